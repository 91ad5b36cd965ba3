"""What a step costs: its two passes apart and together, next to torch and to plain streams.

``python -m benchmarks.step.passes [--csv OUT.csv] [--sizes 2e5,8e7]``

One float32 tensor of each size is stepped by LARS and LAMB. Every row has the bytes an element that
its call asks for, and two rates: of the bytes read, and of the bytes read and written. The machine
is bound by the one that is the same in all rows of a size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import results
from benchmarks.machine import describe
from benchmarks.models import gradients, parameters
from benchmarks.step.check import CHECK_ERROR, CHECK_LR
from benchmarks.step.check import check as step_check
from benchmarks.step.contenders import DECAY, LR, RULES
from benchmarks.timing import Sample, interleave
from fastlars.backends.base import Backend, Dtypes, StepScalars, Tensors
from fastlars.backends.cpu import Cpu
from fastlars.backends.reference import Reference
from fastlars.rules import LambRule, LarsRule

SIZES = (200_000, 660_000, 2_200_000, 7_300_000, 24_000_000, 80_000_000)
LIMIT_S = 20.0
CHECK_SIZE = 100_003  # several chunks, the last one ragged
RULE = {"lars": LarsRule(weight_decay=DECAY), "lamb": LambRule(weight_decay=DECAY)}
TORCH = {"lars": "torch SGD(fused)", "lamb": "torch AdamW(fused)"}


@dataclass(frozen=True)
class Pass:
    """What is timed, and the bytes that it reads and writes for each element."""

    read: int
    written: int
    call: Callable[[], object]


class Listed:
    """A weight with its gradient and states of its own, bound to a back end."""

    def __init__(self, name: str, backend: Backend, weight: Tensor, grad: Tensor) -> None:
        self.rule, self.backend = RULE[name], backend
        zeros = [torch.zeros_like(weight) for _ in self.rule.states]
        counters = [torch.zeros(())] if self.rule.counter else None
        dtypes = Dtypes(weight.dtype, grad.dtype, weight.dtype)
        tensors = Tensors([weight], [grad], tuple([z] for z in zeros), counters, None, dtypes)
        self.bound = backend.bind(tensors, backend.layout([weight]))

    def measure(self, now: StepScalars) -> Tensor:
        return self.backend.measure(self.rule, self.bound, now)

    def apply(self, now: StepScalars, sums: Tensor) -> Tensor:
        return self.backend.apply(self.rule, self.bound, now, sums)


def check(name: str) -> None:
    """No time without a right result: the passes move weights as the specification does."""
    ours = RULES[name]["fastlars"]
    for contender in (ours, RULES[name][TORCH[name]]):
        step_check(contender, ours, name)
    (param,) = parameters([(CHECK_SIZE,)])
    (grad,) = gradients([param])
    now, moved = StepScalars(CHECK_LR[name]), []
    for backend in (Cpu(), Reference()):
        weight = param.detach().clone()
        listed = Listed(name, backend, weight, grad)
        for _ in range(3):
            listed.apply(now, listed.measure(now))
        moved.append((weight - param.detach()).double())
    mine, right = moved
    error = float((mine - right).norm() / right.norm())
    assert error < CHECK_ERROR[torch.float32], f"the passes are off by {error:.2g} of their length"


def streams(size: int) -> dict[str, Pass]:
    """What the machine gives where there is next to nothing to compute."""
    a, b = torch.ones(size), torch.zeros(size)
    return {
        "sum": Pass(4, 0, a.sum),
        "negate in place": Pass(4, 4, b.neg_),
        "add in place": Pass(8, 4, lambda: a.add_(b)),
        # A processor reads a line before it overwrites it.
        "copy": Pass(8, 4, lambda: b.copy_(a)),
    }


def passes(name: str, size: int) -> dict[str, Pass]:
    """The rule's passes, its whole step, and torch's step without a trust ratio."""
    (param,) = parameters([(size,)])
    (grad,) = gradients([param])
    listed, now = Listed(name, Cpu(), param.detach(), grad), StepScalars(LR)
    sums = listed.measure(now)
    steps = [RULES[name][who].build([param]).step for who in ("fastlars", TORCH[name])]
    # read, written: LARS measures w, g; applies w, g, m to w, m. LAMB measures w, g, m, v and
    # advances m, v; applies w, m, v to w.
    measured, applied = ((8, 0), (12, 8)) if name == "lars" else ((16, 8), (12, 4))
    both = (measured[0] + applied[0], measured[1] + applied[1])
    states = len(RULE[name].states)
    return {
        "measure": Pass(*measured, lambda: listed.measure(now)),
        "apply": Pass(*applied, lambda: listed.apply(now, sums)),
        "step": Pass(*both, steps[0]),
        TORCH[name]: Pass(8 + 4 * states, 4 + 4 * states, steps[1]),
    }


def row(what: str, name: str, size: int, timed: Pass, sample: Sample) -> dict[str, object]:
    """The line of one pass."""
    rate = size / sample.median / 1e9
    return {
        "elements": size,
        "what": what,
        "pass": name,
        "p20_ms": f"{1e3 * sample.quantile(0.2):.4g}",
        "p50_ms": f"{1e3 * sample.median:.4g}",
        "p80_ms": f"{1e3 * sample.quantile(0.8):.4g}",
        "read_bytes": timed.read,
        "written_bytes": timed.written,
        "read_gb_s": f"{timed.read * rate:.3g}",
        "moved_gb_s": f"{(timed.read + timed.written) * rate:.3g}",
        "rounds": len(sample.seconds),
    }


def measure(size: int, rounds: int) -> list[dict[str, object]]:
    """Everything of one size, in turns."""
    kinds = {"stream": streams(size), **{name: passes(name, size) for name in RULE}}
    timed = {(what, name): each for what, kind in kinds.items() for name, each in kind.items()}
    calls = {key: each.call for key, each in timed.items()}
    samples = interleave(calls, rounds, limit_s=LIMIT_S)
    return [row(*key, size, each, samples[key]) for key, each in timed.items()]


def markdown(table: Sequence[dict[str, object]]) -> str:
    """The table for people."""
    return results.markdown(
        "elements | of | pass | ms | 20% .. 80% | bytes read + written | GB/s read | of both",
        "rllr",
        (
            f"{r['elements']:,} | {r['what']} | {r['pass']} | {r['p50_ms']} | {r['p20_ms']} .. "
            f"{r['p80_ms']} | {r['read_bytes']} + {r['written_bytes']} | {r['read_gb_s']} | "
            f"{r['moved_gb_s']}"
            for r in table
        ),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Check, measure, print; write the CSV where asked."""
    parser = results.parser(__doc__, rounds=41)
    parser.add_argument(
        "--sizes", type=lambda text: [int(float(size)) for size in text.split(",")], default=SIZES
    )
    options = parser.parse_args(argv)
    torch.set_num_threads(2)
    for name in RULE:
        check(name)
    common = {"threads": torch.get_num_threads(), **describe()}
    table = [line | common for size in options.sizes for line in measure(size, options.rounds)]
    results.publish(f"{markdown(table)}\n\n{common}", table, options.csv)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
