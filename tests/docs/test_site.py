"""The documentation site: it builds without a warning, and has what a reader looks for."""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastlars
from fastlars.conventions import Convention
from repository_files import ROOT

# One worker builds the site, and not each of them.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("site")]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` does."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-E"]
    done = subprocess.run(
        [*command, "-d", folder / "cache", "docs", folder / "html"],
        cwd=ROOT, capture_output=True, text=True, timeout=600,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "html"


def text(page: Path) -> str:
    """What a reader sees of a page."""
    return html.unescape(re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8")))


def test_every_page_is_linked_from_the_start(site: Path) -> None:
    start = (site / "index.html").read_text(encoding="utf-8")
    pages = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in
             (ROOT / "docs").rglob("*.md")}  # fmt: skip
    assert len(pages) > 5
    for page in pages - {Path("index.html")}:
        assert f'href="{page.as_posix()}' in start, page


def test_public_names_have_entries(site: Path) -> None:
    pages = "".join(path.read_text(encoding="utf-8") for path in (site / "api").glob("*.html"))
    for name in fastlars.__all__:
        if callable(getattr(fastlars, name)):
            assert re.search(rf'id="(fastlars\.[\w.]*)?{name}"', pages), name
    assert 'id="fastlars.distributed.overlap"' in pages


def test_conventions_are_all_there(site: Path) -> None:
    page = text(site / "api" / "conventions.html")
    found = [c for c in vars(fastlars.conventions).values() if isinstance(c, Convention)]
    assert len(found) > 10
    for convention in found:
        assert convention.equation in page, convention.name


def test_equations_are_typeset(site: Path) -> None:
    page = (site / "api" / "optimizers.html").read_text(encoding="utf-8")
    assert page.count('class="math notranslate nohighlight"') > 10
    assert ":math:" not in text(site / "api" / "optimizers.html")
