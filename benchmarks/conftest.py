"""Two threads, as the published numbers; torch's version beside the machine's."""

from __future__ import annotations

from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def _two_threads() -> None:
    torch.set_num_threads(2)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--model", help="of the benchmarks on a GPU, those of this model alone")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out other models; and torch.compile, which takes minutes, unless -k names it."""
    compiles = "compile" in (config.getoption("keyword") or "")
    kept = []
    for item in items:
        given = getattr(item, "callspec", None)
        case = given.params.get("compared") if given is not None else None
        wanted = case is None or config.getoption("--model") in (None, case.model)
        if case is not None and not compiles and "compile" in given.params["name"]:
            wanted = False
        if wanted:
            kept.append(item)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info["torch"] = torch.__version__
