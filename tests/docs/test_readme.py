"""README.md: its blocks run, its tables are those of the sources; links of all pages resolve."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import pytest

from fastlars.conventions import by_name
from repository_files import ROOT, python_blocks

TEXT = (ROOT / "README.md").read_text()
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
# rows of the table of times: groups of benchmarks/results/cpu.csv
GROUPS = {
    "LARS, ResNet-50 (161 tensors, 25.6 M)": "resnet50 lars",
    "LAMB, ResNet-50": "resnet50 lamb",
    "LARS, BERT-large (398 tensors, 336 M)": "bert_large lars",
    "LAMB, BERT-large": "bert_large lamb",
    "RMSpropWarmup, ResNet-50, warmed up": "resnet50 rmsprop-warm",
    "LARS, 10,000 tensors of 64 elements": "tiny lars",
}
# rows of the table in docs/performance.md: groups of benchmarks/results/cpu_xeon.csv
XEON_GROUPS = {
    "LARS, ResNet-50": "resnet50 lars",
    "LAMB, ResNet-50": "resnet50 lamb",
    "LARS, ViT-B/16": "vit_b lars",
    "LAMB, ViT-B/16": "vit_b lamb",
}


def rounded(text: str, value: str) -> bool:
    """Whether a text such as 12.3 ms is a figure of the results, to the digits that it has."""
    number = text.removesuffix(" ms")
    return f"{float(value):.{len(number.partition('.')[2])}f}" == number


def test_blocks_run() -> None:
    blocks = python_blocks(TEXT)
    assert len(blocks) > 1
    namespace: dict[str, Any] = {}
    for block in blocks:
        exec(block, namespace)


def test_conventions_are_all_there() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*) \| `(LARS|LAMB|LANS)` \|$", TEXT, re.MULTILINE)
    assert rows == [(c.name, c.source, c.optimizer) for c in by_name.values()]


@pytest.mark.parametrize(
    ("page", "begin", "end", "results", "groups"),
    [
        ("README.md", "## Numbers", "## The trainer", "cpu.csv", GROUPS),
        ("docs/performance.md", "Whole models on", "### Sizes", "cpu_xeon.csv", XEON_GROUPS),
    ],
    ids=["AMD EPYC", "Intel Xeon"],
)
def test_times_are_those_of_the_results(
    page: str, begin: str, end: str, results: str, groups: dict[str, str]
) -> None:
    with open(ROOT / "benchmarks" / "results" / results, newline="") as file:
        found = {(row["group"], row["contender"]): row for row in csv.DictReader(file)}
    text = (ROOT / page).read_text()
    section = text[text.index(begin) : text.index(end)]
    rows = re.findall(r"^\| (.*?) ?\| (.*?) ?\| (.*), (.*?) \| ([\d.]+) \|$", section, re.MULTILINE)
    group = ""
    for label, ours, contender, theirs, ratio in rows:
        group = groups[label] if label else group
        name = contender.replace("`", "").replace("=True", "").replace(" under jax.jit", "(jit)")
        assert rounded(theirs, found[group, name]["p50_ms"]), (group, name)
        assert rounded(ratio, found[group, name]["fastlars_over_this"]), (group, name)
        assert not ours or rounded(ours, found[group, "fastlars"]["p50_ms"]), group
    assert sum(bool(label) for label, *_ in rows) == len(groups)


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
