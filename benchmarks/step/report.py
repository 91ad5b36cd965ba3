"""From pytest-benchmark's JSON to one CSV for the repository and one table for people.

``python -m benchmarks.step.report RUN.json [RUN.json ...] [--csv OUT.csv] [--compare OLD.csv]
[--pictures FOLDER]``
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.step import compare, figures

COLUMNS = [
    "group",
    "contender",
    "version",
    "p20_ms",
    "p50_ms",
    "p80_ms",
    "rounds",
    "kernel_ms",
    "fastlars_over_this",
    "bytes_per_parameter",
    "gb_s",
    "memory_gb_s",
    "share_of_memory",
    "parameters",
    "threads",
    "machine",
    "torch",
    "python",
    "date",
    "commit",
]
# Of runs on a GPU, where "memory" is a copy on the device.
GPU_COLUMNS = [
    "backend",
    "host_ms",
    "touched_per_parameter",
    "extra_memory",
    "gpu",
    "driver",
    "cuda",
]


def rows(run: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a benchmark, with the machine it ran on."""
    machine = run["machine_info"]
    common = {
        "machine": f"{machine['cpu'].get('brand_raw', machine['machine'])}, "
        f"{machine['cpu'].get('count', '?')} cores",
        "torch": machine.get("torch", ""),
        "python": machine["python_version"],
        "date": run["datetime"][:10],
        "commit": run["commit_info"]["id"][:12],
    }
    out = []
    for benchmark in run["benchmarks"]:
        info = benchmark["extra_info"]
        if "contender" in info:
            out.append(tabulated({"group": benchmark["group"], **info, **common}))
    return out


def tabulated(row: dict[str, Any]) -> dict[str, Any]:
    """The columns of a row, of what is known of it."""
    columns = COLUMNS + GPU_COLUMNS if "gpu" in row else COLUMNS
    return {name: _short(row.get(name, "")) for name in columns}


def _short(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value


def markdown(table: list[dict[str, Any]]) -> str:
    """The tables that `make bench` and `make gpu` print."""
    kinds = [r for r in table if "gpu" not in r], [r for r in table if "gpu" in r]
    return "\n\n".join(make(rows) for make, rows in zip((_cpu, _gpu), kinds, strict=True) if rows)


def _spread(row: dict[str, Any]) -> str:
    return f"{row['p20_ms']} .. {row['p80_ms']}"


def _percent(share: str) -> str:
    return f"{float(share):.0%}" if share else ""


def _cpu(table: list[dict[str, Any]]) -> str:
    lines = results.markdown(
        "case | optimizer | median ms | 20% .. 80% | kernel ms | fastlars / this | GB/s "
        "| of memory",
        "llr",
        (
            f"{row['group']} | {row['contender']} {row['version']} | {row['p50_ms']} "
            f"| {_spread(row)} | {row['kernel_ms']} | {row['fastlars_over_this']} | {row['gb_s']} "
            f"| {_percent(row['share_of_memory'])}"
            for row in table
        ),
    )
    first = table[0]
    rates = sorted(float(row["memory_gb_s"]) for row in table if row["memory_gb_s"])
    memory = f"; memory: {rates[0]:.3g} to {rates[-1]:.3g} GB/s" if rates else ""
    threads = max(int(row["threads"] or 0) for row in table)
    return (
        f"{lines}\n\n{first['machine']}, {threads} threads, torch {first['torch']}, Python "
        f"{first['python']}, {first['date']}, commit {first['commit']}{memory}"
    )


def _gpu(table: list[dict[str, Any]]) -> str:
    lines = []
    for row in table:
        name = f"{row['contender']} {row['version']}"
        if row["backend"]:
            name += f" ({row['backend']})"
        lines.append(
            f"{row['group']} | {name} | {row['p50_ms']} | {_spread(row)} | {row['host_ms']} "
            f"| {row['fastlars_over_this']} | {row['bytes_per_parameter']} | {row['gb_s']} "
            f"| {_percent(row['share_of_memory'])} | {float(row['extra_memory']):.2%}"
        )
    first = table[-1]
    shown = results.markdown(
        "case | optimizer | device ms | 20% .. 80% | host ms | fastlars / this "
        "| bytes a parameter | GB/s | of copy | extra memory",
        "llr",
        lines,
    )
    return (
        f"{shown}\n\n{first['gpu']}, driver {first['driver']}, CUDA {first['cuda']}, "
        f"torch {first['torch']}, Python {first['python']}, {first['date']}, "
        f"commit {first['commit']}; copy: {first['memory_gb_s']} GB/s"
    )


def main(argv: list[str] | None = None) -> int:
    """Print the table; write the CSV where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="what pytest --benchmark-json wrote")
    parser.add_argument("--csv", type=Path, help="write the rows here too")
    parser.add_argument(
        "--compare", type=Path, help="committed rows; exit with 1 where fastlars has lost ground"
    )
    parser.add_argument("--pictures", type=Path, help="folder for roofline.svg and cost.svg")
    arguments = parser.parse_args(argv)
    table = []
    for run in arguments.runs:
        try:
            table += rows(json.loads(run.read_text()))
        except (OSError, ValueError, KeyError) as error:
            print(f"{run}: not a pytest-benchmark run: {error!r}", file=sys.stderr)
            return 2
    if arguments.csv:
        results.write_csv(arguments.csv, table, max([COLUMNS, *map(list, table)], key=len))
    print(markdown(table))
    if arguments.pictures:
        figures.draw(table, arguments.pictures)
    return _compare(arguments.compare, table) if arguments.compare else 0


def _compare(committed: Path, table: list[dict[str, Any]]) -> int:
    """Say which ratios are worse than the committed ones; the exit status."""
    old = results.read_csv(committed)
    lost = compare.regressions(old, table)
    print(
        f"\n{compare.shared(old, table)} ratios compared with {committed}, {len(lost)} worse by "
        f"more than a factor of {compare.TOLERANCE}",
        *lost,
        sep="\n",
    )
    return int(bool(lost))


if __name__ == "__main__":
    raise SystemExit(main())
