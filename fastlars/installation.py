"""Says in one line what this installation lacks: a newer Python, torch or the compiled extension.

``import fastlars`` looks for them without torch, which takes seconds to import, and without
pathlib, which takes longer than all of this.
"""

from __future__ import annotations

import os
import re
import struct
import sys
from importlib import import_module
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from types import ModuleType

OLDEST_PYTHON = (3, 10)
OLDEST_TORCH = (2, 10)
FOLDER = os.path.dirname(os.path.abspath(__file__))
PARENT = os.path.dirname(FOLDER)
IS_CHECKOUT = os.path.isdir(os.path.join(PARENT, "csrc"))
# The command that replaces a broken extension.
REMEDY = (
    f"build it with pip install -e {PARENT}"
    if IS_CHECKOUT
    else "reinstall it with pip install --force-reinstall --no-deps fastlars, or the folder "
    "that it was installed from"
)


def check() -> None:
    """Raise an ImportError if something is missing. Its name lets `python -m fastlars` print the
    text without a traceback."""
    if sys.version_info < OLDEST_PYTHON:
        raise ImportError(
            f"fastlars needs Python {_dotted(OLDEST_PYTHON)} or newer, and this is "
            f"{_dotted(sys.version_info[:2])}: run it with another, such as python3.12",
            name="fastlars",
        )
    torch = _torch_version()
    if torch is None:
        raise ImportError(
            f"fastlars needs torch {_dotted(OLDEST_TORCH)} or newer, and torch is not installed: "
            "pip install torch",
            name="fastlars",
        )
    found = re.match(r"(\d+)\.(\d+)", torch)
    if found and (int(found[1]), int(found[2])) < OLDEST_TORCH:
        raise ImportError(
            f"fastlars needs torch {_dotted(OLDEST_TORCH)} or newer, and {torch} is installed: "
            "pip install --upgrade torch",
            name="fastlars",
        )
    _check_extension()


def load_all() -> None:
    """Import torch and the extension, or raise an ImportError that says why not."""
    try:
        import_module("torch")
    except (ImportError, OSError) as error:  # OSError: a library that does not load
        text = " ".join(str(error).split())
        raise ImportError(
            f"torch {_torch_version()} cannot be imported ({text}): reinstall it", name="fastlars"
        ) from None
    load_extension()


def load_extension() -> ModuleType:
    """Import the extension."""
    try:
        return import_module("fastlars._C")
    except ImportError as error:
        raise ImportError(
            f"the compiled extension of fastlars cannot be loaded ({error}): {REMEDY}",
            name="fastlars",
        ) from None


def _check_extension() -> None:
    """Look for the extension without loading it: torch must load its OpenMP first, which ours
    then shares."""
    spec = find_spec("fastlars._C")
    if spec is not None and spec.origin is not None:
        missing = _missing_bytes(spec.origin)
        if missing:
            raise ImportError(
                f"the compiled extension {spec.origin} lacks its last {missing} bytes: {REMEDY}",
                name="fastlars",
            )
        return
    others = ", ".join(sorted(name for name in os.listdir(FOLDER) if re.match(r"_C\..*so$", name)))
    if others:
        raise ImportError(
            f"the compiled extension in {FOLDER} is for another Python ({others}; this one needs "
            f"_C{EXTENSION_SUFFIXES[0]}): {REMEDY}",
            name="fastlars",
        )
    if IS_CHECKOUT:
        raise ImportError(
            f"{FOLDER} holds the sources of fastlars without the compiled extension: run Python in "
            f"another folder, or {REMEDY}",
            name="fastlars",
        )
    raise ImportError(
        f"the compiled extension of fastlars is missing in {FOLDER}: {REMEDY}", name="fastlars"
    )


def _torch_version() -> str | None:
    """The version of the torch that would be imported; None without torch, "" if unknown."""
    if "torch" in sys.modules:
        return getattr(sys.modules["torch"], "__version__", "")
    spec = find_spec("torch")
    # What an incomplete uninstallation leaves is a folder without __init__.py: it has no origin.
    if spec is None or (spec.origin is None and spec.submodule_search_locations is not None):
        return None
    for folder in spec.submodule_search_locations or ():
        path = os.path.join(folder, "version.py")
        if os.path.exists(path):
            with open(path) as file:
                version = re.search(r"^__version__ = ['\"](.*)['\"]", file.read(), re.MULTILINE)
            return version[1] if version else ""
    return ""


def _missing_bytes(path: str) -> int:
    """How many bytes a 64-bit ELF file lacks at its end. Loading a file that was cut off kills the
    process, instead of raising an error."""
    try:
        with open(path, "rb") as file:
            header = file.read(64)
            size = file.seek(0, 2)
    except OSError:  # in a frozen program there is no such file
        return 0
    if len(header) < 64 or header[:6] != b"\x7fELF\x02\x01":
        return 0
    # The table of sections is at the end.
    (start,) = struct.unpack_from("<Q", header, 40)
    length, count = struct.unpack_from("<HH", header, 58)
    return max(0, start + length * count - size)


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
