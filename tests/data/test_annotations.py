import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groundwork.data.annotations import (
    AnnotationError,
    Annotations,
    Box,
    Depth,
    Question,
    Rle,
    annotations_from_info,
    clip_box,
    segmentation_mask,
)
from groundwork.data.samples import Sample, SampleError

TEXT = "a cat beside two dogs"

words = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
identifiers = st.none() | st.integers(-(2**60), 2**60) | words


@st.composite
def boxes(draw: st.DrawFn) -> Box:
    x0, y0 = draw(st.floats(0, 60)), draw(st.floats(0, 40))
    x1 = draw(st.floats(x0, 64).filter(lambda edge: edge > x0))
    y1 = draw(st.floats(y0, 48).filter(lambda edge: edge > y0))
    begin = draw(st.integers(0, len(TEXT) - 1))
    segmentations = (
        st.none()
        | st.just(((0.0, 0.0, 4.5, 0.0, 4.5, 8.0),))
        | st.just(Rle((48, 64), (100, 5, 64 * 48 - 105)))
        | st.just(Rle((48, 64), "SS30b>1O1O0"))
    )
    return Box(
        xyxy=(x0, y0, x1, y1),
        label=draw(st.none() | st.integers(0, 1202)),
        category=draw(words),
        crowd=draw(st.booleans()),
        area=draw(st.floats(0, 4000)),
        segmentation=draw(segmentations),
        spans=draw(st.sampled_from(((), ((begin, begin + 1),), ((0, 5), (begin, len(TEXT)))))),
        pair=draw(st.none() | st.integers(1, 9)),
        id=draw(identifiers),
    )


annotations = st.builds(
    Annotations,
    width=st.just(64),
    height=st.just(48),
    label=st.none() | st.integers(0, 999),
    captions=st.lists(words, max_size=3).map(tuple),
    boxes=st.lists(boxes(), max_size=3).map(tuple),
    has_boxes=st.just(True),
    absent_labels=st.lists(st.integers(0, 9), max_size=3).map(tuple),
    partial_labels=st.lists(st.integers(0, 9), max_size=3).map(tuple),
    qa=st.lists(
        st.builds(
            Question, words, st.lists(words, max_size=3).map(tuple), identifiers,
            st.sampled_from(("", "yes/no")),
        ), max_size=2
    ).map(tuple),
    depth=st.none() | st.just(Depth("relative", "bright")),
    fps=st.none() | st.floats(1, 60),
    frames=st.none() | st.integers(1, 900),
    begin_s=st.none() | st.floats(0, 60),
    end_s=st.none() | st.floats(0, 60),
    source=st.dictionaries(words, st.integers(0, 9), max_size=2),
)  # fmt: skip


@given(annotations)
@settings(max_examples=60)
def test_what_is_written_to_a_tar_is_what_is_read(known: Annotations) -> None:
    sample = Sample("k", b"image", "jpg", TEXT, known.to_info())
    info = json.loads(sample.fields()["json"])
    assert annotations_from_info(info, TEXT) == known


def test_nothing_known_is_nothing_written() -> None:
    assert Annotations().to_info() == {}
    assert annotations_from_info({}) == Annotations()
    assert annotations_from_info({"label": -1, "name": "of another source"}) == Annotations()


def test_a_picture_without_boxes_differs_from_one_nobody_looked_at() -> None:
    looked = Annotations(width=4, height=4, has_boxes=True)
    assert looked.to_info() == {"width": 4, "height": 4, "boxes": []}
    assert annotations_from_info(looked.to_info()).has_boxes
    assert not annotations_from_info({"width": 4, "height": 4}).has_boxes


def test_a_box_without_an_area_has_its_own() -> None:
    assert Box((1.0, 2.0, 4.0, 4.0)).area == 6
    info = {"width": 9, "height": 9, "boxes": [{"xyxy": [1, 2, 4, 4]}]}
    assert annotations_from_info(info).boxes[0].area == 6


BOX = {"xyxy": [0, 0, 2, 2]}
SQUARE = {"size": [4, 4], "counts": [0, 16]}


@pytest.mark.parametrize(
    "info, complaint",
    [
        ({"boxes": [BOX]}, "neither json.width nor json.height"),
        ({"width": 4}, "give both"),
        ({"width": 0, "height": 4}, "json.width is 0"),
        ({"width": 4.0, "height": 4}, "json.width is 4.0"),
        ({"label": "cat"}, "json.label is 'cat'"),
        ({"label": True}, "json.label is True"),
        ({"label": -2}, "json.label is -2"),
        ({"captions": "a cat"}, "json.captions is 'a cat'"),
        ({"captions": [1]}, "json.captions"),
        ({"source": []}, "json.source"),
        ({"fps": -1.0}, "json.fps is -1.0"),
        ({"frames": 0}, "json.frames is 0"),
        ({"absent_labels": [None]}, "json.absent_labels"),
        ({"depth": {"unit": "m", "near": "dark"}}, "json.depth"),
        ({"depth": "mm"}, "json.depth"),
        ({"qa": [{"question": ""}]}, r"json.qa\[0\].question"),
        ({"qa": [{"question": "?", "answers": "yes"}]}, r"json.qa\[0\].answers"),
        ({"qa": [[]]}, r"json.qa\[0\]"),
        ({"boxes": {}}, "json.boxes"),
        ({"boxes": [BOX, 3]}, r"json.boxes\[1\] is 3"),
        ({"boxes": [{"xyxy": [0, 0, 2]}]}, r"json.boxes\[0\].xyxy"),
        ({"boxes": [{"xyxy": [0, 0, 2, math.nan]}]}, "xyxy"),
        ({"boxes": [{"xyxy": [0, 0, 2, 10**400]}]}, "xyxy"),
        ({"boxes": [{"xyxy": [2, 0, 2, 2]}]}, "edges in order"),
        ({"boxes": [{"xyxy": [0, 0, 2, 4.1]}]}, "inside of 4 x 4"),
        ({"boxes": [{"xyxy": [-1, 0, 2, 2]}]}, "inside of 4 x 4"),
        ({"boxes": [BOX | {"label": -1}]}, "label is -1"),
        ({"boxes": [BOX | {"category": 7}]}, "category is 7"),
        ({"boxes": [BOX | {"crowd": 1}]}, "crowd is 1"),
        ({"boxes": [BOX | {"area": "big"}]}, "area is 'big'"),
        ({"boxes": [BOX | {"pair": "a"}]}, "pair is 'a'"),
        ({"boxes": [BOX | {"id": 1.5}]}, "id is 1.5"),
        ({"boxes": [BOX | {"spans": [[3, 3]]}]}, "spans is .3, 3."),
        ({"boxes": [BOX | {"spans": [[0, 99]]}]}, "which has 21 characters"),
        ({"boxes": [BOX | {"spans": [[0]]}]}, "spans"),
        ({"boxes": [BOX | {"segmentation": []}]}, "expected polygons"),
        ({"boxes": [BOX | {"segmentation": [[0, 0, 1, 1]]}]}, "three points"),
        ({"boxes": [BOX | {"segmentation": [[0, 0, 1, 1, 2, 2, 3]]}]}, "three points"),
        ({"boxes": [BOX | {"segmentation": SQUARE | {"size": [4, 5]}}]}, "size is .4, 5."),
        ({"boxes": [BOX | {"segmentation": SQUARE | {"counts": [0, 15]}}]}, "add up to 15"),
        ({"boxes": [BOX | {"segmentation": SQUARE | {"counts": [17, -1]}}]}, "counts"),
        ({"boxes": [BOX | {"segmentation": SQUARE | {"counts": "a b"}}]}, "counts is 'a b'"),
    ],
)
def test_a_wrong_field_is_named(info: dict[str, object], complaint: str) -> None:
    size = {"width": 4, "height": 4} if "boxes" in info and len(info) == 1 else {}
    if complaint.startswith("neither"):
        size = {}
    with pytest.raises(AnnotationError, match=complaint) as error:
        annotations_from_info({**size, **info}, TEXT)
    assert isinstance(error.value, SampleError)  # so that a stream replaces the sample


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(
        ["xyxy", "segmentation", "size", "counts", "spans", "label", "question", "answers", "id"]
    ), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip


@given(
    st.dictionaries(
        st.sampled_from(
            ["width", "height", "boxes", "qa", "captions", "label", "depth", "fps", "source"]
        ),
        json_values,
    )
)
@settings(max_examples=200)
def test_any_json_is_read_or_refused(info: dict[str, object]) -> None:
    try:
        known = annotations_from_info(info)
    except AnnotationError:
        return
    assert annotations_from_info(json.loads(json.dumps(known.to_info()))) == known


@pytest.mark.parametrize(
    "xyxy, expected",
    [
        ((1.0, 1.0, 3.0, 3.0), (1.0, 1.0, 3.0, 3.0)),
        ((-5.0, -1.0, 99.0, 99.0), (0.0, 0.0, 8.0, 6.0)),
        ((8.0, 0.0, 9.0, 6.0), None),
        ((3.0, 3.0, 3.0, 5.0), None),
        ((5.0, 5.0, 3.0, 3.0), None),
        ((math.nan, 0.0, 3.0, 3.0), None),
        ((0.0, 0.0, math.inf, 3.0), None),
    ],
)
def test_boxes_are_cut_to_the_picture(
    xyxy: tuple[float, float, float, float], expected: tuple[float, ...] | None
) -> None:
    assert clip_box(xyxy, 8, 6) == expected


def test_masks_of_polygons_and_run_lengths() -> None:
    square = segmentation_mask(((1.0, 2.0, 5.0, 2.0, 5.0, 4.0, 1.0, 4.0),), 6, 8)
    expected = np.zeros((6, 8), bool)
    expected[2:4, 1:5] = True
    np.testing.assert_array_equal(square, expected)
    # column by column: the first column, then half of the second
    runs = segmentation_mask(Rle((6, 8), (0, 6, 3, 3, 36)), 6, 8)
    columns = np.zeros((6, 8), bool)
    columns[:, 0] = columns[3:, 1] = True
    np.testing.assert_array_equal(runs, columns)
