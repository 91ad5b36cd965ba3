"""Settings: recipe, flags over it, ranges; every flag with every kind of wrong value."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import Field, fields
from datetime import timedelta
from typing import Any, cast

import pytest
import torch

from fastlars.trainer.config import command_line, recipes
from fastlars.trainer.config.settings import _MAY_CHANGE_ON_RESUME, Config, flag
from fastlars.trainer.data.digits import Digits
from fastlars.trainer.errors import TrainerError
from fastlars.trainer.model import memory
from fastlars.trainer.model.context import Progress, build
from fastlars.trainer.process.world import World


def configured(*arguments: str) -> Config:
    return command_line.new_config(command_line.parse(arguments).given)


@pytest.mark.parametrize("batch", [None, 512])
@pytest.mark.parametrize("data", ["digits", "some/folder"])
@pytest.mark.parametrize("name", recipes.NAMES)
def test_a_recipe_sets_what_no_flag_does(name: str, data: str, batch: int | None) -> None:
    flags = () if batch is None else ("--batch-size", str(batch))
    settings = configured("--recipe", name, "--data", data, *flags)
    recipe = recipes.look_up(name, data, batch)
    for key, value in recipe.settings.items():
        expected = min(value, settings.lr) if key == "warmup_from" else value
        assert getattr(settings, key) == expected, key


def test_flags_override_the_recipe() -> None:
    settings = configured("--lr", "0.25", "--epochs", "7", "--weight-decay", "0", "--power", "1")
    assert (settings.lr, settings.epochs, settings.weight_decay, settings.power) == (0.25, 7, 0, 1)
    assert settings.momentum == 0.9


def test_goyal_warms_up_from_the_unscaled_rate() -> None:
    large = configured("--recipe", "goyal", "--data", "folder", "--batch-size", "8192")
    assert (large.warmup_from, large.lr) == (0.1, pytest.approx(3.2))
    small = configured("--recipe", "goyal", "--data", "folder", "--batch-size", "64")
    assert small.warmup_from == small.lr == pytest.approx(0.025)


def test_a_short_run_warms_up_for_a_quarter_of_it() -> None:
    assert configured("--epochs", "2").warmup_epochs == 0.5
    assert configured("--epochs", "2", "--warmup-epochs", "1").warmup_epochs == 1.0


def test_a_warm_up_that_is_long_by_its_recipe_shrinks_with_the_run() -> None:
    """31 of 89 epochs at 65,536: a third of a run of any length."""
    large = ("--recipe", "mlperf", "--data", "folder", "--batch-size", "65536", "--epochs")
    assert configured(*large, "89").warmup_epochs == configured(*large, "200").warmup_epochs == 31
    assert configured(*large, "30").warmup_epochs == pytest.approx(31 * 30 / 89)


def test_the_transition_of_akiba_shrinks_with_its_schedule() -> None:
    akiba = ("--recipe", "akiba", "--data", "folder", "--epochs")
    whole, short = configured(*akiba, "90"), configured(*akiba, "30", "--rmsprop-period", "1")
    assert (whole.rmsprop_center, whole.rmsprop_period) == (10, 5)
    assert (short.rmsprop_center, short.rmsprop_period) == (pytest.approx(10 / 3), 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--lr", "0"), "--lr must be above 0, got 0.0"),
        (("--lr", "nan"), "--lr must be above 0, got nan"),
        (("--lr", "fast"), "argument --lr: must be a number, got 'fast'"),
        (("--batch-size", "0"), "--batch-size must be 1 or more, got 0"),
        (("--batch-size", "2.5"), "argument --batch-size: must be a whole number, got '2.5'"),
        (("--epochs", "-1"), "--epochs must be 1 or more, got -1"),
        (("--momentum", "1"), "--momentum must be from 0 to below 1, got 1.0"),
        (("--weight-decay", "inf"), "--weight-decay must be at most 1e+30, got inf"),
        (("--image-size", "7"), "--image-size must be 0, or from 8 to 32,768, got 7"),
        (("--recipe", "adam"), "argument --recipe: invalid choice: 'adam'"),
        (("--frobnicate",), "unrecognized arguments: --frobnicate; see --help"),
        (("--micro", "3"), "unrecognized arguments: --micro 3"),  # no guessing of prefixes
    ],
)
def test_a_bad_flag_is_named(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(TrainerError) as error:
        configured(*arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_bn_batch_must_fit_if_it_is_given() -> None:
    given = {"batch_size": 192, "bn_batch": 64}
    assert (
        command_line.new_config(given).bn_batch
        == command_line.new_config(given, processes=3).bn_batch
        == 64
    )
    assert command_line.new_config(given | {"micro_batch": 128}, processes=2).bn_batch == 64
    for more, images in (({}, 96), ({"micro_batch": 48}, 48), ({"batch_size": 65}, 32)):
        with pytest.raises(TrainerError) as error:
            command_line.new_config(given | more, processes=2)
        assert str(error.value) == (
            f"--bn-batch 64 does not divide the {images} images of a forward pass"
        )
    assert command_line.new_config({"recipe": "goyal", "batch_size": 40}).bn_batch == 32


def test_what_may_change_on_resume_are_settings() -> None:
    assert {field.name for field in fields(Config)} > _MAY_CHANGE_ON_RESUME


def test_compression_needs_overlap() -> None:
    assert configured("--recipe", "akiba").compression == "fp16"
    assert configured("--recipe", "akiba", "--no-overlap").compression == "none"
    assert configured("--overlap", "--compression", "bf16").compression == "bf16"
    with pytest.raises(TrainerError, match="--compression fp16 needs --overlap"):
        configured("--recipe", "akiba", "--no-overlap", "--compression", "fp16")
    with pytest.raises(TrainerError, match="--compression bf16 needs --overlap"):
        configured("--compression", "bf16")


def test_resume_takes_a_path_or_none() -> None:
    command = command_line.parse(["--epochs", "3", "--no-overlap"])
    assert (command.given, command.resume) == ({"epochs": 3, "overlap": False}, None)
    assert command_line.parse(["--resume"]).resume == ""
    assert command_line.parse(["--resume", "runs/a"]).resume == "runs/a"


def help_text(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as end:
        command_line.parse(["--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


def entries(text: str) -> dict[str, str]:
    """The help of each flag, by its first name, in one line."""
    parts = re.split(r"\n  (?=-)", text)[1:]
    blocks = [part.split("\n\n")[0] for part in parts]
    return {re.split(r"[ ,\n]", block)[0]: " ".join(block.split()) for block in blocks}


@pytest.mark.parametrize("columns", [80, 120])
def test_help_lists_every_flag_in_a_group_with_its_default(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = help_text(columns, capsys, monkeypatch)
    assert max(map(len, text.splitlines())) <= columns
    assert "\xa0" not in text
    groups = re.findall(r"^(\w+) \(.*\):$", text, re.MULTILINE)
    assert groups == ["config", "data", "model", "run", "output"]
    found = entries(text)
    actions = {"--resume", "--find-lr", "--dry-run", "-h"}
    assert found.keys() == {flag(setting.name) for setting in fields(Config)} | actions
    with_default = r" \(([^()]*; )?default: [^()]+\)$"
    assert [name for name, line in found.items() if not re.search(with_default, line)] == ["-h"]


def test_help_names_groups_units_ranges_and_defaults(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = help_text(80, capsys, monkeypatch)
    groups = {part.split(" ")[0]: part for part in re.split(r"\n\n(?=\w+ \()", text)}
    for group, names in (
        ("config", ("--recipe ", "--resume ", "--find-lr ", "--dry-run ")),
        ("data", ("--data ", "--image-size ", "--workers ")),
        ("model", ("--model ", "--bn-batch ", "--precision ", "--lr ", "--schedule ")),
        ("run", ("--epochs ", "--batch-size ", "--device ", "--timeout ")),
        ("output", ("--output ", "--log-every ", "--checkpoint-every ")),
    ):
        assert all(f"\n  {name}" in groups[group] for name in names), group
    found = entries(text)
    for name, unit, note in (
        ("--batch-size", "IMAGES", "(1 or more; default: the recipe's)"),
        ("--image-size", "PIXELS", "(0, or from 8 to 32,768; default: 0)"),
        ("--warmup-epochs", "EPOCHS", "(0 or more; default: the recipe's)"),
        ("--max-steps", "STEPS", "(0 or more; default: 0)"),
        ("--timeout", "SECONDS", "(0.001 or more; default: 1800)"),
        ("--output", "FOLDER", "(default: a new one under runs/)"),
        ("--recipe", "{lars,lamb,goyal,akiba,mlperf}", "(default: lars)"),
        ("--tensorboard", ", --no-tensorboard", "(default: off)"),
        ("--overlap", ", --no-overlap", "(default: the recipe's)"),
    ):
        line = found[name]
        assert line.startswith(f"{name} {unit}".replace(" ,", ","))
        assert line.endswith(note)


# Every flag of the settings table with values of the wrong kind, sign and size.

CPU = torch.device("cpu")
LONGEST = 700  # bytes of a message
TEXTS = ("", " ", "abc", "None", "true", "--", "%s", "{}", "\0", "a\nb", "é", "\udcff", "x" * 9000)
NUMBERS = (
    *("0", "-0", "1", "-1", "2", "7", "0.5", "1.0", "-0.5", "0.99999999999999999999"),
    *(
        "1e3",
        "0x10",
        "1_000",
        "\uff11\uff12",
        "+5",
        "1,5",
        "nan",
        "inf",
        "-inf",
        "1e400",
        "9" * 5000,
    ),
    *("1e-400", "5e-324", "1e-308", "1e-30", "1e9", "1e30", "3e38", "1e40", "1e308", "-1e308"),
    *(str(10**9), str(10**9 + 1), str(2**31), str(2**63 - 1), str(2**63), str(-(2**63)), "1" * 31),
)


class _Folder(Digits):
    """The digits in place of a folder's images: recipes are looked up in their tables."""

    name = "folder"


@pytest.fixture(autouse=True)
def unlimited(monkeypatch: pytest.MonkeyPatch) -> None:
    """The estimate of memory, which would take most of the time here, has tests of its own."""
    monkeypatch.setattr(memory, "check", lambda _context: None)


@pytest.fixture(scope="module")
def images() -> dict[str, Digits]:
    return {"digits": Digits(0, CPU), "folder": _Folder(0, CPU)}


def attempt(arguments: Sequence[str], images: dict[str, Digits], data: str) -> bool:
    """Go all the way to the first step of an optimizer; False for a line that says what is wrong.

    Everything but a TrainerError of one fair line is an error of the trainer.
    """
    try:
        command = command_line.parse(arguments)
        timedelta(seconds=command.given.get("timeout", 1.0))
        settings = command_line.new_config({"data": data} | command.given)
        context = build(settings, images[data], Progress(), World(0, 1, CPU))
    except TrainerError as error:
        text = str(error)
        assert text
        assert text.isprintable(), text
        assert len(text.encode()) < LONGEST, text
        return False
    total = settings.epochs * context.order.steps_per_epoch
    for factor in context.schedule.lr_lambdas:
        for step in (0, 1, total // 2, total - 1, total):
            assert 0 <= factor(step) <= 1 + 1e-9
    for parameter in context.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    context.optimizer.step()
    return True


def values(setting: Field[Any]) -> list[str]:
    choices = setting.metadata["choices"] or ()
    numbers = () if isinstance(setting.default, str) else NUMBERS
    return [*choices, *(choice.upper() for choice in choices), *TEXTS, *numbers]


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("setting", fields(Config), ids=lambda setting: setting.name)
def test_a_value_is_taken_or_refused_in_a_line(
    images: dict[str, Digits], setting: Field[Any]
) -> None:
    taken = 0
    given = flag(setting.name)
    for value in values(setting):
        data = "folder" if len(value) % 2 else "digits"
        taken += attempt((f"{given}={value}", "--model=resnet18"), images, data)
        if value[:1] in ("", "-"):  # another flag, perhaps, to argparse
            taken += attempt((given, value), images, data)
    taken += attempt((given,), images, "digits")
    assert taken, f"no value of {given} was taken"


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("data", ["digits", "folder"])
@pytest.mark.parametrize("recipe", recipes.NAMES)
def test_a_number_at_either_end_of_its_range_goes_with_every_recipe(
    images: dict[str, Digits], recipe: str, data: str
) -> None:
    """Or is refused in a line: of the numbers that the table admits, the smallest and largest."""
    taken = 0
    for setting in fields(Config):
        if isinstance(setting.default, bool) or not isinstance(setting.default, (int, float)):
            continue
        kind = cast("type[float]", type(setting.default))
        admitted = [kind(n) for n in NUMBERS if n.isascii() and _is(kind, n)]
        admitted = [n for n in admitted if not setting.metadata["violated"](n)]
        for number in (min(admitted), max(admitted)):
            arguments = (f"--recipe={recipe}", f"{flag(setting.name)}={number}", "--batch-size=64")
            taken += attempt(arguments, images, data)
    assert taken > 20


def _is(kind: type[float], text: str) -> bool:
    try:
        kind(text)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--output", ""), "--output is empty: name a directory, or leave it out"),
        (("--data=",), "--data is empty: name a directory, or leave it out"),
        (("--output", "a\0b"), "an argument has a NUL character in it"),
        (("--workers", "1000000"), "--workers must be at most 1,024, got 1000000"),
        (("--workers", "-1"), "--workers must be from 0 to 1,024, got -1"),
        (("--lr", "1e-40"), "--lr must be at least 1e-30, got 1e-40"),
        (("--warmup-epochs", "1e308"), "--warmup-epochs must be at most 1e+06, got 1e+308"),
        (("--image-size", "40000"), "--image-size must be at most 32,768, got 40000"),
        (("--timeout", "1e30"), "--timeout must be at most 1e+09, got 1e+30"),
    ],
)
def test_the_line_says_flag_range_and_value(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(TrainerError) as error:
        command_line.parse(arguments)
    assert str(error.value) == message


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"recipe": "akiba", "rmsprop_center": 1e6},
            "--recipe akiba: --rmsprop-center and --rmsprop-period must end the transition within "
            "2^24 steps",
        ),
        ({"end_lr": 5.0}, "the schedule does not work: --end-lr 5.0 exceeds the learning rate "),
        ({"warmup_from": 5.0}, "the schedule does not work: --warmup-from 5.0 exceeds the"),
    ],
)
def test_what_the_library_refuses_names_the_flag(
    images: dict[str, Digits], flags: dict[str, Any], message: str
) -> None:
    settings = command_line.new_config({"batch_size": 64} | flags)
    with pytest.raises(TrainerError) as error:
        build(settings, images["digits"], Progress(), World(0, 1, CPU))
    assert message in str(error.value)


def test_a_long_message_keeps_its_begin_and_its_end() -> None:
    text = str(TrainerError("begin " + "ä" * 5000 + " end"))
    assert len(text.encode()) < LONGEST
    assert text.startswith("begin ä")
    assert text.endswith("ä end")
    assert str(TrainerError("b" * 600)) == "b" * 600
