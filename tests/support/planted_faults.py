"""Twelve faults, planted one at a time in a copy of the checkout: do the tests still find each?

    python tests/support/planted_faults.py [NAME ...] [-- ARGUMENTS OF PYTEST]
    python tests/support/planted_faults.py --list

Without names, the tests run once without a fault ("none"), which they must pass, then with each.
Without arguments of pytest they are those of `make test`. The script prints which test found a
fault, and after how many seconds. The exit status is 1 where a fault was not found, or where the
sources do not have its place exactly once.

The checkout must have the extension built, and is not changed. Where a fault is in a source of the
extension, the copy's is built anew, without CUDA; the tests compile csrc/cuda for the CPU.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from building import output, run
from repository_files import ROOT

FAST = ("-n", "2", "--dist", "loadgroup", "--benchmark-disable", "-m", "not slow")  # `make test`
# It would find every fault, because the text that it looks for is gone.
LEFT_OUT = "tests/package/test_planted_faults.py"
LONGEST = 3600.0  # seconds


@dataclass(frozen=True)
class Fault:
    """A slip as a programmer may make it: in a file, `new` stands where `old` should."""

    slip: str
    file: str
    old: str
    new: str

    def planted(self, root: Path) -> str:
        """The file below `root` with the fault in it; ValueError unless it has one place there."""
        text = (root / self.file).read_text()
        if text.count(self.old) != 1:
            raise ValueError(f"{self.file} has {text.count(self.old)} times {self.old!r}")
        return text.replace(self.old, self.new)


FAULTS = {
    "cpu": Fault(
        "squares of gradients that leave float32's range are not summed again in double",
        "csrc/cpu/sums.h",
        "for (const double sum : found->of) in_range = in_range && !leaves_float_range(sum);",
        "in_range = !leaves_float_range(found->of[0]);",
    ),
    "cuda": Fault(
        "a slot of shared memory counts as valid after it was written again",
        "csrc/cuda/schedule.cuh",
        "turn.in_shared = pushed_ - popped_ <= args_.shared_slots;",
        "turn.in_shared = true;",
    ),
    "triton": Fault(
        "the clip of the trust ratio divides by a learning rate of 0",
        "fastlars/backends/triton/lars.py",
        "q / tl.where(positive, scalars.lr, double(1.0)), double(1.0))",
        "q / scalars.lr, q / scalars.lr)",
    ),
    "trust": Fault(
        "a norm that is no number passes the guard against zeros",
        "csrc/rules/common.h",
        "if (!(weight > 0.0 && update > 0.0)) return 1.0;",
        "if (weight == 0.0 || update == 0.0) return 1.0;",
    ),
    "layout": Fault(
        "the stride of the last dimension is not compared",
        "csrc/layout.h",
        "for (int d = 0; d < tensor.ndim; ++d) {",
        "for (int d = 0; d + 1 < tensor.ndim; ++d) {",
    ),
    "state dict": Fault(
        "a loaded state keeps the type that it has in the file",
        "fastlars/optim/checkpoint.py",
        "copy_with_layout(p, whole, types[name])",
        "copy_with_layout(p, whole, value.dtype)",
    ),
    "conventions": Fault(
        "optax's momentum buffer is thought to hold no learning rate",
        "fastlars/conventions.py",
        '{"ratio": "combined", "buffer": "step", "momentum": 0.9}',
        '{"ratio": "combined", "buffer": "scaled", "momentum": 0.9}',
    ),
    "overlap": Fault(
        "compressed averages are not copied back for a step that clips",
        "fastlars/distributed/engine.py",
        'if in_flight is not None and self._early_work == "step" and kept.steps_all():',
        "if in_flight is not None and kept.steps_all():",
    ),
    "sharded": Fault(
        "replicas are counted as if they were other shards",
        "fastlars/optim/dtensor.py",
        "if size > 1 and not place.is_replicate())",
        "if size > 1)",
    ),
    "recipe": Fault(
        "a batch that has a row takes the row before it",
        "fastlars/trainer/config/recipes.py",
        "if row.batch <= batch]",
        "if row.batch < batch]",
    ),
    "checkpoint": Fault(
        "what was summed since the last line of the log is lost",
        "fastlars/trainer/run/journal.py",
        'self.meter.sums.copy_(state["window"])',
        "self.meter.reset()",
    ),
    "images": Fault(
        "of 16 bits of grey the lower eight are taken",
        "fastlars/trainer/data/decode.py",
        "(np.array(image) >> (bits - 8))",
        "(np.array(image) & 255)",
    ),
}


def copy_checkout(root: Path) -> None:
    """The tracked files as they are now, and the built extension."""
    tracked = output("git", "ls-files", "-z", cwd=ROOT).rstrip("\0").split("\0")
    built = [str(path.relative_to(ROOT)) for path in ROOT.glob("fastlars/_C*.so")]
    if not built:
        sys.exit("there is no extension fastlars/_C*.so to copy: build it with make setup")
    for path in [*tracked, *built]:
        if path != LEFT_OUT and (ROOT / path).exists():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / path, root / path)


def compile_extension(root: Path) -> None:
    """As CONTRIBUTING.md says."""
    hints = output(sys.executable, "-m", "pybind11", "--cmakedir").strip()
    found = (f"-Dpybind11_DIR={hints}", f"-DPython_EXECUTABLE={sys.executable}", "-G", "Ninja")
    output("cmake", "-S", root / "csrc", "-B", root / "build/dev", *found, FASTLARS_CUDA="0")
    output("cmake", "--build", root / "build/dev", timeout=LONGEST)
    for built in root.glob("build/dev/_C*.so"):
        shutil.copy2(built, root / "fastlars")


def failures(root: Path, arguments: list[str]) -> list[str]:
    """The tests that fail there."""
    code = "import fastlars; print(fastlars.__file__)"
    imported = output(sys.executable, "-c", code, cwd=root, PYTHONPATH=str(root)).strip()
    assert Path(imported).is_relative_to(root), imported
    command = (sys.executable, "-m", "pytest", "-x", *arguments)
    done = run(*command, cwd=root, timeout=LONGEST, PYTHONPATH=str(root))
    failed = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    assert failed or done.returncode == 0, done.stdout[-4000:]
    return failed


def as_expected(name: str, arguments: list[str]) -> bool:
    """Whether a test fails with the fault of this name, and none without a fault."""
    fault, start = FAULTS.get(name), time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fastlars-") as folder:
        root = Path(folder).resolve()
        copy_checkout(root)
        if fault is not None:
            (root / fault.file).write_text(fault.planted(root))
            if fault.file.startswith("csrc/") and not fault.file.startswith("csrc/cuda/"):
                compile_extension(root)
        ready = time.perf_counter()
        failed = failures(root, arguments)
    words = ("NOT FOUND", "found") if fault is not None else ("right", "WRONG")
    times = f"{time.perf_counter() - ready:.0f} s, and {ready - start:.0f} s to make the copy"
    print(f"{name}: {words[bool(failed)]} ({times})", *failed, sep="\n    ", flush=True)
    return bool(failed) == (fault is not None)


def main() -> int:
    given = sys.argv[1:]
    cut = given.index("--") if "--" in given else len(given)
    parser = argparse.ArgumentParser(usage="planted_faults.py [--list] [NAME ...] [-- PYTEST ARGS]")
    parser.add_argument("names", nargs="*", metavar="NAME", help='of a fault, or "none"')
    parser.add_argument("--list", action="store_true", help="print the faults, and run nothing")
    options = parser.parse_args(given[:cut])
    if not {"none", *FAULTS}.issuperset(options.names):
        parser.error(f"the faults are {', '.join(FAULTS)}")
    for name, fault in FAULTS.items():
        fault.planted(ROOT)
        if options.list:
            print(f"{name:12}{fault.file}: {fault.slip}")
    if options.list:
        return 0
    names, arguments = options.names or ["none", *FAULTS], given[cut + 1 :] or list(FAST)
    return int(any([not as_expected(name, arguments) for name in names]))  # noqa: C419 - try all


if __name__ == "__main__":
    sys.exit(main())
