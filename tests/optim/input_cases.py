"""A healthy optimizer around one tensor that is not: for the tests of bad and hard input."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optimizers import SIMPLE, Row, Snapshot

each_class = pytest.mark.parametrize("row", SIMPLE, ids=repr)
HERE = r"group 1, parameter 1"


def values(*shape: int, seed: int = 5) -> Tensor:
    return 0.5 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Case:
    """An optimizer of two groups, healthy but for what a test puts at group 1, parameter 1."""

    def __init__(self, row: Row, victim: Tensor | None = None, **options: Any) -> None:
        victim = victim if victim is not None else nn.Parameter(values(4, 6))
        self.victim = victim
        self.healthy = [nn.Parameter(values(3, seed=i)) for i in range(4)]
        a, b, c, d = self.healthy
        groups = [{"params": [a, b]}, {"params": [c, victim, d], **options}]
        self.params = [a, b, c, victim, d]
        self.optimizer = row.make(groups)

    def set_gradients(self, step: int = 0) -> None:
        for i, p in enumerate(self.params):
            if p.is_floating_point() and not p.is_meta and p.layout == torch.strided:
                p.grad = values(*p.shape, seed=100 * step + i).to(p.dtype)

    def train(self, *steps: int) -> None:
        for step in steps:
            self.set_gradients(step)
            self.optimizer.step()

    def refuses(self, error: type[Exception], message: str, where: str = HERE) -> None:
        """The step raises and changes nothing; it works again once the victim has no gradient."""
        before = Snapshot(self.optimizer)
        with pytest.raises(error, match=where) as caught:
            self.optimizer.step()
        assert type(caught.value) is error
        assert re.search(message, str(caught.value)), caught.value
        assert "\n" not in str(caught.value)
        before.assert_unchanged()


def through_file(value: Any) -> Any:
    """What torch.save and torch.load make of it, code and pickles of foreign classes refused."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
