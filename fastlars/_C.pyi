from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

class Mismatch(ValueError): ...
class CudaError(RuntimeError): ...

class Viewer:
    def __init__(self, tensor_type: type, accepted: Sequence[type]) -> None: ...
    def accept(self, type: type) -> None: ...

class Layout:
    def __init__(self, viewer: Viewer, weights: list[Tensor]) -> None: ...

class TensorList:
    def set_step(self, seed: int | None, gradient_sums: int, random_streams: int) -> None: ...
    def write_table(self, table: int) -> bool: ...

TABLE_COLUMNS: int

# There also is a class for each rule of fastlars.rules, of the same name. Its arguments are the
# rule's `constants`.

def tensor_list(
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
def gradients(params: list[Tensor], known: list[Tensor], types: list[type]) -> list[Any] | None: ...
def column(states: list[dict[str, Any]], name: str) -> list[Tensor]: ...
def holds(dict: dict[Any, Any], values: list[Any]) -> bool: ...
def cpu_measure(
    rule: Any,
    tensors: TensorList,
    lr: float,
    gradient_scale: float,
    sums: int,
) -> None: ...
def cpu_apply(
    rule: Any,
    tensors: TensorList,
    lr: float,
    gradient_scale: float,
    sums: int,
    report: int,
) -> None: ...
def cpu_step(
    rule: Any,
    tensors: TensorList,
    lr: float,
    gradient_scale: float,
    report: int,
) -> None: ...
def instruction_set() -> str: ...
def build_info() -> dict[str, Any]: ...

# The names below and CudaError exist only if build_info()["cuda"] is True.

class CudaScalars:
    def __init__(
        self,
        lr: float,
        gradient_scale: float,
        addresses: Sequence[tuple[int, bool]],
        limit: float,
    ) -> None: ...

class CudaChunkTable:
    chunk_entry_bytes: ClassVar[int]
    tensor_entry_bytes: ClassVar[int]
    def __init__(self, layout: Layout) -> None: ...
    @property
    def tensors(self) -> int: ...
    @property
    def chunks(self) -> int: ...
    @property
    def workspace_bytes(self) -> int: ...
    def write_chunk_entries(self, address: int) -> None: ...
    def write_tensor_entries(self, tensors: TensorList, address: int) -> bool: ...
    def place(self, chunk_entries: int, tensor_entries: int, workspace: int) -> None: ...

def cuda_measure(
    rule: Any,
    tensors: TensorList,
    table: CudaChunkTable,
    scalars: CudaScalars,
    sums: int,
    stream: int,
    grid: int,
) -> None: ...
def cuda_apply(
    rule: Any,
    tensors: TensorList,
    table: CudaChunkTable,
    scalars: CudaScalars,
    sums: int,
    report: int,
    stream: int,
    grid: int,
) -> None: ...
def cuda_step(
    rule: Any,
    tensors: TensorList,
    table: CudaChunkTable,
    scalars: CudaScalars,
    report: int,
    stream: int,
    grid: int,
    shared_slots: int,
) -> None: ...
def cuda_why_not() -> str: ...
