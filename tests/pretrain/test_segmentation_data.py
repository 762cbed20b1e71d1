"""Maps are read as written, and a picture and its map are resized, cropped and mirrored alike."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from groundwork.data.samples import Sample, SampleError
from groundwork.data.sources.scenes import ScenesConfig, scene_sample
from groundwork.pretrain.downstream.segmentation.data import (
    SegmentationTransform,
    segmentation_collate,
    segmentation_example,
)
from groundwork.pretrain.downstream.segmentation.maps import (
    SegmentationLabels,
    segmentation_map,
)

SHAPES = ("background", "sphere", "cube", "cylinder", "cone")
SCENE_LABELS = SegmentationLabels(
    num_classes=5, names=SHAPES, member="instances.png", instance_field="shape"
)
#: A grey for each class of the drawn pictures, far apart.
GREYS = np.array([20, 80, 140, 200], np.uint8)


def encoded(array: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, options.pop("format", "PNG"), **options)
    return file.getvalue()


def drawn(classes: np.ndarray, **members: bytes) -> Sample:
    """A picture whose grey tells the class of each pixel, and its index map."""
    picture = np.repeat(GREYS[classes][..., None], 3, 2)
    return Sample(
        "drawn", encoded(picture), "png", "", {}, members or {"seg.png": encoded(classes)}
    )


def blocks(height: int, width: int, block: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 4, (-(-height // block), -(-width // block)), np.uint8)
    return np.kron(coarse, np.ones((block, block), np.uint8))[:height, :width]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_index_maps_of_8_and_16_bits(dtype: Any) -> None:
    largest = np.iinfo(dtype).max
    classes = np.array([[0, 1, largest], [2, 3, largest]], dtype)
    sample = drawn(np.zeros((2, 3), np.uint8), **{"seg.png": encoded(classes)})
    found = segmentation_map(sample, SegmentationLabels(num_classes=4))
    np.testing.assert_array_equal(found, [[0, 1, 255], [2, 3, 255]])


def test_a_map_of_16_bits_may_have_more_than_255_classes() -> None:
    classes = np.array([[0, 255, 300, 65535]], np.uint16)
    sample = drawn(np.zeros((1, 4), np.uint8), **{"seg.png": encoded(classes)})
    labels = SegmentationLabels(num_classes=301, ignore_index=65535)
    np.testing.assert_array_equal(segmentation_map(sample, labels), classes.astype(int))


def test_a_palette_gives_its_indices() -> None:
    image = Image.fromarray(np.array([[0, 2], [1, 3]], np.uint8), "P")
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    file = io.BytesIO()
    image.save(file, "PNG")
    sample = drawn(np.zeros((2, 2), np.uint8), **{"seg.png": file.getvalue()})
    found = segmentation_map(sample, SegmentationLabels(num_classes=4))
    np.testing.assert_array_equal(found, [[0, 2], [1, 3]])


def test_zero_is_ignored_and_classes_are_counted_from_one() -> None:
    classes = np.array([[0, 1, 150, 255]], np.uint8)  # ADE20K
    sample = drawn(np.zeros((1, 4), np.uint8), **{"seg.png": encoded(classes)})
    labels = SegmentationLabels(num_classes=150, zero_is_ignored=True)
    np.testing.assert_array_equal(segmentation_map(sample, labels), [[255, 0, 149, 255]])


def test_instances_of_a_scene_have_the_class_of_their_box() -> None:
    for index in range(20):
        _, sample = scene_sample(ScenesConfig(image_size=64), index)
        found = segmentation_map(sample, SCENE_LABELS)
        numbers = np.asarray(Image.open(io.BytesIO(sample.members["instances.png"])))
        classes = {box["id"]: SHAPES.index(box["shape"]) for box in sample.info["boxes"]} | {0: 0}
        for number in np.unique(numbers):
            assert (found[numbers == number] == classes.get(number, 255)).all()


def test_a_numeric_field_is_counted_from_one() -> None:
    _, sample = scene_sample(ScenesConfig(image_size=64), 3)
    labels = SegmentationLabels(num_classes=33, member="instances.png", instance_field="label")
    expected = {box["label"] + 1 for box in sample.info["boxes"]}
    assert set(np.unique(segmentation_map(sample, labels))) - {0, 255} == expected


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (encoded(np.full((4, 4), 9, np.uint8)), "class 9; expected 0 to 3, or 255"),
        (encoded(np.zeros((4, 5), np.uint8)), "is 5 x 4, the upright picture 4 x 4"),
        (encoded(np.zeros((4, 4, 3), np.uint8)), "a PNG of mode RGB; expected a PNG of 8 or 16"),
        (encoded(np.zeros((4, 4), np.uint8), format="JPEG"), "a JPEG of mode L"),
        (encoded(blocks(99, 99, 1, 0))[:200], "seg.png cannot be decoded: image file is truncated"),
        (b"no picture", "seg.png: image cannot be decoded"),
        (None, "no member 'seg.png'"),
    ],
)
def test_unusable_maps_are_named(member: bytes | None, message: str) -> None:
    members = {"other.png": b""} if member is None else {"seg.png": member}
    sample = drawn(np.zeros((4, 4), np.uint8), **members)
    with pytest.raises(SampleError, match=message):
        segmentation_example(
            sample, SegmentationLabels(num_classes=4), SegmentationTransform(), None
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_classes": 1}, "num_classes is 1"),
        ({"num_classes": 3, "names": ("a", "b")}, "2 names for num_classes 3"),
        ({"num_classes": 256}, "ignore_index is 255, which is one of the 256"),
        ({"num_classes": 9, "zero_is_ignored": True, "instance_field": "x"}, "zero_is_ignored"),
    ],
)
def test_labels_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SegmentationLabels(**settings)


@given(
    height=st.integers(12, 90),
    width=st.integers(12, 90),
    crop=st.sampled_from([16, 32, 48]),
    seed=st.integers(0, 2**31 - 1),
)
def test_the_map_follows_the_picture(height: int, width: int, crop: int, seed: int) -> None:
    sample = drawn(blocks(height, width, min(height, width) // 2, seed))
    labels = SegmentationLabels(num_classes=4)
    transform = SegmentationTransform(crop=crop, scale=(1.0, 2.0), distortion=False)
    rng = np.random.default_rng(seed)
    _, (picture,), classes = segmentation_example(sample, labels, transform, rng)
    assert picture.shape == (3, crop, crop) and classes.shape == (crop, crop)
    inside = classes != 255
    grey = picture[0].numpy().astype(int)
    # blurred by the resizing at the borders of blocks only
    difference = np.abs(grey - GREYS[np.where(inside, classes, 0)].astype(int))[inside.numpy()]
    assert np.median(difference) <= 1
    # what is filled up lies at the right and the bottom, in the mean colour, and is ignored
    assert bool((picture[:, ~inside] == torch.tensor([124, 116, 104])[:, None]).all())
    rows, columns = inside.any(1).sum(), inside.any(0).sum()
    assert bool(inside[:rows, :columns].all())


def test_the_same_generator_gives_the_same_example_and_another_another() -> None:
    _, sample = scene_sample(ScenesConfig(image_size=96), 11)
    transform = SegmentationTransform(crop=64)

    def example(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(seed + 1000)  # nothing may come from the global generator
        rng = np.random.default_rng(seed)
        _, (picture,), classes = segmentation_example(sample, SCENE_LABELS, transform, rng)
        return picture, classes

    (first, first_map), (again, again_map), (other, _) = example(5), example(5), example(6)
    assert torch.equal(first, again) and torch.equal(first_map, again_map)
    assert not torch.equal(first, other)


def test_crops_in_which_one_class_prevails_are_drawn_again() -> None:
    classes = np.zeros((128, 128), np.uint8)
    classes[:, 56:72] = 1
    sample, labels = drawn(classes), SegmentationLabels(num_classes=4)

    def share_of_the_commonest(cat_max_ratio: float) -> list[float]:
        transform = SegmentationTransform(
            crop=32, scale=(4.0, 4.0), cat_max_ratio=cat_max_ratio, distortion=False
        )
        maps = [
            segmentation_example(sample, labels, transform, np.random.default_rng(seed)).labels
            for seed in range(100)
        ]
        return [float((m == m.mode().values.mode().values).float().mean()) for m in maps]

    chosen, first = (np.array(share_of_the_commonest(ratio)) for ratio in (0.75, 1.0))
    assert (chosen < 0.75).mean() > 0.8 > 0.5 > (first < 0.75).mean()


def test_distortion_changes_colours_and_nothing_else() -> None:
    sample = drawn(blocks(64, 64, 16, 0))
    labels = SegmentationLabels(num_classes=4)
    plain, distorted = (
        segmentation_example(
            sample,
            labels,
            SegmentationTransform(crop=32, distortion=on),
            np.random.default_rng(8),
        )
        for on in (False, True)
    )
    assert torch.equal(plain.labels, distorted.labels)
    assert not torch.equal(plain.views[0], distorted.views[0])


def test_evaluation_takes_the_whole_picture_at_every_scale() -> None:
    classes = blocks(60, 100, 12, 1)
    transform = SegmentationTransform(crop=48, test_scales=(1.0, 2.0))
    labels = SegmentationLabels(num_classes=4)
    example = segmentation_example(drawn(classes), labels, transform, None)
    # shorter side 48, so 48 x 80, rounded up to multiples of 32; twice that 96 x 160
    assert [tuple(view.shape) for view in example.views] == [(3, 64, 96), (3, 96, 160)]
    np.testing.assert_array_equal(example.labels, classes)
    # a long picture: its longer side is bounded by 4 crops
    long = segmentation_example(drawn(blocks(10, 200, 5, 1)), labels, transform, None)
    assert long.views[0].shape == (3, 32, 192)
    batch = segmentation_collate([example, long])
    assert batch["keys"] == ["drawn", "drawn"]
    assert [len(pictures) for pictures in batch["views"]] == [2, 2]


@pytest.mark.parametrize(
    "settings",
    [
        {"crop": 0},
        {"max_ratio": 0.5},
        {"scale": (2.0, 0.5)},
        {"cat_max_ratio": 0.0},
        {"flip": 1.5},
        {"test_scales": ()},
        {"test_scales": (0.0,)},
    ],
)
def test_a_transform_that_cannot_be_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="transform"):
        SegmentationTransform(**settings)
