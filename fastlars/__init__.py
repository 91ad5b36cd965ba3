"""fastlars: LARS, LAMB and RMSprop warm-up at the price of SGD."""

from importlib import import_module as _import_module
from importlib.metadata import version as _version
from types import ModuleType as _ModuleType

from fastlars import conventions, schedules
from fastlars.groups import parameter_groups
from fastlars.optim.lamb import LAMB
from fastlars.optim.lars import LARS
from fastlars.optim.rmsprop_warmup import RMSpropWarmup

__version__ = _version("fastlars")

__all__ = [
    "LAMB",
    "LARS",
    "RMSpropWarmup",
    "__version__",
    "conventions",
    "parameter_groups",
    "schedules",
]


def __getattr__(name: str) -> _ModuleType:
    # On demand: one GPU does not need the first, and not every torch has it; few need the second.
    if name in ("distributed", "migrate"):
        return _import_module(f"fastlars.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
