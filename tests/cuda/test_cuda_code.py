"""The machine code of the CUDA kernels, which needs no GPU to be looked at.

What is looked at is the extension as it was installed, with the disassembler that Triton brings.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from fastlars import _C
from fastlars.rules import RULES, GradientNorm, LambRule

INFO = _C.build_info()
ARCHITECTURES = re.findall(r"\d+", INFO["cuda_archs"])
REGISTERS = 65536  # of a multiprocessor

pytestmark = [
    pytest.mark.skipif(not INFO["cuda"], reason=f"no CUDA kernels here: {INFO['cuda_reason']}"),
    pytest.mark.xdist_group("cuda code"),
]
on_sm_90 = pytest.mark.skipif(
    INFO["cuda"] and "90" not in ARCHITECTURES,
    reason=f"built for {INFO['cuda_archs']} alone; what is expected was found out for sm_90",
)

# Threads of a block: one warp of `step` schedules.
THREADS = {"measure": 256, "apply": 256, "step": 288}

# kernel: blocks that a multiprocessor must hold, 16-byte loads that a thread must have in flight
# before it computes, 16-byte stores. `Float32Only` has float32 tensors alone, `RuntimeDtypes` all.
KERNELS = {
    "measure<GradientNorm, Float32Only>": (4, 4, 0),
    "measure<GradientNorm, RuntimeDtypes>": (4, 4, 0),
    "measure<LarsRule, Float32Only>": (4, 8, 0),
    "measure<LarsRule, RuntimeDtypes>": (4, 8, 0),
    "measure<PlainLamb, Float32Only>": (3, 8, 2),
    "measure<PlainLamb, RuntimeDtypes>": (3, 8, 2),
    "apply<LarsRule, Float32Only, global>": (3, 12, 8),
    "apply<LarsRule, RuntimeDtypes, global>": (3, 12, 8),
    "apply<LarsRule, RuntimeDtypes, global, stochastic>": (3, 12, 4),
    "apply<PlainLamb, Float32Only, global>": (3, 12, 4),
    "apply<PlainLamb, RuntimeDtypes, global>": (3, 12, 4),
    "apply<PlainLamb, RuntimeDtypes, global, stochastic>": (3, 12, 0),
    "apply<PlainLamb, Float32Only, fused>": (3, 8, 3),
    "apply<PlainLamb, RuntimeDtypes, fused>": (2, 8, 3),
    "apply<PlainLamb, RuntimeDtypes, fused, stochastic>": (2, 8, 2),
    "measure<NesterovLamb, Float32Only>": (2, 8, 2),
    "measure<NesterovLamb, RuntimeDtypes>": (2, 8, 2),
    "apply<NesterovLamb, Float32Only, global>": (3, 8, 2),
    "apply<NesterovLamb, RuntimeDtypes, global>": (3, 8, 2),
    "apply<NesterovLamb, RuntimeDtypes, global, stochastic>": (3, 8, 0),
    "apply<NesterovLamb, Float32Only, fused>": (3, 8, 3),
    "apply<NesterovLamb, RuntimeDtypes, fused>": (2, 8, 3),
    "apply<NesterovLamb, RuntimeDtypes, fused, stochastic>": (2, 8, 2),
    "step<NesterovLamb, Float32Only>": (2, 8, 4),
    "step<NesterovLamb, RuntimeDtypes>": (2, 8, 4),
    "measure<LansRule, Float32Only>": (3, 8, 2),
    "measure<LansRule, RuntimeDtypes>": (3, 4, 2),
    "apply<LansRule, Float32Only, global>": (3, 8, 2),
    "apply<LansRule, RuntimeDtypes, global>": (3, 8, 2),
    "apply<LansRule, RuntimeDtypes, global, stochastic>": (3, 8, 0),
    "apply<LansRule, Float32Only, fused>": (3, 8, 3),
    "apply<LansRule, RuntimeDtypes, fused>": (2, 8, 3),
    "apply<LansRule, RuntimeDtypes, fused, stochastic>": (2, 8, 2),
    "apply<RmspropWarmupRule, Float32Only, fused>": (3, 12, 14),
    "apply<RmspropWarmupRule, RuntimeDtypes, fused>": (2, 12, 14),
    "apply<RmspropWarmupRule, RuntimeDtypes, fused, stochastic>": (2, 12, 8),
    "step<LarsRule, Float32Only>": (3, 8, 4),
    "step<LarsRule, RuntimeDtypes>": (2, 8, 4),
    "step<PlainLamb, Float32Only>": (3, 8, 4),
    "step<PlainLamb, RuntimeDtypes>": (2, 8, 4),
    "step<LansRule, Float32Only>": (3, 8, 4),
    "step<LansRule, RuntimeDtypes>": (2, 8, 4),
}
# As csrc/cuda/block.cuh numbers OperandSource.
SOURCES = ("global", "shared", "evicted", "fused")
# LAMB's kernels are named after the forms of it that csrc/cuda/lamb.cu tells apart.
RULE_NAMES = [rule.__name__ for rule in (GradientNorm, *RULES) if rule is not LambRule]
NAMES = "|".join([*RULE_NAMES, "PlainLamb", "NesterovLamb"])


def cuobjdump(*options: str) -> str:
    """What the disassembler says of the extension."""
    triton = find_spec("triton")
    found = [shutil.which("cuobjdump")]
    if triton is not None and triton.origin is not None:
        found.append(str(Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"))
    for path in found:
        if path and Path(path).exists():
            command = [path, *options, _C.__file__]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    pytest.skip("no cuobjdump: neither in PATH nor in a triton package")


def short(mangled: str) -> str:
    """A kernel's name as in KERNELS."""
    name = re.search(rf"kernels\d(measure|apply|step)I\w*?\d({NAMES})E", mangled)
    if name is None:
        return mangled
    words = [name[2], "Float32Only" if "Float32Only" in mangled else "RuntimeDtypes"]
    how = re.search(r"OperandSourceE(\d)ELb([01])", mangled)
    if how is not None:
        words += [SOURCES[int(how[1])], *(["stochastic"] if how[2] == "1" else [])]
    return f"{name[1]}<{', '.join(words)}>"


@cache
def usage() -> dict[str, dict[str, int]]:
    """Registers, stack and local memory of every kernel."""
    text = cuobjdump("-res-usage", "-arch", "sm_90")
    found = re.findall(r"Function (\S+):\s+(REG:.*)", text)
    return {
        short(name): {k: int(v) for k, v in re.findall(r"([A-Z]+):(\d+)", line)}
        for name, line in found
    }


@cache
def code() -> dict[str, list[str]]:
    """Every kernel's instructions."""
    parts = re.split(r"\n\s*Function : ", cuobjdump("-sass", "-arch", "sm_90"))[1:]
    pattern = r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)"
    return {short(part.split("\n", 1)[0]): re.findall(pattern, part) for part in parts}


def in_flight(instructions: list[str]) -> int:
    """The most 16-byte loads that are issued without any arithmetic or store between them."""
    most = run = 0
    for name in instructions:
        if re.match(r"LDG\b.*\.128\b", name):
            run += 1
            most = max(most, run)
        elif re.match(r"(FADD|FMUL|FFMA|DADD|DMUL|DFMA|MUFU|STG|BAR)\b", name):
            run = 0
    return most


@on_sm_90
def test_every_kernel_is_expected() -> None:
    assert set(usage()) - set(KERNELS) <= {name for name in usage() if "probe" in name}
    assert set(KERNELS) <= set(usage())
    assert set(KERNELS) <= set(code())


@on_sm_90
@pytest.mark.parametrize("kernel", KERNELS)
def test_registers_suffice_for_the_blocks_and_nothing_is_spilled(kernel: str) -> None:
    used, blocks = usage()[kernel], KERNELS[kernel][0]
    assert used["REG"] * THREADS[kernel.split("<")[0]] * blocks <= REGISTERS
    assert (used["STACK"], used["LOCAL"]) == (0, 0)
    local = [name for name in code()[kernel] if re.match(r"(LDL|STL)\b", name)]
    assert not local


@on_sm_90
@pytest.mark.parametrize("kernel", KERNELS)
def test_loads_are_wide_and_in_flight_together(kernel: str) -> None:
    _, loads, stores = KERNELS[kernel]
    assert in_flight(code()[kernel]) >= loads
    wide = [name for name in code()[kernel] if re.match(r"STG\b.*\.128\b", name)]
    assert len(wide) >= stores


@on_sm_90
@pytest.mark.parametrize("kernel", [name for name in KERNELS if "apply" not in name])
def test_sums_are_made_without_float_atomics(kernel: str) -> None:
    atomics = [name for name in code()[kernel] if re.match(r"(ATOM|RED|ATOMG)\b", name)]
    assert atomics
    assert not [name for name in atomics if re.search(r"\.F(16|32|64)|BF16", name)]


def test_every_architecture_is_in_the_binary() -> None:
    for arch in ARCHITECTURES:
        assert f".sm_{arch}." in cuobjdump("--list-elf"), arch
    virtual = [a for a in INFO["cuda_archs"].split() if "-real" not in a]
    for arch in virtual:
        assert f".sm_{arch}.ptx" in cuobjdump("--list-ptx"), arch
    assert virtual, "GPUs younger than the compiler need PTX"
