import io
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from groundwork.data.samples import Sample, sample_from_fields
from groundwork.data.sources.errors import SourceError
from groundwork.data.sources.image_folder import (
    ImageFolderConfig,
    image_folder_concepts,
    image_folder_samples,
)


def encoded(image_format: str = "JPEG", colour: int = 0, size: tuple[int, int] = (6, 4)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (colour, 80, 160)).save(buffer, image_format)
    return buffer.getvalue()


def put(file: Path, data: bytes | str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data.encode() if isinstance(data, str) else data)
    return file


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    put(root / "red_fox" / "0001.JPEG", encoded(colour=1))
    put(root / "red_fox" / "0001.png", encoded("PNG", colour=2))
    put(root / "red_fox" / "deeper" / "a b.c.jpg", encoded(colour=3, size=(9, 7)))
    put(root / "owl" / "0001.jpg", encoded(colour=4))
    put(root / "owl" / "0002.webp", encoded("WEBP", colour=5))
    put(root / "owl" / "notes.md", "not an image")
    put(root / "owl" / "._0001.jpg", "what macOS leaves behind")
    return root


def read(config: ImageFolderConfig) -> list[Sample]:
    return [sample for _, sample in image_folder_samples(config)]


def test_classes_are_labelled_in_the_order_of_their_folders(root: Path) -> None:
    concepts = image_folder_concepts(ImageFolderConfig(root))
    assert [(c.label, c.name, c.info["folder"]) for c in concepts] == [
        (0, "owl", "owl"),
        (1, "red fox", "red_fox"),
    ]
    assert not any(c.heldout for c in concepts)


def test_files_pass_byte_for_byte_in_sorted_order(root: Path) -> None:
    samples = read(ImageFolderConfig(root))
    assert [s.info["path"] for s in samples] == [
        "owl/0001.jpg",
        "owl/0002.webp",
        "red_fox/0001.JPEG",
        "red_fox/0001.png",
        "red_fox/deeper/a b.c.jpg",
    ]
    assert [s.image for s in samples] == [(root / s.info["path"]).read_bytes() for s in samples]
    assert [s.image_format for s in samples] == ["jpg", "webp", "jpg", "png", "jpg"]
    assert [s.text for s in samples] == ["owl"] * 2 + ["red fox"] * 3
    assert [s.info["label"] for s in samples] == [0, 0, 1, 1, 1]
    assert (samples[-1].info["width"], samples[-1].info["height"]) == (9, 7)
    assert samples == read(ImageFolderConfig(root))


def test_keys_stay_apart_where_names_nearly_meet(tmp_path: Path) -> None:
    names = ["a/b.jpg", "a/b.png", "a/b.c.jpg", "a/b c.jpg", "a/b_c.jpg", "a/b/c.jpg", "a-b/c.jpg"]
    names += ["a/\N{GREEK SMALL LETTER ALPHA}.jpg", "a/\N{GREEK SMALL LETTER BETA}.jpg"]
    names += ["a/" + "x" * 200 + end for end in ("1.jpg", "2.jpg")]
    for name in names:
        put(tmp_path / name, encoded())
    keys = [s.key for s in read(ImageFolderConfig(tmp_path))]
    assert len(set(keys)) == len(names)
    assert all(len(key) <= 90 and key.isascii() for key in keys)


def test_content_decides_the_format_not_the_extension(tmp_path: Path) -> None:
    # As n02105855_2933.JPEG of ImageNet, which is a PNG.
    put(tmp_path / "dog" / "n02105855_2933.JPEG", encoded("PNG"))
    assert [s.image_format for s in read(ImageFolderConfig(tmp_path))] == ["png"]


@pytest.mark.parametrize(
    "file, text",
    [
        ("classes.txt", "red_fox red fox, Vulpes vulpes\n\nowl\tbird of Minerva , owl\n"),
        ("names.json", json.dumps({"owl": "bird of Minerva, owl", "red_fox": ["red fox",
            "Vulpes vulpes"], "wolf": "wolf"})),
    ],
)  # fmt: skip
def test_a_names_file_gives_names_and_synonyms(root: Path, file: str, text: str) -> None:
    put(root / file, text)
    concepts = image_folder_concepts(ImageFolderConfig(root))
    assert [(c.name, c.aliases) for c in concepts] == [
        ("bird of Minerva", ("owl",)),
        ("red fox", ("Vulpes vulpes",)),
    ]
    assert read(ImageFolderConfig(root))[0].text == "bird of Minerva"


@pytest.mark.parametrize(
    "files, complaint",
    [
        ({"classes.txt": "owl owl\n"}, "no name for the class folder 'red_fox'"),
        ({"classes.txt": "owl owl\nred_fox\n"}, "no name for the class folder 'red_fox'"),
        ({"classes.txt": "owl a\nowl b\nred_fox c"}, "line 2 names 'owl' a second time"),
        ({"names.json": "[1]"}, "holds a list"),
        ({"names.json": "{"}, "names.json: "),
        ({"names.json": '{"owl": 3}'}, "'owl' maps to 3"),
        ({"names.json": "{}", "classes.txt": ""}, "both name the classes"),
    ],
)
def test_a_wrong_names_file_is_reported(root: Path, files: dict[str, str], complaint: str) -> None:
    for name, text in files.items():
        put(root / name, text)
    with pytest.raises(SourceError, match=complaint) as error:
        image_folder_concepts(ImageFolderConfig(root))
    assert str(root) in str(error.value)


def test_a_text_beside_the_image_is_its_caption(root: Path) -> None:
    put(root / "owl" / "0002.txt", "\ufeffan owl, café window\n")
    put(root / "red_fox" / "deeper" / "a b.c.txt", "a fox asleep")
    put(root / "owl" / "0001.txt", " \n")
    texts = [s.text for s in read(ImageFolderConfig(root))]
    assert texts == ["owl", "an owl, café window", "red fox", "red fox", "a fox asleep"]
    ignoring = ImageFolderConfig(root, captions="ignore")
    assert [s.text for s in read(ignoring)] == ["owl"] * 2 + ["red fox"] * 3
    with pytest.raises(SourceError, match=r"owl/0001.jpg: has no caption"):
        read(ImageFolderConfig(root, captions="required"))


BAD = {
    "owl/0003.jpg": b"",
    "owl/0004.jpg": b"<html>not found</html>",
    "owl/0005.png": encoded("PNG")[:40],
    "owl/0006.jpg": encoded("GIF"),
    "owl/0007.png": encoded("PNG").replace(b"IDAT", b"IDAX"),
    "owl/0008.jpg": encoded()[:20],
}


@pytest.mark.parametrize("name", BAD)
def test_an_undecodable_file_is_named_with_the_remedy(root: Path, name: str) -> None:
    put(root / name, BAD[name])
    with pytest.raises(SourceError, match="--skip-bad") as error:
        read(ImageFolderConfig(root))
    assert str(root / name) in str(error.value)


def test_skip_bad_passes_over_bad_files_and_lists_them(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = read(ImageFolderConfig(root))
    for name, data in BAD.items():
        put(root / name, data)
    (root / "owl" / "0009.jpg").symlink_to(root / "nowhere.jpg")
    put(root / "red_fox" / "0002.jpg", encoded())
    put(root / "red_fox" / "0002.txt", b"\xff\xfe\xff caption")
    expected = [root / name for name in (*BAD, "owl/0009.jpg", "red_fox/0002.jpg")]

    bad: list[tuple[Path, str]] = []
    config = ImageFolderConfig(root, skip_bad=True)
    samples = [
        sample
        for _, sample in image_folder_samples(config, on_bad=lambda f, why: bad.append((f, why)))
    ]
    assert samples == good
    assert [file for file, _ in bad] == expected
    assert all(reason for _, reason in bad)

    assert read(config) == good
    assert all(str(file) in caplog.text for file in expected)


def test_links_are_followed_but_never_in_a_circle(root: Path, tmp_path: Path) -> None:
    elsewhere = put(tmp_path / "elsewhere" / "0007.jpg", encoded()).parent
    (root / "wolf").symlink_to(elsewhere)
    (elsewhere / "again").symlink_to(root / "wolf")
    (root / "owl" / "up").symlink_to(root)
    paths = [s.info["path"] for s in read(ImageFolderConfig(root))]
    assert paths.count("wolf/0007.jpg") == 1
    assert not any("again" in path for path in paths if path.startswith("wolf/"))


def test_a_link_gives_no_picture_to_a_second_class(root: Path, tmp_path: Path) -> None:
    inner = put(root / "owl" / "deep" / "0008.jpg", encoded()).parent
    outside = put(tmp_path / "outside" / "0009.jpg", encoded()).parent
    first = min(folder for folder in root.iterdir() if folder.is_dir())
    (first / "a").symlink_to(inner)
    (first / "b").symlink_to(outside)
    (root / "owl" / "c").symlink_to(outside)
    paths = [s.info["path"] for s in read(ImageFolderConfig(root))]
    assert [path for path in paths if path.endswith(("0008.jpg", "0009.jpg"))] == [
        f"{first.name}/b/0009.jpg",
        "owl/deep/0008.jpg",
    ]
    (root / "zebra").symlink_to(root / "owl")
    with pytest.raises(SourceError, match=r"zebra is a link to .*owl, so the same pictures"):
        read(ImageFolderConfig(root))


@pytest.mark.parametrize(
    ("content", "reason"), [(b"", "is empty"), (b"no picture", "is neither a JPEG")]
)
def test_what_is_no_picture_is_told_alike_every_time(
    root: Path, content: bytes, reason: str
) -> None:
    put(root / "owl" / "0000.jpg", content)
    with pytest.raises(SourceError, match=rf"0000\.jpg: {reason}") as caught:
        read(ImageFolderConfig(root))
    assert "0x" not in str(caught.value)


def test_names_that_are_not_utf8_still_make_samples(root: Path) -> None:
    strange = os.fsencode(root / "owl") + b"/\xff\xfe.jpg"
    try:
        Path(os.fsdecode(strange)).write_bytes(encoded())
    except OSError:
        pytest.skip("this file system holds UTF-8 names only")
    sample = read(ImageFolderConfig(root))[-4]
    assert sample.info["path"] == "owl/\\xff\\xfe.jpg"
    assert sample_from_fields(sample.key, sample.fields()).info == sample.info


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31 - 1))
def test_splits_are_complete_and_keep_their_files_when_files_are_added(
    tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    root = tmp_path_factory.mktemp("split")
    config = ImageFolderConfig(root, val_fraction=0.5, seed=seed)
    for number in range(0, 40, 2):
        put(root / "owl" / f"{number}.jpg", encoded())
    before = {s.key: split for split, s in image_folder_samples(config)}
    for number in range(1, 40, 2):
        put(root / "owl" / f"{number}.jpg", encoded())
    after = {s.key: split for split, s in image_folder_samples(config)}
    assert before.items() <= after.items()
    assert len(after) == 40
    assert 5 <= list(after.values()).count("val") <= 35


def test_a_class_without_training_images_is_held_out(root: Path) -> None:
    for seed in range(20):
        config = ImageFolderConfig(root, val_fraction=0.5, seed=seed)
        trained = {s.info["label"] for split, s in image_folder_samples(config) if split == "train"}
        for concept in image_folder_concepts(config):
            assert concept.heldout == (concept.label not in trained)


def test_a_wrong_layout_is_reported_with_the_remedy(root: Path, tmp_path: Path) -> None:
    def complaint(at: Path) -> str:
        with pytest.raises(SourceError) as error:
            read(ImageFolderConfig(at))
        return str(error.value)

    assert "is not a directory" in complaint(root / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "has no class folders" in complaint(tmp_path / "empty")
    (root / "wolf").mkdir()
    assert f"{root / 'wolf'} holds no image" in complaint(root)
    stray = put(root / "stray.JPG", encoded())
    assert f"{stray}: 1 image(s) lie beside the class folders" in complaint(root)


def test_impossible_settings_are_refused_by_name(tmp_path: Path) -> None:
    for wrong in ({"val_fraction": 1.0}, {"captions": "some"}, {"extensions": ()}):
        with pytest.raises(ValueError, match=f"ImageFolderConfig: {next(iter(wrong))} is"):
            ImageFolderConfig(tmp_path, **wrong)
