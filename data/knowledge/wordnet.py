"""WordNet's dictionary files, read directly: find them, and build the knowledge index from them.

The format is that of wndb(5WN): `data.POS` holds one synset per line, `index.POS` the synsets of
each lemma in the order of their senses, `POS.exc` the irregular forms. Names, definitions and
morphology are those of NLTK, whose reader most published class lists were made with.
"""

import hashlib
import os
import re
import sys
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from groundwork.data.knowledge.index import Entry, KnowledgeError, KnowledgeIndex, write_index

#: Part of speech -> suffix of its files, in the order in which senses of a term are listed.
POS_FILES: Final = {"n": "noun", "v": "verb", "a": "adj", "r": "adv"}
#: Where Debian's package wordnet-base puts the dictionary.
DEBIAN_DICTIONARY: Final = Path("/usr/share/wordnet")
_NLTK_NAMES: Final = ("wordnet", "wordnet.zip")

#: Part of speech -> (ending, replacement), tried in this order (morphy(7WN)).
_SUFFIX_RULES: Final = {
    "n": (
        ("s", ""),
        ("ses", "s"),
        ("ves", "f"),
        ("xes", "x"),
        ("zes", "z"),
        ("ches", "ch"),
        ("shes", "sh"),
        ("men", "man"),
        ("ies", "y"),
    ),
    "v": (
        ("s", ""),
        ("ies", "y"),
        ("es", "e"),
        ("es", ""),
        ("ed", "e"),
        ("ed", ""),
        ("ing", "e"),
        ("ing", ""),
    ),
    "a": (("er", ""), ("est", ""), ("er", "e"), ("est", "e")),
    "r": (),
}
_FILES: Final = tuple(
    f"{kind}.{suffix}" for kind in ("data", "index") for suffix in POS_FILES.values()
) + tuple(f"{suffix}.exc" for suffix in POS_FILES.values())
_QUOTED: Final = re.compile(r'".*?"')
_SYNTACTIC_MARKER: Final = re.compile(r"\([^()]*\)$")
_VERSION: Final = re.compile(r"WordNet (\d[\d.]*) Copyright")


@dataclass(frozen=True, slots=True)
class _Synset:
    """A line of data.POS; pointers are (part of speech, byte offset)."""

    pos: str
    lemmas: tuple[str, ...]
    gloss: str
    hypernyms: tuple[tuple[str, int], ...]
    instance_hypernyms: tuple[tuple[str, int], ...]


def find_wordnet(directory: Path | None = None) -> Path:
    """The folder (or NLTK's wordnet.zip) that holds the dictionary files.

    With `directory`, only there (itself, or its `dict` as in Princeton's archive); without, in
    Debian's folder and NLTK's data folders.
    """
    if directory is not None:
        looked = [directory, directory / "dict"]
    else:
        corpora = [folder / "corpora" for folder in _nltk_data_folders()]
        looked = [DEBIAN_DICTIONARY, *(c / name for c in corpora for name in _NLTK_NAMES)]
    for place in looked:
        if place.suffix == ".zip" and place.is_file():
            return place
        if all((place / name).is_file() for name in _FILES):
            return place
    listed = "".join(f"\n  {place}" for place in looked)
    raise KnowledgeError(
        "no WordNet dictionary: install one (`apt-get install wordnet-base`), or name its folder "
        "with `--dictionary DIR`. Looked for data.noun, index.noun, noun.exc and the same for "
        f"verb, adj, adv in{listed}"
    )


def build_wordnet(dictionary: Path, out: Path) -> dict[str, int]:
    """Build the knowledge index `out` from a dictionary found by `find_wordnet`; gives its counts.

    Terms are the lower-case lemmas with underscores, their entries ordered noun, verb, adjective,
    adverb and by sense inside each. Aliases are the irregular forms, as "POS:form". External ids
    are the part of speech and byte offset ("n02084071"), which in WordNet 3.0 are ImageNet's.
    """
    files = _read_files(dictionary)
    licence = _licence(files["data.noun"])
    version = _VERSION.search(licence)
    synsets = {
        (pos, offset): synset
        for pos, suffix in POS_FILES.items()
        for offset, synset in _parse_data(f"data.{suffix}", files[f"data.{suffix}"])
    }
    senses = {
        pos: dict(_parse_index(f"index.{suffix}", files[f"index.{suffix}"]))
        for pos, suffix in POS_FILES.items()
    }
    number = {key: place for place, key in enumerate(synsets)}
    terms: dict[str, list[int]] = {}
    entries = []
    try:
        for pos, lemmas in senses.items():
            for lemma, offsets in lemmas.items():
                terms.setdefault(lemma, []).extend(number[pos, offset] for offset in offsets)
        for (pos, offset), synset in synsets.items():
            lemma = synset.lemmas[0].lower()
            # Satellites count among all adjectives, as WordNet numbers senses and as every NLTK
            # before 3.10 named them (`big.s.02`); 3.10 counts satellites alone.
            sense = senses[pos][lemma].index(offset) + 1
            entries.append(
                Entry(
                    source="wordnet",
                    sense_id=f"{lemma}.{synset.pos}.{sense:02d}",
                    pos=synset.pos,
                    lemmas=synset.lemmas,
                    gloss=synset.gloss,
                    hypernyms=tuple(number[key] for key in synset.hypernyms),
                    instance_hypernyms=tuple(number[key] for key in synset.instance_hypernyms),
                    external_id=f"{pos}{offset:08d}",
                )
            )
    except (KeyError, ValueError) as error:
        raise KnowledgeError(
            f"{dictionary}: index and data files do not belong together ({error}); "
            "reinstall the dictionary (`apt-get install --reinstall wordnet-base`)"
        ) from error
    # Every exceptional form is kept, even where none of its bases is a term: a listed form is never
    # taken apart by the suffix rules.
    aliases = {
        f"{pos}:{form}": [base for base in bases if base in terms]
        for pos, suffix in POS_FILES.items()
        for form, *bases in (line.split() for line in files[f"{suffix}.exc"].splitlines() if line)
    }
    digest = hashlib.sha256("".join(files[name] for name in _FILES).encode()).hexdigest()
    return write_index(
        out,
        source="wordnet",
        source_version=version[1] if version else "unknown",
        licence=licence,
        entries=entries,
        terms=terms,
        aliases=aliases,
        parameters={"dictionary_sha256": digest},
    )


def morphy(index: KnowledgeIndex, form: str, pos: str) -> tuple[str, ...]:
    """The base forms of a lower-case word that are terms of this part of speech, itself first.

    Irregular forms come from the exception lists, all others from the suffix rules, applied once.
    """
    adjective = "a" if pos == "s" else pos
    bases = index.alias(f"{adjective}:{form}")
    if bases is None:
        bases = tuple(
            form[: -len(ending)] + replacement
            for ending, replacement in _SUFFIX_RULES[adjective]
            if form.endswith(ending)
        )
    wanted = ("a", "s") if pos == "a" else (pos,)
    return tuple(
        base
        for base in dict.fromkeys((form, *bases))
        if any(index.pos(number) in wanted for number in index.entry_numbers(base))
    )


def _nltk_data_folders() -> Iterator[Path]:
    """NLTK's search path, without the two seconds that importing NLTK takes."""
    for named in os.environ.get("NLTK_DATA", "").split(os.pathsep):
        if named:
            yield Path(named)
    yield Path("~/nltk_data").expanduser()
    for prefix in (Path(sys.prefix), Path("/usr"), Path("/usr/local")):
        for folder in ("nltk_data", "share/nltk_data", "lib/nltk_data"):
            yield prefix / folder


def _read_files(dictionary: Path) -> dict[str, str]:
    try:
        if dictionary.suffix == ".zip":
            with zipfile.ZipFile(dictionary) as archive:
                return {name: archive.read(f"wordnet/{name}").decode() for name in _FILES}
        return {name: (dictionary / name).read_bytes().decode() for name in _FILES}
    except (OSError, KeyError, UnicodeDecodeError, zipfile.BadZipFile) as error:
        raise KnowledgeError(
            f"{dictionary}: not a readable WordNet dictionary ({error}); "
            "install one (`apt-get install wordnet-base`), or name its folder "
            "with `--dictionary DIR`"
        ) from error


def _licence(data: str) -> str:
    """The notice at the head of every data file: numbered lines that begin with two blanks."""
    notice = [line.split(None, 1) for line in data.splitlines()[:64] if line.startswith("  ")]
    return "\n".join(words[1].strip() if len(words) > 1 else "" for words in notice).strip()


def _records(name: str, text: str) -> Iterable[tuple[int, str]]:
    for line_number, line in enumerate(text.splitlines(), start=1):
        if line and not line.startswith(" "):
            yield line_number, line


def _parse_data(name: str, text: str) -> Iterator[tuple[int, _Synset]]:
    for line_number, line in _records(name, text):
        try:
            columns, _, gloss = line.partition("|")
            fields = iter(columns.split())
            offset, _, pos = int(next(fields)), next(fields), next(fields)
            lemmas = []
            for _ in range(int(next(fields), 16)):
                lemmas.append(_SYNTACTIC_MARKER.sub("", next(fields)))
                next(fields)
            hypernyms: dict[str, list[tuple[str, int]]] = {"@": [], "@i": []}
            for _ in range(int(next(fields))):
                symbol, target, target_pos, _ = (next(fields) for _ in range(4))
                if symbol in hypernyms:
                    target_file = "a" if target_pos == "s" else target_pos
                    hypernyms[symbol].append((target_file, int(target)))
        # A generator expression turns the StopIteration of a short line into a RuntimeError.
        except (ValueError, StopIteration, RuntimeError) as error:
            raise KnowledgeError(
                f"{name}, line {line_number}: not a synset ({line[:60]!r}...); reinstall the "
                "dictionary (`apt-get install --reinstall wordnet-base`)"
            ) from error
        definition = _QUOTED.sub("", gloss).strip().strip("; ")
        yield (
            offset,
            _Synset(pos, tuple(lemmas), definition, tuple(hypernyms["@"]), tuple(hypernyms["@i"])),
        )


def _parse_index(name: str, text: str) -> Iterator[tuple[str, list[int]]]:
    for line_number, line in _records(name, text):
        fields = line.split()
        try:
            num_synsets, num_pointers = int(fields[2]), int(fields[3])
            offsets = [int(field) for field in fields[6 + num_pointers :]]
            if len(offsets) != num_synsets:
                raise ValueError(f"{len(offsets)} synsets, announced {num_synsets}")
        except (IndexError, ValueError) as error:
            raise KnowledgeError(
                f"{name}, line {line_number}: not a lemma ({line[:60]!r}...): {error}; reinstall "
                "the dictionary (`apt-get install --reinstall wordnet-base`)"
            ) from error
        yield fields[0], offsets
