"""Host time of steps that differ in which parameters have gradients, beside steps that do not.

``python -m benchmarks.step.changing [TENSORS [ROUNDS]]``

Layer drop takes a tenth of the gradients at random; two networks in turns have one half each;
channels_last weights get contiguous gradients. Tensors are small, so that the host's share is all
there is. Calls take turns in one process, on one thread; prints medians in microseconds, and the
ratio to fastlars with all gradients.
"""

from __future__ import annotations

import random
import sys

import torch
from torch import nn

from benchmarks import results
from benchmarks.machine import describe
from benchmarks.step import contenders
from benchmarks.step.contenders import Build
from benchmarks.timing import interleave

# Not torch's fused SGD, which fails where a parameter gets its first gradient later than others.
BUILDS: dict[str, Build] = {
    "fastlars LARS": contenders.LARS["fastlars"].build,
    "timm Lars": contenders.LARS["timm Lars"].build,
    "torch SGD(foreach)": lambda params: torch.optim.SGD(params, lr=contenders.LR, momentum=0.9),
    "fastlars LAMB": contenders.LAMB["fastlars"].build,
    "timm Lamb": contenders.LAMB["timm Lamb"].build,
    "torch AdamW(foreach)": lambda params: torch.optim.AdamW(params, lr=contenders.LR),
}
SETS = ("all", "a tenth dropped", "halves in turns", "one half", "lie otherwise")


class Run:
    """An optimizer, and the gradients of its next step."""

    def __init__(self, build: Build, which: str, tensors: int) -> None:
        value = torch.randn(4, 2, 2, 2)
        if which == "lie otherwise":
            value = value.contiguous(memory_format=torch.channels_last)
        self.params = [nn.Parameter(value.clone()) for _ in range(tensors)]
        self.grads = [torch.randn(4, 2, 2, 2) for _ in self.params]
        self.which, self.step = which, 0
        self.optimizer = build(self.params)
        self.random = random.Random(1)
        self.next()

    def next(self) -> None:
        """Give the gradients of the next step."""
        n, self.step = len(self.params), self.step + 1
        without: set[int] = set()
        if self.which == "a tenth dropped":
            without = set(self.random.sample(range(n), n // 10))
        elif self.which == "halves in turns":
            without = set(range(self.step % 2, n, 2))
        elif self.which == "one half":
            without = set(range(0, n, 2))
        for i, (p, g) in enumerate(zip(self.params, self.grads, strict=True)):
            p.grad = None if i in without else g


def main(tensors: str = "400", rounds: str = "200") -> int:
    """Print a table."""
    torch.set_num_threads(1)
    print(*describe().values(), f"{tensors} tensors", sep=", ")
    runs = {
        f"{name}, {which}": Run(build, which, int(tensors))
        for name, build in BUILDS.items()
        for which in SETS
    }
    for run in runs.values():
        for _ in range(20):  # until every parameter has been stepped
            run.optimizer.step()
            run.next()
    found = interleave(
        {name: run.optimizer.step for name, run in runs.items()},
        int(rounds),
        between={name: run.next for name, run in runs.items()},
    )
    lines = []
    for name in BUILDS:
        times = [found[f"{name}, {which}"].median * 1e6 for which in SETS]
        lars = name in contenders.LARS or name.endswith(("LARS", "SGD(foreach)"))
        ours = "fastlars LARS, all" if lars else "fastlars LAMB, all"
        base = found[ours].median * 1e6
        lines.append([name, *(f"{t:.0f} ({t / base:.2f})" for t in times)])
    print(results.markdown(" | ".join(["optimizer", *SETS]), "lr", lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
