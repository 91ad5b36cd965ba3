"""docs/migrating.md taken apart: its sections, their blocks and tables, and how they are run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from repository_files import ROOT, python_blocks

TEXT = (ROOT / "docs" / "migrating.md").read_text()
STEPS = 3
LABELS = ("Before", "After", "Going on")


@dataclass(frozen=True)
class Section:
    title: str
    text: str

    def has(self, label: str) -> bool:
        return re.search(rf"^{label}", self.text, re.M) is not None

    def block(self, label: str, language: str = "python") -> str:
        found = re.search(rf"^{label}.*?^```{language}\n(.*?)^```", self.text, re.M | re.S)
        assert found is not None, f"{self.title} has no block after a line with {label!r}"
        return found[1]

    def rows(self, columns: int = 2) -> list[list[str]]:
        """Rows of its table, without the head and the line below it."""
        lines = re.findall(r"^\| (.*) \|$", self.text, re.MULTILINE)
        cells = [line.split(" | ") for line in lines[1:]]
        return [row for row in cells if len(row) == columns]

    def __str__(self) -> str:
        return self.title


def sections() -> dict[str, Section]:
    parts = re.split(r"^## (.*)\n", TEXT, flags=re.MULTILINE)[1:]
    return {
        title: Section(title, text) for title, text in zip(parts[::2], parts[1::2], strict=True)
    }


PAGE = sections()
SECTIONS = [section for section in PAGE.values() if section.has("After")]
# The frameworks' sections, and those whose Before is not torch's, or not a state that its own rule
# goes on with.
OTHERS = ("optax lars", "optax lamb", "bitsandbytes", "MLPerf", "torch and NUS")
FRAMEWORKS = ("torchtitan", "torchtune")
ALIKE = [section for section in SECTIONS if section.title not in OTHERS + FRAMEWORKS]


def prepared() -> dict[str, Any]:
    """What all blocks follow: the first one of the page."""
    torch.manual_seed(0)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    first, *_ = python_blocks(TEXT)
    exec(first, namespace)
    return namespace


def set_gradients(params: list[torch.nn.Parameter], step: int) -> None:
    """Gradients that depend on the step alone."""
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = 0.1 * torch.randn(p.shape, generator=generator)


def train(namespace: dict[str, Any], steps: range) -> list[torch.Tensor]:
    """The weights after some steps; a scheduler of the script's comes first, as in NVIDIA's."""
    params = list(namespace["model"].parameters())
    for step in steps:
        set_gradients(params, step)
        if "lr_scheduler" in namespace:
            namespace["lr_scheduler"].step()
        namespace["optimizer"].step()
    return [p.detach().clone() for p in params]


def assert_close(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        # A few roundings of 6e-8 in each step.
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-6)


def save(namespace: dict[str, Any]) -> None:
    state = {name: namespace[name].state_dict() for name in ("model", "optimizer")}
    torch.save(state, "checkpoint.pt")
