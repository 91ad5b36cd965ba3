"""Half precision: what a gradient scaler skips, keeps and gives up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import fastlars
from fastlars.trainer.errors import TrainerError
from fastlars.trainer.model.precision import Precision
from trainer.helpers import Outcome, assert_same, load, records

Train = Callable[..., Outcome]
CPU = torch.device("cpu")
FP16 = ("--epochs", 2, "--batch-size", 256, "--precision", "fp16")  # 5 steps an epoch


def test_types_of_a_forward_pass() -> None:
    layer, x = nn.Linear(4, 2), torch.ones(3, 4)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        with Precision(name, CPU).autocast():
            assert layer(x).dtype is dtype
    assert Precision("auto", CPU).name == "fp32"


@pytest.mark.parametrize("kind", [fastlars.LARS, fastlars.LAMB, torch.optim.SGD])
def test_a_step_that_overflows_is_skipped(kind: type[torch.optim.Optimizer]) -> None:
    """Of optimizers that take the scaler's verdict themselves, and of others."""
    precision, layer = Precision("fp16", CPU), nn.Linear(4, 2)
    optimizer = kind(layer.parameters(), lr=0.1)
    start = layer.weight.detach().clone()
    taken, scales = [], []
    for factor in (1.0, 1e30, 1.0):
        optimizer.zero_grad()
        with precision.autocast():
            loss = layer(torch.ones(3, 4)).float().square().mean()
        precision.scaled(loss * factor).backward()
        before = layer.weight.detach().clone()
        taken.append(precision.step(optimizer))
        scales.append(precision.gradient_scale)
        assert torch.equal(before, layer.weight) is not taken[-1]
    assert taken == [True, False, True]
    assert scales == [65536.0, 32768.0, 32768.0]
    assert not torch.equal(start, layer.weight)


def overflowing(monkeypatch: pytest.MonkeyPatch, skipped: range) -> None:
    """Have the backward passes of these numbers overflow."""
    scaled, count = Precision.scaled, iter(range(10**9))

    def play(self: Precision, loss: torch.Tensor) -> torch.Tensor:
        factor = float("inf") if next(count) in skipped else 1.0
        return scaled(self, loss) * factor

    monkeypatch.setattr(Precision, "scaled", play)


@pytest.mark.usefixtures("tiny", "no_picture")
def test_skipped_steps_do_not_advance_the_schedule(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    overflowing(monkeypatch, range(2))
    settings = (*FP16, "--log-every", 1, "--warmup-epochs", 1, "--lr", 1)
    assert train(*settings, "--output", tmp_path).status == 0
    state = load(tmp_path)
    assert state["progress"]["step"] == 10
    assert state["schedule"]["last_epoch"] == 8
    assert state["scaler"]["scale"] == 65536.0 / 4
    rates = [record["lr"] for record in records(tmp_path) if record["kind"] == "train"]
    assert rates[:5] == pytest.approx([0.0, 0.0, 0.0, 0.2, 0.4])


@pytest.mark.usefixtures("tiny", "no_picture")
def test_norms_before_the_first_step_that_is_taken(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of gradients as they are, without the loss's scale."""
    found = []
    for name, skipped in (("fp32", range(0)), ("fp16", range(0)), ("fp16", range(2))):
        run = tmp_path / f"{name}-{len(skipped)}"
        with monkeypatch.context() as patch:
            overflowing(patch, skipped)
            flags = ("--precision", name, "--max-steps", 4, "--output", run)
            assert train(*FP16, *flags).status == 0
        (record,) = (record for record in records(run) if record["kind"] == "norms")
        assert record["step"] == len(skipped)
        found.append(record["layers"])
    for layer, (weight, gradient) in found[0].items():
        assert found[1][layer] == pytest.approx([weight, gradient], rel=0.02)
        assert found[2][layer][0] == pytest.approx(weight)
        assert found[2][layer][1] < 10 * gradient


@pytest.mark.usefixtures("tiny", "no_picture")
def test_resumed_scaler(tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scale and its count of good steps are those of a run that was not stopped."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    with monkeypatch.context() as patch:
        overflowing(patch, range(1))
        assert train(*FP16, "--output", whole).status == 0
    with monkeypatch.context() as patch:
        overflowing(patch, range(1))
        assert train(*FP16, "--output", parts, "--max-steps", 3).status == 0
    assert train("--resume", "--output", parts, "--max-steps", 0).status == 0
    assert load(whole)["scaler"] == load(parts)["scaler"]
    assert load(whole)["scaler"]["_growth_tracker"] == 9
    assert_same(load(whole), load(parts))


@pytest.mark.slow
@pytest.mark.usefixtures("tiny", "no_picture")
def test_gradients_that_overflow_at_any_scale(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    overflowing(monkeypatch, range(10**9))
    outcome = train(*FP16, "--epochs", 7, "--output", tmp_path / "run")
    assert outcome.status == 2
    assert "NaN or infinite in --precision fp16, however small" in outcome.err
    assert load(tmp_path / "run")["progress"]["step"] == 30  # 2 ** (16 - 30) is the last scale


@pytest.mark.slow
@pytest.mark.usefixtures("tiny", "no_picture")
def test_half_precision_learns_as_float32_does(tmp_path: Path, train: Train) -> None:
    losses = []
    for name in ("fp32", "bf16", "fp16"):
        run = tmp_path / name
        settings = ("--epochs", 3, "--batch-size", 64, "--precision", name)
        assert train(*settings, "--output", run).status == 0
        tests = [record["loss"] for record in records(run) if record["kind"] == "test"]
        assert tests[-1] < 0.8 * tests[0]
        losses.append(tests[-1])
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=0.1)


@pytest.mark.gpu
@pytest.mark.usefixtures("tiny", "no_picture")
@pytest.mark.parametrize("precision", ["auto", "fp16"])
def test_on_a_gpu(tmp_path: Path, train: Train, precision: str) -> None:
    """Trains, and goes on with its scaler and its average."""
    settings = ("--epochs", 4, "--batch-size", 64, "--device", "cuda", "--ema", 0.5)
    flags = ("--precision", precision, "--output", tmp_path)
    assert train(*settings, *flags, "--max-steps", 30).status == 0
    assert train("--resume", "--output", tmp_path, "--max-steps", 0).status == 0
    tests = [record["accuracy"] for record in records(tmp_path) if record["kind"] == "test"]
    assert tests[-1] > 0.5
    assert bool(load(tmp_path)["scaler"]) is (precision == "fp16")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--overlap", "--precision", "fp16"), "--overlap does not go with --precision fp16"),
        (("--compression", "bf16"), "--compression bf16 needs --overlap"),
    ],
)
def test_what_does_not_go_together(
    tmp_path: Path, train: Train, flags: tuple[str, ...], message: str
) -> None:
    outcome = train(*flags, "--output", tmp_path / "run")
    assert outcome.status == 2
    assert message in outcome.err
    assert not (tmp_path / "run").exists()


def test_a_scale_below_the_least_is_an_error() -> None:
    precision = Precision("fp16", CPU)
    precision.load_state_dict(precision.state_dict() | {"scale": 2.0**-14})
    layer = nn.Linear(1, 1)
    precision.scaled(layer(torch.ones(1, 1)).sum() * float("inf")).backward()
    with pytest.raises(TrainerError, match="NaN or infinite"):
        precision.step(torch.optim.SGD(layer.parameters(), lr=0.1))
