"""CLIP's byte-level BPE tokenizer: loaded from a folder, or trained on a corpus, never downloaded.

A vocabulary has the layout of CLIP's: 256 bytes, 256 bytes that end a word, the merges, then the
start and the end token, so the end token always has the highest id. The text encoder relies on
that: it reads its feature at argmax(ids).
"""

import gzip
import html
import json
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import ftfy
import numpy as np
import regex
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor

from groundwork.data.atomic import directory_written_atomically

START, END = "<|startoftext|>", "<|endoftext|>"
PADDING_ID = 0
#: CLIP's word pattern: English contractions, letters, single digits, other signs. The special
#: tokens are not in it: one in a caption is text like any other, since the encoder would read its
#: feature at an end token inside of a text.
WORDS = regex.compile(
    r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+""", regex.IGNORECASE
)
#: Ids before the merges and the special tokens: 256 bytes, and 256 bytes that end a word.
ALPHABET_SIZE = 512


class TokenizerError(ValueError):
    """A tokenizer folder that cannot be used; says why and how to mend it."""


def clean_text(text: str) -> str:
    """CLIP's cleaning: mend broken Unicode, unescape HTML twice, collapse blanks, lower case."""
    if not (text.isascii() and text.isprintable()) or "&" in text:  # else ftfy changes nothing
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def _words(text: str) -> list[str]:
    # Python's lower() and `regex` rather than the normalisers of `tokenizers`: those know no final
    # sigma and another version of Unicode, so Greek and rare scripts would not get CLIP's ids
    return WORDS.findall(clean_text(text))


class ClipTokenizer:
    """Text -> ids of fixed length.

    context_length: ids per text, the start and the end token included.
    """

    def __init__(self, vocabulary: dict[str, int], merges: list[tuple[str, str]], context: int):
        ids = sorted(vocabulary.values())
        if START not in vocabulary or END not in vocabulary or vocabulary[END] != ids[-1]:
            raise TokenizerError(
                f"not a CLIP vocabulary: it needs {START!r}, and {END!r} with the highest id"
            )
        if ids[0] < 0 or len(set(ids)) != len(ids):
            raise TokenizerError(
                "not a CLIP vocabulary: two tokens share an id, or one is negative"
            )
        if context < 3:
            raise ValueError(
                f"context_length is {context}; start token, end token and one token of text need 3"
            )
        self.vocabulary, self.merges, self.context_length = vocabulary, merges, context
        self.start_id, self.end_id = vocabulary[START], vocabulary[END]
        self.vocab_size = self.end_id + 1
        self._tokenizer = _bpe(vocabulary, merges)

    def encode(self, texts: Sequence[str]) -> Tensor:
        """texts: B strings -> ids (B, context_length) int64, padded with 0.

        A text that is too long loses its tail, never its end token: without that token the feature
        would be read at the start token, and would not depend on the text at all.
        """
        ids = np.full((len(texts), self.context_length), PADDING_ID, np.int64)
        encodings = self._tokenizer.encode_batch_fast(
            [_words(text) for text in texts], is_pretokenized=True
        )
        for row, encoding in zip(ids, encodings, strict=True):
            tokens = encoding.ids[: self.context_length - 2]
            row[0] = self.start_id
            row[1 : 1 + len(tokens)] = tokens
            row[1 + len(tokens)] = self.end_id
        return torch.from_numpy(ids)

    def save(self, directory: Path) -> None:
        """Write the folder that `load_tokenizer` and transformers' CLIPTokenizer read."""
        with directory_written_atomically(directory, is_ours=_is_saved_tokenizer) as folder:
            vocabulary = json.dumps(self.vocabulary, ensure_ascii=False)
            (folder / "vocab.json").write_text(vocabulary, "utf-8")
            lines = ["#version: 0.2", *(f"{a} {b}" for a, b in self.merges)]
            (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
            settings = {
                "tokenizer_class": "CLIPTokenizer",
                "model_max_length": self.context_length,
                "bos_token": START,
                "eos_token": END,
                "unk_token": END,
                "pad_token": END,
            }
            (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


def _is_saved_tokenizer(folder: Path) -> bool:
    written = {"vocab.json", "merges.txt", "tokenizer_config.json"}
    return written == {entry.name for entry in folder.iterdir()}


def load_tokenizer(path: Path, context_length: int) -> ClipTokenizer:
    """Load from a folder with vocab.json and merges.txt (CLIP, Hugging Face), from a folder with
    tokenizer.json, or from OpenAI's `bpe_simple_vocab_16e6.txt.gz`."""
    if path.is_file():
        vocabulary, merges = _read_openai(path)
    else:
        vocabulary, merges = _read_folder(path)
    try:
        return ClipTokenizer(vocabulary, merges, context_length)
    except TokenizerError as error:
        raise TokenizerError(f"{path}: {error}") from error


def _read_folder(path: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    try:
        if (path / "vocab.json").is_file():
            vocabulary = json.loads((path / "vocab.json").read_text("utf-8"))
            lines = (path / "merges.txt").read_text("utf-8").splitlines()
            first = 1 if lines and lines[0].startswith("#version") else 0
            pairs = [line.split() for line in lines[first:] if line]
        elif (path / "tokenizer.json").is_file():
            record = json.loads((path / "tokenizer.json").read_text("utf-8"))
            model = record["model"]
            added = {token["content"]: token["id"] for token in record.get("added_tokens", [])}
            vocabulary = {**model["vocab"], **added}
            pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        else:
            raise TokenizerError(
                f"{path}: no tokenizer here (looked for vocab.json with merges.txt, and "
                "tokenizer.json); give the folder of a CLIP tokenizer, or set data.tokenizer.path "
                "to null to train one on the data set"
            )
        if any(type(token_id) is not int for token_id in vocabulary.values()):
            raise ValueError("an id of the vocabulary is not an integer")
        return vocabulary, [(str(a), str(b)) for a, b in pairs]
    except TokenizerError:
        raise
    except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise TokenizerError(f"{path}: cannot be read as a CLIP tokenizer: {error!r}") from error


def train_tokenizer(texts: Iterable[str], vocab_size: int, context_length: int) -> ClipTokenizer:
    """Learn BPE merges from texts; at most `vocab_size` ids, fewer when the corpus is small."""
    if vocab_size < ALPHABET_SIZE + 2:
        raise ValueError(
            f"vocab_size is {vocab_size}; the bytes and the special tokens alone are "
            f"{ALPHABET_SIZE + 2} ids"
        )
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = _byte_level()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        initial_alphabet=_byte_letters(),
        # the trainer numbers the word-ending letters in the order of a hash map, and breaks ties
        # by number; naming them beforehand makes the same corpus give the same merges
        special_tokens=[f"{letter}</w>" for letter in _byte_letters()],
        end_of_word_suffix="</w>",
        show_progress=False,
        min_frequency=2,
    )
    bpe.train_from_iterator(map(_words, texts), trainer)
    learned = json.loads(bpe.to_str())["model"]["merges"]
    pairs = [m.split(" ") if isinstance(m, str) else m for m in learned]
    # the trainer counts only the word ends it has seen, the vocabulary holds them all
    merges = [(a, b) for a, b in pairs][: vocab_size - 2 - ALPHABET_SIZE]
    return ClipTokenizer(_vocabulary(merges), merges, context_length)


def _read_openai(path: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    try:
        lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
        # CLIP uses the first 49152 - 256 - 2 merges of the file, after its header line
        merges = [(a, b) for a, b in (line.split() for line in lines[1 : 49152 - 256 - 2 + 1])]
        if not merges:
            raise ValueError("it is empty")
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise TokenizerError(f"{path}: not OpenAI's gzipped list of merges: {error}") from error
    return _vocabulary(merges), merges


def _vocabulary(merges: Iterable[tuple[str, ...]]) -> dict[str, int]:
    letters = _byte_letters()
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    tokens += ["".join(pair) for pair in merges]
    return {token: i for i, token in enumerate(dict.fromkeys([*tokens, START, END]))}


def _byte_letters() -> list[str]:
    """The 256 printable stand-ins of the byte-level alphabet (GPT-2), in CLIP's order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]


def _bpe(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    try:
        # no token for the unknown: CLIP's is the end token, which must not stand inside of a text
        model = models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>")
    except Exception as error:  # `tokenizers` raises nothing more specific
        raise TokenizerError(f"the merges do not fit the vocabulary: {error}") from error
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = _byte_level()
    return tokenizer


def _byte_level() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
