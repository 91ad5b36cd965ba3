"""One optimizer step: fastlars against torch's fused optimizers and the other LARS and LAMB.

Each contender is checked, then timed in rounds that alternate with fastlars's, in this process.
pytest-benchmark's own columns time the contender alone; ``extra_info`` has the interleaved figures,
which are what `make bench` tabulates.
"""

from __future__ import annotations

import gc
import importlib.metadata
from functools import cache
from typing import Any

import pytest
import torch

from cases import DECAY, LR, RULES, Contender, check, gradients, parameters
from shapes import MODELS
from timing import Sample, interleave

ROUNDS = {"resnet50": 61, "bert_large": 11}
CASES = [
    pytest.param(model, rule, name, id=f"{model}-{rule}-{name.replace(' ', '_')}")
    for model in ROUNDS
    for rule in RULES
    for name in RULES[rule]
    if model == "resnet50" or "rmsprop" not in rule  # which was made for it
]


@cache
def memory_rate() -> float:
    """Bytes a second that the memory of this machine gives: ``a += b`` over 0.5 GB.

    Not a copy: a processor reads a line before it overwrites it, which a copy does not count and an
    optimizer, which updates in place, does not suffer.
    """
    a, b = torch.zeros(2**26), torch.ones(2**26)
    seconds = interleave({"add": lambda: a.add_(b)}, rounds=15)["add"].median
    return 3 * a.nbytes / seconds


@pytest.mark.parametrize(("model", "rule", "name"), CASES)
def test_step(benchmark: Any, model: str, rule: str, name: str) -> None:
    gc.collect()  # of the test before: optimizers sit in reference cycles, BERT's hold gigabytes
    contender, ours = RULES[rule][name], RULES[rule]["fastlars"]
    check(contender, ours, rule)
    params = parameters(MODELS[model]())
    numel = sum(p.numel() for p in params)
    # Some contenders write into the gradients; without mending they would shrink to nothing.
    grads = gradients(params)
    saved = [g.clone() for g in grads]

    def restore() -> None:
        torch._foreach_copy_(grads, saved)

    theirs = contender.build(params)
    rounds = ROUNDS[model]
    calls = {name: theirs.step}
    if name != "fastlars":
        calls["fastlars"] = ours.build(params).step
    samples = interleave(calls, rounds, between={name: restore})
    report(benchmark, samples, contender, name, numel)
    benchmark.group = f"{model} {rule}"
    benchmark.pedantic(theirs.step, setup=restore, rounds=3, warmup_rounds=0)


def report(
    benchmark: Any, samples: dict[str, Sample], contender: Contender, name: str, numel: int
) -> None:
    """Put the interleaved figures where report.py finds them."""
    mine = samples[name]
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
        memory_gb_s=memory_rate() / 1e9,
    )
    if contender.bytes_per_parameter is not None:
        rate = contender.bytes_per_parameter * numel / mine.median
        benchmark.extra_info.update(
            bytes_per_parameter=contender.bytes_per_parameter,
            gb_s=rate / 1e9,
            share_of_memory=rate / memory_rate(),
        )
