"""The command line: ``python -m fastlars.trainer``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from fastlars.trainer.errors import TrainerError

_NEEDED = ("torchvision", "sklearn", "matplotlib", "tqdm", "PIL", "numpy")


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; the exit status: 0 done, 2 a mistake of the user, 128 + n stopped by signal n."""
    try:
        from fastlars.trainer import config, session

        return session.run(config.parse(sys.argv[1:] if arguments is None else arguments))
    except ModuleNotFoundError as error:
        if error.name not in _NEEDED:
            raise
        return _complain(f"{error.name} is not installed: pip install 'fastlars[trainer]'")
    except TrainerError as error:
        _complain(str(error), alone=not error.everywhere)
        return error.status
    except KeyboardInterrupt:
        _complain("interrupted; the last checkpoint, if there was one, is as it was")
        return 130


def _complain(text: str, *, alone: bool = False) -> int:
    """Print one line; of processes that all fail alike only the first does."""
    if alone or os.environ.get("RANK", "0") == "0":
        print(f"fastlars.trainer: error: {text}", file=sys.stderr, flush=True)
    return 2


if __name__ == "__main__":
    sys.exit(main())
