"""A pretraining run: recipe -> data, model, objective, DeepSpeed engine -> loop -> checkpoints."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn

from groundwork.data.atomic import write_atomically
from groundwork.data.dataset import Dataset
from groundwork.data.knowledge.index import KnowledgeIndex
from groundwork.data.stream import BatchPlan
from groundwork.data.text import ClipTokenizer, load_tokenizer
from groundwork.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from groundwork.pretrain.engine.checkpoint import (
    CheckpointError,
    RunState,
    find_checkpoint,
    load_checkpoint,
    read_state,
    save_checkpoint,
)
from groundwork.pretrain.engine.deepspeed_config import World, deepspeed_config
from groundwork.pretrain.engine.faults import Quarantine
from groundwork.pretrain.engine.masters import set_masters
from groundwork.pretrain.engine.monitor import Monitor
from groundwork.pretrain.engine.optimizer import build_optimizer, lr_at
from groundwork.pretrain.engine.stop import StopRequest
from groundwork.pretrain.engine.trainer import Loop, train
from groundwork.pretrain.image_text import (
    ImageTextCollate,
    make_tokenizer,
    open_stream,
    open_training_data,
)
from groundwork.pretrain.models.klite import build_klite
from groundwork.pretrain.objectives.unicl import Unicl
from groundwork.pretrain.recipe import Recipe, RecipeError, differences, recipe_to_dict

TOKENIZER = "tokenizer"
RECIPE = "recipe.yaml"

MODELS: Final[Mapping[str, Callable[[Any], nn.Module]]] = {"klite": build_klite}
OBJECTIVES: Final[Mapping[str, Callable[..., nn.Module]]] = {"unicl": Unicl}


def batch_plan(recipe: Recipe, world_size: int, rank: int) -> BatchPlan:
    """How the ranks share a global batch. Raises RecipeError where it does not divide."""
    batch = recipe.train.global_batch
    micro = recipe.train.micro_batch or max(1, batch // world_size)
    try:
        return BatchPlan(batch, micro, world_size, rank)
    except ValueError as error:
        raise RecipeError(f"train: {error}") from error


def check_inputs(recipe: Recipe, out: Path) -> tuple[Dataset, KnowledgeIndex | None]:
    """Everything that can be wrong before the first process group: data, knowledge, `out` itself.

    Returns the opened data. Raises the error that the user is to see.
    """
    dataset, index = open_training_data(recipe.data)
    checkpoint = find_checkpoint(out)
    if checkpoint is not None:
        state = read_state(checkpoint)
        changed = differences(state.recipe, recipe_to_dict(recipe))
        if changed:
            listed = "\n  ".join(changed[:12])
            raise CheckpointError(
                f"{checkpoint} is of another recipe. It differs in (saved -> now):\n  {listed}\n"
                f"To go on with it, use the recipe it was made with ({out / RECIPE}); to start "
                "afresh, choose another --out"
            )
        if state.dataset != dataset.digest:
            raise CheckpointError(
                f"{checkpoint} was made on another data set than {recipe.data.shards} holds now; "
                "restore those shards, or choose another --out to start afresh"
            )
    elif out.exists() and not out.is_dir():
        raise CheckpointError(f"{out} is a file; --out names a folder")
    return dataset, index


def pretrain(
    recipe: Recipe,
    out: Path,
    world: World,
    stop: StopRequest,
    dataset: Dataset,
    index: KnowledgeIndex | None,
) -> int:
    """Run `recipe` in folder `out`, from its last checkpoint if it has one. Returns steps done."""
    plan = batch_plan(recipe, world.size, world.rank)
    tokenizer = _shared_tokenizer(recipe, out, world, dataset, index)
    engine, initial = _build_engine(recipe, plan, tokenizer, world)
    checkpoint = find_checkpoint(out)
    state = RunState(0, 0, world.size, recipe_to_dict(recipe), dataset.digest, 0)
    if checkpoint is not None:
        state = replace(load_checkpoint(engine, checkpoint, world), recipe=recipe_to_dict(recipe))
    elif recipe.train.precision == "bf16":
        set_masters(engine, initial)
    if world.is_main:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / RECIPE, yaml.safe_dump(dict(state.recipe), sort_keys=False).encode())
    monitor = Monitor(
        out,
        recipe.monitor,
        first_step=state.step,
        steps=recipe.train.steps,
        is_main=world.is_main,
    )
    quarantine = Quarantine(
        out,
        recipe.data.bad_sample_budget,
        count=state.bad_samples,
        position=state.position,
        is_main=world.is_main,
    )

    def save(step: int) -> Path:
        now = replace(
            state,
            step=step,
            position=step * plan.global_batch,
            bad_samples=quarantine.count,
        )
        return save_checkpoint(engine, out, now, world, recipe.checkpoint.keep)

    if checkpoint is not None:
        monitor.say(f"resuming from {checkpoint} at sample {state.position:,}")
    try:
        return train(
            engine,
            open_stream(recipe.data, dataset, index, recipe.train.seed),
            ImageTextCollate(tokenizer),
            Loop(
                first_step=state.step,
                steps=recipe.train.steps,
                plan=plan,
                precision=recipe.train.precision,
                lr=lambda step: lr_at(
                    step, recipe.train.steps, recipe.optimizer.lr, recipe.schedule
                ),
                log_every=recipe.monitor.log_every,
                save_every=recipe.checkpoint.every_steps,
                save=save,
                workers=recipe.data.workers,
                prefetch=recipe.data.prefetch,
            ),
            world,
            monitor,
            quarantine,
            stop,
        )
    finally:
        monitor.close()


def build_objective(recipe: Recipe, tokenizer: ClipTokenizer) -> nn.Module:
    """The module that DeepSpeed wraps: model and loss."""
    model = MODELS[recipe.model.kind](with_vocabulary(recipe, tokenizer).model)
    return OBJECTIVES[recipe.objective.kind](
        model, recipe.objective, mean=IMAGENET_MEAN, std=IMAGENET_STD
    )


def with_vocabulary(recipe: Recipe, tokenizer: ClipTokenizer) -> Recipe:
    """The recipe with the text tower's vocabulary size filled in from the tokenizer."""
    text = recipe.model.text
    if text.vocab_size is None:
        text = replace(text, vocab_size=tokenizer.vocab_size)
    elif text.vocab_size < tokenizer.vocab_size:
        raise RecipeError(
            f"model.text.vocab_size is {text.vocab_size}, but the tokenizer has "
            f"{tokenizer.vocab_size} ids; raise it, or leave it out to take the tokenizer's"
        )
    return replace(recipe, model=replace(recipe.model, text=text))


def _shared_tokenizer(
    recipe: Recipe,
    out: Path,
    world: World,
    dataset: Dataset,
    index: KnowledgeIndex | None,
) -> ClipTokenizer:
    """The run's tokenizer: made by rank 0 on the first start, read from `out` ever after."""
    folder, context = out / TOKENIZER, recipe.model.text.context_length
    if world.is_main and not folder.is_dir():
        make_tokenizer(recipe.data.tokenizer, dataset, index, context).save(folder)
    dist.barrier()
    return load_tokenizer(folder, context)


def _build_engine(
    recipe: Recipe, plan: BatchPlan, tokenizer: ClipTokenizer, world: World
) -> tuple[Any, dict[str, Tensor]]:
    """The engine, and the initial weights where DeepSpeed rounds them (bf16; empty otherwise)."""
    import deepspeed

    # all ranks build the same initial weights; after that each draws its own numbers
    torch.manual_seed(recipe.train.seed)
    objective = build_objective(recipe, tokenizer)
    initial = {}
    if recipe.train.precision == "bf16":
        initial = {name: p.detach().clone() for name, p in objective.named_parameters()}
    engine, *_ = deepspeed.initialize(
        model=objective,
        optimizer=build_optimizer(objective, recipe.optimizer),
        config=deepspeed_config(
            global_batch=plan.global_batch,
            micro_batch=plan.micro_batch,
            accumulation=plan.accumulation,
            precision=recipe.train.precision,
            zero_stage=recipe.train.zero_stage,
            gradient_clipping=recipe.train.gradient_clipping,
            overrides=recipe.deepspeed,
        ),
    )
    torch.manual_seed(recipe.train.seed * 65_537 + world.rank + 1)
    return engine, initial
