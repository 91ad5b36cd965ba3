"""The machine that a measurement ran on, for the columns beside its numbers."""

from __future__ import annotations

import os
import platform

import cpuinfo
import torch


def describe() -> dict[str, str]:
    """Processor, cores and torch of this machine."""
    brand = cpuinfo.get_cpu_info().get("brand_raw", platform.machine())
    return {"machine": f"{brand}, {os.cpu_count()} cores", "torch": torch.__version__}
