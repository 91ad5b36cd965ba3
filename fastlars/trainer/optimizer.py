"""The optimizer and the schedule that a configuration names."""

from __future__ import annotations

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

import fastlars
from fastlars import schedules
from fastlars.trainer.config import Config
from fastlars.trainer.errors import TrainerError


def build_optimizer(config: Config, model: torch.nn.Module) -> Optimizer:
    """LARS, LAMB or SGD with Nesterov momentum; biases and norms without decay and ratio."""
    groups = fastlars.parameter_groups(model, config.weight_decay)
    if config.recipe == "lars":
        return fastlars.LARS(
            groups,
            lr=config.lr,
            momentum=config.momentum,
            trust_coefficient=config.trust_coefficient,
        )
    if config.recipe == "lamb":
        return fastlars.LAMB(groups, lr=config.lr)
    return torch.optim.SGD(
        groups, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0
    )


def build_schedule(config: Config, optimizer: Optimizer, steps_per_epoch: int) -> LambdaLR:
    """The learning rate of every step of the run."""
    steps = config.epochs * steps_per_epoch
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if warmup >= steps:
        raise TrainerError(
            f"--warmup-epochs {config.warmup_epochs:g} leaves nothing of --epochs {config.epochs}"
        )
    try:
        if config.schedule == "poly":
            return schedules.polynomial(
                optimizer,
                steps=steps,
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
    except ValueError as error:
        raise TrainerError(f"the schedule does not work: {error}") from None


def adapted_ratios(optimizer: Optimizer, model: torch.nn.Module) -> dict[str, float]:
    """Last trust ratio of each adapted parameter, by name; empty for optimizers without any."""
    ratios = getattr(optimizer, "trust_ratios", None)
    if ratios is None:
        return {}
    names = {parameter: name for name, parameter in model.named_parameters()}
    adapted = {
        parameter
        for group in optimizer.param_groups
        if group.get("adapt", True)
        for parameter in group["params"]
    }
    by_parameter = ratios()
    return {
        name: float(by_parameter[parameter])
        for parameter, name in names.items()
        if parameter in adapted and parameter in by_parameter
    }
