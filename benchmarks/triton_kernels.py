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
from fastlars.backends.triton.backend import LANES, OPTIONS, SMALL_OPTIONS, kernels, types_of
from fastlars.backends.triton.common import rule_argument
from fastlars.rules import GradientNorm, LambRule, LarsRule, RmspropWarmupRule

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
TARGETS = {
    **{f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 90, 100, 120)},
    **{arch: GPUTarget("hip", arch, 64) for arch in ("gfx90a", "gfx942", "gfx950")},
    **{arch: GPUTarget("hip", arch, 32) for arch in ("gfx1100", "gfx1201")},
}
# What is not said by a parameter's annotation.
TYPES = {
    "table": "*i64",
    "numel": "*i64",
    "chunks": "*i32",
    "first": "*i32",
    "device_scalars": "*fp64",
    "slots": "*fp64",
    "sums": "*fp64",
    "ratios": "*fp32",
    "count": "i32",
}
PLAIN = Dtypes(F32, F32, F32)
MIXES = {
    "float32": PLAIN,
    "bf16": Dtypes(BF16, BF16, BF16),
    "f16": Dtypes(F16, F16, F32),
    "copy": Dtypes(F32, BF16, F32, copy=F16),
    "stochastic": Dtypes(BF16, F32, F32),
}


@dataclass(frozen=True)
class Kernel:
    """A kernel, and what it is compiled with.

    Attributes:
        rule: with the options that take most registers; None for the kernels of sums.py.
        function: its name in the module of the rule, or in sums.py.
        reads: arrays of a tensor's elements that it reads.
        writes: those that it writes.
        typed: whether it is compiled for all of MIXES, and not for float32 alone.
        constants: arguments that are known at compile time.
    """

    rule: Any
    function: str
    reads: int = 0
    writes: int = 0
    typed: bool = False
    constants: tuple[tuple[str, Any], ...] = ()


LARS = LarsRule(nesterov=True, trust_clip=True)
RMSPROP = RmspropWarmupRule(center_steps=100.0, period_steps=50.0)
_TOTAL = (("COUNT", 2), ("LANES", LANES))
KERNELS = {
    "gradient norm": Kernel(GradientNorm(), "measure", 1, 0),
    "LARS measure": Kernel(LARS, "measure", 2, 0, typed=True),
    "LARS apply": Kernel(LARS, "apply", 3, 2, typed=True),
    "LARS apply without momentum": Kernel(LarsRule(momentum=0.0), "apply", 2, 1),
    "LAMB measure": Kernel(LambRule(), "measure", 4, 2, typed=True),
    "LAMB apply": Kernel(LambRule(), "apply", 3, 1, typed=True),
    "LAMB apply without sums": Kernel(LambRule(adapt=False), "apply", 4, 3),
    "RMSprop warm-up apply": Kernel(RMSPROP, "apply", 4, 3, typed=True),
    "total": Kernel(
        None, "total", constants=(*_TOTAL, ("ADVANCES", False), ("COUNTS_STEPS", False))
    ),
    "total and advance": Kernel(
        None, "total", constants=(*_TOTAL, ("ADVANCES", True), ("COUNTS_STEPS", True))
    ),
    "advance": Kernel(None, "advance", constants=(("COUNTS_STEPS", True), ("LANES", LANES))),
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


def warps(name: str) -> int:
    """The warps of a kernel's program."""
    return int(_module_and_options(KERNELS[name])[1]["num_warps"])


def compiled(name: str, target: GPUTarget, mix: str = "float32") -> Any:
    """A kernel of :data:`KERNELS`, compiled for types of :data:`MIXES`."""
    kernel, dtypes = KERNELS[name], MIXES[mix]
    module, options = _module_and_options(kernel)
    arguments: dict[str, Any] = dict(kernel.constants)
    if kernel.rule is not None:
        rounds = mix == "stochastic"
        arguments["rule"] = rule_argument(kernel.rule)
        arguments["types"] = types_of(dtypes, bool(kernel.rule.states), rounds)
        arguments["device_scalars"] = None
        if kernel.function == "apply" and not kernel.rule.adapt:
            arguments["sums"] = None
    return compile_for(target, getattr(module, kernel.function), options, **arguments)


def _module_and_options(kernel: Kernel) -> tuple[Any, dict[str, Any]]:
    if kernel.rule is None:
        return sums, SMALL_OPTIONS
    return kernels(kernel.rule.name)


def every() -> list[tuple[str, str]]:
    """The names of all kernels, each with the mixes that it is compiled for."""
    return [
        (name, mix)
        for name, kernel in KERNELS.items()
        for mix in (MIXES if kernel.typed else ["float32"])
    ]


__all__ = ["KERNELS", "MIXES", "OPTIONS", "TARGETS", "compile_for", "compiled", "every", "warps"]
