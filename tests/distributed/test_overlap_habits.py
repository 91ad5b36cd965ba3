"""What training loops and frameworks do around an overlapped step."""

from __future__ import annotations

import gc
import weakref
from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastlars
from distributed.overlap_cases import Result, Setting, make, result
from distributed.overlap_loops import MANY, loop, loss_of, same, start
from distributed.processes import run
from fastlars.distributed import overlap
from optimizers import Snapshot


def accelerated(options: dict[str, Any], overlapped: bool, mode: str) -> Result:
    """Accelerate sees which steps a GradScaler skips, and holds its schedule back then."""
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
    from accelerate.scheduler import AcceleratedScheduler

    Accelerator(cpu=True)
    net = make(Setting())
    ddp = DistributedDataParallel(net, **MANY)
    inner = fastlars.LARS(net.parameters(), lr=0.5, **options)
    if overlapped:
        overlap(ddp, inner, mode=mode)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = AcceleratedOptimizer(inner, device_placement=False, scaler=scaler)
    halving = torch.optim.lr_scheduler.ExponentialLR(inner, 0.5)
    schedule = AcceleratedScheduler(halving, optimizer, split_batches=True)
    skipped = []
    for step in range(6):
        optimizer.zero_grad()
        factor = float("inf") if step in (1, 3) else 1.0
        scaler.scale(factor * loss_of(ddp, step)).backward()
        optimizer.step()
        schedule.step()
        skipped.append(float(optimizer.step_was_skipped))
    assert skipped == [0.0, 1.0, 0.0, 1.0, 0.0, 0.0]
    assert int(inner.skipped_steps) == 0
    return result(net, inner, [*skipped, inner.param_groups[0]["lr"]])


@pytest.mark.skipif(find_spec("accelerate") is None, reason="accelerate is not installed")
@pytest.mark.parametrize(("mode", "options"), [("norms", {}), ("step", {"max_grad_norm": 0.5})])
def test_accelerate_sees_skipped_steps(mode: str, options: dict[str, Any]) -> None:
    same(partial(accelerated, options), mode)


def adversarial(freezes: bool, overlapped: bool, mode: str) -> Result:
    """Another loss goes through a module, whose gradients of it are thrown away."""
    net, other = make(Setting()), nn.Parameter(torch.ones(4, 3, 16, 16))
    ddp, optimizer = start(net, overlapped, mode)
    for step in range(5):
        optimizer.zero_grad()
        loss_of(ddp, step).backward()
        optimizer.step()
        net.requires_grad_(not freezes)
        ddp(other).square().mean().backward()
        net.requires_grad_(True)
    return result(net, optimizer)


def adversarial_at_once() -> None:
    net, other = make(Setting()), nn.Parameter(torch.ones(4, 3, 16, 16))
    ddp, optimizer = start(net, True, "step")
    loop(ddp, optimizer, 1)
    optimizer.zero_grad()
    snapshot = Snapshot(optimizer)
    ddp(other).square().mean().backward()
    optimizer.zero_grad()
    snapshot.assert_unchanged()
    with pytest.raises(RuntimeError, match="a second backward pass before optimizer"):
        loss_of(ddp, 1).backward()
    optimizer.zero_grad()
    snapshot.assert_unchanged()


def test_another_loss() -> None:
    """With the module frozen for it, or nothing written; else refused with nothing changed."""
    same(partial(adversarial, True))
    same(partial(adversarial, False), "norms")
    run(2, adversarial_at_once)


class Inner(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return torch.compile(torch.tanh, fullgraph=True, backend="aot_eager")(grads[0])


def compiled(overlapped: bool, mode: str) -> Result:
    class Ends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = make(Setting())

        def forward(self, x: Tensor) -> Tensor:
            # Last in backward, when gradients are there that could be read late.
            return self.net(Inner.apply(x.requires_grad_()))

    net = Ends()
    ddp, optimizer = start(net, overlapped, mode)
    return result(net, optimizer, early=loop(ddp, optimizer))


def test_a_compiled_function_in_backward() -> None:
    same(compiled)


def recovered(overlapped: bool, mode: str) -> Result:
    """A backward pass fails, and a new DDP goes on with the same model and optimizer."""
    net = make(Setting())
    ddp, optimizer = start(net, False, mode)
    handle = overlap(ddp, optimizer, mode=mode) if overlapped else None
    loop(ddp, optimizer, 3)
    saved = [p.detach().clone() for p in net.parameters()]
    first = next(net.parameters())

    def fail(_: Tensor) -> Tensor:
        raise KeyError("the user's")

    hook = first.register_hook(fail)
    with pytest.raises(KeyError):
        loss_of(ddp, 3).backward()
    hook.remove()
    if handle is not None:
        handle.remove()
    gone = weakref.ref(ddp)
    del ddp
    if gone() is not None:  # the error's traceback
        gc.collect()
    optimizer.zero_grad()
    with torch.no_grad():
        for p, value in zip(net.parameters(), saved, strict=True):
            p.copy_(value)
    optimizer.state.clear()
    ddp = DistributedDataParallel(net, **MANY)
    if overlapped:
        overlap(ddp, optimizer, mode=mode)
    return result(net, optimizer, early=loop(ddp, optimizer))


@pytest.mark.parametrize("mode", ["step", "norms"])
def test_recovery_with_a_new_ddp(mode: str) -> None:
    same(recovered, mode)


def let_go() -> None:
    """remove() leaves nothing that keeps the DDP module, though the handle is kept."""
    gc.disable()
    net = make(Setting())
    ddp, optimizer = start(net, False, "step")
    handle = overlap(ddp, optimizer)
    loop(ddp, optimizer, 12)
    handle.remove()
    gone = weakref.ref(ddp)
    del ddp
    assert gone() is None
    assert all(not p._post_accumulate_grad_hooks for p in net.parameters())


def test_remove_lets_the_module_go() -> None:
    run(2, let_go)


def counted(overlapped: bool, mode: str) -> Result:
    """group["step"] of groups that are stepped at some times alone."""
    net = make(Setting())
    own = nn.Parameter(torch.ones(3))
    groups = [{"params": list(net.parameters())}, {"params": [own]}]
    ddp, optimizer = start(net, overlapped, mode, groups)
    shown = []
    for step in range(8):
        optimizer.zero_grad()
        if step != 4:
            loss_of(ddp, step).backward()
        if step % 2:
            own.square().sum().backward()
        optimizer.step()
        shown.append([group["step"] for group in optimizer.param_groups])
    assert shown[-1] == [7, 4]
    return result(net, optimizer)


@pytest.mark.parametrize("mode", ["step", "norms"])
def test_shown_steps(mode: str) -> None:
    same(counted, mode)


def invalid_option() -> None:
    """One group's options are refused before another group's bucket is stepped."""
    net = make(Setting())
    params = list(net.parameters())
    ddp, optimizer = start(
        net, True, "step", [{"params": params[:4]}, {"params": params[4:], "lr": 0.01}]
    )
    loop(ddp, optimizer, 3)
    optimizer.param_groups[0]["weight_decay"] = -1.0
    optimizer.zero_grad()
    snapshot = Snapshot(optimizer)
    loss_of(ddp, 3).backward()
    with pytest.raises(ValueError, match="group 0: weight_decay must be"):
        optimizer.step()
    optimizer.zero_grad()
    snapshot.assert_unchanged()


def change_lr(optimizer: Any, _: nn.Parameter) -> None:
    optimizer.param_groups[0]["lr"] = 0.01


def make_capturable(optimizer: Any, _: nn.Parameter) -> None:
    optimizer.param_groups[0]["capturable"] = not optimizer.param_groups[0]["capturable"]


def make_sparse(optimizer: Any, own: nn.Parameter) -> None:
    own.grad = torch.ones(3).to_sparse() if own.grad is None else None


def refused_twice() -> None:
    """Gradients that were used are not used again, whatever has ended the step."""
    for change in (change_lr, make_capturable, make_sparse):
        net, own = make(Setting()), nn.Parameter(torch.ones(3))
        ddp, optimizer = start(net, True, "step", [*net.parameters(), own])
        loop(ddp, optimizer, 3)
        optimizer.zero_grad()
        loss_of(ddp, 3).backward()
        change(optimizer, own)
        with pytest.raises((RuntimeError, TypeError), match=r"was changed|capturable|sparse"):
            optimizer.step()
        if change is not change_lr:
            change(optimizer, own)
        snapshot = Snapshot(optimizer)
        with pytest.raises(RuntimeError, match="gradients were used already"):
            optimizer.step()
        snapshot.assert_unchanged()
        loop(ddp, optimizer, 2)


def skip_if_set_late() -> None:
    ddp, optimizer = start(make(Setting()), True, "step")
    loss_of(ddp, 0).backward()
    snapshot = Snapshot(optimizer)
    optimizer.skip_if = 1.0
    with pytest.raises(RuntimeError, match="a hyper-parameter was changed"):
        optimizer.step()
    snapshot.assert_unchanged()


def scaler_dropped() -> None:
    """A refused GradScaler leaves nothing that later steps would take for one."""
    ddp, optimizer = start(make(Setting()), True, "step")
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(ddp, 0)).backward()
    with pytest.raises(RuntimeError, match="GradScaler"):
        scaler.step(optimizer)
    assert not hasattr(optimizer, "grad_scale")
    assert not hasattr(optimizer, "found_inf")
    loop(ddp, optimizer, 2)


def overlapped_between() -> None:
    net = make(Setting())
    ddp, optimizer = start(net, False, "step")
    handle = overlap(ddp, optimizer)
    loop(ddp, optimizer, 3)
    loss_of(ddp, 3).backward()
    handle.remove()
    with pytest.raises(RuntimeError, match=r"which after a backward pass takes effect in optimiz"):
        overlap(ddp, optimizer)
    optimizer.step()
    overlap(ddp, optimizer)


@pytest.mark.parametrize(
    "what", [invalid_option, refused_twice, skip_if_set_late, scaler_dropped, overlapped_between]
)
def test_refusals(what: Any) -> None:
    run(2, what)


def odd_states(overlapped: bool, mode: str) -> Result:
    """What wrappers keep in a state, and a gradient that is negated lazily."""
    net = make(Setting())
    net[1].weight.register_hook(lambda g: torch._neg_view(-g))
    ddp, optimizer = start(net, overlapped, mode)
    for step in range(5):
        optimizer.zero_grad()
        loss_of(ddp, step).backward()
        assert net[1].weight.grad.is_neg()
        optimizer.step()
        for p in net.parameters():
            optimizer.state[p]["seen"] = torch.tensor(True)
    found = result(net, optimizer)
    found.states = []
    return found


def test_states_of_any_type() -> None:
    same(odd_states)


def cleared(overlapped: bool, mode: str) -> Result:
    """States are emptied before a step that has nothing to do."""
    net = make(Setting())
    ddp, optimizer = start(net, overlapped, mode)
    loop(ddp, optimizer, 3)
    optimizer.zero_grad()
    optimizer.state.clear()
    optimizer.step()
    return result(net, optimizer, early=loop(ddp, optimizer, 4))


@pytest.mark.parametrize("mode", ["step", "norms"])
def test_states_emptied_before_a_step_without_gradients(mode: str) -> None:
    same(cleared, mode)
