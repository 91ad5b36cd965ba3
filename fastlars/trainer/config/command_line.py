"""The configuration of a run: from the command line over the recipe, or from a checkpoint."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NoReturn, get_type_hints

from fastlars.trainer.config import recipes
from fastlars.trainer.config.settings import Config as Config
from fastlars.trainer.config.settings import check, flag
from fastlars.trainer.errors import TrainerError


@dataclass(frozen=True)
class Command:
    """What a command line asks for.

    Attributes:
        given: the settings named on it.
        resume: what --resume names: "" where the checkpoint is the one in --output, "auto" where it
            may be missing, None without --resume.
        find_lr: sweep over learning rates instead of training.
        dry_run: say what would be done, and do nothing.
        line: the arguments as they were.
    """

    given: dict[str, Any]
    resume: str | None
    find_lr: bool
    dry_run: bool
    line: tuple[str, ...]


def fresh(given: Mapping[str, Any], processes: int = 1) -> Config:
    """The configuration of a new run: the flags given, over the recipe, over the defaults.

    A recipe's --bn-batch adapts to the forward pass of each of the `processes`; one that was given
    must divide it.
    """
    start = Config()
    name, data = given.get("recipe", start.recipe), given.get("data", start.data)
    recipe = recipes.look_up(name, data, given.get("batch_size")).settings
    settings = recipe | dict(given)
    if settings["epochs"] < recipe["epochs"]:
        settings |= {key: value for key, value in _shortened(settings, recipe).items()
                     if key not in given}  # fmt: skip
    if "warmup_from" not in given:  # small batches scale the peak below the recipe's start
        settings["warmup_from"] = min(settings["warmup_from"], settings["lr"])
    if not settings["overlap"] and "compression" not in given:
        settings["compression"] = "none"
    made = replace(start, **settings)
    images = made.micro_batch or made.batch_size // processes
    if given.get("bn_batch") and images % made.bn_batch:
        raise TrainerError(
            f"--bn-batch {made.bn_batch} does not divide the {images} images of a forward pass",
            everywhere=True,
        )
    return made


def recipe_of(config: Config) -> recipes.Recipe:
    """The recipe that a configuration starts from."""
    return recipes.look_up(config.recipe, config.data, config.batch_size)


def _shortened(settings: Mapping[str, Any], recipe: Mapping[str, Any]) -> dict[str, float]:
    """What a recipe says in epochs, in a run of fewer epochs than its own.

    The transition of akiba shrinks as its schedule does; a warm-up stays as it is, as long as it
    takes no more than a quarter of the run.
    """
    epochs, shrink = settings["epochs"], settings["epochs"] / recipe["epochs"]
    warmup = recipe["warmup_epochs"]
    found = {"warmup_epochs": min(warmup, max(epochs / 4, warmup * shrink))}
    for key in ("rmsprop_center", "rmsprop_period"):
        if key in recipe:
            found[key] = recipe[key] * shrink
    return found


def resumed(given: Mapping[str, Any], saved: Mapping[str, Any], path: str) -> Config:
    """The configuration of the run saved in `path`; flags that contradict it are an error.

    Raises TrainerError for flags, ValueError or TypeError for what is saved.
    """
    known = {f.name: f for f in fields(Config)}
    start = {name: value for name, value in saved.items() if name in known}
    if not start.keys() >= {"recipe", "model", "data"}:
        raise ValueError("its configuration is incomplete")
    try:
        Config(**start)
    except TrainerError as error:
        raise ValueError(str(error)) from error
    for name, value in given.items():
        if known[name].metadata["fixed_on_resume"] and name in saved and saved[name] != value:
            raise TrainerError(
                f"{flag(name)} {value} differs from {saved[name]}, with which the run in {path} "
                "was started: leave it out to resume, or start a new run with another --output"
            )
    return Config(**start | dict(given))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise TrainerError(message, everywhere=True)


def parse(arguments: Sequence[str]) -> Command:
    """What the command line asks for; settings out of their range are an error."""
    parser = _Parser(
        prog="python -m fastlars.trainer",
        description="Train ResNets with fastlars' optimizers. Flags left out are the recipe's.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    hints = get_type_hints(Config)
    for setting in fields(Config):
        parser.add_argument(flag(setting.name), **_argument(setting.name, hints, setting.metadata))
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="PATH",
        help="go on from a checkpoint (default: the one in --output) with the settings in it; "
        "'auto': where there is one in --output, else start a new run",
    )
    for action, text in (
        ("--find-lr", "train shortly at growing learning rates, draw the loss, suggest a rate"),
        ("--dry-run", "print model, recipe, steps and estimates of memory and time; do nothing"),
    ):
        parser.add_argument(action, action="store_true", help=text)
    if any("\0" in argument for argument in arguments):
        parser.error("an argument has a NUL character in it")
    given = vars(parser.parse_args(arguments))
    for name, value in given.items():
        if isinstance(value, list):  # what argparse makes of --flag=--
            parser.error(f"argument {flag(name)}: expected one argument")
    resume = given.pop("resume", None)
    find_lr, dry_run = (bool(given.pop(name, False)) for name in ("find_lr", "dry_run"))
    if find_lr and resume is not None:
        parser.error("--find-lr starts from new weights: leave out --resume")
    for setting in fields(Config):  # before processes connect, which takes some of them
        if setting.name in given:
            check(setting, given[setting.name])
    for name in ("data", "output"):
        if given.get(name) == "":
            parser.error(f"{flag(name)} is empty: name a directory, or leave it out")
    return Command(given, resume, find_lr, dry_run, tuple(arguments))


def _argument(name: str, hints: Mapping[str, Any], meta: Mapping[str, Any]) -> dict[str, Any]:
    """How argparse is to take a setting: a switch as --name and --no-name, all else as a value."""
    # argparse formats help with %, which none of ours means.
    text = meta["help"].replace("%", "%%")
    if hints[name] is bool:
        return {"action": argparse.BooleanOptionalAction, "help": text}
    return {
        "type": hints[name],
        "choices": meta["choices"],
        "help": text,
        "metavar": None if meta["choices"] else name.upper(),
    }
