import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from groundwork.data.annotations import Annotations, Box, Rle
from groundwork.data.samples import Sample, SampleError
from groundwork.data.sources.scenes import ScenesConfig, scene_sample
from groundwork.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from groundwork.pretrain.downstream.detection.data import (
    DINO_MULTI_SCALE,
    MULTI_SCALE,
    DetectionTransform,
    detection_collate,
    detection_example,
    encode_mask,
    normalise_images,
)

WIDTH, HEIGHT = 60, 40
#: No mirror image, no scaling: what comes out is what went in.
PLAIN = DetectionTransform(sizes=(HEIGHT,), max_size=600, flip=0.0, test_size=HEIGHT)

SQUARE = Box((10.0, 5.0, 30.0, 25.0), 1, "cat", segmentation=((10, 5, 30, 5, 30, 25, 10, 25),))
CROWD = Box((0.0, 30.0, 60.0, 40.0), 0, "dog", crowd=True, segmentation=None)


def sample_of(*boxes: Box, width: int = WIDTH, height: int = HEIGHT, **known: Any) -> Sample:
    """A picture that is white in the first box and black elsewhere."""
    pixels = np.zeros((height, width, 3), np.uint8)
    if boxes:
        x0, y0, x1, y1 = map(int, boxes[0].xyxy)
        pixels[y0:y1, x0:x1] = 255
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    annotations = Annotations(width=width, height=height, boxes=boxes, has_boxes=True, **known)
    return Sample("000000000139", file.getvalue(), "png", "", annotations.to_info())


def crowd_of_rows(first: int) -> Box:
    """A crowd whose mask is all rows from `first` on, as run lengths, column by column."""
    counts = (first, HEIGHT - first) * WIDTH
    area = float(WIDTH * (HEIGHT - first))
    return Box(
        (0.0, first, WIDTH, HEIGHT),
        0,
        "dog",
        crowd=True,
        area=area,
        segmentation=Rle((HEIGHT, WIDTH), counts),
    )


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def mask_box(mask: torch.Tensor) -> list[int]:
    y, x = mask.nonzero().T
    return [int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1]


def test_a_polygon_becomes_a_mask_of_its_pixels() -> None:
    image, target = detection_example(sample_of(SQUARE), PLAIN, 3, rng())
    assert image.dtype == torch.uint8
    assert target["boxes"].tolist() == [[10, 5, 30, 25]]
    assert target["labels"].tolist() == [1]
    assert target["masks"].shape == (1, HEIGHT, WIDTH)
    assert target["masks"].dtype == torch.uint8
    # the picture is white where the polygon is
    assert torch.equal(target["masks"][0] == 1, image[0] == 255)
    assert (target["image_id"], target["orig_size"]) == ("000000000139", (HEIGHT, WIDTH))
    assert all(type(target[name]) is torch.Tensor for name in ("boxes", "labels", "masks"))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "transform",
    [
        DetectionTransform(sizes=(40, 80, 120), max_size=200),
        DetectionTransform(sizes=(60,), max_size=90, crop_from=(40, 80), crop_range=(20, 50)),
    ],
)
def test_boxes_and_masks_go_where_the_pixels_go(transform: DetectionTransform, seed: int) -> None:
    image, target = detection_example(sample_of(SQUARE), transform, 3, rng(seed))
    white = image[0] >= 128
    if not len(target["boxes"]):  # cropped away
        assert white.float().mean() < 0.01 and target["dropped"]
        return
    assert torch.tensor(mask_box(white)) == pytest.approx(target["boxes"][0].numpy(), abs=1.5)
    disagreement = (white != (target["masks"][0] == 1)).float().mean()
    assert disagreement < 0.04
    assert target["masks"].shape[1:] == image.shape[1:]


def test_the_picture_keeps_its_ratio_within_both_limits() -> None:
    wide = sample_of(SQUARE, width=300, height=60)
    limited, _ = detection_example(wide, DetectionTransform((100,), 200), 3, rng())
    free, _ = detection_example(wide, DetectionTransform((100,), 600), 3, rng())
    assert limited.shape == (3, 40, 200)
    assert free.shape == (3, 100, 500)


def test_the_multi_scale_transform_has_the_sizes_of_detr() -> None:
    # the whole picture, of ratio 4:3, or a part of any ratio; shorter side 480, 512, ..., 800
    picture = sample_of(SQUARE, width=640, height=480)
    sizes = {
        tuple(detection_example(picture, MULTI_SCALE, 3, rng(n), masks=False).image.shape[1:])
        for n in range(24)
    }
    short = {min(size) for size in sizes}
    assert len(short) > 5
    assert all(min(side % 32, -side % 32) <= 1 and 479 <= side <= 800 for side in short)
    assert max(map(max, sizes)) <= 1333
    assert len({round(w / h, 2) for h, w in sizes}) > 4


def test_dino_crops_long_pictures_at_their_scale() -> None:
    # 2000 x 200: within 1333, the shorter side is 133 before the crop, and all of it is kept; else
    # it is 400 to 600, and a part of 384 to 600 pixels is cut out
    wide = sample_of(SQUARE, width=2000, height=200)

    def ratios(transform: DetectionTransform) -> list[float]:
        shapes = (
            detection_example(wide, transform, 3, rng(n), masks=False).image.shape
            for n in range(20)
        )
        return [w / h for _, h, w in shapes]

    kept = replace(DINO_MULTI_SCALE, redraws=None)
    cropped = [ratio for ratio in ratios(kept) if ratio < 9]
    assert 4 < len(cropped) < 16
    assert max(cropped) <= 600 / 384 + 0.01
    assert min(ratios(MULTI_SCALE)) > 384 / 133 - 0.05


def test_a_crop_without_objects_is_drawn_anew() -> None:
    corner = replace(SQUARE, xyxy=(0.0, 0.0, 6.0, 6.0), segmentation=((0, 0, 6, 0, 6, 6, 0, 6),))
    never = DetectionTransform((40,), 200, crop_from=(40,), crop_range=(10, 16), flip=0.0)
    anew = replace(never, redraws=10)
    for has_masks in (False, True):
        lost = 0
        for n in range(30):
            _, before = detection_example(sample_of(corner), never, 3, rng(n), masks=has_masks)
            _, after = detection_example(sample_of(corner), anew, 3, rng(n), masks=has_masks)
            lost += not len(before["boxes"])
            assert len(after["boxes"]) == 1 and not after["dropped"]
            if len(before["boxes"]):  # nothing is drawn anew without need
                assert torch.equal(before["boxes"], after["boxes"])
        assert lost > 5
    # nothing of it is left by any draw
    thin = Box((40.0, 5.0, 40.1, 30.0), 2, "pole")
    _, target = detection_example(sample_of(thin), anew, 3, rng(), masks=False)
    assert target["dropped"] == ("pole: nothing is left of it after the transform",)
    _, target = detection_example(sample_of(), anew, 3, rng(), masks=False)
    assert target["boxes"].shape == (0, 4)


def test_a_generator_state_decides_all_and_torchs_is_left_alone() -> None:
    transform = DetectionTransform((40, 60, 80), 200, crop_from=(40, 60), crop_range=(20, 50))
    sample = sample_of(SQUARE)
    torch.manual_seed(1)
    first = [detection_example(sample, transform, 3, rng(seed)) for seed in range(8)]
    after = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(3))
    again = [detection_example(sample, transform, 3, rng(seed)) for seed in range(8)]
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one.image, other.image)
        assert torch.equal(one.target["boxes"], other.target["boxes"])
    assert len({tuple(example.image.shape) for example in first}) > 2


def test_crowds_are_not_trained_on_but_evaluated() -> None:
    crowd = crowd_of_rows(30)
    sample = sample_of(SQUARE, crowd, source={"image_id": 139})
    _, target = detection_example(sample, PLAIN, 3, rng())
    assert target["labels"].tolist() == [1]
    assert target["dropped"] == ("dog: a crowd",)
    _, target = detection_example(sample, PLAIN, 3, None)
    truth = target["ground_truth"]
    assert truth.crowd.tolist() == [False, True]
    assert truth.labels.tolist() == [1, 0]
    assert truth.area.tolist() == [400.0, 600.0]
    assert truth.boxes[1].tolist() == [0, 30, 60, 40]
    assert truth.source_id == 139
    rows = np.zeros((HEIGHT, WIDTH), bool)
    rows[30:] = True
    assert truth.rles[1] == encode_mask(rows)


def test_evaluation_resizes_the_picture_only() -> None:
    image, target = detection_example(
        sample_of(SQUARE), DetectionTransform((20,), 600, test_size=80), 3, None
    )
    assert image.shape == (3, 80, 120)
    assert target["ground_truth"].boxes.tolist() == [[10, 5, 30, 25]]
    assert target["ground_truth"].rles[0]["size"] == [HEIGHT, WIDTH]


def test_what_nothing_is_left_of_is_dropped_with_a_reason() -> None:
    thin = Box((40.0, 5.0, 40.5, 30.0), 2, "pole", segmentation=((40, 5, 40.5, 5, 40.5, 30),))
    nameless = Box((0.0, 0.0, 9.0, 9.0), None, "thing", segmentation=SQUARE.segmentation)
    _, target = detection_example(sample_of(SQUARE, thin, nameless), PLAIN, 3, rng())
    assert target["labels"].tolist() == [1]
    assert target["dropped"] == (
        "thing: no class",
        "pole: nothing is left of it after the transform",
    )
    # what is evaluated does not depend on a transform
    _, target = detection_example(sample_of(SQUARE, thin, nameless), PLAIN, 3, None)
    assert target["ground_truth"].labels.tolist() == [1, 2]


def test_a_picture_without_boxes_is_a_negative() -> None:
    transform = DetectionTransform((40, 60), 200, crop_from=(40,), crop_range=(20, 30))
    for seed in range(4):
        image, target = detection_example(sample_of(), transform, 3, rng(seed))
        assert target["boxes"].shape == (0, 4)
        assert target["labels"].shape == (0,)
        assert target["masks"].shape == (0, *image.shape[1:])
    truth = detection_example(sample_of(), transform, 3, None).target["ground_truth"]
    assert truth.boxes.shape == (0, 4) and truth.rles == ()


def test_masks_of_scenes_come_from_the_instances() -> None:
    _, sample = scene_sample(ScenesConfig(image_size=64, seed=3), 1)
    plain = DetectionTransform((64,), 64, flip=0.0, test_size=64)
    _, target = detection_example(sample, plain, 32, rng())
    assert len(target["boxes"]) == len(sample.info["boxes"]) > 1
    for mask, box, record in zip(
        target["masks"], target["boxes"], sample.info["boxes"], strict=True
    ):
        assert mask_box(mask) == box.tolist()
        assert mask.sum() == record["area"]


def test_without_masks_no_segmentation_is_needed() -> None:
    bare = Box((10.0, 5.0, 30.0, 25.0), 1, "cat")
    _, target = detection_example(sample_of(bare), PLAIN, 3, rng(), masks=False)
    assert "masks" not in target and target["labels"].tolist() == [1]
    truth = detection_example(sample_of(bare), PLAIN, 3, None, masks=False).target["ground_truth"]
    assert truth.rles is None
    with pytest.raises(SampleError, match=r"cat has no segmentation.*import the data set with its"):
        detection_example(sample_of(bare), PLAIN, 3, rng())


def test_samples_that_cannot_be_used_say_why() -> None:
    with pytest.raises(SampleError, match=r"label 1 \('cat'\), and the model has 1 classes"):
        detection_example(sample_of(SQUARE), PLAIN, 1, rng())
    plain = sample_of(SQUARE)
    unseen = Sample(plain.key, plain.image, "png", "", {"width": WIDTH, "height": HEIGHT})
    with pytest.raises(SampleError, match=r"json\.boxes is missing"):
        detection_example(unseen, PLAIN, 3, rng())
    other = Sample(plain.key, plain.image, "png", "", plain.info | {"width": 61})
    with pytest.raises(SampleError, match="60 x 40 pixels, its annotations are for 61 x 40"):
        detection_example(other, PLAIN, 3, rng())
    _, scene = scene_sample(ScenesConfig(image_size=64), 1)
    small = io.BytesIO()
    Image.new("L", (32, 64)).save(small, "PNG")
    broken = {
        "is 32 x 64 in mode L": small.getvalue(),
        "cannot be decoded": scene.members["instances.png"][:60],
    }
    for message, content in broken.items():
        bad = Sample(
            scene.key,
            scene.image,
            scene.image_format,
            "",
            scene.info,
            {**scene.members, "instances.png": content},
        )
        with pytest.raises(SampleError, match=message):
            detection_example(bad, PLAIN, 32, rng())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sizes": ()}, "sizes is empty"),
        ({"sizes": (900, 1400)}, r"sizes is \[900, 1400\]"),
        ({"crop_from": (0,)}, r"crop_from is \[0\]"),
        ({"crop_from": (1400,)}, r"crop_from is \[1400\].*max_size \(1333\)"),
        ({"crop_from": (600,), "crop_max_size": 500}, r"of 1 to crop_max_size \(500\)"),
        ({"redraws": 0}, "redraws is 0"),
        ({"test_size": 1334}, "test_size is 1334"),
        ({"crop_range": (600, 384)}, r"crop_range is \[600, 384\]"),
        ({"flip": 1.5}, r"flip is 1\.5"),
    ],
)
def test_a_transform_that_cannot_be_says_which_value(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DetectionTransform(**values)


def test_batches_are_padded_to_the_stride_and_stay_zero_there() -> None:
    examples = [
        detection_example(sample_of(SQUARE), DetectionTransform((size,), 600), 3, rng())
        for size in (40, 60)
    ]
    batch = detection_collate(examples)
    assert batch["images"].shape == (2, 3, 64, 96)
    assert batch["sizes"].tolist() == [[40, 60], [60, 90]]
    assert torch.equal(batch["images"][0, :, :40, :60], examples[0].image)
    x = normalise_images(batch["images"], batch["sizes"])
    assert not x[0, :, 40:].any() and not x[0, :, :, 60:].any()
    channel = (examples[1].image[2] / 255 - IMAGENET_MEAN[2]) / IMAGENET_STD[2]
    torch.testing.assert_close(x[1, 2, :60, :90], channel)
