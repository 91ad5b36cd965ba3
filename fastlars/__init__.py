"""LARS, LAMB, LANS and RMSprop warm-up for PyTorch: a whole step in one call of a compiled kernel.

``LARS``, ``LAMB``, ``LANS`` and ``RMSpropWarmup`` are ``torch.optim`` optimizers, and
``parameter_groups`` makes groups in which biases and norms are not adapted. There are modules for
learning rates (``fastlars.schedules``), for the variants of LARS, LAMB and LANS in other libraries
(``fastlars.conventions``), for loading their checkpoints (``fastlars.migrate``), for logs of trust
ratios (``fastlars.logging``) and for the overlap with DDP (``fastlars.distributed``).
``python -m fastlars`` says what was built, ``python -m fastlars.trainer`` trains.
"""

import typing as _typing
from importlib import import_module as _import_module

from fastlars import forks as forks
from fastlars import installation as _installation

_installation.check()

__all__ = [
    "LAMB",
    "LANS",
    "LARS",
    "RMSpropWarmup",
    "__version__",
    "conventions",
    "parameter_groups",
    "schedules",
    "step_in_backward",
]

# Everything that needs torch is imported at first use. Importing torch takes seconds; the command
# lines parse their arguments and handle Ctrl-C before that. Public names and their modules:
_OBJECTS = {
    "LAMB": "fastlars.optim.lamb",
    "LANS": "fastlars.optim.lans",
    "LARS": "fastlars.optim.lars",
    "RMSpropWarmup": "fastlars.optim.rmsprop_warmup",
    "parameter_groups": "fastlars.groups",
    "step_in_backward": "fastlars.in_backward.single",
}
# Imported at first use. distributed cannot be imported with every build of torch.
_MODULES = ("conventions", "distributed", "logging", "migrate", "schedules")
# `import fastlars` once imported these.
_INNER = ("_C", "backends", "groups", "in_backward", "optim", "rules")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_OBJECTS, *_MODULES, *_INNER})


# A type checker that sees __getattr__ would accept any name.
if _typing.TYPE_CHECKING:
    from fastlars import conventions as conventions
    from fastlars import distributed as distributed
    from fastlars import logging as logging
    from fastlars import migrate as migrate
    from fastlars import schedules as schedules
    from fastlars.groups import parameter_groups
    from fastlars.in_backward.single import step_in_backward
    from fastlars.optim.lamb import LAMB
    from fastlars.optim.lans import LANS
    from fastlars.optim.lars import LARS
    from fastlars.optim.rmsprop_warmup import RMSpropWarmup

    __version__: str
else:

    def __getattr__(name: str) -> object:
        if name == "_C":
            return _installation.load_extension()
        if name in _MODULES or name in _INNER:
            return _import_module(f"fastlars.{name}")
        if name == "__version__":
            found = globals()[name] = _import_module("importlib.metadata").version("fastlars")
            return found
        if name in _OBJECTS:
            found = globals()[name] = getattr(_import_module(_OBJECTS[name]), name)
            return found
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
