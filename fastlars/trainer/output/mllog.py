"""A run's records as lines in the format of MLPerf's logs (github.com/mlcommons/logging).

The lines are MLPerf-style, not a submission: a run here warms up no caches, names no submitter and
ends after its epochs, not at a target.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from fastlars.trainer.model.context import TrainingContext
from fastlars.trainer.output.records import Record

_OPTIMIZERS = {"lars": "lars", "mlperf": "lars", "lamb": "lamb", "goyal": "sgd"}


class MLLog:
    """Prints a line for every event of a run, beginning with what the run is.

    Args:
        context: the run, at the point that it starts from.
        say: prints a line.
    """

    def __init__(self, context: TrainingContext, say: Callable[[str], None]) -> None:
        self._say, progress = say, context.progress
        self._epochs, self._steps_per_epoch = context.config.epochs, context.order.steps_per_epoch
        self._epoch = progress.evaluated + 1
        self._running = True
        for key, value in _description(context).items():
            self._line("POINT_IN_TIME", key, value)
        self._line("INTERVAL_START", "run_start")
        if self._epoch <= self._epochs:
            evaluates = progress.step == self._epoch * self._steps_per_epoch
            self._in_epoch("INTERVAL_START", "eval_start" if evaluates else "epoch_start")

    def record(self, record: Record) -> None:
        """Print what one record says."""
        kind = record["kind"]
        if kind == "train" and record["step"] == self._epoch * self._steps_per_epoch:
            self._in_epoch("INTERVAL_END", "epoch_stop")
            self._in_epoch("INTERVAL_START", "eval_start")
        elif kind == "test":
            self._in_epoch("POINT_IN_TIME", "eval_accuracy", record["accuracy"])
            self._in_epoch("INTERVAL_END", "eval_stop")
            self._epoch += 1
            if self._epoch <= self._epochs:
                self._in_epoch("INTERVAL_START", "epoch_start")
        elif kind == "end":
            self._stop("success" if record["finished"] else "aborted")

    def sync(self) -> None:
        """Nothing to do: lines are printed at once."""

    def close(self) -> None:
        """A run that never came to its end was aborted."""
        if self._running:
            self._stop("aborted")

    def _stop(self, status: str) -> None:
        self._running = False
        self._line("INTERVAL_END", "run_stop", status=status)

    def _in_epoch(self, event: str, key: str, value: Any = None) -> None:
        self._line(event, key, value, epoch_num=self._epoch)

    def _line(self, event: str, key: str, value: Any = None, **metadata: Any) -> None:
        fields = {
            "namespace": "",
            "time_ms": time.time_ns() // 1_000_000,
            "event_type": event,
            "key": key,
            "value": value,
            "metadata": metadata,
        }
        self._say(f":::MLLOG {json.dumps(fields)}")


def _description(context: TrainingContext) -> dict[str, Any]:
    """What the run is, by the keys of a ResNet run."""
    config, order = context.config, context.order
    warmup = round(config.warmup_epochs * order.steps_per_epoch)
    found = {
        "submission_benchmark": "resnet",
        "global_batch_size": config.batch_size,
        "gradient_accumulation_steps": order.micro_batches,
        "model_bn_span": config.bn_batch or order.micro_batch,
        "train_samples": context.data.train_size,
        "eval_samples": context.data.test_size,
        "seed": config.seed,
        "opt_name": _OPTIMIZERS.get(config.recipe, config.recipe),
        "opt_base_learning_rate": config.lr,
        "opt_learning_rate_warmup_epochs": config.warmup_epochs,
        "opt_weight_decay": config.weight_decay,
    }
    if found["opt_name"] == "lars":
        found |= {
            "lars_opt_base_learning_rate": config.lr,
            "lars_opt_learning_rate_warmup_epochs": config.warmup_epochs,
            "lars_opt_momentum": config.momentum,
            "lars_opt_weight_decay": config.weight_decay,
            "lars_epsilon": context.optimizer.param_groups[0]["eps"],
        }
        if config.schedule == "poly":
            # As the reference counts them: one more than there are left.
            left = config.epochs * order.steps_per_epoch - warmup + (config.recipe == "mlperf")
            found |= {
                "lars_opt_learning_rate_decay_poly_power": config.power,
                "lars_opt_learning_rate_decay_steps": left,
                "lars_opt_end_learning_rate": config.end_lr,
            }
    return found
