"""What a step and an evaluation compute."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import fastlars
from fastlars.trainer.data.digits import Digits
from fastlars.trainer.data.order import BatchOrder
from fastlars.trainer.model import resnet
from fastlars.trainer.model.context import TrainingContext
from fastlars.trainer.run import loop
from trainer.helpers import Outcome, load, records, tiny_net

Train = Callable[..., Outcome]
pytestmark = pytest.mark.usefixtures("no_picture")


def without_norm(_name: str, classes: int, _stem: str, seed: int) -> nn.Module:
    net = tiny_net("", classes, "", seed)
    return nn.Sequential(*(layer for layer in net if not isinstance(layer, nn.BatchNorm2d)))


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    # Sums of 64 float32 terms in another order, for 3 steps.
    torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(("recipe", "lr"), [("lars", 1.0), ("lamb", 0.01), ("goyal", 0.1)])
def test_micro_batches_make_the_big_batch(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch, recipe: str, lr: float
) -> None:
    """Without batch norm, whose statistics are the micro-batch's, to rounding."""
    monkeypatch.setattr(resnet, "build", without_norm)
    states = []
    for micro in (0, 32, 8):
        run = tmp_path / str(micro)
        settings = ("--recipe", recipe, "--batch-size", 64, "--micro-batch", micro, "--lr", lr)
        assert train(*settings, "--warmup-epochs", 0, "--max-steps", 3, "--output", run).status == 0
        states.append(load(run)["model"])
    start = without_norm("", 10, "", 0).state_dict()
    assert not torch.allclose(start["0.weight"], states[0]["0.weight"], atol=1e-3)
    close(states[0], states[1])
    close(states[0], states[2])


@pytest.mark.usefixtures("tiny")
def test_steps_against_a_loop_written_out(tmp_path: Path, train: Train) -> None:
    """Loss divided by the global batch, batch norm per micro-batch, warm-up from the first step."""
    settings = (
        "--epochs", 2, "--batch-size", 64, "--micro-batch", 16, "--lr", 2.0, "--warmup-epochs", 1,
        "--label-smoothing", 0.1, "--weight-decay", 1e-3, "--trust-coefficient", 0.002,
        "--max-steps", 3, "--output", tmp_path,
    )  # fmt: skip
    assert train(*settings).status == 0

    net = tiny_net("", 10, "", 0).train()
    optimizer = fastlars.LARS(fastlars.parameter_groups(net, 1e-3), lr=2.0, trust_coefficient=0.002)
    data = Digits(0, torch.device("cpu"))
    batches = data.train(BatchOrder(data.train_size, 64, 16, 0, 1, 0).from_step(0))
    steps_per_epoch = 1437 // 64
    for step in range(3):
        for group in optimizer.param_groups:
            group["lr"] = 2.0 * step / steps_per_epoch
        optimizer.zero_grad()
        for _ in range(4):
            images, labels = next(batches)
            functional.cross_entropy(net(images), labels, label_smoothing=0.1, reduction="sum").div(
                64
            ).backward()
        optimizer.step()
    close(load(tmp_path)["model"], net.state_dict())


@pytest.mark.gpu
@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("recipe", ["lars", "lamb", "goyal"])
def test_a_step_does_not_wait_for_the_gpu(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    """Steps 2 to 8: plans are made before, and norms are read in the first and the eleventh."""
    step = loop.step

    def watched(context: TrainingContext, *arguments: Any, **options: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error" if 2 <= context.progress.step < 9 else "default")
        try:
            return step(context, *arguments, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(loop, "step", watched)
    settings = ("--batch-size", 128, "--micro-batch", 32, "--max-steps", 10, "--device", "cuda")
    assert train("--recipe", recipe, *settings, "--output", tmp_path).status == 0


@pytest.mark.usefixtures("tiny")
def test_batch_norm_of_the_last_step(tmp_path: Path, train: Train) -> None:
    """Evaluated and saved with the mean over the last step's four ghost batches, and no others."""
    settings = ("--batch-size", 64, "--micro-batch", 32, "--bn-batch", 16, "--lr", 1e-9)
    flags = ("--bn-statistics", "last", "--max-steps", 3, "--output", tmp_path)
    assert train(*settings, *flags).status == 0

    net, data = tiny_net("", 10, "", 0), Digits(0, torch.device("cpu"))
    batches = data.train(BatchOrder(data.train_size, 64, 16, 0, 1, 0).from_step(2))
    with torch.no_grad():
        features = [net[0](next(batches)[0]) for _ in range(4)]
    expected = [torch.stack([f(x) for x in features]).mean(0) for f in (mean, variance)]
    got = load(tmp_path)["model"]
    torch.testing.assert_close(got["1.running_mean"], expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got["1.running_var"], expected[1], rtol=1e-5, atol=1e-6)


def mean(features: torch.Tensor) -> torch.Tensor:
    return features.mean((0, 2, 3))


def variance(features: torch.Tensor) -> torch.Tensor:
    return features.var((0, 2, 3))


@pytest.mark.usefixtures("tiny")
def test_evaluation_counts_every_test_image(tmp_path: Path, train: Train) -> None:
    """360 is no multiple of 50; the numbers in the log are those of the saved model."""
    outcome = train("--epochs", 1, "--batch-size", 50, "--output", tmp_path)
    assert outcome.status == 0
    test = next(record for record in records(tmp_path) if record["kind"] == "test")
    assert test["images"] == 360

    net = tiny_net("", 10, "", 1)
    net.load_state_dict(load(tmp_path)["model"])
    data = Digits(0, torch.device("cpu"))
    images, labels = next(data.test([torch.arange(360)]))
    with torch.no_grad():
        logits = net.eval()(images)
    correct = (logits.argmax(1) == labels).sum().item()
    assert round(test["accuracy"] * 360) == correct
    assert test["loss"] == pytest.approx(functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert f"final test accuracy: {correct / 360:.2%} ({correct} of 360)" in outcome.out


@pytest.mark.usefixtures("tiny")
def test_images_that_cannot_be_read(tmp_path: Path, train: Train, images: Path) -> None:
    """They count nothing: neither in a step's loss, nor in what an evaluation says."""
    for path in (images / "train" / "ant" / "003.png", images / "val" / "bee" / "001.png"):
        path.write_bytes(path.read_bytes()[:200])
    settings = ("--data", images, "--epochs", 2, "--batch-size", 12, "--lr", 0.1, "--workers", 0)
    outcome = train(*settings, "--max-bad-images", 2, "--output", tmp_path / "run")
    assert outcome.status == 0, outcome
    assert outcome.out.count("1 of 15 test images could not be read\n") == 2
    found = records(tmp_path / "run")
    assert [r["images"] for r in found if r["kind"] == "test"] == [14, 14]
    assert sum(r["images"] for r in found if r["kind"] == "train") == 2 * 35


@pytest.mark.usefixtures("tiny")
def test_log(tmp_path: Path, train: Train) -> None:
    """Every line is JSON; windows of the log add up to the epochs; rates are those used."""
    settings = ("--epochs", 2, "--batch-size", 128, "--log-every", 4)
    outcome = train(*settings, "--lr", 1, "--warmup-epochs", 1, "--output", tmp_path)
    assert outcome.status == 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    start, rest = lines[0], lines[1:]
    assert start["kind"] == "start"
    assert start["config"]["batch_size"] == 128
    assert start["versions"]["torch"] == torch.__version__

    windows = [line for line in rest if line["kind"] == "train"]
    assert [line["step"] for line in windows] == [4, 8, 11, 12, 16, 20, 22]
    assert [line["images"] for line in windows] == [512, 512, 384, 128, 512, 512, 256]
    assert all(line["images_per_second"] > 0 for line in windows)
    assert windows[0]["lr"] == pytest.approx(3 / 11)  # of step 4, the fourth from 0
    assert windows[3]["lr"] == pytest.approx(1.0)  # the first after the warm-up

    trust = [line for line in rest if line["kind"] == "trust"]
    assert [line["step"] for line in trust] == list(range(1, 23))
    assert all(set(line["ratios"]) == {"0.weight", "5.weight"} for line in trust)
    assert all(0 < ratio < 10 for line in trust for ratio in line["ratios"].values())

    assert [line["epoch"] for line in rest if line["kind"] == "test"] == [1.0, 2.0]


@pytest.mark.usefixtures("tiny")
def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path, train: Train) -> None:
    outcome = train(
        "--recipe", "goyal", "--lr", 1e30, "--warmup-epochs", 0, "--output", tmp_path / "run"
    )
    assert outcome.status == 3
    assert "the loss is NaN or infinite at step" in outcome.err
    assert len(outcome.err.splitlines()) == 1
    assert sorted(os.listdir(tmp_path / "run")) == ["metrics.jsonl", "run.json"]


def test_resnets() -> None:
    """Zero gamma where a block ends, the stem for small images, weights from the seed alone."""
    torch.manual_seed(1)
    before = torch.get_rng_state()
    net = resnet.build("resnet50", 7, "imagenet", 3)
    assert torch.equal(torch.get_rng_state(), before)
    gammas = [p for name, p in net.named_parameters() if name.endswith("bn3.weight")]
    assert len(gammas) == 16
    assert all(not gamma.any() for gamma in gammas)
    assert net.fc.out_features == 7
    assert net.conv1.weight.is_contiguous(memory_format=torch.channels_last)

    small = resnet.build("resnet18", 7, "small", 3)
    assert small.conv1.weight.shape == (64, 3, 3, 3)
    assert small(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    assert small.layer1(small.relu(small.conv1(torch.zeros(2, 3, 32, 32)))).shape[-2:] == (32, 32)
    again = resnet.build("resnet18", 7, "small", 3)
    assert all(
        torch.equal(one, other)
        for one, other in zip(small.parameters(), again.parameters(), strict=True)
    )
