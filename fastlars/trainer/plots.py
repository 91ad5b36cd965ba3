"""``python -m fastlars.trainer.plots RUN``: draw the pictures of a run directory again."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from fastlars.trainer.errors import TrainerError
from fastlars.trainer.process import packages
from fastlars.trainer.process.exit import end_process, run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw curves.png, trust.png and norms.png, write their tables, and return the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)

    def load() -> Callable[[], int]:
        if len(given) != 1 or given[0].startswith("-"):
            raise TrainerError("name one run directory: python -m fastlars.trainer.plots RUN")
        packages.load_all()
        return lambda: _draw(Path(given[0]))

    return run_command("fastlars.trainer.plots", load)


def _draw(run: Path) -> int:
    from fastlars.trainer.output import pictures
    from fastlars.trainer.output.records import read

    log = run / "metrics.jsonl"
    try:
        records = read(log)
        if not records:
            raise ValueError("no records")
        pictures.save(pictures.curves(records), run / "curves.png")
        pictures.draw_layers(records, run)
    except (KeyError, TypeError, ValueError):
        raise TrainerError(f"{log} is not a log of the trainer") from None
    return 0


if __name__ == "__main__":
    end_process(main())
