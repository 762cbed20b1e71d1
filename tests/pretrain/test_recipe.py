"""Recipes: all that ship can be built, and what is wrong in one is named with line and remedy."""

from collections.abc import Callable
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from groundwork.pretrain.kinds import MODELS, OBJECTIVES
from groundwork.pretrain.models.swin import SwinConfig
from groundwork.pretrain.recipe import (
    Recipe,
    RecipeError,
    available,
    differences,
    load_recipe,
    recipe_from_dict,
    recipe_to_dict,
)

GOOD = """\
# a comment is a line too
model:
  kind: klite
  image: {kind: swin, image_size: 224, embed_dim: 12, depths: [1, 1], num_heads: [2, 2]}
  text:
    width: 16
    heads: 2
objective: {kind: unicl}
data:
  shards: somewhere
train:
  steps: 10
  global_batch: 4
"""

Writer = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Writer:
    """Writes GOOD with one replacement; gives the path."""

    def writer(old: str = "", new: str = "") -> str:
        assert old in GOOD
        path = tmp_path / "mine.yaml"
        path.write_text(GOOD.replace(old, new) if old else GOOD)
        return str(path)

    return writer


@pytest.mark.parametrize("name", available())
def test_every_recipe_builds_on_the_meta_device(name: str) -> None:
    recipe = load_recipe(name)
    config: Any = recipe.model
    text = getattr(config, "text", None)
    if is_dataclass(text) and getattr(text, "vocab_size", 0) is None:
        config = replace(config, text=replace(text, vocab_size=1000))  # type: ignore[type-var]
    with torch.device("meta"):
        model = MODELS[recipe.model.kind](config)
    assert sum(parameter.numel() for parameter in model.parameters()) > 0
    assert all(parameter.is_meta for parameter in model.parameters())
    assert recipe.objective.kind in OBJECTIVES


@pytest.mark.parametrize("name", available())
def test_every_recipe_says_how_to_run_it(name: str) -> None:
    from groundwork.pretrain.recipe import RECIPES

    head = [
        line for line in (RECIPES / f"{name}.yaml").read_text().splitlines() if line.startswith("#")
    ]
    assert any(name in line for line in head)


@pytest.mark.parametrize("name", available())
def test_a_saved_recipe_is_read_back_as_it_was(name: str) -> None:
    recipe = load_recipe(name)
    again = recipe_from_dict(recipe_to_dict(recipe), "saved")
    assert again == recipe
    assert differences(recipe_to_dict(recipe), recipe_to_dict(again)) == []


def test_what_a_recipe_leaves_out_has_its_default(write: Writer) -> None:
    recipe = load_recipe(write())
    assert isinstance(recipe.model.image, SwinConfig)
    assert recipe.model.image.window_size == 7
    assert recipe.optimizer.betas == (0.9, 0.999)
    assert recipe.train.precision == "bf16"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("width: 16", "widht: 16", r"mine\.yaml:6: unknown key 'model\.text\.widht'; .*'width'"),
        ("embed_dim", "embed_dims", r":4: unknown key 'model\.image\.embed_dims'; .*'embed_dim'"),
        (
            "steps: 10",
            "steps: 10\n  xyzzy: 1",
            r":13: unknown key 'train\.xyzzy'; known keys: .*steps",
        ),
        ("train:", "trian: 1\ntrain:", r":11: unknown key 'trian'; did you mean 'train'"),
        (
            "  steps: 10\n",
            "",
            r":11: key 'train\.steps' is missing; add it, or pass --set train\.steps",
        ),
        ("shards: somewhere", "split: train", r":9: data\.shards is missing"),
        ("objective: {kind: unicl}\n", "", r"mine\.yaml: key 'objective' is missing"),
        ("steps: 10", "steps: many", r":12: train\.steps: .*valid integer.*'many'"),
        ("steps: 10", "steps: 1.5", r":12: train\.steps: .*integer.*1\.5"),
        ("steps: 10", "steps: 0", r":1[12]: train\.steps is 0; it must be at least 1"),
        ("[1, 1]", "[1, x]", r":4: model\.image\.depths(\.1)?: .*valid integer.*'x'"),
        (
            "kind: swin",
            "kind: swim",
            r":4: model\.image\.kind is 'swim'; choose among swin, internimage",
        ),
        ("kind: klite", "kind: klit", r":3: model\.kind is 'klit'; choose among klite"),
        ("num_heads: [2, 2]", "num_heads: [2]", r":4: model\.image: depths has 2 stages"),
        ("heads: 2\nobj", "heads: 3\nobj", r":5: model\.text: width 16 is not divisible by 3"),
        ("train:\n", "train: 3\nmonitor:\n", r":11: train: .*object.*3"),
        ("model:", "model: [", r"mine\.yaml: not valid YAML"),
        (GOOD, "- a\n- b\n", r"mine\.yaml: a recipe is a mapping of sections"),
        (GOOD, "", r"mine\.yaml: a recipe is a mapping of sections"),
    ],
)
def test_a_mistake_is_named_with_line_key_and_remedy(
    write: Writer, old: str, new: str, message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(old, new))


def test_all_mistakes_are_told_at_once(write: Writer) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write("steps: 10", "stepz: 10"))
    assert "'train.steps' is missing" in str(caught.value)
    assert "unknown key 'train.stepz'" in str(caught.value)


def test_a_recipe_that_does_not_exist_is_answered_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match="no recipe 'klite_emojy': did you mean 'klite_emoji'"):
        load_recipe("klite_emojy")


def test_overrides_are_yaml_and_win(write: Writer) -> None:
    overrides = [
        "train.steps=25",
        "optimizer.lr=1.0e-2",
        "model.image.depths=[1, 2]",
        "data.knowledge={prob: 0.25}",
        "model.text.autoregressive=false",
        "deepspeed.zero_optimization.stage=2",
        "train.steps=30",
    ]
    recipe = load_recipe(write(), overrides)
    assert recipe.train.steps == 30
    assert recipe.optimizer.lr == 0.01
    assert recipe.model.image.depths == (1, 2)
    assert recipe.data.knowledge.prob == 0.25
    assert recipe.model.text.autoregressive is False
    assert recipe.deepspeed == {"zero_optimization": {"stage": 2}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=3", r"unknown key 'train\.stepz'; did you mean 'steps'"),
        ("train.steps=many", r"train\.steps: .*valid integer"),
        ("train.steps", r"--set train\.steps: expected key\.path=value"),
        ("=3", r"--set =3: expected key\.path=value"),
        ("train..steps=3", r"expected key\.path=value"),
        ("train.steps.x=3", r"--set train\.steps\.x=3: 'steps' is a value, not a section"),
        ("train.steps=[1", r"--set train\.steps=\[1: the value is not valid YAML"),
        ("data.knowledge.prob=2", r"data\.knowledge\.prob is 2\.0; it is a probability"),
    ],
)
def test_a_wrong_override_is_refused(write: Writer, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(), [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.workers=-1", r"--set data\.workers=-1: data\.workers is -1; it must be 0"),
        ("data={shards: x, prefetch: 0}", r"data\.prefetch is 0; with 2 workers .* at least 1"),
        ("data.bad_sample_budget=-1", r"data\.bad_sample_budget is -1\.0; .* 0 to 1"),
        ("data.bad_sample_budget=.nan", r"data\.bad_sample_budget is nan"),
        ("data.image.size=96", r"data\.image\.size is 96, but model\.image\.image_size is 224"),
        ("data.image.contrast=.nan", r"data\.image: .*contrast is nan"),
        ("data.tokenizer.vocab_size=0", r"data\.tokenizer\.vocab_size is 0; .* at least 514"),
        ("data.knowledge.sources=[]", r"data\.knowledge\.sources is \[\]; name wn_def"),
        ("model.text.context_length=1", r"model\.text\.context_length is 1; .* at least 3"),
        ("model.text.heads=0", r"model\.text\.heads is 0; it must be at least 1"),
        ("model.projection_dim=-3", r"model\.projection_dim is -3; it must be at least 1"),
        (f"train.steps={10**29}", r"train\.steps is 10{29}; .* at most 2147483647"),
        ("train.micro_batch=0", r"train\.micro_batch is 0; it must be at least 1"),
        ("train.seed=-1", r"train\.seed is -1; it must be 0 to"),
        ("train.gradient_clipping=-1", r"train\.gradient_clipping is -1\.0; .*or 0 for none"),
        ("train.gradient_clipping=.nan", r"train\.gradient_clipping is nan"),
        ("train.gradient_clipping=.inf", r"train\.gradient_clipping is inf"),
    ],
)
def test_a_value_that_no_run_could_use_is_refused(
    write: Writer, override: str, message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(), [override])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("2020-13-45", r"2020-13-45: month must be in 1\.\.12; quote it"),
        ("{[1]: 2}", "a key must be a word"),
        ("{2020-01-01: 2}", "is no word; quote it"),
        ("{on: 2}", "key True is no word; quote it"),
        ("&a [*a]", r"\*a stands for something that holds it"),
        ("&a {b: *a}", r"\*a stands for something that holds it"),
        ("[" * 3000, "nested too deeply"),
        ("1" * 5000, "Exceeds the limit"),
    ],
    ids=lambda text: text[:20],
)
def test_odd_yaml_is_refused_with_its_place(write: Writer, value: str, message: str) -> None:
    with pytest.raises(RecipeError, match=r"(?s)mine\.yaml: not valid YAML: .*" + message) as told:
        load_recipe(write("  steps: 10", f"  steps: {value}"))
    assert "line 12" in str(told.value) or "deeply" in message
    with pytest.raises(RecipeError, match=rf"(?s)--set model=.*not valid YAML.*{message}"):
        load_recipe(write(), [f"model={value}"])


def test_a_number_too_long_to_write_down_is_refused(write: Writer) -> None:
    with pytest.raises(RecipeError, match="too large for a recipe"):
        load_recipe(write(), ["train.steps=0x" + "f" * 5000])


def test_a_part_may_be_used_twice(write: Writer) -> None:
    recipe = load_recipe(write("width: 16", "width: &w 16\n    context_length: *w"))
    assert recipe.model.text.context_length == 16


def test_differences_name_key_and_both_values(write: Writer) -> None:
    path = write()

    def resolved(*overrides: str) -> dict[str, Any]:
        return recipe_to_dict(load_recipe(path, overrides))

    assert differences(resolved(), resolved()) == []
    assert differences(resolved(), resolved("train.steps=11", "model.image.depths=[1, 2]")) == [
        "model.image.depths: [1, 1] -> [1, 2]",
        "train.steps: 10 -> 11",
    ]
    assert differences(resolved(), resolved("deepspeed.zero_optimization.stage=2")) != []


def test_what_computes_nothing_may_differ(write: Writer) -> None:
    path = write()
    overrides = ["checkpoint.every_steps=3", "monitor.log_every=7", "data.workers=0"]
    saved, present = recipe_to_dict(load_recipe(path)), recipe_to_dict(load_recipe(path, overrides))
    assert saved != present
    assert differences(saved, present) == []


def test_a_saved_recipe_with_an_unknown_key_is_refused_by_its_source(write: Writer) -> None:
    values = recipe_to_dict(load_recipe(write()))
    values["train"]["momentum"] = 0.9
    with pytest.raises(RecipeError, match=r"run/recipe: unknown key 'train\.momentum'"):
        recipe_from_dict(values, "run/recipe")


def test_a_resolved_recipe_cannot_be_changed(write: Writer) -> None:
    recipe: Recipe = load_recipe(write())
    with pytest.raises(AttributeError):
        recipe.train.steps = 5  # type: ignore[misc]


def test_an_override_is_blamed_and_not_the_file() -> None:
    with pytest.raises(RecipeError, match=r"^--set train\.stepz=3: unknown key 'train\.stepz'"):
        load_recipe("klite_emoji", ["train.stepz=3"])


def test_a_recipe_says_what_differs_from_its_base(tmp_path: Path) -> None:
    (tmp_path / "low.yaml").write_text(GOOD)
    above = tmp_path / "above.yaml"
    above.write_text("# less\nbase: low\ntrain: {steps: 3}\nmodel:\n  image: {depths: [2, 1]}\n")
    low, high = load_recipe(str(tmp_path / "low.yaml")), load_recipe(str(above))
    assert high.train == replace(low.train, steps=3)
    assert high.model.image == replace(low.model.image, depths=(2, 1))  # type: ignore[union-attr]
    assert high.data == low.data
    assert load_recipe(str(above), ["train.steps=4"]).train.steps == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: lo\n", r"above\.yaml:1: base: no recipe 'lo'"),
        ("base: above\n", r"above\.yaml:1: base 'above' has a base itself"),
        ("base: 3\n", r"above\.yaml:1: base is 3; give the name of a recipe"),
        ("base: low\ntrain: {stepps: 3}\n", r"above\.yaml:2: unknown key 'train.stepps'"),
        ("base: bad\n", r"bad\.yaml:2: unknown key 'train.stepps'"),
    ],
)
def test_a_mistake_with_a_base_is_named_where_it_stands(
    tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "low.yaml").write_text(GOOD)
    (tmp_path / "bad.yaml").write_text("# one\ntrain: {stepps: 3}\n")
    (tmp_path / "above.yaml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(str(tmp_path / "above.yaml"))


def test_settings_that_no_recipe_has_are_named_with_the_kinds(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(GOOD + "ema: {decay: 1.5}\n")
    with pytest.raises(RecipeError, match=r"ema.decay is 1.5; it must be in \[0, 1\)"):
        load_recipe(str(tmp_path / "mine.yaml"))
