"""The pages are read once: a first paragraph for the reader, short sentences, no idioms."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from repository_files import ROOT

# The start page of the site is a table of contents; the change log repeats CHANGELOG.md.
OTHERS = ("index.md", "changelog.md")
PAGES = [p for p in sorted((ROOT / "docs").glob("*.md")) if p.name not in OTHERS]
PAGES += [ROOT / "CONTRIBUTING.md"]
MOST_WORDS, MEAN_WORDS, MOST_LINES = 45, 25, 6
IDIOMS = re.compile(
    r"\b(beside|behind|dear|for ever|of ours|told|as it says|of the day)\b"
    r"|\| the same (?=\|)"
)
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def paragraphs(page: str) -> list[str]:
    """Paragraphs and list items, without headings, tables, pictures and code."""
    text = re.sub(r"^```.*?^```$", "\n", page, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^ *(\||#|!|<).*$", "\n", text, flags=re.MULTILINE)
    text = re.sub(r"(?<=\n\n)( {4}.*\n)+", "\n", text)  # indented code
    parts = re.split(r"\n\s*\n|^ *(?:[*-]|\d+\.) ", text, flags=re.MULTILINE)
    return [part.strip() for part in parts if part.strip()]


def lengths(page: str) -> list[int]:
    """Words of each sentence; code counts as one word, and of a link its text."""
    found = []
    for part in paragraphs(page):
        plain = re.sub(r"`+[^`]+`+", "Code", part).replace("et al.", "et al")
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", plain).replace("*", "")
        found += [len(s.split()) for s in re.split(r"(?<=[.?!])\s+", plain)]
    return found


@each_page
def test_the_first_paragraph_says_for_whom(page: Path) -> None:
    title, opening, *_ = re.split(r"\n\s*\n", page.read_text())
    assert title.startswith("# ")
    assert opening.startswith("For ")
    assert re.search("fterwards|fter this page", opening), "what the reader then knows or can do"
    assert opening.count("\n") < 3


@each_page
def test_sentences_are_short(page: Path) -> None:
    found = lengths(page.read_text())
    assert len(found) > 5
    assert sum(found) / len(found) < MEAN_WORDS
    assert max(found) <= MOST_WORDS


@each_page
def test_paragraphs_are_short(page: Path) -> None:
    assert [p for p in paragraphs(page.read_text()) if p.count("\n") >= MOST_LINES] == []


@each_page
def test_there_are_no_idioms(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert [match[0] for match in IDIOMS.finditer(text)] == []


def test_what_is_counted() -> None:
    page = "# T\n\nFor a. One, et al. two `a b` three.\nfour [five six](x.md).\n\n* B `c`? D e.\n"
    assert lengths(page + "\n```sh\nA b. C d.\n```\n\n    x. Y\n\n| A. | B. |\n") == [2, 6, 3, 2, 2]
    assert IDIOMS.findall("| a | the same | b beside c") == ["", "beside"]
