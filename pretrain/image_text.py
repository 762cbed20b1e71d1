"""Image-label and image-text samples -> the batches of the contrastive and captioning objectives.

A sample of a class gets a fresh prompt: a random name of the class in a random template and, with
probability `knowledge.prob`, one knowledge item appended (K-LITE, section 3). A sample without a
class keeps its caption. All choices come from the generator of the sample's position in the stream.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from groundwork.data.dataset import Dataset
from groundwork.data.decode import JpegCrop
from groundwork.data.diagnosis import Diagnosis
from groundwork.data.knowledge.augment import augment_prompt, training_path_text
from groundwork.data.knowledge.index import KnowledgeIndex
from groundwork.data.knowledge.senses import Knowledge, find_knowledge
from groundwork.data.knowledge.templates import TRAINING_TEMPLATES, clean_class_name
from groundwork.data.samples import Concept, Sample, SampleError, class_label
from groundwork.data.stream import Stream
from groundwork.data.text import ALPHABET_SIZE, ClipTokenizer, load_tokenizer, train_tokenizer
from groundwork.data.transforms import ImageTransform, training_image
from groundwork.pretrain.objectives.contrastive import UNIQUE
from groundwork.pretrain.training_data import (
    LABELS_PER_SOURCE,
    DataConfig,
    TrainingData,
    make_stream,
    open_datasets,
    open_knowledge_index,
)


@dataclass(frozen=True)
class TokenizerConfig:
    """path: folder of a CLIP / Hugging Face tokenizer (or OpenAI's gzipped merges).

    Without a path a vocabulary of at most `vocab_size` is learnt from the data set's names and
    captions and from the glosses of the knowledge index, and saved in the run's folder.
    """

    path: str | None = None
    vocab_size: int = 8192

    def __post_init__(self) -> None:
        least = ALPHABET_SIZE + 2
        if self.path is None and self.vocab_size < least:
            raise ValueError(
                f"data.tokenizer.vocab_size is {self.vocab_size}; it must be at least {least}, the "
                "bytes and the special tokens"
            )


@dataclass(frozen=True)
class KnowledgeConfig:
    """index: a `.gkb` file, or null for none. prob: share of class prompts that carry knowledge.

    sources: what an item may be: `wn_def` the gloss, `wn_path` the chain of hypernyms.
    """

    index: str | None = None
    prob: float = 0.5
    sources: tuple[Literal["wn_def", "wn_path"], ...] = ("wn_def", "wn_path")

    def __post_init__(self) -> None:
        if not 0 <= self.prob <= 1:
            raise ValueError(f"data.knowledge.prob is {self.prob}; it is a probability, 0 to 1")
        if not self.sources:
            raise ValueError(
                "data.knowledge.sources is []; name wn_def, wn_path or both (index: null turns "
                "knowledge off)"
            )


@dataclass(frozen=True)
class ImageTextConfig(DataConfig):
    """The `data` section of image-text training.

    templates: `imagenet` draws from the 81 training templates, `plain` uses the bare name.
    """

    kind: Literal["image_text"] = "image_text"
    templates: Literal["imagenet", "plain"] = "imagenet"
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    knowledge: KnowledgeConfig = field(default_factory=KnowledgeConfig)


class Example(NamedTuple):
    """image: (3, S, S) uint8. label: class index, or UNIQUE."""

    image: Tensor
    text: str
    label: int


class ImageTextDecoder:
    """Sample -> Example. Used by every worker; the knowledge index is memory-mapped.

    first_label: added to class indices, so that those of other data sets are other classes.
    jpeg_crop: decodes parts of JPEGs, see `training_image`.
    """

    def __init__(
        self,
        image: ImageTransform,
        concepts: Sequence[Concept],
        templates: Sequence[str],
        index: KnowledgeIndex | None,
        knowledge: KnowledgeConfig,
        first_label: int = 0,
        jpeg_crop: JpegCrop | None = None,
    ) -> None:
        self.image = image
        self.first_label = first_label
        self.jpeg_crop = jpeg_crop
        self.names = {
            concept.label: tuple(map(clean_class_name, (concept.name, *concept.aliases)))
            for concept in concepts
        }
        self.templates = templates
        self.index = index
        self.knowledge = knowledge
        self._found: dict[str, Knowledge | None] = {}

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Example:
        label = class_label(sample)
        image = training_image(sample.image, self.image, rng, jpeg_crop=self.jpeg_crop)
        if label == UNIQUE:
            if not sample.text:
                raise SampleError(
                    "neither a class (json.label) nor a caption (txt)", Diagnosis.MISSING_CAPTION
                )
            return Example(image, sample.text, UNIQUE)
        prompt = self.prompt(label, sample.text, rng)
        if self.first_label and label >= LABELS_PER_SOURCE:
            raise SampleError(
                f"json.label is {label}; in a mixture at most {LABELS_PER_SOURCE:,}",
                Diagnosis.BAD_LABEL,
            )
        return Example(image, prompt, self.first_label + label)

    def prompt(self, label: int, text: str, rng: np.random.Generator) -> str:
        """A fresh prompt for a class. text: stands in for the name of a class without concept."""
        names = self.names.get(label) or (clean_class_name(text),)
        name = names[int(rng.integers(len(names)))]
        template = self.templates[int(rng.integers(len(self.templates)))]
        if self.index is None or rng.random() >= self.knowledge.prob:
            return template.format(name)
        return augment_prompt(template, name, self._knowledge_text(names[0], rng))

    def _knowledge_text(self, name: str, rng: np.random.Generator) -> str | None:
        assert self.index is not None
        if name not in self._found:
            self._found[name] = find_knowledge(self.index, name)
        found = self._found[name]
        if found is None:
            return None
        if self.knowledge.sources[int(rng.integers(len(self.knowledge.sources)))] == "wn_def":
            return found.gloss
        sense = self.index.find_sense(found.sense_id)
        return None if sense is None else training_path_text(self.index, sense, rng)


@dataclass(frozen=True)
class ImageTextCollate:
    """Examples -> {"image": (B, 3, S, S) uint8, "ids": (B, N) int64, "labels": (B,) int64}."""

    tokenizer: ClipTokenizer

    def __call__(self, examples: list[Example]) -> dict[str, Tensor]:
        return {
            "image": torch.stack([example.image for example in examples]),
            "ids": self.tokenizer.encode([example.text for example in examples]),
            "labels": torch.tensor([example.label for example in examples]),
        }


def make_tokenizer(
    config: TokenizerConfig, data: TrainingData, context_length: int
) -> ClipTokenizer:
    """Load the tokenizer a recipe names, or learn one from the data and its knowledge."""
    if config.path is not None:
        return load_tokenizer(Path(config.path), context_length)
    return train_tokenizer(_corpus(data), config.vocab_size, context_length)


def _corpus(data: TrainingData) -> Iterator[str]:
    """Names, templates and, per concept, knowledge; captions of data sets without concepts."""
    yield from TRAINING_TEMPLATES
    for dataset in data.datasets.values():
        yield from _texts(dataset, data.knowledge)


def _texts(dataset: Dataset, index: KnowledgeIndex | None) -> Iterator[str]:
    for concept in dataset.concepts:
        yield from (concept.name, *concept.aliases)
        found = None if index is None else find_knowledge(index, concept.name)
        if found is not None:
            yield augment_prompt("{}", concept.name, found.gloss)
            yield " , ".join(found.path)
    if not dataset.concepts:
        # evenly spaced, so that the first shards do not decide the vocabulary
        numbers = np.linspace(0, len(dataset) - 1, min(len(dataset), 100_000)).astype(int)
        for some in np.array_split(numbers, -(-len(numbers) // 256)):
            for sample in dataset.read_many(some.tolist()):
                if not isinstance(sample, SampleError):
                    yield sample.text


TEMPLATES: Mapping[str, Sequence[str]] = {"imagenet": TRAINING_TEMPLATES, "plain": ("{}",)}


def open_stream(config: ImageTextConfig, data: TrainingData, seed: int) -> Stream[Example]:
    """The training stream of a recipe's `data` section."""

    def decoder(dataset: Dataset, first_label: int, jpeg_crop: JpegCrop | None) -> ImageTextDecoder:
        return ImageTextDecoder(
            config.image,
            dataset.concepts,
            TEMPLATES[config.templates],
            data.knowledge,
            config.knowledge,
            first_label,
            jpeg_crop,
        )

    return make_stream(config, data, seed, decoder)


def open_training_data(config: ImageTextConfig) -> TrainingData:
    """Open what the `data` section names; every missing or damaged file is found here."""
    return TrainingData(open_datasets(config), open_knowledge_index(config.knowledge.index))
