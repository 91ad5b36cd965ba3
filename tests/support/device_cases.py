"""What the tests of the back ends for GPUs share: their devices, and runs whose tensors lie there.

Triton's kernels run on CPU tensors where they are interpreted, those of CUDA where they were
compiled for the CPU; each in a process of its own.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

import fastlars
from backend_cases import DEFAULTS, OPTIONS, Dtypes, Row, Run
from fastlars import _C
from fastlars.backends import cuda
from fastlars.backends.base import Tensors
from optimizers import SIMPLE
from problems import PROBLEMS, Entry, Problem
from tolerances import assert_same_bits

INTERPRETED = "TRITON_INTERPRET" in os.environ
BUILT = _C.build_info()["cuda"]
EMULATED = BUILT and cuda.kernel_device_type() == "cpu"
DEVICES = {"triton": "cpu" if INTERPRETED else "cuda", "cuda": "cpu" if EMULATED else "cuda"}
# Triton compiles, or interprets, every row anew. test_backends.py has them all.
SOME_ROWS = (*DEFAULTS, *OPTIONS[::5])
LAYOUTS = next(problem for problem in PROBLEMS if problem.name == "layouts")
NEEDS_KERNELS = pytest.mark.skipif(
    not BUILT, reason=f"the CUDA kernels were not built: {_C.build_info()['cuda_reason']}"
)


def marks(backend: str) -> list[pytest.MarkDecorator]:
    """What a module of tests of one back end is marked with."""
    on_gpu = [pytest.mark.gpu] if DEVICES[backend] == "cuda" else []
    return [*on_gpu, NEEDS_KERNELS] if backend == "cuda" else on_gpu


def _sizes(generator: torch.Generator) -> list[Entry]:
    """Ends of chunks and of Philox's blocks."""
    values = [torch.randn(size, generator=generator) for size in (4095, 4096, 8199, 0, 7)]
    return [Entry(w, (0.1 * w.flip(0) + 0.01, 0.2 * w)) for w in values]


SIZES = Problem("sizes", _sizes)


def _subnormal(generator: torch.Generator) -> list[Entry]:
    weight = torch.randn(300, generator=generator)
    return [Entry(weight, (1e-41 * weight.flip(0), 2e-41 * weight))]


SUBNORMAL = Problem("subnormal gradients", _subnormal, half_range=False)


def there(tensors: list[Tensor], device: str) -> list[Tensor]:
    """Copies on a device. A view that begins off a 16-byte boundary stays one."""
    bases = [(tensor if tensor._base is None else tensor._base).to(device) for tensor in tensors]
    places = [(tensor.shape, tensor.stride(), tensor.storage_offset()) for tensor in tensors]
    return [base.as_strided(*place) for base, place in zip(bases, places, strict=True)]


def moved(tensors: Tensors, device: str) -> Tensors:
    """All of a run's tensors on a device."""
    return Tensors(
        there(tensors.weights, device),
        there(tensors.grads, device),
        tuple(there(state, device) for state in tensors.states),
        None if tensors.counters is None else there(tensors.counters, device),
        None if tensors.copies is None else there(tensors.copies, device),
        tensors.dtypes,
    )


class Twin(Run):
    """A run of a back end for GPUs, its tensors on the device."""

    def __init__(self, backend: str, row: Row, dtypes: Dtypes, problem: Problem) -> None:
        super().__init__(backend, row, dtypes, problem)
        self.device = DEVICES[backend]
        self.tensors = moved(self.tensors, self.device)

    def take_gradients(self, step: int) -> None:
        super().take_gradients(step)
        self.tensors.grads = there(self.tensors.grads, self.device)

    def at_home(self) -> Run:
        """The same run with its tensors as they are now, on the CPU."""
        run = copy.copy(self)
        run.tensors = moved(self.tensors, "cpu")
        return run


def assert_same_runs(what: str, a: Run, b: Run) -> None:
    """Everything that the two have written has the same bits."""
    for (name, x), (_, y) in zip(a.written(), b.written(), strict=True):
        assert_same_bits(f"{what}: {name}", x.cpu(), y.cpu())


# The optimizers.

NEEDED = {row.kind.__name__: row.needed for row in SIMPLE}
CLASSES = tuple(NEEDED)


def optimizer(
    name: str,
    device: str | torch.device,
    shapes: Iterable[tuple[int, ...]] = ((50,), (7,)),
    **options: object,
) -> tuple[list[Tensor], fastlars.LARS]:
    """Parameters, the same on every device, and an optimizer of that class."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    params = [torch.nn.Parameter(value.to(device)) for value in values]
    made = getattr(fastlars, name)(
        params, **{"lr": 0.1, "weight_decay": 0.1, **NEEDED[name], **options}
    )
    return list(params), made


def set_gradients(params: list[Tensor], step: int) -> None:
    """Gradients that depend on the step alone."""
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.device)
