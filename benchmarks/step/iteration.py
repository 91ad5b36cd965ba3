"""What an optimizer costs in a real iteration: its share of forward, backward and step.

``python -m benchmarks.step.iteration [--csv OUT.csv] [--models resnet50,bert_large]``

ResNet-50 with 32 images of 224 pixels, the share of a worker in Goyal et al. and Akiba et al., and
BERT-large with 4 sequences of 128 tokens. In every round there is one forward and backward pass,
and then every contender steps once, with the gradients of that pass and with momentum of its own;
medians are reported.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks import results
from benchmarks.machine import describe_run
from benchmarks.models import bert_large, resnet50
from benchmarks.step.contenders import RULES
from benchmarks.timing import Sample, interleave

# Of each model: how it is built, its batch, and whose rule steps it.
MODELS: dict[str, tuple[Callable[..., Any], tuple[int, int], str]] = {
    "resnet50": (resnet50, (32, 224), "lars"),
    "bert_large": (bert_large, (4, 128), "lamb"),
}


def measure(
    model: str, device: torch.device, rounds: int, batch: tuple[int, int] | None = None
) -> list[dict[str, Any]]:
    """One row for each contender that is installed."""
    build, usual, rule = MODELS[model]
    batch = batch or usual
    torch.manual_seed(0)
    network, loss = build(device, *batch)
    params = list(network.parameters())

    def synchronised(call: Callable[[], object]) -> Callable[[], object]:
        def called() -> None:
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()

        return called

    def passes() -> None:
        for p in params:
            p.grad = None
        loss().backward()

    passes()
    calls = {"passes": synchronised(passes)}
    versions = {}
    for name, contender in RULES[rule].items():
        # jax's optimizers do not step torch's parameters.
        if contender.package != "optax" and _installed(contender.package):
            calls[name] = synchronised(contender.build(params).step)
            versions[name] = importlib.metadata.version(contender.package)
    samples = interleave(calls, rounds)
    passing = samples.pop("passes")
    return [_row(model, batch, name, versions[name], s, passing) for name, s in samples.items()]


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _row(
    model: str, batch: tuple[int, int], name: str, version: str, step: Sample, passing: Sample
) -> dict[str, Any]:
    return {
        "model": model,
        "batch": " x ".join(map(str, batch)),
        "contender": name,
        "version": version,
        "passes_ms": f"{1e3 * passing.median:.4g}",
        "step_ms": f"{1e3 * step.median:.4g}",
        "share_of_iteration": f"{step.median / (step.median + passing.median):.4f}",
        "rounds": len(step.seconds),
    }


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table for people."""
    return results.markdown(
        "model | batch | optimizer | forward and backward ms | step ms | step's share",
        "lllr",
        (
            f"{r['model']} | {r['batch']} | {r['contender']} {r['version']} | {r['passes_ms']} | "
            f"{r['step_ms']} | {float(r['share_of_iteration']):.1%}"
            for r in rows
        ),
    )


def main() -> None:
    """Measure, print, and write the CSV where asked."""
    parser = results.parser(__doc__, rounds=9)
    parser.add_argument("--models", type=lambda text: text.split(","), default=list(MODELS))
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    options = parser.parse_args()
    begin = time.perf_counter()
    rows = list(
        itertools.chain.from_iterable(
            measure(model, options.device, options.rounds) for model in options.models
        )
    )
    where = describe_run(options.device)
    table = f"{markdown(rows)}\n\n{where}, {time.perf_counter() - begin:.0f} s"
    results.publish(table, [row | where for row in rows], options.csv)


if __name__ == "__main__":
    main()
