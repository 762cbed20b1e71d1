"""Mixtures of data sets in recipes."""

import json
from pathlib import Path

import numpy as np
import pytest

from groundwork.pretrain.image_text import open_stream, open_training_data
from groundwork.pretrain.objectives.contrastive import UNIQUE
from groundwork.pretrain.recipe import Recipe, RecipeError, load_recipe
from groundwork.pretrain.training_data import LABELS_PER_SOURCE


def mixed(tiny_recipe: Path, shards: Path, *more: str) -> Recipe:
    sources = [
        {"name": "a", "shards": str(shards), "weight": 3},
        {"name": "b", "shards": str(shards), "split": "heldout_renderings", "shuffle_block": 5},
    ]
    settings = ["data.shards=null", f"data.sources={json.dumps(sources)}", *more]
    return load_recipe(str(tiny_recipe), settings)


def test_sources_are_mixed_by_weight_and_keep_their_classes_apart(
    tiny_recipe: Path, tiny_shards: Path
) -> None:
    recipe = mixed(tiny_recipe, tiny_shards)
    stream = open_stream(recipe.data, open_training_data(recipe.data), seed=0)
    examples, faults = stream.__getitems__(list(range(48)))
    assert faults == ()
    labels = np.array([example.label for example in examples])
    assert (labels != UNIQUE).all()
    assert ((labels >= LABELS_PER_SOURCE).reshape(-1, 4).sum(1) == 1).all()
    assert set((labels % LABELS_PER_SOURCE).tolist()) == set(range(6))
    assert stream.epochs(48) == {"a": 36 / 96, "b": 1.0}


def test_weights_follow_their_schedule(tiny_recipe: Path, tiny_shards: Path) -> None:
    change = "data.weight_changes=[{from_sample: 20, weights: [0, 1]}]"
    recipe = mixed(tiny_recipe, tiny_shards, change)
    stream = open_stream(recipe.data, open_training_data(recipe.data), seed=0)
    assert {source for source, _ in stream.locate(range(20, 60))} == {1}
    assert {source for source, _ in stream.locate(range(20))} == {0, 1}


def test_the_digest_names_all_sources(tiny_recipe: Path, tiny_shards: Path) -> None:
    alone = open_training_data(load_recipe(str(tiny_recipe)).data)
    together = open_training_data(mixed(tiny_recipe, tiny_shards).data)
    assert alone.digests()["dataset"] == alone.datasets[""].digest
    assert together.digests()["dataset"] != alone.digests()["dataset"]
    assert len(together.concepts) == 2 * len(alone.concepts)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.sources=[{name: a, shards: x}]"], r"data\.shards and data\.sources are both given"),
        (["data.shards=null"], r"data\.shards is missing; name a data set, or several"),
        (
            ["data.shards=null", "data.sources=[{name: a, shards: x, wieght: 2}]"],
            r"unknown key 'data\.sources\.wieght'; did you mean 'weight'",
        ),
        (
            ["data.shards=null", "data.sources=[{name: a, shards: x}, {name: a, shards: y}]"],
            r"names \['a', 'a'\]; each must be its own",
        ),
        (
            ["data.shards=null", "data.sources=[{name: a, shards: x, weight: -1}]"],
            r"data\.sources: weights \[-1\.0\]: expected finite numbers, none negative",
        ),
        (
            ["data.weight_changes=[{from_sample: 9, weights: [1]}]"],
            r"data\.weight_changes are of data\.sources, and there are none",
        ),
        (
            [
                "data.shards=null",
                "data.sources=[{name: a, shards: x}, {name: b, shards: y}]",
                "data.weight_changes=[{from_sample: 9, weights: [1]}]",
            ],
            "1 weights from sample 9 on for 2 sources",
        ),
        (["data.shuffle_block=0"], r"data\.shuffle_block is 0; it is a number of samples"),
        (["data.cache={folder: c, max_gb: 0}"], r"data\.cache\.max_gb is 0"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(
    settings: list[str], message: str, tiny_recipe: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(str(tiny_recipe), settings)
