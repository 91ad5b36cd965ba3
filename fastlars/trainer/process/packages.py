"""The packages that the trainer needs in addition to those of fastlars."""

from __future__ import annotations

import os
from importlib import import_module

from fastlars.trainer.errors import TrainerError, one_line

# A package comes before those that import it: otherwise the error would name the importing one.
_ALWAYS = (
    "numpy",
    "tqdm",
    "PIL.Image",
    "torch",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "torchvision",
    "fastlars.optim.lars",
)
_NAMES_ON_PYPI = {"PIL": "Pillow", "sklearn": "scikit-learn"}


def load_all() -> None:
    """Import what every run needs; TrainerError names a package that is missing or broken."""
    os.environ["MPLBACKEND"] = "agg"  # matplotlib refuses to load with a misspelt name in it
    for module in _ALWAYS:
        load(module)


def load(module: str, wanted_by: str = "", package: str = "") -> None:
    """Import a module; TrainerError if its package is missing or broken.

    The error names the flag that needs it, `wanted_by`, and the `package`, by default the first
    part of the module's name.
    """
    package = package or module.split(".")[0]
    try:
        import_module(module)
        return
    except Exception as error:  # a broken package may raise anything
        if isinstance(error, ImportError) and error.name == "fastlars":
            raise TrainerError(str(error), everywhere=True) from None  # it names the cure itself
        why = f"is there but does not load: {one_line(error)}"
        if isinstance(error, ModuleNotFoundError) and error.name in (package, module):
            why, cure = "is not installed", "pip install 'fastlars[trainer]'"
        elif "failed to map" in why or "llocate memory" in why:
            cure = "is the memory limited (ulimit -v)?"
        else:
            name = _NAMES_ON_PYPI.get(package, package)
            cure = f"repair it, or reinstall it (pip install --force-reinstall {name})"
    prefix = f"{wanted_by}: " if wanted_by else ""
    raise TrainerError(f"{prefix}{package} {why}: {cure}", everywhere=True)
