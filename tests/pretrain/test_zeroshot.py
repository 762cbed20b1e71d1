"""Zero-shot evaluation: what a class is, what a hit is, and what the controls say."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from groundwork.data.dataset import open_dataset
from groundwork.data.knowledge.index import KnowledgeIndex
from groundwork.data.knowledge.wordnet import build_wordnet, find_wordnet
from groundwork.data.samples import Concept, Sample, SampleError
from groundwork.data.shards import write_shards
from groundwork.data.text import train_tokenizer
from groundwork.data.transforms import ImageTransform
from groundwork.pretrain.downstream.evaluation import zeroshot
from groundwork.pretrain.downstream.evaluation.zeroshot import (
    Pictures,
    bootstrap,
    class_features,
    class_prompts,
    knowledge_texts,
    picture_features,
    rank_of_truth,
    scores,
)

NAMES = ("dog", "apple", "mountain", "violin", "qwxz")
CONCEPTS = [Concept(label=10 * i, name=name) for i, name in enumerate(NAMES)]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KnowledgeIndex]:
    try:
        dictionary = find_wordnet()
    except Exception as error:
        pytest.skip(str(error))
    path = tmp_path_factory.mktemp("wordnet") / "wordnet.gkb"
    build_wordnet(dictionary, path)
    yield KnowledgeIndex(path)


def pictures(features: Tensor, labels: list[int]) -> Pictures:
    return Pictures(features, np.array(labels), np.arange(len(labels)))


def test_a_rank_counts_the_classes_that_score_no_less() -> None:
    classes = torch.eye(3)
    shown = torch.tensor([[0.9, 0.1, 0.0], [0.9, 0.1, 0.0], [0.5, 0.5, 0.1], [0.0, 0.0, 0.0]])
    ranks = rank_of_truth(pictures(shown, [7, 8, 8, 9]), classes, [7, 8, 9])
    # a tie counts against the model: one that says nothing hits nothing
    assert ranks.tolist() == [0, 1, 1, 2]


def test_controls_have_the_shape_of_knowledge_and_not_its_content(index: KnowledgeIndex) -> None:
    plain, known, shuffled, random = (
        knowledge_texts(CONCEPTS, index, control) for control in zeroshot.CONTROLS
    )
    assert plain == [[]] * 5
    assert [len(items) for items in known] == [2, 2, 2, 2, 0]
    assert sorted(map(tuple, shuffled)) == sorted(map(tuple, known))
    for own, other, words in zip(known[:4], shuffled[:4], random[:4], strict=True):
        assert own != other  # nobody keeps its own
        assert own != words
        assert [len(item.split()) for item in own] == [len(item.split()) for item in words]
    vocabulary = {word for items in known for item in items for word in item.split()}
    assert {w for items in random for item in items for w in item.split()} <= vocabulary
    assert knowledge_texts(CONCEPTS, index, "random", seed=1) != random


def test_prompts_are_every_template_with_every_item() -> None:
    assert class_prompts("dog", [])[1] == "a bad photo of the dog."
    prompts = class_prompts("dog", ["a pet", "an animal"])
    assert len(prompts) == 2 * len(zeroshot.TEMPLATES)
    assert prompts[0] == "itap of a dog. ; dog , a pet"
    assert prompts[-1] == "a photo of the small dog. ; dog , an animal"


class Texts(nn.Module):
    """Features of a text: which of its first ids are even."""

    def forward(self, ids: Tensor) -> Tensor:
        features = torch.zeros(len(ids), 6)
        width = min(6, ids.shape[1])
        features[:, :width] = (ids[:, :width] % 7 + 1).float()
        return torch.nn.functional.normalize(features, dim=-1)


def test_a_class_is_the_mean_of_its_normalised_prompts_whatever_the_batch() -> None:
    tokenizer = train_tokenizer(NAMES, 600, 16)
    items = [["a pet", "x"], [], ["stone"], [], []]
    features = class_features(Texts(), tokenizer, CONCEPTS, items, batch=4)
    for concept, own, row in zip(CONCEPTS, items, features, strict=True):
        prompts = class_prompts(concept.name, own)
        mean = torch.cat([Texts()(tokenizer.encode([text])) for text in prompts]).mean(0)
        torch.testing.assert_close(row, mean / mean.norm())


def test_the_bootstrap_redraws_classes_not_pictures() -> None:
    hits = np.repeat([1.0, 0.0], 500)
    alike = bootstrap(hits, np.repeat([1, 2], 500))
    assert (alike.value, alike.low, alike.high) == (50.0, 0.0, 100.0)
    apart = bootstrap(hits, np.arange(1000))
    # 95 % of a binomial mean of 1,000: 50 ± 3.1
    assert apart.low == pytest.approx(46.9, abs=0.5)
    assert apart.high == pytest.approx(53.1, abs=0.5)


def test_gains_are_paired() -> None:
    labels = np.arange(200)
    truth = np.arange(200) % 2
    ranks = {"plain": truth, "knowledge": np.where(labels < 20, 0, truth)}
    gain = scores(ranks, labels)["knowledge"]["gain_over_plain"]  # type: ignore[arg-type]
    assert gain.value == pytest.approx(5.0)
    # every difference is 0 or 1: paired, zero lies outside, although the intervals overlap
    assert gain.low > 1


class Objective(nn.Module):
    def normalise(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        return images.to(dtype)

    def model(self, image: Tensor) -> Tensor:
        return image.mean((2, 3))


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (3, r"sample 'b': json\.label is 3, which is none"),
        (None, r"sample 'b': json\.label is -1, which is none"),
        (True, r"json\.label is True; expected a class index"),
    ],
)
def test_a_picture_of_no_concept_is_named(tmp_path: Path, label: Any, message: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 9)).save(buffer, "PNG")
    infos = [{"label": 0}, {} if label is None else {"label": label}]
    samples = [
        ("test", Sample(key, buffer.getvalue(), "png", "x", info))
        for key, info in zip("ab", infos, strict=True)
    ]
    out = tmp_path / "d"
    write_shards(samples, out, concepts=CONCEPTS, name="d", source={}, licence="none")
    with pytest.raises(SampleError, match=message):
        picture_features(Objective(), open_dataset(str(out), "test"), ImageTransform(8))
