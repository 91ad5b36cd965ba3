"""Frameworks that ask an optimizer more than to step: Lightning's clip, Accelerate's skips."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastlars
from optimizers import one_thread as one_thread

# With a weight decay, because LARS without one does not depend on the size of gradients.
KINDS: dict[str, Any] = {
    "LARS": {"lr": 0.5, "weight_decay": 1.0, "trust_coefficient": 0.1},
    "LAMB": {"lr": 0.1},
}
each_kind = pytest.mark.parametrize("name", KINDS)


@pytest.fixture(autouse=True)
def quiet() -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def _data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = 10.0 * torch.randn(16, 8, generator=generator)
    return TensorDataset(x, torch.randint(4, (16,), generator=generator))


def _net() -> nn.Module:
    torch.manual_seed(2)
    return nn.Linear(8, 4)


@each_kind
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_lightning_clips_under_mixed_precision(name: str, precision: str) -> None:
    """As max_grad_norm does, which is ours; Lightning adds 1e-6 to the norm."""
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self, **options: Any) -> None:
            super().__init__()
            self.net, self.options = _net(), options

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return getattr(fastlars, name)(self.parameters(), **KINDS[name], **self.options)

    def trained(clip: float | None, **options: Any) -> nn.Module:
        module = Module(**options)
        lightning.Trainer(
            accelerator="cpu", precision=precision, gradient_clip_val=clip, max_epochs=2,
            logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(module, DataLoader(_data(), 8))  # fmt: skip
        return module.net

    theirs, ours, none = trained(0.5), trained(None, max_grad_norm=0.5), trained(None)
    for p, q, r in zip(*(net.parameters() for net in (theirs, ours, none)), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(p, r, rtol=1e-3)


@each_kind
def test_lightning_shows_and_sets_skipping(name: str) -> None:
    """Through self.optimizers(), which wraps the optimizer; also in an evaluation."""
    import lightning

    seen = []

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = _net()

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def on_train_batch_end(self, *_: Any) -> None:
            wrapper: Any = self.optimizers()
            with torch.inference_mode():
                skipped = int(wrapper.skipped_steps)
            seen.append((wrapper.skip_if, skipped, float(wrapper.grad_norm) > 0.0))
            wrapper.skip_if = 1e6

        def configure_optimizers(self) -> Any:
            return getattr(fastlars, name)(self.parameters(), skip_if=1e-9, **KINDS[name])

    lightning.Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    ).fit(Module(), DataLoader(_data(), 8))  # fmt: skip
    assert seen == [(1e-9, 1, True), *[(1e6, 1, True)] * 3]


@each_kind
def test_accelerate_sees_a_skipped_step(name: str) -> None:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    Accelerator(cpu=True)
    w = nn.Parameter(torch.ones(4))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = getattr(fastlars, name)([w], **KINDS[name])
    wrapped = AcceleratedOptimizer(optimizer, device_placement=False, scaler=scaler)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    seen = []
    for bad in (True, False):
        wrapped.zero_grad()
        scaler.scale(w.sum()).backward()
        assert w.grad is not None
        if bad:
            w.grad[0] = float("inf")
        wrapped.step()
        seen.append((wrapped.step_was_skipped, torch.equal(w, torch.ones(4))))
    assert seen == [(True, True), (False, False)]
    schedule.step()


@each_kind
def test_accelerate_prepares_and_resumes(name: str, tmp_path: Any) -> None:
    """Its prepare() saves and loads the state of every optimizer; so does its checkpoint."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    net = _net()
    groups = fastlars.parameter_groups(net, weight_decay=0.01)
    optimizer = getattr(fastlars, name)(groups, **KINDS[name])
    net, prepared, data = accelerator.prepare(net, optimizer, DataLoader(_data(), 8))

    def train(epochs: int) -> list[torch.Tensor]:
        for _ in range(epochs):
            for x, y in data:
                prepared.zero_grad()
                accelerator.backward(nn.functional.cross_entropy(net(x), y))
                accelerator.clip_grad_norm_(net.parameters(), 1.0)
                prepared.step()
        return [p.detach().clone() for p in net.parameters()]

    train(1)
    accelerator.save_state(str(tmp_path))
    expected = train(1)
    accelerator.load_state(str(tmp_path))
    for p, q in zip(train(1), expected, strict=True):
        assert torch.equal(p, q)


def test_lookahead_of_timm_resumes() -> None:
    """It keeps its slow weights in optimizer.state."""
    import timm.optim

    def made(w: nn.Parameter) -> Any:
        return timm.optim.Lookahead(fastlars.LARS([w], lr=0.5), k=2)

    def train(w: nn.Parameter, optimizer: Any, steps: range) -> None:
        for step in steps:
            w.grad = torch.full((4,), 0.1 * (1 + step))
            optimizer.step()

    w, v = (nn.Parameter(torch.ones(4)) for _ in range(2))
    first, second = made(w), made(v)
    train(w, first, range(3))
    saved = first.state_dict()
    v.data.copy_(w.data)
    second.load_state_dict(saved)
    train(w, first, range(3, 7))
    train(v, second, range(3, 7))
    assert torch.equal(w, v)
