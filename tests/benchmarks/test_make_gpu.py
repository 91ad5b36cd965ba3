"""`make gpu` with a stand-in for the GPU: a Python that answers for the card, and whose stages
pass, fail, crash, hang or are slow as a test says."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_proof import card, stages
from repository_files import ROOT, files

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
CARD = {
    "name": "Stand-in 9000",
    "count": 1,
    "archs": ["90"],
    "torch": "2.11.0",
    "cuda": "13.0",
    "python": "3.12.3",
    "cores": 16,
    "plugins": ["xdist", "pytest_timeout"],
    "trainer_lacks": [],
}
# The driver itself and the look at the card are real, or answered; stages do as they are told.
STAND_IN = """#!{python}
import json, os, sys, time
import signal
arguments = sys.argv[1:]
if arguments[:2] == ["-m", "benchmarks.gpu_proof"]:
    os.execv({python!r}, [{python!r}, *arguments])
if arguments[0] == "-c":
    print(json.dumps({card}))
    sys.exit()
stage = os.environ["GPU_STAGE"]
what = json.loads(os.environ["STAND_IN"]).get(stage, "pass")
print("ran:", *arguments)
print("variables:", *(n for n in os.environ if n.startswith(("FASTLARS", "TRITON", "PYTEST"))))
print("with:", os.environ.get("FASTLARS_CUDA_ARCHS"), os.environ["FASTLARS_GPU_FOLDER"])
if what == "hang":
    def waits_for_the_device():
        time.sleep(1000)
    waits_for_the_device()
elif what == "crash":
    os.kill(os.getpid(), signal.SIGSEGV)
elif what == "fail":
    sys.exit("tensor 3 differs")
elif what == "skip":
    print("ncu was not found")
    sys.exit(77)
elif what == "slow":
    time.sleep(1)
elif what == "leaves a process":
    os.fork() or time.sleep(1000)
elif what == "starts a session":
    import subprocess
    code = "import time; time.sleep(1000)"
    subprocess.Popen([{python!r}, "-c", code, sys.argv[0] + " sleeps"], start_new_session=True)
    time.sleep(1000)
elif what == "half a report":
    print("[gw0] [ 50%] PASSED tests/test_it.py::a ")
    with open(os.path.join(os.environ["FASTLARS_GPU_FOLDER"], "tests.xml"), "w") as report:
        report.write("<testsuites><te")
    sys.exit(1)
with open(os.path.join(os.environ["FASTLARS_GPU_FOLDER"], stage + ".md"), "w") as page:
    page.write("| figure |\\n|---|\\n| of " + stage + " |\\n")
"""


class StandIn:
    """`make gpu` and its parts with the stand-in."""

    def __init__(self, folder: Path) -> None:
        self.out = folder / "out"
        self.python = folder / "python"
        self.python.write_text(STAND_IN.format(python=sys.executable, card=CARD))
        self.python.chmod(0o755)

    def make(self, part: str, *options: str, **told: str) -> tuple[int, str]:
        """A target of make: the exit status, and what is printed."""
        variables = [f"PYTHON={self.python}", f"GPU_OUT={self.out}"]
        return self._run(["make", "-s", part, *variables, *options], told)

    def run(self, part: str, *options: str, **told: str) -> tuple[int, str]:
        """The same without make, with options that make has no variable for."""
        return self._run(self.command(part, *options), told)

    def command(self, part: str, *options: str) -> list[str]:
        program = [sys.executable, "-m", "benchmarks.gpu_proof", part, f"--python={self.python}"]
        return [*program, f"--out={self.out}", *options]

    def environment(self, told: dict[str, str]) -> dict[str, str]:
        # The tests may run inside of another make, whose variables would be taken over.
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
        return {**kept, "STAND_IN": json.dumps(told), "PYTHONPATH": str(ROOT)}

    def _run(self, command: list[str], told: dict[str, str]) -> tuple[int, str]:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=self.environment(told),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
        )
        return done.returncode, done.stdout

    def left_over(self) -> list[str]:
        """Processes of stages, and what those have started."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):  # ended meanwhile
                found.append(path.read_text().replace("\0", " "))
        ours = (f"{self.python} -m benchmarks.gpu_proof.", f"{self.python} sleeps")
        return [line for line in found if any(own in line for own in ours)]

    @property
    def page(self) -> str:
        return (self.out / "stand-in-9000.md").read_text()

    def log(self, stage: str) -> str:
        return (self.out / "stand-in-9000" / f"{stage}.log").read_text()

    def record(self, stage: str) -> dict[str, str]:
        return json.loads((self.out / "stand-in-9000" / f"{stage}.json").read_text())


def _passed(said: str) -> list[str]:
    """The stages that have run now, and passed."""
    return re.findall(r"^(\S+) +\d+\.\d s  passed$", said, re.MULTILINE)


@pytest.fixture
def stand_in(tmp_path: Path) -> StandIn:
    return StandIn(tmp_path)


def test_all_stages_in_the_order_in_which_most_is_learned(stand_in: StandIn) -> None:
    status, said = stand_in.make("gpu")
    assert status == 0, said
    assert _passed(said) == [
        *("build", "check", "rows", "grid", "paths", "tests", "sanitizer", "counters"),
        "first-step",
        *(f"bench-{model}" for model in stages.MODELS),
    ]
    assert said.startswith("Stand-in 9000, driver ")
    assert said.endswith("out/stand-in-9000.md\n")
    assert "with: 90 " in stand_in.log("build")
    assert "of compute capability 90" in stand_in.page
    assert "| of grid |" in stand_in.page


def test_one_that_hangs_says_where_and_ends(stand_in: StandIn) -> None:
    status, said = stand_in.run("first", "--limit=3", rows="hang")
    assert status == 1
    assert re.search(
        r"^rows +\d+\.\d s  did not end within 3 s; File .* in waits_for_the_device$",
        said,
        re.MULTILINE,
    )
    assert re.search(r"^paths +\d+\.\d s  passed$", said, re.MULTILINE)
    assert "in waits_for_the_device" in stand_in.log("rows")
    assert "in waits_for_the_device" in stand_in.page
    assert stand_in.record("rows")["status"] == "hung"


@pytest.mark.parametrize(
    ("what", "words"),
    [("crash", "was ended by SIGSEGV"), ("fail", "failed with status 1; tensor 3 differs")],
)
def test_one_that_fails_takes_none_from_the_next(what: str, words: str, stand_in: StandIn) -> None:
    status, said = stand_in.run("first", check=what, grid=what)
    assert status == 1
    assert _passed(said) == ["build", "rows", "paths"]
    for stage in ("check", "grid"):
        assert re.search(rf"^{stage} +\d+\.\d s  {words}", said, re.MULTILINE)
    assert stand_in.page.count(f"| {words.split(';')[0]} |") == 2


def test_without_a_build_nothing_else_is_tried(stand_in: StandIn) -> None:
    status, said = stand_in.run("first", build="fail")
    assert status == 1
    assert "Nothing else can be tried without a build." in said
    assert "Not run yet: check, rows" in stand_in.page


def test_what_is_missing_is_skipped_with_its_reason(stand_in: StandIn) -> None:
    status, said = stand_in.run("counters", counters="skip")
    assert status == 0
    assert "skipped: ncu was not found" in said
    assert "skipped: ncu was not found" in stand_in.page


def test_what_is_done_is_passed_over_and_the_rest_goes_on(stand_in: StandIn) -> None:
    slow = dict.fromkeys(("check", "rows", "grid", "paths"), "slow")
    status, said = stand_in.run("first", "--seconds=4", **slow)
    assert status == 0
    left = re.search(r"The 4 s are over\. Left for the next call: (.*)$", said, re.MULTILINE)
    assert left is not None
    assert "Not run yet: " in stand_in.page
    known = [stage for stage in stages.PARTS["first"][0] if stage not in left[1]]
    status, said = stand_in.run("first")
    assert status == 0
    assert re.findall(r"^(\S+) +known: passed, 20", said, re.MULTILINE) == known
    assert _passed(said) == left[1].split(", ")
    # A failure is an answer too, and stays one; other sources, or --again, ask anew.
    assert stand_in.run("first", "--again=grid", grid="fail")[0] == 1
    status, said = stand_in.run("first")
    assert status == 1
    assert "grid             known: failed with status 1" in said
    path = stand_in.out / "stand-in-9000" / "grid.json"
    path.write_text(path.read_text().replace(stand_in.record("grid")["sources"], "0" * 12))
    status, said = stand_in.run("first", "--again=rows", rows="fail")
    assert status == 1
    assert _passed(said) == ["grid"]


def test_a_stage_that_the_budget_ended_has_no_answer_yet(stand_in: StandIn) -> None:
    status, said = stand_in.run("first", "--seconds=8", grid="hang")
    assert status == 0
    assert "The 8 s are over. Left for the next call: grid, paths" in said
    assert "| was ended after " in stand_in.page
    assert stand_in.record("grid")["status"] == "unfinished"
    status, said = stand_in.run("first")
    assert status == 0
    assert _passed(said) == ["grid", "paths"]


def test_the_page_says_which_results_are_of_other_sources(stand_in: StandIn) -> None:
    assert stand_in.run("first")[0] == 0
    path = stand_in.out / "stand-in-9000" / "grid.json"
    path.write_text(path.read_text().replace(stand_in.record("grid")["sources"], "0" * 12))
    assert stand_in.run("counters")[0] == 0
    (line,) = [line for line in stand_in.page.splitlines() if line.startswith("| grid |")]
    assert "passed, of other sources (" in line
    assert stand_in.page.count("of other sources") == 1


def test_nothing_that_a_stage_has_left_running_stays(stand_in: StandIn) -> None:
    assert stand_in.run("first", rows="leaves a process")[0] == 0
    assert stand_in.left_over() == []


def test_a_process_in_a_session_of_its_own_is_ended_too(stand_in: StandIn) -> None:
    status, _ = stand_in.run("first", "--limit=3", rows="hang", grid="starts a session")
    assert status == 1
    assert stand_in.left_over() == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_driver_ends_the_stage(number: int, stand_in: StandIn) -> None:
    process = subprocess.Popen(
        stand_in.command("first"), cwd=ROOT, env=stand_in.environment({"rows": "hang"}),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not stand_in.left_over() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert stand_in.left_over() == []
    assert "Traceback" not in said
    assert "Not run yet: rows, grid" in stand_in.page


def test_variables_of_the_shell_do_not_reach_the_stages(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FASTLARS_BACKEND", "FASTLARS_CHECK", "TRITON_INTERPRET", "PYTEST_ADDOPTS"):
        monkeypatch.setenv(name, "7")
    assert stand_in.run("first")[0] == 0
    assert "variables: FASTLARS_GPU_FOLDER\n" in stand_in.log("check")


def test_other_arguments_are_another_question(stand_in: StandIn) -> None:
    assert stand_in.run("bench", "--", "-k", "two-launch")[0] == 0
    status, said = stand_in.run("bench")
    assert status == 0
    assert _passed(said) == [f"bench-{model}" for model in stages.MODELS]
    assert "build            known" in said


def test_damaged_files_are_no_obstacle(stand_in: StandIn) -> None:
    assert stand_in.run("test", tests="half a report")[0] == 1
    assert "Before pytest was ended: 1 passed." in stand_in.page
    folder = stand_in.out / "stand-in-9000"
    for text in ("", "{", "[]", "null", '{"seconds": null}', '{"card": {}}'):
        (folder / "sanitizer.json").write_text(text)
        _, said = stand_in.run("test")
        assert "sanitizer" in _passed(said), text


def test_an_output_that_cannot_be_written_is_said_in_one_line(stand_in: StandIn) -> None:
    stand_in.out.write_text("a file")
    status, said = stand_in.run("first")
    assert status == 1
    assert re.fullmatch(r"fastlars: .*/out cannot be written: .*\n", said)


def test_arguments_of_pytest_reach_tests_and_benchmarks(stand_in: StandIn) -> None:
    assert stand_in.make("gpu-bench", "PYTEST_ARGS=-k two-launch")[0] == 0
    first = stand_in.log("bench-resnet50").splitlines()[0]
    assert first == "ran: -m benchmarks.gpu_proof.bench resnet50 -k two-launch"


# The stages themselves.


def _card(**others: object) -> card.Card:
    return card.Card(**{**CARD, **others})  # type: ignore[arg-type]


def _tests(**others: object) -> tuple[str, ...]:
    every = {stage.name: stage for stage in stages.stages(_card(**others), Path("out"), ["--last"])}
    return every["tests"].arguments


def test_every_test_that_needs_a_gpu_is_run() -> None:
    arguments = _tests()
    ran = {word for word in arguments if word.endswith(".py")}
    named = (path for path in files("tests", suffixes=(".py",)) if "/test_" in path)
    marked = {p for p in named if re.search(r'mark\.gpu|marks\("', (ROOT / p).read_text())}
    assert ran == marked
    # without it a machine that lacks the trainer's packages would be found wrong too
    assert {Path(path).parent.name for path in ran} > {"distributed", "trainer"}
    assert arguments[-1] == "--last"
    assert "-m gpu " in " ".join(arguments)


def test_without_the_packages_of_the_others_the_back_ends_are_tested() -> None:
    arguments = _tests(trainer_lacks=["torchvision"], plugins=[])
    folders = {Path(word).parent.name for word in arguments if word.endswith(".py")}
    assert folders == {"backends", "cuda", "optim"}
    assert "--timeout" not in arguments
    assert "-n" not in arguments


def test_parts_have_the_time_that_is_promised_and_together_all_stages() -> None:
    assert (stages.PARTS["all"][1], stages.PARTS["first"][1]) == (600, 240)
    every = stages.stages(_card(), Path("out"), [])
    assert set(stages.PARTS["all"][0]) == {stage.name for stage in every}


@pytest.mark.parametrize(
    ("python", "expected"),
    [
        ("bare", r"fastlars: .* lacks torch, .*pybind11.*; make PYTHON=/path/to/python3 gpu"),
        ("ours", r"fastlars: torch .* sees no CUDA device here"),
        ("none", r"fastlars: .*none was not found; choose a Python with make PYTHON="),
    ],
)
def test_what_is_missing_is_said_in_one_line(python: str, expected: str, stand_in: StandIn) -> None:
    if python == "bare":
        stand_in.python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    elif python == "none":
        stand_in.python = stand_in.python.with_name("none")
    elif torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    else:
        stand_in.python = Path(sys.executable)
    status, said = stand_in.make("gpu")
    assert status != 0
    first, last = said.splitlines()
    assert re.match(expected, first), first
    assert last.startswith("make: ***")
    assert not stand_in.out.exists()
