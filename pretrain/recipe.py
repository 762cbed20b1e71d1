"""Recipes: one YAML file names one experiment and becomes one frozen dataclass.

Reading is strict: an unknown key, a missing key or a wrong type is an error that names the recipe,
its line, the key and the nearest known key. Overrides (`--set train.steps=100`) go through the same
check. A resolved recipe is saved beside the checkpoints, and a resumed run must agree with it.
"""

import dataclasses
import difflib
import json
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from groundwork.pretrain.engine.checkpoint import CheckpointConfig
from groundwork.pretrain.engine.monitor import MonitorConfig
from groundwork.pretrain.engine.optimizer import OptimizerConfig, ScheduleConfig
from groundwork.pretrain.image_text import ImageTextConfig
from groundwork.pretrain.models.klite import KliteConfig
from groundwork.pretrain.models.swin import SwinConfig
from groundwork.pretrain.objectives.unicl import UniclConfig

RECIPES = Path(__file__).parent / "recipes"
#: Of steps and of samples in one: their product, the position in the stream, stays below 2**63.
MAX_COUNT = 2**31 - 1


class RecipeError(ValueError):
    """A recipe that cannot be used; says which key of which file, why, and how to mend it."""


@dataclass(frozen=True)
class TrainConfig:
    """The run itself.

    steps: optimiser steps. global_batch: samples per step over all ranks; micro_batch: samples per
    rank and forward pass, so that accumulation is global_batch / (micro_batch x ranks).
    micro_batch null: global_batch / ranks, no accumulation.
    """

    steps: int
    global_batch: int
    micro_batch: int | None = None
    precision: Literal["bf16", "fp32"] = "bf16"
    seed: int = 0
    gradient_clipping: float = 0.0
    zero_stage: Literal[0, 1, 2, 3] = 3

    def __post_init__(self) -> None:
        for name in ("steps", "global_batch", "micro_batch"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= MAX_COUNT:
                raise ValueError(
                    f"train.{name} is {value}; it must be at least 1 and at most {MAX_COUNT}"
                )
        if not 0 <= self.seed <= MAX_COUNT:
            raise ValueError(f"train.seed is {self.seed}; it must be 0 to {MAX_COUNT}")
        if not 0 <= self.gradient_clipping < math.inf:
            raise ValueError(
                f"train.gradient_clipping is {self.gradient_clipping}; it is the largest norm of "
                "the gradient, or 0 for none"
            )


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run. `deepspeed` is merged verbatim into the generated config."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # holds for the sections, too

    model: KliteConfig
    objective: UniclConfig
    data: ImageTextConfig
    train: TrainConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    deepspeed: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tower, size = self.model.image, self.data.image.size
        if isinstance(tower, SwinConfig) and tower.image_size != size:
            raise ValueError(
                f"data.image.size is {size}, but model.image.image_size is {tower.image_size}; "
                "give both the same number"
            )


_ADAPTER = TypeAdapter(Recipe)

#: Parts of a recipe that may differ when a run is resumed: they do not decide what is computed.
FREE_ON_RESUME = (
    *("checkpoint", "monitor"),
    *("data.workers", "data.prefetch", "data.cache", "data.jpeg_decoder"),
)


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe by name (a file of `pretrain/recipes/`) or by path, and apply overrides.

    overrides: `key.path=value`, the value in YAML. Raises RecipeError.
    """
    path = _find(name)
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not valid YAML: {error}") from error
    values, lines = _read_yaml(text, f"{path}:")
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of sections (model, data, train, ...)")
    places = {key: f"{path}:{line}" for key, line in lines.items()}
    for override in overrides:
        places = _overridden(places, _apply(values, override), override)
    return _validate(values, str(path), places)


def recipe_from_dict(values: Mapping[str, Any], source: str) -> Recipe:
    """Validate a recipe that was saved with `recipe_to_dict`. source: named in errors."""
    return _validate(dict(values), source, {})


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe as plain JSON values, defaults included."""
    resolved: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(recipe)))
    return resolved


def differences(saved: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    """Keys, with both values, in which two resolved recipes differ and a resume may not."""
    a, b = dict(_flatten(saved)), dict(_flatten(present))
    return [
        f"{key}: {a.get(key)!r} -> {b.get(key)!r}"
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key)
        and not any(key == free or key.startswith(f"{free}.") for free in FREE_ON_RESUME)
    ]


def available() -> list[str]:
    """Names of the recipes that come with groundwork."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def _find(name: str) -> Path:
    for path in (Path(name), RECIPES / f"{name}.yaml"):
        if path.is_file():
            return path
    near = difflib.get_close_matches(name, available(), 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise RecipeError(
        f"no recipe {name!r}: {hint}Give a YAML file or one of: {', '.join(available())}"
    )


def _apply(values: dict[str, Any], override: str) -> str:
    """Set the value in place. Returns the key."""
    key, separator, text = override.partition("=")
    if not separator or not all(key.split(".")):
        raise RecipeError(f"--set {override}: expected key.path=value, e.g. train.steps=100")
    value, _ = _read_yaml(text, f"--set {override}: the value is")
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise RecipeError(f"--set {override}: {parent!r} is a value, not a section")
    values[last] = value
    return key


def _overridden(places: Mapping[str, str], key: str, override: str) -> dict[str, str]:
    """The places of keys, where that of an overridden one and all below is the command line."""
    kept = {k: v for k, v in places.items() if k != key and not k.startswith(f"{key}.")}
    return {**kept, key: f"--set {override}"}


def _read_yaml(text: str, where: str) -> tuple[Any, dict[str, int]]:
    """The value of a YAML document, and the line of each of its keys. where: begins the error."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        return None if node is None else loader.construct_document(node), _lines(node)
    except yaml.YAMLError as error:
        raise RecipeError(f"{where} not valid YAML: {error}") from error
    except RecursionError as error:
        raise RecipeError(f"{where} not valid YAML: it is nested too deeply") from error
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number (YAML 1.2), keys are words and unique, and nothing holds
    itself."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.open_anchors: list[str | None] = []

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in self.open_anchors:
                raise _error(f"*{event.anchor} stands for something that holds it", event)
            return super().compose_node(parent, index)
        self.open_anchors.append(event.anchor)
        node = super().compose_node(parent, index)
        self.open_anchors.pop()
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except ValueError as error:  # 2020-13-45
            raise _error(
                f"{str(node.value)[:60]}: {error}; quote it if it is text", node
            ) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = []
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _error("a key must be a word", key)
            if key.value in keys:
                line = node.start_mark.line + 1
                raise _error(f"key {key.value!r} is given twice in the section at line {line}", key)
            keys.append(key.value)
        mapping = super().construct_mapping(node, deep)
        for key in mapping:
            if not isinstance(key, str):
                raise _error(f"key {key!r} is no word; quote it if it is meant", node)
        return mapping


def _error(message: str, place: Any) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, message, place.start_mark)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _validate(values: dict[str, Any], source: str, places: Mapping[str, str]) -> Recipe:
    try:
        # as JSON: strict about types (true is no step count), but a list may fill a tuple
        text = json.dumps(values, default=str)
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits
        raise RecipeError(f"{source}: a value is too large for a recipe: {error}") from error
    try:
        return _ADAPTER.validate_json(text, strict=True)
    except ValidationError as error:
        problems = [_explain(problem, source, places) for problem in error.errors()]
        raise RecipeError("\n".join(dict.fromkeys(problems))) from error


def _explain(problem: Any, source: str, places: Mapping[str, str]) -> str:
    steps = _recipe_keys(problem["loc"], problem["type"])
    key = ".".join(steps)
    # a check of a whole section names the very key first
    named = problem["msg"].removeprefix("Value error, ").split(" ", 1)[0]
    place = named if named.startswith(f"{key}.") or not key else key
    where = next((places[k] for k in _prefixes(place) if k in places), source)
    if problem["type"] == "unexpected_keyword_argument":
        known = _known_keys(steps[:-1])
        near = difflib.get_close_matches(steps[-1], known, 1, 0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"{where}: unknown key {key!r}; {hint}"
    if problem["type"] in ("missing", "missing_argument"):
        return f"{where}: key {key!r} is missing; add it, or pass --set {key}=VALUE"
    message = problem["msg"].removeprefix("Value error, ")
    got = problem.get("input")
    shown = "" if isinstance(got, dict) or "Value error" in problem["msg"] else f" (got {got!r})"
    return f"{where}: {message}" if message.startswith(key) else f"{where}: {key}: {message}{shown}"


def _recipe_keys(location: Sequence[str | int], kind: str) -> list[str]:
    """A location without the tags of unions, which pydantic adds and no recipe has."""
    steps: list[str] = []
    for i, step in enumerate(map(str, location)):
        is_unknown_key = i == len(location) - 1 and kind == "unexpected_keyword_argument"
        known = _known_keys(steps)
        if is_unknown_key or step in known or not known:
            steps.append(step)
    return steps


def _known_keys(path: Sequence[str]) -> list[str]:
    """The keys a recipe may have below a path, over all alternatives of a union."""
    level: list[type] = [Recipe]
    for step in path:
        hints = [typing.get_type_hints(kind).get(step) for kind in level]
        level = [kind for hint in hints for kind in _dataclass_members(hint)]
    return sorted({f.name for kind in level for f in dataclasses.fields(kind)})


def _dataclass_members(hint: Any) -> list[type]:
    if typing.get_origin(hint) is typing.Annotated:
        return _dataclass_members(typing.get_args(hint)[0])
    if typing.get_origin(hint) in (typing.Union, types.UnionType, tuple):
        return [kind for arg in typing.get_args(hint) for kind in _dataclass_members(arg)]
    return [hint] if isinstance(hint, type) and is_dataclass(hint) else []


def _prefixes(key: str) -> Iterator[str]:
    while key:
        yield key
        key = key.rpartition(".")[0]


def _lines(node: yaml.Node | None, prefix: str = "") -> dict[str, int]:
    """Key path -> line number of a parsed YAML document."""
    result: dict[str, int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            path = f"{prefix}{key.value}"
            result[path] = key.start_mark.line + 1
            result.update(_lines(value, f"{path}."))
    return result


def _flatten(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(values, Mapping) and values:
        for key, value in values.items():
            yield from _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, values
