"""Optimizers over several processes: the step overlapped with the reductions of DDP and FSDP2."""

from fastlars.distributed.overlapping import overlap
from fastlars.in_backward.handle import Handle

__all__ = ["Handle", "overlap"]
