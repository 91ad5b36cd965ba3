"""Numbers that the CUDA kernels take from where they lie on the device, without a kernel more.

On a GPU, and where the kernels were compiled for the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from backend_cases import F16, F32, F64, PLAIN, USUAL, Row
from device_cases import CLASSES, DEVICES, Twin, assert_same_runs, marks, optimizer, set_gradients
from fastlars.backends.base import OnDevice, StepScalars
from fastlars.backends.choose import instance
from fastlars.backends.cuda import PATHS
from problems import ORDINARY
from tolerances import assert_same_bits

DEVICE = DEVICES["cuda"]
pytestmark = marks("cuda")
LIMIT = 1.7
# The limit over a norm of 49 has other bits than the limit times 1 / 49, in float32 too.
CLOSE = 49 * 16777137.5 / 2**24


@pytest.fixture(autouse=True, params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(instance("cuda"), "path", request.param)
    return str(request.param)


def _number(value: float, dtype: torch.dtype = F64) -> Tensor:
    return torch.tensor(value, dtype=dtype, device=DEVICE)


GIVEN: dict[str, tuple[float, Callable[[], OnDevice]]] = {
    "lr": (-1.0, lambda: OnDevice(lr=_number(0.3, F32))),
    "lr, double": (0.25, lambda: OnDevice(lr=_number(0.3))),
    "scale": (1.0, lambda: OnDevice(grad_scale=_number(3.7, F32))),
    "scale, double": (-1.0, lambda: OnDevice(grad_scale=_number(3.7))),
    "norm above": (0.25, lambda: OnDevice(square_norm=_number(7.0), limit=LIMIT)),
    "norm close": (1.0, lambda: OnDevice(square_norm=_number(2401.0), limit=CLOSE)),
    "norm below": (-1.0, lambda: OnDevice(square_norm=_number(2.0), limit=LIMIT)),
    "norm of nan": (1.0, lambda: OnDevice(square_norm=_number(float("nan")), limit=LIMIT)),
    "all": (
        -1.0,
        lambda: OnDevice(*(_number(x, F32) for x in (0.3, 3.7, 0.0)), _number(7.0), LIMIT),
    ),
}


@pytest.mark.parametrize("row", USUAL, ids=lambda row: row.name)
@pytest.mark.parametrize("given", GIVEN)
def test_bits_are_those_of_torchs_arithmetic(row: Row, given: str) -> None:
    sign, there = GIVEN[given]
    numbers = StepScalars(0.6, sign, None, there())
    assert numbers.doubles is not None
    lr, scale, skip = numbers.doubles.tolist()
    assert skip == 0.0
    taken, by_value = (Twin("cuda", row, PLAIN, ORDINARY) for _ in range(2))
    for step in range(2):
        for run, now in ((taken, numbers), (by_value, StepScalars(lr, scale))):
            run.take_gradients(step)
            run.backend.step(row.rule, run.bind(), now)
        assert_same_runs(f"step {step}", taken, by_value)


@pytest.mark.parametrize("row", USUAL, ids=lambda row: row.name)
@pytest.mark.parametrize("dtype", [F32, F64])
def test_a_verdict_skips_the_step(row: Row, dtype: torch.dtype) -> None:
    run = Twin("cuda", row, PLAIN, ORDINARY)
    run.take_gradients(0)
    run.step(0)
    before = [x.clone() for _, x in run.written()]
    for verdict in (1.0, float("nan")):
        there = OnDevice(found_inf=_number(verdict, dtype))
        run.backend.step(row.rule, run.bind(), StepScalars(0.5, 1.0, None, there))
    for (name, x), was in zip(run.written(), before, strict=True):
        assert_same_bits(name, x, was)


def test_wrong_numbers_never_reach_a_kernel() -> None:
    run = Twin("cuda", USUAL[0], PLAIN, ORDINARY)
    run.take_gradients(0)
    for wrong in (
        torch.zeros((), device="meta"),
        torch.zeros(3, device=DEVICE),
        _number(1.0, F16),
        torch._efficientzerotensor((), device=DEVICE),
    ):
        for there in (OnDevice(lr=wrong), OnDevice(grad_scale=wrong), OnDevice(found_inf=wrong)):
            with pytest.raises(
                ValueError, match="reads its scalars there: each must be one float32 or"
            ):
                run.backend.step(run.row.rule, run.bind(), StepScalars(0.1, device=there))
    there = OnDevice(square_norm=_number(1.0, F32))
    with pytest.raises(ValueError, match="and the squared norm a float64"):
        run.backend.step(run.row.rule, run.bind(), StepScalars(0.1, device=there))


class Kernels(TorchDispatchMode):
    """Notes torch's operations that launch something."""

    NONE = ("empty", "select", "view", "_local_scalar_dense")  # check_lr reads a rate of the host's

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name not in self.NONE:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


# What a step needs beside ours; two of a scaler count what it skips. Bringing the numbers together,
# in torch, would be 4 for the rate, 6 for a scaler, 12 for a clip and 21 for all.
NEEDED = {
    "nothing": [],
    "lr": [],
    "scaler": ["ne", "add_"],
    "clip": ["sum"],
    "clip of two": ["sum", "sum", "stack", "sum"],
    "skip_if": ["sum", "sqrt", "le", "logical_not", "_to_copy", "add_"],
    "all": ["sum", "ne", "add_"],
}


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("given", NEEDED)
def test_numbers_on_the_device_launch_nothing(
    name: str, given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTLARS_BACKEND", "cuda")
    lr = _number(0.1, F32) if given in ("lr", "all") else 0.1
    limit = 0.5 if given in ("clip", "clip of two", "all") else None
    skip_if = 0.5 if given == "skip_if" else None
    params, tested = optimizer(name, DEVICE, lr=lr, max_grad_norm=limit, skip_if=skip_if)
    if given == "clip of two":
        (second,) = optimizer(name, DEVICE, ((5,),))[0]
        tested.add_param_group({"params": [second]})
        params.append(second)
    set_gradients(params, 0)
    if given in ("scaler", "all"):
        tested.grad_scale = _number(2.0, F32)  # type: ignore[attr-defined]
        tested.found_inf = _number(0.0, F32)  # type: ignore[attr-defined]
    tested.step()
    with Kernels() as kernels:
        tested.step()
    assert kernels.found == NEEDED[given]
