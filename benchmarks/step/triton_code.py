"""Compiles all of Triton's kernels for GPUs that are not here, and writes what their code needs.

``make triton-code`` writes benchmarks/results/triton_code.csv; without ``--out`` this prints it.
Columns: the kernel and its types, the GPU, Triton's version; per thread registers, spilled
registers (of NVIDIA's code: the instructions that spill and load again) and bytes of stack; shared
memory of a program; machine instructions; those that work in float64; loads and stores of global
memory that move 16 bytes at once.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks import RESULTS, results

NAMES = ("kernel", "types", "target", "triton")
COUNTS = ("registers", "spills", "stack", "shared", "instructions", "float64", "wide")
TABLE = RESULTS / "triton_code.csv"
Row = dict[str, Any]
Job = tuple[str, str, str]  # kernel, types, target

# Opcodes of NVIDIA's that compute in float64 or convert to or from it.
_NVIDIA_F64 = r"D(ADD|MUL|FMA|SETP|MNMX|MMA)\b|MUFU\.\w*64H|\w+\.(\w+\.)*F64"
# In PTX: multiplications that do not round before an addition, and what is approximate or flushes
# subnormal numbers to 0. Kernels have none, so that all back ends round alike.
_INEXACT = re.compile(r"fma\.rn\.f32|\w+\.approx[\w.]*|div\.full[\w.]*|\w+[\w.]*\.ftz")
_AMD_F64 = r"v_\w*f64"


def _tool(option: str, cubin: Path) -> str:
    import triton

    command = [triton.knobs.nvidia.cuobjdump.path, option, str(cubin)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def of_nvidia(cubin: bytes) -> dict[str, int]:
    """What a kernel's code for NVIDIA needs."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        found = re.findall(r"\b(REG|STACK|LOCAL):(\d+)", _tool("-res-usage", path))
        sass = _tool("-sass", path)
    usage = {name: int(value) for name, value in found}
    # Without the predicate, as in @!P0.
    code = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@\S+\s+)?([A-Z][\w.]*)", sass, re.MULTILINE)
    code = [each for each in code if each != "NOP"]
    assert len(code) > 10, sass[:2000]
    return {
        "registers": usage["REG"],
        "spills": _count(r"STL\b|LDL\b", code),
        "stack": usage["STACK"] + usage["LOCAL"],
        "instructions": len(code),
        "float64": _count(_NVIDIA_F64, code),
        "wide": _count(r"(LD|ST)G?\.(\w+\.)*128\b", code),
    }


def of_amd(text: str) -> dict[str, int]:
    """What a kernel's code for AMD needs."""
    usage = {k: int(v) for k, v in re.findall(r"^\s+\.(\w+):\s+(\d+)\s*$", text, re.MULTILINE)}
    code = re.findall(r"^\t((?:v|s|ds|global|buffer|flat|scratch)_\w+)", text, re.MULTILINE)
    code = [each for each in code if each not in ("s_nop", "s_code_end")]
    assert len(code) > 10, text[:2000]
    return {
        "registers": usage["vgpr_count"],
        "spills": usage["vgpr_spill_count"] + usage["sgpr_spill_count"],
        "stack": usage["private_segment_fixed_size"],
        "instructions": len(code),
        "float64": _count(_AMD_F64, code),
        "wide": _count(r"(global|buffer|flat)_(load|store)_(dwordx4|b128)", code),
    }


def _count(pattern: str, code: Iterable[str]) -> int:
    return sum(bool(re.match(pattern, each)) for each in code)


def row(name: str, mix: str, target: str) -> Row:
    """Compile a kernel, and read its code."""
    import triton

    from benchmarks.step.triton_kernels import TARGETS, compiled

    made = compiled(name, TARGETS[target], mix)
    if inexact := set(_INEXACT.findall(made.asm.get("ptx", ""))):
        raise RuntimeError(f"operations that do not round as IEEE 754 requires: {inexact}")
    found = of_nvidia(made.asm["cubin"]) if target.startswith("sm_") else of_amd(made.asm["amdgcn"])
    found["shared"] = made.metadata.shared
    names = {"kernel": name, "types": mix, "target": target, "triton": triton.__version__}
    return {**names, **{key: found[key] for key in COUNTS}}


def _row(job: Job) -> Row:
    try:
        return row(*job)
    except Exception as error:
        raise RuntimeError(f"{', '.join(job)}: {error}") from None


def _use_cache(folder: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = folder


def rows(jobs: Sequence[Job], processes: int = 2) -> list[Row]:
    """A row for each job. Nothing is taken from Triton's cache."""
    with tempfile.TemporaryDirectory() as folder:
        # Not forked: torch may have threads already.
        pool = ProcessPoolExecutor(processes, get_context("spawn"), _use_cache, (folder,))
        with pool:
            return list(pool.map(_row, jobs, chunksize=4))


def read(path: Path) -> list[Row]:
    """The rows of a written table."""
    return [
        {key: int(value) if key in COUNTS else value for key, value in each.items()}
        for each in results.read_csv(path)
    ]


def main() -> None:
    from benchmarks.step.triton_kernels import TARGETS, every

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="a CSV file; without it the table is printed")
    parser.add_argument("--targets", nargs="*", default=list(TARGETS), choices=list(TARGETS))
    given = parser.parse_args()
    jobs = [(name, mix, target) for target, (name, mix) in product(given.targets, every())]
    found = rows(jobs)
    if given.out:
        results.write_csv(given.out, found)
    else:
        print(results.plain_table(found))


if __name__ == "__main__":
    main()
