"""All contenders of a case on one device: checked, then timed in the same rounds."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from benchmarks.machine import COPY_BYTES, Machine
from benchmarks.models import gradients, parameters
from benchmarks.step.cases import Case, gpu_contenders
from benchmarks.step.check import check
from benchmarks.step.contenders import Contender
from benchmarks.step.traffic import traffic
from benchmarks.timing import Sample, interleave, interleave_device, lead
from fastlars.backends import choose
from fastlars.backends.base import Dtypes
from fastlars.rules import LambRule, LansRule, LarsRule


class UnavailableError(Exception):
    """A contender that cannot run here, and why; no fault of its own."""


@dataclass(frozen=True)
class Effort:
    """How long to measure. Rounds are fewer where they take longer than the limit."""

    rounds: int = 101
    limit_s: float = 2.5
    host_rounds: int = 51
    host_limit_s: float = 1.0
    copy_bytes: int = COPY_BYTES


@dataclass(frozen=True)
class Figures:
    """What was measured of one contender."""

    device: Sample
    host: Sample
    extra_bytes: int


@dataclass
class Comparison:
    """The contenders of one case, and what was found.

    Attributes:
        wanted: says of a contender's name whether it takes part; fastlars always does.
        calls: the step of every contender that runs here and passed its check.
        served_by: the back end that fastlars chose for a contender, and its path.
        errors: why the others have no figures.
        figures: of those in ``calls``.
        copy_rate: bytes a second, read and written, of a large copy in the same rounds.
    """

    case: Case
    machine: Machine
    effort: Effort = field(default_factory=Effort)
    wanted: Callable[[str], bool] = lambda name: True
    calls: dict[str, Callable[[], object]] = field(default_factory=dict)
    served_by: dict[str, str] = field(default_factory=dict)
    errors: dict[str, Exception] = field(default_factory=dict)
    figures: dict[str, Figures] = field(default_factory=dict)
    copy_rate: float = 0.0

    def __post_init__(self) -> None:
        every = gpu_contenders(self.case)
        # The others are compared with the first.
        self.contenders = {n: c for n, c in every.items() if n == "fastlars" or self.wanted(n)}
        self.sizes = [torch.Size(shape).numel() for shape in self.case.shapes()]
        self.numel = sum(self.sizes)

    def run(self) -> Comparison:
        """Prepare, check and time. What goes wrong with one contender is kept for its own test."""
        case, device = self.case, self.machine.device
        needed = self.numel * (24 + 12 * len(self.contenders)) + 2 * self.effort.copy_bytes
        free = self.machine.free_bytes()
        if needed > free:
            reason = (
                f"{case} needs about {needed / 1e9:.0f} GB of memory, {free / 1e9:.0f} are free"
            )
            self.errors = {name: UnavailableError(reason) for name in self.contenders}
            return self
        params = parameters(case.shapes(), device, case.torch_dtype)
        for name, contender in self.contenders.items():
            try:
                self.served_by[name] = backend_of(contender, case, params[0])
                self._check(contender)
                self.calls[name] = self._prepared(contender, params)
            except Exception as error:
                self.errors[name] = error
        if self.calls:
            self._measure(params)
        return self

    def _check(self, contender: Contender) -> None:
        check(
            contender,
            self.contenders["fastlars"],
            self.case.rule,
            device=self.machine.device,
            dtype=self.case.torch_dtype,
            record=self.machine.recorded,
        )

    def _prepared(self, contender: Contender, params: list[nn.Parameter]) -> Callable[[], object]:
        optimizer = contender.started(params)
        return self.machine.recorded(optimizer.step) if contender.graph else optimizer.step

    def _measure(self, params: list[nn.Parameter]) -> None:
        machine, effort = self.machine, self.effort
        grads = gradients(params)
        saved = [g.clone() for g in grads]

        def restore() -> None:
            # Some contenders write into the gradients, which would shrink to nothing.
            torch._foreach_copy_(grads, saved)

        def restore_and_wait() -> None:
            restore()
            machine.wait()

        hosts = interleave(
            self.calls,
            effort.host_rounds,
            between=dict.fromkeys(self.calls, restore_and_wait),
            limit_s=effort.host_limit_s,
        )
        leads = {name: lead(host) for name, host in hosts.items()}
        source = torch.ones(effort.copy_bytes // 4, device=machine.device)
        target = torch.zeros_like(source)
        copying = {"copy": lambda: target.copy_(source)}
        devices = interleave_device(
            {**self.calls, **copying},
            effort.rounds,
            machine,
            leads=leads,
            between=dict.fromkeys(self.calls, restore),
            limit_s=effort.limit_s,
        )
        self.copy_rate = 2 * source.nbytes / devices["copy"].median
        for name, call in self.calls.items():
            extra = machine.extra_bytes(call)
            self.figures[name] = Figures(devices[name], hosts[name], extra)

    def row(self, name: str) -> dict[str, Any]:
        """The figures of one contender, as report.py tabulates them."""
        figures, contender = self.figures[name], self.contenders[name]
        device = figures.device
        row: dict[str, Any] = {
            "contender": name,
            "parameters": self.numel,
            "p20_ms": device.quantile(0.2) * 1e3,
            "p50_ms": device.median * 1e3,
            "p80_ms": device.quantile(0.8) * 1e3,
            "rounds": len(device.seconds),
            "host_ms": figures.host.median * 1e3,
            "extra_memory": figures.extra_bytes / (self.numel * self.case.torch_dtype.itemsize),
            "memory_gb_s": self.copy_rate / 1e9,
            "backend": self.served_by[name],
            **self.machine.facts(),
        }
        if "fastlars" in self.figures:
            row["fastlars_over_this"] = self.figures["fastlars"].device.median / device.median
        least: float | None = contender.bytes_per_parameter
        if contender.package == "fastlars":
            path = "one-launch" if "one-launch" in self.served_by[name] else "two-launch"
            moved = traffic(self.case.rule, path, self.sizes, self.case.widths)
            least, row["touched_per_parameter"] = moved.least, moved.touched
        if least is not None:
            rate = least * self.numel / device.median
            row |= {
                "bytes_per_parameter": least,
                "gb_s": rate / 1e9,
                "share_of_memory": rate / self.copy_rate,
            }
        return row


def backend_of(contender: Contender, case: Case, param: nn.Parameter) -> str:
    """The back end that will serve a contender of fastlars; "" for the others.

    Raises:
        UnavailableError: the contender's package or back end is missing.
        RuntimeError: the back end is here, and wrong.
    """
    if importlib.util.find_spec(contender.package) is None:
        raise UnavailableError(f"{contender.package} is not installed")
    if contender.package != "fastlars":
        return ""
    low = None if param.dtype == torch.float32 else param.dtype
    dtypes = Dtypes(torch.float32, param.dtype, torch.float32, copy=low)
    with contender.planning():
        try:
            backend = choose.choose(param, dtypes)
        except RuntimeError as error:
            raise UnavailableError(str(error)) from None
        rule = {"lars": LarsRule, "lamb": LambRule, "lans": LansRule}[case.rule]()
        checked = choose.choose(param, dtypes, rule)
    if checked is not backend:
        raise RuntimeError(f"{backend.name} fails its check, and {checked.name} would serve")
    path = getattr(backend, "path", "")
    if contender.path not in (None, path):
        raise RuntimeError(f"FASTLARS_CUDA_PATH={contender.path}, but the path taken is {path!r}")
    if contender.backend is None and backend.name == "reference":
        raise UnavailableError("no compiled back end serves this device")
    return f"{backend.name} {path}".strip()
