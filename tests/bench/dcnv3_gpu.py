"""DCNv3 on a GPU against its peers and against the floor of DRAM; `kernels.py` runs this.

InternImage-T, -B and -H at 224 pixels in bfloat16, T also in float32; forward and backward apart.
A time is the median of many runs between CUDA events, each after the L2 cache was overwritten and
while the GPU still had other work, so that no launch is waited for. torchvision has no bfloat16:
it runs in float32. Where memory is short a peer runs with fewer images, and its time is scaled.
"""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from dcnv3_floors import DRAM, INTERNIMAGE, Stage, floor, floor_of_model, stages
from dcnv3_peers import grid_sample_core, torchvision_core
from rich.console import Console
from rich.table import Table
from torch import Tensor

from groundwork.kernels import autotune, dcnv3_cuda
from groundwork.kernels.dcnv3 import choose_backend, dcnv3

Op = Callable[[Tensor, Tensor, Tensor, int], Tensor]

DEVICE = "cuda"
RESULTS = Path(__file__).parent / "results"
CASES = (("T", torch.bfloat16), ("B", torch.bfloat16), ("H", torch.bfloat16), ("T", torch.float32))
DIRECTIONS = ("forward", "backward")


def ours(value: Tensor, offset: Tensor, mask: Tensor, groups: int) -> Tensor:
    return dcnv3(value, offset, mask, kernel_size=3, groups=groups)


PEERS: dict[str, Op] = {"grid_sample": grid_sample_core, "torchvision": torchvision_core}


def inputs_of(stage: Stage, batch: int, dtype: torch.dtype) -> list[Tensor]:
    g = torch.Generator(DEVICE).manual_seed(0)
    size, samples = (batch, stage.side, stage.side), stage.groups * 9
    tensors = (
        torch.randn(*size, stage.channels, generator=g, device=DEVICE),
        torch.randn(*size, samples * 2, generator=g, device=DEVICE) * 0.7,
        torch.rand(*size, samples, generator=g, device=DEVICE),
    )
    return [t.to(dtype).requires_grad_() for t in tensors]


class Clock:
    """Times runs on the current stream. runs: at most, of each; seconds: likewise."""

    def __init__(self, runs: int, seconds: float) -> None:
        self.runs, self.seconds = runs, seconds
        cache = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 64 << 20)
        self.flush = torch.empty(4 * cache, dtype=torch.uint8, device=DEVICE)

    def milliseconds(self, run: Callable[[], object]) -> float:
        self._once(run)  # compiles, allocates
        seconds = self._once(run) / 1e3 + 1e-3
        runs = max(3, min(self.runs, int(self.seconds / seconds)))
        marks = [self._marked(run) for _ in range(runs)]
        torch.cuda.synchronize()
        return sorted(begin.elapsed_time(end) for begin, end in marks)[runs // 2]

    def _once(self, run: Callable[[], object]) -> float:
        begin, end = self._marked(run)
        torch.cuda.synchronize()
        return begin.elapsed_time(end)

    def _marked(self, run: Callable[[], object]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        torch.cuda._sleep(1_000_000)  # half a millisecond, in which the run is queued
        begin.record()
        run()
        end.record()
        return begin, end


def copy_bandwidth(clock: Clock) -> float:
    """Bytes per millisecond of a large copy, read and written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / clock.milliseconds(lambda: target.copy_(source))


def time_op(op: Op, tensors: list[Tensor], groups: int, clock: Clock) -> dict[str, float]:
    """forward_ms, backward_ms, and the most memory that both add, in bytes."""
    value, offset, mask = tensors
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    output = op(value, offset, mask, groups)
    grad = torch.ones_like(output)
    torch.autograd.grad(output, tensors, grad, retain_graph=True)
    peak = torch.cuda.max_memory_allocated() - before

    def forward() -> None:
        with torch.no_grad():
            op(value, offset, mask, groups)

    def backward() -> None:
        torch.autograd.grad(output, tensors, grad, retain_graph=True)

    times = {"backward_ms": clock.milliseconds(backward), "forward_ms": clock.milliseconds(forward)}
    return {**times, "extra_bytes": float(peak)}


def time_peer(
    name: str, stage: Stage, batch: int, dtype: torch.dtype, clock: Clock, console: Console
) -> dict[str, Any] | None:
    images, used = batch, torch.float32 if name == "torchvision" else dtype
    while images >= 1:
        try:
            times = time_op(PEERS[name], inputs_of(stage, images, used), stage.groups, clock)
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            images //= 2
        except RuntimeError as error:
            if used == torch.float32:
                raise
            console.print(f"{name} at {stage}: float32, as it cannot do {used}: {error}")
            used = torch.float32
        else:
            if images < batch:
                console.print(f"{name} at {stage}: {images} images fit; its times are scaled")
            scaled = {key: size * batch / images for key, size in times.items()}
            return {**scaled, "images": images, "dtype": str(used).removeprefix("torch.")}
    console.print(f"{name} at {stage}: does not fit this GPU, skipped")
    return None


def check(stage: Stage) -> None:
    """Ours and the peers compute the same, in float32, before anything is timed."""
    tensors = inputs_of(stage, 2, torch.float32)
    expected = torchvision_core(*tensors, stage.groups)
    grad = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, tensors, grad)
    for name, op in (("ours", ours), ("grid_sample", grid_sample_core)):
        output = op(*tensors, stage.groups)
        pairs = [(output, expected)]
        if name == "ours":
            pairs += zip(torch.autograd.grad(output, tensors, grad), gradients, strict=True)
        for actual, wanted in pairs:
            error = (actual - wanted).abs().max() / wanted.abs().max().clamp_min(1)
            if not error <= 2e-3:
                raise SystemExit(f"{name} computes something else at {stage}: {error.item()}")


def measure(
    stage: Stage, batch: int, dtype: torch.dtype, clock: Clock, copy: float, console: Console
) -> dict[str, Any]:
    check(stage)
    tensors = inputs_of(stage, batch, dtype)
    if choose_backend("auto", *tensors) != "cuda":
        raise SystemExit(f"the CUDA kernels do not run here: {dcnv3_cuda.unsupported(*tensors)}")
    record: dict[str, Any] = {
        **stage._asdict(),
        "batch": batch,
        "dtype": str(dtype).removeprefix("torch."),
        "ours": time_op(ours, tensors, stage.groups, clock),
    }
    del tensors
    for name in PEERS:
        record[name] = time_peer(name, stage, batch, dtype, clock, console)
        torch.cuda.empty_cache()
    least = floor(stage, batch, dtype.itemsize)
    for direction, size in (("forward", least.forward), ("backward", least.with_sums)):
        milliseconds = record["ours"][f"{direction}_ms"]
        record[direction] = {
            "floor_bytes": size,
            "floor_ms": size / DRAM,
            "floor_ms_at_copy_bandwidth": size / copy,
            "times_floor": milliseconds / (size / DRAM),
            "times_floor_at_copy_bandwidth": milliseconds / (size / copy),
            "gigabytes_per_second": size / milliseconds / 1e6,
        }
    return record


def sums(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over all blocks of each model: to be compared with the published table of floors."""
    rows = []
    for model, dtype in CASES:
        name = str(dtype).removeprefix("torch.")
        own = [r for r in records if (r["model"], r["dtype"]) == (model, name)]
        if len(own) != len(INTERNIMAGE[model][2]):
            continue
        least = floor_of_model(model, own[0]["batch"], dtype.itemsize)
        row: dict[str, Any] = {"model": model, "dtype": name, "batch": own[0]["batch"]}
        for direction, size in (("forward", least.forward), ("backward", least.with_sums)):
            total = sum(r["blocks"] * r["ours"][f"{direction}_ms"] for r in own)
            row[f"{direction}_ms"] = total
            row[f"{direction}_floor_ms"] = size / DRAM
            row[f"{direction}_times_floor"] = total / (size / DRAM)
        row["backward_floor_without_sums_ms"] = least.backward / DRAM
        rows.append(row)
    return rows


def show(records: list[dict[str, Any]], totals: list[dict[str, Any]], console: Console) -> None:
    for direction in DIRECTIONS:
        table = Table(title=f"DCNv3 3x3, {direction}: milliseconds, peers' times over ours")
        for head in ("stage", "dtype", "ms", *PEERS, "GB/s", "floor ms", "x floor", "x copy floor"):
            table.add_column(head, justify="right")
        table.add_column("extra MB (both)", justify="right")
        for r in records:
            mine, least = r["ours"], r[direction]
            peers = (
                r[name] and r[name][f"{direction}_ms"] / mine[f"{direction}_ms"] for name in PEERS
            )
            table.add_row(
                f"{r['model']} {r['side']}²x{r['channels']}",
                r["dtype"],
                f"{mine[f'{direction}_ms']:.4f}",
                *("none" if ratio is None else f"{ratio:.1f}x" for ratio in peers),
                f"{least['gigabytes_per_second']:.0f}",
                f"{least['floor_ms']:.4f}",
                f"{least['times_floor']:.2f}",
                f"{least['times_floor_at_copy_bandwidth']:.2f}",
                f"{mine['extra_bytes'] / 1e6:.0f}",
            )
        console.print(table)
    table = Table(title="All blocks of a model; floors at 3.0 TB/s, backward with float32 sums")
    for head in ("model", "dtype", *(f"{d} {w}" for d in DIRECTIONS for w in ("ms", "floor", "x"))):
        table.add_column(head, justify="right")
    for t in totals:
        cells = (
            f"{t[f'{direction}_{what}']:.2f}"
            for direction in DIRECTIONS
            for what in ("ms", "floor_ms", "times_floor")
        )
        table.add_row(t["model"], t["dtype"], *cells)
    console.print(table)


def commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    )
    return done.stdout.strip() or "unknown"


def result_path(device: str, version: str) -> Path:
    slug = "-".join("".join(c if c.isalnum() else " " for c in device.lower()).split())
    return RESULTS / f"gpu-{slug}-{version}.json"


def main(out: Path | None, batch: int, quick: bool) -> None:
    console = Console(width=150)
    device = torch.cuda.get_device_name(0)
    clock = Clock(runs=5 if quick else 30, seconds=0.05 if quick else 0.3)
    copy = copy_bandwidth(clock)
    console.print(f"{device}, torch {torch.__version__}; a copy moves {copy / 1e6:.0f} GB/s")
    records = [
        measure(stage, batch, dtype, clock, copy, console)
        for model, dtype in CASES
        for stage in stages(model)
    ]
    totals = sums(records)
    show(records, totals, console)
    table = autotune.table_of(0, (dcnv3_cuda.SOURCE, dcnv3_cuda.TILE_SOURCE))
    version = commit()
    out = out or result_path(device, version)
    out.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "device": device,
        "commit": version,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "copy_gigabytes_per_second": copy / 1e6,
        "models": totals,
        "shapes": records,
        "tuned": table.entries,
    }
    out.write_text(json.dumps(result, indent=1))
    console.print(f"written to {out}")
