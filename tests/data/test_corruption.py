"""The corruption matrix: every fault is told by name, and handled as docs/faults.md says."""

import io
import json
import struct
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from groundwork.data import dataset
from groundwork.data.batch_plan import BatchPlan
from groundwork.data.dataset import open_dataset
from groundwork.data.diagnosis import Diagnosis, Policy
from groundwork.data.repair import StoredSample, repair
from groundwork.data.samples import Sample, SampleError, class_label
from groundwork.data.shard_check import Checks, Finding
from groundwork.data.shard_index import ShardError, index_path, read_index, scan_tar, write_index
from groundwork.data.shards import MANIFEST, read_manifest, write_shards
from groundwork.data.stream import Fault, Source, Stream
from groundwork.data.transforms import ImageTransform, training_image
from groundwork.data.verify import verify
from groundwork.kernels.member_reader import find_member_reader

SAMPLES, PER_SHARD = 24, 6
#: The sample that is spoilt, in the second shard.
BAD, SHARD = "k08", "train-000001.tar"
GLOBAL_BATCH, STEPS = 12, 4
TRANSFORM = ImageTransform(size=4, scale=(0.3, 1.0))
Stored = dict[str, bytes]
Content = dict[str, Stored]


def decode(sample: Sample, rng: np.random.Generator) -> tuple[str, bytes]:
    """As the decoder of image-text training: a class or a caption is needed, and the image."""
    if class_label(sample) == -1 and not sample.text:
        raise SampleError("neither a class nor a caption", Diagnosis.MISSING_CAPTION)
    return sample.key, training_image(sample.image, TRANSFORM, rng).numpy().tobytes()


def encoded(image: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def picture(seed: int, size: tuple[int, int] = (9, 7)) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8))


def good_samples() -> Content:
    return {
        f"k{i:02d}": {
            "jpg": encoded(picture(i), "JPEG"),
            "json": b'{"width": 9}',
            "txt": b"caption %d" % i,
        }
        for i in range(SAMPLES)
    }


def build(folder: Path, samples: Content) -> None:
    stored = (
        (
            "train",
            StoredSample(
                key, fields.get("jpg", b""), fields["txt"].decode("utf-8", "replace"), fields
            )
            if "txt" in fields
            else StoredSample(key, fields.get("jpg", b""), "", fields),
        )
        for key, fields in samples.items()
    )
    write_shards(stored, folder, name="n", source={}, licence="l", max_samples=PER_SHARD)


def write_tar(path: Path, members: list[tuple[str, bytes]], **options: object) -> None:
    with tarfile.open(path, "w", **options) as archive:  # type: ignore[call-overload]
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def members_of(keys: list[str]) -> list[tuple[str, bytes]]:
    good = good_samples()
    return [(f"{key}.{name}", data) for key in keys for name, data in good[key].items()]


def plain(folder: Path, spoil: Callable[[Path], None]) -> None:
    """Two tars of six samples without side-cars or manifest, of which the second is spoilt."""
    folder.mkdir()
    keys = [f"k{i:02d}" for i in range(2 * PER_SHARD)]
    write_tar(folder / "train-000000.tar", members_of(keys[:PER_SHARD]))
    write_tar(folder / SHARD, members_of(keys[PER_SHARD:]))
    spoil(folder / SHARD)


def header_at(tar: Path, name: str) -> int:
    with tarfile.open(tar) as archive:
        return archive.getmember(name).offset


def stored_in(directory: Path) -> dict[str, dict[str, Stored]]:
    """split -> key -> members of a data set, read by Python's tarfile."""
    splits: dict[str, dict[str, Stored]] = {}
    for split, shards in read_manifest(directory).splits.items():
        samples = splits.setdefault(split, {})
        for shard in shards:
            with tarfile.open(directory / shard.file) as archive:
                for member in archive.getmembers():
                    key, _, name = member.name.partition(".")
                    content = archive.extractfile(member)
                    assert content is not None
                    samples.setdefault(key, {})[name] = content.read()
    return splits


def run(
    stream: Stream[tuple[str, bytes]], ranks: int, workers: int, first_step: int = 0
) -> tuple[list[tuple[str, bytes]], list[Fault]]:
    """The global sequence put together from all ranks, and all faults in order of position."""
    parts = []
    for rank in range(ranks):
        plan = BatchPlan(GLOBAL_BATCH, 2, ranks, rank)
        parts.append(
            list(
                stream.batches(plan, list, first_step=first_step, last_step=STEPS, workers=workers)
            )
        )
    in_turn = [batch for micro_step in zip(*parts, strict=True) for batch in micro_step]
    faults = [fault for batch in in_turn for fault in batch.faults]
    return [e for batch in in_turn for e in batch.data], sorted(faults, key=lambda f: f.position)


def result_of(sample: Sample | SampleError) -> object:
    is_bad = isinstance(sample, SampleError)
    return (str(sample), sample.diagnosis) if is_bad else sample


def assert_same_on_resume_and_elsewhere(folder: Path) -> list[Fault]:
    """Returns the faults of the stream, which are those of every other way to read it."""
    stream = Stream([Source(open_dataset(str(folder)), decode)], seed=5)
    sequence, faults = run(stream, 1, 0)
    assert len(sequence) == STEPS * GLOBAL_BATCH
    assert run(stream, 2, 1) == (sequence, faults)
    assert run(stream, 3, 0) == (sequence, faults)
    everything = list(range(SAMPLES))
    in_c = open_dataset(str(folder), reader=find_member_reader()).read_many(everything)
    in_python = open_dataset(str(folder)).read_many(everything)
    assert list(map(result_of, in_c)) == list(map(result_of, in_python))
    for step in (1, 3):
        rest = [fault for fault in faults if fault.position >= step * GLOBAL_BATCH]
        assert run(stream, 2, 0, first_step=step) == (sequence[step * GLOBAL_BATCH :], rest)
    return faults


def bad_of(where: Path, *, decode_all: bool = True) -> list[Finding]:
    found = verify(str(where), Checks(decode=decode_all)).findings
    return [finding for finding in found if finding.diagnosis.is_bad]


# Samples that are bad: quarantined and replaced


def bomb() -> bytes:
    """A PNG that says it has 900 million pixels, in some 60 bytes."""
    head = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def without(fields: Stored, name: str) -> Stored:
    return {key: value for key, value in fields.items() if key != name}


HTML = b"<!DOCTYPE html><html><body>403 Forbidden</body></html>"
#: Name -> (diagnosis, field that the offset is of, what becomes of the good members).
SPOILT: dict[str, tuple[Diagnosis, str, Callable[[Stored], Stored]]] = {
    "zero-length member": (Diagnosis.EMPTY_IMAGE, "jpg", lambda f: {**f, "jpg": b""}),
    "HTML saved as .jpg": (Diagnosis.NOT_AN_IMAGE, "jpg", lambda f: {**f, "jpg": HTML}),
    "truncated JPEG": (Diagnosis.DAMAGED_IMAGE, "jpg", lambda f: {**f, "jpg": f["jpg"][:-40]}),
    "decompression bomb": (Diagnosis.TOO_MANY_PIXELS, "jpg", lambda f: {**f, "jpg": bomb()}),
    "missing image": (Diagnosis.MISSING_IMAGE, "json", lambda f: without(f, "jpg")),
    "missing caption": (Diagnosis.MISSING_CAPTION, "jpg", lambda f: without(f, "txt")),
    "empty caption": (Diagnosis.MISSING_CAPTION, "txt", lambda f: {**f, "txt": b""}),
    "bad UTF-8": (Diagnosis.BAD_TEXT, "txt", lambda f: {**f, "txt": b"caf\xe9"}),
    "bad JSON": (Diagnosis.BAD_JSON, "json", lambda f: {**f, "json": b'{"a": '}),
    "JSON in UTF-16": (Diagnosis.BAD_JSON, "json", lambda f: {**f, "json": b'{"a": "\xff"}'}),
    "JSON that is no object": (Diagnosis.BAD_JSON, "json", lambda f: {**f, "json": b"[1]"}),
    "JSON too deep": (Diagnosis.BAD_JSON, "json", lambda f: {**f, "json": b"[" * 200_000}),
    "bad label": (Diagnosis.BAD_LABEL, "json", lambda f: {**f, "json": b'{"label": "cat"}'}),
}


@pytest.mark.parametrize("kind", [*SPOILT, "bit flip"])
def test_a_bad_sample_is_quarantined_and_left_out(kind: str, tmp_path: Path) -> None:
    folder, samples = tmp_path / "o", good_samples()
    if kind == "bit flip":
        diagnosis, field = Diagnosis.DAMAGED_MEMBER, "jpg"
        build(folder, samples)
        tar = folder / SHARD
        data = bytearray(tar.read_bytes())
        data[header_at(tar, f"{BAD}.jpg") + 512 + 300] ^= 1
        tar.write_bytes(data)
    else:
        diagnosis, field, spoil = SPOILT[kind]
        build(folder, {**samples, BAD: spoil(samples[BAD])})
    assert diagnosis.policy is Policy.QUARANTINE
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    faults = assert_same_on_resume_and_elsewhere(folder)
    assert {(Path(f.shard).name, f.key, f.diagnosis) for f in faults} == {(SHARD, BAD, diagnosis)}
    assert len(faults) >= 1

    offset = header_at(folder / SHARD, f"{BAD}.{field}") + 512
    (finding,) = bad_of(folder)
    assert finding[:4] == (SHARD, BAD, offset, diagnosis)

    result = repair(str(folder), tmp_path / "r")
    del samples[BAD]
    assert stored_in(tmp_path / "r") == {"train": samples}
    assert bad_of(tmp_path / "r") == []
    assert result.left_out == 1
    (entry,) = json.loads((tmp_path / "r" / "repair.json").read_bytes())["left_out"]
    assert [entry[name] for name in ("shard", "key", "offset", "diagnosis")] == [
        *(SHARD, BAD),
        *(offset, diagnosis.value),
    ]
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


# Samples that are unusual: used


def animated(image_format: str) -> bytes:
    frames = [picture(i) for i in range(3)]
    return encoded(frames[0], image_format, save_all=True, append_images=frames[1:])


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture(1), "JPEG", exif=exif)


deep = Image.fromarray(np.linspace(0, 65535, 63).astype(np.uint16).reshape(7, 9))
UNUSUAL: dict[str, tuple[Diagnosis, str, bytes]] = {
    "CMYK": (Diagnosis.CMYK_IMAGE, "jpg", encoded(picture(1).convert("CMYK"), "JPEG")),
    "16-bit": (Diagnosis.DEEP_IMAGE, "png", encoded(deep, "PNG")),
    "EXIF-rotated": (Diagnosis.ROTATED_IMAGE, "jpg", rotated()),
    "animated WebP": (Diagnosis.ANIMATED_IMAGE, "webp", animated("WEBP")),
    "animated PNG": (Diagnosis.ANIMATED_IMAGE, "png", animated("PNG")),
    "pickle-like field": (Diagnosis.UNSAFE_FIELD, "pyd", b"cos\nsystem\n(S'false'\ntR."),
}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_an_unusual_sample_is_noted_and_used(kind: str, tmp_path: Path) -> None:
    diagnosis, field, content = UNUSUAL[kind]
    assert diagnosis.policy is Policy.ACCEPT
    folder, samples = tmp_path / "o", good_samples()
    if field in ("png", "webp"):
        samples[BAD] = without(samples[BAD], "jpg")
    samples[BAD][field] = content
    build(folder, samples)

    assert assert_same_on_resume_and_elsewhere(folder) == []
    read = open_dataset(str(folder)).read(8)
    assert read.key == BAD
    assert "pyd" not in read.members
    report = verify(str(folder), Checks(decode=True))
    assert report.is_good
    offset = header_at(folder / SHARD, f"{BAD}.{field}") + 512
    assert [f[:4] for f in report.findings] == [(SHARD, BAD, offset, diagnosis)]

    repair(str(folder), tmp_path / "r")
    kept = {**samples, BAD: without(samples[BAD], "pyd")}
    assert stored_in(tmp_path / "r") == {"train": kept}


def test_pax_headers_are_read(tmp_path: Path) -> None:
    long = "снег-" * 30 + "1"
    plain(
        tmp_path / "o",
        lambda tar: write_tar(
            tar,
            [*members_of(["k06"]), *((f"{long}.{n}", d) for n, d in good_samples()[BAD].items())],
            format=tarfile.PAX_FORMAT,
        ),
    )
    report = verify(str(tmp_path / "o"))
    noted = {finding.diagnosis for finding in report.findings}
    assert noted == {Diagnosis.PAX_HEADER, Diagnosis.MISSING_INDEX}
    assert report.is_good
    repair(str(tmp_path / "o"), tmp_path / "r")
    assert stored_in(tmp_path / "r")["train"][long] == good_samples()[BAD]
    assert open_dataset(str(tmp_path / "o")).read(7).text == "caption 8"


# Tars that are refused

END, NUMBER = "end", "number"


@dataclass(frozen=True)
class Refused:
    """message: of the refusal at opening. lost: samples that the repaired copy has not. key: that
    the finding names. at: (member, bytes behind its header), in the tar before it was spoilt; END
    is the end of that, and NUMBER counts members of the spoilt one."""

    diagnosis: Diagnosis
    message: str
    spoil: Callable[[Path], None]
    at: tuple[str, int]
    lost: tuple[str, ...] = ()
    key: str = ""


def cut(tar: Path, name: str, behind: int) -> None:
    tar.write_bytes(tar.read_bytes()[: header_at(tar, name) + behind])


def overwrite(tar: Path, at: int, data: bytes) -> None:
    content = tar.read_bytes()
    tar.write_bytes(content[:at] + data + content[at + len(data) :])


def insert(tar: Path, before: str, data: bytes) -> None:
    content, at = tar.read_bytes(), header_at(tar, before)
    tar.write_bytes(content[:at] + data + content[at:])


def special(name: str, kind: bytes, **fields: object) -> bytes:
    member = tarfile.TarInfo(name)
    member.type = kind
    for field, value in fields.items():
        setattr(member, field, value)
    return member.tobuf(tarfile.GNU_FORMAT)


def sparse_of_pax() -> bytes:
    member = tarfile.TarInfo("GNUSparseFile.0/s.jpg")
    member.size = 3
    member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
    return member.tobuf(tarfile.PAX_FORMAT) + b"abc".ljust(512, b"\0")


def global_path() -> bytes:
    return tarfile.TarInfo.create_pax_global_header({"path": "same.jpg"})


def with_data(name: str) -> bytes:
    return special(name, tarfile.REGTYPE, size=5) + b"12345".ljust(512, b"\0")


SECOND = [f"k{i:02d}" for i in range(PER_SHARD, 2 * PER_SHARD)]
REFUSED = {
    "truncated tar": Refused(
        Diagnosis.TRUNCATED_TAR,
        "truncated",
        lambda tar: cut(tar, "k09.json", 512 + 3),
        ("k09.json", 0),
        ("k09", "k10", "k11"),
    ),
    "tar cut between two members": Refused(
        Diagnosis.TRUNCATED_TAR,
        "truncated",
        lambda tar: cut(tar, "k09.json", 0),
        ("k09.json", 0),
        ("k09", "k10", "k11"),
    ),
    "tar without its end": Refused(
        Diagnosis.TRUNCATED_TAR,
        "truncated",
        lambda tar: cut(tar, "k11.txt", 1024),
        ("k11.txt", 1024),
    ),
    "bit flip in a tar header": Refused(
        Diagnosis.DAMAGED_TAR,
        "damaged",
        lambda tar: overwrite(tar, header_at(tar, f"{BAD}.json") + 3, b"X"),
        (f"{BAD}.json", 0),
        (BAD,),
    ),
    "HTML saved as .tar": Refused(
        Diagnosis.NOT_A_TAR,
        "not a readable tar",
        lambda tar: tar.write_bytes(HTML * 30) and None,
        (END, 0),
        tuple(SECOND),
    ),
    "empty file": Refused(
        Diagnosis.NOT_A_TAR,
        "empty file",
        lambda tar: tar.write_bytes(b"") and None,
        (END, 0),
        tuple(SECOND),
    ),
    "duplicate keys, side by side": Refused(
        Diagnosis.REPEATED_FIELD,
        "has two 'jpg' members",
        lambda tar: write_tar(tar, members_of(["k06", BAD, BAD, *SECOND[1:2], *SECOND[3:]])),
        (NUMBER, 6),
        (),
        BAD,
    ),
    "duplicate keys, others between": Refused(
        Diagnosis.REPEATED_KEY,
        "appears twice",
        lambda tar: write_tar(tar, members_of([*SECOND, BAD])),
        (NUMBER, 18),
        (),
        BAD,
    ),
    "sample in two pieces": Refused(
        Diagnosis.REPEATED_KEY,
        "appears twice",
        lambda tar: write_tar(
            tar,
            [
                *members_of([BAD])[:1],
                *members_of([*SECOND[:2], *SECOND[3:]]),
                *members_of([BAD])[1:],
            ],
        ),
        (NUMBER, 16),
        (),
        BAD,
    ),
    "absolute path": Refused(
        Diagnosis.UNSAFE_PATH,
        "absolute or parent path",
        lambda tar: insert(tar, "k09.jpg", with_data("/etc/passwd.jpg")),
        ("k09.jpg", 0),
    ),
    "parent path": Refused(
        Diagnosis.UNSAFE_PATH,
        "absolute or parent path",
        lambda tar: insert(tar, "k09.jpg", with_data("a/../../b.jpg")),
        ("k09.jpg", 0),
    ),
    "symbolic link": Refused(
        Diagnosis.SPECIAL_MEMBER,
        "a link, a device or a sparse file",
        lambda tar: insert(
            tar, "k09.jpg", special("x.jpg", tarfile.SYMTYPE, linkname="/etc/passwd")
        ),
        ("k09.jpg", 0),
    ),
    "hard link": Refused(
        Diagnosis.SPECIAL_MEMBER,
        "a link, a device or a sparse file",
        lambda tar: insert(tar, "k09.jpg", special("x.jpg", tarfile.LNKTYPE, linkname="k06.jpg")),
        ("k09.jpg", 0),
    ),
    "device": Refused(
        Diagnosis.SPECIAL_MEMBER,
        "a link, a device or a sparse file",
        lambda tar: insert(tar, "k09.jpg", special("x.jpg", tarfile.CHRTYPE, devmajor=1)),
        ("k09.jpg", 0),
    ),
    "sparse file of GNU": Refused(
        Diagnosis.SPARSE_MEMBER,
        "a link, a device or a sparse file",
        lambda tar: insert(
            tar, "k09.jpg", special("x.jpg", tarfile.GNUTYPE_SPARSE, size=3) + bytes(512)
        ),
        ("k09.jpg", 0),
    ),
    "sparse file of pax": Refused(
        Diagnosis.SPARSE_MEMBER,
        "a link, a device or a sparse file",
        lambda tar: insert(tar, "k09.jpg", sparse_of_pax()),
        ("k09.jpg", 1024),
    ),
    "global header": Refused(
        Diagnosis.GLOBAL_HEADER,
        "a global header sets 'path'",
        lambda tar: insert(tar, "k09.jpg", global_path()),
        ("k09.jpg", 0),
    ),
    "concatenated tars": Refused(
        Diagnosis.JOINED_TARS,
        "joined with `cat`",
        lambda tar: tar.write_bytes(tar.read_bytes() + second_archive(tar)) and None,
        (END, 0),
    ),
}


PICTURE = good_samples()["k00"]["jpg"]
#: Name -> (diagnosis, the member that is refused, its bytes).
BETWEEN: dict[str, tuple[Diagnosis, bytes]] = {
    "link": (Diagnosis.SPECIAL_MEMBER, special("x.jpg", tarfile.SYMTYPE, linkname="a.jpg")),
    "fifo": (Diagnosis.SPECIAL_MEMBER, special("x", tarfile.FIFOTYPE)),
    "absolute path": (Diagnosis.UNSAFE_PATH, with_data("/x.jpg")),
    "folder with a parent path": (Diagnosis.UNSAFE_PATH, special("../d/", tarfile.DIRTYPE)),
    "sparse file": (Diagnosis.SPARSE_MEMBER, sparse_of_pax()),
}


@pytest.mark.parametrize("kind", BETWEEN)
def test_the_neighbours_of_a_refused_member_are_kept(kind: str, tmp_path: Path) -> None:
    diagnosis, data = BETWEEN[kind]
    tar = tmp_path / "o" / "x.tar"
    tar.parent.mkdir()
    good = {key: {"jpg": PICTURE, "txt": key.encode()} for key in ("a", "b")}
    write_tar(
        tar, [(f"{key}.{name}", d) for key, fields in good.items() for name, d in fields.items()]
    )
    insert(tar, "b.jpg", data)
    (finding,) = bad_of(tar.parent)
    assert (finding.key, finding.diagnosis, finding.row) == ("", diagnosis, -1)
    repair(str(tar.parent), tmp_path / "r")
    assert stored_in(tmp_path / "r") == {"train": good}


def test_the_sample_of_a_refused_member_is_left_out(tmp_path: Path) -> None:
    tar = tmp_path / "o" / "x.tar"
    tar.parent.mkdir()
    good = [
        (f"{key}.{name}", data) for key in "abc" for name, data in (("jpg", PICTURE), ("txt", b"1"))
    ]
    write_tar(tar, [member for member in good if member[0] != "b.jpg"])
    # far from the rest of its sample, and before it
    insert(tar, "a.jpg", special("b.jpg", tarfile.SYMTYPE, linkname="a.jpg"))
    first, second = bad_of(tar.parent)
    assert (first.key, first.offset, first.diagnosis) == ("", 0, Diagnosis.SPECIAL_MEMBER)
    assert (second.key, second.diagnosis) == ("b", Diagnosis.SPECIAL_MEMBER)
    assert "may lack members: member 'b.jpg' is a link" in second.detail
    repair(str(tar.parent), tmp_path / "r")
    assert list(stored_in(tmp_path / "r")["train"]) == ["a", "c"]


def second_archive(tar: Path) -> bytes:
    other = tar.with_name("other")
    write_tar(other, [(f"z{name}", data) for name, data in members_of(["k06"])])
    data = other.read_bytes()
    other.unlink()
    return data


@pytest.mark.parametrize("kind", REFUSED)
def test_a_bad_tar_is_refused_by_name_and_what_is_whole_is_kept(kind: str, tmp_path: Path) -> None:
    row, folder = REFUSED[kind], tmp_path / "o"
    assert row.diagnosis.policy is Policy.REFUSE
    plain(folder, lambda tar: None)
    name, at = row.at
    if name == END:
        at += (folder / SHARD).stat().st_size
    elif name != NUMBER:
        at += header_at(folder / SHARD, name)
    row.spoil(folder / SHARD)
    if row.diagnosis is Diagnosis.NOT_A_TAR:
        at = 0
    elif name == NUMBER:
        with tarfile.open(folder / SHARD) as archive:
            at = archive.getmembers()[at].offset_data
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    found = bad_of(folder)
    assert [f[:4] for f in found if f.offset == at] == [(SHARD, row.key, at, row.diagnosis)]
    # and the samples that it took with it, as far as they were found
    others = [finding for finding in found if finding.offset != at]
    assert {finding.diagnosis for finding in found} == {row.diagnosis}
    assert {finding.key for finding in others} <= set(row.lost)

    repair(str(folder), tmp_path / "r")
    samples = {k: f for k, f in good_samples().items() if k < "k12" and k not in row.lost}
    if kind == "concatenated tars":
        samples["zk06"] = samples["k06"]
    if kind == "sample in two pieces":  # the first piece says where it stands
        assert list(stored_in(tmp_path / "r")["train"])[PER_SHARD] == BAD
    assert stored_in(tmp_path / "r") == {"train": samples}
    assert bad_of(tmp_path / "r") == []
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}

    with pytest.raises(ShardError, match=row.message) as caught:
        open_dataset(str(folder))
    assert SHARD in str(caught.value)
    assert caught.value.diagnosis is row.diagnosis
    assert len(open_dataset(str(tmp_path / "r"))) == len(samples)


def test_too_many_fields_are_refused(tmp_path: Path) -> None:
    def spoil(tar: Path) -> None:
        write_tar(tar, [(f"s{i}.part{i}.jpg", b"") for i in range(2250)])

    plain(tmp_path / "o", spoil)
    assert Diagnosis.TOO_MANY_FIELDS in {f.diagnosis for f in bad_of(tmp_path / "o")}
    with pytest.raises(ShardError, match="take the other dots out of the names") as caught:
        open_dataset(str(tmp_path / "o"))
    assert caught.value.diagnosis is Diagnosis.TOO_MANY_FIELDS
    repair(str(tmp_path / "o"), tmp_path / "r")
    assert list(stored_in(tmp_path / "r")["train"]) == [f"k{i:02d}" for i in range(PER_SHARD)]


def test_a_side_car_saves_the_samples_behind_a_damaged_header(tmp_path: Path) -> None:
    folder = tmp_path / "o"
    build(folder, good_samples())
    tar = folder / SHARD
    overwrite(tar, header_at(tar, f"{BAD}.json") + 3, b"X")
    assert [f.diagnosis for f in bad_of(folder)] == [Diagnosis.DAMAGED_TAR]
    assert assert_same_on_resume_and_elsewhere(folder) == []  # read by the side-car
    repair(str(folder), tmp_path / "r")
    assert stored_in(tmp_path / "r") == {"train": good_samples()}


# Side-cars and manifests


def test_a_missing_or_outdated_side_car_is_made_anew(tmp_path: Path) -> None:
    folder = tmp_path / "o"
    build(folder, good_samples())
    index = index_path(folder / SHARD)
    whole = index.read_bytes()
    for spoil, diagnosis in (
        (lambda: index.unlink(), Diagnosis.MISSING_INDEX),
        (lambda: index.write_bytes(b"GWIDX\0\0\1" + bytes(64)), Diagnosis.OUTDATED_INDEX),
    ):
        spoil()
        report = verify(str(folder))
        assert [f[:2] + f[3:4] for f in report.findings] == [(SHARD, "", diagnosis)]
        assert report.is_good
        assert assert_same_on_resume_and_elsewhere(folder) == []
        assert index.read_bytes() == whole


def test_a_damaged_side_car_is_refused_and_not_believed(tmp_path: Path) -> None:
    folder = tmp_path / "o"
    build(folder, good_samples())
    index = index_path(folder / SHARD)
    whole = index.read_bytes()
    for data in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:100], b"", HTML):
        index.write_bytes(data)
        assert [f[:4] for f in bad_of(folder)] == [(SHARD, "", 0, Diagnosis.DAMAGED_INDEX)]
        with pytest.raises(ShardError, match=r"000001\.idx: .*delete it") as caught:
            open_dataset(str(folder))
        assert caught.value.diagnosis is Diagnosis.DAMAGED_INDEX
    repair(str(folder), tmp_path / "r")
    assert stored_in(tmp_path / "r") == {"train": good_samples()}


def test_of_many_shards_one_is_refused_when_it_is_first_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "CHECKED_AT_OPENING", 1)
    folder = tmp_path / "o"
    build(folder, good_samples())
    index_path(folder / SHARD).write_bytes(HTML)
    faults = assert_same_on_resume_and_elsewhere(folder)
    expected = {(SHARD, "", "damaged-index")}  # without its side-car it has no keys
    assert {(Path(f.shard).name, f.key, f.diagnosis) for f in faults} == expected


def test_a_side_car_of_another_tar_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "o"
    build(folder, good_samples())
    tar, index = folder / SHARD, index_path(folder / SHARD)
    right = read_index(index, tar)
    # of the same size, with members in the same places: found when they are read
    write_index(replace(right, checksums=right.checksums ^ 1), index)
    (finding,) = bad_of(folder)
    assert finding[:4] == (SHARD, "k06", 512, Diagnosis.WRONG_INDEX)
    faults = assert_same_on_resume_and_elsewhere(folder)
    assert {(Path(f.shard).name, f.diagnosis) for f in faults} == {(SHARD, "damaged-member")}
    assert {f.key for f in faults} == set(SECOND)
    repair(str(folder), tmp_path / "r")
    assert stored_in(tmp_path / "r") == {"train": good_samples()}
    # of the same size, with members in other places
    write_index(replace(right, offsets=right.offsets + 1), index)
    (finding,) = bad_of(folder)
    assert finding[:4] == (SHARD, "k06", 512, Diagnosis.WRONG_INDEX)
    # with the sizes of other images
    for change in ({"widths": right.widths + 1}, {"text_bytes": right.text_bytes + 1}):
        write_index(replace(right, **change), index)
        (finding,) = bad_of(folder)
        assert finding[:4] == (SHARD, "k06", 512, Diagnosis.WRONG_INDEX)
    # of another size
    write_index(replace(right, tar_bytes=right.tar_bytes - 512), index)
    (finding,) = bad_of(folder)
    assert finding[:4] == (SHARD, "", 0, Diagnosis.WRONG_INDEX)
    with pytest.raises(ShardError, match="the tar was replaced") as caught:
        open_dataset(str(folder))
    assert caught.value.diagnosis is Diagnosis.WRONG_INDEX


def test_a_wrong_side_car_of_a_plain_tar_does_not_condemn_its_samples(tmp_path: Path) -> None:
    plain(tmp_path / "o", lambda tar: None)
    tar = tmp_path / "o" / SHARD
    right = scan_tar(tar)
    write_index(replace(right, checksums=right.checksums ^ 1), index_path(tar))
    assert [f[:4] for f in bad_of(tmp_path / "o")] == [(SHARD, "k06", 512, Diagnosis.WRONG_INDEX)]


def record_of(folder: Path) -> dict[str, object]:
    record = json.loads((folder / MANIFEST).read_bytes())
    assert isinstance(record, dict)
    return record


Edit = Callable[[Path], object]
MANIFESTS: dict[str, tuple[Diagnosis, str, str, Edit]] = {
    "no JSON": (
        *(Diagnosis.BAD_MANIFEST, MANIFEST, "not a groundwork manifest"),
        lambda folder: (folder / MANIFEST).write_bytes(b"{"),
    ),
    "other JSON": (
        *(Diagnosis.BAD_MANIFEST, MANIFEST, "not a groundwork manifest"),
        lambda folder: (folder / MANIFEST).write_bytes(b"[[]]"),
    ),
    "a path": (
        *(Diagnosis.BAD_MANIFEST, MANIFEST, "outside the folder"),
        lambda folder: (folder / MANIFEST).write_text(
            json.dumps(record_of(folder)).replace("train-000001.tar", "../x.tar")
        ),
    ),
    "more samples than can be": (
        *(Diagnosis.BAD_MANIFEST, MANIFEST, "not from 0 to 2"),
        lambda folder: (folder / MANIFEST).write_text(
            (folder / MANIFEST).read_text().replace('"samples": 6', f'"samples": {10**30}', 1)
        ),
    ),
    "bad concepts": (
        *(Diagnosis.BAD_CONCEPTS, "concepts.json", "not a list of concepts"),
        lambda folder: (folder / "concepts.json").write_bytes(b"[1]"),
    ),
    "missing shard": (
        *(Diagnosis.MISSING_SHARD, SHARD, "missing: train-000001.tar"),
        lambda folder: (folder / SHARD).unlink(),
    ),
    "wrong size": (
        *(Diagnosis.WRONG_SIZE, SHARD, "truncated or replaced"),
        lambda folder: (folder / SHARD).write_bytes((folder / SHARD).read_bytes() + bytes(512)),
    ),
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_a_data_set_that_is_not_what_it_says_is_not_opened(kind: str, tmp_path: Path) -> None:
    diagnosis, file, message, spoil = MANIFESTS[kind]
    assert diagnosis.policy is Policy.STOP
    folder = tmp_path / "o"
    build(folder, good_samples())
    spoil(folder)
    assert (file, diagnosis) in {(f.file, f.diagnosis) for f in bad_of(folder)}
    with pytest.raises(ShardError, match=message) as caught:
        open_dataset(str(folder))
    assert caught.value.diagnosis is diagnosis
    repair(str(folder), tmp_path / "r")
    lost = set(SECOND) if kind == "missing shard" else set()
    assert set(stored_in(tmp_path / "r")["train"]) == set(good_samples()) - lost
    assert bad_of(tmp_path / "r") == []


def test_a_wrong_number_of_samples_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "o"
    build(folder, good_samples())
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace('"samples": 6', '"samples": 7', 1))
    (finding,) = bad_of(folder)
    assert finding[:4] == ("train-000000.tar", "", 0, Diagnosis.WRONG_COUNT)
    with pytest.raises(ShardError, match="6 samples, 7 were expected") as caught:
        open_dataset(str(folder))
    assert caught.value.diagnosis is Diagnosis.WRONG_COUNT
    assert Diagnosis.WRONG_COUNT.policy is Policy.REFUSE


def test_a_tar_that_was_changed_where_no_member_is_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "o"
    build(folder, good_samples())
    tar = folder / SHARD
    overwrite(tar, header_at(tar, f"{BAD}.json") - 1, b"!")  # the padding of the member before
    (finding,) = bad_of(folder)
    assert finding[:4] == (SHARD, "", 0, Diagnosis.WRONG_TAR_CHECKSUM)
    assert Diagnosis.WRONG_TAR_CHECKSUM.policy is Policy.TOLERATE
    assert assert_same_on_resume_and_elsewhere(folder) == []
    index_path(tar).unlink()  # but no side-car is made of such a tar
    with pytest.raises(ShardError, match="does not have the checksum") as caught:
        open_dataset(str(folder))
    assert caught.value.diagnosis is Diagnosis.WRONG_TAR_CHECKSUM


def test_a_key_in_two_shards_is_found_and_the_first_stays(tmp_path: Path) -> None:
    folder = tmp_path / "o"
    plain(
        folder,
        lambda tar: write_tar(
            tar, [*members_of(["k06"]), *((f"k03.{n}", d) for n, d in good_samples()[BAD].items())]
        ),
    )
    (finding,) = bad_of(folder)
    offset = header_at(folder / SHARD, "k03.jpg") + 512
    assert finding[:4] == (SHARD, "k03", offset, Diagnosis.KEY_IN_TWO_SHARDS)
    assert Diagnosis.KEY_IN_TWO_SHARDS.policy is Policy.TOLERATE
    assert len(open_dataset(str(folder))) == PER_SHARD + 2
    repair(str(folder), tmp_path / "r")
    kept = stored_in(tmp_path / "r")["train"]
    assert kept == {k: f for k, f in good_samples().items() if k < "k07"}
