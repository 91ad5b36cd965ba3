"""The command line: ``python -m fastlars.trainer``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from fastlars.trainer.process.exit import end_process, run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, and return the exit status.

    0: done; 1: an error of the trainer itself; 2: a mistake of the user; 3: the training diverged;
    128 + n: stopped by signal n. For all but 0 the user gets one line.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)

    def load() -> Callable[[], int]:
        from fastlars.trainer.config import command_line
        from fastlars.trainer.process import packages

        command = command_line.parse(given)  # first: --help and mistakes do not wait for torch
        packages.load_all()
        from fastlars.trainer.run import session

        return lambda: session.run(command)

    return run_command("fastlars.trainer", load)


if __name__ == "__main__":
    end_process(main())
