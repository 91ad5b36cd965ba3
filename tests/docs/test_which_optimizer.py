"""docs/which-optimizer.md: its blocks run; its settings are those of its tables and recipes."""

from __future__ import annotations

import re
from typing import Any

import pytest

from fastlars.trainer.config.recipes import MLPERF
from repository_files import ROOT, python_blocks

TEXT = (ROOT / "docs" / "which-optimizer.md").read_text()
WARMUP = 3125  # steps, at every batch of LAMB's table: 1/20 of 62,500 at 8,192


def test_the_blocks_have_the_settings_of_the_tables() -> None:
    namespace: dict[str, Any] = {}
    peaks = []
    for block in python_blocks(TEXT):
        exec(block, namespace)
        groups = namespace["optimizer"].param_groups
        assert [group.get("adapt", True) for group in groups] == [True, False]
        decay, peak = groups[0]["weight_decay"], groups[0]["initial_lr"]
        factor, steps = namespace["scheduler"].lr_lambdas[0], namespace["steps"]
        warmup = next(i for i in range(steps) if factor(i) == 1.0)
        peaks.append((decay, peak, warmup, steps))
        assert factor(steps) * peak == pytest.approx(1e-4 if len(peaks) == 1 else 0.0)
    row = next(row for row in MLPERF if row.batch == 8192)
    images = 1_281_167
    warmup, steps = (int(n * images / 8192) for n in (row.warmup_epochs, row.epochs))
    lars = (row.weight_decay, row.lr, warmup, steps)
    assert peaks == [lars, (0.01, 0.0025, WARMUP, 62_500)]
    assert re.search(r"^\| 512 to 32,768 \| `LAMB` \| 0\.005 sqrt.* \| 0\.01 \|", TEXT, re.M)


@pytest.mark.parametrize("row", [r for r in MLPERF if r.batch in (4096, 8192, 32768)], ids=str)
def test_rows_of_lars_are_those_of_the_recipe(row: Any) -> None:
    expected = (
        f"| {row.batch:,} | `LARS` | {row.lr:g} | {row.warmup_epochs:g} | "
        f"poly 2, {row.epochs} epochs | {row.weight_decay:g} | "
        f"norms, biases / norms, biases | {row.momentum:g} | 0.001 |"
    )
    # Python writes 2e-4 as 0.0002, and 2.5e-5 as 2.5e-05.
    assert expected.replace("0.0002", "2e-4").replace("e-05", "e-5") in TEXT
