"""The loop of fine-tuning: steps, metrics, evaluations, checkpoints."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from groundwork.data.atomic import write_atomically
from groundwork.data.stream import Stream
from groundwork.pretrain.downstream.finetuning.engine import Engine, number
from groundwork.pretrain.downstream.finetuning.recipe import EvaluationConfig
from groundwork.pretrain.downstream.task import Task
from groundwork.pretrain.engine.ema import Ema
from groundwork.pretrain.engine.faults import Quarantine
from groundwork.pretrain.engine.monitor import Monitor
from groundwork.pretrain.engine.stop import StopRequest
from groundwork.pretrain.engine.trainer import DivergedError
from groundwork.pretrain.recipe_yaml import RecipeError

EVALUATIONS: Final = "evaluations.jsonl"
RESULTS: Final = "results.json"


@dataclass
class Evaluations:
    """The evaluations of a run, and the best of them.

    best: {"step", "metric", "value"} or None.
    """

    out: Path
    config: EvaluationConfig
    is_main: bool
    best: dict[str, Any] | None = None
    last: dict[str, float] = field(default_factory=dict)

    def forget_after(self, step: int) -> None:
        """Drop lines of steps that a resumed run will repeat, and a line cut off by a kill."""
        path = self.out / EVALUATIONS
        if not self.is_main or not path.is_file():
            return
        kept = []
        for line in path.read_text("utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError):
                continue
        write_atomically(path, "".join(f"{line}\n" for line in kept).encode())

    def add(self, step: int, result: dict[str, float]) -> bool:
        """Note a result, the same on all ranks. Returns whether it is the best so far."""
        metric = self.config.metric or next(iter(result))
        if metric not in result:
            raise RecipeError(
                f"evaluation.metric is {metric!r}; the task measures {', '.join(result)}"
            )
        self.last = result
        value = result[metric]
        sign = 1 if self.config.larger_is_better else -1
        is_best = self.best is None or sign * value > sign * self.best["value"]
        if is_best:
            self.best = {"step": step, "metric": metric, "value": value}
        if self.is_main:
            record = {"step": step, **result}
            with (self.out / EVALUATIONS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            results = {"last": record, "best": self.best}
            write_atomically(self.out / RESULTS, json.dumps(results, indent=1).encode())
        return is_best


@dataclass(frozen=True)
class FinetuneLoop:
    """What the loop is told.

    first_step, steps: steps done already, and to be done in all. save: writes a checkpoint after
    that many steps (collective). evaluate: the metrics of the evaluation split (collective), or
    None where there is none.
    """

    first_step: int
    steps: int
    log_every: int
    save_every: int
    evaluate_every: int | None
    save: Callable[[int], object]
    evaluate: Callable[[], dict[str, float]] | None
    workers: int
    prefetch: int

    def evaluates_at(self, step: int) -> bool:
        if self.evaluate is None:
            return False
        every = self.evaluate_every
        return step == self.steps or (every is not None and step % every == 0)


def finetune_steps(
    engine: Engine,
    task: Task,
    stream: Stream[Any],
    loop: FinetuneLoop,
    ema: Ema | None,
    monitor: Monitor,
    quarantine: Quarantine,
    evaluations: Evaluations,
    stop: StopRequest,
) -> int:
    """Train until the last step, or until asked to stop. Returns the number of steps done.

    Whatever ends the loop in good order, the last step done is saved. What is saved knows its bad
    samples and has a finite loss.
    """
    plan, world = engine.plan, engine.world
    batches = stream.batches(
        plan,
        task.collate,
        first_step=loop.first_step,
        last_step=loop.steps,
        workers=loop.workers,
        prefetch=loop.prefetch,
        pin_memory=world.device.type == "cuda",
    )
    engine.model.train()
    began = since_log = time.monotonic()
    waited, done, saved, logged = 0.0, loop.first_step, loop.first_step, loop.first_step
    while done < loop.steps and not stop.agreed():
        lr = engine.set_lr(done)
        losses: dict[str, Tensor] = {}
        norm: Any = None
        for _ in range(plan.accumulation):
            asked = time.monotonic()
            batch = next(batches)
            waited += time.monotonic() - asked
            quarantine.add(batch.faults)
            output, norm = engine.micro_step(engine.to_device(batch.data))
            for name, value in output.items():
                part = value.detach().float() / plan.accumulation
                losses[name] = losses[name] + part if name in losses else part
        engine.level()
        if ema is not None:
            ema.update()
        done += 1
        monitor.step(done)
        samples = done * plan.global_batch
        evaluates, saves = loop.evaluates_at(done), done % loop.save_every == 0
        logs = done % loop.log_every == 0 or done == loop.steps
        if logs or evaluates or saves:
            now = time.monotonic()
            means = _over_ranks(losses, waited / (now - since_log), quarantine, samples, engine)
            grad_norm = number(norm)
            if logs:
                epochs = stream.epochs(samples)
                metrics = {
                    "step": done,
                    "samples": samples,
                    "epoch": min(epochs.values()),
                    "seconds": now - began,
                    **means,
                    "lr": lr,
                    "grad_norm": grad_norm,
                    "seconds_per_step": (now - since_log) / (done - logged),
                    "samples_per_s": (done - logged) * plan.global_batch / (now - since_log),
                    "bad_samples": quarantine.count,
                }
                monitor.log(metrics)
                since_log, waited, logged = time.monotonic(), 0.0, done
            _check_finite(done, means["loss"], grad_norm)
        if evaluates:
            assert loop.evaluate is not None
            paused = time.monotonic()
            result = loop.evaluate()
            # the best is kept, so it must be there
            saves |= evaluations.add(done, result)
            # what is of a single class is in the file of evaluations
            shown = "  ".join(f"{k} {value:.4g}" for k, value in result.items() if "/" not in k)
            monitor.say(f"step {done}: {shown}")
            since_log += time.monotonic() - paused
        if saves or done == loop.steps:
            loop.save(done)
            saved = done
    if done > saved:
        means = _over_ranks(losses, 0.0, quarantine, done * plan.global_batch, engine)
        _check_finite(done, means["loss"], number(norm))
        loop.save(done)
    return done


def _check_finite(step: int, loss: float, norm: float) -> None:
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise DivergedError(
            f"step {step}: loss {loss}, gradient norm {norm}. Lower optimizer.lr, lengthen "
            "schedule.warmup_steps, or set train.gradient_clipping; the run goes on from its last "
            "checkpoint"
        )


def _over_ranks(
    losses: dict[str, Tensor], wait: float, quarantine: Quarantine, samples: int, engine: Engine
) -> dict[str, float]:
    """Mean of losses and waiting share over ranks; the bad samples of all are collected."""
    world = engine.world
    names = [*losses, "data_wait"]
    values = torch.stack([*losses.values(), torch.tensor(wait, device=world.device)]).double()
    pending = torch.tensor([quarantine.pending * world.size], device=world.device)
    values = torch.cat([values, pending])
    dist.all_reduce(values)
    *means, bad = (values / world.size).tolist()
    quarantine.collect(round(bad), samples, world)
    return dict(zip(names, means, strict=True))
