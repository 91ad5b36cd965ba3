"""Draws one iteration with and one without overlap from traces of torch's profiler.

``python -m benchmarks.overlap.timeline docs/images/overlap.png``

The setting of two_hosts.py, over a cable of 2.5 Gbit/s; one of the processes is profiled.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.overlap import network
from benchmarks.overlap.two_hosts import CONTENDERS, WARM_UP, Contender, connect, on_hosts
from fastlars.distributed.engine import DdpEngine

MODULE = "benchmarks.overlap.timeline"
GIGABITS = 2.5
SHOWN = ("DDP", "overlap", "overlap, fp16")
ROUNDS = 9  # the quickest is drawn: it is the one that others on the machine disturbed least
BUCKET = "step of a bucket"
ROWS = ("forward", "backward", "all-reduce", "step")
COLORS = {
    "forward": "C7", "backward": "C0", "all-reduce": "C1", BUCKET: "C3", "optimizer.step()": "C2",
}  # fmt: skip
Bar = tuple[str, float, float]  # what, from, for how long: milliseconds


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


def work(rank: int, store: str, pixels: int, out: Path) -> None:
    """One of the two processes; the first writes a trace of every iteration."""
    connect(rank, store)
    contenders = [CONTENDERS[name](pixels) for name in SHOWN]
    threads = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    for contender in contenders:
        mark(contender)
        for _ in range(WARM_UP):
            contender.iterate()
    for round_ in range(ROUNDS):
        for number, contender in enumerate(contenders):
            trace = profile(activities=[ProfilerActivity.CPU], experimental_config=threads)
            with trace, parts(contender):
                contender.iterate()
            if rank == 0:
                trace.export_chrome_trace(str(out / f"{number}-{round_}.json"))
    dist.barrier()
    dist.destroy_process_group()


def bars(trace: Path) -> list[Bar]:
    """What is drawn of the iteration in a trace."""
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("ph") == "X"]
    events.sort(key=lambda e: e["ts"])
    (begin,) = [e["ts"] for e in events if e["name"] == "forward"]
    (end,) = [e["ts"] + e["dur"] for e in events if e["name"] == "optimizer.step()"]
    inside = [e for e in events if begin <= e["ts"] < end]
    steps = [e for e in inside if e["name"] == BUCKET]
    found = []
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
        found.append((name, (event["ts"] - begin) / 1e3, (stop - event["ts"]) / 1e3))
    return found


def length(drawn: Sequence[Bar]) -> float:
    """Milliseconds until the last bar ends."""
    return max(begin + duration for _, begin, duration in drawn)


def draw(path: Path, iterations: Sequence[Sequence[Bar]]) -> None:
    """One panel a contender, on one scale."""
    figure = Figure(figsize=(10, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(iterations), 1, sharex=True)
    for panel, name, drawn in zip(panels, SHOWN, iterations, strict=True):
        for what, begin, duration in drawn:
            row = ROWS.index("step" if "step" in what else what)
            panel.broken_barh(
                [(begin, max(duration, 0.5))], (row - 0.4, 0.8), facecolors=COLORS[what],
                edgecolor="white" if what == "all-reduce" else "none", linewidth=0.5,
            )  # fmt: skip
        end = length(drawn)
        panel.axvline(end, color="black", linewidth=0.8, linestyle=":")
        panel.set_yticks(range(len(ROWS)), ROWS)
        panel.invert_yaxis()
        panel.set_title(f"{name}: {end:.0f} ms", fontsize=10, loc="left")
    panels[-1].set_xlabel(
        f"ms; one of two gloo processes, ResNet-50, 32 images, cable of {GIGABITS:g} Gbit/s; "
        "red: a bucket, green: optimizer.step()"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> int:
    """Run, and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("png", type=Path, nargs="?")
    parser.add_argument("--pixels", type=int, default=32, help="side of an image")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--keep", type=Path, help="a folder for the traces")
    arguments = parser.parse_args(argv)
    if arguments.worker is not None:
        work(arguments.worker, arguments.store, arguments.pixels, arguments.out)
        return 0
    reason = network.why_not()
    if reason:
        print(f"two hosts are needed: {reason}", file=sys.stderr)
        return 2
    with network.Hosts() as hosts, tempfile.TemporaryDirectory() as folder:
        hosts.limit(GIGABITS)
        out = arguments.keep or Path(folder)
        on_hosts(hosts, MODULE, "--pixels", arguments.pixels, "--out", out, seconds=300)
        iterations = [
            min((bars(out / f"{number}-{r}.json") for r in range(ROUNDS)), key=length)
            for number in range(len(SHOWN))
        ]
    draw(arguments.png, iterations)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
