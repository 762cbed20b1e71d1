"""InternImage's memory layout, its compilation, and how others take features from it."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.feature_extraction import create_feature_extractor

from groundwork.pretrain.models.attention_pool import AttentionPool
from groundwork.pretrain.models.internimage import InternImage, InternImageConfig
from groundwork.pretrain.models.internimage_blocks import Block, Downsample, Stem
from groundwork.pretrain.models.internimage_head import fuse_stages

T_LIKE = InternImageConfig(
    num_classes=3, channels=16, depths=(1, 1, 2, 1), groups=(1, 2, 4, 8), drop_path=0.2
)
H_LIKE = replace(
    T_LIKE,
    channels=8,
    norm="res_post_norm",
    dw_kernel_size=5,
    center_feature_scale=True,
    level2_post_norm_block_ids=(1,),
    use_clip_projector=True,
    clip_embed_dim=32,
    clip_num_heads=4,
    clip_dim=24,
)
L_LIKE = replace(T_LIKE, norm="post_norm", layer_scale=0.1, offset_scale=2.0)
FLASH = replace(T_LIKE, core="dcnv4", dw_kernel_size=None, mlp_fc2_bias=False)
CONFIGS = {"T": T_LIKE, "L": L_LIKE, "H": H_LIKE, "flash": FLASH}


def randomised(config: InternImageConfig, seed: int = 0) -> InternImage:
    """A model whose offsets, masks and scales are not at their initial zeros."""
    torch.manual_seed(seed)
    model = InternImage(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


# ---- layout ----


def is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_convolution_reads_and_writes_channels_last_memory(name: str) -> None:
    model = randomised(CONFIGS[name])
    seen = 0

    def check(module: nn.Module, inputs: Any, output: Tensor) -> None:
        nonlocal seen
        (x, *_) = inputs
        # The fused depthwise convolution reads and writes (B, H, W, C) as it is.
        if x.shape[1] == module.in_channels:  # type: ignore[operator]
            assert is_channels_last(x)
            assert is_channels_last(output)
        else:
            assert x.is_contiguous()
            assert output.is_contiguous()
        seen += 1

    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    for module in convolutions:
        module.register_forward_hook(check)
    blocks = [m for m in model.modules() if isinstance(m, Block)]
    for block in blocks:
        block.register_forward_hook(lambda m, i, o: _require_contiguous(o))
    images = torch.randn(2, 3, 96, 160)  # no stage is as high or wide as it has channels
    logits = model(images)
    assert seen == len(convolutions)
    for features in model.features(images):
        assert is_channels_last(features)
    logits.sum().backward()


def _require_contiguous(x: Tensor) -> None:
    assert x.is_contiguous()


class LayoutCopies(TorchDispatchMode):
    """Elements copied by `clone` and `copy_` where the source has another order of dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.clone.default, torch.ops.aten._to_copy.default):
            source = args[0]
            if source.dim() >= 3 and source.stride() != result.stride():
                self.elements.append(source.numel())
        return result


@pytest.mark.parametrize("name", ["T", "L"])
def test_nothing_but_the_image_is_copied_for_its_layout(name: str) -> None:
    model = randomised(replace(CONFIGS[name], drop_path=0.0)).eval()
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        model(x)  # fused kernels are found at the first call
        copies = LayoutCopies()
        with copies:
            model(x)
    assert copies.elements == [x.numel()]


# ---- compilation ----


@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [
        ("T", False),
        ("H", True),
        pytest.param("T", True, marks=pytest.mark.slow),
        pytest.param("H", False, marks=pytest.mark.slow),
        pytest.param("flash", False, marks=pytest.mark.slow),
    ],
)
def test_training_compiles_without_graph_breaks(name: str, checkpointing: bool) -> None:
    torch.compiler.reset()
    config = replace(CONFIGS[name], drop_path=0.0, activation_checkpointing=checkpointing)
    x = torch.randn(2, 3, 64, 64)
    results = []
    for compiled in (False, True):
        model = randomised(config).train()
        run: Any = model
        if compiled:
            run = torch.compile(model, fullgraph=True, backend="aot_eager")
        logits = run(x)
        logits.square().sum().backward()
        results.append([logits.detach(), *(p.grad for p in model.parameters())])
    for eager, fused in zip(*results, strict=True):
        assert eager is not None
        assert fused is not None
        assert (eager - fused).norm() <= 1e-4 * max(0.1, float(eager.norm()))


@pytest.mark.slow
def test_stochastic_depth_compiles_without_graph_breaks() -> None:
    torch.compiler.reset()
    model = randomised(replace(L_LIKE, drop_path=0.5)).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(torch.randn(4, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["T", "H"])
def test_inductor_compiles_training(name: str) -> None:
    torch.compiler.reset()
    x = torch.randn(2, 3, 64, 64)
    results = []
    for compiled in (False, True):
        model = randomised(replace(CONFIGS[name], drop_path=0.0)).train()
        run: Any = torch.compile(model, fullgraph=True) if compiled else model
        logits = run(x)
        logits.square().sum().backward()
        results.append([logits.detach(), *(p.grad for p in model.parameters())])
    for eager, fused in zip(*results, strict=True):
        assert eager is not None
        assert fused is not None
        assert (eager - fused).norm() <= 1e-3 * max(0.1, float(eager.norm()))


# ---- precision ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_running_statistics_stay_float32_in_a_cast_model(dtype: torch.dtype) -> None:
    model = randomised(T_LIKE)
    norm = model.conv_head[1][0]  # type: ignore[index]
    norm.running_mean.fill_(1 + 2**-20)  # no bfloat16
    model.to(dtype)
    assert norm.weight.dtype == dtype
    assert norm.running_mean.dtype == norm.running_var.dtype == torch.float32
    assert norm.running_mean[0] == 1 + 2**-20
    before = norm.running_mean.clone()
    model.train()(torch.randn(2, 3, 64, 64, dtype=dtype)).sum().backward()
    assert norm.num_batches_tracked == 1
    assert not torch.equal(norm.running_mean, before)
    assert model.double().conv_head[1][0].running_mean.dtype == torch.float64  # type: ignore[index]


def test_the_batch_norm_is_torchs() -> None:
    model = randomised(T_LIKE)
    ours = model.conv_head[1][0]  # type: ignore[index]
    theirs = nn.BatchNorm2d(ours.num_features)
    theirs.load_state_dict(ours.state_dict())
    for training in (True, False):
        x = torch.randn(4, ours.num_features, 3, 2)
        outputs = [norm.train(training)(x) for norm in (ours, theirs)]
        torch.testing.assert_close(*outputs, rtol=0, atol=0)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=0, atol=0)


# ---- features ----


@pytest.mark.parametrize("name", ["T", "H"])
def test_feature_info_describes_the_maps(name: str) -> None:
    model = randomised(CONFIGS[name]).eval()
    height, width = 64, 96
    maps = model.features(torch.randn(1, 3, height, width))
    for info, features in zip(model.feature_info, maps, strict=True):
        step = info["reduction"]
        assert features.shape == (1, info["num_chs"], height // step, width // step)
        assert dict(model.named_modules())[info["module"]] is not None


def test_intermediates_are_the_chosen_maps() -> None:
    model = randomised(T_LIKE).eval()
    x = torch.randn(1, 3, 64, 64)
    maps = model.features(x)
    last, chosen = model.forward_intermediates(x, indices=2)
    for got, expected in zip(chosen, maps[2:], strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    torch.testing.assert_close(last, maps[-1], rtol=0, atol=0)
    (first,) = model.forward_intermediates(
        x, indices=[-3], stop_early=True, output_fmt="NHWC", intermediates_only=True
    )
    torch.testing.assert_close(first, maps[1].permute(0, 2, 3, 1), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"indices is \[4\]; InternImage has the stages 0 to 3"):
        model.forward_intermediates(x, indices=[4])


def test_timms_feature_extractor_takes_the_model() -> None:
    model = randomised(T_LIKE).eval()
    x = torch.randn(1, 3, 64, 64)
    extractor = FeatureGetterNet(model, out_indices=(1, 3), prune=False)
    assert extractor.feature_info.channels() == [32, 128]
    assert extractor.feature_info.reduction() == [8, 32]
    maps = model.features(x)
    for got, expected in zip(extractor(x), (maps[1], maps[3]), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["T", "H"])
def test_torchvisions_feature_extractor_finds_the_official_names(name: str) -> None:
    model = randomised(CONFIGS[name]).eval()
    x = torch.randn(1, 3, 64, 64)
    extractor = create_feature_extractor(
        model,
        return_nodes=["patch_embed", "levels.0.downsample", "head"],
        tracer_kwargs={
            "leaf_modules": [Stem, Block, Downsample, AttentionPool],
            "autowrap_functions": (math.ceil, fuse_stages),
        },
    )
    features = extractor(x)
    torch.testing.assert_close(features["head"], model(x))
    stem = model.patch_embed(x)
    torch.testing.assert_close(features["patch_embed"], stem)
    torch.testing.assert_close(features["levels.0.downsample"], model.levels[0](stem)[1])


def test_tokens_are_what_is_pooled() -> None:
    x = torch.randn(2, 3, 64, 96)
    model = randomised(H_LIKE).eval()
    tokens = model.forward_tokens(x)
    assert tokens.shape == (2, 4 * 6, 32)
    torch.testing.assert_close(model.pool_tokens(tokens), model.forward_features(x))
    plain = randomised(replace(T_LIKE, num_classes=0)).eval()
    tokens = plain.forward_tokens(x)
    assert tokens.shape == (2, 2 * 3, 128)
    torch.testing.assert_close(tokens.mean(1), plain(x))
    with pytest.raises(ValueError, match="set use_clip_projector"):
        plain.pool_tokens(tokens)
