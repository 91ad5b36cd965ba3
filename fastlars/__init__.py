"""LARS, LAMB and RMSprop warm-up for PyTorch: a whole step in one call of a compiled kernel.

:class:`LARS`, :class:`LAMB` and :class:`RMSpropWarmup` are ``torch.optim`` optimizers;
:func:`parameter_groups` leaves biases and norms out; :mod:`fastlars.schedules` has learning rates,
:mod:`fastlars.conventions` what other libraries mean by LARS and LAMB, :mod:`fastlars.migrate` how
to go on from their checkpoints, :mod:`fastlars.distributed` the overlap with DDP.
``python -m fastlars`` says what was built, ``python -m fastlars.trainer`` trains.
"""

import typing as _typing
from importlib import import_module as _import_module
from importlib.metadata import version as _version
from types import ModuleType as _ModuleType

from fastlars import conventions, schedules
from fastlars.groups import parameter_groups

try:
    from fastlars.optim.lamb import LAMB
    from fastlars.optim.lars import LARS
    from fastlars.optim.rmsprop_warmup import RMSpropWarmup
except ModuleNotFoundError as error:
    if error.name != "fastlars._C":
        raise
    raise ImportError(
        f"{__path__[0]} holds the sources of fastlars without the compiled extension: run Python "
        "in another folder, or build the extension in place with pip install -e"
    ) from None

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

# On demand: one GPU does not need the first, and not every torch has it; few need the second.
_ON_DEMAND = ("distributed", "migrate")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ON_DEMAND})


# From __getattr__ a type checker would conclude that any name is a module.
if _typing.TYPE_CHECKING:
    from fastlars import distributed as distributed
    from fastlars import migrate as migrate
else:

    def __getattr__(name: str) -> _ModuleType:
        if name in _ON_DEMAND:
            return _import_module(f"fastlars.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
