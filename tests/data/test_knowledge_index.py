"""The `.gkb` file: what is written is read, what is broken is refused."""

import json
import multiprocessing
import os
import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from groundwork.data.knowledge.index import (
    FORMAT_VERSION,
    MAGIC,
    Entry,
    KnowledgeError,
    KnowledgeIndex,
    write_index,
)

PRELUDE = struct.Struct("<8sIIQ")
TEXT = st.text(max_size=6)
QUICK = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@st.composite
def dictionaries(draw: st.DrawFn) -> dict[str, Any]:
    sense_ids = draw(st.lists(st.text(min_size=1, max_size=6), max_size=6, unique=True))
    numbers = st.lists(st.integers(0, len(sense_ids) - 1), max_size=4) if sense_ids else st.just([])
    entries = [
        Entry(
            source="source",
            sense_id=sense_id,
            pos=draw(st.sampled_from(["n", "v", "proper noun", ""])),
            lemmas=tuple(draw(st.lists(TEXT, max_size=3))),
            gloss=draw(TEXT),
            hypernyms=tuple(draw(numbers)),
            instance_hypernyms=tuple(draw(numbers)),
            external_id=f"x{place}" if draw(st.booleans()) else "",
        )
        for place, sense_id in enumerate(sense_ids)
    ]
    terms = draw(st.dictionaries(TEXT, numbers, max_size=6))
    targets = st.lists(st.sampled_from(sorted(terms)), max_size=3) if terms else st.just([])
    return {
        "source": "source",
        "source_version": draw(TEXT),
        "licence": draw(TEXT),
        "entries": entries,
        "terms": terms,
        "aliases": draw(st.dictionaries(TEXT, targets, max_size=4)),
        "parameters": {"depth": 3},
    }


def everything(index: KnowledgeIndex) -> tuple[Any, ...]:
    terms = list(index.terms())
    return (
        index.source,
        index.source_version,
        index.licence,
        [index.entry(number) for number in range(len(index))],
        {term: index.entry_numbers(term) for term in terms},
    )


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.gkb"
    write_index(
        path,
        source="wordnet",
        source_version="3.0",
        licence="a notice",
        entries=[
            Entry("wordnet", "animal.n.01", "n", ("animal",), "a living organism"),
            Entry("wordnet", "dog.n.01", "n", ("dog", "Canis"), "ein Höhlentier", (0,), (), "n07"),
        ],
        terms={"dog": [1], "animal": [0], "hündchen": [1, 0]},
        aliases={"n:doggen": ["dog"], "n:none": []},
    )
    return path


@given(dictionary=dictionaries())
@QUICK
def test_what_is_written_is_read(dictionary: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "round.gkb"
    counts = write_index(path, **dictionary)
    index = KnowledgeIndex(path)
    index.verify()
    assert counts == index.counts
    assert len(index) == counts["entries"] == len(dictionary["entries"])
    for name in ("source", "source_version", "licence", "parameters"):
        assert getattr(index, name) == dictionary[name]
    for number, entry in enumerate(dictionary["entries"]):
        assert index.entry(number) == entry
        assert index.pos(number) == entry.pos
        assert index.find_sense(entry.sense_id) == entry
        if entry.external_id:
            assert index.find_external(entry.external_id) == entry
    assert sorted(index.terms()) == sorted(dictionary["terms"])
    for term, numbers in dictionary["terms"].items():
        assert index.entry_numbers(term) == tuple(numbers)
    for alias, terms in dictionary["aliases"].items():
        assert index.alias(alias) == tuple(terms)


@given(dictionary=dictionaries(), word=st.text(max_size=8))
@QUICK
def test_unknown_words_are_not_found(dictionary: dict[str, Any], word: str, tmp_path: Path) -> None:
    path = tmp_path / "unknown.gkb"
    write_index(path, **dictionary)
    index = KnowledgeIndex(path)
    if word not in dictionary["terms"]:
        assert index.entry_numbers(word) == ()
    if word not in dictionary["aliases"]:
        assert index.alias(word) is None
    if word not in {entry.sense_id for entry in dictionary["entries"]}:
        assert index.find_sense(word) is None


def test_the_same_dictionary_gives_the_same_bytes(small: Path, tmp_path: Path) -> None:
    index = KnowledgeIndex(small)
    again = tmp_path / "again.gkb"
    write_index(
        again,
        source="wordnet",
        source_version="3.0",
        licence="a notice",
        entries=[index.entry(number) for number in range(len(index))],
        terms={term: index.entry_numbers(term) for term in reversed(list(index.terms()))},
        aliases={"n:none": [], "n:doggen": ["dog"]},
    )
    assert again.read_bytes() == small.read_bytes()


def test_every_truncation_is_refused(small: Path, tmp_path: Path) -> None:
    whole, cut = small.read_bytes(), tmp_path / "cut.gkb"
    for length in range(len(whole)):
        cut.write_bytes(whole[:length])
        with pytest.raises(KnowledgeError):
            KnowledgeIndex(cut)


def test_every_changed_byte_is_refused_or_harmless(small: Path, tmp_path: Path) -> None:
    whole, changed = small.read_bytes(), tmp_path / "changed.gkb"
    content = everything(KnowledgeIndex(small))
    header_end = PRELUDE.size + PRELUDE.unpack_from(whole)[3]
    for place in range(len(whole)):
        for mask in (0x01, 0x80, 0xFF):
            damaged = bytearray(whole)
            damaged[place] ^= mask
            changed.write_bytes(damaged)
            try:
                index = KnowledgeIndex(changed)
                found = everything(index)
            except KnowledgeError:
                continue
            assert place >= header_end
            if found != content:
                with pytest.raises(KnowledgeError):
                    index.verify()


@given(tail=st.binary(max_size=200), crc32=st.integers(0, 2**32 - 1), length=st.integers(0, 2**63))
@QUICK
def test_garbage_is_refused(tail: bytes, crc32: int, length: int, tmp_path: Path) -> None:
    path = tmp_path / "garbage.gkb"
    path.write_bytes(PRELUDE.pack(MAGIC, FORMAT_VERSION, crc32, length) + tail)
    with pytest.raises(KnowledgeError):
        KnowledgeIndex(path)


def with_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrites the header with a right checksum, so that only its content can be at fault."""
    whole = path.read_bytes()
    header_bytes = PRELUDE.unpack_from(whole)[3]
    header = json.loads(whole[PRELUDE.size : PRELUDE.size + header_bytes])
    payload = whole[-header["payload_bytes"] :]
    changed = change(header)
    raw = json.dumps(header if changed is None else changed).encode()
    start = PRELUDE.pack(MAGIC, FORMAT_VERSION, zlib.crc32(raw), len(raw)) + raw
    path.write_bytes(start + bytes(-len(start) % 64) + payload)


SECTIONS = (
    *(f"{n}.{part}" for n in ("sense_ids", "glosses", "lemmas", "terms", "aliases", "external_ids")
      for part in ("offsets", "blob")),
    *(f"{n}.{part}" for n in ("hypernyms", "term_entries", "alias_terms")
      for part in ("ranges", "values")),
    "pos",
    "by_sense_id",
    "lemma_ranges",
)  # fmt: skip


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize(
    "entry",
    [
        ["<u4", 0, 2**40],
        ["<u4", 2**40, 1],
        ["<u4", -4096, 1],
        ["<u4", 0, -1],
        ["<u4", 10**400, 1],
        ["|O", 0, 1],
        [["<u4"], 0, 1],
        ["<u4", None, 1],
        ["<u4", 0],
        "text",
        7,
        None,
    ],
)
def test_sections_out_of_range_are_refused(small: Path, section: str, entry: Any) -> None:
    with_header(small, lambda header: header["sections"].update({section: entry}))
    with pytest.raises(KnowledgeError):
        KnowledgeIndex(small)


@pytest.mark.parametrize("key", ["source", "licence", "counts", "sections", "pos_names"])
def test_a_header_without_a_field_is_refused(small: Path, key: str) -> None:
    with_header(small, lambda header: header.pop(key) and None)
    with pytest.raises(KnowledgeError):
        KnowledgeIndex(small)


@pytest.mark.parametrize("header", [[], 3, "text", {}, {"payload_bytes": True}])
def test_a_header_of_another_kind_is_refused(small: Path, header: Any) -> None:
    with_header(small, lambda _: header)
    with pytest.raises(KnowledgeError):
        KnowledgeIndex(small)


@pytest.mark.parametrize("start", [b"", b"PK\x03\x04" * 20, MAGIC.replace(b"\r\n", b"\n") * 20])
def test_errors_name_the_file_and_the_remedy(tmp_path: Path, start: bytes) -> None:
    path = tmp_path / "other.gkb"
    path.write_bytes(start)
    with pytest.raises(KnowledgeError) as error:
        KnowledgeIndex(path)
    assert str(path) in str(error.value)
    assert f"groundwork knowledge build wordnet --out {path}" in str(error.value)


def test_another_format_version_is_refused_by_number(small: Path) -> None:
    whole = bytearray(small.read_bytes())
    whole[8:12] = struct.pack("<I", 99)
    small.write_bytes(whole)
    with pytest.raises(KnowledgeError, match="version 99"):
        KnowledgeIndex(small)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KnowledgeError, match="No such file"):
        KnowledgeIndex(tmp_path / "missing.gkb")
    with pytest.raises(KnowledgeError):
        KnowledgeIndex(tmp_path)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = small.read_bytes()

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(KnowledgeError, match="No space left"):
        write_index(
            small, source="other", source_version="1", licence="", entries=[], terms={"word": []}
        )
    assert small.read_bytes() == before
    assert list(small.parent.iterdir()) == [small]


def test_an_open_index_outlives_its_replacement(small: Path) -> None:
    index = KnowledgeIndex(small)
    write_index(small, source="other", source_version="1", licence="", entries=[], terms={})
    assert index.entry(1).lemmas == ("dog", "Canis")
    assert len(KnowledgeIndex(small)) == 0


@pytest.mark.parametrize(
    "change",
    [
        {"terms": {"dog": [2]}},
        {"terms": {"dog": [-1]}},
        {"aliases": {"n:dogs": ["cat"]}},
        {"entries": [Entry("source", "same", "n", (), "")] * 2},
        {"entries": [Entry("source", "", "n", (), "")]},
        {"entries": [Entry("elsewhere", "a", "n", (), "")]},
        {"entries": [Entry("source", "a", "n", (), "", (5,))]},
        {"entries": [Entry("source", "a", "n", (), "\ud800")]},
    ],
)
def test_inconsistent_dictionaries_are_not_written(change: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "bad.gkb"
    right: dict[str, Any] = {"entries": [], "terms": {}}
    with pytest.raises(KnowledgeError, match=r"bad\.gkb"):
        write_index(path, source="source", source_version="", licence="", **right | change)
    assert not path.exists()


def test_an_index_is_pickled_by_path(small: Path) -> None:
    index = KnowledgeIndex(small)
    pickled = pickle.dumps(index)
    assert len(pickled) < 1000
    assert everything(pickle.loads(pickled)) == everything(index)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_workers_read_the_same_index(small: Path) -> None:
    index = KnowledgeIndex(small)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    workers = [
        context.Process(target=lambda: sender.send(everything(index) == everything(index)))
        for _ in range(2)
    ]
    content = everything(index)
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
        assert worker.exitcode == 0
        assert receiver.recv() is True
    assert everything(index) == content
