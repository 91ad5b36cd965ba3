"""``python -m fastlars.trainer.plots RUN``: draw the pictures of a run directory again."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from fastlars.trainer.errors import printable, reason
from fastlars.trainer.process import packages
from fastlars.trainer.process.exit import end_process, run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw curves.png, trust.png and norms.png, and write their tables; the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)

    def load() -> Callable[[], int]:
        packages.load_all()
        return lambda: _draw(given)

    return run_command("fastlars.trainer.plots", load)


def _draw(arguments: Sequence[str]) -> int:
    from fastlars.trainer.output import pictures
    from fastlars.trainer.output.records import read

    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m fastlars.trainer.plots RUN", file=sys.stderr)
        return 2
    run = Path(arguments[0])
    try:
        records = read(run / "metrics.jsonl")
        if not records:
            raise ValueError("no records")
        pictures.draw_all(records, run)
    except OSError as error:
        print(f"fastlars.trainer.plots: error: {reason(error)}", file=sys.stderr)
        return 2
    except (KeyError, TypeError, ValueError):
        text = printable(f"{run / 'metrics.jsonl'} is no log of the trainer")
        print(f"fastlars.trainer.plots: error: {text}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    end_process(main())
