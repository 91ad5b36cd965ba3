"""LAMB in Hugging Face's Trainer, or through Accelerate: ``hugging_face.py [--accelerate]``."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import fastlars


class Sequences(Dataset[dict[str, torch.Tensor]]):
    """Random tokens; the label says whether the first one is in the upper half."""

    def __init__(self, count: int) -> None:
        self.tokens = torch.randint(100, (count, 16), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = self.tokens[index]
        return {"input_ids": tokens, "labels": (tokens[0] >= 50).long()}


def optimizer_and_schedule(model: torch.nn.Module, steps: int) -> tuple[Any, Any]:
    """What both ways share: LAMB, warm-up over a tenth of the steps, linear decay."""
    optimizer = fastlars.LAMB(fastlars.parameter_groups(model, weight_decay=0.01), lr=5e-3)
    shape = {"steps": steps, "power": 1.0, "warmup_steps": steps // 10}
    return optimizer, fastlars.schedules.polynomial(optimizer, **shape)


def with_trainer(model: Any, data: Sequences, batch: int, epochs: int) -> float:
    """Trainer takes a pair of optimizer and schedule; by default it clips gradients to 1."""
    options = TrainingArguments(
        "runs/hugging_face", per_device_train_batch_size=batch, num_train_epochs=epochs,
        save_strategy="no", report_to=[],
    )  # fmt: skip
    pair = optimizer_and_schedule(model, epochs * (len(data) // batch))
    trainer = Trainer(model, options, train_dataset=data, optimizers=pair)
    return float(trainer.train().training_loss)


def with_accelerate(model: Any, data: Sequences, batch: int, epochs: int) -> float:
    """accelerator.prepare wraps the optimizer; step and zero_grad are called as ever."""
    accelerator = Accelerator()
    optimizer, schedule = optimizer_and_schedule(model, epochs * (len(data) // batch))
    batches = DataLoader(data, batch, shuffle=True)
    model, optimizer, batches, schedule = accelerator.prepare(model, optimizer, batches, schedule)
    for _ in range(epochs):
        for inputs in batches:
            optimizer.zero_grad()
            loss = model(**inputs).loss
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
    return float(loss.item())


def main(arguments: list[str] | None = None) -> float:
    """Train; the loss."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--accelerate", action="store_true")
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args(arguments)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=100, intermediate_size=128, **sizes)
    model = BertForSequenceClassification(config)
    train = with_accelerate if options.accelerate else with_trainer
    return train(model, Sequences(1024), 64, options.epochs)


if __name__ == "__main__":
    print(f"loss {main():.4f}")
