"""The documentation site: Markdown pages, and API pages from the docstrings. `make docs` builds."""

from __future__ import annotations

import re
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

import fastlars
from fastlars.conventions import Convention

ROOT = Path(__file__).resolve().parent.parent

project = "fastlars"
author = "fastlars developers"
version = release = fastlars.__version__
language = "en"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
]
html_theme = "furo"
html_title = f"fastlars {release}"
nitpicky = True
# Types of annotations whose documentation lies with others.
_OTHERS = "torch|nn|Tensor|Optimizer|LambdaLR|collections|Any|ProcessGroup|DeviceMesh|NormGroup"
nitpick_ignore_regex = [("py:.*", rf"({_OTHERS}|Params|SkipIf|Figure)\b.*")]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
napoleon_numpy_docstring = False
napoleon_use_rtype = False
myst_heading_anchors = 4

# Pages link to files of the repository, which are no pages: their names stay, the links go.
_OUTSIDE = re.compile(r"\[([^\]]+)\]\((\.\./[^)#\s]+)(#[^)\s]*)?\)")


def _without_links(text: str) -> str:
    def name(match: re.Match[str]) -> str:
        if not (ROOT / "docs" / match[2]).exists():
            raise ExtensionError(f"a page links to {match[2]}, which is not there")
        return match[1]

    return _OUTSIDE.sub(name, text)


def _conventions() -> str:
    """A section for each: they are mappings, which autodoc has nothing to say about."""
    found = [c for c in vars(fastlars.conventions).values() if isinstance(c, Convention)]
    return "".join(f"\n## {c.name}\n\n```text\n{c}\n```\n" for c in found)


def _read(_app: Sphinx, name: str, source: list[str]) -> None:
    source[0] = _without_links(source[0])
    if name == "api/conventions":
        source[0] += _conventions()


def setup(app: Sphinx) -> None:
    """Hooks."""
    app.connect("source-read", _read)
