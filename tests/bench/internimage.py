"""InternImage against its peers: `python tests/bench/internimage.py [--json FILE] [--all]`.

Forward (evaluation, no gradients) and training step (forward, backward, AdamW) of InternImage-T,
with --all also -S and -B, at 224 pixels against
- the same network in plain PyTorch, as it runs without the official extension (`grid_sample`): it
  gets our weights, and its logits are compared with ours first,
- timm's ConvNeXt and Swin of the same size.
On a GPU if there is one (bfloat16 autocast; TF32 where float32 is asked for), else on the CPU
(float32 and bfloat16). Models take turns, so that other work on the machine meets all of them: a
ratio is the median of the ratios of neighbouring runs. On a machine that is never quiet `--clock
cpu` counts the CPU time of one thread instead. Prints images/s, FLOP/s as a share of the
peak (MFU), memory, ratios, and the parts of a training step.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import timm
import torch
import torch.nn.functional as F
from dcnv3_gpu import commit
from internimage_breakdown import breakdown
from internimage_peer import PeerInternImage
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from groundwork.pretrain.engine.throughput import device_peak
from groundwork.pretrain.models.flops import internimage_macs
from groundwork.pretrain.models.internimage import InternImage
from groundwork.pretrain.models.internimage_config import InternImageConfig
from kernels import peak_extra_bytes

OURS: Final = "InternImage"
CORE: Final = "PyTorch core"
TIMM: Final[Mapping[str, tuple[str, str]]] = {
    "t": ("convnext_tiny", "swin_tiny_patch4_window7_224"),
    "s": ("convnext_small", "swin_small_patch4_window7_224"),
    "b": ("convnext_base", "swin_base_patch4_window7_224"),
}
PRECISIONS: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Setting:
    """What all models of a run have in common."""

    variant: str
    device: str
    precision: str
    batch: int
    size: int
    seconds: float
    drop_path: float | None
    clock: str


class Runner:
    """A network with its optimiser and a batch: what is timed."""

    def __init__(self, model: nn.Module, macs: int, images: Tensor, setting: Setting) -> None:
        self.model = model.to(setting.device)
        self.macs = macs
        self.images = images
        self.labels = torch.randint(1000, (len(images),), device=images.device)
        self.device, self.dtype = setting.device, PRECISIONS[setting.precision]
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def _logits(self) -> Tensor:
        with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
            logits: Tensor = self.model(self.images)
            return logits

    def forward(self) -> None:
        self.model.eval()
        with torch.no_grad():
            self._logits()

    def step(self) -> None:
        self.model.train()
        F.cross_entropy(self._logits().float(), self.labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def networks(setting: Setting) -> Iterator[tuple[str, nn.Module, int]]:
    """Name, network, multiply-adds of an image."""
    config = InternImageConfig.variant(setting.variant)  # type: ignore[arg-type]
    if setting.drop_path is not None:
        config = replace(config, drop_path=setting.drop_path)
    torch.manual_seed(0)
    ours = InternImage(config)
    macs = internimage_macs(config, setting.size, setting.size)
    yield OURS, ours, macs
    plain = PeerInternImage(
        config.channels, config.depths, config.groups, config.layer_scale, config.drop_path
    )
    plain.load_state_dict(ours.state_dict())
    yield CORE, plain, macs
    for name in TIMM[setting.variant]:
        sizes = {"img_size": setting.size} if name.startswith("swin") else {}
        network = timm.create_model(name, drop_path_rate=config.drop_path, **sizes)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network.eval()(torch.zeros(1, 3, setting.size, setting.size))
        yield name.split("_patch")[0], network, counter.get_total_flops() // 2


def check(ours: nn.Module, plain: nn.Module, images: Tensor) -> None:
    """The two compute the same in float32, before anything is timed; offsets are moved off zero."""
    saved = {k: v.clone() for k, v in ours.state_dict().items()}
    generator = torch.Generator(images.device).manual_seed(1)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if ".offset.bias" in name:
                parameter.uniform_(-1, 1, generator=generator)
        plain.load_state_dict(ours.state_dict())
        expected = plain.eval()(images[:1])
        error = (ours.eval()(images[:1]) - expected).abs().max().item()
    if not error <= 2e-3 * max(1.0, expected.abs().max().item()):
        raise SystemExit(f"the two InternImages compute different things: {error}")
    for model in (ours, plain):
        model.load_state_dict(saved)


def measured_peak(device: str, precision: str, clock: str) -> float:
    """FLOP/s of the best of many large matrix products."""
    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=PRECISIONS[precision]) for _ in range(2))
    return 2 * size**3 / min(seconds_of(lambda: a @ b, device, clock) for _ in range(10))


def seconds_of(run: Callable[[], object], device: str, clock: str) -> float:
    now = time.perf_counter if clock == "wall" else time.process_time
    if device == "cuda":
        torch.cuda.synchronize()
    began = now()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return now() - began


def memory_of(run: Callable[[], object], device: str) -> int | None:
    """Bytes that a run adds at its highest."""
    if device == "cpu":
        return peak_extra_bytes(run)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def take_turns(
    runs: Mapping[str, Callable[[], object]], setting: Setting
) -> dict[str, list[float]]:
    """Seconds of each run, in rounds: at least 3, and until `setting.seconds` for each are over."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    end = time.monotonic() + setting.seconds * len(runs)
    while time.monotonic() < end or len(times[OURS]) < 3:
        for name, run in runs.items():
            times[name].append(seconds_of(run, setting.device, setting.clock))
    return times


def measure(setting: Setting, only: list[str], peaks: Mapping[str, float]) -> dict[str, Any]:
    torch.manual_seed(0)
    images = torch.randn(setting.batch, 3, setting.size, setting.size, device=setting.device)
    runners = {
        name: Runner(model, macs, images, setting)
        for name, model, macs in networks(setting)
        if not only or name == OURS or any(part in name for part in only)
    }
    if CORE in runners:
        check(runners[OURS].model, runners[CORE].model, images)
    record: dict[str, Any] = {**setting.__dict__, "peak_flops": dict(peaks), "models": {}}
    for what, factor in (("forward", 2), ("step", 6)):
        runs = {name: getattr(runner, what) for name, runner in runners.items()}
        memory = {name: memory_of(run, setting.device) for name, run in runs.items()}
        times = take_turns(runs, setting)
        for name, runner in runners.items():
            middle = statistics.median(times[name])
            flops = factor * runner.macs * setting.batch / middle
            record["models"].setdefault(name, {"gmacs": runner.macs / 1e9})[what] = {
                "ms": [1e3 * t for t in times[name]],
                "images_per_second": setting.batch / middle,
                "images_per_second_best": setting.batch / min(times[name]),
                "flops_per_second": flops,
                "mfu": {kind: flops / peak for kind, peak in peaks.items()},
                "extra_bytes": memory[name],
                "times_faster": quartiles(times[name], times[OURS]),
            }
    record["breakdown_ms"] = {
        name: breakdown(runner.model, runner.step)
        for name, runner in runners.items()
        if name in (OURS, CORE)
    }
    return record


def quartiles(theirs: list[float], ours: list[float]) -> list[float]:
    """How many times faster ours is in neighbouring runs: lower quartile, median, upper one."""
    return statistics.quantiles([a / b for a, b in zip(theirs, ours, strict=True)], n=4)


def show(record: dict[str, Any], console: Console) -> None:
    peaks = record["peak_flops"]
    floor = 6 * record["models"][OURS]["gmacs"] * 1e12 * record["batch"] / min(peaks.values())
    table = Table(
        title=f"InternImage-{record['variant'].upper()}, {record['precision']}, batch "
        f"{record['batch']}, {record['size']} px, {record['clock']} time; floor of our step "
        f"{floor:.0f} ms"
    )
    for head in ("network", "GMACs", "run", "images/s", "best", "GFLOP/s"):
        table.add_column(head, justify="right")
    for kind, peak in peaks.items():
        table.add_column(f"of {kind} {peak / 1e12:.2f} TFLOP/s", justify="right")
    table.add_column("extra memory", justify="right")
    table.add_column("ours is faster (quartiles)", justify="right")
    for name, model in record["models"].items():
        for what in ("forward", "step"):
            r = model[what]
            low, middle, high = r["times_faster"]
            extra = r["extra_bytes"]
            table.add_row(
                name,
                f"{model['gmacs']:.2f}",
                what,
                f"{r['images_per_second']:.2f}",
                f"{r['images_per_second_best']:.2f}",
                f"{r['flops_per_second'] / 1e9:.0f}",
                *(f"{share:.0%}" for share in r["mfu"].values()),
                "unknown" if extra is None else f"{extra / 2**20:.0f} MiB",
                "" if name == OURS else f"{middle:.2f}x ({low:.2f} - {high:.2f})",
            )
    console.print(table)
    table = Table(title="parts of a training step, ms forward + backward (profiled, the least)")
    table.add_column("part")
    names = list(record["breakdown_ms"])
    for name in names:
        table.add_column(name, justify="right")
    none = {"forward": 0.0, "backward": 0.0}
    for part in dict.fromkeys(p for name in names for p in record["breakdown_ms"][name]):
        cells = [record["breakdown_ms"][name].get(part, none) for name in names]
        table.add_row(part, *(f"{c['forward']:.1f} + {c['backward']:.1f}" for c in cells))
    totals = [
        sum(sum(directions.values()) for directions in record["breakdown_ms"][name].values())
        for name in names
    ]
    table.add_row("sum", *(f"{total:.1f}" for total in totals))
    console.print(table)


def peaks_of(device: str, precision: str, clock: str) -> dict[str, float]:
    """Kind -> FLOP/s: measured, and of the data sheet where the device is known."""
    peaks = {"measured matmul": measured_peak(device, precision, clock)}
    if device == "cuda":
        sheet = device_peak(
            torch.device(device), {"float32": "fp32", "bfloat16": "bf16"}[precision]
        )
        if sheet is not None:
            peaks["data sheet"] = sheet
    return peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--quick", action="store_true", help="small images, few short runs")
    parser.add_argument("--all", action="store_true", help="also -S and -B")
    parser.add_argument("--variant", choices=list(TIMM), help="only this one")
    parser.add_argument("--batch", type=int, help="images; 8 on the CPU, 128 on a GPU")
    parser.add_argument("--size", type=int, default=224, help="pixels")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each timed run")
    parser.add_argument("--precision", choices=list(PRECISIONS), help="only this one")
    parser.add_argument("--only", nargs="*", default=[], help="peers whose names contain this")
    parser.add_argument("--drop-path", type=float, help="of all networks; that of the variant")
    parser.add_argument(
        "--float32-matmul",
        choices=("highest", "high", "medium"),
        help="of all networks, as train.float32_matmul; highest on a CPU, high on a GPU",
    )
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="on the CPU")
    parser.add_argument("--cpu", action="store_true", help="measure the CPU, also beside a GPU")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() and not arguments.cpu else "cpu"
    if arguments.clock == "cpu":
        if device == "cuda":
            raise SystemExit("--clock cpu does not time a GPU; add --cpu, or leave it out")
        torch.set_num_threads(1)
    products = arguments.float32_matmul or ("high" if device == "cuda" else "highest")
    torch.set_float32_matmul_precision(products)
    torch.backends.cudnn.allow_tf32 = True
    console = Console(width=150)
    where = (
        torch.cuda.get_device_name()
        if device == "cuda"
        else f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    )
    console.print(f"{where}, torch {torch.__version__}, commit {commit()}")
    variants = list(TIMM) if arguments.all else [arguments.variant or "t"]
    precisions = ["bfloat16"] if device == "cuda" else list(PRECISIONS)
    if arguments.precision:
        precisions = [arguments.precision]
    records = []
    for precision in precisions:
        peaks = peaks_of(device, precision, arguments.clock)
        for variant in variants:
            setting = Setting(
                variant,
                device,
                precision,
                arguments.batch or (2 if arguments.quick else 128 if device == "cuda" else 8),
                64 if arguments.quick else arguments.size,
                0.5 if arguments.quick else arguments.seconds,
                arguments.drop_path,
                arguments.clock,
            )
            records.append(measure(setting, arguments.only, peaks))
            show(records[-1], console)
            if arguments.json:
                result = {
                    "device": where,
                    "threads": torch.get_num_threads(),
                    "float32_matmul": products,
                    "torch": torch.__version__,
                    "commit": commit(),
                    "results": records,
                }
                arguments.json.parent.mkdir(parents=True, exist_ok=True)
                arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
