"""What decides the last digits of a run besides its recipe: sums are added up in another order by
another number of threads, another processor or another release of PyTorch."""

import platform
from collections.abc import Mapping
from typing import Any

import torch


def arithmetic() -> dict[str, Any]:
    """What this process computes with, as a checkpoint records it."""
    if torch.cuda.is_available():
        return {"torch": torch.__version__, "device": torch.cuda.get_device_name()}
    return {
        "torch": torch.__version__,
        "device": platform.machine(),
        "threads": torch.get_num_threads(),
    }


def arithmetic_changes(record: Mapping[str, Any]) -> list[str]:
    """What the writer of a checkpoint computed with that this process does not.

    record: of the checkpoint, with `arithmetic` under "versions". One text for each difference,
    none if the run can go on to the last digit.
    """
    then, now = record.get("versions", {}), arithmetic()
    texts = {
        "torch": "PyTorch {then}, now {now}",
        "device": "{then}, now {now}",
        "threads": "OMP_NUM_THREADS={then}, now {now}",
    }
    return [
        text.format(then=then[name], now=now[name])
        for name, text in texts.items()
        if name in then and name in now and then[name] != now[name]
    ]


def resume_note(record: Mapping[str, Any]) -> str:
    """What to tell beside "resuming from ...": "" if nothing changed."""
    changes = arithmetic_changes(record)
    if not changes:
        return ""
    return (
        f" (begun with {'; '.join(changes)}: the last digits will differ from those of a run that "
        "was never stopped)"
    )
