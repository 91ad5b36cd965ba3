"""The compiled CPU back end: the kernels of csrc/cpu."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from fastlars import _C
from fastlars.backends.base import (
    Mismatch,
    StepScalars,
    Tensors,
    checked_gradient_sums,
    checked_streams,
    checked_sums,
)
from fastlars.rules import GradientNorm, Rule

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
STATE_DTYPES = (torch.float32, torch.bfloat16)
DEFAULT_DISPATCH = Tensor.__torch_dispatch__


@lru_cache(maxsize=1024)  # a schedule of momentum or weight decay makes a new rule every step
def native_rule(rule: Rule | GradientNorm) -> Any:
    """The rule as the C++ struct of the same name."""
    return getattr(_C, type(rule).__name__)(**rule.constants)


@cache
def viewer() -> Any:
    """Reads addresses, types, shapes and strides of tensors and parameters. Subclasses must be
    accepted first: they may keep their elements elsewhere."""
    return _C.Viewer(Tensor, [Tensor, torch.nn.Parameter])


def address(tensor: Tensor | None) -> int:
    """The address of a tensor's first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


@dataclass(frozen=True)
class BoundTensors:
    """Checked tensors, and their addresses."""

    tensor_list: Any  # fastlars._C.TensorList
    tensors: Tensors  # kept alive, as the list has addresses alone

    def __len__(self) -> int:
        return len(self.tensors.weights)


class Cpu:
    """float32, bfloat16 and float16 weights and gradients in any mix; float32 or bfloat16 states.

    Sums of squares have the same bits in every run, for any number of threads.
    """

    name = "cpu"
    reads_device = False

    def layout(self, weights: list[Tensor]) -> Any:
        for tensor_type in set(map(type, weights)):
            viewer().accept(tensor_type)
        return _C.Layout(viewer(), weights)

    def bind(self, tensors: Tensors, layout: Any) -> BoundTensors:
        try:
            return BoundTensors(self._tensor_list(tensors, layout), tensors)
        except Mismatch as mismatch:
            # Gradients may be of a subclass that no weight has. It is accepted if it does not
            # override the dispatcher: its elements then are where DLPack says.
            types = set(map(type, tensors.grads))
            plain = all(getattr(t, "__torch_dispatch__", None) is DEFAULT_DISPATCH for t in types)
            if mismatch.args[0] != "grads" or mismatch.args[2] != "type" or not plain:
                raise
            for tensor_type in types:
                viewer().accept(tensor_type)
        return BoundTensors(self._tensor_list(tensors, layout), tensors)

    def _tensor_list(self, tensors: Tensors, layout: Any) -> Any:
        dtypes = tensors.dtypes
        return _C.tensor_list(
            layout,
            tensors.weights,
            tensors.grads,
            tensors.states,
            tensors.copies,
            tensors.counters,
            DTYPES[dtypes.weight],
            DTYPES[dtypes.grad],
            DTYPES[dtypes.state],
            DTYPES[dtypes.copy] if dtypes.copy is not None else 0,
        )

    def _call(
        self,
        call: Callable[..., None],
        rule: Rule | GradientNorm,
        bound: BoundTensors,
        scalars: StepScalars,
        *results: Tensor | None,
    ) -> None:
        """Call a function of the extension. ``results``: what it reads and writes per tensor."""
        here = torch.device("cpu")
        sums = checked_gradient_sums(rule, scalars, len(bound), here)
        streams = checked_streams(scalars, len(bound), here)
        bound.tensor_list.set_step(scalars.seed, address(sums), address(streams))
        addresses = map(address, results)
        call(native_rule(rule), bound.tensor_list, scalars.lr, scalars.gradient_scale, *addresses)

    def measure(
        self, rule: Rule | GradientNorm, bound: BoundTensors, scalars: StepScalars
    ) -> Tensor:
        sums = torch.empty((len(bound), rule.sums), dtype=torch.float64, device="cpu")
        self._call(_C.cpu_measure, rule, bound, scalars, sums)
        return sums

    def apply(
        self, rule: Rule, bound: BoundTensors, scalars: StepScalars, sums: Tensor | None
    ) -> Tensor:
        report = self._new_report(rule, bound)
        sums = checked_sums(rule, sums, len(bound), report.device)
        self._call(_C.cpu_apply, rule, bound, scalars, sums, report)
        return report

    def step(self, rule: Rule, bound: BoundTensors, scalars: StepScalars) -> Tensor:
        report = self._new_report(rule, bound)
        self._call(_C.cpu_step, rule, bound, scalars, report)
        return report

    def _new_report(self, rule: Rule, bound: BoundTensors) -> Tensor:
        return torch.empty((len(bound), 1 + rule.sums), dtype=torch.float32, device="cpu")


instruction_set: Callable[[], str] = _C.instruction_set
