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
    # torch's sockets would add the stack of their C++ to what we say of a lost process.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    given = list(sys.argv[1:] if arguments is None else arguments)
    with console.guarded():
        try:
            with signals.leaving():
                packages.load_all()
                from fastlars.trainer import config, session
            with signals.raising():
                return session.run(config.parse(given))
        except SystemExit:  # --help
            raise
        except BaseException as error:
            text, status = failures.told(error)
            # Of processes that all fail alike only the first one says so.
            alone = os.environ.get("WORLD_SIZE", "1") == "1"
            alone = alone or not (isinstance(error, TrainerError) and error.everywhere)
            if alone or os.environ.get("RANK", "0") == "0":
                said = text if isinstance(error, KeyboardInterrupt) else f"error: {text}"
                print(f"fastlars.trainer: {said}", file=sys.stderr, flush=True)
            return status


if __name__ == "__main__":
    status = main()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # all is done and told: Python only cleans up
    sys.exit(status)
