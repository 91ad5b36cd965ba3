"""Two processes under torchrun, over gloo."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlars.trainer.process.world import StopVote, World
from trainer.helpers import Outcome, assert_same, facts, load, records, write_images
from trainer.processes import finish, start

Train = Callable[..., Outcome]
# SGD: LARS would not notice a gradient that is twice as long. Checkpoints lie between two lines of
# the log, so that it shows who goes on from the sums of all processes.
SETTINGS = ("--recipe", "goyal", "--epochs", 3, "--batch-size", 64, "--log-every", 4)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes that nothing disturbed."""
    run = tmp_path_factory.mktemp("two") / "run"
    outcome = finish(start(*SETTINGS, "--output", run))
    assert outcome.status == 0, outcome
    assert outcome.out.count("final test accuracy") == 1  # one speaks for both
    assert "2 processes on cpu, 32 images each, fp32" in facts(outcome.out)["steps"]
    return run


def parameters(run: Path) -> dict[str, torch.Tensor]:
    state: dict[str, Any] = load(run)["model"]
    return {
        name: value for name, value in state.items() if not name.startswith(("1.running", "1.num"))
    }


@pytest.mark.xdist_group("two processes")
@pytest.mark.usefixtures("tiny", "no_picture")
def test_two_processes_make_the_big_batch(two: Path, tmp_path: Path, train: Train) -> None:
    """As one process with two micro-batches: the batch norm's 32 images are the same ones."""
    run = tmp_path / "one"
    assert train(*SETTINGS, "--micro-batch", 32, "--output", run).status == 0
    one, other = ([r for r in records(at) if r["kind"] == "train"] for at in (run, two))
    assert [(r["step"], r["images"], r["lr"]) for r in one] == [
        (r["step"], r["images"], r["lr"]) for r in other
    ]
    # A loss is as exact as the weights it was computed with, and they drift apart: gradients are
    # summed in another order at each step.
    losses = [(mine["loss"], theirs["loss"]) for mine, theirs in zip(one, other, strict=True)]
    assert max(abs(a / b - 1) for a, b in losses[:1]) < 1e-6
    assert max(abs(a / b - 1) for a, b in losses) < 1e-3
    torch.testing.assert_close(parameters(two), parameters(run), rtol=0, atol=2e-3)


@pytest.mark.xdist_group("two processes")
def test_evaluation_counts_every_test_image(two: Path) -> None:
    """Each process has 180 of 360, in batches of 32."""
    tests = [record for record in records(two) if record["kind"] == "test"]
    assert [record["images"] for record in tests] == [360, 360, 360]


@pytest.mark.xdist_group("two processes")
@pytest.mark.slow
def test_a_killed_process_is_started_again(two: Path, tmp_path: Path) -> None:
    """torchrun restarts both; they go on from the last checkpoint to the same end, to the bit."""
    run = tmp_path / "run"
    flags = ("--checkpoint-every", 10, "--output", run)
    outcome = finish(start(*SETTINGS, *flags, restarts=1, DIE_AT="36"))
    assert outcome.status == 0, outcome
    assert "resumed at step 30 of 66" in outcome.out
    assert_same(load(two), load(run))
    assert records(two) == records(run)


@pytest.mark.xdist_group("two processes")
@pytest.mark.slow
def test_ctrl_c_at_a_terminal(two: Path, tmp_path: Path) -> None:
    """All processes and torchrun get the signal; one checkpoint, one line, and it goes on."""
    run = tmp_path / "run"
    started = start("--epochs", 3000, "--batch-size", 64, "--output", run)
    log, deadline = run / "metrics.jsonl", time.monotonic() + 300
    while not (log.exists() and '"train"' in log.read_text()):
        assert time.monotonic() < deadline
        assert started.poll() is None, started.communicate()
        time.sleep(0.05)
    os.killpg(started.pid, signal.SIGINT)
    outcome = finish(started)
    assert outcome.status != 0
    assert outcome.out.count("go on with: torchrun ... -m fastlars.trainer --resume") == 1
    assert load(run)["progress"]["step"] > 0


@pytest.mark.slow
def test_a_signal_to_one_process(tmp_path: Path) -> None:
    """The other one ends with it, and says why."""
    run = tmp_path / "run"
    flags = ("--checkpoint-every", 10, "--output", run)
    outcome = finish(start(*SETTINGS, *flags, DIE_AT="36", DIE_BY="SIGTERM"))
    assert "stopped by SIGTERM at step" in outcome.out
    last = records(run)[-1]
    assert (last["kind"], last["stopped_by"]) == ("end", "SIGTERM")


@pytest.mark.slow
def test_a_restart_of_a_run_that_came_from_elsewhere(tmp_path: Path) -> None:
    """The command line names the old checkpoint still; the new directory has a later one."""
    old, new = tmp_path / "old", tmp_path / "new"
    assert finish(start(*SETTINGS, "--output", old, "--max-steps", 5)).status == 0
    flags = ("--checkpoint-every", 10, "--max-steps", 40)
    outcome = finish(start("--resume", old, "--output", new, *flags, restarts=1, DIE_AT="36"))
    assert outcome.status == 0, outcome
    assert "resumed at step 5 of 66" in outcome.out
    assert "resumed at step 30 of 66" in outcome.out
    assert load(new)["progress"]["step"] == 40
    assert load(old)["progress"]["step"] == 5


@pytest.mark.slow
def test_no_room_for_the_last_checkpoint(tmp_path: Path) -> None:
    """Tried after the epoch and again at the end, by all processes."""
    outcome = finish(start(*SETTINGS[:3], 1, *SETTINGS[4:], "--output", tmp_path / "run", FULL="1"))
    assert outcome.status != 0
    told = [line for line in outcome.err.splitlines() if "No space left on device" in line]
    assert len(told) == 2, outcome.err
    assert "training goes on" in told[0]
    assert "the previous checkpoint is untouched" in told[1]
    assert "lost its connection" not in outcome.err


@pytest.mark.slow
def test_a_mistake_is_said_once(tmp_path: Path) -> None:
    outcome = finish(start(*SETTINGS, "--data", tmp_path / "absent", "--output", tmp_path / "run"))
    assert outcome.status != 0
    lines = [line for line in outcome.err.splitlines() if line.startswith("fastlars.trainer")]
    assert lines == [
        f"fastlars.trainer: error: --data: cannot read {tmp_path / 'absent'}: "
        "No such file or directory"
    ]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_processes_that_see_other_images(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recipe has other rates for small images: the processes would train with two of them."""
    for name in ("ant", "bee", "cat"):
        for part, count in (("train", 12), ("val", 5)):
            write_images(tmp_path / "node" / "images" / part / name, count, 0, side=80)
    monkeypatch.chdir(tmp_path)
    flags = ("--data", "images", "--stem", "small", "--workers", 0, "--batch-size", 8)
    for more in ((), ("--find-lr",)):
        outcome = finish(start(*flags, *more, ELSEWHERE=str(tmp_path / "node")))
        assert outcome.status != 0
        lines = [line for line in outcome.err.splitlines() if line.startswith("fastlars.trainer")]
        assert lines == [
            "fastlars.trainer: error: --data: the processes do not see the same images in images"
        ]


@pytest.mark.slow
def test_damage_that_one_process_finds(images: Path, tmp_path: Path) -> None:
    """Its line names the image; the other one ends too, without a stack trace of its own."""
    damaged = images / "train" / "bee" / "007.png"
    damaged.write_bytes(damaged.read_bytes()[:200])
    flags = ("--data", images, "--batch-size", 36, "--lr", 0.1, "--workers", 0)
    flags = (*flags, "--cache", "off")  # else all processes find it while they load
    outcome = finish(start("--epochs", 2, *flags, "--output", tmp_path / "run"))
    assert outcome.status != 0
    assert f"fastlars.trainer: error: cannot read image {damaged}: " in outcome.err
    assert 'run_tiny.py", line' not in outcome.err  # torchrun has a trace, the trainer none
    assert not (tmp_path / "run").exists()


def test_one_process_votes_alone() -> None:
    vote = StopVote(World(0, 1, torch.device("cpu")))
    assert [vote.any(mine) for mine in (False, True)] == [False, True]
    assert vote.close() is False
