"""SwiGLU: silu(a) * b for the two halves of the last dimension.

Memory: forward reads 2F and writes F a row; backward reads 3F (a, b and the cotangent) and writes one packed 2F. Saved
for backward: h only; the sigmoid is recomputed. Computed in float32 (float64 if h is), rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from copedit_kernels import reference
from copedit_kernels.dispatch import register, use_triton
from copedit_kernels.launch import cdiv, check_contiguous_last, check_dtype, collapse, jit, on, tiles, tl


class Tiles(NamedTuple):
    """Rows and columns of a tile: 256 divides 8/3 of every width in use but that of heart-3mm."""

    rows: int
    columns: int
    warps: int


TILES = {80: Tiles(8, 256, 4), 90: Tiles(8, 256, 4)}


@jit
def place(size_1, size_2, FLAT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """This program's rows [ROWS, 1], their places in the three leading dimensions, and its columns [1, BLOCK].

    FLAT: the first two have size 1; otherwise a place takes four divisions of 64 bits, half of the kernel's
    instructions.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    if FLAT:
        return row, 0, 0, row, c
    else:
        outer = row // size_2
        return row, outer // size_1, outer % size_1, row % size_2, c


@jit
def sigmoid(a, ROUNDED: tl.constexpr):
    """1 / (1 + exp(-a)). ROUNDED: the result is rounded to 16 bits; then as the square of an inverse root, which the
    hardware has as one instruction with an error of about 2^-22, and which takes no division."""
    if ROUNDED:
        root = tl.rsqrt(1.0 + tl.exp2(a * -1.4426950408889634))
        return root * root
    else:
        return 1.0 / (1.0 + tl.exp(-a))


@jit(do_not_specialize=["rows", "size_1", "size_2"])
def swiglu_forward(
    h, out, rows, size_1, size_2, F, h_0, h_1, h_2, FLAT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Program (j, k): ROWS rows from j * ROWS, BLOCK columns from k * BLOCK. size_1, size_2: inner leading sizes."""
    NARROW: tl.constexpr = h.dtype.element_ty
    WIDE: tl.constexpr = tl.float64 if NARROW == tl.float64 else tl.float32
    row, at_0, at_1, at_2, c = place(size_1, size_2, FLAT, ROWS, BLOCK)
    # [ROWS, BLOCK]
    live = (row < rows) & (c < F)
    source = h + at_0 * h_0 + at_1 * h_1 + at_2 * h_2 + c
    a = tl.load(source, mask=live, other=0.0).to(WIDE)
    b = tl.load(source + F, mask=live, other=0.0).to(WIDE)
    s = sigmoid(a, NARROW.primitive_bitwidth == 16)
    tl.store(out + row * F + c, (a * s * b).to(NARROW), mask=live)


@jit(do_not_specialize=["rows", "size_1", "size_2"])
def swiglu_backward(
    g, h, dh, rows, size_1, size_2, F, g_0, g_1, g_2, h_0, h_1, h_2,
    FLAT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program as in `swiglu_forward`; writes both halves of dh."""
    NARROW: tl.constexpr = h.dtype.element_ty
    WIDE: tl.constexpr = tl.float64 if NARROW == tl.float64 else tl.float32
    row, at_0, at_1, at_2, c = place(size_1, size_2, FLAT, ROWS, BLOCK)
    # [ROWS, BLOCK]
    live = (row < rows) & (c < F)
    source = h + at_0 * h_0 + at_1 * h_1 + at_2 * h_2 + c
    a = tl.load(source, mask=live, other=0.0).to(WIDE)
    b = tl.load(source + F, mask=live, other=0.0).to(WIDE)
    d = tl.load(g + at_0 * g_0 + at_1 * g_1 + at_2 * g_2 + c, mask=live, other=0.0).to(WIDE)
    s = sigmoid(a, NARROW.primitive_bitwidth == 16)
    to = dh + row * 2 * F + c
    tl.store(to, (d * b * s * (1.0 + a * (1.0 - s))).to(NARROW), mask=live)
    tl.store(to + F, (d * a * s).to(NARROW), mask=live)


def _check(h: Tensor) -> None:
    if h.ndim < 1 or h.shape[-1] % 2:
        raise ValueError(f"swiglu: h {tuple(h.shape)} must be [..., 2F]")
    check_dtype("swiglu", "h", h)
    check_contiguous_last("swiglu", "h", h)


def _collapsed(*tensors: Tensor) -> tuple[list[int], list[list[int]]] | None:
    """The leading dimensions as three."""
    if all([x.is_contiguous() for x in tensors]):
        rows = math.prod(tensors[0].shape[:-1])
        return [1, 1, rows], [[0, 0, x.shape[-1]] for x in tensors]
    return collapse(tensors[0].shape[:-1], *(x.stride()[:-1] for x in tensors), dims=3)


def _launch(kernel: Any, inputs: Sequence[Tensor], out: Tensor, lead: tuple[list[int], list[list[int]]]) -> None:
    (size_0, size_1, size_2), strides = lead
    rows, half = size_0 * size_1 * size_2, inputs[-1].shape[-1] // 2
    tile = tiles(TILES, out)
    block = min(tile.columns, 1 << (half - 1).bit_length())
    with on(out):
        kernel[(cdiv(rows, tile.rows), cdiv(half, block))](
            *inputs, out, rows, size_1, size_2, half, *(step for own in strides for step in own),
            FLAT=size_0 * size_1 == 1, ROWS=tile.rows, BLOCK=block, num_warps=tile.warps,
        )  # fmt: skip


def _fake_forward(h: Tensor) -> Tensor:
    _check(h)
    return h.new_empty((*h.shape[:-1], h.shape[-1] // 2))


def _forward(h: Tensor) -> Tensor:
    out = _fake_forward(h)
    lead = _collapsed(h)
    if lead is None:
        raise ValueError(f"swiglu: h {tuple(h.shape)} with strides {h.stride()} has more than three leading dimensions")
    if out.numel():
        _launch(swiglu_forward, (h,), out, lead)
    return out


def _fake_backward(g: Tensor, h: Tensor) -> Tensor:
    return h.new_empty(h.shape)


def _backward(g: Tensor, h: Tensor) -> Tensor:
    dh = h.new_empty(h.shape)
    lead = _collapsed(g, h) if g.stride(-1) == 1 else None
    if lead is None:  # a cotangent with strides of its own, as that of a sum
        g = g.contiguous()
        lead = _collapsed(g, h)
    assert lead is not None  # the forward has seen h
    if dh.numel():
        _launch(swiglu_backward, (g, h), dh, lead)
    return dh


def _save(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx: Any, g: Tensor) -> Tensor:
    return _BACKWARD(g, *ctx.saved_tensors)


_FORWARD = register(
    "swiglu(Tensor h) -> Tensor",
    _forward, _fake_forward, save=_save, gradient=_gradient, decomposition=reference.swiglu,
)  # fmt: skip
_BACKWARD = register("swiglu_backward(Tensor g, Tensor h) -> Tensor", _backward, _fake_backward)


def swiglu(h: Tensor) -> Tensor:
    """silu(h[..., :F]) * h[..., F:] for h [..., 2F] (Shazeer 2020).

    h: float16, bfloat16, float32 or float64; the last dimension contiguous, those before it by strides. Returns
    [..., F], contiguous, in h's dtype.

    The Triton kernel raises ValueError for a strided last dimension and for leading dimensions that three strides
    cannot describe.
    """
    if use_triton(h):
        return _FORWARD(h)
    return reference.swiglu(h)
