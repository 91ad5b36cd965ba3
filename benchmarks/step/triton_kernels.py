"""Triton's kernels with arguments of a step, compiled for GPUs that need not be here.

The one list of them: triton_code.py measures the code that Triton makes of each, tests hold rules
that it must keep. ``compiled(NAME, TARGET)`` compiles one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastlars.backends.base import Dtypes
from fastlars.backends.triton import sums
from fastlars.backends.triton.backend import LANES, SMALL_OPTIONS, kernels, types_of
from fastlars.backends.triton.common import rule_argument
from fastlars.rules import GradientNorm, LambRule, LansRule, LarsRule, RmspropWarmupRule

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
TARGETS = {
    **{f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 90, 100, 120)},
    **{arch: GPUTarget("hip", arch, 64) for arch in ("gfx90a", "gfx942", "gfx950")},
    **{arch: GPUTarget("hip", arch, 32) for arch in ("gfx1100", "gfx1201")},
}
# What is not said by a parameter's annotation.
TYPES = {
    **dict.fromkeys(("table", "numel", "sizes"), "*i64"),
    **dict.fromkeys(("chunks", "first_chunk", "streams"), "*i32"),
    **dict.fromkeys(("gradient_slots", "gradient_sums", "slots", "sums"), "*fp64"),
    "device_scalars": "*fp64",
    **dict.fromkeys(("report", "coefficient_table"), "*fp32"),
}
PLAIN = Dtypes(F32, F32, F32)
MIXES = {
    "float32": PLAIN,
    "bf16": Dtypes(BF16, BF16, BF16),
    "f16": Dtypes(F16, F16, F32),
    "copy": Dtypes(F32, BF16, F32, copy=F16),
    "stochastic": Dtypes(BF16, F32, F32),
}


NORMS = ("gradient_slots", "gradient_sums")


@dataclass(frozen=True)
class Kernel:
    """A kernel, and what it is compiled with.

    Attributes:
        rule: with the options that take most registers; None for ``total`` of sums.py.
        function: its name in the module of the rule, or in sums.py.
        reads: arrays of a tensor's elements that it reads.
        writes: those that it writes.
        last: those of ``reads`` that the step does not read again.
        typed: whether it is compiled for all of MIXES, and not for float32 alone.
        absent: pointers that are None.
    """

    rule: Any
    function: str
    reads: int = 0
    writes: int = 0
    last: int = 0
    typed: bool = False
    absent: tuple[str, ...] = ("device_scalars", *NORMS)

    @property
    def by_tensor(self) -> bool:
        """Whether a program works on a tensor, and not on a chunk of one."""
        return self.reads == 0


LARS = LarsRule(nesterov=True, trust_clip=True)
NN_LAMB = LambRule(nesterov="both")
RMSPROP = RmspropWarmupRule(center_steps=100.0, period_steps=50.0)
KERNELS = {
    "gradient norm": Kernel(GradientNorm(), "measure", 1),
    "LARS measure": Kernel(LARS, "measure", 2, typed=True),
    "LARS prepare": Kernel(LARS, "prepare", absent=("sums", "device_scalars", *NORMS)),
    "LARS apply": Kernel(LARS, "apply", 3, 2, 3, typed=True),
    "LARS apply without momentum": Kernel(LarsRule(momentum=0.0), "apply", 2, 1, 2),
    "LAMB prepare before measure": Kernel(
        LambRule(), "prepare", absent=("slots", "sums", "report", "device_scalars", *NORMS)
    ),
    "LAMB measure": Kernel(LambRule(), "measure", 4, 2, 1, typed=True),
    "LAMB prepare": Kernel(LambRule(), "prepare", absent=("sums", *NORMS)),
    "LAMB apply": Kernel(LambRule(), "apply", 3, 1, 3, typed=True),
    "LAMB apply without sums": Kernel(LambRule(adapt=False), "apply", 4, 3, 3),
    "NN-LAMB measure": Kernel(NN_LAMB, "measure", 4, 2),
    "NN-LAMB prepare": Kernel(NN_LAMB, "prepare", absent=("sums", *NORMS)),
    "NN-LAMB apply": Kernel(NN_LAMB, "apply", 4, 1, 4),
    "LANS prepare before measure": Kernel(
        LansRule(), "prepare", absent=("slots", "sums", "report", "device_scalars", "gradient_sums")
    ),
    "LANS measure": Kernel(LansRule(), "measure", 4, 2, typed=True),
    "LANS prepare": Kernel(LansRule(), "prepare", absent=("sums", "gradient_sums")),
    "LANS apply": Kernel(LansRule(), "apply", 4, 1, 4, typed=True),
    "LANS apply without sums": Kernel(LansRule(adapt=False), "apply", 4, 3, 4),
    "RMSprop warm-up prepare": Kernel(
        RMSPROP, "prepare", absent=("slots", "sums", "device_scalars", *NORMS)
    ),
    "RMSprop warm-up apply": Kernel(RMSPROP, "apply", 4, 3, 3, typed=True),
    "total": Kernel(None, "total"),
}


def compile_for(target: GPUTarget, kernel: Any, options: dict[str, Any], **arguments: Any) -> Any:
    """Compile a kernel. ``arguments``: what is known at compile time, and tuples; the others are
    arrays or floats."""
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    aligned = {}
    for i, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments.get(parameter.name)
        if isinstance(value, tuple):
            runtime = [isinstance(each, int) for each in value]
            signature[name] = type(value)(*("i64" if x else "constexpr" for x in runtime))
            constants |= {(i, j): x for j, x in enumerate(value) if not runtime[j]}
        elif name in arguments:
            signature[name] = "constexpr"
            constants[(i,)] = value
        else:
            signature[name] = TYPES.get(name, parameter.annotation_type)
            if signature[name].startswith("*"):
                aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=target, options=options)


def compiled(name: str, target: GPUTarget, mix: str = "float32") -> Any:
    """A kernel of :data:`KERNELS`, compiled for types of :data:`MIXES`."""
    kernel, dtypes = KERNELS[name], MIXES[mix]
    options = SMALL_OPTIONS if kernel.by_tensor else kernels(kernel.rule).options
    arguments: dict[str, Any] = {"COUNT": 2, "LANES": LANES, **dict.fromkeys(kernel.absent)}
    module: Any = sums
    if kernel.rule is not None:
        module = kernels(kernel.rule).module
        arguments["rule"] = rule_argument(kernel.rule)
        rounds = mix == "stochastic"
        arguments["types"] = types_of(dtypes, bool(kernel.rule.states), rounds)
        if not rounds:
            arguments["streams"] = None
    return compile_for(target, getattr(module, kernel.function), options, **arguments)


def every() -> list[tuple[str, str]]:
    """The names of all kernels, each with the mixes that it is compiled for."""
    return [
        (name, mix)
        for name, kernel in KERNELS.items()
        for mix in (MIXES if kernel.typed else ["float32"])
    ]
