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

import backend_cases
from child import passing, python
from fastlars.backends import choose, selfcheck

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from fastlars.backends.sending import Sender  # noqa: E402
from fastlars.backends.triton import lamb, lars, rmsprop_warmup, sums  # noqa: E402
from fastlars.backends.triton.backend import Triton, choices, interprets  # noqa: E402
from fastlars.backends.triton.launch import LARGE_OPTIONS, OPTIONS  # noqa: E402
from fastlars.backends.triton.table import BLOCK, Addresses, Chunks  # noqa: E402
from fastlars.rules import LambRule, LarsRule  # noqa: E402

F32, BF16, F16 = tl.float32, tl.bfloat16, tl.float16
SM_90, GFX942 = GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)
POINTERS = {
    "table": "*i64",
    "numel": "*i64",
    "chunks": "*i32",
    "slots": "*fp64",
    "sums": "*fp64",
    "ratios": "*fp32",
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
        chunks = Chunks(weights, Sender(weights))
        host = Addresses(2, Sender(weights))._host
    assert chunks.numel.tolist() == [3, BLOCK + 1]
    assert chunks.chunk.tolist() == [[0, 0], [1, 0], [1, 1]]
    assert host.device.type == "cpu"


def test_interpreter_stays_in_its_own_process() -> None:
    assert "TRITON_INTERPRET" not in os.environ
    assert not interprets()


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
    assert reason.startswith("Triton cannot be imported")


def test_a_compiler_that_fails_is_a_reason_not_an_error() -> None:
    # Without a GPU its driver is what fails, with one a device that Triton knows nothing of.
    device = torch.device("meta" if torch.cuda.is_available() else "cuda")
    family = selfcheck.family(LarsRule(), backend_cases.PLAIN)
    reason = selfcheck.difference(Triton(), family, device)
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
        chosen = choose.choose(weight, backend_cases.PLAIN, LarsRule())
    assert chosen.name == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose.choose(weight, backend_cases.PLAIN, LarsRule()) is chosen
    choose._warn_once.cache_clear()


# Generated code.


def _options(kernel: Any) -> dict[str, Any]:
    return LARGE_OPTIONS if kernel is rmsprop_warmup.apply else OPTIONS


def _compile(kernel: Any, target: Any, **constants: Any) -> Any:
    signature: dict[str, str] = {}
    constants = {"numbers": None, "BLOCK": BLOCK, **constants}
    for parameter in kernel.params:
        if parameter.name in constants:
            signature[parameter.name] = "constexpr"
        else:
            signature[parameter.name] = POINTERS.get(parameter.name, parameter.annotation_type)
    constants = {name: value for name, value in constants.items() if name in signature}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, kind in enumerate(signature.values())
        if kind.startswith("*")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=target, options=_options(kernel))


PLAIN = {"WEIGHTS": F32, "GRADS": F32, "STATES": F32, "COPIES": None, "STOCHASTIC": False}
LARS = {**choices(LarsRule(nesterov=True, trust_clip=True)), "COUNTS": True}
LAMB = choices(LambRule())
# kernel, its constants, arrays read, arrays written
KERNELS = {
    "gradient norm": (sums.measure_gradient, {}, 1, 0),
    "LARS measure": (lars.measure, LARS, 2, 0),
    "LARS apply": (lars.apply, LARS, 3, 2),
    "LARS apply without momentum": (lars.apply, {**LARS, "STATES": None}, 2, 1),
    "LAMB measure": (lamb.measure, LAMB, 4, 2),
    "LAMB apply": (lamb.apply, LAMB, 3, 1),
    "LAMB apply without sums": (lamb.apply, {**LAMB, "sums": None}, 4, 3),
    "RMSprop warm-up apply": (rmsprop_warmup.apply, {}, 4, 3),
}

# Kernels that are compiled for all of TYPES.
TYPED = ["LARS measure", "LARS apply", "LAMB measure", "LAMB apply", "RMSprop warm-up apply"]
TYPES = {
    "bf16": {"WEIGHTS": BF16, "GRADS": BF16, "STATES": BF16},
    "f16": {"WEIGHTS": F16, "GRADS": F16, "STATES": F32},
    "copy": {"WEIGHTS": F32, "GRADS": BF16, "STATES": F32, "COPIES": F16},
    "stochastic": {"WEIGHTS": BF16, "GRADS": F32, "STATES": F32, "STOCHASTIC": True},
}


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
    kernel, constants, reads, writes = KERNELS[name]
    compiled = _compile(kernel, SM_90, **{**PLAIN, **constants})
    ptx = compiled.asm["ptx"]
    _assert_ieee(ptx)
    threads = _options(kernel)["num_warps"] * 32
    each = BLOCK // threads // 4  # accesses of 4 floats by a thread
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
@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("name", TYPED)
def test_sm_90_compiles_every_type_without_spills(name: str, types: str, tmp_path: Path) -> None:
    kernel, constants, *_ = KERNELS[name]
    compiled = _compile(kernel, SM_90, **{**PLAIN, **constants, **TYPES[types]})
    _assert_ieee(compiled.asm["ptx"])
    assert re.search(r"ld\.global[\w.]*\.v4\.b32", compiled.asm["ptx"])
    usage = _resources(compiled.asm["cubin"], tmp_path)
    assert usage["STACK"] == usage["LOCAL"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_gfx942_has_wide_accesses_and_no_spills(name: str) -> None:
    kernel, constants, reads, writes = KERNELS[name]
    code = _compile(kernel, GFX942, **{**PLAIN, **constants}).asm["amdgcn"]
    each = BLOCK // (_options(kernel)["num_warps"] * 64) // 4
    assert len(re.findall(r"(?:buffer|global)_load_dwordx4", code)) >= reads * each
    assert len(re.findall(r"(?:buffer|global)_store_dwordx4", code)) >= writes * each
    spills = re.findall(
        r"\.(?:vgpr_spill_count|sgpr_spill_count|private_segment_fixed_size):\s*(\d+)", code
    )
    assert spills
    assert set(spills) == {"0"}


@pytest.mark.slow
@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("name", TYPED)
def test_gfx942_compiles_every_type(name: str, types: str) -> None:
    kernel, constants, *_ = KERNELS[name]
    compiled = _compile(kernel, GFX942, **{**PLAIN, **constants, **TYPES[types]})
    assert re.search(r"\.vgpr_spill_count:\s*0\b", compiled.asm["amdgcn"])


@pytest.mark.parametrize("target", [SM_90, GFX942], ids=["sm_90", "gfx942"])
@pytest.mark.parametrize("counts", [False, True])
def test_tables_compile_with_numbers_on_the_device(target: Any, counts: bool) -> None:
    common = {"first": "*i32", "numbers": "*fp64", "count": "i32"}
    for kernel, constants in (
        (sums.total, {"COUNTS": counts, "LANES": 128}),
        (sums.advance, {"REMEMBERS": counts, "LANES": 128}),
    ):
        names = {**POINTERS, **common}
        signature = {
            p.name: "constexpr" if p.name in constants else names.get(p.name, p.annotation_type)
            for p in kernel.params
        }
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        assert triton.compile(source, target=target, options=OPTIONS).asm
