"""Launch choices of CUDA kernels: a default, or the fastest one that was measured on the device.

A table in the cache folder, one per kind of device and version of the sources, holds the choice for
each kind of call. It is only ever written when that is asked for: by `groundwork kernels build
--tune`, or by `GROUNDWORK_TUNE=1`, with which a kind of call is measured where it first occurs, but
not while a CUDA graph is captured. Ranks that ask at once wait for one measurement. A table that is
damaged, or was made for something else, counts as empty.
"""

import hashlib
import json
import logging
import math
import os
import re
import tempfile
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any, Final, TypeVar

import torch

from groundwork.kernels.cuda_compiler import CudaCompileError, source_text
from groundwork.kernels.host_compiler import HostCompileError, _alone, cache_folder

log = logging.getLogger(__name__)

#: A choice is any value that its `str` tells from the others; tables hold that.
C = TypeVar("C", bound=Hashable)
#: The milliseconds that a function's work takes on the current device.
Timer = Callable[[Callable[[], None]], float]

FORMAT: Final = 1
#: Another choice than the default has to be this much faster: less is noise.
GAIN: Final = 1.02


def wanted() -> bool:
    """Whether calls may be measured where they first occur: `GROUNDWORK_TUNE=1`."""
    return os.environ.get("GROUNDWORK_TUNE", "") not in ("", "0")


class Table:
    """The choices for one kind of device.

    path: of the file, or None where no folder can be had: each process then measures for itself.
    identity: what it was made for.
    """

    def __init__(self, path: Path | None, identity: dict[str, Any]) -> None:
        self.path, self.identity = path, identity
        self.entries = self._read()
        self._chosen: dict[str, Any] = {}

    def choice(self, key: str, choices: Sequence[C]) -> C | None:
        """The one of `choices` that was found for `key`; None where none was."""
        if key not in self._chosen and key in self.entries:
            found = self.entries[key].get("choice")
            self._chosen[key] = next((c for c in choices if str(c) == found), None)
        chosen = self._chosen.get(key)
        return next((choice for choice in choices if choice == chosen), None)

    def tune(self, key: str, choices: Sequence[C], launch: Callable[[C], None], timer: Timer) -> C:
        """Measure all choices, unless another process has; the fastest is written to the file."""
        with nullcontext() if self.path is None else _alone(self.path.with_suffix(".lock")):
            self.entries = self._read()
            self._chosen.pop(key, None)
            known = self.choice(key, choices)
            if known is not None:
                return known
            times = [_time(launch, choice, timer) for choice in choices]
            best = min(range(len(choices)), key=times.__getitem__)
            if not times[best] * GAIN < times[0]:
                best = 0
            if math.isinf(times[best]):
                return choices[0]  # which then says why it does not run
            found = zip(choices, times, strict=True)
            measured = {str(c): round(t, 5) for c, t in found if not math.isinf(t)}
            self.entries[key] = {"choice": str(choices[best]), "milliseconds": measured}
            self._write()
            self._chosen[key] = choices[best]
            return choices[best]

    def _read(self) -> dict[str, dict[str, Any]]:
        if self.path is None:
            return {}
        try:
            content = json.loads(self.path.read_text("utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(content, dict) or content.get("made_for") != self.identity:
            return {}
        entries = content.get("entries")
        if not isinstance(entries, dict):
            return {}
        return {key: entry for key, entry in entries.items() if isinstance(entry, dict)}

    def _write(self) -> None:
        if self.path is None:
            return
        content = {"made_for": self.identity, "entries": self.entries}
        with tempfile.TemporaryDirectory(dir=self.path.parent) as folder:
            written = Path(folder, self.path.name)
            written.write_text(json.dumps(content, indent=1, sort_keys=True), "utf-8")
            written.replace(self.path)


@cache
def table_of(device: int, sources: tuple[str, ...]) -> Table:
    """The table for a CUDA device and the present text of some files in `csrc/`."""
    major, minor = torch.cuda.get_device_capability(device)
    return make_table(torch.cuda.get_device_name(device), f"sm_{major}{minor}", sources)


def make_table(name: str, arch: str, sources: tuple[str, ...]) -> Table:
    digest = hashlib.sha256(b"\0".join(map(source_text, sources))).hexdigest()[:20]
    identity = {"format": FORMAT, "device": name, "arch": arch, "sources": digest}
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    try:
        path = cache_folder() / f"autotune-{slug}-{arch}-{digest}.json"
    except HostCompileError as error:
        log.warning("launch choices are not kept: %s", error)
        path = None
    return Table(path, identity)


def choose(
    table: Table,
    key: str,
    choices: Sequence[C],
    launch: Callable[[C], None],
    tune: bool,
    timer: Timer | None = None,
) -> C:
    """What to launch a call of kind `key` with: measured, else the first of `choices`.

    launch: runs the call with a choice, any number of times without harm. tune: whether it may be
    measured now.
    """
    known = table.choice(key, choices)
    if known is not None:
        return known
    if tune and len(choices) > 1 and not torch.cuda.is_current_stream_capturing():
        return table.tune(key, choices, launch, timer or time_on_gpu)
    return choices[0]


def _time(launch: Callable[[C], None], choice: C, timer: Timer) -> float:
    try:
        return timer(lambda: launch(choice))
    except CudaCompileError:  # what does not run on this device is not the fastest
        return math.inf


def time_on_gpu(run: Callable[[], None], runs: int = 9) -> float:
    """The median time of a run on the current stream, in milliseconds, after one to warm up."""
    run()
    marks = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(runs)
    ]
    for begin, end in marks:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return sorted(begin.elapsed_time(end) for begin, end in marks)[runs // 2]
