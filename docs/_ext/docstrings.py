"""Links in docstrings, which are written for a terminal and so have no markup for any."""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx

_NAME = re.compile(r"``(fastlars(?:\.\w+)+)``")
_PAGE = re.compile(r"\bdocs/([\w-]+)\.md\b")
_PAPER = re.compile(r"\barXiv:(\d{4}\.\d{5})\b")


def link(_app: Sphinx, _kind: str, _name: str, _of: Any, _options: Any, lines: list[str]) -> None:
    """Called for every docstring."""
    for i, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            linked = _PAGE.sub(r":doc:`/\1`", _NAME.sub(r":py:obj:`\1`", line))
            lines[i] = _PAPER.sub(r"`arXiv:\1 <https://arxiv.org/abs/\1>`__", linked)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", link)
    return {"parallel_read_safe": True}
