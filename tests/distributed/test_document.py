"""Every Python block of docs/distributed.md runs; the training script also survives kills."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import pytest
import torch

import overlap
from distributed.processes import run
from distributed.torchrun import TWO, finish, resumed_at, start
from sources import ROOT, python_blocks
from trainer.helpers import assert_same

DEADLY = Path(__file__).parent / "deadly.py"
TEXT = (ROOT / "docs" / "distributed.md").read_text()
SCRIPT, *BLOCKS = python_blocks(TEXT)


def train(folder: Path, deaths: str) -> str:
    """Run the script of the page in a folder; what it printed."""
    folder.mkdir()
    script = folder / "train.py"
    script.write_text(SCRIPT)
    log = folder / "log"
    started = start(
        DEADLY, script, folder, launch=(*TWO, "--max-restarts=5"), log=log, DEATHS=deaths,
        TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
    )  # fmt: skip
    status = finish(started)
    assert status == 0, log.read_text()
    return log.read_text()


@pytest.mark.slow
def test_the_script_is_killed_between_two_buckets(tmp_path: Path) -> None:
    """Some weights are written, others not; it ends with the bits of a run without a death."""
    # A process may be aborted when it ends, with overlap and without: docs/distributed.md says why.
    # torchrun then starts both once more, at step 20, where nothing is left to do.
    assert set(resumed_at(train(tmp_path / "whole", ""))) <= {20}
    # The second attempt begins with step 5: its death is in step 13.
    assert resumed_at(train(tmp_path / "killed", "0:7 1:8"))[:4] == [5, 5, 10, 10]
    whole, killed = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)
        for name in ("whole", "killed")
    )
    for state in (whole, killed):
        assert state["step"] == 20
        for group in state["optimizer"]["param_groups"]:
            group.pop("differentiable", None)  # torch's Optimizer adds it to what it loads
    assert_same(whole, killed)


def test_the_table_is_the_one_that_was_measured() -> None:
    with (ROOT / "benchmarks" / "results" / "overlap.csv").open() as file:
        assert overlap.markdown(list(csv.DictReader(file))) in TEXT


def execute(source: str, folder: str) -> None:
    """In a process of a group."""
    os.chdir(folder)
    torch.manual_seed(0)
    exec(compile(source, "docs/distributed.md", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("source", BLOCKS, ids=["sharded", "zero"])
def test_blocks_run(source: str, tmp_path: Path) -> None:
    run(4, execute, source, str(tmp_path))
