"""The code that Triton makes of every kernel, against benchmarks/results/triton_code.csv."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

import triton

from benchmarks.step import triton_code
from benchmarks.step.triton_code import COUNTS, TABLE, Row
from benchmarks.step.triton_kernels import TARGETS, every

# All mixes of types for one GPU of each maker. Of the other GPUs, each kernel takes two in turns,
# with float32: a third of all rows, which `make triton-code` compiles.
ALL_MIXES = ("sm_90", "gfx942")
OTHERS = [target for target in TARGETS if target not in ALL_MIXES]
JOBS = [(name, mix, target) for target in ALL_MIXES for name, mix in every()]
JOBS += [
    (name, mix, OTHERS[(i + shift) % len(OTHERS)])
    for i, (name, mix) in enumerate(job for job in every() if job[1] == "float32")
    for shift in (0, len(OTHERS) // 2)
]


def key(row: Row) -> tuple[str, str, str]:
    return row["kernel"], row["types"], row["target"]


def worse(row: Row, written: Row) -> list[str]:
    """What has become worse. Another Triton uses other registers, and for the same source up to 8
    float64 instructions more (3.6, 3.8 and 3.9 were tried). An operation on elements that became
    float64 has one for each element of a thread: 16 at least."""
    same = row["triton"] == written["triton"]
    limits = {name: written[name] for name in COUNTS if name not in ("shared", "wide")}
    if not same:
        limits = {name: 0 for name in ("spills", "stack") if written[name] == 0}
        limits["float64"] = written["float64"] + 12
    found = [name for name, limit in limits.items() if row[name] > limit]
    if same and row["wide"] < written["wide"]:
        found.append("wide")
    return [
        f"{', '.join(key(row))}: {name} is {row[name]}, in the table {written[name]}"
        for name in found
    ]


@pytest.fixture(scope="module")
def table() -> dict[tuple[str, str, str], Row]:
    return {key(row): row for row in triton_code.read(TABLE)}


def test_the_table_has_every_kernel_of_one_triton(table: dict[tuple[str, str, str], Row]) -> None:
    assert list(table) == [(name, mix, target) for target in TARGETS for name, mix in every()]
    assert len({row["triton"] for row in table.values()}) == 1


def test_what_is_worse_is_found(table: dict[tuple[str, str, str], Row]) -> None:
    written = next(row for row in table.values() if row["wide"])
    written = {**written, "spills": 0, "stack": 0}
    assert not worse(written, written)
    assert not worse({**written, "triton": "0"}, {**written, "spills": 2, "stack": 8})
    for name in ("spills", "stack", "float64", "registers", "instructions"):
        assert worse({**written, name: written[name] + 1}, written)
    assert worse({**written, "wide": written["wide"] - 1}, written)
    other = {**written, "triton": "0"}
    assert not worse({**other, "registers": 999, "instructions": 10**6, "wide": 0}, written)
    for name in ("spills", "stack"):
        assert worse({**other, name: 1}, written)
    assert worse({**other, "float64": written["float64"] + 16}, written)


@pytest.mark.slow
def test_no_code_is_worse_than_the_table(table: dict[tuple[str, str, str], Row]) -> None:
    found = triton_code.rows(JOBS)
    assert list(map(key, found)) == JOBS
    assert {target for *_, target in JOBS} == set(TARGETS)
    wrong = [text for row in found for text in worse(row, table[key(row)])]
    assert not wrong, f"Triton {triton.__version__}: see `make triton-code`\n" + "\n".join(wrong)
