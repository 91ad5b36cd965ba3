"""What one iteration does when, with overlap and without: from traces of torch's profiler.

``python -m benchmarks.overlap.timeline --csv benchmarks/results/timeline.csv``

The setting of two_hosts.py, over a cable of 2.5 Gbit/s; one of the processes is profiled.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import results
from benchmarks.machine import describe
from benchmarks.overlap import network
from benchmarks.overlap.two_hosts import (
    CONTENDERS,
    WARM_UP,
    Contender,
    command,
    connect,
    on_hosts,
)
from fastlars.distributed.engine import DdpEngine

MODULE = "benchmarks.overlap.timeline"
GIGABITS = 2.5
SHOWN = ("DDP", "overlap", "overlap, fp16")
BUCKET = "step of a bucket"
JOINED_MS = 0.3  # two parts of the backward pass that are no further apart are one bar
Bar = tuple[str, float, float]  # what, from when, until when: milliseconds


def mark(contender: Contender) -> None:
    """Let the profiler see the steps of buckets. It knows the all-reduces already."""
    engine: Any = contender.optimizer.overlap_hook
    if not isinstance(engine, DdpEngine):
        return
    work = engine.on_reduced

    def marked(*arguments: Any) -> Any:
        with record_function(BUCKET):
            return work(*arguments)

    engine.on_reduced = marked


@contextmanager
def parts(contender: Contender) -> Iterator[None]:
    """Name the parts of an iteration."""
    ddp, optimizer = contender.ddp, contender.optimizer
    forward, step = ddp.forward, optimizer.step

    def named(name: str, function: Any) -> Any:
        def call(*arguments: Any, **keywords: Any) -> Any:
            with record_function(name):
                return function(*arguments, **keywords)

        return call

    ddp.forward, optimizer.step = named("forward", forward), named("optimizer.step()", step)
    backward = torch.Tensor.backward
    torch.Tensor.backward = named("backward", backward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        ddp.forward, optimizer.step = forward, step  # type: ignore[method-assign]
        torch.Tensor.backward = backward  # type: ignore[method-assign]


def work(rank: int, store: str, rounds: int, pixels: int, out: Path) -> None:
    """One of the two processes; the first writes a trace of every iteration."""
    connect(rank, store)
    contenders = [CONTENDERS[name](pixels) for name in SHOWN]
    threads = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    for contender in contenders:
        mark(contender)
        for _ in range(WARM_UP):
            contender.iterate()
    for round_ in range(rounds):
        for number, contender in enumerate(contenders):
            trace = profile(activities=[ProfilerActivity.CPU], experimental_config=threads)
            with trace, parts(contender):
                contender.iterate()
            if rank == 0:
                trace.export_chrome_trace(str(out / f"{number}-{round_}.json"))
    dist.barrier()
    dist.destroy_process_group()


def bars(trace: Path) -> list[Bar]:
    """The parts of the iteration in a trace."""
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("ph") == "X"]
    events.sort(key=lambda e: e["ts"])
    (begin,) = [e["ts"] for e in events if e["name"] == "forward"]
    (end,) = [e["ts"] + e["dur"] for e in events if e["name"] == "optimizer.step()"]
    inside = [e for e in events if begin <= e["ts"] < end]
    steps = [e for e in inside if e["name"] == BUCKET]
    found: list[Bar] = []
    backward: int | None = None  # the place of the latest bar of that name
    for event in inside:
        name, stop = event["name"], event["ts"] + event["dur"]
        if name == "gloo:all_reduce":
            # A bucket's step runs in the callback, which the profiler counts to the all-reduce.
            own = [s["ts"] for s in steps if s["tid"] == event["tid"] and s["ts"] > event["ts"]]
            name, stop = "all-reduce", min([stop, *own])
        elif name.startswith("autograd::engine::evaluate_function"):
            name = "backward"  # the part that computes; tensor.backward() waits for buckets too
        elif name not in (BUCKET, "forward", "optimizer.step()"):
            continue
        start, stop = (event["ts"] - begin) / 1e3, (stop - begin) / 1e3
        if name == "backward" and backward is not None:
            _, first, last = found[backward]
            if start - last < JOINED_MS:
                found[backward] = (name, first, max(last, stop))
                continue
        backward = len(found) if name == "backward" else backward
        found.append((name, start, stop))
    return found


def length(drawn: Sequence[Bar]) -> float:
    """Milliseconds until the last bar ends."""
    return max(end for _, _, end in drawn)


def measure(hosts: network.Hosts, arguments: argparse.Namespace) -> None:
    """Write the bars of the quickest iteration of each contender."""
    hosts.limit(GIGABITS)
    with tempfile.TemporaryDirectory() as folder:
        on_hosts(hosts, MODULE, "--rounds", arguments.rounds, "--pixels", arguments.pixels,
                 "--out", folder, seconds=900)  # fmt: skip
        # The quickest is the one that others on the machine disturbed least.
        quickest = {
            name: min(
                (bars(Path(folder, f"{number}-{r}.json")) for r in range(arguments.rounds)),
                key=length,
            )
            for number, name in enumerate(SHOWN)
        }
    where = {"rounds": arguments.rounds, **describe()}
    rows = [
        {"contender": name, "what": what, "from_ms": f"{begin:.2f}", "until_ms": f"{end:.2f}"}
        | where
        for name, drawn in quickest.items()
        for what, begin, end in drawn
    ]
    said = [f"{name}: {length(drawn):.0f} ms" for name, drawn in quickest.items()]
    results.publish(", ".join(said), rows, arguments.csv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run, and write the CSV where asked."""
    return command(__doc__, argv, rounds=9, pixels=32, work=work, measure=measure)


if __name__ == "__main__":
    raise SystemExit(main())
