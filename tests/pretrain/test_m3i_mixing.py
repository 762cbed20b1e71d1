"""Mixtures of two pictures: nothing is lost, nothing else gets in, and draws can be repeated."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from groundwork.pretrain.models.mixed_images import (
    check_mixable,
    draw_masks,
    mix_partners,
    own_cells,
    per_picture,
    swap_partners,
)


@settings(max_examples=40, deadline=None)
@given(
    pairs=st.integers(1, 3),
    rows=st.integers(1, 4),
    columns=st.integers(2, 4),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**31 - 1),
)
def test_both_mixtures_of_a_pair_give_back_both_pictures(
    pairs: int, rows: int, columns: int, share: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(2 * pairs, 3, 4 * rows, 4 * columns, generator=generator)
    masks = draw_masks(pairs, rows, columns, share, generator)
    own = per_picture(masks, 4 * rows, 4 * columns)
    mixtures = mix_partners(images, own)
    assert torch.equal(mix_partners(mixtures, own), images)

    for i, partner in enumerate(i ^ 1 for i in range(2 * pairs)):
        for y in range(rows):
            for x in range(columns):
                cell = (i, slice(None), slice(4 * y, 4 * y + 4), slice(4 * x, 4 * x + 4))
                source = i if masks[i // 2, y, x] else partner
                assert torch.equal(mixtures[cell], images[source, *cell[1:]])


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(2, 9),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**31 - 1),
)
def test_every_mask_has_the_same_number_of_cells_and_none_is_empty(
    rows: int, columns: int, share: float, seed: int
) -> None:
    masks = draw_masks(7, rows, columns, share, torch.Generator().manual_seed(seed))
    kept = own_cells(rows, columns, share)
    assert masks.sum((1, 2)).tolist() == [kept] * 7
    assert 0 < kept < rows * columns
    assert abs(kept - share * rows * columns) <= 1


def test_every_cell_is_kept_as_often_as_the_share_says() -> None:
    masks = draw_masks(4000, 3, 3, 1 / 3, torch.Generator().manual_seed(0))
    torch.testing.assert_close(masks.float().mean(0), torch.full((3, 3), 1 / 3), rtol=0, atol=0.03)


def test_masks_follow_the_random_state_that_checkpoints_hold() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, second = draw_masks(5, 4, 4, 0.5), draw_masks(5, 4, 4, 0.5)
    torch.set_rng_state(state)
    assert torch.equal(draw_masks(5, 4, 4, 0.5), first)
    assert not torch.equal(first, second)


def test_partners_are_neighbours() -> None:
    assert swap_partners(torch.arange(6)).tolist() == [1, 0, 3, 2, 5, 4]


@pytest.mark.parametrize(
    ("batch", "height", "width", "message"),
    [
        (7, 64, 64, "a micro-batch has 7"),
        (8, 48, 64, r"pictures of 48 x 64 .*objective\.mask_cell and data\.image\.size"),
        (8, 32, 32, "two cells"),
    ],
)
def test_what_cannot_be_mixed_is_refused(batch: int, height: int, width: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_mixable(batch, height, width, 32)
