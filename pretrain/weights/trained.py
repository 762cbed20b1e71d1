"""A trained model: rebuilt from a run's folder, for evaluation and export."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from groundwork.data.text import ClipTokenizer, load_tokenizer
from groundwork.pretrain.engine.checkpoint import (
    CheckpointError,
    RunState,
    read_state,
    require_checkpoint,
    verify_files,
)
from groundwork.pretrain.kinds import build_objective, with_vocabulary
from groundwork.pretrain.models.klite import KliteConfig
from groundwork.pretrain.recipe import Recipe, recipe_from_dict
from groundwork.pretrain.run import TOKENIZER
from groundwork.pretrain.weights.zero_shards import full_buffers, full_weights


@dataclass(frozen=True)
class Trained:
    """A model in evaluation mode with float32 weights, and what it was trained by.

    recipe: with the vocabulary size filled in. tokenizer: of a model that reads texts, else None.
    objective: the module that was trained; `model` is the part of it that is exported.
    """

    checkpoint: Path
    state: RunState
    recipe: Recipe
    tokenizer: ClipTokenizer | None
    objective: nn.Module

    @property
    def model(self) -> nn.Module:
        model = self.objective.model
        assert isinstance(model, nn.Module)
        return model


def load_trained(path: Path, *, ema: bool = False) -> Trained:
    """Load a run's folder, or one of its checkpoints. Raises CheckpointError.

    ema: the averages of the weights, and of BatchNorm's statistics, which a run may keep.
    """
    checkpoint = require_checkpoint(path)
    verify_files(checkpoint)
    state = read_state(checkpoint)
    recipe = recipe_from_dict(state.recipe, str(checkpoint))
    tokenizer = None
    if isinstance(recipe.model, KliteConfig):
        folder = checkpoint.parent.parent / TOKENIZER
        tokenizer = load_tokenizer(folder, recipe.model.text.context_length)
    objective = build_objective(recipe, tokenizer)
    load_full_weights(objective, full_weights(checkpoint, ema=ema), checkpoint)
    buffers = full_buffers(checkpoint)
    if ema:
        buffers |= full_buffers(checkpoint, ema=True)
    load_full_buffers(objective, buffers, checkpoint)
    return Trained(
        checkpoint, state, with_vocabulary(recipe, tokenizer), tokenizer, objective.eval()
    )


def load_full_weights(
    objective: nn.Module, weights: dict[str, torch.Tensor], checkpoint: Path
) -> None:
    """Copy weights by name; every parameter must be given, in its shape, and nothing else."""
    own = dict(objective.named_parameters())
    problems = [f"{name} is missing" for name in sorted(own.keys() - weights.keys())]
    problems += [f"{name} is not in the model" for name in sorted(weights.keys() - own.keys())]
    problems += [
        f"{name} is {tuple(weights[name].shape)}, the model has {tuple(own[name].shape)}"
        for name in sorted(own.keys() & weights.keys())
        if weights[name].shape != own[name].shape
    ]
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise CheckpointError(
            f"{checkpoint}: its weights are of another model: {'; '.join(problems[:5])}{more}. "
            "Use the recipe it was trained with"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])


def load_full_buffers(
    objective: nn.Module, buffers: dict[str, torch.Tensor], checkpoint: Path
) -> None:
    """Copy buffers by name, such as BatchNorm's statistics; each that the model saves."""
    parameters = dict(objective.named_parameters(remove_duplicate=False))
    own = {name: v for name, v in objective.state_dict().items() if name not in parameters}
    missing = sorted(name for name in own if name not in buffers)
    if missing:
        raise CheckpointError(
            f"{checkpoint}: its buffers are of another model: {', '.join(missing[:5])} missing. "
            "Use the recipe it was trained with"
        )
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(buffers[name].reshape(value.shape))
