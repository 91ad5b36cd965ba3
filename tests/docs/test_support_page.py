"""docs/support.md and docs/trainer.md: their tables say what the code does on this machine."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import fastlars
import fastlars.distributed
from fastlars.optim.base import FusedOptimizer
from fastlars.trainer.config.settings import Config
from fastlars.trainer.errors import DivergedError, TrainerError
from optimizers import SIMPLE, Row
from optimizers import one_thread as one_thread
from repository_files import ROOT, python_path

DOCS = ROOT / "docs"
SUPPORT = (DOCS / "support.md").read_text()
TRAINER = (DOCS / "trainer.md").read_text()


@pytest.fixture(autouse=True)
def no_demands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTLARS_BACKEND", raising=False)


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(DOCS / "_ext"))
    import tables

    return tables


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def cells(table: str) -> list[list[str]]:
    """The rows of a table in Markdown, without its head."""
    lines = [line for line in table.splitlines() if line.startswith("|")][2:]
    return [re.split(r"(?<!\\) \| ", line.strip("| ")) for line in lines]


def named(cell: str) -> list[str]:
    return re.findall(r"`(\w+)`", cell)


def weight(dtype: torch.dtype = torch.float32) -> Tensor:
    p = nn.Parameter(torch.ones(4, 4, dtype=dtype))
    p.grad = torch.ones_like(p)
    return p


def served_by(row: Row, p: Tensor) -> str:
    optimizer = row.make([p])
    with torch.no_grad():
        (bound,) = optimizer.bind_groups()
    optimizer.step()
    return bound.backend.name


def test_the_committed_tables_are_those_of_the_code(tables: ModuleType) -> None:
    for name in tables.COMMITTED:
        page = (DOCS / name).read_text()
        assert page.count("<!-- end -->") == page.count("<!-- table: ") > 1
        assert tables.with_tables(page) == page, "run python docs/_ext/tables.py"


@pytest.mark.parametrize("row", SIMPLE, ids=repr)
def test_a_step_takes_the_back_end_of_the_table(row: Row, tables: ModuleType) -> None:
    head, _, cpu, *_ = [line.split(" | ")[1:] for line in tables.devices().splitlines()]
    served = {
        t: named(cell)[0] for types, cell in zip(head, cpu, strict=True) for t in named(types)
    }
    assert served.keys() == {"float32", "bfloat16", "float16", "float64"}
    for dtype, name in served.items():
        assert served_by(row, weight(getattr(torch, dtype))) == name, dtype
    gaps = nn.Parameter(torch.ones(4, 8)[:, ::2])
    gaps.grad = torch.ones_like(gaps)
    assert served_by(row, gaps) == "reference"


def test_kernels_take_every_mix_of_the_table(tables: ModuleType) -> None:
    by_name = {line[0].strip("`"): line[1:] for line in cells(tables.backends())}
    weights, states, capturable = by_name["cpu"]
    assert capturable == "no"
    types = [[getattr(torch, name) for name in named(cell)] for cell in (weights, states)]
    mixes = [*product(types[0], types[0], types[1])]
    assert len(mixes) == 18
    for of_weight, of_grad, of_state in mixes:
        p = nn.Parameter(torch.ones(4, dtype=of_weight))
        p.grad_dtype = None  # torch then lets the gradient have another type
        p.grad = torch.ones(4, dtype=of_grad)
        row = Row("mix", fastlars.LARS, {"lr": 1.0, "state_dtype": of_state})
        assert served_by(row, p) == "cpu"


def test_the_oldest_gpu_is_that_of_the_build() -> None:
    (oldest,) = re.findall(r"compute capability (\d)\.5 and newer", SUPPORT)
    assert f"set(default_architectures {oldest}5 " in (ROOT / "csrc" / "cuda.cmake").read_text()


@pytest.mark.parametrize("row", SIMPLE, ids=repr)
def test_states_are_those_of_the_table(row: Row, tables: ModuleType) -> None:
    number = [kind.__name__ for kind in tables.OPTIMIZERS].index(row.kind.__name__) + 1
    rows = {line[0]: line[number] for line in cells(tables.optimizers())}
    p = weight()
    optimizer = row.make([p])
    optimizer.step()
    whole = {name: v for name, v in optimizer.state[p].items() if v.shape == p.shape}
    assert {*named(rows["states, each of the parameter's shape"])} == {*whole}
    size = sum(v.nbytes for v in whole.values()) / p.numel()
    assert float(rows["bytes of float32 states for each weight"]) == size


# What goes together: for each row of the page, what tries it.


def sharded() -> Tensor:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    p = nn.Parameter(distribute_tensor(torch.ones(4, 4), init_device_mesh("cpu", (1,)), [Shard(0)]))
    p.grad = torch.ones_like(p)
    return p


def compiled(optimizer: FusedOptimizer) -> None:
    torch._dynamo.reset()
    torch.compile(optimizer.step, fullgraph=True, backend="eager")()


def plain_in_compile() -> None:
    pair = weight(), weight()
    fastlars.LARS([pair[0]], lr=1.0).step()
    compiled(fastlars.LARS([pair[1]], lr=1.0))
    assert torch.equal(*pair)


def outside_the_graph() -> None:
    """A whole graph is refused, and without that demand the step is taken."""
    scaled = fastlars.LARS([weight()], lr=1.0)
    scaled.found_inf = torch.zeros(())
    for optimizer in (
        fastlars.LARS([weight()], lr=1.0, skip_if=1e9),
        fastlars.LARS([weight()], lr=1.0, norm_group=dist.group.WORLD, max_grad_norm=1e9),
        scaled,
    ):
        with pytest.raises(torch._dynamo.exc.Unsupported):
            compiled(optimizer)
        torch._dynamo.reset()
        torch.compile(optimizer.step, backend="eager")()
        assert len(optimizer.trust_ratios()) == 1


def refused(error: type[Exception], text: str, attempt: Callable[[], Any]) -> Callable[[], None]:
    def tries() -> None:
        with pytest.raises(error, match=text):
            attempt()

    return tries


def sharded_in_backward() -> None:
    model = nn.Linear(4, 4, bias=False)
    model.weight = sharded()
    fastlars.step_in_backward(model, fastlars.LARS(model.parameters(), lr=1.0))


def capturable_overlap() -> None:
    ddp = nn.parallel.DistributedDataParallel(nn.Linear(4, 4))
    optimizer = fastlars.LARS(ddp.parameters(), lr=1.0, capturable=True)
    fastlars.distributed.overlap(ddp, optimizer)


def lars(**options: Any) -> FusedOptimizer:
    return fastlars.LARS([weight(torch.bfloat16)], lr=1.0, stochastic_rounding=True, **options)


TOGETHER: dict[str, Callable[[], None]] = {
    "plain tensors in `torch.compile`": plain_in_compile,
    "`skip_if`, `norm_group` or a `GradScaler` in `torch.compile`": outside_the_graph,
    "DTensors in `torch.compile`": refused(
        RuntimeError, "DTensors are not stepped inside torch.compile",
        lambda: compiled(fastlars.LARS([sharded()], lr=1.0)),
    ),
    "DTensors in `step_in_backward`": refused(
        RuntimeError, "fastlars.distributed.overlap", sharded_in_backward
    ),
    "`capturable=True` on a back end without it": refused(
        RuntimeError, "capturable=True needs a back end",
        lambda: fastlars.LARS([weight()], lr=1.0, capturable=True).step(),
    ),
    "`capturable=True` and `stochastic_rounding=True`": refused(
        ValueError, "does not go with capturable", lambda: lars(capturable=True)
    ),
    "`capturable=True` and `overlap` of DDP": refused(
        RuntimeError, "overlap does not go with capturable", capturable_overlap
    ),
    "`master_weights=True` and `stochastic_rounding=True`": refused(
        ValueError, "choose one of the two", lambda: lars(master_weights=True)
    ),
}  # fmt: skip


def test_every_combination_of_the_page_is_tried() -> None:
    rows = cells(SUPPORT[SUPPORT.index("## What goes together") :])
    assert [first for first, _ in rows] == [*TOGETHER]
    for first, what_happens in rows:
        is_refusal = TOGETHER[first].__name__ == "tries"
        assert what_happens.startswith("refused") == is_refusal, first


@pytest.mark.parametrize("row", TOGETHER)
@pytest.mark.usefixtures("one_process")
def test_combination(row: str) -> None:
    TOGETHER[row]()


# The trainer's page.


def test_trainer_page_has_every_flag(tables: ModuleType) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastlars.trainer", "--help"],
        cwd=ROOT, env={"PYTHONPATH": python_path(), "PATH": ""}, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    flags = set(re.findall(r"^  (?:-h, )?(--[a-z-]+)", done.stdout, re.MULTILINE))
    assert len(flags) > 50
    rows = [line for line in cells(tables.flags()) if line[0].startswith("`--")]
    of_table = {line[0].split(",")[0].strip("`") for line in rows}
    others = set(re.findall(r"`(--[a-z-]+)`", TRAINER[TRAINER.index("## Flags") :]))
    assert len(of_table) == len(fields(Config))
    assert flags == of_table | (others & flags)


def test_trainer_page_has_the_exit_codes() -> None:
    rows = dict(cells(TRAINER[TRAINER.index("## Exit codes") : TRAINER.index("## Flags")]))
    assert "diverged" in rows[str(DivergedError.status)]
    assert "mistake in the call" in rows[str(TrainerError.status)]
