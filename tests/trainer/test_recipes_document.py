"""docs/recipes.md: its commands can be run, its tables are those of the code."""

from __future__ import annotations

import math
import re
import shlex

import pytest

from fastlars.trainer.config import command_line
from fastlars.trainer.config.recipes import LARS, MLPERF, MLPERF_DEFAULT, NAMES
from fastlars.trainer.data.order import BatchOrder
from sources import ROOT

TEXT = (ROOT / "docs" / "recipes.md").read_text()
COMMANDS = [line for line in TEXT.splitlines() if " -m fastlars.trainer " in line]
IMAGENET = 1_281_167


def gpus(line: str) -> int:
    """Of a command, which torchrun starts or nobody."""
    found = (re.search(rf"--{name}=(\d+)", line) for name in ("nnodes", "nproc-per-node"))
    return math.prod(int(match[1]) for match in found if match)


@pytest.mark.parametrize("line", [line for line in COMMANDS if "/data/imagenet" in line])
def test_commands_fit_their_gpus(line: str) -> None:
    processes = gpus(line)
    command = command_line.parse(shlex.split(line.split(" -m fastlars.trainer ")[1]))
    made = command_line.new_config(command.given, processes)
    steps = BatchOrder(IMAGENET, made.batch_size, made.micro_batch, 0, processes, made.seed)
    assert steps.micro_batch <= 256
    if made.bn_batch:
        assert steps.micro_batch % made.bn_batch == 0


def test_every_recipe_has_a_command_for_1_8_and_256_gpus() -> None:
    found = sorted(
        (re.findall(r"--recipe (\w+)", line)[0], gpus(line))
        for line in COMMANDS
        if "/data/imagenet" in line
    )
    assert found == sorted((name, count) for name in NAMES for count in (1, 8, 256))


def test_the_table_of_mlperf_is_the_codes() -> None:
    rows = sorted([*MLPERF, MLPERF_DEFAULT], key=lambda row: row.batch)
    lines = [
        f"| {row.batch:,} | {row.lr:g} | {row.warmup_epochs:g} | {row.epochs} | {row.momentum:g} "
        f"| {row.weight_decay:g} | {row.bn_batch} | {row.source.split()[-1]} |"
        for row in rows
    ]
    assert "\n".join(lines) in TEXT


def test_the_table_of_lars_is_the_codes() -> None:
    rates = " | ".join(str(row.lr) for row in LARS)
    batches = " | ".join(f"{row.batch:,}" for row in LARS)
    assert f"| batch | {batches} |\n|---|---|---|---|\n| lr | {rates} |" in TEXT
