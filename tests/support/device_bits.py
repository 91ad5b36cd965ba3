"""What a back end for GPUs must do with numbers: tests that every one of them inherits."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from backend_cases import (
    ADAPTED,
    BF16,
    DEFAULTS,
    F16,
    F32,
    F64,
    OPTIONS,
    PLAIN,
    USUAL,
    Dtypes,
    Row,
    Run,
    label,
)
from device_cases import (
    CLASSES,
    DEVICES,
    INTERPRETED,
    LAYOUTS,
    SIZES,
    SOME_ROWS,
    SUBNORMAL,
    Twin,
    assert_same_runs,
    optimizer,
    set_gradients,
)
from fastlars.backends.base import OnDevice, StepScalars, with_gradient_sums
from fastlars.rules import GradientNorm
from problems import ORDINARY, Problem
from tolerances import assert_close, assert_same_bits

TYPE_MIXES = (Dtypes(BF16, F16, BF16), Dtypes(F16, BF16, F32), Dtypes(F32, BF16, F32, copy=F16))
NORMALIZING = [row for row in DEFAULTS if row.rule.normalize_grad]
CASES = (
    *((row, PLAIN, ORDINARY) for row in SOME_ROWS),
    *((row, dtypes, ORDINARY) for row in DEFAULTS for dtypes in TYPE_MIXES),
    *((row, PLAIN, problem) for row in USUAL for problem in (LAYOUTS, SIZES)),
    # One over the norm is beyond float32.
    *((replace(row, gradient_scale=-1.0), PLAIN, SUBNORMAL) for row in NORMALIZING[:1]),
)
CORRECTIONS = [*DEFAULTS, *(row for row in OPTIONS if "correction" in row.name)][:8]


class Bits:
    """Bit for bit the compiled CPU back end's results, where both do the same arithmetic."""

    backend: str

    @property
    def device(self) -> str:
        return DEVICES[self.backend]

    def twin(self, row: Row, dtypes: Dtypes, problem: Problem) -> Twin:
        return Twin(self.backend, row, dtypes, problem)

    def equal_norms(
        self, run: Run, row: Row, step: int, seed: int | None = None
    ) -> tuple[StepScalars, StepScalars]:
        """The scalars of a step for the CPU and for the device, with the CPU's sums of squares of
        the gradients, if the rule needs them: chunks of another size add up other sums."""
        now = with_gradient_sums(run.backend, row.rule, run.bind(), row.now(step, seed))
        sums = now.gradient_sums
        return now, now if sums is None else replace(now, gradient_sums=sums.to(self.device))

    @pytest.mark.parametrize(
        ("row", "dtypes", "problem"),
        CASES,
        ids=lambda x: label(x) if isinstance(x, Dtypes) else getattr(x, "name", None),
    )
    def test_apply_equals_cpu_for_equal_sums(
        self, row: Row, dtypes: Dtypes, problem: Problem
    ) -> None:
        self.assert_apply_equals_cpu(row, dtypes, problem)

    def assert_apply_equals_cpu(self, row: Row, dtypes: Dtypes, problem: Problem) -> None:
        run, twin = Run("cpu", row, dtypes, problem), self.twin(row, dtypes, problem)
        for step in range(2):
            run.take_gradients(step)
            twin.take_gradients(step)
            now, there = self.equal_norms(run, row, step)
            expected, found = None, None
            bound, other = run.bind(), twin.bind()
            if row.rule.adapt:
                expected = run.backend.measure(row.rule, bound, now)
                found = twin.backend.measure(row.rule, other, there)
                assert_close("sums", "sum", found.cpu(), expected)
                found.copy_(expected)
            report = run.backend.apply(row.rule, bound, now, expected)
            assert_same_bits(
                "report", twin.backend.apply(row.rule, other, there, found).cpu(), report
            )
            assert_same_runs(f"step {step}", twin, run)

    @pytest.mark.parametrize("row", DEFAULTS, ids=lambda row: row.name)
    def test_stochastic_rounding_draws_the_same_bits_as_cpu(self, row: Row) -> None:
        dtypes = Dtypes(BF16, F32, F32)
        run, twin = Run("cpu", row, dtypes, SIZES), self.twin(row, dtypes, SIZES)
        for step, seed in enumerate((3, 2**61 + 12345)):
            for each in (run, twin):
                each.take_gradients(step)
            now, there = self.equal_norms(run, row, step, seed)
            if step > 0:  # numbers of their own, for tensors that another call might step
                streams = torch.arange(7, 7 + len(run.entries), dtype=torch.int32)
                now = replace(now, streams=streams)
                there = replace(there, streams=streams.to(self.device))
            found = run.backend.measure(row.rule, run.bind(), now) if row.rule.adapt else None
            bound = twin.bind()
            if found is not None:
                twin.backend.measure(row.rule, bound, there)
            run.backend.apply(row.rule, run.bind(), now, found)
            moved = None if found is None else found.to(self.device)
            twin.backend.apply(row.rule, bound, there, moved)
            assert_same_runs(f"step {step}", twin, run)

    @pytest.mark.parametrize("row", ADAPTED, ids=lambda row: row.name)
    def test_sums_are_the_same_from_run_to_run(self, row: Row) -> None:
        found = []
        for _ in range(2):
            twin = self.twin(row, PLAIN, SIZES)
            twin.take_gradients(0)
            norms = twin.backend.measure(GradientNorm(), twin.bind(), row.now(0))
            sums = twin.backend.measure(row.rule, twin.bind(), row.now(0))
            found.append(torch.cat([norms, sums], dim=1))
        assert_same_bits("sums", found[1].cpu(), found[0].cpu())

    @pytest.mark.parametrize("row", NORMALIZING, ids=lambda row: row.name)
    def test_norms_of_gradients_that_are_given_are_those_that_it_takes(self, row: Row) -> None:
        takes, given = (self.twin(row, PLAIN, SIZES) for _ in range(2))
        for step, factor in enumerate((1.0, 1.0, 4.0)):
            for run in (takes, given):
                run.take_gradients(step % 2)
            now, bound = row.now(step), given.bind()
            sums = factor * given.backend.measure(GradientNorm(), bound, now)
            takes.backend.step(row.rule, takes.bind(), now)
            given.backend.step(row.rule, bound, replace(now, gradient_sums=sums))
            if factor == 1.0:
                assert_same_runs(f"step {step}", given, takes)
        moments = (run.tensors.states[0][0] for run in (given, takes))
        assert not torch.equal(*moments), "what is given is not used"

    @pytest.mark.parametrize("row", CORRECTIONS, ids=lambda row: row.name)
    def test_numbers_on_the_device_equal_numbers_by_value(self, row: Row) -> None:
        by_value, on_device = (self.twin(row, PLAIN, ORDINARY) for _ in range(2))
        for step in range(2):
            now = row.now(step)
            values = (now.lr, 1.0 / abs(now.gradient_scale), 0.0)  # scales are powers of 2
            there = OnDevice(*(torch.tensor(x, dtype=F64, device=self.device) for x in values))
            given = StepScalars(9.0, math.copysign(1.0, now.gradient_scale), None, there)
            for run, numbers in ((by_value, now), (on_device, given)):
                run.take_gradients(step)
                run.backend.step(row.rule, run.bind(), numbers)
            assert_same_runs("device", on_device, by_value)
        before = [x.clone() for _, x in on_device.written()]
        assert there.found_inf is not None
        there.found_inf.fill_(1.0)
        given = StepScalars(9.0, 1.0, None, there)
        on_device.backend.step(row.rule, on_device.bind(), given)
        for (name, x), was in zip(on_device.written(), before, strict=True):
            assert_same_bits(f"skipped: {name}", x.cpu(), was.cpu())

    def test_rmsprop_warmup_has_the_bits_of_cpu_across_its_transition(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if INTERPRETED:
            pytest.skip("it takes 300 steps, which test_rmsprop_warmup.py takes in the interpreter")
        options = {"center_steps": 120.0, "period_steps": 90.5}
        trained = []
        for name, device in (("cpu", "cpu"), (self.backend, self.device)):
            monkeypatch.setenv("FASTLARS_BACKEND", name)
            params, tested = optimizer("RMSpropWarmup", device, **options)
            for step in range(300):
                tested.param_groups[0]["lr"] = 0.1 / (1 + step % 7)
                set_gradients(params, step)
                tested.step()
            trained.append((params, tested))
        (expected, other), (params, tested) = trained
        for p, q in zip(params, expected, strict=True):
            assert_same_bits("weight", p.detach().cpu(), q.detach())
            for key, value in other.state[q].items():
                assert_same_bits(key, tested.state[p][key].cpu(), value)

    @pytest.mark.parametrize("name", CLASSES)
    def test_optimizer_reads_scaler_clip_and_rate_on_the_device(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        expected, other = optimizer(name, "cpu", max_grad_norm=0.5)
        rate = torch.tensor(0.1, device=self.device)
        params, tested = optimizer(name, self.device, max_grad_norm=0.5, lr=rate, capturable=True)
        for step, found_inf in enumerate((0.0, 1.0, 0.0)):
            rate.fill_(0.1 * (step + 1))
            other.param_groups[0]["lr"] = 0.1 * (step + 1)
            for tensors, each, device in ((expected, other, "cpu"), (params, tested, self.device)):
                monkeypatch.setenv("FASTLARS_BACKEND", "cpu" if each is other else self.backend)
                set_gradients(tensors, step)
                each.grad_scale = torch.full((1,), 4.0, device=device)  # type: ignore[attr-defined]
                each.found_inf = torch.full((1,), found_inf, device=device)  # type: ignore[attr-defined]
                each.step()
        for p, q in zip(params, expected, strict=True):
            assert_close(name, "weight", p.detach().cpu(), q.detach().double(), 3.0)
            for key, value in other.state[q].items():
                found = tested.state[p][key]
                assert found.device.type == torch.device(self.device).type
                assert_close(key, "state", found.cpu(), value.double(), 3.0)

    def test_capturable_refuses_random_numbers(self) -> None:
        with pytest.raises(ValueError, match="stochastic_rounding does not go with capturable"):
            optimizer("LARS", self.device, capturable=True, stochastic_rounding=True)
