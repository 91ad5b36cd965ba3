"""Every Python block of docs/distributed.md runs, and steps as one process would.

The training script also survives kills.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import fastlars
from benchmarks import RESULTS
from benchmarks.overlap import fsdp, two_hosts, zero
from benchmarks.results import read_csv
from distributed.processes import run
from distributed.sharded_cases import whole
from distributed.torchrun import TWO, finish, resumed_at, start
from repository_files import ROOT, python_blocks
from tolerances import assert_close
from trainer.helpers import assert_same

KILL = Path(__file__).parent / "kill_during_overlap.py"
TEXT = (ROOT / "docs" / "distributed.md").read_text()
SCRIPT = next(block for block in python_blocks(TEXT) if block.startswith("# train.py"))
# The recipes, by the first word of the heading that they stand under.
RECIPES: dict[str, str] = {
    re.findall(r"^##+ (\w+)", TEXT[: TEXT.index(block)], re.MULTILINE)[-1]: block
    for block in python_blocks(TEXT[TEXT.index("\n## FSDP2") :])
}


def train(folder: Path, deaths: str) -> str:
    """Run the script of the page in a folder; what it printed."""
    folder.mkdir()
    script = folder / "train.py"
    script.write_text(SCRIPT)
    log = folder / "log"
    started = start(
        KILL, script, folder, launch=(*TWO, "--max-restarts=5"), log=log, DEATHS=deaths,
        TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
    )  # fmt: skip
    status = finish(started)
    assert status == 0, log.read_text()
    return log.read_text()


@pytest.mark.slow
def test_the_script_is_killed_between_two_buckets(tmp_path: Path) -> None:
    """Some weights are written, others not; it ends with the bits of a run without a death."""
    # A process may be aborted when it ends, with overlap and without: docs/distributed.md says why.
    # torchrun then starts both once more, at step 20, where nothing is left to do.
    assert set(resumed_at(train(tmp_path / "whole", ""))) <= {20}
    # The second attempt begins with step 5: its death is in step 13.
    assert resumed_at(train(tmp_path / "killed", "0:7 1:8"))[:4] == [5, 5, 10, 10]
    whole, killed = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)
        for name in ("whole", "killed")
    )
    for state in (whole, killed):
        assert state["step"] == 20
        for group in state["optimizer"]["param_groups"]:
            group.pop("differentiable", None)  # torch's Optimizer adds it to what it loads
    assert_same(whole, killed)


def test_the_table_is_the_one_that_was_measured() -> None:
    assert two_hosts.markdown(read_csv(RESULTS / "overlap.csv")) in TEXT


Ends = dict[str, tuple[Tensor, float | None]]


def execute(source: str, folder: Path) -> Ends:
    """Every weight of the models that a block stepped, whole, and its last trust ratio.

    In a process of a group.
    """
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    torch.manual_seed(0)
    ratios: dict[Tensor, float] = {}
    names: dict[str, Any] = {"__name__": "__main__"}
    # Loading a state dict forgets them; and torch's ZeroRedundancyOptimizer has none itself.
    noted = register_optimizer_step_post_hook(
        lambda optimizer, *_: ratios.update(getattr(optimizer, "trust_ratios", dict)())
    )
    exec(compile(source, "docs/distributed.md", "exec"), names)
    noted.remove()
    container = names.get("optimizers")
    models = container.model_parts if container else [names.get("ddp", names.get("model"))]
    return {
        name.removeprefix("module."): (whole(p), ratios.get(p))
        for model in models
        for name, p in model.named_parameters()
    }


def as_it_is(module: nn.Module, *_: Any, **__: Any) -> nn.Module:
    """In place of what divides a model."""
    return module


def not_spread(
    params: Any, optimizer_class: Any, *, lr: float, weight_decay: float, **_: Any
) -> Any:
    """In place of ZeroRedundancyOptimizer."""
    return optimizer_class(params, lr=lr, weight_decay=weight_decay)


UNDIVIDED: dict[str, Callable[..., Any]] = {
    "torch.distributed.fsdp.fully_shard": as_it_is,
    "torch.distributed.tensor.parallel.parallelize_module": as_it_is,
    "torch.nn.parallel.DistributedDataParallel": as_it_is,
    "torch.distributed.optim.ZeroRedundancyOptimizer": not_spread,
}


def both_ways(source: str, folder: str) -> tuple[Ends, Ends]:
    """What the block ends with, and what it ends with where each process has the whole model."""
    divided = execute(source, Path(folder, "divided"))
    with ExitStack() as stack:
        for name, replacement in UNDIVIDED.items():
            stack.enter_context(mock.patch(name, replacement))
        return divided, execute(source, Path(folder, "whole"))


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_step_as_one_process_would(name: str, tmp_path: Path) -> None:
    known: set[str] = set()
    for divided, expected in run(4, both_ways, RECIPES[name], str(tmp_path)):
        assert divided.keys() == expected.keys()
        assert any(ratio not in (None, 1.0) for _, ratio in expected.values())
        for key, (weight, ratio) in expected.items():
            found, its_ratio = divided[key]
            assert_close(key, "weight", found, weight, float(weight.abs().max()))
            # Under ZeroRedundancyOptimizer a process has the ratios of what it steps.
            if its_ratio is not None:
                known.add(key)
                assert_close(key, "ratio", torch.tensor(its_ratio), torch.tensor(ratio))
    assert known == expected.keys()


def test_every_engine_has_a_recipe() -> None:
    assert list(RECIPES) == ["FSDP2", "HSDP", "Tensor", "ZeRO", "torchtitan"]


def test_a_flat_part_of_several_layers_has_one_ratio_of_its_own() -> None:
    """What the page says of DeepSpeed, which hands over such parts."""
    torch.manual_seed(0)
    layers = [torch.randn(6, 5), torch.randn(10, 4), torch.randn(10, 4)]
    grads = [torch.randn(6, 5), 10 * torch.randn(10, 4), torch.randn(10, 4)]

    def ratios(weights: list[Tensor], gradients: list[Tensor]) -> list[float]:
        params = [nn.Parameter(w.clone()) for w in weights]
        for p, g in zip(params, gradients, strict=True):
            p.grad = g
        optimizer = fastlars.LARS(params, lr=1.0)
        optimizer.step()
        return list(optimizer.trust_ratios().values())

    flat, grad = (torch.cat([t.flatten() for t in each]) for each in (layers, grads))
    parts = [ratios([w], [g])[0] for w, g in zip(flat.chunk(2), grad.chunk(2), strict=True)]
    for part in parts:
        for right in ratios(layers, grads):
            assert abs(part / right - 1.0) > 0.1
    assert abs(parts[0] / parts[1] - 1.0) > 0.1


def test_the_balance_is_the_one_that_the_benchmark_computes() -> None:
    for line in zero.balances().splitlines():
        assert line in TEXT


def test_the_table_of_zero_is_the_one_that_was_measured() -> None:
    assert zero.markdown(read_csv(RESULTS / "zero.csv")) in TEXT


def test_the_table_of_overlap_under_fsdp_is_the_one_that_was_measured() -> None:
    assert fsdp.markdown(read_csv(RESULTS / "overlap_fsdp.csv")) in TEXT


def measured_small() -> dict[str, str] | None:
    """The benchmark, of a few rounds of the small model; what the first process saw."""
    with TemporaryDirectory() as folder, ExitStack() as stack:
        few = {name: fsdp.TRAINED[name] for name in ("200 small tensors",)}
        for name, value in (("TRAINED", few), ("connect", lambda *_: None)):
            stack.enter_context(mock.patch.object(fsdp, name, value))
        fsdp.work(dist.get_rank(), folder, 1)
        seen = Path(folder, "rows")
        return json.loads(seen.read_text()) if seen.exists() else None


def test_the_benchmark_of_overlap_under_fsdp() -> None:
    (seen, nothing) = run(2, measured_small)
    assert nothing is None
    assert [line["rule"] for line in seen] == ["LARS", "LAMB"]
    assert fsdp.markdown(seen).count("\n") == 3
    times = [((0.2, 0.1), (0.4, 0.05)), ((0.2, 0.1), (0.1, 0.02))]
    found = fsdp.figures(times)
    assert found["iteration_plain_ms"] == "200.00"
    assert (found["step_overlap_ms"], found["step_ratio"]) == ("35.00", "0.35")
