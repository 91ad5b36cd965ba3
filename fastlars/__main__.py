"""``python -m fastlars``: what was built, and which back end serves each device, and why.

``python -m fastlars check`` steps small problems with every back end that serves a device here.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sys

if __name__ == "__main__":
    # Before torch is imported, which takes seconds: Ctrl-C then prints no traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from fastlars import installation

    try:
        installation.load_all()
    except ImportError as error:
        sys.exit(f"fastlars: error: {error}")

import torch
from torch import Tensor

import fastlars
from fastlars import _C, check
from fastlars.backends import choose, cuda
from fastlars.backends.base import Dtypes
from fastlars.rules import RULES

FLOAT32 = Dtypes(torch.float32, torch.float32, torch.float32)


def build_lines() -> list[str]:
    """What was compiled when the package was installed."""
    info = _C.build_info()
    openmp = f"OpenMP {info['openmp']}" if info["openmp"] else "no OpenMP: one thread"
    if info["cuda"]:
        kernels = f"nvcc {info['cuda_version']}, architectures {info['cuda_archs']}"
        if not torch.cuda.is_available():
            kernels += f"; not usable here: {_C.cuda_why_not() or 'torch sees no GPU'}"
    else:
        kernels = f"not built: {info['cuda_reason']}"
    return [
        f"extension  {info['compiler']}, {info['build_type']}, {openmp}",
        f"cuda       {kernels}",
        f"triton     {triton_version()}",
    ]


def triton_version() -> str:
    """Triton's version, or why it cannot be imported."""
    reason = choose.why_no_triton("cuda")
    if reason:
        return reason
    import triton

    return f"{triton.__version__}"


def device_lines() -> list[str]:
    """For each device of this machine, the back end of float32 parameters, and why it serves."""
    lines = []
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    for device in devices:
        weight = torch.empty(1, device=device)
        try:
            name = choose.choose(weight, FLOAT32, RULES[0].usual()).name
        except RuntimeError as error:
            lines.append(f"{device!s:10} refused: {error}")
            continue
        lines.append(f"{device!s:10} {name}: {why(name, weight)}")
    return lines


def why(name: str, weight: Tensor) -> str:
    """Why the back end of this name serves a weight, and how it runs."""
    reasons = []
    if choose.demanded_backend() == name:
        reasons.append("FASTLARS_BACKEND asks for it")
    else:
        _, faster = choose.find_compiled(weight, FLOAT32, RULES[0].usual())
        reasons += [choose.format_reasons(faster)] if faster else []
    if name == "cpu":
        reasons.append(f"{_C.instruction_set()}, {torch.get_num_threads()} threads")
    elif name == "cuda":
        reasons.append(f"{cuda.demanded_path()} path")
    if weight.device.type == "cuda":
        reasons.append(torch.cuda.get_device_name(weight.device))
    return "; ".join(reasons)


def main() -> int:
    """Print the report, or run the check. Returns 1 if a back end is wrong, 2 if an argument or an
    environment variable is."""
    parser = argparse.ArgumentParser("python -m fastlars", description=__doc__)
    parser.add_argument(
        "command", nargs="?", choices=("check",), help="step small problems with every back end"
    )
    if parser.parse_args().command == "check":
        return check.main()
    print(f"fastlars   {fastlars.__version__}")
    print(f"torch      {torch.__version__}, Python {platform.python_version()}")
    try:
        cuda.demanded_path()
        for line in [*build_lines(), *device_lines()]:
            print(line)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    names = ("FASTLARS_BACKEND", "FASTLARS_CHECK", "FASTLARS_CUDA_PATH")
    overrides = [f"{name}={os.environ[name]}" for name in names if os.environ.get(name)]
    print(f"override   {', '.join(overrides) or 'none'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
