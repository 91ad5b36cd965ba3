"""fastlars.step_in_backward: what it refuses, and that nothing goes wrong silently."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlars
from fastlars.in_backward.released import is_released
from optim.in_backward_cases import (
    WIDE,
    Net,
    Recomputing,
    both,
    change_weights,
    early_of,
    early_pair,
    inputs,
    row_of,
    train,
)
from optimizers import SIMPLE, Row, assert_same, one_thread

__all__ = ["one_thread"]


def sharing_ddp() -> None:
    ddp = object.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(ddp)
    ddp.module = Net()
    optimizer = row_of["LARS"].make(ddp.module.parameters())
    fastlars.step_in_backward(ddp, optimizer)


def twice() -> None:
    net, optimizer, _ = early_pair()
    fastlars.step_in_backward(net, optimizer)


def several_devices() -> None:
    net = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2, device="meta")])
    fastlars.step_in_backward(net, fastlars.LARS(net.parameters(), lr=0.1))


def refused_parameter() -> None:
    net = nn.ParameterList([nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3).cfloat())])
    fastlars.step_in_backward(net, fastlars.LARS(net.parameters(), lr=0.1))


def refused_bucket(size: Any) -> Callable[[], Any]:
    net = Net()
    optimizer = row_of["LARS"].make(net.parameters())
    return lambda: fastlars.step_in_backward(net, optimizer, bucket_mb=size)


def excepting(*values: Any) -> Callable[[], Any]:
    net = Net()
    optimizer = row_of["LARS"].make(net.parameters())
    chosen = values[0] if isinstance(values[0], Tensor) else values
    return lambda: fastlars.step_in_backward(net, optimizer, except_for=chosen)


def anew() -> None:
    """As in a notebook: the first optimizer is dropped, but its hooks are still there."""
    net, _, _ = early_pair()
    fastlars.step_in_backward(net, row_of["LARS"].make(net.parameters()))


REFUSED_AT_ONCE: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "another optimizer": (
        lambda: fastlars.step_in_backward(n := Net(), torch.optim.SGD(n.parameters(), lr=0.1)),
        TypeError,
        "step_in_backward needs an optimizer of fastlars, got SGD",
    ),
    "another model": (
        lambda: fastlars.step_in_backward(Net(), row_of["LARS"].make(Net().parameters())),
        ValueError,
        "steps none of the module's parameters",
    ),
    "twice": (twice, RuntimeError, "already steps during backward"),
    "DDP": (sharing_ddp, RuntimeError, "not averaged: use fastlars.distributed.overlap"),
    "devices": (several_devices, RuntimeError, "on one device, got cpu, meta"),
    "a parameter": (refused_parameter, TypeError, "group 0, parameter 1 is complex"),
    "no bucket": (refused_bucket(0), ValueError, "bucket_mb must be positive, got 0"),
    "names": (excepting("layers.0"), TypeError, "except_for must be a list of parameters"),
    "a bare tensor": (
        excepting(torch.ones(3)),
        TypeError,
        "except_for must be a list of parameters",
    ),
    "another model's": (
        lambda: fastlars.step_in_backward(
            net := Net(), row_of["LARS"].make(net.parameters()), except_for=Net().parameters()
        ),
        ValueError,
        "except_for has a parameter that is not of the model",
    ),
    "anew": (anew, RuntimeError, "by another optimizer already: remove"),
    "bucket_mb": (refused_bucket("25"), TypeError, "bucket_mb must be a number"),
}


@pytest.mark.parametrize(("call", "kind", "words"), REFUSED_AT_ONCE.values(), ids=REFUSED_AT_ONCE)
def test_refused_at_once(call: Callable[[], Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        call()


def test_a_refusal_leaves_no_hooks() -> None:
    net = Net()
    with pytest.raises(ValueError, match="none of the module's"):
        fastlars.step_in_backward(net, row_of["LARS"].make(Net().parameters()))
    assert not net._forward_hooks
    assert not any(p._post_accumulate_grad_hooks for p in net.parameters())


USES: dict[str, Callable[[Net, Any], Any]] = {
    "clip_grad_norm_": lambda net, _: nn.utils.clip_grad_norm_(net.parameters(), 1.0),
    "clip_grad_value_": lambda net, _: nn.utils.clip_grad_value_(net.parameters(), 1.0),
    "scaled": lambda net, _: [p.grad.mul_(0.5) for p in net.parameters()],
    "through .data": lambda net, _: [p.grad.data.mul_(0.5) for p in net.parameters()],
    "read": lambda net, _: [p.grad.norm() for p in net.parameters()],
    "a second backward pass": lambda net, _: net(inputs(1)).backward(),
    "zeroed": lambda net, optimizer: optimizer.zero_grad(set_to_none=False),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_freed_gradient_is_not_used_silently(use: Callable[[Net, Any], Any]) -> None:
    net, optimizer, _ = early_pair()
    net(inputs(0)).backward()
    with pytest.raises(RuntimeError, match=r"was used by step_in_backward during backward, and fr"):
        use(net, optimizer)


def change_state(net: Net, optimizer: Any) -> None:
    for p in net.parameters():
        optimizer.state[p]["momentum_buffer"].data.mul_(0.5)


def change_last_row(net: Net, _: Any) -> None:
    for p in net.parameters():
        if p.dim():
            p.data[-1:].mul_(0.5)


CHANGES: dict[str, tuple[Callable[[Net, Any], Any], str]] = {
    "lr": (lambda _, optimizer: optimizer.param_groups[0].update(lr=9.0), "a hyper-parameter was"),
    "weights": (change_weights, "a weight was changed"),
    "weights, .data": (change_last_row, "a weight was changed"),
    "states": (change_state, "a state was changed"),
    "other states": (lambda _, optimizer: optimizer.state.clear(), "a state was changed"),
    "no gradients": (lambda _, optimizer: optimizer.zero_grad(), "a gradient was changed"),
    "parameters": (
        lambda _, optimizer: optimizer.param_groups[0]["params"].pop(),
        "a list of parameters was changed",
    ),
}


@pytest.mark.parametrize(("change", "words"), CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("at", [0, 3])
def test_a_change_before_step_is_refused(
    change: Callable[[Net, Any], Any], words: str, at: int
) -> None:
    net, optimizer, handle = early_pair()
    train(net, optimizer, handle, steps=at)
    net(inputs(0)).backward()
    change(net, optimizer)
    with pytest.raises(RuntimeError, match=words):
        optimizer.step()


@pytest.mark.parametrize("options", [{"max_grad_norm": 1.0}, {"skip_if": 10.0}], ids=str)
def test_a_norm_without_a_norm_pass(options: dict[str, Any]) -> None:
    net, _, _ = early_pair(**options)
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(RuntimeError, match=rf"{next(iter(options))} needs the norm of all gradien"):
        net(inputs(0)).backward()
    assert_same("weight", net.parameters(), before)


def test_mistakes_with_a_norm_pass() -> None:
    net, optimizer, handle = early_pair(max_grad_norm=1.0)
    with handle.accumulate():
        net(inputs(0)).backward()
    with pytest.raises(RuntimeError, match="have gradients already"), handle.norm_pass():
        pass
    optimizer.zero_grad()
    net.dropped = (4,)
    with handle.norm_pass():
        net(inputs(0)).backward()
    net.dropped = ()
    with pytest.raises(RuntimeError, match="has a gradient that norm_pass"):
        net(inputs(0)).backward()
    net, optimizer, handle = early_pair(max_grad_norm=1.0, bucket_mb=WIDE)
    net.dropped = (4,)
    with handle.norm_pass():
        net(inputs(0)).backward()
    net.dropped = ()
    net(inputs(0)).backward()
    with pytest.raises(RuntimeError, match="has a gradient that norm_pass"):
        optimizer.step()
    handle.remove()
    with pytest.raises(RuntimeError, match="which was removed"), handle.norm_pass():
        pass


def test_a_norm_of_other_parameters() -> None:
    net, other = Net(), nn.Parameter(torch.ones(3))
    optimizer = row_of["LARS"].make([*net.layers, other], max_grad_norm=1.0)
    handle = fastlars.step_in_backward(net, optimizer)
    with pytest.raises(RuntimeError, match="steps other parameters too"), handle.norm_pass():
        pass


def test_a_norm_pass_in_the_middle() -> None:
    net, _, handle = early_pair()
    net(inputs(0)).backward()
    with pytest.raises(RuntimeError, match="comes before the backward"), handle.norm_pass():
        pass


@pytest.mark.parametrize("how", ["step", "unscale_"])
def test_a_gradscaler(how: str) -> None:
    net, optimizer, _ = early_pair()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(net(inputs(0))).backward()
    with pytest.raises(RuntimeError, match=r"GradScaler does not go|was used by step_in_backward"):
        getattr(scaler, how)(optimizer)


@pytest.mark.parametrize("row", SIMPLE, ids=repr)
def test_a_weight_whose_gradient_comes_in_parts(row: Row) -> None:
    def make(_: Row) -> Recomputing:
        return Recomputing(reentrant=True, shares=True)

    for options in ({}, {"max_grad_norm": 1.0}):
        both(
            row,
            1e-9,
            make=make,
            except_for=lambda net: [net.layers[0]],
            overrides=options,
            measures=bool(options),
        )
    both(row, 1e-9, make=lambda _: Recomputing(reentrant=False, shares=True))
    with pytest.raises(RuntimeError, match="belongs into except_for"):
        both(row, 1e-9, make=make)


def test_a_norm_in_parts() -> None:
    net, optimizer, handle = early_pair(Recomputing(reentrant=True, shares=True), max_grad_norm=1.0)
    with pytest.raises(RuntimeError, match=r"shape \(6, 5\) has arrived in several parts"):
        train(net, optimizer, handle, measures=True)


class Hidden(torch.autograd.Function):
    """x w, where backward reads w past autograd; and so after its step."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, holder: list[Tensor]) -> Tensor:
        ctx.holder = holder
        return x * holder[0].detach().sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient * ctx.holder[0].detach().sum(), None


class ReadingLate(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = Hidden.apply(x.clone().requires_grad_(), [self.layers[3]])
        return super().forward(x)


def test_a_batch_that_is_skipped_after_its_backward_pass() -> None:
    """While all gradients wait: nothing was used, and options may have changed since."""
    runs = []
    for early in (False, True):
        net = Net()
        optimizer = row_of["LARS"].make(net.parameters())
        if early:
            fastlars.step_in_backward(net, optimizer)
        for step in range(6):
            net.dropped = (step % 5,)
            net(inputs(step)).backward()
            optimizer.param_groups[0]["lr"] = 1.0 / (1 + step)
            if step % 2:
                optimizer.zero_grad()
                continue
            net(inputs(step)).sum()
            optimizer.param_groups[0]["lr"] = 0.5
            optimizer.zero_grad()
            net(inputs(step)).backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append(list(net.parameters()))
    assert_same("weight", runs[1], runs[0])


def test_a_forward_pass_before_a_step_that_is_skipped() -> None:
    """The norm was looked at already, and its gradients were freed."""
    asked: list[float] = []
    net, optimizer, handle = early_pair()
    before = [p.detach().clone() for p in net.parameters()]
    optimizer.skip_if = lambda norm: asked.append(float(norm)) is None
    loss = net(inputs(0))
    with handle.norm_pass():
        loss.backward(retain_graph=True)
    loss.backward()
    net(inputs(1))
    optimizer.step()
    assert len(asked) == int(optimizer.skipped_steps) == 1
    assert_same("weight", net.parameters(), before)


def test_a_parameter_of_another_optimizer_by_now() -> None:
    """It left the group: its gradient is not this optimizer's any more."""
    net, optimizer, _ = early_pair(bucket_mb=1e-9)
    moved = optimizer.param_groups[0]["params"].pop(0)
    other = torch.optim.SGD([moved], lr=0.1)
    before = moved.detach().clone()
    net(inputs(0)).backward()
    assert not is_released(moved.grad)
    optimizer.step()
    other.step()
    assert not torch.equal(moved, before)


def test_order_of_passes() -> None:
    net, optimizer, handle = early_pair(max_grad_norm=1.0)
    loss = net(inputs(0))
    with handle.norm_pass():
        loss.backward(retain_graph=True)
    with (
        pytest.raises(RuntimeError, match=r"accumulate\(\) after norm_pass\(\)"),
        handle.accumulate(),
    ):
        pass
    with pytest.raises(RuntimeError, match="only measures: a second backward pass steps"):
        optimizer.step()


def test_sparse_gradients() -> None:
    net = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 3))
    optimizer = fastlars.LARS(net.parameters(), lr=0.1)
    fastlars.step_in_backward(net, optimizer, bucket_mb=WIDE)
    net(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="parameter 0 has a sparse gradient"):
        optimizer.step()


def test_a_late_read() -> None:
    net, optimizer, _ = early_pair(ReadingLate())
    net(inputs(0)).backward()
    with pytest.raises(RuntimeError, match=r"were stepped already, of shape \(4, 3, 2, 2\)"):
        optimizer.step()
    both(row_of["LARS"], make=lambda _: ReadingLate(), except_for=lambda net: [net.layers[3]])


def test_autograd_refuses_a_weight_that_it_needs() -> None:
    """Saved by a node that comes after the weight's gradient: no silent mistake."""
    net, _, _ = early_pair()
    loss = net(inputs(0))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, list(net.parameters()))


def test_compiled_autograd() -> None:
    """It calls hooks on parameters, but none at the end of a backward pass."""
    net, _, _ = early_pair()
    before = [p.detach().clone() for p in net.parameters()]
    with (
        torch._dynamo.config.patch(compiled_autograd=True),
        pytest.raises(RuntimeError, match="do not go with compiled autograd"),
    ):
        torch.compile(lambda x: net(x).backward(), backend="eager")(inputs(0))
    assert early_of(net) == 0
    assert_same("weight", net.parameters(), before)


def test_a_model_inside_ddp(tmp_path: Any) -> None:
    """DDP's own forward pass runs around it: refused before anything is stepped."""
    import torch.distributed as dist

    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        net = nn.Linear(3, 3)
        ddp = nn.parallel.DistributedDataParallel(net)
        optimizer = fastlars.LARS(net.parameters(), lr=0.1)
        fastlars.step_in_backward(net, optimizer)
        with pytest.raises(RuntimeError, match="that DDP has not averaged"):
            ddp(torch.ones(2, 3))
    finally:
        dist.destroy_process_group()
