"""Operations of training on one sample, against torch's own count of products and convolutions."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from groundwork.pretrain.engine.throughput import training_flops
from groundwork.pretrain.models.clip_text import TextConfig
from groundwork.pretrain.models.flops import internimage_mac_split, klite_macs
from groundwork.pretrain.models.klite import InternImageTower, KliteConfig, build_klite
from groundwork.pretrain.models.swin import SwinConfig
from groundwork.pretrain.objectives.m3i import M3i, M3iConfig
from groundwork.pretrain.recipe import available, load_recipe
from groundwork.pretrain.sample_flops import flops_per_sample, m3i_dense_flops

TEXT = TextConfig(vocab_size=60, context_length=8, width=32, layers=2, heads=2)
TOWER = InternImageTower(
    channels=16,
    depths=(1, 1, 2, 1),
    groups=(1, 2, 4, 8),
    use_clip_projector=True,
    clip_embed_dim=48,
    clip_num_heads=4,
    clip_dim=32,
)


@pytest.mark.parametrize(("size", "window"), [(64, 4), (64, 5), (48, 7)])
def test_two_towers_are_counted_to_the_unit(size: int, window: int) -> None:
    """Windows that divide the maps, that are padded, and that shrink to them."""
    swin = SwinConfig("swin", size, 4, 32, (2, 2, 2), (1, 2, 4), window)
    config = KliteConfig(image=swin, text=TEXT, projection_dim=16)
    model = build_klite(config).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image=torch.randn(1, 3, size, size), ids=torch.randint(0, 60, (1, 8)))
    assert counter.get_total_flops() == 2 * klite_macs(config, size)


@pytest.mark.parametrize("dense_weight", [0.0, 1.0])
def test_m3i_counts_its_teacher_and_its_decoder(dense_weight: float) -> None:
    config = KliteConfig(image=TOWER, text=TEXT, projection_dim=16)
    objective = M3iConfig(decoder_depth=2, decoder_width=32, decoder_heads=4)
    model = M3i(
        build_klite(config), replace(objective, dense_weight=dense_weight), (0.5,) * 3, (0.2,) * 3
    )
    batch = {
        "image": torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8),
        "ids": torch.randint(0, 60, (4, 8)),
        "labels": torch.full((4,), -1),
    }
    with FlopCounterMode(display=False) as counter:
        model(batch, torch.float32)["loss"].backward()
    ours = training_flops(klite_macs(config, 64))
    passes = 3
    if dense_weight:
        ours += m3i_dense_flops(objective, TOWER, 64)
        passes += 1
    # torch does not know our op, the sampling; and the stem's pixels need no gradient, which is
    # much of a model as small as this
    ours -= 2 * passes * internimage_mac_split(TOWER, 64, 64)["sampling"]
    ours -= 2 * 9 * 3 * (TOWER.channels // 2) * 32**2
    assert counter.get_total_flops() / 4 == pytest.approx(ours, rel=0.02)


def test_every_recipe_knows_its_work() -> None:
    work = {name: flops_per_sample(load_recipe(name)) for name in available()}
    assert work["internimage_t_in1k"] == pytest.approx(6 * 4.885e9, rel=0.01)
    assert work["internimage_h_m3i"] > 4 * work["internimage_l_in22k"]
