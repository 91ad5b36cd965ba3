"""The run directory, and what is written in it when."""

from __future__ import annotations

import errno
import os
import re
import shlex
import signal
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastlars.trainer.config import recipes
from fastlars.trainer.errors import TrainerError
from fastlars.trainer.model.context import TrainingContext
from fastlars.trainer.output import directory
from fastlars.trainer.output.records import read
from fastlars.trainer.process.signals import StopSignals
from fastlars.trainer.run import loop
from trainer.helpers import Outcome, facts, files_below

Train = Callable[..., Outcome]
SHORT = ("--epochs", 1, "--batch-size", 512)
LONG = 300 * "x"  # as with a folder that may not be entered, asking whether it is there fails


@pytest.mark.usefixtures("tiny")
def test_every_file_is_named_at_the_end(tmp_path: Path, train: Train) -> None:
    run = tmp_path / "a" / "run"
    outcome = train(*SHORT, "--tensorboard", "--output", run)
    assert outcome.status == 0
    written = {path.name for path in run.iterdir()}
    assert written >= {"checkpoint.pt", "metrics.jsonl", "tensorboard"}
    assert written >= {"curves.png", "trust.csv", "trust.png", "norms.csv", "norms.png"}
    for name in written:
        assert re.search(rf"^  {re.escape(name)} +\w", outcome.out, re.MULTILINE)
    assert f"\nfiles in {run}:\n" in outcome.out
    with Image.open(run / "curves.png") as picture:
        picture.load()
        assert picture.size[0] > 1000


@pytest.mark.usefixtures("tiny", "no_picture")
def test_a_run_says_where_its_settings_come_from(tmp_path: Path, train: Train) -> None:
    flags = ("--epochs", 14, "--lr", 0.5, "--max-steps", 1, "--output", tmp_path)
    outcome = train(*flags)
    source = recipes.look_up("lars", "digits", None).source
    assert facts(outcome.out)["recipe"] == f"lars: {source}"
    assert facts(outcome.out)["changed"] == "--lr 0.5 (recipe: 1)"
    assert read(tmp_path / "metrics.jsonl")[0]["recipe"] == source
    again = train("--resume", "--output", tmp_path, "--max-steps", 2)
    assert facts(again.out)["changed"] == "--lr 0.5 (recipe: 1)"
    (tmp_path / "other").mkdir()
    plain = train("--max-steps", 1, "--output", tmp_path / "other")
    assert "changed" not in facts(plain.out)


@pytest.mark.usefixtures("tiny", "no_picture")
def test_the_result_is_that_of_the_images_that_could_be_read(
    tmp_path: Path, train: Train, images: Path
) -> None:
    (images / "val" / "ant" / "000.png").write_text("no picture")
    flags = ("--data", images, "--max-bad-images", 1, "--workers", 0, "--epochs", 1)
    run = tmp_path / "run"
    outcome = train(*flags, "--batch-size", 12, "--output", run)
    assert outcome.status == 0, outcome.err
    accuracy = next(r["accuracy"] for r in read(run / "metrics.jsonl") if r["kind"] == "test")
    assert f"final test accuracy: {accuracy:.2%} ({accuracy * 14:.0f} of 14), best" in outcome.out


@pytest.mark.usefixtures("tiny", "no_picture")
def test_the_log_ends_with_how_the_run_ended(tmp_path: Path, train: Train) -> None:
    assert train(*SHORT, "--output", tmp_path, "--max-steps", 1).status == 0
    ended = {"kind": "end", "step": 1, "epoch": 0.5, "finished": False, "stopped_by": "--max-steps"}
    assert read(tmp_path / "metrics.jsonl")[-1] == ended
    assert train("--resume", "--output", tmp_path, "--max-steps", 0).status == 0
    found = read(tmp_path / "metrics.jsonl")
    ends = [record for record in found if record["kind"] == "end"]
    assert ends == [ended | {"step": 2, "epoch": 1.0, "finished": True, "stopped_by": None}]
    assert [record["kind"] for record in found[:2]] == ["start", "norms"]


@pytest.mark.usefixtures("tiny", "no_picture")
def test_runs_without_output_do_not_meet(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert train(*SHORT, "--max-steps", 1).status == 0
    assert sorted(os.listdir("runs")) == ["digits-lars-1", "digits-lars-2"]


@pytest.mark.usefixtures("tiny", "no_picture")
def test_a_run_is_not_overwritten(tmp_path: Path, train: Train) -> None:
    assert train(*SHORT, "--output", tmp_path, "--max-steps", 1).status == 0
    before = {name: (tmp_path / name).read_bytes() for name in files_below(tmp_path)}
    outcome = train(*SHORT, "--output", tmp_path)
    assert outcome.status == 2
    assert "holds a run already: add --resume" in outcome.err
    assert {name: (tmp_path / name).read_bytes() for name in files_below(tmp_path)} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--resume",), "--resume needs the PATH of a checkpoint, or --output with one in it"),
        (("--resume", "absent"), "cannot read absent: No such file or directory"),
        (("--resume", "--output", "absent"), "cannot read absent/checkpoint.pt: No such file"),
        (("--output", "file/run"), "cannot write in file/run: Not a directory"),
        (("--output", "file"), "cannot write in file: "),
        (("--output", LONG), f"--output: cannot write in {LONG}: File name too long"),
        (("--output", LONG, "--resume", "auto"), f"cannot write in {LONG}: File name too long"),
        (("--resume", LONG), f"--resume: cannot read {LONG}: File name too long"),
        (("--output", "a/b/c", "--batch-size", 9999), "--batch-size 9999 exceeds"),
        (("--output", "a/b/c", "--warmup-epochs", 99), "--warmup-epochs 99 leaves nothing"),
        (("--output", "a/b/c", "--end-lr", 99), "--end-lr 99.0 exceeds the learning rate"),
        (("--output", "a/b/c", "--device", "cuda"), "--device cuda: PyTorch sees no GPU"),
        (("--output", "a/b/c", "--data", "nowhere"), "cannot read nowhere: No such file"),
    ],
)
@pytest.mark.usefixtures("tiny")
def test_mistakes_leave_nothing_behind(
    tmp_path: Path,
    train: Train,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[object, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (tmp_path / "file").write_text("in the way")
    outcome = train(*arguments)
    assert outcome.status == 2
    assert message in outcome.err
    assert len(outcome.err.splitlines()) == 1
    assert files_below(tmp_path) == ["file"]


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    "mistake",
    [
        ("--batch-size", 9999),
        ("--warmup-epochs", 99),
        ("--data", "nowhere"),
        ("--resume", "nowhere"),
        ("--tensorboard",),
        ("--dry-run",),
    ],
    ids=str,
)
def test_no_file_is_replaced_before_the_first_step(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch, mistake: tuple[object, ...]
) -> None:
    """Also files of a run whose checkpoints were removed; then a new run replaces them all."""
    names = ["run.json", "metrics.jsonl", "curves.png", "trust.csv", "norms.png"]
    for name in names:
        (tmp_path / name).write_text("of an earlier run")
    before = sorted(names)
    if mistake == ("--tensorboard",):
        (tmp_path / "tensorboard").write_text("in the way")
        before.append("tensorboard")
    outcome = train(*SHORT, "--output", tmp_path, *mistake)
    assert outcome.status == (0 if mistake == ("--dry-run",) else 2)

    def fail(*_arguments: object, **_options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "step", fail)
        assert train(*SHORT, "--output", tmp_path).status == 130
    assert sorted(files_below(tmp_path)) == sorted(before)
    assert {(tmp_path / name).read_text() for name in names} == {"of an earlier run"}
    assert train("--recipe", "goyal", *SHORT, "--output", tmp_path).status == 0
    assert not (tmp_path / "trust.csv").exists()  # of the earlier run; goyal has none
    assert "of an earlier run" not in (tmp_path / "norms.png").read_text(errors="replace")


@pytest.mark.usefixtures("tiny", "no_picture")
@pytest.mark.parametrize("name", ["checkpoint.pt", "best.pt", "checkpoint-000100.pt"])
def test_any_checkpoint_is_a_run(tmp_path: Path, train: Train, name: str) -> None:
    (tmp_path / name).write_text("mine")
    for flags in ((), ("--dry-run",)):
        outcome = train(*SHORT, "--output", tmp_path, *flags)
        assert outcome.status == 2
        assert f"--output: {tmp_path} holds a run already: add --resume" in outcome.err
    assert files_below(tmp_path) == [name]


@pytest.mark.usefixtures("tiny", "no_picture")
@pytest.mark.parametrize("name", ["best.pt", "checkpoint-000100.pt"])
def test_a_run_that_goes_on_elsewhere_replaces_no_other(
    tmp_path: Path, train: Train, name: str
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert train(*SHORT, "--output", first, "--max-steps", 1).status == 0
    second.mkdir()
    (second / name).write_text("of a better run")
    outcome = train("--resume", first, "--output", second, "--max-steps", 0)
    assert outcome.status == 2
    assert f"--output: {second} holds a different run than {first}" in outcome.err
    assert files_below(second) == [name]


@pytest.mark.usefixtures("tiny")
def test_stopped_before_the_first_step(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = StopSignals.note

    def noted(self: StopSignals) -> None:
        note(self)
        os.kill(os.getpid(), signal.SIGTERM)

    (tmp_path / "trust.csv").write_text("of an earlier run")
    with monkeypatch.context() as patch:
        patch.setattr(StopSignals, "note", noted)
        outcome = train(*SHORT, "--output", tmp_path)
        assert (outcome.status, outcome.err) == (143, "")
        assert outcome.out.endswith("stopped by SIGTERM before the first step\n")
        assert files_below(tmp_path) == ["trust.csv"]
    assert train(*SHORT, "--output", tmp_path, "--max-steps", 1).status == 0
    for number in range(5):  # of which one more step would leave two
        (tmp_path / f"checkpoint-00000{number}.pt").write_text("older")
    before = {name: (tmp_path / name).read_bytes() for name in files_below(tmp_path)}
    with monkeypatch.context() as patch:
        patch.setattr(StopSignals, "note", noted)
        outcome = train("--resume", "--output", tmp_path, "--max-steps", 0, "--keep-last", 2)
    assert outcome.status == 143
    assert "stopped by SIGTERM at step 1 of 2; go on with: python" in outcome.out
    assert {name: (tmp_path / name).read_bytes() for name in files_below(tmp_path)} == before


@pytest.mark.usefixtures("tiny", "no_picture")
def test_how_to_go_on(tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that a shell takes, with what the run was asked for and no checkpoint has."""
    monkeypatch.chdir(tmp_path)
    for output, written in (("my run", "--resume 'my run/checkpoint.pt'"), ("-x", "--resume=-x/")):
        flags = ("--max-steps", 1, "--max-bad-images", 9, "--keep-last", 3, "--mllog")
        outcome = train(*SHORT, f"--output={output}", *flags)
        last = outcome.out.splitlines()[-1]
        assert f"go on with: python -m fastlars.trainer {written}" in last
        assert (
            last.endswith("checkpoint.pt --max-bad-images 9 --mllog --keep-last 3") or "'" in last
        )
        assert train(*shlex.split(last.split("fastlars.trainer ")[1])).status == 0


@pytest.mark.usefixtures("tiny", "no_picture")
def test_a_log_that_is_gone_or_edited(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = loop.step

    def losing(context: TrainingContext, *arguments: Any, **options: Any) -> Any:
        (tmp_path / "metrics.jsonl").unlink(missing_ok=True)
        return step(context, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "step", losing)
        outcome = train(*SHORT, "--output", tmp_path)
    assert outcome.status == 0
    assert "final test accuracy: " in outcome.out
    (tmp_path / "metrics.jsonl").write_text('null\n[3]\n{"a": 1}\n' * 9)
    outcome = train("--resume", "--output", tmp_path, "--tensorboard")
    assert (outcome.status, outcome.err) == (0, "")


@pytest.mark.usefixtures("tiny", "no_picture")
def test_no_run_inside_the_images(tmp_path: Path, train: Train, images: Path) -> None:
    for inside in (images / "train" / "run", images / "val"):
        for flags in ((), ("--find-lr",), ("--dry-run",)):
            outcome = train("--data", images, "--batch-size", 4, "--output", inside, *flags)
            assert outcome.status == 2
            assert f"--output: {inside} is inside the images of --data, in {images}" in outcome.err
    assert not (images / "train" / "run").exists()
    flags = ("--data", images, "--batch-size", 4, "--dry-run", "--workers", 0)
    assert train(*flags, "--output", images / "run").status == 0


@pytest.mark.usefixtures("tiny", "no_picture")
@pytest.mark.parametrize("name", ["loop", 240 * "x", 300 * "x"])
def test_names_of_data_that_cannot_name_a_run(
    tmp_path: Path, train: Train, images: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    if len(name) == 240:
        images.rename(tmp_path / name)
    outcome = train("--data", name, "--batch-size", 4, "--workers", 0, "--max-steps", 1)
    if len(name) == 240:
        assert outcome.status == 0
    else:
        assert outcome.status == 2
        assert "--data: cannot read " in outcome.err
        assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("tiny", "no_picture")
@pytest.mark.parametrize("error", [errno.EINVAL, errno.EIO, errno.ENOTSUP])
def test_a_folder_that_cannot_be_synced(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    """As on many network file systems; of files, only what says that they know no fsync."""
    fsync, seen = os.fsync, set()

    def refusing(descriptor: int) -> None:
        folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        seen.add(folder)
        if folder or error != errno.EIO:
            raise OSError(error, os.strerror(error))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refusing)
    outcome = train(*SHORT, "--output", tmp_path)
    assert (outcome.status, outcome.err) == (0, "")
    assert seen == {True, False}
    assert (tmp_path / "best.pt").exists()


def test_a_directory_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may write anywhere, so the system's refusal is played: of .lock, and of other files."""

    def refuse(*_arguments: object, **_options: object) -> None:
        raise PermissionError(13, "Permission denied")

    for module, name in ((os, "open"), (tempfile, "TemporaryFile")):
        run = directory.RunDirectory(tmp_path / "a" / "b")
        with monkeypatch.context() as patch:
            patch.setattr(module, name, refuse)
            with pytest.raises(TrainerError, match=r"cannot write in .*/a/b: Permission denied"):
                run.claim()
        assert files_below(tmp_path) == []


def test_folders_with_files_of_others_stay(tmp_path: Path) -> None:
    run = directory.RunDirectory(tmp_path / "a" / "b")
    run.claim()
    (tmp_path / "a" / "notes.txt").write_text("mine")
    run.release()
    assert files_below(tmp_path) == ["a", "a/notes.txt"]


def test_a_restart_by_torchrun_goes_on(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt").write_text("there")
    output = str(tmp_path)
    assert directory.checkpoint_path(None, output, restarted=False) is None
    assert directory.checkpoint_path(None, output, restarted=True) == tmp_path / "checkpoint.pt"
    assert directory.checkpoint_path(None, str(tmp_path / "fresh"), restarted=True) is None


@pytest.mark.usefixtures("tiny", "no_picture")
def test_restarts_need_an_output(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    for action in ((), ("--find-lr",), ("--dry-run",)):
        outcome = train(*SHORT, *action)
        assert outcome.status == 2
        assert "--max-restarts needs --output, for a restarted run to find itself" in outcome.err
    assert files_below(tmp_path) == []
    assert train(*SHORT, "--max-steps", 1, "--output", "run").status == 0
    assert train("--resume", "run", "--max-steps", 2).status == 0
