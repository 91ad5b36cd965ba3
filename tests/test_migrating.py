"""docs/migrating.md: its blocks run, and compute what the library of the section computes."""

from __future__ import annotations

import inspect
import re
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytorch_optimizer
import timm.optim
import torch

import fastlars
import migrating_peers
from fastlars import conventions
from optimizers import one_thread as one_thread
from sources import ROOT, python_blocks

TEXT = (ROOT / "docs" / "migrating.md").read_text()
STEPS = 3


@dataclass(frozen=True)
class Section:
    title: str
    text: str

    def block(self, label: str) -> str:
        found = re.search(rf"^{label}.*?^```python\n(.*?)^```", self.text, re.M | re.S)
        assert found is not None, f"{self.title} has no block after a line with {label!r}"
        return found[1]

    def rows(self) -> list[tuple[str, str]]:
        lines = re.findall(r"^\| (.*?) \| (.*?) \|$", self.text, re.MULTILINE)
        return [row for row in lines if "`" in row[0]]

    def __str__(self) -> str:
        return self.title


def sections() -> list[Section]:
    parts = re.split(r"^## (.*)\n", TEXT, flags=re.MULTILINE)[1:]
    return [Section(*pair) for pair in zip(parts[::2], parts[1::2], strict=True)]


SECTIONS = [section for section in sections() if "After" in section.text]
# Before: not torch's, or not a state that its own rule goes on with.
OTHERS = ("optax lars", "optax lamb", "bitsandbytes", "MLPerf", "torch and NUS")
ALIKE = [section for section in SECTIONS if section.title not in OTHERS]
each = pytest.mark.parametrize("section", SECTIONS, ids=str)
alike = pytest.mark.parametrize("section", ALIKE, ids=str)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    migrating_peers.install(monkeypatch)


def prepared() -> dict[str, Any]:
    """What all blocks follow: the first one of the page."""
    torch.manual_seed(0)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    first, *_ = python_blocks(TEXT)
    exec(first, namespace)
    return namespace


def train(namespace: dict[str, Any], steps: range) -> list[torch.Tensor]:
    """The weights after some steps whose gradients depend on the step alone."""
    params = list(namespace["model"].parameters())
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = 0.1 * torch.randn(p.shape, generator=generator)
        namespace["optimizer"].step()
    return [p.detach().clone() for p in params]


def assert_close(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        # A few roundings of 6e-8 in each step.
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-6)


def save(namespace: dict[str, Any]) -> None:
    state = {name: namespace[name].state_dict() for name in ("model", "optimizer")}
    torch.save(state, "checkpoint.pt")


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
    section = next(s for s in SECTIONS if s.title == "torch and NUS")
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
    """The states are made by hand; tests/test_migrate.py has those of optax itself."""
    section = next(s for s in SECTIONS if s.title == name)
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
    section = next(s for s in SECTIONS if s.title == "MLPerf")
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
    section = next(s for s in SECTIONS if s.title == "bitsandbytes")
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
    kinds = (fastlars.LARS, fastlars.LAMB, fastlars.parameter_groups)
    mine = {"None"}.union(*(inspect.signature(kind).parameters for kind in kinds))
    rows = section.rows()
    for before, after in rows:
        assert keywords(after) <= mine, (section.title, after)
        if section.title in PEERS:
            theirs = set(inspect.signature(PEERS[section.title]).parameters)
            assert keywords(before) <= theirs | HIDDEN, (section.title, before)
    assert rows or section.title == "torch and NUS"


def test_all_blocks_are_run() -> None:
    labels = ("Before", "After", "Going on")
    labelled = sum(len({s.block(label) for label in labels}) for s in SECTIONS)
    assert len(python_blocks(TEXT)) == 1 + labelled


@pytest.mark.parametrize("name", conventions.by_name)
def test_every_convention_is_shown(name: str) -> None:
    assert f"conventions.{name}" in TEXT
