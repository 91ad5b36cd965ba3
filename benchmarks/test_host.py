"""Host time of a step: Python and checks, for as many tensors as ResNet-50 has, of 1 element each.

What the compiled call takes for such tensors is timed beside it, so that the rest can be read off.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

import pytest
import torch

import fastlars
from cases import parameters
from fastlars.backends.cpu import Cpu
from shapes import resnet50
from timing import interleave

ROUNDS = 2001


@pytest.mark.parametrize("name", ["fastlars LARS", "fastlars LAMB", "torch SGD(fused)"])
def test_host(benchmark: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    params = parameters([(1,) for _ in resnet50()])
    kinds: dict[str, Any] = {
        "fastlars LARS": lambda: fastlars.LARS(params, lr=1e-6),
        "fastlars LAMB": lambda: fastlars.LAMB(params, lr=1e-6),
        "torch SGD(fused)": lambda: torch.optim.SGD(params, lr=1e-6, momentum=0.9, fused=True),
    }
    optimizer = kinds[name]()
    optimizer.step()
    calls = {"step": optimizer.step}
    if name.startswith("fastlars"):
        calls["kernel"] = last_call(optimizer, monkeypatch)
    samples = interleave(calls, ROUNDS)
    benchmark.group = "host, 161 tensors of 1 element"
    step = samples["step"]
    benchmark.extra_info.update(
        contender=name,
        version=importlib.metadata.version(name.split()[0]),
        p20_ms=step.quantile(0.2) * 1e3,
        p50_ms=step.median * 1e3,
        p80_ms=step.quantile(0.8) * 1e3,
        rounds=len(step.seconds),
        parameters=len(params),
        threads=1,
    )
    if "kernel" in samples:
        benchmark.extra_info["kernel_ms"] = samples["kernel"].median * 1e3
    benchmark.pedantic(optimizer.step, rounds=100, warmup_rounds=5)


def last_call(optimizer: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The compiled call that the optimizer's step makes, to be made again by itself."""
    seen: list[Any] = []
    real = Cpu.step

    def spy(self: Cpu, *arguments: Any) -> torch.Tensor:
        seen[:] = [self, *arguments]
        return real(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Cpu, "step", spy)
        optimizer.step()
    return lambda: real(*seen)
