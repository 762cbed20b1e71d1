"""The loop of fine-tuning: steps, metrics, evaluations, checkpoints."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from groundwork.data.stream import Stream
from groundwork.pretrain.downstream.finetuning.engine import Engine, number
from groundwork.pretrain.downstream.finetuning.evaluations import Evaluations
from groundwork.pretrain.downstream.task import Task
from groundwork.pretrain.engine.ema import Ema
from groundwork.pretrain.engine.faults import Quarantine
from groundwork.pretrain.engine.monitor import Monitor
from groundwork.pretrain.engine.step_means import check_finite, means_over_ranks
from groundwork.pretrain.engine.stop import StopRequest


@dataclass(frozen=True)
class FinetuneLoop:
    """What the loop is told.

    first_step, steps: steps done already, and to be done in all. save: writes a checkpoint after
    that many steps (collective). keep_best: that checkpoint is the best from now on. evaluate: the
    metrics of the evaluation split (collective), or None where there is none.
    """

    first_step: int
    steps: int
    log_every: int
    save_every: int
    evaluate_every: int | None
    save: Callable[[int], object]
    keep_best: Callable[[int], object]
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
    samples and has a finite loss. What is evaluated has been saved before: an evaluation that
    fails, or that a kill ends, costs no training, and is made up for when the run goes on.
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

    def evaluate(step: int) -> None:
        assert loop.evaluate is not None
        result = loop.evaluate()
        if evaluations.add(step, result):
            loop.keep_best(step)
        # what is of a single class is in the file of evaluations
        shown = "  ".join(f"{k} {value:.4g}" for k, value in result.items() if "/" not in k)
        monitor.say(f"step {step}: {shown}")

    first = loop.first_step
    if first and loop.evaluates_at(first) and not evaluations.has(first):
        evaluate(first)
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
            means = means_over_ranks(losses, waited / (now - since_log), quarantine, samples, world)
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
            check_finite(done, means["loss"], grad_norm)
        if saves or evaluates or done == loop.steps:
            loop.save(done)
            saved = done
        if evaluates:
            paused = time.monotonic()
            evaluate(done)
            since_log += time.monotonic() - paused
    if done > saved:
        means = means_over_ranks(losses, 0.0, quarantine, done * plan.global_batch, world)
        check_finite(done, means["loss"], number(norm))
        loop.save(done)
    return done
