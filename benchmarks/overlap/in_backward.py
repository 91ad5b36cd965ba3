"""Steps inside backward against ordinary ones: time of an iteration, and peak memory.

``python -m benchmarks.overlap.in_backward [--csv OUT.csv] [--models resnet50,bert_large]``

The ways train copies of a model in one process, and take turns round by round; medians are
reported, after a check that all have the same bits. Memory is measured in a process for each way:
how far the peak rises above what weights and states take, by torch's allocator on a GPU, by the
resident size on a CPU. There both depend on what glibc does with freed memory: see GLIBC.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastlars
from benchmarks import ROOT, results
from benchmarks.machine import describe_run
from benchmarks.models import BertLarge, bert_large, resnet50
from benchmarks.timing import interleave
from fastlars.in_backward.engine import WATCHED_STEPS


def small(device: torch.device, rows: int, width: int) -> tuple[nn.Module, Any]:
    """For tests: 16 square layers."""
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(16))).to(device)
    batch = torch.randn(rows, width, device=device)
    return model, lambda: model(batch).square().mean()


def bert_without_dropout(device: torch.device, sequences: int, tokens: int) -> tuple[Any, Any]:
    """All ways must compute the same gradients."""
    model, loss = bert_large(device, sequences, tokens)
    assert isinstance(model, BertLarge)
    return model.eval(), loss  # attention in eval mode still has gradients


MODELS: dict[str, tuple[Any, tuple[int, int], Any]] = {
    "resnet50": (resnet50, (8, 64), fastlars.LARS),
    "bert_large": (bert_without_dropout, (1, 128), fastlars.LAMB),
    "small": (small, (4, 256), fastlars.LAMB),
}
# Name of the way: MiB of gradients that are stepped together, or None for ordinary steps.
WAYS = {"ordinary": None, "25 MiB": 25.0, "5 MiB": 5.0}

# What glibc does with freed memory, and the environment in which it does so.
GLIBC = {
    "gives it back": {"MALLOC_MMAP_THRESHOLD_": "65536"},
    "defaults": {},
    "keeps it": {"MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "8000000000"},
}


class Contender:
    """A model, its optimizer, and the way it is stepped."""

    def __init__(self, name: str, bucket_mb: float | None, device: torch.device) -> None:
        build, batch, rule = MODELS[name]
        torch.manual_seed(0)
        self.model, self.loss = build(device, *batch)
        self.params = list(self.model.parameters())
        self.optimizer = rule(self.params, lr=1e-4, weight_decay=1e-4)
        self.device = device
        if bucket_mb is not None:
            fastlars.step_in_backward(self.model, self.optimizer, bucket_mb=bucket_mb)

    def iterate(self) -> None:
        """Forward, backward and step."""
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def make_states(self) -> None:
        """As the first step does."""
        for p in self.params:
            p.grad = torch.zeros_like(p)
            self.optimizer.step()
            p.grad = None


def times(name: str, device: torch.device, rounds: int) -> dict[str, float]:
    """Milliseconds of an iteration, by way."""
    contenders = {way: Contender(name, size, device) for way, size in WAYS.items()}
    for contender in contenders.values():
        for _ in range(WATCHED_STEPS):  # which also run checks
            contender.iterate()
    samples = interleave({way: c.iterate for way, c in contenders.items()}, rounds)
    expected = contenders["ordinary"].params
    for way, contender in contenders.items():
        if not all(map(torch.equal, contender.params, expected)):
            raise RuntimeError(f"{way} has other bits than ordinary steps")
    return {way: 1e3 * sample.median for way, sample in samples.items()}


def peak(name: str, way: str, device: torch.device) -> dict[str, int]:
    """Bytes of weights and states, and how far three iterations rise above them."""
    torch.set_num_threads(1)  # every thread of glibc's would keep memory of its own
    contender = Contender(name, WAYS[way], device)
    contender.make_states()
    held = [*contender.params]
    held += [v for p in contender.params for v in contender.optimizer.state[p].values()]
    before = _restart(device)
    for _ in range(3):
        contender.iterate()
    return {
        "kept": sum(t.nbytes for t in held),
        "gradients": sum(p.nbytes for p in contender.params),
        "rise": _most(device) - before,
    }


def _restart(device: torch.device) -> int:
    """Forget the peak so far; the bytes in use."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _most(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else _status("VmHWM")


def _status(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(what))


def in_a_process(glibc: str, *arguments: str) -> dict[str, Any]:
    """:func:`times` or :func:`peak`, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.overlap.in_backward", *arguments]
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    done = subprocess.run(
        command, cwd=ROOT, env=kept | GLIBC[glibc], stdout=subprocess.PIPE, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measure(name: str, glibc: str, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """One row for each way."""
    options = ("--device", str(device), "--rounds", str(rounds))
    peaks = {way: in_a_process(glibc, "--peak", name, way, *options) for way in WAYS}
    milliseconds = in_a_process(glibc, "--times", name, *options)
    return [
        {
            "model": name,
            "optimizer": MODELS[name][2].__name__,
            "batch": " x ".join(map(str, MODELS[name][1])),
            "glibc": glibc,
            "way": way,
            "iteration_ms": f"{milliseconds[way]:.4g}",
            "over_ordinary": f"{milliseconds[way] / milliseconds['ordinary']:.4f}",
            "kept_mb": f"{peaks[way]['kept'] / 1e6:.1f}",
            "gradients_mb": f"{peaks[way]['gradients'] / 1e6:.1f}",
            "rise_mb": f"{peaks[way]['rise'] / 1e6:.1f}",
            "rounds": rounds,
        }
        for way in WAYS
    ]


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table for people: a row for each model and setting of glibc."""
    ways, lines = " | ".join(WAYS), []
    for i in range(0, len(rows), len(WAYS)):
        each = rows[i : i + len(WAYS)]
        first, *others = each
        figures = [first["model"], first["gradients_mb"], first["glibc"]]
        figures += [f"{float(row['rise_mb']):,.0f}" for row in each]
        figures += [first["iteration_ms"], *(f"{float(r['over_ordinary']):.2f}" for r in others)]
        lines.append(figures)
    return results.markdown(
        f"model | gradients, MB | freed memory: glibc | peak, MB: {ways} "
        f"| iteration: {ways.replace('ordinary', 'ordinary, ms')}",
        "lrlr",
        lines,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write the CSV where asked."""
    parser = results.parser(__doc__, rounds=9)
    usual = [name for name in MODELS if name != "small"]
    parser.add_argument("--models", type=lambda text: text.split(","), default=usual)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--glibc", type=lambda text: text.split(","), help="default: all")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--times", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.peak:
        name, way = options.peak
        print(json.dumps(peak(name, way, options.device)))
        return
    if options.times:
        print(json.dumps(times(options.times, options.device, options.rounds)))
        return
    begin = time.perf_counter()
    on_gpu = options.device.type == "cuda"  # where torch's own allocator keeps what is freed
    rows = [
        row
        for name in options.models
        for glibc in options.glibc or (["defaults"] if on_gpu else GLIBC)
        for row in measure(name, glibc, options.device, options.rounds)
    ]
    where = describe_run(options.device)
    table = f"{markdown(rows)}\n\n{where}, {time.perf_counter() - begin:.0f} s"
    results.publish(table, [row | where for row in rows], options.csv)


if __name__ == "__main__":
    main()
