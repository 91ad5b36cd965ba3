"""Every convention against the library that it names: 20 steps, another learning rate each.

In float64 through the reference back end, and in float32 through the compiled one. Then every
keyword of every convention is changed, which must show. What is deliberately not copied is in
tests/test_convention_quirks.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from typing import Any

import pytest
import torch
from torch import Tensor

import fastlars
import peers
from fastlars import conventions
from peer_rows import ROWS, Row
from peers import Model, distance, train

BACKEND = {torch.float64: "reference", torch.float32: "cpu"}
# Errors relative to the largest weight of a tensor, after all steps.
TOLERANCE = {
    torch.float64: 1e-13,  # operations in another order: roundings of 1e-16 in 20 steps
    torch.float32: 2e-6,  # the same with 6e-8, and about ten of them in a step
}
SPECIAL = {
    # optax takes 1 - beta2^t in float32: at t = 1 that is 1e-3, known to 6e-8.
    ("optax_lamb", torch.float32): 3e-5,
}


def tolerance(row: Row, dtype: torch.dtype) -> float:
    return SPECIAL.get((row.convention, dtype), TOLERANCE[dtype])


@cache
def of_optax() -> dict[tuple[Row, torch.dtype], list[Tensor]]:
    """All rows for optax, run in one process of its own."""
    chosen = [(row, dtype) for dtype in TOLERANCE for row in ROWS if isinstance(row.make, str)]
    tasks = [(str(row.make), row.options, row.peak, dtype) for row, dtype in chosen]
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        results = pool.submit(peers.optax_runs, tasks).result()
    tensors = ([torch.tensor(array) for array in result] for result in results)
    return dict(zip(chosen, tensors, strict=True))


def grouped(name: str, *values: Any) -> Any:
    """Parameters of a convention. One worker runs optax for all of its rows, not each worker."""
    return pytest.param(*values, marks=[pytest.mark.xdist_group("optax")] * ("optax" in name))


@cache
def theirs(row: Row, dtype: torch.dtype) -> list[Tensor]:
    """The peer's weights after all steps."""
    if isinstance(row.make, str):
        return of_optax()[row, dtype]
    model = Model(dtype)
    groups = row.peer_groups(model, 0.0)
    return train(model, row.make(groups, lr=1.0, **row.options), row.peak)


def ours(row: Row, dtype: torch.dtype, **changes: Any) -> list[Tensor]:
    """fastlars' weights after all steps."""
    convention = conventions.by_name[row.convention](**(row.ours | changes))
    model = Model(dtype)
    groups = row.groups(model, convention.get("weight_decay", 0.0))
    optimizer = getattr(fastlars, convention.optimizer)(groups, lr=1.0, **convention)
    return train(model, optimizer, row.peak)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small are faster on one; results do not depend on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("row", [grouped(row.convention, row) for row in ROWS], ids=str)
def test_equals_the_peer(row: Row, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLARS_BACKEND", BACKEND[dtype])
    assert distance(ours(row, dtype), theirs(row, dtype)) <= tolerance(row, dtype)


def other(keyword: str, value: Any) -> Any:
    """A value that is near, or the alternative, so that a test that is too lax lets it pass."""
    if isinstance(value, bool):
        return not value
    alternatives = {
        "ratio": {"separate": "combined", "combined": "separate"},
        "buffer": {"step": "scaled", "scaled": "step", "gradient": "scaled"},
        "decay": {"update": "gradient", "decoupled": "gradient"},
        "bias_correction": {"rate": True},
        "phi": {(0.0, math.inf): (0.0, 10.0), (0.0, 10.0): (0.0, math.inf)},
        "betas": {(0.9, 0.999): (0.9, 0.998)},
        "max_grad_norm": {None: 8.0, 1.0: None},
        "eps": {0.0: 1e-3, 1e-8: 0.0, 1e-6: 1e-8},
        "ratio_eps": {0.0: 1e-6, 1e-6: 0.0},
        "norm_eps": {1e-6: 0.0},
    }
    return alternatives[keyword][value] if keyword in alternatives else value + 0.001


def keywords() -> Iterator[tuple[str, str]]:
    """Every convention with every keyword that has a meaning in it."""
    of_storage = {"lr", "master_weights", "stochastic_rounding", "state_dtype", "capturable"}
    of_storage |= {"fused_unscale"}
    without_ratio = {"ratio", "trust_coefficient", "eps", "phi", "ratio_eps", "trust_clip"}
    for name, convention in conventions.by_name.items():
        optimizer = getattr(fastlars, convention.optimizer)([torch.zeros(1)], lr=1.0, **convention)
        meaningless = set(of_storage)
        if convention.get("buffer") != "step":
            meaningless |= {"momentum_correction"}  # is refused
        if convention.get("momentum_correction"):
            meaningless |= {"buffer"}  # any other is refused
        if not convention.get("adapt", True):
            meaningless |= without_ratio | {"always_adapt"}
            if convention.optimizer != "LARS":
                meaningless -= {"eps"}  # stands in the direction
        yield from ((name, key) for key in optimizer.defaults if key not in meaningless)


@pytest.mark.parametrize(("name", "keyword"), [grouped(n, n, key) for n, key in keywords()])
def test_another_value_shows(name: str, keyword: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: it notices when any one keyword of a convention is wrong."""
    monkeypatch.setenv("FASTLARS_BACKEND", "reference")
    for row in ROWS:
        if row.convention != name or keyword in row.ours:
            continue
        convention = conventions.by_name[name](**row.ours)
        optimizer = getattr(fastlars, convention.optimizer)([torch.zeros(1)], 1.0, **convention)
        changes = {keyword: other(keyword, optimizer.defaults[keyword])}
        if changes == {"nesterov": True} and not convention.get("momentum"):
            continue
        if keyword == "dampening" and convention.get("nesterov"):
            continue
        changed = distance(ours(row, torch.float64, **changes), theirs(row, torch.float64))
        if changed > 10 * tolerance(row, torch.float64):
            return
    pytest.fail(f"no row notices a wrong {keyword}")


@pytest.mark.parametrize("row", [r for r in ROWS if r.convention == "mlperf_mxnet_lars"], ids=str)
def test_corrected_momentum_has_the_rate_outside(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    """NVIDIA's correction makes Algorithm 1 what the ports to PyTorch compute, at any schedule."""
    monkeypatch.setenv("FASTLARS_BACKEND", "reference")
    port = ours(row, torch.float64, buffer="scaled", momentum_correction=False)
    assert distance(port, theirs(row, torch.float64)) <= TOLERANCE[torch.float64]


def test_every_convention_has_rows() -> None:
    assert {row.convention for row in ROWS} == set(conventions.by_name)


@pytest.mark.parametrize("name", conventions.by_name)
def test_convention_is_a_mapping(name: str) -> None:
    convention = getattr(conventions, name)
    assert convention.name == name
    assert name in conventions.__all__
    assert "lr" not in convention
    changed = convention(weight_decay=0.125)
    assert dict(changed) == {**convention, "weight_decay": 0.125}
    assert convention.get("weight_decay") != 0.125
    for text in (name, convention.equation, convention.source, *convention.differences):
        assert text in str(convention)
