"""What `make gpu` runs, in the order in which most is learned first."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import ROOT
from benchmarks.gpu_proof.card import Card

FOLDER = "FASTLARS_GPU_FOLDER"  # the variable that says where a stage writes
SANITIZED = "tests/cuda/test_cuda_device.py::test_compute_sanitizer"
MODELS = ("resnet50", "bert_large", "vit_b", "tiny", "giant")


def folder() -> Path:
    """Where this stage writes."""
    return Path(os.environ[FOLDER])


@dataclass(frozen=True)
class Stage:
    """One command, which no other stage needs but that which builds.

    Attributes:
        name: names its files and its row on the page.
        asks: the question that it answers.
        limit_s: seconds after which it is ended.
        arguments: what the Python with torch is given.
        environment: variables that it has besides.
    """

    name: str
    asks: str
    limit_s: float
    arguments: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)


# part: its stages, and the seconds that they may take together
PARTS: dict[str, tuple[tuple[str, ...], float]] = {
    "first": (("build", "check", "rows", "grid", "paths"), 240.0),
    "test": (("build", "tests", "sanitizer"), 400.0),
    "counters": (("build", "counters", "first-step"), 300.0),
    "bench": (("build", *(f"bench-{model}" for model in MODELS)), 500.0),
}
PARTS["all"] = (tuple(dict.fromkeys(name for names, _ in PARTS.values() for name in names)), 600.0)


def stages(card: Card, folder: Path, arguments: list[str]) -> list[Stage]:
    """All stages.

    Args:
        card: the GPU that is here.
        folder: of what they write.
        arguments: of pytest, for tests and benchmarks.
    """
    build = ("-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-build-isolation")
    archs = {"FASTLARS_CUDA": "1", "FASTLARS_CUDA_ARCHS": " ".join(card.archs)}
    workers = max(1, min(8, card.cores // 2))
    files = test_files(card)
    return [
        Stage("build", "does it build for this GPU", 150, (*build, "--no-deps", "-e", "."), archs),
        Stage(
            "check",
            "is every back end right for every rule and type",
            60,
            ("-m", "fastlars", "check"),
        ),
        Stage(
            "rows",
            "what does a step of ResNet-50 and BERT-large take, against torch's fused optimizers",
            80,
            ("-m", "benchmarks.gpu_proof.rows"),
        ),
        Stage(
            "grid",
            "which number of blocks and of chunks in shared memory is the fastest",
            75,
            ("-m", "benchmarks.gpu_proof.grid"),
        ),
        Stage(
            "paths",
            "have both CUDA paths, and a CUDA graph, the same bits after many steps",
            60,
            ("-m", "benchmarks.gpu_proof.paths"),
        ),
        Stage(
            "tests",
            "do the tests pass that need a GPU",
            200,
            _pytest(card, folder, "tests", workers, [*files, "--deselect", SANITIZED, *arguments]),
        ),
        Stage(
            "sanitizer",
            "does compute-sanitizer find anything",
            130,
            _pytest(card, folder, "sanitizer", 2, [SANITIZED]),
        ),
        Stage(
            "counters",
            "how many bytes reach the memory, how much does the L2 cache answer",
            110,
            ("-m", "benchmarks.gpu_proof.counters"),
            {"FASTLARS_CHECK": "0"},  # whose launches would be counted
        ),
        Stage(
            "first-step",
            "what does the check at first use add to the first step",
            70,
            ("-m", "benchmarks.step.first_step", "cuda", "lars"),
        ),
        *(
            Stage(
                f"bench-{model}",
                f"what does a step take of every contender, {model}",
                90,
                ("-m", "benchmarks.gpu_proof.bench", model, *arguments),
            )
            for model in MODELS
        ),
    ]


def _pytest(
    card: Card, folder: Path, name: str, workers: int, arguments: list[str]
) -> tuple[str, ...]:
    usual = ("-m", "gpu", "-v", "--benchmark-disable", "-p", "no:cacheprovider")
    report = f"--junitxml={folder / name}.xml"
    side_by_side = ("-n", str(workers), "--dist", "worksteal") * ("xdist" in card.plugins)
    # A test that hangs prints where and ends with its process; the others go on in a new one.
    limits = ("--timeout", "120", "--timeout-method", "thread") * ("pytest_timeout" in card.plugins)
    return ("-m", "pytest", *usual, *side_by_side, *limits, report, *arguments)


def test_files(card: Card) -> list[str]:
    """Files that have tests for a GPU: others need packages that a GPU machine may lack."""
    left_out = ("distributed", "trainer") if card.trainer_lacks else ()
    return [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if path.parent.name not in left_out and re.search(r'mark\.gpu|marks\("', path.read_text())
    ]
