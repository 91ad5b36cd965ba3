"""Every example runs, at toy size, as a user would start it; and is short enough to be read."""

from __future__ import annotations

import csv
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from repository_files import ROOT

EXAMPLES = ROOT / "examples"
# What each is called with, and the most that its last loss may be: below what guessing gives.
# Toy sizes of the two that are given noise learn nothing that could be asked for.
_MASKED = (
    "--steps 60 --batch-size 32 --micro-batch 16 --layers 1 --width 64 --length 32 --base-lr 0.5"
)
TOY = {
    "simclr": ("--batch-size 8 --epochs 2 --side 32", 1e3),
    "masked_lm": (f"{_MASKED} --base-lr 0.5", 4.5),  # ln 256 = 5.55
    "fsdp2": ("--steps 6 --width 64 --layers 2", 2.4),  # ln 10 = 2.30
    "lightning_module": ("--batch-size 8 --epochs 2", 1e3),
    "hugging_face": ("", 0.68),  # ln 2 = 0.69
}


def run(name: str, *more: str, processes: int = 1) -> str:
    """What an example prints; it is started in a process of its own."""
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [*start, str(EXAMPLES / f"{name}.py"), *TOY[name][0].split(), *more],
        capture_output=True, text=True, timeout=600,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    # gloo's threads sometimes abort a process of torch 2.15 that has done all its work.
    aborted = processes > 1 and "terminate called without an active exception" in done.stderr
    assert done.returncode == 0 or aborted, done.stderr
    return done.stdout + done.stderr


def last_loss(printed: str) -> float:
    """The number behind the last "loss"."""
    return float(re.findall(r"loss[ =:]+([\d.]+)", printed)[-1])


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("simclr", marks=pytest.mark.slow),
        "masked_lm",
        pytest.param("lightning_module", marks=pytest.mark.slow),
    ],
)
def test_example_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert last_loss(run(name)) < TOY[name][1]


@pytest.mark.slow
def test_fsdp2_goes_on_from_its_checkpoint_on_more_processes(tmp_path: Path) -> None:
    folder = str(tmp_path / "checkpoint")
    first = run("fsdp2", "--checkpoint", folder, processes=2)
    assert last_loss(first) < TOY["fsdp2"][1]
    again = run("fsdp2", "--checkpoint", folder, "--steps", "1", processes=3)
    losses = [float(re.findall(r"step 1: loss ([\d.]+)", text)[0]) for text in (first, again)]
    assert losses[1] < losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("way", [[], ["--accelerate"]])
def test_hugging_face_learns(
    way: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert last_loss(run("hugging_face", *way)) < TOY["hugging_face"][1]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_are_short_and_tested(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 80
    assert path.stem in TOY


def _module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_masked_tokens_are_those_that_are_guessed() -> None:
    import torch

    module = _module("masked_lm")
    tokens = torch.randint(256, (64, 64))
    seen, labels = module.masked(tokens)
    hidden = labels != -100
    assert 0.1 < hidden.float().mean() < 0.2
    assert (seen[hidden] == module.MASK).all()
    assert (labels[hidden] == tokens[hidden]).all()
    assert (seen[~hidden] == tokens[~hidden]).all()


def test_lightning_logs_ratios_with_its_own_logger(tmp_path: Path) -> None:
    """At the steps that Lightning logs, although batches are accumulated."""
    import lightning
    import torch
    from lightning.pytorch.loggers import CSVLogger

    import fastlars

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Linear(4, 2)

        def training_step(self, batch: torch.Tensor, _index: int) -> torch.Tensor:
            return self.net(batch).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return fastlars.LARS(self.parameters(), lr=0.1)

    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=6, log_every_n_steps=2, accumulate_grad_batches=2,
        logger=CSVLogger(tmp_path), callbacks=[_module("lightning_module").TrustRatios()],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Module(), torch.utils.data.DataLoader(list(torch.randn(24, 4)), 2))
    (path,) = tmp_path.rglob("metrics.csv")
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [1, 3, 5]  # counted from 0
    for row in rows:
        low, middle, high = (float(row[f"trust_ratio_{each}"]) for each in ("min", "median", "max"))
        assert 0.0 < low <= middle <= high


def test_hugging_face_logs_ratios_beside_the_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And reads them at no other step."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import transformers

    module = _module("hugging_face")
    reads: list[Any] = []
    plain = module.layer_statistics
    monkeypatch.setattr(
        module, "layer_statistics", lambda *given: reads.append(given) or plain(*given)
    )
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
        intermediate_size=8,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    options = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=6,
        logging_steps=3, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    pair = module.optimizer_and_schedule(model, 6)
    trainer = transformers.Trainer(
        model, options, train_dataset=module.sequences(64), optimizers=pair
    )
    trainer.add_callback(module.TrustRatios(trainer))
    trainer.train()
    assert len(reads) == 2
    for key in ("loss", "trust_ratio_median"):
        assert [row["step"] for row in trainer.state.log_history if key in row] == [3, 6], key
