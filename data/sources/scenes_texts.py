"""Captions, phrases, questions and answers that are true of a drawn synthetic scene.

A small grammar. Nothing is said of objects that are hardly visible, nothing is counted where one
shows a sliver, and a phrase with "the" fits exactly one object that can be seen.
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from groundwork.data.sources.scenes_description import COLOURS, SceneObject
from groundwork.data.sources.scenes_facts import Facts, Predicate, Seen
from groundwork.data.sources.scenes_shapes import SHAPES

T = TypeVar("T")

NUMBER_WORDS: Final = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
#: Attributes in the order of English.
ATTRIBUTES: Final = ("size", "material", "colour", "shape")
#: Sets of attributes that a phrase may name, short ones first.
PHRASES: Final = (
    ("shape",),
    ("colour", "shape"),
    ("size", "shape"),
    ("material", "shape"),
    ("size", "colour", "shape"),
    ("material", "colour", "shape"),
    ("size", "material", "shape"),
    ("size", "material", "colour", "shape"),
)
#: Those that the caption which lists all objects chooses among.
LIST_PHRASES: Final = (PHRASES[1], PHRASES[4], PHRASES[5], PHRASES[7])
OPPOSITES: Final[dict[Predicate, Predicate]] = {
    "to the left of": "to the right of",
    "to the right of": "to the left of",
    "in front of": "behind",
    "behind": "in front of",
    "larger than": "smaller than",
    "smaller than": "larger than",
}
#: Questions per picture, at most.
MAX_QUESTIONS: Final = 6
#: Share of the pictures in which a shadow is asked for that is there, or one that is not.
SHADED_ASKED: Final = 0.8
UNSHADED_ASKED: Final = 0.3
#: Relations that captions state, at most.
MAX_RELATION_CAPTIONS: Final = 3


@dataclass(frozen=True)
class Caption:
    """text: of which `spans` says where each object is named: number -> [(begin, end)], in
    characters, without the article."""

    text: str
    spans: dict[int, list[tuple[int, int]]]


def write_captions(facts: Facts, rng: random.Random) -> list[Caption]:
    """All captions; the first is the one that a sample carries as its text."""
    if not facts.listed:
        return [Caption("An empty scene.", {})]
    captions = [_list_caption(facts, rng)]
    captions.extend(_relation_captions(facts, rng))
    # half of the pictures that can be spoken of by a relation are
    if len(captions) > 1 and rng.random() < 0.5:
        captions[0], captions[1] = captions[1], captions[0]
    captions.extend(Caption(text, {}) for text in _count_captions(facts))
    if facts.light_from:
        captions.append(Caption(f"The light comes from the {facts.light_from}.", {}))
    return captions


def write_questions(facts: Facts, rng: random.Random) -> list[dict[str, Any]]:
    """Questions with one right answer each: {"question", "answers", "kind"}."""
    questions = [
        *_count_questions(facts, rng),
        *_attribute_questions(facts, rng),
        *_relation_questions(facts, rng),
    ]
    if facts.light_from:
        question = "From which side does the light come?"
        questions.append(_question(question, facts.light_from, "light"))
    _shuffle(rng, questions)
    return questions[:MAX_QUESTIONS]


def phrase(thing: SceneObject, attributes: Sequence[str]) -> str:
    """("colour", "shape") -> "red cube"."""
    return " ".join(getattr(thing, name) for name in ATTRIBUTES if name in attributes)


def unique_phrase(facts: Facts, seen: Seen, rng: random.Random, without: str = "") -> str | None:
    """A phrase that fits this one object only, and does not name the attribute `without`.

    None where there is none. `without` "shape" calls it an object.
    """
    noun = " object" if without == "shape" else ""
    found = []
    # mostly the shortest, as people do
    wants_short = rng.random() < 0.6
    for attributes in PHRASES:
        named = [name for name in attributes if name != without]
        # only the shape may be replaced by another noun; without it there must be something left
        is_phrase = bool(named) if without == "shape" else without not in attributes
        if is_phrase and _fits_only(facts, seen, named):
            found.append(phrase(seen.thing, named) + noun)
            if wants_short:
                break
    return _pick(rng, found) if found else None


def _fits_only(facts: Facts, seen: Seen, attributes: Sequence[str]) -> bool:
    """Whether no other object, of those that show at all, has the same attributes."""
    return not any(
        all(getattr(other.thing, name) == getattr(seen.thing, name) for name in attributes)
        for other in facts.seen
        if other is not seen
    )


def _list_caption(facts: Facts, rng: random.Random) -> Caption:
    """ "A red sphere, two blue cubes and a green cone." """
    attributes = _pick(rng, LIST_PHRASES)
    listed = list(facts.listed)
    _shuffle(rng, listed)
    groups: dict[str, list[int]] = {}
    for seen in listed:
        groups.setdefault(phrase(seen.thing, attributes), []).append(seen.number)
    text = _pick(rng, ("", "A picture of ", "There is ")) if len(groups) == 1 else ""
    if text == "There is " and len(listed) > 1:
        text = "There are "
    spans: dict[int, list[tuple[int, int]]] = {}
    for position, (name, numbers) in enumerate(groups.items()):
        text += "" if not position else " and " if position == len(groups) - 1 else ", "
        article = _article(name) if len(numbers) == 1 else NUMBER_WORDS[len(numbers)]
        text += f"{article if text else article.capitalize()} "
        words = name if len(numbers) == 1 else f"{name}s"
        for number in numbers:
            spans[number] = [(len(text), len(text) + len(words))]
        text += words
    return Caption(text + (" in front of a wall." if facts.has_wall else "."), spans)


def _relation_captions(facts: Facts, rng: random.Random) -> list[Caption]:
    by_number = {seen.number: seen for seen in facts.listed}
    relations = list(facts.relations)
    _shuffle(rng, relations)
    # shadows are rare and worth telling
    relations.sort(key=lambda relation: relation[1] != "in the shadow of")
    captions: list[Caption] = []
    told: set[frozenset[int]] = set()
    for subject, predicate, other in relations:
        if len(captions) == MAX_RELATION_CAPTIONS:
            break
        if frozenset((subject, other)) in told:
            continue
        first = unique_phrase(facts, by_number[subject], rng)
        second = unique_phrase(facts, by_number[other], rng)
        if first is None or second is None:
            continue
        told.add(frozenset((subject, other)))
        begin = len(f"The {first} is {predicate} the ")
        captions.append(
            Caption(
                f"The {first} is {predicate} the {second}.",
                {subject: [(4, 4 + len(first))], other: [(begin, begin + len(second))]},
            )
        )
    return captions


def _count_captions(facts: Facts) -> list[str]:
    if not facts.is_countable:
        return []
    total = len(facts.seen)
    if total == 1:
        return ["There is one object."]
    shape, count = Counter(s.thing.shape for s in facts.seen).most_common(1)[0]
    many = f"There are {NUMBER_WORDS[total]} objects"
    if count == total:
        return [f"{many}, all of them {shape}s."]
    if count == 1:
        return [f"{many}."]
    return [f"{many}, {NUMBER_WORDS[count]} of them {shape}s."]


def _count_questions(facts: Facts, rng: random.Random) -> list[dict[str, Any]]:
    if not facts.is_countable or not facts.seen:
        return []
    shapes = Counter(s.thing.shape for s in facts.seen)
    colours = Counter(s.thing.colour for s in facts.seen)
    # what is there is asked for about as often as what is not
    shape = _pick(rng, SHAPES if rng.random() < 0.4 else sorted(shapes))
    colour = _pick(rng, tuple(COLOURS) if rng.random() < 0.4 else sorted(colours))
    questions = [
        _question("How many objects are there?", str(len(facts.seen)), "count"),
        _question(f"How many {shape}s are there?", str(shapes[shape]), "count"),
        _question(f"How many {colour} objects are there?", str(colours[colour]), "count"),
    ]
    asked = _pick(rng, facts.seen).thing
    is_there = rng.random() < 0.5
    wanted_colour = asked.colour if is_there else _pick(rng, tuple(COLOURS))
    exists = any(
        (s.thing.colour, s.thing.shape) == (wanted_colour, asked.shape) for s in facts.seen
    )
    name = f"{wanted_colour} {asked.shape}"
    questions.append(
        _question(f"Is there {_article(name)} {name}?", "yes" if exists else "no", "exists")
    )
    first, second = _two(rng, SHAPES)
    if shapes[first] != shapes[second]:
        more = "yes" if shapes[first] > shapes[second] else "no"
        questions.append(_question(f"Are there more {first}s than {second}s?", more, "compare"))
    return questions


def _attribute_questions(facts: Facts, rng: random.Random) -> list[dict[str, Any]]:
    if not facts.listed:
        return []
    questions = []
    seen = _pick(rng, facts.listed)
    if name := unique_phrase(facts, seen, rng, without="colour"):
        questions.append(_question(f"What color is the {name}?", seen.thing.colour, "color"))
    seen = _pick(rng, facts.listed)
    if name := unique_phrase(facts, seen, rng, without="shape"):
        questions.append(_question(f"What shape is the {name}?", seen.thing.shape, "shape"))
    return questions


def _relation_questions(facts: Facts, rng: random.Random) -> list[dict[str, Any]]:
    """Each true relation can be asked as it is, or turned round, where the answer is no."""
    if not facts.relations:
        return []
    by_number = {seen.number: seen for seen in facts.listed}
    questions = []
    subject, predicate, other = _pick(rng, facts.relations)
    names = [unique_phrase(facts, by_number[n], rng) for n in (subject, other)]
    if None not in names:
        asked, answer = predicate, "yes"
        if predicate in OPPOSITES and rng.random() < 0.5:
            asked, answer = OPPOSITES[predicate], "no"
        questions.append(
            _question(f"Is the {names[0]} {asked} the {names[1]}?", answer, "relation")
        )
    questions.extend(_shadow_questions(facts, by_number, rng))
    return questions


def _shadow_questions(
    facts: Facts, by_number: Mapping[int, Seen], rng: random.Random
) -> list[dict[str, Any]]:
    """ "Yes" where the relation holds, "no" where not one pixel lies in the other's shadow."""
    shaded = [(a, b) for a, predicate, b in facts.relations if predicate == "in the shadow of"]
    # of all pairs few are shaded; the shares make the answers about as frequent
    if shaded and rng.random() < SHADED_ASKED:
        (subject, other), answer = _pick(rng, shaded), "yes"
    elif rng.random() < UNSHADED_ASKED:
        first, second = _two(rng, facts.listed)
        if second.number in first.shaded_by:
            return []
        (subject, other), answer = (first.number, second.number), "no"
    else:
        return []
    names = [unique_phrase(facts, by_number[n], rng) for n in (subject, other)]
    if None in names:
        return []
    question = f"Is the {names[0]} in the shadow of the {names[1]}?"
    return [_question(question, answer, "shadow")]


def _question(question: str, answer: str, kind: str) -> dict[str, Any]:
    return {"question": question, "answers": [answer], "kind": kind}


def _article(name: str) -> str:
    return "an" if name[0] in "aeiou" else "a"


def _two(rng: random.Random, choices: Sequence[T]) -> tuple[T, T]:
    """Two different ones."""
    first = int(rng.random() * len(choices))
    second = (first + 1 + int(rng.random() * (len(choices) - 1))) % len(choices)
    return choices[first], choices[second]


def _pick(rng: random.Random, choices: Sequence[T]) -> T:
    return choices[int(rng.random() * len(choices))]


def _shuffle(rng: random.Random, values: list[Any]) -> None:
    # not rng.shuffle, whose algorithm Python may change
    for i in range(len(values) - 1, 0, -1):
        j = int(rng.random() * (i + 1))
        values[i], values[j] = values[j], values[i]
