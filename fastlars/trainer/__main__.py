"""The command line: ``python -m fastlars.trainer``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from fastlars.trainer.process import command, packages


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; the exit status: 0 done, 2 a mistake of the user, 3 diverged, 128 + n signal n.

    1 is an error of the trainer itself. Whatever it is, the user gets one line.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)

    def load() -> Callable[[], int]:
        packages.load_all()
        from fastlars.trainer.config import command_line
        from fastlars.trainer.run import session

        return lambda: session.run(command_line.parse(given))

    return command.run("fastlars.trainer", load)


if __name__ == "__main__":
    command.end(main())
