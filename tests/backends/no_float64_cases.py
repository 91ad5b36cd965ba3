"""Run by test_no_float64.py in processes of their own: steps on no_float64_device's device."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backends.no_float64_device import DEVICE, HOLDS, calls
from fastlars.backends import choose
from fastlars.backends.base import Dtypes
from fastlars.backends.float64 import has_float64
from fastlars.backends.reference import Reference
from optimizers import SIMPLE
from tolerances import assert_close

pytestmark = pytest.mark.filterwarnings("ignore:fastlars steps singles parameters with plain")
BF16 = torch.bfloat16
OPTIONS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "float16": (torch.float16, {"master_weights": True}),
    "bfloat16 states": (torch.float32, {"state_dtype": BF16}),
    "stochastic rounding": (BF16, {"stochastic_rounding": True}),
    "clip": (torch.float32, {"max_grad_norm": 0.5}),
    "no skip": (torch.float32, {"skip_if": 1e9}),
    "lr in a tensor": (torch.float32, {"lr": torch.tensor(0.25)}),
}


def _steps(
    row: Any, device: Any, dtype: torch.dtype, scale: float = 1.0, **options: Any
) -> tuple[list[Tensor], Any]:
    """Weights after three steps, and the optimizer."""
    torch.manual_seed(3)
    generator = torch.Generator().manual_seed(0)
    if isinstance(options.get("lr"), Tensor):
        options["lr"] = options["lr"].to(device)
    weights = [torch.randn(n, generator=generator) for n in ((50,), (7, 3), (5000,))]
    params = [nn.Parameter(w.to(dtype).to(device)) for w in weights]
    optimizer = row.kind(params, **{"lr": 0.25, "weight_decay": 0.1, **row.needed, **options})
    for _ in range(3):
        for p in params:
            p.grad = (scale * torch.randn(p.shape, generator=generator)).to(dtype).to(device)
        optimizer.step()
    return [p.detach().cpu() for p in params], optimizer


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("row", SIMPLE, ids=str)
def test_weights_are_those_of_the_cpu(
    row: Any, options: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype, given = OPTIONS[options]
    calls.clear()
    found, optimizer = _steps(row, DEVICE, dtype, **given)
    monkeypatch.setenv("FASTLARS_BACKEND", "reference")
    expected, twin = _steps(row, "cpu", dtype, **given)
    for i, (weight, right) in enumerate(zip(found, expected, strict=True)):
        assert_close(f"weight {i}", "weight", weight, right, float(right.abs().max()))
    ratios = [[*each.trust_ratios().values()] for each in (optimizer, twin)]
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-6)
    if twin.grad_norm is not None:
        assert float(optimizer.grad_norm) == pytest.approx(float(twin.grad_norm), rel=1e-6)
        assert optimizer.grad_norm.dtype == torch.float64
    # Steps compute on the device, and not on copies of its tensors.
    assert any(name.startswith("aten::mul") for name in calls)


@pytest.mark.parametrize("scale", [1e-24, 1e24])
def test_squares_beyond_float32(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"weight_decay": 0.0, "max_grad_norm": math.inf, "scale": scale}
    found, optimizer = _steps(SIMPLE[0], DEVICE, torch.float32, **given)
    monkeypatch.setenv("FASTLARS_BACKEND", "reference")
    expected, twin = _steps(SIMPLE[0], "cpu", torch.float32, **given)
    for i, (weight, right) in enumerate(zip(found, expected, strict=True)):
        assert_close(f"weight {i}", "weight", weight, right, float(right.abs().max()))
    assert 0.0 < float(twin.grad_norm) == pytest.approx(float(optimizer.grad_norm), rel=1e-6)


@pytest.mark.parametrize("check", ["0", "1"])
def test_one_warning_and_no_error(check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLARS_CHECK", check)
    choose._warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for row in SIMPLE:
            _steps(row, DEVICE, torch.float32)
    assert [str(each.message) for each in caught if "fastlars" in str(each.message)] == [
        "fastlars steps singles parameters with plain torch operations: the triton back end needs "
        "float64, which singles:0 does not have. `python -m fastlars` says more."
    ]


def test_what_needs_float64_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="capturable=True needs a back end that reads lr and st"):
        _steps(SIMPLE[0], DEVICE, torch.float32, capturable=True)
    monkeypatch.setenv("FASTLARS_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="=triton, but the triton back end needs float64"):
        _steps(SIMPLE[0], DEVICE, torch.float32)


def test_the_device_refuses_float64() -> None:
    value = torch.ones(3, device=DEVICE)
    tries: list[Callable[[], object]] = [
        lambda: value.to(torch.float64),
        lambda: value.to("cpu", torch.float64),
        lambda: torch.ones(3, device=DEVICE, dtype=torch.float64),
    ]
    for each in tries:
        with pytest.raises(RuntimeError, match="aspect fp64"):
            each()
    if HOLDS:
        assert torch.empty(3, device=DEVICE, dtype=torch.float64).device == DEVICE
    assert not has_float64(DEVICE)
    assert has_float64(torch.device("cpu"))


def test_it_is_asked_outside_of_modes() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    has_float64.cache_clear()
    with FakeTensorMode():
        assert not has_float64(DEVICE)


def test_a_failure_for_another_reason_is_no_answer() -> None:
    with pytest.raises(Exception, match=r"."):
        has_float64(torch.device("cuda:999"))


def test_triton_says_why_not() -> None:
    weight = torch.ones(3, device=DEVICE)
    reason = choose.why_not("triton", weight, Dtypes(torch.float32, torch.float32, torch.float32))
    assert reason == "the triton back end needs float64, which singles:0 does not have"
    assert Reference().name == choose.choose(weight, Dtypes(*[torch.float32] * 3)).name
