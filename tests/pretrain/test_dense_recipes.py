"""The recipes of UperNet and DINO: each builds, with the published size and learning rates."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from groundwork.data.batch_plan import BatchPlan
from groundwork.pretrain.downstream.detection.data import DINO_MULTI_SCALE
from groundwork.pretrain.downstream.detection.dino import DinoDetectionTask
from groundwork.pretrain.downstream.finetuning.recipe import (
    FinetuneRecipe,
    RecipeError,
    available_finetune_recipes,
    load_finetune_recipe,
)
from groundwork.pretrain.downstream.finetuning.run import build_task, check_batch
from groundwork.pretrain.engine.optimizer import parameter_groups

RECIPES = [name for name in available_finetune_recipes() if "upernet" in name or "dino" in name]
#: Of the backbones, millions (spec: stem and levels), and blocks in all.
BACKBONES = {"t": (28.8, 30), "s": (48.5, 33), "b": (94.9, 33), "l": (219.0, 37), "xl": (329.0, 39)}
BACKBONES["h"] = (1073.1, 50)


def built(name: str) -> tuple[FinetuneRecipe, Any]:
    recipe = load_finetune_recipe(name)
    if "dino" in name:  # COCO names its 80 classes in the data set
        recipe = replace(recipe, task=replace(recipe.task, num_classes=80))  # type: ignore[call-arg]
    with torch.device("meta"):
        return recipe, build_task(recipe, SimpleNamespace(concepts=())).model  # type: ignore[arg-type]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_builds_and_has_its_learning_rates(name: str) -> None:
    recipe, model = built(name)
    groups = parameter_groups(model, recipe.optimizer)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    size = name.split("_")[1]
    if size not in BACKBONES:
        return
    millions, blocks = BACKBONES[size]
    # 0.05: layer scales, which the detection form of T has and the classifier has not
    assert sum(p.numel() for p in model.backbone.parameters()) / 1e6 == pytest.approx(
        millions, abs=0.06
    )
    scales = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    decay = recipe.optimizer.layer_decay
    named = dict(model.named_parameters())
    head = next(n for n in named if n.startswith(("heads.", "detector.mapper")))
    stem = scales[id(named["backbone.patch_embed.conv1.weight"])]
    assert scales[id(named[head])] == 1
    if decay is not None:
        assert stem == pytest.approx(decay ** (blocks + 1))
        if "dino" in name:  # the official rule takes them for part of the stem
            assert scales[id(named["detector.level_embeds"])] == pytest.approx(stem, rel=1e-3)
    else:
        assert stem == (0.1 if "dino" in name else 1)


def test_the_official_settings_of_upernet() -> None:
    crops = {"t": 512, "s": 512, "b": 512, "l": 640, "xl": 640, "h": 896}
    for size, crop in crops.items():
        recipe = load_finetune_recipe(f"internimage_{size}_upernet_160k")
        assert recipe.task.transform.crop == crop  # type: ignore[union-attr]
        assert recipe.task.labels.num_classes == 150  # type: ignore[union-attr]
        assert recipe.optimizer.lr == (6e-5 if crop == 512 else 2e-5)
        assert recipe.train.gradient_clipping == (0 if crop == 512 else 0.1)
        assert (recipe.train.steps, recipe.train.global_batch) == (160_000, 16)


@pytest.mark.parametrize("size", ["t", "l"])
def test_the_official_augmentation_of_dino(size: str) -> None:
    recipe = load_finetune_recipe(f"internimage_{size}_dino_1x")
    assert recipe.task.image == DINO_MULTI_SCALE  # type: ignore[union-attr]
    assert DinoDetectionTask().image == DINO_MULTI_SCALE
    assert (DINO_MULTI_SCALE.crop_max_size, DINO_MULTI_SCALE.max_size) == (4200, 1333)


def test_sampling_offsets_are_not_decayed() -> None:
    recipe, model = built("internimage_t_dino_1x")
    groups = parameter_groups(model, recipe.optimizer)
    decays = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    named = dict(model.named_parameters())
    attention = "detector.encoder.0.self_attn."
    assert decays[id(named[f"{attention}sampling_offsets.weight"])] == 0
    assert decays[id(named[f"{attention}value_proj.weight"])] == 1e-4


def test_a_batch_too_small_to_normalise_over_is_named_before_the_start() -> None:
    recipe = load_finetune_recipe("internimage_scenes_upernet")
    concepts: Any = SimpleNamespace(concepts=())
    task = build_task(recipe, concepts)
    check_batch(recipe, task, BatchPlan(8, 2, 2, 0))
    with pytest.raises(RecipeError, match=r"train: 1 samples per rank .* needs at least 2: raise"):
        check_batch(recipe, task, BatchPlan(8, 1, 2, 0))
    synced = replace(recipe, train=replace(recipe.train, sync_batch_norm=True))
    check_batch(synced, task, BatchPlan(8, 1, 2, 0))
    with pytest.raises(RecipeError):
        check_batch(synced, task, BatchPlan(8, 1, 1, 0))
