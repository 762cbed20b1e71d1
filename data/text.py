"""CLIP's byte-level BPE tokenizer: loaded from a folder, or trained on a corpus, without any download.

A vocabulary has the layout of CLIP's: 256 bytes, 256 bytes that end a word, the merges, then the
start and the end token, so the end token always has the highest id. The text encoder relies on that:
it reads its feature at argmax(ids).
"""

import gzip
import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import ftfy
import numpy as np
import regex
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from groundwork.data.atomic import directory_written_atomically

START, END = "<|startoftext|>", "<|endoftext|>"
PADDING_ID = 0
#: CLIP's word pattern: special tokens, English contractions, letters, single digits, other signs.
WORDS = (
    r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
)
SPACES = regex.compile(r"\s+")


class TokenizerError(ValueError):
    """A tokenizer folder that cannot be used; says why and how to mend it."""


def clean_text(text: str) -> str:
    """CLIP's cleaning: mend broken Unicode, unescape HTML twice, collapse blanks."""
    if not text.isascii():
        text = ftfy.fix_text(text)
    if "&" in text:
        text = html.unescape(html.unescape(text))
    return SPACES.sub(" ", text).strip()


class ClipTokenizer:
    """Text -> ids of fixed length.

    context_length: ids per text, the start and the end token included.
    """

    def __init__(self, vocabulary: dict[str, int], merges: list[tuple[str, str]], context: int):
        ids = sorted(vocabulary.values())
        if vocabulary.get(END) != ids[-1] or START not in vocabulary:
            raise TokenizerError(
                f"not a CLIP vocabulary: {START!r} must be in it and {END!r} must have the highest id"
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
        encodings = self._tokenizer.encode_batch_fast([clean_text(t) for t in texts])
        for row, encoding in zip(ids, encodings, strict=True):
            tokens = encoding.ids[: self.context_length - 2]
            row[0] = self.start_id
            row[1 : 1 + len(tokens)] = tokens
            row[1 + len(tokens)] = self.end_id
        return torch.from_numpy(ids)

    def save(self, directory: Path) -> None:
        """Write the folder that `load_tokenizer` and transformers' CLIPTokenizer read."""
        with directory_written_atomically(directory) as folder:
            (folder / "vocab.json").write_text(json.dumps(self.vocabulary, ensure_ascii=False))
            lines = ["#version: 0.2", *(f"{a} {b}" for a, b in self.merges)]
            (folder / "merges.txt").write_text("\n".join(lines) + "\n")
            settings = {
                "tokenizer_class": "CLIPTokenizer",
                "model_max_length": self.context_length,
                "bos_token": START,
                "eos_token": END,
                "unk_token": END,
                "pad_token": END,
            }
            (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


def load_tokenizer(path: Path, context_length: int) -> ClipTokenizer:
    """Load from a folder with vocab.json and merges.txt (CLIP, Hugging Face), from a folder with
    tokenizer.json, or from OpenAI's `bpe_simple_vocab_16e6.txt.gz`."""
    if path.is_file():
        return _from_openai(path, context_length)
    try:
        if (path / "vocab.json").is_file():
            vocabulary = json.loads((path / "vocab.json").read_text("utf-8"))
            lines = (path / "merges.txt").read_text("utf-8").splitlines()
            pairs = [tuple(line.split()) for line in lines if line and not line.startswith("#v")]
        elif (path / "tokenizer.json").is_file():
            record = json.loads((path / "tokenizer.json").read_text("utf-8"))
            model = record["model"]
            added = {token["content"]: token["id"] for token in record.get("added_tokens", [])}
            vocabulary = {**model["vocab"], **added}
            pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
        else:
            raise TokenizerError(
                f"{path}: no tokenizer here (looked for vocab.json with merges.txt, and "
                "tokenizer.json); give the folder of a CLIP tokenizer, or set data.tokenizer.path "
                "to null to train one on the data set"
            )
    except (OSError, KeyError, ValueError) as error:
        if isinstance(error, TokenizerError):
            raise
        raise TokenizerError(f"{path}: cannot be read as a CLIP tokenizer: {error}") from error
    return ClipTokenizer(vocabulary, [(a, b) for a, b in pairs], context_length)


def train_tokenizer(texts: Iterable[str], vocab_size: int, context_length: int) -> ClipTokenizer:
    """Learn BPE merges from texts; at most `vocab_size` ids, fewer when the corpus is small."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer, bpe.pre_tokenizer = _normalizer(), _pre_tokenizer()
    alphabet = _byte_letters()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
        min_frequency=2,
    )
    bpe.train_from_iterator(map(clean_text, texts), trainer)
    learned = json.loads(bpe.to_str())["model"]["merges"]
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in learned]
    merges = merges[: max(0, vocab_size - 2 * len(alphabet) - 2)]
    return ClipTokenizer(_vocabulary(merges), merges, context_length)


def _from_openai(path: Path, context_length: int) -> ClipTokenizer:
    try:
        lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
        # CLIP uses the first 49152 - 256 - 2 merges of the file, after its header line
        merges = [(a, b) for a, b in (line.split() for line in lines[1 : 49152 - 256 - 2 + 1])]
    except (OSError, ValueError, EOFError) as error:
        raise TokenizerError(f"{path}: not OpenAI's gzipped list of merges: {error}") from error
    return ClipTokenizer(_vocabulary(merges), merges, context_length)


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
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>", unk_token=END)
    )
    tokenizer.normalizer, tokenizer.pre_tokenizer = _normalizer(), _pre_tokenizer()
    return tokenizer


def _normalizer() -> normalizers.Normalizer:
    return normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
