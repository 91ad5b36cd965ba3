"""LAMB in Hugging Face's Trainer, or with Accelerate: ``hugging_face.py [--accelerate]``."""

from __future__ import annotations

import sys
from typing import Any

import torch
import transformers
from accelerate import Accelerator

import fastlars
from fastlars.logging import layer_statistics, summary


class TrustRatios(transformers.TrainerCallback):
    """Log the smallest, median and largest trust ratio whenever the loss is logged."""

    def __init__(self, trainer: transformers.Trainer) -> None:
        self.trainer = trainer

    def on_step_end(self, _args, _state, control, model=None, optimizer=None, **_) -> None:  # type: ignore
        if control.should_log:
            self.trainer.log(summary(layer_statistics(model, optimizer)))
            control.should_log = True  # log() has unset it, but the loss comes next


def sequences(count: int) -> list[dict[str, torch.Tensor]]:
    """Random tokens; the label says whether the first one is in the upper half."""
    tokens = torch.randint(100, (count, 16), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": (row[0] >= 50).long()} for row in tokens]


def optimizer_and_schedule(model: torch.nn.Module, steps: int) -> tuple[Any, Any]:
    """For Trainer and Accelerate: LAMB, warm-up over a tenth of the steps, linear decay."""
    optimizer = fastlars.LAMB(fastlars.parameter_groups(model, weight_decay=0.01), lr=5e-3)
    shape = {"steps": steps, "power": 1.0, "warmup_steps": steps // 10}
    return optimizer, fastlars.schedules.polynomial(optimizer, **shape)


def with_trainer(model: Any, data: Any, batch: int, epochs: int) -> float:
    """Pass Trainer a pair of optimizer and schedule. By default it clips gradients to 1."""
    options = transformers.TrainingArguments(
        "runs/hugging_face", per_device_train_batch_size=batch, num_train_epochs=epochs,
        save_strategy="no", report_to=[], logging_steps=20,
    )  # fmt: skip
    pair = optimizer_and_schedule(model, epochs * (len(data) // batch))
    trainer = transformers.Trainer(model, options, train_dataset=data, optimizers=pair)
    trainer.add_callback(TrustRatios(trainer))
    return float(trainer.train().training_loss)


def with_accelerate(model: Any, data: Any, batch: int, epochs: int) -> float:
    """accelerator.prepare wraps the optimizer; call step and zero_grad as usual."""
    accelerator = Accelerator()
    optimizer, schedule = optimizer_and_schedule(model, epochs * (len(data) // batch))
    batches: Any = torch.utils.data.DataLoader(data, batch, shuffle=True)
    model, optimizer, batches, schedule = accelerator.prepare(model, optimizer, batches, schedule)
    for _ in range(epochs):
        for inputs in batches:
            optimizer.zero_grad()
            loss = model(**inputs).loss
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
    return float(loss.item())


def main(accelerate: bool) -> float:
    """Train; return the loss."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=100, intermediate_size=128, **sizes)
    model = transformers.BertForSequenceClassification(config)
    train = with_accelerate if accelerate else with_trainer
    return train(model, sequences(1024), batch=64, epochs=6)


if __name__ == "__main__":
    print(f"loss {main('--accelerate' in sys.argv):.4f}")
