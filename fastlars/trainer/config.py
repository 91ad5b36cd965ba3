"""The settings of a run: one frozen dataclass, its command line, and how both meet a checkpoint."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any, NoReturn, get_type_hints

from fastlars.trainer import recipes
from fastlars.trainer.errors import TrainerError


def _setting(
    default: Any,
    text: str,
    check: Callable[[Any], bool] | None = None,
    must: str = "",
    *,
    choices: Sequence[str] | None = None,
    shapes_run: bool = True,
) -> Any:
    """A field with its help, its range in code (`check`) and in words (`must`).

    `shapes_run=False` marks what may differ when a run is resumed.
    """
    return field(
        default=default,
        metadata={
            "help": text,
            "check": check,
            "must": must,
            "choices": choices,
            "shapes_run": shapes_run,
        },
    )


def _finite(low: float, *, above: bool = False) -> Callable[[float], bool]:
    return lambda x: math.isfinite(x) and (x > low if above else x >= low)


@dataclass(frozen=True)
class Config:
    """Everything that shapes a run. Settings left at None on the command line are the recipe's."""

    recipe: str = _setting("lars", "optimizer and its settings", choices=recipes.NAMES)
    data: str = _setting(
        "digits",
        "'digits' (handwritten digits inside scikit-learn) or a folder with train/ and val/ or "
        "test/, each with one folder of images a class",
        shapes_run=False,
    )
    model: str = _setting(
        "resnet50",
        "torchvision's ResNet of that depth",
        choices=("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    )
    stem: str = _setting(
        "auto",
        "first layers: 'imagenet' (7x7, stride 2, pooling) or 'small' (3x3, stride 1, for images "
        "of up to 64 pixels); 'auto': what suits the data",
        choices=("auto", "imagenet", "small"),
    )
    image_size: int = _setting(
        0,
        "side in pixels that images of a folder are brought to; 0: their own if at most 64, "
        "else 224",
        lambda x: x == 0 or x >= 8,
        "be 0 or at least 8",
    )
    epochs: int = _setting(1, "passes over the training images", lambda x: x >= 1, "be at least 1")
    batch_size: int = _setting(
        1, "images per optimizer step, over all processes", lambda x: x >= 1, "be at least 1"
    )
    micro_batch: int = _setting(
        0,
        "images per process and forward pass (the batch norm's n); gradients are accumulated to "
        "--batch-size; 0: a process's whole share at once",
        lambda x: x >= 0,
        "be at least 0",
    )
    lr: float = _setting(1.0, "peak learning rate", _finite(0, above=True), "be above 0")
    schedule: str = _setting(
        "poly",
        "after the warm-up: 'poly' decay, or a tenth at 1/3, 2/3 and 8/9 of the run ('step')",
        choices=("poly", "step"),
    )
    power: float = _setting(2.0, "power of 'poly'", _finite(0, above=True), "be above 0")
    end_lr: float = _setting(0.0, "where 'poly' ends", _finite(0), "be at least 0")
    warmup_epochs: float = _setting(
        0.0, "epochs of linear warm-up, counted in steps", _finite(0), "be at least 0"
    )
    warmup_from: float = _setting(
        0.0, "learning rate at the first step of the warm-up", _finite(0), "be at least 0"
    )
    momentum: float = _setting(
        0.9, "of lars and sgd", lambda x: 0 <= x < 1, "lie from 0 to below 1"
    )
    weight_decay: float = _setting(
        0.0, "of all parameters but biases and norms", _finite(0), "be at least 0"
    )
    trust_coefficient: float = _setting(0.001, "of lars", _finite(0, above=True), "be above 0")
    label_smoothing: float = _setting(
        0.0, "of the training loss", lambda x: 0 <= x < 1, "lie from 0 to below 1"
    )
    precision: str = _setting(
        "auto",
        "'bf16' autocast or 'fp32'; 'auto': bf16 on a GPU that has it, fp32 on the CPU",
        choices=("auto", "fp32", "bf16"),
    )
    seed: int = _setting(
        0, "of weights, order of images and augmentation", lambda x: 0 <= x < 2**63, "be at least 0"
    )
    device: str = _setting(
        "auto", "where to train", choices=("auto", "cpu", "cuda"), shapes_run=False
    )
    workers: int = _setting(
        2,
        "processes that decode images of a folder; 0: in the training process",
        lambda x: x >= 0,
        "be at least 0",
        shapes_run=False,
    )
    output: str = _setting(
        "",
        "run directory for checkpoint, log and picture; default: a new one under runs/",
        shapes_run=False,
    )
    log_every: int = _setting(
        0,
        "steps between lines of the log; 0: a tenth of an epoch, at most 50",
        lambda x: x >= 0,
        "be at least 0",
    )
    checkpoint_every: int = _setting(
        0,
        "steps between checkpoints beside those after each epoch; 0: none",
        lambda x: x >= 0,
        "be at least 0",
        shapes_run=False,
    )
    timeout: float = _setting(
        1800.0,  # saving to a slow disk, or the slowest reader at the start
        "seconds that a process waits for another one before it gives up",
        _finite(0, above=True),
        "be above 0",
        shapes_run=False,
    )
    max_steps: int = _setting(
        0,
        "stop with a checkpoint after so many steps of the run; 0: at its end",
        lambda x: x >= 0,
        "be at least 0",
        shapes_run=False,
    )

    def __post_init__(self) -> None:
        for setting in fields(self):
            _check(setting, getattr(self, setting.name))

    def shaping(self) -> dict[str, Any]:
        """The settings that a resumed run must share, and `data`, which it takes over."""
        return {f.name: getattr(self, f.name) for f in fields(self)
                if f.metadata["shapes_run"] or f.name == "data"}  # fmt: skip


def _check(setting: Field[Any], value: Any) -> None:
    meta = setting.metadata
    if meta["check"] is not None and not meta["check"](value):
        text = f"{flag(setting.name)} must {meta['must']}, got {value}"
        raise TrainerError(text, everywhere=True)


def flag(name: str) -> str:
    """The command-line flag of a setting."""
    return "--" + name.replace("_", "-")


def fresh(given: Mapping[str, Any]) -> Config:
    """The configuration of a new run: the flags given, over the recipe, over the defaults."""
    start = Config()
    recipe = recipes.look_up(given.get("recipe", start.recipe), given.get("data", start.data))
    settings = recipe.settings | dict(given)
    settings.setdefault("lr", recipe.lr(max(settings["batch_size"], 1)))
    if "warmup_epochs" not in given:  # a short run warms up for a quarter of it at most
        settings["warmup_epochs"] = min(settings["warmup_epochs"], settings["epochs"] / 4)
    if "warmup_from" not in given:  # small batches scale the peak below the recipe's start
        settings["warmup_from"] = min(settings["warmup_from"], settings["lr"])
    return replace(start, **settings)


def resumed(given: Mapping[str, Any], saved: Mapping[str, Any], path: str) -> Config:
    """The configuration of the run saved in `path`; flags that contradict it are an error."""
    known = {f.name: f for f in fields(Config)}
    for name, value in given.items():
        if known[name].metadata["shapes_run"] and name in saved and saved[name] != value:
            raise TrainerError(
                f"{flag(name)} {value} differs from {saved[name]}, with which the run in {path} "
                "was started: leave it out to resume, or start a new run with another --output"
            )
    return Config(**{name: v for name, v in saved.items() if name in known} | dict(given))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise TrainerError(message, everywhere=True)


def parse(arguments: Sequence[str] | None) -> tuple[dict[str, Any], str | None]:
    """The settings given on the command line, and what --resume names.

    That is None without --resume, and "" where the checkpoint is the one in --output.
    """
    parser = _Parser(
        prog="python -m fastlars.trainer",
        description="Train ResNets with fastlars' optimizers. Flags left out are the recipe's.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    hints = get_type_hints(Config)
    for setting in fields(Config):
        parser.add_argument(
            flag(setting.name),
            type=hints[setting.name],
            choices=setting.metadata["choices"],
            help=setting.metadata["help"],
            metavar=None if setting.metadata["choices"] else setting.name.upper(),
        )
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="PATH",
        help="go on from a checkpoint (default: the one in --output) with the settings in it",
    )
    given = vars(parser.parse_args(arguments))
    for setting in fields(Config):  # before processes connect, which takes some of them
        if setting.name in given:
            _check(setting, given[setting.name])
    return given, given.pop("resume", None)
