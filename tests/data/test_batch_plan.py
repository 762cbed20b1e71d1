"""How ranks share global batches."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from groundwork.data.batch_plan import BatchPlan


@given(
    global_batch=st.integers(1, 70),
    micro_batch=st.integers(1, 9),
    world_size=st.integers(1, 8),
    first_step=st.integers(0, 10**9),
    steps=st.integers(0, 3),
)
def test_ranks_share_out_each_global_batch(
    global_batch: int, micro_batch: int, world_size: int, first_step: int, steps: int
) -> None:
    try:
        plans = [BatchPlan(global_batch, micro_batch, world_size, r) for r in range(world_size)]
    except ValueError:
        assert global_batch < world_size * -(-global_batch // (micro_batch * world_size))
        return
    read = [list(plan.micro_batches(first_step, first_step + steps)) for plan in plans]
    assert {len(rank) for rank in read} == {steps * plans[0].accumulation}
    in_turn = [batch for micro_step in zip(*read, strict=True) for batch in micro_step]
    start = first_step * global_batch
    expected = list(range(start, start + steps * global_batch))
    assert [position for batch in in_turn for position in batch] == expected
    sizes = {len(batch) for batch in in_turn}
    assert not sizes or micro_batch >= max(sizes) >= min(sizes) >= max(1, max(sizes) - 1)
    if plans[0].is_even:
        assert sizes <= {micro_batch}


@pytest.mark.parametrize("plan", [(0, 1, 1, 0), (8, 0, 1, 0), (8, 2, 2, 2), (8, 2, 2, -1)])
def test_a_plan_without_sense_is_refused(plan: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"global_batch|rank"):
        BatchPlan(*plan)


def test_a_rank_is_not_left_without_a_sample() -> None:
    with pytest.raises(ValueError, match="leaves some of 4 ranks without a sample"):
        BatchPlan(3, 2, 4, 0)
