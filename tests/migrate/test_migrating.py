"""docs/migrating.md: its blocks run, and compute what the library of the section computes."""

from __future__ import annotations

import inspect
import re
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import pytorch_optimizer
import timm.optim
import torch

import fastlars
from fastlars import conventions
from migrate import stand_ins
from migrate.page import (
    ALIKE,
    FRAMEWORKS,
    LABELS,
    PAGE,
    SECTIONS,
    STEPS,
    TEXT,
    Section,
    assert_close,
    prepared,
    save,
    train,
)
from optimizers import one_thread as one_thread
from repository_files import python_blocks

each = pytest.mark.parametrize("section", SECTIONS, ids=str)
alike = pytest.mark.parametrize("section", ALIKE, ids=str)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stand_ins.install(monkeypatch)


@alike
def test_after_computes_what_before_did(section: Section) -> None:
    theirs, ours = prepared(), prepared()
    start = [p.detach().clone() for p in ours["model"].parameters()]
    exec(section.block("Before"), theirs)
    exec(section.block("After"), ours)
    after = train(ours, range(STEPS))
    assert_close(after, train(theirs, range(STEPS)))
    assert all(not torch.equal(a, b) for a, b in zip(after, start, strict=True))


@alike
def test_a_checkpoint_goes_on(section: Section) -> None:
    theirs, ours = prepared(), prepared()
    exec(section.block("Before"), theirs)
    train(theirs, range(STEPS))
    save(theirs)
    exec(section.block("After"), ours)
    exec(section.block("Going on"), ours)
    expected = train(theirs, range(STEPS, 2 * STEPS))
    assert_close(train(ours, range(STEPS, 2 * STEPS)), expected)
    fresh = prepared()
    exec(section.block("After"), fresh)
    fresh["model"].load_state_dict(torch.load("checkpoint.pt", weights_only=False)["model"])
    weights = zip(train(fresh, range(STEPS, 2 * STEPS)), expected, strict=True)
    assert any(not torch.allclose(a, b, rtol=2e-6, atol=1e-6) for a, b in weights)


def test_sgd_goes_on_as_lars() -> None:
    section = PAGE["torch and NUS"]
    theirs, ours = prepared(), prepared()
    exec(section.block("Before"), theirs)
    train(theirs, range(STEPS))
    save(theirs)
    exec(section.block("After"), ours)
    exec(section.block("Going on"), ours)
    pairs = zip(theirs["model"].parameters(), ours["model"].parameters(), strict=True)
    for p, q in pairs:
        states = [n["optimizer"].state[x] for n, x in ((theirs, p), (ours, q))]
        assert torch.equal(*(state["momentum_buffer"] for state in states))
    train(ours, range(STEPS))


def flax(values: list[Any]) -> dict[str, Any]:
    """Arrays of the parameters' shapes, as a tree with flax's names and layouts."""
    kernel, bias, scale, shift, dense, last = (value.numpy() for value in values)
    return {
        "Conv_0": {"kernel": kernel.transpose(2, 3, 1, 0), "bias": bias},
        "BatchNorm_0": {"scale": scale, "bias": shift},
        "Dense_0": {"kernel": dense.T, "bias": last},
    }


@pytest.mark.parametrize("name", ["optax lars", "optax lamb"])
def test_optax_states_load(name: str) -> None:
    """The states are made by hand; tests/migrate/test_migrate.py has those of optax itself."""
    section = PAGE[name]
    compile(section.block("Before"), name, "exec")
    ours = prepared()
    exec(section.block("After"), ours)
    first, second = ([torch.randn(p.shape) for p in ours["model"].parameters()] for _ in range(2))
    if name == "optax lars":
        part = namedtuple("TraceState", "trace")(flax(first))
    else:
        part = namedtuple("AdamState", "count mu nu")(5, flax(first), flax(second))
    ours["opt_state"] = ((), (part, ()))
    exec(section.block("Going on"), ours)
    for p, a, b in zip(ours["model"].parameters(), first, second, strict=True):
        state = ours["optimizer"].state[p]
        if name == "optax lars":
            assert torch.equal(state["momentum_buffer"], -a)
        else:
            assert torch.equal(state["exp_avg"], a)
            assert torch.equal(state["exp_avg_sq"], b)
            assert state["step"] == 5
    train(ours, range(STEPS))


def test_mlperf_momentum_loads() -> None:
    section = PAGE["MLPerf"]
    compile(section.block("Before"), "mlperf", "exec")
    ours = prepared()
    exec(section.block("After"), ours)
    named = {name: torch.randn(p.shape) for name, p in ours["model"].named_parameters()}
    to_theirs = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}
    ours["momentum"] = {n: v.permute(to_theirs[v.ndim]).numpy() for n, v in named.items()}
    exec(section.block("Going on"), ours)
    for name, p in ours["model"].named_parameters():
        assert torch.equal(ours["optimizer"].state[p]["momentum_buffer"], -named[name])
    train(ours, range(STEPS))
    ours["scheduler"].step()


def test_bitsandbytes_moments_load() -> None:
    section = PAGE["bitsandbytes"]
    compile(section.block("Before"), "bitsandbytes", "exec")
    ours = prepared()
    exec(section.block("After"), ours)
    shapes = [p.shape for p in ours["model"].parameters()]
    states = {
        i: {"step": 4, "state1": torch.full(s, 0.5), "state2": torch.full(s, 0.25)}
        for i, s in enumerate(shapes)
    }
    group = {"lr": 2e-3, "betas": (0.9, 0.999), "params": list(range(len(shapes)))}
    optimizer = {"state": states, "param_groups": [group]}
    torch.save({"model": ours["model"].state_dict(), "optimizer": optimizer}, "checkpoint.pt")
    exec(section.block("Going on"), ours)
    for p in ours["model"].parameters():
        assert bool((ours["optimizer"].state[p]["exp_avg_sq"] == 0.25).all())
    train(ours, range(STEPS))


def keywords(cell: str) -> set[str]:
    """Names of keywords in a cell, in code spans such as `eps` or `eps=1e-8`; not of calls."""
    spans = re.findall(r"`([^`]*)`", cell)
    return {m[1] for span in spans if (m := re.fullmatch(r"(\w+)(=[^`]*)?", span))} - {"LARS"}


PEERS: dict[str, Any] = {
    "timm Lars": timm.optim.Lars,
    "timm Lamb": timm.optim.Lamb,
    "pytorch_optimizer LARS": pytorch_optimizer.LARS,
    "pytorch_optimizer Lamb": pytorch_optimizer.Lamb,
}
# Read from **kwargs.
HIDDEN = {"adam_debias", "adanorm"}


@each
def test_tables_name_keywords_that_exist(section: Section) -> None:
    kinds = (fastlars.LARS, fastlars.LAMB, fastlars.LANS, fastlars.parameter_groups)
    kinds += (fastlars.schedules.polynomial,)
    mine = {"None"}.union(*(inspect.signature(kind).parameters for kind in kinds))
    rows = section.rows()
    for before, after in rows:
        if "`" not in before:
            continue
        assert keywords(after) <= mine, (section.title, after)
        if section.title in PEERS:
            theirs = set(inspect.signature(PEERS[section.title]).parameters)
            assert keywords(before) <= theirs | HIDDEN, (section.title, before)
    assert rows or section.title in ("torch and NUS", "timm's registry", *FRAMEWORKS)


def test_all_blocks_are_run() -> None:
    for section in ALIKE:
        assert all(section.has(label) for label in LABELS), section
    labelled = [(s, label) for s in SECTIONS for label in LABELS if s.has(label)]
    in_yaml = [s for s in SECTIONS if s.title == "torchtune"]
    others = 2  # what all follow, and the recipe that tests/optim/test_skip_if.py runs
    assert len(python_blocks(TEXT)) == others + len(labelled) - 2 * len(in_yaml)


@pytest.mark.parametrize("name", conventions.by_name)
def test_every_convention_is_shown(name: str) -> None:
    assert f"conventions.{name}" in TEXT
