"""Texts with what is known about them: phrases of boxes, and words that a knowledge source has."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from groundwork.data.knowledge.index import KnowledgeIndex
from groundwork.data.knowledge.senses import (
    FUNCTION_WORDS,
    Knowledge,
    find_knowledge,
    knowledge_of,
    senses,
)

WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
#: Words with a noun of their own spelling (WordNet has the noun "there") that are hardly ever it.
NO_ENTITIES = FUNCTION_WORDS | {
    *("all", "any", "both", "each", "either", "every", "few", "how", "many", "more", "most"),
    *("much", "neither", "other", "same", "so", "some", "such", "then", "there", "here", "very"),
    *("what", "when", "where", "which", "while", "who", "why", "will", "can", "may", "must"),
}
#: Words of the longest term looked up ("german shepherd dog"), and of a text that are looked at.
LONGEST_TERM = 4
MAX_WORDS = 500


@dataclass(frozen=True)
class Entity:
    """A term inside a text. begin, end: characters. senses: how many nouns have this name."""

    begin: int
    end: int
    knowledge: Knowledge
    senses: int = 1


def find_entities(index: KnowledgeIndex, text: str) -> list[Entity]:
    """The nouns of a text that the index knows: at each word the longest term that begins there."""
    words = [match for match, _ in zip(WORD.finditer(text), range(MAX_WORDS), strict=False)]
    entities, place = [], 0
    while place < len(words):
        found = next(_terms_at(index, text, words, place), None)
        if found is None:
            place += 1
        else:
            entity, length = found
            entities.append(entity)
            place += length
    return entities


def _terms_at(
    index: KnowledgeIndex, text: str, words: Sequence[re.Match[str]], place: int
) -> Iterator[tuple[Entity, int]]:
    """Terms that begin with a word, longest first, each with its number of words."""
    for length in range(min(LONGEST_TERM, len(words) - place), 0, -1):
        chosen = words[place : place + length]
        begin, end = chosen[0].start(), chosen[-1].end()
        phrase = text[begin:end]
        ends = {chosen[0].group().lower(), chosen[-1].group().lower()}
        # a comma separates: "a cat, dog" holds no cat dog
        if ends & NO_ENTITIES or phrase.split() != [word.group() for word in chosen]:
            continue
        term = "_".join(phrase.split())
        for spelling in dict.fromkeys((term, term.replace("-", "_"))):
            found = senses(index, spelling, "n")
            # "large" is first of all no garment, as "bear" is no verb
            if found and len(senses(index, spelling, "a")) <= 2 * len(found):
                known = knowledge_of(index, found[0], phrase, exact=True, order="file")
                yield Entity(begin, end, known, len(found)), length
                break


def segments(
    text: str, spans: Sequence[tuple[int, int, int]], entities: Sequence[Entity]
) -> list[dict[str, Any]]:
    """Cut a text where a span or an entity begins or ends.

    spans: (box number, begin, end). -> [{"text", "boxes": numbers, "entity": number or None}].
    Joined, the texts give `text`. Done here, as a browser counts characters in another way.
    """
    marks = [(b, e) for _, b, e in spans] + [(entity.begin, entity.end) for entity in entities]
    cuts = sorted({0, len(text), *(place for mark in marks for place in mark)})
    return [
        {
            "text": text[begin:end],
            "boxes": sorted({box for box, b, e in spans if b <= begin and end <= e}),
            "entity": next(
                (n for n, e in enumerate(entities) if e.begin <= begin and end <= e.end), None
            ),
        }
        for begin, end in pairwise(cuts)
    ]


def knowledge_card(found: Knowledge, senses: int = 1) -> dict[str, Any]:
    """What a page shows of an item of knowledge, the first of so many senses."""
    return {
        "term": found.matched_term,
        "sense": found.sense_id,
        "gloss": found.gloss,
        "path": list(found.path),
        "exact": found.exact,
        "senses": senses,
    }


def name_card(index: KnowledgeIndex | None, name: str) -> dict[str, Any] | None:
    """The knowledge about the name of a class, by the rule that training uses."""
    found = None if index is None or not name.strip() else find_knowledge(index, name)
    return None if found is None else knowledge_card(found)
