"""Two hosts, in network namespaces joined by a cable, under torchrun with its c10d rendezvous."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.overlap import network
from distributed.torchrun import (
    SETTINGS,
    STEPS,
    TRAINER,
    assert_same_runs,
    finish,
    resumed_at,
    start,
    stop,
)

pytestmark = pytest.mark.xdist_group("elastic")  # with one undisturbed run for both files
WAIT = 8  # seconds that a process waits for another one, also while both start
LOST = "lost its connection to another process"


@pytest.fixture
def hosts() -> Iterator[network.Hosts]:
    reason = network.why_not()
    if reason:
        pytest.skip(reason)
    with network.Hosts() as pair:
        yield pair


class Run:
    """A run of the trainer over both hosts, which share a disk."""

    def __init__(self, hosts: network.Hosts, folder: Path) -> None:
        self._hosts, self.path = hosts, folder / "run"
        self._logs = [folder / name for name in network.NAMES]
        self.torchruns = [self.launch(host) for host in range(2)]

    def launch(self, host: int) -> subprocess.Popen[bytes]:
        """Start torchrun on a host."""
        return start(
            TRAINER, *SETTINGS, "--timeout", WAIT, "--output", self.path,
            launch=(
                "--nnodes=2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-id=run",
                "--rdzv-backend=c10d", f"--rdzv-endpoint={self._hosts.addresses[0]}:29400",
                # Names of hosts are not known here.
                f"--rdzv-conf=is_host={int(host == 0)}",
                f"--local-addr={self._hosts.addresses[host]}",
            ),
            log=self._logs[host], inside=self._hosts.on(host),
            GLOO_SOCKET_IFNAME=network.CABLE, SECONDS="0.1",
            # With the store shared, torchrun never tells one that joins later where it is.
            TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
        )  # fmt: skip

    def log(self, host: int) -> str:
        return self._logs[host].read_text()

    def step(self) -> int:
        """The last step that the log shows."""
        if not (self.path / "metrics.jsonl").exists():
            return 0
        lines = (self.path / "metrics.jsonl").read_text().splitlines(keepends=True)
        return max([line.count('"step"') and int(line.split('"step": ')[1].split(",")[0])
                    for line in lines if line.endswith("\n")], default=0)  # fmt: skip

    def wait_for(self, what: Callable[[], bool], seconds: float) -> float:
        """Seconds until it is so."""
        begun = time.monotonic()
        while not what():
            late = time.monotonic() > begun + seconds
            assert not late, f"after {seconds} s:\n{self.log(0)}\n{self.log(1)}"
            time.sleep(0.1)
        return time.monotonic() - begun


@pytest.mark.slow
def test_a_cut_cable_and_a_lost_host(
    hosts: network.Hosts, undisturbed: Path, tmp_path: Path
) -> None:
    """Both end in one clear line, in bounded time; torchrun goes on, and not a bit is lost."""
    run = Run(hosts, tmp_path)
    try:
        run.wait_for(lambda: run.step() >= 7, 60)
        hosts.cut()
        run.wait_for(lambda: all(LOST in run.log(host) for host in range(2)), WAIT + 20)
        hosts.mend()
        run.wait_for(lambda: len(resumed_at(run.log(0))) > 0, 90)
        run.wait_for(lambda: run.step() >= 24, 60)

        losses = run.log(0).count(LOST)
        hosts.kill(1)  # torchrun and its process
        run.wait_for(lambda: run.log(0).count(LOST) > losses, WAIT + 20)
        # torchrun on the other host counts one restart more than this one.
        run.torchruns[1] = run.launch(1)
        assert [finish(torchrun, 90) for torchrun in run.torchruns] == [0, 0], run.log(0)
    finally:
        for torchrun in run.torchruns:
            stop(torchrun)
    # Two restarts, no third one in which hosts that went on differently would have met again.
    first, last = resumed_at(run.log(0))
    assert 5 <= first <= 22 <= last < STEPS
    assert_same_runs(undisturbed, run.path)
