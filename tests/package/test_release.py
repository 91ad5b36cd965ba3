"""What a release is made with: one list of Pythons, one version, actions that cannot be moved."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from pathlib import Path

import pytest

from building import output, run
from repository_files import ROOT

PYPROJECT = (ROOT / "pyproject.toml").read_text()
WORKFLOW = (ROOT / ".github/workflows/release.yml").read_text()
LOCK = (ROOT / "requirements.lock").read_text()
(VERSION,) = re.findall(r'^version = "(.*)"', PYPROJECT, re.M)


def one(pattern: str, text: str) -> str:
    (found,) = re.findall(pattern, text, re.M)
    return str(found)


def test_the_pythons_are_the_same_everywhere() -> None:
    supported = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PYPROJECT)
    assert one(r'^requires-python = ">=(.*)"', PYPROJECT) == supported[0]
    short = ["cp" + python.replace(".", "") for python in supported]
    assert re.findall(r'"(cp\d+)-\*"', one(r"^build = \[(.*)\]", PYPROJECT)) == short
    wheels, tries = re.findall(r"^ +python: \[(.*)\]", WORKFLOW, re.M)
    assert wheels.split(", ") == short
    assert re.findall(r'"(.*?)"', tries) == supported


def test_the_oldest_torch_is_tried() -> None:
    oldest = one(r'^    "torch>=(.*)"', PYPROJECT)
    assert f'torch: ["=={oldest}.*", ">={oldest}"]' in WORKFLOW


def test_wheels_have_cuda_of_the_release_that_is_installed() -> None:
    release = one(r"install-nvcc (\S+)\"", PYPROJECT)
    assert one(r'^CUDACXX = "(.*)"', PYPROJECT) == f"/usr/local/cuda-{release}/bin/nvcc"
    assert one(r'^FASTLARS_CUDA = "(.*)"', PYPROJECT) == "1", "a wheel without kernels is no error"


def test_every_repair_leaves_libgomp_to_torch() -> None:
    makers = ["pyproject.toml", "Makefile", ".ci/wheels.py"]
    text = re.sub(r"\W+", " ", "".join((ROOT / path).read_text() for path in makers))
    repairs = re.findall(r"auditwheel repair (\w+ \w+ \w+ \w+)", text)
    assert repairs == ["exclude libgomp so 1"] * 3


def test_wheels_are_built_and_tried_on_the_same_machines() -> None:
    builds, tries = re.findall(r"^ +machine: \[(.*)\]", WORKFLOW, re.M)
    assert builds == tries == "ubuntu-24.04, ubuntu-24.04-arm"
    assert WORKFLOW.count("runs-on: ${{ matrix.machine }}") == 2
    images = re.findall(r'^manylinux-(\w+)-image = "(.*)"', PYPROJECT, re.M)
    assert images == [(machine, "manylinux_2_28") for machine in ("x86_64", "aarch64")]
    assert '*manylinux_2_28_"$(uname -m)".whl' in WORKFLOW


@pytest.mark.parametrize(("machine", "repository"), [("x86_64", "x86_64"), ("aarch64", "sbsa")])
def test_nvcc_comes_from_the_repository_of_the_machine(
    tmp_path: Path, machine: str, repository: str
) -> None:
    for name, says in (("uname", f"echo {machine}"), ("curl", 'echo "$@"'), ("dnf", 'echo "$@"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{says}\n")
        (tmp_path / name).chmod(0o755)
    bash, nvcc = shutil.which("bash"), "99.9"  # a release that no machine has
    assert bash is not None
    done = run(bash, ROOT / ".ci/install-nvcc", nvcc, PATH=f"{tmp_path}:/usr/bin:/bin")
    assert f"/compute/cuda/repos/rhel8/{repository}/cuda-rhel8.repo" in done.stdout
    assert "cuda-nvcc-99-9" in done.stdout


def test_tools_have_the_versions_of_the_lock() -> None:
    pins = output(ROOT / ".ci/pins").splitlines()
    assert pins == [line.strip() for line in re.findall(r"^([\w.-]+==[^\\]*)\\$", LOCK, re.M)]
    assert re.findall(r"pip install (.*)", WORKFLOW) == [
        "build twine",  # with PIP_CONSTRAINT, see below
        '"torch$TORCH" --index-url https://download.pytorch.org/whl/cpu',  # the oldest, the newest
        '-c "$RUNNER_TEMP/pins.txt" numpy pytest twine',
    ]
    assert {"build", "twine", "numpy", "pytest"} <= {pin.split("==")[0] for pin in pins}
    assert re.findall(r"pipx run (\S+)", WORKFLOW) == [one(r"(cibuildwheel==[\d.]+) ", WORKFLOW)]
    assert "PIP_CONSTRAINT: ${{ runner.temp }}/pins.txt" in WORKFLOW
    (written,) = re.findall(
        r'^before-all = "bash \{project\}/.ci/pins > (\S+) && ', PYPROJECT, re.M
    )
    assert f'\nPIP_CONSTRAINT = "{written}"' in PYPROJECT


@pytest.mark.parametrize("status", [0, 1])
def test_make_wheels_says_which_check_failed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: int
) -> None:
    spec = importlib.util.spec_from_file_location("wheels", ROOT / ".ci/wheels.py")
    assert spec is not None
    assert spec.loader is not None
    wheels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(wheels)
    home = tmp_path / "environment"

    def outcome(*command: str | Path, **_: object) -> tuple[int, str]:
        home.mkdir(exist_ok=True)
        if "check" in command:
            return status, "\n7 of 9 combinations of rule and types agree with the reference.\n1 s"
        return 0, "a warning\n3.12.1|2.10.0|GNU 12.2.0|none"

    monkeypatch.setattr(wheels, "run", outcome)
    row, good = wheels.check("python3.12", "2.10.*", tmp_path / "a.whl", "", home)
    agreed = "7 of 9 combinations of rule and types agree with the reference."
    assert row == f"| 3.12.1 | 2.10.0 | GNU 12.2.0 | none | {agreed} | status {status} |"
    assert good == (status == 0)
    assert not home.exists()


def test_actions_are_named_by_commit() -> None:
    used = re.findall(r"uses: (\S+)(.*)", WORKFLOW)
    assert used
    for action, comment in used:
        assert re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", action), action
        assert re.fullmatch(r" # v[\d.]+", comment), f"{action}: which release is that?"


def test_documents_speak_of_this_version() -> None:
    readme = (ROOT / "README.md").read_text()
    assert set(re.findall(r"State of (\d+\.\d+\.\d+)", readme)) <= {VERSION}


@pytest.mark.parametrize(
    ("tag", "section", "answer"),
    [
        (f"v{VERSION}", f"## {VERSION} (2026-11-21)", ""),
        (VERSION, f"## {VERSION} (2026-11-21)", f"the tag {VERSION} does not name the version"),
        (
            "v99.0.0",
            "## 99.0.0 (2026-11-21)",
            f"does not name the version of pyproject.toml, {VERSION}",
        ),
        (
            f"v{VERSION}",
            "## Unreleased",
            f"CHANGELOG.md has no section '## {VERSION} (YYYY-MM-DD)'",
        ),
    ],
)
def test_a_tag_that_is_not_the_version_stops_the_release(
    tmp_path: Path, tag: str, section: str, answer: str
) -> None:
    (tmp_path / ".ci").mkdir()
    shutil.copy2(ROOT / ".ci/version.py", tmp_path / ".ci")
    shutil.copy2(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n{section}\n")
    done = run(sys.executable, tmp_path / ".ci/version.py", tag)
    assert (done.returncode == 0) == (not answer)
    assert answer in done.stdout
