"""What the kinds of a recipe stand for: its model, its objective, its data.

A new model, objective or way of reading data is a file of its own, a line in the union of
`recipe.py` that names its config, and a line here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from torch import Tensor, nn

from groundwork.data.stream import Stream
from groundwork.data.text import ClipTokenizer
from groundwork.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from groundwork.pretrain.image_text import (
    ImageTextCollate,
    ImageTextConfig,
    open_stream,
    open_training_data,
)
from groundwork.pretrain.labelled_images import (
    LabelledImagesConfig,
    collate_labelled,
    labelled_stream,
    open_labelled_images,
)
from groundwork.pretrain.models.internimage import InternImage, InternImageConfig
from groundwork.pretrain.models.klite import KliteConfig, build_klite
from groundwork.pretrain.objectives.classification import Classification, ClassificationConfig
from groundwork.pretrain.objectives.m3i import M3i, M3iConfig
from groundwork.pretrain.objectives.unicl import Unicl, UniclConfig
from groundwork.pretrain.recipe import Recipe, RecipeError
from groundwork.pretrain.training_data import TrainingData

MODELS: Final[Mapping[str, Callable[[Any], nn.Module]]] = {
    "klite": build_klite,
    "internimage": InternImage,
}


def build_objective(recipe: Recipe, tokenizer: ClipTokenizer | None) -> nn.Module:
    """The module that DeepSpeed wraps: model and loss. tokenizer: where the model reads texts."""
    recipe = with_vocabulary(recipe, tokenizer)
    model = MODELS[recipe.model.kind](recipe.model)
    return OBJECTIVES[recipe.objective.kind](recipe, model)


def with_vocabulary(recipe: Recipe, tokenizer: ClipTokenizer | None) -> Recipe:
    """The recipe with the text tower's vocabulary size filled in from the tokenizer."""
    if tokenizer is None or not isinstance(recipe.model, KliteConfig):
        return recipe
    text = recipe.model.text
    if text.vocab_size is None:
        text = replace(text, vocab_size=tokenizer.vocab_size)
    elif text.vocab_size < tokenizer.vocab_size:
        raise RecipeError(
            f"model.text.vocab_size is {text.vocab_size}, but the tokenizer has "
            f"{tokenizer.vocab_size} ids; raise it, or leave it out to take the tokenizer's"
        )
    return replace(recipe, model=replace(recipe.model, text=text))


def _unicl(recipe: Recipe, model: nn.Module) -> nn.Module:
    assert isinstance(recipe.objective, UniclConfig)
    return Unicl(model, recipe.objective, mean=IMAGENET_MEAN, std=IMAGENET_STD)


def _m3i(recipe: Recipe, model: nn.Module) -> nn.Module:
    assert isinstance(recipe.objective, M3iConfig)
    return M3i(model, recipe.objective, mean=IMAGENET_MEAN, std=IMAGENET_STD)


def _classification(recipe: Recipe, model: nn.Module) -> nn.Module:
    assert isinstance(recipe.objective, ClassificationConfig)
    classes = _num_classes(recipe)
    return Classification(model, recipe.objective, classes, mean=IMAGENET_MEAN, std=IMAGENET_STD)


OBJECTIVES: Final[Mapping[str, Callable[[Recipe, nn.Module], nn.Module]]] = {
    "unicl": _unicl,
    "m3i": _m3i,
    "classification": _classification,
}


@dataclass(frozen=True)
class DataKind:
    """What a kind of `data` section comes to.

    open: finds every missing or damaged file. stream: of the recipe's samples. collate: examples ->
    batch, with the tokenizer where the model reads texts.
    """

    open: Callable[[Recipe], TrainingData]
    stream: Callable[[Recipe, TrainingData], Stream[Any]]
    collate: Callable[[ClipTokenizer | None], Callable[[list[Any]], dict[str, Tensor]]]


def _open_image_text(recipe: Recipe) -> TrainingData:
    assert isinstance(recipe.data, ImageTextConfig)
    return open_training_data(recipe.data)


def _image_text_stream(recipe: Recipe, data: TrainingData) -> Stream[Any]:
    assert isinstance(recipe.data, ImageTextConfig)
    return open_stream(recipe.data, data, recipe.train.seed)


def _image_text_collate(
    tokenizer: ClipTokenizer | None,
) -> Callable[[list[Any]], dict[str, Tensor]]:
    assert tokenizer is not None
    return ImageTextCollate(tokenizer)


def _open_labelled(recipe: Recipe) -> TrainingData:
    assert isinstance(recipe.data, LabelledImagesConfig)
    data = open_labelled_images(recipe.data)
    classes = _num_classes(recipe)
    last = max(data.concepts, key=lambda concept: concept.label, default=None)
    if last is not None and last.label >= classes:
        raise RecipeError(
            f"model.num_classes is {classes}, but {recipe.data.where} has class {last.label} "
            f"({last.name!r}); set model.num_classes to {last.label + 1}"
        )
    return data


def _labelled_stream(recipe: Recipe, data: TrainingData) -> Stream[Any]:
    assert isinstance(recipe.data, LabelledImagesConfig)
    return labelled_stream(recipe.data, data, recipe.train.seed, _num_classes(recipe))


def _num_classes(recipe: Recipe) -> int:
    assert isinstance(recipe.model, InternImageConfig)
    return recipe.model.num_classes


DATA: Final[Mapping[str, DataKind]] = {
    "image_text": DataKind(_open_image_text, _image_text_stream, _image_text_collate),
    "labelled_images": DataKind(_open_labelled, _labelled_stream, lambda _: collate_labelled),
}
