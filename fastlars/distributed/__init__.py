"""Optimizers over several processes: the step overlapped with DDP's all-reduce."""

from fastlars.distributed.ddp import Handle, overlap

__all__ = ["Handle", "overlap"]
