"""Numba kernels of dropout and a residual addition in one pass. Arrays in, arrays out, no checks.

    y_i = residual_i + x_i m_i / (1 - p)        adjoint: dx_i = dy_i m_i / (1 - p)

m_i is 0 with probability p, else 1. It is computed anew from the element's number i and two key
words, in the backward pass as well, so no mask is kept and no order of threads matters. The bits
are those of MurmurHash3's 32-bit finaliser (Appleby 2011), with the second key word added halfway.
Sources: dropout, Srivastava et al. 2014 (JMLR 15); random numbers from counters, Salmon et al. 2011
("Parallel random numbers: as easy as 1, 2, 3").

A task is a block of BLOCK elements. Arrays are flat, and x and dx may hold bfloat16.
"""

import numpy as np

from mmrec.kernels._bf16 import from_bf16, to_bf16
from mmrec.kernels._jit import always_inline_jit
from mmrec.kernels._launch import parallel_kernel

BLOCK = 1 << 14  # elements in a task
_MIX_1, _MIX_2 = np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35)
_SHIFT_1, _SHIFT_2, _SHIFT_3 = np.uint32(16), np.uint32(13), np.uint32(16)


@always_inline_jit
def random_bits(counter, key_0, key_1):
    """32 random bits for a counter and a key, all uint32."""
    h = np.uint32(counter + key_0)
    h = np.uint32((h ^ (h >> _SHIFT_1)) * _MIX_1)
    h = np.uint32(h + key_1)
    h = np.uint32((h ^ (h >> _SHIFT_2)) * _MIX_2)
    return np.uint32(h ^ (h >> _SHIFT_3))


@parallel_kernel
def dropout_add_fwd(task, x, residual, key_0, key_1, threshold, scale, y):
    """Fill y (n,) from x and residual (n,). Elements whose bits are below ``threshold`` drop."""
    block, first = slice(task * BLOCK, (task + 1) * BLOCK), np.uint32(task * BLOCK)
    x_block, residual_block, y_block = x[block], residual[block], y[block]
    for i in range(x_block.size):
        kept = random_bits(np.uint32(first + np.uint32(i)), key_0, key_1) >= threshold
        value = from_bf16(x_block[i]) * scale
        y_block[i] = residual_block[i] + (value if kept else y.dtype.type(0))


@parallel_kernel
def dropout_add_bwd(task, dy, key_0, key_1, threshold, scale, dx):
    """Fill dx (n,) from dy (n,)."""
    block, first = slice(task * BLOCK, (task + 1) * BLOCK), np.uint32(task * BLOCK)
    dy_block, dx_block = dy[block], dx[block]
    for i in range(dy_block.size):
        kept = random_bits(np.uint32(first + np.uint32(i)), key_0, key_1) >= threshold
        value = dy_block[i] * scale
        dx_block[i] = to_bf16(value if kept else dy.dtype.type(0), dx_block)
