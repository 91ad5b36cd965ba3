"""Engine: a step that begins during the backward pass, and that optimizer.step() finishes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastlars.backends.upload import is_capturing
from fastlars.in_backward.late_reads import LateReads
from fastlars.in_backward.pieces import EarlyWork, InFlightPiece, with_known_sums
from fastlars.in_backward.rounding import Rounding
from fastlars.in_backward.snapshots import OptionsSnapshot, TensorSnapshot, same_param_lists
from fastlars.in_backward.validation import has_scaler, raise_changed, raise_scaler
from fastlars.optim.base import FusedOptimizer
from fastlars.optim.execute import BoundBatch, StepResults
from fastlars.optim.planner import GroupSlice, slices_of
from fastlars.rules import Rule

# The first steps with a backward pass, in which an engine also runs checks that would be too slow
# for every step.
WATCHED_STEPS = 10


class Engine:
    """Does a part of the steps of one optimizer during the backward passes of one module.

    A subclass learns when gradients are complete: from DDP's buckets (fastlars.distributed), or
    from hooks on parameters (``fastlars.in_backward.arrivals``). It puts what it does early into
    ``in_flight``. What is done with a piece before ``optimizer.step()`` is chosen when the first
    gradients of a step are complete: "step" (it is stepped), "measure" (its sums of squares are
    taken), "clip" (those of its gradients alone are taken, for the global norm), or None:
    everything is left to ``optimizer.step()``.

    A program that may write during backward is checked in every step, also in steps that write
    nothing early, so that a mistake is reported at the first step that makes it. Early sums that
    wrote nothing are ignored by ``step()`` where gradients have changed since.
    """

    # Left to optimizer.step(): what they find is refused with nothing changed.
    untouched_steps = 2
    looks_for_late_reads = True
    # What to do where something must happen between backward and step.
    without_writing = 'mode="norms" and max_grad_norm write nothing before optimizer.step()'

    def __init__(
        self, optimizer: FusedOptimizer, params: list[Tensor], mode: str, debug: bool
    ) -> None:
        self.optimizer = optimizer
        self.release: Callable[[], None] = lambda: None
        self.leaving = False
        self._params = params
        self._mode = mode
        self._debug = debug
        self._rest: dict[int, GroupSlice] = {}  # by group: parameters that were in no piece
        self._members: list[list[Tensor]] = []
        self._rounding = Rounding(optimizer)
        self._left_out: set[Tensor] = set()  # parameters that only optimizer.step() may step
        self._early_sums_unused = False  # the last step could not use its early sums
        self._changes_unseen = False  # by the program, in ways that later steps may not notice
        self._gradients_used = False  # by a step that was then refused
        self._wrote = False  # whether the last forward pass was of a step that may write
        self._watched = 0  # steps with a backward pass so far, up to WATCHED_STEPS
        self.reads: LateReads | None = LateReads(params) if self.looks_for_late_reads else None
        # Not as a decorator: it imports torch._dynamo, as DDP does when one is made.
        self.step = torch.compiler.disable(self.finish)
        self.reset()

    def reset(self) -> None:
        self._begun = False  # the first gradients of a step are complete
        self._ended = False  # a whole backward pass has ended
        self._stale = False  # the early sums are not of the gradients that there are now
        self._writes = False  # this step may write during backward
        self._early_work: EarlyWork | None = None
        self._options: OptionsSnapshot | None = None  # when the step began
        self._snapshots: list[TensorSnapshot] = []  # of what was used of this backward pass
        self.in_flight: list[InFlightPiece] = []
        self._rounding.forget_seeds()
        if self.reads is not None:
            self.reads.forget()

    def before_forward(self) -> None:
        """Check, or prepare, what the module's forward pass needs."""

    def watch(self, outputs: Any) -> None:
        """Look for late reads in the backward pass of these outputs of the module."""
        writes = self.may_write() and self.looks_for_late_reads
        if writes and not self._wrote and self._watched:
            # From here on parameters are stepped early: look again, as at the beginning.
            self._watched = 0
            self.reads = self.reads or LateReads(self._params)
        self._wrote = writes
        if self.reads is not None and writes:
            self.reads.watch(outputs)

    def check_options(self) -> None:
        """Raise where the options of a group do not go with this engine."""

    def loaded(self) -> None:
        """A state_dict was loaded: go on from there, also after a backward pass that failed."""

    def check_whole(self) -> None:
        """Raise where a state_dict would hold states of half a step."""
        if self._writes and self.in_flight:
            raise RuntimeError(
                "a state_dict between backward and optimizer.step() would hold half a step, of "
                "which parameters were stepped during backward: call optimizer.step() first"
            )

    def may_write(self) -> bool:
        """Whether steps of this program write during backward, even if this step does not."""
        return self._mode == "step" and not self._needs_norm()

    def _needs_norm(self) -> str:
        return self.optimizer.stepper.needs_norm(self.optimizer.param_groups)

    def begin(self) -> None:
        """At the first gradients of a step: compare with everything that may have changed since."""
        self._begun, self._gradients_used = True, False
        self._options = OptionsSnapshot(self.optimizer)
        if not same_param_lists(self._members, self._options.members):
            # Slices know parameters by their index in their group.
            self._members = self._options.members
            self.forget_pieces()
            self._rest.clear()
        self._writes = self.may_write()
        self._early_work = None if self._changes_unseen else self.choose_early_work()

    def forget_pieces(self) -> None:
        """Forget what is known of pieces: which parameters they step has changed."""
        raise NotImplementedError

    def choose_early_work(self) -> EarlyWork | None:
        raise NotImplementedError

    def planned_rules(self) -> list[Rule] | None:
        """The rules of the groups as they were planned; None where the whole step is left to
        ``optimizer.step()``, which raises what is wrong before it writes anything."""
        optimizer = self.optimizer
        if self._watched < self.untouched_steps or self._early_sums_unused:
            return None
        try:
            self.check_options()
            return optimizer.planner.current_rules(optimizer.param_groups, optimizer.state)
        except (RuntimeError, TypeError, ValueError):
            return None

    def wait(self) -> None:
        """Wait until the early work of every piece is done; raise what went wrong in it."""
        for in_flight in self.in_flight:
            if in_flight.future is not None:
                in_flight.future.wait()

    def _covered(self) -> list[Tensor]:
        return [p for in_flight in self.in_flight for p in in_flight.params()]

    def _snapshot(self, params: list[Tensor], reduced: list[Tensor] | None) -> None:
        """Note parameters, gradients and states after they were used; see TensorSnapshot."""
        exact = self._debug or self._watched < WATCHED_STEPS
        if params and is_capturing(params[0].device):
            exact = False  # the host would wait
        every = self.optimizer.state
        held = [every.get(p, {}).values() for p in params] if self._early_work and exact else []
        states = [value for values in held for value in values if isinstance(value, Tensor)]
        self._snapshots.append(TensorSnapshot(params, reduced, states, exact))

    def is_under_way(self) -> bool:
        """Whether a step has begun that ``optimizer.step()`` is to finish."""
        return bool(self.in_flight) and self._ended

    def close(self) -> None:
        """Remove the hooks on parameters, and drop the references that would keep the module alive
        until Python collects cycles."""
        if self.reads is not None:
            self.reads.close()
        self.release = lambda: None
        self._params = []
        del self.step

    def _is_cut_off(self) -> bool:
        """Whether a backward pass has begun, and has not reached its end."""
        return bool(self.in_flight) and not self._ended

    def what_changed(self) -> str | None:
        """What was changed after the engine had used it, if anything: "gradient", "weight", ..."""
        optimizer = self.optimizer
        changed = next(filter(None, (each.changed() for each in self._snapshots)), None)
        if changed is None and self._options is not None:
            changed = self._options.changed(optimizer)
        if changed is None and self._early_work and not optimizer.planner.holds(optimizer.state):
            changed = "state"
        return changed

    def finish(self) -> StepResults | None:
        """The rest of the step, which ``optimizer.step()`` asks for. Returns what it
        reports of each batch, or None where the step was skipped."""
        used = self._gradients_used
        # Until the step has ended well: after any error the gradients are used up.
        self._gradients_used = used or (self._writes and bool(self.in_flight))
        try:
            self.check_options()
            self.wait()
            if used and any(p.grad is not None for group in self._members for p in group):
                raise RuntimeError(
                    "gradients were used already, by a step that was then refused: go on with "
                    "zero_grad() and a backward pass, from a checkpoint"
                )
            writes = self._writes if self._begun else self.may_write()
            if writes:
                self.check_step()
            else:
                # Nothing was written yet.
                changed = self.what_changed() is not None or self._is_cut_off()
                if not self._debug and any(each.unseen for each in self._snapshots):
                    self._changes_unseen = True
                self._stale = self._stale or changed or has_scaler(self.optimizer)
                self._early_sums_unused = self._stale
            results = self.step_rest()
            self._gradients_used = False
            if self._ended:
                self.update_watch()
            return results
        finally:
            self.reset()
            if self.leaving:
                self.release()

    def raise_cut_off(self) -> None:
        raise NotImplementedError

    def check_step(self) -> None:
        """Raise where parameters were stepped, or in later steps would be, with values that have
        changed since."""
        if has_scaler(self.optimizer):
            raise_scaler(self.optimizer, self.without_writing)
        if self._is_cut_off():
            self.raise_cut_off()
        changed = self.what_changed()
        if changed is not None:
            raise_changed(changed, self.without_writing)
        late = self.reads.late.intersection(self._covered()) if self.reads is not None else set()
        if late:
            self._leave_out(late)
            shapes = sorted(str(tuple(p.shape)) for p in late)
            raise RuntimeError(
                f"backward has read weights that were stepped already, of shape "
                f"{', '.join(shapes)}: gradients may be wrong. From now on, optimizer.step() steps "
                "these weights: go on from a checkpoint"
            )

    def _leave_out(self, params: set[Tensor]) -> None:
        if not params <= self._left_out:
            self._left_out |= params
            self.forget_pieces()

    def update_watch(self) -> None:
        """After a step with a backward pass: note which parameters later steps must not step early,
        and end the watch after ``WATCHED_STEPS``."""
        self._watched = min(self._watched + 1, WATCHED_STEPS)
        reads = self.reads
        if reads is None:
            return
        self._leave_out(set(reads.late))
        if self._watched == WATCHED_STEPS and not self._debug:
            reads.close()
            self.reads = None

    def step_rest(self) -> StepResults | None:
        optimizer, in_flight = self.optimizer, self.in_flight
        if self._stale or not in_flight:
            return optimizer.step_batches(optimizer.bind_groups)
        if self._early_work == "clip":
            bind = optimizer.bind_groups
            return optimizer.step_batches(lambda: with_known_sums(bind(), in_flight))
        # The rest first: binding it can still raise, while pieces were bound and checked before.
        rest = optimizer.step_batches(lambda: self._rounding.prepare(self._bind_rest()))
        assert rest is not None  # only the global norm skips steps here, and no group needs it
        return [one for each in in_flight for one in each.finish()] + rest

    def _bind_rest(self) -> list[BoundBatch]:
        """The batches of parameters that were in no piece."""
        optimizer = self.optimizer
        covered = set(self._covered())
        params = [p for group in optimizer.param_groups for p in group["params"]]
        grads = {p: p.grad for p in params if p.grad is not None and p not in covered}
        slices = slices_of(optimizer.param_groups, grads)
        for part in slices:
            part.reuse_plan_of(self._rest.get(part.number))
            self._rest[part.number] = part
        return optimizer.planner.bind_slices(slices, optimizer.param_groups, optimizer.state)
