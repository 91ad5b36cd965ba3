"""The version of NVIDIA's driver; without torch, which may not be installed yet."""

from __future__ import annotations

import subprocess


def version() -> str:
    """The version that nvidia-smi prints, or "unknown"."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.split("\n")[0].strip()
