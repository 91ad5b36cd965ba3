"""The documentation site: Markdown pages, and API pages from the docstrings. `make docs` builds."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

import fastlars

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "_ext"))
PROJECT = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]

project = "fastlars"
author = PROJECT["authors"][0]["name"]
version = release = fastlars.__version__
project_copyright = f"2026, {author}. fastlars {release}, licence {PROJECT['license']}"
language = "en"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "pages",
    "docstrings",
]
exclude_patterns = ["_ext"]
maximum_signature_line_length = 90
html_theme = "furo"
html_title = f"fastlars {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
# No language for a literal block of a docstring: it holds equations.
highlight_language = "none"
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

# Empty until [project.urls] has it. See docs/_ext/pages.py.
repository = PROJECT.get("urls", {}).get("Repository", "").rstrip("/")


def _link_repository(_app: Sphinx, config: Any) -> None:
    """Edit links and an icon, where there is a repository that they can lead to."""
    if config.repository:
        config.html_theme_options = {
            "source_repository": config.repository,
            "source_branch": "main",
            "source_directory": "docs/",
            "footer_icons": [
                {"name": "Repository", "url": config.repository, "html": "Repository"}
            ],
        }


def setup(app: Sphinx) -> None:
    app.connect("config-inited", _link_repository)
