"""fastlars.logging: ratios and norms by name, after any kind of step, and what loggers take."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastlars
from fastlars.logging import LayerStatistics, heat_map, layer_statistics, scalars, summary
from optimizers import one_thread as one_thread
from repository_files import ROOT, python_blocks
from subprocess_tests import passing

RECIPES = (ROOT / "docs" / "recipes.md").read_text()


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 4, bias=False)).to(dtype)


def set_gradients(model: nn.Module, step: int = 0) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def stepped(model: nn.Module, optimizer: Any) -> dict[str, LayerStatistics]:
    set_gradients(model)
    optimizer.step()
    return layer_statistics(model, optimizer)


def norm(values: torch.Tensor | None) -> float:
    assert values is not None
    return float(values.detach().double().norm())


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("ratio", ["separate", "combined"])
def test_lars(ratio: str, clip: float | None) -> None:
    """The gradient's norm is what the ratio divides by: clipped, and with its decay if combined."""
    model, wd = net(), 0.25
    set_gradients(model)
    scale = 1.0 if clip is None else clip / math.hypot(*(norm(p.grad) for p in model.parameters()))
    expected = {}
    for name, p in model.named_parameters():
        assert p.grad is not None
        g = scale * p.grad
        expected[name] = norm(p), norm(g + wd * p if ratio == "combined" else g)
    optimizer = fastlars.LARS(
        model.parameters(), lr=0.5, weight_decay=wd, max_grad_norm=clip,
        ratio=ratio,  # type: ignore[arg-type]
    )  # fmt: skip
    optimizer.step()
    found = layer_statistics(model, optimizer)
    assert list(found) == list(expected)
    for name, layer in found.items():
        w, g = expected[name]
        assert list(layer.norms) == ["weight", "gradient"]
        assert list(layer.norms.values()) == pytest.approx([w, g], rel=1e-5)
        if w:  # the norm's bias is 0: its ratio is 1
            decay = wd * w if ratio == "separate" else 0.0
            assert layer.trust_ratio == pytest.approx(0.001 * w / (g + decay), rel=1e-5)


def test_lamb() -> None:
    """Without decay the first update is the gradient's sign, but for eps."""
    model = net()
    weights = {name: norm(p) for name, p in model.named_parameters()}
    found = stepped(model, fastlars.LAMB(model.parameters(), eps=1e-12))
    for name, layer in found.items():
        update = math.sqrt(model.get_parameter(name).numel())
        assert layer.norms == pytest.approx({"weight": weights[name], "update": update}, rel=1e-5)
        expected = weights[name] / update if weights[name] else 1.0
        assert layer.trust_ratio == pytest.approx(expected, rel=1e-5)


def test_lans() -> None:
    """As LAMB's, and without a bias correction the momentum's direction is a tenth of it over the
    root of a thousandth."""
    model = net()
    weights = {name: norm(p) for name, p in model.named_parameters()}
    options: dict[str, Any] = {"eps": 1e-12, "bias_correction": False}
    found = stepped(model, fastlars.LANS(model.parameters(), **options))
    for name, layer in found.items():
        gradient = math.sqrt(model.get_parameter(name).numel() / 0.001)
        norms = {"weight": weights[name], "momentum": 0.1 * gradient, "gradient": gradient}
        assert layer.norms == pytest.approx(norms, rel=1e-5)
        assert list(layer.norms) == list(norms)
        expected = weights[name] / norms["momentum"] if weights[name] else 1.0
        assert layer.trust_ratio == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", [fastlars.LARS, fastlars.LAMB, fastlars.LANS])
def test_ratios_are_the_optimizers(kind: Any) -> None:
    model = net()
    optimizer = kind(model.parameters(), lr=0.5)
    for step in range(3):
        set_gradients(model, step)
        optimizer.step()
    ratios, found = optimizer.trust_ratios(), layer_statistics(model, optimizer)
    assert len({*ratios.values()}) > 1
    assert {n: layer.trust_ratio for n, layer in found.items()} == {
        name: ratios[p] for name, p in model.named_parameters()
    }


def test_what_is_not_adapted_is_left_out() -> None:
    model = net()
    matrices = ["0.weight", "2.weight"]
    groups = fastlars.parameter_groups(model, weight_decay=0.1)
    assert list(stepped(model, fastlars.LAMB(groups))) == matrices
    groups = fastlars.parameter_groups(model, weight_decay=0.1, adapt_excluded=True)
    assert list(stepped(model, fastlars.LAMB(groups, always_adapt=False))) == matrices
    warmup = fastlars.RMSpropWarmup(model.parameters(), lr=0.1, center_steps=1, period_steps=1)
    assert stepped(model, warmup) == {}


def test_groups_and_types_in_the_order_of_the_model() -> None:
    """Batches of the compiled back end, of two types, and of the reference, for float64."""
    model = nn.ModuleDict({"c": net(), "b": net(torch.bfloat16), "a": net(torch.float64)})
    last, *first = model.parameters()
    groups: list[dict[str, Any]] = [{"params": first, "lr": 0.1}, {"params": [last]}]
    weights = {name: norm(p) for name, p in model.named_parameters()}
    found = stepped(model, fastlars.LARS(groups, lr=0.5, master_weights=True))
    assert list(found) == list(weights)
    for name, p in model.named_parameters():
        norms = {"weight": weights[name], "gradient": norm(p.grad)}
        assert found[name].norms == pytest.approx(norms, rel=1e-5)


def test_a_part_of_the_parameters() -> None:
    """Those of the given model, and those that had a gradient."""
    model = net()
    optimizer = fastlars.LARS(model.parameters(), lr=0.5)
    stepped(model, optimizer)
    assert list(layer_statistics(model[2], optimizer)) == ["weight"]
    optimizer.zero_grad()
    model[2].weight.grad = torch.ones(4, 5)
    optimizer.step()
    assert list(layer_statistics(model, optimizer)) == ["2.weight"]
    assert layer_statistics(model[0], optimizer) == {}


def test_before_the_first_step_and_after_one_that_was_skipped() -> None:
    model = net()
    optimizer: Any = fastlars.LARS(model.parameters(), lr=0.5, skip_if=1e9, fused_unscale=True)
    assert layer_statistics(model, optimizer) == {}
    assert stepped(model, optimizer)
    optimizer.skip_if = 1e-9
    assert stepped(model, optimizer) == {}
    optimizer.skip_if = None
    assert stepped(model, optimizer)
    optimizer.found_inf = torch.ones(())
    assert stepped(model, optimizer) == {}
    del optimizer.found_inf
    assert stepped(model, optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    assert layer_statistics(model, optimizer) == {}


@pytest.mark.parametrize("skipped", [False, True])
def test_a_verdict_that_stays_on_the_device(skipped: bool) -> None:
    model = net()
    optimizer = fastlars.LARS(model.parameters(), lr=0.5)
    stepped(model, optimizer)
    optimizer.stepper.verdict = torch.tensor(skipped)
    assert bool(layer_statistics(model, optimizer)) != skipped


def test_copies_from_a_device() -> None:
    assert passing("optim/logging_cases.py") == 4


def test_inside_wrappers() -> None:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
    from lightning.fabric.wrappers import _FabricOptimizer
    from lightning.pytorch.core.optimizer import LightningOptimizer

    Accelerator(cpu=True)
    model = net()
    optimizer = fastlars.LARS(model.parameters(), lr=0.5)
    expected = stepped(model, optimizer)
    wrappers: list[Any] = [
        AcceleratedOptimizer(optimizer, device_placement=False),
        LightningOptimizer(optimizer),
        _FabricOptimizer(optimizer, strategy=None),  # type: ignore[arg-type]
    ]
    for wrapper in wrappers:
        assert layer_statistics(model, wrapper) == expected


def test_what_is_refused() -> None:
    model, other = net(), net()
    with pytest.raises(TypeError, match="needs an optimizer of fastlars, got SGD"):
        layer_statistics(model, torch.optim.SGD(model.parameters()))
    optimizer = fastlars.LARS(model.parameters(), lr=0.5)
    stepped(model, optimizer)
    with pytest.raises(ValueError, match="steps none of the model's parameters"):
        layer_statistics(other, optimizer)
    for empty in ([], [(1, {})]):
        with pytest.raises(ValueError, match="the history has no trust ratio"):
            heat_map(empty)


def layers(*ratios: float) -> dict[str, LayerStatistics]:
    return {
        name: LayerStatistics(q, {"weight": 2.0 * q, "update": 2.0})
        for name, q in zip("abcd", ratios, strict=False)
    }


def test_scalars_are_flat() -> None:
    assert scalars(layers(0.5, 2.0)) == {
        "trust_ratio/a": 0.5, "trust_ratio/b": 2.0,
        "weight_norm/a": 1.0, "update_norm/a": 2.0,
        "weight_norm/b": 4.0, "update_norm/b": 2.0,
    }  # fmt: skip
    assert scalars({}) == summary({}) == {}


def test_summary() -> None:
    names = ["trust_ratio_min", "trust_ratio_median", "trust_ratio_max"]
    assert summary(layers(4.0, 0.5, 1.0)) == dict(zip(names, [0.5, 1.0, 4.0], strict=True))
    assert summary(layers(4.0, 0.5, 1.0, 2.0))["trust_ratio_median"] == 1.0
    assert all(math.isnan(value) for value in summary(layers(1.0, math.nan, 2.0)).values())
    assert summary(layers(1.0, math.inf))["trust_ratio_max"] == math.inf


def test_heat_map_of_statistics_and_of_ratios() -> None:
    """A row for each layer, wherever it first appears; what has no logarithm is masked."""
    history = [(1, layers(0.5, 2.0)), (3, {"b": 0.0, "c": math.nan}), (4, {"a": 1.0, "b": None})]
    figure = heat_map(history, title="LARS, $x_1")
    axis = figure.axes[0]
    assert figure.get_suptitle() == "LARS, $x_1"
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a", "b", "c"]
    mesh: Any = axis.collections[0]
    assert mesh.get_array().filled(-1).tolist() == [[0.5, -1, 1.0], [2.0, -1, -1], [-1, -1, -1]]
    assert mesh.get_coordinates()[0, :, 0].tolist() == [0.0, 2.0, 3.5, 4.5]


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The names of its scalars reach TensorBoard, and its comments show what is printed."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    (block,) = python_blocks(RECIPES[RECIPES.index("## Trust ratios where you look") :])
    names: dict[str, Any] = {"torch": torch, "fastlars": fastlars}
    exec(block, names)
    events = EventAccumulator("runs/ratios")
    events.Reload()
    expected = scalars(names["layers"])
    assert sorted(events.Tags()["scalars"]) == sorted(expected)
    for name, value in expected.items():
        curve = events.Scalars(name)
        assert [event.step for event in curve] == [5, 10, 15, 20]
        assert curve[-1].value == pytest.approx(value, rel=1e-6)
    assert (tmp_path / "trust.png").read_bytes().startswith(b"\x89PNG")
    shown = re.findall(r"^print.*\n# (.*)$", block, re.MULTILINE)
    for line, pattern in zip(capsys.readouterr().out.splitlines(), shown, strict=True):
        assert re.fullmatch(re.escape(pattern).replace(r"\.\.\.", r"\d*"), line)
