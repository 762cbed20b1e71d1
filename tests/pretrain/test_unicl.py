"""The UniCL loss against golden values, a naive float64 loss, and four real processes."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from groundwork.pretrain.objectives.contrastive import (
    UNIQUE,
    gather_ranks,
    resolve_unique,
    soft_contrastive,
    unicl_loss,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "klite" / "unicl_loss.npz"
CASES = ("all_unique", "duplicates", "mixed", "all_same", "large_scale", "four_ranks")
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}
WORLD = 4


def load(case: str) -> dict[str, Tensor]:
    values = np.load(GOLDEN)
    return {
        name.partition(".")[2]: torch.from_numpy(values[name])
        for name in values
        if name.startswith(f"{case}.")
    }


def leaves(golden: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """image, text features, and the logarithm of the scale, float32, with gradients to come."""
    names = ("image_features", "text_features", "logit_scale_log")
    image, text, log_scale = (golden[name].float().clone().requires_grad_() for name in names)
    return image, text, log_scale


def naive(image: Tensor, text: Tensor, scale: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The formula of the paper, entry by entry, in float64."""
    N = len(labels)
    logits = scale * image @ text.T
    directions = []
    for matrix in (logits, logits.T):
        total = matrix.new_zeros(())
        for i in range(N):
            positives = [
                j for j in range(N) if i == j or (labels[i] == labels[j] and labels[i] != UNIQUE)
            ]
            log_p = matrix[i] - torch.logsumexp(matrix[i], 0)
            total = total - log_p[positives].sum() / len(positives)
        directions.append(total / N)
    return directions[0], directions[1]


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_the_golden_ones(case: str) -> None:
    golden = load(case)
    image, text, log_scale = leaves(golden)
    i2t, t2i = unicl_loss(image, text, log_scale.exp(), golden["labels"])
    torch.testing.assert_close(i2t.double(), golden["loss_i2t"], **TOLERANCE)
    torch.testing.assert_close(t2i.double(), golden["loss_t2i"], **TOLERANCE)
    loss = (i2t + t2i) / 2
    torch.testing.assert_close(loss.double(), golden["loss"], **TOLERANCE)
    loss.backward()
    assert image.grad is not None and text.grad is not None and log_scale.grad is not None
    torch.testing.assert_close(image.grad.double(), golden["grad_image"], **TOLERANCE)
    torch.testing.assert_close(text.grad.double(), golden["grad_text"], **TOLERANCE)
    torch.testing.assert_close(log_scale.grad.double(), golden["grad_logit_scale_log"], **TOLERANCE)


def run_rank(rank: int, folder: str) -> None:
    """One of the four processes of the test below: its rows against all columns."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD
    )
    golden = load("four_ranks")
    per_rank = len(golden["labels"]) // WORLD
    own = slice(rank * per_rank, (rank + 1) * per_rank)
    image, text, log_scale = leaves(golden)
    image, text = (x.detach()[own].clone().requires_grad_() for x in (image, text))
    i2t, t2i = unicl_loss(image, text, log_scale.exp(), golden["labels"][own], block_rows=3)
    ((i2t + t2i) / 2).backward()

    part = torch.full((2,), float(rank), requires_grad=True)
    gathered = gather_ranks(part)
    gathered.retain_grad()
    (gathered * (rank + 1)).sum().backward()
    results = {
        "loss": (i2t + t2i).detach() / 2,
        "image": image.grad,
        "text": text.grad,
        "log_scale": log_scale.grad,
        "gathered": gathered.detach(),
        "gathered_grad": gathered.grad,
        "part_grad": part.grad,
    }
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    """What four gloo processes computed, by rank."""
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        # a spawned process imports this file by a name of its own
        name = Path(__file__).stem
        patch.syspath_prepend(str(Path(__file__).parent))
        patch.setitem(sys.modules, name, sys.modules[__name__])
        patch.setattr(run_rank, "__module__", name)
        torch.multiprocessing.spawn(run_rank, (str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.multirank
def test_four_processes_give_the_golden_loss_and_gradients(ranks: list[dict[str, Tensor]]) -> None:
    golden = load("four_ranks")
    losses = torch.stack([rank["loss"] for rank in ranks]).double()
    torch.testing.assert_close(losses, golden["rank_losses"], **TOLERANCE)
    torch.testing.assert_close(losses.mean(), golden["loss"], **TOLERANCE)

    # data parallel training averages gradients over ranks
    for name, key in (("image", "grad_image"), ("text", "grad_text")):
        gradient = torch.cat([rank[name] for rank in ranks]).double() / WORLD
        torch.testing.assert_close(gradient, golden[key], **TOLERANCE)
    gradient = torch.stack([rank["log_scale"] for rank in ranks]).double().mean()
    torch.testing.assert_close(gradient, golden["grad_logit_scale_log"], **TOLERANCE)


@pytest.mark.multirank
def test_gather_adds_up_the_gradients_of_all_ranks_and_spares_its_input(
    ranks: list[dict[str, Tensor]],
) -> None:
    for rank, values in enumerate(ranks):
        assert values["gathered"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
        assert values["part_grad"].tolist() == [1 + 2 + 3 + 4] * 2
        assert values["gathered_grad"].tolist() == [rank + 1] * 8


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalised float64 image and text features, a scale, and labels with some UNIQUE."""
    N, D = draw(st.integers(1, 9)), draw(st.integers(1, 6))
    labels = draw(st.lists(st.integers(UNIQUE, 3), min_size=N, max_size=N))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    image, text = F.normalize(
        torch.randn(2, N, D, generator=generator, dtype=torch.float64), dim=-1
    )
    scale = torch.tensor(draw(st.sampled_from([0.5, 2.718, 14.3, 100.0])), dtype=torch.float64)
    return image, text, scale, torch.tensor(labels)


@settings(max_examples=60, deadline=None)
@given(batch=batches(), block_rows=st.integers(1, 10))
def test_loss_and_gradients_are_those_of_the_naive_formula(
    batch: tuple[Tensor, Tensor, Tensor, Tensor], block_rows: int
) -> None:
    *features, labels = batch
    exact = [x.clone().requires_grad_() for x in features]
    ours = [x.float().requires_grad_() for x in features]
    expected = naive(*exact, labels)
    actual = unicl_loss(*ours, labels, block_rows)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=2e-5)
    (expected[0] + 3 * expected[1]).backward()
    (actual[0] + 3 * actual[1]).backward()
    for a, e in zip(ours, exact, strict=True):
        assert a.grad is not None
        torch.testing.assert_close(a.grad.double(), e.grad, rtol=1e-4, atol=5e-5)


@settings(max_examples=30, deadline=None)
@given(batch=batches(), seed=st.integers(0, 1000))
def test_neither_the_order_nor_the_numbering_of_classes_matters(
    batch: tuple[Tensor, Tensor, Tensor, Tensor], seed: int
) -> None:
    image, text, scale, labels = batch
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    renamed = torch.where(labels == UNIQUE, UNIQUE, 2**63 - 1 - labels)
    expected = unicl_loss(image, text, scale, labels)
    actual = unicl_loss(image[order], text[order], scale, renamed[order])
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def random_batch(batch: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    image, text = F.normalize(torch.randn(2, batch, width, generator=generator), dim=-1)
    return image.requires_grad_(), text.requires_grad_(), torch.tensor(14.3, requires_grad=True)


@pytest.mark.parametrize("block_rows", [1, 3, 50, 1024])
def test_the_size_of_the_blocks_changes_nothing(block_rows: int) -> None:
    labels = torch.arange(50) % 20 - 1
    results = []
    for rows in (50, block_rows):
        leaves = random_batch(50, 16)
        i2t, t2i = unicl_loss(*leaves, labels, rows)
        gradients = torch.autograd.grad(i2t + t2i, leaves)
        results.append((i2t.detach(), t2i.detach(), *gradients))
    # only the order of float32 sums differs
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


def test_unique_labels_give_the_loss_of_clip() -> None:
    image, text, scale = random_batch(40, 16)
    logits = scale * image @ text.T
    i2t, t2i = unicl_loss(image, text, scale, torch.full((40,), UNIQUE), block_rows=7)
    torch.testing.assert_close(i2t, F.cross_entropy(logits, torch.arange(40)))
    torch.testing.assert_close(t2i, F.cross_entropy(logits.T, torch.arange(40)))


def test_fresh_labels_meet_no_other_label() -> None:
    labels = torch.tensor([2**63 - 1, UNIQUE, 0, UNIQUE, 5, 5, UNIQUE])
    resolved = resolve_unique(labels)
    assert resolved[labels != UNIQUE].tolist() == [2**63 - 1, 0, 5, 5]
    assert len(set(resolved.tolist())) == 6


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = out if isinstance(out, tuple | list) else [out]
        sizes = [tensor.numel() for tensor in tensors if isinstance(tensor, Tensor)]
        self.numel = max([self.numel, *sizes])
        return out


def test_the_logit_matrix_never_exists_as_a_whole() -> None:
    N, block_rows = 3000, 64
    image, text, scale = random_batch(N, 8)
    with LargestTensor() as largest:
        i2t, t2i = unicl_loss(image, text, scale, torch.arange(N) // 2, block_rows)
        (i2t + t2i).backward()
    assert image.grad is not None and image.grad.abs().max() > 0
    assert largest.numel == block_rows * N


def test_bf16_features_are_used_as_they_are_in_float32_logits() -> None:
    rounded = [x.detach().bfloat16().requires_grad_() for x in random_batch(32, 16)[:2]]
    exact = [x.detach().double().requires_grad_() for x in rounded]
    labels = torch.arange(32) % 10 - 1
    ours = sum(unicl_loss(*rounded, torch.tensor(100.0), labels, 8))
    theirs = sum(naive(*exact, torch.tensor(100.0).double(), labels))
    assert isinstance(ours, Tensor) and isinstance(theirs, Tensor)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)
    ours.backward()
    theirs.backward()
    for a, e in zip(rounded, exact, strict=True):
        assert a.grad is not None and a.grad.dtype == torch.bfloat16
        rounding = 2**-8 * e.grad.abs().max().item()  # twice: as query and as key
        torch.testing.assert_close(a.grad.double(), e.grad, rtol=0, atol=rounding)


def test_autocast_leaves_the_logits_in_float32() -> None:
    labels = torch.arange(32) % 10 - 1
    expected = unicl_loss(*random_batch(32, 16), labels)
    with torch.autocast("cpu", torch.bfloat16):
        actual = unicl_loss(*random_batch(32, 16), labels)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_second_derivatives_are_refused() -> None:
    image, text, scale = random_batch(4, 8)
    labels = torch.arange(4)
    loss = soft_contrastive(image, text, scale, labels, labels)
    (gradient,) = torch.autograd.grad(loss**2, image, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def tiny_objective() -> Any:
    from groundwork.pretrain.models.clip_text import TextConfig
    from groundwork.pretrain.models.klite import KliteConfig, build_klite
    from groundwork.pretrain.models.swin import SwinConfig
    from groundwork.pretrain.objectives.unicl import Unicl, UniclConfig

    torch.manual_seed(0)
    swin = SwinConfig(
        image_size=16, embed_dim=16, depths=(1, 1), num_heads=(2, 4), window_size=2, drop_path=0.0
    )
    text = TextConfig(vocab_size=60, context_length=8, width=32, layers=1, heads=2)
    model = build_klite(KliteConfig(image=swin, text=text, projection_dim=16, logit_scale=2.0))
    return Unicl(model, UniclConfig(block_rows=5), (0.48, 0.46, 0.41), (0.27, 0.26, 0.28))


def tiny_batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 50, (12, 8), generator=generator)
    ids[:, -1] = 59
    image = torch.randint(0, 256, (12, 3, 16, 16), generator=generator, dtype=torch.uint8)
    labels = torch.tensor([-1, -1, -1, -1, -1, -1, 0, 0, 1, 1, 2, 2])
    return {"image": image, "ids": ids, "labels": labels}


def test_the_objective_learns_a_small_batch_by_heart() -> None:
    objective, batch = tiny_objective(), tiny_batch()
    optimizer = torch.optim.AdamW(objective.parameters(), lr=5e-3)
    losses = []
    for _ in range(60):
        output = objective(batch, torch.float32)
        optimizer.zero_grad()
        output["loss"].backward()
        optimizer.step()
        losses.append(output["loss"].item())
    # a class of two has ln 2 left in either direction: 6 of 12 rows
    floor = np.log(2) / 2
    assert losses[0] > 2.0
    assert floor - 1e-3 < losses[-1] < floor + 0.15
    assert output.keys() == {"loss", "image_to_text", "text_to_image", "logit_scale"}


def test_pixels_are_normalised_exactly_in_a_bf16_model_too() -> None:
    objective, image = tiny_objective(), tiny_batch()["image"]
    mean, std = torch.tensor([0.48, 0.46, 0.41]), torch.tensor([0.27, 0.26, 0.28])
    expected = (image.permute(0, 2, 3, 1).double() / 255 - mean) / std
    actual = objective.bfloat16().normalise(image, torch.float32)
    torch.testing.assert_close(actual.permute(0, 2, 3, 1).double(), expected, rtol=1e-5, atol=1e-6)


def test_a_block_without_rows_is_refused() -> None:
    from groundwork.pretrain.objectives.unicl import UniclConfig

    with pytest.raises(ValueError, match=r"objective\.block_rows is 0"):
        replace(UniclConfig(), block_rows=0)
