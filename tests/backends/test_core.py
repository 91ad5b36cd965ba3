"""csrc/core by itself: conversions, random numbers, and loops for any number of sums and states."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch
from torch import Tensor

from backend_cases import BF16, F16, F32, F64, NAMES
from core_library import core as core
from fastlars.backends.base import Dtypes, StepScalars, Tensors
from fastlars.backends.choose import instance
from fastlars.rules import LarsRule
from tolerances import assert_close, assert_same_bits

HALVES = {"bfloat16": BF16, "float16": F16}


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


# Conversions.


def _all_patterns(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def _floats() -> Tensor:
    """Where rounding goes wrong, if it does: halves, the ties between them, and beside those."""
    halves = torch.cat([_all_patterns(dtype).float() for dtype in HALVES.values()])
    # The bits below a half's last place: none, the least, under a tie, a tie, above it, all.
    bits = halves.view(torch.int32)
    cut = {16: (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF), 13: (1, 0xFFF, 0x1000, 0x1001, 0x1FFF)}
    near = [(bits & -(1 << width)) | low for width, lows in cut.items() for low in lows]
    # Subnormal float16 drop more bits the smaller they are.
    generator = torch.Generator().manual_seed(0)
    everywhere = torch.randint(-(2**31), 2**31, (400_000,), generator=generator).to(torch.int32)
    ties = (torch.arange(0, 2048, dtype=F32) + 0.5) * 2.0**-24
    around = [ties, torch.nextafter(ties, ties + 1), torch.nextafter(ties, ties - 1)]
    edges = [65504.0, 65519.996, 65520.0, 65536.0, 3.3895314e38, 3.4028235e38, 1e-45, 2.0**-25]
    patterns = torch.cat([*near, everywhere]).view(F32)
    return torch.cat([patterns, *around, *(-x for x in around), torch.tensor(edges)])


@pytest.mark.parametrize("name", HALVES)
def test_every_half_becomes_the_right_float(core: ctypes.CDLL, name: str) -> None:
    halves = _all_patterns(HALVES[name])
    out = torch.empty(len(halves), dtype=F32)
    getattr(core, f"{name}_to_float")(_pointer(halves), _pointer(out), len(halves))
    assert_same_bits(name, out, halves.float())


@pytest.mark.parametrize("name", HALVES)
def test_floats_are_rounded_to_the_nearest_half(core: ctypes.CDLL, name: str) -> None:
    floats = _floats()
    out = torch.empty(len(floats), dtype=HALVES[name])
    getattr(core, f"float_to_{name}")(_pointer(floats), _pointer(out), len(floats))
    assert_same_bits(name, out, floats.to(HALVES[name]))


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("dtype", HALVES.values())
def test_a_step_of_rate_0_changes_no_half(backend: str, dtype: torch.dtype) -> None:
    # The same conversions as they are in the kernels: load, round, store.
    halves = _all_patterns(dtype)
    halves = halves[halves.isfinite()]
    weight, grad = halves.clone(), torch.ones(len(halves))
    tensors = Tensors([weight], [grad], (), None, None, Dtypes(dtype, F32, F32))
    chosen = instance(backend)
    rule = LarsRule(momentum=0.0, adapt=False)
    chosen.step(rule, chosen.bind(tensors, chosen.layout([weight])), StepScalars(lr=0.0))
    assert_same_bits("weights", weight, halves)


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("dtype", HALVES.values())
def test_copies_of_masters_are_rounded_as_torch_rounds(backend: str, dtype: torch.dtype) -> None:
    master = _floats()
    master = master[master.isfinite()].clone()
    copy, grad = torch.zeros(len(master), dtype=dtype), torch.ones(len(master))
    tensors = Tensors([master], [grad], (), None, [copy], Dtypes(F32, F32, F32, copy=dtype))
    chosen = instance(backend)
    rule = LarsRule(momentum=0.0, adapt=False)
    chosen.step(rule, chosen.bind(tensors, chosen.layout([master])), StepScalars(lr=0.0))
    assert_same_bits("copies", copy, master.to(dtype))


def test_stochastic_rounding_takes_one_of_two_neighbours(core: ctypes.CDLL) -> None:
    floats = _floats()
    bits = floats.view(torch.int32).long() & 0xFFFFFFFF
    for random in (0, 1, 0x7FFF, 0x8000, 0xFFFF, 0xABCD8000):
        out = torch.empty(len(floats), dtype=BF16)
        words = torch.full((len(floats),), random, dtype=torch.int64).to(torch.int32)
        core.stochastic(_pointer(floats), _pointer(words), _pointer(out), len(floats))
        up = (bits & 0xFFFF) + (random & 0xFFFF) >= 0x10000
        expected = (((bits >> 16) + up.long()) & 0xFFFF).to(torch.int16).view(BF16)
        expected = torch.where(floats.isfinite(), expected, floats.to(BF16))
        assert_same_bits(f"random bits {random:#x}", out, expected)


# Random numbers: the known answers of Random123's tests/kat_vectors, philox4x32 10.
# Counter and key are given there as words; ours are block (words 0 and 1), tensor (2), 0 (3); seed.


def _philox(core: ctypes.CDLL, counter: tuple[int, int, int], key: tuple[int, int]) -> list[int]:
    out = (ctypes.c_uint32 * 4)()
    seed = ctypes.c_uint64(key[0] | key[1] << 32)
    block = ctypes.c_uint64(counter[0] | counter[1] << 32)
    core.philox(seed, ctypes.c_uint32(counter[2]), block, out)
    return list(out)


def _philox_in_python(counter: list[int], key: list[int]) -> list[int]:
    """Algorithm 2 of the paper, as it is written there."""
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * counter[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * counter[2], 2**32)
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return counter


KNOWN_ANSWERS = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    (
        [0xFFFFFFFF] * 4,
        [0xFFFFFFFF] * 2,
        [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
    ),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(
    core: ctypes.CDLL, counter: list[int], key: list[int], answer: list[int]
) -> None:
    # Our counter's last word is always 0, and so is that of the first vector alone. The others
    # vouch for the Python form, which the next test holds against the C++ one.
    assert _philox_in_python(counter, key) == answer
    if counter[3] == 0:
        assert _philox(core, (counter[0], counter[1], counter[2]), (key[0], key[1])) == answer


def test_random_blocks(core: ctypes.CDLL) -> None:
    numbers = torch.randint(0, 2**32, (200, 5)).tolist()
    for a, b, c, d, e in [*numbers, [2**32 - 1] * 5]:
        assert _philox(core, (a, b, c), (d, e)) == _philox_in_python([a, b, c, 0], [d, e])


def test_elements_take_different_bits_of_a_block(core: ctypes.CDLL) -> None:
    words = (ctypes.c_uint32 * 4)(0x11110000, 0x33332222, 0x55554444, 0x77776666)
    taken = [core.bits_of_element(words, element) for element in range(8)]
    assert taken == [0x1111 * i for i in range(8)]


# A rule with three sums and three states (rule_of_three.h).


@pytest.mark.parametrize("size", [5, 16384, 40_001])
@pytest.mark.parametrize("adapt", [True, False])
def test_three_sums_and_three_states(core: ctypes.CDLL, adapt: bool, size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, size, generator=generator)
    grads = [torch.randn(2, size, generator=generator) for _ in range(3)]
    found = {}
    for at_once in (True, False):
        w, states = weight.clone(), torch.zeros(3, 2, size)
        counters, sums, report = torch.zeros(2), torch.zeros(2, 3, dtype=F64), torch.zeros(2, 4)
        for g in grads:
            arrays = map(_pointer, (w, g, states, counters, sums, report))
            core.three(int(adapt), int(at_once), ctypes.c_double(0.1), size, *arrays)
        found[at_once] = [w, states, counters, report]
    for a, b in zip(*found.values(), strict=True):
        assert_same_bits("step, and measure with apply", a, b)
    w, s = weight.double(), torch.zeros(3, 2, size, dtype=F64)
    factor = torch.arange(1.0, 4.0, dtype=F64).view(3, 1, 1)
    right = torch.tensor([1.0, *3 * [math.nan]], dtype=F64).repeat(2, 1)
    for t, g in enumerate(grads, 1):
        s = s / 2 + factor * g.double()
        if adapt:
            norms = torch.stack([w.norm(dim=1), s[0].norm(dim=1), s[2].norm(dim=1)], dim=1)
            right = torch.cat([norms[:, :1] / norms[:, 1:].sum(1, keepdim=True), norms], dim=1)
        w = w - 0.1 / t * right[:, :1] * s.sum(0)
    assert_close("report", "ratio", found[True][3], right)
    # Three steps of float32, whose values are below 10.
    for name, x, exact in zip("wst", found[True], (w, s, torch.full((2,), 3.0)), strict=False):
        assert (x.double() - exact).abs().max() < 1e-5, name
