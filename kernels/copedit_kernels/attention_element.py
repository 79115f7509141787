"""Attention over the elements at each token, without a matrix of scores.

The M x M scores of a token and head live in registers; backward computes them again from qkv. As in Dao 2023, m_i is
the largest score of a row, l_i the sum of exp2(s - m_i) and delta_i the sum of dout * out.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from copedit_kernels.launch import cdiv, jit, tl
from copedit_kernels.rotary import load_rows, store_rows, strides


class Rows(NamedTuple):
    """Constants of the element kernels (4 warps)."""

    HALF: int
    BLOCK: int
    UNROLL: int


def rows_of(D: int, m: int, itemsize: int, backward: bool) -> Rows:
    """16 bytes of each operand a thread, but 4 values where m > 4 keeps many dk and dv; D padded to a power of two.

    Beyond 4 elements the queries are a loop: unrolled, m * m scores compile for minutes.
    """
    half = 1 << (D // 2 - 1).bit_length()
    values = min(16 // itemsize, 4 if backward and m > 4 else 8)
    return Rows(half, values * 128 // (2 * half), m if m <= 4 else 1)


@jit
def element_forward(
    qkv, rope, out, x_b, x_i, x_t, x_c, x_h, r_s, r_t, R: tl.constexpr, T, heads,
    M: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
    ROTATE: tl.constexpr,
):  # fmt: skip
    """out [B, M, T, heads, D]. A row is a token and head of one sample: rows follow each other in memory.

    UNROLL divides M: queries of the unrolled loop body.
    """
    r_s, r_t = r_s * R, r_t * R
    blocks = tl.cdiv(T * heads, BLOCK)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    live = row < T * heads
    token, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    at, turn = token * x_t + head * x_h, token * r_t
    to = (token * heads + head) * D
    WIDE: tl.constexpr = tl.float64 if qkv.dtype.element_ty == tl.float64 else tl.float32
    SCALE: tl.constexpr = 1.4426950408889634 * D**-0.5
    q = qkv + b * x_b
    k = q + x_c
    v = k + x_c
    out += b * M * T * heads * D
    ks: tl.tuple = ()
    vs: tl.tuple = ()
    for _ in tl.static_range(M):
        # [BLOCK, 2 * HALF]
        ks += (load_rows(k, at, live, 1, rope, turn, r_s, 0, HALF, D, ROTATE),)
        vs += (load_rows(v, at, live, 1, None, turn, 0, 0, HALF, D, False),)
        k += x_i
        v += x_i
    for _ in range(0, M, UNROLL):
        for _ in tl.static_range(UNROLL):
            # [BLOCK, 2 * HALF]
            query = load_rows(q, at, live, 1, rope, turn, r_s, 0, HALF, D, ROTATE).to(WIDE)
            scores: tl.tuple = ()
            m_i = tl.full([BLOCK], float("-inf"), WIDE)
            for j in tl.static_range(M):
                s = tl.sum(query * ks[j].to(WIDE), 1) * SCALE
                scores += (s,)
                m_i = tl.maximum(m_i, s)
            l_i = tl.zeros([BLOCK], WIDE)
            acc = tl.zeros([BLOCK, 2 * HALF], WIDE)
            for j in tl.static_range(M):
                p = tl.exp2(scores[j] - m_i)
                l_i += p
                acc += p[:, None] * vs[j].to(WIDE)
            store_rows(out, to, live, acc / l_i[:, None], None, turn, 0, 0, HALF, D, False)
            q += x_i
            out += T * heads * D


@jit
def element_backward(
    qkv, rope, dout, dqkv, x_b, x_i, x_t, x_c, x_h, g_b, g_i, g_t, g_h, g_d, r_s, r_t, R: tl.constexpr, T, heads,
    M: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
    ROTATE: tl.constexpr,
):  # fmt: skip
    """dqkv [B, M, T, 3, heads, D] from dout [B, M, T, heads, D] by strides; the rest as in `element_forward`."""
    r_s, r_t = r_s * R, r_t * R
    blocks = tl.cdiv(T * heads, BLOCK)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    live = row < T * heads
    token, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    at, turn = token * x_t + head * x_h, token * r_t
    g_at, to = token * g_t + head * g_h, (token * 3 * heads + head) * D
    WIDE: tl.constexpr = tl.float64 if qkv.dtype.element_ty == tl.float64 else tl.float32
    SCALE: tl.constexpr = 1.4426950408889634 * D**-0.5
    q = qkv + b * x_b
    k = q + x_c
    v = k + x_c
    dout += b * g_b
    dq = dqkv + b * M * T * 3 * heads * D
    dk = dq + heads * D
    dv = dk + heads * D
    ks: tl.tuple = ()
    vs: tl.tuple = ()
    dks: tl.tuple = ()
    dvs: tl.tuple = ()
    for _ in tl.static_range(M):
        # [BLOCK, 2 * HALF]
        ks += (load_rows(k, at, live, 1, rope, turn, r_s, 0, HALF, D, ROTATE),)
        vs += (load_rows(v, at, live, 1, None, turn, 0, 0, HALF, D, False),)
        dks += (tl.zeros([BLOCK, 2 * HALF], WIDE),)
        dvs += (tl.zeros([BLOCK, 2 * HALF], WIDE),)
        k += x_i
        v += x_i
    for _ in range(0, M, UNROLL):
        for _ in tl.static_range(UNROLL):
            # [BLOCK, 2 * HALF]
            query = load_rows(q, at, live, 1, rope, turn, r_s, 0, HALF, D, ROTATE).to(WIDE)
            g = load_rows(dout, g_at, live, g_d, None, turn, 0, 0, HALF, D, False).to(WIDE)
            scores: tl.tuple = ()
            m_i = tl.full([BLOCK], float("-inf"), WIDE)
            for j in tl.static_range(M):
                s = tl.sum(query * ks[j].to(WIDE), 1) * SCALE
                scores += (s,)
                m_i = tl.maximum(m_i, s)
            ps: tl.tuple = ()
            dps: tl.tuple = ()
            l_i, delta_i = tl.zeros([BLOCK], WIDE), tl.zeros([BLOCK], WIDE)
            for j in tl.static_range(M):
                p = tl.exp2(scores[j] - m_i)
                dp = tl.sum(g * vs[j].to(WIDE), 1)
                ps += (p,)
                dps += (dp,)
                l_i += p
                delta_i += p * dp
            delta_i = delta_i / l_i
            dquery = tl.zeros([BLOCK, 2 * HALF], WIDE)
            dks_before, dvs_before = dks, dvs
            dks, dvs = (), ()
            for j in tl.static_range(M):
                p = ps[j] / l_i
                ds = p * (dps[j] - delta_i) * D**-0.5
                dquery += ds[:, None] * ks[j].to(WIDE)
                dks += (dks_before[j] + ds[:, None] * query,)
                dvs += (dvs_before[j] + p[:, None] * g,)
            store_rows(dq, to, live, dquery, rope, turn, r_s, 0, HALF, D, ROTATE)
            q += x_i
            dout += g_i
            dq += T * 3 * heads * D
    for j in tl.static_range(M):
        store_rows(dk, to, live, dks[j], rope, turn, r_s, 0, HALF, D, ROTATE)
        store_rows(dv, to, live, dvs[j], None, turn, 0, 0, HALF, D, False)
        dk += T * 3 * heads * D
        dv += T * 3 * heads * D


def forward(qkv: Tensor, rope: Tensor | None, out: Tensor) -> None:
    """Writes out."""
    B, m, T, _, heads, D = qkv.shape
    rows = rows_of(D, m, qkv.itemsize, False)
    element_forward[(cdiv(T * heads, rows.BLOCK) * B,)](
        qkv, rope, out, *qkv.stride()[:5], *strides(rope), T, heads, m, D, *rows, rope is not None, num_warps=4
    )  # fmt: skip


def backward(dout: Tensor, qkv: Tensor, rope: Tensor | None, dqkv: Tensor) -> None:
    """Writes dqkv."""
    B, m, T, _, heads, D = qkv.shape
    rows, turn = rows_of(D, m, qkv.itemsize, True), rope is not None
    element_backward[(cdiv(T * heads, rows.BLOCK) * B,)](
        qkv, rope, dout, dqkv, *qkv.stride()[:5], *dout.stride(), *strides(rope), T, heads, m, D, *rows, turn,
        num_warps=4,
        maxnreg=128 if turn and m <= 2 else None,  # unbounded, the compiler goes for 80 and spills two
    )  # fmt: skip
