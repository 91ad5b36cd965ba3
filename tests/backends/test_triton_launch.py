"""Triton's launches as its runtime takes them, with a driver that launches nothing.

The interpreter lets pass what the runtime refuses, and compiles nothing. Needs no GPU.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from backend_cases import BF16, F32, PLAIN, ROWS, Run
from fastlars.backends.base import Dtypes, OnDevice, StepScalars
from fastlars.rules import GradientNorm, Rule
from problems import ORDINARY

triton = pytest.importorskip("triton")

from triton.runtime import driver  # noqa: E402

from benchmarks.step.triton_host import NoLaunches  # noqa: E402
from fastlars.backends.triton import launch  # noqa: E402
from fastlars.backends.triton.common import NUMBER_OFFSET, encode  # noqa: E402

NAMES = (
    "LARS momentum correction",
    "LAMB of the paper",
    "LAMB without adaptation",
    "LANS of the paper",
    "LANS without adaptation",
    "RMSprop warm-up across the transition",
)
RATES, SEEDS = (0.1, 1.0, 16.0), (3, 2**61 + 16, 1)


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[NoLaunches]:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(launch, "_compiled", {})
    found, before = NoLaunches(), vars(driver).copy()
    driver.set_active(found)
    yield found
    vars(driver).clear()  # not driver.reset_active(), which needs a GPU
    vars(driver).update(before)


def _on_device(rate: float, seed: int | None) -> StepScalars:
    return StepScalars(0.0, 1.0, seed, OnDevice(torch.tensor(rate, dtype=torch.float64)))


def _launches(notes: NoLaunches, run: Run, rule: Rule, scalars: StepScalars) -> tuple[int, int]:
    """Kernels loaded and launched in one step, and for one global norm."""
    before = len(notes.loaded), len(notes.launched)
    bound = run.bind()
    run.backend.measure(GradientNorm(), bound, scalars)
    run.backend.step(rule, bound, scalars)
    return len(notes.loaded) - before[0], len(notes.launched) - before[1]


def _run(name: str, dtypes: Dtypes = PLAIN) -> tuple[Run, Rule]:
    (row,) = (row for row in ROWS if row.name == name)
    run = Run("triton", row, dtypes, ORDINARY)
    run.take_gradients(0)
    return run, row.rule


@pytest.mark.parametrize("dtypes", [PLAIN, Dtypes(BF16, F32, F32)], ids=["plain", "stochastic"])
@pytest.mark.parametrize("name", NAMES)
def test_rates_and_seeds_compile_nothing_anew(name: str, dtypes: Dtypes, notes: NoLaunches) -> None:
    run, rule = _run(name, dtypes)
    seeds = SEEDS if dtypes.weight == BF16 else (None,) * 3
    pairs = list(zip(RATES, seeds, strict=True))
    for numbers in (
        [StepScalars(rate, 1.0, seed) for rate, seed in pairs],
        [_on_device(rate, seed) for rate, seed in pairs],
    ):
        loaded, launched = zip(*(_launches(notes, run, rule, x) for x in numbers), strict=True)
        assert loaded[0] > 0
        assert loaded[1:] == (0, 0)
        assert launched[0] > 3 - (not rule.adapt)
        assert len(set(launched)) == 1


# In a tuple, Triton compiles anew for integers that are 1, multiples of 16, or fit 32 bits; powers
# of two are floats whose last bits are 0.
VALUES = (0.0, -0.0, 5e-324, 2.0**-1022, 0.1, 0.5, 0.999, 1.0, 16.0, 1e308, math.inf)


@pytest.mark.parametrize("name", NAMES)
def test_hyper_parameters_compile_nothing_anew(name: str, notes: NoLaunches) -> None:
    run, rule = _run(name)
    _launches(notes, run, rule, StepScalars(0.1))
    tried = 0
    for field, value in product(fields(rule), VALUES):
        if field.metadata and not field.metadata["off"]:
            try:
                changed = replace(rule, **{field.name: value})
            except ValueError:  # out of its range
                continue
            assert _launches(notes, run, changed, StepScalars(0.1))[0] == 0, (field.name, value)
            tried += 1
    assert tried > 10


def test_options_compile_anew(notes: NoLaunches) -> None:
    run, rule = _run("LAMB of the paper")
    assert _launches(notes, run, rule, StepScalars(0.1))[0] > 0
    options: dict[str, Any] = {"decay": "decoupled"}
    changed = replace(rule, **options)
    # `prepare` before the sums are known and after; `measure` has the rule for Nesterov's form.
    loaded = _launches(notes, run, changed, StepScalars(0.1))[0]
    assert notes.loaded[-loaded:] == ["prepare", "measure", "prepare", "apply"]


LAUNCHES = {
    "LARS momentum correction": ["measure", "prepare", "apply"],
    "LAMB of the paper": ["prepare", "measure", "prepare", "apply"],
    "LAMB without adaptation": ["prepare", "apply"],
    "LANS of the paper": ["measure", "prepare", "measure", "prepare", "apply"],
    "LANS without adaptation": ["measure", "prepare", "apply"],
    "RMSprop warm-up across the transition": ["prepare", "apply"],
}


@pytest.mark.parametrize("name", NAMES)
def test_launches_of_a_step(name: str, notes: NoLaunches) -> None:
    run, rule = _run(name)
    run.backend.step(rule, run.bind(), StepScalars(0.1))
    assert notes.launched == LAUNCHES[name]


@pytest.mark.parametrize("name", ["LANS of the paper", "LANS without adaptation"])
def test_known_norms_of_gradients_are_not_taken_again(name: str, notes: NoLaunches) -> None:
    run, rule = _run(name)
    bound = run.bind()
    sums = torch.ones(len(run.tensors.weights), 1, dtype=torch.float64)
    run.backend.step(rule, bound, StepScalars(0.1, gradient_sums=sums))
    run.backend.step(replace(rule, normalize_grad=False), bound, StepScalars(0.1))
    assert notes.launched == LAUNCHES[name][1:] * 2
    for wrong in (sums.float(), sums[1:], sums.flatten(), sums.to("meta")):
        with pytest.raises(ValueError, match="step of LANS needs"):
            run.backend.step(rule, bound, StepScalars(0.1, gradient_sums=wrong))


def test_triton_is_asked_once_for_each_kernel(
    notes: NoLaunches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton looks at every argument of every call, which takes longer than the rest of a step."""
    asked = []
    warmup = triton.JITFunction.warmup

    def noted(kernel: Any, *arguments: Any, **options: Any) -> Any:
        asked.append(kernel)
        return warmup(kernel, *arguments, **options)

    monkeypatch.setattr(triton.JITFunction, "warmup", noted)
    run, rule = _run("LAMB of the paper")
    for bound, rate in product((run.bind(), run.bind()), RATES):  # two plans
        run.backend.step(replace(rule, beta1=rate / 20), bound, StepScalars(rate))
    assert len(asked) == 4
    assert len(notes.launched) == 4 * 2 * len(RATES)


@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_that_does_not_compile_leaves_everything_as_it_was(
    name: str, notes: NoLaunches, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, rule = _run(name)
    compiled = launch.Launcher._compile

    def fails(launcher: Any, kernel: Any, *given: Any) -> Any:
        if kernel.__name__ == "apply":
            raise RuntimeError("no compiler")
        return compiled(launcher, kernel, *given)

    monkeypatch.setattr(launch.Launcher, "_compile", fails)
    with pytest.raises(RuntimeError, match="no compiler"):
        run.backend.step(rule, run.bind(), StepScalars(0.1))
    assert notes.launched == []


@pytest.mark.parametrize("name", [name for name in NAMES if len(LAUNCHES[name]) > 2])
def test_sums_and_numbers_of_a_caller_may_begin_anywhere(name: str, notes: NoLaunches) -> None:
    run, rule = _run(name)
    bound = run.bind()
    # On a boundary, though the next call's need not be: the same kernel must serve both.
    sums = torch.rand(len(run.tensors.weights), rule.sums, dtype=torch.float64)
    of_gradients = sums[:, :1].clone()
    streams = torch.arange(len(sums), dtype=torch.int32)
    given = StepScalars(0.1, seed=3, gradient_sums=of_gradients, streams=streams)
    run.backend.apply(rule, bound, given, sums)
    aligned = {
        source.fn.arg_names[i]
        for source in notes.sources
        if source.name in ("prepare", "apply")
        for (i, *_), attributes in source.attrs.items()
        if attributes
    }
    assert {"table", "report", "coefficient_table"} <= aligned
    assert not {"sums", "gradient_sums", "streams"} & aligned


@pytest.mark.parametrize("value", VALUES)
def test_numbers_are_encoded_as_odd_64_bit_integers(value: float) -> None:
    encoded = encode(value)
    assert encoded % 2 == 1
    assert 2**51 < abs(encoded) < 2**63
    bits = ((encoded - NUMBER_OFFSET.value) % 2**64) >> 1
    assert struct.unpack("<d", struct.pack("<Q", bits)) == (value,)


def test_numbers_below_zero_are_refused() -> None:
    with pytest.raises(OverflowError):
        encode(-1.0)
