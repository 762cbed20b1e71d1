import fcntl
import gc
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from groundwork.data.diagnosis import Diagnosis
from groundwork.data.samples import Concept, Sample
from groundwork.data.shard_index import ShardError, index_path, read_index, scan_tar
from groundwork.data.shards import (
    Manifest,
    is_data_set,
    parse_manifest,
    read_concepts,
    read_manifest,
    write_shards,
)

keys = st.text(
    st.characters(codec="utf-8", exclude_characters="./\\ \t\n\x00"), min_size=1, max_size=120
)
samples_drawn = st.lists(
    st.builds(
        Sample,
        keys,
        st.binary(max_size=1300),
        st.sampled_from(["jpg", "png", "webp"]),
        st.text(max_size=50),
        st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=3),
    ),
    min_size=1,
    max_size=9,
    unique_by=lambda sample: sample.key,
)


def some(count: int, prefix: str = "k") -> list[tuple[str, Sample]]:
    return [
        ("train", Sample(f"{prefix}{i}", bytes([i]) * i, "jpg", f"text {i}", {"label": i}))
        for i in range(count)
    ]


def write(samples: Any, out: Path, **options: Any) -> Manifest:
    given_options = {"name": "test", "source": {"kind": "test"}, "licence": "CC0", **options}
    return write_shards(samples, out, **given_options)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# few examples: every one of them waits for the disk
@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=25
)
@given(samples=samples_drawn, max_samples=st.integers(1, 4), max_bytes=st.integers(1, 3000))
def test_webdataset_and_tarfile_read_back_what_was_written(
    samples: list[Sample], max_samples: int, max_bytes: int, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    pairs = [("train", sample) for sample in samples]
    manifest = write(pairs, out, max_samples=max_samples, max_bytes=max_bytes)
    tars = [str(out / shard.file) for shard in manifest.splits["train"]]

    expected = [(sample.key, sample.fields()) for sample in samples]
    read = webdataset.WebDataset(tars, shardshuffle=False)
    assert [
        (s["__key__"], {k: v for k, v in s.items() if not k.startswith("__")}) for s in read
    ] == expected

    members = []
    for tar in tars:
        with tarfile.open(tar) as archive:
            for member in archive.getmembers():
                file = archive.extractfile(member)
                assert file is not None
                members.append((member.name, file.read()))
    assert members == [
        (f"{key}.{field}", data)
        for key, sample in expected
        for field, data in sorted(sample.items())
    ]

    assert [shard.samples for shard in manifest.splits["train"]] == [
        len(read_index(index_path(Path(tar)), Path(tar))) for tar in tars
    ]
    assert max(shard.samples for shard in manifest.splits["train"]) <= max_samples
    assert read_manifest(out) == manifest


def test_a_written_index_equals_a_rebuilt_one(tmp_path: Path) -> None:
    for shard in write(some(10), tmp_path / "out", max_samples=4).splits["train"]:
        tar = tmp_path / "out" / shard.file
        written, rebuilt = read_index(index_path(tar), tar), scan_tar(tar)
        assert written.digest() == rebuilt.digest()
        assert (written.offsets == rebuilt.offsets).all()
        assert (written.sizes == rebuilt.sizes).all()


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    concepts = [Concept(0, "chat", ("félin",))]
    for name in ("a", "b"):
        write(some(10), tmp_path / name, max_samples=4, concepts=concepts)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert len(files(tmp_path / "a")) == 3 * 2 + 4


def test_splits_are_written_apart_and_may_share_keys(tmp_path: Path) -> None:
    pairs = [(split, sample) for _, sample in some(3) for split in ("train", "val.v2")]
    manifest = write(pairs, tmp_path / "out")
    assert {split: manifest.samples(split) for split in manifest.splits} == {
        "train": 3,
        "val.v2": 3,
    }


def test_concepts_come_back_in_label_order(tmp_path: Path) -> None:
    concepts = [
        Concept(2, "Ω", ("ω", "omega"), heldout=True, info={"wnid": "n1"}),
        Concept(0, "cat"),
        Concept(1, "dog"),
    ]
    write(some(1), tmp_path / "out", concepts=concepts)
    assert read_concepts(tmp_path / "out") == [concepts[1], concepts[2], concepts[0]]
    (tmp_path / "out" / "concepts.json").unlink()
    assert read_concepts(tmp_path / "out") == []


WRONG_CONCEPTS = ["{", "[1]", '[{"label": 1}]', '[{"label": "1", "name": "a", "aliases": []}]']


@pytest.mark.parametrize("text", WRONG_CONCEPTS)
def test_malformed_concepts_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "concepts.json").write_text(text)
    with pytest.raises(ShardError, match=r"concepts\.json: not a list of concepts"):
        read_concepts(tmp_path)


class SourceBrokeError(Exception):
    pass


def breaking(count: int) -> Iterator[tuple[str, Sample]]:
    yield from some(count)
    raise SourceBrokeError("as planned")


def in_split(split: str) -> list[tuple[str, Sample]]:
    return [(split, sample) for _, sample in some(1)]


FAILURES: list[tuple[Callable[[], Any], dict[str, Any], type[Exception], str]] = [
    (lambda: [], {}, ShardError, "yielded no sample"),
    (lambda: some(3) + some(1), {}, ShardError, "key 'k0' twice in split 'train'"),
    (lambda: breaking(0), {}, SourceBrokeError, "as planned"),
    (lambda: breaking(5), {}, SourceBrokeError, "as planned"),
    (lambda: in_split("../train"), {}, ShardError, r"split '\.\./train'"),
    (lambda: in_split(""), {}, ShardError, "split ''"),
    (lambda: some(1), {"source": {"root": Path()}}, TypeError, "not JSON serializable"),
    (lambda: some(1), {"max_samples": 0}, ValueError, "max_samples 0"),
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("samples", "options", "error", "message"), FAILURES)
@pytest.mark.parametrize("exists", [False, True])
def test_a_failure_leaves_all_as_it_was(
    samples: Callable[[], Any],
    options: dict[str, Any],
    error: type[Exception],
    message: str,
    exists: bool,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    if exists:
        write(some(2, "old"), out)
    before = files(out) if exists else {}
    with pytest.raises(error, match=message):
        write(samples(), out, **{"max_samples": 2, **options})
    gc.collect()  # what the writers left open would now warn
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if exists else [])
    assert (files(out) if exists else {}) == before


WRITER = """
import sys, time
from pathlib import Path
from groundwork.data.samples import Sample
from groundwork.data.shards import write_shards

def samples():
    for i in range(10**9):
        yield "train", Sample(f"k{i}", b"x" * 2000, "jpg", "text")
        if i == 25:
            print("writing", flush=True)
            sys.stdin.read(1)

write_shards(samples(), Path(sys.argv[1]), name="n", source={}, licence="l", max_samples=10)
"""


@pytest.fixture
def writer_at_work(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that is in the middle of writing `tmp_path/out`."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path / "out")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "namespace")},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    yield process
    process.kill()
    process.communicate()


def test_a_killed_writer_leaves_the_old_data_set_and_its_place_to_the_next(
    writer_at_work: subprocess.Popen[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert not out.exists()
    with pytest.raises(ShardError, match="another process is writing this folder"):
        write(some(2), out)
    writer_at_work.kill()
    writer_at_work.wait()
    assert not out.exists()
    write(some(2), out)
    write(some(2), tmp_path / "undisturbed")
    assert files(out) == files(tmp_path / "undisturbed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "undisturbed"]


def test_a_kill_between_the_two_renames_of_a_replacement_is_mended(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(some(2), out)
    before = files(out)
    # what such a writer leaves behind: the old folder aside, the new one not yet in its place
    out.rename(tmp_path / ".out.replaced")
    shutil.copytree(tmp_path / ".out.replaced", tmp_path / ".out.partial")
    with pytest.raises(ShardError, match="yielded no sample"):
        write([], out)
    assert files(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_symbolic_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "big_disk").mkdir()
    out = tmp_path / "out"
    out.symlink_to(tmp_path / "big_disk" / "data")
    for count in (2, 3):
        write(some(count), out)
        assert out.is_symlink()
        assert read_manifest(tmp_path / "big_disk" / "data").samples("train") == count
    assert [path.name for path in (tmp_path / "big_disk").iterdir()] == ["data"]


def test_a_file_in_the_way_is_kept(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious")
    with pytest.raises(ShardError, match="a file is where a folder is to be written"):
        write(some(2), tmp_path / "out")
    assert (tmp_path / "out").read_text() == "precious"


def test_a_file_system_without_locks_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    write(some(2), tmp_path / "out")
    assert read_manifest(tmp_path / "out").samples("train") == 2


def edited(out: Path, edit: Any) -> None:
    record = json.loads((out / "manifest.json").read_text())
    edit(record)
    (out / "manifest.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    "file", ["../k.tar", "/etc/passwd", "a/b.tar", "..", "", ".", "train-000000.tar/"]
)
def test_a_shard_outside_of_the_folder_is_refused(file: str, tmp_path: Path) -> None:
    write(some(2), tmp_path / "out")
    edited(tmp_path / "out", lambda r: r["splits"]["train"][0].update(file=file))
    with pytest.raises(ShardError, match="lies outside the folder"):
        read_manifest(tmp_path / "out")


def twice(record: Any) -> None:
    record["splits"]["train"] *= 2


@pytest.mark.parametrize(
    "edit",
    [
        lambda r: r.update(format="parquet"),
        lambda r: r.update(version=2),
        lambda r: r.pop("splits"),
        lambda r: r.update(splits=[]),
        lambda r: r["splits"].update(train=[{}]),
        lambda r: r["splits"].update(train=[7]),
        lambda r: r["splits"]["train"][0].update(file=7),
        lambda r: r["splits"]["train"][0].update(bytes="7"),
        lambda r: r["splits"]["train"][0].update(samples=-1),
        *(
            lambda r, name=name, value=value: r["splits"]["train"][0].update({name: value})
            for name in ("samples", "bytes", "crc32c")
            for value in (2**63, 10**30)
        ),
        *(
            lambda r, name=name: r["splits"].update(
                {"val": [{**r["splits"]["train"][0], "file": "val-000000.tar", name: 2**63 - 1}]}
            )
            for name in ("samples", "bytes")  # each is one that can be, their sum is not
        ),
        lambda r: r["splits"]["train"][0].update(colour="red"),
        twice,
    ],
)
def test_a_wrong_manifest_is_refused(edit: Any, tmp_path: Path) -> None:
    write(some(2), tmp_path / "out")
    edited(tmp_path / "out", edit)
    with pytest.raises(
        ShardError, match=r"manifest\.json: not a groundwork manifest .*build"
    ) as caught:
        read_manifest(tmp_path / "out")
    assert caught.value.diagnosis is Diagnosis.BAD_MANIFEST


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"\xff", b'{"format": '])
def test_a_manifest_that_is_none_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(data)
    with pytest.raises(ShardError, match="not a groundwork manifest"):
        read_manifest(tmp_path)


def test_missing_and_cut_shards_are_named(tmp_path: Path) -> None:
    write(some(9), tmp_path / "out", max_samples=3)
    tar = tmp_path / "out" / "train-000001.tar"
    (tmp_path / "out" / "train-000000.tar").unlink()
    tar.write_bytes(tar.read_bytes()[:-1])
    with pytest.raises(
        ShardError, match=r"missing: train-000000\.tar; truncated or replaced: train-000001\.tar \("
    ):
        read_manifest(tmp_path / "out")


def test_the_digest_follows_the_content_only(tmp_path: Path) -> None:
    base = write(some(4), tmp_path / "a").digest()
    assert write(some(4), tmp_path / "b", name="x", source={}, licence="y").digest() == base
    assert write(some(4, "other"), tmp_path / "c").digest() != base
    assert write(some(4), tmp_path / "d", max_samples=2).digest() != base


@pytest.mark.parametrize("foreign", ["notes.txt", "precious.tar", ".git/", "train/mine"])
def test_a_data_set_with_files_of_someone_else_is_not_replaced(
    tmp_path: Path, foreign: str
) -> None:
    out = tmp_path / "set"
    write(some(3), out, concepts=[Concept(0, "a")])
    assert is_data_set(out)
    mine = out / foreign
    if foreign.endswith("/"):
        mine.mkdir()
    else:
        mine.parent.mkdir(exist_ok=True)
        mine.write_text("mine")
    assert not is_data_set(out)
    with pytest.raises((ShardError, OSError)):
        write(some(4), out)
    assert mine.exists()
    assert len(read_manifest(out).splits["train"]) == 1


@pytest.mark.parametrize("edit", ["more", "less", "none"])
def test_a_card_that_somebody_wrote_into_is_kept(edit: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(some(3), out)
    card = out / "README.md"
    if edit == "none":
        card.unlink()
        write(some(4), out)
        assert card.exists()
        return
    text = card.read_text()
    card.write_text(text + "my notes" if edit == "more" else text.replace("Licence", "License"))
    with pytest.raises(ShardError, match="holds something else"):
        write(some(4), out)
    assert len(read_manifest(out).splits["train"]) == 1


def test_a_manifest_is_parsed_from_its_bytes(tmp_path: Path) -> None:
    manifest = write(some(9), tmp_path / "out", max_samples=4)
    data = (tmp_path / "out" / "manifest.json").read_bytes()
    shutil.rmtree(tmp_path / "out")
    assert parse_manifest(data, "s3://b/manifest.json") == manifest
    with pytest.raises(ShardError, match=r"^s3://b/manifest\.json: not a groundwork manifest"):
        parse_manifest(b"{}", "s3://b/manifest.json")


def test_keys_are_compared_across_shards_and_not_across_splits(tmp_path: Path) -> None:
    pairs = [*some(9), *(("val", sample) for _, sample in some(9)), *some(8)[7:]]
    with pytest.raises(
        ShardError,
        match=r"key 'k7' twice in split 'train' \(in train-000003\.tar and train-000004\.tar\)",
    ):
        write(pairs, tmp_path / "out", max_samples=2)
    assert write(pairs[:-1], tmp_path / "out", max_samples=2).samples("val") == 9
