"""Mixtures: counts of every prefix, schedules, weights."""

import pickle
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groundwork.data.mixture import MAX_PERIOD, Mixture, MixtureError, period_quotas

WEIGHTS = st.lists(st.integers(0, 60), min_size=1, max_size=8).filter(any)


def counts_of(sources: np.ndarray, number: int) -> np.ndarray:
    """(n, S): of each source among the first 1, 2, ..., n positions."""
    return np.cumsum(sources[:, None] == np.arange(number), axis=0)


@settings(max_examples=150, deadline=None)
@given(weights=WEIGHTS)
def test_every_prefix_is_within_one_sample_of_its_weights(weights: list[int]) -> None:
    mixture = Mixture(weights)
    length = 3 * sum(weights) + 5
    sources, ordinals = mixture.locate(np.arange(length))
    counts = counts_of(sources, len(weights))
    ideal = np.arange(1, length + 1)[:, None] * [Fraction(w, sum(weights)) for w in weights]
    assert (abs(counts - ideal) < 1).all()
    for source in range(len(weights)):
        assert np.array_equal(ordinals[sources == source], np.arange(counts[-1, source]))


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.floats(1e-7, 1e3), min_size=1, max_size=12),
    position=st.integers(0, 10**12),
)
def test_far_positions_keep_the_promise_too(weights: list[float], position: int) -> None:
    mixture = Mixture(weights)
    kept = mixture.weights(position)
    counts = mixture.counts(position)
    assert int(counts.sum()) == position
    assert all(abs(int(c) - position * w) < 1 for c, w in zip(counts, kept, strict=True))
    source, ordinal = mixture.locate(np.array([position]))
    assert ordinal[0] == counts[source[0]]


@settings(max_examples=60, deadline=None)
@given(
    schedule=st.lists(
        st.tuples(st.integers(1, 400), st.tuples(*[st.integers(0, 9)] * 3).filter(any)),
        min_size=1,
        max_size=4,
    )
)
def test_a_schedule_keeps_the_promise_across_its_changes(
    schedule: list[tuple[int, tuple[int, int, int]]],
) -> None:
    changes = {0: (1, 1, 1), **dict(schedule)}
    mixture = Mixture(changes)
    length = 600
    sources, ordinals = mixture.locate(np.arange(length))
    ideal = np.cumsum([mixture.weights(n) for n in range(length)], axis=0)
    counts = counts_of(sources, 3)
    assert (abs(counts - ideal) < 1).all()
    for n in (0, 1, 37, length):
        assert mixture.counts(n).tolist() == (counts[n - 1].tolist() if n else [0, 0, 0])
    for source in range(3):
        of_source = ordinals[sources == source]
        assert np.array_equal(of_source, np.arange(len(of_source)))


@settings(max_examples=60, deadline=None)
@given(
    starts=st.lists(st.integers(1, 30_000), min_size=1, max_size=5, unique=True),
    seed=st.integers(0, 2**32),
)
def test_changes_may_come_faster_than_periods_end(starts: list[int], seed: int) -> None:
    """Weights of many digits have periods of thousands of samples."""
    rng = np.random.default_rng(seed)
    digits = rng.integers(1, 6, len(starts) + 1)
    weights = [np.maximum(rng.random(3), 0.01).round(n) + 10.0**-n for n in digits]
    mixture = Mixture({p: w.tolist() for p, w in zip([0, *sorted(starts)], weights, strict=True)})
    length = 60_000
    sources, ordinals = mixture.locate(np.arange(length))
    for source in range(3):
        of_source = ordinals[sources == source]
        assert np.array_equal(of_source, np.arange(len(of_source)))
    begins = [stage.begin for stage in mixture.stages]
    assert begins == sorted(set(begins))
    kept = np.zeros((length, 3))
    for begin in begins:
        kept[begin:] = [float(w) for w in mixture.weights(begin)]
    counts = counts_of(sources, 3)
    assert (abs(counts - np.cumsum(kept, axis=0)) < 1 + 1e-6).all()
    for n in (1, 19_999, length):
        assert mixture.counts(n).tolist() == counts[n - 1].tolist()


def test_a_change_waits_for_the_end_of_its_period() -> None:
    mixture = Mixture({0: [1, 2], 4: [1, 0]})
    assert mixture.locate(np.arange(9))[0].tolist()[6:] == [0, 0, 0]
    assert sorted(mixture.locate(np.arange(3, 6))[0].tolist()) == [0, 1, 1]


def test_decimal_weights_are_meant_exactly() -> None:
    assert period_quotas([0.7, 0.2, 0.1]) == [7, 2, 1]
    assert period_quotas([1_000_000, 3_000_000]) == [1, 3]
    assert period_quotas([0.5]) == [1]
    assert Mixture([0.7, 0.3]).weights(0) == [Fraction(7, 10), Fraction(3, 10)]


@given(weights=st.lists(st.floats(0, 1e6), min_size=1, max_size=50).filter(any))
def test_rounding_is_by_less_than_two_parts(weights: list[float]) -> None:
    quotas = period_quotas(weights)
    period, total = sum(quotas), sum(map(Fraction, map(str, weights)))
    assert period <= MAX_PERIOD
    raised = sum(0 < Fraction(str(w)) / total * period < 1 for w in weights)
    for quota, weight in zip(quotas, weights, strict=True):
        assert (quota > 0) == (weight > 0)
        assert abs(quota - Fraction(str(weight)) / total * period) < 2 + raised


@pytest.mark.parametrize("weights", [[], [0.0, 0], [-1, 2], [float("nan"), 1], [float("inf")]])
def test_weights_that_make_no_mixture_are_refused(weights: list[float]) -> None:
    with pytest.raises(MixtureError, match="weights"):
        Mixture(weights)


def test_a_schedule_begins_at_zero_and_keeps_its_sources() -> None:
    with pytest.raises(MixtureError, match="begins at sample 0, not at 5"):
        Mixture({5: [1, 1]})
    with pytest.raises(MixtureError, match="1 weights from sample 9 on for 2 sources"):
        Mixture({0: [1, 1], 9: [1]})


def test_a_pickled_mixture_is_the_same() -> None:
    mixture = Mixture([3, 2, 2])
    copy = pickle.loads(pickle.dumps(mixture))
    assert np.array_equal(copy.locate(np.arange(99)), mixture.locate(np.arange(99)))
