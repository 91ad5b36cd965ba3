"""The page on which a GPU's results stand, and the record of every stage that it is made from."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.gpu_proof.card import Card
from benchmarks.gpu_proof.process import last_line, tail
from benchmarks.results import write_text

LINES = 30  # of the output of a stage that did not pass
SHOWN = ("check", "first-step")  # whose output is their result


@dataclass(frozen=True)
class Record:
    """How a stage ended, and under what.

    Attributes:
        sources: hash of the files that are tried; a record of others is out of date.
        words: the outcome in words.
        arguments: of the command: of pytest, -k is among them.
        made: the extension that the build left.
    """

    stage: str
    asks: str
    status: str
    words: str
    seconds: float
    sources: str
    commit: str
    date: str
    card: Card
    arguments: list[str]
    made: str = ""

    def write(self, folder: Path) -> None:
        """Keep the record next to what its stage wrote."""
        write_text(folder / f"{self.stage}.json", json.dumps(asdict(self), indent=1) + "\n")


def read(folder: Path, stage: str) -> Record | None:
    """The record of a stage, if it has run."""
    try:
        values = json.loads((folder / f"{stage}.json").read_text())
        seconds, card = float(values["seconds"]), Card(**values["card"])
        return Record(**{**values, "seconds": seconds, "card": card})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def page(folder: Path, names: list[str], sources: str) -> str:
    """All stages of a card: what passed, what failed, the figures."""
    records = [record for name in names if (record := read(folder, name)) is not None]
    current = [record for record in records if record.sources == sources]
    card = (current or records)[-1].card
    commits = ", ".join(dict.fromkeys(record.commit for record in current))
    lines = [
        f"# {card.name}",
        "",
        f"Written by `make gpu`. {card.count} device{'s' * (card.count > 1)} of compute capability "
        f"{', '.join(card.archs)}, driver {card.driver}; torch {card.torch} with CUDA {card.cuda}, "
        f"Python {card.python}, {card.cores} cores. Commit {commits}, sources {sources}.",
        "",
        "| stage | question | answer | seconds | date |",
        "|---|---|---|--:|---|",
    ]
    for record in records:
        old = "" if record.sources == sources else f", of other sources ({record.commit})"
        seconds = f"{record.seconds:.0f}"
        words = record.words.replace("|", "\\|") + old
        cells = (record.stage, f"{record.asks}?", words, seconds, record.date)
        lines.append(f"| {' | '.join(cells)} |")
    missing = [name for name in names if all(record.stage != name for record in records)]
    if missing:
        lines += ["", f"Not run yet: {', '.join(missing)}."]
    for record in records:
        lines += _section(folder, record)
    return "\n".join(lines) + "\n"


def _section(folder: Path, record: Record) -> list[str]:
    """What a stage has to say beyond one row."""
    lines = []
    log = folder / f"{record.stage}.log"
    results = folder / f"{record.stage}.xml"
    if record.stage in ("tests", "sanitizer"):
        try:
            lines += tests(results)
        except (OSError, ElementTree.ParseError):  # pytest was ended before it wrote its report
            lines += tests_so_far(tail(log, 2**24)) if log.exists() else []
    figures = folder / f"{record.stage}.md"
    if figures.exists():
        lines += figures.read_text().splitlines()
    fine = record.status in ("passed", "skipped") and record.stage not in SHOWN
    if log.exists() and not fine:
        output = [line[:500] for line in tail(log).rstrip().splitlines()[-LINES:]]
        lines += ["", "```text", *output, "```"]
    return ["", f"## {record.stage}", "", *lines] if lines else []


def tests(results: Path) -> list[str]:
    """Counts, failures and reasons of skips, from pytest's report."""
    cases = ElementTree.parse(results).iter("testcase")
    counts: Counter[str] = Counter()
    failed, skipped = [], Counter[str]()
    for case in cases:
        kinds = {child.tag: child.get("message", "") for child in case}
        name = f"{case.get('classname')}::{case.get('name')}"
        if "failure" in kinds or "error" in kinds:
            counts["failed"] += 1
            message = (kinds.get("failure") or kinds.get("error") or "").strip().split("\n")[0]
            failed.append(f"* `{name}`: {message[:300]}")
        elif "skipped" in kinds:
            counts["skipped"] += 1
            skipped[kinds["skipped"]] += 1
        else:
            counts["passed"] += 1
    words = ", ".join(f"{counts[kind]} {kind}" for kind in ("passed", "failed", "skipped"))
    reasons = [f"* {count} skipped: {reason}" for reason, count in skipped.most_common()]
    return [f"{words}.", "", *failed, *reasons]


def tests_so_far(log: str) -> list[str]:
    """Counts and failures from the output of a pytest that was ended."""
    found = re.findall(r"\b(PASSED|FAILED|ERROR|SKIPPED) (tests/\S+)", log)
    counts = Counter(kind.lower() for kind, _ in found)
    words = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    failed = sorted({name for kind, name in found if kind in ("FAILED", "ERROR")})
    return [
        f"Before pytest was ended: {words or 'nothing'}.",
        "",
        *(f"* `{name}`" for name in failed),
    ]


def summary(record: Record, log: Path) -> str:
    """One line for the terminal; of a stage that hung, with the place."""
    ending = ""
    if record.status == "failed":
        ending = f"; {last_line(log)[:160]}"
    elif record.status == "hung":
        # As Python's faulthandler prints it, the innermost call first.
        places = re.findall(r"thread 0x.*\n +(File .*)", tail(log, 2**20), re.I)
        ending = f"; {places[-1]}" if places else "; no Python says where"
    return f"{record.stage:16} {record.seconds:6.1f} s  {record.words}{ending}"
