"""What is made of benchmark figures: comparison with committed ones, pictures, memory needed."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.machine import free_bytes
from benchmarks.models import SWEEP, BertLarge
from benchmarks.step import (
    changing,
    compare,
    figures,
    first_step,
    host_turns,
    iteration,
    report,
    sharded_host,
)
from benchmarks.step.cases import CPU_CASES, Case, cpu_contenders
from benchmarks.step.check import check
from benchmarks.step.contenders import RULES


def row(group: str, contender: str, ratio: float | str, **others: Any) -> dict[str, Any]:
    numbers = {"p50_ms": "2.5", "parameters": "1000", "bytes_per_parameter": "20"}
    return {
        "group": group, "contender": contender, "fastlars_over_this": str(ratio),
        "memory_gb_s": "50", **numbers, **others,
    }  # fmt: skip


FUSED = {"lars": "torch SGD(fused)", "lamb": "torch AdamW(fused)"}
OLD = [row("a", "fastlars", 1), row("a", "torch", 1.2), row("b", "torch", 1.5)]


def test_a_ratio_that_grew_is_a_regression_and_no_time_is() -> None:
    slower_machine = [{**line, "p50_ms": "250"} for line in OLD]
    assert compare.regressions(OLD, slower_machine) == []
    noise = [row("a", "torch", 1.3), row("b", "torch", 1.1), row("c", "torch", 9.0)]
    assert compare.regressions(OLD, noise) == []
    assert compare.shared(OLD, noise) == 2
    (line,) = compare.regressions(OLD, [row("a", "torch", 1.5), row("b", "torch", 1.5)])
    assert line == "a: fastlars / torch is 1.5, was 1.2"


@pytest.mark.parametrize(("ratio", "status"), [(1.3, 0), (2.0, 1)])
def test_the_report_ends_in_the_comparison(
    ratio: float, status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    committed, run = tmp_path / "old.csv", tmp_path / "run.json"
    with committed.open("w", newline="") as file:
        writer = csv.DictWriter(file, OLD[0])
        writer.writeheader()
        writer.writerows(OLD)
    info = {"contender": "torch", "version": "1", "fastlars_over_this": ratio, "p50_ms": 1.0}
    numbers = {"p20_ms": 1.0, "p80_ms": 1.0, "rounds": 5, "parameters": 10, "memory_gb_s": 50.0}
    content = {
        "machine_info": {"cpu": {}, "machine": "x86_64", "python_version": "3.12", "torch": "2"},
        "datetime": "2030-01-02T03:04:05",
        "commit_info": {"id": "0123456789abcdef"},
        "benchmarks": [{"group": "a", "extra_info": info | numbers | {"threads": 2}}],
    }
    run.write_text(json.dumps(content))
    assert report.main([str(run), "--compare", str(committed)]) == status
    assert "1 ratios compared" in capsys.readouterr().out


def test_pictures_have_a_point_for_every_row(tmp_path: Path) -> None:
    rows = [row(f"{model} {rule}", name, 1)
            for model in ("resnet50", "1 x 1e4", "100 x 64", "tiny")
            for rule in ("lars", "lamb")
            for name in ("fastlars", FUSED[rule])]  # fmt: skip
    rows.append(row("resnet50 lars bf16 + masters", "fastlars", 1))
    rows.append(row("host, 161 small tensors", "fastlars LARS", ""))
    panel = figures.roofline(rows).axes[0]
    memory, *points = (line.get_xydata() for line in panel.lines)
    assert points[0].tolist() == [[2e-5, 2.5]] * 2  # ResNet-50 and 10,000 tensors
    assert len(points) == 3
    assert memory[:, 1] == pytest.approx(1e3 * memory[:, 0] / 50)
    words = [text.get_text() for text in panel.texts]
    assert {"fastlars", "torch, fused", "fastlars, bf16", "memory,\n50 GB/s"} <= {*words}
    sizes, counts = figures.cost(rows).axes
    assert [list(line.get_xdata()) for line in sizes.lines] == [[1000.0]] * 4
    assert sorted(counts.lines[0].get_xdata()) == [100, 10_000]
    drawn = figures.draw(rows, tmp_path)
    assert [path.name for path in drawn] == [
        "roofline.svg", "roofline-dark.svg", "cost.svg", "cost-dark.svg",
    ]  # fmt: skip
    assert figures.draw(rows[-1:], tmp_path) == []


def test_cases_cover_one_element_to_a_thousand_million() -> None:
    sizes = {Case(name, "lars", "float32").numel for name in SWEEP if name.startswith("1 x 1e")}
    assert (min(sizes), max(sizes)) == (1, 10**9)
    assert len(set(map(str, CPU_CASES))) == len(CPU_CASES)
    assert all(next(iter(cpu_contenders(case))) == "fastlars" for case in CPU_CASES)


def test_memory_is_asked_for_what_two_optimizers_keep() -> None:
    # Weights, gradients and their copies, and a momentum each.
    assert Case("resnet50", "lars", "float32").needed_bytes() == 25_557_032 * (4 + 8 + 8)
    assert Case("resnet50", "lamb", "float32").needed_bytes() == 25_557_032 * (4 + 8 + 16)
    assert 2**28 < free_bytes() < 2**50


@pytest.mark.parametrize("rule", ["lars", "lamb"])
def test_optax_steps_as_the_specification_does(rule: str) -> None:
    name = next(name for name in RULES[rule] if name.startswith("optax"))
    check(RULES[rule][name], RULES[rule]["fastlars"], rule, dtype=torch.float32)


def test_shares_of_an_iteration_are_those_of_its_times() -> None:
    rows = iteration.measure("resnet50", torch.device("cpu"), 5, (2, 32))
    assert [r["contender"] for r in rows][:2] == ["fastlars", "torch SGD(fused)"]
    for line in rows:
        step, passes = float(line["step_ms"]), float(line["passes_ms"])
        assert float(line["share_of_iteration"]) == pytest.approx(step / (step + passes), abs=1e-3)
    assert "| resnet50 | 2 x 32 | fastlars" in iteration.markdown(rows)


def test_the_cost_of_the_check_at_first_use_is_the_difference_of_two_processes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(first_step, "PROCESSES", 1)
    assert first_step.main("cpu", "lamb") == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| lamb |")]
    first, without, difference, second = (float(cell) for cell in line.split("|")[2:6])
    assert difference == pytest.approx(first - without, abs=0.11)
    assert min(first, without, second) > 0


def test_host_times_of_changing_sets_of_gradients(capsys: pytest.CaptureFixture[str]) -> None:
    assert changing.main("12", "5") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[3:]] == [f"| {name}" for name in changing.BUILDS]
    assert all(line.count("(") - line.split("|")[1].count("(") == 5 for line in lines[3:])


def test_host_times_of_shards(capsys: pytest.CaptureFixture[str]) -> None:
    assert sharded_host.main("5", "5") == 0
    lines = capsys.readouterr().out.splitlines()[3:]
    assert [line.split(" | ")[0] for line in lines] == [f"| {name}" for name in sharded_host.MESHES]
    assert all(float(cell.split()[0]) > 0 for line in lines for cell in line.split(" | ")[1:4])


def test_checkouts_in_turns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(host_turns, "PAIRS", 1)
    assert host_turns.main(str(host_turns.ROOT), "1") == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == [
        f"| {name}, 161 {what}" for name in ("LARS", "LAMB") for what in ("tensors", "DTensors")
    ]
    assert all(float(row[3]) > 0.0 for row in rows)


@pytest.mark.parametrize("which", changing.SETS)
def test_sets_of_gradients_are_what_they_are_called(which: str) -> None:
    run = changing.Run(changing.BUILDS["fastlars LARS"], which, 20)
    seen = []
    for _ in range(4):
        seen.append([p.grad is not None for p in run.params])
        run.optimizer.step()
        run.next()
    counts = {"a tenth dropped": 18, "halves in turns": 10, "one half": 10}
    assert {sum(each) for each in seen} == {counts.get(which, 20)}
    assert (seen[0] != seen[1]) == (which in ("a tenth dropped", "halves in turns"))
    p = run.params[0]
    assert p.grad is None or (p.grad.stride() != p.stride()) == (which == "lie otherwise")


def test_bert_large_has_the_parameters_of_bert_large() -> None:
    with torch.device("meta"):
        model = BertLarge()
        assert model(torch.zeros(2, 5, dtype=torch.long)).shape == (2, 5, 30522)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(335e6, rel=0.01)
