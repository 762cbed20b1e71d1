"""The training loop."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from groundwork.data.batch_plan import BatchPlan
from groundwork.data.stream import Stream
from groundwork.pretrain.engine.deepspeed_config import World
from groundwork.pretrain.engine.faults import Quarantine
from groundwork.pretrain.engine.monitor import Monitor
from groundwork.pretrain.engine.step_means import check_finite, means_over_ranks
from groundwork.pretrain.engine.stop import StopRequest, seconds_since_launch
from groundwork.pretrain.engine.throughput import device_peak, throughput

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Loop:
    """What the loop is told.

    first_step, steps: steps done already, and to be done in all.
    set_lr: gives the groups of the optimiser the learning rates of a step (0-based); returns the
        one to be reported.
    after_step: called after each optimiser step with the number of steps done (collective).
    flops_per_sample: of the model, forward and backward.
    save: writes a checkpoint after that many steps (collective).
    """

    first_step: int
    steps: int
    plan: BatchPlan
    precision: str
    set_lr: Callable[[torch.optim.Optimizer, int], float]
    after_step: Callable[[int], object]
    flops_per_sample: float
    log_every: int
    save_every: int
    save: Callable[[int], object]
    workers: int
    prefetch: int


def train(
    engine: Any,
    stream: Stream[Any],
    collate: Callable[[list[Any]], dict[str, Tensor]],
    loop: Loop,
    world: World,
    monitor: Monitor,
    quarantine: Quarantine,
    stop: StopRequest,
) -> int:
    """Train until the last step, or until asked to stop. Returns the number of steps done.

    Whatever ends the loop in good order, the last step done is saved. What is saved knows its bad
    samples and has a finite loss.
    """
    batches = stream.batches(
        loop.plan,
        collate,
        first_step=loop.first_step,
        last_step=loop.steps,
        workers=loop.workers,
        prefetch=loop.prefetch,
        pin_memory=world.device.type == "cuda",
    )
    engine.train()
    dtype = DTYPES[loop.precision]
    peak = device_peak(world.device, loop.precision)
    began = time.monotonic()
    first_step_s = 0.0
    since_log, waited, done, saved = began, 0.0, loop.first_step, loop.first_step
    while done < loop.steps and not stop.agreed():
        lr = loop.set_lr(engine.optimizer, done)
        losses: dict[str, Tensor] = {}
        for _ in range(loop.plan.accumulation):
            asked = time.monotonic()
            batch = next(batches)
            waited += time.monotonic() - asked
            quarantine.add(batch.faults)
            data = {k: v.to(world.device, non_blocking=True) for k, v in batch.data.items()}
            output = engine(data, dtype)
            engine.backward(output["loss"])
            engine.step()
            for name, value in output.items():
                part = value.detach().float() / loop.plan.accumulation
                losses[name] = losses[name] + part if name in losses else part
        done += 1
        loop.after_step(done)
        monitor.step(done)
        if done == loop.first_step + 1:
            first_step_s = seconds_since_launch()
            monitor.say(f"first step done {first_step_s:.1f} s after launch")
        if done % loop.log_every == 0 or done == loop.steps:
            now = time.monotonic()
            steps = done - max(loop.first_step, (done - 1) // loop.log_every * loop.log_every)
            samples = done * loop.plan.global_batch
            means = means_over_ranks(losses, waited / (now - since_log), quarantine, samples, world)
            rate = steps * loop.plan.global_batch / (now - since_log)
            metrics = {
                "step": done,
                "samples": samples,
                **_epochs(stream, samples),
                "seconds": now - began,
                **means,
                "lr": lr,
                "grad_norm": _gradient_norm(engine),
                "seconds_per_step": (now - since_log) / steps,
                "samples_per_s": rate,
                **throughput(rate, loop.flops_per_sample, world.size, peak),
                "bad_samples": quarantine.count,
                "first_step_s": first_step_s,
            }
            monitor.log(metrics)
            check_finite(done, means["loss"], metrics["grad_norm"])
            since_log, waited = time.monotonic(), 0.0
        if done % loop.save_every == 0 or done == loop.steps:
            _save(engine, losses, quarantine, done, loop, world)
            saved = done
    if done > saved:
        _save(engine, losses, quarantine, done, loop, world)
    return done


def _epochs(stream: Stream[Any], samples: int) -> dict[str, float]:
    """How often the data has been gone through: of a mixture, the least of its sources and each."""
    epochs = stream.epochs(samples)
    each = {f"epoch/{name}": epoch for name, epoch in epochs.items() if name}
    return {"epoch": min(epochs.values()), **each}


def _save(
    engine: Any,
    losses: dict[str, Tensor],
    quarantine: Quarantine,
    done: int,
    loop: Loop,
    world: World,
) -> None:
    """Save a step, which may have had no metrics: with its bad samples, and never a NaN."""
    means = means_over_ranks(losses, 0.0, quarantine, done * loop.plan.global_batch, world)
    check_finite(done, means["loss"], _gradient_norm(engine))
    loop.save(done)


def _gradient_norm(engine: Any) -> float:
    return float(engine.get_global_grad_norm() or 0.0)
