import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from groundwork.pretrain.downstream.detection.coco_evaluation import (
    METRICS,
    CocoEvaluator,
    coco_results,
)
from groundwork.pretrain.downstream.detection.data import GroundTruth, encode_mask

HEIGHT, WIDTH = 120, 160
CLASSES = ["cat", "dog", "cup"]


def box_mask(box: Any) -> Any:
    """An ellipse in the box. -> (H, W) bool."""
    x0, y0, x1, y1 = map(float, box)
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    u, v = (2 * x - x0 - x1) / (x1 - x0), (2 * y - y0 - y1) / (y1 - y0)
    return u**2 + v**2 <= 1


def truth_of(boxes: list[list[float]], labels: list[int], crowd: list[bool]) -> GroundTruth:
    masks = [box_mask(box) for box in boxes]
    return GroundTruth(
        boxes=np.array(boxes, np.float64).reshape(-1, 4),
        labels=np.array(labels, np.int64),
        area=np.array([mask.sum() for mask in masks], np.float64),
        crowd=np.array(crowd, np.bool_),
        rles=tuple(map(encode_mask, masks)),
        source_id=None,
    )


def prediction_of(boxes: Any, labels: Any, scores: Any) -> dict[str, torch.Tensor]:
    boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
    masks = np.array([box_mask(box) for box in boxes], bool).reshape(-1, HEIGHT, WIDTH)
    return {
        "boxes": torch.from_numpy(boxes),
        "labels": torch.as_tensor(labels, dtype=torch.int64),
        "scores": torch.as_tensor(scores, dtype=torch.float32),
        "masks": torch.from_numpy(masks),
    }


def targets(truths: list[GroundTruth]) -> dict[str, Any]:
    return {
        "targets": [
            {"image_id": f"picture-{n:03d}", "orig_size": (HEIGHT, WIDTH), "ground_truth": truth}
            for n, truth in enumerate(truths)
        ]
    }


def evaluate(
    truths: list[GroundTruth], predictions: list[dict[str, torch.Tensor]], masks: bool = True
) -> dict[str, float]:
    evaluator = CocoEvaluator(CLASSES, masks=masks)
    evaluator.add(predictions, targets(truths))
    return evaluator.result(evaluator.records())


def random_boxes(rng: np.random.Generator, count: int) -> Any:
    sides = rng.uniform(6, 100, (count, 2))
    corner = rng.uniform(0, 1, (count, 2)) * (np.array([WIDTH, HEIGHT]) - sides)
    return np.concatenate([corner, corner + sides], 1)


def random_split(seed: int) -> tuple[list[GroundTruth], list[dict[str, torch.Tensor]]]:
    """Ground truth, and detections near it, of wrong class, and of nothing at all."""
    rng = np.random.default_rng(seed)
    truths, predictions = [], []
    for n in range(8):
        boxes = random_boxes(rng, 0 if n == 3 else int(rng.integers(1, 7)))
        labels = rng.integers(0, 3, len(boxes))
        crowd = rng.random(len(boxes)) < 0.15
        truths.append(truth_of(boxes.tolist(), labels.tolist(), crowd.tolist()))
        near = np.clip(boxes + rng.normal(0, 4, boxes.shape), 0, [WIDTH, HEIGHT] * 2)
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 2)
        found = np.concatenate([near, random_boxes(rng, 0 if n == 5 else 3)])
        wrong = rng.random(len(near)) < 0.2
        classes = np.concatenate(
            [np.where(wrong, (labels + 1) % 3, labels), rng.integers(0, 3, len(found) - len(near))]
        )
        predictions.append(prediction_of(found, classes, rng.random(len(found))))
    return truths, predictions


def pycocotools_on_files(
    folder: Path,
    truths: list[GroundTruth],
    predictions: list[dict[str, torch.Tensor]],
    kind: str,
) -> Any:
    """The twelve numbers as users of pycocotools get them: from two JSON files."""
    annotations, results = [], []
    for n, (truth, prediction) in enumerate(zip(truths, predictions, strict=True)):
        for i, (x0, y0, x1, y1) in enumerate(truth.boxes.tolist()):
            rle = coco_mask.encode(np.asfortranarray(box_mask((x0, y0, x1, y1)).astype(np.uint8)))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": n + 7,
                    "category_id": int(truth.labels[i]) + 11,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": float(truth.area[i]),
                    "iscrowd": int(truth.crowd[i]),
                    "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
                }
            )
        for box, label, score, mask in zip(
            *(prediction[k].numpy() for k in ("boxes", "labels", "scores", "masks")), strict=True
        ):
            x0, y0, x1, y1 = map(float, box)
            rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
            shape = (
                {"bbox": [x0, y0, x1 - x0, y1 - y0]}
                if kind == "bbox"
                else {"segmentation": {"size": rle["size"], "counts": rle["counts"].decode()}}
            )
            results.append(
                {
                    "image_id": n + 7,
                    "category_id": int(label) + 11,
                    "score": float(score),
                    **shape,
                }
            )
    dataset = {
        "images": [{"id": n + 7, "height": HEIGHT, "width": WIDTH} for n in range(len(truths))],
        "categories": [{"id": n + 11, "name": name} for n, name in enumerate(CLASSES)],
        "annotations": annotations,
    }
    (folder / "truth.json").write_text(json.dumps(dataset))
    (folder / "results.json").write_text(json.dumps(results))
    coco = COCO(str(folder / "truth.json"))
    evaluation = COCOeval(coco, coco.loadRes(str(folder / "results.json")), kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats


@pytest.mark.parametrize("seed", [0, 1])
def test_the_numbers_are_those_of_pycocotools_on_files(tmp_path: Path, seed: int) -> None:
    truths, predictions = random_split(seed)
    result = evaluate(truths, predictions)
    for kind, name in (("box", "bbox"), ("mask", "segm")):
        expected = pycocotools_on_files(tmp_path, truths, predictions, name)
        assert 0.02 < expected[0] < 0.98
        assert [result[f"{kind}_{metric}"] for metric in METRICS] == pytest.approx(
            expected.tolist(), abs=1e-9
        )


def test_the_mean_over_classes_is_the_average_precision() -> None:
    result = evaluate(*random_split(2))
    for kind in ("box", "mask"):
        per_class = [result[f"{kind}_ap/{name}"] for name in CLASSES]
        assert np.mean(per_class) == pytest.approx(result[f"{kind}_ap"])


def test_perfect_predictions_score_one() -> None:
    truths, _ = random_split(3)
    # a crowd is neither demanded nor forbidden
    predictions = [
        prediction_of(t.boxes[~t.crowd], t.labels[~t.crowd], np.ones((~t.crowd).sum()))
        for t in truths
    ]
    result = evaluate(truths, predictions)
    for name in ("box_ap", "box_ap75", "box_ap_medium", "mask_ap", "mask_ap75", "mask_ap/dog"):
        assert result[name] == pytest.approx(1)


def test_a_box_of_overlap_0_62_counts_at_three_of_ten_thresholds() -> None:
    # 100 x 50 pixels in common with the truth's 100 x 50, and 100 x 30.6 more: 0.62
    truth = truth_of([[10, 10, 110, 60]], [0], [False])
    prediction = prediction_of([[10, 10, 110, 90.6]], [0], [0.9])
    result = evaluate([truth], [prediction], masks=False)
    assert result["box_ap"] == pytest.approx(0.3)
    assert (result["box_ap50"], result["box_ap75"]) == pytest.approx((1, 0))
    assert "mask_ap" not in result


def test_a_false_box_of_higher_score_halves_the_precision() -> None:
    truth = truth_of([[10, 10, 60, 60]], [1], [False])
    prediction = prediction_of([[100, 70, 150, 110], [10, 10, 60, 60]], [1, 1], [0.9, 0.8])
    assert evaluate([truth], [prediction])["box_ap"] == pytest.approx(0.5)


def test_boxes_inside_a_crowd_are_not_counted_as_false() -> None:
    truth = truth_of([[10, 10, 60, 60], [70, 10, 150, 110]], [0, 0], [False, True])
    prediction = prediction_of(
        [[80, 30, 130, 90], [75, 20, 100, 60], [10, 10, 60, 60]], [0, 0, 0], [0.9, 0.8, 0.7]
    )
    assert evaluate([truth], [prediction])["box_ap"] == pytest.approx(1.0)


def test_no_detection_at_all_scores_zero() -> None:
    truths, predictions = random_split(4)
    nothing = [{name: x[:0] for name, x in prediction.items()} for prediction in predictions]
    result = evaluate(truths, nothing)
    assert result["box_ap"] == result["mask_ap"] == result["box_ar100"] == 0.0


def test_records_of_two_ranks_give_the_result_of_one() -> None:
    truths, predictions = random_split(5)
    batch = targets(truths)
    shares = []
    for rows in ([6, 4, 2, 0], [1, 3, 5, 7]):
        evaluator = CocoEvaluator(CLASSES, masks=True)
        evaluator.add(
            [predictions[i] for i in rows], {"targets": [batch["targets"][i] for i in rows]}
        )
        shares.append(evaluator.records())
    gathered = CocoEvaluator(CLASSES, masks=True).result(shares[1] + shares[0])
    assert gathered == evaluate(truths, predictions)


def test_pictures_with_the_same_key_count_each() -> None:
    """As in tars of several sources that lie together. Half of all objects are not found."""
    truth = truth_of([[10, 10, 60, 60]], [1], [False])
    found = prediction_of([[10, 10, 60, 60]], [1], [0.9])
    lost = prediction_of([[100, 10, 150, 60]], [1], [0.1])
    batch = targets([truth, truth])
    batch["targets"][1]["image_id"] = batch["targets"][0]["image_id"]
    evaluator = CocoEvaluator(CLASSES, masks=True)
    evaluator.add([found, lost], batch)
    result = evaluator.result(evaluator.records())
    assert result["box_ar100"] == pytest.approx(0.5)
    assert set(result) <= set(evaluator.names())


def test_detections_are_cut_to_a_hundred_by_class_as_pycocotools_does() -> None:
    """Of 150 detections 120 are of class 0, with higher scores; those of class 1 count all."""
    truth = truth_of([[10, 10, 60, 60], [200, 10, 250, 60]], [0, 1], [False, False])
    boxes = [[10, 10, 60, 60]] * 120 + [[200, 10, 250, 60]] * 30
    labels = [0] * 120 + [1] * 30
    scores = [*np.linspace(0.9, 0.8, 120), *np.linspace(0.3, 0.2, 30)]
    evaluator = CocoEvaluator(CLASSES, masks=False)
    evaluator.add([prediction_of(boxes, labels, scores)], targets([truth]))
    result = evaluator.result(evaluator.records())
    assert result["box_ap/" + CLASSES[1]] == pytest.approx(1.0)


def test_results_for_the_server_have_the_data_sets_ids() -> None:
    truth = truth_of([[10, 10, 60, 60]], [1], [False])
    evaluator = CocoEvaluator(CLASSES, masks=True)
    batch = targets([truth])
    evaluator.add([prediction_of([[12, 10, 60, 50]], [1], [0.75])], batch)
    with pytest.raises(ValueError, match=r"picture-000 has no json\.source\.image_id"):
        coco_results(evaluator.records(), [1, 18, 47], "box")
    evaluator.records()[0]["source_id"] = 139
    assert coco_results(evaluator.records(), [1, 18, 47], "box") == [
        {"image_id": 139, "category_id": 18, "score": 0.75, "bbox": [12.0, 10.0, 48.0, 40.0]}
    ]
    (mask,) = coco_results(evaluator.records(), [1, 18, 47], "mask")
    assert set(mask) == {"image_id", "category_id", "score", "segmentation"}
    assert np.array_equal(coco_mask.decode(mask["segmentation"]), box_mask([12, 10, 60, 50]))
    json.dumps(mask)


def test_wrong_input_says_what_is_missing() -> None:
    truth = truth_of([[10, 10, 60, 60]], [1], [False])
    prediction = prediction_of([[12, 10, 60, 50]], [1], [0.75])
    prediction["masks"] = prediction["masks"][:, ::2]
    with pytest.raises(ValueError, match=r"masks of \(60, 160\); the original picture is"):
        evaluate([truth], [prediction])
    with pytest.raises(ValueError, match="no picture was evaluated"):
        CocoEvaluator(CLASSES, masks=False).result([])
