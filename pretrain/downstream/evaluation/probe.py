"""Cheap signals of what frozen features know: k nearest neighbours, and a linear probe.

k-NN: the weighted vote of InstDisc (Wu et al. 2018, arXiv 1805.01978, section 3.4) and DINO (Caron
et al. 2021, arXiv 2104.14294, appendix): cosine similarity s, a neighbour counts exp(s / 0.07).

Linear probe: multinomial logistic regression with an L2 penalty by full-batch L-BFGS, the penalty
chosen on a part of the training split (Radford et al. 2021, arXiv 2103.00020, appendix A.3).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE: Final = 0.07
NEIGHBOURS: Final = (10, 20, 100, 200)
#: Penalties that are tried, per sample: lambda in mean cross entropy + lambda / 2 |W|².
PENALTIES: Final = tuple(10.0**e for e in range(-7, 2))
#: Share of the training split on which the penalty is chosen.
HELD_OUT: Final = 0.2
#: Rows of the similarity matrix at a time.
ROWS: Final = 1024


def knn_accuracy(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    neighbours: Sequence[int] = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> dict[int, dict[str, float]]:
    """k -> top1 and top5 in percent. train: (N, D); test: (M, D); labels: class indices.

    A k above N is left out. Classes are those of the training split; ties go to the lower one.
    """
    names, index = train_labels.unique(return_inverse=True)
    used = [k for k in sorted(set(neighbours)) if k <= len(train)]
    if not used:
        raise ValueError(
            f"knn: the training split has {len(train)} samples, fewer than any of "
            f"{', '.join(map(str, neighbours))} neighbours; give smaller ones"
        )
    train, test = F.normalize(train.float(), dim=1), F.normalize(test.float(), dim=1)
    hits = {k: torch.zeros(2, dtype=torch.int64) for k in used}
    for part, truth in zip(test.split(ROWS), test_labels.split(ROWS), strict=True):
        similarity, nearest = (part @ train.T).topk(max(used), dim=1)
        weight, votes = (similarity / temperature).exp(), index[nearest]
        for k in used:
            score = torch.zeros(len(part), len(names), device=part.device)
            score.scatter_add_(1, votes[:, :k], weight[:, :k])
            order = score.sort(dim=1, descending=True, stable=True).indices[:, :5]
            found = names[order] == truth[:, None]
            hits[k] += torch.stack([found[:, :1].any(1).sum(), found.any(1).sum()]).cpu()
    return {
        k: {"top1": 100 * counts[0].item() / len(test), "top5": 100 * counts[1].item() / len(test)}
        for k, counts in hits.items()
    }


@dataclass(frozen=True)
class LogisticRegression:
    """logits = features @ weight.T + bias. weight: (K, D), bias: (K,), float64."""

    weight: Tensor
    bias: Tensor

    def logits(self, features: Tensor) -> Tensor:
        return features.double() @ self.weight.T + self.bias


def fit_logistic_regression(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    penalty: float,
    start: LogisticRegression | None = None,
    max_iterations: int = 1000,
) -> LogisticRegression:
    """The minimum of mean cross entropy + penalty / 2 |weight|² (the bias is free).

    features: (N, D); labels: (N,) in 0..K-1. It is scikit-learn's with C = 1 / (penalty N).
    start: where to begin; it decides the time, not the result.
    """
    x, y = features.double(), labels
    if start is None:
        start = LogisticRegression(x.new_zeros(num_classes, x.shape[1]), x.new_zeros(num_classes))
    weight = start.weight.clone().requires_grad_()
    bias = start.bias.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_iterations,
        tolerance_grad=1e-8,
        tolerance_change=1e-12,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        with torch.enable_grad():
            optimizer.zero_grad()
            loss = F.cross_entropy(x @ weight.T + bias, y) + penalty / 2 * weight.square().sum()
            loss.backward()
        return float(loss.detach())

    optimizer.step(closure)
    return LogisticRegression(weight.detach(), bias.detach())


@dataclass(frozen=True)
class ProbeResult:
    """top1, top5: in percent, on the test split. penalty: the chosen one; held_out: penalty -> top1
    on the held-out part of the training split."""

    top1: float
    top5: float
    penalty: float
    held_out: dict[float, float]


def linear_probe(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    penalties: Sequence[float] = PENALTIES,
    seed: int = 0,
) -> ProbeResult:
    """Fit on the training split, score on the test split; sizes and labels as for `knn_accuracy`.

    Features are standardised by the training split's mean and deviation. Of penalties that do
    equally well on the held-out part the largest is taken.
    """
    names, index = train_labels.unique(return_inverse=True)
    if len(names) < 2:
        raise ValueError("linear-probe: the training split has one class only; there is no choice")
    mean, deviation = train.double().mean(0), train.double().std(0)
    deviation = torch.where(deviation > 0, deviation, torch.ones_like(deviation))
    x, x_test = (train.double() - mean) / deviation, (test.double() - mean) / deviation
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator).to(x.device)
    held, fitted = order[: max(1, int(HELD_OUT * len(x)))], order[max(1, int(HELD_OUT * len(x))) :]
    scores: dict[float, float] = {}
    model: LogisticRegression | None = None
    for penalty in sorted(penalties, reverse=True):  # each begins where the last one ended
        model = fit_logistic_regression(x[fitted], index[fitted], len(names), penalty, model)
        right = model.logits(x[held]).argmax(1) == index[held]
        scores[penalty] = 100 * right.double().mean().item()
    best = max(scores, key=lambda penalty: (scores[penalty], penalty))
    model = fit_logistic_regression(x, index, len(names), best)
    order = model.logits(x_test).sort(dim=1, descending=True, stable=True).indices[:, :5]
    found = names[order] == test_labels[:, None]
    top1, top5 = (100 * found[:, :k].any(1).double().mean().item() for k in (1, 5))
    return ProbeResult(top1, top5, best, scores)
