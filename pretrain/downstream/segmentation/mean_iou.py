"""Mean intersection over union of semantic segmentation, by one confusion matrix per split.

A class counts over all pictures together (Everingham et al. 2010, as in ADE20K and mmsegmentation),
not per picture. Classes that occur neither in the truth nor in a prediction have no IoU and are
left out of the means.
"""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SCORES: Final = ("mean_iou", "mean_accuracy", "pixel_accuracy")


def confusion_matrix(
    predictions: Tensor, truth: Tensor, num_classes: int, ignore_index: int = 255
) -> Tensor:
    """Counts of pixels: row the true class, column the predicted one.

    predictions, truth: integers of one shape; pixels whose truth is ignore_index do not count.
    -> (num_classes, num_classes) int64, on the host. Raises ValueError for other classes.
    """
    if predictions.shape != truth.shape:
        raise ValueError(
            f"confusion_matrix: predictions are {tuple(predictions.shape)}, the truth is "
            f"{tuple(truth.shape)}; bring the predictions to the size of the truth"
        )
    predictions, truth = predictions.cpu().long().flatten(), truth.cpu().long().flatten()
    counted = truth != ignore_index
    predictions, truth = predictions[counted], truth[counted]
    for name, values in (("predictions", predictions), ("truth", truth)):
        if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < num_classes:
            raise ValueError(
                f"confusion_matrix: the {name} have values from {int(values.min())} to "
                f"{int(values.max())}; expected classes 0 to {num_classes - 1}, or {ignore_index} "
                "in the truth for what does not count"
            )
    cells = torch.bincount(truth * num_classes + predictions, minlength=num_classes**2)
    return cells.view(num_classes, num_classes)


def segmentation_scores(
    confusion: NDArray[np.int64], class_names: Sequence[str] = ()
) -> dict[str, float]:
    """Mean IoU, mean accuracy (recall) of the classes and accuracy of the pixels, in 0 to 1.

    confusion: (classes, classes), rows the truth. class_names: adds `iou/NAME` of each class that
    has one. Without a single pixel all are NaN.
    """
    hits = np.diag(confusion).astype(np.float64)
    true, predicted = confusion.sum(1), confusion.sum(0)
    with np.errstate(invalid="ignore"):
        iou = hits / (true + predicted - hits)
        recall = hits / true
        pixels = hits.sum() / confusion.sum()
    scores = dict(zip(SCORES, (_mean(iou), _mean(recall), float(pixels)), strict=True))
    for name, value in zip(class_names, iou, strict=False):
        if not np.isnan(value):
            scores[f"iou/{name}"] = float(value)
    return scores


class MeanIou:
    """An `Evaluator`: predictions and batch["labels"] are lists of (H, W) maps, pair by pair.

    Its one record per rank is the confusion matrix, so that gathering costs classes² numbers.
    """

    def __init__(
        self, num_classes: int, *, ignore_index: int = 255, class_names: Sequence[str] = ()
    ) -> None:
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.class_names = tuple(class_names)
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)

    def add(self, predictions: Sequence[Tensor], batch: dict[str, Any]) -> None:
        for predicted, truth in zip(predictions, batch["labels"], strict=True):
            self.confusion += confusion_matrix(
                predicted, truth, self.num_classes, self.ignore_index
            )

    def records(self) -> list[Any]:
        return [self.confusion.numpy()]

    def names(self) -> list[str]:
        return [*SCORES, *(f"iou/{name}" for name in self.class_names)]

    def result(self, records: Sequence[Any]) -> dict[str, float]:
        empty = np.zeros((self.num_classes, self.num_classes), np.int64)
        return segmentation_scores(sum(records, start=empty), self.class_names)


def _mean(values: NDArray[np.float64]) -> float:
    """Over those that are numbers; NaN where none is."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")
