"""Every flag of the settings table with values of the wrong kind, sign and size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import Field, fields
from datetime import timedelta
from typing import Any, cast

import pytest
import torch

from fastlars.trainer.config import command_line, recipes
from fastlars.trainer.config.settings import Config, flag
from fastlars.trainer.data.digits import Digits
from fastlars.trainer.errors import TrainerError
from fastlars.trainer.model import memory
from fastlars.trainer.model.context import Progress, build
from fastlars.trainer.process.world import World

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
