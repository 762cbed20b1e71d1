"""Swin, text transformer and K-LITE against the official code: names, results, gradients."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from groundwork.data.text import train_tokenizer
from groundwork.pretrain.models.clip_text import TextConfig, TextTransformer, build_text
from groundwork.pretrain.models.klite import (
    MAX_SCALE,
    InternImageTower,
    Klite,
    KliteConfig,
    build_klite,
)
from groundwork.pretrain.models.swin import SwinConfig, build_swin
from groundwork.pretrain.objectives.contrastive import unicl_loss
from groundwork.pretrain.objectives.unicl import Unicl, UniclConfig

GOLDEN = Path(__file__).parents[1] / "golden" / "klite"
SETS = json.loads((GOLDEN / "manifest.json").read_text())["sets"]
BUFFERS = ("relative_position_index", "attn_mask")

SWIN_BASE = SwinConfig(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), drop_path=0.5)
SWINS = {"klite_swin_tiny": SwinConfig(), "klite_swin_base": SWIN_BASE}

TINY = KliteConfig(
    image=SwinConfig(
        image_size=32, embed_dim=12, depths=(2, 1), num_heads=(2, 4), window_size=4, drop_path=0.0
    ),
    text=TextConfig(vocab_size=600, context_length=12, width=16, layers=2, heads=2),
    projection_dim=8,
)


class Golden:
    """One file of golden tensors, with the configuration that made it."""

    def __init__(self, name: str) -> None:
        self.tensors = load_file(GOLDEN / f"{name}.safetensors")
        self.record: dict[str, Any] = SETS[f"{name}.safetensors"]

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]

    def part(self, prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}

    def weights(self) -> dict[str, Tensor]:
        return {k: v for k, v in self.part("weight.").items() if not k.endswith(BUFFERS)}

    def check(self, actual: Tensor, key: str, extra: float = 0.0) -> None:
        torch.testing.assert_close(
            actual,
            self[key],
            rtol=self.record["rtol"],
            atol=self.record["atol"] + extra,
            msg=lambda m: f"{key}: {m}",
        )

    def check_gradients(self, model: nn.Module) -> None:
        parameters = dict(model.named_parameters())
        for name in self.part("grad."):
            if name != "input":
                grad = parameters[name].grad
                assert grad is not None
                expected = self[f"grad.{name}"]
                # where large terms cancel, the golden gradients, made in float32, are themselves
                # this far from a computation in float64
                rounding = 2e-6 * expected.abs().max().item()
                self.check(grad.reshape(expected.shape), f"grad.{name}", extra=rounding)


def swin_config(official: dict[str, Any]) -> SwinConfig:
    return SwinConfig(
        image_size=official["img_size"],
        patch_size=official["patch_size"],
        embed_dim=official["embed_dim"],
        depths=tuple(official["depths"]),
        num_heads=tuple(official["num_heads"]),
        window_size=official["window_size"],
        mlp_ratio=official["mlp_ratio"],
        drop_path=0.0,
    )


def model_config(official: dict[str, Any]) -> KliteConfig:
    return KliteConfig(
        image=swin_config(official["image"]),
        text=TextConfig(**official["text"]),
        projection_dim=official["dim_projection"],
    )


@pytest.fixture(params=["swin_a", "swin_b"])
def swin_golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


@pytest.fixture(params=["text_causal", "text_bidirectional"])
def text_golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


def test_swin_gives_the_official_activations_and_gradients(swin_golden: Golden) -> None:
    model = build_swin(swin_config(swin_golden.record["config"]))
    model.load_state_dict(swin_golden.weights())
    activations: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda _module, _inputs, out: activations.update({name: out.detach()})

    names = swin_golden.part("act.")
    for name in names:
        model.get_submodule(name).register_forward_hook(keep(name))
    image = swin_golden["input.image"].requires_grad_()
    features = model(image)
    for name in names:
        swin_golden.check(activations[name].flatten(1, 2), f"act.{name}")  # (B, H, W, C)
    swin_golden.check(features, "output.features")

    (features * swin_golden["probe"]).sum().backward()
    swin_golden.check_gradients(model)
    assert image.grad is not None
    swin_golden.check(image.grad, "grad.input")


def test_swin_recomputes_the_buffers_of_official_checkpoints(swin_golden: Golden) -> None:
    model = build_swin(swin_config(swin_golden.record["config"]))
    buffers = {k: v for k, v in swin_golden.part("weight.").items() if k.endswith(BUFFERS)}
    ours = dict(model.named_buffers())
    assert ours.keys() == buffers.keys()
    for name, value in buffers.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=0)


def test_text_gives_the_official_states_and_gradients(text_golden: Golden) -> None:
    model = build_text(TextConfig(**text_golden.record["config"]))
    model.load_state_dict(text_golden.weights())
    states: list[Tensor] = []
    model.ln_final.register_forward_hook(lambda _module, _inputs, out: states.append(out.detach()))
    pooled = model(text_golden["input.ids"])
    text_golden.check(states[0], "output.last_hidden_state")
    text_golden.check(pooled, "output.pooled")

    (pooled * text_golden["probe"]).sum().backward()
    text_golden.check_gradients(model)


def test_whole_model_gives_the_official_loss_and_gradients() -> None:
    golden = Golden("model")
    model = build_klite(model_config(golden.record["config"]))
    model.load_state_dict(golden.weights())
    features = model(golden["input.image"], golden["input.ids"])
    golden.check(features.image, "output.image_features")
    golden.check(features.text, "output.text_features")
    golden.check(features.scale, "output.scale")
    golden.check(features.scale * features.image @ features.text.T, "output.logits")

    i2t, t2i = unicl_loss(*features[:3], golden["input.labels"])
    loss = (i2t + t2i) / 2
    golden.check(loss, "output.loss")
    loss.backward()
    golden.check_gradients(model)


@pytest.mark.parametrize("name", SWINS)
def test_names_shapes_and_counts_are_those_of_the_published_models(name: str) -> None:
    inventory = json.loads((GOLDEN / f"{name}.keys.json").read_text())
    with torch.device("meta"):
        model = build_klite(KliteConfig(image=SWINS[name], text=TextConfig(vocab_size=49408)))
    expected = {k: v for k, v in inventory["shapes"].items() if k not in inventory["buffers"]}
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == expected

    def count(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    published = {
        "klite_swin_tiny": (27_519_354, 63_165_952, 91_340_667),
        "klite_swin_base": (86_743_224, 63_165_952, 150_695_609),
    }
    assert (count(model.visual), count(model.text), count(model)) == published[name]


def tiny_inputs(batch: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(batch, 3, 32, 32, generator=generator)
    ids = torch.randint(1, 500, (batch, 12), generator=generator)
    ids[:, 0], ids[:, 9], ids[:, 10:] = 598, 599, 0
    return image, ids


def tiny(config: KliteConfig = TINY) -> Klite:
    torch.manual_seed(0)
    return build_klite(config)


@pytest.mark.parametrize("autoregressive", [True, False])
def test_a_batch_of_one_equals_its_row_in_a_batch_of_four(autoregressive: bool) -> None:
    model = tiny(replace(TINY, text=replace(TINY.text, autoregressive=autoregressive))).eval()
    image, ids = tiny_inputs(4)
    ids[1, 5:], ids[1, 5] = 0, 599
    together = model(image, ids)
    for row in range(4):
        alone = model(image[row : row + 1], ids[row : row + 1])
        torch.testing.assert_close(alone.image[0], together.image[row])
        torch.testing.assert_close(alone.text[0], together.text[row])


def test_one_tower_alone_gives_its_features() -> None:
    model = tiny().eval()
    image, ids = tiny_inputs(2)
    both = model(image, ids)
    torch.testing.assert_close(model(image=image), both.image, rtol=0, atol=0)
    torch.testing.assert_close(model(ids=ids), both.text, rtol=0, atol=0)
    with pytest.raises(ValueError, match="give an image, ids, or both"):
        model()


@pytest.mark.parametrize("autoregressive", [True, False])
def test_padding_after_the_end_token_does_not_count(autoregressive: bool) -> None:
    model = build_text(replace(TINY.text, autoregressive=autoregressive)).eval()
    _, ids = tiny_inputs(3)
    torch.testing.assert_close(model(ids), model(ids[:, :10]))


def test_a_text_that_is_too_long_keeps_its_meaning() -> None:
    words = "a red heron stands in shallow water near tall green reeds while small fish swim past"
    other = "the old wooden chair was made by two brothers who lived above their shop in the town"
    tokenizer = train_tokenizer([words, other], 600, 12)
    model = tiny(replace(TINY, text=replace(TINY.text, vocab_size=tokenizer.vocab_size))).eval()
    ids = tokenizer.encode([words, other, other.replace("chair", "table")])
    assert ids[:, -1].tolist() == [tokenizer.end_id] * 3
    first, second, third = model(ids=ids)
    assert (first - second).norm() > 0.01
    assert (second - third).norm() > 0.001

    # what the end token is for: without it every text has the feature of the start token
    cut = torch.where(ids == tokenizer.end_id, 5, ids)
    alike = model(ids=cut)
    torch.testing.assert_close(alike[0], alike[1])


def test_ids_beyond_the_context_length_are_refused() -> None:
    model = build_text(TINY.text)
    with pytest.raises(ValueError, match="texts of 13 ids, but context_length is 12"):
        model(torch.ones(1, 13, dtype=torch.int64))


def test_the_logit_scale_is_a_scalar_in_state_dicts() -> None:
    model = tiny()
    assert model.logit_scale.shape == (1,)  # DeepSpeed cannot broadcast scalars
    assert model.state_dict()["logit_scale"].shape == ()
    wrapped = Unicl(model, UniclConfig(), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    assert wrapped.state_dict()["model.logit_scale"].shape == ()


@pytest.mark.parametrize("shape", [(), (1,)])
def test_the_logit_scale_loads_as_scalar_and_as_one_element(shape: tuple[int, ...]) -> None:
    model = tiny()
    state = model.state_dict() | {"logit_scale": torch.full(shape, 3.25)}
    model.load_state_dict(state)
    assert model.logit_scale.tolist() == [3.25]
    assert state["logit_scale"].shape == shape
    wrapped = Unicl(tiny(), UniclConfig(), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    wrapped.load_state_dict({f"model.{name}": value for name, value in state.items()})
    assert wrapped.get_parameter("model.logit_scale").tolist() == [3.25]


@pytest.mark.parametrize(("sign", "expected"), [(1.0, True), (-1.0, False)])
def test_a_scale_above_the_limit_can_only_come_down(sign: float, expected: bool) -> None:
    model = tiny(replace(TINY, logit_scale=5.0))
    scale = model(*tiny_inputs(1)).scale
    assert scale.item() == MAX_SCALE
    (sign * scale).backward()
    assert model.logit_scale.grad is not None
    assert bool(model.logit_scale.grad != 0) is expected  # descent goes against the gradient


@pytest.mark.parametrize("cast_buffers", [True, False])
def test_features_of_a_bf16_model_are_float32_and_normalised(cast_buffers: bool) -> None:
    model = tiny().eval()
    if cast_buffers:
        model.bfloat16()
    else:  # as DeepSpeed does
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
    image, ids = tiny_inputs(4)
    exact = tiny().eval()(image, ids)
    features = model(image.bfloat16(), ids)
    for ours, full in ((features.image, exact.image), (features.text, exact.text)):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.norm(dim=1), torch.ones(4), rtol=1e-6, atol=0)
        assert (ours * full).sum(1).min() > 0.999  # the weights themselves are rounded
    assert features.scale.dtype == torch.float32


def test_activation_checkpointing_leaves_the_gradients_as_they_are() -> None:
    image, ids = tiny_inputs(2)
    gradients = []
    for recompute in (False, True):
        config = replace(
            TINY,
            image=replace(TINY.image, activation_checkpointing=recompute, drop_path=0.3),
            text=replace(TINY.text, activation_checkpointing=recompute, drop_path=0.3),
        )
        model = tiny(config).train()
        torch.manual_seed(3)  # stochastic depth draws the same numbers
        features = model(image, ids)
        (features.image * features.text).sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_the_image_tower_may_be_internimage() -> None:
    config = InternImageTower(channels=16, depths=(1, 1, 1, 1), groups=(1, 2, 4, 8), drop_path=0.0)
    model = tiny(replace(TINY, image=config)).eval()
    image, ids = tiny_inputs(2)
    features = model(image, ids)
    assert features.image.shape == features.text.shape == (2, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depths": (2, 2)}, "one head count per stage"),
        ({"image_size": 220}, "not a multiple of 32"),
        ({"embed_dim": 100}, "not divisible by its 3 heads"),
        ({"num_heads": (0, 6, 12, 24)}, "1 or more heads"),
        ({"depths": (), "num_heads": ()}, "give at least one stage"),
        ({"patch_size": 0}, "patch_size is 0; give at least 1"),
    ],
)
def test_swin_settings_that_cannot_work_are_refused(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        SwinConfig(**arguments)


def test_text_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="not divisible by 7 heads"):
        TextConfig(heads=7)
    with pytest.raises(ValueError, match="no tokenizer was given"):
        build_text(TextConfig())


def test_text_starts_with_the_official_initialisation() -> None:
    torch.manual_seed(0)
    model = TextTransformer(vocab_size=400, context_length=77, width=64, layers=2, heads=2)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert parameter.abs().max() == 0, name
        elif ".ln_" in name or name.startswith("ln_"):
            assert parameter.min() == parameter.max() == 1, name
        else:
            assert 0.018 < parameter.std() < 0.022, name


def test_the_lecun_initialisation_hands_a_text_on_at_its_own_size() -> None:
    torch.manual_seed(0)
    text = TextConfig(vocab_size=400, width=64, layers=2, heads=2, init="lecun")
    model = build_klite(replace(TINY, text=text))
    expected = {
        "in_proj_weight": 64,
        "out_proj.weight": 64,
        "c_fc.weight": 64,
        "c_proj.weight": 256,
    }
    for name, parameter in model.text.named_parameters():
        for part, inputs in expected.items():
            if name.endswith(part):
                assert 0.97 < parameter.std() * inputs**0.5 < 1.03, name
    assert model.text.token_embedding.weight.std() < 0.022
    assert 0.9 < model.text_projection.std() * 64**0.5 < 1.1
