"""Who may use whom, and how large a file may grow: the rules of docs/architecture.md."""

from __future__ import annotations

import ast
import re
from functools import cache
from graphlib import TopologicalSorter

import pytest
from torch import nn

from repository_files import CXX, ROOT, TESTS, files

PYTHON = files("fastlars", suffixes=(".py",))
LINES = 400

UPPER = ("fastlars.logging", "fastlars.migrate", "fastlars.trainer")
# package: the modules of fastlars that it must not import
FORBIDDEN = {
    "fastlars.backends": (
        *("fastlars.optim", "fastlars.in_backward", "fastlars.distributed", *UPPER),
    ),
    "fastlars.optim": ("fastlars.in_backward", "fastlars.distributed", *UPPER),
    "fastlars.in_backward": ("fastlars.distributed", *UPPER),
    "fastlars.distributed": UPPER,
    "fastlars.migrate": (
        *("fastlars.in_backward", "fastlars.distributed", "fastlars.logging", "fastlars.trainer"),
    ),
    "fastlars.logging": (
        *("fastlars.in_backward", "fastlars.distributed", "fastlars.migrate", "fastlars.trainer"),
    ),
    # The trainer is a user: it imports what any user could.
    "fastlars.trainer": ("fastlars._C", "fastlars.backends", "fastlars.rules", "fastlars.optim"),
}
# The folders of the trainer, from the lowest to the highest; errors.py is below them, and the
# commands __main__.py and plots.py are above them.
ROOMS = ("process", "config", "data", "model", "output", "run")
COMMANDS = ("fastlars.trainer.__main__", "fastlars.trainer.plots")
# Subjects of the benchmarks import what they share, and not each other; commands import subjects.
SUBJECTS = ("step", "overlap", "scaling", "accuracy")
BENCH_COMMANDS = ("gpu_proof", "pictures.py")
# The trainer's command line cannot check the flags of a whole grid before the first run.
TRAINER_IN_BENCHMARKS = {
    "benchmarks/accuracy/grid.py": {
        "fastlars.trainer.config.command_line", "fastlars.trainer.errors.TrainerError",
    }
}  # fmt: skip
# Where an address leaves Python: behind one check of layout and device.
ADDRESSES = ("fastlars/backends/cpu.py", "fastlars/backends/cuda.py", "fastlars/backends/triton/")
# folder of csrc: the folders that it may include
INCLUDES = {
    "core": {"core"},
    "rules": {"core", "rules"},
    "cpu": {"core", "rules", "cpu"},
    "cuda": {"core", "rules", "cuda"},
}
FOREIGN = re.compile(r"^(torch|ATen|c10|pybind11|Python\.h|pytypedefs\.h)\b")


def module_name(path: str) -> str:
    parts = path.removesuffix(".py").split("/")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: str, top: str = "fastlars") -> set[str]:
    """All names below `top` that a file imports, at any depth of its code."""
    package = path.split("/")[:-1]
    names: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            names.update(f"{origin}.{alias.name}" for alias in node.names)
    return {name for name in names if name.split(".")[0] == top}


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def includes(path: str) -> list[str]:
    pattern = r"^\s*#\s*include\s*[<\"]([^>\"]+)[>\"]"
    return re.findall(pattern, (ROOT / path).read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("path", PYTHON)
def test_packages_import_only_what_lies_below_them(path: str) -> None:
    banned = [names for user, names in FORBIDDEN.items() if within(module_name(path), user)]
    wrong = [n for n in imported(path) for bans in banned for ban in bans if within(n, ban)]
    assert not wrong, f"{path} imports {wrong}"


def room_of(module: str) -> int:
    """The height of a module of the trainer; -1 for what is outside it or below its folders."""
    parts = module.split(".")
    return ROOMS.index(parts[2]) if len(parts) > 2 and parts[2] in ROOMS else -1


@pytest.mark.parametrize("path", [p for p in PYTHON if p.startswith("fastlars/trainer/")])
def test_rooms_of_the_trainer_import_only_lower_ones(path: str) -> None:
    module = module_name(path)
    higher = [name for name in imported(path) if room_of(name) > room_of(module)]
    assert not higher or module in COMMANDS, f"{path} imports {higher}"
    assert not [n for n in imported(path) for command in COMMANDS if within(n, command)]


def test_every_folder_of_the_trainer_is_a_room() -> None:
    folders = {path.split("/")[2] for path in PYTHON if path.count("/") > 2 and "trainer/" in path}
    assert folders == set(ROOMS)


BENCHMARKS = files("benchmarks", suffixes=(".py",))


@pytest.mark.parametrize("path", BENCHMARKS)
def test_benchmarks_drive_the_trainer_by_its_command_line(path: str) -> None:
    reached = {name for name in imported(path) if within(name, "fastlars.trainer")}
    assert reached == TRAINER_IN_BENCHMARKS.get(path, set())


@pytest.mark.parametrize("path", BENCHMARKS)
def test_subjects_of_the_benchmarks_import_only_what_they_share(path: str) -> None:
    own = path.split("/")[1]
    if own not in BENCH_COMMANDS:
        others = {name.split(".")[1] for name in imported(path, "benchmarks")} - {own}
        assert not others & {*SUBJECTS, *BENCH_COMMANDS}, f"{path} imports {others}"


def test_every_folder_of_the_benchmarks_is_a_subject_or_a_command() -> None:
    folders = {path.split("/")[1] for path in BENCHMARKS if path.count("/") > 1}
    assert folders == {*SUBJECTS, "gpu_proof"}


def test_imports_among_the_benchmarks_have_no_circle() -> None:
    modules = {module_name(path): path for path in BENCHMARKS}
    uses = {
        user: {
            module
            for module in modules
            for name in imported(path, "benchmarks")
            if name in (module, f"{module}.{name.rpartition('.')[2]}") and module != user
        }
        for user, path in modules.items()
    }
    tuple(TopologicalSorter(uses).static_order())  # a CycleError names the circle


def package_of(path: str) -> str:
    """``fastlars/optim`` and the like; a module of the top level is a package by itself."""
    return "/".join(path.split("/")[:2])


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name != "_C"


@cache
def private_names(path: str) -> set[str]:
    """What a file defines for itself: functions, classes, variables, attributes of ``self``."""
    names: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return {name for name in names if is_private(name) and not hasattr(nn.Module(), name)}


def borrowed_names(path: str) -> list[tuple[int, str]]:
    """Private names that a file imports, or takes from anything but ``self`` and ``cls``."""
    found = []
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastlars"):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.Attribute):
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if not own:
                found.append((node.lineno, node.attr))
    return [(line, name) for line, name in found if is_private(name)]


@pytest.mark.parametrize("path", [*PYTHON, *BENCHMARKS])
def test_private_names_stay_in_their_package(path: str) -> None:
    own = package_of(path)
    others = {name for p in PYTHON if package_of(p) != own for name in private_names(p)}
    wrong = [f"line {line}: {name}" for line, name in borrowed_names(path) if name in others]
    assert not wrong, f"{path} uses private names of another package: {wrong}"


@pytest.mark.parametrize("path", [path for path in PYTHON if not path.startswith(ADDRESSES)])
def test_addresses_leave_python_in_the_back_ends_alone(path: str) -> None:
    nodes = ast.walk(ast.parse((ROOT / path).read_text()))
    lines = [n.lineno for n in nodes if isinstance(n, ast.Attribute) and n.attr == "data_ptr"]
    assert not lines, f"{path} uses data_ptr in lines {lines}"


@pytest.mark.parametrize("path", files("csrc", suffixes=CXX))
def test_cxx_includes_only_what_lies_below_it(path: str) -> None:
    names = includes(path)
    folder = path.split("/")[1]
    if folder in INCLUDES:
        ours = [name for name in names if (ROOT / "csrc" / name).exists() or ".." in name]
        wrong = [name for name in ours if name.split("/")[0] not in INCLUDES[folder]]
        assert not wrong, f"{path} includes {wrong}"
    if path != "csrc/bindings.cpp":
        foreign = [name for name in names if FOREIGN.match(name)]
        assert not foreign, f"{path} includes {foreign}; csrc/bindings.cpp alone knows Python"


@pytest.mark.parametrize("path", files("csrc/core", "csrc/rules", "csrc/cpu", suffixes=CXX))
def test_threads_are_torchs_own(path: str) -> None:
    text = (ROOT / path).read_text()
    assert not re.search(r"num_threads\s*\(|omp_set_|std::j?thread\b", text), path


@pytest.mark.parametrize(
    "path", files("fastlars", "csrc", "benchmarks", suffixes=(".py", ".pyi", *CXX))
)
def test_sources_stay_short(path: str) -> None:
    lines = len((ROOT / path).read_text().splitlines())
    assert lines < LINES, f"{path} has {lines} lines: is it one idea?"


def test_every_folder_of_tests_says_what_it_proves() -> None:
    folders = {path.parent for path in TESTS.glob("*/*.py")}
    assert len(folders) > 8
    assert TESTS not in {path.parent for path in TESTS.glob("test_*.py")}
    for folder in folders:
        sentence = (folder / "README.md").read_text()
        assert sentence.count("\n") == 1, folder
        assert 60 < len(sentence) < 400, folder


@pytest.mark.parametrize("command", ["make train", "make test"])
def test_readme_names_the_command(command: str) -> None:
    assert command in (ROOT / "README.md").read_text()
    assert re.search(rf"^{command.split()[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
