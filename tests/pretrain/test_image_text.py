"""Samples of images and texts: what their records may say."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from groundwork.data.samples import Sample, SampleError
from groundwork.data.transforms import ImageTransform
from groundwork.pretrain.image_text import ImageTextCollate, ImageTextDecoder, KnowledgeConfig


def sample(label: Any) -> Sample:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    return Sample("0", buffer.getvalue(), "png", "a cat", {"label": label})


DECODER = ImageTextDecoder(ImageTransform(size=4), [], ("{}",), None, KnowledgeConfig())


@pytest.mark.parametrize("label", [True, 10**20, 2**63, -2, 1.0, "1", None, [1]])
def test_a_label_that_is_no_class_index_makes_a_bad_sample(label: Any) -> None:
    with pytest.raises(SampleError, match=r"json\.label is .*; expected a class index"):
        DECODER(sample(label), np.random.default_rng(0))


@pytest.mark.parametrize("label", [-1, 0, 2**63 - 1])
def test_every_label_that_is_let_through_fits_into_a_batch(label: int) -> None:
    class Tokenizer:
        def encode(self, texts: list[str]) -> None:
            return None

    example = DECODER(sample(label), np.random.default_rng(0))
    batch = ImageTextCollate(Tokenizer())([example])  # type: ignore[arg-type]
    assert batch["labels"].tolist() == [label]
