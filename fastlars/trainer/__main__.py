"""The command line: ``python -m fastlars.trainer``."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

from fastlars.trainer import console, failures, packages, signals
from fastlars.trainer.errors import TrainerError


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; the exit status: 0 done, 2 a mistake of the user, 128 + n stopped by signal n.

    1 is an error of the trainer itself. Whatever it is, the user gets one line.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    with console.guarded():
        try:
            with signals.leaving():
                packages.load_all()
                from fastlars.trainer import config, session
            with signals.raising():
                return session.run(config.parse(given))
        except SystemExit as end:  # --help
            return int(end.code or 0)
        except BaseException as error:
            text, status = failures.told(error)
            alone = not (isinstance(error, TrainerError) and error.everywhere)
            # Of processes that all fail alike only the first one says so.
            if alone or os.environ.get("RANK", "0") == "0":
                said = text if isinstance(error, KeyboardInterrupt) else f"error: {text}"
                print(f"fastlars.trainer: {said}", file=sys.stderr, flush=True)
            return status


if __name__ == "__main__":
    status = main()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # all is done and told: Python only cleans up
    sys.exit(status)
