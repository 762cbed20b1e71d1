"""From a name to its knowledge: which sense of which term a class name or phrase means.

Two rules. `find_knowledge` is the default: it normalises the name, prefers nouns and backs off to
the head noun. `reference_lookup` is the rule behind the knowledge files released with K-LITE
(arXiv 2204.09222), with its quirks, for comparison only.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Literal

from groundwork.data.knowledge.index import Entry, KnowledgeIndex
from groundwork.data.knowledge.wordnet import POS_FILES, morphy

#: Which of several hypernyms a path takes: the first in WordNet's file, or the first by sense id,
#: as NLTK sorted them when K-LITE's files were made. (Today's NLTK keeps them in a set, so its
#: first hypernym changes from process to process with the seed of Python's string hash.)
HypernymOrder = Literal["file", "name"]
#: Which sense of a noun is taken: the first, or the first that can be seen in a picture and is not
#: a kind of person ("shrimp" is first of all a small person).
SensePreference = Literal["first", "physical"]

# fmt: off
#: Words that end the head of a phrase: "face | with tears of joy", "woman | in steamy room".
_BOUNDARY_WORDS: Final = frozenset({
    "about", "above", "across", "after", "against", "along", "amid", "among", "and", "around",
    "as", "at", "before", "behind", "below", "beneath", "beside", "between", "beyond", "but",
    "by", "down", "during", "for", "from", "in", "inside", "into", "like", "near", "nor", "of",
    "off", "on", "onto", "or", "out", "outside", "over", "past", "per", "than", "through", "to",
    "toward", "towards", "under", "up", "upon", "via", "with", "within", "without",
})
#: Never the head itself, though WordNet knows them: "a" is also angstrom, "us" the United States.
FUNCTION_WORDS: Final = _BOUNDARY_WORDS | {
    "a", "an", "the", "no", "not", "my", "your", "his", "her", "its", "our", "their", "this",
    "that", "these", "those", "i", "we", "us", "you", "he", "she", "it", "they", "me", "him",
    "them", "is", "are", "be", "was", "were", "do", "does", "did", "has", "have", "had",
}
# fmt: on
_PARENTHESES: Final = re.compile(r"\([^()]*\)|\[[^\[\]]*\]")
_QUOTES: Final = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "–": "-", "—": "-"})
_OUTER_PUNCTUATION: Final = " .,;:!?\"'"


@dataclass(frozen=True, slots=True)
class Knowledge:
    """What a source knows about a name.

    matched_term: the part of the name that was found, in lower case.
    path: first lemmas from the sense to its root, nearest first.
    exact: True where the whole name matched, False after a back-off to its head.
    """

    sense_id: str
    matched_term: str
    gloss: str
    path: tuple[str, ...]
    exact: bool


def senses(index: KnowledgeIndex, term: str, pos: str | None = None) -> tuple[Entry, ...]:
    """All senses of a term, inflected or not: NLTK's `synsets`.

    term: words joined by underscores, any case. pos: one of n, v, a (satellites included), s, r.
    """
    return tuple(index.entry(number) for number in _sense_numbers(index, term, pos))


def hypernym_path(
    index: KnowledgeIndex, sense: Entry, order: HypernymOrder = "file"
) -> tuple[Entry, ...]:
    """The sense and its hypernyms up to a root, one per level, nearest first.

    Instance hypernyms are not followed: the path of a city ends with the city.
    """
    path = [sense]
    # WordNet 3.0 has a cycle among its verbs (inhibit, restrain); a walk ends before it closes.
    seen = {sense.sense_id}
    while path[-1].hypernyms:
        parents = [index.entry(number) for number in path[-1].hypernyms]
        parent = parents[0] if order == "file" else min(parents, key=lambda e: e.sense_id)
        if parent.sense_id in seen:
            break
        seen.add(parent.sense_id)
        path.append(parent)
    return tuple(path)


def hypernym_paths(index: KnowledgeIndex, sense: Entry) -> list[tuple[Entry, ...]]:
    """Every way from a root to the sense, root first, instance hypernyms followed too."""
    return list(_paths_from_root(index, sense, frozenset()))


def reference_lookup(index: KnowledgeIndex, classname: str) -> Knowledge | None:
    """The knowledge of a class in K-LITE's released files; None where they have none.

    Reproduces their errors: the raw name (so no name of several words is found), the first sense of
    any part of speech, and a path looked up a second time from the *name* of that sense, which may
    be a path of another sense. Lemmas keep their underscores.
    """
    found = _sense_numbers(index, classname, None)
    if not found:
        return None
    first = index.entry(found[0])
    again = _sense_numbers(index, first.sense_id.split(".")[0], None)
    path = hypernym_path(index, index.entry(again[0]), "name") if again else ()
    return Knowledge(
        sense_id=first.sense_id,
        matched_term=classname.lower(),
        gloss=first.gloss,
        path=tuple(entry.lemmas[0] for entry in path),
        exact=True,
    )


def find_knowledge(
    index: KnowledgeIndex,
    name: str,
    order: HypernymOrder = "file",
    prefer: SensePreference = "first",
) -> Knowledge | None:
    """The knowledge about a class name or a short phrase, or None.

    The whole name first, in every usual spelling. Else its head: what stands before the first
    preposition or conjunction, and of this and then of the whole name the longest ending that is a
    term. Noun senses come before all others, within a step and over the steps of the back-off.
    """
    text = _normalised(name)
    heads = list(dict.fromkeys([*_endings(_before_boundary(text)), *_endings(text)]))
    for exact, phrases in ((True, [text]), (False, heads)):
        for pos in ("n", None):
            if (match := _first_match(index, phrases, pos)) is not None:
                phrase, numbers = match
                sense = index.entry(numbers[0])
                if prefer == "physical":
                    candidates = (index.entry(number) for number in numbers)
                    sense = next((s for s in candidates if _is_visible_thing(index, s)), sense)
                return knowledge_of(index, sense, phrase, exact=exact, order=order)
    return None


def find_by_external_id(
    index: KnowledgeIndex, external_id: str, order: HypernymOrder = "file"
) -> Knowledge | None:
    """The knowledge of a class given by number ("n02084071" in ImageNet): nothing to guess."""
    entry = index.find_external(external_id)
    if entry is None:
        return None
    return knowledge_of(index, entry, entry.lemmas[0], exact=True, order=order)


def knowledge_of(
    index: KnowledgeIndex, sense: Entry, matched_term: str, *, exact: bool, order: HypernymOrder
) -> Knowledge:
    """The knowledge that a sense holds, for readers: blanks in place of underscores."""
    return Knowledge(
        sense_id=sense.sense_id,
        matched_term=matched_term.replace("_", " ").lower(),
        gloss=sense.gloss,
        path=tuple(
            entry.lemmas[0].replace("_", " ") for entry in hypernym_path(index, sense, order)
        ),
        exact=exact,
    )


def _sense_numbers(index: KnowledgeIndex, term: str, pos: str | None) -> list[int]:
    if pos is not None and pos not in (*POS_FILES, "s"):
        raise ValueError(f"part of speech {pos!r} is not one of {', '.join(POS_FILES)}, s")
    term = term.lower()
    numbers = []
    for wanted in POS_FILES if pos is None else (pos,):
        accepted = ("a", "s") if wanted == "a" else (wanted,)
        for form in morphy(index, term, wanted):
            numbers += [n for n in index.entry_numbers(form) if index.pos(n) in accepted]
    return numbers


def _paths_from_root(
    index: KnowledgeIndex, sense: Entry, below: frozenset[str]
) -> Iterator[tuple[Entry, ...]]:
    below = below | {sense.sense_id}
    numbers = sense.hypernyms + sense.instance_hypernyms
    parents = [p for p in map(index.entry, numbers) if p.sense_id not in below]
    if not parents:
        yield (sense,)
    for parent in parents:
        for path in _paths_from_root(index, parent, below):
            yield (*path, sense)


def _first_match(
    index: KnowledgeIndex, phrases: Iterable[str], pos: str | None
) -> tuple[str, list[int]] | None:
    """The first phrase that is a term in some spelling, and the numbers of its senses."""
    for phrase in phrases:
        for spelling in _spellings(phrase):
            if numbers := _sense_numbers(index, spelling, pos):
                return phrase, numbers
    return None


def _is_visible_thing(index: KnowledgeIndex, sense: Entry) -> bool:
    ancestors = {entry.sense_id for path in hypernym_paths(index, sense) for entry in path}
    return "physical_entity.n.01" in ancestors and "person.n.01" not in ancestors


def _normalised(name: str) -> str:
    """Lower case, plain quotes, single blanks; what stands in parentheses goes."""
    text = unicodedata.normalize("NFC", name).translate(_QUOTES).lower()
    text = text.replace("_", " ").replace("&", " and ")
    outside = " ".join(_PARENTHESES.sub(" ", text).split())
    return outside or " ".join(text.split()).strip("()[] ")


def _spellings(phrase: str) -> dict[str, None]:
    """How a dictionary may spell a phrase, likeliest first."""
    folded = unicodedata.normalize("NFKD", phrase)
    unaccented = "".join(c for c in folded if not unicodedata.combining(c))
    spellings = []
    for text in (phrase, phrase.strip(_OUTER_PUNCTUATION), unaccented.strip(_OUTER_PUNCTUATION)):
        words = text.replace(",", "").split()
        spellings += [
            "_".join(words),
            "_".join(words).replace("-", "_"),
            "_".join(words).replace("-", ""),
            "-".join(words),
            "".join(words).replace("-", "").replace("'", ""),
        ]
    return dict.fromkeys(spelling for spelling in spellings if spelling)


def _before_boundary(text: str) -> str:
    """What stands before the first preposition, conjunction or mark that follows a word."""
    words = text.split()
    for place, word in enumerate(words):
        if place > 0 and word.strip(_OUTER_PUNCTUATION) in _BOUNDARY_WORDS:
            return " ".join(words[:place])
        if word[-1] in ",:;" and place + 1 < len(words):
            return " ".join(words[: place + 1]).strip(_OUTER_PUNCTUATION)
    return text


def _endings(text: str) -> Iterator[str]:
    """The text, then what is left of it as leading words are dropped, also at hyphens."""
    starts = [0, *(match.end() for match in re.finditer(r"[\s-]+", text))]
    for start in starts:
        ending = text[start:].strip(_OUTER_PUNCTUATION)
        words = ending.split()
        # "of wood" and bare numbers ("737-800") are no heads.
        if not words or words[0] in _BOUNDARY_WORDS or ending in FUNCTION_WORDS:
            continue
        if not any(c.isalpha() for c in ending) or len(ending) == 1:
            continue
        yield ending
