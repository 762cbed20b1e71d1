import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from groundwork.data.dataset import open_dataset
from groundwork.data.samples import Concept, Sample
from groundwork.data.shard_builder import Progress, build_shards, parts_folder
from groundwork.data.shard_index import ShardError
from groundwork.data.shards import Manifest, is_data_set, read_manifest, write_shards
from groundwork.data.sources.emoji import (
    EmojiConfig,
    emoji_concepts,
    emoji_samples,
    emoji_units,
    read_emoji_unit,
)
from groundwork.data.sources.errors import SourceError
from groundwork.data.sources.image_folder import (
    ImageFolderConfig,
    image_folder_concepts,
    image_folder_samples,
    image_folder_units,
    read_image_folder_unit,
)

UNITS = [["train", 0, 5], ["val", 5, 7], ["train", 7, 12], ["train", 12, 12]]


def read_range(unit: list[Any], note: Callable[[str], None]) -> Iterator[tuple[str, Sample]]:
    split, begin, end = unit
    for i in range(begin, end):
        yield split, Sample(f"k{i}", bytes([i]) * (i + 1), "jpg", f"text {i}", {"label": i})
    note(f"read {begin} to {end}")


def build(units: Any, read: Any, out: Path, **options: Any) -> Manifest:
    return build_shards(
        units, read, out, **{"name": "n", "source": {"kind": "t"}, "licence": "CC0", **options}
    )


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def inodes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in folder.glob("*.tar")}


def test_samples_come_in_the_order_of_the_units(tmp_path: Path) -> None:
    manifest = build(UNITS, read_range, tmp_path / "out", max_samples=3)
    assert [s.samples for s in manifest.splits["train"]] == [3, 2, 3, 2]
    assert [s.samples for s in manifest.splits["val"]] == [2]
    assert read_manifest(tmp_path / "out") == manifest
    assert is_data_set(tmp_path / "out")
    dataset = open_dataset(str(tmp_path / "out"))
    assert [dataset.read(i).text for i in range(len(dataset))] == [
        f"text {i}" for i in (*range(5), *range(7, 12))
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_one_unit_gives_what_the_plain_writer_gives(tmp_path: Path) -> None:
    concepts = [Concept(0, "a")]
    build([["train", 0, 9]], read_range, tmp_path / "a", max_samples=4, concepts=concepts)
    samples = read_range(["train", 0, 9], print)
    options: dict[str, Any] = {"name": "n", "source": {"kind": "t"}, "licence": "CC0"}
    write_shards(samples, tmp_path / "b", max_samples=4, concepts=concepts, **options)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def picture(value: int, size: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, 8), (value, 0, 99)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    root = tmp_path / "pictures"
    for i in range(24):
        file = root / f"class_{i % 3}" / f"{i:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture(i))
    return root


def build_pictures(root: Path, out: Path, *, unit_samples: int = 5, **options: Any) -> Manifest:
    config = ImageFolderConfig(root, val_fraction=0.3, skip_bad=options.pop("skip_bad", False))
    return build(
        image_folder_units(config, unit_samples=unit_samples),
        partial(read_image_folder_unit, config),
        out,
        **{"concepts": image_folder_concepts(config), **options},
    )


def test_the_number_of_workers_leaves_no_trace(pictures: Path, tmp_path: Path) -> None:
    for workers in (1, 3):
        build_pictures(pictures, tmp_path / str(workers), workers=workers)
    assert files(tmp_path / "1") == files(tmp_path / "3")
    assert len(read_manifest(tmp_path / "1").splits["train"]) > 2


def test_units_of_an_image_folder_hold_what_its_samples_are(pictures: Path, tmp_path: Path) -> None:
    (pictures / "class_0" / "00.txt").write_text("a caption")
    build_pictures(pictures, tmp_path / "out")
    expected = list(image_folder_samples(ImageFolderConfig(pictures, val_fraction=0.3)))
    for split in ("train", "val"):
        dataset = open_dataset(str(tmp_path / "out"), split)
        read = [dataset.read(i) for i in range(len(dataset))]
        assert read == [sample for name, sample in expected if name == split]


def test_units_of_an_image_folder_are_full_by_count_or_bytes(pictures: Path) -> None:
    (pictures / "class_1" / "large.png").write_bytes(picture(9, 4000) + bytes(10**6))
    config = ImageFolderConfig(pictures)
    by_count = [len(u["files"]) for u in image_folder_units(config, unit_samples=10)]
    assert by_count == [10, 10, 5]
    units = image_folder_units(config, unit_bytes=10**6)
    assert [u["files"][-1][2] for u in units] == ["class_1/large.png", "class_2/23.png"]


def test_units_of_emoji_hold_what_its_samples_are(tmp_path: Path) -> None:
    codes = tuple(range(0x1F600, 0x1F60C))
    config = EmojiConfig(image_size=16, renderings=3, heldout_renderings=1, code_points=codes)
    units = emoji_units(config, unit_samples=4)
    assert len(units) > 4
    concepts = emoji_concepts(config)
    build(units, partial(read_emoji_unit, config), tmp_path / "out", concepts=concepts)
    expected = list(emoji_samples(config))
    assert {split for split, _ in expected} == set(read_manifest(tmp_path / "out").splits)
    for split in read_manifest(tmp_path / "out").splits:
        dataset = open_dataset(str(tmp_path / "out"), split)
        read = [(s.key, s.fields()) for s in map(dataset.read, range(len(dataset)))]
        assert read == [(s.key, s.fields()) for name, s in expected if name == split]


class SourceBrokeError(Exception):
    pass


def breaking(unit: list[Any], note: Callable[[str], None]) -> Iterator[tuple[str, Sample]]:
    yield from read_range(unit, note)
    if unit[1] == 7:
        raise SourceBrokeError


def test_after_an_error_only_what_is_missing_is_built(tmp_path: Path) -> None:
    out, notes = tmp_path / "out", []
    with pytest.raises(SourceBrokeError):
        build(UNITS, breaking, out, on_note=notes.append, max_samples=3)
    assert notes[:2] == ["read 0 to 5", "read 5 to 7"]
    assert notes[2].startswith(f"2 of 4 units are finished and kept in {parts_folder(out)}")
    assert not out.exists()
    kept = set(inodes(parts_folder(out)).values())
    seen: list[Progress] = []
    notes.clear()
    build(UNITS, read_range, out, on_progress=seen.append, on_note=notes.append, max_samples=3)
    assert [p.resumed for p in seen] == [1, 2, 2, 2]
    assert seen[-1] == Progress(units=4, total_units=4, samples=12, resumed=2)
    assert notes == ["read 0 to 5", "read 5 to 7", "read 7 to 12", "read 12 to 12"]
    made = inodes(out)
    assert {made[f"train-00000{i}.tar"] for i in (0, 1)} | {made["val-000000.tar"]} <= kept
    build(UNITS, read_range, tmp_path / "undisturbed", max_samples=3)
    assert files(out) == files(tmp_path / "undisturbed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "undisturbed"]


@pytest.mark.parametrize("units_done", [1, 3, 4])
def test_whatever_ends_a_build_the_next_goes_on(units_done: int, tmp_path: Path) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.units == units_done:
            raise KeyboardInterrupt

    notes: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        build(UNITS, read_range, tmp_path / "out", on_progress=interrupt, on_note=notes.append)
    assert notes[-1].startswith(f"{units_done} of 4 units are finished and kept")
    assert [path.name for path in tmp_path.iterdir()] == [".out.parts"]
    seen: list[Progress] = []
    build(UNITS, read_range, tmp_path / "out", on_progress=seen.append)
    assert seen[-1].resumed == units_done
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_builds_of_one_data_set_do_not_mix(tmp_path: Path) -> None:
    def meddle(progress: Progress) -> None:
        if progress.units == 2:
            with pytest.raises(ShardError, match="another process is writing this folder"):
                build(UNITS, read_range, tmp_path / "out")

    build(UNITS, read_range, tmp_path / "out", on_progress=meddle)
    assert read_manifest(tmp_path / "out").samples("train") == 10


def unfinished(out: Path, **options: Any) -> Path:
    with pytest.raises(SourceBrokeError):
        build(UNITS, breaking, out, **options)
    return parts_folder(out)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 1
    file.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "a flipped bit": lambda parts: [flip(f) for f in parts.glob("*.tar")] and None,
    "a flipped bit in a side-car": lambda parts: [flip(f) for f in parts.glob("*.idx")] and None,
    "a flipped bit in the hashes": lambda parts: [flip(f) for f in parts.glob("*.hashes")] and None,
    "a missing tar": lambda parts: next(parts.glob("*.train-000000.tar")).unlink(),
    "an empty journal": lambda parts: [f.write_bytes(b"") for f in parts.glob("*.json")] and None,
    "another journal": lambda parts: [f.write_text("[1]") for f in parts.glob("*.json")] and None,
    "a foreign file": lambda parts: (parts / "x").write_bytes(b"") and None,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_leftovers_are_built_again(damage: str, tmp_path: Path) -> None:
    DAMAGES[damage](unfinished(tmp_path / "out"))
    build(UNITS, read_range, tmp_path / "out")
    build(UNITS, read_range, tmp_path / "undisturbed")
    assert files(tmp_path / "out") == files(tmp_path / "undisturbed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "undisturbed"]


@pytest.mark.parametrize("change", [{"max_samples": 4}, {"source": {"kind": "other"}}])
def test_shards_of_other_settings_are_not_taken_over(
    change: dict[str, Any], tmp_path: Path
) -> None:
    unfinished(tmp_path / "out")
    seen: list[Progress] = []
    build(UNITS, read_range, tmp_path / "out", on_progress=seen.append, **change)
    assert seen[-1].resumed == 0


def test_mending_a_file_builds_its_shard_again(pictures: Path, tmp_path: Path) -> None:
    config = ImageFolderConfig(pictures, val_fraction=0.3)
    bad = pictures / image_folder_units(config, unit_samples=5)[-1]["files"][-1][2]
    good = bad.read_bytes()
    bad.write_bytes(b"<html>")
    with pytest.raises(SourceError, match=rf"{bad.name}: is neither"):
        build_pictures(pictures, tmp_path / "out")
    bad.write_bytes(good)
    seen: list[Progress] = []
    build_pictures(pictures, tmp_path / "out", on_progress=seen.append)
    assert seen[-1].resumed == seen[-1].total_units - 1 > 2
    build_pictures(pictures, tmp_path / "undisturbed")
    assert files(tmp_path / "out") == files(tmp_path / "undisturbed")


def test_bad_files_are_skipped_and_named(pictures: Path, tmp_path: Path) -> None:
    (pictures / "class_2" / "23.png").write_bytes(b"<html>")
    notes: list[str] = []
    build_pictures(pictures, tmp_path / "out", skip_bad=True, on_note=notes.append, workers=2)
    assert len(notes) == 1
    assert notes[0].startswith(f"skipped {pictures / 'class_2' / '23.png'}: is neither")


FAILURES: list[tuple[Any, Any, str]] = [
    ([], read_range, "yielded no sample"),
    ([["train", 3, 3]], read_range, "yielded no sample"),
    ([["train", 0, 3], ["train", 5, 6], ["train", 2, 4]], read_range, "key 'k2' twice in split"),
    ([["train", 0, 3], ["train", 0, 3]], read_range, "lists a unit twice"),
    ([["../x", 0, 3]], read_range, r"split '\.\./x'"),
]


@pytest.mark.parametrize(("units", "read", "message"), FAILURES)
def test_what_cannot_be_a_data_set_is_refused(
    units: Any, read: Any, message: str, tmp_path: Path
) -> None:
    write_shards(
        read_range(["train", 0, 2], print), tmp_path / "out", name="n", source={}, licence="l"
    )
    before = files(tmp_path / "out")
    with pytest.raises(ShardError, match=message):
        build(units, read, tmp_path / "out")
    assert files(tmp_path / "out") == before


def test_a_key_may_come_in_two_splits(tmp_path: Path) -> None:
    build([["train", 0, 3], ["val", 0, 3]], read_range, tmp_path / "out")
    assert read_manifest(tmp_path / "out").samples("val") == 3


def test_a_file_system_without_links_is_used_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    build(UNITS, read_range, tmp_path / "linked")
    monkeypatch.setattr(os, "link", unsupported)
    build(UNITS, read_range, tmp_path / "moved")
    assert files(tmp_path / "moved") == files(tmp_path / "linked")


READER = """
import os, time
from groundwork.data.samples import Sample

def read(unit, note):
    split, begin, end, trouble = unit
    for i in range(begin, end):
        yield split, Sample(f"k{i}", b"x" * i, "jpg", f"text {i}")
    if trouble == "die" and not os.path.exists("survive"):
        os._exit(9)
    if trouble == "hang" and not os.path.exists("survive"):
        time.sleep(600)
"""
BUILDER = """
import sys
from pathlib import Path
from groundwork.data.shard_builder import build_shards
from unit_reader_of_test import read

if __name__ == "__main__":
    units = [["train", i, i + 5, "hang" if i == 15 else ""] for i in range(0, 40, 5)]
    show = lambda progress: print(progress.units, progress.resumed, flush=True)
    build_shards(units, read, Path("out"), name="n", source={}, licence="l", workers=2,
                 on_progress=show)
"""


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A reader of units that worker processes can import."""
    (tmp_path / "unit_reader_of_test.py").write_text(READER)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("unit_reader_of_test", None)
    import unit_reader_of_test

    return unit_reader_of_test.read


def test_a_worker_that_dies_ends_the_build_with_a_message(reader: Any, tmp_path: Path) -> None:
    units = [["train", 0, 5, ""], ["train", 5, 9, "die"]]
    with pytest.raises(ShardError, match="a worker process died, most likely because memory"):
        build(units, reader, tmp_path / "out", workers=2)
    (tmp_path / "survive").touch()
    build(units, reader, tmp_path / "out", workers=2)
    assert read_manifest(tmp_path / "out").samples("train") == 9


def start_builder(folder: Path, **options: Any) -> subprocess.Popen[str]:
    (folder / "builder.py").write_text(BUILDER)
    namespace = str(Path(__file__).parents[1] / "namespace")
    return subprocess.Popen(
        [sys.executable, "builder.py"],
        cwd=folder,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": namespace},
        **options,
    )


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_build_holds_nothing_that_outlives_the_kill_of_its_process_group(
    reader: Any, tmp_path: Path
) -> None:
    killed = start_builder(tmp_path, start_new_session=True)
    assert killed.stdout is not None
    assert killed.stdout.readline() == "1 0\n"
    builder = psutil.Process(killed.pid)
    group = [builder, *builder.children(recursive=True)]
    try:
        mapped = {Path(m.path).name for process in group for m in process.memory_maps()}
    finally:
        os.killpg(killed.pid, signal.SIGKILL)
        killed.communicate()
    assert psutil.wait_procs(group, timeout=30)[1] == []
    assert any(name.startswith("python") for name in mapped)
    # the semaphores of multiprocessing stay in /dev/shm if all who know them are killed
    assert not [name for name in mapped if name.startswith("sem.")]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_build_takes_its_workers_along_and_goes_on_later(
    how: signal.Signals, reader: Any, tmp_path: Path
) -> None:
    killed = start_builder(tmp_path)
    assert killed.stdout is not None
    assert [killed.stdout.readline() for _ in range(3)] == ["1 0\n", "2 0\n", "3 0\n"]
    workers = psutil.Process(killed.pid).children(recursive=True)
    assert len(workers) >= 2
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob(".out.parts/*.json"))) < 7:  # the other worker does the rest
        assert time.monotonic() < deadline
        time.sleep(0.05)
    killed.send_signal(how)
    killed.communicate()
    assert psutil.wait_procs(workers, timeout=30)[1] == []
    (tmp_path / "survive").touch()
    output, _ = start_builder(tmp_path).communicate(timeout=120)
    assert output.splitlines()[-1] == "8 7"
    out = tmp_path / "out"
    units = [["train", i, i + 5, "hang" if i == 15 else ""] for i in range(0, 40, 5)]
    build(units, reader, tmp_path / "undisturbed", source={}, licence="l")
    assert files(out) == files(tmp_path / "undisturbed")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
