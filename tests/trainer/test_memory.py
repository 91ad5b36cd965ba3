"""The memory that a run needs: what --dry-run says, what a run takes, and what is refused."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from fastlars.trainer.config import command_line
from fastlars.trainer.data.digits import Digits
from fastlars.trainer.errors import TrainerError
from fastlars.trainer.model import memory
from fastlars.trainer.model.context import Progress, TrainingContext, build
from fastlars.trainer.process.world import World
from repository_files import ROOT
from trainer.helpers import Outcome, files_below, write_images

Train = Callable[..., Outcome]
CPU = torch.device("cpu")
# The most that the process had, of this program alone: what getrusage says of a child begins with
# what its parent had.
PEAK = """
import sys
from fastlars.trainer.__main__ import main
status = main(sys.argv[1:])
print("peak", next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])
sys.exit(status)
"""


def context(**settings: object) -> TrainingContext:
    found = command_line.new_config({"data": "digits", **settings}, 1)
    return build(found, Digits(0, CPU), Progress(), World(0, 1, CPU))


@pytest.mark.usefixtures("tiny")
def test_activations_are_what_autograd_keeps() -> None:
    """Counted by hand: each memory once, however many layers keep it."""
    fixed, for_each = memory.activations(context(batch_size=64))
    image, convolved, pooled = 3 * 32 * 32, 16 * 16 * 16, 144
    # the norm keeps what it is given, the ReLU its result, the loss 10 logarithms and the label
    assert for_each == 4 * (image + 2 * convolved + pooled + 10) + 8
    assert fixed == 4 * (2 * 16) + 4  # mean and deviation of the norm, and the loss's weight


def kept(net: nn.Module, images: torch.Tensor, labels: torch.Tensor, *, bf16: bool) -> int:
    """Bytes that autograd keeps of a pass that takes place, weights not."""
    known = {StorageWeakRef(t.untyped_storage()) for t in [*net.parameters(), *net.buffers()]}
    found: dict[StorageWeakRef, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        found[StorageWeakRef(tensor.untyped_storage())] = tensor.untyped_storage().nbytes()
        return tensor

    net.train()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = net(images)
        loss = nn.functional.cross_entropy(logits.float(), labels)
    total = sum(size for memory, size in found.items() if memory not in known)
    del loss
    return total


@pytest.mark.parametrize(
    ("settings", "off"),
    [({}, 0.0), ({"bn_batch": 4}, 0.0), ({"precision": "bf16"}, 0.1)],
)
def test_activations_of_few_images_without_memory_give_those_of_many(
    settings: dict[str, object], off: float
) -> None:
    job = context(model="resnet20", batch_size=24, **settings)
    before = {name: tensor.clone() for name, tensor in job.model.state_dict().items()}
    fixed, for_each = memory.activations(job)
    assert all(torch.equal(before[name], t) for name, t in job.model.state_dict().items())
    assert not any(p.grad is not None for p in job.model.parameters())
    images, labels = next(iter(job.data.train(iter([(0, torch.arange(24))]))))
    real = kept(job.model, images, labels, bf16="precision" in settings)
    assert fixed + 24 * for_each == pytest.approx(real, rel=off)
    assert fixed < 24 * for_each


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux says what a peak was")
@pytest.mark.parametrize(
    "flags",
    [
        ("--batch-size", 128),
        ("--recipe", "lamb", "--batch-size", 64, "--micro-batch", 16, "--ema", 0.9),
    ],
)
def test_a_dry_run_says_what_a_run_takes(tmp_path: Path, flags: tuple[object, ...]) -> None:
    for split, count in (("train", 64), ("val", 4)):
        for name in ("ant", "bee"):
            write_images(tmp_path / "data" / split / name, count, len(name), 32)
    common = (
        *flags, "--model", "resnet20", "--device", "cpu", "--data", tmp_path / "data",
        "--workers", 0, "--output", tmp_path / "run",
    )  # fmt: skip

    def number(pattern: str, *more: object) -> float:
        command = [sys.executable, "-c", PEAK, *map(str, (*common, *more))]
        path = os.pathsep.join([str(ROOT), *sys.path])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "2"}
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, env=environment, timeout=300
        )
        assert done.returncode == 0, done.stderr
        found = re.search(pattern, done.stdout)
        assert found is not None, done.stdout
        return float(found[1]) * {"GB": 1e9, "MB": 1e6}.get(found[found.lastindex or 1], 1024)

    told = number(r"memory of a process: ([\d.]+) (GB|MB)", "--dry-run")
    peak = number(r"peak (\d+)", "--max-steps", 2)
    assert 1 / 1.3 < told / peak < 1.3, f"said {told / 1e6:.0f} MB, took {peak / 1e6:.0f} MB"


def limited(monkeypatch: pytest.MonkeyPatch, whole: float, free: float) -> None:
    monkeypatch.setattr(memory, "available", lambda _device: (whole, free))


@pytest.mark.usefixtures("no_picture")
def test_what_the_machine_cannot_hold_is_refused_before_images_are_read(
    images: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited(monkeypatch, 64e9, 64e9)
    flags = ("--data", images, "--image-size", 32768, "--batch-size", 16, "--workers", 0)
    flags = (*flags, "--device", "cpu")
    for more in ((), ("--dry-run",), ("--find-lr",), ("--micro-batch", 4)):
        outcome = train(*flags, *more, "--output", images.parent / "run")
        assert outcome.status == 2
        assert outcome.err.count("\n") == 1
        assert re.search(
            r"error: this run needs about [\d.]+ TB of memory, of which activations [\d.]+ TB, and "
            r"this machine has 64.00 GB: set a smaller (--batch-size or )?--micro-batch, "
            r"--image-size or --model \(now --(batch-size 16|micro-batch 4), images of 32768 "
            r"pixels, resnet50\)\n",
            outcome.err,
        ), outcome.err
        assert "read" not in outcome.out
    assert "run" not in files_below(images.parent)


@pytest.mark.usefixtures("tiny", "no_picture")
@pytest.mark.parametrize(
    ("whole", "free", "status", "said"),
    [
        (1.0, 1.0, 0, ""),
        (0.9, 0.9, 0, "warning: "),  # an estimate may be as far off
        (2.0, 0.9, 0, "warning: "),
        (0.7, 0.7, 2, "error: "),
    ],
)
def test_what_may_not_fit_is_tried(
    tmp_path: Path,
    train: Train,
    monkeypatch: pytest.MonkeyPatch,
    whole: float,
    free: float,
    status: int,
    said: str,
) -> None:
    """In parts of what is needed, which is the same for every run of the tiny model."""
    monkeypatch.setattr(memory, "_resident", lambda: 10**10)
    need = sum(memory.needed(context()).values())
    limited(monkeypatch, whole * need, free * need)
    outcome = train("--device", "cpu", "--max-steps", 1, "--output", tmp_path / "run")
    assert outcome.status == status, outcome.err
    assert said in outcome.err
    assert bool(said) == ("this run needs about 11.0" in outcome.err)


@pytest.mark.usefixtures("tiny")
def test_processes_of_one_machine_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_resident", lambda: 10**10)
    job = context()
    limited(monkeypatch, 30e9, 30e9)
    memory.check(job)
    monkeypatch.setattr(World, "gather", lambda _self, value: [value] * 4 + [f"other {value}"])
    with pytest.raises(TrainerError, match="4 processes need about 44"):
        memory.check(job)


def test_the_limits_of_containers_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of version 2, the group's and those above it; of version 1, memory alone."""
    files = {
        "a/memory.max": "max\n", "a/memory.current": "5\n",
        "memory.max": "9000\n", "memory.current": "6000\n", "memory.stat": "inactive_file 1000\n",
        "memory/job/memory.limit_in_bytes": "8000\n", "memory/job/memory.usage_in_bytes": "1\n",
    }  # fmt: skip
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    own = tmp_path / "cgroup"
    own.write_text("12:memory:/job\n3:cpu,cpuacct:/job\n0::/a\n")
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "_OWN_CGROUPS", own)
    assert list(memory._limits()) == [(8000, 1), (9000, 5000)]
    whole, free = memory.available(CPU)
    assert whole == 8000
    assert free == pytest.approx(4000 + memory._resident(), abs=1e8)
    own.unlink()
    assert list(memory._limits()) == []
    assert memory.available(CPU)[0] > 1e8
