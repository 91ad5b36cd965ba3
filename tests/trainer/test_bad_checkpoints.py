"""What is no checkpoint, a damaged one, or one of something else is refused in one line."""

from __future__ import annotations

import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlars.trainer.__main__ import main
from fastlars.trainer.errors import TrainerError
from fastlars.trainer.model import resnet
from fastlars.trainer.output import checkpoint
from trainer.helpers import Outcome, assert_same, files_below, load, tiny_net

Train = Callable[..., Outcome]
SHORT = ("--epochs", 1, "--batch-size", 512)
pytestmark = pytest.mark.usefixtures("tiny", "no_picture")


def test_changed_bits_are_seen(tmp_path: Path) -> None:
    """Also in the archive's directory, which its checksums do not cover."""
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"weights": torch.arange(300.0), "step": 3, "name": "x" * 40})
    whole, draw = path.read_bytes(), random.Random(0)
    for at in range(0, len(whole), 3):
        changed = bytearray(whole)
        changed[at] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(TrainerError, match="is damaged or not a checkpoint"):
            checkpoint.load(path)
    for cut in (1, 30, 40, 60, 300):
        path.write_bytes(whole[:-cut])
        with pytest.raises(TrainerError, match="is damaged or not a checkpoint"):
            checkpoint.load(path)


def test_the_previous_version_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It also had states of random number generators."""
    path, state = tmp_path / "checkpoint.pt", {"weights": torch.arange(300.0), "random": [{}]}
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_FORMAT", "fastlars.trainer checkpoint 3")
        checkpoint.save(path, state)
    assert_same(checkpoint.load(path)["weights"], state["weights"])
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(TrainerError, match="is damaged or not a checkpoint"):
        checkpoint.load(path)


def garbage() -> list[bytes]:
    draw = random.Random(0)
    texts = [
        b"step,epoch\n1,0.5\n",
        b'{"kind": "start"}\n',
        b"\x89PNG\r\n\x1a\n",
        b"PK\x05\x06" + bytes(18),
    ]
    pickles = [pickle.dumps(value) for value in (None, [1], {"format": 3}, {3: 4}, Path("x"))]
    noise = [draw.randbytes(draw.randint(1, 200)) for _ in range(300)]
    return [*texts, *pickles, *noise]


def test_files_of_other_kinds(tmp_path: Path) -> None:
    path = tmp_path / "x"
    for content in garbage():
        path.write_bytes(content)
        with pytest.raises(TrainerError, match=r"--resume: .*/x is damaged or not a checkpoint"):
            checkpoint.load(path)


@pytest.mark.parametrize("kind", ["folder", "fifo", "device"])
def test_what_is_no_file(tmp_path: Path, train: Train, kind: str) -> None:
    path = tmp_path / "checkpoint.pt"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path = Path("/dev/zero")
    outcome = train("--resume", path if kind != "folder" else tmp_path, "--output", tmp_path / "o")
    assert outcome.status == 2
    assert outcome.err == f"fastlars.trainer: error: --resume: {path} is not a file\n"


# What a checkpoint can be made to hold by hand, or by another program.
CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    f"{key} is {value!r}": lambda state, key=key, value=value: state.update({key: value})  # type: ignore[misc]
    for key in checkpoint._CONTENTS
    for value in ("text", [], {})
    if (key, value) not in [("scaler", {}), ("average", {})]  # none is used here
} | {
    f"no {key}": lambda state, key=key: state.pop(key)  # type: ignore[misc]
    for key in checkpoint._CONTENTS
    if key != "average"  # without which None stands for it
} | {
    "weights of another shape": lambda state: state["model"].update(
        {"0.weight": torch.zeros(16, 3, 5, 5)}
    ),
    "other names of weights": lambda state: state["model"].update(
        {"layer1.weight": state["model"].pop("0.weight")}
    ),
    "a parameter more": lambda state: state["optimizer"]["param_groups"][0]["params"].append(99),
    "a setting out of range": lambda state: state["config"].update({"batch_size": -1}),
    "a setting of another kind": lambda state: state["config"].update({"batch_size": "many"}),
    "another recipe": lambda state: state["config"].update({"recipe": "adam"}),
    "another model": lambda state: state["config"].update({"model": "vgg16"}),
    "progress beyond words": lambda state: state["progress"].update({"step": "three"}),
    "more progress": lambda state: state["progress"].update({"speed": 3}),
    "sums of another shape": lambda state: state.update({"window": torch.zeros(2)}),
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The checkpoint of a run of one step."""
    run = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resnet, "build", tiny_net)
        assert main([*map(str, SHORT), "--output", str(run), "--max-steps", "1"]) == 0
    return (run / "checkpoint.pt").read_bytes()


@pytest.mark.parametrize("change", CHANGES)
def test_states_that_do_not_fit(tmp_path: Path, train: Train, made: bytes, change: str) -> None:
    run = tmp_path / "run"
    path = run / "checkpoint.pt"
    run.mkdir()
    path.write_bytes(made)
    state = torch.load(path, weights_only=True)
    CHANGES[change](state)
    torch.save(state, path)
    before = path.read_bytes(), files_below(run)
    outcome = train("--resume", "--output", run, "--max-steps", 2)
    assert outcome.status == 2, outcome
    assert len(outcome.err.splitlines()) == 1, outcome.err
    assert len(outcome.err) < 700
    assert str(run) in outcome.err
    assert (path.read_bytes(), files_below(run)) == before


@pytest.mark.parametrize("other", ["lamb", "akiba", "goyal"])
def test_a_checkpoint_of_another_recipe(tmp_path: Path, train: Train, other: str) -> None:
    """Flags that contradict it are refused, and so is an optimizer's state in another's place."""
    for recipe in ("lars", other):
        flags = ("--recipe", recipe, "--output", tmp_path / recipe)
        assert train(*SHORT, *flags, "--max-steps", 1).status == 0
    outcome = train("--resume", tmp_path / "lars", "--recipe", other, "--output", tmp_path / "new")
    assert outcome.status == 2
    assert f"--recipe {other}: the run in" in outcome.err
    assert not (tmp_path / "new").exists()
    state, stranger = load(tmp_path / "lars"), load(tmp_path / other)
    checkpoint.save(tmp_path / "mixed.pt", state | {"optimizer": stranger["optimizer"]})
    outcome = train("--resume", tmp_path / "mixed.pt", "--output", tmp_path / "new")
    assert outcome.status == 2, outcome
    assert "mixed.pt does not fit its model and recipe: " in outcome.err
    assert len(outcome.err.splitlines()) == 1
    assert not (tmp_path / "new").exists()
