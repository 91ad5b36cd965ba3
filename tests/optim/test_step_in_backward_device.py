"""fastlars.step_in_backward on a GPU: bits, memory and streams."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import fastlars
from fastlars.in_backward.waiting import Waiting
from optim.in_backward_cases import Net, both
from optimizers import ROWS, Row


class FakeStream:
    """Notes whom it waits for."""

    def __init__(self) -> None:
        self.waited: list[FakeStream] = []

    def wait_stream(self, other: FakeStream) -> None:
        self.waited.append(other)


class OnGpu(SimpleNamespace):
    """As much of a parameter as is looked at."""

    def __hash__(self) -> int:
        return id(self)


def test_gradients_of_several_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream of the last arrival waits for the others, and keeps the memory until then."""
    streams = [FakeStream(), FakeStream()]
    read: list[tuple[str, Any]] = []

    def arrived(name: str) -> Any:
        def record_stream(stream: Any) -> None:
            read.append((name, stream))

        grad = SimpleNamespace(numel=lambda: 1, element_size=lambda: 4, record_stream=record_stream)
        return OnGpu(is_cpu=False, device="cuda:0", grad=grad)

    def on(stream: FakeStream) -> None:
        monkeypatch.setattr(torch.accelerator, "current_stream", lambda _: stream)

    waiting = Waiting()
    params = [arrived(name) for name in "abc"]
    for p, stream in zip(params, (streams[0], streams[0], streams[1]), strict=True):
        on(stream)
        waiting.add(p)
    assert waiting.take() == params
    assert streams[1].waited == [streams[0]]
    assert read == [(name, streams[1]) for name in "abc"]
    assert streams[0].waited == []
    waiting.add(params[0])
    assert waiting.take() == params[:1]
    assert len(read) == 3  # one stream: nothing to wait for


@pytest.mark.gpu
@pytest.mark.parametrize("row", ROWS, ids=repr)
def test_on_a_gpu(row: Row) -> None:
    """Bits; and the allocator's peak, which has no room for all gradients."""
    both(row, make=lambda row: Net(row.dtype).cuda())


@pytest.mark.gpu
def test_the_peak_of_a_gpu() -> None:
    size = 4 * 1024 * 1024
    peaks = []
    for early in (False, True):
        net = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(48))).cuda()
        optimizer = fastlars.LARS(net.parameters(), lr=0.01)
        if early:
            fastlars.step_in_backward(net, optimizer, bucket_mb=8)
        torch.cuda.reset_peak_memory_stats()
        for _ in range(3):
            optimizer.zero_grad()
            net(torch.randn(4, 1024, device="cuda")).square().mean().backward()
            optimizer.step()
        peaks.append(torch.cuda.max_memory_allocated())
        del net, optimizer
        gc.collect()
    assert peaks[0] - peaks[1] > 0.9 * (48 * size - 8 * 2**20), peaks
