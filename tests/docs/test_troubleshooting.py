"""docs/troubleshooting.md against the sources: every message is there, and no other."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from repository_files import ROOT, files

TEXT = (ROOT / "docs" / "troubleshooting.md").read_text()
PYTHON = [path for path in files("fastlars", suffixes=(".py",)) if "/trainer/" not in path]
CUDA = "csrc/cuda/launch.cu"
BINDINGS = "csrc/bindings.cpp"
CMAKE = files("csrc", suffixes=(".txt", ".cmake"))
# Functions that return a reason, which another message ends in.
REASONS = re.compile(r"why_|incompatibility")
# Not for users: Mismatch never leaves a step, and the others end a process or a lookup.
INTERNAL = {"Mismatch", "SystemExit", "KeyError"}


def template(node: ast.expr) -> list[str]:
    """Texts that an expression can give, with … for what is filled in."""
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    if isinstance(node, ast.JoinedStr):
        parts = [v.value if isinstance(v, ast.Constant) else "…" for v in node.values]
        return ["".join(map(str, parts))]
    if isinstance(node, ast.IfExp):
        return template(node.body) + template(node.orelse)
    return []


def says_something(text: str) -> bool:
    """Whether a text is more than a place put before another message."""
    return bool(re.sub(r"group|state_dict|[…:, ]", "", text))


def in_python(path: str) -> Iterator[str]:
    tree = ast.parse((ROOT / path).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and REASONS.search(node.name):
            returned = [n.value for n in ast.walk(node) if isinstance(n, ast.Return) and n.value]
            yield from (text for value in returned for text in template(value))
        raised = node.exc if isinstance(node, ast.Raise) else None
        warned = isinstance(node, ast.Call) and ast.unparse(node.func) == "warnings.warn"
        call = node if warned else raised
        if isinstance(call, ast.Call) and ast.unparse(call.func) not in INTERNAL and call.args:
            found = template(call.args[0])
            assert found, f"{path}:{call.lineno}: a message that cannot be read from the source"
            yield from found


def in_cxx(path: str) -> Iterator[str]:
    """What throw statements say, and what `advice_on` returns."""
    text = (ROOT / path).read_text()
    start = text.find("std::string advice_on(")
    advice = text[start : text.index("\n}\n", start)] if start >= 0 else ""
    statements = re.findall(r"throw (?!Mismatch)[\w:]+\((.*?)\);\n", text, re.DOTALL)
    for statement in statements + re.findall(r"return ([^;]*);", advice):
        # The one that is put together from CUDA's own words.
        kernel = "fastlars kernel" in statement
        yield from ["fastlars kernel …: …, …"] if kernel else branches(statement)


def branches(expression: str) -> Iterator[str]:
    """The strings that a C++ expression of literals, + and ?: can give."""
    said = ""
    for token in [*re.findall(r'"[^"]*"|[?:]|\+|[^"?:+]+', expression), "?"]:
        if token in "?:":
            yield said
            said = ""
        elif token.startswith('"'):
            said += token.strip('"')
        elif token.strip() and token != "+":
            said += "…"


def in_setup() -> Iterator[str]:
    """What setup.py says before it ends."""
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "sys.exit":
            yield from template(node.args[0])


def in_cmake(path: str) -> Iterator[str]:
    """What setup.py repeats of CMake's errors."""
    text = (ROOT / path).read_text().replace("\\\n", "")
    for said in re.findall(r'^ *fastlars_(?:stop|if_it_stops)\("(.*)"\)$', text, re.MULTILINE):
        yield re.sub(r"\$(ENV)?\{\w+\}", "…", said).replace('\\"', '"')


def in_sources() -> set[str]:
    found = {text for path in PYTHON for text in in_python(path)}
    found |= {*in_setup(), *(text for path in CMAKE for text in in_cmake(path))}
    found |= {text for path in (CUDA, BINDINGS) for text in in_cxx(path)}
    return {text for text in found if says_something(text)}


def documented() -> list[str]:
    rows = re.findall(r"^\| (`` ?.*? ?``|`[^`]*`) \|", TEXT, re.MULTILINE)
    inline = re.findall(r"raises `(fastlars kernel [^`]*)`", TEXT)
    symptoms = TEXT[TEXT.index("## No message, but") :]
    return [row.strip("`") for row in rows if row not in symptoms] + inline


def test_every_message_is_documented() -> None:
    missing = in_sources() - set(documented())
    assert not missing, "docs/troubleshooting.md lacks:\n" + "\n".join(sorted(missing))


def test_every_documented_message_is_in_the_sources() -> None:
    gone = set(documented()) - in_sources()
    assert not gone, "no longer raised:\n" + "\n".join(sorted(gone))


def test_messages_are_documented_once() -> None:
    rows = documented()
    assert len(rows) == len(set(rows)) > 100


@pytest.mark.parametrize("line", [x for x in TEXT.splitlines() if x.startswith("| `")])
def test_every_row_has_a_cause_and_a_cure(line: str) -> None:
    cells = re.split(r"(?<!\\) \| ", line.strip("| "))
    assert len(cells) in (2, 3)
    assert all(cell.strip() for cell in cells)
