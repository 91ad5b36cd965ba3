"""CONTRIBUTING's list of the files that an optimizer takes, held against the sources."""

from __future__ import annotations

import ast
import re

import pytest

import fastlars
from fastlars.rules import RULES, Rule
from repository_files import CXX, ROOT, files

SECTION = (
    (ROOT / "CONTRIBUTING.md").read_text().split("## Adding an optimizer")[1].split("\n## ")[0]
)
LISTED = re.findall(r"^\| `([^`]+)` \|", SECTION, re.MULTILINE)
MOST = 13
# These translate between fastlars and other libraries, or use it, and so name optimizers.
OTHERS = ("fastlars/conventions.py", "fastlars/migrate/", "fastlars/trainer/")
# The first two rules have no file of tests of their own: most tests are about them.
OWN_TESTS = {
    "tests/optim/test_lars.py": "tests/optim/test_trust.py",
    "tests/optim/test_lamb.py": "tests/optim/test_trust.py",
}


def optimizer_of(rule: type[Rule]) -> str:
    (name,) = (n for n in fastlars.__all__ if getattr(getattr(fastlars, n), "rule", None) is rule)
    return name


def names_in(path: str, *, strings: bool = False) -> set[str]:
    """The identifiers of a source; comments do not count, nor do strings unless asked for."""
    text = (ROOT / path).read_text()
    if path.endswith(CXX):
        return set(re.findall(r"\w+", re.sub(r"//.*", "", text)))
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if strings or not isinstance(node, ast.Constant):
            values = [getattr(node, field, None) for field in node._fields]
            found.update(*(re.findall(r"\w+", each) for each in values if isinstance(each, str)))
    return found


def paths(rule: type[Rule]) -> list[str]:
    expanded = [path.replace("<name>", rule.name) for path in LISTED]
    return [OWN_TESTS.get(path, path) for path in expanded]


def test_the_list_is_no_longer_than_promised() -> None:
    assert 0 < len(LISTED) <= MOST
    assert len(set(LISTED)) == len(LISTED)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_every_listed_file_is_there_and_has_the_rule(rule: type[Rule]) -> None:
    wanted = {rule.__name__, optimizer_of(rule), rule.name}
    for path in paths(rule):
        assert (ROOT / path).is_file(), path
        if rule.name not in path:
            assert wanted & names_in(path, strings=True), f"{path} does not name {rule.title}"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_no_other_source_names_the_rule(rule: type[Rule]) -> None:
    sources = files("csrc", "fastlars", suffixes=(".py", ".pyi", *CXX))
    wanted = {rule.__name__, optimizer_of(rule)}
    named = {p for p in sources if not p.startswith(OTHERS) and wanted & names_in(p)}
    assert sorted(named - set(paths(rule))) == []
