"""Settings: recipe, flags over it, ranges."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest

from fastlars.trainer.config import command_line, recipes
from fastlars.trainer.config.settings import _MAY_CHANGE_ON_RESUME, Config, flag
from fastlars.trainer.errors import TrainerError


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
