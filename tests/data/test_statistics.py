import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from groundwork.data.data_card import bars, is_card
from groundwork.data.duplicates import equal_hashes, hash64, write_run
from groundwork.data.samples import Sample
from groundwork.data.shard_index import ShardError
from groundwork.data.shards import read_statistics, write_shards
from groundwork.data.statistics import Duplicates, Histogram, SplitStatistics, Statistics

counts = st.lists(st.integers(0, 10**6), max_size=40)


@given(values=counts, bins=st.lists(st.integers(0, 10**6), min_size=1, max_size=9, unique=True))
def test_a_histogram_counts_every_value_once(values: list[int], bins: list[int]) -> None:
    edges = sorted(bins)
    histogram = Histogram.empty(tuple(edges))
    histogram.add(values)
    expected = [0] * len(edges)
    for value in values:
        expected[max((i for i, edge in enumerate(edges) if edge <= value), default=0)] += 1
    assert histogram.counts == expected
    assert histogram.values == len(values)
    if values:
        assert (histogram.minimum, histogram.maximum) == (min(values), max(values))
        assert histogram.total == sum(values)
        assert histogram.mean == (pytest.approx(np.mean(values)) if sum(values) else None)


sample_numbers = st.lists(
    st.tuples(st.integers(0, 5000), st.integers(0, 5000), st.integers(0, 9999), st.integers(0, 99)),
    max_size=30,
)


def counted(numbers: list[tuple[int, int, int, int]]) -> SplitStatistics:
    statistics = SplitStatistics()
    columns = list(zip(*numbers, strict=True)) or [()] * 4
    statistics.add(
        widths=columns[0],
        heights=columns[1],
        image_bytes=columns[2],
        text_characters=columns[3],
        sample_bytes=sum(columns[2]),
    )
    return statistics


@given(first=sample_numbers, second=sample_numbers)
def test_statistics_of_parts_add_up_and_survive_json(
    first: list[tuple[int, int, int, int]], second: list[tuple[int, int, int, int]]
) -> None:
    merged = counted(first)
    merged.merge(counted(second))
    assert merged == counted(first + second)
    whole = Statistics({"train": merged}, Duplicates(1, 2, 0, ((("train", "a"), ("val", "b")),)))
    assert Statistics.from_record(json.loads(json.dumps(whole.record()))) == whole


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    shards=st.lists(
        st.lists(st.tuples(st.integers(1, 2**64 - 1) | st.integers(2**62, 2**62 + 4))), max_size=5
    ),
    in_memory=st.integers(1, 20),
)
def test_equal_hashes_are_found_in_any_number_of_passes(
    shards: list[list[tuple[int]]], in_memory: int, tmp_path: Path
) -> None:
    runs = []
    expected = defaultdict(list)
    for number, shard in enumerate(shards):
        keys = np.array([value for (value,) in shard], np.uint64)
        runs.append(tmp_path / f"{number}.hashes")
        write_run(runs[-1], keys, np.zeros(len(keys), np.uint64))
        for row, (value,) in enumerate(shard):
            expected[value].append((number, row))
    found = list(equal_hashes(runs, "key", in_memory=in_memory))
    assert sorted(found) == sorted(group for group in expected.values() if len(group) > 1)
    assert list(equal_hashes(runs, "image", in_memory=in_memory)) == []  # samples without images


def test_a_hash_is_that_of_sha256() -> None:
    assert hash64(b"abc") == int.from_bytes(bytes.fromhex("ba7816bf8f01cfea"), "little")


PICTURE = b"\xff\xd8\xff\xc0\x00\x11\x08\x00\x20\x00\x40\x03\x00\x00\x00"  # the header of 64 x 32


def data_set(out: Path, **options: int) -> None:
    pairs = [
        ("train", Sample("a", PICTURE + b"1", "jpg", "zwölf Boxkämpfer")),
        ("train", Sample("b", PICTURE + b"2", "jpg", " \n")),
        ("train", Sample("c", PICTURE + b"1", "jpg", "")),
        ("train", Sample("d", b"<html>", "jpg", "x")),
        ("train", Sample("e", b"", "", "no image", {}, {"mp4": b"1"})),
        ("val", Sample("a", PICTURE + b"2", "jpg", "y")),
        ("val", Sample("f", PICTURE + b"3", "jpg", "z")),
        ("val", Sample("g", b"", "", "no image", {}, {"mp4": b"1"})),
    ]
    write_shards(pairs, out, name="cats & dogs", source={"kind": "t"}, licence="CC0", **options)


@pytest.mark.parametrize("max_samples", [1, 2, 100])
def test_a_data_set_comes_with_its_statistics(max_samples: int, tmp_path: Path) -> None:
    data_set(tmp_path / "out", max_samples=max_samples)
    statistics = read_statistics(tmp_path / "out")
    assert statistics is not None
    train = statistics.splits["train"]
    assert (train.samples, train.images, train.unknown_sizes, train.missing_captions) == (
        5,
        4,
        1,
        2,
    )
    assert train.histograms["width"].minimum == train.histograms["width"].maximum == 64
    assert train.histograms["height"].mean == 32
    assert train.histograms["aspect"].maximum == 2
    assert train.histograms["image_bytes"].total == 3 * len(PICTURE + b"1") + len(b"<html>")
    assert train.histograms["text_characters"].maximum == len("zwölf Boxkämpfer")
    assert statistics.all_splits().samples == 8
    assert statistics.duplicates == Duplicates(
        contents=2,
        samples=2,
        across_splits=1,
        examples=((("train", "a"), ("train", "c")), (("train", "b"), ("val", "a"))),
    )
    assert not list((tmp_path / "out").glob("*.hashes"))


def test_the_card_tells_what_the_data_set_is(tmp_path: Path) -> None:
    data_set(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_bytes()
    text = card.decode()
    assert text.startswith("# cats & dogs\n\nLicence: CC0\n")
    assert "| train | 5 | 1 | 0.0 | 2 |" in text
    assert "`train/b`, `val/a`" in text
    assert "min 64  mean 64  max 64" in text
    assert is_card(card)
    assert not is_card(card.replace(b"cats", b"bats"))
    assert not is_card(card + b"and this")
    assert not is_card(b"")


def test_bars_are_as_long_as_their_counts() -> None:
    histogram = Histogram.empty((1, 10, 100, 1000))
    histogram.add([20] * 8 + [2000] * 3)
    lengths = [line.count("#") for line in bars(histogram)]
    assert lengths == [40, 0, 15]


@pytest.mark.parametrize("data", [b"", b"[]", b'{"format": "x"}', b"[" * 10**5])
def test_statistics_that_are_none_are_refused(data: bytes, tmp_path: Path) -> None:
    assert read_statistics(tmp_path) is None
    (tmp_path / "statistics.json").write_bytes(data)
    with pytest.raises(ShardError, match=r"statistics\.json: not statistics"):
        read_statistics(tmp_path)
