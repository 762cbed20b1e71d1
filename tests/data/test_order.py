"""Orders: permutations, their statistics, and blocks of shards."""

import math
import pickle
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from groundwork.data.order import (
    BlockOrder,
    GlobalOrder,
    order_quality,
    replacement,
    sample_generator,
)

SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 63, 64, 65, 1023, 1024, 1025, 4095, 4097, 100_000]


def epoch(size: int, seed: int, number: int = 0) -> np.ndarray:
    return GlobalOrder(size, seed).indices(np.arange(number * size, (number + 1) * size))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", [0, 1, 2**63])
def test_every_sample_comes_once_per_epoch(size: int, seed: int) -> None:
    for number in (0, 1, 10**6):
        assert np.array_equal(np.sort(epoch(size, seed, number)), np.arange(size))


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**64))
def test_every_size_and_seed_gives_a_permutation(size: int, seed: int) -> None:
    assert np.array_equal(np.sort(epoch(size, seed)), np.arange(size))


@settings(deadline=None)
@given(
    size=st.integers(1, 10**6),
    seed=st.integers(0, 9),
    positions=st.lists(st.integers(0, 10**12), min_size=1, max_size=9),
)
def test_an_element_does_not_depend_on_what_is_asked_with_it(
    size: int, seed: int, positions: list[int]
) -> None:
    order = GlobalOrder(size, seed)
    together = order.indices(np.array(positions))
    assert together.tolist() == [int(order.indices(np.array([p]))[0]) for p in positions]
    assert together.dtype == np.int64


def test_without_shuffling_the_order_is_that_of_the_shards() -> None:
    order = GlobalOrder(3, seed=5, shuffle=False)
    assert order.indices(np.arange(7)).tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_the_order_never_changes_between_versions() -> None:
    """A resumed run relies on it; these numbers may change with a format version only."""
    assert epoch(10, 0).tolist() == [5, 7, 4, 0, 6, 8, 9, 1, 2, 3]
    assert epoch(10, 0, 1).tolist() == [1, 6, 9, 2, 3, 8, 4, 0, 5, 7]
    assert epoch(2000, 0)[:10].tolist() == [1946, 14, 54, 572, 431, 1003, 1999, 776, 1935, 1470]
    assert epoch(2000, 0, 1)[:10].tolist() == [
        1926,
        1226,
        724,
        1871,
        384,
        677,
        1131,
        1216,
        473,
        477,
    ]


def test_a_far_element_of_a_large_order_costs_no_more_than_the_first() -> None:
    order = GlobalOrder(10**8, seed=0)
    order.indices(np.arange(4))
    tracemalloc.start()
    began = time.perf_counter()
    order.indices(np.arange(10**9, 10**9 + 256))
    seconds = time.perf_counter() - began
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < 0.2
    assert peak < 10**6


def test_an_order_without_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="num_samples is 0"):
        GlobalOrder(0, 0)


# The statistics below are of fixed seeds, so they pass or fail for good. Their bounds are such that
# a true shuffle stays inside with odds of a thousand to one or more.


@pytest.mark.parametrize("size", [1000, 1024, 1025, 65_536, 100_003])
def test_positions_and_samples_are_unrelated(size: int) -> None:
    bound = 4 / math.sqrt(size)
    first, second, other_seed = epoch(size, 0), epoch(size, 0, 1), epoch(size, 1)
    positions = np.arange(size)

    def correlation(a: np.ndarray, b: np.ndarray) -> float:
        return abs(float(np.corrcoef(a, b)[0, 1]))

    assert correlation(positions, first) < bound
    assert correlation(first, second) < bound
    assert correlation(first, other_seed) < bound
    assert correlation(first[:-1], first[1:]) < bound  # neighbours in the stream
    inverse = np.argsort(first)
    assert correlation(inverse[:-1], inverse[1:]) < bound  # where neighbours in a shard end up


@pytest.mark.parametrize("size", [4096, 5000, 100_003])
def test_each_part_of_the_stream_draws_evenly_from_each_part_of_the_data(size: int) -> None:
    parts = 16
    table, *_ = np.histogram2d(np.arange(size), epoch(size, 3), bins=parts)
    expected = size / parts**2
    chi_square = float(((table - expected) ** 2 / expected).sum())
    # rows and columns are fixed by the permutation, hence (parts - 1)^2 degrees of freedom
    low, high = stats.chi2.ppf([0.001, 0.999], (parts - 1) ** 2)
    assert low < chi_square < high


@pytest.mark.parametrize("size", [1000, 4096, 30_000])
def test_the_low_bits_of_samples_in_a_row_are_those_of_coin_tosses(size: int) -> None:
    order = epoch(size, 11)
    for bit in range(4):
        tosses = (order >> bit) & 1
        runs = 1 + int((tosses[1:] != tosses[:-1]).sum())
        ones = int(tosses.sum())
        mean = 2 * ones * (size - ones) / size + 1  # Wald and Wolfowitz
        deviation = math.sqrt((mean - 1) * (mean - 2) / (size - 1))
        assert abs(runs - mean) < 4 * deviation


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_all_orders_of_a_few_samples_are_equally_likely(size: int) -> None:
    trials = 60 * math.factorial(size)
    order = GlobalOrder(size, seed=0).indices(np.arange(trials * size)).reshape(trials, size)
    _, counts = np.unique(order, axis=0, return_counts=True)
    assert len(counts) == math.factorial(size)  # 60 chances each
    assert stats.chisquare(counts).pvalue > 0.001


def test_fixed_points_are_as_rare_as_in_a_true_shuffle() -> None:
    size, epochs = 500, 400
    order = GlobalOrder(size, seed=2).indices(np.arange(size * epochs)).reshape(epochs, size)
    # a permutation has one fixed point on average, with variance one
    fixed = float((order == np.arange(size)).sum(1).mean())
    assert abs(fixed - 1) < 4 / math.sqrt(epochs)


def test_replacements_are_spread_over_the_data_set() -> None:
    drawn = [replacement(0, 20, p, attempt) for p in range(500) for attempt in (1, 2)]
    assert stats.chisquare(np.bincount(drawn, minlength=20)).pvalue > 0.001
    assert drawn == [replacement(0, 20, p, attempt) for p in range(500) for attempt in (1, 2)]
    pairs = np.array(drawn).reshape(-1, 2)
    assert abs(np.corrcoef(pairs.T)[0, 1]) < 4 / math.sqrt(500)


def test_the_numbers_of_a_position_are_its_own() -> None:
    def draw(seed: int, position: int) -> list[float]:
        return sample_generator(seed, position).random(3).tolist()

    assert draw(0, 5) == draw(0, 5)
    assert len({tuple(draw(seed, p)) for seed in range(3) for p in range(100)}) == 300
    first = np.array([draw(0, p)[0] for p in range(1000)])
    assert stats.kstest(first, "uniform").pvalue > 0.001
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 4 / math.sqrt(1000)


SHARDS = st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(any)


@settings(max_examples=150, deadline=None)
@given(sizes=SHARDS, seed=st.integers(0, 2**64), block=st.integers(1, 300))
def test_blocks_hold_every_sample_once_per_epoch(sizes: list[int], seed: int, block: int) -> None:
    order, total = BlockOrder(sizes, seed, block), sum(sizes)
    for number in (0, 1, 10**6):
        indices = order.indices(np.arange(number * total, (number + 1) * total))
        assert np.array_equal(np.sort(indices), np.arange(total))


@settings(max_examples=60, deadline=None)
@given(
    sizes=SHARDS, block=st.integers(1, 99), positions=st.lists(st.integers(0, 10**6), min_size=1)
)
def test_an_element_of_a_block_does_not_depend_on_what_is_asked_with_it(
    sizes: list[int], block: int, positions: list[int]
) -> None:
    order = BlockOrder(sizes, 3, block)
    together = order.indices(np.array(positions)).tolist()
    copy = pickle.loads(pickle.dumps(order))
    assert together == [int(copy.indices(np.array([p]))[0]) for p in positions]


def test_a_block_reads_its_shards_and_no_others() -> None:
    sizes, block = [100] * 50, 500
    order = BlockOrder(sizes, 0, block)
    shards = order.indices(np.arange(10_000)) // 100
    by_block = shards.reshape(-1, block)
    assert all(len(np.unique(row)) == 5 for row in by_block)
    assert len({tuple(np.unique(row)) for row in by_block}) == 20  # other company in epoch 2
    assert not np.array_equal(by_block[0], np.sort(by_block[0]))


def test_a_block_of_one_sample_reads_shard_after_shard() -> None:
    indices = BlockOrder([10] * 20, 1, 1).indices(np.arange(200))
    assert all(len(np.unique(row)) == 1 for row in (indices // 10).reshape(-1, 10))
    assert not np.array_equal(indices // 10, np.repeat(np.arange(20), 10))
    assert not np.array_equal(indices[:10] % 10, np.arange(10))


def test_the_order_of_blocks_never_changes_between_versions() -> None:
    order = BlockOrder([4, 3, 5], 0, 6)
    assert order.indices(np.arange(12)).tolist() == [11, 6, 10, 9, 8, 5, 7, 4, 1, 2, 3, 0]
    assert order.indices(np.arange(12, 24)).tolist() == [4, 8, 5, 11, 7, 9, 10, 6, 3, 1, 2, 0]


def test_a_far_element_among_many_shards_opens_at_once() -> None:
    """10^8 samples in 10^4 shards; what is computed is of the size of the shard list."""
    order = BlockOrder([10_000] * 10_000, 0, 1_000_000)
    began = time.perf_counter()
    indices = order.indices(np.arange(10**7, 10**7 + 256))
    assert time.perf_counter() - began < 0.2
    assert 1 < len(np.unique(indices // 10_000)) <= 101


def test_quality_says_how_far_an_order_is_from_a_uniform_shuffle() -> None:
    sizes = [100] * 200
    uniform = order_quality(GlobalOrder(20_000, 0), sizes, batch=256, window=1000)
    assert uniform.same_shard == pytest.approx(1, rel=0.1)
    assert uniform.open_shards == pytest.approx(200 * (1 - math.exp(-5)), rel=0.02)
    blocks = order_quality(BlockOrder(sizes, 0, 1000), sizes, batch=256, window=1000)
    assert blocks.same_shard == pytest.approx(20, rel=0.1)  # one shard of 10 instead of 200
    assert blocks.open_shards < 21
    whole = order_quality(BlockOrder(sizes, 0, 20_000), sizes, batch=256, window=1000)
    assert whole.same_shard == pytest.approx(1, rel=0.1)
    assert order_quality(GlobalOrder(1, 0), [1]).same_shard == 1


@pytest.mark.parametrize(("sizes", "block"), [([], 1), ([0, 0], 1), ([3], 0), ([2, -1], 5)])
def test_blocks_without_samples_are_refused(sizes: list[int], block: int) -> None:
    with pytest.raises(ValueError, match="need at least one"):
        BlockOrder(sizes, 0, block)
