"""The GPU that is here, and what is missing to try it; found out in a process of its own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass

from benchmarks import driver

LOOK_S = 120.0
# Runs in the Python that has torch, before anything of this package is imported.
LOOK = """
import json, os, shutil, sys
from importlib.util import find_spec

def stop(text):
    sys.exit("fastlars: " + text)

packages = {"torch": "torch", "numpy": "numpy", "pip": "pip", "pytest": "pytest",
            "pytest_benchmark": "pytest-benchmark", "setuptools": "setuptools",
            "scikit_build_core": "scikit-build-core", "pybind11": "pybind11"}
missing = [package for module, package in packages.items() if find_spec(module) is None]
missing += [t for t in ("cmake", "ninja") if shutil.which(t) is None and find_spec(t) is None]
if missing:
    stop("%s lacks %s; make PYTHON=/path/to/python3 gpu takes another"
         % (sys.executable, ", ".join(missing)))
import torch
if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
    stop("torch 2.10 or newer is needed, %s has %s" % (sys.executable, torch.__version__))
if not torch.cuda.is_available():
    stop("torch %s of %s sees no CUDA device here" % (torch.__version__, sys.executable))
homes = [os.environ.get(name, "") + "/bin/nvcc" for name in ("CUDA_HOME", "CUDA_PATH")]
compilers = ["nvcc", os.environ.get("CUDACXX", ""), "/usr/local/cuda/bin/nvcc"] + homes
if not any(map(shutil.which, compilers)):
    stop("nvcc was not found in PATH, CUDACXX, CUDA_HOME, CUDA_PATH or /usr/local/cuda")
count = torch.cuda.device_count()
archs = sorted({"%d%d" % torch.cuda.get_device_capability(i) for i in range(count)})
wanted = ("torchvision", "sklearn", "matplotlib", "tqdm")
print(json.dumps({"name": torch.cuda.get_device_name(0), "count": count, "archs": archs,
                  "torch": torch.__version__, "cuda": torch.version.cuda,
                  "python": "%d.%d.%d" % sys.version_info[:3], "cores": os.cpu_count(),
                  "plugins": [name for name in ("xdist", "pytest_timeout") if find_spec(name)],
                  "trainer_lacks": [name for name in wanted if find_spec(name) is None]}))
"""


@dataclass(frozen=True)
class Card:
    """What belongs next to every result.

    Attributes:
        archs: compute capabilities of all devices, such as "90".
        plugins: of pytest, by their modules: xdist runs tests side by side, pytest_timeout ends one
            that hangs; without it the whole stage ends.
        trainer_lacks: packages without which the tests of the trainer and of many processes are
            left out.
    """

    name: str
    count: int
    archs: list[str]
    torch: str
    cuda: str
    python: str
    cores: int
    plugins: list[str]
    trainer_lacks: list[str]
    driver: str = "unknown"

    @property
    def slug(self) -> str:
        """The name as a file's."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


def look(python: str) -> Card:
    """The card that ``python`` sees; SystemExit with one line that says what is missing."""
    try:
        done = subprocess.run([python, "-c", LOOK], capture_output=True, text=True, timeout=LOOK_S)
    except subprocess.TimeoutExpired:
        sys.exit(f"fastlars: {python} has not said within {LOOK_S:.0f} s which GPU is here")
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"{python} ended with {done.returncode}"]
        sys.exit(lines[-1])
    return Card(**json.loads(done.stdout.strip().splitlines()[-1]), driver=driver.version())
