"""A run that was stopped and resumed is the run that was not, to the bit."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastlars.trainer.model.context import TrainingContext
from fastlars.trainer.run import loop
from trainer.helpers import Outcome, assert_same, load, records

Train = Callable[..., Outcome]

# 1,437 digits: 5 steps of 256 an epoch. 36 images: 4 steps of 8.
DIGITS = ("--epochs", 2, "--batch-size", 256, "--log-every", 2)
FOLDER = ("--epochs", 2, "--batch-size", 8, "--log-every", 3, "--lr", 0.1)


def assert_same_runs(one: Path, other: Path) -> None:
    assert_same(load(one), load(other))
    assert records(one) == records(other)


@pytest.mark.usefixtures("tiny", "no_picture")
@pytest.mark.parametrize("recipe", ["lars", "lamb", "goyal", "akiba", "mlperf"])
def test_stopped_anywhere(tmp_path: Path, train: Train, recipe: str) -> None:
    """In an epoch, at its end, within a window of the log, and just before the end."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = (*DIGITS, "--recipe", recipe)
    assert train(*settings, "--output", whole).status == 0
    for steps in (1, 3, 5, 9, 10):
        resume = () if steps == 1 else ("--resume",)
        outcome = train(*settings, "--output", parts, "--max-steps", steps, *resume)
        assert outcome.status == 0
        assert f"stopped by --max-steps at step {steps} of 10" in outcome.out
        assert load(parts)["progress"]["step"] == steps
    assert train("--output", parts, "--resume", "--max-steps", 0).status == 0
    assert_same_runs(whole, parts)


@pytest.mark.usefixtures("tiny", "no_picture")
@pytest.mark.parametrize("workers", [0, 2])
def test_stopped_within_an_epoch_of_a_folder(
    tmp_path: Path, train: Train, images: Path, workers: int
) -> None:
    """Augmentation goes on where it was, whatever the number of workers before and after."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = (*FOLDER, "--data", images, "--cache", "off")
    assert train(*settings, "--workers", 0, "--output", whole).status == 0
    first = train(*settings, "--workers", 2 - workers, "--output", parts, "--max-steps", 6)
    assert first.status == 0
    again = train("--resume", "--output", parts, "--workers", workers, "--max-steps", 0)
    assert again.status == 0
    assert_same_runs(whole, parts)


@pytest.mark.usefixtures("tiny", "no_picture")
@pytest.mark.parametrize("large", [False, True])
def test_no_step_draws_from_a_global_generator(
    tmp_path: Path, train: Train, images: Path, large: bool
) -> None:
    """So a checkpoint needs no states of them. Large images are cropped by torchvision."""
    size = ("--image-size", 72) if large else ()
    runs = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index]
        runs.append(tmp_path / str(seed))
        flags = (*FOLDER, *size, "--workers", 0, "--data", images, "--output", runs[-1])
        assert train(*flags).status == 0
        after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index]
        assert before[:2] == after[:2]
        assert torch.equal(before[2], after[2])
    assert_same_runs(*runs)


@pytest.mark.usefixtures("tiny", "no_picture")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_signal_during_a_step(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    number = signal.Signals[name]
    step = loop.step

    def interrupted(context: TrainingContext, *arguments: Any, **options: Any) -> Any:
        if context.progress.step == 6:
            os.kill(os.getpid(), number)
        return step(context, *arguments, **options)

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(*DIGITS, "--output", whole).status == 0
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "step", interrupted)
        outcome = train(*DIGITS, "--output", parts)
    assert outcome.status == 128 + number
    last = outcome.out.splitlines()[-1]
    command = f"python -m fastlars.trainer --resume {parts / 'checkpoint.pt'}"
    assert last == f"stopped by {name} at step 7 of 10; go on with: {command}"
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert train(*command.split()[3:]).status == 0
    assert_same_runs(whole, parts)


@pytest.mark.usefixtures("tiny", "no_picture")
def test_second_ctrl_c_ends_at_once(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = loop.step

    def impatient(context: TrainingContext, *arguments: Any, **options: Any) -> Any:
        if context.progress.step == 6:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return step(context, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "step", impatient)
        outcome = train(*DIGITS, "--output", tmp_path / "run")
    assert outcome.status == 130
    assert len(outcome.err.splitlines()) == 1
    assert load(tmp_path / "run")["progress"]["step"] == 5  # the epoch's end
    assert train("--output", tmp_path / "run", "--resume").status == 0


@pytest.mark.slow
@pytest.mark.usefixtures("no_picture")
def test_ctrl_c_from_outside_with_a_resnet(tmp_path: Path, train: Train) -> None:
    """The module as a user starts it; also shows that a ResNet computes the same bits twice."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    settings = ("--model", "resnet18", "--batch-size", 16, "--micro-batch", 8, "--log-every", 1)
    started = subprocess.Popen(
        [sys.executable, "-m", "fastlars.trainer", *map(str, settings), "--output", str(run)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Sums of another number of threads are rounded otherwise.
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    log, deadline = run / "metrics.jsonl", time.monotonic() + 300
    while not (log.exists() and '"train"' in log.read_text()):
        assert time.monotonic() < deadline
        assert started.poll() is None, started.communicate()
        time.sleep(0.05)
    started.send_signal(signal.SIGINT)
    out, err = started.communicate(timeout=600)
    assert (started.returncode, err) == (130, "")
    assert "go on with: python -m fastlars.trainer --resume" in out.splitlines()[-1]
    stopped_at = load(run)["progress"]["step"]
    assert 0 < stopped_at < 60

    until = stopped_at + 3
    assert train("--resume", run / "checkpoint.pt", "--max-steps", until).status == 0
    assert train(*settings, "--output", whole, "--max-steps", until).status == 0
    assert_same_runs(whole, run)


@pytest.mark.usefixtures("tiny", "no_picture")
def test_lines_after_the_checkpoint_are_dropped(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run killed between two checkpoints has logged steps that will come again."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert train(*DIGITS, "--output", whole).status == 0
    step = loop.step

    def crashing(context: TrainingContext, *arguments: Any, **options: Any) -> Any:
        if context.progress.step == 9:
            raise SystemExit(1)
        return step(context, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "step", crashing)
        with pytest.raises(SystemExit):
            train(*DIGITS, "--output", run)
    assert max(record.get("step", 0) for record in records(run)) == 9
    with open(run / "metrics.jsonl", "a") as log:
        log.write('{"kind": "train", "st')  # cut short by the kill
    assert train("--output", run, "--resume").status == 0
    assert_same_runs(whole, run)


@pytest.mark.usefixtures("tiny", "no_picture")
def test_into_another_directory(tmp_path: Path, train: Train) -> None:
    """The log comes along, and the first directory stays as it was."""
    whole, first, second = (tmp_path / name for name in ("whole", "first", "second"))
    assert train(*DIGITS, "--output", whole).status == 0
    assert train(*DIGITS, "--output", first, "--max-steps", 4).status == 0
    before = (first / "checkpoint.pt").read_bytes(), (first / "metrics.jsonl").read_bytes()
    outcome = train("--resume", first, "--output", second, "--max-steps", 0)
    assert outcome.status == 0
    assert_same_runs(whole, second)
    assert before == (
        (first / "checkpoint.pt").read_bytes(),
        (first / "metrics.jsonl").read_bytes(),
    )


@pytest.mark.usefixtures("tiny", "no_picture")
def test_a_finished_run_only_repeats_its_result(tmp_path: Path, train: Train) -> None:
    first = train(*DIGITS, "--output", tmp_path)
    again = train("--output", tmp_path, "--resume")
    assert again.status == 0
    result = [line for line in first.out.splitlines() if line.startswith("final test accuracy")]
    assert result[0].split(";")[0] in again.out


@pytest.mark.usefixtures("tiny", "no_picture")
def test_a_checkpoint_without_its_log(tmp_path: Path, train: Train) -> None:
    """It counts lines that are not there; a finished run still has a result."""
    run, alone = tmp_path / "run", tmp_path / "alone"
    for steps in (8, 0):
        assert train(*DIGITS, "--output", run, "--resume", "auto", "--max-steps", steps).status == 0
        shutil.rmtree(alone, ignore_errors=True)
        alone.mkdir()
        shutil.copy(run / "checkpoint.pt", alone)
        outcome = train("--output", alone, "--resume", "--max-steps", 0)
        assert outcome.status == 0, outcome.err
        assert "final test accuracy: " in outcome.out
        lines = (alone / "metrics.jsonl").read_text().splitlines()
        assert load(alone)["log_lines"] == len(lines) - 1  # all but that of the end


@pytest.mark.usefixtures("tiny", "no_picture")
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--lr", 3.0), "has 5.0; leave --lr out to resume"),
        (("--recipe", "goyal"), "has lars; leave --recipe out"),
        (("--epochs", 3), "--epochs 3: the run in"),
        (("--seed", 1), "has 0; leave --seed out"),
    ],
)
def test_other_settings_are_refused(
    tmp_path: Path, train: Train, flags: tuple[object, ...], message: str
) -> None:
    settings = (*DIGITS, "--lr", 5.0)
    assert train(*settings, "--output", tmp_path, "--max-steps", 1).status == 0
    before = (tmp_path / "checkpoint.pt").read_bytes()
    outcome = train("--output", tmp_path, "--resume", *flags)
    assert outcome.status == 2
    assert message in outcome.err
    assert len(outcome.err.splitlines()) == 1
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


@pytest.mark.usefixtures("tiny", "no_picture")
def test_from_another_folder(
    tmp_path: Path, train: Train, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The images are found again, though --data was given relative to the first folder."""
    monkeypatch.chdir(images.parent)
    flags = (*FOLDER, "--data", images.name, "--workers", 0)
    assert train(*flags, "--output", "run", "--max-steps", 1).status == 0
    assert load(images.parent / "run")["config"]["data"] == str(images)
    (images.parent / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    outcome = train("--output", "../run", "--resume", "--max-steps", 0)
    assert outcome.status == 0, outcome.err


@pytest.mark.usefixtures("tiny", "no_picture")
def test_other_images_are_refused(tmp_path: Path, train: Train, images: Path) -> None:
    run = tmp_path / "run"
    assert train(*FOLDER, "--data", images, "--output", run, "--max-steps", 1).status == 0
    (images / "train" / "ant" / "000.png").unlink()
    outcome = train("--output", run, "--resume")
    assert outcome.status == 2
    assert "train_size is 35, was 36" in outcome.err
