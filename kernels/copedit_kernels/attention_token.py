"""Attention over the tokens of an element, with an online softmax in base 2 (Dao 2023).

A program owns a tile of queries, walks over the keys and keeps of each row only its log-sum-exp. Backward: one kernel
gives dq and delta, a second one dk and dv; both compute the scores again, and neither uses atomics, so that gradients
repeat bit for bit.

Of a row, as in Dao 2023: m_i is the largest score so far, l_i the sum of exp2(s - m_i), lse_i = m_i + log2(l_i) and
delta_i the sum of dout * out over the channels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from copedit_kernels.launch import cdiv, jit, tiles, tl
from copedit_kernels.rotary import HALVES, load_rows, place, rotated, store_rows, strides

# False: q and k are turned where they are read, so a token's k once per tile of queries. True: what a program walks
# over (k; q for dk and dv) is turned once, into a buffer of its size.
ROTATE_BEFORE = False


class Tile(NamedTuple):
    """Queries and keys of a tile of scores; warps and pipeline stages of a program; how float32 is multiplied; a bound
    on registers (None: the compiler's own choice, which may spill a few for more programs at a time)."""

    BQ: int
    BK: int
    warps: int
    stages: int
    precision: str = "ieee"
    registers: int | None = None


# None of these spills a register on its architecture; which is fastest is for a GPU to say. 16-bit inputs, by head dim.
FORWARD = {
    80: {32: Tile(64, 64, 4, 3), 48: Tile(64, 64, 4, 2), 64: Tile(64, 64, 4, 2), 96: Tile(64, 32, 4, 2)},
    90: {32: Tile(64, 64, 4, 3), 48: Tile(64, 64, 4, 3), 64: Tile(64, 64, 4, 2), 96: Tile(64, 64, 4, 2)},
}
BACKWARD_Q = {
    80: {32: Tile(64, 64, 4, 2), 48: Tile(64, 32, 4, 2), 64: Tile(64, 32, 4, 2), 96: Tile(64, 16, 4, 2)},
    90: {32: Tile(64, 64, 4, 2), 48: Tile(64, 64, 4, 2), 64: Tile(64, 64, 4, 2), 96: Tile(64, 64, 4, 2)},
}
BACKWARD_KV = {
    80: {32: Tile(64, 64, 4, 2), 48: Tile(32, 64, 4, 2), 64: Tile(32, 32, 4, 2), 96: Tile(16, 128, 8, 2)},
    90: {32: Tile(64, 64, 4, 2), 48: Tile(64, 64, 4, 2), 64: Tile(64, 64, 4, 2), 96: Tile(32, 64, 4, 2)},
}
# float32 forward: three TF32 products on the tensor cores leave about 2^-22 of a product, the size of what float32 sums
# lose. Backward: exact products outside them, as the split operands would not fit in registers.
FORWARD_32 = {
    80: dict.fromkeys((32, 48, 64), Tile(64, 16, 4, 1, "tf32x3")) | {96: Tile(16, 16, 4, 1)},
    90: dict.fromkeys((32, 48, 64, 96), Tile(64, 32, 4, 2, "tf32x3")),
}
BACKWARD_32 = {
    80: {
        **dict.fromkeys((32, 48), Tile(16, 16, 4, 1, registers=168)),
        64: Tile(16, 16, 4, 1, registers=255),
        96: Tile(16, 32, 8, 1, registers=255),
    }
}


@jit
def dot(a, b, acc, WIDE: tl.constexpr, PRECISION: tl.constexpr):
    """a b + acc (None: 0) in WIDE. PRECISION: of float32 products, "ieee" or "tf32x3" (three TF32 products)."""
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=WIDE)


@jit
def token_forward(
    qkv, rope, turned, out, lse, x_b, x_i, x_t, x_c, x_h, r_s, r_t, R: tl.constexpr, m, T, heads,
    D: tl.constexpr, H0: tl.constexpr, H1: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    ROTATE: tl.constexpr, BEFORE: tl.constexpr, EVEN: tl.constexpr, SAVE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out [B, m, T, heads, D] and, if SAVE, lse [B, m, heads, T], the base-2 log-sum-exp of each row of scores.

    ROTATE: by rope; BEFORE: k has been, into turned. EVEN: T is a multiple of BK.
    """
    r_s, r_t = r_s * R, r_t * R
    start, head, b, i = place(BQ, m, T, heads)
    WIDE: tl.constexpr = tl.float64 if qkv.dtype.element_ty == tl.float64 else tl.float32
    SCALE: tl.constexpr = 1.4426950408889634 * D**-0.5
    n, j = tl.arange(0, BQ), tl.arange(0, BK)
    live = n < T - start
    q = qkv + b * x_b + i * x_i + head * x_h
    k = q + x_c
    v = k + x_c
    k_t = x_t
    if BEFORE:
        k, k_t = turned + ((b * m + i) * T * heads + head) * D, heads * D
    q += start * x_t
    at, turn = n * x_t, (start + n) * r_t
    # [BQ, 2 * H0], [BQ, 2 * H1]
    q0 = load_rows(q, at, live, 1, rope, turn, r_s, 0, H0, D, ROTATE)
    acc0 = tl.zeros([BQ, 2 * H0], WIDE)
    if H1 > 0:
        q1 = load_rows(q, at, live, 1, rope, turn, r_s, H0, H1, D, ROTATE)
        acc1 = tl.zeros([BQ, 2 * H1], WIDE)
    k_at, v_at, k_rope, k_turn = j * k_t, j * x_t, rope, j * r_t
    m_i = tl.full([BQ], float("-inf"), WIDE)
    l_i = tl.zeros([BQ], WIDE)
    for first in range(0, T, BK):
        there = j < T - first
        # [BK, 2 * H0], [BK, 2 * H1] -> [BQ, BK]
        k0 = load_rows(k, k_at, there, 1, k_rope, k_turn, r_s, 0, H0, D, ROTATE and not BEFORE)
        s = dot(q0, tl.trans(k0), None, WIDE, PRECISION)
        if H1 > 0:
            k1 = load_rows(k, k_at, there, 1, k_rope, k_turn, r_s, H0, H1, D, ROTATE and not BEFORE)
            s = dot(q1, tl.trans(k1), s, WIDE, PRECISION)
        if not EVEN:
            s = tl.where(there[None, :], s, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, 1) * SCALE)
        p = tl.exp2(s * SCALE - m_new[:, None])
        alpha = tl.exp2(m_i - m_new)
        m_i = m_new
        l_i = l_i * alpha + tl.sum(p, 1)
        p = p.to(qkv.dtype.element_ty)
        # [BK, 2 * H0], [BK, 2 * H1]
        v0 = load_rows(v, v_at, there, 1, None, k_turn, 0, 0, H0, D, False)
        acc0 = dot(p, v0, acc0 * alpha[:, None], WIDE, PRECISION)
        if H1 > 0:
            v1 = load_rows(v, v_at, there, 1, None, k_turn, 0, H0, H1, D, False)
            acc1 = dot(p, v1, acc1 * alpha[:, None], WIDE, PRECISION)
        k += BK * k_t
        v += BK * x_t
        if ROTATE and not BEFORE:
            k_rope += BK * r_t
    row = (b * m + i) * T + start
    out += (row * heads + head) * D
    to = n * (heads * D)
    store_rows(out, to, live, acc0 / l_i[:, None], None, turn, 0, 0, H0, D, False)
    if H1 > 0:
        store_rows(out, to, live, acc1 / l_i[:, None], None, turn, 0, H0, H1, D, False)
    if SAVE:
        lse += ((b * m + i) * heads + head) * T + start
        tl.store(lse + n, m_i + tl.log2(l_i), mask=live)


@jit
def token_backward_q(
    qkv, rope, turned, out, lse, dout, delta, dqkv,
    x_b, x_i, x_t, x_c, x_h, g_b, g_i, g_t, g_h, g_d, r_s, r_t, R: tl.constexpr, m, T, heads,
    D: tl.constexpr, H0: tl.constexpr, H1: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    ROTATE: tl.constexpr, BEFORE: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq into dqkv [B, m, T, 3, heads, D], and delta [B, m, heads, T] = sum over channels of dout * out.

    dout: [B, m, T, heads, D] by strides. turned, EVEN: of k.
    """
    r_s, r_t = r_s * R, r_t * R
    start, head, b, i = place(BQ, m, T, heads)
    WIDE: tl.constexpr = lse.dtype.element_ty
    SCALE: tl.constexpr = 1.4426950408889634 * D**-0.5
    n, j = tl.arange(0, BQ), tl.arange(0, BK)
    live = n < T - start
    q = qkv + b * x_b + i * x_i + head * x_h
    k = q + x_c
    v = k + x_c
    k_t = x_t
    if BEFORE:
        k, k_t = turned + ((b * m + i) * T * heads + head) * D, heads * D
    q += start * x_t
    at, turn = n * x_t, (start + n) * r_t
    row = (b * m + i) * T + start
    out += (row * heads + head) * D
    out_at = n * (heads * D)
    dout += b * g_b + i * g_i + start * g_t + head * g_h
    g_at = n * g_t
    # [BQ, 2 * H0], [BQ, 2 * H1]
    q0 = load_rows(q, at, live, 1, rope, turn, r_s, 0, H0, D, ROTATE)
    g0 = load_rows(dout, g_at, live, g_d, None, turn, 0, 0, H0, D, False)
    o0 = load_rows(out, out_at, live, 1, None, turn, 0, 0, H0, D, False)
    delta_i = tl.sum(g0.to(WIDE) * o0.to(WIDE), 1)
    dq0 = tl.zeros([BQ, 2 * H0], WIDE)
    if H1 > 0:
        q1 = load_rows(q, at, live, 1, rope, turn, r_s, H0, H1, D, ROTATE)
        g1 = load_rows(dout, g_at, live, g_d, None, turn, 0, H0, H1, D, False)
        o1 = load_rows(out, out_at, live, 1, None, turn, 0, H0, H1, D, False)
        delta_i += tl.sum(g1.to(WIDE) * o1.to(WIDE), 1)
        dq1 = tl.zeros([BQ, 2 * H1], WIDE)
    sequence = ((b * m + i) * heads + head) * T + start
    tl.store(delta + sequence + n, delta_i, mask=live)
    lse_i = tl.load(lse + sequence + n, mask=live, other=float("inf"))
    k_at, v_at, k_rope, k_turn = j * k_t, j * x_t, rope, j * r_t
    for first in range(0, T, BK):
        there = j < T - first
        # [BK, 2 * H0], [BK, 2 * H1] -> [BQ, BK]
        k0 = load_rows(k, k_at, there, 1, k_rope, k_turn, r_s, 0, H0, D, ROTATE and not BEFORE)
        v0 = load_rows(v, v_at, there, 1, None, k_turn, 0, 0, H0, D, False)
        s = dot(q0, tl.trans(k0), None, WIDE, PRECISION)
        dp = dot(g0, tl.trans(v0), None, WIDE, PRECISION)
        if H1 > 0:
            k1 = load_rows(k, k_at, there, 1, k_rope, k_turn, r_s, H0, H1, D, ROTATE and not BEFORE)
            v1 = load_rows(v, v_at, there, 1, None, k_turn, 0, H0, H1, D, False)
            s = dot(q1, tl.trans(k1), s, WIDE, PRECISION)
            dp = dot(g1, tl.trans(v1), dp, WIDE, PRECISION)
        p = tl.exp2(s * SCALE - lse_i[:, None])
        if not EVEN:
            p = tl.where(there[None, :], p, 0.0)
        ds = (p * (dp - delta_i[:, None])).to(qkv.dtype.element_ty)
        dq0 = dot(ds, k0, dq0, WIDE, PRECISION)
        if H1 > 0:
            dq1 = dot(ds, k1, dq1, WIDE, PRECISION)
        k += BK * k_t
        v += BK * x_t
        if ROTATE and not BEFORE:
            k_rope += BK * r_t
    dqkv += (row * 3 * heads + head) * D
    to = n * (3 * heads * D)
    store_rows(dqkv, to, live, dq0 * D**-0.5, rope, turn, r_s, 0, H0, D, ROTATE)
    if H1 > 0:
        store_rows(dqkv, to, live, dq1 * D**-0.5, rope, turn, r_s, H0, H1, D, ROTATE)


@jit
def token_backward_kv(
    qkv, rope, turned, lse, dout, delta, dqkv,
    x_b, x_i, x_t, x_c, x_h, g_b, g_i, g_t, g_h, g_d, r_s, r_t, R: tl.constexpr, m, T, heads,
    D: tl.constexpr, H0: tl.constexpr, H1: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    ROTATE: tl.constexpr, BEFORE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv into dqkv [B, m, T, 3, heads, D]; the rest as in `token_backward_q`, turned: of q."""
    r_s, r_t = r_s * R, r_t * R
    start, head, b, i = place(BK, m, T, heads)
    WIDE: tl.constexpr = lse.dtype.element_ty
    SCALE: tl.constexpr = 1.4426950408889634 * D**-0.5
    n, j = tl.arange(0, BQ), tl.arange(0, BK)
    live = j < T - start
    q = qkv + b * x_b + i * x_i + head * x_h
    k = q + x_c + start * x_t
    v = k + x_c
    q_t = x_t
    if BEFORE:
        q, q_t = turned + ((b * m + i) * T * heads + head) * D, heads * D
    at, turn = j * x_t, (start + j) * r_t
    dout += b * g_b + i * g_i + head * g_h
    sequence = ((b * m + i) * heads + head) * T
    # [BK, 2 * H0], [BK, 2 * H1]
    k0 = load_rows(k, at, live, 1, rope, turn, r_s, 0, H0, D, ROTATE)
    v0 = load_rows(v, at, live, 1, None, turn, 0, 0, H0, D, False)
    dk0, dv0 = tl.zeros([BK, 2 * H0], WIDE), tl.zeros([BK, 2 * H0], WIDE)
    if H1 > 0:
        k1 = load_rows(k, at, live, 1, rope, turn, r_s, H0, H1, D, ROTATE)
        v1 = load_rows(v, at, live, 1, None, turn, 0, H0, H1, D, False)
        dk1, dv1 = tl.zeros([BK, 2 * H1], WIDE), tl.zeros([BK, 2 * H1], WIDE)
    q_at, g_at, q_rope, q_turn = n * q_t, n * g_t, rope, n * r_t
    for first in range(0, T, BQ):
        there = n < T - first
        # [BQ, 2 * H0], [BQ, 2 * H1] -> [BK, BQ]
        q0 = load_rows(q, q_at, there, 1, q_rope, q_turn, r_s, 0, H0, D, ROTATE and not BEFORE)
        s = dot(k0, tl.trans(q0), None, WIDE, PRECISION)
        if H1 > 0:
            q1 = load_rows(q, q_at, there, 1, q_rope, q_turn, r_s, H0, H1, D, ROTATE and not BEFORE)
            s = dot(k1, tl.trans(q1), s, WIDE, PRECISION)
        # exp2(s - inf) = 0: queries beyond T add nothing
        lse_i = tl.load(lse + sequence + first + n, mask=there, other=float("inf"))
        p = tl.exp2(s * SCALE - lse_i[None, :])
        g0 = load_rows(dout, g_at, there, g_d, None, q_turn, 0, 0, H0, D, False)
        dv0 = dot(p.to(qkv.dtype.element_ty), g0, dv0, WIDE, PRECISION)
        dp = dot(v0, tl.trans(g0), None, WIDE, PRECISION)
        if H1 > 0:
            g1 = load_rows(dout, g_at, there, g_d, None, q_turn, 0, H0, H1, D, False)
            dv1 = dot(p.to(qkv.dtype.element_ty), g1, dv1, WIDE, PRECISION)
            dp = dot(v1, tl.trans(g1), dp, WIDE, PRECISION)
        delta_i = tl.load(delta + sequence + first + n, mask=there, other=0.0)
        ds = (p * (dp - delta_i[None, :])).to(qkv.dtype.element_ty)
        dk0 = dot(ds, q0, dk0, WIDE, PRECISION)
        if H1 > 0:
            dk1 = dot(ds, q1, dk1, WIDE, PRECISION)
        q += BQ * q_t
        dout += BQ * g_t
        if ROTATE and not BEFORE:
            q_rope += BQ * r_t
    dqkv += ((((b * m + i) * T + start) * 3 + 1) * heads + head) * D
    to = j * (3 * heads * D)
    store_rows(dqkv, to, live, dk0 * D**-0.5, rope, turn, r_s, 0, H0, D, ROTATE)
    store_rows(dqkv + heads * D, to, live, dv0, None, turn, 0, 0, H0, D, False)
    if H1 > 0:
        store_rows(dqkv, to, live, dk1 * D**-0.5, rope, turn, r_s, H0, H1, D, ROTATE)
        store_rows(dqkv + heads * D, to, live, dv1, None, turn, 0, H0, H1, D, False)


def forward(qkv: Tensor, rope: Tensor | None, out: Tensor, lse: Tensor | None) -> None:
    """Writes out and, where it is given, the log-sum-exp of the scores."""
    B, m, T, _, heads, D = qkv.shape
    turned = _turned(qkv, rope, 1)
    tile = tile_of(FORWARD, FORWARD_32, qkv)
    token_forward[(cdiv(T, tile.BQ) * B * m * heads,)](
        qkv, rope, turned, out, lse, *qkv.stride()[:5], *strides(rope), m, T, heads, D, *HALVES[D], tile.BQ, tile.BK,
        rope is not None, turned is not None, T % tile.BK == 0, lse is not None, tile.precision,
        num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers,
    )  # fmt: skip


def backward(dout: Tensor, qkv: Tensor, rope: Tensor | None, out: Tensor, lse: Tensor, dqkv: Tensor) -> None:
    """Writes dqkv; out and lse are those of the forward pass."""
    B, m, T, _, heads, D = qkv.shape
    steps = *qkv.stride()[:5], *dout.stride(), *strides(rope)
    turned = _turned(qkv, rope, 1)
    delta = torch.empty_like(lse)
    tile = tile_of(BACKWARD_Q, BACKWARD_32, qkv)
    token_backward_q[(cdiv(T, tile.BQ) * B * m * heads,)](
        qkv, rope, turned, out, lse, dout, delta, dqkv, *steps, m, T, heads, D, *HALVES[D], tile.BQ, tile.BK,
        rope is not None, turned is not None, T % tile.BK == 0, tile.precision,
        num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers,
    )  # fmt: skip
    turned = _turned(qkv, rope, 0)
    tile = tile_of(BACKWARD_KV, BACKWARD_32, qkv)
    token_backward_kv[(cdiv(T, tile.BK) * B * m * heads,)](
        qkv, rope, turned, lse, dout, delta, dqkv, *steps, m, T, heads, D, *HALVES[D], tile.BQ, tile.BK,
        rope is not None, turned is not None, tile.precision,
        num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers,
    )  # fmt: skip


def tile_of(half: dict[int, dict[int, Tile]], single: dict[int, dict[int, Tile]], qkv: Tensor) -> Tile:
    """The tile for qkv, from the table for 16-bit types or the one for wider ones."""
    return tiles(half if qkv.itemsize == 2 else single, qkv)[qkv.shape[-1]]


def _turned(qkv: Tensor, rope: Tensor | None, part: int) -> Tensor | None:
    """q (part 0) or k (1) turned into a buffer, if that is wanted."""
    return rotated(qkv.select(3, part), rope) if rope is not None and ROTATE_BEFORE else None
