"""The tokenizer against CLIP's own ids."""

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip  # type: ignore[import-untyped]
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from groundwork.data.text import (
    ALPHABET_SIZE,
    END,
    START,
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
def open_clips() -> Any:
    return open_clip.tokenizer.SimpleTokenizer()


@pytest.fixture(scope="module")
def trained() -> ClipTokenizer:
    return train_tokenizer(CORPUS, 700, 16)


def test_ids_equal_the_golden_prompts(clip: ClipTokenizer, shared_golden: Path) -> None:
    entries = json.loads((shared_golden / "klite" / "prompts.json").read_text())["entries"]
    ids = clip.encode([entry["text"] for entry in entries])
    for row, entry in zip(ids.tolist(), entries, strict=True):
        expected = entry["ids_keep_eot"]
        assert row == expected + [0] * (77 - len(expected))


TEXTS = [
    "",
    " \t\n ",
    "A photo of a CAT.",
    "it's, they'll, I'D, we've, you're, I'm, don't",
    "'ſ is an s to a pattern that ignores case, \u212a is a k",
    "ΟΔΟΣ ΣΑΣ Σ",  # the last sigma of a word is another letter in lower case
    "İstanbul ŞIŞLI ẞ Straße",
    "cafe\u0301 café ﬁne ｆｕｌｌ　ｗｉｄｔｈ ½ ² Ⅷ ①",
    "schÃ¶n â€œquotedâ€\x9d â€™",  # UTF-8 read as Latin-1
    "&lt;b&gt; &amp;amp; &eacute; &#x27; &#0; &nbsp;x &acirc;&euro;&trade; &amp;#x301;",
    "tab\tnew\nline\r\nreturn\x0bfeed\x0c\x85next\u2028line\u00a0blank\u3000wide\u200bzero",
    "\x00\x01\x1b[31mred\x1b[0m\x7f\ufeff\ufffd\ufffe",
    "\ud800 lone surrogate \udcff",
    "日本語のテキスト 한국어 עברית العربية हिन्दी ไทย 𝒜𝓁𝑔 𓀀 ꙮ",
    "👩‍👩‍👧 🏳️‍🌈 🇨🇭 👍🏽 ☃",
    "1234567 3.14 1,000 10^9 ٣ Ⅳ",
    "!!! --- ... ??? #hashtag @user http://x.y/z?a=b&c=d",
    "<|endoftext|>",
    "a <|startoftext|> b<|endoftext|>c <|ENDOFTEXT|>",
    "x" * 500,
    "ab " * 300,
    "🧀" * 90,
]


@pytest.mark.parametrize("text", TEXTS)
def test_ids_equal_open_clips(text: str, clip: ClipTokenizer, open_clips: Any) -> None:
    assert torch.equal(clip.encode([text]), open_clips([text]))


# By design other than open_clip's: its own two special tokens, which it reads out of the text.
anything = st.text(max_size=60).filter(lambda t: "_of_text>" not in t.lower())
entities = st.lists(
    st.sampled_from(
        ["&", "amp;", "#", "x", "3", "1", "eacute;", "lt", ";", "ſ", "'", "S", "Σ", " "]
    )
).map("".join)
latin = st.text(st.characters(max_codepoint=0x24F), max_size=60)


@settings(deadline=None, max_examples=300)
@given(text=anything | latin | entities)
def test_ids_equal_open_clips_on_any_text(text: str, clip: ClipTokenizer, open_clips: Any) -> None:
    assert torch.equal(clip.encode([text]), open_clips([text]))


def test_a_text_has_the_same_ids_alone_and_in_a_batch(clip: ClipTokenizer) -> None:
    together = clip.encode(TEXTS)
    assert together.shape == (len(TEXTS), 77)
    assert torch.equal(together, torch.cat([clip.encode([text]) for text in TEXTS]))
    assert clip.encode([]).shape == (0, 77)


@pytest.mark.parametrize("context", [3, 8, 77])
def test_a_long_text_keeps_its_end_token(context: int) -> None:
    tokenizer = load_tokenizer(OPENAI, context)
    ids = tokenizer.encode(["dog " * 200, "cat " * 200])
    assert ids[:, -1].tolist() == [tokenizer.end_id] * 2
    assert ids.argmax(1).tolist() == [context - 1] * 2
    assert not torch.equal(ids[0], ids[1])


@given(parts=st.lists(st.sampled_from([START, END, END.upper(), " ", "a dog", "<|", "|>", "&lt;"])))
def test_special_tokens_in_a_caption_do_not_move_where_the_feature_is_read(
    parts: list[str], clip: ClipTokenizer
) -> None:
    ids = clip.encode(["".join(parts)])[0].tolist()
    assert ids.count(clip.start_id) == 1
    assert ids.count(clip.end_id) == 1
    assert not any(ids[ids.index(clip.end_id) + 1 :])


def test_letters_that_a_vocabulary_lacks_do_not_become_end_tokens(tmp_path: Path) -> None:
    """Hugging Face writes vocabularies whose unknown token is the end token."""
    vocabulary = {"a": 0, "a</w>": 1, "b": 2, "ab</w>": 3, START: 4, END: 5}
    (tmp_path / "vocab.json").write_text(json.dumps({**vocabulary, "b</w>": 6, END: 7}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b</w>\n")
    tokenizer = load_tokenizer(tmp_path, 8)
    assert tokenizer.encode(["ab zz a é b"])[0].tolist() == [4, 3, 1, 6, 7, 0, 0, 0]


def test_training_is_deterministic_in_fresh_processes(trained: ClipTokenizer) -> None:
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


@pytest.mark.parametrize("vocab_size", [ALPHABET_SIZE + 2, ALPHABET_SIZE + 5, 535])
def test_a_trained_vocabulary_has_the_size_asked_for(vocab_size: int) -> None:
    tokenizer = train_tokenizer(CORPUS, vocab_size, 16)
    assert sorted(tokenizer.vocabulary.values()) == list(range(vocab_size))
    assert (tokenizer.start_id, tokenizer.end_id) == (vocab_size - 2, vocab_size - 1)


def test_a_small_corpus_gives_a_smaller_vocabulary() -> None:
    tokenizer = train_tokenizer(CORPUS, 5000, 16)
    assert tokenizer.vocab_size == ALPHABET_SIZE + len(tokenizer.merges) + 2 < 5000


def test_training_learns_the_words_it_sees_often(trained: ClipTokenizer) -> None:
    assert int((trained.encode(["Apple"]) != 0).sum()) == 3
    assert int((trained.encode(["elppa"]) != 0).sum()) > 3


def test_a_vocabulary_smaller_than_the_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size is 513"):
        train_tokenizer(CORPUS, ALPHABET_SIZE + 1, 16)
    with pytest.raises(ValueError, match="context_length is 2"):
        train_tokenizer(CORPUS, 600, 2)


@settings(deadline=None, max_examples=50)
@given(text=st.text(max_size=30))
def test_any_text_can_be_encoded_after_training(text: str, trained: ClipTokenizer) -> None:
    ids = trained.encode([text])[0]
    assert ids[0] == trained.start_id
    assert int(ids.argmax()) == (ids == trained.end_id).nonzero()[0, 0]
    assert int((ids == trained.end_id).sum()) == 1


def test_a_trained_tokenizer_survives_saving(trained: ClipTokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path / "t")
    loaded = load_tokenizer(tmp_path / "t", 16)
    assert torch.equal(loaded.encode(TEXTS), trained.encode(TEXTS))
    loaded.save(tmp_path / "again")
    for path in (tmp_path / "t").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_transformers_reads_a_saved_tokenizer(
    trained: ClipTokenizer, clip: ClipTokenizer, tmp_path: Path
) -> None:
    from transformers import CLIPTokenizer

    for name, ours in (("trained", trained), ("clip", clip)):
        ours.save(tmp_path / name)
        theirs = CLIPTokenizer.from_pretrained(tmp_path / name)
        for text in (*CORPUS[:2], "A photo of 2 cats, isn't it?", "日本 ½ don't"):
            expected = theirs(text, truncation=True, max_length=ours.context_length).input_ids
            assert ours.encode([text])[0, : len(expected)].tolist() == expected


def test_the_layout_of_tokenizer_json_is_read(trained: ClipTokenizer, tmp_path: Path) -> None:
    special = {START: trained.start_id, END: trained.end_id}
    record: dict[str, Any] = {
        "added_tokens": [{"content": token, "id": i} for token, i in special.items()],
        "model": {
            "vocab": {t: i for t, i in trained.vocabulary.items() if t not in special},
            "merges": [" ".join(pair) for pair in trained.merges],
        },
    }
    for merges in (record["model"]["merges"], [list(pair) for pair in trained.merges]):
        record["model"]["merges"] = merges
        (tmp_path / "tokenizer.json").write_text(json.dumps(record))
        loaded = load_tokenizer(tmp_path, 16)
        assert torch.equal(loaded.encode(TEXTS), trained.encode(TEXTS))


VOCABULARIES = [
    "{",
    "[]",
    "null",
    "{}",
    '{"a": 1}',
    json.dumps({START: 1, END: 0}),  # the end token has not the highest id
    json.dumps({"a": 0, "b": 0, START: 1, END: 2}),
    json.dumps({"a": -1, START: 1, END: 2}),
    json.dumps({"a": "0", START: 1, END: 2}),
    json.dumps({"a": 0.5, START: 1, END: 2}),
    json.dumps({"z": 0, START: 1, END: 2}),  # lacks what the merges join
]


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_a_malformed_vocabulary_is_named(vocabulary: str, tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(vocabulary)
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    with pytest.raises(TokenizerError, match=str(tmp_path)):
        load_tokenizer(tmp_path, 16)


@pytest.mark.parametrize("merges", [b"a\n", b"a b c\n", b"\xff\xfe", None])
def test_malformed_merges_are_named(
    merges: bytes | None, trained: ClipTokenizer, tmp_path: Path
) -> None:
    trained.save(tmp_path / "t")
    path = tmp_path / "t" / "merges.txt"
    path.unlink() if merges is None else path.write_bytes(merges)
    with pytest.raises(TokenizerError, match=str(tmp_path)):
        load_tokenizer(tmp_path / "t", 16)


@pytest.mark.parametrize("text", ["[]", "{}", '{"model": 3}', '{"model": {"vocab": []}}'])
def test_a_malformed_tokenizer_json_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(TokenizerError, match=str(tmp_path)):
        load_tokenizer(tmp_path, 16)


SPOILERS: list[Callable[[bytes], bytes]] = [
    lambda data: b"",
    lambda data: b"not gzipped",
    lambda data: data[: len(data) // 2],
    lambda data: data[:1000] + bytes(9) + data[1009:],
    lambda data: gzip.compress(b"a header\na b\nno_pair\n"),
    lambda data: gzip.compress(b"\xff\xff"),
]


@pytest.mark.parametrize("spoil", SPOILERS)
def test_a_malformed_list_of_openai_is_named(
    spoil: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    path = tmp_path / "bpe.txt.gz"
    path.write_bytes(spoil(OPENAI.read_bytes()))
    with pytest.raises(TokenizerError, match=r"bpe\.txt\.gz"):
        load_tokenizer(path, 16)


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(TokenizerError, match="no tokenizer here"):
            load_tokenizer(path, 16)
