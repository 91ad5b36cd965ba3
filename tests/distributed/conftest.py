"""A run of the trainer that nothing disturbed, which disturbed ones are compared with."""

from __future__ import annotations

from pathlib import Path

import pytest

from distributed.torchrun import SETTINGS, TRAINER, TWO, finish, start


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of two processes on one host."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run, log = folder / "run", folder / "log"
    status = finish(start(TRAINER, *SETTINGS, "--output", run, launch=TWO, log=log))
    assert status == 0, log.read_text()
    return run
