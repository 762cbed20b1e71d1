"""Mixtures: which source gives position i of the stream, exact in every prefix.

Weights are brought to whole quotas of a period of P positions. Within a period the j-th sample of a
source with weight w is due in the window [floor((j-1)/w), ceil(j/w)); serving the earliest deadline
first keeps all windows (Baruah et al., "Proportionate progress", Algorithmica 1996), and with them
every prefix of n positions within one sample of n·w, for each source at once. Periods repeat, so
any position is found by a division and a look into one table.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import gcd, isfinite, lcm

import numpy as np
from numpy.typing import NDArray

#: Longest period. Weights whose common denominator is larger are rounded to it.
MAX_PERIOD = 2**16


class MixtureError(ValueError):
    """Weights that make no mixture; says which, and what is expected."""


@dataclass(frozen=True)
class _Stage:
    """One set of weights. begin: its first position. before: (S,) samples of each source by then.

    quotas: (S,) of a period. table: (P,) source of each position. rank: (P,) how many positions of
    the same source precede it in the period.
    """

    begin: int
    before: NDArray[np.int64]
    quotas: NDArray[np.int64]
    table: NDArray[np.int64]
    rank: NDArray[np.int64]


class Mixture:
    """Interleaves sources by weight; a pure function of the position.

    weights: of each source, in any unit; or a schedule, {position: weights}, that begins at 0. A
        change takes effect at the end of the period it falls in, where all counts are exact; of
        several that fall into one period, the last.
    """

    def __init__(self, weights: Sequence[float] | Mapping[int, Sequence[float]]) -> None:
        schedule = weights if isinstance(weights, Mapping) else {0: weights}
        if (first := min(schedule, default=None)) != 0:
            raise MixtureError(f"a schedule of weights begins at sample 0, not at {first}")
        self.num_sources = len(schedule[0])
        self.stages: list[_Stage] = []
        for start, wanted in sorted(schedule.items()):
            if len(wanted) != self.num_sources:
                raise MixtureError(
                    f"{len(wanted)} weights from sample {start} on for {self.num_sources} sources"
                )
            self._add_stage(start, period_quotas(wanted))

    def _add_stage(self, start: int, quotas: list[int]) -> None:
        begin, before = 0, np.zeros(self.num_sources, np.int64)
        if self.stages:
            last = self.stages[-1]
            # none where the last change still waits for its own beginning: it takes no effect
            periods = max(0, -(-(start - last.begin) // len(last.table)))
            begin = last.begin + periods * len(last.table)
            before = last.before + periods * last.quotas
            if begin == last.begin:
                self.stages.pop()
        table = _earliest_deadline_first(quotas)
        rank = np.empty_like(table)
        for source, quota in enumerate(quotas):
            rank[table == source] = np.arange(quota)
        self.stages.append(_Stage(begin, before, np.array(quotas, np.int64), table, rank))

    def locate(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The source of each position, and its number among that source's. (K,) -> (K,), (K,)."""
        positions = np.asarray(positions, np.int64)
        sources, ordinals = np.empty_like(positions), np.empty_like(positions)
        begins = [stage.begin for stage in self.stages]
        numbers = np.searchsorted(begins, positions, side="right") - 1
        for number in np.unique(numbers):
            chosen, stage = numbers == number, self.stages[number]
            periods, within = np.divmod(positions[chosen] - stage.begin, len(stage.table))
            source = stage.table[within]
            sources[chosen] = source
            ordinals[chosen] = (
                stage.before[source] + periods * stage.quotas[source] + stage.rank[within]
            )
        return sources, ordinals

    def counts(self, position: int) -> NDArray[np.int64]:
        """Samples of each source among the first `position` positions. -> (S,) int64."""
        stage = next(s for s in reversed(self.stages) if s.begin <= position)
        periods, within = divmod(position - stage.begin, len(stage.table))
        rest = np.bincount(stage.table[:within], minlength=self.num_sources)
        return stage.before + periods * stage.quotas + rest

    def weights(self, position: int) -> list[Fraction]:
        """The weights in effect at a position, as they are kept: exact, of sum 1."""
        stage = next(s for s in reversed(self.stages) if s.begin <= position)
        return [Fraction(int(quota), len(stage.table)) for quota in stage.quotas]


def period_quotas(weights: Sequence[float]) -> list[int]:
    """Whole numbers in the ratio of the weights, of sum at most MAX_PERIOD.

    Exact for decimal weights of few digits, such as 0.7 and 0.3. Else rounded, by at most one part
    in MAX_PERIOD; a source of any weight above zero keeps at least one part.
    """
    if not weights or not all(isfinite(w) and w >= 0 for w in weights) or not any(weights):
        raise MixtureError(
            f"weights {list(weights)}: expected finite numbers, none negative, not all zero"
        )
    # 0.1 is meant as a tenth, not as the binary fraction next to it
    exact = [Fraction(str(w)) if isinstance(w, float) else Fraction(w) for w in weights]
    scale = lcm(*(w.denominator for w in exact))
    quotas = [int(w * scale) for w in exact]
    divisor = gcd(*quotas)
    quotas = [quota // divisor for quota in quotas]
    if sum(quotas) <= MAX_PERIOD:
        return quotas
    total = sum(exact)
    shares = [w / total * MAX_PERIOD for w in exact]
    quotas = [max(int(share), int(share > 0)) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda s: quotas[s] - shares[s])
    missing = MAX_PERIOD - sum(quotas)
    for source in by_remainder[: max(0, missing)]:
        quotas[source] += 1
    while sum(quotas) > MAX_PERIOD:  # many tiny weights were raised to one part
        quotas[max(range(len(quotas)), key=quotas.__getitem__)] -= 1
    return quotas


def _earliest_deadline_first(quotas: Sequence[int]) -> NDArray[np.int64]:
    """A period: (P,) sources, P = sum(quotas), each as often as its quota and evenly spread."""
    period = sum(quotas)
    # (release, source, number) of the next sample of each source; then, once released, by deadline
    waiting = [(0, source, 1) for source, quota in enumerate(quotas) if quota]
    ready: list[tuple[int, int, int]] = []
    table = np.empty(period, np.int64)
    for slot in range(period):
        while waiting and waiting[0][0] <= slot:
            _, source, number = heapq.heappop(waiting)
            heapq.heappush(ready, (-(-number * period // quotas[source]), source, number))
        _, source, number = heapq.heappop(ready)
        table[slot] = source
        if number < quotas[source]:
            heapq.heappush(waiting, (number * period // quotas[source], source, number + 1))
    return table
