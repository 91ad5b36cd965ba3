"""One optimizer step on a GPU: fastlars, path by path, against everything else there is.

All contenders of a case run in the same rounds, in this process, each with a cold cache; a copy
runs among them. Times are the device's; ``host_ms`` is what it takes to enqueue a step.
pytest-benchmark's own columns time a step with the wait for it, and a warm cache; ``extra_info``
has the rest, which report.py tabulates.
"""

from __future__ import annotations

import gc
import importlib.metadata
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.machine import Gpu
from benchmarks.step.cases import GPU_CASES, gpu_contenders
from benchmarks.step.comparison import Comparison, UnavailableError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
ROWS = [
    pytest.param(case, name, id=f"{case}-{name}".replace(" ", "_"))
    for case in GPU_CASES
    for name in gpu_contenders(case)
]


@pytest.fixture(scope="module")
def gpu() -> Gpu:
    return Gpu()


@pytest.fixture(scope="module")
def compared(request: pytest.FixtureRequest, gpu: Gpu) -> Iterator[Comparison]:
    """A case, measured once for all of its rows, which follow each other."""
    # Of -k and --model too: a contender whose row is left out takes no turn either.
    rows = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    names = {row["name"] for row in rows if row.get("compared") == request.param}
    comparison = Comparison(request.param, gpu, wanted=names.__contains__).run()
    yield comparison
    comparison.calls.clear()
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.parametrize(("compared", "name"), ROWS, indirect=["compared"])
def test_gpu_step(benchmark: Any, compared: Comparison, name: str) -> None:
    if name in compared.errors:
        error = compared.errors[name]
        if isinstance(error, UnavailableError):
            pytest.skip(str(error))
        raise error
    package = compared.contenders[name].package
    benchmark.extra_info.update(compared.row(name), version=importlib.metadata.version(package))
    benchmark.group = str(compared.case)

    def step_and_wait() -> None:
        compared.calls[name]()
        compared.machine.wait()

    benchmark.pedantic(step_and_wait, rounds=5, warmup_rounds=1)
