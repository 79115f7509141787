"""Attention along one axis of packed qkv, with rotary embedding inside (Section 3.3; Dao 2023 for the token axis).

Token axis: a program owns a tile of queries, walks over the keys with an online softmax in base 2, and keeps of each
row only its log-sum-exp. Backward: one kernel gives dq and the row sums of dout * out, a second one dk and dv; both
compute the scores again, and neither uses atomics, so that gradients repeat bit for bit. Element axis: the m x m
scores of a token and head live in registers; backward computes them again from qkv.

Channel j turns with channel j + D/2. The kernels load the two halves, turn them in float32, round once to qkv's dtype
as the reference does, and place them side by side: the order of channels does not matter to q.k, and the gradient
turns back in the same registers. `ROTATE_BEFORE` is the alternative for the operand that a token program walks over.

D is split in groups of 2 * H0 and 2 * H1 channels (48 = 32 + 16, 96 = 64 + 32): powers of two without padding.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from copedit_kernels import reference
from copedit_kernels.dispatch import (
    INTERPRETED,
    cdiv,
    check_contiguous_last,
    check_device,
    check_dtype,
    jit,
    on,
    register,
    tiles,
    tl,
    use_triton,
)

# False: q and k are turned where they are read, so a token's k once per tile of queries. True: what a token program
# walks over (k; q for dk and dv) is turned once, into a buffer of its size. Set it on the module, whose name the
# operator shadows: importlib.import_module("copedit_kernels.attention").ROTATE_BEFORE = True
ROTATE_BEFORE = False

HALVES = {32: (16, 0), 48: (16, 8), 64: (32, 0), 96: (32, 16)}  # head dim -> (H0, H1), H0 + H1 = D / 2


class Tile(NamedTuple):
    """Queries and keys of a tile of scores; warps and pipeline stages of a program; how float32 is multiplied; a bound
    on registers (None: the compiler's own choice, which may spill a few for more programs at a time)."""

    BQ: int
    BK: int
    warps: int
    stages: int
    precision: str = "ieee"
    registers: int | None = None


# Kernels


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
def dot(a, b, acc, WIDE: tl.constexpr, PRECISION: tl.constexpr):
    """a b + acc (None: 0) in WIDE. PRECISION: of float32 products, "ieee" or "tf32x3" (three TF32 products)."""
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=WIDE)


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
    x, rope, turned, x_b, x_i, x_t, x_h, r_s, r_t, m, T, heads,
    D: tl.constexpr, H0: tl.constexpr, H1: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """turned [B, m, T, heads, D]: x [B, m, T, heads, D] as `load_rows` turns it, group after group."""
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


@jit
def token_forward(
    qkv, rope, turned, out, lse, x_b, x_i, x_t, x_c, x_h, r_s, r_t, m, T, heads,
    D: tl.constexpr, H0: tl.constexpr, H1: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    ROTATE: tl.constexpr, BEFORE: tl.constexpr, EVEN: tl.constexpr, SAVE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out [B, m, T, heads, D] and, if SAVE, lse [B, m, heads, T], the base-2 log-sum-exp of each row of scores.

    ROTATE: by rope; BEFORE: k has been, into turned. EVEN: T is a multiple of BK.
    """
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
    top = tl.full([BQ], float("-inf"), WIDE)
    total = tl.zeros([BQ], WIDE)
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
        above = tl.maximum(top, tl.max(s, 1) * SCALE)
        p = tl.exp2(s * SCALE - above[:, None])
        shrink = tl.exp2(top - above)
        top = above
        total = total * shrink + tl.sum(p, 1)
        p = p.to(qkv.dtype.element_ty)
        # [BK, 2 * H0], [BK, 2 * H1]
        v0 = load_rows(v, v_at, there, 1, None, k_turn, 0, 0, H0, D, False)
        acc0 = dot(p, v0, acc0 * shrink[:, None], WIDE, PRECISION)
        if H1 > 0:
            v1 = load_rows(v, v_at, there, 1, None, k_turn, 0, H0, H1, D, False)
            acc1 = dot(p, v1, acc1 * shrink[:, None], WIDE, PRECISION)
        k += BK * k_t
        v += BK * x_t
        if ROTATE and not BEFORE:
            k_rope += BK * r_t
    row = (b * m + i) * T + start
    out += (row * heads + head) * D
    to = n * (heads * D)
    store_rows(out, to, live, acc0 / total[:, None], None, turn, 0, 0, H0, D, False)
    if H1 > 0:
        store_rows(out, to, live, acc1 / total[:, None], None, turn, 0, H0, H1, D, False)
    if SAVE:
        lse += ((b * m + i) * heads + head) * T + start
        tl.store(lse + n, top + tl.log2(total), mask=live)


@jit
def token_backward_q(
    qkv, rope, turned, out, lse, grad, delta, dqkv,
    x_b, x_i, x_t, x_c, x_h, g_b, g_i, g_t, g_h, g_d, r_s, r_t, m, T, heads,
    D: tl.constexpr, H0: tl.constexpr, H1: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    ROTATE: tl.constexpr, BEFORE: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq into dqkv [B, m, T, 3, heads, D], and delta [B, m, heads, T] = sum over channels of grad * out.

    grad: [B, m, T, heads, D] by strides. turned, EVEN: of k.
    """
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
    grad += b * g_b + i * g_i + start * g_t + head * g_h
    g_at = n * g_t
    # [BQ, 2 * H0], [BQ, 2 * H1]
    q0 = load_rows(q, at, live, 1, rope, turn, r_s, 0, H0, D, ROTATE)
    g0 = load_rows(grad, g_at, live, g_d, None, turn, 0, 0, H0, D, False)
    o0 = load_rows(out, out_at, live, 1, None, turn, 0, 0, H0, D, False)
    rest = tl.sum(g0.to(WIDE) * o0.to(WIDE), 1)
    dq0 = tl.zeros([BQ, 2 * H0], WIDE)
    if H1 > 0:
        q1 = load_rows(q, at, live, 1, rope, turn, r_s, H0, H1, D, ROTATE)
        g1 = load_rows(grad, g_at, live, g_d, None, turn, 0, H0, H1, D, False)
        o1 = load_rows(out, out_at, live, 1, None, turn, 0, H0, H1, D, False)
        rest += tl.sum(g1.to(WIDE) * o1.to(WIDE), 1)
        dq1 = tl.zeros([BQ, 2 * H1], WIDE)
    sequence = ((b * m + i) * heads + head) * T + start
    tl.store(delta + sequence + n, rest, mask=live)
    level = tl.load(lse + sequence + n, mask=live, other=float("inf"))
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
        p = tl.exp2(s * SCALE - level[:, None])
        if not EVEN:
            p = tl.where(there[None, :], p, 0.0)
        ds = (p * (dp - rest[:, None])).to(qkv.dtype.element_ty)
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
    qkv, rope, turned, lse, grad, delta, dqkv,
    x_b, x_i, x_t, x_c, x_h, g_b, g_i, g_t, g_h, g_d, r_s, r_t, m, T, heads,
    D: tl.constexpr, H0: tl.constexpr, H1: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    ROTATE: tl.constexpr, BEFORE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv into dqkv [B, m, T, 3, heads, D]; the rest as in `token_backward_q`, turned: of q."""
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
    grad += b * g_b + i * g_i + head * g_h
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
        level = tl.load(lse + sequence + first + n, mask=there, other=float("inf"))
        p = tl.exp2(s * SCALE - level[None, :])
        g0 = load_rows(grad, g_at, there, g_d, None, q_turn, 0, 0, H0, D, False)
        dv0 = dot(p.to(qkv.dtype.element_ty), g0, dv0, WIDE, PRECISION)
        dp = dot(v0, tl.trans(g0), None, WIDE, PRECISION)
        if H1 > 0:
            g1 = load_rows(grad, g_at, there, g_d, None, q_turn, 0, H0, H1, D, False)
            dv1 = dot(p.to(qkv.dtype.element_ty), g1, dv1, WIDE, PRECISION)
            dp = dot(v1, tl.trans(g1), dp, WIDE, PRECISION)
        rest = tl.load(delta + sequence + first + n, mask=there, other=0.0)
        ds = (p * (dp - rest[None, :])).to(qkv.dtype.element_ty)
        dk0 = dot(ds, q0, dk0, WIDE, PRECISION)
        if H1 > 0:
            dk1 = dot(ds, q1, dk1, WIDE, PRECISION)
        q += BQ * q_t
        grad += BQ * g_t
        if ROTATE and not BEFORE:
            q_rope += BQ * r_t
    dqkv += ((((b * m + i) * T + start) * 3 + 1) * heads + head) * D
    to = j * (3 * heads * D)
    store_rows(dqkv, to, live, dk0 * D**-0.5, rope, turn, r_s, 0, H0, D, ROTATE)
    store_rows(dqkv + heads * D, to, live, dv0, None, turn, 0, 0, H0, D, False)
    if H1 > 0:
        store_rows(dqkv, to, live, dk1 * D**-0.5, rope, turn, r_s, H0, H1, D, ROTATE)
        store_rows(dqkv + heads * D, to, live, dv1, None, turn, 0, H0, H1, D, False)


@jit
def element_forward(
    qkv, rope, out, x_b, x_i, x_t, x_c, x_h, r_s, r_t, T, heads,
    M: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
    ROTATE: tl.constexpr,
):  # fmt: skip
    """out [B, M, T, heads, D]. A row is a token and head of one sample: rows follow each other in memory.

    UNROLL divides M: queries of the unrolled loop body.
    """
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
            top = tl.full([BLOCK], float("-inf"), WIDE)
            for j in tl.static_range(M):
                s = tl.sum(query * ks[j].to(WIDE), 1) * SCALE
                scores += (s,)
                top = tl.maximum(top, s)
            total = tl.zeros([BLOCK], WIDE)
            acc = tl.zeros([BLOCK, 2 * HALF], WIDE)
            for j in tl.static_range(M):
                p = tl.exp2(scores[j] - top)
                total += p
                acc += p[:, None] * vs[j].to(WIDE)
            store_rows(out, to, live, acc / total[:, None], None, turn, 0, 0, HALF, D, False)
            q += x_i
            out += T * heads * D


@jit
def element_backward(
    qkv, rope, grad, dqkv, x_b, x_i, x_t, x_c, x_h, g_b, g_i, g_t, g_h, g_d, r_s, r_t, T, heads,
    M: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
    ROTATE: tl.constexpr,
):  # fmt: skip
    """dqkv [B, M, T, 3, heads, D] from grad [B, M, T, heads, D] by strides; the rest as in `element_forward`."""
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
    grad += b * g_b
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
            g = load_rows(grad, g_at, live, g_d, None, turn, 0, 0, HALF, D, False).to(WIDE)
            scores: tl.tuple = ()
            top = tl.full([BLOCK], float("-inf"), WIDE)
            for j in tl.static_range(M):
                s = tl.sum(query * ks[j].to(WIDE), 1) * SCALE
                scores += (s,)
                top = tl.maximum(top, s)
            ps: tl.tuple = ()
            dps: tl.tuple = ()
            total, rest = tl.zeros([BLOCK], WIDE), tl.zeros([BLOCK], WIDE)
            for j in tl.static_range(M):
                p = tl.exp2(scores[j] - top)
                dp = tl.sum(g * vs[j].to(WIDE), 1)
                ps += (p,)
                dps += (dp,)
                total += p
                rest += p * dp
            rest = rest / total
            dquery = tl.zeros([BLOCK, 2 * HALF], WIDE)
            dks_before, dvs_before = dks, dvs
            dks, dvs = (), ()
            for j in tl.static_range(M):
                p = ps[j] / total
                ds = p * (dps[j] - rest) * D**-0.5
                dquery += ds[:, None] * ks[j].to(WIDE)
                dks += (dks_before[j] + ds[:, None] * query,)
                dvs += (dvs_before[j] + p[:, None] * g,)
            store_rows(dq, to, live, dquery, rope, turn, r_s, 0, HALF, D, ROTATE)
            q += x_i
            grad += g_i
            dq += T * 3 * heads * D
    for j in tl.static_range(M):
        store_rows(dk, to, live, dks[j], rope, turn, r_s, 0, HALF, D, ROTATE)
        store_rows(dv, to, live, dvs[j], None, turn, 0, 0, HALF, D, False)
        dk += T * 3 * heads * D
        dv += T * 3 * heads * D


# Launchers

# None of these spills a register on its architecture; which is fastest is for a GPU to say. 16-bit inputs, by head dim.
FORWARD = {
    80: {32: Tile(64, 64, 4, 3), 48: Tile(64, 64, 4, 2), 64: Tile(64, 64, 4, 2), 96: Tile(64, 32, 4, 2)},
    90: {32: Tile(64, 64, 4, 3), 48: Tile(64, 64, 4, 3), 64: Tile(64, 64, 4, 2), 96: Tile(64, 64, 4, 2)},
}
BACKWARD_Q = {
    80: {32: Tile(64, 64, 4, 2), 48: Tile(64, 32, 4, 2), 64: Tile(64, 32, 4, 2), 96: Tile(64, 32, 4, 2)},
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
ROTATED = 64  # rows of `rotate_rows`
_LARGEST = 128  # rows of a tile at most, whose offsets are int32


def token_tile(half: dict[int, dict[int, Tile]], single: dict[int, dict[int, Tile]], qkv: Tensor) -> Tile:
    """The tile for qkv, from the table for 16-bit types or the one for wider ones."""
    return tiles(half if qkv.itemsize == 2 else single, qkv)[qkv.shape[-1]]


class Rows(NamedTuple):
    """Constants of the element kernels (4 warps)."""

    HALF: int
    BLOCK: int
    UNROLL: int


def element_rows(D: int, m: int, itemsize: int, backward: bool) -> Rows:
    """16 bytes of each operand a thread, but 4 values where m > 4 keeps many dk and dv; D padded to a power of two.

    Beyond 4 elements the queries are a loop: unrolled, m * m scores compile for minutes.
    """
    half = 1 << (D // 2 - 1).bit_length()
    values = min(16 // itemsize, 4 if backward and m > 4 else 8)
    return Rows(half, values * 128 // (2 * half), m if m <= 4 else 1)


def _check(qkv: Tensor, rope: Tensor | None, axis: str) -> None:
    op = "axis_attention"
    if axis not in ("token", "element"):
        raise ValueError(f"{op}: axis {axis!r} must be 'token' or 'element'")
    if qkv.ndim != 6 or qkv.shape[3] != 3:
        raise ValueError(f"{op}: qkv {tuple(qkv.shape)} must be [B, m, T, 3, heads, D]")
    m, T, D = qkv.shape[1], qkv.shape[2], qkv.shape[5]
    if D not in HALVES:
        raise ValueError(f"{op}: qkv {tuple(qkv.shape)} has head dimension {D}, not one of 32, 48, 64, 96")
    if axis == "element" and m > 8:
        raise ValueError(f"{op}: qkv {tuple(qkv.shape)} has {m} elements to attend over, more than 8")
    check_dtype(op, "qkv", qkv)
    if qkv.dtype == torch.bfloat16 and INTERPRETED and qkv.is_cpu:
        raise ValueError(f"{op}: qkv is bfloat16, whose products Triton's interpreter gets wrong")
    if qkv.dtype == torch.float64 and not qkv.is_cpu:
        raise ValueError(f"{op}: qkv is float64, which only Triton's interpreter runs")
    check_contiguous_last(op, "qkv", qkv)
    _check_stride("qkv", qkv)
    if rope is not None:
        if rope.shape != (2, T, D // 2):
            raise ValueError(f"{op}: rope {tuple(rope.shape)} does not fit qkv {tuple(qkv.shape)}")
        if rope.requires_grad:
            raise ValueError(f"{op}: rope {tuple(rope.shape)} requires a gradient, which it does not get")
        check_dtype(op, "rope", rope)
        check_contiguous_last(op, "rope", rope)
        check_device(op, qkv=qkv, rope=rope)


def _check_stride(name: str, x: Tensor) -> None:
    if x.stride(2) * _LARGEST >= 2**31:
        raise ValueError(
            f"axis_attention: {name} {tuple(x.shape)} has strides {tuple(x.stride())}: tokens are too far apart"
        )


def _rotated(x: Tensor, rope: Tensor) -> Tensor:
    """x [B, m, T, heads, D] turned, in the channel order of `load_rows`."""
    B, m, T, heads, D = x.shape
    turned = x.new_empty(x.shape)
    rotate_rows[(cdiv(T, ROTATED) * B * m * heads,)](
        x, rope, turned, *x.stride()[:4], *rope.stride()[:2], m, T, heads, D, *HALVES[D], ROTATED
    )  # fmt: skip
    return turned


def _strides(rope: Tensor | None) -> tuple[int, int]:
    return (rope.stride(0), rope.stride(1)) if rope is not None else (0, 0)


def _shape_of_lse(qkv: Tensor, axis: str, save: bool) -> tuple[int, ...]:
    B, m, T, _, heads, _ = qkv.shape
    return (B, m, heads, T) if save and axis == "token" else (0,)


def _wide(qkv: Tensor) -> torch.dtype:
    return torch.float64 if qkv.dtype == torch.float64 else torch.float32


def _forward(qkv: Tensor, rope: Tensor | None, axis: str, save: bool) -> tuple[Tensor, Tensor]:
    """out and, for the token axis if save, the log-sum-exp of its scores (empty otherwise)."""
    _check(qkv, rope, axis)
    out, lse = _fake_forward(qkv, rope, axis, save)
    if not out.numel():
        return out, lse
    B, m, T, _, heads, D = qkv.shape
    strides = *qkv.stride()[:5], *_strides(rope)
    with on(qkv):
        if axis == "element":
            rows = element_rows(D, m, qkv.itemsize, False)
            element_forward[(cdiv(T * heads, rows.BLOCK) * B,)](
                qkv, rope, out, *strides, T, heads, m, D, *rows, rope is not None, num_warps=4
            )
            return out, lse
        turned = _rotated(qkv.select(3, 1), rope) if rope is not None and ROTATE_BEFORE else None
        tile = token_tile(FORWARD, FORWARD_32, qkv)
        token_forward[(cdiv(T, tile.BQ) * B * m * heads,)](
            qkv, rope, turned, out, lse if save else None, *strides, m, T, heads, D, *HALVES[D], tile.BQ, tile.BK,
            rope is not None, turned is not None, T % tile.BK == 0, save, tile.precision,
            num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers,
        )  # fmt: skip
    return out, lse


def _fake_forward(qkv: Tensor, rope: Tensor | None, axis: str, save: bool) -> tuple[Tensor, Tensor]:
    B, m, T, _, heads, D = qkv.shape
    return qkv.new_empty(B, m, T, heads, D), qkv.new_empty(_shape_of_lse(qkv, axis, save), dtype=_wide(qkv))


def _backward(
    grad: Tensor, qkv: Tensor, rope: Tensor | None, out: Tensor | None, lse: Tensor | None, axis: str
) -> Tensor:
    """dqkv [B, m, T, 3, heads, D], contiguous. out and lse: of the forward pass, for the token axis."""
    _check(qkv, rope, axis)
    _check_stride("the gradient", grad)
    dqkv = _fake_backward(grad, qkv, rope, out, lse, axis)
    if not dqkv.numel():
        return dqkv
    B, m, T, _, heads, D = qkv.shape
    strides = *qkv.stride()[:5], *grad.stride(), *_strides(rope)
    turn = rope is not None
    with on(qkv):
        if axis == "element":
            rows = element_rows(D, m, qkv.itemsize, True)
            element_backward[(cdiv(T * heads, rows.BLOCK) * B,)](
                qkv, rope, grad, dqkv, *strides, T, heads, m, D, *rows, turn, num_warps=4,
                maxnreg=128 if turn and m <= 2 else None,  # unbounded, the compiler goes for 80 and spills two
            )  # fmt: skip
            return dqkv
        assert out is not None and lse is not None
        turned = _rotated(qkv.select(3, 1), rope) if rope is not None and ROTATE_BEFORE else None
        delta = torch.empty_like(lse)
        tile = token_tile(BACKWARD_Q, BACKWARD_32, qkv)
        token_backward_q[(cdiv(T, tile.BQ) * B * m * heads,)](
            qkv, rope, turned, out, lse, grad, delta, dqkv, *strides, m, T, heads, D, *HALVES[D], tile.BQ, tile.BK,
            turn, turned is not None, T % tile.BK == 0, tile.precision,
            num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers,
        )  # fmt: skip
        turned = _rotated(qkv.select(3, 0), rope) if rope is not None and ROTATE_BEFORE else None
        tile = token_tile(BACKWARD_KV, BACKWARD_32, qkv)
        token_backward_kv[(cdiv(T, tile.BK) * B * m * heads,)](
            qkv, rope, turned, lse, grad, delta, dqkv, *strides, m, T, heads, D, *HALVES[D], tile.BQ, tile.BK,
            turn, turned is not None, tile.precision,
            num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers,
        )  # fmt: skip
    return dqkv


def _fake_backward(
    grad: Tensor, qkv: Tensor, rope: Tensor | None, out: Tensor | None, lse: Tensor | None, axis: str
) -> Tensor:
    return qkv.new_empty(qkv.shape)


# Registration


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, rope, ctx.axis, save = inputs
    out, lse = output
    if not save:
        raise ValueError("axis_attention: save=False keeps nothing for a gradient")
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, rope, *((out, lse) if ctx.axis == "token" else (None, None)))


def _gradient(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, None, None, None]:
    if grad is None:  # nothing that was asked for depends on the output
        return None, None, None, None
    qkv, rope, out, lse = ctx.saved_tensors
    return _axis_attention_backward(grad, qkv, rope, out, lse, ctx.axis), None, None, None


def _decomposition(qkv: Tensor, rope: Tensor | None, axis: str, save: bool) -> tuple[Tensor, Tensor]:
    """The reference; of the log-sum-exp, which only `_backward` reads, no more than its shape."""
    out = reference.axis_attention(qkv, rope, axis).contiguous()
    return out, qkv.new_empty(_shape_of_lse(qkv, axis, save), dtype=_wide(qkv))


_axis_attention = register(
    "axis_attention(Tensor qkv, Tensor? rope, str axis, bool save) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
    setup_context=_setup_context,
    backward=_gradient,
    decomposition=_decomposition,
)
_axis_attention_backward = register(
    "axis_attention_backward(Tensor grad, Tensor qkv, Tensor? rope, Tensor? out, Tensor? lse, str axis) -> Tensor",
    _backward,
    _fake_backward,
)


def axis_attention(qkv: Tensor, rope: Tensor | None, axis: str) -> Tensor:
    """Attention within an element or across elements (Section 3.3).

    qkv: [B, m, T, 3, heads, D] by strides, the last dimension contiguous; D 32, 48, 64 or 96. rope: [2, T, D/2] or
    None, cos and sin that turn q and k by token; a constant. axis: "token" attends over the T tokens of each element,
    "element" over the m <= 8 elements at each token. float16, bfloat16, float32, and float64 in Triton's interpreter,
    which has no bfloat16. Returns [B, m, T, heads, D], contiguous.

    Scores, softmax and sums are float32 (float64 of float64); q and k are rounded after turning, the token axis rounds
    the weights before they meet v, and the output is rounded once. Saved for the gradient: qkv, rope, and for the token
    axis the output and one float32 log-sum-exp a row; scores are computed again. Without gradients only the output is
    allocated. Gradients are deterministic. Raises ValueError for what does not fit.
    """
    if use_triton(qkv):
        save = torch.is_grad_enabled() and qkv.requires_grad
        return _axis_attention(qkv, rope, axis, save)[0]
    return reference.axis_attention(qkv, rope, axis)
