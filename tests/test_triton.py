"""The Triton back end on machines without a GPU: interpreted, and compiled for GPUs elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from backend_cases import BF16, F16, F32, PLAIN
from child import passing, python
from fastlars.backends import choose, selfcheck
from fastlars.backends.base import Dtypes

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from fastlars.backends.triton import memory, sums  # noqa: E402
from fastlars.backends.triton.backend import (  # noqa: E402
    LANES,
    OPTIONS,
    Triton,
    is_interpreted,
    kernels,
    types_of,
)
from fastlars.backends.triton.common import rule_argument  # noqa: E402
from fastlars.backends.triton.table import AddressTable, ChunkTables  # noqa: E402
from fastlars.backends.upload import Uploader  # noqa: E402
from fastlars.rules import GradientNorm, LambRule, LarsRule, RmspropWarmupRule  # noqa: E402

BLOCK = memory.BLOCK.value
SM_90, GFX942 = GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)
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


@pytest.fixture(scope="session")
def interpreter() -> None:
    """Skips where Triton's interpreter takes no tensor in `range`, as sums.py gives it one."""
    done = python("tests/triton_range.py", TRITON_INTERPRET="1")
    if "only 0-dimensional arrays can be converted to Python scalars" in done.stdout:
        numpy = version("numpy")
        pytest.skip(f"Triton {triton.__version__} interprets no range of tensors, NumPy {numpy}")
    assert done.stdout.strip() == "7"


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(
    ("path", "quick", "whole"),
    [
        ("test_backends.py", 200, 290),
        ("test_core.py", 4, 4),
        ("test_trust.py", 10, 10),
        ("test_selfcheck.py", 25, 25),
        pytest.param("test_triton_bits.py", 45, 45, marks=pytest.mark.slow),
        pytest.param("test_rmsprop_warmup.py", 6, 6, marks=pytest.mark.slow),
        pytest.param("test_grad_norm.py", 72, 72, marks=pytest.mark.slow),
    ],
)
def test_interpreted(path: str, quick: int, whole: int, marks: str) -> None:
    options = ("-k", "triton", "-m", marks, "-W", "ignore::RuntimeWarning")
    assert passing(path, *options, TRITON_INTERPRET="1") >= (quick if marks else whole)


def test_tables_are_made_on_the_host_whatever_the_default_device() -> None:
    weights = [torch.ones(3), torch.ones(BLOCK + 1)]
    with torch.device("meta"):
        chunks = ChunkTables(weights, Uploader(weights))
        host = AddressTable(2, Uploader(weights))._host
    assert chunks.numel.tolist() == [3, BLOCK + 1]
    assert chunks.entries.tolist() == [[0, 0], [1, 0], [1, 1]]
    assert host.device.type == "cpu"


def test_interpreter_stays_in_its_own_process() -> None:
    assert "TRITON_INTERPRET" not in os.environ
    assert not is_interpreted()


# Which back end is chosen, and what a user is told.


def test_report_says_why() -> None:
    done = python("-m", "fastlars", FASTLARS_BACKEND="triton")
    assert "Triton serves cpu in its interpreter alone" in done.stdout
    assert f"triton     {triton.__version__}" in done.stdout


@pytest.mark.usefixtures("interpreter")
def test_report_of_the_interpreter() -> None:
    done = python("-m", "fastlars", FASTLARS_BACKEND="triton", TRITON_INTERPRET="1")
    assert "triton: FASTLARS_BACKEND asks for it" in done.stdout


def test_missing_triton_is_a_reason_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastlars.backends.triton.backend", None)
    reason = choose.why_no_triton.__wrapped__("cuda")
    assert reason.startswith("Triton cannot be imported (")
    assert reason.endswith("for other builds there is pip install 'fastlars[triton]'")


def test_a_compiler_that_fails_is_a_reason_not_an_error() -> None:
    # Without a GPU its driver is what fails, with one a device that Triton knows nothing of.
    device = torch.device("meta" if torch.cuda.is_available() else "cuda")
    tested = selfcheck.combination(LarsRule(), PLAIN)
    reason = selfcheck.difference(Triton(), tested, device)
    assert re.match(r"\w+: .", reason)
    assert "\n" not in reason


def test_a_device_that_triton_does_not_serve_gets_the_reference_with_one_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("FASTLARS_BACKEND", raising=False)
    monkeypatch.setattr(choose, "why_no_triton", lambda kind: "no C compiler was found")
    choose._warn_once.cache_clear()
    weight = torch.ones(3, device="meta")
    with pytest.warns(UserWarning, match="no C compiler was found"):
        chosen = choose.choose(weight, PLAIN, LarsRule())
    assert chosen.name == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose.choose(weight, PLAIN, LarsRule()) is chosen
    choose._warn_once.cache_clear()


# Generated code.


def _compile(kernel: Any, target: Any, options: dict[str, Any] = OPTIONS, **arguments: Any) -> Any:
    """``arguments``: what is known at compile time, and tuples; the others are arrays or floats."""
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


LARS = LarsRule(nesterov=True, trust_clip=True)
RMSPROP = RmspropWarmupRule(center_steps=100.0, period_steps=50.0)
# rule, its kernel, arrays read, arrays written
KERNELS: dict[str, tuple[Any, str, int, int]] = {
    "gradient norm": (GradientNorm(), "measure", 1, 0),
    "LARS measure": (LARS, "measure", 2, 0),
    "LARS apply": (LARS, "apply", 3, 2),
    "LARS apply without momentum": (LarsRule(momentum=0.0), "apply", 2, 1),
    "LAMB measure": (LambRule(), "measure", 4, 2),
    "LAMB apply": (LambRule(), "apply", 3, 1),
    "LAMB apply without sums": (LambRule(adapt=False), "apply", 4, 3),
    "RMSprop warm-up apply": (RMSPROP, "apply", 4, 3),
}

# Kernels that are compiled for all of TYPE_MIXES.
TYPED = ["LARS measure", "LARS apply", "LAMB measure", "LAMB apply", "RMSprop warm-up apply"]
TYPE_MIXES = {
    "bf16": Dtypes(BF16, BF16, BF16),
    "f16": Dtypes(F16, F16, F32),
    "copy": Dtypes(F32, BF16, F32, copy=F16),
    "stochastic": Dtypes(BF16, F32, F32),
}


def _compiled(name: str, target: Any, dtypes: Dtypes = PLAIN) -> tuple[Any, int]:
    """A kernel of KERNELS, and its warps."""
    rule, kernel, *_ = KERNELS[name]
    module, options = kernels(rule.name)
    arguments: dict[str, Any] = {
        "rule": rule_argument(rule),
        "types": types_of(dtypes, bool(rule.states), dtypes == TYPE_MIXES["stochastic"]),
        "device_scalars": None,
    }
    if kernel == "apply" and not rule.adapt:
        arguments["sums"] = None
    compiled = _compile(getattr(module, kernel), target, options, **arguments)
    return compiled, options["num_warps"]


def _dump(option: str, cubin: bytes, folder: Path) -> str:
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    tool = triton.knobs.nvidia.cuobjdump.path
    out = subprocess.run([tool, option, path], capture_output=True, text=True, check=True)
    return out.stdout + out.stderr


def _resources(cubin: bytes, folder: Path) -> dict[str, int]:
    usage = re.findall(r"\b(REG|STACK|LOCAL):(\d+)", _dump("-res-usage", cubin, folder))
    return {name: int(value) for name, value in usage}


def _assert_ieee(ptx: str) -> None:
    """Every multiplication rounds before the addition; nothing is approximate or flushed to 0."""
    wrong = set(
        re.findall(r"(?:fma\.rn\.f32|\w+\.approx[\w.]*|div\.full[\w.]*|\w+[\w.]*\.ftz)", ptx)
    )
    assert not wrong, wrong


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("name", KERNELS)
def test_sm_90_has_wide_accesses_and_no_spills(name: str, tmp_path: Path) -> None:
    *_, reads, writes = KERNELS[name]
    compiled, warps = _compiled(name, SM_90)
    ptx = compiled.asm["ptx"]
    _assert_ieee(ptx)
    each = BLOCK // (warps * 32) // 4  # accesses of 4 floats by a thread
    assert len(re.findall(r"ld\.global[\w.]*\.v4\.b32", ptx)) >= reads * each
    assert len(re.findall(r"st\.global[\w.]*\.v4\.b32", ptx)) >= writes * each
    if "LARS" in name:  # square roots and divisions of float32, which others have, are made of them
        sass = _dump("-sass", compiled.asm["cubin"], tmp_path)
        assert "FMUL" in sass
        # A division in float64 has one; an update would have one for each of its elements.
        assert sass.count("FFMA") < 4 * each
    usage = _resources(compiled.asm["cubin"], tmp_path)
    assert usage["STACK"] == usage["LOCAL"] == 0
    # 512 threads at least share the 65,536 registers of a multiprocessor.
    assert usage["REG"] <= 128


@pytest.mark.slow
@pytest.mark.parametrize("dtypes", TYPE_MIXES)
@pytest.mark.parametrize("name", TYPED)
def test_sm_90_compiles_every_type_without_spills_in_whole_chunks(
    name: str, dtypes: str, tmp_path: Path
) -> None:
    compiled, _ = _compiled(name, SM_90, TYPE_MIXES[dtypes])
    _assert_ieee(compiled.asm["ptx"])
    assert re.search(r"ld\.global[\w.]*\.v4\.b32", compiled.asm["ptx"])
    sass = _dump("-sass", compiled.asm["cubin"], tmp_path)
    # Wide accesses are those of whole chunks. What follows them works on the last chunk of a
    # tensor, where ptxas spills two registers to have three blocks on a multiprocessor.
    assert not re.search(r"\b(STL|LDL)\b", sass[: sass.rindex("G.E.128")])
    assert _resources(compiled.asm["cubin"], tmp_path)["STACK"] <= 8


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_gfx942_has_wide_accesses_and_no_spills(name: str) -> None:
    *_, reads, writes = KERNELS[name]
    compiled, warps = _compiled(name, GFX942)
    code = compiled.asm["amdgcn"]
    each = BLOCK // (warps * 64) // 4
    assert len(re.findall(r"(?:buffer|global)_load_dwordx4", code)) >= reads * each
    assert len(re.findall(r"(?:buffer|global)_store_dwordx4", code)) >= writes * each
    spills = re.findall(
        r"\.(?:vgpr_spill_count|sgpr_spill_count|private_segment_fixed_size):\s*(\d+)", code
    )
    assert spills
    assert set(spills) == {"0"}


@pytest.mark.slow
@pytest.mark.parametrize("dtypes", TYPE_MIXES)
@pytest.mark.parametrize("name", TYPED)
def test_gfx942_compiles_every_type(name: str, dtypes: str) -> None:
    compiled, _ = _compiled(name, GFX942, TYPE_MIXES[dtypes])
    assert re.search(r"\.vgpr_spill_count:\s*0\b", compiled.asm["amdgcn"])


@pytest.mark.parametrize("target", [SM_90, GFX942], ids=["sm_90", "gfx942"])
@pytest.mark.parametrize("counts", [False, True])
def test_tables_compile_with_numbers_on_the_device(target: Any, counts: bool) -> None:
    common: dict[str, Any] = {"COUNTS_STEPS": counts, "LANES": LANES}
    assert _compile(sums.total, target, COUNT=3, ADVANCES=True, **common).asm
    assert _compile(sums.advance, target, **common).asm
