"""What a back end for GPUs must do with streams, graphs and memory: tests that each inherits."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

import fastlars
from device_cases import CLASSES, optimizer, set_gradients
from fastlars.backends import selfcheck
from fastlars.logging import layer_statistics
from tolerances import assert_same_bits

# Many chunks, some of them ragged; the last tensors lie off every boundary that matters.
SHAPES = ((300, 1000), (4096,), (50,), (12_289,), (), (0, 3), (7, 11))
STEPS = 4
Trained = tuple[list[Tensor], torch.optim.Optimizer]
each_optimizer = pytest.mark.parametrize("name", CLASSES)


def _written(trained: Trained) -> list[Tensor]:
    params, tested = trained
    states = [value for p in params for value in tested.state[p].values()]
    return [x.detach() for x in (*params, *states)]


def assert_same(what: str, a: Trained, b: Trained) -> None:
    """Parameters and states of both optimizers have the same bits."""
    for i, (x, y) in enumerate(zip(_written(a), _written(b), strict=True)):
        assert_same_bits(f"{what}, tensor {i}", x.cpu(), y.cpu())


@contextmanager
def no_waiting() -> Iterator[None]:
    """A wait for the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _train(trained: Trained, steps: range = range(STEPS)) -> Trained:
    params, tested = trained
    for step in steps:
        set_gradients(params, step)
        tested.step()
    return trained


@pytest.mark.gpu
class Streams:
    """A step does the same wherever and whenever it runs."""

    backend: str

    @pytest.fixture(autouse=True)
    def _demanded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FASTLARS_BACKEND", self.backend)

    def made(self, name: str, **options: object) -> Trained:
        return optimizer(name, "cuda", SHAPES, **options)

    @each_optimizer
    def test_step_waits_for_nothing(self, name: str) -> None:
        params, tested = self.made(name, max_grad_norm=0.5, skip_if=1e9)
        for step in range(3):
            set_gradients(params, step)
            tested.grad_scale = torch.ones(1, device="cuda")  # type: ignore[attr-defined]
            tested.found_inf = torch.zeros(1, device="cuda")  # type: ignore[attr-defined]
            if step == 0:
                tested.step()
                continue
            with no_waiting():
                tested.step()

    @each_optimizer
    def test_statistics_wait_once(self, name: str) -> None:
        params, tested = _train(self.made(name, max_grad_norm=0.5, skip_if=1e9))
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                found = layer_statistics(nn.ParameterList(params), tested)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        adapts = type(tested).rule.sums > 0  # type: ignore[attr-defined]
        assert bool(found) == adapts
        assert (
            len([each for each in caught if "called a synchronizing" in str(each.message)])
            == adapts
        )

    def test_the_check_may_wait_where_waits_are_errors(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = selfcheck.difference
        found: list[str] = []
        monkeypatch.setattr(selfcheck, "_passed", defaultdict(set))
        monkeypatch.setattr(
            selfcheck, "difference", lambda *given: found.append(whole(*given)) or found[-1]
        )
        params, tested = self.made("LARS")
        set_gradients(params, 0)
        torch.cuda.set_sync_debug_mode("error")
        try:
            tested.step()
            assert torch.cuda.get_sync_debug_mode() == 2
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert found == [""]

    @each_optimizer
    def test_a_scaler_skips_without_a_wait(self, name: str) -> None:
        expected, scaled = self.made(name), self.made(name, fused_unscale=True)
        scaler = torch.amp.GradScaler("cuda")
        scaler.scale(torch.ones((), device="cuda"))  # makes the scale, a power of two
        for step in range(STEPS):
            params, tested = scaled
            before = [x.clone() for x in _written(scaled)]
            set_gradients(params, step)
            for p in params:
                assert p.grad is not None
                p.grad.mul_(scaler.get_scale())
            if step == 2:
                assert params[0].grad is not None
                params[0].grad[1, 1] = float("inf")
            if step == 0:
                scaler.step(tested)
            else:
                with no_waiting():
                    scaler.step(tested)
            scaler.update()
            if step == 2:
                for i, (x, was) in enumerate(zip(_written(scaled), before, strict=True)):
                    assert_same_bits(f"skipped, tensor {i}", x, was)
            else:
                _train(expected, range(step, step + 1))
        assert_same("scaled", scaled, expected)

    @each_optimizer
    def test_replays_follow_rate_and_gradients(self, name: str) -> None:
        rates = [torch.tensor(0.1, device="cuda") for _ in range(2)]
        eager, recorded = (self.made(name, lr=rate, capturable=True) for rate in rates)
        for trained in (eager, recorded):
            _train(trained, range(2))
        set_gradients(recorded[0], 2)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            recorded[1].step()
        for step in range(2, 2 + STEPS):
            for rate in rates:
                rate.fill_(0.1 / step)
            _train(eager, range(step, step + 1))
            for p, q in zip(recorded[0], eager[0], strict=True):
                assert p.grad is not None
                assert q.grad is not None
                p.grad.copy_(q.grad)
            graph.replay()
            assert_same(f"replay {step}", recorded, eager)

    @each_optimizer
    def test_a_thousand_replays_equal_a_thousand_steps(self, name: str) -> None:
        eager, recorded = (self.made(name, lr=0.01, capturable=True) for _ in range(2))
        for trained in (eager, recorded):
            _train(trained, range(2))
            set_gradients(trained[0], 2)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            recorded[1].step()
        for _ in range(1000):
            eager[1].step()
            graph.replay()
        assert_same("replays", recorded, eager)
        # Steps between replays find what they need, and leave it.
        for _ in range(2):
            for trained in (eager, recorded):
                trained[1].step()
            eager[1].step()
            graph.replay()
        assert_same("in turn", recorded, eager)

    @each_optimizer
    def test_a_graph_outlives_the_plan_it_was_recorded_with(self, name: str) -> None:
        eager, recorded = (self.made(name, capturable=True) for _ in range(2))
        for trained in (eager, recorded):
            _train(trained, range(3))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            recorded[1].step()
        read = [p.grad for p in recorded[0]]
        for params, tested in (eager, recorded):
            for p in params[1:]:
                p.grad = None
            tested.step()  # planned anew, for one parameter
        # What the first plan had would be among this, if it were given back.
        taken = [
            torch.full((512 << i % 9,), 0xFF, dtype=torch.uint8, device="cuda") for i in range(900)
        ]
        set_gradients(eager[0], 2)
        eager[1].step()
        graph.replay()
        del read, taken
        assert_same("after another plan", recorded, eager)

    @each_optimizer
    def test_a_plan_made_in_a_recording_is_not_checked(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        eager, recorded = (self.made(name, capturable=True) for _ in range(2))
        for trained in (eager, recorded):
            _train(trained, range(2))
            set_gradients(trained[0], 2)
        recorded[1].load_state_dict(recorded[1].state_dict())  # forgets its plan
        # As in a process that has stepped nothing on this device yet.
        monkeypatch.setattr(selfcheck, "_passed", defaultdict(set))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            recorded[1].step()
        assert not any(selfcheck._passed.values())
        eager[1].step()
        graph.replay()
        assert_same("planned in a recording", recorded, eager)

    @each_optimizer
    def test_side_streams_behind_long_kernels(self, name: str) -> None:
        expected = _train(self.made(name))
        params, tested = trained = self.made(name)
        grads: list[list[Tensor]] = []
        for step in range(STEPS):
            set_gradients(params, step)
            grads.append([p.grad for p in params if p.grad is not None])
        for p in params:
            p.grad = torch.full_like(p, float("nan"))  # what must not be read
        streams = [torch.cuda.Stream() for _ in range(2)]
        last = torch.cuda.current_stream()
        for step in range(STEPS):
            stream = streams[step % 2]
            stream.wait_stream(last)
            with torch.cuda.stream(stream):
                torch.cuda._sleep(50_000_000)  # some tens of milliseconds
                for p, grad in zip(params, grads[step], strict=True):
                    assert p.grad is not None
                    p.grad.copy_(grad)
                tested.step()
            last = stream
        torch.cuda.current_stream().wait_stream(last)
        assert_same("side streams", trained, expected)

    @each_optimizer
    def test_a_fresh_thread(self, name: str) -> None:
        expected = _train(self.made(name))
        with ThreadPoolExecutor(1) as pool:
            found = pool.submit(lambda: _train(self.made(name))).result()
        assert_same("thread", found, expected)

    @each_optimizer
    def test_beside_matrix_products(self, name: str) -> None:
        def everything(before: Callable[[], None]) -> Trained:
            trained = self.made(name)
            for step in range(20):
                before()
                _train(trained, range(step, step + 1))
            return trained

        expected = everything(lambda: None)
        side = torch.cuda.Stream()
        matrix = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
        side.wait_stream(torch.cuda.current_stream())

        def multiply() -> None:
            with torch.cuda.stream(side):
                for _ in range(10):
                    torch.mm(matrix, matrix)

        found = everything(multiply)
        torch.cuda.synchronize()
        assert_same("beside", found, expected)

    @each_optimizer
    def test_memory(self, name: str) -> None:
        """All that a step takes beside parameters, gradients and states."""
        params, tested = optimizer(name, "cuda", ((2048, 1024),) * 12 + ((1000,),) * 40)
        set_gradients(params, 0)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        tested.step()
        peak = torch.cuda.memory_stats()["requested_bytes.all.peak"]
        states = sum(x.nbytes for state in tested.state.values() for x in state.values())
        size = sum(p.nbytes for p in params)
        assert peak - before - states <= 0.01 * size

    @each_optimizer
    def test_several_gpus(self, name: str) -> None:
        if torch.cuda.device_count() < 2:
            pytest.skip("needs two GPUs, and there is one")
        expected = [_train(optimizer(name, f"cuda:{i}", SHAPES)) for i in range(2)]
        apart = [optimizer(name, f"cuda:{i}", SHAPES)[0] for i in range(2)]
        together = [p for params in apart for p in params]
        tested = getattr(fastlars, name)(together, lr=0.1, weight_decay=0.1)
        for step in range(STEPS):
            for params in apart:
                set_gradients(params, step)
            tested.step()
        for i, params in enumerate(apart):
            assert_same(f"cuda:{i}", (params, tested), expected[i])
