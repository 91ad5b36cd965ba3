"""Overlap with FSDP2: what is refused, backward passes that fail, and the event after a step."""

from __future__ import annotations

import copy
import re
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from distributed.changes import CHANGES
from distributed.fsdp_cases import EVERY, Net, Run, failing, net
from distributed.overlap_cases import count_early
from distributed.processes import run
from distributed.sharded_cases import here
from distributed.wrapped_cases import Flattened, wrapped
from fastlars.distributed import fsdp
from fastlars.in_backward.engine import WATCHED_STEPS
from optimizers import Snapshot, assert_same

SECONDS = 10.0  # timeout of the process group; a busy machine may need 3 for a step
AGAIN = r"a second reduce-scatter before optimizer\.step\(\)"
CUT_OFF = "backward ended in an error after overlap had advanced some moments"


def refused(name: str, before: int, debug: bool) -> None:
    """In the step after ``before`` steps, of LAMB with mode="step"."""
    change, what, _ = CHANGES[name]
    one = Run(True, grouped=False, debug=debug).go(range(before))
    one.optimizer.zero_grad()
    one.backward(before)
    change(one.params, one.optimizer)
    snapshot = Snapshot(one.optimizer)
    with pytest.raises(RuntimeError, match=f"a {what} was changed between backward and optimizer"):
        one.optimizer.step()
    snapshot.assert_unchanged()
    one.go(range(before + 1, before + 3))


def refused_everywhere() -> None:
    for name, (_, what, every_step) in CHANGES.items():
        if "memory" in name:
            continue  # torch ignores other memory for a DTensor
        if what != "state":  # there is none before the first step
            refused(name, 0, debug=False)
        refused(name, WATCHED_STEPS - 1, debug=False)
        refused(name, WATCHED_STEPS + 1, debug=not every_step)


def test_a_change_is_refused_where_moments_were_advanced() -> None:
    run(2, refused_everywhere)


def in_the_way() -> None:
    """A GradScaler, and a second backward pass, in the first step and later."""
    for before in (0, 3):
        one = Run(True).go(range(before))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        one.optimizer.zero_grad()
        scaler.scale(one.loss(before)).backward()
        snapshot = Snapshot(one.optimizer)
        with pytest.raises(RuntimeError, match=r'GradScaler does not .* mode="norms" and max_grad'):
            scaler.step(one.optimizer)
        snapshot.assert_unchanged()
        one.go(range(before, before + 2))
        again = Run(True).go(range(before))
        again.optimizer.zero_grad()
        again.backward(before)
        with pytest.raises(RuntimeError, match=AGAIN):
            again.backward(before + 1)


def test_a_gradscaler_and_a_second_backward_are_refused() -> None:
    run(2, in_the_way)


def interrupted(one: Run) -> Run:
    """A backward pass that fails on all ranks, with what it has left behind."""
    one.optimizer.zero_grad()
    with pytest.raises(ZeroDivisionError), failing(one.module.blocks[0]):
        one.backward(4)
    return one


def recovered() -> None:
    """Moments that a failed backward pass has advanced: refused, until a checkpoint is loaded."""
    plain = interrupted(Run(False).go(range(4)))
    plain.module.reset_iter_state()
    one = Run(True).go(range(4))
    kept = copy.deepcopy(one.optimizer.state_dict())
    assert count_early(interrupted(one).optimizer) > 0
    snapshot = Snapshot(one.optimizer)
    with pytest.raises(RuntimeError, match=CUT_OFF):
        one.optimizer.step()
    snapshot.assert_unchanged()
    one.module.reset_iter_state()
    one.optimizer.load_state_dict(kept)
    one.go(range(5, 9)).result().assert_same(plain.go(range(5, 9)).result())
    assert one.early[-1] == EVERY - 1


@pytest.mark.skipif(not hasattr(FSDPModule, "reset_iter_state"), reason="torch is too old")
def test_a_failed_backward_pass() -> None:
    run(2, recovered)


def failed_on_one_rank() -> list[str]:
    """The error of backward, and after it that of step(), which writes nothing."""
    one = Run(True).go(range(3))
    one.optimizer.zero_grad()
    weights = [here(p).clone() for p in one.params]
    said = []
    with failing(one.module.blocks[0]) if dist.get_rank() == 1 else nullcontext():
        for call in (lambda: one.backward(3), one.optimizer.step):
            with pytest.raises((RuntimeError, ZeroDivisionError)) as error:
                call()
            said.append(str(error.value))
    assert_same("weight", [here(p) for p in one.params], weights)
    return said


def test_a_rank_that_fails_alone() -> None:
    """All say so, in bounded time: no moment that was advanced passes for a step."""
    zero, one = run(2, failed_on_one_rank, group_timeout=SECONDS)
    assert re.search(r"time.?out|timed out|closed|reset", zero[0], re.IGNORECASE)
    assert one[0] == "as asked"
    assert CUT_OFF in zero[1]
    assert CUT_OFF in one[1]


class Stream:
    """Stands for a GPU's stream, of which a CPU has none.

    Attributes:
        recorded: the events of this stream.
        waited: what this stream waited for: events, or all of another stream.
    """

    def __init__(self) -> None:
        self.recorded: list[object] = []
        self.waited: list[object] = []

    def record_event(self) -> object:
        self.recorded.append(object())
        return self.recorded[-1]

    def wait_event(self, event: object) -> None:
        if type(event) is object:
            self.waited.append(event)

    def wait_stream(self, _: Any) -> None:
        self.waited.append("all")


def tells() -> None:
    """FSDP2's next forward pass waits for the last step, unless a weight was written since."""
    current, gathering = Stream(), Stream()
    fsdp._current_stream = lambda _: current  # type: ignore[assignment]
    one = Run(True, "LARS")
    one.optimizer.overlap_hook._after_step = fsdp.AfterStep(one.module)
    waited = gathering.waited

    def step(number: int) -> object:
        one.go([number])
        waited.clear()
        return current.recorded[-1]

    one.loss(0)
    one.module._get_fsdp_state()._comm_ctx.all_gather_stream = gathering
    last = step(1)
    one.loss(1)
    assert waited == [last]  # told before FSDP2's own hook asks
    one.loss(1)
    assert waited == [last, "all"]  # once
    step(2)
    last = step(3)
    with torch.no_grad():
        one.loss(3)
    assert waited == [last]
    for write in (lambda p: p.mul_(0.5), lambda p: p.to_local().mul_(0.5)):
        step(4)
        with torch.no_grad():
            write(one.params[5])
        one.loss(4)
        assert waited == ["all"]
    step(5)
    one.optimizer.step()
    one.loss(5)
    assert waited == [current.recorded[-1]]
    step(6)
    assert one.handle is not None
    one.handle.remove()
    one.loss(6)
    assert waited == ["all"]


def tells_nothing() -> None:
    """Where a later step would find the event, or an all-gather may read more than weights."""
    current = Stream()
    fsdp._current_stream = lambda _: current  # type: ignore[assignment]
    one = Run(True, "LARS")
    block = one.module.blocks[0]
    part = fsdp.AfterStep(block)
    one.optimizer.overlap_hook._after_step = part
    one.go([0])
    part.tell()
    assert len(current.recorded) == 1
    assert one.module._get_fsdp_state()._state_ctx.post_optim_event is None
    other = Run(True, "LARS", model=net(lambda: wrapped(Net(), Flattened)))
    other.optimizer.overlap_hook._after_step = fsdp.AfterStep(other.module)
    other.go([0])
    assert len(current.recorded) == 1


def test_the_event_after_a_step() -> None:
    run(1, tells)
    run(1, tells_nothing)
