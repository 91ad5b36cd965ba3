"""Prints 7, run by itself with TRITON_INTERPRET=1: what `range` gives for a tensor.

Triton 3.6, of torch 2.11, fails with NumPy 2.4 or later: it calls int() on an array of
shape (1,), which NumPy now refuses.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def count(end, out):
    for i in range(0, tl.load(end), 1):
        tl.store(out, i + 1)


out = torch.zeros(1, dtype=torch.int32)
count[(1,)](torch.full((1,), 7, dtype=torch.int32), out)
print(int(out))
