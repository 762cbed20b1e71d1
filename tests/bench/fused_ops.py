"""Fused ops against plain PyTorch, in one run: `python tests/bench/fused_ops.py [--out FILE]`.

The layers at the stages of InternImage-T at 224 pixels, and `linear_cross_entropy` at a captioning
head: each fused, eager, and eager under `torch.compile`. Also what was not kept: the projections to
offsets and mask as one Linear with concatenated weights, against the two. Runs on a GPU if there is
one, else on the CPU with the threads that torch has. Prints milliseconds, and how many times faster
the fused op is; writes JSON. `--quick` makes runs short, and leaves `torch.compile` out.
"""

import argparse
import json
import math
import platform
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from groundwork.kernels.depthwise_norm_gelu import (
    depthwise_norm_gelu,
    depthwise_norm_gelu_reference,
)
from groundwork.kernels.linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_reference,
)
from groundwork.kernels.residual_norm import residual_norm, residual_norm_reference

#: Side and channels of the stages.
STAGES = tuple((56 >> i, 64 << i) for i in range(4))
Op = Callable[..., Tensor | tuple[Tensor, ...]]


class Case(NamedTuple):
    """fused and eager take the tensors; those with a gradient come first."""

    op: str
    shape: str
    fused: Op
    eager: Op
    tensors: list[Tensor]
    with_gradient: int


def two_projections(x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
    offset, offset_bias, mask, mask_bias = parameters
    return F.linear(x, offset, offset_bias), F.linear(x, mask, mask_bias)


def one_projection(x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
    """dcnv3 reads offset and mask each as one contiguous tensor."""
    offset, offset_bias, mask, mask_bias = parameters
    both = F.linear(x, torch.cat((offset, mask)), torch.cat((offset_bias, mask_bias)))
    first, second = both.split((len(offset), len(mask)), -1)
    return first.contiguous(), second.contiguous()


def cases(batch: int, device: str) -> list[Case]:
    torch.manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device)

    found = []
    for side, channels in STAGES:
        shape, size = f"{side}²x{channels}", (batch, side, side, channels)
        x, vectors = random(*size), random(3, channels)
        weight = random(channels, 1, 3, 3) / 3
        op, plain = depthwise_norm_gelu, depthwise_norm_gelu_reference
        found.append(
            Case("depthwise_norm_gelu", shape, op, plain, [x, weight, *vectors.clone()], 5)
        )
        tensors = [x, random(*size), *vectors.clone()]
        found.append(
            Case("residual_norm", shape, residual_norm, residual_norm_reference, tensors, 5)
        )
        groups = channels // 16
        tensors = [x]
        for rows in (groups * 18, groups * 9):
            tensors += [random(rows, channels), random(rows)]
        found.append(Case("packed projection", shape, one_projection, two_projections, tensors, 5))
    for rows, width, vocabulary in ((1024, 256, 30522),):
        targets = torch.randint(vocabulary, (rows,), device=device)
        head = random(vocabulary, width) / width**0.5
        found.append(
            Case(
                "linear_cross_entropy",
                f"{rows}x{width}x{vocabulary}",
                linear_cross_entropy,
                linear_cross_entropy_reference,
                [random(rows, width), head, targets],
                2,
            )
        )
    return found


def fastest(runs: dict[str, Callable[[], object]], seconds: float, device: str) -> dict[str, float]:
    """The shortest of repeated runs, in ms: other work on the machine only ever adds. They take
    turns, so that such work meets all of them."""
    best = dict.fromkeys(runs, math.inf)
    for run in runs.values():
        run()
    end = time.monotonic() + seconds * len(runs)
    while True:
        for name, run in runs.items():
            if device == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            best[name] = min(best[name], 1e3 * (time.perf_counter() - began))
        if time.monotonic() > end:
            return best


def outputs(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def measure(case: Case, seconds: float, device: str, compiles: bool) -> dict[str, Any]:
    inputs = [
        t.clone().requires_grad_() if i < case.with_gradient else t
        for i, t in enumerate(case.tensors)
    ]
    differentiated = inputs[: case.with_gradient]
    expected = outputs(case.eager(*inputs))
    grads = [torch.randn_like(tensor) for tensor in expected]
    for a, b in zip(outputs(case.fused(*inputs)), expected, strict=True):
        error = (a - b).abs().max().item()
        if error > 1e-3 * max(1.0, b.abs().max().item()):
            raise SystemExit(f"{case.op} computes something else at {case.shape}: {error}")
    ways = {"fused": case.fused, "eager": case.eager}
    if compiles:
        torch.compiler.reset()
        ways["compiled"] = torch.compile(case.eager, fullgraph=True, dynamic=False)

    def forward(way: Op) -> object:
        with torch.no_grad():
            return way(*inputs)

    def both(way: Op) -> object:
        return torch.autograd.grad(outputs(way(*inputs)), differentiated, grads)

    record: dict[str, Any] = {"op": case.op, "shape": case.shape}
    record.update({name: {} for name in ways})
    for what, function in (("forward_ms", forward), ("both_ms", both)):
        runs = {name: partial(function, way) for name, way in ways.items()}
        for name, milliseconds in fastest(runs, seconds, device).items():
            record[name][what] = milliseconds
    return record


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def show(records: list[dict[str, Any]], console: Console) -> dict[str, dict[str, float]]:
    peers = [name for name in ("eager", "compiled") if name in records[0]]
    table = Table(title="milliseconds of the fused op, and how many times faster than each peer")
    for head in ("op", "shape", "forward", *peers, "fwd+bwd", *peers):
        table.add_column(head, justify="right")

    def ratio(record: dict[str, Any], peer: str, what: str) -> float:
        return float(record[peer][what] / record["fused"][what])

    for r in sorted(records, key=lambda r: str(r["op"])):
        cells = []
        for what in ("forward_ms", "both_ms"):
            cells += [f"{r['fused'][what]:.3f}"]
            cells += [f"{ratio(r, peer, what):.2f}x" for peer in peers]
        table.add_row(r["op"], r["shape"], *cells)
    console.print(table)
    means: dict[str, dict[str, float]] = {}
    for op in dict.fromkeys(r["op"] for r in records):
        own = [r for r in records if r["op"] == op]
        means[op] = {
            f"{peer}_{what}": geometric_mean([ratio(r, peer, f"{what}_ms") for r in own])
            for peer in peers
            for what in ("forward", "both")
        }
        text = ", ".join(f"{name} {mean:.2f}x" for name, mean in means[op].items())
        console.print(f"{op}: {text} (geometric means)")
    return means


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    parser.add_argument("--quick", action="store_true", help="short runs, no torch.compile")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--only", help="the ops whose names begin with this")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each op, both ways")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    seconds = 0.05 if arguments.quick else arguments.seconds
    records = [
        measure(case, seconds, device, not arguments.quick)
        for case in cases(arguments.batch, device)
        if case.op.startswith(arguments.only or "")
    ]
    console = Console(width=150)
    where = (
        torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    )
    console.print(f"{where}, float32, batch {arguments.batch}, torch {torch.__version__}")
    means = show(records, console)
    if arguments.out:
        result = {
            "device": where,
            "cpu": platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "batch": arguments.batch,
            "times_faster": means,
            "cases": records,
        }
        arguments.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
