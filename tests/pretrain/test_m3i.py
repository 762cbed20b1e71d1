"""The M3I objective: against formulas, oracles as decoder, and pixels that must not count."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from groundwork.pretrain.models.clip_text import TextConfig
from groundwork.pretrain.models.klite import InternImageTower, KliteConfig, build_klite
from groundwork.pretrain.models.m3i_decoder import M3iDecoder, decoder_parameters
from groundwork.pretrain.models.mixed_images import (
    draw_masks,
    mix_partners,
    per_picture,
    swap_partners,
)
from groundwork.pretrain.models.swin import SwinConfig
from groundwork.pretrain.objectives.m3i import M3i, M3iConfig, dense_loss, dense_targets

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
TEXT = TextConfig(vocab_size=60, context_length=8, width=32, layers=1, heads=2)
IMAGE = InternImageTower(
    channels=16,
    depths=(1, 1, 2, 1),
    groups=(1, 2, 4, 8),
    norm="res_post_norm",
    dw_kernel_size=5,
    center_feature_scale=True,
    use_clip_projector=True,
    clip_embed_dim=48,
    clip_num_heads=4,
    clip_dim=32,
    drop_path=0.2,
)
CONFIG = M3iConfig(decoder_depth=2, decoder_width=32, decoder_heads=4, mix_share=0.25, block_rows=3)


def objective(config: M3iConfig = CONFIG, image: InternImageTower = IMAGE) -> M3i:
    """A small one whose deformable kernels and gates have left their initial zeros."""
    torch.manual_seed(0)
    model = build_klite(KliteConfig(image=image, text=TEXT, projection_dim=16, logit_scale=2.0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return M3i(model, config, MEAN, STD)


def batch(size: int = 64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 50, (6, 8), generator=generator)
    ids[:, -1] = 59
    image = torch.randint(0, 256, (6, 3, size, size), generator=generator, dtype=torch.uint8)
    return {"image": image, "ids": ids, "labels": torch.tensor([-1, 4, 4, -1, -1, 7])}


def masks() -> Tensor:
    return draw_masks(3, 2, 2, CONFIG.mix_share, torch.Generator().manual_seed(1))


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return -(targets * logits.log_softmax(1)).sum(1).mean()


def test_the_contrastive_part_is_the_cross_entropy_with_soft_targets_by_area() -> None:
    m3i, values = objective().eval(), batch()
    losses = m3i.losses(values, masks(), torch.float32)
    own = per_picture(masks(), 64, 64)
    pixels = m3i.normalise(values["image"], torch.float32)
    features = m3i.model(image=mix_partners(pixels, own), ids=values["ids"])
    logits = features.scale * features.image @ features.text.T

    labels = values["labels"].tolist()
    same = torch.tensor(
        [[float(i == j or (a == b and a != -1)) for j, b in enumerate(labels)]
         for i, a in enumerate(labels)]
    )  # fmt: skip
    of_texts = same / same.sum(1, keepdim=True)
    mixed = torch.zeros(6, 6)
    for i in range(6):  # mixture i shows a quarter of picture i, the rest of its partner
        mixed[i] = 0.25 * of_texts[i] + 0.75 * of_texts[i ^ 1]
    torch.testing.assert_close(losses["image_to_text"], soft_cross_entropy(logits, mixed))
    # text i: a quarter of its weight on the mixtures led by its class, the rest on their partners
    back = 0.25 * of_texts + 0.75 * of_texts[:, [1, 0, 3, 2, 5, 4]]
    torch.testing.assert_close(losses["text_to_image"], soft_cross_entropy(logits.T, back))
    expected = (losses["image_to_text"] + losses["text_to_image"]) / 2 + losses["dense"]
    torch.testing.assert_close(losses["loss"], expected)


def expected_targets(tokens: Tensor) -> Tensor:
    """What sets a picture apart, by the formula: in float64, per position and channel."""
    x = tokens.double()
    x = (x - x.mean(2, keepdim=True)) / (x.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
    x = x - x.mean(0)
    return (x / (x.square().mean((0, 1)) + 1e-3).sqrt()).float()


class PerfectDecoder(nn.Module):
    """Answers with each picture's own tokens, which the teacher makes one picture at a time."""

    def __init__(self, m3i: M3i, pixels: Tensor) -> None:
        super().__init__()
        assert m3i.teacher is not None
        each = [m3i.teacher.forward_tokens(picture[None]) for picture in pixels]
        own = expected_targets(torch.cat(each))
        self.answers = torch.cat([own, own[[1, 0, 3, 2, 5, 4]]])

    def forward(self, tokens: Tensor, visible: Tensor) -> Tensor:
        return self.answers


@pytest.mark.parametrize("positions", ["hidden", "all"])
def test_a_perfect_student_has_no_dense_loss_and_one_that_confuses_partners_has(
    positions: Any,
) -> None:
    m3i = objective(replace(CONFIG, dense_positions=positions)).eval()
    perfect = PerfectDecoder(m3i, m3i.normalise(batch()["image"], torch.float32))
    m3i.decoder = perfect  # type: ignore[assignment]
    assert m3i.losses(batch(), masks(), torch.float32)["dense"] < 1e-9
    perfect.answers = swap_partners(perfect.answers)
    assert m3i.losses(batch(), masks(), torch.float32)["dense"] > 0.1


def test_only_hidden_positions_count_unless_all_are_asked_for() -> None:
    m3i = objective().eval()
    perfect = PerfectDecoder(m3i, m3i.normalise(batch()["image"], torch.float32))
    own = per_picture(masks(), 4, 4).flatten(1)
    shown = torch.cat([own, ~own])
    perfect.answers = torch.where(shown[..., None], 100.0, perfect.answers)
    m3i.decoder = perfect  # type: ignore[assignment]
    assert m3i.losses(batch(), masks(), torch.float32)["dense"] < 1e-9
    m3i.config = replace(CONFIG, dense_positions="all")
    assert m3i.losses(batch(), masks(), torch.float32)["dense"] > 1


def test_the_dense_loss_is_the_smooth_l1_distance_of_the_positions_that_count() -> None:
    generator = torch.Generator().manual_seed(0)
    predicted, targets = 2 * torch.randn(2, 3, 4, 5, generator=generator)
    counted = torch.tensor([[[True, False], [False, True]]] * 3)
    terms = []
    for b in range(3):
        for n in (0, 3):
            for p, t in zip(predicted[b, n].tolist(), targets[b, n].tolist(), strict=True):
                d = abs(p - t)
                terms.append(d**2 / 2 if d < 1 else d - 0.5)
    loss = dense_loss(predicted, targets, counted)
    assert float(loss) == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_targets_are_what_sets_a_picture_apart() -> None:
    tokens = torch.randn(5, 6, 8, generator=torch.Generator().manual_seed(0))
    targets, spread = dense_targets(tokens)
    torch.testing.assert_close(targets, expected_targets(tokens))
    assert spread.shape == (8,) and spread.min() > 0.3 and spread.max() < 1.5
    # neither the size of the teacher's tokens counts
    torch.testing.assert_close(dense_targets(30 * tokens + 2)[0], targets, rtol=1e-3, atol=1e-3)


def test_tokens_that_depend_on_the_position_alone_are_no_target() -> None:
    tokens = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0)).expand(5, -1, -1)
    targets, spread = dense_targets(tokens)
    assert targets.abs().max() < 1e-4
    assert spread.max() < 1e-5


def test_what_a_mixture_does_not_show_does_not_reach_its_features() -> None:
    m3i, images = objective().eval(), batch()["image"]
    own = per_picture(masks(), 64, 64)
    changed = images.clone()
    # picture 1 is hidden in mixture 0 where picture 0 stays
    changed[1] = torch.where(own[0], 255 - images[1], images[1])
    before, after = (
        m3i.model(
            image=mix_partners(m3i.normalise(x, torch.float32), own), ids=batch()["ids"], dense=True
        )
        for x in (images, changed)
    )
    assert torch.equal(after.tokens[0], before.tokens[0])
    assert torch.equal(after.image[0], before.image[0])
    assert not torch.equal(after.image[1], before.image[1])  # which shows just these pixels
    assert torch.equal(after.tokens[2:], before.tokens[2:])


def test_the_decoder_reads_no_token_of_the_other_picture() -> None:
    torch.manual_seed(0)
    decoder = M3iDecoder(48, 32, 2, 4)
    tokens, visible = torch.randn(2, 16, 48), per_picture(masks()[:1], 4, 4)
    other = torch.where(visible.flatten(1)[..., None], tokens, torch.randn(2, 16, 48))
    assert torch.equal(decoder(tokens, visible), decoder(other, visible))
    shown = torch.where(visible.flatten(1)[..., None], torch.randn(2, 16, 48), tokens)
    assert not torch.equal(decoder(tokens, visible), decoder(shown, visible))


def test_the_decoder_knows_where_its_tokens_stand_at_any_size() -> None:
    torch.manual_seed(0)
    decoder = M3iDecoder(48, 32, 1, 4)
    # all hidden: only the positions tell the tokens apart
    out = decoder(torch.zeros(1, 6, 48), torch.zeros(1, 2, 3, dtype=torch.bool))
    assert torch.pdist(out[0]).min() > 1e-4


def test_the_decoder_has_the_stated_number_of_parameters() -> None:
    for size in ((48, 32, 2, 4), (1024, 512, 4, 8)):
        with torch.device("meta"):
            decoder = M3iDecoder(*size)
        assert sum(p.numel() for p in decoder.parameters()) == decoder_parameters(*size[:3])
    assert decoder_parameters(1024, 512, 4) == 13_663_232


def test_gradients_reach_everything_but_the_teacher() -> None:
    m3i = objective(image=replace(IMAGE, drop_path=0.0)).train()
    m3i(batch(), torch.float32)["loss"].backward()
    for name, parameter in m3i.named_parameters():
        if name.startswith("teacher."):
            assert not parameter.requires_grad and parameter.grad is None, name
        else:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_the_dense_part_alone_trains_the_student_but_not_its_pooling() -> None:
    m3i = objective(replace(CONFIG, contrastive_weight=1e-30)).eval()
    m3i.losses(batch(), masks(), torch.float32)["loss"].backward()
    gradients = {n: p.grad for n, p in m3i.named_parameters() if p.grad is not None}
    assert gradients["model.visual.patch_embed.conv1.weight"].abs().max() > 1e-6
    assert gradients["model.visual.clip_projector.cross_dcn.proj.weight"].abs().max() < 1e-20


def test_the_teacher_starts_as_the_student_and_has_no_noise() -> None:
    m3i = objective().train()
    assert m3i.teacher is not None and not m3i.teacher.training and m3i.model.training
    own = dict(m3i.named_parameters())
    pairs = m3i.momentum_pairs()
    assert {teacher for teacher, _ in pairs} == {n for n in own if n.startswith("teacher.")}
    assert {student for _, student in pairs} == {n for n in own if n.startswith("model.visual.")}
    for teacher, student in pairs:
        assert torch.equal(own[teacher], own[student])
        assert own[teacher].data_ptr() != own[student].data_ptr()
    pixels = m3i.normalise(batch()["image"], torch.float32)
    assert torch.equal(m3i.teacher.forward_tokens(pixels), m3i.teacher.forward_tokens(pixels))


def test_the_momentum_rises_along_a_cosine() -> None:
    m3i = objective(replace(CONFIG, momentum=0.9, final_momentum=1.0))
    values = [m3i.momentum(step, 101) for step in range(101)]
    assert values[0] == pytest.approx(0.9)
    assert values[50] == pytest.approx(0.95)
    assert values[100] == m3i.momentum(100, 101) == 1.0
    assert values == sorted(values)


def test_a_resumed_step_draws_the_masks_and_depths_it_would_have_drawn() -> None:
    m3i = objective().train()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = m3i(batch(), torch.float32)["loss"]
    second = m3i(batch(), torch.float32)["loss"]
    torch.set_rng_state(state)
    assert torch.equal(m3i(batch(), torch.float32)["loss"], first)
    assert not torch.equal(first, second)


def test_the_decoder_tells_both_pictures_of_a_mixture_from_what_it_shows() -> None:
    torch.manual_seed(0)
    decoder, own = M3iDecoder(48, 32, 2, 4), per_picture(masks(), 4, 4)
    tokens, targets = torch.randn(6, 16, 48), dense_targets(torch.randn(6, 16, 48))[0]
    visible = torch.cat([own, ~own])
    both = torch.cat([targets, swap_partners(targets)])
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-2)
    history = []
    for _ in range(150):
        loss = dense_loss(decoder(torch.cat([tokens, tokens]), visible), both, ~visible)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(float(loss.detach()))
    nothing = float(dense_loss(torch.zeros_like(both), both, ~visible))
    assert history[0] > 0.8 * nothing
    assert history[-1] < 0.4 * nothing


def test_it_learns_to_name_both_pictures_of_a_mixture() -> None:
    m3i = objective(replace(CONFIG, dense_weight=0.0), image=replace(IMAGE, drop_path=0.0)).train()
    optimizer = torch.optim.AdamW(m3i.parameters(), lr=1e-3)
    values = batch() | {"labels": torch.full((6,), -1)}
    history = []
    for _ in range(40):
        losses = m3i.losses(values, masks(), torch.float32)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        history.append(float(losses["loss"].detach()))
    # the entropy of the soft targets, below which no student gets
    floor = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert history[-1] - floor < 0.8 * (history[0] - floor)


def test_bf16_weights_give_nearly_the_losses_of_float32() -> None:
    exact = objective().eval().losses(batch(), masks(), torch.float32)
    m3i = objective().bfloat16().eval()
    rounded = m3i.losses(batch(), masks(), torch.bfloat16)
    rounded["loss"].backward()
    for name, value in exact.items():
        assert rounded[name].dtype == torch.float32, name
        torch.testing.assert_close(rounded[name], value, rtol=0.05, atol=0.02)
    for name, parameter in m3i.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_without_the_dense_part_there_is_neither_teacher_nor_decoder() -> None:
    m3i = objective(replace(CONFIG, dense_weight=0.0)).eval()
    assert not [n for n, _ in m3i.named_parameters() if not n.startswith("model.")]
    assert m3i.momentum_pairs() == []
    losses = m3i.losses(batch(), masks(), torch.float32)
    assert losses.keys() == {"loss", "image_to_text", "text_to_image", "logit_scale"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"contrastive_weight": 0.0}, r"objective\.contrastive_weight is 0\.0"),
        ({"dense_weight": -1.0}, r"objective\.dense_weight is -1\.0"),
        ({"mix_share": 1.0}, r"objective\.mix_share is 1\.0"),
        ({"mask_cell": 48}, r"objective\.mask_cell is 48; it must be a multiple of 32"),
        ({"mask_cell": 16}, r"objective\.mask_cell is 16"),
        ({"decoder_depth": 0}, r"objective\.decoder_depth is 0"),
        ({"decoder_width": 36, "decoder_heads": 8}, r"objective\.decoder_width is 36"),
        ({"momentum": 0.999, "final_momentum": 0.99}, r"objective\.momentum is 0\.999"),
        ({"block_rows": 0}, r"objective\.block_rows is 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        M3iConfig(**change)


def test_another_image_tower_is_refused() -> None:
    swin = SwinConfig(image_size=32, embed_dim=16, depths=(1, 1), num_heads=(2, 4), window_size=2)
    for image in (swin, replace(IMAGE, use_clip_projector=False)):
        model = build_klite(KliteConfig(image=image, text=TEXT, projection_dim=16))
        with pytest.raises(ValueError, match=r"model\.image\.use_clip_projector: true"):
            M3i(model, CONFIG, MEAN, STD)


def test_an_odd_batch_and_pictures_without_cells_are_refused_before_the_first_step() -> None:
    m3i, values = objective(), batch(size=96)
    with pytest.raises(ValueError, match="a micro-batch has 5"):
        m3i({name: value[:5] for name, value in values.items()}, torch.float32)
    with pytest.raises(ValueError, match=r"data\.image\.size"):
        CONFIG.check(IMAGE, 80, 6)
    CONFIG.check(IMAGE, 96, 6)
