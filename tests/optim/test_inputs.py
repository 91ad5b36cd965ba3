"""Bad input: the right exception, that says where, and no tensor changed.

torch's own fused optimizers are silently wrong, or write out of bounds, on nine of the inputs in
these files.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlars
from backend_cases import BF16, F64
from optim.input_cases import Case, each_class, values
from optimizers import SIMPLE, Row, train
from optimizers import one_thread as one_thread
from tolerances import assert_same_bits

# Parameters and gradients that no kernel can take (rows 1 to 4, 15, 21).


@dataclass(frozen=True)
class Bad:
    """A parameter or a gradient that is refused when the step is taken."""

    name: str
    error: type[Exception]
    message: str
    parameter: Callable[[], Tensor] = lambda: nn.Parameter(values(4, 6))
    grad: Callable[[Tensor], Tensor] = field(default=torch.ones_like)

    def __repr__(self) -> str:
        return self.name


class Wrapper(Tensor):
    """A subclass that keeps its elements elsewhere, as quantized and sharded tensors do."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, dtype=inner.dtype, requires_grad=inner.requires_grad
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    def __repr__(self) -> str:
        return "Wrapper"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        def unwrap(x: Any) -> Any:
            return x.inner if isinstance(x, Wrapper) else x

        out = func(*map(unwrap, args), **(kwargs or {}))
        return Wrapper(out) if isinstance(out, Tensor) else out


def _complex() -> Tensor:
    return nn.Parameter(torch.complex(values(4, 6), values(4, 6, seed=6)))


def _sparse(p: Tensor) -> Tensor:
    return torch.ones_like(p).to_sparse()


def _sparse_rows(p: Tensor) -> Tensor:
    return torch.sparse_coo_tensor([[0, 2]], torch.ones(2, 6), (4, 6), check_invariants=True)


BAD = [
    Bad("sparse gradient", TypeError, "sparse gradient", grad=_sparse),
    Bad("rows, as nn.Embedding makes them", TypeError, "sparse gradient", grad=_sparse_rows),
    Bad(
        "sparse parameter",
        TypeError,
        "sparse tensor",
        lambda: nn.Parameter(values(4, 6).to_sparse()),
        lambda p: p.detach().clone(),
    ),
    Bad("complex parameter", TypeError, "view_as_real", _complex),
    Bad(
        "parameter on meta",
        TypeError,
        "meta device",
        lambda: nn.Parameter(torch.empty(4, 6, device="meta")),
    ),
    Bad("integer parameter", TypeError, "int32", lambda: torch.ones(4, 6, dtype=torch.int32)),
    Bad("boolean parameter", TypeError, "bool", lambda: torch.ones(4, 6, dtype=torch.bool)),
    Bad(
        "8-bit parameter",
        TypeError,
        "float8_e4m3fn",
        lambda: torch.ones(4, 6).to(torch.float8_e4m3fn),
    ),
    Bad(
        "wrapper parameter",
        TypeError,
        "Wrapper",
        lambda: Wrapper(values(4, 6)).requires_grad_(),
        lambda p: torch.ones(4, 6),
    ),
    Bad("wrapper gradient", TypeError, "Wrapper", grad=lambda p: Wrapper(torch.ones(4, 6))),
]


@each_class
@pytest.mark.parametrize("bad", BAD, ids=repr)
@pytest.mark.parametrize("steps", [0, 2])
def test_refused_tensors(row: Row, bad: Bad, steps: int) -> None:
    victim = bad.parameter()
    case = Case(row, victim)
    for step in range(steps):  # others have states by then, and plans are made
        case.set_gradients(step)
        victim.grad = None
        case.optimizer.step()
    case.set_gradients(5)
    victim.grad = None
    victim.grad = bad.grad(victim)
    case.refuses(bad.error, bad.message)
    victim.grad = None
    case.optimizer.step()


@each_class
def test_an_expanded_parameter_is_refused_at_once(row: Row) -> None:
    healthy = nn.Parameter(values(3))
    expanded = nn.Parameter(values(1, 4).expand(3, 4))
    with pytest.raises(ValueError, match="group 0, parameter 1 is a view whose elements overlap"):
        row.make([healthy, expanded])
    optimizer = row.make([healthy])
    with pytest.raises(ValueError, match="group 1, parameter 0 is a view whose elements overlap"):
        optimizer.add_param_group({"params": [expanded]})
    assert len(optimizer.param_groups) == 1


@each_class
def test_meta_parameters_without_gradients_are_left_alone(row: Row) -> None:
    case = Case(row, nn.Parameter(torch.empty(4, 6, device="meta")))
    before = [p.detach().clone() for p in case.healthy]
    case.train(0, 1)
    assert all(not torch.equal(p, was) for p, was in zip(case.healthy, before, strict=True))


@each_class
def test_view_as_real_of_a_complex_parameter(row: Row) -> None:
    complex_values = _complex().detach()
    real, plain = nn.Parameter(torch.view_as_real(complex_values)), nn.Parameter(values(4, 6, 2))
    plain.data.copy_(real.data)
    optimizer, other = row.make([real]), row.make([plain])
    train(optimizer, [real], range(2))
    train(other, [plain], range(2))
    assert_same_bits("parameter", real, plain)
    assert_same_bits("complex tensor", torch.view_as_real(complex_values), plain.data)


# Lists of parameters (rows 18 to 20, 28 to 30).


@each_class
def test_lists_of_parameters(row: Row) -> None:
    p, q = nn.Parameter(values(3)), nn.Parameter(values(3))
    with pytest.raises(ValueError, match="empty parameter list"):
        row.make([])
    with pytest.raises(TypeError, match="should be an iterable"):
        row.make(p)
    with pytest.raises(TypeError, match="ordered collection"):
        row.make([{"params": {p, q}}])
    with pytest.raises(TypeError, match="can only optimize Tensors"):
        row.make([p, 3.0])
    with pytest.raises(ValueError, match="non-leaf"):
        row.make([p * 2])
    with pytest.raises(ValueError, match="more than one parameter group"):
        row.make([{"params": [p]}, {"params": [q, p]}])
    with (
        pytest.warns(UserWarning, match="duplicate"),
        pytest.raises(ValueError, match=r"group 0, parameter 2 shares memory with .*parameter 0"),
    ):
        row.make([p, q, p])


@each_class
@pytest.mark.parametrize("with_gradient", [False, True])
def test_frozen_parameters(row: Row, with_gradient: bool) -> None:
    """As in torch.optim: what counts is the gradient."""
    case = Case(row)
    case.victim.requires_grad_(False)
    case.set_gradients()
    if not with_gradient:
        case.victim.grad = None
    was = case.victim.detach().clone()
    case.optimizer.step()
    assert torch.equal(case.victim, was) != with_gradient


# Values (row 31 and beyond).


@each_class
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, BF16, F64])
def test_a_spoiled_gradient_shows_and_stays_where_it_is(
    row: Row, value: float, dtype: torch.dtype
) -> None:
    case, clean = (Case(row, nn.Parameter(values(4, 6).to(dtype))) for _ in range(2))
    case.set_gradients()
    clean.set_gradients()
    case.victim.grad[1, 2] = value
    case.optimizer.step()
    clean.optimizer.step()
    assert not math.isfinite(case.victim[1, 2].item())
    for p, q in zip(case.healthy, clean.healthy, strict=True):
        assert_same_bits("another parameter", p, q)
    assert case.victim.isfinite().sum() in (0, 23)


@pytest.mark.parametrize("row", [row for row in SIMPLE if row.adapts], ids=repr)
def test_values_whose_squares_leave_float32(row: Row) -> None:
    """A norm in float32 is 0 or infinite here, and the ratio silently 1 or 0."""
    for scale in (1e-30, 1e-22, 1e22, 1e30):
        p = nn.Parameter(scale * torch.ones(100))
        # LAMB's second moment must hold the square of a gradient.
        p.grad = torch.full((100,), scale if row.kind is fastlars.LARS else 0.1)
        optimizer = row.make([p], weight_decay=0.0)
        optimizer.step()
        expected = 0.1 if row.kind is fastlars.LARS else scale
        assert optimizer.trust_ratios()[p] == pytest.approx(expected, rel=1e-4)
        moved = row.options["lr"] * (0.1 if row.kind is fastlars.LARS else 1.0) * scale
        assert p.detach().tolist() == pytest.approx([scale - moved] * 100, rel=1e-4)
