"""Where exports come from: runs of pretraining and of fine-tuning, and official weights."""

from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from torch import nn

from groundwork.data.shard_index import ShardError
from groundwork.data.shards import MANIFEST, read_concepts, read_manifest
from groundwork.data.transforms import ImageTransform
from groundwork.pretrain.downstream.finetuning.checkpoint import (
    AVERAGE,
    finetuned_weights,
    is_finetuned,
    read_finetune_state,
)
from groundwork.pretrain.engine.checkpoint import CheckpointError, require_checkpoint
from groundwork.pretrain.models.internimage import InternImage, InternImageConfig
from groundwork.pretrain.models.internimage_weights import OfficialWeightsError
from groundwork.pretrain.models.klite import KliteConfig
from groundwork.pretrain.recipe_file import recipe_from_values, recipe_to_dict
from groundwork.pretrain.weights.export_error import ExportError
from groundwork.pretrain.weights.exportable import Exportable
from groundwork.pretrain.weights.internimage import load_internimage
from groundwork.pretrain.weights.trained import Trained, load_trained

#: Part of an image-text model: the image tower, or the teacher that follows it (M3I).
Tower = Literal["image", "teacher"]

#: Of the backbone's parameters in a model of fine-tuning.
PREFIX = "backbone."
AVERAGED = " The weights are averages over the steps."


def find_exportable(
    path: Path,
    *,
    ema: bool = False,
    tower: Tower | None = None,
    variant: str | None = None,
    num_classes: int | None = None,
    size: int | None = None,
) -> Exportable:
    """The model at `path`: a run, one of its checkpoints, or with `variant` official weights.

    num_classes, size: of official weights only, 1000 and 224 unless given. Raises ExportError for
    options that do not go together, CheckpointError where nothing fitting is there.
    """
    if variant is None:
        for option, value in (("--num-classes", num_classes), ("--size", size)):
            if value is not None:
                raise ExportError(
                    f"{option}: of official weights only, as a run knows its own; leave it out, or "
                    "say which --variant the file holds"
                )
        checkpoint = require_checkpoint(path)
        if is_finetuned(checkpoint):
            if tower is not None:
                raise ExportError(f"--tower {tower}: of image-text models only; leave it out")
            return exportable_finetuned(checkpoint, ema=ema)
        return exportable(load_trained(checkpoint, ema=ema), tower=tower, ema=ema)
    for option, given in (("--ema", ema), ("--tower", tower)):
        if given:
            raise ExportError(f"{option}: of runs only, not of official weights; leave it out")
    try:
        config = InternImageConfig.variant(variant)
        if num_classes is not None:
            config = replace(config, num_classes=num_classes)
        transform = ImageTransform(size=224 if size is None else size)
    except ValueError as error:
        raise ExportError(f"--variant {variant}: {error}") from error
    return exportable_official(path, config, transform)


def exportable(trained: Trained, *, tower: Tower | None = None, ema: bool = False) -> Exportable:
    """The model of a pretraining run. tower: only that part of an image-text model.

    ema: the weights are averages, for the model card.
    """
    recipe, state = trained.recipe, trained.state
    digests = {"samples": state.dataset, "class names": state.concepts}
    digests["knowledge"] = state.knowledge
    listed = "; ".join(f"{name} `{digest}`" for name, digest in digests.items() if digest)
    origin = (
        f"Pretrained with groundwork {version('groundwork-pretrain')} on `{recipe.data.where}` "
        f"(manifests: {listed}), {state.step:,} steps, {state.position:,} samples seen."
        + (AVERAGED if ema else "")
    )
    classes = getattr(recipe.model, "num_classes", 0)
    labels, licence = described(recipe.data.shards, state.dataset, classes)
    whole = Exportable(
        trained.model,
        recipe.model,
        recipe.data.image,
        origin + licence,
        recipe_to_dict(recipe),
        trained.tokenizer,
        labels,
    )
    return whole if tower is None else tower_of(whole, trained.objective, tower)


def exportable_finetuned(checkpoint: Path, *, ema: bool = False) -> Exportable:
    """The classifier of a fine-tuning run; of a detector or segmenter, its backbone.

    ema: the averaged weights. Raises CheckpointError.
    """
    state = read_finetune_state(checkpoint)
    if ema and not (checkpoint / AVERAGE).is_file():
        raise CheckpointError(
            f"{checkpoint}: no averages of the weights in it; fine-tune with a section `ema`, or "
            "export the weights themselves"
        )
    task, source = state.recipe["task"], str(checkpoint)
    config = recipe_from_values(InternImageConfig, state.recipe["backbone"], source)
    is_classifier = task["kind"] == "classification"
    if is_classifier:
        config = replace(config, num_classes=state.classes or 0)
        image = recipe_from_values(ImageTransform, task["image"], source)
    else:
        config = replace(config, num_classes=0, use_clip_projector=False)
        image = ImageTransform()
    weights = finetuned_weights(checkpoint, ema=ema)
    model = InternImage(config)
    own = {n.removeprefix(PREFIX): v for n, v in weights.items() if n.startswith(PREFIX)}
    try:
        model.load_official(own)
    except OfficialWeightsError as error:
        raise CheckpointError(f"{checkpoint}: {error}") from error
    what = "" if is_classifier else " This is the backbone alone, without neck and heads."
    origin = (
        f"Fine-tuned with groundwork {version('groundwork-pretrain')} for {task['kind']} on "
        f"`{state.recipe['data']['shards']}` (manifest: `{state.dataset}`), {state.step:,} steps, "
        f"from `{(state.recipe.get('weights') or {}).get('path', 'fresh weights')}`."
        + (AVERAGED if ema else "")
        + what
    )
    shards = state.recipe["data"]["shards"]
    labels, licence = described(shards, state.dataset, config.num_classes)
    return Exportable(model.eval(), config, image, origin + licence, state.recipe, labels=labels)


def described(shards: str | None, digest: str, classes: int) -> tuple[tuple[str, ...], str]:
    """The names of the classes, and a sentence with the data's licence, if the data set is at hand.

    shards: as in recipes. digest: of the data set as it was trained on; a changed one says nothing.
    """
    folder = Path(shards or "")
    if shards is None or not (folder / MANIFEST).is_file():
        return (), ""
    try:
        manifest, concepts = read_manifest(folder), read_concepts(folder)
    except (ShardError, OSError):
        return (), ""
    if not digest.startswith(manifest.digest()):
        return (), ""
    named = {concept.label: concept.name for concept in concepts}
    names = tuple(named.get(i, f"LABEL_{i}") for i in range(classes)) if named else ()
    return names, f" The data's licence: {manifest.licence}."


def tower_of(whole: Exportable, objective: nn.Module, tower: Tower) -> Exportable:
    """The image tower of an image-text model, or its momentum teacher, as a model of its own."""
    if tower not in ("image", "teacher"):
        raise ExportError(f"--tower {tower}: unknown; choose image or teacher")
    if not isinstance(whole.config, KliteConfig):
        raise ExportError(
            f"--tower {tower}: the model is {whole.config.kind}, which is an image model as a "
            "whole; leave the option out"
        )
    config = whole.config.image
    if not isinstance(config, InternImageConfig):
        raise ExportError(
            f"--tower {tower}: the tower is {config.kind}, and only internimage has formats of its "
            "own; leave the option out"
        )
    model = whole.model.visual if tower == "image" else getattr(objective, "teacher", None)
    if not isinstance(model, InternImage):
        raise ExportError(
            "--tower teacher: the run has no momentum teacher (objective m3i with a dense_weight "
            "above 0 has); choose --tower image"
        )
    return replace(whole, model=model.eval(), config=config, tokenizer=None, labels=())


def exportable_official(path: Path, config: InternImageConfig, image: ImageTransform) -> Exportable:
    """A file of official weights, for the model that `config` says.

    Raises CheckpointError where they do not fit.
    """
    model = InternImage(config)
    load_internimage(model, path)
    return Exportable(
        model.eval(),
        config,
        image,
        f"Converted by groundwork {version('groundwork-pretrain')} from `{path.name}`.",
    )


def read_labels(path: Path) -> tuple[str, ...]:
    """The class names of a text file, one per line. Raises ExportError."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ExportError(f"--labels {path}: cannot be read: {error}") from error
    empty = [number for number, line in enumerate(lines, 1) if not line.strip()]
    if empty:
        raise ExportError(f"--labels {path}:{empty[0]}: an empty line; give one name per line")
    return tuple(line.strip() for line in lines)
