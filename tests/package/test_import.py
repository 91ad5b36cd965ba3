"""``import fastlars``: what it shows, and what it imports when."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from repository_files import ROOT


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A new interpreter in a folder. -S: an editable install's finder would lend its extension."""
    return subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.parametrize("module", ["fastlars", "fastlars.logging"])
def test_modules_that_are_imported_on_demand_are_listed(module: str) -> None:
    # torch's compiler takes as long to import as all of torch.
    late = {"fastlars.migrate", "matplotlib", "torch._dynamo", "torchvision", "triton"}
    late |= {"lightning", "tensorboard", "transformers"}
    late = f"{late} & {{*sys.modules}} or None"
    code = f"import sys, fastlars, {module}; print({late}, *dir(fastlars))"
    done = run(code, ROOT)
    imported, *names = done.stdout.split()
    assert imported == "None", done.stdout + done.stderr
    assert {"LARS", "conventions", "distributed", "logging", "migrate"} <= set(names)
    assert "TYPE_CHECKING" not in names


def test_torch_is_imported_when_it_is_needed() -> None:
    """A command line is parsed, and answers Ctrl-C, before the seconds that torch takes."""
    code = (
        "import sys, fastlars.trainer.process.exit\n"
        "assert {'LARS', 'optim', 'backends'} <= {*dir(fastlars)}\n"
        "assert 'torch' not in sys.modules\n"
        "assert fastlars.LARS.__module__ == 'fastlars.optim.lars'; assert 'torch' in sys.modules\n"
        "print(fastlars.LARS is fastlars.optim.lars.LARS)"
    )
    done = run(code, ROOT)
    assert done.stdout == "True\n", done.stderr


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys\n"
        "from fastlars.trainer.__main__ import main\n"
        "assert main(['--epochs', 'x']) == 2\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)\n"
    )
    done = run(code, ROOT)
    assert done.stdout.endswith("\n0 False\n"), done.stderr
    assert done.stderr == (
        "fastlars.trainer: error: argument --epochs: must be a whole number, got 'x'\n"
    )


def test_threads_that_need_it_at_once() -> None:
    code = """
import threading, fastlars
barrier, found = threading.Barrier(8), []
def ask():
    barrier.wait()
    found.append((fastlars.LAMB, fastlars.schedules, fastlars.parameter_groups))
threads = [threading.Thread(target=ask) for _ in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(len(found), len(set(found)))
"""
    done = run(code, ROOT)
    assert done.stdout == "8 1\n", done.stderr


def test_all_of_it() -> None:
    done = run("from fastlars import *; print(LARS, LAMB, conventions, parameter_groups)", ROOT)
    assert done.returncode == 0, done.stderr


USER = """
import fastlars
params: list[object] = []
fastlars.LARS(params, lr=1.0, **fastlars.conventions.timm_lars(momentum=0.9)).step()
fastlars.Lars
fastlars.LARS(params, lr=1.0, ratio="both")
fastlars.migrate.load(fastlars.LARS(params, lr=1.0), {}, 1)
fastlars.distributed.overlap(1, fastlars.LAMB(params), compression="fp8")
"""


def test_type_checkers_see_mistakes(tmp_path: Path) -> None:
    api = pytest.importorskip("mypy.api")
    (tmp_path / "user.py").write_text(USER)
    # torch takes long to check, and is not what is asked about.
    (tmp_path / "mypy.ini").write_text(
        f"[mypy]\nmypy_path = {ROOT}\n[mypy-torch.*]\nfollow_imports = skip\n"
        "[mypy-fastlars.*]\nignore_errors = true\n"
    )
    options = ("--config-file", str(tmp_path / "mypy.ini"), "--cache-dir", os.devnull)
    printed, _, _ = api.run([*options, "--hide-error-codes", str(tmp_path / "user.py")])
    lines = [int(line.split(":")[1]) for line in printed.splitlines() if ": error: " in line]
    assert lines == [5, 6, 7, 8], printed
