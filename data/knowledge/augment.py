"""K-LITE's texts: a prompt or a caption with knowledge appended (arXiv 2204.09222).

For a template T, a class name c and a knowledge text k the augmented text is

    T(c) + " " + tok(" ; " + c + " , " + k)

where tok splits into words and punctuation and joins them by single blanks.
"""

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Final, Protocol

import numpy as np

from groundwork.data.knowledge.index import Entry, KnowledgeIndex
from groundwork.data.knowledge.senses import find_knowledge, hypernym_path

#: WordNet's kinds of knowledge text: the definition, and the nearest three levels of the hierarchy.
WORDNET_TEXTS: Final = ("wn_def", "wn_path")
_PATH_LENGTH: Final = 3


@lru_cache(maxsize=1 << 16)
def tokenize_words(text: str) -> str:
    """The words and marks of a text, joined by single blanks.

    NLTK's word tokenizer without sentence splitting, which would need a downloaded model: only the
    very last full stop is split off.
    """
    return " ".join(_word_tokenizer().tokenize(text))


def augment_prompt(template: str, name: str, knowledge_text: str | None) -> str:
    """The prompt with knowledge appended.

    None (the source has no entry) gives the plain prompt and one trailing blank, as in the
    reference; an entry whose text is empty still gives " ; name ,".
    """
    # str.replace, not str.format: braces in a name are not a placeholder.
    prompt = template.replace("{}", name)
    if knowledge_text is None:
        return f"{prompt} "
    return f"{prompt} {tokenize_words(f' ; {name} , {knowledge_text}')}"


def augment_caption(caption: str, entity: str, gloss: str | None) -> str:
    """The caption with the gloss of one of its entities appended; unchanged without a gloss."""
    if gloss is None:
        return caption
    return f"{caption} ; {entity} , {tokenize_words(gloss)}"


def path_text(path: Sequence[str], compat: bool = False) -> str:
    """The first three lemmas of a hypernym path (the concept included), for evaluation.

    compat: keep the underscores inside lemmas, as the reference does.
    """
    text = " ".join(path[:_PATH_LENGTH])
    return text if compat else text.replace("_", " ")


def training_path_text(index: KnowledgeIndex, sense: Entry, rng: np.random.Generator) -> str:
    """The whole hypernym path for training: a random lemma at each level, in lower case."""
    lemmas = (
        entry.lemmas[rng.integers(len(entry.lemmas))] for entry in hypernym_path(index, sense)
    )
    return " , ".join(lemma.replace("_", " ").lower() for lemma in lemmas)


def knowledge_items(
    index: KnowledgeIndex, name: str, sources: Sequence[str] = WORDNET_TEXTS
) -> list[str]:
    """The knowledge texts of a name, one per source in the order asked for.

    Each item makes its own augmented prompt; the reference lets the last source overwrite the
    others. Empty where the name is unknown; an empty text is no item.
    """
    if unknown := [source for source in sources if source not in WORDNET_TEXTS]:
        raise ValueError(
            f"unknown knowledge text {unknown[0]!r}; choose among {', '.join(WORDNET_TEXTS)}"
        )
    knowledge = find_knowledge(index, name)
    if knowledge is None:
        return []
    texts = {"wn_def": knowledge.gloss, "wn_path": path_text(knowledge.path)}
    return [texts[source] for source in sources if texts[source]]


class _WordTokenizer(Protocol):
    def tokenize(self, text: str) -> list[str]: ...


@cache
def _word_tokenizer() -> _WordTokenizer:
    # Imported here because importing NLTK takes two seconds, which only this function is worth.
    from nltk.tokenize.destructive import NLTKWordTokenizer

    tokenizer: _WordTokenizer = NLTKWordTokenizer()
    return tokenizer
