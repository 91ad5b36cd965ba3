"""Iterations with and without fastlars.distributed.overlap, between two hosts on one machine.

``python -m benchmarks.overlap.two_hosts [--csv OUT.csv]``

Two processes with a thread each train ResNet-50 over gloo, 32 images a process. They stand in two
network namespaces joined by a cable, unlimited and held at 10 and 1 Gbit/s by tc. All contenders
are in the same processes and take turns, round by round; medians are reported.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import resnet50

import fastlars
import fastlars.distributed
from benchmarks import ROOT, results
from benchmarks.machine import describe
from benchmarks.overlap import network
from fastlars.distributed.engine import DdpEngine
from fastlars.in_backward.engine import WATCHED_STEPS

MODULE = "benchmarks.overlap.two_hosts"
LINKS = {"unlimited": 0.0, "10 Gbit/s": 10.0, "1 Gbit/s": 1.0}
WARM_UP = WATCHED_STEPS + 1  # in which overlap takes checksums, and DDP rebuilds its buckets
_SENT = Path(f"/sys/class/net/{network.CABLE}/statistics/tx_bytes")


@dataclass(frozen=True)
class Times:
    """One iteration of one contender on the first host."""

    iteration: float  # seconds
    visible: float  # from the last bucket's arrival until all weights are written
    sent: int  # bytes on the cable


class Contender:
    """A ResNet-50, its optimizer, and how they work together."""

    def __init__(self, overlapped: bool, compression: str | None, pixels: int) -> None:
        torch.manual_seed(0)
        self.ddp = DistributedDataParallel(resnet50(), gradient_as_bucket_view=True)
        groups = fastlars.parameter_groups(self.ddp, weight_decay=1e-4)
        # Small: with random labels training is chaotic, and results could not be compared.
        self.optimizer = fastlars.LARS(groups, lr=1e-4, momentum=0.9)
        self.taking: list[float] = []  # when the step of each bucket began
        if overlapped:
            choice: Any = compression
            fastlars.distributed.overlap(self.ddp, self.optimizer, compression=choice)
            self._note_buckets()
        elif compression:
            self.ddp.register_comm_hook(None, fp16_compress_hook)
        torch.manual_seed(1 + dist.get_rank())
        self.images = torch.randn(32, 3, pixels, pixels)
        self.labels = torch.randint(1000, (32,))

    def _note_buckets(self) -> None:
        engine = self.optimizer.overlap_hook
        assert isinstance(engine, DdpEngine)
        work = engine.on_reduced

        def noted(*arguments: Any) -> Any:
            self.taking.append(time.perf_counter())
            return work(*arguments)

        engine.on_reduced = noted  # type: ignore[method-assign]

    def iterate(self) -> Times:
        """Both hosts begin together."""
        dist.barrier()
        self.taking.clear()
        sent, begin = int(_SENT.read_text()), time.perf_counter()
        self.optimizer.zero_grad()
        functional.cross_entropy(self.ddp(self.images), self.labels).backward()
        arrived = time.perf_counter()
        self.optimizer.step()
        end = time.perf_counter()
        arrived = self.taking[-1] if self.taking else arrived
        return Times(end - begin, end - arrived, int(_SENT.read_text()) - sent)

    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.ddp.parameters()])


CONTENDERS = {
    "DDP": partial(Contender, False, None),
    "overlap": partial(Contender, True, None),
    "DDP, fp16 hook": partial(Contender, False, "fp16"),
    "overlap, fp16": partial(Contender, True, "fp16"),
}


def check(contenders: dict[str, Contender]) -> None:
    """Before any time is taken: the same training, to the bit; half precision near it."""
    check_bits(contenders)
    _, _, half, both = (each.weights() for each in contenders.values())
    start = resnet_weights()
    moved = torch.linalg.vector_norm(half - start)
    if not torch.linalg.vector_norm(both - half) < 0.1 * moved:
        raise RuntimeError("overlap in half precision is not where DDP's own hook is")


def check_bits(contenders: dict[str, Contender]) -> None:
    """Overlap in float32 changes nothing."""
    if not torch.equal(contenders["DDP"].weights(), contenders["overlap"].weights()):
        raise RuntimeError("overlap does not have the bits of DDP without it")


def resnet_weights() -> Tensor:
    """What every contender starts from."""
    torch.manual_seed(0)
    return torch.cat([p.detach().flatten() for p in resnet50().parameters()])


def connect(rank: int, store: str) -> None:
    """Join the other process, with one thread."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2,
        timeout=datetime.timedelta(seconds=120),
    )  # fmt: skip


def work(rank: int, store: str, rounds: int, pixels: int, out: Path) -> None:
    """One of the two processes; the first one writes what it saw."""
    connect(rank, store)
    contenders = {name: make(pixels) for name, make in CONTENDERS.items()}
    seen: dict[str, list[Times]] = {name: [] for name in contenders}
    for number in range(WARM_UP + rounds):
        for name, contender in contenders.items():
            times = contender.iterate()
            if number >= WARM_UP:
                seen[name].append(times)
        if number == WARM_UP - 1:
            check(contenders)
    check_bits(contenders)
    if rank == 0:
        out.write_text(json.dumps({n: [asdict(t) for t in each] for n, each in seen.items()}))
    dist.barrier()
    dist.destroy_process_group()


def on_hosts(hosts: network.Hosts, module: str, *arguments: object, seconds: float) -> None:
    """Run a module on both; its first arguments are the rank and a file to meet."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": network.CABLE,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    with tempfile.TemporaryDirectory() as folder:
        running = [
            subprocess.Popen(
                hosts.on(rank, sys.executable, "-m", module, "--worker", str(rank), "--store",
                         f"{folder}/store", *map(str, arguments)),
                env=environment,
            )
            for rank in range(2)
        ]  # fmt: skip
        try:
            for process in running:
                if process.wait(timeout=seconds) != 0:
                    raise RuntimeError(f"{module}: a process ended with {process.returncode}")
        finally:
            for process in running:
                process.kill()


def rows(link: str, seen: dict[str, list[dict[str, Any]]]) -> list[dict[str, object]]:
    """One line a contender; times in ms."""
    plain = [times["iteration"] for times in seen["DDP"]]
    step = statistics.median(times["visible"] for times in seen["DDP"])
    lines: list[dict[str, object]] = []
    for name, each in seen.items():
        times = sorted(t["iteration"] for t in each)
        ratios = [t["iteration"] / p for t, p in zip(each, plain, strict=True)]
        visible = statistics.median(t["visible"] for t in each)
        lines.append(
            {
                "link": link,
                "contender": name,
                "p20_ms": f"{1e3 * times[len(times) // 5]:.1f}",
                "p50_ms": f"{1e3 * statistics.median(times):.1f}",
                "p80_ms": f"{1e3 * times[4 * len(times) // 5]:.1f}",
                "over_ddp": f"{statistics.median(ratios):.3f}",
                "visible_step_ms": f"{1e3 * visible:.2f}",
                "visible_share": f"{visible / step:.3f}",
                "megabytes_sent": f"{statistics.median(t['sent'] for t in each) / 1e6:.1f}",
                "rounds": len(each),
            }
        )
    return lines


def markdown(lines: Sequence[Mapping[str, object]]) -> str:
    """The table for people."""
    return results.markdown(
        "cable | | ms, median | 20% .. 80% | over DDP | step after the last bucket, ms "
        "| of DDP's | MB sent",
        "llr",
        (
            f"{line['link']} | {line['contender']} | {line['p50_ms']} | {line['p20_ms']} .. "
            f"{line['p80_ms']} | {line['over_ddp']} | {line['visible_step_ms']} "
            f"| {float(str(line['visible_share'])):.0%} | {line['megabytes_sent']}"
            for line in lines
        ),
    )


def command(
    doc: str,
    argv: Sequence[str] | None,
    *,
    rounds: int,
    pixels: int,
    work: Callable[[int, str, int, int, Path], None],
    measure: Callable[[network.Hosts, argparse.Namespace], None],
) -> int:
    """The exit status of a benchmark on two hosts, each of which starts it again as a worker."""
    parser = results.parser(doc, rounds=rounds)
    parser.add_argument("--pixels", type=int, default=pixels, help="side of an image")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.worker is not None:
        work(arguments.worker, arguments.store, arguments.rounds, arguments.pixels, arguments.out)
        return 0
    reason = network.why_not()
    if reason:
        print(f"two hosts are needed: {reason}", file=sys.stderr)
        return 2
    with network.Hosts() as hosts:
        measure(hosts, arguments)
    return 0


def measure(hosts: network.Hosts, arguments: argparse.Namespace) -> None:
    """Measure over every link."""
    common = {"model": "ResNet-50", "images": 32, "pixels": arguments.pixels, **describe()}
    table: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        for link, gigabits in LINKS.items():
            if gigabits:
                hosts.limit(gigabits)
            out = Path(folder) / "times"
            on_hosts(hosts, MODULE, "--rounds", arguments.rounds, "--pixels",
                     arguments.pixels, "--out", out, seconds=900)  # fmt: skip
            table += [line | common for line in rows(link, json.loads(out.read_text()))]
    results.publish(markdown(table), table, arguments.csv)


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table, and write the CSV where asked."""
    return command(__doc__, argv, rounds=7, pixels=64, work=work, measure=measure)


if __name__ == "__main__":
    raise SystemExit(main())
