"""A sample: what a source yields, what a tar holds, what a decoder receives."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from groundwork.data.diagnosis import Diagnosis

#: Tar extensions that hold an encoded image, in the order in which a reader looks for them.
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")

#: Extensions of further members: lower case, several parts allowed (`depth.png`, `seg.npz`).
MEMBER = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)*")
#: What no key has.
NOT_IN_KEYS = re.compile(r"[./\\ \t\n]")
#: Extensions whose usual decoders run code of the file. Such members are neither written nor read.
UNSAFE_EXTENSIONS = frozenset(
    ("pyd", "pkl", "pickle", "pth", "pt", "ckpt", "joblib", "dill", "bin", "h5", "hdf5", "marshal")
)

#: Label of a sample that belongs to no class.
NO_CLASS = -1
#: Labels travel as int64.
MAX_LABEL = 2**63 - 1


#: What the keys of foreign tars may have and those of samples may not.
_UNFIT_FOR_KEYS = re.compile(r"[./\\\s]")


class SampleError(ValueError):
    """A sample that cannot be used; the message says what is wrong with it, the diagnosis which
    of the known faults that is."""

    def __init__(self, message: str, diagnosis: Diagnosis = Diagnosis.UNUSABLE) -> None:
        super().__init__(message)
        self.diagnosis = diagnosis


@dataclass(frozen=True, slots=True)
class Sample:
    """One image with its text, still encoded.

    key: unique inside its data set; becomes the stem of the tar members, so it holds neither
        dots, slashes nor blanks.
    image: the encoded file, `image_format` its extension (one of IMAGE_EXTENSIONS). Both empty in a
        sample without a still image, such as a clip.
    text: the caption or the class name.
    info: what else is known, JSON-serialisable. `label` (int) is the class index where the sample
        belongs to a class; sources add their own fields.
    members: further files by extension, still encoded: depth maps, masks, clips. A name has several
        parts where a sample holds several files of one format (`depth.png`, `instances.png`).
    """

    key: str
    image: bytes
    image_format: str
    text: str
    info: Mapping[str, Any] = field(default_factory=dict)
    members: Mapping[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.key or NOT_IN_KEYS.search(self.key):
            raise SampleError(
                f"sample key {self.key!r}: a key is not empty and has no '.', '/', '\\' or blanks: "
                "because it becomes the stem of tar member names",
                Diagnosis.BAD_KEY,
            )
        if (self.image or not self.members) and self.image_format not in IMAGE_EXTENSIONS:
            raise SampleError(
                f"sample {self.key!r}: image format {self.image_format!r} is not one of "
                f"{', '.join(IMAGE_EXTENSIONS)}"
            )
        for name in self.members:
            if not is_member_name(name):
                raise SampleError(
                    f"sample {self.key!r}: member {name!r}: expected an extension in lower case "
                    "that is none of the sample's own (image, txt, json) and of no format that "
                    "can hold code"
                )

    def fields(self) -> dict[str, bytes]:
        """The tar members of this sample: extension -> bytes."""
        return {
            **({self.image_format: self.image} if self.image else {}),
            "txt": self.text.encode("utf-8"),
            "json": json.dumps(self.info, ensure_ascii=False, sort_keys=True).encode("utf-8"),
            **dict(sorted(self.members.items())),
        }


@lru_cache(4096)  # asked for each member of each sample; there are few names
def is_member_name(extension: str) -> bool:
    """Whether `Sample.members` may hold a file of this extension."""
    return (
        MEMBER.fullmatch(extension) is not None
        and extension not in (*IMAGE_EXTENSIONS, "txt", "json")
        and not UNSAFE_EXTENSIONS.intersection(extension.split("."))
    )


def class_label(sample: Sample) -> int:
    """The class index of a sample, or NO_CLASS. Raises SampleError where it is neither."""
    label = sample.info.get("label", NO_CLASS)
    if type(label) is not int or not NO_CLASS <= label <= MAX_LABEL:
        raise SampleError(
            f"json.label is {repr(label)[:60]}; expected a class index, or {NO_CLASS} for none",
            Diagnosis.BAD_LABEL,
        )
    return label


@dataclass(frozen=True, slots=True)
class Concept:
    """One class of a data set: what zero-shot evaluation chooses among.

    label: the class index used in `Sample.info["label"]`.
    name: the name used in prompts; aliases: other names of the same thing.
    heldout: True where no sample of the training split shows it.
    """

    label: int
    name: str
    aliases: tuple[str, ...] = ()
    heldout: bool = False
    info: Mapping[str, Any] = field(default_factory=dict)


def sample_key(name: str) -> str:
    """A key of a foreign tar as `Sample.key` may be."""
    return _UNFIT_FOR_KEYS.sub("_", name)


def sample_from_fields(key: str, fields: Mapping[str, bytes]) -> Sample:
    """Read a sample back from its tar members.

    `txt` and `json` may be missing (plain image tars have neither), the image too where there are
    other members. These are passed on as they are, never decoded; formats that can hold code are
    left out. Raises SampleError naming the member at fault.
    """
    members = {name: content for name, content in fields.items() if is_member_name(name)}
    image_format = next((e for e in IMAGE_EXTENSIONS if e in fields), "")
    if not image_format and not members:
        raise SampleError(
            f"no image member (looked for {', '.join(IMAGE_EXTENSIONS)}; "
            f"found {', '.join(sorted(fields)) or 'nothing'})",
            Diagnosis.MISSING_IMAGE,
        )
    try:
        text = fields.get("txt", b"").decode("utf-8")
    except UnicodeDecodeError as error:
        raise SampleError(f"member 'txt' is not UTF-8: {error}", Diagnosis.BAD_TEXT) from error
    try:
        info = json.loads(fields["json"]) if "json" in fields else {}
    except ValueError as error:
        raise SampleError(f"member 'json' is not JSON: {error}", Diagnosis.BAD_JSON) from error
    except RecursionError as error:
        message = "member 'json' is nested too deeply"
        raise SampleError(message, Diagnosis.BAD_JSON) from error
    if not isinstance(info, dict):
        raise SampleError(
            f"member 'json' holds a {type(info).__name__}, expected an object", Diagnosis.BAD_JSON
        )
    return Sample(key, fields.get(image_format, b""), image_format, text, info, members)
