"""MLPerf's log lines."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.helpers import Outcome, records

Train = Callable[..., Outcome]
pytestmark = pytest.mark.usefixtures("tiny", "no_picture")
SHORT = ("--epochs", 2, "--batch-size", 512, "--mllog")  # two steps an epoch


def lines(outcome: Outcome) -> list[dict[str, Any]]:
    mark = ":::MLLOG "
    return [json.loads(line[len(mark) :]) for line in outcome.out.splitlines() if mark in line]


def events(outcome: Outcome) -> list[tuple[str, int | str | None]]:
    """Key and epoch, or status, of what happened after the description."""
    keys = [(line["key"], line["metadata"]) for line in lines(outcome)]
    start = keys.index(("run_start", {}))
    return [(key, data.get("epoch_num", data.get("status"))) for key, data in keys[start:]]


def epoch(number: int) -> list[tuple[str, int | str | None]]:
    keys = ("epoch_start", "epoch_stop", "eval_start", "eval_accuracy", "eval_stop")
    return [(key, number) for key in keys]


def test_lines_have_the_published_fields(tmp_path: Path, train: Train) -> None:
    before = time.time() * 1000
    outcome = train(*SHORT, "--recipe", "mlperf", "--output", tmp_path)
    assert outcome.status == 0, outcome.err
    found = lines(outcome)
    fields = ["namespace", "time_ms", "event_type", "key", "value", "metadata"]
    assert all(list(line) == fields for line in found)
    times = [line["time_ms"] for line in found]
    assert before - 1 <= times[0]
    assert times == sorted(times)
    types = {"start": "INTERVAL_START", "stop": "INTERVAL_END"}
    for line in found:
        assert line["event_type"] == types.get(line["key"].split("_")[-1], "POINT_IN_TIME")
    assert events(outcome) == [("run_start", None), *epoch(1), *epoch(2), ("run_stop", "success")]
    tests = [record["accuracy"] for record in records(tmp_path) if record["kind"] == "test"]
    assert [line["value"] for line in found if line["key"] == "eval_accuracy"] == tests


@pytest.mark.parametrize(("recipe", "name"), [("mlperf", "lars"), ("goyal", "sgd")])
def test_the_run_is_described(tmp_path: Path, train: Train, recipe: str, name: str) -> None:
    flags = (
        "--recipe", recipe, "--lr", 0.3, "--warmup-epochs", 0.5, "--weight-decay", 0.02,
        "--seed", 7, "--momentum", 0.8, "--max-steps", 1, "--micro-batch", 256, "--bn-batch", 128,
    )  # fmt: skip
    outcome = train(*SHORT, *flags, "--output", tmp_path)
    assert outcome.status == 0, outcome.err
    found = {line["key"]: line["value"] for line in lines(outcome)}
    expected = {
        "submission_benchmark": "resnet",
        "global_batch_size": 512,
        "gradient_accumulation_steps": 2,
        "model_bn_span": 128,
        "train_samples": 1437,
        "eval_samples": 360,
        "seed": 7,
        "opt_name": name,
        "opt_base_learning_rate": 0.3,
        "opt_learning_rate_warmup_epochs": 0.5,
        "opt_weight_decay": 0.02,
    }
    lars = {
        "lars_opt_base_learning_rate": 0.3,
        "lars_opt_learning_rate_warmup_epochs": 0.5,
        "lars_opt_momentum": 0.8,
        "lars_opt_weight_decay": 0.02,
        "lars_opt_learning_rate_decay_poly_power": 2.0,
        "lars_opt_learning_rate_decay_steps": 4,  # of 4 steps one warms up; the reference adds one
        "lars_opt_end_learning_rate": 0.0,
        "lars_epsilon": 1e-7,
    }
    expected |= lars if name == "lars" else {}
    assert {key: found[key] for key in expected} == expected
    assert name == "lars" or not [key for key in found if key.startswith("lars")]


def test_a_run_in_parts(tmp_path: Path, train: Train) -> None:
    """Each part tells its own events; what was under way when it stopped has no end."""
    flags = (*SHORT, "--output", tmp_path)
    start, aborted = ("run_start", None), ("run_stop", "aborted")
    assert events(train(*flags, "--max-steps", 1)) == [start, ("epoch_start", 1), aborted]
    again = ("--resume", "--mllog", "--output", tmp_path)
    part = events(train(*again, "--max-steps", 2))  # before the evaluation
    assert part == [start, *epoch(1)[:3], aborted]
    part = events(train(*again, "--max-steps", 3))
    assert part == [start, *epoch(1)[2:], ("epoch_start", 2), aborted]
    assert events(train(*again, "--max-steps", 0)) == [start, *epoch(2), ("run_stop", "success")]
    assert events(train(*again)) == [start, ("run_stop", "success")]


def test_a_run_that_fails_was_aborted(tmp_path: Path, train: Train) -> None:
    outcome = train(*SHORT, "--lr", 1e30, "--warmup-epochs", 0, "--output", tmp_path / "run")
    assert outcome.status == 3
    assert events(outcome)[-1] == ("run_stop", "aborted")


def test_no_lines_without_the_flag(tmp_path: Path, train: Train) -> None:
    assert lines(train(*SHORT, "--no-mllog", "--max-steps", 1, "--output", tmp_path)) == []
