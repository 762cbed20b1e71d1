"""Packing: every token once, nobody sees a neighbour, few rows."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from groundwork.data.packing import pack, pack_tokens, segment_mask

TEXTS = st.lists(st.lists(st.integers(1, 99), max_size=12), min_size=1, max_size=40)


@given(texts=TEXTS, spare=st.integers(0, 9))
def test_every_token_comes_once_and_can_be_found(texts: list[list[int]], spare: int) -> None:
    capacity = max(1, *map(len, texts)) + spare
    packed = pack_tokens(texts, capacity, pad_id=-7)
    for number, text in enumerate(texts):
        row, start = int(packed.rows[number]), int(packed.starts[number])
        place = slice(start, start + len(text))
        assert packed.ids[row, place].tolist() == text
        assert packed.positions[row, place].tolist() == list(range(len(text)))
        assert len(set(packed.segments[row, place].tolist())) == min(1, len(text))
    assert int((packed.segments > 0).sum()) == sum(map(len, texts))
    assert (packed.ids[packed.segments == 0] == -7).all()
    assert packed.fill == pytest.approx(sum(map(len, texts)) / packed.ids.numel())


@given(lengths=st.lists(st.integers(0, 50), min_size=1, max_size=60))
def test_rows_are_few(lengths: list[int]) -> None:
    rows = pack(lengths, 50)
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    assert all(sum(lengths[n] for n in row) <= 50 for row in rows)
    # no two rows would fit into one, so all but one are more than half full on average
    assert len(rows) <= max(1, math.ceil(2 * sum(lengths) / 50))


def test_captions_fill_their_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = (torch.randn(256, generator=generator).exp() * 15).clamp(4, 128).int().tolist()
    rows = pack(lengths, 128)
    assert sum(lengths) / (len(rows) * 128) > 0.95


def test_a_text_longer_than_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="text 1 has 9 tokens, a row holds 8"):
        pack([3, 9], 8)


def test_attention_over_packed_rows_is_that_over_single_texts() -> None:
    torch.manual_seed(0)
    texts = [torch.randint(1, 50, (n,)).tolist() for n in (5, 3, 7, 1, 6)]
    packed = pack_tokens(texts, 9)
    tokens, places = nn.Embedding(50, 16), nn.Embedding(9, 16)
    attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def attend(ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = tokens(ids) + places(positions)
        return attention(x, x, x, attn_mask=~mask.repeat_interleave(2, 0))[0]

    together = attend(packed.ids, packed.positions, segment_mask(packed.segments))
    for number, text in enumerate(texts):
        alone = torch.ones(1, len(text), len(text), dtype=torch.bool)
        expected = attend(torch.tensor([text]), torch.arange(len(text))[None], alone)[0]
        row, start = packed.rows[number], packed.starts[number]
        torch.testing.assert_close(together[row, start : start + len(text)], expected)
