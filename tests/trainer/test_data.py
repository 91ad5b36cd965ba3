"""Images in processes of their own: three that share a run, and runs that end early."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from fastlars.trainer.data.dataset import Data
from repository_files import TESTS, python_path
from trainer.helpers import folder, load, records, tiny_net, write_images


def start(*arguments: object, processes: int = 0) -> subprocess.Popen[str]:
    """The trainer with the tiny model, in a process group of its own; under torchrun if asked."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}")
    command = (*(torchrun if processes else ()), TESTS / "trainer" / "run_tiny.py", *arguments)
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        env=os.environ | {"PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def alive(group: int) -> list[int]:
    """The processes of a group, without zombies."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:  # gone meanwhile
            continue
        if int(fields[2]) == group and fields[0] not in "ZX":
            found.append(int(status.parent.name))
    return found


def evaluated(run: Path, images: Data) -> tuple[float, int]:
    """Mean loss of a run's checkpoint on all test images, and the number of images."""
    net = tiny_net("", len(images.classes), "", 0)
    net.load_state_dict(load(run)["model"])
    pictures, labels = next(images.test([torch.arange(images.test_size)]))
    with torch.inference_mode():
        return functional.cross_entropy(net.eval()(pictures), labels).item(), len(labels)


@pytest.mark.slow
def test_three_processes_test_every_image_once(tmp_path: Path) -> None:
    """16 of them, one of which cannot be read: 5, 5 and 5, in batches of 4."""
    images, run = tmp_path / "images", tmp_path / "run"
    for part, count in (("train", 12), ("val", 8)):
        for seed, name in enumerate(("ant", "bee")):
            write_images(images / part / name, count, seed)
    for bad in (images / "val" / "ant" / "003.png", images / "train" / "bee" / "004.png"):
        bad.write_bytes(bad.read_bytes()[:200])
    started = start(
        "--data", images, "--cache", "on", "--workers", 1, "--max-bad-images", 2, "--epochs", 1,
        "--batch-size", 12, "--lr", 0.1, "--output", run, processes=3,
    )  # fmt: skip
    _, err = started.communicate(timeout=600)
    assert started.returncode == 0, err
    assert err.count("warning: skipped image") == 2  # all three read it, one reports it
    (test,) = [record for record in records(run) if record["kind"] == "test"]
    loss, count = evaluated(run, folder(images, max_bad_images=2))
    assert test["images"] == count == 15
    assert test["loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", ["SIGINT", "SIGKILL"])
def test_no_worker_outlives_the_run(images: Path, tmp_path: Path, name: str) -> None:
    """Ctrl-C reaches workers too; a kill reaches the trainer alone."""
    run, number = tmp_path / "run", signal.Signals[name]
    started = start(
        "--data", images, "--cache", "off", "--workers", 2, "--epochs", 10_000, "--batch-size", 8,
        "--lr", 0.1, "--output", run,
    )  # fmt: skip
    log, deadline = run / "metrics.jsonl", time.monotonic() + 300
    while not (log.exists() and '"train"' in log.read_text()):
        assert time.monotonic() < deadline
        assert started.poll() is None, started.communicate()
        time.sleep(0.05)
    assert len(alive(started.pid)) >= 3
    (os.killpg if name == "SIGINT" else os.kill)(started.pid, number)
    started.wait(timeout=600)
    deadline = time.monotonic() + 300  # workers look after their parent every 5 s
    while alive(started.pid):
        assert time.monotonic() < deadline, alive(started.pid)
        time.sleep(0.05)
    out, err = started.communicate(timeout=600)
    if name == "SIGKILL":
        return
    assert started.returncode == 128 + number
    assert "go on with: python -m fastlars.trainer --resume" in out
    assert err == ""
