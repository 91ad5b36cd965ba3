"""Both CUDA paths, and replays of a CUDA graph, from the same start over many steps: every bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from cases import Contender, gradients, parameters
from gpu_cases import Case, fastlars_of
from gpu_proof.writing import folder, table, write_text
from machine import Gpu, Machine

STEPS = {"resnet50": 200, "bert_large": 20}
CASES = [Case(model, rule, "float32") for model in STEPS for rule in ("lars", "lamb")]


@dataclass
class Run:
    """Parameters, and the call that steps them one way."""

    params: list[nn.Parameter]
    step: Callable[[], object]


def started(case: Case, machine: Machine, path: str, *, graph: bool = False) -> Run:
    """A run after its first step."""
    build = fastlars_of(case, capturable=graph)
    params = parameters(case.shapes(), machine.device)
    with Contender(build, "fastlars", backend="cuda", path=path).planning():
        optimizer = build(params)
        optimizer.step()
    return Run(params, machine.recorded(optimizer.step) if graph else optimizer.step)


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
        for i, (p, q) in enumerate(zip(first.params, run.params, strict=True)):
            if not p.detach().view(torch.int32).equal(q.detach().view(torch.int32)):
                return f"tensor {i} differs between {name} and {other}"
    return ""


def measure(machine: Machine, out: Path, cases: list[Case], steps: dict[str, int]) -> int:
    """Compare case by case, and write what is known after each; 1 where bits differ."""
    rows, status = [], 0
    for case in cases:
        runs = {path: started(case, machine, path) for path in ("two-launch", "one-launch")}
        if case.model == "resnet50":
            for path in tuple(runs):
                runs[f"{path}, graph"] = started(case, machine, path, graph=True)
        found = difference(runs, steps[case.model], machine.device)
        status |= bool(found)
        ways = "; ".join(runs)
        words = found or "the same bits"
        rows.append({"case": case, "ways": ways, "steps": steps[case.model], "result": words})
        print(f"{case}: {ways}: {words} after {steps[case.model]} steps", flush=True)
        write_text(out / "paths.md", table(rows))
        del runs
        torch.cuda.empty_cache()
    return status


if __name__ == "__main__":
    raise SystemExit(measure(Gpu(), folder(), CASES, STEPS))
