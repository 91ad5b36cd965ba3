"""README.md: its blocks run, its tables are those of the sources; links of all pages resolve."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import RESULTS
from benchmarks.results import read_csv
from fastlars.conventions import by_name
from repository_files import ROOT, python_blocks

TEXT = (ROOT / "README.md").read_text()
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
# rows of the README's table: groups of benchmarks/results/cpu.csv
GROUPS = {
    "LARS, ResNet-50": "resnet50 lars",
    "LARS, BERT-large": "bert_large lars",
    "LARS, 10,000 tensors of 64 elements": "tiny lars",
    "LAMB, ResNet-50": "resnet50 lamb",
    "LAMB, BERT-large": "bert_large lamb",
}
# columns of that table: how the contenders' names begin
COLUMNS = ("torch", "timm", "pytorch_optimizer", "optax")
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


def measured(results: str) -> dict[tuple[str, str], dict[str, str]]:
    """The rows of a file of results, by group and contender."""
    return {(row["group"], row["contender"]): row for row in read_csv(RESULTS / results)}


def test_it_is_short_and_says_once_that_no_gpu_was_there() -> None:
    assert len(TEXT.splitlines()) <= 130
    assert len(re.findall(r"has run on a GPU|ran on a GPU|run on a GPU", TEXT)) == 1


def test_the_number_of_conventions_is_right() -> None:
    assert f"there are {len(by_name)} conventions" in " ".join(TEXT.split())


def test_times_are_those_of_the_results() -> None:
    found = measured("cpu.csv")
    rows = re.findall(r"^\| (L.*?) \| ([\d.]+ ms) \| (.*) \|$", TEXT, re.MULTILINE)
    assert [label for label, *_ in rows] == list(GROUPS)
    for label, ours, cells in rows:
        group = GROUPS[label]
        assert rounded(ours, found[group, "fastlars"]["p50_ms"]), group
        ratios = dict(zip(COLUMNS, (cell.strip() for cell in cells.split("|")), strict=True))
        for column, cell in ratios.items():
            rivals = [key for key in found if key[0] == group and key[1].startswith(column)]
            assert bool(cell) == bool(rivals), (group, column)
            for key in rivals:
                name, ratio = re.fullmatch(r"(?:`(\w+)` )?([\d.]+)", cell).groups()  # type: ignore[union-attr]
                assert name is None or name in key[1]
                assert rounded(ratio, found[key]["fastlars_over_this"]), key


def test_times_of_the_xeon_are_those_of_the_results() -> None:
    found = measured("cpu_xeon.csv")
    text = (ROOT / "docs/performance.md").read_text()
    section = text[text.index("Whole models on") : text.index("### Sizes")]
    rows = re.findall(r"^\| (.*?) ?\| (.*?) ?\| (.*), (.*?) \| ([\d.]+) \|$", section, re.MULTILINE)
    assert [label for label, *_ in rows] == list(XEON_GROUPS)
    for label, ours, contender, theirs, ratio in rows:
        group = XEON_GROUPS[label]
        name = contender.replace("`", "").replace("=True", "")
        assert rounded(theirs, found[group, name]["p50_ms"]), (group, name)
        assert rounded(ratio, found[group, name]["fastlars_over_this"]), (group, name)
        assert rounded(ours, found[group, "fastlars"]["p50_ms"]), group


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
