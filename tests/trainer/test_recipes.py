"""Recipes at every batch size of the papers' tables, between and beyond; docs/recipes.md."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.accuracy.grid import SEARCH, Cell, Grid, read
from fastlars.logging import layer_statistics
from fastlars.trainer.config import command_line, recipes
from fastlars.trainer.config.recipes import LARS, MLPERF, MLPERF_DEFAULT, NAMES
from fastlars.trainer.config.settings import Config
from fastlars.trainer.data.order import BatchOrder
from fastlars.trainer.errors import TrainerError
from fastlars.trainer.model.optimizer import build_optimizer, build_schedule
from repository_files import ROOT, python_blocks
from trainer.helpers import Outcome, facts


def settings(name: str, batch: int | None) -> dict[str, Any]:
    return recipes.look_up(name, "a/folder", batch).settings


def source(name: str, batch: int) -> str:
    return recipes.look_up(name, "a/folder", batch).source


@pytest.mark.parametrize(
    ("batch", "lr", "warmup", "epochs", "momentum", "decay", "span"),
    [
        (1632, 7.4, 2, 37, 0.9, 5e-5, 204),
        (2048, 8.5, 5, 41, 0.9, 2e-4, 64),
        (3264, 10.5, 2, 37, 0.9, 5e-5, 204),
        (4096, 10, 5, 42, 0.9, 2e-4, 64),
        (8192, 17, 5, 44, 0.9, 2e-4, 64),
        (13056, 12.8, 9, 48, 0.9, 2.5e-5, 204),
        (16384, 25, 5, 90, 0.9, 2e-4, 0),
        (32768, 21.2, 16, 58, 0.94, 2.5e-5, 128),
        (49152, 19.405, 24, 71, 0.951807, 1e-4, 256),
        (58880, 23.246, 29, 82, 0.951807, 1e-4, 230),
        (65536, 24.699, 31, 89, 0.951807, 1e-4, 128),
        (67840, 24.699, 31, 91, 0.951807, 1e-4, 424),
    ],
)
def test_mlperf_at_every_row(
    batch: int, lr: float, warmup: float, epochs: int, momentum: float, decay: float, span: int
) -> None:
    found = settings("mlperf", batch)
    assert found["batch_size"] == batch
    assert found["lr"] == lr
    assert (found["warmup_epochs"], found["epochs"]) == (warmup, epochs)
    assert (found["momentum"], found["weight_decay"]) == (momentum, decay)
    assert found["bn_batch"] == span
    assert (found["power"], found["end_lr"], found["label_smoothing"]) == (2, 1e-4, 0.1)
    assert (found["no_decay"], found["no_ratio"]) == ("norms+biases", "norms+biases")
    assert found["trust_coefficient"] == 0.001
    assert f"{batch:,}" in source("mlperf", batch)
    assert "scaled" not in source("mlperf", batch)


def test_mlperf_leaves_time_to_converge() -> None:
    """The longest of the runs given beside a row; at 16,384 there are none."""
    longest = {1632: 37, 2048: 39, 3264: 37, 4096: 42, 8192: 44, 13056: 46, 32768: 57, 49152: 69,
               58880: 81, 65536: 86, 67840: 87}  # fmt: skip
    found = {row.batch: row.epochs for row in MLPERF}
    assert list(found) == list(longest)
    assert all(found[batch] >= epochs for batch, epochs in longest.items())


def test_mlperf_between_two_rows() -> None:
    """A quarter of the way from 8,192 to 13,056, hence 9,408; the rest is the row's below."""
    found = settings("mlperf", 9408)
    assert found["lr"] == pytest.approx(17 - 4.2 / 4)
    assert found["warmup_epochs"] == pytest.approx(6)
    assert found["epochs"] == 45
    assert (found["momentum"], found["weight_decay"], found["bn_batch"]) == (0.9, 2e-4, 64)
    expected = "8,192; lr, warm-up and epochs interpolated towards the point at 13,056"
    assert expected in source("mlperf", 9408)


def test_mlperf_does_not_interpolate_from_a_default() -> None:
    """16,384 has no convergence point: its neighbours lie between 13,056 and 32,768."""
    assert settings("mlperf", 16385)["lr"] == pytest.approx(12.8 + 8.4 * 3329 / 19712)
    assert "at 13,056" in source("mlperf", 16385)


def test_mlperf_beyond_its_table() -> None:
    small, large = settings("mlperf", 408), settings("mlperf", 131072)
    assert (small["lr"], small["warmup_epochs"], small["epochs"]) == (7.4 / 4, 2, 37)
    assert "at 1,632, its rate scaled linearly down to 408" in source("mlperf", 408)
    assert (large["lr"], large["momentum"], large["epochs"]) == (24.699, 0.951807, 91)
    assert "at 67,840, the last row of the table" in source("mlperf", 131072)


@pytest.mark.parametrize(
    ("batch", "lr", "text"),
    [
        (8192, 12.8, "table 4 of You et al. 2017 at 8,192"),
        (16384, 25.0, "table 4 of You et al. 2017 at 16,384"),
        (32768, 29.0, "table 4 of You et al. 2017 at 32,768"),
        (4096, 6.4, "at 8,192, its rate scaled linearly down to 4,096"),
        (128, 0.2, "at 8,192, its rate scaled linearly down to 128"),
        (65536, 29.0, "at 32,768, the last row of the table"),
        # half way in the logarithm: the geometric mean of both
        (
            11585,
            (12.8 * 25.0) ** 0.5,
            "as a power of the batch, interpolated towards the point at 16,384",
        ),
        (
            23170,
            (25.0 * 29.0) ** 0.5,
            "as a power of the batch, interpolated towards the point at 32,768",
        ),
    ],
)
def test_lars(batch: int, lr: float, text: str) -> None:
    found = settings("lars", batch)
    assert found["lr"] == pytest.approx(lr, rel=1e-4)
    assert text in source("lars", batch)
    assert (found["warmup_epochs"], found["epochs"], found["power"]) == (5, 90, 2)
    assert (found["weight_decay"], found["trust_coefficient"]) == (1e-4, 1e-3)
    assert (found["no_decay"], found["no_ratio"], found["label_smoothing"]) == ("none", "none", 0)


@pytest.mark.parametrize(
    ("batch", "lr", "warmup"),
    [
        (512, 0.005, 0.3125),
        (1024, 0.00707, 0.625),
        (2048, 0.01, 1.25),
        (4096, 0.01414, 2.5),
        (8192, 0.02, 5),
        (16384, 0.02828, 10),
        (32768, 0.04, 20),
    ],
)
def test_lamb_at_every_batch_of_table_5(batch: int, lr: float, warmup: float) -> None:
    found = settings("lamb", batch)
    assert found["lr"] == pytest.approx(lr, rel=5e-4)  # printed with four digits
    assert (found["warmup_epochs"], found["epochs"], found["power"]) == (warmup, 90, 1)
    assert (found["weight_decay"], found["max_grad_norm"]) == (1.5, 1)
    assert (found["bias_correction"], found["label_smoothing"]) == (False, 0.1)
    assert (found["no_decay"], found["no_ratio"]) == ("norms", "norms")
    assert "continued" not in source("lamb", batch)


def test_lamb_beyond_its_table_says_so() -> None:
    assert "continued beyond its 512 to 32,768" in source("lamb", 256)
    assert settings("lamb", 131072)["lr"] == pytest.approx(0.08)


@pytest.mark.parametrize("name", ["goyal", "akiba"])
@pytest.mark.parametrize(("batch", "lr"), [(256, 0.1), (8192, 3.2), (32768, 12.8), (64, 0.025)])
def test_linear_scaling(name: str, batch: int, lr: float) -> None:
    found = settings(name, batch)
    assert found["lr"] == pytest.approx(lr)
    assert found["warmup_from"] == (min(0.1, lr) if name == "goyal" else 0)
    assert (found["bn_batch"], found["classifier_std"]) == (32, 0.01)
    assert (found["weight_decay"], found["no_decay"]) == (1e-4, "norms")
    assert "lr 0.1 x batch/256" in source(name, batch)


def test_goyal_and_akiba_are_told_apart() -> None:
    goyal, akiba = settings("goyal", None), settings("akiba", None)
    assert (goyal["schedule"], goyal["warmup_epochs"], goyal["bn_statistics"]) == (
        "step", 5, "running"
    )  # fmt: skip
    assert (akiba["schedule"], akiba["warmup_epochs"], akiba["bn_statistics"]) == (
        "slow-start", 0, "last"
    )  # fmt: skip
    assert (akiba["rmsprop_center"], akiba["rmsprop_period"], akiba["lr_rmsprop"]) == (10, 5, 3e-4)
    assert (akiba["overlap"], akiba["compression"]) == (True, "fp16")
    assert (goyal["overlap"], goyal["compression"]) == (False, "none")


@pytest.mark.parametrize("data", ["digits", "a/folder"])
@pytest.mark.parametrize("name", recipes.NAMES)
def test_every_batch_gives_a_valid_run(name: str, data: str) -> None:
    for batch in (2, 100, 256, 3000, 8192, 20000, 100_000):
        made = command_line.new_config({"recipe": name, "data": data, "batch_size": batch})
        assert made.batch_size == batch
        assert "\n" not in recipes.look_up(name, data, batch).source


@pytest.mark.parametrize("name", ["goyal", "lars", "lamb"])
def test_small_images_have_rates_next_to_the_best_of_the_grid(name: str) -> None:
    """The grid's rates are factors of 2 apart, and no optimizer's best ones are a power law."""
    grid = Grid(ROOT / "benchmarks" / "accuracy" / "grid.ini")
    rows = read(ROOT / "benchmarks" / "results" / "large_batch.csv", grid)
    for batch in grid.batches:
        optimizer = "sgd" if name == "goyal" else name
        best = grid.best_rate(rows, optimizer, batch)
        assert best is not None
        found = recipes.look_up(name, "a/folder", batch, small_images=True)
        assert best / 2.01 < found.settings["lr"] < best * 2.01
        command = command_line.parse(grid.command(Cell(SEARCH, optimizer, batch, best, 0)).split())
        searched = {"no_decay", "no_ratio", "weight_decay"} if name != "goyal" else {"weight_decay"}
        searched |= {"trust_coefficient", "bias_correction", "max_grad_norm", "label_smoothing"}
        for setting in searched & command.given.keys():
            assert found.settings[setting] == command.given[setting], setting


@pytest.mark.usefixtures("tiny", "no_picture")
def test_a_run_on_small_images_has_their_rates_unless_a_flag_sets_one(
    images: Path, train: Callable[..., Outcome]
) -> None:
    flags = ("--data", images, "--batch-size", 8, "--workers", 0)
    changed = "; with rates for images of up to 64 pixels (docs/recipes.md)"
    said = facts(train(*flags, "--dry-run").out)
    assert said["recipe"].endswith(changed)
    assert "then lr 0.125, " in said["rate"]  # sqrt(8 / 512)
    assert "changed" not in said
    said = facts(train(*flags, "--dry-run", "--lr", 0.25).out)
    assert said["changed"] == "--lr 0.25 (recipe: 0.125)"
    said = facts(train(*flags, "--dry-run", "--image-size", 65).out)
    assert "then lr 0.0125, " in said["rate"]  # 12.8 x 8 / 8,192
    assert "64 pixels" not in said["recipe"]
    for recipe in ("akiba", "lars"):
        said = facts(train(*flags, "--dry-run", "--recipe", recipe).out)
        assert ("64 pixels" in said["recipe"]) == (recipe == "lars")


@pytest.mark.usefixtures("tiny", "no_picture")
def test_a_sweep_and_a_resumed_run_on_small_images(
    images: Path, tmp_path: Path, train: Callable[..., Outcome]
) -> None:
    flags = ("--data", images, "--batch-size", 8, "--workers", 0)
    said = facts(train(*flags, "--find-lr", "--dry-run").out)
    assert said["sweep"].startswith("lr 0.000125 to 12.5, ")
    run = ("--output", tmp_path / "run")
    assert train(*flags, *run, "--max-steps", 1).status == 0
    outcome = train("--resume", *run, "--max-steps", 2)
    assert outcome.status == 0, outcome.err
    assert "then lr 0.125, " in facts(outcome.out)["rate"]
    assert "changed" not in facts(outcome.out)


class Net(nn.Module):
    """A layer of each kind that groups tell apart."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(2)
        self.fc = nn.Linear(2, 3)


def configured(name: str, **given: object) -> Config:
    return command_line.new_config({"recipe": name, "data": "a/folder", **given})


NORMS, BIASES, NOBODY = {"norm.weight", "norm.bias"}, {"fc.bias"}, set()
NEVER = {"conv.weight", "fc.weight", *NORMS, *BIASES}


@pytest.mark.parametrize(
    ("name", "kind", "undecayed", "unadapted"),
    [
        ("lars", "LARS", NOBODY, NOBODY),
        ("lamb", "LAMB", NORMS, NORMS),
        ("mlperf", "LARS", NORMS | BIASES, NORMS | BIASES),
        ("goyal", "LARS", NORMS, NEVER),
        ("akiba", "RMSpropWarmup", NORMS, NEVER),
    ],
)
def test_who_is_decayed_and_adapted(
    name: str, kind: str, undecayed: set[str], unadapted: set[str]
) -> None:
    net = Net()
    optimizer = build_optimizer(configured(name, momentum=0.8), net, 10)
    assert type(optimizer).__name__ == kind
    names = {parameter: key for key, parameter in net.named_parameters()}
    groups = [(names[p], group) for group in optimizer.param_groups for p in group["params"]]
    assert {key for key, group in groups if not group["weight_decay"]} == undecayed
    assert {key for key, group in groups if not group.get("adapt", False)} == unadapted
    assert all(group.get("momentum", 0.8) == 0.8 for _, group in groups)

    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert set(layer_statistics(net, optimizer)) == NEVER - unadapted


def test_options_reach_their_optimizer() -> None:
    (group, *_) = build_optimizer(configured("goyal"), Net(), 10).param_groups
    assert group["nesterov"]
    (group, *_) = build_optimizer(configured("goyal", momentum=0.0), Net(), 10).param_groups
    assert not group["nesterov"]
    (group, *_) = build_optimizer(configured("lamb", bias_correction=True), Net(), 10).param_groups
    assert (group["bias_correction"], group["max_grad_norm"]) == (True, 1.0)
    (group, *_) = build_optimizer(configured("lamb", max_grad_norm=0.0), Net(), 10).param_groups
    assert (group["bias_correction"], group["max_grad_norm"]) == (False, None)
    (group, *_) = build_optimizer(configured("mlperf"), Net(), 10).param_groups
    assert (group["eps"], group["buffer"]) == (1e-7, "step")


def test_options_of_the_rmsprop_warm_up() -> None:
    given = {"epochs": 9, "rmsprop_transition": "printed", "lr_rmsprop": 1e-3}
    (group, *_) = build_optimizer(configured("akiba", **given), Net(), 30).param_groups
    assert (group["center_steps"], group["period_steps"]) == (30, 15)
    assert (group["transition"], group["lr_rmsprop"]) == ("printed", 1e-3)


def rates(made: Config, steps_per_epoch: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=made.lr)
    schedule = build_schedule(made, optimizer, steps_per_epoch)
    seen = []
    for _ in range(made.epochs * steps_per_epoch):
        seen.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        schedule.step()
    return seen


def test_slow_start_follows_the_length_of_the_run() -> None:
    """40, 70 and 85 of 90 epochs are 160, 280 and 340 steps of 18 epochs of 20."""
    seen = rates(configured("akiba", epochs=18, lr=2.0), 20)
    cuts = [step for step in range(1, 360) if seen[step] != seen[step - 1]]
    assert cuts == [160, 280, 340]
    assert sorted(set(seen), reverse=True) == pytest.approx([1.0, 0.15, 0.02, 0.002])


def test_goyal_steps_follow_the_length_of_the_run() -> None:
    """30, 60 and 80 of 90 epochs; the warm-up is of 5 epochs, from the unscaled rate."""
    seen = rates(configured("goyal", batch_size=2560, epochs=45), 4)
    assert seen[0] == pytest.approx(0.1)
    assert seen[19] == pytest.approx(0.1 + 0.9 * 19 / 20)
    assert seen[20] == seen[59] == 1.0
    assert (seen[60], seen[120], seen[160]) == pytest.approx((0.1, 0.01, 0.001))


def test_slow_start_has_no_warm_up() -> None:
    with pytest.raises(TrainerError, match="slow-start has no warm-up: add --warmup-epochs 0"):
        rates(configured("goyal", schedule="slow-start"), 4)


# docs/recipes.md: its commands can be run, its tables are those of the code.

TEXT = (ROOT / "docs" / "recipes.md").read_text()
COMMANDS = [line for line in TEXT.splitlines() if " -m fastlars.trainer " in line]
IMAGENET = 1_281_167


def gpus(line: str) -> int:
    """Of a command, which torchrun starts or nobody."""
    found = (re.search(rf"--{name}=(\d+)", line) for name in ("nnodes", "nproc-per-node"))
    return math.prod(int(match[1]) for match in found if match)


@pytest.mark.parametrize("line", [line for line in COMMANDS if "/data/imagenet" in line])
def test_commands_fit_their_gpus(line: str) -> None:
    processes = gpus(line)
    command = command_line.parse(shlex.split(line.split(" -m fastlars.trainer ")[1]))
    made = command_line.new_config(command.given, processes)
    steps = BatchOrder(IMAGENET, made.batch_size, made.micro_batch, 0, processes, made.seed)
    assert steps.micro_batch <= 256
    if made.bn_batch:
        assert steps.micro_batch % made.bn_batch == 0


def test_every_recipe_has_a_command_for_1_8_and_256_gpus() -> None:
    found = sorted(
        (re.findall(r"--recipe (\w+)", line)[0], gpus(line))
        for line in COMMANDS
        if "/data/imagenet" in line
    )
    assert found == sorted((name, count) for name in NAMES for count in (1, 8, 256))


def test_the_table_of_mlperf_is_the_codes() -> None:
    rows = sorted([*MLPERF, MLPERF_DEFAULT], key=lambda row: row.batch)
    lines = [
        f"| {row.batch:,} | {row.lr:g} | {row.warmup_epochs:g} | {row.epochs} | {row.momentum:g} "
        f"| {row.weight_decay:g} | {row.bn_batch} | {row.source.split()[-1]} |"
        for row in rows
    ]
    assert "\n".join(lines) in TEXT


def test_the_table_of_lars_is_the_codes() -> None:
    rates = " | ".join(str(row.lr) for row in LARS)
    batches = " | ".join(f"{row.batch:,}" for row in LARS)
    assert f"| batch | {batches} |\n|---|---|---|---|\n| lr | {rates} |" in TEXT


def test_scripts_run() -> None:
    """LANS's at the rates of its table, TVLARS's with a rate that falls from step to step."""
    blocks = python_blocks(TEXT[: TEXT.index("## Trust ratios where you look")])
    assert len(blocks) == 2
    namespace: dict[str, Any] = {}
    for block in blocks:
        exec(block, namespace)
        optimizer, schedule = namespace["optimizer"], namespace["schedule"]
        peaks = [group["initial_lr"] for group in optimizer.param_groups]
        factor, steps = schedule.lr_lambdas[0], 3870
        if "LANS" in block:
            shares = [factor(i) for i in range(steps + 1)]
            assert sum(share == 1.0 for share in shares) == 967 + 1
            assert shares[: round(0.05 * steps) + 1][-1] == 1.0 == shares[round(0.3 * steps)]
            assert shares[steps] == 0.0
            assert peaks == [0.005, 0.005]
            assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]
            assert all(group["adapt"] for group in optimizer.param_groups)
        else:
            shares = [factor(i) for i in (0, 970, 9700)]
            assert shares == pytest.approx([0.725 + 0.01, 0.51, 0.01], abs=1e-3)
        for p in namespace["model"].parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        schedule.step()
