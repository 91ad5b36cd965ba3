"""What is refused while a CUDA graph is recorded. Nothing here needs a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastlars
from fastlars.backends import upload
from fastlars.optim import plan, planner
from fastlars.optim.compile import operator
from fastlars.optim.execute import check_recording, check_states_exist
from fastlars.optim.scalars import DeviceScalars
from fastlars.optim.states import lacks_states, make_states
from fastlars.rules import LarsRule
from optimizers import SIMPLE, Row, parameters, set_gradients

CUDA = SimpleNamespace(device=torch.device("cuda", 0))
CPU = SimpleNamespace(device=torch.device("cpu"))
each_class = pytest.mark.parametrize("row", SIMPLE, ids=lambda row: row.name)


@pytest.fixture(params=[True, False], ids=["recording", "not recording"])
def recording(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: request.param)
    return bool(request.param)


@pytest.mark.parametrize("made", [True, False])
def test_states_are_not_made_in_a_graph(recording: bool, made: bool) -> None:
    optimizer = fastlars.LARS([nn.Parameter(torch.ones(3))], lr=0.1)

    def check(device: str) -> None:
        with FakeTensorMode():
            param = nn.Parameter(torch.ones(3, device=device))
            param.grad = torch.ones(3, device=device)
        group = {**optimizer.param_groups[0], "params": [param]}
        state: Any = {param: {"momentum_buffer": param}} if made else {}
        check_states_exist(group, optimizer.rule_of(group), state)

    check("cpu")
    if recording and not made:
        with pytest.raises(RuntimeError, match="take a step before recording one"):
            check("cuda")
    else:
        check("cuda")


def test_no_back_end_is_looked_for_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Triton finds out then would be wrong, and is remembered."""

    def recorded(*arguments: Any) -> None:
        raise RuntimeError("recorded")

    monkeypatch.setattr(planner, "check_states_exist", recorded)
    monkeypatch.setattr(
        plan, "ChoiceCache", lambda *arguments: pytest.fail("a back end was chosen")
    )
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match="recorded"):
        fastlars.LARS([param], lr=0.1).step()


@pytest.mark.parametrize("capturable", [True, False])
def test_scalars_of_the_host_are_not_recorded(recording: bool, capturable: bool) -> None:
    def batches(param: SimpleNamespace) -> Any:
        return [SimpleNamespace(device=param.device, group={"capturable": capturable})]

    check_recording(batches(CPU))
    if recording and not capturable:
        with pytest.raises(RuntimeError, match="only with capturable=True"):
            check_recording(batches(CUDA))
    else:
        check_recording(batches(CUDA))


@each_class
def test_states_are_lacking_until_the_first_step(row: Row) -> None:
    params = parameters()
    optimizer = row.make(params)
    group = optimizer.param_groups[0]
    set_gradients(params, 0)
    for expected in (True, False):
        assert lacks_states(group, optimizer.rule_of(group), optimizer.state) is expected
        optimizer.step()
    del optimizer.state[params[1]]
    assert lacks_states(group, optimizer.rule_of(group), optimizer.state)
    params[1].grad = None
    assert not lacks_states(group, optimizer.rule_of(group), optimizer.state)


def test_scalars_on_the_device_live_as_long_as_their_graph(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """But for the norm, which a recording makes itself, in memory that it may use again."""
    params = parameters()
    optimizer = fastlars.LARS(params, lr=torch.ones(()), max_grad_norm=1.0)
    set_gradients(params, 0)
    (batch,) = optimizer.bind_groups()
    scalars = DeviceScalars(torch.ones(()), torch.zeros(()))
    scalars.set_square(torch.ones((), dtype=torch.float64))
    for recording in (False, True):
        monkeypatch.setattr(upload, "is_capturing", lambda device, now=recording: now)
        given = batch.step_scalars(scalars).device
        assert given is not None
        kept = upload._read_at_replay.get(params[0], [])
        expected = [given.lr, given.grad_scale, given.found_inf] if recording else []
        assert list(map(id, kept)) == list(map(id, expected))


class Copies(TorchDispatchMode):
    """Notes the devices between which copies go."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[tuple[str, str]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            self.found.add((args[1].device.type, args[0].device.type))
        return func(*args, **(kwargs or {}))


@each_class
def test_states_are_made_where_their_parameter_is(row: Row) -> None:
    """From zeros of the host, as many would be made there and sent."""
    optimizer = row.make([nn.Parameter(torch.ones(3))], master_weights=True)
    with FakeTensorMode(), Copies() as copies:
        param = nn.Parameter(torch.empty(5, 7, dtype=torch.bfloat16, device="cuda"))
        group = {**optimizer.param_groups[0], "params": [param]}
        make_states(param, optimizer.rule_of(group), group, optimizer.state[param])
    assert len(optimizer.state[param]) >= 2
    assert copies.found == {("cuda", "cuda")}


@pytest.mark.parametrize("capturing", [True, False])
def test_a_compiled_step_does_not_record_random_numbers(
    capturing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operator, "is_capturing", lambda device: capturing)
    weight, grad = torch.ones(5, dtype=torch.bfloat16), torch.ones(5, dtype=torch.bfloat16)
    rule = operator.encode(LarsRule(momentum=0.0))
    lists: tuple[list[Tensor], ...] = ([weight], [grad], [], [], [])

    def step(rounds: bool) -> None:
        torch.ops.fastlars.step(rule, *lists, 0.1, None, 1.0, None, None, rounds)

    if capturing:
        with pytest.raises(RuntimeError, match="stochastic_rounding does not go with CUDA graphs"):
            step(True)
        assert weight.eq(1.0).all()
    else:
        step(True)
    step(False)
