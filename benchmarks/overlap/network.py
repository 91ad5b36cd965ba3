"""Two hosts on one machine: network namespaces joined by a cable that can be slowed down or cut."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from contextlib import suppress

NAMES = ("first", "second")
CABLE = "cable"  # the name of the network interface on both hosts


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=30)
    if done.returncode != 0:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def why_not() -> str:
    """Why this machine cannot have two hosts; empty where it can."""
    if shutil.which("ip") is None:
        return "the command ip (iproute2) is not installed"
    try:
        with Hosts():
            return ""
    except OSError as error:
        return f"network namespaces cannot be made: {error}"


class Hosts:
    """Two hosts as a context; with it they and what still runs on them end."""

    def __init__(self) -> None:
        self._spaces = [f"fastlars-{os.getpid()}-{name}" for name in NAMES]
        self.addresses = ("10.0.0.1", "10.0.0.2")  # nobody else's: each host has its own network

    def __enter__(self) -> Hosts:
        try:
            for space in self._spaces:
                _ip("netns", "add", space)
            first, second = self._spaces
            _ip("link", "add", CABLE, "netns", first, "type", "veth",
                "peer", "name", CABLE, "netns", second)  # fmt: skip
            for space, address in zip(self._spaces, self.addresses, strict=True):
                _ip("-n", space, "address", "add", f"{address}/24", "dev", CABLE)
                _ip("-n", space, "link", "set", CABLE, "up")
                _ip("-n", space, "link", "set", "lo", "up")
        except OSError:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill what runs on the hosts, and take them down."""
        for host, space in enumerate(self._spaces):
            if space in _ip("netns", "list").split():
                self.kill(host)
                _ip("netns", "delete", space)

    def on(self, host: int, *command: str) -> list[str]:
        """The command line that runs `command` on a host."""
        return ["ip", "netns", "exec", self._spaces[host], *command]

    def kill(self, host: int) -> None:
        """End every process on a host at once."""
        for process in _ip("netns", "pids", self._spaces[host]).split():
            with suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)

    def cut(self) -> None:
        """Unplug the cable."""
        _ip("-n", self._spaces[1], "link", "set", CABLE, "down")

    def mend(self) -> None:
        """Plug it in again."""
        _ip("-n", self._spaces[1], "link", "set", CABLE, "up")

    def limit(self, gigabits: float) -> None:
        """Let the cable carry so many Gbit/s each way."""
        # A bucket below one packet of 64 KiB would never let it through.
        burst = max(int(gigabits * 1e9 / 8 * 1e-3), 2**17)
        for host in range(len(NAMES)):
            shape = ("qdisc", "replace", "dev", CABLE, "root", "tbf", "rate", f"{gigabits}gbit",
                     "burst", str(burst), "latency", "50ms")  # fmt: skip
            subprocess.run(self.on(host, "tc", *shape), check=True, timeout=30)

    def sent(self, host: int) -> int:
        """Bytes that a host has put on the cable."""
        counter = f"/sys/class/net/{CABLE}/statistics/tx_bytes"
        command = self.on(host, "cat", counter)
        return int(subprocess.run(command, capture_output=True, check=True, timeout=30).stdout)
