"""``python -m benchmarks.gpu_proof PART``, which `make gpu` and its parts call.

Builds for the GPU that is here, tries it and times it, stage by stage, without a network. Each
stage has a limit that ends it, one that fails takes none from the next, and each result is written
when it is known. What was tried before on such a card, from the same sources, is passed over.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

from benchmarks import RESULTS, ROOT
from benchmarks.gpu_proof import process
from benchmarks.gpu_proof.card import Card, look
from benchmarks.gpu_proof.page import Record, page, read, summary
from benchmarks.gpu_proof.stages import FOLDER, PARTS, Stage, stages
from benchmarks.results import write_text

TRIED = ("csrc", "fastlars", "tests", "benchmarks", "pyproject.toml", "setup.py")
SUFFIXES = (".py", ".pyi", ".toml", ".txt", ".cmake", ".h", ".cpp", ".cu", ".cuh")


def sources() -> str:
    """A hash of the files that are tried: it is the same on a machine without git."""
    found = hashlib.sha256()
    for name in TRIED:
        for path in sorted([ROOT / name, *(ROOT / name).rglob("*")]):
            if path.suffix in SUFFIXES and path.is_file() and "results" not in path.parts:
                found.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return found.hexdigest()[:12]


def commit() -> str:
    """The commit that is checked out, marked where files were changed since."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("GPU_COMMIT", "unknown")
    return done.stdout.strip()


def extension() -> str:
    """Names and times of the compiled extensions in the checkout."""
    found = sorted((ROOT / "fastlars").glob("_C*.so"))
    return ", ".join(f"{path.name} {path.stat().st_mtime_ns}" for path in found)


# Of the user's shell: what would change what is tried, or how fast it is.
LEFT_OUT = ("FASTLARS_", "TRITON_INTERPRET", "CUDA_LAUNCH_BLOCKING", "PYTEST_", "PYTORCH_NO_CUDA")


class Proof:
    """Runs stages, and writes their records and the page."""

    def __init__(self, card: Card, arguments: argparse.Namespace) -> None:
        self.card = card
        self.python = arguments.python
        self.results = arguments.out
        self.folder = arguments.out / card.slug
        self.again = set(arguments.again.split())
        self.longest = arguments.limit
        self.sources, self.commit = sources(), commit()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.all = {stage.name: stage for stage in stages(card, self.folder, arguments.pytest)}

    def known(self, stage: Stage) -> Record | None:
        """The stage's answer for this card and these sources, if there is one."""
        known = read(self.folder, stage.name)
        if known is None or known.status == "unfinished" or self.again & {stage.name, "all"}:
            return None
        if stage.name == "build" and (known.status != "passed" or known.made != extension()):
            return None  # what was built is on another machine
        asked = (known.sources, known.card, known.arguments)
        return known if asked == (self.sources, self.card, self._asked(stage)) else None

    def _asked(self, stage: Stage) -> list[str]:
        """The stage's arguments, without its folder, which may lie elsewhere the next time."""
        return [word.replace(str(self.folder), "") for word in stage.arguments]

    def take(self, stage: Stage, left_s: float) -> Record:
        """Run a stage; it is unfinished where the time that is left was too short for it."""
        log = self.folder / f"{stage.name}.log"
        for old in self.folder.glob(f"{stage.name}.*"):
            old.unlink()
        limit = min(stage.limit_s, self.longest)
        # Those of pythonpath in pyproject.toml, for processes that tests start.
        own = (ROOT, ROOT / "tests", ROOT / "tests/support")
        paths = [*map(str, own), os.environ.get("PYTHONPATH", "")]
        kept = {k: v for k, v in os.environ.items() if not k.startswith(LEFT_OUT)}
        environment = {
            **kept,
            **stage.environment,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            FOLDER: str(self.folder),
            "GPU_STAGE": stage.name,
            "GPU_COMMIT": self.commit,
        }
        command = [self.python, *stage.arguments]
        try:
            found = process.run(command, log, min(limit, left_s), environment)
        finally:
            process.end_descendants()
        status, words = found.status, found.words
        if status == "hung" and left_s < limit:
            status, words = "unfinished", f"was ended after {found.seconds:.0f} s, with its part"
        date = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M")
        known = (self.sources, self.commit, date, self.card, self._asked(stage))
        made = extension() if stage.name == "build" else ""
        record = Record(stage.name, stage.asks, status, words, found.seconds, *known, made)
        record.write(self.folder)
        return record

    def run(self, names: tuple[str, ...], budget_s: float) -> int:
        """Run the stages that are not done; 1 where one failed or hung, else 0."""
        end = time.monotonic() + budget_s
        status, late = 0, []
        for name in names:
            stage = self.all[name]
            if (known := self.known(stage)) is not None:
                status |= known.status in ("failed", "hung")
                print(f"{name:16} known: {known.words}, {known.date}", flush=True)
                continue
            left = end - time.monotonic()
            if left < 1.0:
                late.append(name)
                continue
            record = self.take(stage, left)
            status |= record.status in ("failed", "hung")
            if record.status == "unfinished":
                late.append(name)
            print(summary(record, self.folder / f"{name}.log"), flush=True)
            write_text(self.page, page(self.folder, list(self.all), self.sources))
            if name == "build" and record.status != "passed":
                print("Nothing else can be tried without a build.")
                break
        if late:
            print(f"The {budget_s:.0f} s are over. Left for the next call: {', '.join(late)}")
        print(self.page)
        return int(status)

    @property
    def page(self) -> Path:
        return self.results / f"{self.card.slug}.md"


def main(argv: list[str] | None = None) -> int:
    """Run a part."""
    parser = argparse.ArgumentParser("python -m benchmarks.gpu_proof", description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--python", default=sys.executable, help="the Python that has torch")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu")
    parser.add_argument("--again", default="", help="stages to run though they are known, or all")
    parser.add_argument("--seconds", type=float, help="for all stages together")
    parser.add_argument("--limit", type=float, default=1e9, help="seconds for any one stage")
    parser.epilog = "What follows -- are arguments of pytest, for tests and benchmarks."
    given = sys.argv[1:] if argv is None else argv
    cut = given.index("--") if "--" in given else len(given)
    arguments = parser.parse_args(given[:cut])
    arguments.pytest = given[cut + 1 :]
    arguments.out = arguments.out.resolve()
    os.chdir(ROOT)
    process.adopt_orphans()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        # As an exception, so that the stage that runs is ended too.
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    names, budget_s = PARTS[arguments.part]
    card = look(arguments.python)
    try:
        proof = Proof(card, arguments)
    except OSError as error:
        sys.exit(f"fastlars: {arguments.out} cannot be written: {error}")
    facts = (card.name, f"driver {card.driver}", f"torch {card.torch}", f"sources {proof.sources}")
    print(", ".join(facts), flush=True)
    return proof.run(names, arguments.seconds or budget_s)


if __name__ == "__main__":
    sys.exit(main())
