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
    model, compiles = config.getoption("--model"), "compile" in config.getoption("keyword")

    def is_wanted(item: Any) -> bool:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if "compared" not in params:
            return True
        return model in (None, params["compared"].model) and (
            compiles or "compile" not in params["name"]
        )

    config.hook.pytest_deselected(items=[item for item in items if not is_wanted(item)])
    items[:] = filter(is_wanted, items)


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info["torch"] = torch.__version__
