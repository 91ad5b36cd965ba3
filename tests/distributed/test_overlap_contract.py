"""What overlap assumes of the training loop: for each assumption, what happens where it is broken.

The table "What overlap relies on" in docs/distributed.md lists them, with the tests by name.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.nn.parallel import DistributedDataParallel

import fastlars
from distributed.changes import CHANGES
from distributed.overlap_cases import RATES, Result, Setting, make, result
from distributed.overlap_loops import MANY, loop, loss_of, same
from distributed.processes import run
from fastlars.distributed import overlap
from fastlars.in_backward.engine import WATCHED_STEPS
from optimizers import Snapshot
from repository_files import ROOT


def pair(kind: str, options: dict[str, Any] | None = None) -> tuple[Any, Any, list[nn.Parameter]]:
    net = make(Setting())
    params = list(net.parameters())
    optimizer = {"LARS": fastlars.LARS, "LAMB": fastlars.LAMB}[kind](
        params, lr=RATES[kind], weight_decay=0.01, **(options or {})
    )
    return DistributedDataParallel(net, **MANY), optimizer, params


def refused(name: str, before: int, debug: bool) -> None:
    """In the step after ``before`` steps, with mode="step"."""
    change, what, _ = CHANGES[name]
    ddp, optimizer, params = pair("LAMB")
    overlap(ddp, optimizer, debug=debug)
    loop(ddp, optimizer, before)
    optimizer.zero_grad()
    if before == 0:
        as_it_was = [p.detach().clone() for p in params]
    loss_of(ddp, before).backward()
    change(params, optimizer)
    if before == 0 and what != "weight":
        assert all(map(torch.equal, params, as_it_was))
    snapshot = Snapshot(optimizer)
    with pytest.raises(RuntimeError, match=f"a {what} was changed between backward and optimizer"):
        optimizer.step()
    snapshot.assert_unchanged()
    loop(ddp, optimizer, 2)


def refused_everywhere() -> None:
    for name, (_, what, every_step) in CHANGES.items():
        if what != "state":  # there is none before the first step
            refused(name, 0, debug=False)
        refused(name, WATCHED_STEPS - 1, debug=False)
        refused(name, WATCHED_STEPS + 1, debug=not every_step)


def test_a_change_is_refused() -> None:
    """In the first step before anything is changed."""
    run(2, refused_everywhere)


def changed(kind: str, options: dict[str, Any], overlapped: bool, mode: str) -> Result:
    """A change of each kind, each in a step of its own."""
    ddp, optimizer, params = pair(kind, options)
    if overlapped:
        overlap(ddp, optimizer, mode=mode, debug=True)
    early = loop(ddp, optimizer, 3)
    for number, (change, _, _) in enumerate(CHANGES.values()):
        optimizer.zero_grad()
        loss_of(ddp, 3 + number).backward()
        change(params, optimizer)
        optimizer.step()
    early += loop(ddp, optimizer, 3)
    return result(ddp.module, optimizer, early=early)


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("LARS", "norms", {}),
        ("LAMB", "norms", {}),
        ("LARS", "step", {"max_grad_norm": 0.5}),
        ("LAMB", "norms", {"max_grad_norm": 0.5}),
    ],
)
def test_a_change_counts_where_nothing_was_written(
    kind: str, mode: str, options: dict[str, Any]
) -> None:
    (first, _) = same(partial(changed, kind, options), mode)
    if kind == "LARS" or options:
        assert (first.early[2], first.early[-1]) == (len(first.params), len(first.params) - 2)


def twice(options: dict[str, Any], overlapped: bool, mode: str) -> Result:
    """Two backward passes before a step, without no_sync()."""
    ddp, optimizer, _ = pair("LARS", options)
    if overlapped:
        overlap(ddp, optimizer, mode=mode)
    early = []
    for step in range(8):
        optimizer.zero_grad()
        for k in range(1 + (step in (1, 4))):
            loss_of(ddp, 2 * step + k).backward()
        early.append(0 if not overlapped else len(optimizer.overlap_hook.in_flight))
        optimizer.step()
    return result(ddp.module, optimizer, early=early)


@pytest.mark.parametrize(("mode", "options"), [("norms", {}), ("step", {"max_grad_norm": 0.5})])
def test_a_second_backward_counts_where_nothing_was_written(
    mode: str, options: dict[str, Any]
) -> None:
    (first, _) = same(partial(twice, options), mode)
    # A step after one whose sums were in vain takes none.
    assert [bool(count) for count in first.early[2:]] == [False, True, True, False, True, True]


def skipped_batch(overlapped: bool, mode: str) -> Result:
    """Gradients that were thrown away without a step."""
    ddp, optimizer, _ = pair("LARS")
    if overlapped:
        overlap(ddp, optimizer, mode=mode)
    for step in range(6):
        optimizer.zero_grad()
        loss_of(ddp, step).backward()
        if step % 3 != 1:
            optimizer.step()
    return result(ddp.module, optimizer)


def test_gradients_thrown_away() -> None:
    same(skipped_batch, "norms")


def without_backward(overlapped: bool, mode: str) -> Result:
    """Steps that no backward pass came before show nothing of the ones that will."""
    net = nn.Sequential(make(Setting()))
    net.unused = nn.Linear(3, 2)
    net.forward = net[0].forward
    ddp = DistributedDataParallel(net, static_graph=True, **MANY)
    optimizer = fastlars.LAMB(net.parameters(), lr=0.02, weight_decay=0.01)
    if overlapped:
        overlap(ddp, optimizer, mode=mode)
    get_optimizer_state_dict(ddp, optimizer)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    return result(net, optimizer, early=loop(ddp, optimizer))


@pytest.mark.parametrize("mode", ["step", "norms"])
def test_a_step_without_backward(mode: str) -> None:
    """As torch.distributed.checkpoint takes one, to make states."""
    (first, _) = same(without_backward, mode)
    assert first.early[0] == 0
    if mode == "step":
        assert first.early[2] == len(first.params) - 2


def regrouped(overlapped: bool, mode: str) -> Result:
    """Lists of parameters that change between steps: frozen, moved to another group, put back."""
    net = make(Setting())
    params = list(net.parameters())
    ddp = DistributedDataParallel(net, **MANY)
    groups = [{"params": params[:4]}, {"params": params[4:], "lr": 0.01, "weight_decay": 0.1}]
    optimizer = fastlars.LAMB(groups, lr=0.05)
    if overlapped:
        overlap(ddp, optimizer, mode=mode)
    one, two = optimizer.param_groups
    early = loop(ddp, optimizer, 3)
    one["params"] = params[1:4]
    early += loop(ddp, optimizer, 3)
    del two["params"][1]
    early += loop(ddp, optimizer, 3)
    one["params"], two["params"] = params[4:], params[:4]
    early += loop(ddp, optimizer, 3)
    one["params"].reverse()
    early += loop(ddp, optimizer, 3)
    return result(net, optimizer, early=early)


@pytest.mark.parametrize("mode", ["step", "norms"])
def test_parameters_that_leave_their_group(mode: str) -> None:
    (first, _) = same(regrouped, mode)
    if mode == "step":
        count = len(first.params)
        expected = [count, count - 1, count - 2, count, count]
        assert [first.early[i] for i in (2, 5, 8, 11, 14)] == expected


def scaled(options: dict[str, Any], overlapped: bool, mode: str) -> Result:
    ddp, optimizer, params = pair("LARS", options)
    if overlapped:
        overlap(ddp, optimizer, mode=mode)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=3)
    losses = []
    for step in range(WATCHED_STEPS + 4):
        optimizer.zero_grad()
        factor = float("inf") if step == 4 else 1.0
        scaler.scale(factor * loss_of(ddp, step)).backward()
        if step in (1, 3, 5):
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(params, 0.5)
        scaler.step(optimizer)
        scaler.update()
        losses.append(scaler.get_scale())
    assert losses[4] < losses[3]
    return result(ddp.module, optimizer, losses)


@pytest.mark.parametrize(("mode", "options"), [("norms", {}), ("step", {"max_grad_norm": 0.5})])
def test_a_gradscaler_where_nothing_is_written(mode: str, options: dict[str, Any]) -> None:
    """Also one that clips by itself, and an overflow."""
    same(partial(scaled, options), mode)


def scaled_after_resume() -> None:
    ddp, optimizer, _ = pair("LAMB")
    overlap(ddp, optimizer)
    get_optimizer_state_dict(ddp, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    snapshot = Snapshot(optimizer)
    scaler.scale(loss_of(ddp, 0)).backward()
    with pytest.raises(RuntimeError, match=r'GradScaler does not .* mode="norms" and max_grad'):
        scaler.step(optimizer)
    optimizer.zero_grad()
    snapshot.assert_unchanged()


def test_a_gradscaler_after_a_resume() -> None:
    run(2, scaled_after_resume)


def test_the_table_names_tests_that_exist() -> None:
    page = (ROOT / "docs/distributed.md").read_text()
    table = page.split("### What overlap relies on")[1].split("\n## ")[0]
    named = set(re.findall(r"`(test_\w+)`", table))
    here = "".join(path.read_text() for path in (ROOT / "tests/distributed").glob("test_*.py"))
    assert len(named) > 20
    assert named <= set(re.findall(r"^def (test_\w+)", here, re.M))
