"""Says in one line what a machine lacks to set up .venv, before anything is downloaded.

It runs on old Pythons, which it refuses: it has no type hints and no f-strings.
"""

import os
import shutil
import subprocess
import sys
import sysconfig


def stop(text):
    sys.exit("fastlars: " + text)


if sys.version_info < (3, 10):
    stop(
        "Python 3.10 or newer is needed, %s is %d.%d; choose another with make "
        "PYTHON=/path/to/python3" % (sys.executable, sys.version_info[0], sys.version_info[1])
    )
try:
    import ensurepip  # noqa: F401
    import venv  # noqa: F401
except ImportError as error:
    stop(
        "%s cannot make virtual environments (%s); on Debian and Ubuntu: apt install python3-venv"
        % (sys.executable, error)
    )
if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
    stop(
        "%s has no C headers (Python.h); on Debian and Ubuntu: apt install python3-dev"
        % sys.executable
    )
names = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
compilers = [name for name in names if shutil.which(name)]
if not compilers:
    stop(
        "no C++ compiler was found (looked for %s); on Debian and Ubuntu: apt install g++"
        % ", ".join(names)
    )
probe = [compilers[0], "-std=c++17", "-fsyntax-only", "-x", "c++", "-"]
if subprocess.run(probe, input=b"#include <optional>\n", stderr=subprocess.DEVNULL).returncode:
    stop(
        "the C++ compiler %s does not compile C++17; choose another with CXX=/path/to/c++"
        % compilers[0]
    )
