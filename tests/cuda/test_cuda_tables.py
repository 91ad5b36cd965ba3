"""What the CUDA back end uploads and launches. Launches are noted down and not run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastlars import _C
from fastlars.backends import cuda, upload
from fastlars.backends.base import Dtypes, StepScalars, Tensors
from fastlars.backends.cuda import Cuda, TableCache
from fastlars.backends.upload import UploadedTensors, Uploader
from fastlars.rules import GradientNorm, LambRule, LarsRule, RmspropWarmupRule, Rule


class Table:
    """Stands in for fastlars._C.CudaChunkTable."""

    chunk_entry_bytes, tensor_entry_bytes, chunks, tensors, workspace_bytes = 16, 48, 3, 2, 100

    def __init__(self, layout: object = None) -> None:
        self.changed = True
        self.places: list[tuple[int, ...]] = []

    def write_chunk_entries(self, address: int) -> None:
        pass

    def write_tensor_entries(self, tensors: object, address: int) -> bool:
        changed, self.changed = self.changed, False
        return changed

    def place(self, *addresses: int) -> None:
        self.places.append(addresses)


def test_tables_are_uploaded_when_something_moved() -> None:
    table = Table()
    cache = TableCache(table, [torch.ones(3)])
    constant, entries = first = cache.get(None)
    assert [x.numel() for x in (*constant.tensors, *entries.tensors)] == [48, 100, 96]
    assert int(constant.tensors[1].sum()) == 0
    assert cache.get(None) is first
    table.changed = True
    other = cache.get(None)
    assert other[0] is constant
    assert other[1] is not entries


def test_tables_are_written_on_the_host_whatever_the_default_device() -> None:
    """Their host's side is filled through addresses."""
    weights = [torch.ones(3)]
    with torch.device("meta"):
        cache = TableCache(Table(), weights)
        sent = [x for each in cache.get(None) for x in each.tensors]
    assert [x.device.type for x in (cache._host, *sent)] == ["cpu"] * 4


def test_a_failed_upload_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table()
    cache = TableCache(table, [torch.ones(3)])
    cache.get(None)
    table.changed = True

    def fails(values: Tensor) -> Tensor:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as context:
        context.setattr(cache._uploader, "upload", fails)
        with pytest.raises(torch.OutOfMemoryError):
            cache.get(None)
    assert cache.get(None) is cache.get(None)


def test_an_upload_during_capture_is_not_used_by_eager_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = torch.ones(3)
    cache = TableCache(Table(), [weight])
    with monkeypatch.context() as context:
        context.setattr(cuda, "is_capturing", lambda device: True)
        recorded = cache.get(None)
    eager = cache.get(None)
    assert all(a is not b for a, b in zip(recorded, eager, strict=True))
    with monkeypatch.context() as context:
        context.setattr(cuda, "is_capturing", lambda device: True)
        assert cache.get(None) is eager


def test_pinned_memory_lies_ready_for_a_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    recording, pinned = [False], []
    for module in (cuda, upload):
        monkeypatch.setattr(module, "is_capturing", lambda device: recording[0])
    real = Uploader.pinned_copy
    monkeypatch.setattr(Uploader, "pinned_copy", lambda *a: pinned.append(a) or real(*a))
    table = Table()
    cache = TableCache(table, [torch.ones(3)])
    for _ in range(2):
        recording[0] = False
        cache.get(None)
        pinned.clear()
        # Weights may have moved.
        recording[0] = table.changed = True
        cache.get(None)
        assert pinned == []
        table.changed = True
    # A table that is made within a recording pins memory for both kinds of entries.
    table = Table()
    cache = TableCache(table, [torch.ones(3)])
    assert cache.get(None)[1].tensors[0].numel() == 96
    assert len(pinned) == 2


class Stream:
    """Stands in for torch.cuda.Stream, and for a tensor that is used on it."""

    def __init__(self, handle: int) -> None:
        self.cuda_stream = handle
        self.notes: list[tuple[str, object]] = []

    def record_event(self) -> str:
        return f"event of {self.cuda_stream}"

    def wait_event(self, event: object) -> None:
        self.notes.append(("waits", event))

    def record_stream(self, stream: Stream) -> None:
        stream.notes.append(("uses", self))


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether launches are recorded; a test may change its one element."""
    now = [False]
    monkeypatch.setattr(upload, "is_capturing", lambda device: now[0])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: now[0])
    return now


def test_other_streams_wait_for_tables_once(
    capturing: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    filling, side, tensor = Stream(1), Stream(2), Stream(0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: filling)
    uploader = SimpleNamespace(device=torch.device("cuda", 0), read_at_replay=[])
    uploaded = UploadedTensors(uploader, tensor)
    for stream in (filling, side, side):
        uploaded.wait_for_upload(stream)
    assert filling.notes == []
    assert side.notes == [("waits", "event of 1"), ("uses", tensor)]
    capturing[0] = True
    recording = Stream(3)
    for _ in range(2):
        uploaded.wait_for_upload(recording)
    assert recording.notes == []
    assert uploader.read_at_replay == [uploaded]


def test_what_graphs_read_lives_as_long_as_their_weights() -> None:
    weight = torch.ones(3)
    Uploader([weight]).read_at_replay.append("a table")
    assert Uploader([weight, torch.ones(2)]).read_at_replay == ["a table"]
    assert Uploader([torch.ones(3)]).read_at_replay == []


@pytest.mark.parametrize(
    ("path", "rule", "seed", "calls"),
    [
        ("two-launch", LarsRule(), None, ["measure", "apply"]),
        ("two-launch", LarsRule(adapt=False), None, ["apply"]),
        ("one-launch", LarsRule(), None, ["step"]),
        ("one-launch", LambRule(), None, ["step"]),
        ("one-launch", LambRule(adapt=False), None, ["apply"]),
        ("one-launch", RmspropWarmupRule(1.0, 1.0), None, ["apply"]),
        ("one-launch", LarsRule(), 7, ["measure", "apply"]),
    ],
)
def test_launches(
    path: str, rule: Rule, seed: int | None, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def takes_notes(name: str) -> Any:
        return lambda *arguments: made.append(name)

    for name in ("measure", "apply", "step"):
        monkeypatch.setattr(_C, f"cuda_{name}", takes_notes(name), raising=False)
    monkeypatch.setattr(_C, "CudaChunkTable", Table, raising=False)
    monkeypatch.setattr(_C, "CudaScalars", lambda *scalars: scalars, raising=False)
    monkeypatch.setattr(cuda, "kernel_device_type", lambda: "cpu")
    backend = Cuda()
    backend.path = path
    weights = [torch.ones(2), torch.ones(3)]
    states = tuple([torch.zeros_like(w) for w in weights] for _ in rule.states)
    counters = [torch.zeros(()) for _ in weights] if rule.counter else None
    dtypes = Dtypes(*[torch.float32] * 3)
    tensors = Tensors(weights, [w.clone() for w in weights], states, counters, None, dtypes)
    layout = backend.layout(weights)
    report = backend.step(rule, backend.bind(tensors, layout), StepScalars(0.1, seed=seed))
    assert made == calls
    assert (report.shape, report.dtype) == ((2, 1 + rule.sums), torch.float32)
    sums = backend.measure(GradientNorm(), backend.bind(tensors, layout), StepScalars(0.1))
    assert (sums.shape, sums.dtype) == ((2, 1), torch.float64)
    assert len(layout.table.places) == 1
