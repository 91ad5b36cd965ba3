"""Checkpoints: whole or not at all, whatever ends the writing; others are refused in one line."""

from __future__ import annotations

import errno
import os
import pickle
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlars.trainer.__main__ import main
from fastlars.trainer.errors import TrainerError
from fastlars.trainer.model import resnet
from fastlars.trainer.model.context import TrainingContext
from fastlars.trainer.output import checkpoint
from fastlars.trainer.output.directory import RunDirectory
from fastlars.trainer.output.retention import Retention
from fastlars.trainer.run import loop
from trainer.helpers import Outcome, assert_same, disk_full_after, files_below, load, tiny_net

Train = Callable[..., Outcome]


def state(value: float, size: int = 1000) -> dict[str, object]:
    return {"step": int(value), "weights": torch.full((size,), value)}


def test_save_and_load(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    for value in (1.0, 2.0):
        checkpoint.save(path, state(value))
        loaded = checkpoint.load(path)
        loaded.pop("format")
        assert_same(loaded, state(value))
    assert files_below(tmp_path) == ["checkpoint.pt"]


KILLED_WHILE_SAVING = """
import os, signal, sys, time
from pathlib import Path
import torch
from fastlars.trainer.output import checkpoint
from fastlars.trainer.output.retention import Retention
from fastlars.trainer.output.directory import RunDirectory

if sys.argv[2] == "copies":
    def link(source, target):
        raise PermissionError(1, "Operation not permitted")
    os.link = link
run = RunDirectory(Path(sys.argv[1]))
torch.set_num_threads(1)
for delay in (0.0, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1):
    saved, saves = os.pipe()
    child = os.fork()
    if child == 0:
        step, kept = checkpoint.load(run.checkpoint)["step"], Retention(run, 2)
        kept.add_names(step, best=step % 3 == 0)  # as a resumed run does
        while True:
            step += 1
            state = {"step": step, "weights": torch.full((300_000,), float(step))}
            kept.save(state, step, best=step % 3 == 0)
            os.write(saves, b".")
    os.close(saves)
    os.read(saved, 1)  # on a busy machine, the first save may be long in coming
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(saved)
    latest = checkpoint.load(run.checkpoint)["step"]
    numbered = sorted(run.path.glob("checkpoint-*.pt"))
    for path in (run.checkpoint, run.best, *numbered):
        state = checkpoint.load(path)
        assert state["weights"].eq(state["step"]).all()
        assert path not in numbered or path.name == f"checkpoint-{state['step']:06}.pt"
    best = checkpoint.load(run.best)["step"]
    assert best % 3 == 0 and latest - 3 <= best <= latest, (best, latest)
    assert 2 <= len(numbered) <= 3 and int(numbered[-1].stem[-6:]) in (latest - 1, latest)
    left = any(path.name.endswith(".partial") for path in run.path.iterdir())
    print(latest, left)
"""


@pytest.mark.parametrize("how", ["links", "copies"])
def test_kill_while_saving(tmp_path: Path, how: str) -> None:
    """SIGKILL at seven moments of saving without a pause: each name is a whole checkpoint's."""
    run = RunDirectory(tmp_path)
    for step in range(4):
        Retention(run, 2).save(state(step, 300_000), step, best=step % 3 == 0)
    done = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_SAVING, str(tmp_path), how],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    kills = [line.split() for line in done.stdout.splitlines()]
    assert len(kills) == 7
    assert int(kills[-1][0]) > 3  # it did save
    assert any(left == "True" for _, left in kills)  # and was killed in the middle of it
    last = int(kills[-1][0]) + 3
    Retention(run, 2).save(state(last), last, best=True)
    names = sorted(name for name in files_below(tmp_path) if name.startswith("checkpoint-"))
    assert names[-1] == f"checkpoint-{last:06}.pt"
    assert files_below(tmp_path) == ["best.pt", *names, "checkpoint.pt"]  # no leftovers


@pytest.mark.parametrize("size", [0, 100, 2000, 300_000])
def test_full_disk(tmp_path: Path, size: int) -> None:
    """Nothing is lost: the latest ones and the best one are as they were."""
    run = RunDirectory(tmp_path)
    kept = Retention(run, 2)
    for step in (1, 2, 3):
        kept.save(state(step), step, best=step == 2)
    message = f"cannot write {run.checkpoint}: File too large"
    with disk_full_after(size), pytest.raises(checkpoint.NotSavedError, match=message):
        kept.save(state(4, 100_000), 4, best=True)
    names = ["best.pt", "checkpoint-000002.pt", "checkpoint-000003.pt", "checkpoint.pt"]
    assert files_below(tmp_path) == names
    assert [checkpoint.load(tmp_path / name)["step"] for name in names] == [2, 2, 3, 3]


@pytest.mark.parametrize(("copied", "name"), [(0, "checkpoint-000004.pt"), (1, "best.pt")])
def test_no_room_for_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copied: int, name: str
) -> None:
    """On a disk without links names are copies, and any of them may find it full."""
    run = RunDirectory(tmp_path)
    for step in (1, 2, 3):
        Retention(run, 2).save(state(step), step, best=step == 2)

    def link(_source: Path, _target: Path) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    room = iter([True] * copied + [False])

    def copy(source: Any, target: Any) -> None:
        target.write(source.read(100))
        if not next(room):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        target.write(source.read())

    monkeypatch.setattr(os, "link", link)
    monkeypatch.setattr(shutil, "copyfileobj", copy)
    with pytest.raises(checkpoint.NotSavedError, match=rf"{name}: No space left on device"):
        Retention(run, 2).save(state(4), 4, best=True)
    left = {path.name: checkpoint.load(path)["step"] for path in tmp_path.iterdir()}
    numbers = {f"checkpoint-00000{step}.pt": step for step in (2, 3)}
    if name == "best.pt":
        numbers |= {"checkpoint-000004.pt": 4}
    assert left == numbers | {"checkpoint.pt": 4, "best.pt": 2}
    monkeypatch.undo()
    Retention(run, 2).add_names(4, best=True)  # as a resumed run does
    left = {path.name: checkpoint.load(path)["step"] for path in tmp_path.iterdir()}
    names = {"checkpoint-000003.pt": 3, "checkpoint-000004.pt": 4}
    assert left == names | {"checkpoint.pt": 4, "best.pt": 4}


def test_one_file_has_many_names(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    Retention(run, 3).save(state(1), 1, best=True)
    Retention(run, 3).add_names(1, best=True)  # as a resumed run does
    assert len({path.stat().st_ino for path in tmp_path.iterdir()}) == 1
    assert files_below(tmp_path) == ["best.pt", "checkpoint-000001.pt", "checkpoint.pt"]


def test_no_more_are_kept_than_asked_for(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    (tmp_path / "checkpoint-mine.pt").write_text("not one of the run's")
    for step in (5, 999_999, 1_000_000, 2_000_000):
        Retention(run, 3).save(state(step), step, best=step == 5)
    kept = ["checkpoint-1000000.pt", "checkpoint-2000000.pt", "checkpoint-999999.pt"]
    others = ["checkpoint-mine.pt", "checkpoint.pt"]
    assert files_below(tmp_path) == ["best.pt", *kept, *others]
    Retention(run, 1).save(state(3_000_000), 3_000_000, best=False)
    assert files_below(tmp_path) == ["best.pt", *kept, *others]  # resumed without --keep-last
    assert checkpoint.load(run.best)["step"] == 5


@pytest.mark.usefixtures("tiny", "no_picture")
def test_full_disk_during_a_run(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A warning while there are further chances, an error at the end; the old one stays."""
    settings = ("--epochs", 3, "--batch-size", 256, "--output", tmp_path)
    assert train(*settings, "--max-steps", 1).status == 0
    before = (tmp_path / "checkpoint.pt").read_bytes()

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    step = loop.step
    with monkeypatch.context() as patch:

        def fills(context: TrainingContext, *arguments: Any, **options: Any) -> Any:
            if context.progress.step > 1:  # when the run has its files
                patch.setattr(os, "fsync", full)
            return step(context, *arguments, **options)

        patch.setattr(loop, "step", fills)
        outcome = train("--output", tmp_path, "--resume", "--max-steps", 0)
    assert outcome.status == 2
    *warnings, last = outcome.err.splitlines()
    assert len(warnings) == 3  # after each epoch
    assert all("No space left on device; training goes on" in line for line in warnings)
    assert all(str(tmp_path) in line for line in (*warnings, last))
    assert "No space left on device; the previous checkpoint is untouched" in last
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert train("--output", tmp_path, "--resume", "--max-steps", 0).status == 0
    assert load(tmp_path)["progress"]["evaluated"] == 3


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", b"PK\x03\x04 half an archive", None],
    ids=["empty", "text", "cut", "other"],
)
def test_damaged(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "checkpoint.pt"
    if content is None:
        torch.save({"weights": torch.zeros(3)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(TrainerError, match="is damaged or not a checkpoint of this trainer"):
        checkpoint.load(path)


def test_of_another_version(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    for version in (1, 2, 5):
        torch.save({"format": f"fastlars.trainer checkpoint {version}"}, path)
        message = (
            rf"checkpoint\.pt needs another version of fastlars: it is a .* checkpoint {version}$"
        )
        with pytest.raises(TrainerError, match=message):
            checkpoint.load(path)


def test_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, state(1.0))
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(TrainerError, match="is damaged"):
        checkpoint.load(path)


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match=r"cannot read .*absent\.pt: No such file"):
        checkpoint.load(tmp_path / "absent.pt")


# What is no checkpoint, a damaged one, or one of something else is refused in one line.

SHORT = ("--epochs", 1, "--batch-size", 512)
pytestmark = pytest.mark.usefixtures("tiny", "no_picture")


def test_changed_bits_are_seen(tmp_path: Path) -> None:
    """Also in the archive's directory, which its checksums do not cover."""
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"weights": torch.arange(300.0), "step": 3, "name": "x" * 40})
    whole, draw = path.read_bytes(), random.Random(0)
    for at in range(0, len(whole), 3):
        changed = bytearray(whole)
        changed[at] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(TrainerError, match="is damaged or not a checkpoint"):
            checkpoint.load(path)
    for cut in (1, 30, 40, 60, 300):
        path.write_bytes(whole[:-cut])
        with pytest.raises(TrainerError, match="is damaged or not a checkpoint"):
            checkpoint.load(path)


def test_the_previous_version_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It also had states of random number generators."""
    path, state = tmp_path / "checkpoint.pt", {"weights": torch.arange(300.0), "random": [{}]}
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_FORMAT", "fastlars.trainer checkpoint 3")
        checkpoint.save(path, state)
    assert_same(checkpoint.load(path)["weights"], state["weights"])
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(TrainerError, match="is damaged or not a checkpoint"):
        checkpoint.load(path)


def garbage() -> list[bytes]:
    draw = random.Random(0)
    texts = [
        b"step,epoch\n1,0.5\n",
        b'{"kind": "start"}\n',
        b"\x89PNG\r\n\x1a\n",
        b"PK\x05\x06" + bytes(18),
    ]
    pickles = [pickle.dumps(value) for value in (None, [1], {"format": 3}, {3: 4}, Path("x"))]
    noise = [draw.randbytes(draw.randint(1, 200)) for _ in range(300)]
    return [*texts, *pickles, *noise]


def test_files_of_other_kinds(tmp_path: Path) -> None:
    path = tmp_path / "x"
    for content in garbage():
        path.write_bytes(content)
        with pytest.raises(TrainerError, match=r"--resume: .*/x is damaged or not a checkpoint"):
            checkpoint.load(path)


@pytest.mark.parametrize("kind", ["folder", "fifo", "device"])
def test_what_is_no_file(tmp_path: Path, train: Train, kind: str) -> None:
    path = tmp_path / "checkpoint.pt"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path = Path("/dev/zero")
    outcome = train("--resume", path if kind != "folder" else tmp_path, "--output", tmp_path / "o")
    assert outcome.status == 2
    assert outcome.err == f"fastlars.trainer: error: --resume: {path} is not a file\n"


# What a checkpoint can be made to hold by hand, or by another program.
CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    f"{key} is {value!r}": lambda state, key=key, value=value: state.update({key: value})  # type: ignore[misc]
    for key in checkpoint._CONTENTS
    for value in ("text", [], {})
    if (key, value) not in [("scaler", {}), ("average", {})]  # none is used here
} | {
    f"no {key}": lambda state, key=key: state.pop(key)  # type: ignore[misc]
    for key in checkpoint._CONTENTS
    if key != "average"  # without which None stands for it
} | {
    "weights of another shape": lambda state: state["model"].update(
        {"0.weight": torch.zeros(16, 3, 5, 5)}
    ),
    "other names of weights": lambda state: state["model"].update(
        {"layer1.weight": state["model"].pop("0.weight")}
    ),
    "a parameter more": lambda state: state["optimizer"]["param_groups"][0]["params"].append(99),
    "a setting out of range": lambda state: state["config"].update({"batch_size": -1}),
    "a setting of another kind": lambda state: state["config"].update({"batch_size": "many"}),
    "another recipe": lambda state: state["config"].update({"recipe": "adam"}),
    "another model": lambda state: state["config"].update({"model": "vgg16"}),
    "progress beyond words": lambda state: state["progress"].update({"step": "three"}),
    "more progress": lambda state: state["progress"].update({"speed": 3}),
    "sums of another shape": lambda state: state.update({"window": torch.zeros(2)}),
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The checkpoint of a run of one step."""
    run = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resnet, "build", tiny_net)
        assert main([*map(str, SHORT), "--output", str(run), "--max-steps", "1"]) == 0
    return (run / "checkpoint.pt").read_bytes()


@pytest.mark.parametrize("change", CHANGES)
def test_states_that_do_not_fit(tmp_path: Path, train: Train, made: bytes, change: str) -> None:
    run = tmp_path / "run"
    path = run / "checkpoint.pt"
    run.mkdir()
    path.write_bytes(made)
    state = torch.load(path, weights_only=True)
    CHANGES[change](state)
    torch.save(state, path)
    before = path.read_bytes(), files_below(run)
    outcome = train("--resume", "--output", run, "--max-steps", 2)
    assert outcome.status == 2, outcome
    assert len(outcome.err.splitlines()) == 1, outcome.err
    assert len(outcome.err) < 700
    assert str(run) in outcome.err
    assert (path.read_bytes(), files_below(run)) == before


@pytest.mark.parametrize("other", ["lamb", "akiba", "goyal"])
def test_a_checkpoint_of_another_recipe(tmp_path: Path, train: Train, other: str) -> None:
    """Flags that contradict it are refused, and so is an optimizer's state in another's place."""
    for recipe in ("lars", other):
        flags = ("--recipe", recipe, "--output", tmp_path / recipe)
        assert train(*SHORT, *flags, "--max-steps", 1).status == 0
    outcome = train("--resume", tmp_path / "lars", "--recipe", other, "--output", tmp_path / "new")
    assert outcome.status == 2
    assert f"--recipe {other}: the run in" in outcome.err
    assert not (tmp_path / "new").exists()
    state, stranger = load(tmp_path / "lars"), load(tmp_path / other)
    checkpoint.save(tmp_path / "mixed.pt", state | {"optimizer": stranger["optimizer"]})
    outcome = train("--resume", tmp_path / "mixed.pt", "--output", tmp_path / "new")
    assert outcome.status == 2, outcome
    assert "mixed.pt does not fit its model and recipe: " in outcome.err
    assert len(outcome.err.splitlines()) == 1
    assert not (tmp_path / "new").exists()
