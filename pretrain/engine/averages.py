"""Averages that go along with training: of the weights for evaluation, and a momentum teacher."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from groundwork.pretrain.engine.batch_statistics import average_over_ranks, batch_statistics
from groundwork.pretrain.engine.ema import Ema, EmaConfig, ema_of_engine
from groundwork.pretrain.engine.momentum_teacher import MomentumTeacher


class Averages:
    """Whichever of the two a run has. Every rank calls the same methods in the same order."""

    def __init__(
        self,
        engine: Any,
        config: EmaConfig | None,
        total_steps: int,
        initial: Mapping[str, Tensor] | None = None,
    ) -> None:
        """config: of the average, None for none. The engine's module offers `momentum_pairs()` and
        `momentum(step, total_steps)` if it has a teacher.

        initial: unrounded initial weights, where there are any. The masters must be set by now.
        Raises ValueError for what cannot be averaged.
        """
        self._engine, self._total_steps = engine, total_steps
        self.ema: Ema | None = ema_of_engine(engine, config) if config is not None else None
        self.teacher: MomentumTeacher | None = None
        named = getattr(engine.module, "momentum_pairs", None)
        if named is not None and (pairs := named()):
            self.teacher = MomentumTeacher(engine, pairs, initial)

    def after_step(self, done: int) -> None:
        """An optimiser step has been made. done: steps so far, this one included."""
        if self.teacher is not None:
            self.teacher.update(self._engine.module.momentum(done - 1, self._total_steps))
        # what each rank gathers for itself; after every step, as the moment of a save must not
        # decide what a run comes to
        average_over_ranks(batch_statistics(self._engine.module))
        if self.ema is not None:
            self.ema.update()

    @property
    def has_state(self) -> bool:
        return self.ema is not None or self.teacher is not None

    def is_saved_by(self, rank: int) -> bool:
        """Without ZeRO every rank has the whole, and the first one saves it for all."""
        return self.has_state and (rank == 0 or self._engine.zero_optimization_stage() > 0)

    def state_dict(self) -> dict[str, Any]:
        """This rank's parts."""
        state: dict[str, Any] = {}
        if self.ema is not None:
            state["ema"] = self.ema.state_dict()
        if self.teacher is not None:
            state["teacher"] = self.teacher.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError where the state is not of this run's averages."""
        if self.ema is not None:
            self.ema.load_state_dict(_entry(state, "ema"))
        if self.teacher is not None:
            self.teacher.load_state_dict(_entry(state, "teacher"))


def _entry(state: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    if name not in state:
        raise ValueError(f"no state of {name!r} was saved")
    entry: Mapping[str, Any] = state[name]
    return entry
