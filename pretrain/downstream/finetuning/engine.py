"""Accelerate's part of fine-tuning: who runs where, in which precision, and who holds what.

The Accelerate config (`accelerate launch --config_file ...`, which speaks through environment
variables) chooses one process, DDP, DeepSpeed or FSDP 2; the recipe chooses everything that decides
what is computed. Two ways in which Accelerate quietly trains something else are turned into errors
here: DeepSpeed is ignored beside a CPU flag, and on CPUs it runs every rank as if it were alone.
"""

import datetime
import os
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from groundwork.data.batch_plan import BatchPlan
from groundwork.pretrain.downstream.finetuning.recipe import FinetuneRecipe, FinetuneTrain
from groundwork.pretrain.downstream.task import Task
from groundwork.pretrain.engine.batch_statistics import average_over_ranks, batch_statistics
from groundwork.pretrain.engine.deepspeed_config import World, prepare_environment
from groundwork.pretrain.engine.gradient_norm import note_gradient_norm
from groundwork.pretrain.engine.masters import set_masters
from groundwork.pretrain.engine.optimizer import build_optimizer, set_lr
from groundwork.pretrain.models.batch_norm import synchronise_batch_norms
from groundwork.pretrain.recipe_yaml import RecipeError

Kind = Literal["plain", "deepspeed", "fsdp"]


class EngineError(RuntimeError):
    """Accelerate has set up something else than was asked for; says what, and how to mend it."""


def start_accelerator(train: FinetuneTrain, plan: BatchPlan, timeout_s: float) -> tuple[Any, World]:
    """Join the job that the environment describes. Raises EngineError.

    timeout_s: after which a silent rank ends the job.
    """
    prepare_environment()
    wants = wanted_kind()
    is_distributed = "RANK" in os.environ
    if not is_distributed and wants != "plain":
        raise EngineError(
            f"the Accelerate config asks for {wants}, but no launcher has started this process "
            "(RANK is not set); start it with `accelerate launch --config_file FILE ...`"
        )
    _start_group(wants, is_distributed, timeout_s)
    from accelerate import Accelerator
    from accelerate.utils import (
        DistributedDataParallelKwargs,
        GradientAccumulationPlugin,
        InitProcessGroupKwargs,
    )

    is_cpu = not torch.cuda.is_available()
    handlers: list[Any] = [
        DistributedDataParallelKwargs(
            find_unused_parameters=train.find_unused_parameters,
            broadcast_buffers=False,  # see `Engine.level`
        )
    ]
    plugin = None
    if wants == "deepspeed":
        from accelerate.utils import DeepSpeedPlugin

        # weights are loaded into a whole model, and partitioned after that
        plugin = DeepSpeedPlugin(zero3_init_flag=False)
        if is_cpu:
            # without a backend of that name every rank takes itself for the only one
            handlers.append(InitProcessGroupKwargs(backend="gloo"))
    accelerator = Accelerator(
        cpu=is_cpu and wants != "deepspeed",
        mixed_precision="bf16" if train.precision == "bf16" else "no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=plan.accumulation, sync_with_dataloader=False
        ),
        deepspeed_plugin=plugin,
        kwargs_handlers=handlers,
    )
    world = World(
        int(os.environ.get("RANK", "0")),
        int(os.environ.get("WORLD_SIZE", "1")),
        int(os.environ.get("LOCAL_RANK", "0")),
        accelerator.device,
    )
    _check_accelerator(accelerator, wants, world)
    return accelerator, world


def wanted_kind() -> Kind:
    """What the Accelerate config asks for."""

    def is_set(name: str) -> bool:
        return os.environ.get(name, "false").lower() in ("1", "true", "yes")

    if is_set("ACCELERATE_USE_DEEPSPEED"):
        return "deepspeed"
    return "fsdp" if is_set("ACCELERATE_USE_FSDP") else "plain"


def _start_group(wants: Kind, is_distributed: bool, timeout_s: float) -> None:
    """A process group of all ranks, for Accelerate and for what is agreed upon besides it."""
    if dist.is_initialized():
        return
    timeout = datetime.timedelta(seconds=timeout_s)
    if not is_distributed:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if wants == "deepspeed":
        import deepspeed

        # it would be compiled for minutes at first use; gloo gives the same results
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(timeout=timeout, verbose=False)
        return
    # FSDP with parts on the host needs gloo, too
    backend = "cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timeout)


def _check_accelerator(accelerator: Any, wants: Kind, world: World) -> None:
    got = accelerator.distributed_type.name
    expected = {"deepspeed": got == "DEEPSPEED", "fsdp": got == "FSDP"}
    if not expected.get(wants, got in ("NO", "MULTI_CPU", "MULTI_GPU")):
        hint = (
            "DeepSpeed is ignored where `use_cpu: true` is set (ACCELERATE_USE_CPU); remove it"
            if wants == "deepspeed"
            else "FSDP needs GPUs; on CPUs use DDP or DeepSpeed"
        )
        raise EngineError(f"the Accelerate config asks for {wants}, Accelerate runs {got}: {hint}")
    if (accelerator.num_processes, accelerator.process_index) != (world.size, world.rank):
        raise EngineError(
            f"Accelerate takes this for process {accelerator.process_index} of "
            f"{accelerator.num_processes}, the launcher for {world.rank} of {world.size}; each "
            "rank would train on all data. Start the job with `accelerate launch`, `torchrun` or "
            "--ranks, and without other process-group settings"
        )


class Engine:
    """The task's model and its optimiser as Accelerate has prepared them.

    model: what is called, in training and in evaluation. module: the task's own, whose parameters
    carry its names. kind: plain (one process or DDP), deepspeed, or fsdp.
    """

    def __init__(
        self, accelerator: Any, task: Task, recipe: FinetuneRecipe, plan: BatchPlan, world: World
    ) -> None:
        self.accelerator, self.world, self.recipe, self.plan = accelerator, world, recipe, plan
        self.module = task.model
        self.kind: Kind = wanted_kind()
        if recipe.train.sync_batch_norm and world.size > 1:
            self.module = task.model = synchronise_batch_norms(task.model)
        _exempt_from_decay(task)
        optimizer = build_optimizer(self.module, recipe.optimizer)
        initial: dict[str, Tensor] = {}
        if self.kind == "deepspeed":
            self._fit_deepspeed()
            if recipe.train.precision == "bf16":
                initial = {n: p.detach().clone() for n, p in self.module.named_parameters()}
                # its weights are bf16, which only autocast brings together with float32 inputs;
                # inside of forward, as the engine turns off what is around it
                self.module.forward = torch.autocast(world.device.type, torch.bfloat16)(
                    self.module.forward
                )
        elif self.kind == "fsdp" and not accelerator.is_fsdp2:
            raise EngineError(
                "the Accelerate config asks for FSDP 1, which flattens parameters of different "
                "learning rates into one; set fsdp_version: 2"
            )
        with warnings.catch_warnings():
            # of torch 2.15, for an argument that Accelerate passes on and has no other name for
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            self.model, self.optimizer = accelerator.prepare(self.module, optimizer)
        if self.kind == "deepspeed":
            self._check_deepspeed()
            note_gradient_norm(self.model)
            if initial:
                set_masters(self.model, initial)
        self.parameters = dict(self.module.named_parameters())

    def _fit_deepspeed(self) -> None:
        """The batch and the clipping are the recipe's; Accelerate would guess them."""
        config = self.accelerator.state.deepspeed_plugin.deepspeed_config
        config["train_micro_batch_size_per_gpu"] = self.plan.micro_batch
        config["gradient_accumulation_steps"] = self.plan.accumulation
        config["train_batch_size"] = self.plan.global_batch
        config["gradient_clipping"] = self.recipe.train.gradient_clipping
        # the optimiser is torch's also where its state is offloaded: nothing is compiled at start
        config["zero_force_ds_cpu_optimizer"] = False
        config["zero_allow_untested_optimizer"] = True
        for key in ("optimizer", "scheduler"):
            if key in config:
                raise RecipeError(
                    f"the DeepSpeed config has a section {key!r}; the recipe decides that, take "
                    "the section out"
                )

    def _check_deepspeed(self) -> None:
        if type(self.model).__name__ != "DeepSpeedEngine":
            raise EngineError(
                "the Accelerate config asks for DeepSpeed, Accelerate has made a "
                f"{type(self.model).__name__}"
            )
        parameter = next(self.module.parameters())
        if self.model.zero_optimization_stage() == 3 and not hasattr(parameter, "ds_id"):
            raise EngineError("the Accelerate config asks for ZeRO-3, the weights are not parted")

    def set_lr(self, step: int) -> float:
        """The learning rates of a step (0-based); returns that of groups of scale 1."""
        recipe = self.recipe
        return set_lr(
            self.optimizer,
            step,
            recipe.train.steps,
            recipe.optimizer,
            recipe.schedule,
            recipe.train.global_batch,
        )

    def micro_step(self, batch: Any) -> tuple[dict[str, Tensor], Any]:
        """Forward and backward of a micro-batch; the last one of a step also updates the weights.

        Returns the model's scalars, and the norm of the gradient (a tensor or a number; see
        `number`) after an update, else None.
        """
        with self.accelerator.accumulate(self.model):
            output = self.model(batch)
            self.accelerator.backward(output["loss"])
            norm = None
            if self.accelerator.sync_gradients:
                limit = self.recipe.train.gradient_clipping or float("inf")
                norm = self.accelerator.clip_grad_norm_(self.model.parameters(), limit)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return output, norm

    def level(self) -> None:
        """Make BatchNorm's statistics, which each rank gathers for itself, their mean over ranks.

        After every step: were it done for checkpoints and evaluations only, its rounding would
        depend on when these are. Training does not read the statistics. Collective.
        """
        average_over_ranks(batch_statistics(self.module))

    def settle(self) -> None:
        """Part again what FSDP leaves whole after a forward pass that no backward pass follows."""
        if self.kind == "fsdp":
            for module in self.module.modules():
                reshard: Any = getattr(module, "reshard", None)
                if reshard is not None:
                    reshard()

    def to_device(self, data: Any) -> Any:
        """`moved` to this rank's device."""
        return moved(data, self.world.device)


def whole(tensor: Any) -> Any:
    """A tensor that FSDP has parted, put together. Collective for such a one."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def number(value: Any) -> float:
    """A norm as a number; waits for the device. Collective where FSDP has parted it."""
    return float("nan") if value is None else float(whole(value))


def _exempt_from_decay(task: Task) -> None:
    """Tell the optimiser, which asks modules, what the task itself exempts from weight decay."""
    model = task.model
    own = getattr(model, "no_weight_decay", None)
    names = task.no_weight_decay() | frozenset(own() if callable(own) else ())
    model.no_weight_decay = lambda: names  # type: ignore[assignment]


def moved(data: Any, device: torch.device) -> Any:
    """Tensors of a batch on a device; lists and plain values as they are."""
    if isinstance(data, Tensor):
        return data.to(device, non_blocking=True)
    if isinstance(data, Mapping):
        return {key: moved(value, device) for key, value in data.items()}
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        return type(data)(*(moved(value, device) for value in data))
    if isinstance(data, list | tuple):
        return type(data)(moved(value, device) for value in data)
    return data
