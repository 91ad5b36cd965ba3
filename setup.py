"""Finds the packages, and ends a build that fails with one line; all else is in pyproject.toml.

setuptools runs this file. pip imports it as the build backend, which is scikit-build-core's plug-in
for setuptools: this file alone can say what to do where that is not installed.
"""

import sys
from pathlib import Path

TOOLS = "leave out --no-build-isolation, or pip install -U setuptools scikit-build-core pybind11"
try:
    import setuptools
    from scikit_build_core.errors import FailedLiveProcessError, NotFoundError
    from scikit_build_core.setuptools.build_cmake import BuildCMake
    from scikit_build_core.setuptools.build_meta import *  # noqa: F403
    from setuptools.command.build import build
except ImportError as error:
    sys.exit(f"error: fastlars cannot be built without its build tools ({error}): {TOOLS}")
# pip compares no versions where a build is not isolated. Older ones stop with a traceback.
if int(setuptools.__version__.split(".")[0]) < 77:
    old = setuptools.__version__
    sys.exit(f"error: fastlars needs setuptools 77 or newer, and {old} is installed: {TOOLS}")


class Build(BuildCMake):
    """Compiles the extension. SystemExit, because other errors come with a traceback."""

    def run(self) -> None:
        try:
            super().run()
        except NotFoundError as error:
            sys.exit(f"error: fastlars cannot be compiled ({error}): pip install cmake ninja")
        except FailedLiveProcessError as error:
            # csrc/stop.cmake writes it where the cause is known.
            known = [*Path(self.build_temp).rglob("why_cmake_stopped.txt")]
            if known:
                sys.exit(f"error: fastlars cannot be compiled: {known[0].read_text()}")
            sys.exit(f"error: fastlars cannot be compiled ({error}): see the first error above")


if __name__ == "__main__":
    # First: what fails is then shown without the hundred files that setuptools copies.
    build.sub_commands.insert(0, ("build_cmake", None))
    setuptools.setup(
        packages=setuptools.find_packages(include=["fastlars", "fastlars.*"]),
        cmake_source_dir="csrc",
        cmdclass={"build_cmake": Build},
    )
