"""Folders of images, one per class: the layout of ImageNet and of torchvision's ImageFolder.

    ROOT/CLASS/anything/below/it.jpg      the image, passed on byte for byte
    ROOT/CLASS/anything/below/it.txt      its caption, if there is one
    ROOT/classes.txt or ROOT/names.json   readable class names, if folders are called n01440764

`classes.txt` has one line per class: the folder, a tab or blank, the names, separated by commas.
`names.json` maps each folder to such a string or to a list of names. The first name is the class's
name, the others are its aliases.
"""

import hashlib
import io
import json
import logging
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

from PIL import Image, UnidentifiedImageError

from groundwork.data.samples import Concept, Sample
from groundwork.data.sources.errors import SourceError

logger = logging.getLogger(__name__)

NAME_FILES: Final = ("classes.txt", "names.json")

#: Pillow's name of what the header says -> extension of the tar member. MPO is a JPEG that carries
#: further pictures after its end, as many cameras write them.
FORMAT_EXTENSIONS: Final = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}

#: What Pillow raises on broken files, beyond OSError.
DECODE_ERRORS: Final = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)

Split = Literal["train", "val"]
OnBad = Callable[[Path, str], None]


@dataclass(frozen=True)
class ImageFolderConfig:
    """Where the images lie and how they are split.

    extensions: of the files that count as images, in any case; what is in them decides the format.
    val_fraction: the expected share of images that go to the split "val".
    captions: "optional" takes the class name where no caption file lies beside the image,
        "required" calls such an image bad, "ignore" takes the class name always.
    skip_bad: pass over bad images and report them, instead of stopping at the first.
    """

    root: Path
    extensions: tuple[str, ...] = ("jpg", "jpeg", "png", "webp")
    val_fraction: float = 0.0
    seed: int = 0
    captions: Literal["optional", "required", "ignore"] = "optional"
    skip_bad: bool = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.val_fraction < 1.0:
            raise SourceError(
                f"ImageFolderConfig: val_fraction is {self.val_fraction} (--val-fraction); "
                "give a number in [0, 1)"
            )
        if self.captions not in ("optional", "required", "ignore"):
            raise SourceError(
                f"ImageFolderConfig: captions is {self.captions!r}; "
                "choose 'optional', 'required' or 'ignore'"
            )
        if not self.extensions:
            raise SourceError("ImageFolderConfig: extensions is empty; name at least one")


def image_folder_concepts(config: ImageFolderConfig) -> list[Concept]:
    """One concept per class folder, labelled in the order of the folders' names.

    A class all of whose images fall into the split "val" counts as held out. Names need not be
    unique: ImageNet itself has two cranes.
    """
    return [concept for concept, _ in _classes(config)]


def image_folder_samples(
    config: ImageFolderConfig, *, on_bad: OnBad | None = None
) -> Iterator[tuple[Split, Sample]]:
    """Read every image, lazily, in the order of folders and paths.

    on_bad: with `skip_bad`, is called with the file and the reason; None logs a warning. The check
    covers the header, and all chunks of a PNG; a JPEG cut short shows only when it is decoded.
    """
    for concept, files in _classes(config):
        for file in files:
            if (sample := _sample_or_skip(config, concept, file, on_bad)) is not None:
                yield _split(config, file), sample


def image_folder_units(
    config: ImageFolderConfig, *, unit_samples: int = 10_000, unit_bytes: int = 256 * 1024**2
) -> list[dict[str, Any]]:
    """The same images in the same order by split, as work units of `build_shards`.

    A unit lists files of one split: [label, class name, path below the root, bytes and time of the
    image, bytes and time of its caption]. It is full when it reaches either limit. Captions and
    `info` are not counted: a writer that is to make one shard of each unit needs some room above
    `unit_bytes`.
    """
    units: list[dict[str, Any]] = []
    present: dict[Split, tuple[dict[str, Any], int]] = {}
    for concept, files in _classes(config):
        for file in files:
            split = _split(config, file)
            unit, size = present.pop(split, ({"split": split, "files": []}, 0))
            if not unit["files"]:
                units.append(unit)
            file_bytes, time = _bytes_and_time(file)
            relative = _relative(config.root, file)
            captioned = _bytes_and_time(file.with_suffix(".txt"))
            unit["files"].append(
                [concept.label, concept.name, relative, file_bytes, time, *captioned]
            )
            size += file_bytes
            if len(unit["files"]) < unit_samples and size < unit_bytes:
                present[split] = unit, size
    return units


def read_image_folder_unit(
    config: ImageFolderConfig, unit: Mapping[str, Any], note: Callable[[str], None]
) -> Iterator[tuple[Split, Sample]]:
    """The samples of a unit. With `skip_bad`, bad files are reported to `note`."""
    skipped = partial(_note_skipped, note)
    for label, name, relative, *_ in unit["files"]:
        file = config.root / relative
        if (sample := _sample_or_skip(config, Concept(label, name), file, skipped)) is not None:
            yield _split(config, file), sample


def _note_skipped(note: Callable[[str], None], file: Path, reason: str) -> None:
    note(f"skipped {file}: {reason}")


def _bytes_and_time(file: Path) -> tuple[int, int]:
    """Size and time of change in ns; zeros for what is not there."""
    try:
        status = file.stat()
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


def _sample_or_skip(
    config: ImageFolderConfig, concept: Concept, file: Path, on_bad: OnBad | None
) -> Sample | None:
    try:
        return _sample(config, concept, file)
    except _BadFileError as error:
        if not config.skip_bad:
            raise SourceError(
                f"{file}: {error}; mend or remove the file, or pass over such files with "
                "--skip-bad (skip_bad: true)"
            ) from error
        if on_bad is None:
            logger.warning("skipped %s: %s", file, error)
        else:
            on_bad(file, str(error))
        return None


class _BadFileError(Exception):
    """Why one file is unusable."""


def _classes(config: ImageFolderConfig) -> list[tuple[Concept, list[Path]]]:
    """The concepts, each with its image files, after checking the layout."""
    root = config.root
    if not root.is_dir():
        raise SourceError(f"image folder {root} is not a directory; give the one above the classes")
    extensions = {f".{e.lstrip('.').casefold()}" for e in config.extensions}
    entries = sorted(entry for entry in root.iterdir() if not entry.name.startswith("."))
    folders = [entry for entry in entries if entry.is_dir()]
    stray = [e for e in entries if not e.is_dir() and e.suffix.casefold() in extensions]
    if stray:
        raise SourceError(
            f"{stray[0]}: {len(stray)} image(s) lie beside the class folders of {root}; move each "
            "into the folder of its class (ROOT/CLASS/image.jpg)"
        )
    if not folders:
        raise SourceError(
            f"image folder {root} has no class folders; lay it out as ROOT/CLASS/image.jpg"
        )
    names = _class_names(root, folders)
    classes = []
    claimed = _real_folders(root)
    for folder in folders:
        other = claimed.setdefault(_identity(folder), folder)
        if other != folder:
            raise SourceError(
                f"class folder {folder} is a link to {other}, so the same pictures would be of two "
                "classes; remove the link"
            )
    for label, folder in enumerate(folders):
        files = sorted(_image_files(folder, extensions, claimed))
        if not files:
            raise SourceError(
                f"class folder {folder} holds no image (looked for "
                f"{', '.join(sorted(extensions))}); remove it, or name its files' extension in "
                "`extensions`"
            )
        concept = Concept(
            label=label,
            name=names[folder.name][0],
            aliases=names[folder.name][1:],
            heldout=all(_split(config, file) == "val" for file in files),
            info={"folder": _printable(folder.name)},
        )
        classes.append((concept, files))
    return classes


def _real_folders(root: Path) -> dict[tuple[int, int], Path]:
    """Every folder that is reached without following a link, and the path that leads to it."""
    folders = {_identity(root): root}
    for parent, names, _ in os.walk(root):
        real = [path for path in (Path(parent, name) for name in names) if not path.is_symlink()]
        folders.update((_identity(path), path) for path in real)
    return folders


def _image_files(
    folder: Path, extensions: set[str], claimed: dict[tuple[int, int], Path]
) -> Iterator[Path]:
    """Image files at any depth. Links are followed, but no folder is read by a second path.

    claimed: the path by which each folder is read; grows by the targets of links. A link to an
    ancestor would go round in a circle, one to another class show its pictures under two names.
    """
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            if claimed.setdefault(_identity(entry), entry) == entry:
                yield from _image_files(entry, extensions, claimed)
        elif entry.suffix.casefold() in extensions:
            yield entry


def _identity(folder: Path) -> tuple[int, int]:
    """What tells a folder whatever the path that leads to it."""
    status = folder.stat()
    return status.st_dev, status.st_ino


def _class_names(root: Path, folders: list[Path]) -> Mapping[str, tuple[str, ...]]:
    """Folder -> its names, from the names file if there is one, else from the folder itself."""
    found = [root / name for name in NAME_FILES if (root / name).is_file()]
    if not found:
        return {f.name: (_printable(f.name).replace("_", " ").strip(),) for f in folders}
    if len(found) > 1:
        raise SourceError(f"{found[0]} and {found[1]} both name the classes; remove one of them")
    file = found[0]
    try:
        text = file.read_text(encoding="utf-8-sig")
        names = _names_from_json(text) if file.suffix == ".json" else _names_from_lines(text)
    except (_BadFileError, ValueError) as error:
        raise SourceError(
            f"{file}: {error}; write 'FOLDER name, other name' on each line of classes.txt, or "
            '{"FOLDER": ["name", "other name"]} in names.json'
        ) from error
    for folder in folders:
        if not names.get(folder.name):
            raise SourceError(
                f"{file} has no name for the class folder {folder.name!r}; add one, or remove the "
                "file to use the folders' names"
            )
    return names


def _names_from_lines(text: str) -> dict[str, tuple[str, ...]]:
    names = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        # A tab comes first, because with it a folder's name may hold blanks.
        folder, _, listed = line.strip().partition("\t" if "\t" in line else " ")
        if folder in names:
            raise _BadFileError(f"line {number} names {folder!r} a second time")
        names[folder] = _synonyms(listed.split(","))
    return names


def _names_from_json(text: str) -> dict[str, tuple[str, ...]]:
    table = json.loads(text)
    if not isinstance(table, dict):
        raise _BadFileError(f"holds a {type(table).__name__}, expected an object")
    names = {}
    for folder, listed in table.items():
        if isinstance(listed, str):
            names[folder] = _synonyms(listed.split(","))
        elif isinstance(listed, list) and all(isinstance(name, str) for name in listed):
            names[folder] = _synonyms(listed)
        else:
            raise _BadFileError(f"{folder!r} maps to {listed!r}, expected a string or strings")
    return names


def _synonyms(listed: list[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in listed if name.strip()))


def _sample(config: ImageFolderConfig, concept: Concept, file: Path) -> Sample:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise _BadFileError(f"cannot be read: {error.strerror or error}") from error
    image_format, (width, height) = _check_image(data)
    return Sample(
        key=_key(config.root, file),
        image=data,
        image_format=image_format,
        text=_caption(config, file) or concept.name,
        info={
            "label": concept.label,
            "name": concept.name,
            "path": _printable(_relative(config.root, file)),
            "split": _split(config, file),
            "width": width,
            "height": height,
        },
    )


def _check_image(data: bytes) -> tuple[str, tuple[int, int]]:
    """The extension that the content deserves, and (width, height).

    The file's own extension does not count: ImageNet has a PNG called .JPEG.
    """
    if not data:
        raise _BadFileError("is empty")
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
            found, size = image.format, image.size
            image.verify()
    except UnidentifiedImageError as error:
        # its own message names an address in memory
        raise _BadFileError("is neither a JPEG, nor a PNG, nor a WebP image") from error
    except DECODE_ERRORS as error:
        raise _BadFileError(f"is not a readable JPEG, PNG or WebP image ({error})") from error
    return FORMAT_EXTENSIONS[str(found)], size


def _caption(config: ImageFolderConfig, file: Path) -> str:
    """The text beside the image; empty where there is none and none is required."""
    if config.captions == "ignore":
        return ""
    caption_file = file.with_suffix(".txt")
    try:
        caption = caption_file.read_text(encoding="utf-8-sig").strip()
    except FileNotFoundError:
        caption = ""
    except (OSError, UnicodeDecodeError) as error:
        raise _BadFileError(f"its caption {caption_file.name} cannot be read: {error}") from error
    if not caption and config.captions == "required":
        raise _BadFileError(f"has no caption (looked for {caption_file.name}, not empty)")
    return caption


def _split(config: ImageFolderConfig, file: Path) -> Split:
    """Judge each file by itself, so that new files do not move old ones between the splits."""
    digest = _digest(f"{config.seed}:{_relative(config.root, file)}")
    return "val" if int(digest[:16], 16) < config.val_fraction * 2**64 else "train"


def _key(root: Path, file: Path) -> str:
    """A readable beginning, and a digest that keeps a/b.jpg, a_b.jpg and a/b.png apart."""
    relative = _relative(root, file)
    readable = re.sub(r"[^A-Za-z0-9_-]", "_", relative.rpartition(".")[0].replace("/", "-"))
    return f"{readable[:64]}-{_digest(relative)[:12]}"


def _digest(text: str) -> str:
    return hashlib.sha256(os.fsencode(text)).hexdigest()


def _relative(root: Path, file: Path) -> str:
    return file.relative_to(root).as_posix()


def _printable(path: str) -> str:
    """File names need not be UTF-8, but JSON and captions must be."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
