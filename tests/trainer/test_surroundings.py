"""What goes wrong around a run: it goes on, or it ends with one line and the right status."""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from fastlars.trainer import errors
from fastlars.trainer.config import command_line
from fastlars.trainer.model.context import TrainingContext
from fastlars.trainer.output.tensorboard import TensorBoard
from fastlars.trainer.process import console, packages
from fastlars.trainer.run import loop
from repository_files import TESTS, python_path
from trainer.helpers import Outcome, disk_full_after, files_below, load, records

Train = Callable[..., Outcome]
SHORT = ("--epochs", 1, "--batch-size", 512)


def command(*arguments: object, before: str = "", after: str = "", **env: str) -> Outcome:
    """The trainer with the tiny model, as a shell starts it."""
    words = [sys.executable, str(TESTS / "trainer" / "run_tiny.py"), *map(str, arguments)]
    done = subprocess.run(
        ["bash", "-c", f'{before} "$@" {after}', "bash", *words],
        env=os.environ | {"PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"} | env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def assert_one_line(outcome: Outcome, *parts: str) -> None:
    assert outcome.status == 2, outcome
    assert len(outcome.err.splitlines()) == 1, outcome.err
    assert all(part in outcome.err for part in parts), outcome.err


@pytest.mark.parametrize(
    ("after", "why"),
    [
        (">/dev/full", "No space left on device"),
        ("| true; exit ${PIPESTATUS[0]}", "Broken pipe"),
        (">&- 2>&- <&-", ""),
    ],
)
def test_nobody_takes_what_is_printed(tmp_path: Path, after: str, why: str) -> None:
    outcome = command(*SHORT, "--output", tmp_path / "run", after=after)
    assert outcome.status == 0, outcome
    told = f"warning: cannot write to standard output ({why}); the run goes on without it\n"
    assert outcome.err == (told if why else "")
    assert records(tmp_path / "run")[-1]["finished"]


@pytest.mark.usefixtures("tiny", "no_picture")
def test_a_terminal_that_hangs_up(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = loop.step

    def hung_up(context: TrainingContext, *arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGHUP)
        return step(context, *arguments, **options)

    monkeypatch.setattr(loop, "step", hung_up)
    outcome = train(*SHORT, "--output", tmp_path / "run")
    assert outcome.status == 129
    assert "stopped by SIGHUP at step 1 of " in outcome.out
    assert load(tmp_path / "run")["progress"]["step"] == 1
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        assert train("--resume", "--output", tmp_path / "run").status == 0
    finally:
        signal.signal(signal.SIGHUP, before)


# What hangs, and says that it does. A worker that is not forked imports the script anew.
SLOW = {
    "imports": """
import sys, time
class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == "matplotlib":
            open({there!r}, "w").close()
            time.sleep(60)
sys.meta_path.insert(0, Slow())
""",
    "images": """
import sys, time
from fastlars.trainer.data import decode as images
def decode(_path):
    open({there!r}, "w").close()
    time.sleep(60)
images.decode = decode
""",
}
MAIN = """
if __name__ == "__main__":
    from fastlars.trainer.__main__ import main
    sys.exit(main())
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("when", SLOW)
def test_a_signal_before_the_first_step(tmp_path: Path, images: Path, name: str, when: str) -> None:
    """While packages are imported, or while a worker reads images: one line, nothing is left."""
    number = signal.Signals[name]
    script = tmp_path / "slow.py"
    script.write_text(SLOW[when].format(there=str(tmp_path / "there")) + MAIN)
    path = os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    started = subprocess.Popen(
        [sys.executable, str(script), "--data", str(images), "--workers", "1",
         "--batch-size", "4", "--output", str(tmp_path / "run")],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "there").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(started.pid, number)  # as a terminal does
        _, err = started.communicate(timeout=60)
    finally:
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGKILL)
    assert started.returncode == 128 + number, err
    assert len(err.splitlines()) == 1
    assert f"fastlars.trainer: stopped by {name}" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("name", ["my_$a_$b", os.fsdecode(b"caf\xe9"), "a\nb"])
def test_names_that_are_no_formulas(tmp_path: Path, train: Train, images: Path, name: str) -> None:
    try:
        images.rename(tmp_path / name)
    except OSError as error:
        pytest.skip(f"this file system has no such names: {error.strerror}")
    flags = ("--data", tmp_path / name, "--workers", 0, "--batch-size", 12, "--epochs", 1)
    outcome = train(*flags, "--tensorboard", "--output", tmp_path / "run")
    assert outcome.status == 0, outcome.err
    assert outcome.err == ""
    sweep = train(*flags, "--find-lr", "--output", tmp_path / "sweep")
    assert (sweep.status, sweep.err) == (0, "")


@pytest.mark.usefixtures("tiny")
def test_pictures_that_cannot_be_drawn(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_arguments: object, **_options: object) -> None:
        raise ValueError("no such font\nat all")

    monkeypatch.setattr(Figure, "savefig", broken)
    outcome = train(*SHORT, "--output", tmp_path / "run")
    assert outcome.status == 0
    assert outcome.err == "warning: no picture: no such font\n" * 2
    assert {"trust.csv", "norms.csv"} <= set(files_below(tmp_path / "run"))
    sweep = train(*SHORT, "--find-lr", "--output", tmp_path / "sweep")
    assert sweep.status == 0
    assert "suggest   " in sweep.out
    assert files_below(tmp_path / "sweep") == ["lr_find.csv"]


def test_tensorboard_without_disk(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Its thread fails first; whoever writes next is told."""
    told: list[str] = []
    with console.unfailing():
        board = TensorBoard(tmp_path / "tensorboard", 0, told.append)
        with disk_full_after(300):
            for step in range(100):
                board.record({"kind": "test", "step": step, "loss": 0.5, "accuracy": 0.5})
                if step % 10 == 9:
                    board.sync()
            board.close()
    assert told == [f"no more TensorBoard in {tmp_path / 'tensorboard'}: File too large"]
    assert capfd.readouterr().err == ""


def test_streams_of_the_calling_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """A closed one drops what is printed; what an encoding does not have is escaped."""
    closed, written = io.StringIO(), io.BytesIO()
    closed.close()
    monkeypatch.setattr(sys, "stdout", closed)
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(written, "ascii", write_through=True))
    with console.unfailing():
        assert not sys.stdout.isatty()
        print("lost")
        print("caf\xe9", file=sys.stderr)
    assert sys.stdout is closed
    text = written.getvalue().decode()
    assert "caf\\xe9\n" in text
    assert "warning: cannot write to standard output (I/O operation on closed file" in text


@pytest.mark.skipif(not shutil.which("unshare"), reason="there is no unshare")
def test_shared_memory_too_small_for_a_batch(tmp_path: Path, images: Path) -> None:
    mount = "unshare -rm bash -c 'mount -t tmpfs -o size=1000k tmpfs /dev/shm && exec \"$@\"' bash"
    if subprocess.run(f"{mount} true", shell=True, capture_output=True).returncode != 0:
        pytest.skip("this user may not mount")
    flags = ("--data", images, "--workers", 2, "--image-size", 224, "--batch-size", 12)
    outcome = command(*flags, "--epochs", 1, "--output", tmp_path / "run", before=mount)
    assert (outcome.status, outcome.err) == (0, "")
    assert records(tmp_path / "run")[-1]["finished"]


def test_too_few_open_files(tmp_path: Path, images: Path) -> None:
    flags = ("--data", images, "--workers", 4, "--image-size", 72, "--batch-size", 12)
    flags = (*flags, "--device", "cpu")  # CUDA needs more files
    run = tmp_path / "run"
    outcome = command(*flags, "--epochs", 1, "--output", run, before="ulimit -n 20;")
    assert_one_line(outcome, "--workers: Too many open files", "ulimit -n")
    assert not run.exists()
    fewer = (*flags, "--workers", 2, "--epochs", 1, "--output", run)
    assert_one_line(command(*fewer, before="ulimit -n 22;"), "--workers: ", "ulimit -n")
    alone = (*flags, "--workers", 0, "--epochs", 1, "--output", tmp_path / "alone")
    assert command(*alone, before="ulimit -n 20;").status == 0


def test_a_package_that_does_not_load(tmp_path: Path) -> None:
    module = "torchvision"
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nclass Broken:\n def find_spec(self, name, path=None, target=None):\n"
        f"  if name == {module!r}: raise RuntimeError('operator x does not exist')\n"
        "sys.meta_path.insert(0, Broken())\n"
    )
    path = os.pathsep.join([str(tmp_path), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "fastlars.trainer", "--output", str(tmp_path / "run")],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    outcome = Outcome(done.returncode, done.stdout, done.stderr)
    assert_one_line(outcome, f"{module} is there but does not load: operator x", "pip install")


@pytest.mark.parametrize(
    ("module", "error", "message"),
    [
        ("PIL.Image", ImportError("libtiff.so: cannot open"), "PIL is there but does not load: l"),
        (
            "PIL.Image",
            ImportError("x"),
            "repair it, or reinstall it (pip install --force-reinstall Pillow)",
        ),
        ("tqdm", AttributeError("no attribute"), "tqdm is there but does not load: no attribute"),
        ("tqdm", ModuleNotFoundError("", name="tqdm"), "tqdm is not installed: pip install"),
        ("torch", ModuleNotFoundError("No module named 'sympy'", name="sympy"), "No module named"),
        ("fastlars.optim.lars", ImportError("too short: reinstall", name="fastlars"), "too short"),
    ],
)
def test_how_a_package_fails(
    monkeypatch: pytest.MonkeyPatch, module: str, error: Exception, message: str
) -> None:
    def fail(_module: str) -> None:
        raise error

    monkeypatch.setattr(packages, "import_module", fail)
    with pytest.raises(errors.TrainerError, match=re.escape(message)):
        packages.load(module)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK is not set: start the processes with"),
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE must be a number from 1 to 2147483647, got 'abc'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE must be a number from 1"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK must be a number from 0 to 1, got '2'"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": ""}, "but MASTER_ADDR is not set"),
        ({"WORLD_SIZE": "2", "MASTER_PORT": "99999"}, "MASTER_PORT must be a number from 1 to"),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "-1"}, "LOCAL_RANK must be a number from 0 to 1"),
        ({"WORLD_SIZE": "2", "MASTER_PORT": "1"}, "process 1 does not reach the others"),
        ({"FASTLARS_BACKEND": "tritn"}, "FASTLARS_BACKEND must be one of cpu, cuda, triton"),
        ({"FASTLARS_BACKEND": "cuda"}, "FASTLARS_BACKEND=cuda, but "),
        ({"FASTLARS_CUDA_PATH": "one"}, "FASTLARS_CUDA_PATH must be one of one-launch, two"),
        ({"FASTLARS_CHECK": "no"}, "FASTLARS_CHECK must be 0 or 1, got 'no'"),
    ],
)
@pytest.mark.usefixtures("tiny")
def test_the_environment_is_checked_first(
    tmp_path: Path,
    train: Train,
    monkeypatch: pytest.MonkeyPatch,
    given: dict[str, str],
    message: str,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    if len(given) > 1:
        usual = {"RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29811"}
        given = usual | given
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    outcome = train(*SHORT, "--timeout", 2, "--output", tmp_path / "run")
    assert_one_line(outcome, message)
    assert outcome.out == ""
    assert files_below(tmp_path) == []


@pytest.mark.usefixtures("tiny", "no_picture")
def test_an_internal_error_leaves_its_trace_in_a_file(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*_arguments: object, **_options: object) -> None:
        raise KeyError("no such thing")

    monkeypatch.chdir(tmp_path)
    name = f"fastlars-trainer-{os.getpid()}.log"
    for place, where in (("", "step"), ("run/", "evaluate")):  # before and after a first step
        with monkeypatch.context() as patch:
            patch.setattr(loop, where, wrong)
            outcome = train(*SHORT, "--output", "run")
        assert outcome.status == 1
        told = f"internal error: KeyError: 'no such thing'; the trace is in {place}{name}; please"
        assert len(outcome.err.splitlines()) == 1
        assert told in outcome.err
        assert "in wrong\n" in (tmp_path / place / name).read_text()


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "out of memory: lower --micro-batch, --image-size or --workers"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "out of mem"),
        (OSError(28, "No space left on device", "a\nb"), r"a\nb: No space left on device"),
        (OSError(24, "Too many open files"), "raise the limit of open files (ulimit -n)"),
        (OSError(5, "Input/output error"), "error: Input/output error"),
    ],
)
def test_what_the_machine_lacks_is_a_line(
    train: Train, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def lacking(*_arguments: object) -> None:
        raise error

    monkeypatch.setattr(command_line, "new_config", lacking)
    assert_one_line(train(*SHORT), message)


def test_what_a_worker_raises_is_named() -> None:
    text = "Caught OSError in DataLoader worker process 0.\nOriginal Traceback (most recent call "
    text += 'last):\n  File "x", line 1\nOSError: [Errno 5] Input/output error\n'
    assert errors.one_line(OSError(text)) == "OSError: [Errno 5] Input/output error"
