"""What overlap refuses: by name, and with the model as it was."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel

import fastlars
from distributed.overlap_cases import Setting, images, make
from distributed.processes import run
from fastlars.distributed import overlap
from optimizers import Snapshot

Build = Callable[[], tuple[Any, Any, dict[str, Any]]]


def pair(options: dict[str, Any] | None = None, **ddp: Any) -> tuple[Any, Any]:
    net = make(Setting())
    module = DistributedDataParallel(net, **ddp)
    return module, fastlars.LAMB(net.parameters(), lr=0.05, **(options or {}))


def train(ddp: Any, optimizer: Any, steps: int) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        backward(ddp, step)
        optimizer.step()


def backward(ddp: Any, step: int, scale: float = 1.0) -> None:
    x, y = images(step, dist.get_rank(), torch.float32)
    (scale * nn.functional.cross_entropy(ddp(x), y)).backward()


def python_reducer() -> Any:
    torch._dynamo.config.optimize_ddp = "python_reducer"
    return (*pair(), {})


def in_backward() -> Any:
    ddp, optimizer = pair()
    for p in ddp.parameters():
        p._in_backward_optimizers = []
    return ddp, optimizer, {}


def hooked() -> Any:
    ddp, optimizer = pair()
    ddp.register_comm_hook(None, fp16_compress_hook)
    return ddp, optimizer, {}


def built_in() -> Any:
    ddp, optimizer = pair(gradient_as_bucket_view=True)
    ddp._register_builtin_comm_hook(dist.BuiltinCommHookType.FP16_COMPRESS)
    return ddp, optimizer, {}


def twice() -> Any:
    ddp, optimizer = pair()
    overlap(ddp, optimizer)
    return ddp, optimizer, {}


def twice_ddp() -> Any:
    ddp, _, _ = twice()
    return ddp, fastlars.LARS(ddp.parameters(), lr=1.0), {}


def mixed() -> Any:
    ddp, optimizer = pair()
    ddp.mixed_precision = object()  # with the real thing, DDP itself asks for an accelerator
    return ddp, optimizer, {}


# name: how to build what is refused, and what the message says
AT_ONCE: dict[str, tuple[Build, str, str]] = {
    "no DDP": (lambda: (pair()[0].module, pair()[1], {}), "TypeError", "DistributedDataParallel"),
    "torch's optimizer": (
        lambda: (m := pair()[0], torch.optim.SGD(m.parameters(), lr=1.0), {}),
        "TypeError",
        "overlap needs an optimizer of fastlars, got SGD",
    ),
    "another module's": (lambda: (pair()[0], pair()[1], {}), "ValueError", "none of the module"),
    "compression": (lambda: (*pair(), {"compression": "fp8"}), "ValueError", "compression must be"),
    "mode": (lambda: (*pair(), {"mode": "fast"}), "ValueError", "mode must be one of"),
    "unused": (
        lambda: (*pair(find_unused_parameters=True), {}),
        "RuntimeError",
        "find_unused_parameters=True",
    ),
    "mixed precision": (mixed, "RuntimeError", "DDP's mixed_precision"),
    "python reducer": (python_reducer, "RuntimeError", "python reducer"),
    "in backward": (in_backward, "RuntimeError", "_apply_optimizer_in_backward"),
    "second hook": (hooked, "RuntimeError", "has fp16_compress_hook"),
    "built-in hook": (built_in, "RuntimeError", "built-in hook"),
    "twice": (twice, "RuntimeError", "optimizer already steps during backward"),
    "twice, by module": (twice_ddp, "RuntimeError", "DDP module is overlapped already"),
    "capturable": (
        lambda: (*pair({"capturable": True}), {}),
        "RuntimeError",
        "group 0: overlap does not go with capturable",
    ),
}


def _gradient_hooks(module: nn.Module) -> list[int]:
    return [len(p._post_accumulate_grad_hooks or ()) for p in module.parameters()]


def refused(name: str) -> tuple[str, str]:
    ddp, optimizer, keywords = AT_ONCE[name][0]()
    before = Snapshot(optimizer)
    attributes = dict(vars(optimizer))
    hooks = list(getattr(ddp, "_comm_hooks", []))
    modules = dict(ddp._forward_pre_hooks), _gradient_hooks(ddp)
    try:
        overlap(ddp, optimizer, **keywords)
    except (RuntimeError, TypeError, ValueError) as error:
        before.assert_unchanged()
        assert vars(optimizer) == attributes
        assert list(getattr(ddp, "_comm_hooks", [])) == hooks
        assert (dict(ddp._forward_pre_hooks), _gradient_hooks(ddp)) == modules
        return type(error).__name__, str(error)
    return "", "was not refused"


@pytest.mark.parametrize("name", AT_ONCE)
def test_refused_at_once(name: str) -> None:
    for kind, message in run(1, refused, name):
        assert kind == AT_ONCE[name][1]
        assert AT_ONCE[name][2] in message


@contextmanager
def raises(text: str, optimizer: Any) -> Any:
    """The model has the same bits before and after, but for its gradients."""
    before = Snapshot(optimizer)
    for name in list(before.taken):
        if name.endswith("gradient"):
            before.taken[name] = None
    with pytest.raises(RuntimeError, match=re.escape(text)):
        yield
    optimizer.zero_grad()
    before.assert_unchanged()


def scaled(before: int) -> None:
    """GradScaler shows itself in step(): the first one is not overlapped for that."""
    ddp, optimizer = pair()
    train(ddp, optimizer, before)
    overlap(ddp, optimizer)
    for group in optimizer.param_groups:
        group["fused_unscale"] = False  # shows itself all the same
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(torch.ones(()))
    with raises("GradScaler", optimizer):
        backward(ddp, 0, 2.0)
        scaler.step(optimizer)
    train(ddp, optimizer, 2)


def second_backward(after: int) -> None:
    ddp, optimizer = pair()
    overlap(ddp, optimizer)
    train(ddp, optimizer, after)
    backward(ddp, 7)
    with raises("a second backward pass before optimizer.step()", optimizer):
        backward(ddp, 8)
    with raises("gradients hold a second backward pass", optimizer):
        optimizer.step()
    before = [p.detach().clone() for p in ddp.parameters()]
    train(ddp, optimizer, 2)  # DDP and the optimizer go on
    assert all(not torch.equal(p, b) for p, b in zip(ddp.parameters(), before, strict=True))


def joined(_: str) -> None:
    ddp, optimizer = pair()
    overlap(ddp, optimizer)
    train(ddp, optimizer, 2)
    join = ddp.join(divide_by_initial_world_size=False)
    with raises("divide_by_initial_world_size=False", optimizer), join:
        backward(ddp, 3)


def later_option(name: str) -> None:
    """Options that a group gets after overlap(); no bucket of another group is stepped either."""
    ddp, _ = pair(bucket_cap_mb=0.001)
    params = list(ddp.parameters())
    optimizer = fastlars.LAMB([{"params": params[:4]}, {"params": params[4:]}], lr=0.05)
    overlap(ddp, optimizer)
    train(ddp, optimizer, 2)
    optimizer.param_groups[0][name] = True
    optimizer.zero_grad()
    with raises(f"group 0: overlap does not go with {name}", optimizer):
        backward(ddp, 3)
        optimizer.step()


def tuples(_: str) -> None:
    """What the python reducer calls a hook with."""
    ddp, optimizer = pair()
    overlap(ddp, optimizer)
    ((hook, state),) = ddp._comm_hooks
    with raises("python reducer", optimizer):
        hook(state, (torch.ones(1), torch.ones(1)))


def another_hook(_: str) -> None:
    ddp, optimizer = pair()
    overlap(ddp, optimizer)
    with raises("can only be called once", optimizer):
        ddp.register_comm_hook(None, fp16_compress_hook)
    train(ddp, optimizer, 2)


@pytest.mark.parametrize(
    ("function", "argument"),
    [
        (scaled, 0),
        (scaled, 2),
        (joined, ""),
        (later_option, "capturable"),
        (tuples, ""),
        (another_hook, ""),
    ],
)
def test_refused_where_it_shows(function: Callable[[Any], None], argument: Any) -> None:
    run(2, function, argument)


@pytest.mark.parametrize("after", [0, 2])
def test_a_second_backward(after: int) -> None:
    """Also where the first step is not overlapped: a program works in all its steps or in none."""
    run(2, second_backward, after)
