"""Average precision of boxes and masks, as COCO defines it and pycocotools computes it.

The ground truth comes with the evaluated pictures, so no annotation file is needed. Everything is
in pixels of the original pictures.
"""

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Literal

import torch
from torch import Tensor

from groundwork.pretrain.downstream.detection.data import GroundTruth, encode_mask

#: pycocotools' twelve numbers, in its order; of -1 there is nothing to measure in the split.
METRICS: Final = (
    *("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"),
    *("ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large"),
)
Kind = Literal["box", "mask"]


class CocoEvaluator:
    """The `Evaluator` of detectors.

    class_names: of the labels 0, 1, ...; each gets its own AP. masks: score masks as well, for
    which the ground truth must have them.
    """

    def __init__(self, class_names: Sequence[str], *, masks: bool) -> None:
        self.class_names = list(class_names)
        self.masks = masks
        self._records: list[Any] = []

    def add(self, predictions: Sequence[Mapping[str, Tensor]], batch: Mapping[str, Any]) -> None:
        """Take in the detections of a batch.

        predictions: one for each picture: boxes (n, 4) as [left, top, right, bottom] in pixels of
            the original picture, scores (n,), labels (n,), and with `masks` also masks (n, H, W),
            bool, of the original picture's size. Of each class, the 100 of highest score count.
        batch: its `targets`, as `detection_example` makes them without a generator.
        """
        for prediction, target in zip(predictions, batch["targets"], strict=True):
            truth: GroundTruth = target["ground_truth"]
            if self.masks and truth.rles is None:
                raise ValueError(
                    f"CocoEvaluator: {target['image_id']} has no masks to compare with; make the "
                    "examples with masks=True"
                )
            record = {
                "image_id": target["image_id"],
                "size": tuple(target["orig_size"]),
                "truth": {
                    "boxes": truth.boxes,
                    "labels": truth.labels,
                    "area": truth.area,
                    "crowd": truth.crowd,
                    "rles": truth.rles if self.masks else None,
                },
                "source_id": truth.source_id,
                "boxes": _array(prediction["boxes"]),
                "scores": _array(prediction["scores"]),
                "labels": _array(prediction["labels"]),
            }
            if self.masks:
                masks = _array(prediction["masks"])
                if masks.shape[1:] != record["size"]:
                    raise ValueError(
                        f"CocoEvaluator: {target['image_id']} has masks of {masks.shape[1:]}; the "
                        f"original picture is {record['size']}, give masks as large"
                    )
                record["rles"] = [encode_mask(mask) for mask in masks]
            self._records.append(record)

    def records(self) -> list[Any]:
        return self._records

    def names(self) -> list[str]:
        kinds = ("box", "mask") if self.masks else ("box",)
        per_class = (f"{kind}_ap/{name}" for kind in kinds for name in self.class_names)
        return [*(f"{kind}_{name}" for kind in kinds for name in METRICS), *per_class]

    def result(self, records: Sequence[Any]) -> dict[str, float]:
        """`box_ap`, `box_ap50`, ... and `mask_ap`, ...: see METRICS; 0 to 1, or -1 for no value.

        `box_ap/NAME` is the AP of a class, for those of which the split has objects. Pictures are
        told apart by their records: keys repeat where tars of several sources lie together.
        """
        ordered = sorted(records, key=lambda record: record["image_id"])
        if not ordered:
            raise ValueError("CocoEvaluator: no picture was evaluated; is the split empty?")
        kinds: tuple[Kind, ...] = ("box", "mask") if self.masks else ("box",)
        return {name: value for kind in kinds for name, value in self._score(ordered, kind).items()}

    def _score(self, records: Sequence[Any], kind: Kind) -> dict[str, float]:
        coco_class, evaluation_class = _pycocotools()
        categories = [{"id": n, "name": name} for n, name in enumerate(self.class_names)]
        images = [
            {"id": n, "height": record["size"][0], "width": record["size"][1]}
            for n, record in enumerate(records)
        ]
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
            sides = []
            for annotations in (_truth(records, kind), _detections(records, kind)):
                side = coco_class()
                side.dataset = {
                    "images": images,
                    "categories": categories,
                    "annotations": annotations,
                }
                side.createIndex()
                sides.append(side)
            evaluation = evaluation_class(*sides, iouType="bbox" if kind == "box" else "segm")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        result = {
            f"{kind}_{name}": float(value)
            for name, value in zip(METRICS, evaluation.stats, strict=True)
        }
        precision = evaluation.eval["precision"][..., 0, -1]  # (IoU, recall, class), all areas
        for number, name in enumerate(self.class_names):
            values = precision[:, :, number]
            if (values > -1).any():
                result[f"{kind}_ap/{name}"] = float(values[values > -1].mean())
        return result


def coco_results(
    records: Sequence[Any], category_ids: Sequence[int], kind: Kind
) -> list[dict[str, Any]]:
    """Detections as COCO's server and tools read them, from the records of a `CocoEvaluator`.

    category_ids: the data set's id of each label, `category_id` in `concepts.json`. Raises
    ValueError for pictures that have no number in the raw data.
    """
    for record in records:
        if record["source_id"] is None:
            raise ValueError(
                f"coco_results: {record['image_id']} has no json.source.image_id; only pictures of "
                "a data set in COCO's format have a number there"
            )
    return [
        {
            **{name: value for name, value in found.items() if name in ("score", "segmentation")},
            **({"bbox": found["bbox"]} if kind == "box" else {}),
            "image_id": records[found["image_id"]]["source_id"],
            "category_id": category_ids[found["category_id"]],
        }
        for found in _detections(records, kind)
    ]


def _truth(records: Sequence[Any], kind: Kind) -> list[dict[str, Any]]:
    rows = (
        (n, record["truth"], i)
        for n, record in enumerate(records)
        for i in range(len(record["truth"]["labels"]))
    )
    return [
        {
            "id": number,
            "image_id": n,
            "category_id": int(truth["labels"][i]),
            "bbox": _xywh(truth["boxes"][i]),
            "area": float(truth["area"][i]),
            "iscrowd": int(truth["crowd"][i]),
            **({"segmentation": truth["rles"][i]} if kind == "mask" else {}),
        }
        for number, (n, truth, i) in enumerate(rows, 1)  # 0 would mean "unmatched" to pycocotools
    ]


def _detections(records: Sequence[Any], kind: Kind) -> list[dict[str, Any]]:
    """As `COCO.loadRes` makes them, which does not take an empty list."""
    return [
        {
            "id": number,
            "image_id": n,
            "category_id": int(record["labels"][i]),
            "score": float(record["scores"][i]),
            "iscrowd": 0,
            **(_box(record["boxes"][i]) if kind == "box" else _mask(record["rles"][i])),
        }
        for number, (n, record, i) in enumerate(_rows(records), 1)
    ]


def _rows(records: Sequence[Any]) -> Iterator[tuple[int, Any, int]]:
    for n, record in enumerate(records):
        for i in range(len(record["labels"])):
            yield n, record, i


def _box(xyxy: Any) -> dict[str, Any]:
    bbox = _xywh(xyxy)
    return {"bbox": bbox, "area": bbox[2] * bbox[3]}


def _mask(rle: Mapping[str, Any]) -> dict[str, Any]:
    """By its own area it is small or large, not by its box's."""
    from pycocotools import mask as coco_mask

    return {"segmentation": rle, "area": float(coco_mask.area(rle))}


def _xywh(xyxy: Any) -> list[float]:
    left, top, right, bottom = map(float, xyxy)
    return [left, top, right - left, bottom - top]


def _pycocotools() -> tuple[Any, Any]:
    """(COCO, COCOeval)."""
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise ImportError(
            "COCO's average precision needs pycocotools: "
            "pip install 'groundwork-pretrain[annotations]'"
        ) from error
    return COCO, COCOeval


def _array(x: Tensor) -> Any:
    x = x.detach().cpu()
    return x.float().numpy() if x.dtype == torch.bfloat16 else x.numpy()  # numpy has no bfloat16
