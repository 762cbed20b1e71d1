"""Mutated files: the readers say what is wrong, quickly, without memory, or read what is right.

Checksums are made right again in half of the cases, or hardly a mutation would get behind them.
"""

import io
import json
import resource
import signal
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from groundwork.data import decode
from groundwork.data.damaged_tar import find_samples
from groundwork.data.repair import repair
from groundwork.data.sample_reader import plan_reads
from groundwork.data.samples import Concept, Sample, SampleError, class_label, sample_from_fields
from groundwork.data.shard_check import Checks
from groundwork.data.shard_index import (
    ShardError,
    index_bytes,
    map_index,
    parse_index,
    parse_index_header,
    scan_file,
)
from groundwork.data.shards import (
    CONCEPTS,
    MANIFEST,
    STATISTICS,
    parse_concepts,
    parse_manifest,
    read_statistics,
    write_shards,
)
from groundwork.data.tar_reader import TarReader
from groundwork.data.transforms import ImageTransform, training_image
from groundwork.data.verify import verify

#: What one input may take: seconds of processor time, and bytes above what the process had before.
SECONDS, BYTES = 5.0, 512 * 2**20
#: Numbers that parsers stumble over.
ODD_NUMBERS = (
    b"0",
    b"-1",
    b"1e999",
    b"99999999999999999999",
    b"2147483648",
    b"null",
    b'"x"',
    b"[]",
)
ODD_BYTES = (b"", b"\0" * 8, b"\xff" * 8, b"{", b"[" * 5000, b'"', b"\n", b"../", b"/", b"\xc3\x28")


class TooSlowError(Exception):
    """An input took more than SECONDS."""


@contextmanager
def limits() -> Iterator[None]:
    """Processor time and address space are bounded; what exceeds them raises."""

    def too_slow(*_: object) -> None:
        raise TooSlowError

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGVTALRM, too_slow)
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, before[1]))
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGVTALRM, handler)


def fuzz(seeds: list[bytes], examples: int, check: Callable[[bytes, bool], None]) -> None:
    """Call `check` with mutations of the seeds, and whether checksums are to be put right."""
    count = 0

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    @given(mutations(seeds), st.booleans())
    def run(data: bytes, mend: bool) -> None:
        nonlocal count
        count += 1
        with limits():
            check(data, mend)

    run()
    assert count >= examples


@st.composite
def mutations(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        kind = draw(st.integers(0, 7))
        length = draw(st.integers(1, 600))
        if kind == 0 and data:
            data[at] ^= 1 << (length % 8)
        elif kind == 1 and data:
            data[at] = length % 256
        elif kind == 2:
            del data[at : at + length]
        elif kind == 3:
            data[at:at] = data[at : at + length]
        elif kind == 4:
            data[at : at + 1] = ODD_BYTES[length % len(ODD_BYTES)]
        elif kind == 5:  # a number in the text near by becomes another
            digits = [i for i in range(at, min(at + 300, len(data))) if 48 <= data[i] <= 57]
            if digits:
                end = digits[0]
                while end < len(data) and 48 <= data[end] <= 57:
                    end += 1
                data[digits[0] : end] = ODD_NUMBERS[length % len(ODD_NUMBERS)]
        elif kind == 6:
            del data[at:]
        else:
            other = draw(st.integers(0, max(0, len(data) - 1)))
            data[at : at + length] = data[other : other + length]
    return bytes(data)


def sizes(few: int, many: int) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("examples", [few, pytest.param(many, marks=pytest.mark.slow)])


def picture(image_format: str, **options: object) -> bytes:
    rng = np.random.default_rng(0)
    buffer = io.BytesIO()
    image = Image.fromarray(rng.integers(0, 256, (13, 17, 3), np.uint8))
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


# Tars


def tar_seeds() -> list[bytes]:
    seeds = []
    long = "d" * 90 + "/" + "ж" * 60
    for tar_format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as archive:
            for name in ("a", "b", "c" if tar_format == tarfile.USTAR_FORMAT else long, "e"):
                for field, data in (("jpg", picture("JPEG")), ("json", b'{"a": 1}'), ("txt", b"")):
                    member = tarfile.TarInfo(f"{name}.{field}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
        seeds.append(buffer.getvalue())
    seeds.append(tarfile.TarInfo.create_pax_global_header({"comment": "x"}) + seeds[2])
    return seeds


def with_checksums(data: bytes) -> bytes:
    """Every block that looks like a header of ustar gets the checksum that it should have."""
    blocks = [bytearray(data[at : at + 512]) for at in range(0, len(data), 512)]
    for block in blocks:
        if block[257:262] == b"ustar" and len(block) == 512:
            block[148:156] = b" " * 8
            block[148:156] = b"%06o\0 " % sum(block)
    return b"".join(blocks)


@sizes(900, 32_000)
def test_any_tar_is_read_or_refused(examples: int) -> None:
    refused = 0

    def check(data: bytes, mend: bool) -> None:
        nonlocal refused
        data = with_checksums(data) if mend else data
        found = find_samples(TarReader(io.BytesIO(data), len(data)))
        in_file = [range_ for s in found.samples for range_ in s.members.values()]
        assert all(0 <= offset <= offset + size <= len(data) for offset, size in in_file)
        try:
            index = scan_file(io.BytesIO(data), len(data), "x.tar")
        except ShardError as error:
            refused += 1
            assert error.diagnosis is not None
            assert error.diagnosis.policy == "refuse"
            assert any(problem.diagnosis.is_bad for problem in found.problems)
        else:
            # where nothing is wrong, both find the same
            assert [sample.key for sample in found.samples] == index.keys_of(np.arange(len(index)))
            assert not any(problem.diagnosis.is_bad for problem in found.problems)
            ends = (index.offsets + index.sizes)[index.sizes >= 0]
            assert not len(ends) or ends.max() <= len(data)

    fuzz(tar_seeds(), examples, check)
    assert 0 < refused < examples


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("has_manifest", [False, True])
@sizes(40, 1_500)
def test_what_is_repaired_of_any_tar_is_good(
    has_manifest: bool, examples: int, data_set: Path, tmp_path: Path
) -> None:
    folder, out = tmp_path / "o", tmp_path / "r"
    folder.mkdir()
    for name, data in bytes_of(data_set).items():
        if has_manifest or name.endswith(".tar"):
            (folder / name).write_bytes(data)
    tar = folder / "train-000001.tar"
    changed = 0

    def check(data: bytes, mend: bool) -> None:
        nonlocal changed
        tar.write_bytes(with_checksums(data) if mend else data)
        before = bytes_of(folder)
        result = repair(str(folder), out)
        assert bytes_of(folder) == before
        assert verify(str(out), Checks(decode=True)).is_good
        changed += not result.report.is_good
        copied = sum(map(result.manifest.samples, result.manifest.splits))
        assert copied >= 3  # those of the other two shards

    fuzz([tar.read_bytes()], examples, check)
    assert changed > 0


# Side-cars

ALL = np.arange(1000)


def index_seed() -> tuple[bytes, int]:
    data = tar_seeds()[2]
    return index_bytes(scan_file(io.BytesIO(data), len(data), "x.tar")), len(data)


def with_a_section_more(data: bytes) -> bytes:
    """A side-car as a later version may write it, which this one reads all the same."""
    length = struct.unpack_from("<I", data, 8)[0]
    record = json.loads(data[16 : 16 + length])
    for section in record["sections"]:
        section[3] += 512
    record["file_bytes"] += 512
    record["sections"].append(["later", "<f4", [2, 2], *record["sections"][0][3:]])
    header = json.dumps(record).encode().ljust(length + 512)
    assert len(header) == length + 512
    preamble = data[:8] + struct.pack("<II", len(header), google_crc32c.value(header))
    return preamble + header + data[16 + length :]


def version_2(data: bytes, tar_bytes: int) -> bytes:
    index = parse_index(data, "x.idx", tar_bytes)
    header = json.dumps(
        {"tar_bytes": index.tar_bytes, "samples": len(index), "fields": index.fields}
    ).encode()
    checksums = index.checksums.tobytes()
    rest = header + bytes(-(16 + len(header)) % 8) + index.offsets.tobytes()
    rest += index.sizes.tobytes() + checksums + bytes(-len(checksums) % 8)
    rest += index.key_ends.tobytes() + bytes(index.keys)
    return b"GWIDX\0\0\2" + struct.pack("<II", len(header), google_crc32c.value(rest)) + rest


def with_index_checksums(data: bytes) -> bytes:
    """The side-car with the length and the checksums that fit its content, as far as possible."""
    if len(data) < 16 or data[7] not in (2, 3):
        return data
    if data[7] == 2:
        return data[:12] + struct.pack("<I", google_crc32c.value(data[16:])) + data[16:]
    length = struct.unpack_from("<I", data, 8)[0]
    end = min(len(data), 16 + length)
    header = data[16:end]
    try:
        record = json.loads(header)
        record["file_bytes"] = len(data)
        for section in record["sections"]:
            size = np.dtype(section[1]).itemsize * int(np.prod(section[2], dtype=object))
            part = data[section[3] : section[3] + size + -size % 8]
            section[4] = int(google_crc32c.value(part))
        new = json.dumps(record, separators=(",", ":")).encode()
        if len(new) <= len(header):
            header = new + b" " * (len(header) - len(new))
    except (LookupError, TypeError, ValueError, ArithmeticError, RecursionError, SyntaxError):
        pass  # then with its own checksum only
    preamble = data[:8] + struct.pack("<II", len(header), google_crc32c.value(header))
    return preamble + header + data[end:]


@pytest.mark.parametrize("version", [2, 3])
@sizes(300, 14_000)
def test_any_side_car_is_read_or_refused(version: int, examples: int, tmp_path: Path) -> None:
    seed, tar_bytes = index_seed()
    seeds = [seed, with_a_section_more(seed)] if version == 3 else [version_2(seed, tar_bytes)]
    for whole in seeds:
        assert len(parse_index(whole, "x.idx", tar_bytes)) == 4
    path = tmp_path / "x.idx"
    accepted = 0

    def check(data: bytes, mend: bool) -> None:
        nonlocal accepted
        data = with_index_checksums(data) if mend else data
        try:
            parse_index_header(data, "x.idx", len(data))
        except ShardError as error:
            assert error.diagnosis is not None
        try:
            index = parse_index(data, "x.idx", tar_bytes)
        except ShardError as error:
            assert error.diagnosis is not None
            return
        accepted += 1
        assert all(
            index.key(row) == key for row, key in enumerate(index.keys_of(ALL[: len(index)]))
        )
        for plan in plan_reads("x.tar", index, np.arange(len(index))):
            assert 0 <= plan.begin <= plan.end <= tar_bytes
        assert len(index.digest()) == 64
        if accepted % 10 == 0:
            path.write_bytes(data)
            assert map_index(path, tar_bytes).digest() == index.digest()

    fuzz(seeds, examples, check)
    assert 0 < accepted < examples


# Descriptions


@pytest.fixture(scope="module")
def data_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "o"
    samples = (("train", Sample(f"k{i}", picture("PNG"), "png", f"t{i}")) for i in range(5))
    concepts = [Concept(0, "zero", ("null",)), Concept(1, "one")]
    write_shards(
        samples, folder, name="n", source={}, licence="l", concepts=concepts, max_samples=2
    )
    return folder


@sizes(250, 10_000)
def test_any_description_is_read_or_refused(examples: int, data_set: Path, tmp_path: Path) -> None:
    accepted = 0

    def check(data: bytes, is_manifest: bool) -> None:
        nonlocal accepted
        for parse in (parse_manifest, parse_concepts):
            try:
                parse(data, "x.json")
                accepted += 1
            except ShardError as error:
                assert error.diagnosis is not None

    fuzz([(data_set / name).read_bytes() for name in (MANIFEST, CONCEPTS)], examples, check)
    assert accepted > 0


@sizes(100, 3_000)
def test_any_statistics_are_read_or_refused(examples: int, data_set: Path, tmp_path: Path) -> None:
    def check(data: bytes, _: bool) -> None:
        (tmp_path / STATISTICS).write_bytes(data)
        try:
            read_statistics(tmp_path)
        except ShardError as error:
            assert STATISTICS in str(error)

    fuzz([(data_set / STATISTICS).read_bytes()], examples, check)


@sizes(300, 9_000)
def test_any_json_member_makes_a_sample_or_is_bad(examples: int) -> None:
    seeds = [
        json.dumps(record, ensure_ascii=False).encode()
        for record in (
            {"label": 3, "boxes": [[0.5, 1.0, 2.0, 3.5]], "caption": "ein großer Käfer"},
            {"a": {"b": {"c": [None, True, 1e-7, "x"]}}, "label": -1},
        )
    ]
    good = 0

    def check(data: bytes, is_text: bool) -> None:
        nonlocal good
        fields = {"jpg": b"x", "txt": data if is_text else b"", "json": b"{}" if is_text else data}
        try:
            sample = sample_from_fields("k", fields)
            class_label(sample)
            good += 1
        except SampleError as error:
            assert error.diagnosis.policy == "quarantine"

    fuzz(seeds, examples, check)
    assert 0 < good < examples


# Images


def image_seeds() -> list[bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    return [
        picture("JPEG", exif=exif),
        picture("JPEG", progressive=True, icc_profile=b"profile" * 30),
        picture("PNG"),
        picture("WEBP"),
        picture("WEBP", lossless=True),
    ]


def with_crcs(data: bytes) -> bytes:
    """The chunks of a PNG with the checksums that they should have."""
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        return data
    parts, at = [data[:8]], 8
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        end = at + 8 + length
        if end + 4 > len(data):
            break
        parts += [data[at:end], struct.pack(">I", zlib.crc32(data[at + 4 : end]))]
        at = end + 4
    return b"".join(parts) + data[at:]


@sizes(600, 15_000)
def test_any_image_is_decoded_or_bad(examples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from groundwork.data.image_header import image_size

    # headers of a few bytes may ask for MAX_PIXELS, which is more than this test gives
    monkeypatch.setattr(decode, "MAX_PIXELS", 2_000_000)
    transform = ImageTransform(size=8)
    good = 0

    def check(data: bytes, mend: bool) -> None:
        nonlocal good
        data = with_crcs(data) if mend else data
        width, height = image_size(data)
        assert 0 <= width < 2**31
        assert 0 <= height < 2**31
        results: list[Any] = []
        for attempt in (
            lambda: decode.peculiarities(decode.open_image(data)),
            lambda: training_image(data, transform, np.random.default_rng(0)),
            lambda: decode.decode_image(data),
        ):
            try:
                with decode.ignoring_warnings():
                    results.append(attempt())
            except SampleError as error:
                assert error.diagnosis.policy == "quarantine"
        good += len(results) == 3

    fuzz(image_seeds(), examples, check)
    assert 0 < good < examples
