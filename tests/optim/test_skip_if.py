"""skip_if as argument and attribute: what it may be, who keeps it, and where it is refused."""

from __future__ import annotations

import copy
import functools
import io
import math
import pickle
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import fastlars
from fastlars.optim import stepper
from optim.input_cases import through_file
from optimizers import SIMPLE, Row, Snapshot, parameters, set_gradients, train
from optimizers import one_thread as one_thread
from repository_files import ROOT, python_blocks

each_class = pytest.mark.parametrize("row", SIMPLE, ids=repr)
THRESHOLD = 20.0


def test_the_count_is_first_read_in_an_evaluation() -> None:
    params = parameters()
    optimizer = fastlars.LAMB(params, lr=0.1, skip_if=1e-9)
    with torch.inference_mode():
        assert int(optimizer.skipped_steps) == 0
    train(optimizer, params, range(2))
    assert int(optimizer.skipped_steps) == 2


def test_the_recipe_after_a_state_dict_before_the_first_step() -> None:
    """torch.distributed.checkpoint takes a step of zero gradients, whose norm is no gradient's."""
    model = nn.Linear(3, 2)
    names: dict[str, Any] = {"torch": torch}
    block = next(
        b for b in python_blocks((ROOT / "docs/migrating.md").read_text()) if "FarAboveMean" in b
    )
    exec(block.split("device = next")[0], names)
    optimizer = fastlars.LAMB(model.parameters(), lr=0.1, skip_if=names["FarAboveMean"]("cpu"))
    get_optimizer_state_dict(model, optimizer)
    train(optimizer, list(model.parameters()), range(20))
    assert int(optimizer.skipped_steps) == 0


def too_large(norm: Tensor) -> Tensor:
    return norm > THRESHOLD


@each_class
@pytest.mark.parametrize(
    "value", [2, 2.0, np.float32(2.0), Decimal(2), torch.tensor([2.0]), np.array([2.0])], ids=repr
)
def test_numbers_of_all_kinds_are_thresholds(row: Row, value: Any) -> None:
    optimizer = row.make(parameters(), skip_if=value)
    assert optimizer.skip_if == 2.0
    assert type(optimizer.skip_if) is float


@each_class
@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0, ValueError, "skip_if must be above 0, a callable, or None to skip no step, got 0"),
        (-1.0, ValueError, "got -1.0"),
        (math.nan, ValueError, "got nan"),
        ("large", TypeError, "skip_if must be a number, got str"),
        (True, TypeError, "skip_if must be a number, got bool"),
        (torch.ones(2), TypeError, "skip_if must be a number, got Tensor"),
    ],
)
def test_what_is_no_threshold(row: Row, value: Any, error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        row.make(parameters(), skip_if=value)
    optimizer = row.make(parameters(), skip_if=3.0)
    with pytest.raises(error, match=text):
        optimizer.skip_if = value
    assert optimizer.skip_if == 3.0


@each_class
def test_it_may_be_changed_between_steps(row: Row) -> None:
    params = parameters()
    optimizer = row.make(params)
    skipped = []
    for skip_if in (None, 1e-3, too_large, lambda norm: True, math.inf, None):
        optimizer.skip_if = skip_if
        train(optimizer, params, [0])
        skipped.append(int(optimizer.skipped_steps))
    assert skipped == [0, 1, 1, 2, 2, 2]


@each_class
def test_copies_keep_it(row: Row) -> None:
    params = parameters()
    for skip_if in (THRESHOLD, too_large):
        optimizer = row.make(params, skip_if=skip_if)
        set_gradients(params, 0, scale=1000.0)
        optimizer.step()
        for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
            assert other.skip_if == skip_if
            assert other.grad_norm is None
            assert int(other.skipped_steps) == 1
            mine = other.param_groups[0]["params"]
            set_gradients(mine, 0, scale=1000.0)
            other.step()
            assert int(other.skipped_steps) == 2
            assert int(optimizer.skipped_steps) == 1
    unpickled = row.make(params, skip_if=lambda norm: norm > 1.0)
    with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
        pickle.dumps(unpickled)


@each_class
def test_checkpoints_do_not_have_it(row: Row) -> None:
    params, others = parameters(), parameters()
    optimizer = row.make(params, skip_if=lambda norm: norm > THRESHOLD)
    train(optimizer, params, range(2))
    plain = row.make(others)
    train(plain, others, range(2))
    dict_ = optimizer.state_dict()
    assert repr(dict_["param_groups"]) == repr(plain.state_dict()["param_groups"])
    file = io.BytesIO()
    torch.save(dict_, file)
    file.seek(0)
    torch.load(file, weights_only=True)
    other = row.make(others, skip_if=1e-6)
    train(other, others, [0])
    other.load_state_dict(through_file(dict_))
    assert other.skip_if == 1e-6
    assert int(other.skipped_steps) == 1
    assert other.grad_norm is None


@each_class
def test_a_step_with_a_closure_is_skipped_by_the_gradients_of_the_closure(row: Row) -> None:
    params = parameters()
    optimizer = row.make(params, skip_if=THRESHOLD)

    def closure(scale: float) -> float:
        set_gradients(params, 0, scale=scale)
        return scale

    for scale in (1.0, 1000.0):
        assert optimizer.step(functools.partial(closure, scale)) == scale
    assert int(optimizer.skipped_steps) == 1


@each_class
def test_groups_are_decided_together(row: Row) -> None:
    """Also one that was added later, and of which the norm of the others knows nothing."""
    params = parameters()
    optimizer = row.make(params[:2], skip_if=THRESHOLD)
    train(optimizer, params[:2], [0])
    optimizer.add_param_group({"params": params[2:]})
    set_gradients(params, 1)
    optimizer.step()
    for p in params[2:]:
        assert p.grad is not None
        p.grad.mul_(1000.0)
    before = Snapshot(optimizer)
    optimizer.step()
    before.assert_unchanged()
    assert int(optimizer.skipped_steps) == 1


# Where it is refused.


@each_class
def test_inside_backward(row: Row) -> None:
    params = parameters()[:2]
    optimizers = [row.make([p], skip_if=THRESHOLD) for p in params]
    for p, optimizer in zip(params, optimizers, strict=True):
        p.register_post_accumulate_grad_hook(lambda _, optimizer=optimizer: optimizer.step())
    with pytest.raises(RuntimeError, match=r"skip_if in a step inside backward.*leave skip_if out"):
        torch.stack([p.square().sum() for p in params]).sum().backward()


def test_a_recording_needs_a_decision_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters()
    optimizer = fastlars.LARS(params, lr=0.1, skip_if=lambda norm: bool(norm > THRESHOLD))
    train(optimizer, params, [0])
    before = Snapshot(optimizer)
    monkeypatch.setattr(stepper, "is_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="skip_if has decided on the host while a CUDA graph is"):
        optimizer.step()
    before.assert_unchanged()
    optimizer.skip_if = too_large
    optimizer.step()


def test_a_recording_needs_the_count_on_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("meta")  # in the place of a GPU
    optimizer = fastlars.LARS(parameters(), lr=0.1)
    monkeypatch.setattr(stepper, "is_capturing", lambda device: device.type != "cpu")
    with pytest.raises(RuntimeError, match="begin to count skipped steps anew at every replay"):
        optimizer.stepper.count_skips_on(device)
    assert optimizer.skipped_steps.device.type == "cpu"
    monkeypatch.setattr(stepper, "is_capturing", lambda device: False)
    optimizer.stepper.count_skips_on(device)
    counted = optimizer.skipped_steps
    assert counted.device == device
    monkeypatch.setattr(stepper, "is_capturing", lambda device: True)
    optimizer.stepper.count_skips_on(device)
    optimizer.stepper.count_skips_on(torch.device("cpu"))
    assert optimizer.skipped_steps is counted


# torch.compile.


@each_class
@pytest.mark.filterwarnings("ignore")  # of torch, which says that it does not trace an extension
def test_compiled_steps_are_skipped_outside_the_graph(row: Row) -> None:
    torch._dynamo.reset()
    params, others = parameters()[:2], parameters()[:2]
    optimizer, other = row.make(params), row.make(others)
    counter = CompileCounter()
    compiled = torch.compile(optimizer.step, backend=counter)
    train_one(compiled, params, 0)
    train(other, others, [0])
    assert counter.frame_count == 1
    optimizer.skip_if = THRESHOLD
    train_one(compiled, params, 1, scale=1000.0)
    train_one(compiled, params, 2)
    train(other, others, [2])
    assert int(optimizer.skipped_steps) == 1
    norm = optimizer.grad_norm
    assert norm is not None
    optimizer.skip_if = None
    for step in (3, 4):
        train_one(compiled, params, step)
    train(other, others, (3, 4))
    assert optimizer.grad_norm == norm  # traced steps leave it as it is
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)


def train_one(step: Any, params: list[nn.Parameter], number: int, scale: float = 1.0) -> None:
    set_gradients(params, number, scale=scale)
    step()


# The documentation.


def test_the_recipe_runs(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs" / "migrating.md").read_text()
    section = text[text.index("## Log the gradient norm, skip spikes") :].split("\n## ")[0]
    (block,) = python_blocks(section)
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    batches = [torch.randn(8, 4) for _ in range(3)]
    batches[1] *= 1e3  # a spike
    batches.append(torch.full((8, 4), math.nan))
    namespace: dict[str, Any] = {"torch": torch, "fastlars": fastlars, "model": model}
    namespace |= {"batches": batches, "loss_of": lambda batch: model(batch).square().mean()}
    exec(block, namespace)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines] == ["0", "1", "1", "2"]
    assert lines[-1] == "norm nan, skipped 2"
