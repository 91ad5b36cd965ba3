"""--compile: the same training, through a graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from trainer.helpers import Outcome, load, records

Train = Callable[..., Outcome]
SETTINGS = ("--epochs", 1, "--batch-size", 256, "--micro-batch", 64, "--bn-batch", 32)


def compile_with(monkeypatch: pytest.MonkeyPatch, backend: Any) -> None:
    """Graphs without code generation, which takes the most time and is torch's own business."""
    plain = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: plain(self, backend=backend))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.mark.usefixtures("tiny", "no_picture")
def test_compiled(tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and evaluation to rounding; names in the checkpoint are those of the plain model."""
    compile_with(monkeypatch, "aot_eager")
    states, losses = [], []
    for flag in ("--no-compile", "--compile"):
        assert not torch._dynamo.utils.counters["stats"]["unique_graphs"]
        run = tmp_path / flag
        assert train(*SETTINGS, flag, "--ema", 0.5, "--output", run).status == 0
        states.append(load(run))
        losses.append(next(r["loss"] for r in records(run) if r["kind"] == "test"))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for what in ("model", "average"):
        assert list(states[0][what]) == list(states[1][what])
        torch.testing.assert_close(states[1][what], states[0][what], rtol=1e-4, atol=1e-5)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.usefixtures("tiny", "no_picture")
def test_a_compiler_that_fails(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_graph: object, _inputs: object) -> Any:
        raise RuntimeError("No working C++ compiler found")

    compile_with(monkeypatch, fail)
    outcome = train(*SETTINGS, "--compile", "--output", tmp_path / "run")
    assert outcome.status == 2
    assert "--compile: torch.compile failed: " in outcome.err
    assert "No working C++ compiler found" in outcome.err
    assert len(outcome.err.splitlines()) == 1
    assert not (tmp_path / "run").exists()
