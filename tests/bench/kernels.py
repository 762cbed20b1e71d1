"""DCNv3 against its peers, in one run: `python tests/bench/kernels.py [--out FILE] [--quick]`.

Peers: the official project's PyTorch path (padding and `grid_sample`, written from its
description) and `torchvision.ops.deform_conv2d` with a depthwise weight of ones. Shapes: the stages
of InternImage-T and -B at 224 pixels. Prints times, the ratios to the peers and their geometric
means, the bandwidth reached (each input and output once) and the extra memory; writes JSON.
Where there is a GPU that is measured instead: see dcnv3_gpu.py; `--cpu` leaves it alone.
"""

import argparse
import ctypes
import gc
import json
import math
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import dcnv3_gpu
import torch
from dcnv3_floors import Stage, stages
from dcnv3_peers import grid_sample_core, torchvision_core
from rich.console import Console
from rich.table import Table
from torch import Tensor

from groundwork.kernels.dcnv3 import choose_backend, dcnv3

Run = Callable[[], Tensor]


SHAPES = (*stages("T"), *stages("B"))


def inputs_of(shape: Stage, batch: int) -> list[Tensor]:
    torch.manual_seed(0)
    size = (batch, shape.side, shape.side)
    samples = shape.groups * 9
    return [
        torch.randn(*size, shape.channels, requires_grad=True),
        (torch.randn(*size, samples * 2) * 0.7).requires_grad_(),
        torch.rand(*size, samples, requires_grad=True),
    ]


def fastest(run: Callable[[], object], seconds: float) -> float:
    """The shortest of repeated runs: other work on the machine only ever adds."""
    run()
    best, end = math.inf, time.monotonic() + seconds
    while True:
        began = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - began)
        if time.monotonic() > end:
            return best


def peak_extra_bytes(run: Callable[[], object]) -> int | None:
    """Resident memory that a run adds at its highest; None where the system does not tell."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        run()
        return _status("VmHWM") - before
    except OSError:
        return None


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure(shape: Stage, batch: int, seconds: float) -> dict[str, Any]:
    value, offset, mask = inputs_of(shape, batch)
    ops: dict[str, Run] = {
        "ours": lambda: dcnv3(value, offset, mask, kernel_size=3, groups=shape.groups),
        "grid_sample": lambda: grid_sample_core(value, offset, mask, shape.groups),
        "torchvision": lambda: torchvision_core(value, offset, mask, shape.groups),
    }
    grad = torch.randn_like(value)
    record: dict[str, Any] = {**shape._asdict(), "batch": batch}
    ours = ops["ours"]()
    for name, op in ops.items():
        # the official core rounds coordinates of the normalised grid: see its specification
        error = (op() - ours).abs().max().item()
        if error > 2e-3:
            raise SystemExit(f"{name} computes something else at {shape}: {error}")

        def both(op: Run = op) -> None:
            torch.autograd.grad(op(), (value, offset, mask), grad)

        def forward(op: Run = op) -> Tensor:
            with torch.no_grad():
                return op()

        record[name] = {
            "forward_ms": 1e3 * fastest(forward, seconds),
            "both_ms": 1e3 * fastest(both, seconds),
            "extra_bytes": peak_extra_bytes(both),
        }
    inputs = sum(t.numel() * 4 for t in (value, offset, mask))
    outputs = value.numel() * 4
    record["floor_bytes_forward"] = inputs + outputs
    # gradients of all inputs, the inputs once more, and the gradient of the output
    record["floor_bytes_both"] = 2 * inputs + inputs + 2 * outputs
    return record


def ratio(record: dict[str, Any], peer: str, what: str) -> float:
    return float(record[peer][what] / record["ours"][what])


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def show(records: list[dict[str, Any]], console: Console) -> dict[str, float]:
    table = Table(title="DCNv3 3x3: milliseconds, and how many times faster than each peer")
    for head in ("stage", "forward", "grid_sample", "torchvision", "GB/s", "fwd+bwd"):
        table.add_column(head, justify="right")
    for head in ("grid_sample", "torchvision", "GB/s", "extra memory"):
        table.add_column(head, justify="right")
    for r in records:
        ours, needed = r["ours"], r["floor_bytes_both"]
        extra = ours["extra_bytes"]
        table.add_row(
            f"{r['model']} {r['side']}²x{r['channels']}",
            f"{ours['forward_ms']:.2f}",
            *(f"{ratio(r, peer, 'forward_ms'):.1f}x" for peer in ("grid_sample", "torchvision")),
            f"{r['floor_bytes_forward'] / ours['forward_ms'] / 1e6:.1f}",
            f"{ours['both_ms']:.2f}",
            *(f"{ratio(r, peer, 'both_ms'):.1f}x" for peer in ("grid_sample", "torchvision")),
            f"{needed / ours['both_ms'] / 1e6:.1f}",
            "unknown"
            if extra is None
            else f"{extra / r['floor_bytes_both']:.2f} of in- and outputs",
        )
    console.print(table)
    means = {
        f"{peer}_{what}": geometric_mean([ratio(r, peer, f"{what}_ms") for r in records])
        for peer in ("grid_sample", "torchvision")
        for what in ("forward", "both")
    }
    for name, mean in means.items():
        console.print(f"{name:>20}: {mean:5.1f} times faster (geometric mean)")
    return means


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    parser.add_argument("--quick", action="store_true", help="one short run of each")
    parser.add_argument("--batch", type=int, help="images; 4 on the CPU, 64 on a GPU")
    parser.add_argument("--cpu", action="store_true", help="measure the CPU, also beside a GPU")
    arguments = parser.parse_args()
    if torch.cuda.is_available() and not arguments.cpu:
        dcnv3_gpu.main(arguments.out, arguments.batch or 64, arguments.quick)
        return
    seconds = 0.0 if arguments.quick else 1.0
    records = [measure(shape, arguments.batch or 4, seconds) for shape in SHAPES]
    backend = choose_backend("auto", *inputs_of(SHAPES[0], 1))
    console = Console(width=150)
    threads = torch.get_num_threads()
    console.print(f"backend {backend}, {threads} threads, torch {torch.__version__}")
    means = show(records, console)
    if arguments.out:
        result = {
            "backend": backend,
            "threads": threads,
            "cpu": platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "times_faster": means,
            "shapes": records,
        }
        arguments.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
