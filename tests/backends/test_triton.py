"""The Triton back end on machines without a GPU: interpreted, and compiled for GPUs elsewhere."""

from __future__ import annotations

import os
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch

from backend_cases import PLAIN
from fastlars.backends import choose, selfcheck
from subprocess_tests import passing, python

triton = pytest.importorskip("triton")

from benchmarks.step.triton_kernels import KERNELS, TARGETS, compiled  # noqa: E402
from fastlars.backends import upload  # noqa: E402
from fastlars.backends.triton import memory, table  # noqa: E402
from fastlars.backends.triton.backend import Triton, kernels  # noqa: E402
from fastlars.backends.triton.launch import is_interpreted  # noqa: E402
from fastlars.backends.triton.table import DeviceTables  # noqa: E402
from fastlars.backends.upload import Uploader  # noqa: E402
from fastlars.rules import LarsRule  # noqa: E402

BLOCK = memory.BLOCK.value


@pytest.mark.parametrize(
    ("path", "quick", "whole"),
    [
        ("backends/test_backends.py", 200, 290),
        ("backends/test_core.py", 4, 4),
        ("optim/test_trust.py", 10, 10),
        ("backends/test_reports.py", 8, 8),
        ("backends/test_random_streams.py", 9, 9),
        ("backends/test_selfcheck.py", 25, 25),
        pytest.param("backends/test_triton_bits.py", 45, 45, marks=pytest.mark.slow),
        pytest.param("optim/test_rmsprop_warmup.py", 6, 6, marks=pytest.mark.slow),
        pytest.param("optim/test_grad_norm.py", 42, 42, marks=pytest.mark.slow),
        ("optim/test_step_in_backward.py", 12, 12),
        pytest.param("optim/test_lans.py", 36, 36, marks=pytest.mark.slow),
    ],
)
def test_interpreted(path: str, quick: int, whole: int, marks: str) -> None:
    options = ("-k", "triton", "-m", marks, "-W", "ignore::RuntimeWarning")
    assert passing(path, *options, TRITON_INTERPRET="1") >= (quick if marks else whole)


class NotMoved:
    """A list of tensors with the addresses of the last step."""

    def write_table(self, address: int) -> bool:
        return False


class Moved(NotMoved):
    def write_table(self, address: int) -> bool:
        return True


def test_tables_are_made_on_the_host_whatever_the_default_device() -> None:
    weights = [torch.ones(3), torch.ones(BLOCK + 1)]
    with torch.device("meta"):
        tables = DeviceTables(weights, Uploader(weights))
        given = tables.get(NotMoved())
    assert given.numel.tolist() == [3, BLOCK + 1]
    assert given.chunks.tolist() == [[0, 0], [1, 0], [1, 1]]
    assert given.first_chunk.tolist() == [0, 1, 3]
    assert {each.device.type for each in given} == {"cpu"}


def test_tables_are_uploaded_again_only_when_a_tensor_has_moved() -> None:
    weights = [torch.ones(3)]
    tables = DeviceTables(weights, Uploader(weights))
    first, second = tables.get(NotMoved()), tables.get(NotMoved())
    assert second is first
    moved = tables.get(Moved())
    assert [a is b for a, b in zip(moved, first, strict=True)] == [False] + [True] * 7
    assert tables.get(NotMoved()) is moved


def test_a_graph_uploads_what_has_moved_and_for_itself_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights = [torch.ones(3)]
    uploader = Uploader(weights)
    tables = DeviceTables(weights, uploader)
    eager, pinned = tables.get(NotMoved()), []
    for module in (table, upload):
        monkeypatch.setattr(module, "is_capturing", lambda device: True)
    monkeypatch.setattr(Uploader, "pinned_copy", lambda _, values: pinned.append(values))
    assert tables.get(NotMoved()) is eager  # its uploads are done: none at each replay
    captures = [tables.get(Moved()), tables.get(NotMoved()), tables.get(NotMoved())]
    assert len({id(capture.table) for capture in (eager, *captures)}) == 4
    assert all(capture.chunks is eager.chunks for capture in captures)
    assert pinned == []  # pinned memory cannot be allocated during capture
    monkeypatch.undo()
    after = tables.get(NotMoved())
    assert not any(after.table is capture.table for capture in captures)
    assert after.chunks is eager.chunks
    assert tables.get(NotMoved()) is after


def test_interpreter_stays_in_its_own_process() -> None:
    assert "TRITON_INTERPRET" not in os.environ
    assert not is_interpreted()


# Which back end is chosen, and what a user is told.


def test_report_says_why() -> None:
    done = python("-m", "fastlars", FASTLARS_BACKEND="triton")
    assert "Triton serves cpu in its interpreter alone" in done.stdout
    assert f"triton     {triton.__version__}" in done.stdout


def test_report_of_the_interpreter() -> None:
    done = python("-m", "fastlars", FASTLARS_BACKEND="triton", TRITON_INTERPRET="1")
    assert "triton: FASTLARS_BACKEND asks for it" in done.stdout


def test_missing_triton_is_a_reason_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastlars.backends.triton.launch", None)
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


# Generated code. test_triton_code.py holds registers and spills, for more GPUs.

CHUNKS = [name for name, kernel in KERNELS.items() if not kernel.by_tensor]
EACH = 4  # accesses of 16 bytes by a thread of 8 warps, for each array of floats


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("name", CHUNKS)
def test_chunks_are_read_and_written_by_vectors(name: str) -> None:
    kernel = KERNELS[name]
    ptx = compiled(name, TARGETS["sm_90"]).asm["ptx"]
    each = EACH // (kernels(kernel.rule).options["num_warps"] // 8)
    loads = re.findall(r"ld\.global[\w.:]*\.v4\.b32", ptx)
    assert len(loads) == kernel.reads * each
    assert len(re.findall(r"st\.global[\w.:]*\.v4\.b32", ptx)) == kernel.writes * each
    # What is read for the last time in a step leaves the cache first.
    assert sum("evict_first" in load for load in loads) == kernel.last * each
    # Only where an array is on a 16-byte boundary, which is asked of each.
    assert len(set(re.findall(r"and\.b64\s+%rd\d+, (%rd\d+), 15;", ptx))) == kernel.reads
    # Coefficients are computed by `prepare` alone. Rare branches take sums again in float64.
    if kernel.function == "apply":
        assert ".f64" not in ptx


@pytest.mark.parametrize("name", [name for name in KERNELS if "prepare" in name])
def test_a_tensor_has_one_warp(name: str) -> None:
    """All its threads read the counter before one of them writes it, and no barrier is between."""
    assert compiled(name, TARGETS["sm_90"]).metadata.num_warps == 1
