"""Changes Markdown before it is parsed: pictures, links to files of the repository, tables."""

from __future__ import annotations

import html
import re
from importlib import import_module
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

ROOT = Path(__file__).resolve().parent.parent.parent

_PICTURE = re.compile(
    r'^<picture><source media="\(prefers-color-scheme: dark\)" srcset="([^"]+)">'
    r'<img alt="([^"]+)" src="([^"]+)"></picture>$',
    re.MULTILINE,
)
_FILE = re.compile(r"\[([^\]]+)\]\(\.\./([^)#\s]+)(#[^)\s]*)?\)")
# The table of the page that is committed ends where its second comment stands.
_TABLE = re.compile(r"^<!-- table: (\w+) -->\n(?:\n.*?\n<!-- end -->\n)?", re.MULTILINE | re.DOTALL)


def both_pictures(text: str) -> str:
    """The picture for light pages and the one for dark pages, of which furo shows one.

    A browser's own choice would follow the system, and not the page's switch.
    """

    def images(match: re.Match[str]) -> str:
        dark, alt, light = match.groups()
        return "\n\n".join(
            f"```{{image}} {path}\n:alt: {html.unescape(alt)}\n:class: only-{mode}\n```"
            for path, mode in ((light, "light"), (dark, "dark"))
        )

    return _PICTURE.sub(images, text)


def linked_files(text: str, repository: str) -> str:
    """Links to files of the repository, which are no pages: to the repository, or only names."""

    def link(match: re.Match[str]) -> str:
        name, path, fragment = match[1], match[2], match[3] or ""
        if not (ROOT / path).exists():
            raise ExtensionError(f"a page links to {path}, which is not there")
        return f"[{name}]({repository}/blob/main/{path}{fragment})" if repository else name

    return _FILE.sub(link, text)


def with_tables(text: str) -> str:
    """A page with its tables as the code has them now, between the comments that name them."""

    def made(match: re.Match[str]) -> str:
        # Imported only for a page with tables: it imports torch and the trainer.
        table = import_module("tables").TABLES[match[1]]()
        return f"<!-- table: {match[1]} -->\n\n{table.strip()}\n\n<!-- end -->\n"

    return _TABLE.sub(made, text)


def read(app: Sphinx, _name: str, source: list[str]) -> None:
    """Called for every page."""
    text = re.sub(r"^<!-- .* -->$", "", with_tables(source[0]), flags=re.MULTILINE)
    source[0] = linked_files(both_pictures(text), app.config.repository)


def setup(app: Sphinx) -> dict[str, bool]:
    """``repository``: the repository's address; without one, no page links to it."""
    app.add_config_value("repository", "", "env")
    app.connect("source-read", read)
    return {"parallel_read_safe": True}
