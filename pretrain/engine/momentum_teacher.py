"""A momentum teacher: parameters that are the exponential average of others, at any ZeRO stage."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from groundwork.pretrain.engine.masters import own_part, own_parts
from groundwork.pretrain.engine.parts import Part, follow, load_parts, part_state

#: Elements per collective: as few calls as a megabyte-sized buffer allows.
BUCKET = 1 << 25


class MomentumTeacher:
    """teacher <- m teacher + (1 - m) student, in float32, after each optimiser step.

    Each rank averages the parts whose masters it keeps, in a float32 shadow, as bf16 would swallow
    the updates; the teacher's parameters are rounded from that. ZeRO-3 partitions the teacher as it
    does the student, so a rank writes its own part; with ZeRO-1 and 2 the teacher is whole
    everywhere, and the ranks gather what each of them has averaged.
    """

    def __init__(
        self,
        engine: Any,
        pairs: Sequence[tuple[str, str]],
        initial: Mapping[str, Tensor] | None = None,
    ) -> None:
        """pairs: (teacher, student), names of the engine's module. The teachers are frozen.

        initial: what the teachers start from, unrounded, whole, by name; without it they start from
        what the module has. Collective. Raises ValueError for a pair that cannot be.
        """
        if getattr(engine.optimizer, "params_in_nvme_and_cpu", False):
            raise ValueError(
                "a momentum teacher needs its weights in memory, but "
                "deepspeed.zero_optimization.offload_param.device is nvme; use cpu or none"
            )
        self._engine = engine
        named = dict(engine.module.named_parameters())
        parts = own_parts(engine)
        for teacher, student in pairs:
            _check_pair(teacher, student, named)
        self._teachers = {teacher: named[teacher] for teacher, _ in pairs}
        # a rank of ZeRO-1 or 2 may have no part of some students
        self._students = {teacher: student for teacher, student in pairs if student in parts}
        self.shadow = {}
        for teacher, student in self._students.items():
            part = parts[student]
            value = _own_values(named[teacher], part, (initial or {}).get(teacher))
            self.shadow[teacher] = Part(part.begin, value, part.shape)
        self._write()

    def update(self, momentum: float) -> None:
        """Move the teacher towards the student. Collective. momentum: m, from 0 to 1."""
        parts = own_parts(self._engine)
        follow(
            [part.values for part in self.shadow.values()],
            [parts[self._students[teacher]].values for teacher in self.shadow],
            1 - momentum,
        )
        self._write()

    def state_dict(self) -> dict[str, Any]:
        """Numbers and tensors, for `torch.load(weights_only=True)`."""
        return {name: part_state(part) for name, part in self.shadow.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Collective. Raises ValueError where the state is of other weights or parts."""
        load_parts(self.shadow, state)
        self._write()

    @torch.no_grad()
    def _write(self) -> None:
        """Round the shadow into the module's parameters."""
        stage = self._engine.zero_optimization_stage()
        if stage in (1, 2):
            owned = [(teacher, self.shadow.get(name)) for name, teacher in self._teachers.items()]
            for bucket in _buckets(owned):
                _gather(bucket)
            return
        for name, teacher in self._teachers.items():
            part = self.shadow[name]
            if stage == 0:
                teacher.copy_(part.values.view(part.shape))
                continue
            teacher.ds_tensor.copy_(part.values)
            # small parameters stay gathered between steps: the next forward gathers them anew
            if teacher.ds_status.name == "AVAILABLE":
                teacher.partition()


def _check_pair(teacher: str, student: str, named: Mapping[str, Any]) -> None:
    for name in (teacher, student):
        if name not in named:
            raise ValueError(f"momentum_pairs names {name!r}, which the objective does not have")
    if named[teacher].requires_grad or not named[student].requires_grad:
        raise ValueError(
            f"momentum_pairs: {teacher!r} must be frozen and {student!r} trained, as the one "
            "follows the other"
        )
    shapes = [getattr(named[n], "ds_shape", named[n].shape) for n in (teacher, student)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"momentum_pairs: {teacher!r} has shape {tuple(shapes[0])}, {student!r} "
            f"{tuple(shapes[1])}; they must be alike"
        )


def _own_values(teacher: Any, part: Part, initial: Tensor | None) -> Tensor:
    """float32, on the device of the part: what the shadow of this rank's part starts from."""
    if hasattr(teacher, "ds_tensor"):
        value = teacher.ds_tensor if initial is None else own_part(initial, teacher)
    else:
        whole = teacher if initial is None else initial
        value = whole.detach().reshape(-1)[part.begin : part.begin + part.values.numel()]
    return value.detach().clone().to(part.values.device, torch.float32)


def _buckets(
    teachers: Sequence[tuple[Any, Part | None]],
) -> list[list[tuple[Any, Part | None]]]:
    """In the same order and of the same sizes on every rank."""
    buckets: list[list[tuple[Any, Part | None]]] = []
    size = BUCKET
    for teacher, part in teachers:
        if size + teacher.numel() > BUCKET:
            buckets.append([])
            size = 0
        buckets[-1].append((teacher, part))
        size += teacher.numel()
    return buckets


def _gather(bucket: Sequence[tuple[Any, Part | None]]) -> None:
    """Give every rank the whole of the teachers of which the ranks have parts.

    Each element is of one rank, and 0 on the others: the sum is exact, and the same everywhere.
    """
    first = bucket[0][0]
    numel = sum(teacher.numel() for teacher, _ in bucket)
    buffer = torch.zeros(numel, dtype=first.dtype, device=first.device)
    offset = 0
    for teacher, part in bucket:
        if part is not None:
            begin = offset + part.begin
            buffer[begin : begin + part.values.numel()] = part.values.to(buffer)
        offset += teacher.numel()
    dist.all_reduce(buffer)
    offset = 0
    for teacher, _ in bucket:
        teacher.copy_(buffer[offset : offset + teacher.numel()].view(teacher.shape))
        offset += teacher.numel()
