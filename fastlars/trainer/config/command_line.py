"""The command line: what it asks for, and the configuration of a new or a resumed run."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, fields
from functools import partial
from typing import Any, NoReturn

from fastlars.trainer.config import recipes
from fastlars.trainer.config.settings import GROUPS, Config, check, fixed_on_resume, flag
from fastlars.trainer.errors import TrainerError

_DESCRIPTION = """\
Train ResNets with fastlars' optimizers, on a folder of images or on the
handwritten digits of scikit-learn. A recipe has a paper's settings for each
batch size, or rates for small images; the run prints where they come from, and
a flag overrides its setting.

  python -m fastlars.trainer
  python -m fastlars.trainer --data FOLDER --recipe lars --batch-size 8192
  torchrun --nproc-per-node=8 -m fastlars.trainer --data FOLDER
"""
_SET_BY_RECIPES = {
    name for recipe in recipes.NAMES for name in recipes.look_up(recipe, "folder", None).settings
}


@dataclass(frozen=True)
class Command:
    """What a command line asks for: its settings are in `given`, all its arguments in `line`.

    `resume` is the argument of --resume: "" for the checkpoint in --output, "auto" if it may be
    missing there, a path, or None without --resume.
    """

    given: dict[str, Any]
    line: tuple[str, ...]
    resume: str | None = None
    find_lr: bool = False
    dry_run: bool = False


def parse(arguments: Sequence[str]) -> Command:
    """Parse a command line; a mistake in it, or a setting out of its range, is a TrainerError."""
    parser = _parser()
    if any("\0" in argument for argument in arguments):
        parser.error("an argument has a NUL character in it")
    known, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}; see --help")
    given = vars(known)
    for name, value in given.items():
        if isinstance(value, list):  # what argparse makes of --flag=--
            parser.error(f"argument {flag(name)}: expected one argument")
        if value == "" and name in ("data", "output"):
            parser.error(f"{flag(name)} is empty: name a directory, or leave it out")
    actions = {name: given.pop(name) for name in given.keys() & {"resume", "find_lr", "dry_run"}}
    if {"resume", "find_lr"} <= actions.keys():
        parser.error("--find-lr starts from new weights: leave out --resume")
    # Checked here too, because --device and --timeout are used before there is a Config.
    for setting in fields(Config):
        if setting.name in given:
            check(setting, given[setting.name])
    return Command(given, tuple(arguments), **actions)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        for kind, words in (("int", "a whole number"), ("float", "a number")):
            message = message.replace(f"invalid {kind} value:", f"must be {words}, got")
        raise TrainerError(message, everywhere=True)


_BLANK = "\xa0"  # a space at which no line is broken


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def _split_lines(self, text: str, width: int) -> list[str]:
        """Keep flags such as "--batch-size", and words joined by _BLANK, on one line."""
        lines = textwrap.wrap(text, width, break_on_hyphens=False)
        return [line.replace(_BLANK, " ") for line in lines]


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        usage="python -m fastlars.trainer [FLAG ...]",
        description=_DESCRIPTION,
        formatter_class=partial(_Formatter, max_help_position=28),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        add_help=False,
    )
    for setting in fields(Config):
        if setting.name in GROUPS:
            group = parser.add_argument_group(GROUPS[setting.name])
        group.add_argument(flag(setting.name), **_argument(setting))
        if setting.name == "recipe":
            _add_actions(group)
    return parser


def _add_actions(group: argparse._ArgumentGroup) -> None:
    """Add the flags that are not settings: they say what to do instead of starting a new run."""
    group.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="PATH",
        help="continue from a checkpoint, by default the one in --output, with its settings; "
        "'auto': if there is one in --output, else start a new run"
        + _note("default: start a new run"),
    )
    for name, text in (
        ("--find-lr", "train briefly at growing learning rates, draw the loss, suggest a rate"),
        ("--dry-run", "print model, recipe, steps and estimates of memory and time, then stop"),
    ):
        group.add_argument(name, action="store_true", help=text + _note("default: off"))
    group.add_argument("-h", "--help", action="help", help="print this help and exit")


def shown_default(setting: Field[Any]) -> str:
    """A setting's default in words; "" where its help says what the default is."""
    if setting.name in _SET_BY_RECIPES:
        return "the recipe's"
    if isinstance(setting.default, bool):
        return "on" if setting.default else "off"
    return f"{setting.default:g}" if isinstance(setting.default, float) else str(setting.default)


def _argument(setting: Field[Any]) -> dict[str, Any]:
    """The arguments of add_argument for a setting; a bool becomes --name and --no-name."""
    meta, shown = setting.metadata, shown_default(setting)
    text = meta["help"]
    if shown:
        text += _note("; ".join(part for part in (meta["bounds"], f"default: {shown}") if part))
    if isinstance(setting.default, bool):
        return {"action": argparse.BooleanOptionalAction, "help": text}
    if meta["choices"]:
        return {"choices": meta["choices"], "help": text}
    return {
        "type": type(setting.default),
        "metavar": (meta["unit"] or "number").upper(),
        "help": text,
    }


def _note(text: str) -> str:
    return " (" + text.replace(" ", _BLANK) + ")"


def new_config(
    given: Mapping[str, Any], processes: int = 1, *, small_images: bool = False
) -> Config:
    """The configuration of a new run: the flags given, then the recipe, then the defaults.

    A recipe's --bn-batch adapts to the forward pass of each of the `processes`; one that was given
    as a flag must divide it.
    """
    name, data = given.get("recipe", Config.recipe), given.get("data", Config.data)
    batch = given.get("batch_size")
    recipe = recipes.look_up(name, data, batch, small_images=small_images).settings
    settings = recipe | dict(given)
    if settings["epochs"] < recipe["epochs"]:
        settings |= _shortened(recipe, settings["epochs"]) | dict(given)
    if "warmup_from" not in given:  # a low --lr may be below the rate that the warm-up starts from
        settings["warmup_from"] = min(settings["warmup_from"], settings["lr"])
    if not settings["overlap"] and "compression" not in given:
        settings["compression"] = "none"
    made = Config(**settings)
    images = made.micro_batch or made.batch_size // processes
    if given.get("bn_batch") and images % made.bn_batch:
        text = f"--bn-batch {made.bn_batch} does not divide the {images} images of a forward pass"
        raise TrainerError(text, everywhere=True)
    return made


def _shortened(recipe: Mapping[str, Any], epochs: int) -> dict[str, float]:
    """The settings in epochs of a recipe, for a run of fewer epochs than the recipe's own.

    akiba's transition shrinks in proportion, as its schedule does. A warm-up keeps its length as
    long as it takes at most a quarter of the run; else it takes that quarter, or the recipe's own
    share of the run if that is more.
    """
    shrink, warmup = epochs / recipe["epochs"], recipe["warmup_epochs"]
    shrunk = {
        name: recipe[name] * shrink for name in recipe.keys() & {"rmsprop_center", "rmsprop_period"}
    }
    return shrunk | {"warmup_epochs": min(warmup, max(epochs / 4, warmup * shrink))}


def resumed_config(given: Mapping[str, Any], saved: Mapping[str, Any], path: str) -> Config:
    """The configuration of the run saved in `path`; a flag that contradicts it is an error.

    Raises TrainerError for a flag, ValueError or TypeError for what is saved.
    """
    names = {setting.name for setting in fields(Config)}
    start = {name: value for name, value in saved.items() if name in names}
    if not start.keys() >= {"recipe", "model", "data"}:
        raise ValueError("its configuration is incomplete")
    try:
        Config(**start)
    except TrainerError as error:
        raise ValueError(str(error)) from error
    for name, value in given.items():
        if fixed_on_resume(name) and name in saved and saved[name] != value:
            raise TrainerError(
                f"{flag(name)} {value}: the run in {path} has {saved[name]}; leave {flag(name)} "
                "out to resume, or start a new run with another --output"
            )
    return Config(**start | dict(given))
