"""LAMB with FSDP2: weights, gradients and states are sharded, trust ratios are of whole layers.

``torchrun --nproc-per-node=8 examples/fsdp2.py``
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fastlars


def main(arguments: list[str] | None = None) -> float:
    """Train a transformer on random sequences; return the last loss."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--checkpoint", help="folder to go on from, and to save in")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    mesh = init_device_mesh(device, (dist.get_world_size(),))

    torch.manual_seed(0)
    layers = [
        nn.TransformerEncoderLayer(options.width, 8, 4 * options.width, batch_first=True)
        for _ in range(options.layers)
    ]
    model = nn.Sequential(*layers, nn.Linear(options.width, 10)).to(device)
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)

    # Only this line is new: pass the sharded parameters as they are. A step adds up the shards'
    # sums of squares in one small all-reduce, and gathers nothing.
    optimizer = fastlars.LAMB(fastlars.parameter_groups(model, weight_decay=0.01), lr=2e-3)

    saved = options.checkpoint and os.path.exists(options.checkpoint)
    if saved:
        weights, states = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optimizer": states}, checkpoint_id=options.checkpoint)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=states)
    torch.manual_seed(1 + dist.get_rank())
    batch = torch.randn(4, 16, options.width, device=device)
    labels = torch.randint(10, (4 * 16,), device=device)
    for step in range(options.steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(batch).flatten(0, 1), labels)
        loss.backward()
        optimizer.step()
        if dist.get_rank() == 0:
            print(f"step {step + 1}: loss {loss.item():.4f}", flush=True)
    if options.checkpoint:
        weights, states = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": states}, checkpoint_id=options.checkpoint)
    dist.destroy_process_group()
    return loss.item()


if __name__ == "__main__":
    main()
