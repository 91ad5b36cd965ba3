"""Strided, shared, empty and misaligned tensors: right, or refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from backend_cases import BF16, F64
from optim.input_cases import each_class, values
from optimizers import Row, Snapshot, assert_same, set_gradients, train
from optimizers import one_thread as one_thread
from tolerances import assert_same_bits


class Plain(Tensor):
    """A subclass without behaviour of its own."""


# Layouts (rows 5, 6, 14, 26, 27).


def _strided() -> list[tuple[str, Tensor, Tensor]]:
    """Name, the memory that must not change beside the view, the view."""
    out = []
    for name, view in {
        "every second column": lambda x: x[:, ::2],
        "inner block": lambda x: x[2:5, 1:4],
        "diagonal": lambda x: x.diagonal(),
        "one column": lambda x: x[:, 3],
        "transposed": lambda x: x.t(),
        "overlapping rows, read apart": lambda x: x.flatten()[3:51].view(6, 8)[:, :7],
        "one element": lambda x: x[2:3, 3:4],
        "permuted": lambda x: x.view(2, 4, 8).permute(2, 0, 1),
    }.items():
        base = values(8, 8)
        out.append((name, base, view(base)))
    return out


@each_class
@pytest.mark.parametrize("index", range(8), ids=lambda i: _strided()[i][0])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_strided_parameters(row: Row, index: int, dtype: torch.dtype) -> None:
    _, base, view = _strided()[index]
    base = base.to(dtype)
    view = base.as_strided(view.shape, view.stride(), view.storage_offset())
    around = torch.ones(64, dtype=torch.bool)
    around.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
    outside = base.flatten()[around].clone()
    p, plain = nn.Parameter(view), nn.Parameter(view.clone(memory_format=torch.contiguous_format))
    optimizer, other = row.make([p]), row.make([plain])
    for step in range(3):
        grad = values(*p.shape, seed=step).to(dtype)
        p.grad, plain.grad = grad.clone(), grad
        optimizer.step()
        other.step()
    rtol = 1e-2 if dtype == BF16 else 2e-6
    torch.testing.assert_close(p.detach(), plain.detach(), rtol=rtol, atol=1e-6)
    assert_same_bits("elements beside the view", base.flatten()[around], outside)


@each_class
@pytest.mark.parametrize(
    "grad",
    [
        lambda g: g.t().contiguous().t(),
        lambda g: g[:1].expand(4, 6),
        lambda g: g[:, :1].expand(4, 6),
        lambda g: torch.ones(()).expand(4, 6),
        lambda g: torch.cat([g, g], 1)[:, ::2],
        lambda g: torch.cat([torch.zeros(1), g.flatten()])[1:].view(4, 6),
        lambda g: torch.complex(g, -g).conj().imag,  # negated lazily
        lambda g: nn.Parameter(g),
        lambda g: g.as_subclass(Plain),
        lambda g: g.clone().requires_grad_(),
        lambda g: g.to(BF16),
        lambda g: g.to(torch.float16),
        lambda g: g.double(),
    ],
    ids=[
        "transposed",
        "expanded rows",
        "expanded columns",
        "expanded scalar",
        "strided",
        "misaligned",
        "negated",
        "a parameter itself",
        "of a plain subclass",
        "requires grad",
        "bfloat16",
        "float16",
        "float64",
    ],
)
def test_hard_gradients(row: Row, grad: Callable[[Tensor], Tensor]) -> None:
    p, plain = nn.Parameter(values(4, 6)), nn.Parameter(values(4, 6))
    p.grad_dtype = None  # lets any type in
    optimizer, other = row.make([p]), row.make([plain])
    for step in range(3):
        given = grad(values(4, 6, seed=step))
        p.grad, plain.grad = given, given.detach().resolve_neg().float().contiguous()
        plain.grad = plain.grad.as_subclass(Tensor)
        optimizer.step()
        other.step()
    torch.testing.assert_close(p.detach(), plain.detach(), rtol=1e-6, atol=1e-7)


@each_class
@pytest.mark.parametrize("shape", [(4, 6), ()], ids=str)
def test_zeros_that_autograd_never_wrote(row: Row, shape: tuple[int, ...]) -> None:
    """The gradient of torch.sgn has no memory."""
    p, plain = nn.Parameter(values(*shape)), nn.Parameter(values(*shape))
    optimizer, other = row.make([p]), row.make([plain])
    for step in range(3):
        p.grad = None
        (p if step == 0 else torch.sgn(p)).sum().backward()
        plain.grad = torch.full(shape, 1.0 if step == 0 else 0.0)
        optimizer.step()
        other.step()
    assert_same_bits("parameter", p, plain)


@each_class
@pytest.mark.parametrize("shape", [(1,), (1, 1), (3,)])
def test_parameters_that_are_negated_lazily(row: Row, shape: tuple[int, ...]) -> None:
    """The memory of such a view holds its negative. Refused, or right."""
    base = torch.complex(values(*shape), values(*shape, seed=9))
    p = nn.Parameter(base.conj().imag)
    assert p.is_neg()
    plain = nn.Parameter(p.detach().resolve_neg().clone())
    optimizer, other = row.make([p]), row.make([plain])
    set_gradients([plain], 0)
    p.grad = plain.grad.clone()
    before = Snapshot(optimizer)
    try:
        optimizer.step()
    except (TypeError, ValueError) as error:
        assert "group 0, parameter 0" in str(error)  # noqa: PT017
        before.assert_unchanged()
        return
    other.step()
    torch.testing.assert_close(p.detach(), plain.detach(), rtol=1e-6, atol=1e-7)


OVERLAPS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "the same memory": lambda x: (x, x.view(8, 8)),
    "part of it": lambda x: (x[:40], x[32:]),
    "one element": lambda x: (x[:33], x[32:]),
    "rows and columns": lambda x: (x.view(8, 8)[2], x.view(8, 8)[:, 3]),
    "in another type": lambda x: (x[:8], x[4:].view(BF16)),
    "every other half": lambda x: (x[:8], x[:8].view(BF16)[1::2]),
}


@each_class
@pytest.mark.parametrize("name", OVERLAPS)
def test_parameters_that_share_memory(row: Row, name: str) -> None:
    memory = values(64)
    kept = memory.clone()
    first, second = map(nn.Parameter, OVERLAPS[name](memory))
    message = r"group 0, parameter \d.*shares memory with group 0, parameter \d"
    with pytest.raises(ValueError, match=message):
        row.make([nn.Parameter(values(3)), first, second])
    optimizer = row.make([nn.Parameter(values(3)), first])
    message = r"(group 1, parameter 0|group 0, parameter 1).*shares memory with"
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [second]})
    assert len(optimizer.param_groups) == 1
    set_gradients([first], 0)
    optimizer.step()
    untouched = ~torch.isin(
        torch.arange(64),
        torch.arange(64).as_strided(first.shape, first.stride(), first.storage_offset()),
    )
    assert_same_bits("memory of the other", memory[untouched], kept[untouched])


@each_class
def test_neighbours_in_one_buffer_are_fine(row: Row) -> None:
    """Flat buffers, as FSDP and others make them: columns may interleave too."""
    buffer = values(100)
    columns = buffer[64:].view(18, 2).unbind(1)
    tiles = [buffer[:30].view(5, 6), buffer[30:31], buffer[31:64], *columns]
    params, others = ([nn.Parameter(f(x)) for x in tiles] for f in (lambda x: x, Tensor.clone))
    optimizer, other = row.make(params), row.make(others)
    train(optimizer, params, range(3))
    train(other, others, range(3))
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=1e-7)


@each_class
@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16, F64])
def test_empty_and_0_dim_parameters(row: Row, dtype: torch.dtype) -> None:
    shapes = [(0,), (), (3, 0), (1,), (0, 5, 0)]
    params = [nn.Parameter(values(*shape).to(dtype)) for shape in shapes]
    scalars = [nn.Parameter(params[i].detach().clone()) for i in (1, 3)]
    optimizer, other = row.make(params), row.make(scalars)
    for step in range(2):
        for i, p in enumerate([*params, *scalars]):
            p.grad = torch.full_like(p, 0.5 + step + (i == 3 or i == 6))
        optimizer.step()
        other.step()
    assert_same("parameter", [params[1], params[3]], scalars)
    assert not torch.equal(params[1], values().to(dtype))
