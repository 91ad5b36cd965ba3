"""One optimizer step: fastlars against torch's fused optimizers and the other LARS and LAMB.

Each contender is checked, then timed in rounds that alternate with fastlars's, in this process.
pytest-benchmark's own columns time the contender alone; ``extra_info`` has the interleaved figures,
which are what `make bench` tabulates.
"""

from __future__ import annotations

import gc
import importlib.metadata
from typing import Any

import pytest
import torch

from benchmarks.machine import free_bytes
from benchmarks.models import gradients, parameters
from benchmarks.step.cases import CPU_CASES, Case, cpu_contenders
from benchmarks.step.check import check
from benchmarks.step.contenders import DECAY, LR, Contender
from benchmarks.step.traffic import elements
from benchmarks.timing import Sample, interleave

ROUNDS = 61
LIMIT_S = 8.0
ROWS = [
    pytest.param(case, name, id=f"{case}-{name}".replace(" ", "_"))
    for case in CPU_CASES
    for name in cpu_contenders(case)
]


def memory_rate() -> float:
    """Bytes a second that the memory of this machine gives now: ``a += b`` over 0.5 GB.

    Taken anew for every case: machines that others share do not always give the same.
    Not a copy: a processor reads a line before it overwrites it, which a copy does not count and an
    optimizer, which updates in place, does not suffer.
    """
    a, b = torch.zeros(2**26), torch.ones(2**26)
    seconds = interleave({"add": lambda: a.add_(b)}, rounds=15)["add"].median
    return 3 * a.nbytes / seconds


@pytest.mark.parametrize(("case", "name"), ROWS)
def test_step(benchmark: Any, case: Case, name: str) -> None:
    gc.collect()  # of the test before: optimizers sit in reference cycles, BERT's hold gigabytes
    if case.needed_bytes() > free_bytes():
        pytest.skip(
            f"{case} needs about {case.needed_bytes() / 1e9:.0f} GB of memory, "
            f"{free_bytes() / 1e9:.0f} are free"
        )
    contender, ours = cpu_contenders(case)[name], cpu_contenders(case)["fastlars"]
    check(contender, ours, case.rule, dtype=case.torch_dtype)
    params = parameters(case.shapes(), dtype=case.torch_dtype)
    # Some contenders write into the gradients; without mending they would shrink to nothing.
    grads = gradients(params)
    saved = [g.clone() for g in grads]

    def restore() -> None:
        torch._foreach_copy_(grads, saved)

    theirs = contender.build(params)
    calls = {name: theirs.step}
    if name != "fastlars":
        calls["fastlars"] = ours.build(params).step
    samples = interleave(calls, ROUNDS, between={name: restore}, limit_s=LIMIT_S)
    report(benchmark, samples, contender, name, case)
    benchmark.group = str(case)
    benchmark.pedantic(theirs.step, setup=restore, rounds=3, warmup_rounds=0)


def report(
    benchmark: Any, samples: dict[str, Sample], contender: Contender, name: str, case: Case
) -> None:
    """Put the interleaved figures where report.py finds them."""
    mine, numel, memory = samples[name], case.numel, memory_rate()
    benchmark.extra_info.update(
        contender=name,
        version=importlib.metadata.version(contender.package),
        parameters=numel,
        threads=torch.get_num_threads(),
        lr=LR,
        weight_decay=DECAY,
        p20_ms=mine.quantile(0.2) * 1e3,
        p50_ms=mine.median * 1e3,
        p80_ms=mine.quantile(0.8) * 1e3,
        rounds=len(mine.seconds),
        fastlars_ms=samples["fastlars"].median * 1e3,
        fastlars_over_this=samples["fastlars"].median / mine.median,
        memory_gb_s=memory / 1e9,
    )
    least: float | None = contender.bytes_per_parameter
    if contender.package == "fastlars" and least is None:
        least = elements(case.rule, "two-launch", case.widths).least
    if least is not None:
        rate = least * numel / mine.median
        benchmark.extra_info.update(
            bytes_per_parameter=least,
            gb_s=rate / 1e9,
            share_of_memory=rate / memory,
        )
