"""mIoU against scikit-learn, and the rules about ignored pixels and absent classes."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, confusion_matrix, jaccard_score, recall_score

from groundwork.pretrain.downstream.segmentation.mean_iou import MeanIou, segmentation_scores
from groundwork.pretrain.downstream.segmentation.mean_iou import confusion_matrix as our_confusion

IGNORE = 255


def random_maps(
    classes: int, height: int, width: int, ignored: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    size = (height, width)
    truth = torch.randint(classes, size, generator=generator)
    truth[torch.rand(size, generator=generator) < ignored] = IGNORE
    return torch.randint(classes, size, generator=generator), truth


@given(
    classes=st.integers(1, 9),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    ignored=st.sampled_from([0.0, 0.3, 0.95]),
    seed=st.integers(0, 2**31 - 1),
)
def test_matrix_and_scores_are_scikit_learns(
    classes: int, height: int, width: int, ignored: float, seed: int
) -> None:
    predicted, truth = random_maps(classes, height, width, ignored, seed)
    matrix = our_confusion(predicted, truth, classes, IGNORE)
    counted = (truth != IGNORE).numpy()
    p, t = predicted.numpy()[counted], truth.numpy()[counted]
    if t.size == 0:
        assert matrix.sum() == 0
        return
    np.testing.assert_array_equal(matrix, confusion_matrix(t, p, labels=range(classes)))
    scores = segmentation_scores(matrix.numpy())
    present = np.union1d(t, p)  # what occurs in neither has no IoU
    iou = jaccard_score(t, p, labels=present, average=None, zero_division=0)
    recall = recall_score(t, p, labels=np.unique(t), average=None)
    assert scores["mean_iou"] == pytest.approx(np.mean(iou))
    assert scores["mean_accuracy"] == pytest.approx(np.mean(recall))
    assert scores["pixel_accuracy"] == pytest.approx(accuracy_score(t, p))


def test_absent_classes_are_left_out_and_named_ones_reported() -> None:
    #               truth 0: two right, one taken for 1; classes 2 and 3 occur nowhere
    evaluator = MeanIou(4, class_names=("sky", "road", "car", "dog"))
    truth, predicted = torch.tensor([[0, 0, 0, IGNORE]]), torch.tensor([[0, 0, 1, 3]])
    evaluator.add([predicted], {"labels": [truth]})
    scores = evaluator.result(evaluator.records())
    assert scores["mean_iou"] == pytest.approx((2 / 3 + 0) / 2)
    assert scores["mean_accuracy"] == pytest.approx(2 / 3)
    assert scores["iou/sky"] == pytest.approx(2 / 3) and scores["iou/road"] == 0
    assert "iou/car" not in scores and "iou/dog" not in scores


def test_records_of_several_ranks_score_as_one() -> None:
    pairs = [random_maps(5, 8, 9, 0.2, seed) for seed in range(6)]
    alone = MeanIou(5)
    alone.add([p for p, _ in pairs], {"labels": [t for _, t in pairs]})
    records = []
    for rank in range(3):
        evaluator = MeanIou(5)
        for p, t in pairs[rank::3]:
            evaluator.add([p], {"labels": [t]})
        records += evaluator.records()
    assert alone.result(records) == alone.result(alone.records())


def test_no_pixel_gives_nan() -> None:
    scores = MeanIou(3).result([])
    assert all(math.isnan(value) for value in scores.values())


@pytest.mark.parametrize(
    ("predicted", "truth", "message"),
    [
        ([[0, 1]], [[0], [1]], "bring the predictions to the size"),
        ([[0, 3]], [[0, 1]], "predictions have values from 0 to 3"),
        ([[0, 1]], [[0, 254]], "truth have values from 0 to 254"),
    ],
)
def test_maps_that_do_not_fit_are_refused(
    predicted: list[list[int]], truth: list[list[int]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        our_confusion(torch.tensor(predicted), torch.tensor(truth), 3, IGNORE)
