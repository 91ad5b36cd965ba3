"""fastlars: LARS and LAMB at the price of SGD."""

from importlib.metadata import version as _version

from fastlars import conventions, schedules
from fastlars.groups import parameter_groups
from fastlars.optim.lamb import LAMB
from fastlars.optim.lars import LARS

__version__ = _version("fastlars")

__all__ = ["LAMB", "LARS", "__version__", "conventions", "parameter_groups", "schedules"]
