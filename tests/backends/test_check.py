"""``python -m fastlars check``: its table, its exit status, and back ends that are wrong, that end
their process, that never come back."""

from __future__ import annotations

import re
import sys
import time

import pytest
import torch

from fastlars import check
from fastlars.__main__ import main as fastlars_main
from fastlars.backends import choose
from subprocess_tests import python

CPU = torch.device("cpu")
# In place of the process of a back end, which would take its time to start.
STAND_IN = """
import os, signal, sys, time
with open(sys.argv[2], "a") as out:
    for number in range(int(sys.argv[1]), 252):
        wrong = ""
        {plant}
        print(wrong, file=out, flush=True)
"""
WRONG = "weight 0 [1] is 2 instead of 1 (1 of 2 wrong)"
PLANTS = {
    "talks": "os.write(1, b'50%... ' + bytes([255])); os.write(2, bytes([255]))",
    "wrong": f"wrong = {WRONG!r} * (number in (3, 70, 220))",
    "all wrong": f"wrong = {WRONG!r}",
    "killed": "if number == 3: os.kill(os.getpid(), signal.SIGSEGV)",
    "always killed": "os.kill(os.getpid(), signal.SIGSEGV)",
    "ended": "if number == 3: sys.exit('CUDA error: an illegal memory access was encountered')",
    "hangs": "if number == 3: time.sleep(1000)",
    "leaves a process": "if number == 3: os.fork() or time.sleep(1000); time.sleep(1000)",
    "never begins": "time.sleep(1000)",
}


@pytest.fixture
def planted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    code = STAND_IN.format(plant=PLANTS[request.param])

    def command(trial: check.Trial, results: str) -> list[str]:
        return [sys.executable, "-c", code, str(len(trial.results)), results]

    monkeypatch.setattr(check, "command", command)
    monkeypatch.setattr(check, "devices", lambda: [CPU])


def _plant(what: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("planted", [what], indirect=True)


def _said(capsys: pytest.CaptureFixture[str], status: int) -> str:
    assert check.main() == status
    return capsys.readouterr().out


def test_the_back_ends_of_this_machine_are_right(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["fastlars", "check"])
    # Other tests may take the cores.
    monkeypatch.setattr(check, "SILENCE_LIMIT_S", 300.0)
    monkeypatch.setattr(check, "LIMIT_S", 300.0)
    status, said = fastlars_main(), capsys.readouterr().out
    assert status == 0, said
    assert re.search(r"^cpu +cpu( +72 of 72){3} +36 of 36$", said, re.MULTILINE)
    assert re.search(r"^(\d+) of \1 combinations of rule and types agree", said, re.MULTILINE)


def test_other_words_are_refused() -> None:
    done = python("-m", "fastlars", "chekc")
    assert done.returncode == 2
    assert "invalid choice: 'chekc'" in done.stdout


@_plant("talks")
@pytest.mark.usefixtures("planted")
def test_what_others_print_is_not_taken_for_a_result(capsys: pytest.CaptureFixture[str]) -> None:
    assert "252 of 252 combinations" in _said(capsys, 0)


@_plant("wrong")
@pytest.mark.usefixtures("planted")
def test_what_is_wrong_is_listed_with_what_to_set(capsys: pytest.CaptureFixture[str]) -> None:
    said = _said(capsys, 1)
    assert "cpu       cpu     70 of 72, 2 WRONG  72 of 72  72 of 72  35 of 36, 1 WRONG" in said
    assert f"  LARS, float32 weights, bfloat16 gradients, bfloat16 states: {WRONG}\n" in said
    assert "cpu: set FASTLARS_BACKEND=reference" in said
    assert "249 of 252 combinations" in said


@_plant("all wrong")
@pytest.mark.usefixtures("planted")
def test_a_long_list_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    said = _said(capsys, 1)
    assert said.count("weight 0 [1]") == 5
    assert "  and 247 more" in said


@pytest.mark.parametrize(
    ("planted", "expected"),
    [
        ("killed", "the process ended with status -11"),
        ("ended", "with status 1: CUDA error: an illegal memory access was encountered"),
        ("hangs", "took longer than 6 s"),
        ("leaves a process", "took longer than 6 s"),
    ],
    indirect=["planted"],
)
@pytest.mark.usefixtures("planted")
def test_one_that_never_answers_costs_one_combination(
    expected: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Far above what the start of a process takes, next to other tests too.
    monkeypatch.setattr(check, "SILENCE_LIMIT_S", 6.0 if expected.startswith("took") else 100.0)
    monkeypatch.setattr(check, "LIMIT_S", 300.0)
    said = _said(capsys, 1)
    assert expected in said
    assert "251 of 252 combinations" in said
    assert "71 of 72, 1 WRONG" in said


@_plant("always killed")
@pytest.mark.usefixtures("planted")
def test_processes_that_all_end_are_not_started_for_ever(
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = _said(capsys, 1)
    assert "0 of 3 combinations" in said
    assert "0 of 72, 3 WRONG, 69 not reached" in said
    assert "249 more were not reached" in said


@_plant("hangs")
@pytest.mark.usefixtures("planted")
def test_the_command_ends_in_time(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "LIMIT_S", 6.0)
    start = time.monotonic()
    said = _said(capsys, 0)
    assert time.monotonic() - start < 60
    assert "more were not reached" in said


@_plant("never begins")
@pytest.mark.usefixtures("planted")
def test_one_of_which_nothing_is_known_is_not_right(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "LIMIT_S", 0.5)
    said = _said(capsys, 1)
    assert "nothing was known after 0 s" in said
    assert said.endswith("cpu: set FASTLARS_BACKEND=reference\n")


def _trial(backend: str, path: str, device: str, *found: str) -> check.Trial:
    return check.Trial(backend, path, torch.device(device), results=list(found))


def test_advice_names_the_fastest_back_end_that_is_right() -> None:
    two, one = (_trial("cuda", path, "cuda:0", "", "off") for path in ("two-launch", "one-launch"))
    triton, cpu = _trial("triton", "", "cuda:0", ""), _trial("cpu", "", "cpu", "")
    assert check.advice([cpu, two, one, triton]) == ["cuda:0: set FASTLARS_BACKEND=triton"]
    one.results[1] = ""
    setting = "cuda:0: set FASTLARS_BACKEND=cuda FASTLARS_CUDA_PATH=one-launch"
    assert check.advice([cpu, two, one, triton]) == [setting]
    two.results[1] = ""
    assert check.advice([cpu, two, one, triton]) == []
    for trial in (two, one, triton):
        trial.results[0] = "off"
    assert check.advice([two, one, triton]) == ["cuda:0: set FASTLARS_BACKEND=reference"]


def test_back_ends_that_are_not_here_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(choose.COMPILED, "cpu", ("cpu", "cuda", "triton"))
    monkeypatch.setattr(check, "devices", lambda: [CPU])
    every = check.trials()
    assert [trial.name for trial in every] == ["cpu", "cuda", "triton"]
    lines = check.table(every)
    assert re.fullmatch(r"cuda +cpu +not here: \S.*", lines[2])
    assert lines[3].endswith(
        "not here: Triton serves cpu in its interpreter alone (TRITON_INTERPRET=1)"
    )


def test_combinations_cover_each_type_in_each_place() -> None:
    for backend in ("cpu", "cuda", "triton"):
        every = [checked for _, checked in check.combinations(backend)]
        dtypes = {checked.dtypes for checked in every}
        for place in ("weight", "grad"):
            assert {getattr(k, place) for k in dtypes} == {
                torch.float32,
                torch.bfloat16,
                torch.float16,
            }
        assert {k.copy for k in dtypes} == {None, torch.bfloat16, torch.float16}
        assert {k.state for k in dtypes} == {torch.float32, torch.bfloat16}
        assert {checked.rounds for checked in every} == {False, True}
        assert len(set(every)) == len(every)
