"""YAML as recipes use it: strict keys, no cycles, and the line of every key."""

import re
from typing import Any

import yaml


class RecipeError(ValueError):
    """A recipe that cannot be used; says which key of which file, why, and how to mend it."""


def read_yaml(text: str, where: str) -> tuple[Any, dict[str, int]]:
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


def _lines(node: yaml.Node | None, prefix: str = "") -> dict[str, int]:
    """Key path -> line number of a parsed YAML document."""
    result: dict[str, int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            path = f"{prefix}{key.value}"
            result[path] = key.start_mark.line + 1
            result.update(_lines(value, f"{path}."))
    return result
