"""The C++ reader of members: checksums, hostile indices, damaged files, no access out of bounds."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import google_crc32c
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from groundwork.kernels import host_compiler, member_reader
from groundwork.kernels.member_reader import (
    BAD_INDEX,
    DAMAGED,
    FAILED,
    GOOD,
    NOT_READ,
    SHORT,
    MemberPlan,
    crc32c,
    find_member_reader,
    plan_members,
)

pytestmark = pytest.mark.skipif(
    find_member_reader() is None, reason="the reader cannot be compiled here"
)

ROWS, FIELDS = 50, 2


class Made(NamedTuple):
    """A file of two members per sample, and its index."""

    path: Path
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    checksums: NDArray[np.uint32]
    key_ends: NDArray[np.int64]
    keys: NDArray[np.uint8]

    def pointers(self) -> list[int]:
        addresses = [array.ctypes.data for array in self[1:]]
        return [len(self.sizes), self.sizes.shape[1], *addresses, len(self.keys)]

    def content(self, row: int, field: int) -> bytes:
        begin = int(self.offsets[row, field])
        return self.path.read_bytes()[begin : begin + int(self.sizes[row, field])]


def make(path: Path, seed: int = 0, gap: int = 100) -> Made:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, 3000, (ROWS, FIELDS))
    data, offsets = bytearray(), np.zeros((ROWS, FIELDS), np.int64)
    for row in range(ROWS):
        for field in range(FIELDS):
            data += bytes(gap)
            offsets[row, field] = len(data)
            data += rng.bytes(int(sizes[row, field]))
    path.write_bytes(data)
    parts = [
        [google_crc32c.value(bytes(data[o : o + s])) for o, s in zip(*row, strict=True)]
        for row in zip(offsets.tolist(), sizes.tolist(), strict=True)
    ]
    sizes[7, 1] = -1
    names = [f"key{row}" for row in range(ROWS)]
    ends = np.cumsum([len(name) for name in names])
    keys = np.frombuffer("".join(names).encode(), np.uint8).copy()
    return Made(path, offsets, sizes, np.array(parts, np.uint32), ends, keys)


def planned(made: list[Made], numbers: list[int], rows: list[int], **options: int) -> MemberPlan:
    return plan_members(
        np.array([one.pointers() for one in made], np.int64).reshape(-1, 8),
        np.tile(np.arange(FIELDS, dtype=np.int32), (len(made), 1)),
        np.array(numbers, np.int64),
        np.array(rows, np.int64),
        **options,
    )


def read(made: list[Made], plan: MemberPlan) -> MemberPlan:
    descriptors = [os.open(one.path, os.O_RDONLY) for one in made]
    try:
        plan.read(0, len(plan.runs), np.array(descriptors, np.int32))
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    return plan


def member(plan: MemberPlan, i: int, column: int) -> bytes:
    begin, size = int(plan.places[i, column]), int(plan.sizes[i, column])
    return plan.buffer[begin : begin + size].tobytes()


@pytest.mark.parametrize("by_tables", [False, True])
@settings(max_examples=200, deadline=None)
@given(size=st.integers(0, 5000), seed=st.integers(0, 2**31 - 1))
def test_checksums_are_those_of_google_crc32c(by_tables: bool, size: int, seed: int) -> None:
    data = np.random.default_rng(seed).bytes(size)
    assert crc32c(data, by_tables=by_tables) == google_crc32c.value(data)


@pytest.mark.parametrize("by_tables", [False, True])
def test_the_checksum_of_the_standard(by_tables: bool) -> None:
    """RFC 3720, appendix B.4."""
    assert crc32c(bytes(32), by_tables=by_tables) == 0x8A9136AA
    assert crc32c(b"\xff" * 32, by_tables=by_tables) == 0x62A8AB43
    assert crc32c(bytes(range(32)), by_tables=by_tables) == 0x46DD794E


@settings(max_examples=100, deadline=None)
@given(
    chosen=st.lists(st.tuples(st.integers(0, 2), st.integers(0, ROWS - 1)), max_size=60),
    gap=st.sampled_from([0, 100, 4096, 2**30]),
    threads=st.sampled_from([1, 3]),
    between=st.sampled_from([0, 100, 100_000]),
)
def test_any_samples_in_any_order(
    chosen: list[tuple[int, int]],
    gap: int,
    threads: int,
    between: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("files")
    made = [make(folder / f"{i}", i, between) for i in range(3)]
    numbers, rows = [number for number, _ in chosen], [row for _, row in chosen]
    plan = read(made, planned(made, numbers, rows, gap=gap, threads=threads))
    assert (plan.status == 0).all()
    for i, (number, row) in enumerate(chosen):
        assert member(plan, i, FIELDS) == b"key%d" % row
        for field in range(FIELDS):
            size = made[number].sizes[row, field]
            assert plan.sizes[i, field] == size
            if size >= 0:
                assert member(plan, i, field) == made[number].content(row, field)
    shutil.rmtree(folder)


def test_neighbours_are_read_at_once_and_strangers_are_not(tmp_path: Path) -> None:
    made = [make(tmp_path / "x")]
    together = planned(made, [0] * 20, list(range(29, 9, -1)))
    assert len(together.runs) == 1
    assert len(planned(made, [0, 0], [3, 30]).runs) == 2
    # what lies between is neither read nor kept
    assert len(planned(made, [0, 0], [3, 30]).buffer) < 4 * 3000 + 100
    # a sample that is asked for twice is there once
    twice = planned(made, [0, 0], [3, 3])
    assert len(twice.buffer) < 2 * 3000 + 200


def test_what_is_wrong_with_a_file_is_said_of_each_sample(tmp_path: Path) -> None:
    made = [make(tmp_path / str(i), i) for i in range(4)]
    made[2].sizes[4, 0] = made[1].sizes[40, 1] = 100
    made[1].checksums[40, 1] ^= 1
    end = int(made[2].offsets[20].min())
    os.truncate(made[2].path, end)
    made[3].path.unlink()
    made[3].path.mkdir()
    numbers, rows = [0, 0, 1, 1, 2, 2, 3], [0, 49, 39, 40, 18, 21, 0]
    plan = read(made, planned(made, numbers, rows))
    assert plan.status.tolist() == [
        *([GOOD, 0], [GOOD, 0], [GOOD, 0], [DAMAGED, 1], [GOOD, 0], [SHORT, 0]),
        [FAILED, errno.EISDIR],
    ]


def test_what_is_not_open_or_not_asked_for_is_not_read(tmp_path: Path) -> None:
    made = [make(tmp_path / str(i), i) for i in range(2)]
    plan = planned(made, [0, 1], [0, 0])
    with made[0].path.open("rb") as file:
        plan.read(0, 1, np.array([file.fileno(), -1], np.int32))
        assert plan.status.tolist() == [[GOOD, 0], [NOT_READ, 0]]
        plan.read(1, 2, np.array([file.fileno(), -1], np.int32))
    assert plan.status.tolist() == [[GOOD, 0], [FAILED, errno.EBADF]]


def hostile(folder: Path) -> list[Made]:
    """Indices whose checksums may be right, and whose numbers are not."""
    cases: list[tuple[str, int]] = [
        *(("offsets", value) for value in (-1, -(2**63), 2**63 - 1, 2**62, 2**40)),
        *(("sizes", value) for value in (-2, -(2**63), 2**63 - 1, 2**62, 2**46 + 1)),
        *(("key_ends", value) for value in (-1, 2**63 - 1, -(2**63), 10**6)),
    ]
    made = []
    for i, (name, value) in enumerate(cases):
        one = make(folder / str(i), i)
        array = getattr(one, name)
        array[(20,) if array.ndim == 1 else (20, 0)] = value
        made.append(one)
    return made


def run_hostile(folder: Path) -> None:
    made = hostile(folder)
    for number, one in enumerate(made):
        others = [*range(15, 19), *range(23, 27)]
        rows = [*others, 20, ROWS, -1, 2**62, -(2**63)]
        plan = read(made, planned(made, [number] * len(rows), rows))
        assert (plan.status[: len(others), 0] == GOOD).all()
        assert (plan.status[len(others) + 1 :, 0] == BAD_INDEX).all()
        assert plan.status[len(others), 0] in (BAD_INDEX, SHORT, FAILED)
        for i, row in enumerate(others):
            assert member(plan, i, 0) == one.content(row, 0)
    plan = read(made, planned(made, [-1, len(made), 2**62, 0], [0, 0, 0, 1]))
    assert plan.status[:, 0].tolist() == [BAD_INDEX] * 3 + [GOOD]
    # a column that the index does not have
    plan = plan_members(
        np.array([made[0].pointers()]), np.array([[5]], np.int32), np.array([0]), np.array([1])
    )
    assert plan.status[0, 0] == BAD_INDEX
    assert len(planned([], [], []).runs) == 0


def test_hostile_indices_spoil_nothing_but_their_own_samples(tmp_path: Path) -> None:
    run_hostile(tmp_path)


def test_arrays_that_do_not_fit_each_other_are_refused(tmp_path: Path) -> None:
    made = [make(tmp_path / "x")]
    with pytest.raises(ValueError, match="expected"):
        planned(made, [0, 0], [1])
    with pytest.raises(ValueError, match="gap is -1"):
        planned(made, [0], [1], gap=-1)


def test_more_than_memory_holds_is_refused_before_it_is_read(tmp_path: Path) -> None:
    made = [make(tmp_path / "x")]
    made[0].sizes[:, 0] = 2**31 - 1
    made[0].sizes[:, 1] = -1
    made[0].offsets[:, 0] = np.arange(ROWS) * 2**32
    with pytest.raises(MemoryError):
        planned(made * 800, np.repeat(np.arange(800), ROWS).tolist(), list(range(ROWS)) * 800)


def test_without_a_compiler_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("GROUNDWORK_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    caplog.set_level("INFO")
    host_compiler.load_host_library.cache_clear()
    member_reader._functions.cache_clear()
    try:
        assert find_member_reader() is None
        assert "no C++ compiler" in caplog.text
    finally:
        host_compiler.load_host_library.cache_clear()
        member_reader._functions.cache_clear()


@pytest.mark.parametrize("compiler", ["clang++", "aarch64-linux-gnu-g++"])
def test_other_compilers_and_processors(compiler: str, tmp_path: Path) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler} in PATH")
    flags = [*host_compiler.COMMON_FLAGS, "-Wall", "-Wextra", "-Werror"]
    source = host_compiler.SOURCES / member_reader.SOURCE
    subprocess.run([compiler, *flags, "-c", source, "-o", tmp_path / "code.o"], check=True)


SANITIZED = """
import ctypes, importlib.util, pathlib, sys
from groundwork.kernels import member_reader
library = member_reader.declare(ctypes.CDLL(sys.argv[1]))
member_reader._functions = lambda: library
spec = importlib.util.spec_from_file_location("tests_of_reader", sys.argv[2])
tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tests)
for size in range(0, 2100, 7):
    assert member_reader.crc32c(bytes(size)) == member_reader.crc32c(bytes(size), by_tables=True)
tests.run_hostile(pathlib.Path(sys.argv[3]))
made = [tests.make(pathlib.Path(sys.argv[3], "y"))]
for threads in (1, 3):
    rows = list(range(tests.ROWS))
    plan = tests.read(made, tests.planned(made, [0] * len(rows), rows, threads=threads))
    assert (plan.status == 0).all()
print("clean")
"""


def test_no_access_is_out_of_bounds(tmp_path: Path) -> None:
    """Under AddressSanitizer and UBSan, with hostile indices."""
    compiler = host_compiler.find_compiler()
    assert compiler is not None
    runtime = subprocess.run(
        [compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(runtime).is_absolute():
        pytest.skip(f"{compiler} has no AddressSanitizer")
    library = tmp_path / "sanitized.so"
    source = host_compiler.SOURCES / member_reader.SOURCE
    flags = ["-std=c++17", "-O1", "-g", "-fPIC", "-shared"]
    checks = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    subprocess.run([compiler, *flags, *checks, source, "-o", library], check=True)
    done = subprocess.run(
        [sys.executable, "-c", SANITIZED, str(library), __file__, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0"},
    )
    assert done.stdout.strip().endswith("clean"), done.stderr[-3000:]
