"""fastlars.step_in_backward: the bits of ordinary steps, freed gradients, and what is refused."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastlars
from fastlars.in_backward.engine import WATCHED_STEPS
from fastlars.in_backward.released import is_released
from optimizers import ROWS, SIMPLE, Row, assert_same, one_thread, parameters

__all__ = ["one_thread"]
TINY = 40 / 2**20  # bucket_mb of which ten float32 numbers make a bucket
WIDE = 25.0  # the default, in which all gradients of a small model wait for step()
row_of = {row.kind.__name__: row for row in SIMPLE}


class Net(nn.Module):
    """Every parameter of optimizers.SHAPES, one after the other, so that gradients arrive one after
    the other. ``dropped`` are left out of the next forward pass."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.layers = nn.ParameterList(parameters(dtype))
        self.dropped: tuple[int, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        for i, p in enumerate(self.layers):
            if i not in self.dropped:
                x = (p * x).tanh().sum() + x
        return x


@dataclass
class Trained:
    params: list[Tensor]
    states: list[Tensor]
    ratios: list[float]
    norms: list[float] = field(default_factory=list)
    early: list[int] = field(default_factory=list)  # at each step, parameters stepped before step()

    def assert_same(self, other: Trained) -> None:
        assert_same("weight", self.params, other.params)
        assert_same("state", self.states, other.states)
        assert self.ratios == other.ratios
        assert self.norms == other.norms


def result(net: nn.Module, optimizer: Any, **others: Any) -> Trained:
    ratios = optimizer.trust_ratios()
    return Trained(
        [p.detach().clone() for p in net.parameters()],
        [v.clone() for p in net.parameters() for _, v in sorted(optimizer.state[p].items())],
        [ratios[p] for p in net.parameters() if p in ratios],
        **others,
    )


def inputs(step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Gradients are in proportion to it: at every third step they are small."""
    return torch.tensor(0.001 if step % 3 == 2 else 0.1 + 0.01 * (step % 7), dtype=dtype)


def early_of(net: nn.Module) -> int:
    return sum(is_released(p.grad) for p in net.parameters())


def train(
    net: Any,
    optimizer: Any,
    handle: Any = None,
    steps: int = WATCHED_STEPS + 3,
    before: Callable[[int], None] = lambda step: None,
    passes: int = 1,
    measures: bool = False,
) -> Trained:
    """An ordinary loop; ``passes`` accumulate, ``measures`` runs a norm pass where there is a
    handle."""
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1.0 + step))
    norms, early = [], []
    dtype = next(net.parameters()).dtype
    for step in range(steps):
        before(step)
        optimizer.zero_grad()
        for part in range(passes):
            last = part == passes - 1
            with nullcontext() if last or handle is None else handle.accumulate():
                loss = net(inputs(passes * step + part, dtype))
                if measures and handle is not None:
                    with handle.norm_pass():
                        loss.backward(retain_graph=True)
                loss.backward()
        early.append(early_of(net))
        optimizer.step()
        assert not any(is_released(p.grad) for p in net.parameters())
        norms.append(-1.0 if optimizer.grad_norm is None else float(optimizer.grad_norm))
        schedule.step()
    return result(net, optimizer, norms=norms, early=early)


def both(
    row: Row,
    bucket_mb: float = TINY,
    except_for: Callable[[Net], list[Any]] = lambda net: [],
    make: Callable[[Row], Any] = lambda row: Net(row.dtype),
    overrides: dict[str, Any] | None = None,
    **loop: Any,
) -> Trained:
    """Train twice, and compare; the run that stepped in backward."""
    runs = []
    for steps_early in (False, True):
        net = make(row)
        optimizer = row.make(net.parameters(), **copy.deepcopy(overrides or {}))
        handle = None
        if steps_early:
            handle = fastlars.step_in_backward(
                net, optimizer, bucket_mb=bucket_mb, except_for=except_for(net)
            )
        own = dict(loop)
        if "drops" in own:
            own["before"] = own.pop("drops")(net)
        runs.append(train(net, optimizer, handle, **own))
    plain, early = runs
    early.assert_same(plain)
    assert plain.early == [0] * len(plain.early)
    return early


@pytest.mark.parametrize("row", ROWS, ids=repr)
def test_the_bits_of_ordinary_steps(row: Row) -> None:
    """From the first step on, all but what waits at the end is stepped during backward."""
    early = both(row).early
    assert min(early) >= 3, early


@pytest.mark.parametrize("row", SIMPLE, ids=repr)
@pytest.mark.parametrize("options", [{"maximize": True}, {"lr": torch.tensor(0.1)}], ids=str)
def test_options_that_no_row_has(row: Row, options: dict[str, Any]) -> None:
    both(row, overrides=options)


@pytest.mark.parametrize("row", SIMPLE, ids=repr)
def test_buckets(row: Row) -> None:
    every = both(row, bucket_mb=1e-9)
    assert every.early == [5] * len(every.early)  # one parameter each
    wide = both(row, bucket_mb=WIDE)
    assert wide.early == [0] * len(wide.early)  # all wait, and step() steps them


def dropping(net: Net) -> Callable[[int], None]:
    def before(step: int) -> None:
        net.dropped = ((), (1,), (0, 3), (1, 2), (4,))[step % 5]

    return before


@pytest.mark.parametrize("row", SIMPLE, ids=repr)
def test_layers_that_are_dropped(row: Row) -> None:
    both(row, drops=dropping)


@pytest.mark.parametrize("row", SIMPLE, ids=repr)
def test_accumulation(row: Row) -> None:
    assert min(both(row, passes=3).early) >= 3


@pytest.mark.parametrize("row", SIMPLE, ids=repr)
@pytest.mark.parametrize("exempt", [0, 2])
def test_except_for(row: Row, exempt: int) -> None:
    early = both(row, 1e-9, except_for=lambda net: list(net.layers)[:exempt]).early
    assert early == [5 - exempt] * len(early)


@pytest.mark.parametrize("row", SIMPLE, ids=repr)
@pytest.mark.parametrize("options", [{"max_grad_norm": 1.0}, {"skip_if": 1.0}], ids=str)
def test_a_norm_pass(row: Row, options: dict[str, Any]) -> None:
    """Clipped and skipped as an ordinary step is, with the same norm."""
    kept = both(row, overrides=options, measures=True, except_for=lambda net: [net.layers[0]])
    bound = next(iter(options.values()))
    assert min(kept.norms) < bound < max(kept.norms), kept.norms


def test_skip_if_is_asked_once_a_step() -> None:
    asked: list[float] = []
    net = Net()
    optimizer = row_of["LARS"].make(net.parameters())
    optimizer.skip_if = lambda norm: asked.append(float(norm)) or len(asked) % 2 == 0
    handle = fastlars.step_in_backward(net, optimizer, bucket_mb=TINY)
    train(net, optimizer, handle, steps=6, measures=True)
    assert len(asked) == 6
    assert int(optimizer.skipped_steps) == 3


def test_gradients_take_a_bucket_of_memory() -> None:
    """At every arrival: the gradients that are there, against all of them."""
    net = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(12)))
    optimizer = fastlars.LAMB(net.parameters(), lr=0.01)
    size = 64 * 64 * 4
    fastlars.step_in_backward(net, optimizer, bucket_mb=3 * size / 2**20)
    most = 0

    def count(_: Tensor) -> None:
        nonlocal most
        grads = [p.grad for p in net.parameters() if p.grad is not None]
        most = max(most, sum(g.nbytes for g in grads if not is_released(g)))

    for p in net.parameters():
        p.register_post_accumulate_grad_hook(count)
    for step in range(2):
        net(torch.randn(4, 64)).square().sum().backward()
        optimizer.step()
        assert most == 2 * size, step  # the third makes a bucket, which is stepped at once


MEMORY = """
import sys, torch, fastlars
from pathlib import Path
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
torch.set_num_threads(1)
net = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024, bias=False) for _ in range(48)))
optimizer = fastlars.LARS(net.parameters(), lr=0.01)
if sys.argv[1] == "early":
    fastlars.step_in_backward(net, optimizer, bucket_mb=8)
for _ in range(3):
    optimizer.zero_grad()
    net(torch.randn(4, 1024)).square().mean().backward()
    optimizer.step()
print(peak())
"""


def test_the_peak_of_a_process() -> None:
    """48 layers of 4 MiB: their gradients, but for a bucket of 8 MiB, are no longer needed."""
    from child import python

    peaks = {}
    for how in ("plain", "early"):
        done = python("-c", MEMORY, how, MALLOC_MMAP_THRESHOLD_="65536")
        assert done.returncode == 0, done.stdout
        peaks[how] = int(done.stdout.split()[-1]) / 1024
    assert peaks["plain"] - peaks["early"] > 0.9 * (48 * 4 - 8), peaks


def early_pair(
    net: nn.Module | None = None, row: Row = row_of["LARS"], **options: Any
) -> tuple[Any, Any, Any]:
    net = Net() if net is None else net
    optimizer = row.make(net.parameters(), **options)
    return net, optimizer, fastlars.step_in_backward(net, optimizer, bucket_mb=TINY)


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


def change_weights(net: Net, _: Any) -> None:
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(0.5)


CHANGES: dict[str, tuple[Callable[[Net, Any], Any], str]] = {
    "lr": (lambda _, optimizer: optimizer.param_groups[0].update(lr=9.0), "a hyper-parameter was"),
    "weights": (change_weights, "a weight was changed"),
    "weights, .data": (lambda net, _: [p.data.mul_(0.5) for p in net.parameters()], "a weight was"),
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


def test_changes_between_steps() -> None:
    """After step(), everything may change."""
    runs = []
    for early in (False, True):
        net = Net()
        optimizer = row_of["LAMB"].make(net.parameters())
        handle = fastlars.step_in_backward(net, optimizer, bucket_mb=TINY) if early else None

        def before(step: int, net: Net = net, optimizer: Any = optimizer) -> None:
            if step == 2:
                optimizer.param_groups[0]["weight_decay"] = 0.5
            if step == 4:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            if step == 6:
                change_weights(net, None)
            if step == 8:
                params = optimizer.param_groups[0]["params"]
                params.append(params.pop(1))

        runs.append(train(net, optimizer, handle, before=before))
    runs[1].assert_same(runs[0])


class Fails(torch.autograd.Function):
    """The identity, whose backward pass fails when it is told to."""

    fail = False

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        if Fails.fail:
            raise ZeroDivisionError("as asked")
        return gradient


class Failing(Net):
    """Fails before or after the gradients of its last layers arrive."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        for i, p in enumerate(self.layers):
            x = (p * x).tanh().sum() + x
            x = Fails.apply(x) if i == (4 if self.first else 0) else x
        return x


@pytest.fixture
def failing() -> Iterator[None]:
    Fails.fail = True
    yield
    Fails.fail = False


def test_an_error_after_some_were_stepped(failing: None) -> None:
    net, optimizer, handle = early_pair(Failing(first=False))
    with pytest.raises(ZeroDivisionError):
        net(inputs(0)).backward()
    assert early_of(net) >= 2
    with pytest.raises(RuntimeError, match=r"error after \d of 5 parameters were stepped: go on"):
        optimizer.step()
    # From a checkpoint: here, the beginning.
    Fails.fail = False
    fresh = Failing(first=False)
    net.load_state_dict(fresh.state_dict())
    optimizer.load_state_dict(row_of["LARS"].make(fresh.parameters()).state_dict())
    again = train(net, optimizer, handle)
    again.assert_same(train(fresh, row_of["LARS"].make(fresh.parameters())))
    assert min(again.early) >= 3


def test_an_error_and_no_step(failing: None) -> None:
    """The error was caught, and the loop goes on with the next batch."""
    net, optimizer, _ = early_pair(Failing(first=False))
    with pytest.raises(ZeroDivisionError):
        net(inputs(0)).backward()
    Fails.fail = False
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="arrived after its parameter was stepped, in a backwa"):
        net(inputs(1)).backward()


def test_an_error_before_anything_was_stepped(failing: None) -> None:
    """As out of memory: a smaller batch is tried, and nothing was lost."""
    net, optimizer, handle = early_pair(Failing(first=True))
    with pytest.raises(ZeroDivisionError):
        net(inputs(0)).backward()
    Fails.fail = False
    fresh = Failing(first=True)
    train(net, optimizer, handle).assert_same(train(fresh, row_of["LARS"].make(fresh.parameters())))


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
    handle.remove()
    with pytest.raises(RuntimeError, match="which was removed"), handle.norm_pass():
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


class Recomputing(Net):
    """One layer of two is computed again during backward; the first weight is used by all."""

    def __init__(self, reentrant: bool, shares: bool) -> None:
        super().__init__()
        self.reentrant, self.shares = reentrant, shares

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        shared = self.layers[0]
        for p in list(self.layers)[1:]:

            def block(x: Tensor, p: Tensor = p) -> Tensor:
                own = (p * x).tanh().sum() + x
                return own + (shared * own).mean() if self.shares else own

            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x + shared.sum() * x


@pytest.mark.parametrize("row", SIMPLE, ids=repr)
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(row: Row, reentrant: bool) -> None:
    early = both(row, make=lambda _: Recomputing(reentrant, shares=False)).early
    assert min(early) >= 3


@pytest.mark.parametrize("row", SIMPLE, ids=repr)
def test_a_weight_whose_gradient_comes_in_parts(row: Row) -> None:
    def make(_: Row) -> Recomputing:
        return Recomputing(reentrant=True, shares=True)

    both(row, 1e-9, make=make, except_for=lambda net: [net.layers[0]])
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


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_take_ordinary_steps(copied: Callable[[Net], Net]) -> None:
    net, optimizer, handle = early_pair()
    train(net, optimizer, handle, steps=2)
    other = copied(net)
    second = row_of["LARS"].make(other.parameters())
    train(other, second, steps=2)
    assert early_of(other) == 0
    fastlars.step_in_backward(other, second, bucket_mb=TINY)
    assert len(other._forward_hooks) == 1
    assert pickle.loads(pickle.dumps(handle)).remove() is None


def test_remove() -> None:
    """At once, and between a backward pass and its step, which then still ends well."""
    for middle in (False, True):
        net, optimizer, handle = early_pair()
        fresh = Net()
        expected = train(fresh, row_of["LARS"].make(fresh.parameters()), steps=2)
        if middle:
            net(inputs(0)).backward()
        handle.remove()
        handle.remove()
        assert (optimizer.overlap_hook is not None) == middle
        if middle:
            optimizer.step()
            optimizer.zero_grad()
            assert optimizer.overlap_hook is None
        else:
            train(net, optimizer, steps=2).assert_same(expected)
        net(inputs(0)).backward()
        assert early_of(net) == 0
        assert not net._forward_hooks


def test_a_removed_model_is_freed() -> None:
    net, optimizer, handle = early_pair()
    train(net, optimizer, handle, steps=2)
    handle.remove()
    gone = weakref.ref(net)
    del net, optimizer, handle
    gc.collect()
    assert gone() is None


def test_other_parameters() -> None:
    """Those of the optimizer alone, and those of the model alone."""
    runs = []
    for early in (False, True):
        net, other = Net(), nn.Parameter(torch.ones(3))
        optimizer = row_of["LARS"].make([*list(net.layers)[1:], other])
        if early:
            fastlars.step_in_backward(net, optimizer, bucket_mb=TINY)
        for step in range(4):
            optimizer.zero_grad()
            (net(inputs(step)) + (other**2).sum()).backward()
            assert net.layers[0].grad is not None
            optimizer.step()
        runs.append([*result(net, optimizer).params, other.detach()])
    assert_same("weight", runs[1], runs[0])


def test_a_closure_and_hooks() -> None:
    net, optimizer, _ = early_pair()
    fresh = Net()
    plain = row_of["LARS"].make(fresh.parameters())
    counted = []
    optimizer.register_step_post_hook(lambda *_: counted.append(early_of(net)))
    for step in range(3):
        for model, chosen in ((net, optimizer), (fresh, plain)):

            def closure(model: Any = model, chosen: Any = chosen, step: int = step) -> Tensor:
                chosen.zero_grad()
                loss = model(inputs(step))
                loss.backward()
                return loss

            chosen.step(closure)
    assert counted == [0, 0, 0]
    result(net, optimizer).assert_same(result(fresh, plain))


def test_two_optimizers_of_one_model() -> None:
    runs = []
    for early in (False, True):
        net = Net()
        halves = [list(net.layers)[:3], list(net.layers)[3:]]
        optimizers = [row_of["LARS"].make(halves[0]), row_of["LAMB"].make(halves[1])]
        for optimizer in optimizers if early else ():
            fastlars.step_in_backward(net, optimizer, bucket_mb=1e-9)
        for step in range(4):
            net(inputs(step)).backward()
            assert early_of(net) == (5 if early else 0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        runs.append([p.detach() for p in net.parameters()])
    assert_same("weight", runs[1], runs[0])


def test_parts_of_a_step_by_several_losses() -> None:
    """Two backward passes of one step through different layers."""
    runs = []
    for early in (False, True):
        net = Net()
        optimizer = row_of["LAMB"].make(net.parameters())
        if early:
            fastlars.step_in_backward(net, optimizer, bucket_mb=1e-9)
        for step in range(4):
            optimizer.zero_grad()
            for net.dropped in ((0, 1), (2, 3, 4)):
                net(inputs(step)).backward()
            optimizer.step()
        runs.append(result(net, optimizer))
    runs[1].assert_same(runs[0])


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


def test_a_wrapped_optimizer() -> None:
    core = pytest.importorskip(
        "lightning.pytorch.core.optimizer", reason="Lightning is not installed"
    )
    net = Net()
    optimizer = row_of["LARS"].make(net.parameters())
    wrapped = core.LightningOptimizer(optimizer)
    fastlars.step_in_backward(net, wrapped, bucket_mb=TINY)
    net(inputs(0)).backward()
    assert early_of(net) >= 3
    optimizer.step()
    assert early_of(net) == 0


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model() -> None:
    """One graph: its gradients arrive together, at the end; the bits stay."""
    runs = []
    for early in (False, True):
        torch.compiler.reset()
        net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        with torch.no_grad():
            for p in net.parameters():
                p.fill_(0.1)
        optimizer = row_of["LARS"].make(net.parameters())
        if early:
            fastlars.step_in_backward(net, optimizer, bucket_mb=TINY)
        compiled = torch.compile(net, backend="aot_eager")
        for _ in range(3):
            optimizer.zero_grad()
            compiled(torch.ones(2, 8)).sum().backward()
            optimizer.step()
        runs.append(result(net, optimizer))
    runs[1].assert_same(runs[0])
