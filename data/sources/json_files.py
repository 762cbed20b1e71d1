"""Annotation files in JSON: read with messages that name file, line and record."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from groundwork.data.sources.errors import SourceError
from groundwork.data.sources.report import BadItemError

T = TypeVar("T")

#: Bytes above which a file is read record by record: `json` needs up to ten times as many in
#: memory, and the annotations of Objects365 have gigabytes. It takes no longer.
LARGE_FILE = 2**28


def require_files(paths: Iterable[Path]) -> None:
    """Find out that an annotation file is missing before hours of reading others."""
    for path in paths:
        if not path.is_file():
            raise SourceError(
                f"{path}: annotation file is missing; lay the data out as docs/sources.md shows, "
                "or name only the splits that are there"
            )


def read_json(path: Path) -> Any:
    """The whole of a JSON file. Raises SourceError with line and column of a fault."""
    require_files([path])
    try:
        return json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        raise SourceError(
            f"{path}: line {error.lineno}, column {error.colno}: not JSON ({error.msg}); the file "
            "is damaged or was not fully fetched: fetch it again"
        ) from error
    except (ValueError, RecursionError) as error:
        # not UTF-8, nested too deep, or a number of more digits than Python reads
        raise SourceError(f"{path}: not JSON ({error}); fetch the file again") from error


class JsonFile:
    """The lists of a JSON file. Small files are held in memory, large ones read once per list."""

    def __init__(self, path: Path) -> None:
        self.path = path
        is_large = path.is_file() and path.stat().st_size > LARGE_FILE
        self._document = None if is_large else read_json(path)
        self._is_large = is_large

    def records(self, section: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
        """(place for messages, object) of each element of a list.

        section: the member of the top-level object that holds the list; empty: the file is the
        list. Raises SourceError where there is no such list or an element is no object.
        """
        found = False
        for number, record in enumerate(self._elements(section)):
            found = True
            where = f"{self.path}: {section}[{number}]"
            if not isinstance(record, dict):
                raise SourceError(
                    f"{where} is a {type(record).__name__}, expected an object; the file is not in "
                    "the published layout"
                )
            yield where, record
        if not found and self._is_large:
            raise SourceError(f"{self.path}: no list {section!r} with any element in it")

    def _elements(self, section: str) -> Iterator[Any]:
        if self._is_large:
            return self._streamed(f"{section}.item" if section else "item")
        document = self._document
        if section:
            document = document.get(section) if isinstance(document, dict) else None
        if not isinstance(document, list):
            raise SourceError(
                f"{self.path}: holds no list{f' {section!r}' if section else ''}; the file is not "
                "in the published layout"
            )
        return iter(document)

    def _streamed(self, prefix: str) -> Iterator[Any]:
        try:
            import ijson
        except ImportError as error:
            raise SourceError(
                f"{self.path}: a file of more than {LARGE_FILE / 2**20:.0f} MiB is read with "
                "ijson: pip install 'groundwork-pretrain[annotations]'"
            ) from error
        with self.path.open("rb") as file:
            try:
                yield from ijson.items(file, prefix, use_float=True)
            except (ijson.JSONError, ValueError) as error:
                raise SourceError(
                    f"{self.path}: byte {file.tell()} or before: not JSON "
                    f"({str(error).splitlines()[0]}); the file is damaged or was not fully "
                    "fetched: fetch it again"
                ) from error


def member(record: Mapping[str, Any], name: str, kind: type[T]) -> T:
    """A member of a record that must be there with this type. Raises BadItemError.

    Integers fit in 64 bits, other numbers are finite, strings can be encoded in UTF-8.
    """
    value = record.get(name)
    if kind is float and type(value) is int and abs(value) < 2**63:
        value = float(value)
    is_right = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if kind is int and is_right:
        is_right = -(2**63) <= value < 2**63  # type: ignore[operator]
    elif kind is float and is_right:
        is_right = math.isfinite(value)  # type: ignore[arg-type]
    elif kind is str and is_right:
        is_right = is_encodable(value)  # type: ignore[arg-type]
    if not is_right:
        found = repr(value)[:60] if name in record else "missing"
        raise BadItemError(f"{name!r} is {found}; expected {_NAMES.get(kind, kind.__name__)}")
    return value  # type: ignore[return-value]


def known_members(record: Mapping[str, Any], names: Iterable[str]) -> dict[str, int | str]:
    """Those of the named members that are there and are integers or strings that can be stored."""
    found = {name: record.get(name) for name in names}
    return {
        name: value
        for name, value in found.items()
        if (type(value) is int and abs(value) < 2**63)
        or (isinstance(value, str) and is_encodable(value))
    }


def is_encodable(text: str) -> bool:
    """Whether UTF-8 can hold a string; JSON can escape halves of characters, which it cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


_NAMES = {int: "an integer", str: "a string", list: "a list", dict: "an object", float: "a number"}
