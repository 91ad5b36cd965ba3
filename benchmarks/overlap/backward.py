"""When in the backward pass each gradient of ResNet-50 is ready, measured on this machine.

``python -m benchmarks.overlap.backward --csv benchmarks/results/backward.csv``

benchmarks.scaling.model needs the order and the shares; seconds are those of the CPU that ran this.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn
from torch.nn import functional

from benchmarks import results
from benchmarks.machine import describe


def profile(model: nn.Module, images: torch.Tensor, rounds: int) -> list[dict[str, object]]:
    """One row a parameter, in the order in which gradients come: median over the rounds."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    labels = torch.zeros(len(images), dtype=torch.long)
    came: dict[str, float] = {}

    def note(parameter: torch.Tensor) -> None:
        came[names[parameter]] = time.perf_counter()

    hooks = [p.register_post_accumulate_grad_hook(note) for p in names]
    shares: dict[str, list[float]] = {name: [] for name in names.values()}
    forwards, backwards = [], []
    for number in range(rounds + 1):
        model.zero_grad(set_to_none=True)
        start = time.perf_counter()
        loss = functional.cross_entropy(model(images), labels)
        middle = time.perf_counter()
        loss.backward()
        end = time.perf_counter()
        if number == 0:  # allocates, and chooses kernels
            continue
        forwards.append(middle - start)
        backwards.append(end - middle)
        for name, moment in came.items():
            shares[name].append((moment - middle) / (end - middle))
    for hook in hooks:
        hook.remove()
    sizes = {name: parameter.numel() for parameter, name in names.items()}
    ready = {name: statistics.median(values) for name, values in shares.items()}
    common = {
        "images": len(images),
        "forward_s": f"{statistics.median(forwards):.4g}",
        "backward_s": f"{statistics.median(backwards):.4g}",
        "rounds": rounds,
        **describe(),
    }
    return [
        {"parameter": name, "elements": sizes[name], "ready": f"{ready[name]:.4f}", **common}
        for name in sorted(ready, key=ready.__getitem__)
    ]


def main(argv: list[str] | None = None) -> int:
    """Measure, and write the CSV."""
    parser = results.parser(__doc__, rounds=3)  # one more comes first
    parser.add_argument("--images", type=int, default=32, help="of a worker; the papers' number")
    arguments = parser.parse_args(argv)
    from torchvision.models import resnet50

    torch.manual_seed(0)
    images = torch.randn(arguments.images, 3, 224, 224)
    rows = profile(resnet50(), images, arguments.rounds)
    said = f"{len(rows)} gradients, backward {rows[0]['backward_s']} s"
    results.publish(said, rows, arguments.csv)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
