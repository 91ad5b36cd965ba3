"""What the stages of `make gpu` measure and write, on a processor in the place of a GPU.

Names with "cuda" run again where the CUDA kernels are compiled for the CPU: test_cuda_on_cpu.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import models
from benchmarks.gpu_proof import bench, card, counters, grid, page, paths, process, rows
from benchmarks.results import read_csv
from benchmarks.step.cases import GPU_CASES, Case
from benchmarks.step.comparison import Effort
from device_cases import EMULATED
from fake_device import FakeDevice
from fastlars.backends.cuda import Cuda
from repository_files import ROOT, python_path

QUICK = Effort(rounds=5, host_rounds=5, copy_bytes=2**12)
LARS, LAMB = (Case("resnet50", rule, "float32") for rule in ("lars", "lamb"))
LAUNCHES = grid.launches(2, 227 * 1024)
WANTED = rows.is_wanted
needs_kernels = pytest.mark.skipif(not EMULATED, reason="test_cuda_on_cpu.py runs it")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("resnet50", "bert_large"):
        monkeypatch.setitem(models.SHAPES, name, lambda: [(80, 64), (4096,), (5,)])
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    # The processor records nothing.
    monkeypatch.setattr(rows, "is_wanted", lambda name: WANTED(name) and "graph" not in name)


def test_rows_are_written_and_what_cannot_run_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rows.measure(FakeDevice(), tmp_path, [LARS, LAMB], QUICK) == 0
    table = read_csv(tmp_path / "rows.csv")
    if not EMULATED:
        assert {row["contender"] for row in table} == {
            "fastlars", "torch SGD(fused)", "torch AdamW(fused)",
        }  # fmt: skip
        assert "resnet50 lars: fastlars triton: skipped: FASTLARS_BACKEND=triton, but" in (
            capsys.readouterr().out
        )
    assert {row["group"] for row in table} == {"resnet50 lars", "resnet50 lamb"}
    assert "| resnet50 lamb | fastlars" in (tmp_path / "rows.md").read_text()
    assert all(row["machine"] and row["torch"] and row["date"] for row in table)


def test_every_contender_has_a_version(monkeypatch: pytest.MonkeyPatch) -> None:
    for case in GPU_CASES:
        compared = rows.Comparison(case, FakeDevice(), QUICK)
        monkeypatch.setattr(compared, "row", lambda name: {"contender": name})
        for name, contender in compared.contenders.items():
            if contender.package == "apex":
                continue  # not installed here
            assert rows.tabulated(compared, name)["version"], name


def test_rows_that_are_wrong_fail_the_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(self: Any, contender: Any, params: Any) -> None:
        raise RuntimeError("measure: an illegal memory access")

    monkeypatch.setattr(rows.Comparison, "_prepared", broken)
    assert rows.measure(FakeDevice(), tmp_path, [LARS], QUICK) == 1
    assert "fastlars: RuntimeError: measure: an illegal memory access" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@needs_kernels
def test_rows_of_cuda(tmp_path: Path) -> None:
    assert rows.measure(FakeDevice(), tmp_path, [LARS, LAMB], QUICK) == 0
    ours = {row["contender"]: row["backend"] for row in read_csv(tmp_path / "rows.csv")}
    assert ours["fastlars cuda two-launch"] == "cuda two-launch"
    assert ours["fastlars cuda one-launch"] == "cuda one-launch"


@needs_kernels
def test_grid_of_cuda(tmp_path: Path) -> None:
    assert grid.measure(FakeDevice(), LAUNCHES, tmp_path, [LARS, LAMB], limit_s=0.0) == 0
    table = read_csv(tmp_path / "grid.csv")
    assert len(table) == 2 * (1 + len(LAUNCHES))
    assert {row["path"] for row in table} == {"torch fused", "two-launch", "one-launch"}
    assert {row["over torch fused"] for row in table} == {"1.000"}  # this clock stands still
    assert (tmp_path / "grid.md").read_text().startswith("| case | path | blocks | shared_slots |")


@needs_kernels
def test_grid_of_cuda_goes_on_after_a_launch_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = Cuda.step

    def step(self: Cuda, *arguments: Any) -> Any:
        if self.shared_slots == 13:
            raise RuntimeError("too much shared memory")
        return whole(self, *arguments)

    monkeypatch.setattr(Cuda, "step", step)
    assert grid.measure(FakeDevice(), LAUNCHES, tmp_path, [LARS], limit_s=0.0) == 1
    assert "one-launch, 2 blocks, 13 slots: too much shared memory" in capsys.readouterr().out
    assert len(read_csv(tmp_path / "grid.csv")) == len(LAUNCHES)


@needs_kernels
def test_paths_of_cuda_have_the_same_bits(tmp_path: Path) -> None:
    assert paths.measure(FakeDevice(), tmp_path, paths.CASES, {"resnet50": 3, "bert_large": 2}) == 0
    text = (tmp_path / "paths.md").read_text()
    assert text.count("the same bits") == len(paths.CASES)
    assert "one-launch; two-launch; one-launch, graph; two-launch, graph" in text


@needs_kernels
def test_paths_of_cuda_that_differ_fail_the_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Cuda.step

    def step(self: Cuda, rule: Any, bound: Any, now: Any) -> Any:
        ratios = whole(self, rule, bound, now)
        if self.path == "one-launch":
            weight = bound.tensors.weights[1]
            weight[7] = torch.nextafter(weight[7], torch.tensor(9.0))
        return ratios

    monkeypatch.setattr(Cuda, "step", step)
    assert paths.measure(FakeDevice(), tmp_path, [LARS], {"resnet50": 2}) == 1
    assert "tensor 1 differs between one-launch and two-launch" in (
        (tmp_path / "paths.md").read_text()
    )


# ncu.

NCU = """==PROF== Connected to process 7
==PROF== Profiling "measure" - 0: 0%....100% - 1 pass
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","7","void fastlars::cuda::measure<Lars>(Call)","dram__bytes_read.sum","byte","204,512"
"0","7","void fastlars::cuda::measure<Lars>(Call)","gpu__time_duration.sum","ns","12,345"
"0","7","void fastlars::cuda::measure<Lars>(Call)","lts__t_sector_hit_rate.pct","%","12.5"
"0","7","void fastlars::cuda::measure<Lars>(Call)","dram__bytes_write.sum","byte","n/a"
"0","7","void fastlars::cuda::measure<Lars>(Call)","of a newer ncu","byte","7"
"1","7","void fastlars::cuda::step<Lars>(Call)","dram__bytes_write.sum","byte","102256"
==PROF== Disconnected
"""


def test_counters_are_read_from_what_ncu_prints() -> None:
    numel = 80 * 64 + 4096 + 5
    found = counters.rows(LARS, NCU)
    assert found == [
        {
            "case": LARS, "kernel": "measure", "read B a parameter": f"{204512 / numel:.2f}",
            "us": "12.35", "L2 hits %": "12.50",
        },
        {"case": LARS, "kernel": "step", "written B a parameter": f"{102256 / numel:.2f}"},
    ]  # fmt: skip
    assert counters.rows(LARS, "==ERROR== no permission") == []


def _ncu(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    stand_in = folder / "ncu"
    stand_in.write_text(f"#!/bin/sh\n{script}\n")
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_counters_are_written_case_by_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "printed").write_text(NCU)
    # Counts the first case, and not the second.
    script = (
        f'case "$*" in *lars*) cat {tmp_path}/printed;; *) echo "==ERROR== denied"; exit 1;; esac'
    )
    _ncu(tmp_path, monkeypatch, script)
    assert counters.measure(tmp_path, [LARS, LAMB]) == 1
    assert "resnet50 lamb: ncu failed with status 1, and counted nothing" in capsys.readouterr().out
    assert [row["kernel"] for row in read_csv(tmp_path / "counters.csv")] == ["measure", "step"]


def test_an_ncu_that_hangs_costs_its_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _ncu(tmp_path, monkeypatch, "exec sleep 1000")
    monkeypatch.setattr(counters, "LIMIT_S", 0.5)
    assert counters.measure(tmp_path, [LARS]) == 1
    assert (
        "resnet50 lars: ncu did not end within 0 s, and counted nothing" in capsys.readouterr().out
    )


def test_counters_that_may_not_be_read_are_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _ncu(tmp_path, monkeypatch, 'echo "==ERROR== ERR_NVGPUCTRPERM - The user ..."; exit 1')
    assert counters.measure(tmp_path, [LARS]) == process.SKIPPED
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "this user may not read the counters of this GPU"


def test_without_ncu_the_stage_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counters.shutil, "which", lambda *_, **__: None)
    assert counters.measure(tmp_path, [LARS]) == process.SKIPPED


@needs_kernels
def test_steps_of_cuda_to_be_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("measure", "apply", "step"):
        method: Callable[..., Any] = getattr(Cuda, name)

        def counting(self: Cuda, *rest: Any, _n: str = name, _m: Any = method) -> Any:
            calls.append(f"{self.path} {_n}")
            return _m(self, *rest)

        monkeypatch.setattr(Cuda, name, counting)
    monkeypatch.setenv("FASTLARS_CHECK", "0")  # as the stage has it
    counters.steps(LARS, torch.device("cpu"), number=1)
    two = ["two-launch step", "two-launch measure", "two-launch apply"]
    assert calls == ["one-launch step", *two, "one-launch step", *two]


# Benchmarks and tests.


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU, on which this takes a while")
def test_benchmarks_without_a_gpu_are_skipped_by_name(tmp_path: Path) -> None:
    path = python_path()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_proof.bench", "resnet50", "-k", "two-launch"],
        env={
            **os.environ,
            "PYTHONPATH": path,
            "FASTLARS_GPU_FOLDER": str(tmp_path),
        },
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 skipped, 120 deselected" in done.stdout


def test_figures_of_benchmarks_are_written_row_by_row(tmp_path: Path) -> None:
    compared = rows.Comparison(LARS, FakeDevice(), QUICK, lambda name: "torch SGD" in name).run()
    plugin = bench.Rows(tmp_path, "bench-resnet50")
    for number, name in enumerate(["fastlars", "a failed one", "torch SGD(fused)"]):
        plugin.pytest_runtest_teardown(
            SimpleNamespace(funcargs={"compared": compared, "name": name})
        )
        written = read_csv(tmp_path / "bench-resnet50.csv")
        assert len(written) == (1, 1, 2)[number]
    plugin.pytest_runtest_teardown(SimpleNamespace(funcargs={}))
    assert "torch SGD(fused)" in (tmp_path / "bench-resnet50.md").read_text()


def test_a_huge_output_is_read_from_its_end(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("wb") as file:
        file.truncate(2**33)
        file.seek(0, os.SEEK_END)
        file.write(b"\xff the end\n")
    assert process.last_line(log).endswith(" the end")


def test_a_card_that_does_not_answer_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexec sleep 1000\n")
    python.chmod(0o755)
    monkeypatch.setattr(card, "LOOK_S", 0.5)
    with pytest.raises(SystemExit, match="has not said within 0 s which GPU is here"):
        card.look(str(python))


def test_results_of_tests_reach_the_page(tmp_path: Path) -> None:
    test = tmp_path / "test_it.py"
    test.write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2, 'one is not two'\n"
        "def test_left_out(): pytest.skip('apex is not installed')\n"
    )
    results = tmp_path / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-v", str(test)]
    done = subprocess.run(
        [*command, f"--junitxml={results}"], cwd=tmp_path, capture_output=True, text=True
    )
    lines = page.tests(results)
    assert lines[0] == "1 passed, 1 failed, 1 skipped."
    assert any("test_it::test_bad`: AssertionError: one is not two" in line for line in lines)
    assert any("1 skipped: " in line and "apex is not installed" in line for line in lines)
    # Of a pytest that was ended before it could write that.
    output = "[gw0] [ 50%] PASSED tests/test_it.py::a \n[gw1] [ 60%] FAILED tests/test_it.py::b \n"
    assert page.tests_so_far(output) == [
        "Before pytest was ended: 1 passed, 1 failed.", "", "* `tests/test_it.py::b`",
    ]  # fmt: skip
    assert "FAILED" in done.stdout
