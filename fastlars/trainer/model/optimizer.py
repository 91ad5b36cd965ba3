"""The optimizer and the schedule that a configuration names."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

import fastlars
from fastlars import conventions, schedules
from fastlars.trainer.config.settings import Config, flag
from fastlars.trainer.errors import TrainerError, one_line


def check_environment(device: torch.device) -> None:
    """Raise TrainerError where a FASTLARS_ variable asks for what the device does not have.

    A step reads these variables; without this one, the first step would come after all images
    were read.
    """
    if not any(name.startswith("FASTLARS_") for name in os.environ):
        return
    weight = torch.zeros(1, device=device)
    weight.grad = torch.zeros_like(weight)
    try:
        fastlars.LARS([weight], lr=0.0).step()
    except (RuntimeError, ValueError) as error:
        if "FASTLARS_" not in str(error):
            raise
        raise TrainerError(one_line(error), everywhere=True) from None


# Settings as the library's errors name them: the flags that the user knows.
_FLAGS = {"center_steps": "--rmsprop-center", "period_steps": "--rmsprop-period"} | {
    name: flag(name)
    for name in ("lr", "lr_rmsprop", "end_lr", "warmup_from", "power", "momentum", "weight_decay")
}


@contextmanager
def _in_a_line(what: str) -> Iterator[None]:
    """Turn an error of the library into one line that names flags."""
    try:
        yield
    except (ValueError, ArithmeticError) as error:
        text = one_line(error).removeprefix("group 0: ")
        text = re.sub(r"\w+", lambda word: _FLAGS.get(word[0], word[0]), text)
        raise TrainerError(f"{what}: {text}") from None


def build_optimizer(config: Config, model: torch.nn.Module, steps_per_epoch: int) -> Optimizer:
    """The recipe's optimizer; --no-decay and --no-ratio divide the parameters into groups."""
    with _in_a_line(f"--recipe {config.recipe}"):
        recipe, lr, momentum = config.recipe, config.lr, config.momentum
        groups = fastlars.parameter_groups(
            model,
            config.weight_decay,
            no_decay=config.no_decay,  # type: ignore[arg-type]
            no_ratio=config.no_ratio,  # type: ignore[arg-type]
        )
        for group in groups:
            # With --precision fp16 the step itself divides by the loss scale: no other code reads
            # the gradients afterwards.
            group["fused_unscale"] = True
        if recipe == "lamb":
            return fastlars.LAMB(
                groups,
                lr=lr,
                bias_correction=config.bias_correction,
                max_grad_norm=config.max_grad_norm or None,
            )
        if recipe == "akiba":
            return fastlars.RMSpropWarmup(
                groups,
                lr=lr,
                momentum=momentum,
                center_steps=config.rmsprop_center * steps_per_epoch,
                period_steps=config.rmsprop_period * steps_per_epoch,
                lr_rmsprop=config.lr_rmsprop,
                transition=config.rmsprop_transition,  # type: ignore[arg-type]
            )
        form: dict[str, Any] = {"momentum": momentum, "trust_coefficient": config.trust_coefficient}
        if recipe == "goyal":
            form = dict(conventions.torch_sgd(momentum=momentum, nesterov=momentum > 0))
        elif recipe == "mlperf":  # with the eps that its reference code runs with
            form = dict(conventions.mlperf_lars(**form, eps=1e-7))
        return fastlars.LARS(groups, lr=lr, **form)


def build_schedule(config: Config, optimizer: Optimizer, steps_per_epoch: int) -> LambdaLR:
    """The learning rate of every step of the run."""
    steps = config.epochs * steps_per_epoch
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if warmup >= steps:
        raise TrainerError(
            f"--warmup-epochs {config.warmup_epochs:g} leaves nothing of --epochs {config.epochs}"
        )
    with _in_a_line("the schedule does not work"):
        if config.schedule == "slow-start":
            if warmup:
                raise ValueError("slow-start has no warm-up: add --warmup-epochs 0")
            epochs = [epoch / 90 * config.epochs for epoch in (40, 70, 85)]
            return schedules.slow_start(optimizer, steps_per_epoch=steps_per_epoch, epochs=epochs)
        if config.schedule == "poly":
            return schedules.polynomial(
                optimizer,
                # MLPerf's reference counts one iteration more.
                steps=steps + (config.recipe == "mlperf"),
                power=config.power,
                end_lr=config.end_lr,
                warmup_steps=warmup,
                warmup_from=config.warmup_from,
            )
        cuts = (steps // 3, 2 * steps // 3, 8 * steps // 9)
        return schedules.step_decay(
            optimizer,
            milestones=sorted({cut for cut in cuts if cut > 0}),
            warmup_steps=warmup,
            warmup_from=config.warmup_from,
        )
