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

_EVENTS = {"start": "INTERVAL_START", "stop": "INTERVAL_END"}  # by the last word of a key
_OPTIMIZERS = {"mlperf": "lars", "goyal": "sgd"}  # of the recipes that are named otherwise


class MLLog:
    """Prints a line for every event of a run, beginning with what the run is."""

    def __init__(self, context: TrainingContext, say: Callable[[str], None]) -> None:
        self._say, self._running, progress = say, True, context.progress
        self._epochs, self._steps_per_epoch = context.config.epochs, context.order.steps_per_epoch
        self._epoch = progress.evaluated + 1
        for key, value in _description(context).items():
            self._line(key, value)
        self._line("run_start")
        if self._epoch <= self._epochs:
            evaluates = progress.step == self._epoch * self._steps_per_epoch
            self._in_epoch("eval_start" if evaluates else "epoch_start")

    def record(self, record: dict[str, Any]) -> None:
        kind = record["kind"]
        if kind == "train" and record["step"] == self._epoch * self._steps_per_epoch:
            self._in_epoch("epoch_stop")
            self._in_epoch("eval_start")
        elif kind == "test":
            self._in_epoch("eval_accuracy", record["accuracy"])
            self._in_epoch("eval_stop")
            self._epoch += 1
            if self._epoch <= self._epochs:
                self._in_epoch("epoch_start")
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
        self._line("run_stop", status=status)

    def _in_epoch(self, key: str, value: Any = None) -> None:
        self._line(key, value, epoch_num=self._epoch)

    def _line(self, key: str, value: Any = None, **metadata: Any) -> None:
        fields = {
            "namespace": "",
            "time_ms": time.time_ns() // 1_000_000,
            "event_type": _EVENTS.get(key.split("_")[-1], "POINT_IN_TIME"),
            "key": key,
            "value": value,
            "metadata": metadata,
        }
        self._say(f":::MLLOG {json.dumps(fields)}")


def _description(context: TrainingContext) -> dict[str, Any]:
    """Return what the run is, by the keys of MLPerf's ResNet benchmark."""
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
            # The recipe mlperf counts one more, as its reference does.
            left = config.epochs * order.steps_per_epoch - warmup + (config.recipe == "mlperf")
            found |= {
                "lars_opt_learning_rate_decay_poly_power": config.power,
                "lars_opt_learning_rate_decay_steps": left,
                "lars_opt_end_learning_rate": config.end_lr,
            }
    return found
