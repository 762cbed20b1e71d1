"""The benchmark of InternImage: its peer computes the same, the parts of a step add up, it runs."""

import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from groundwork.pretrain.models.internimage import InternImage
from groundwork.pretrain.models.internimage_config import VARIANTS, InternImageConfig

BENCH = Path(__file__).parent.parent / "bench"
TINY = {"channels": 16, "depths": (1, 1, 2, 1), "groups": (1, 2, 4, 8)}


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module


@pytest.mark.parametrize("layer_scale", [None, 0.5])
def test_the_peer_has_our_weights_results_and_gradients(
    load: Callable[[str], Any], layer_scale: float | None
) -> None:
    torch.manual_seed(0)
    config = InternImageConfig(
        **TINY,  # type: ignore[arg-type]
        num_classes=5,
        norm="pre_norm" if layer_scale is None else "post_norm",
        layer_scale=layer_scale,
        drop_path=0.0,
    )
    ours = InternImage(config)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            # samples away from pixels, where the two take another side of the kink
            parameter.add_(0.37 if ".offset.bias" in name else 0.02 * torch.randn_like(parameter))
    peer = load("internimage_peer").PeerInternImage(
        config.channels, config.depths, config.groups, layer_scale, 0.0, num_classes=5
    )
    peer.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 64, 64)
    results = []
    for model in (ours, peer):
        logits = model(images)
        logits.square().sum().backward()
        results.append([logits, *(dict(model.named_parameters())[n].grad for n in names_of(ours))])
    for got, expected in zip(*results, strict=True):
        assert (got - expected).norm() < 5e-3 * max(1e-2, float(expected.detach().norm()))


def names_of(model: torch.nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def test_the_parts_of_a_step_add_up_to_it(load: Callable[[str], Any]) -> None:
    breakdown = load("internimage_breakdown")
    model = InternImage(InternImageConfig(**TINY, num_classes=5))  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    images = torch.randn(1, 3, 64, 64)

    def step() -> None:
        model(images).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    parts = breakdown.breakdown(model, step, repetitions=1)
    expected = set(breakdown.PARTS.values()) | {breakdown.RESIDUAL, breakdown.OPTIMISER}
    assert expected <= set(parts)
    for part in ("sampling", "MLP", "offset and mask", "stem", "downsampling", "norms"):
        assert min(parts[part].values()) > 0, part
    total = sum(sum(directions.values()) for directions in parts.values())
    assert parts.get(breakdown.OTHER, {"forward": 0, "backward": 0})["forward"] < 0.3 * total
    assert not any(m._forward_hooks for m in model.modules())


def test_the_benchmark_runs_to_its_end(
    load: Callable[[str], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a small network under the name of InternImage-T, and no networks of timm."""
    bench = load("internimage")
    monkeypatch.setitem(VARIANTS, "t", replace(VARIANTS["t"], **TINY))  # type: ignore[arg-type, misc]
    monkeypatch.setattr(bench, "TIMM", {"t": ()})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "new" / "results.json"
    command = ["internimage.py", "--quick", "--json", str(out), "--seconds", "0.01"]
    monkeypatch.setattr(sys, "argv", [*command, "--clock", "cpu"])
    bench.main()
    records = json.loads(out.read_text())["results"]
    assert [r["precision"] for r in records] == ["float32", "bfloat16"]
    for record in records:
        assert list(record["models"]) == ["InternImage", "PyTorch core"]
        step = record["models"]["PyTorch core"]["step"]
        assert step["images_per_second"] > 0
        assert 0 < step["mfu"]["measured matmul"] < 1
        assert step["times_faster"] == sorted(step["times_faster"])
        assert "sampling" in record["breakdown_ms"]["InternImage"]
