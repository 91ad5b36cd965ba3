"""Tables of the pages, made from what the code itself decides by.

python docs/_ext/tables.py     # writes them into docs/support.md and docs/trainer.md
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

import torch
from pages import with_tables

import fastlars
from fastlars.backends import choose
from fastlars.backends.base import Dtypes
from fastlars.backends.cpu import DTYPES, STATE_DTYPES
from fastlars.conventions import by_name
from fastlars.distributed.fsdp import work_on_shards
from fastlars.optim.base import FusedOptimizer
from fastlars.rules import RULES
from fastlars.trainer.config.command_line import shown_default
from fastlars.trainer.config.settings import GROUPS, Config, fixed_on_resume, flag
from fastlars.trainer.output.report import FILES

DOCS = Path(__file__).resolve().parent.parent
DEVICES = {
    "CPU": "cpu",
    "GPUs that torch calls `cuda`: NVIDIA's, and AMD's under ROCm": "cuda",
    "every other device, such as `xpu`": "",
}
WEIGHTS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PUBLIC = [getattr(fastlars, name) for name in fastlars.__all__]
OPTIMIZERS: list[type[FusedOptimizer]] = sorted(
    (each for each in PUBLIC if isinstance(each, type) and issubclass(each, FusedOptimizer)),
    key=lambda kind: RULES.index(kind.rule),
)
EARLY_WORK = {
    "measure": "the norms of its ratio",
    "clip": "the norms of gradients",
    None: "nothing",
}


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    lines = [list(head), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in escaped)


def code(names: Iterable[Any]) -> str:
    return ", ".join(f"`{name}`".replace("torch.", "") for name in names)


def with_code(text: str) -> str:
    """A text of the command line, with its flags as code."""
    return re.sub(r"--[a-z-]+", r"`\g<0>`", text)


def names_for(device_type: str, weight: torch.dtype) -> tuple[str, ...]:
    """The back ends that can serve plain parameters with gradients of the same type."""
    state = torch.float64 if weight == torch.float64 else torch.float32
    able = choose.COMPILED.get(device_type, choose.COMPILED_ELSEWHERE)
    return (*(() if choose.why_no_kernels(Dtypes(weight, weight, state)) else able), "reference")


def devices() -> str:
    """Types with the same back ends on every device share a column."""
    columns: dict[tuple[str, ...], list[torch.dtype]] = {}
    for weight in WEIGHTS:
        column = tuple(code(names_for(kind, weight)) for kind in DEVICES.values())
        columns.setdefault(column, []).append(weight)
    return table(
        ["parameters on", *map(code, columns.values())], zip(DEVICES, *columns, strict=True)
    )


def backends() -> str:
    def row(name: str) -> list[str]:
        compiled = name != "reference"
        weights, states = (code(DTYPES), code(STATE_DTYPES)) if compiled else ("all", "all")
        reads = choose.instance(name).reads_device
        return [f"`{name}`", weights, states, "yes" if reads else "no"]

    head = ["back end", "weights and gradients", "states", "`capturable`"]
    return table(head, map(row, choose.NAMES))


def optimizers() -> str:
    def column(kind: type[FusedOptimizer]) -> list[str]:
        rule = kind.rule.usual()
        early = [EARLY_WORK[work_on_shards(rule, mode)] for mode in ("step", "norms")]
        return [
            code(rule.norms) or "no trust ratio",
            code(sorted(rule.STATES)),
            str(4 * len(rule.STATES)),
            str(rule.sums) if rule.sums else "none",
            *early,
        ]

    rows = [
        "its trust ratio takes the norms of",
        "states, each of the parameter's shape",
        "bytes of float32 states for each weight",
        "sums that a sharded parameter (DTensor) adds over its ranks",
        'FSDP2, `overlap(mode="step")`, the default: computed during backward',
        'FSDP2, `overlap(mode="norms")`: computed during backward',
    ]
    columns = [column(kind) for kind in OPTIMIZERS]
    head = ["", *(f"`{kind.__name__}`" for kind in OPTIMIZERS)]
    return table(head, ([name, *cells] for name, *cells in zip(rows, *columns, strict=True)))


def conventions() -> str:
    """A section for each: they are mappings, which autodoc has nothing to say about."""
    return "".join(f"\n## {c.name}\n\n```text\n{c}\n```\n" for c in by_name.values())


def flags() -> str:
    """The settings of the trainer, a table for each subject."""

    def row(setting: Field[Any]) -> list[str]:
        meta, switch = setting.metadata, isinstance(setting.default, bool)
        names = [flag(setting.name), *([flag(f"no_{setting.name}")] if switch else [])]
        limits = code(meta["choices"]) or meta["bounds"]
        limits += f" ({meta['unit']})" if meta["unit"] else ""
        text = with_code(meta["help"]) + ("" if fixed_on_resume(setting.name) else "  ↻")
        return [code(names), shown_default(setting), limits, text]

    text, rows = "", []
    head = ["flag", "default", "values", "meaning"]
    for setting in reversed(fields(Config)):
        rows.insert(0, row(setting))
        if setting.name in GROUPS:
            text = f"\n### {GROUPS[setting.name].capitalize()}\n\n{table(head, rows)}{text}"
            rows = []
    return text


def run_directory() -> str:
    return table(
        ["file", "what it holds"], ([f"`{name}`", with_code(text)] for name, text in FILES.items())
    )


TABLES: dict[str, Callable[[], str]] = {
    each.__name__: each
    for each in (devices, backends, optimizers, conventions, flags, run_directory)
}

# Pages that have their tables without the site too. The conventions are too many for that.
COMMITTED = ("support.md", "trainer.md")

if __name__ == "__main__":
    for page in map(DOCS.joinpath, COMMITTED):
        page.write_text(with_tables(page.read_text()))
