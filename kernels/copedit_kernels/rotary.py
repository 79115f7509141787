"""Rotary embedding inside the attention kernels: rows are turned where they are read, gradients where they are stored.

Channel j turns with channel j + D/2. The kernels load the two halves, turn them in float32, round once to the dtype of
x as the reference does, and place them side by side: the order of channels does not matter to q.k, and the gradient
turns back in the same registers.

D is split in groups of 2 * H0 and 2 * H1 channels (48 = 32 + 16, 96 = 64 + 32): powers of two without padding.
"""

from __future__ import annotations

import math

from torch import Tensor

from copedit_kernels.launch import cdiv, jit, tl

HALVES = {32: (16, 0), 48: (16, 8), 64: (32, 0), 96: (32, 16)}  # head dim -> (H0, H1), H0 + H1 = D / 2
ROWS = 64  # of a program of `rotate_rows`


@jit
def load_rows(
    x, at, live, step, rope, turn, r_s, FIRST: tl.constexpr, HALF: tl.constexpr, D: tl.constexpr, TURN: tl.constexpr
):
    """Channels of the rows at x + at [R]; rows that are not live and channels beyond D are 0.

    TURN: channels h and h + D/2 for h from FIRST, turned by cos at rope + turn [R], side by side. Else channels from
    2 * FIRST on, in their order.
    """
    ROWS: tl.constexpr = at.shape[0]
    if TURN:
        h = FIRST + tl.arange(0, HALF)[None, :]
        mask = live[:, None]
        if FIRST + HALF > D // 2:
            mask = mask & (h < D // 2)
        # [R, HALF]
        a = tl.load(x + at[:, None] + h, mask=mask, other=0.0)
        b = tl.load(x + at[:, None] + (h + D // 2), mask=mask, other=0.0)
        cos = tl.load(rope + turn[:, None] + h, mask=mask, other=0.0)
        sin = tl.load(rope + r_s + turn[:, None] + h, mask=mask, other=0.0)
        WIDE: tl.constexpr = tl.float64 if a.dtype == tl.float64 else tl.float32
        a_wide, b_wide, cos, sin = a.to(WIDE), b.to(WIDE), cos.to(WIDE), sin.to(WIDE)
        turned = tl.join((a_wide * cos - b_wide * sin).to(a.dtype), (b_wide * cos + a_wide * sin).to(a.dtype))
        return tl.reshape(turned, [ROWS, 2 * HALF])
    else:
        c = 2 * FIRST + tl.arange(0, 2 * HALF)[None, :]
        mask = live[:, None]
        if 2 * (FIRST + HALF) > D:
            mask = mask & (c < D)
        # [R, 2 * HALF]
        return tl.load(x + at[:, None] + c * step, mask=mask, other=0.0)


@jit
def store_rows(
    x, at, live, y, rope, turn, r_s, FIRST: tl.constexpr, HALF: tl.constexpr, D: tl.constexpr, TURN: tl.constexpr
):
    """Writes y [R, 2 * HALF] where `load_rows` reads; TURN: y is the gradient of what it returned."""
    ROWS: tl.constexpr = at.shape[0]
    dtype: tl.constexpr = x.dtype.element_ty
    if TURN:
        h = FIRST + tl.arange(0, HALF)[None, :]
        mask = live[:, None]
        if FIRST + HALF > D // 2:
            mask = mask & (h < D // 2)
        # [R, HALF]
        a, b = tl.split(tl.reshape(y, [ROWS, HALF, 2]))
        cos = tl.load(rope + turn[:, None] + h, mask=mask, other=0.0).to(y.dtype)
        sin = tl.load(rope + r_s + turn[:, None] + h, mask=mask, other=0.0).to(y.dtype)
        tl.store(x + at[:, None] + h, (a * cos + b * sin).to(dtype), mask=mask)
        tl.store(x + at[:, None] + (h + D // 2), (b * cos - a * sin).to(dtype), mask=mask)
    else:
        c = 2 * FIRST + tl.arange(0, 2 * HALF)[None, :]
        mask = live[:, None]
        if 2 * (FIRST + HALF) > D:
            mask = mask & (c < D)
        tl.store(x + at[:, None] + c, y.to(dtype), mask=mask)


@jit
def place(BLOCK: tl.constexpr, m, T, heads):
    """First row of this program's tile, its head, sample and element (int64: offsets are products of these)."""
    program = tl.program_id(0)
    tiles = tl.cdiv(T, BLOCK)
    start, sequence = program % tiles * BLOCK, program // tiles
    head, element = sequence % heads, sequence // heads
    return start.to(tl.int64), head.to(tl.int64), (element // m).to(tl.int64), (element % m).to(tl.int64)


@jit
def rotate_rows(
    x, rope, turned, x_b, x_i, x_t, x_h, r_s, r_t, R: tl.constexpr, m, T, heads,
    D: tl.constexpr, H0: tl.constexpr, H1: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """turned [B, m, T, heads, D]: x [B, m, T, heads, D] as `load_rows` turns it, group after group."""
    r_s, r_t = r_s * R, r_t * R
    start, head, b, i = place(BLOCK, m, T, heads)
    n = tl.arange(0, BLOCK)
    live = n < T - start
    at, turn = n * x_t, (start + n) * r_t
    x += b * x_b + i * x_i + start * x_t + head * x_h
    turned += (((b * m + i) * T + start) * heads + head) * D
    to = n * (heads * D)
    # [BLOCK, 2 * H0]
    y = load_rows(x, at, live, 1, rope, turn, r_s, 0, H0, D, True)
    store_rows(turned, to, live, y, None, turn, 0, 0, H0, D, False)
    if H1 > 0:
        # [BLOCK, 2 * H1]
        y = load_rows(x, at, live, 1, rope, turn, r_s, H0, H1, D, True)
        store_rows(turned, to, live, y, None, turn, 0, H0, H1, D, False)


def rotated(x: Tensor, rope: Tensor) -> Tensor:
    """x [B, m, T, heads, D] turned by rope, in the channel order of `load_rows`."""
    B, m, T, heads, D = x.shape
    turned = x.new_empty(x.shape)
    rotate_rows[(cdiv(T, ROWS) * B * m * heads,)](
        x, rope, turned, *x.stride()[:4], *strides(rope), m, T, heads, D, *HALVES[D], ROWS
    )  # fmt: skip
    return turned


def strides(rope: Tensor | None) -> tuple[int, int, int]:
    """Of cos and sin, and of a token, in units; and the unit.

    A kernel knows of an integer only whether 16 divides it, and a token of head dimension 48 is 24 values: as a product
    with a unit that it is compiled for, it knows that its rows can be read 16 bytes at a time.
    """
    if rope is None:
        return 0, 0, 16
    unit = math.gcd(16, rope.stride(0), rope.stride(1))
    return rope.stride(0) // unit, rope.stride(1) // unit, unit
