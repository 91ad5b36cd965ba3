"""The documentation site: it builds without a warning, and can be read without a network."""

from __future__ import annotations

import html
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastlars
from fastlars.conventions import by_name
from repository_files import ROOT
from site_crawl import BROWSER, NAMES, faults_in_browser, faults_of_links

# One worker builds the site, and not each of them.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("site")]
needs_browser = pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(NAMES)} is here")

PICTURE = (
    '<picture><source media="(prefers-color-scheme: dark)" srcset="images/x-dark.svg">'
    '<img alt="time &lt; size" src="images/x.svg"></picture>'
)
SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="{}" height="10"/>'
# What is added to a page, and what the crawl then says.
PLANTED = {
    '<a href="index.html#nowhere">x</a>': "dead fragment index.html#nowhere",
    '<a href="gone.html">x</a>': "dead link gone.html",
    '<img src="gone.png" alt="x">': "dead link gone.png",
    '<script src="https://cdn.example.org/x.js"></script>': "asks for https://cdn.example.org/x.js",
}
PLANTED_LOOKS = {
    '<table style="width: 900px"><tr><td>x</td></tr></table>': "pixels wide",
    '<img src="_images/x.svg">': "no alt text",
    '<img src="gone.png" alt="x">': "no picture",
    '<img src="https://example.org/x.png" alt="x">': "asks for https://example.org",
    '<p style="font-size: 9px">x</p>': "letters of 9 px",
}


def build(source: Path, folder: Path, conf: Path = ROOT / "docs") -> Path:
    """A folder of pages, built as `make docs` does."""
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-E"]
    done = subprocess.run(
        [*command, "-c", conf, "-d", folder / "cache", source, folder / "html"],
        cwd=ROOT, capture_output=True, text=True, timeout=600,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "html"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(ROOT / "docs", tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources of a site of one page, with a pair of pictures and links to the repository."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "images").mkdir()
    for name, width in (("x", 20), ("x-dark", 30)):
        (folder / "images" / f"{name}.svg").write_text(SVG.format(width))
    text = f"# One page\n\n{PICTURE}\n\n[setup](../setup.py), [readme](../README.md#papers).\n"
    (folder / "index.md").write_text(text)
    return folder


def project(folder: Path, urls: str) -> Path:
    """docs/conf.py with what it needs, in a project whose pyproject.toml ends in ``urls``."""
    for name in ("docs/conf.py", "setup.py", "README.md"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    for name in ("_ext", "_static"):
        shutil.copytree(ROOT / "docs" / name, folder / "docs" / name)
    whole = (ROOT / "pyproject.toml").read_text()
    own = re.sub(r"^\[project\.urls\]\n(.+\n)*", "", whole, flags=re.MULTILINE)
    (folder / "pyproject.toml").write_text(own + urls)
    return folder / "docs"


@pytest.fixture(scope="module")
def small_site(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small_site")
    return build(small, folder, project(folder, ""))


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
    assert len(by_name) > 10
    for convention in by_name.values():
        assert convention.equation in page, convention.name


def test_docstrings_have_equations_and_links(site: Path) -> None:
    page = site / "api" / "optimizers.html"
    assert "q = eta |w| / (|g| + wd |w| + eps)\n" in text(page)
    links = re.findall(r'<a class="reference \w+" href="([^"]+)"', page.read_text(encoding="utf-8"))
    for link in ("https://arxiv.org/abs/1708.03888", "../numerics.html",
                 "conventions.html#module-fastlars.conventions"):  # fmt: skip
        assert link in links


def test_no_marker_of_a_table_is_left(site: Path) -> None:
    for path in site.rglob("*.html"):
        assert "<!-- table:" not in path.read_text(encoding="utf-8"), path


def test_footer_names_the_owner_the_licence_and_the_version(site: Path) -> None:
    footer = " ".join(text(site / "index.html").rpartition("Copyright")[2].split())
    for words in ("fastlars developers", "BSD-3-Clause", fastlars.__version__):
        assert words in footer


def test_a_pair_of_pictures_follows_the_mode_of_the_page(small_site: Path) -> None:
    page = (small_site / "index.html").read_text(encoding="utf-8")
    images = re.findall(r'<img alt="([^"]*)" class="([^"]*)" src="([^"]*)"', page)
    assert images == [
        ("time &lt; size", "only-light", "_images/x.svg"),
        ("time &lt; size", "only-dark", "_images/x-dark.svg"),
    ]
    assert "<picture" not in page


def test_without_a_repository_nothing_leads_to_one(small_site: Path) -> None:
    page = (small_site / "index.html").read_text(encoding="utf-8")
    assert "<p>setup, readme.</p>" in page
    assert "edit-this-page" not in page
    assert "view-this-page" not in page


def test_with_a_repository_pages_lead_to_it(small: Path, tmp_path: Path) -> None:
    address = "https://github.com/someone/fastlars"
    conf = project(tmp_path, f'[project.urls]\nRepository = "{address}"\n')
    folder = build(small, tmp_path / "site", conf)
    page = (folder / "index.html").read_text(encoding="utf-8")
    for link in (
        f"{address}/blob/main/setup.py",
        f"{address}/blob/main/README.md#papers",
        f"{address}/edit/main/docs/index.md",
        address,
    ):
        assert f'href="{link}"' in page, link


def test_links_lead_somewhere(site: Path, small_site: Path) -> None:
    assert faults_of_links(site) == {}
    assert faults_of_links(small_site) == {}


@needs_browser
def test_pages_can_be_read_on_a_telephone(site: Path) -> None:
    read, faults = faults_in_browser(site)
    assert faults == {}
    assert read == len([*site.rglob("*.html")]) > 20


def broken(site: Path, folder: Path, planted: dict[str, str]) -> Path:
    """A copy of a site whose first page has the planted faults."""
    shutil.copytree(site, folder)
    page = folder / "index.html"
    whole = page.read_text(encoding="utf-8")
    page.write_text(whole.replace("</article>", "".join(planted) + "</article>", 1))
    return folder


def test_dead_links_are_found(small_site: Path, tmp_path: Path) -> None:
    found = faults_of_links(broken(small_site, tmp_path / "broken", PLANTED))
    assert sorted(found["index.html"]) == sorted(PLANTED.values())


@needs_browser
def test_bad_looks_are_found(small_site: Path, tmp_path: Path) -> None:
    _, found = faults_in_browser(broken(small_site, tmp_path / "broken", PLANTED_LOOKS))
    for fault, said in PLANTED_LOOKS.items():
        assert any(said in each for each in found["index.html"]), (fault, found)
