"""Reading recipes of any kind: one YAML file becomes one frozen dataclass.

Reading is strict: an unknown key, a missing key or a wrong type is an error that names the recipe,
its line, the key and the nearest known key. Overrides (`--set train.steps=100`) go through the same
check. A recipe may say `base: NAME` and give only what differs from that one; a base has no base.
"""

import copy
import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from groundwork.pretrain.recipe_yaml import RecipeError, read_yaml

#: Key of the recipe that another one differs from.
BASE = "base"

RecipeT = TypeVar("RecipeT")


def read_recipe(cls: type[RecipeT], name: str, overrides: Sequence[str], folder: Path) -> RecipeT:
    """Load a recipe by name (a file of `folder`) or by path, and apply overrides.

    cls: the dataclass it becomes. overrides: `key.path=value`, the value in YAML.
    Raises RecipeError.
    """
    path = find_recipe(name, folder)
    values, places = _read_file(path)
    if BASE in values:
        values, places = _over_base(values, places, path, folder)
    for override in overrides:
        places = _overridden(places, _apply(values, override), override)
    return _validate(cls, values, str(path), places)


def recipe_from_values(cls: type[RecipeT], values: Mapping[str, Any], source: str) -> RecipeT:
    """Validate a recipe that was saved with `recipe_to_dict`. source: named in errors."""
    return _validate(cls, dict(values), source, {})


def recipe_to_dict(recipe: Any) -> dict[str, Any]:
    """The resolved recipe as plain JSON values, defaults included."""
    resolved: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(recipe)))
    return resolved


def differing_keys(
    saved: Mapping[str, Any], present: Mapping[str, Any], free: Sequence[str]
) -> list[str]:
    """Keys, with both values, in which two resolved recipes differ; those below `free` may."""
    a, b = dict(_flatten(saved)), dict(_flatten(present))
    return [
        f"{key}: {a.get(key)!r} -> {b.get(key)!r}"
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key)
        and not any(key == part or key.startswith(f"{part}.") for part in free)
    ]


def available_recipes(folder: Path) -> list[str]:
    """Names of the recipes of a folder."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def find_recipe(name: str, *folders: Path) -> Path:
    """The file of a recipe: a path, or a name in one of `folders`.

    Raises RecipeError that names the nearest one.
    """
    for path in (Path(name), *(folder / f"{name}.yaml" for folder in folders)):
        if path.is_file():
            return path
    known = [found for folder in folders for found in available_recipes(folder)]
    near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise RecipeError(f"no recipe {name!r}: {hint}Give a YAML file or one of: {', '.join(known)}")


def is_recipe_of(section: str, path: Path) -> bool:
    """Whether a recipe file, or the base it differs from, has a section of that name."""
    values, places = _read_file(path)
    if BASE in values:
        values, _ = _over_base(values, places, path, path.parent)
    return section in values


def by_kind(default: str) -> Callable[[Any], str]:
    """For pydantic's Discriminator: the `kind` of a section, `default` where it does not say."""

    def kind(section: Any) -> str:
        if isinstance(section, Mapping):
            return str(section.get("kind", default))
        return str(getattr(section, "kind", default))

    return kind


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The values of a recipe file, and the place (file and line) of each key."""
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not valid YAML: {error}") from error
    values, lines = read_yaml(text, f"{path}:")
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of sections (model, data, train, ...)")
    return values, {key: f"{path}:{line}" for key, line in lines.items()}


def _over_base(
    values: dict[str, Any], places: dict[str, str], path: Path, folder: Path
) -> tuple[dict[str, Any], dict[str, str]]:
    """A recipe laid over its base: sections are merged, anything else replaces."""
    base = values.pop(BASE)
    where = places.pop(BASE)
    if not isinstance(base, str):
        raise RecipeError(f"{where}: base is {base!r}; give the name of a recipe, or a YAML file")
    beside = path.parent / f"{base}.yaml"
    try:
        base_path = beside if beside.is_file() else find_recipe(base, folder)
    except RecipeError as error:
        raise RecipeError(f"{where}: base: {error}") from error
    below, below_places = _read_file(base_path)
    if BASE in below:
        raise RecipeError(
            f"{where}: base {base!r} has a base itself ({below_places[BASE]}); one step is all "
            "there is, copy what is needed"
        )
    return _merged(below, values), {**below_places, **places}


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    result = copy.deepcopy(dict(below))
    for key, value in above.items():
        mine = result.get(key)
        both = isinstance(mine, Mapping) and isinstance(value, Mapping)
        result[key] = _merged(mine, value) if both else value  # type: ignore[arg-type]
    return result


def _apply(values: dict[str, Any], override: str) -> str:
    """Set the value in place. Returns the key."""
    key, separator, text = override.partition("=")
    if not separator or not all(key.split(".")):
        raise RecipeError(f"--set {override}: expected key.path=value, e.g. train.steps=100")
    value, _ = read_yaml(text, f"--set {override}: the value is")
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


@cache
def _adapter(cls: type[RecipeT]) -> TypeAdapter[RecipeT]:
    return TypeAdapter(cls)


def _validate(
    cls: type[RecipeT], values: dict[str, Any], source: str, places: Mapping[str, str]
) -> RecipeT:
    try:
        # as JSON: strict about types (true is no step count), but a list may fill a tuple
        text = json.dumps(values, default=str)
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits
        raise RecipeError(f"{source}: a value is too large for a recipe: {error}") from error
    try:
        return _adapter(cls).validate_json(text, strict=True)  # type: ignore[arg-type]
    except ValidationError as error:
        problems = [_explain(cls, problem, source, places) for problem in error.errors()]
        raise RecipeError("\n".join(dict.fromkeys(problems))) from error


def _explain(cls: type, problem: Any, source: str, places: Mapping[str, str]) -> str:
    steps = _recipe_keys(cls, problem["loc"], problem["type"])
    key = ".".join(steps)
    # a check of a whole section names the very key first
    named = problem["msg"].removeprefix("Value error, ").split(" ", 1)[0]
    place = named if named.startswith(f"{key}.") or not key else key
    where = next((places[k] for k in _prefixes(place) if k in places), source)
    if problem["type"] == "unexpected_keyword_argument":
        known = _known_keys(cls, steps[:-1])
        near = difflib.get_close_matches(steps[-1], known, 1, 0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"{where}: unknown key {key!r}; {hint}"
    if problem["type"] == "union_tag_invalid":
        kinds = problem["ctx"]["expected_tags"].replace("'", "")
        place = next((places[k] for k in _prefixes(f"{key}.kind") if k in places), source)
        return f"{place}: {key}.kind is {problem['ctx']['tag']!r}; choose among {kinds}"
    if problem["type"] in ("missing", "missing_argument"):
        return f"{where}: key {key!r} is missing; add it, or pass --set {key}=VALUE"
    message = problem["msg"].removeprefix("Value error, ")
    got = problem.get("input")
    shown = "" if isinstance(got, dict) or "Value error" in problem["msg"] else f" (got {got!r})"
    return f"{where}: {message}" if message.startswith(key) else f"{where}: {key}: {message}{shown}"


def _recipe_keys(cls: type, location: Sequence[str | int], kind: str) -> list[str]:
    """A location without the tags of unions, which pydantic adds and no recipe has."""
    steps: list[str] = []
    for i, step in enumerate(map(str, location)):
        is_unknown_key = i == len(location) - 1 and kind == "unexpected_keyword_argument"
        known = _known_keys(cls, steps)
        if is_unknown_key or step in known or not known:
            steps.append(step)
    return steps


def _known_keys(cls: type, path: Sequence[str]) -> list[str]:
    """The keys a recipe may have below a path, over all alternatives of a union."""
    level: list[type] = [cls]
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


def _flatten(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(values, Mapping) and values:
        for key, value in values.items():
            yield from _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, values
