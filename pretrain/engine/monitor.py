"""What a run says about itself: a progress bar, `metrics.jsonl`, TensorBoard."""

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class MonitorConfig:
    """log_every: steps between two lines of metrics. tensorboard: also write event files."""

    log_every: int = 10
    tensorboard: bool = True

    def __post_init__(self) -> None:
        if self.log_every < 1:
            raise ValueError(f"monitor.log_every is {self.log_every}; it must be at least 1")


class Monitor:
    """Rank 0's view of the run; on other ranks every call does nothing.

    A metric line has: step, samples (seen so far), epoch, seconds (of this process), the losses,
    lr, grad_norm, samples_per_s, data_wait (share of the time), bad_samples; and, where the model's
    work is known, tflops_per_s of each device and mfu, its share of the device's peak.
    """

    def __init__(
        self, out: Path, config: MonitorConfig, *, first_step: int, steps: int, is_main: bool
    ) -> None:
        self.enabled = is_main
        if not is_main:
            return
        out.mkdir(parents=True, exist_ok=True)
        _drop_lines_from(out / METRICS, first_step)
        self._file = (out / METRICS).open("a", encoding="utf-8")
        self._board = None
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(out / "tensorboard"), purge_step=first_step)
        self.console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not sys.stderr.isatty(),
            transient=False,
        )
        self._task = self._progress.add_task("train", total=steps, completed=first_step, status="")
        self._steps = steps
        self._last_line = 0.0
        self._progress.start()

    def step(self, step: int) -> None:
        """A step has ended; step counts from 1."""
        if self.enabled:
            self._progress.update(self._task, completed=step)

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Record one line of metrics."""
        if not self.enabled:
            return
        self._file.write(json.dumps({k: _plain(v) for k, v in metrics.items()}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in metrics.items():
                if name not in ("step", "samples"):
                    self._board.add_scalar(name, value, metrics["step"])
        status = (
            f"loss {metrics['loss']:.3f}  {metrics['samples_per_s']:.0f} samples/s  "
            f"data wait {metrics['data_wait']:.0%}"
        )
        if "mfu" in metrics:
            status += f"  MFU {metrics['mfu']:.0%}"
        elif "tflops_per_s" in metrics:
            status += f"  {metrics['tflops_per_s']:.3g} TFLOP/s"
        self._progress.update(self._task, status=status)
        # without a terminal (a log file, a cluster) a line now and then takes the bar's place
        now = time.monotonic()
        if self._progress.disable and (
            now - self._last_line > 10 or metrics["step"] == self._steps
        ):
            self._last_line = now
            left = (self._steps - metrics["step"]) * metrics["seconds_per_step"]
            self.say(f"step {metrics['step']}/{self._steps}  {status}  ETA {left:.0f} s")

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        if self.enabled:
            self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        if not self.enabled:
            return
        self._progress.stop()
        self._file.close()
        if self._board is not None:
            self._board.close()


def _plain(value: Any) -> Any:
    return round(value, 6) if isinstance(value, float) else value


def _drop_lines_from(path: Path, first_step: int) -> None:
    """Forget metrics of steps that a resumed run will repeat, and a line cut off by a kill."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text("utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= first_step:
                kept.append(line)
        except (ValueError, KeyError):
            continue
    path.write_text("".join(f"{line}\n" for line in kept))
