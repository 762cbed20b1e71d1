"""InternImage built under `deepspeed.zero.Init`: the weights of a plain build, never whole.

Two ranks run all cases in one process group; this file is also their program.
"""

import gc
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from groundwork.pretrain.models.internimage import InternImage, InternImageConfig

pytestmark = pytest.mark.multirank

T_LIKE = InternImageConfig(
    num_classes=3, channels=16, depths=(1, 1, 2, 1), groups=(1, 2, 4, 8), drop_path=0.0
)
CONFIGS = {
    "T": T_LIKE,
    "L": replace(T_LIKE, norm="post_norm", layer_scale=0.1),
    "H": replace(
        T_LIKE,
        norm="res_post_norm",
        dw_kernel_size=5,
        center_feature_scale=True,
        level2_post_norm_block_ids=(1,),
        use_clip_projector=True,
        clip_embed_dim=32,
        clip_num_heads=4,
        clip_dim=24,
    ),
    "flash": replace(T_LIKE, core="dcnv4"),
}
#: Its largest tensor has 1/23 of all parameters.
DEEP = replace(T_LIKE, channels=32, groups=(2, 4, 8, 16), depths=(2, 2, 24, 2))
PRECISIONS = ("fp32", "bf16")


def plain(config: InternImageConfig) -> InternImage:
    torch.manual_seed(0)
    return InternImage(config)


def settings(precision: str) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "bf16": {"enabled": precision == "bf16"},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }


def images() -> Tensor:
    return torch.randn(2, 3, 32, 64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_weights_are_those_of_a_plain_build(runs: Path, name: str, precision: str) -> None:
    """In bfloat16 rounded to it, for all is drawn in float32."""
    got = torch.load(runs / f"{name}-{precision}.pt")["built"]
    expected = plain(CONFIGS[name]).state_dict()
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        if precision == "bf16" and "running" not in key and value.is_floating_point():
            value = value.bfloat16()
        torch.testing.assert_close(got[key], value, rtol=0, atol=0, msg=key)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_statistics_of_batch_norms_stay_float32_in_the_engine(
    runs: Path, precision: str
) -> None:
    got = torch.load(runs / f"T-{precision}.pt")
    assert got["statistics"] == [torch.float32, torch.float32]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_model_computes_what_the_plain_one_does(runs: Path, name: str) -> None:
    got = torch.load(runs / f"{name}-fp32.pt")["logits"]
    torch.testing.assert_close(got, plain(CONFIGS[name]).eval()(images()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_official_checkpoint_is_read_into_partitions(runs: Path, precision: str) -> None:
    got = torch.load(runs / f"L-{precision}.pt")["loaded"]
    for key, value in official(CONFIGS["L"]).items():
        torch.testing.assert_close(got[key], value.to(got[key].dtype), rtol=0, atol=0, msg=key)


def test_no_rank_ever_holds_all_weights(runs: Path) -> None:
    """But its half, and beside that a few of the largest tensor: draws, casts, gathered copies."""
    peaks = torch.load(runs / "peaks.pt")
    sizes = [4 * p.numel() for p in plain(DEEP).parameters()]
    assert peaks["plain"] >= sum(sizes)  # the measure counts what there is
    assert peaks["partitioned"] <= sum(sizes) / 2 + 4 * max(sizes)


def official(config: InternImageConfig) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        name: torch.rand(value.shape, generator=generator).to(value.dtype)
        for name, value in plain(config).state_dict().items()
    }


@pytest.fixture(scope="module")
def runs(run_two_ranks: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("zero-init")
    run_two_ranks(__file__, out)
    return out


# ---- the ranks ----


def build(config: InternImageConfig, precision: str) -> InternImage:
    import deepspeed

    # Another seed on the other rank: the first one's numbers count.
    torch.manual_seed(torch.distributed.get_rank())
    with deepspeed.zero.Init(config_dict_or_path=settings(precision)):
        return InternImage(config)


def gathered(model: InternImage) -> dict[str, Tensor]:
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    values = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        parameters = [tensor] if hasattr(tensor, "ds_id") else []
        with GatheredParameters(parameters):
            values[name] = tensor.detach().clone()
    return values


def peak_bytes(make: Any) -> int:
    """Of the tensors that lived at once during a call, by the allocator's own account."""
    gc.collect()  # what is freed within would count as less than nothing
    with torch.profiler.profile(profile_memory=True) as profile:
        kept = make()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    events = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
    live = peak = 0
    for event in events:
        live += event.nbytes()
        peak = max(peak, live)
    del kept
    return peak


def main(folder: str) -> None:
    """A rank: builds each model in parts, reads it back, and runs it in an engine."""
    from groundwork.pretrain.engine.deepspeed_config import prepare_environment, start_process_group

    prepare_environment()
    world = start_process_group(60)
    import deepspeed

    out = Path(folder)
    for name, config in CONFIGS.items():
        for precision in PRECISIONS:
            model = build(config, precision)
            assert all(p.numel() == 0 for p in model.parameters())
            result: dict[str, Any] = {"built": gathered(model)}
            if name == "L":
                loaded = build(config, precision)
                loaded.load_official(official(config))
                result["loaded"] = gathered(loaded)
            engine, *_ = deepspeed.initialize(model=model, config=settings(precision))
            result["statistics"] = [b.dtype for n, b in model.named_buffers() if "running" in n]
            if precision == "fp32":
                engine.eval()
                with torch.no_grad():
                    result["logits"] = engine(images())
            if world.is_main:
                torch.save(result, out / f"{name}-{precision}.pt")
    peaks = {
        "partitioned": peak_bytes(lambda: build(DEEP, "fp32")),
        "plain": peak_bytes(lambda: plain(DEEP)),
    }
    if world.is_main:
        torch.save(peaks, out / "peaks.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
