from collections.abc import Sequence
from typing import Any

from torch import Tensor

class Mismatch(ValueError): ...

class Viewer:
    def __init__(self, tensor_type: type, accepted: Sequence[type]) -> None: ...
    def accept(self, type: type) -> None: ...

class Layout:
    def __init__(self, viewer: Viewer, weights: list[Tensor]) -> None: ...

class TensorList:
    def write_table(self, table: int) -> bool: ...

class GradientNorm: ...

class LarsRule:
    def __init__(
        self,
        *,
        momentum: float,
        dampening: float,
        weight_decay: float,
        trust_coefficient: float,
        eps: float,
        buffer: int,
        combined: bool,
        nesterov: bool,
        momentum_correction: bool,
        trust_clip: bool,
        adapt: bool,
    ) -> None: ...

class LambRule:
    def __init__(
        self,
        *,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        lower: float,
        upper: float,
        ratio_eps: float,
        decay: int,
        correction: int,
        gradient_averaging: bool,
        trust_clip: bool,
        adapt: bool,
    ) -> None: ...

NativeRule = LarsRule | LambRule

def bind(
    layout: Layout,
    weights: list[Tensor],
    grads: list[Tensor],
    states: Sequence[list[Tensor]],
    copies: list[Tensor] | None,
    counters: list[Tensor] | None,
    weight_dtype: int,
    grad_dtype: int,
    state_dtype: int,
    copy_dtype: int,
) -> TensorList: ...
def cpu_measure(
    rule: NativeRule | GradientNorm,
    tensors: TensorList,
    lr: float,
    gradient_scale: float,
    sums: int,
) -> None: ...
def cpu_apply(
    rule: NativeRule,
    tensors: TensorList,
    lr: float,
    gradient_scale: float,
    seed: int | None,
    sums: int,
    ratios: int,
) -> None: ...
def cpu_step(
    rule: NativeRule,
    tensors: TensorList,
    lr: float,
    gradient_scale: float,
    seed: int | None,
    ratios: int,
) -> None: ...
def instruction_set() -> str: ...
def build_info() -> dict[str, Any]: ...
