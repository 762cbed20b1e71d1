"""Zero-shot classification with text controls (ELEVATER protocol; K-LITE, section 4).

A class is the mean of its normalised prompt features, over knowledge items and templates. Knowledge
is only worth what it adds over text of the same shape, so each result comes with four texts:

    plain      the name alone
    knowledge  the name, and what WordNet says about it
    shuffled   the name, and what WordNet says about another class
    random     the name, and as many words drawn at random from all glosses
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from groundwork.data.dataset import Dataset
from groundwork.data.knowledge.augment import augment_prompt, knowledge_items
from groundwork.data.knowledge.index import KnowledgeIndex
from groundwork.data.knowledge.templates import clean_class_name
from groundwork.data.samples import Concept, SampleError, class_label
from groundwork.data.text import ClipTokenizer
from groundwork.data.transforms import ImageTransform, evaluation_image

Control = Literal["plain", "knowledge", "shuffled", "random"]
CONTROLS: Final[tuple[Control, ...]] = ("plain", "knowledge", "shuffled", "random")

#: The subset of CLIP's 80 ImageNet templates that its authors found to do nearly as well as all.
TEMPLATES: Final = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
BOOTSTRAP_DRAWS: Final = 2000


@dataclass(frozen=True)
class Pictures:
    """Image features (S, D) of a split, the label (S,) and dataset number (S,) of each sample."""

    features: Tensor
    labels: NDArray[np.int64]
    numbers: NDArray[np.int64]


@dataclass(frozen=True)
class Score:
    """Accuracy in percent, with the 95 % interval of a bootstrap over classes."""

    value: float
    low: float
    high: float


def knowledge_texts(
    concepts: Sequence[Concept], index: KnowledgeIndex, control: Control, seed: int = 0
) -> list[list[str]]:
    """Per concept the knowledge items of a control; an empty list where there is no knowledge.

    `shuffled` gives every concept with knowledge the items of another one; `random` replaces each
    word of each item by a word drawn from the words of all items.
    """
    if control == "plain":
        return [[] for _ in concepts]
    items = [knowledge_items(index, concept.name) for concept in concepts]
    if control == "knowledge":
        return items
    rng = np.random.default_rng(seed)
    if control == "shuffled":
        known = [i for i, own in enumerate(items) if own]
        # one cycle through all of them: nobody keeps its own
        cycle = rng.permutation(known)
        for i, other in zip(cycle, np.roll(cycle, 1), strict=True):
            items[i] = knowledge_items(index, concepts[other].name)
        return items
    words = [word for own in items for item in own for word in item.split()]
    return [[" ".join(rng.choice(words, len(item.split()))) for item in own] for own in items]


def class_prompts(name: str, items: Sequence[str]) -> list[str]:
    """Every template with every knowledge item; the templates alone where there is none."""
    name = clean_class_name(name)
    if not items:
        return [template.format(name) for template in TEMPLATES]
    return [augment_prompt(template, name, item) for item in items for template in TEMPLATES]


@torch.no_grad()
def class_features(
    model: nn.Module,
    tokenizer: ClipTokenizer,
    concepts: Sequence[Concept],
    items: Sequence[Sequence[str]],
    batch: int = 512,
) -> Tensor:
    """Normalised class features. items: knowledge per concept -> (K, D)."""
    prompts = [class_prompts(c.name, own) for c, own in zip(concepts, items, strict=True)]
    texts = [text for own in prompts for text in own]
    # texts of like length are encoded together, cut after the longest: padding costs like text
    ids = tokenizer.encode(texts)
    order = (ids != 0).sum(1).argsort()
    features = []
    for rows in order.split(batch):
        length = int((ids[rows] != 0).sum(1).max())
        features.append(model(ids=ids[rows, :length]))
    encoded = torch.empty_like(torch.cat(features))
    encoded[order] = torch.cat(features)
    means = torch.stack([part.mean(0) for part in encoded.split([len(own) for own in prompts])])
    return F.normalize(means, dim=-1)


@torch.no_grad()
def picture_features(
    objective: nn.Module, dataset: Dataset, transform: ImageTransform, batch: int = 256
) -> Pictures:
    """Encode every picture of a split; a bad one, or one of no concept, raises SampleError."""
    known = {concept.label for concept in dataset.concepts}
    labels, numbers, features, images = [], [], [], []
    for number in range(len(dataset)):
        try:
            sample = dataset.read(number)
            label = class_label(sample)
            if label not in known:
                raise SampleError(
                    f"json.label is {label}, which is none of the data set's concepts"
                )
            images.append(evaluation_image(sample.image, transform))
        except SampleError as error:
            shard, key = dataset.where(number)
            raise SampleError(f"{shard}: sample {key!r}: {error}") from error
        labels.append(label)
        numbers.append(number)
        if len(images) == batch or number == len(dataset) - 1:
            pixels = objective.normalise(torch.stack(images), torch.float32)  # type: ignore[operator]
            features.append(objective.model(image=pixels))  # type: ignore[operator]
            images = []
    return Pictures(torch.cat(features), np.array(labels), np.array(numbers))


def rank_of_truth(pictures: Pictures, classes: Tensor, labels: Sequence[int]) -> NDArray[np.int64]:
    """How many classes score above the true one, per picture: 0 is a hit. classes: (K, D) -> (S,).

    labels: of the K classes. A class that scores the same as the true one counts against it.
    """
    column = {label: i for i, label in enumerate(labels)}
    truth = torch.tensor([column[int(label)] for label in pictures.labels])
    scores = pictures.features @ classes.T
    own = scores.gather(1, truth[:, None])
    return ((scores >= own).sum(1) - 1).numpy()


def bootstrap(hits: NDArray[np.float64], labels: NDArray[np.int64], seed: int = 0) -> Score:
    """Mean of `hits` in percent; classes, not pictures, are redrawn: their pictures are alike."""
    _, group = np.unique(labels, return_inverse=True)
    sums, counts = np.bincount(group, hits), np.bincount(group)
    draws = np.random.default_rng(seed).integers(len(sums), size=(BOOTSTRAP_DRAWS, len(sums)))
    means = sums[draws].sum(1) / counts[draws].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Score(100 * float(hits.mean()), 100 * float(low), 100 * float(high))


def scores(
    ranks: Mapping[Control, NDArray[np.int64]], labels: NDArray[np.int64]
) -> dict[str, dict[str, Score]]:
    """top1 and top5 of every control, and what knowledge gains in top1 over the others (paired)."""
    result: dict[str, dict[str, Score]] = {}
    for control, rank in ranks.items():
        result[control] = {
            "top1": bootstrap((rank < 1).astype(np.float64), labels),
            "top5": bootstrap((rank < 5).astype(np.float64), labels),
        }
    if "knowledge" in ranks:
        for control in ranks:
            if control != "knowledge":
                gain = (ranks["knowledge"] < 1).astype(np.float64) - (ranks[control] < 1)
                result["knowledge"][f"gain_over_{control}"] = bootstrap(gain, labels)
    return result
