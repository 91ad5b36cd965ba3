"""``python -m fastlars``: what was built, and which back end each device gets, and why."""

from __future__ import annotations

import os
import platform
import sys

import torch

import fastlars
from fastlars import _C
from fastlars.backends import choose


def build_lines() -> list[str]:
    """What was compiled when the package was installed."""
    info = _C.build_info()
    openmp = f"OpenMP {info['openmp']}" if info["openmp"] else "no OpenMP: one thread"
    if info["cuda"]:
        cuda = f"nvcc {info['cuda_version']}, architectures {info['cuda_archs']}"
    else:
        cuda = f"not built: {info['cuda_reason']}"
    return [
        f"extension  {info['compiler']}, {info['build_type']}, {openmp}",
        f"cuda       {cuda}",
        f"triton     {triton_version()}",
    ]


def triton_version() -> str:
    """Triton's version, or why there is none."""
    try:
        import triton
    except ImportError as error:
        return f"cannot be imported ({error})"
    return f"{triton.__version__}"


def device_lines() -> list[str]:
    """For every device of this machine, the back end that float32 parameters get, and why."""
    lines = []
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    for device in devices:
        weight = torch.empty(1, device=device)
        try:
            name = choose.choose(weight, weight.dtype, torch.float32).name
        except RuntimeError as error:
            lines.append(f"{device!s:10} refused: {error}")
            continue
        why = choose.why_not_compiled(weight, weight.dtype, torch.float32)
        if name == "cpu":
            why = f"{_C.instruction_set()}, {torch.get_num_threads()} threads"
        elif choose.forced() == name:
            why = "FASTLARS_BACKEND asks for it"
        elif name == "triton":
            why = "there are no CUDA kernels for it"
        lines.append(f"{device!s:10} {name}: {why}")
    return lines


def main() -> int:
    """Print the report; 0, or 2 where FASTLARS_BACKEND names no back end."""
    print(f"fastlars   {fastlars.__version__}")
    print(f"torch      {torch.__version__}, Python {platform.python_version()}")
    try:
        for line in [*build_lines(), *device_lines()]:
            print(line)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    forced = os.environ.get("FASTLARS_BACKEND")
    print(f"override   FASTLARS_BACKEND={forced}" if forced else "override   none")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
