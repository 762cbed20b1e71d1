"""The tokenizer against CLIP's own ids."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from groundwork.data.text import (
    ClipTokenizer,
    TokenizerError,
    load_tokenizer,
    train_tokenizer,
)

OPENAI = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
CORPUS = ["a photo of a red apple ; apple , fruit with red skin", "Ein süßer Käse 🧀 !"] * 4


@pytest.fixture(scope="module")
def clip() -> ClipTokenizer:
    return load_tokenizer(OPENAI, 77)


@pytest.fixture(scope="module")
def trained() -> ClipTokenizer:
    return train_tokenizer(CORPUS, 700, 16)


def test_ids_equal_the_golden_prompts(clip: ClipTokenizer, shared_golden: Path) -> None:
    entries = json.loads((shared_golden / "klite" / "prompts.json").read_text())["entries"]
    ids = clip.encode([entry["text"] for entry in entries])
    for row, entry in zip(ids.tolist(), entries, strict=True):
        expected = entry["ids_keep_eot"]
        assert row == expected + [0] * (77 - len(expected))


@settings(deadline=None, max_examples=100)
@given(st.text(st.characters(codec="utf-8", exclude_characters="<>|"), max_size=60))
def test_ids_equal_open_clips_on_any_text(text: str) -> None:
    tokenizer = load_tokenizer(OPENAI, 77)
    expected = open_clip.tokenizer.SimpleTokenizer(clean="lower")([text])[0]
    assert torch.equal(tokenizer.encode([text])[0], expected)


def test_a_long_text_keeps_its_end_token(clip: ClipTokenizer) -> None:
    ids = clip.encode(["dog " * 200, "cat " * 200])
    assert ids[:, -1].tolist() == [clip.end_id] * 2
    assert ids.argmax(1).tolist() == [76, 76]
    assert not torch.equal(ids[0], ids[1])


def test_a_special_token_in_a_caption_is_ordinary_text(clip: ClipTokenizer) -> None:
    ids = clip.encode(["a dog <|endoftext|> and a cat"])[0].tolist()
    assert ids.count(clip.end_id) == 1
    assert ids.index(clip.end_id) > 8


def test_training_is_deterministic_in_fresh_processes(trained: ClipTokenizer) -> None:
    import subprocess
    import sys

    code = (
        "from groundwork.data.text import train_tokenizer\n"
        f"print(train_tokenizer({CORPUS!r}, 700, 16).merges)"
    )
    namespace = Path(__file__).parents[1] / "namespace"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(namespace), "PATH": ""},
    )
    assert done.stdout.strip() == str(trained.merges), done.stderr


def test_a_trained_tokenizer_survives_saving_and_loads_in_transformers(
    trained: ClipTokenizer, tmp_path: Path
) -> None:
    from transformers import CLIPTokenizer

    trained.save(tmp_path / "t")
    ids = trained.encode(CORPUS[:2])
    assert torch.equal(load_tokenizer(tmp_path / "t", 16).encode(CORPUS[:2]), ids)
    theirs = CLIPTokenizer.from_pretrained(tmp_path / "t")(CORPUS[0]).input_ids
    assert theirs[:15] == ids[0].tolist()[:15]


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1}'])
def test_a_malformed_folder_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "vocab.json").write_text(content)
    (tmp_path / "merges.txt").write_text("a b\n")
    with pytest.raises(TokenizerError):
        load_tokenizer(tmp_path, 16)
    with pytest.raises(TokenizerError, match="no tokenizer here"):
        load_tokenizer(tmp_path / "absent", 16)
