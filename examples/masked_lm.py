"""BERT-like masked language modelling with LAMB; large batches by gradient accumulation.

``python examples/masked_lm.py --text FILE [--batch-size 4096]``; without --text, on this file.
"""

from __future__ import annotations

import argparse
import math

import torch
from transformers import BertConfig, BertForMaskedLM

import fastlars

MASK, VOCABULARY = 256, 257  # the bytes, and the token that hides them


def masked(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Hide 15% of [n, length] tokens; labels are -100 at all other places."""
    hidden = torch.rand(tokens.shape) < 0.15
    return tokens.masked_fill(hidden, MASK), tokens.masked_fill(~hidden, -100)


def main(arguments: list[str] | None = None) -> float:
    """Train; return the last loss."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", default=__file__)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=4096)
    # You et al. 2019: the rate grows with the square root of the batch, 5e-3 at 32,768.
    parser.add_argument("--base-lr", type=float, default=5e-3, help="at a batch of 32,768")
    parser.add_argument("--micro-batch", type=int, default=64, help="sequences of a forward pass")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with open(options.text, "rb") as file:
        text = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8).long()

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 64,
        intermediate_size=4 * options.width,
        max_position_embeddings=options.length,
    )
    model = BertForMaskedLM(config).to(device)

    lr = options.base_lr * math.sqrt(options.batch_size / 32768)
    groups = fastlars.parameter_groups(model, weight_decay=0.01)
    optimizer = fastlars.LAMB(groups, lr=lr, max_grad_norm=1.0)
    schedule = fastlars.schedules.polynomial(
        optimizer, steps=options.steps, power=1.0, warmup_steps=options.steps // 10
    )
    passes = options.batch_size // options.micro_batch
    for step in range(options.steps):
        optimizer.zero_grad()
        mean = 0.0
        for _ in range(passes):
            starts = torch.randint(len(text) - options.length, (options.micro_batch, 1))
            tokens, labels = masked(text[starts + torch.arange(options.length)])
            loss = model(input_ids=tokens.to(device), labels=labels.to(device)).loss / passes
            loss.backward()
            mean += loss.item()
        optimizer.step()
        schedule.step()
        if step % max(options.steps // 20, 1) == 0 or step == options.steps - 1:
            print(f"step {step + 1}: loss {mean:.4f}")
    return mean


if __name__ == "__main__":
    main()
