"""docs/recipes.md: its commands can be run, its tables are those of the code."""

from __future__ import annotations

import math
import re
import shlex
from typing import Any

import pytest
import torch

from fastlars.trainer.config import command_line
from fastlars.trainer.config.recipes import LARS, MLPERF, MLPERF_DEFAULT, NAMES
from fastlars.trainer.data.order import BatchOrder
from sources import ROOT, python_blocks

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


def test_scripts_run() -> None:
    """LANS's at the rates of its table, TVLARS's with a rate that falls from step to step."""
    blocks = python_blocks(TEXT[: TEXT.index("## Trust ratios where you look")])
    assert len(blocks) == 2
    namespace: dict[str, Any] = {}
    for block in blocks:
        exec(block, namespace)
        optimizer, schedule = namespace["optimizer"], namespace["schedule"]
        peaks = [group["initial_lr"] for group in optimizer.param_groups]
        factor, steps = schedule.lr_lambdas[0], 3870
        if "LANS" in block:
            shares = [factor(i) for i in range(steps + 1)]
            assert sum(share == 1.0 for share in shares) == 967 + 1
            assert shares[: round(0.05 * steps) + 1][-1] == 1.0 == shares[round(0.3 * steps)]
            assert shares[steps] == 0.0
            assert peaks == [0.005, 0.005]
            assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]
            assert all(group["adapt"] for group in optimizer.param_groups)
        else:
            shares = [factor(i) for i in (0, 970, 9700)]
            assert shares == pytest.approx([0.725 + 0.01, 0.51, 0.01], abs=1e-3)
        for p in namespace["model"].parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        schedule.step()
