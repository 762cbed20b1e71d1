"""Stopping politely: a signal on any rank makes all ranks stop after the same step."""

import os
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch
import torch.distributed as dist


class StopRequest:
    """Set by SIGTERM, SIGUSR1 or Ctrl-C, and when a launcher above this process has died.

    A third Ctrl-C interrupts at once, without saving; the second does not, as torchrun and the
    terminal may each deliver one.
    """

    def __init__(self) -> None:
        self.requested = False
        self._launchers = _launchers()
        self._group: Any = None
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self.requested = True

    def agreed(self) -> bool:
        """Whether any rank was asked to stop. Collective."""
        if not all(process.is_running() for process in self._launchers):
            # `kill` of the outer launcher leaves its children behind; do not train on unseen
            self.requested = True
        if dist.get_world_size() == 1:
            return self.requested
        if self._group is None:
            # a group of its own on the host: asking costs no device synchronisation
            self._group = dist.new_group(backend="gloo")
        flag = torch.tensor([int(self.requested)], dtype=torch.int32)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return bool(flag.item())


def _launchers() -> list[psutil.Process]:
    """The processes of launchers above this one: `deepspeed`, `accelerate`, `groundwork`'s own."""
    above = psutil.Process(os.getpid()).parents()
    found = []
    for process in above:
        try:
            command = process.cmdline()
        except psutil.Error:
            break
        names = {Path(word).name for word in command[:5]}
        is_launcher = any(word in name for name in names for word in ("deepspeed", "accelerate"))
        if not is_launcher and not {"pretrain", "finetune"} & set(command):
            break
        found.append(process)
    return found


def seconds_since_launch() -> float:
    """Seconds since the outermost launcher of this job started on this node."""
    processes = [psutil.Process(os.getpid()), *_launchers()]
    return time.time() - min(process.create_time() for process in processes)
