"""Packages that the trainer needs beyond fastlars' own."""

from __future__ import annotations

import os
from importlib import import_module
from types import ModuleType

from fastlars.trainer.errors import TrainerError, one_line

# What `import` needs of them; each as far as the trainer uses it.
# Those that others import come first, or the error would name the others.
_ALWAYS = (
    "numpy",
    "tqdm",
    "PIL.Image",
    "torch",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "torchvision.models",
    "torchvision.transforms",
    "fastlars.optim.lars",
)
_DISTRIBUTED_AS = {"PIL": "Pillow", "sklearn": "scikit-learn"}


def load_all() -> None:
    """Import what every run needs; TrainerError names what is not there or does not load."""
    os.environ["MPLBACKEND"] = "agg"  # the one that is used; matplotlib refuses misspelt ones
    for module in _ALWAYS:
        load(module)


def load(module: str, wanted_by: str = "", package: str = "") -> ModuleType:
    """Import a module of a package, for the flag that wants it if there is one."""
    package = package or module.split(".")[0]
    name = _DISTRIBUTED_AS.get(package, package)
    prefix = f"{wanted_by}: " if wanted_by else ""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name in (package, module):
            text = f"{prefix}{package} is not installed: pip install 'fastlars[trainer]'"
            raise TrainerError(text, everywhere=True) from None
        why = one_line(error)
    except Exception as error:  # any: each library fails in its own way
        why = one_line(error)
    cure = f"mend it, or reinstall it (pip install --force-reinstall {name})"
    if "failed to map" in why or "llocate memory" in why:
        cure = "is the memory limited (ulimit -v)?"
    raise TrainerError(
        f"{prefix}{package} is there but does not load: {why}: {cure}", everywhere=True
    )
