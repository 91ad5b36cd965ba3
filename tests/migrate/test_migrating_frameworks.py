"""docs/migrating.md: optimizers by name in other frameworks, and what scripts read off them."""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_optimizer
import timm.optim
import torch
import yaml
from timm.optim._optim_factory import default_registry
from torch import nn

import fastlars
from fastlars import conventions
from migrate import stand_ins
from migrate.page import PAGE, STEPS, assert_close, prepared, train
from optimizers import one_thread as one_thread


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stand_ins.install(monkeypatch)
    monkeypatch.setattr(default_registry, "_optimizers", dict(default_registry._optimizers))


def ran(title: str, *labels: str) -> dict[str, Any]:
    namespace = prepared()
    for label in labels:
        exec(PAGE[title].block(label), namespace)
    return namespace


# timm's registry.


def test_timms_lookahead_wraps_the_registered_class() -> None:
    results = []
    for label, name in (("Before", "lookahead_lars"), ("After", "lookahead_fastlars")):
        namespace = ran("timm's registry", label)
        namespace["optimizer"] = timm.optim.create_optimizer_v2(
            namespace["model"], opt=name, lr=1.0, weight_decay=1e-4, momentum=0.9
        )
        assert isinstance(namespace["optimizer"], timm.optim.Lookahead)
        results.append(train(namespace, range(2 * 6 + 1)))  # Lookahead acts at every sixth step
    assert isinstance(namespace["optimizer"]._base_optimizer, fastlars.LARS)
    assert_close(*results)


def test_timm_cuts_names_at_their_underscores() -> None:
    model = ran("timm's registry", "After")["model"]
    cut = timm.optim.create_optimizer_v2(model, opt="fastlars_lars", lr=1.0)
    assert type(cut) is timm.optim.Lars
    default_registry.register(timm.optim.OptimInfo("lars", fastlars.LARS, has_momentum=True))
    for name in ("lars", "fastlars_lars"):
        replaced = timm.optim.create_optimizer_v2(model, opt=name, lr=1.0)
        assert type(replaced) is fastlars.LARS


def test_timm_registers_lamb_too() -> None:
    (line,) = re.findall(r"`(OptimInfo\(\"fastlamb\".*?\))`", PAGE["timm's registry"].text)
    namespace = ran("timm's registry", "After")
    default_registry.register(eval(line, namespace))
    results = []
    for name in ("lamb", "fastlamb"):
        each = prepared()
        each["optimizer"] = timm.optim.create_optimizer_v2(
            each["model"], opt=name, lr=0.01, weight_decay=0.1, betas=(0.8, 0.9)
        )
        results.append(train(each, range(STEPS)))
    assert_close(*results)


# torchtitan.


def test_torchtitans_container_steps_lamb() -> None:
    compile(PAGE["torchtitan"].block("Before"), "torchtitan", "exec")
    theirs, ours = prepared(), ran("torchtitan", "After")
    decayed = [p for name, p in theirs["model"].named_parameters() if not name.endswith("bias")]
    rest = [p for name, p in theirs["model"].named_parameters() if name.endswith("bias")]
    groups = [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]
    theirs["optimizer"] = stand_ins.FusedLamb(groups, lr=2e-3, max_grad_norm=1e9)
    assert_close(train(ours, range(STEPS)), train(theirs, range(STEPS)))


def test_torchtitan_steps_lars_whose_groups_have_their_rates() -> None:
    ours = ran("torchtitan", "After")
    group = ours["ParamGroupConfig"](
        pattern=".*",
        optimizer_name="LARS",
        optimizer_kwargs={"lr": 0.5, **conventions.vicreg_lars},
    )
    ours["optimizer"] = (
        ours["Optimizers"].Config(param_groups=[group]).build(model_parts=[ours["model"]])
    )
    theirs = prepared()
    theirs["optimizer"] = fastlars.LARS(
        theirs["model"].parameters(), lr=0.5, **conventions.vicreg_lars
    )
    for a, b in zip(train(ours, range(STEPS)), train(theirs, range(STEPS)), strict=True):
        assert torch.equal(a, b)


def test_torchtitans_checkpoint_goes_on() -> None:
    first = ran("torchtitan", "After")
    train(first, range(STEPS))
    saved = copy.deepcopy(first["optimizer"].state_dict())
    second = ran("torchtitan", "After")
    second["model"].load_state_dict(first["model"].state_dict())
    second["optimizer"].load_state_dict(saved)
    steps = range(STEPS, 2 * STEPS)
    for a, b in zip(train(first, steps), train(second, steps), strict=True):
        assert torch.equal(a, b)


# torchtune.


def instantiate(config: dict[str, Any], params: Any) -> torch.optim.Optimizer:
    """What torchtune makes of the part `optimizer` of its configurations."""
    module, name = config["_component_"].rsplit(".", 1)
    options = {key: value for key, value in config.items() if key != "_component_"}
    made: torch.optim.Optimizer = getattr(importlib.import_module(module), name)(params, **options)
    return made


def configured(label: str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(PAGE["torchtune"].block(label, "yaml"))["optimizer"]
    return config


def test_torchtune_makes_lamb_of_its_configuration() -> None:
    theirs, ours = prepared(), prepared()
    instantiate(configured("Before"), theirs["model"].parameters())
    ours["optimizer"] = instantiate(configured("After"), ours["model"].parameters())
    theirs["optimizer"] = fastlars.LAMB(
        theirs["model"].parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.01
    )
    for a, b in zip(train(ours, range(STEPS)), train(theirs, range(STEPS)), strict=True):
        assert torch.equal(a, b)


def test_torchtune_steps_within_the_backward_pass() -> None:
    """Its optimizer_in_bwd: an optimizer for each parameter, called by the parameter's hook."""
    whole, split = prepared()["model"], prepared()["model"]
    one = instantiate(configured("After"), whole.parameters())
    each = {p: instantiate(configured("After"), [p]) for p in split.parameters()}

    def step(p: torch.Tensor) -> None:
        each[p].step()  # type: ignore[index]
        each[p].zero_grad()  # type: ignore[index]

    for p in split.parameters():
        p.register_post_accumulate_grad_hook(step)
    for seed in range(STEPS):
        x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        for model in (whole, split):
            model(x).square().mean().backward()
        one.step()
        one.zero_grad()
    for a, b in zip(whole.parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-6)
        states = each[b].state_dict()
        assert states["state"][0]["step"] == STEPS
        each[b].load_state_dict(states)


# What scripts read.


def test_nvidias_scheduler_sees_every_step() -> None:
    rates = []
    for label in ("Before", "After"):
        namespace = ran("NVIDIA BERT", label)
        found = []
        for step in range(STEPS):
            train(namespace, range(step, step + 1))
            found.append([float(group["lr"]) for group in namespace["optimizer"].param_groups])
        rates.append(found)
    assert rates[0] == rates[1]
    assert rates[0][0][0] == pytest.approx(6e-3 * 1 / 50 / 0.2)
    assert rates[0][2][0] == pytest.approx(6e-3 * 3 / 50 / 0.2)


def test_nvidias_log_takes_the_count() -> None:
    namespace = ran("NVIDIA BERT", "After")
    train(namespace, range(STEPS))
    kept = torch.zeros(1, dtype=torch.int32)
    kept.copy_(namespace["optimizer"].param_groups[0]["step"], non_blocking=True)
    assert kept.tolist() == [STEPS]


def test_swav_logs_and_writes_rates() -> None:
    namespace = ran("SwAV", "After")
    optimizer = namespace["optimizer"]
    for group in optimizer.param_groups:
        group["lr"] = np.linspace(0.0, 0.6, 4)[2]
    assert optimizer.optim.param_groups[0]["lr"] == pytest.approx(0.4)
    train(namespace, range(1))


def readable() -> Iterator[dict[str, Any]]:
    """What the third column of the table is about: LARS and LAMB after a step."""
    for make in (
        lambda p: fastlars.LARS([p], lr=1.0),
        lambda p: fastlars.LAMB([p], master_weights=True),
    ):
        p = nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))
        optimizer = make(p)
        p.grad = torch.ones_like(p)
        optimizer.step()
        found = {"optimizer": optimizer, "group": optimizer.param_groups[0], "p": p}
        yield found | {
            "state": optimizer.state[p],
            "LAMB": fastlars.LAMB,
            "parameter_groups": fastlars.parameter_groups,
        }


def spans(cell: str) -> list[str]:
    return re.findall(r"`([^`]*)`", cell)


def has(namespace: dict[str, Any], expression: str) -> bool:
    try:
        eval(expression, namespace)
    except (AttributeError, KeyError):
        return False
    return True


READ = PAGE["What scripts read"].rows(columns=3)


@pytest.mark.parametrize("row", READ, ids=lambda row: row[0])
def test_what_scripts_read_is_there(row: list[str]) -> None:
    namespaces = list(readable())
    for expression in spans(row[2]):
        assert any(has(each, expression) for each in namespaces), expression


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (timm.optim.Lars, "timm Lars"),
        (timm.optim.Lamb, "timm Lamb"),
        (pytorch_optimizer.Lamb, "pytorch_optimizer Lamb"),
    ],
)
def test_what_scripts_read_is_there_in_the_libraries(make: Any, name: str) -> None:
    p = nn.Parameter(torch.ones(2, 2))
    optimizer = make([p], lr=0.1)
    p.grad = torch.ones_like(p)
    optimizer.step()
    found = {"optimizer": optimizer, "group": optimizer.param_groups[0], "p": p}
    found["state"] = optimizer.state[p]
    rows = [row for row in READ if name in row[1]]
    assert rows
    for row in rows:
        assert any(has(found, expression) for expression in spans(row[0])), row[0]


@pytest.mark.parametrize(
    ("theirs", "ours"), [(torch.optim.SGD, fastlars.LARS), (torch.optim.AdamW, fastlars.LAMB)]
)
def test_other_keys_of_torchs_groups_are_the_same(theirs: Any, ours: Any) -> None:
    (row,) = [row for row in READ if row[1].startswith("torch's SGD")]
    missing = (
        theirs([nn.Parameter(torch.ones(2))], lr=0.1).defaults.keys()
        - ours([nn.Parameter(torch.ones(2))], lr=0.1).param_groups[0].keys()
    )
    assert missing
    assert {f'group["{name}"]' for name in missing} <= set(spans(row[0]))
