"""The pictures and tables of a run, and the norms in them."""

from __future__ import annotations

import csv
import itertools
import json
import math
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn

from fastlars.trainer.model import norms
from fastlars.trainer.output import pictures
from fastlars.trainer.plots import main
from trainer.helpers import files_below


def history(layers: int) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = [{"kind": "start", "title": "LARS, some net"}]
    for step in range(1, 21):
        at = {"step": step, "epoch": step / 10}
        loss = None if step == 3 else 2 / step
        records.append(at | {"kind": "train", "loss": loss, "accuracy": step / 30, "lr": step})
        ratios = {f"layer{n}.weight": 0.01 * (n + 1) for n in range(layers)}
        records.append(at | {"kind": "trust", "ratios": ratios})
        if step % 10 == 0:
            records.append(at | {"kind": "test", "loss": 1 / step, "accuracy": step / 25})
    return records if layers else [r for r in records if r["kind"] != "trust"]


@pytest.mark.parametrize("layers", [0, 1, 54])
def test_curves(layers: int) -> None:
    """Four labelled panels with the records' values in them; a line for each layer."""
    figure = pictures.curves(history(layers))
    assert isinstance(figure, Figure)
    assert figure.get_suptitle() == "LARS, some net: 80.00% test accuracy"
    loss, accuracy, rate, ratios = figure.axes[:4]
    for axis in (loss, accuracy, rate, ratios):
        assert axis.get_title()
        assert axis.get_xlabel() == "epoch"
        assert axis.get_ylabel()
    assert list(loss.lines[0].get_ydata()) == [2 / step for step in range(1, 21) if step != 3]
    assert list(accuracy.lines[1].get_ydata()) == [10 / 25, 20 / 25]
    assert list(rate.lines[0].get_ydata()) == list(range(1, 21))
    assert len(ratios.lines) == layers
    if layers:
        assert ratios.get_yscale() == "log"
        assert figure.axes[4].get_ylabel() == "layer, from the input to the classifier"
    else:
        assert ratios.texts[0].get_text() == "this optimizer has none"


def cells(path: Path) -> list[list[str]]:
    with open(path, newline="") as file:
        return list(csv.reader(file))


def assert_nothing_is_cut_off(figure: Figure) -> None:
    """Every text lies inside the picture, and no two names of layers on each other."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    frame = figure.bbox.padded(1)
    for axis in figure.axes:
        ticks = axis.get_xticklabels() + axis.get_yticklabels() if axis.axison else []
        texts = [tick for tick in ticks if axis.viewLim.contains(*tick.get_position())]
        texts += [axis.title, axis.xaxis.label, axis.yaxis.label, *axis.texts]
        for text in texts:
            corners = text.get_window_extent().corners()
            inside = all(frame.contains(*corner) for corner in corners)
            assert inside or not text.get_text(), text.get_text()
    names = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    assert not any(a.overlaps(b) for a, b in itertools.pairwise(names))


@pytest.mark.parametrize("count", [1, 54, 161])
def test_heat_map(count: int) -> None:
    """A row for each layer, a column for each record, the records' ratios in the cells."""
    figure = pictures.heat_map(history(count))
    axis, scale = figure.axes
    names = [label.get_text() for label in axis.get_yticklabels()]
    assert names == [f"layer{n}.weight" for n in range(count)]
    assert axis.get_ylim() == (count - 0.5, -0.5)  # the first layer on top
    mesh = axis.collections[0]
    ratios = np.broadcast_to(0.01 * np.arange(1, count + 1)[:, None], (count, 20))
    np.testing.assert_allclose(mesh.get_array(), ratios)
    assert axis.get_xlim() == (0.5, 20.5)
    assert mesh.norm.vmin <= 0.01
    assert mesh.norm.vmax >= 0.01 * count
    assert (axis.get_xlabel(), scale.get_ylabel()) == ("step", "trust ratio")
    assert_nothing_is_cut_off(figure)


def test_ratios_without_a_logarithm_are_left_out() -> None:
    records = [
        {"kind": "trust", "step": step, "epoch": step / 4, "ratios": {"a": a, "b": 2.0}}
        for step, a in ((1, 0.5), (2, 0.0), (5, None))
    ]
    mesh = pictures.heat_map(records).axes[0].collections[0]
    assert mesh.get_array().mask.tolist() == [[False, True, True], [False, False, False]]
    assert mesh.get_coordinates()[0, :, 0].tolist() == [0.5, 1.5, 3.5, 6.5]
    table = [["step", "epoch", "a", "b"], [1, 0.25, 0.5, 2.0], [2, 0.5, 0.0, 2.0]]
    assert pictures.trust_table(records) == [*table, [5, 1.25, None, 2.0]]


def test_norms_are_shown_and_written() -> None:
    """Table 2 of the LARS paper, two of its layers; a layer without gradient has no ratio."""
    found = {"conv1.b": [1.86, 0.22], "conv1.w": [0.098, 0.017], "still": [3.0, 0.0]}
    records = [
        {"kind": "start", "title": "AlexNet-BN"},
        {"kind": "norms", "step": 0, "layers": found},
    ]
    figure = pictures.norms(records)
    pairs, ratio, numbers = figure.axes
    assert figure.get_suptitle() == "AlexNet-BN"
    assert pairs.get_title() == "Norms at the first step"
    assert [list(line.get_xdata().filled(0)) for line in pairs.lines] == [
        [1.86, 0.098, 3.0],
        [0.22, 0.017, 0.0],
    ]
    np.testing.assert_allclose(ratio.lines[0].get_xdata().filled(0), [8.4545, 5.7647, 0], rtol=1e-4)
    texts = [text.get_text() for text in numbers.texts]
    heads, rows = ["|w|", "|g|", "|w|/|g|"], ["1.86", "0.22", "8.45", "0.098", "0.017", "5.76"]
    assert texts == [*heads, *rows, "3", "0", "-"]
    assert_nothing_is_cut_off(figure)
    assert pictures.norm_table(records)[3] == ["still", 3.0, 0.0, None]

    later = [*records, {"kind": "norms", "step": 10, "layers": {"still": [3.0, 2.0]}}]
    assert pictures.norms(later).axes[0].get_title() == "Norms after 10 steps"
    assert pictures.norm_table(later)[1:] == [["still", 3.0, 2.0, 1.5]]


def test_all_is_drawn_again_from_the_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [*history(3), {"kind": "norms", "step": 0, "layers": {"layer0.weight": [3.0, 1.5]}}]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "metrics.jsonl").write_text(text)
    assert main([str(tmp_path)]) == 0
    tables, pictures = ["norms.csv", "trust.csv"], ["curves.png", "norms.png", "trust.png"]
    assert files_below(tmp_path) == sorted(["metrics.jsonl", *tables, *pictures])
    assert cells(tmp_path / "norms.csv")[1] == ["layer0.weight", "3.0", "1.5", "2.0"]
    assert cells(tmp_path / "trust.csv")[1] == ["1", "0.1", "0.01", "0.02", "0.03"]
    assert main([]) == 2
    assert main([str(tmp_path / "absent")]) == 2
    assert "No such file or directory" in capsys.readouterr().err


@pytest.mark.parametrize("text", ['{"loss": 1}\n', "[1]\n", '{"kind": "train"}\n', "\xff"])
def test_what_is_no_log_is_not_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(text.encode("latin-1"))
    assert main([str(tmp_path)]) == 2
    assert "metrics.jsonl is not a log of the trainer" in capsys.readouterr().err
    assert files_below(tmp_path) == ["metrics.jsonl"]


def test_a_picture_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "curves.png"
    pictures.save(pictures.curves([{"kind": "start", "title": "LARS"}]), path)  # of nothing yet
    before = path.read_bytes()
    assert before.startswith(b"\x89PNG")

    def fail(_figure: Figure, file: BinaryIO, **_options: Any) -> None:
        file.write(before[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="No space left"):
        pictures.save(pictures.curves(history(1)), path)
    assert files_below(tmp_path) == ["curves.png"]
    assert path.read_bytes() == before


# Norms of weights and gradients.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_norms_of_every_parameter_with_a_gradient(dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1)).to(dtype)
    net[2].requires_grad_(False)
    net(torch.randn(8, 3, dtype=dtype)).sum().backward()
    found = norms.measure(net, norms.weights(net))
    assert list(found) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    for name, (weight, gradient) in found.items():
        parameter = net.get_parameter(name)
        assert parameter.grad is not None
        for norm, tensor in ((weight, parameter), (gradient, parameter.grad)):
            squares = (value**2 for value in tensor.detach().double().flatten().tolist())
            assert norm == pytest.approx(math.sqrt(sum(squares)), rel=1e-12)


def test_squares_outside_of_float32() -> None:
    net = nn.Linear(2, 2, bias=False)
    net.weight.grad = torch.full((2, 2), 1e-30)
    nn.init.constant_(net.weight, 1e30)
    weight, gradient = norms.measure(net, norms.weights(net))["weight"]
    assert weight == pytest.approx(2e30, rel=1e-6)
    assert gradient == pytest.approx(2e-30, rel=1e-6)


def test_without_gradients_there_are_none() -> None:
    net = nn.Linear(2, 2)
    assert norms.measure(net, norms.weights(net)) == {}
