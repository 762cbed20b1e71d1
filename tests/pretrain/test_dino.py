"""DINO part by part, against transformers, loops and brute force; and that it learns."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import DeformableDetrConfig
from transformers.loss.loss_deformable_detr import (
    DeformableDetrHungarianMatcher,
    DeformableDetrImageLoss,
)
from transformers.models.deformable_detr.modeling_deformable_detr import (
    DeformableDetrMultiscaleDeformableAttention,
)

from groundwork.data.samples import Concept
from groundwork.data.sources.scenes import ScenesConfig, scene_sample, scenes_concepts
from groundwork.pretrain.downstream.detection.data import DetectionTransform
from groundwork.pretrain.downstream.detection.dino import (
    DinoDetectionTask,
    best_detections,
    build_dino_detection,
)
from groundwork.pretrain.downstream.detection.dino_loss import (
    LOSS_WEIGHTS,
    Objects,
    dino_losses,
    match,
    matching_cost,
)
from groundwork.pretrain.models.deformable_attention import DeformableAttention
from groundwork.pretrain.models.dino import Detections, Dino, DinoConfig, DinoOutputs
from groundwork.pretrain.models.dino_denoising import Denoising, make_denoising
from groundwork.pretrain.models.dino_layers import cell_positions
from groundwork.pretrain.models.internimage import InternImageConfig

SHAPES = [(5, 7), (3, 4), (2, 2)]
CELLS = sum(h * w for h, w in SHAPES)
TINY = DinoConfig(
    queries=12, width=32, heads=4, points=2, encoder_layers=1, decoder_layers=3, hidden=48
)
TINY_BACKBONE = InternImageConfig(channels=16, depths=(1, 1, 1, 1), groups=(1, 2, 4, 8))


def deformable_inputs(coordinates: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    queries, memory = torch.randn(2, 6, 16), torch.randn(2, CELLS, 16)
    reference = torch.rand(2, 6, len(SHAPES), coordinates)
    padding = torch.rand(2, CELLS) < 0.2
    return queries, reference, memory, padding


def random_attention() -> DeformableAttention:
    torch.manual_seed(0)
    attention = DeformableAttention(16, heads=4, levels=len(SHAPES), points=3)
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.5)
    return attention


@pytest.mark.parametrize("coordinates", [2, 4])
def test_deformable_attention_is_that_of_transformers(coordinates: int) -> None:
    attention = random_attention()
    settings = DeformableDetrConfig(d_model=16, num_feature_levels=len(SHAPES))
    peer = DeformableDetrMultiscaleDeformableAttention(settings, num_heads=4, n_points=3)
    peer.load_state_dict(attention.state_dict(), strict=True)
    queries, reference, memory, padding = deformable_inputs(coordinates)
    starts = [0, *itertools.accumulate(h * w for h, w in SHAPES)][:-1]
    expected = peer(
        hidden_states=queries,
        attention_mask=~padding,
        encoder_hidden_states=memory,
        reference_points=reference,
        spatial_shapes=torch.tensor(SHAPES),
        spatial_shapes_list=SHAPES,
        level_start_index=torch.tensor(starts),
    )[0]
    torch.testing.assert_close(attention(queries, reference, memory, SHAPES, padding), expected)


def bilinear(grid: Tensor, x: float, y: float) -> Tensor:
    """grid: (h, w, D), its first pixel's centre at (0.5, 0.5); zero outside."""
    x, y = x - 0.5, y - 0.5
    left, top = int(np.floor(x)), int(np.floor(y))
    value = torch.zeros(grid.shape[-1], dtype=grid.dtype)
    for row, column in itertools.product((top, top + 1), (left, left + 1)):
        if 0 <= row < grid.shape[0] and 0 <= column < grid.shape[1]:
            value += grid[row, column] * (1 - abs(x - column)) * (1 - abs(y - row))
    return value


def test_deformable_attention_is_what_its_equation_says() -> None:
    attention = random_attention()
    queries, reference, memory, _ = deformable_inputs(2)
    found = attention(queries, reference, memory, SHAPES)
    with torch.no_grad():
        value = attention.value_proj(memory).view(2, CELLS, 4, 4)
        offsets = attention.sampling_offsets(queries).view(2, 6, 4, 3, 3, 2)
        weights = attention.attention_weights(queries).view(2, 6, 4, 9).softmax(-1)
        expected = torch.zeros(2, 6, 4, 4)
        for b, n, head, level, point in itertools.product(*map(range, (2, 6, 4, 3, 3))):
            height, width = SHAPES[level]
            start = sum(h * w for h, w in SHAPES[:level])
            grid = value[b, start : start + height * width, head].view(height, width, 4)
            dx, dy = offsets[b, n, head, level, point].tolist()
            x, y = reference[b, n, level].tolist()
            seen = bilinear(grid, x * width + dx, y * height + dy)
            expected[b, n, head] += weights[b, n, head, level * 3 + point] * seen
        expected = attention.output_proj(expected.flatten(2))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_positions_count_the_cells_of_the_picture() -> None:
    inside = torch.zeros(2, 6, 9, dtype=torch.bool)
    sizes = ((4, 9), (6, 5))
    for row, (height, width) in zip(inside, sizes, strict=True):
        row[:height, :width] = True
    found = cell_positions(inside, 8).view(2, 6, 9, 8)
    for b, (height, width) in enumerate(sizes):
        for r, c in itertools.product(range(height), range(width)):
            expected = [
                wave(2 * np.pi * place / 20 ** (pair / 2))
                for place in ((r + 1) / height, (c + 1) / width)
                for pair in (0, 1)
                for wave in (np.sin, np.cos)
            ]
            torch.testing.assert_close(
                found[b, r, c].double(), torch.tensor(expected), atol=1e-5, rtol=0
            )


def test_parameters_of_the_published_size() -> None:
    with torch.device("meta"):
        model = Dino(DinoConfig(), [128, 256, 512], 80)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert shapes["level_embeds"] == (4, 256) and shapes["query_embedding.weight"] == (900, 256)
    assert shapes["label_embedding.weight"] == (80, 256)
    assert shapes["encoder.5.self_attn.sampling_offsets.weight"] == (256, 256)
    assert shapes["decoder.5.cross_attn.attention_weights.weight"] == (128, 256)
    assert shapes["encoder.0.ffn.fc1.weight"] == (2048, 256)
    assert shapes["reference_embed.layers.0.weight"] == (256, 512)
    assert shapes["mapper.extra_convs.0.conv.weight"] == (256, 512, 3, 3)
    assert len(model.class_heads) == len(model.box_heads) == 7
    linear = lambda a, b: a * b + b  # noqa: E731
    deformable = linear(256, 256) * 3 + linear(256, 128)
    feed_forward = linear(256, 2048) + linear(2048, 256)
    encoder = 6 * (deformable + feed_forward + 2 * 512)
    decoder = 6 * (deformable + feed_forward + 4 * linear(256, 256) + 3 * 512) + 512
    heads = 7 * (linear(256, 80) + 2 * linear(256, 256) + linear(256, 4))
    mapper = 256 * (128 + 256 + 512 + 512 * 9) + 4 * 512
    rest = (4 + 900 + 80) * 256 + linear(256, 256) + 512 + linear(512, 256) + linear(256, 256)
    assert sum(p.numel() for p in model.parameters()) == encoder + decoder + heads + mapper + rest


def tiny_dino(**change: Any) -> Dino:
    torch.manual_seed(0)
    model = Dino(replace(TINY, **change), [8, 16, 24], 5)
    for regressor in model.box_heads:  # away from zero, so that boxes differ
        nn.init.normal_(regressor.layers[-1].weight, std=0.3)  # type: ignore[union-attr, index, arg-type]
    return model


def tiny_features(batch: int = 2) -> tuple[list[Tensor], Tensor]:
    """Of pictures of 64 x 96 pixels; the last one has 40 columns of padding."""
    torch.manual_seed(1)
    features = [torch.randn(batch, c, 64 // s, 96 // s) for c, s in ((8, 8), (16, 16), (24, 32))]
    inside = torch.ones(batch, 64, 96, dtype=torch.bool)
    inside[-1, :, 56:] = False
    return features, inside


def random_objects(counts: Sequence[int], seed: int = 0) -> list[Objects]:
    generator = torch.Generator().manual_seed(seed)
    objects = []
    for n in counts:
        size = torch.rand(n, 2, generator=generator) * 0.4 + 0.05
        centre = size / 2 + torch.rand(n, 2, generator=generator) * (1 - size)
        labels = torch.randint(5, (n,), generator=generator)
        objects.append(Objects(labels, torch.cat([centre, size], -1)))
    return objects


def noisy(objects: Sequence[Objects], **options: Any) -> Denoising:
    return make_denoising([o.labels for o in objects], [o.boxes for o in objects], 5, **options)


@pytest.mark.parametrize("counts", [(3, 1), (0, 2), (0, 0)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_parameter_gets_a_gradient(counts: tuple[int, int], checkpointing: bool) -> None:
    model = tiny_dino(activation_checkpointing=checkpointing)
    features, inside = tiny_features()
    objects = random_objects(counts)
    denoising = noisy(objects, queries=6)
    outputs = model(features, inside, denoising)
    assert outputs.matched.logits.shape == (3, 2, 12, 5)
    assert outputs.matched.boxes.shape == (3, 2, 12, 4)
    assert outputs.proposals.boxes.shape == (1, 2, 12, 4)
    assert outputs.denoising.boxes.shape[2] == denoising.labels[0].numel()
    losses = dino_losses(outputs, objects, denoising)
    losses["loss"].backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert missing == []
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    assert all(bool(value.isfinite()) for value in losses.values())
    used = model.label_embedding.weight.grad.abs().sum()  # type: ignore[union-attr]
    assert (used > 0) == (sum(counts) > 0)


def test_checkpointing_changes_no_gradient() -> None:
    features, inside = tiny_features()
    gradients = []
    for checkpointing in (False, True):
        model = tiny_dino(activation_checkpointing=checkpointing)
        losses = dino_losses(model(features, inside), random_objects((3, 1)), None)
        losses["loss"].backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_denoising_queries_do_not_leak_their_answers() -> None:
    model = tiny_dino().eval()
    features, inside = tiny_features()
    first = noisy(random_objects((3, 2)), queries=9)
    B, G, _, M = first.labels.shape
    assert G == 3
    other = first._replace(labels=(first.labels + 1) % 5, boxes=torch.rand_like(first.boxes))
    one_group = first._replace(labels=first.labels.clone(), boxes=first.boxes.clone())
    one_group.labels[:, 0] = other.labels[:, 0]
    one_group.boxes[:, 0] = other.boxes[:, 0]
    with torch.no_grad():
        a, b, c = (model(features, inside, d) for d in (first, other, one_group))
        alone = model(features, inside)
    for matched in (b.matched, c.matched, alone.matched):
        torch.testing.assert_close(a.matched, matched, atol=1e-5, rtol=1e-4)
    # a group sees itself and the matched queries, and no other group
    boxes, changed = (x.denoising.boxes.view(3, B, G, 2 * M, 4) for x in (a, c))
    torch.testing.assert_close(boxes[:, :, 1:], changed[:, :, 1:], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(boxes[:, :, 0], changed[:, :, 0], atol=1e-2)


def test_a_box_error_reaches_the_layer_before_and_no_further() -> None:
    """Look forward twice (section 3.5)."""
    model = tiny_dino()
    features, inside = tiny_features()
    outputs = model(features, inside)
    first = model.box_heads[0].layers[-1].bias  # type: ignore[union-attr, index]
    for layer, reached in ((0, True), (1, True), (2, False)):
        loss = outputs.matched.boxes[layer].square().sum()
        (gradient,) = torch.autograd.grad(loss, first, retain_graph=True, allow_unused=True)  # type: ignore[arg-type]
        assert (gradient is not None and bool(gradient.abs().sum() > 0)) == reached


def test_padding_and_edges_are_not_proposed() -> None:
    model = tiny_dino()
    features, inside = tiny_features()
    proposals = model(features, inside).proposals.boxes[0, -1]
    model.box_heads[-1].apply(lambda m: nn.init.zeros_(m.weight) if isinstance(m, nn.Linear) else m)
    centres = model(features, inside).proposals.boxes[0, -1, :, :2]
    assert proposals.shape == (12, 4)
    # in parts of the picture without padding: whatever lay in it would be beyond 1
    assert bool(((centres > 0.01) & (centres < 0.99)).all())


def test_a_picture_with_fewer_cells_than_queries() -> None:
    outputs = tiny_dino(queries=900)(*tiny_features())
    cells = 8 * 12 + 4 * 6 + 2 * 3 + 1 * 2
    assert outputs.matched.logits.shape[2] == cells
    assert bool(outputs.matched.boxes.isfinite().all())


@settings(max_examples=25)
@given(counts=st.tuples(st.integers(0, 3), st.integers(0, 4)), seed=st.integers(0, 2**31 - 1))
def test_matching_is_the_cheapest_there_is(counts: tuple[int, int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    found = Detections(
        torch.randn(2, 2, 5, 5, generator=generator), torch.rand(2, 2, 5, 4, generator=generator)
    )
    objects = random_objects(counts, seed)
    matches = match(found, objects)
    for layer, picture in itertools.product(range(2), range(2)):
        one = objects[picture]
        cost = matching_cost(
            found.logits[layer : layer + 1, picture], found.boxes[layer : layer + 1, picture], one
        )[0]
        queries, numbers = matches[layer][picture]
        assert sorted(numbers.tolist()) == list(range(len(one.labels)))
        assert len(set(queries.tolist())) == len(queries)
        best = min(
            sum(float(cost[q, n]) for n, q in enumerate(chosen))
            for chosen in itertools.permutations(range(5), len(one.labels))
        )
        assert float(cost[queries, numbers].sum()) == pytest.approx(best, abs=1e-4)


def test_matching_and_losses_are_those_of_transformers() -> None:
    objects = random_objects((3, 0, 6))
    logits, boxes = torch.randn(3, 3, 20, 5), torch.rand(3, 3, 20, 4) * 0.4 + 0.1
    targets = [{"class_labels": o.labels, "boxes": o.boxes} for o in objects]
    matcher = DeformableDetrHungarianMatcher(class_cost=2, bbox_cost=5, giou_cost=2)
    ours = match(Detections(logits, boxes), objects)
    for layer in range(3):
        theirs = matcher({"logits": logits[layer], "pred_boxes": boxes[layer]}, targets)
        for (q, n), (peer_q, peer_n) in zip(ours[layer], theirs, strict=True):
            assert dict(zip(q.tolist(), n.tolist(), strict=True)) == dict(
                zip(peer_q.tolist(), peer_n.tolist(), strict=True)
            )
    peer = DeformableDetrImageLoss(matcher, 5, 0.25, ["labels", "boxes"])
    total = 0.0
    for layer in range(3):
        parts = peer({"logits": logits[layer], "pred_boxes": boxes[layer]}, targets)
        names = ("loss_ce", "loss_bbox", "loss_giou")
        total += sum(w * float(parts[name]) for w, name in zip(LOSS_WEIGHTS, names, strict=True))
    outputs = DinoOutputs(
        Detections(logits[:2], boxes[:2]), Detections(logits[2:], boxes[2:]), None
    )
    assert float(dino_losses(outputs, objects, None)["loss"]) == pytest.approx(total, rel=1e-5)


def test_a_diverged_model_is_matched_all_the_same() -> None:
    found = Detections(torch.full((1, 1, 4, 5), torch.nan), torch.full((1, 1, 4, 4), torch.nan))
    ((queries, _),) = match(found, random_objects((3,)))[0]
    assert len(set(queries.tolist())) == 3


def test_denoising_loss_wants_the_true_box_and_nothing_of_the_noisier_ones() -> None:
    objects = random_objects((2, 0, 3))
    denoising = noisy(objects, queries=9)
    B, G, _, M = denoising.labels.shape
    logits = torch.full((1, B, G, 2, M, 5), -20.0)
    for b, one in enumerate(objects):
        for m, label in enumerate(one.labels):
            logits[0, b, :, 0, m, label] = 20
    boxes = denoising.true_boxes[:, None, None].expand(B, G, 2, M, 4).clone()
    boxes[:, :, 1] = 0.5  # of no importance
    boxes = boxes.view(1, B, -1, 4)
    matched = Detections(torch.full((1, B, 4, 5), -20.0), torch.full((1, B, 4, 4), 0.5))

    def loss(logits: Tensor, boxes: Tensor) -> float:
        outputs = DinoOutputs(matched, matched, Detections(logits.reshape(1, B, -1, 5), boxes))
        return float(dino_losses(outputs, objects, denoising)["loss_denoising"])

    assert loss(logits, boxes) == pytest.approx(0, abs=1e-4)
    wrong = logits.clone()
    wrong[0, 0, 1, 1, 0, 2] = 20  # one that should be told apart, and is taken for class 2
    # focal: (1 - alpha) * 20, over 5 objects in 3 groups
    assert loss(wrong, boxes) == pytest.approx(0.75 * 20 / 15, rel=1e-4)
    absent = logits.clone()
    absent[0, 1] = 20  # a picture without objects has absent queries only
    assert loss(absent, boxes) == pytest.approx(0, abs=1e-4)
    assert loss(logits, boxes + 0.01) > 5 * 0.04  # and the generalised IoU


def test_noise_stays_within_its_bounds() -> None:
    torch.manual_seed(0)
    centres = torch.full((200, 2), 0.5)
    boxes = torch.cat([centres, torch.full((200, 2), 0.1)], -1)
    labels = torch.zeros(200, dtype=torch.int64)
    noise = make_denoising([labels], [boxes], 4, queries=2000, label_noise=0.5, box_noise=1.0)
    assert noise.labels.shape == (1, 10, 2, 200)
    few, more = noise.boxes[0].unbind(1)

    def shifts(boxes: Tensor) -> Tensor:
        """Of the four edges, in half boxes."""
        edges = torch.cat(
            [boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], -1
        )
        return (edges - torch.tensor([0.45, 0.45, 0.55, 0.55])).abs() / 0.05

    assert float(shifts(few).max()) <= 1 + 1e-4
    kept = (more[..., 2:] > 1e-6).all(-1)  # others were turned inside out
    outer = shifts(more[kept])
    assert float(outer.min()) >= 1 - 1e-3 and float(outer.max()) <= 2 + 1e-3
    changed = float((noise.labels != 0).float().mean())
    assert changed == pytest.approx(0.25 * 3 / 4, abs=0.02)  # a quarter drawn anew, of 4 classes
    still = make_denoising([labels], [boxes], 4, queries=200, label_noise=0.0, box_noise=0.0)
    assert bool((still.labels == 0).all())
    torch.testing.assert_close(still.boxes[0, 0, 1], boxes)


def test_detections_are_the_likeliest_pairs_in_pixels() -> None:
    logits = torch.full((2, 1, 3, 2), -9.0)
    logits[-1, 0, 1, 0], logits[-1, 0, 1, 1], logits[-1, 0, 2, 1] = 2.0, 1.0, 3.0
    boxes = torch.rand(2, 1, 3, 4)
    boxes[-1, 0, 1] = torch.tensor([0.5, 0.5, 0.2, 0.4])
    boxes[-1, 0, 2] = torch.tensor([0.9, 0.1, 0.4, 0.4])  # reaches beyond the picture
    (found,) = best_detections(Detections(logits, boxes), [(100, 200)], 3)
    assert found["labels"].tolist() == [1, 0, 1]
    torch.testing.assert_close(found["scores"], torch.tensor([3.0, 2.0, 1.0]).sigmoid())
    expected = [[140.0, 0, 200, 30], [80, 30, 120, 70], [80, 30, 120, 70]]
    torch.testing.assert_close(found["boxes"], torch.tensor(expected))


class Concepts:
    def __init__(self, concepts: list[Concept]) -> None:
        self.concepts = concepts


def test_it_learns_a_few_scenes_by_heart() -> None:
    torch.manual_seed(0)
    scenes = ScenesConfig(image_size=64, objects=(1, 2))
    config = DinoDetectionTask(
        head=replace(TINY, queries=20, width=64, decoder_layers=2, denoising_queries=20),
        image=DetectionTransform(sizes=(64,), test_size=64, flip=0.0),
    )
    concepts: Any = Concepts(scenes_concepts(scenes))
    task = build_dino_detection(config, replace(TINY_BACKBONE, drop_path=0.0), concepts)
    samples = [scene_sample(scenes, index)[1] for index in range(4)]
    batch = task.collate([task.example(s, np.random.default_rng(0)) for s in samples])

    def ap50() -> float:
        task.model.eval()
        evaluator = task.evaluator()
        held = task.collate([task.example(sample, None) for sample in samples])
        with torch.no_grad():
            evaluator.add(task.model(held), held)
        return evaluator.result(evaluator.records())["box_ap50"]

    before = ap50()
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=1e-3)
    task.model.train()
    for _ in range(120):
        losses = task.model(batch)
        optimizer.zero_grad()
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(task.model.parameters(), 0.1)
        optimizer.step()
    assert [n for n, p in task.model.named_parameters() if p.grad is None] == []
    assert before < 0.1 and ap50() > 0.6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": 0}, "queries is 0"),
        ({"width": 48}, "width is 48; give a multiple of 32"),
        ({"denoising_queries": -1}, "denoising_queries is -1"),
        ({"label_noise": 1.5}, "label_noise is 1.5"),
        ({"box_noise": -1.0}, "box_noise is -1.0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_a_config_that_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(DinoConfig(), **change)


def test_more_maps_than_levels_are_refused() -> None:
    with pytest.raises(ValueError, match="5 maps for 4 levels"):
        Dino(TINY, [8] * 5, 3)
