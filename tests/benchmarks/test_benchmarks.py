"""What of the benchmarks can be tested without a GPU and without a stopwatch."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastlars
from benchmarks import models
from benchmarks.overlap import in_backward
from benchmarks.results import read_csv
from benchmarks.step import comparison, report, traffic
from benchmarks.step.cases import GPU_CASES, Case, gpu_contenders
from benchmarks.step.check import check
from benchmarks.step.comparison import Comparison, Effort, UnavailableError
from benchmarks.step.contenders import LR, RULES, Contender
from benchmarks.timing import interleave, interleave_device
from fake_device import FakeDevice
from fastlars.backends import choose, selfcheck
from fastlars.backends.base import Dtypes
from fastlars.backends.cpu import Cpu
from fastlars.backends.upload import Uploader
from repository_files import ROOT

QUICK = Effort(rounds=5, host_rounds=5, copy_bytes=2**12)


@pytest.mark.parametrize(("name", "build"), [("resnet50", "resnet50"), ("vit_b", "vit_b_16")])
def test_shapes_are_those_of_torchvision(name: str, build: str) -> None:
    networks = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        expected = [tuple(p.shape) for p in getattr(networks, build)().parameters()]
    assert models.SHAPES[name]() == expected


@pytest.mark.parametrize(
    ("name", "tensors", "elements"),
    [("bert_large", 398, 336_226_108), ("tiny", 10_000, 640_000), ("giant", 1, 500_000_000)],
)
def test_models_have_the_sizes_that_are_published(name: str, tensors: int, elements: int) -> None:
    found = models.SHAPES[name]()
    assert (len(found), sum(torch.Size(s).numel() for s in found)) == (tensors, elements)


@pytest.mark.parametrize(
    ("rule", "path", "widths", "least", "touched"),
    [
        ("lars", "two-launch", traffic.FLOAT32, 20, 28),
        ("lars", "one-launch", traffic.FLOAT32, 20, 24),
        ("lamb", "two-launch", traffic.FLOAT32, 28, 40),
        ("lamb", "one-launch", traffic.FLOAT32, 28, 32),
        ("lans", "two-launch", traffic.FLOAT32, 28, 48),
        ("lans", "one-launch", traffic.FLOAT32, 28, 36),
        ("lars", "two-launch", traffic.MASTERS, 20, 26),
        ("lars", "one-launch", traffic.MASTERS, 20, 24),
        ("lamb", "two-launch", traffic.MASTERS, 28, 40),
        ("lamb", "one-launch", traffic.MASTERS, 28, 32),
        ("lans", "two-launch", traffic.MASTERS, 28, 44),
        ("lans", "one-launch", traffic.MASTERS, 28, 34),
    ],
)
def test_bytes_are_those_of_the_documentation(
    rule: str, path: str, widths: traffic.Widths, least: int, touched: int
) -> None:
    assert traffic.elements(rule, path, widths) == traffic.Traffic(least, touched)
    sizes = [torch.Size(shape).numel() for shape in models.resnet50_shapes()]
    moved = traffic.traffic(rule, path, sizes, widths)
    assert least < moved.least < 1.01 * least
    assert touched < moved.touched < 1.01 * touched
    row = f"| {rule.upper()} | {'float32' if widths == traffic.FLOAT32 else 'bfloat16'} | {path} "
    documented = (ROOT / "docs" / "performance.md").read_text().splitlines()
    (line,) = [line for line in documented if line.startswith(row)]
    assert line.endswith(f"| {least} | {touched} |")


def test_chunks_are_counted_as_the_back_ends_cut_them() -> None:
    triton = pytest.importorskip("fastlars.backends.triton.table")
    sizes = [1, 4095, 4096, 4097, 100_000]
    weights = [torch.empty(size) for size in sizes]
    cut = triton.DeviceTables(weights, Uploader(weights))
    assert traffic.chunks(sizes) == cut.chunk_count


@pytest.mark.parametrize("case", GPU_CASES[:4], ids=str)
def test_contenders_pass_the_check(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    # Compiling takes half a minute, and the rule is what is ours.
    monkeypatch.setattr(torch, "compile", lambda rule, **_: rule)
    everyone = gpu_contenders(case)
    for contender in everyone.values():
        # What serves GPUs alone is left to machines that have one; so is what a graph records.
        if contender.backend is None and not contender.graph:
            pytest.importorskip(contender.package)
            check(contender, everyone["fastlars"], case.rule, dtype=case.torch_dtype)


def _idle(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.0)


class _Idle(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        del closure


class _Ascending(torch.optim.SGD):
    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__(params, lr=LR, maximize=True)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (Contender(lambda ps: _Idle(ps, lr=LR), "torch"), "moves nothing"),
        (Contender(_Ascending, "torch"), "points elsewhere"),
        (replace(RULES["lars"]["torch SGD(fused)"], exact=True), "off by"),
    ],
    ids=["idle", "ascending", "other length"],
)
def test_wrong_contenders_fail_the_check(wrong: Contender, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check(wrong, RULES["lars"]["fastlars"], "lars")


def test_a_contender_is_planned_for_its_back_end_and_leaves_no_trace() -> None:
    weight = torch.ones(3)

    def chosen() -> tuple[str, str]:
        cuda: Any = choose.instance("cuda")
        return choose.choose(weight, Dtypes(*3 * [weight.dtype])).name, cuda.path

    before = chosen()
    named = Contender(_idle, "torch", backend="reference", path="two-launch")
    with named.planning():
        assert chosen() == ("reference", "two-launch")
    assert chosen() == before == ("cpu", "one-launch")


def test_device_times_are_interleaved_and_leave_out_the_rest() -> None:
    device = FakeDevice()
    order: list[str] = []

    def taking(name: str, seconds: float) -> Callable[[], None]:
        def call() -> None:
            order.append(name)
            # The first two rounds are slow, as first rounds are.
            device.now += seconds if len(order) > 6 else 100.0

        return call

    samples = interleave_device(
        {"a": taking("a", 1.0), "b": taking("b", 2.0)},
        5,
        device,
        leads={"b": 0.5},
        between={"a": taking("undo", 50.0)},
    )
    assert order == ["a", "undo", "b"] * 7
    assert device.leads == [0.0, 0.5] * 7
    assert device.waits == 7
    assert samples["a"].seconds == pytest.approx([1.0] * 5, abs=1e-5)
    assert samples["b"].seconds == pytest.approx([2.0] * 5, abs=1e-5)


def test_rounds_end_with_the_time_there_is() -> None:
    calls = {"sleep": lambda: time.sleep(1e-3)}
    limited = (
        interleave(calls, 10_000, limit_s=0.0),
        interleave_device(calls, 10_000, FakeDevice(), leads={}, limit_s=0.0),
    )
    assert [len(samples["sleep"].seconds) for samples in limited] == [5, 5]


def _small(monkeypatch: pytest.MonkeyPatch, **others: Contender) -> Comparison:
    monkeypatch.setitem(models.SHAPES, "resnet50", lambda: [(64, 64), (5,)])
    known = {name: RULES["lars"][name] for name in ("fastlars", "torch SGD(fused)")}
    monkeypatch.setattr(comparison, "gpu_contenders", lambda _: known | others)
    return Comparison(Case("resnet50", "lars", "float32"), FakeDevice(), QUICK)


def test_one_contenders_fault_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        raise RuntimeError("measure: an illegal memory access")

    good = RULES["lars"]["fastlars"]
    found = _small(
        monkeypatch,
        absent=replace(good, package="no_such_package"),
        elsewhere=replace(good, backend="triton"),
        ascending=Contender(_Ascending, "torch"),
        broken=replace(good, build=broken),
        graph=replace(good, graph=True),
    ).run()
    assert list(found.figures) == list(found.calls) == ["fastlars", "torch SGD(fused)", "graph"]
    assert found.machine.recordings == 2  # to be checked, to be timed
    reasons = {name: f"{type(e).__name__}: {e}" for name, e in found.errors.items()}
    assert reasons["absent"] == "UnavailableError: no_such_package is not installed"
    assert reasons["elsewhere"].startswith("UnavailableError: FASTLARS_BACKEND=triton, but ")
    assert reasons["ascending"].startswith("AssertionError: the step points elsewhere")
    # A fault of a kernel is no reason to skip.
    assert reasons["broken"] == "RuntimeError: measure: an illegal memory access"


def test_a_case_that_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    case = _small(monkeypatch)
    case.machine.free = 1000  # type: ignore[attr-defined]
    assert set(map(type, case.run().errors.values())) == {UnavailableError}
    assert not case.figures


def test_a_back_end_that_fails_its_check_has_no_figures_of_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = Cpu.step
    monkeypatch.setattr(Cpu, "step", lambda *given: whole(*given).mul_(1.1))
    monkeypatch.setattr(selfcheck, "_passed", defaultdict(set))
    monkeypatch.setattr(selfcheck, "_failure", {})
    found = _small(monkeypatch).run()
    assert str(found.errors["fastlars"]) == "cpu fails its check, and reference would serve"
    assert list(found.figures) == ["torch SGD(fused)"]


def test_a_path_that_was_not_taken_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    good = RULES["lars"]["fastlars"]
    found = _small(monkeypatch, other=replace(good, path="one-launch")).run()
    assert "the path taken is ''" in str(found.errors["other"])


def _as_run(*rows: dict[str, Any]) -> dict[str, Any]:
    """What pytest-benchmark writes, as far as report.py reads it."""
    return {
        "machine_info": {"cpu": {}, "machine": "x86_64", "python_version": "3.12", "torch": "2"},
        "datetime": "2030-01-02T03:04:05",
        "commit_info": {"id": "0123456789abcdef"},
        "benchmarks": [{"group": "a case", "extra_info": row | {"version": "1"}} for row in rows],
    }


def test_figures_reach_table_and_csv(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = _small(monkeypatch).run()
    rows = [found.row(name) for name in found.figures]
    run, out = tmp_path / "run.json", tmp_path / "out.csv"
    run.write_text(json.dumps(_as_run(*rows)))
    assert report.main([str(run), "--csv", str(out)]) == 0
    printed = capsys.readouterr().out
    table = read_csv(out)
    assert [row["contender"] for row in table] == ["fastlars", "torch SGD(fused)"]
    empty = {"kernel_ms", "threads"}
    assert {name for name, value in table[0].items() if not value} == empty
    assert float(table[0]["bytes_per_parameter"]) == pytest.approx(20, rel=0.01)
    assert float(table[1]["touched_per_parameter"] or 0) == 0
    assert "| fastlars 1 (cpu) |" in printed
    assert "none, driver 1.2, CUDA 13.0" in printed


def test_csv_of_processors_keeps_its_columns(tmp_path: Path) -> None:
    committed = ROOT / "benchmarks" / "results" / "cpu.csv"
    run, out = tmp_path / "run.json", tmp_path / "out.csv"
    figures = {"contender": "c", "p20_ms": 1.0, "p50_ms": 1.0, "p80_ms": 1.0, "rounds": 5}
    run.write_text(json.dumps(_as_run(figures)))
    assert report.main([str(run), "--csv", str(out)]) == 0
    assert out.read_text().splitlines()[0] == committed.read_text().splitlines()[0]


def test_steps_inside_backward_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory in a process for each way; no time for a way with other bits."""
    out = tmp_path / "in_backward.csv"
    options = ["--models", "small", "--rounds", "5", "--glibc", "gives it back"]
    in_backward.main([*options, "--csv", str(out)])
    table = read_csv(out)
    assert [row["way"] for row in table] == list(in_backward.WAYS)
    assert {row["gradients_mb"] for row in table} == {"4.2"}
    assert {row["kept_mb"] for row in table} == {"12.6"}  # weights, and LAMB's two moments
    assert all(float(row["rise_mb"]) > 0.0 for row in table)
    right = fastlars.step_in_backward

    def other(model: nn.Module, *arguments: Any, **keywords: Any) -> Any:
        with torch.no_grad():
            next(model.parameters()).add_(1e-3)
        return right(model, *arguments, **keywords)

    monkeypatch.setattr(fastlars, "step_in_backward", other, raising=False)
    with pytest.raises(RuntimeError, match="has other bits"):
        in_backward.times("small", torch.device("cpu"), 5)
