"""The `.gkb` file: a memory-mapped dictionary of senses, shared by all workers of a machine.

Layout: a prelude (magic, format version, CRC-32 and length of the header), a JSON header (source,
licence, counts, build parameters, table of sections), then plain little-endian arrays. Strings lie
in byte blobs with an offset array beside them; terms are sorted, so a look-up is a binary search
that touches a handful of pages. Opening maps the file and checks the offset arrays, nothing else.
"""

import json
import mmap
import os
import struct
import sys
import zlib
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from groundwork.data.atomic import write_atomically

#: A carriage return and a line feed, as in PNG, so that a transfer in text mode is noticed.
MAGIC: Final = b"GWKNOW\r\n"
FORMAT_VERSION: Final = 1

_PRELUDE: Final = struct.Struct("<8sIIQ")
_ALIGNMENT: Final = 64
_STRING_LISTS: Final = ("sense_ids", "external_ids", "glosses", "lemmas", "terms", "aliases")
#: Lists of numbers, one list per owner: name -> (owner, what the numbers count).
_NUMBER_LISTS: Final[Mapping[str, tuple[str, str]]] = {
    "hypernyms": ("sense_ids", "sense_ids"),
    "instance_hypernyms": ("sense_ids", "sense_ids"),
    "term_entries": ("terms", "sense_ids"),
    "alias_terms": ("aliases", "terms"),
}


class KnowledgeError(ValueError):
    """A knowledge file or dictionary that cannot be used; the message says how to mend it."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One sense of a knowledge source.

    pos: "n", "v", "a", "s" (satellite adjective) or "r" (adverb), as in WordNet; other sources map
        their tags to these and keep their own word where there is none.
    lemmas: the source's spelling, blanks as underscores in WordNet.
    hypernyms, instance_hypernyms: entry numbers in the same file, in the order of the source.
    external_id: the number others know it by (WordNet: "n02084071", as in ImageNet), or "".
    """

    source: str
    sense_id: str
    pos: str
    lemmas: tuple[str, ...]
    gloss: str
    hypernyms: tuple[int, ...] = ()
    instance_hypernyms: tuple[int, ...] = ()
    external_id: str = ""


class _Strings:
    """A list of byte strings inside the mapped file."""

    __slots__ = ("blob", "offsets")

    def __init__(self, offsets: memoryview, blob: memoryview) -> None:
        self.offsets = offsets
        self.blob = blob

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, number: int) -> bytes:
        return bytes(self.blob[self.offsets[number] : self.offsets[number + 1]])

    def find(self, key: bytes) -> int:
        """The number of `key`, or -1. The list is sorted."""
        number = bisect_left(self, key)
        return number if number < len(self) and self[number] == key else -1


class KnowledgeIndex:
    """An open `.gkb` file. Read-only, safe to fork and to share between threads, pickled by path.

    source, source_version, licence: what the texts are and under which terms they may be used.
    counts, parameters: of the build.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).absolute()
        try:
            with self.path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size < _PRELUDE.size:
                    raise self._error(f"truncated: {size} bytes, not even a prelude")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise self._error(f"cannot be opened ({error.strerror or error})") from error
        header = self._read_header(len(self._map))
        try:
            self.source = str(header["source"])
            self.source_version = str(header["source_version"])
            self.licence = str(header["licence"])
            self.counts: Mapping[str, int] = dict(header["counts"])
            self.parameters: Mapping[str, Any] = dict(header["parameters"])
            self._payload_crc32 = int(header["payload_crc32"])
            self._pos_names = [str(name) for name in header["pos_names"]]
            self._sections = dict(header["sections"])
            self._map_sections()
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            if isinstance(error, KnowledgeError):
                raise
            raise self._error(f"the header lacks or garbles {error}") from error

    def __reduce__(self) -> tuple[type["KnowledgeIndex"], tuple[Path]]:
        return KnowledgeIndex, (self.path,)

    def __len__(self) -> int:
        """The number of entries."""
        return len(self._strings["sense_ids"])

    def entry(self, number: int) -> Entry:
        if not 0 <= number < len(self):
            raise IndexError(f"{self.path}: entry {number} of {len(self)}")
        first, last = self._lemma_ranges[number], self._lemma_ranges[number + 1]
        return Entry(
            source=self.source,
            sense_id=self._text("sense_ids", number),
            pos=self.pos(number),
            lemmas=tuple(self._text("lemmas", lemma) for lemma in range(first, last)),
            gloss=self._text("glosses", number),
            hypernyms=self._numbers("hypernyms", number),
            instance_hypernyms=self._numbers("instance_hypernyms", number),
            external_id=self._text("external_ids", number),
        )

    def pos(self, number: int) -> str:
        """The part of speech of an entry, without reading the rest of it."""
        return self._pos_names[self._pos[number]]

    def entry_numbers(self, term: str) -> tuple[int, ...]:
        """The entries of a term in the order of the source; empty where it is unknown."""
        number = self._strings["terms"].find(term.encode("utf-8", "replace"))
        return self._numbers("term_entries", number) if number >= 0 else ()

    def alias(self, alias: str) -> tuple[str, ...] | None:
        """The terms an alias stands for, or None where there is no such alias."""
        number = self._strings["aliases"].find(alias.encode("utf-8", "replace"))
        if number < 0:
            return None
        return tuple(self._text("terms", term) for term in self._numbers("alias_terms", number))

    def terms(self) -> Iterator[str]:
        """All terms, sorted by their UTF-8 bytes."""
        return (self._text("terms", number) for number in range(len(self._strings["terms"])))

    def find_sense(self, sense_id: str) -> Entry | None:
        return self._find_by(self._by_sense_id, "sense_ids", sense_id)

    def find_external(self, external_id: str) -> Entry | None:
        return self._find_by(self._by_external_id, "external_ids", external_id)

    def verify(self) -> None:
        """Read the whole file and compare its checksum; KnowledgeError where it differs."""
        start = self._payload_start
        if zlib.crc32(memoryview(self._map)[start:]) != self._payload_crc32:
            raise self._error("the checksum of the payload is wrong")

    def _error(self, what: str) -> KnowledgeError:
        return KnowledgeError(
            f"{self.path}: {what}; build the file (anew) with "
            f"`groundwork knowledge build wordnet --out {self.path}`"
        )

    def _read_header(self, size: int) -> dict[str, Any]:
        magic, version, crc32, header_bytes = _PRELUDE.unpack_from(self._map)
        if magic != MAGIC:
            raise self._error(f"not a knowledge file (it begins with {magic!r}, not {MAGIC!r})")
        if version != FORMAT_VERSION:
            raise self._error(f"format version {version}, this release reads {FORMAT_VERSION}")
        if header_bytes > size - _PRELUDE.size:
            raise self._error(f"truncated: a header of {header_bytes} bytes in a file of {size}")
        raw = self._map[_PRELUDE.size : _PRELUDE.size + header_bytes]
        if zlib.crc32(raw) != crc32:
            raise self._error("the checksum of the header is wrong")
        try:
            header = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise self._error(f"the header is not JSON ({error})") from error
        if not isinstance(header, dict):
            raise self._error("the header is not a JSON object")
        self._payload_start = _aligned(_PRELUDE.size + header_bytes)
        expected = header.get("payload_bytes")
        if expected != size - self._payload_start:
            raise self._error(
                f"truncated or padded: {size - self._payload_start} bytes of payload, "
                f"the header says {expected}"
            )
        return header

    def _map_sections(self) -> None:
        self._strings = {
            name: _Strings(
                self._ranges(f"{name}.offsets", self._section(f"{name}.blob").nbytes),
                self._section(f"{name}.blob").data,
            )
            for name in _STRING_LISTS
        }
        counts = {name: len(strings) for name, strings in self._strings.items()}
        entries = counts["sense_ids"]
        self._lists: dict[str, tuple[memoryview, memoryview]] = {}
        for name, (owner, target) in _NUMBER_LISTS.items():
            values = self._below(f"{name}.values", counts[target])
            ranges = self._ranges(f"{name}.ranges", len(values), counts[owner])
            self._lists[name] = ranges, values
        self._lemma_ranges = self._ranges("lemma_ranges", counts["lemmas"], entries)
        self._pos = self._below("pos", len(self._pos_names))
        self._by_sense_id = self._below("by_sense_id", entries)
        self._by_external_id = self._below("by_external_id", entries)
        for name in ("external_ids", "glosses"):
            if counts[name] != entries:
                raise self._error(f"{counts[name]} {name} for {entries} entries")
        if len(self._pos) != entries:
            raise self._error(f"{len(self._pos)} parts of speech for {entries} entries")

    def _section(self, name: str) -> NDArray[Any]:
        dtype_name, offset, count = self._sections[name]
        if dtype_name not in ("|u1", "<u4", "<u8"):
            raise self._error(f"section {name} has the unknown type {dtype_name!r}")
        dtype = np.dtype(dtype_name)
        start = self._payload_start + int(offset)
        if int(offset) < 0 or int(count) < 0 or start + count * dtype.itemsize > len(self._map):
            raise self._error(f"section {name} lies outside the file")
        array: NDArray[Any] = np.frombuffer(self._map, dtype, count, start)
        # memoryview, which is many times faster than numpy for single elements, reads the
        # machine's own byte order only.
        return array if sys.byteorder == "little" else array.astype(dtype.newbyteorder("="))

    def _ranges(self, name: str, end: int, owners: int | None = None) -> memoryview:
        """An offset array: starts at 0, never falls, ends at `end`."""
        array = self._section(name)
        if owners is not None and len(array) != owners + 1:
            raise self._error(f"section {name} has {len(array)} offsets for {owners} owners")
        if len(array) == 0 or array[0] != 0 or array[-1] != end or (array[1:] < array[:-1]).any():
            raise self._error(f"section {name} has offsets out of range")
        return array.data

    def _below(self, name: str, bound: int) -> memoryview:
        array = self._section(name)
        if len(array) and int(array.max()) >= bound:
            raise self._error(f"section {name} points to number {int(array.max())} of {bound}")
        return array.data

    def _text(self, name: str, number: int) -> str:
        try:
            return self._strings[name][number].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._error(f"{name} number {number} is not UTF-8") from error

    def _numbers(self, name: str, owner: int) -> tuple[int, ...]:
        ranges, values = self._lists[name]
        return tuple(values[ranges[owner] : ranges[owner + 1]])

    def _find_by(self, permutation: memoryview, name: str, key: str) -> Entry | None:
        raw, strings = key.encode("utf-8", "replace"), self._strings[name]
        place = bisect_left(permutation, raw, key=strings.__getitem__)
        if place < len(permutation) and strings[permutation[place]] == raw:
            return self.entry(permutation[place])
        return None


def write_index(
    path: Path | str,
    *,
    source: str,
    source_version: str,
    licence: str,
    entries: Sequence[Entry],
    terms: Mapping[str, Sequence[int]],
    aliases: Mapping[str, Sequence[str]] | None = None,
    parameters: Mapping[str, Any] | None = None,
) -> dict[str, int]:
    """Write a `.gkb` file atomically and return its counts. The same input gives the same bytes.

    entries: numbered by their place; `Entry.source` must be `source`, sense ids unique.
    terms: term -> entry numbers in the order of the source.
    aliases: other spelling -> terms it stands for, all of them in `terms`.
    """
    path, aliases = Path(path), aliases or {}
    if len({entry.sense_id for entry in entries} - {""}) != len(entries):
        raise KnowledgeError(f"{path}: sense ids repeat or are empty; give each entry its own")
    if strange := {entry.source for entry in entries} - {source}:
        raise KnowledgeError(f"{path}: entries of {sorted(strange)} in a file of {source!r}")
    term_list, alias_list = sorted(terms, key=_utf8), sorted(aliases, key=_utf8)
    term_number = {term: number for number, term in enumerate(term_list)}
    pos_names = sorted({entry.pos for entry in entries})
    if len(pos_names) > 256:
        raise KnowledgeError(f"{path}: {len(pos_names)} parts of speech; map them to at most 256")
    sections: dict[str, NDArray[Any]] = {}
    try:
        for name, texts in {
            "sense_ids": [entry.sense_id for entry in entries],
            "external_ids": [entry.external_id for entry in entries],
            "glosses": [entry.gloss for entry in entries],
            "lemmas": [lemma for entry in entries for lemma in entry.lemmas],
            "terms": term_list,
            "aliases": alias_list,
        }.items():
            _add_strings(sections, name, texts)
        number_lists: dict[str, list[Sequence[int]]] = {
            "hypernyms": [entry.hypernyms for entry in entries],
            "instance_hypernyms": [entry.instance_hypernyms for entry in entries],
            "term_entries": [terms[term] for term in term_list],
            "alias_terms": [[term_number[t] for t in aliases[alias]] for alias in alias_list],
        }
        for name, lists in number_lists.items():
            flat = [number for numbers in lists for number in numbers]
            bound = len(terms) if name == "alias_terms" else len(entries)
            if bad := [number for number in flat if not 0 <= number < bound]:
                raise KnowledgeError(f"{path}: {name} name number {bad[0]} of {bound}")
            sections[f"{name}.ranges"] = _offsets(len(numbers) for numbers in lists)
            sections[f"{name}.values"] = np.asarray(flat, "<u4")
    except (KeyError, UnicodeEncodeError) as error:
        raise KnowledgeError(
            f"{path}: cannot be written: an alias names an unknown term, or a text "
            f"is not valid Unicode ({error})"
        ) from error
    sections["lemma_ranges"] = _offsets(len(entry.lemmas) for entry in entries)
    sections["pos"] = np.asarray([pos_names.index(entry.pos) for entry in entries], "|u1")
    sections["by_sense_id"] = _sorted_by(entries, lambda entry: entry.sense_id)
    sections["by_external_id"] = _sorted_by(entries, lambda entry: entry.external_id)
    counts = {
        "entries": len(entries),
        "terms": len(terms),
        "lemmas": sum(len(entry.lemmas) for entry in entries),
        "aliases": len(aliases),
    }
    header = {
        "source": source,
        "source_version": source_version,
        "licence": licence,
        "counts": counts,
        "parameters": dict(parameters or {}),
        "pos_names": pos_names,
    }
    _write_sections(path, header, sections)
    return counts


def _write_sections(
    path: Path, header: dict[str, Any], sections: Mapping[str, NDArray[Any]]
) -> None:
    table: dict[str, tuple[str, int, int]] = {}
    payload = bytearray()
    for name, array in sections.items():
        payload.extend(bytes(_aligned(len(payload)) - len(payload)))
        table[name] = array.dtype.str, len(payload), len(array)
        payload.extend(array.tobytes())
    header |= {
        "sections": table,
        "payload_bytes": len(payload),
        "payload_crc32": zlib.crc32(payload),
    }
    raw = json.dumps(header, ensure_ascii=False, sort_keys=True).encode("utf-8")
    prelude = _PRELUDE.pack(MAGIC, FORMAT_VERSION, zlib.crc32(raw), len(raw))
    start = prelude + raw
    padding = bytes(_aligned(len(start)) - len(start))
    try:
        write_atomically(path, b"".join((start, padding, payload)))
    except OSError as error:
        raise KnowledgeError(
            f"{path}: cannot be written ({error.strerror or error}); choose another --out"
        ) from error


def _add_strings(sections: dict[str, NDArray[Any]], name: str, texts: Iterable[str]) -> None:
    raw = [text.encode("utf-8") for text in texts]
    sections[f"{name}.offsets"] = _offsets(len(text) for text in raw)
    sections[f"{name}.blob"] = np.frombuffer(b"".join(raw), "|u1")


def _offsets(lengths: Iterable[int]) -> NDArray[Any]:
    ends = np.cumsum(np.fromiter(lengths, np.int64), dtype=np.int64)
    offsets = np.concatenate([np.zeros(1, np.int64), ends])
    return offsets.astype("<u4" if offsets[-1] < 2**32 else "<u8")


def _sorted_by(entries: Sequence[Entry], key: Callable[[Entry], str]) -> NDArray[Any]:
    """The numbers of the entries that have such a key, sorted by it."""
    keyed = sorted((_utf8(key(entry)), number) for number, entry in enumerate(entries))
    return np.asarray([number for raw, number in keyed if raw], "<u4")


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _aligned(length: int) -> int:
    return -(-length // _ALIGNMENT) * _ALIGNMENT
