"""Every tolerance of the tests, with its reason; and the comparison that uses them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Distance from 1 to the next number, and the smallest step near 0.
_EPS = {
    torch.float64: 2.0**-52,
    torch.float32: 2.0**-23,
    torch.bfloat16: 2.0**-7,
    torch.float16: 2.0**-10,
}
_STEP_AT_ZERO = {
    torch.float64: 2.0**-1074,
    torch.float32: 2.0**-149,
    torch.bfloat16: 2.0**-133,
    torch.float16: 2.0**-24,
}


@dataclass(frozen=True)
class Tolerance:
    """How far a quantity may be off.

    Attributes:
        arithmetic: relative to ``scale``, the largest of the values that were added up.
        reason: why not less.
    """

    arithmetic: float
    reason: str


TOLERANCES = {
    "sum": Tolerance(
        2e-6,
        "a lane adds 512 squares in float32: 512 roundings of 2^-24 are 3e-5 if all err to one "
        "side and 1.4e-6 if they err at random; 32 independent lanes average that down",
    ),
    "ratio": Tolerance(2e-6, "the square root of a sum has half its error; one more for division"),
    "state": Tolerance(
        1e-6, "scaling, decay, ratio, momentum: 8 float32 roundings of 2^-24, and the ratio's error"
    ),
    "weight": Tolerance(
        2e-6, "the state's error and 4 more roundings, one of them a square root, one a division"
    ),
    "300 steps": Tolerance(
        2e-6,
        "a step's rounding of 2^-24 stays in the weight: 300 that err at random are 1e-6; momentum "
        "forgets its own after 10 steps",
    ),
}


def _describe(actual: Tensor, expected: Tensor, bad: Tensor) -> str:
    rows = []
    for index in bad.nonzero()[:5].tolist():
        at = tuple(index)
        rows.append(f"  [{', '.join(map(str, at))}]: {actual[at].item()!r}, expected ")
        rows[-1] += repr(expected[at].item())
    return "\n".join(rows)


def assert_close(
    what: str,
    kind: str,
    actual: Tensor,
    expected: Tensor,
    scale: float | Tensor | None = None,
) -> None:
    """Compare with an expectation in float64.

    ``kind`` names the row of the table; ``scale`` is the largest summand (by default the
    expectation itself). Half a step of the type that ``actual`` is stored in comes on top; NaN
    must meet NaN, an infinity the same infinity.
    """
    row = TOLERANCES[kind]
    a, e = actual.double(), expected.double()
    assert a.shape == e.shape, f"{what}: shape {tuple(a.shape)}, expected {tuple(e.shape)}"
    scale = e.abs() if scale is None else torch.as_tensor(scale, dtype=torch.float64)
    allowed = row.arithmetic * scale
    allowed = allowed + 0.5001 * _EPS[actual.dtype] * e.abs() + _STEP_AT_ZERO[actual.dtype]
    # What float64 holds may be too large for the type: infinity then.
    largest = torch.finfo(actual.dtype).max
    overflow = a.isinf() & (e.abs() + allowed >= largest) & (a.sign() == e.sign())
    error = (a - e).abs()
    good = (error <= allowed) | (a == e) | (a.isnan() & e.isnan()) | overflow
    if bool(good.all()):
        return
    ratio = torch.where(good, 0.0, error / allowed)
    raise AssertionError(
        f"{what}: {int((~good).sum())} of {good.numel()} differ, the largest error is "
        f"{float(error.nan_to_num(float('inf')).max()):.3e}, {float(ratio.nan_to_num(0).max()):.3g}"
        f" times what is allowed ({kind}: {row.arithmetic:.1e}, since {row.reason})\n"
        + _describe(actual, expected, ~good)
    )


def assert_same_bits(what: str, actual: Tensor, expected: Tensor) -> None:
    """Equal in type, shape and every bit: -0 is not 0; one NaN is as good as another."""
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: {actual.shape}, expected {expected.shape}"
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.itemsize]
    a = actual.detach().contiguous().view(integer)
    e = expected.detach().contiguous().view(integer)
    bad = (a != e) & ~(actual.detach().isnan() & expected.detach().isnan())
    if not bool(bad.any()):
        return
    raise AssertionError(
        f"{what}: {int(bad.sum())} of {bad.numel()} differ in their bits\n"
        + _describe(actual.detach(), expected.detach(), bad)
    )
