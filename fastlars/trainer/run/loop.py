"""The training loop, as the papers write it.

    for every epoch:
        for every batch of B images, divided among the processes:
            g <- 1/B x sum over the batch of the gradients of the loss     (all-reduce)
            w <- optimizer(w, g, lr(step))                                 (LARS, LAMB, ...)
        evaluate w on every test image

Goyal et al. 2017 (arXiv:1706.02677), sections 2 and 3; You et al. 2017 (arXiv:1708.03888),
algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.nn import functional

from fastlars.trainer.data.dataset import Batch
from fastlars.trainer.data.order import test_batches
from fastlars.trainer.model import batchnorm, norms
from fastlars.trainer.model.context import TrainingContext
from fastlars.trainer.process.signals import StopSignals
from fastlars.trainer.process.world import StopVote
from fastlars.trainer.run.journal import Journal
from fastlars.trainer.run.meter import Figures, Meter, figures
from fastlars.trainer.run.replica import Replica


class StepResult(NamedTuple):
    """What one step reports."""

    lr: float
    norms: norms.LayerNorms  # before the update; empty if not wanted, or if fp16 skipped the step


def train(context: TrainingContext, replica: Replica, journal: Journal, stop: StopSignals) -> bool:
    """Train from `context.progress` on; return whether the last epoch is done.

    A signal or --max-steps ends the training earlier, after the same step in every process.
    """
    config, order, progress = context.config, context.order, context.progress
    stop.note()
    batches = journal.save_if_unreadable(context.data.train(order.from_step(progress.step)))
    vote, stopped = StopVote(context.world), False
    while progress.evaluated < config.epochs:
        stopped = vote.any(stop.received is not None)
        if stopped or progress.step >= (config.max_steps or math.inf):
            break
        if progress.step < (progress.evaluated + 1) * order.steps_per_epoch:
            result = step(context, replica, batches, journal.meter, with_norms=journal.wants_norms)
            journal.record_step(result.lr, result.norms)
        else:
            with journal.saving_if_unreadable():
                test = evaluate(context, replica)
            journal.record_epoch(test)
    vote.close()
    journal.finish(stopped=stopped)
    return progress.evaluated == config.epochs


def step(
    context: TrainingContext,
    replica: Replica,
    batches: Iterator[Batch],
    meter: Meter,
    *,
    with_norms: bool = False,
) -> StepResult:
    """One optimizer step over --batch-size images, an equal share of them in each process.

    Takes the process's next micro-batches from `batches`, and counts them in `meter`.
    """
    config, model, precision = context.config, context.model, context.precision
    replica.network.train()
    context.optimizer.zero_grad(set_to_none=True)
    batchnorm.reset_step_statistics(model)
    # Measured before the backward pass: with --overlap that pass moves the weights.
    weights = norms.weights(model) if with_norms else {}
    for k in range(1, context.order.micro_batches + 1):
        images, labels = next(batches)
        # Gradients are all-reduced in the last micro-batch's backward pass; with --overlap the
        # parameters of each bucket are stepped in it, too.
        with replica.all_reduce(last=k == context.order.micro_batches), replica.compiling():
            with precision.autocast():
                logits = replica.network(images)
            loss = functional.cross_entropy(
                logits.float(), labels, label_smoothing=config.label_smoothing, reduction="sum"
            )
            # The gradient is the mean over the global batch (Goyal et al. 2017, remark 3), and DDP
            # averages over the processes.
            share = loss * (context.world.size / config.batch_size)
            precision.scaled(share).backward()
        meter.add(loss, logits, labels)
    found = norms.measure(model, weights, precision.gradient_scale) if with_norms else {}
    lr = float(context.schedule.get_last_lr()[0])
    if not precision.step(context.optimizer):  # fp16: the gradients overflowed, the step is skipped
        return StepResult(lr, {})
    context.schedule.step()
    if replica.average is not None:
        replica.average.update_parameters(model)
    return StepResult(lr, found)


def evaluate(context: TrainingContext, replica: Replica) -> Figures:
    """Loss and accuracy on the test images, every one counted once over all processes."""
    world, data, model = context.world, context.data, replica.evaluated
    batchnorm.share(model, world.size, context.config.bn_statistics)
    model.eval()
    meter = Meter(world.device)
    own = test_batches(data.test_size, context.order.micro_batch, world.rank, world.size)
    with torch.inference_mode():
        for images, labels in data.test(own):
            with context.precision.autocast():
                logits = model(images)
            loss = functional.cross_entropy(logits.float(), labels, reduction="sum")
            meter.add(loss, logits, labels)
    return figures(world.total(meter.sums))
