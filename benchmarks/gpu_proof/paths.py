"""Both CUDA paths, and replays of a CUDA graph, from the same start over many steps: every bit."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.gpu_proof.stages import folder
from benchmarks.machine import Gpu, Machine
from benchmarks.models import gradients, parameters
from benchmarks.results import plain_table, write_text
from benchmarks.step.cases import Case, fastlars_of, gpu_contenders
from benchmarks.step.check import CHECK_LR
from fastlars.backends.cuda import PATHS

STEPS = {"resnet50": 200, "bert_large": 20}
CASES = [Case(model, rule, "float32") for model in STEPS for rule in ("lars", "lamb", "lans")]


@dataclass
class Run:
    """Parameters, and the call that steps them one way."""

    params: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    step: Callable[[], object]

    def written(self) -> list[Tensor]:
        """Weights and states."""
        states = [x for p in self.params for x in self.optimizer.state[p].values()]
        return [*(p.detach() for p in self.params), *states]


def started(case: Case, machine: Machine, path: str, *, graph: bool = False) -> Run:
    """A run after its first step."""
    # By more than the last bits, and not beyond all bounds: 0.1% of a layer a step.
    build = fastlars_of(case, lr=CHECK_LR[case.rule] * 1e-2, capturable=graph)
    params = parameters(case.shapes(), machine.device)
    optimizer = replace(gpu_contenders(case)[f"fastlars cuda {path}"], build=build).started(params)
    return Run(params, optimizer, machine.recorded(optimizer.step) if graph else optimizer.step)


def difference(runs: dict[str, Run], steps: int, device: torch.device) -> str:
    """Which tensor differs between two ways, if one does, after steps with the same gradients."""
    generator = torch.Generator(device).manual_seed(1)
    (name, first), *others = runs.items()
    for _ in range(steps):
        for run in runs.values():
            if run is first:
                for g in gradients(run.params):
                    g.normal_(generator=generator).mul_(1e-3)
            else:
                torch._foreach_copy_(gradients(run.params), gradients(first.params))
            run.step()
    for other, run in others:
        for i, (x, y) in enumerate(zip(first.written(), run.written(), strict=True)):
            if not x.view(torch.int32).equal(y.view(torch.int32)):
                return f"tensor {i} differs between {name} and {other}"
    return ""


def measure(machine: Machine, out: Path, cases: list[Case], steps: dict[str, int]) -> int:
    """Compare case by case, and write what is known after each; 1 where bits differ."""
    rows, status = [], 0
    for case in cases:
        runs = {path: started(case, machine, path) for path in PATHS}
        if case.model == "resnet50":
            for path in tuple(runs):
                runs[f"{path}, graph"] = started(case, machine, path, graph=True)
        found = difference(runs, steps[case.model], machine.device)
        status |= bool(found)
        ways = "; ".join(runs)
        words = found or "the same bits"
        rows.append({"case": case, "ways": ways, "steps": steps[case.model], "result": words})
        print(f"{case}: {ways}: {words} after {steps[case.model]} steps", flush=True)
        write_text(out / "paths.md", plain_table(rows))
        del runs
        gc.collect()
        torch.cuda.empty_cache()
    return status


if __name__ == "__main__":
    raise SystemExit(measure(Gpu(), folder(), CASES, STEPS))
