"""Adaptive norm, alone and behind a gated residual: `ada_norm` and `gated_residual_ada_norm`, one pair of kernels.

    y = x + gate * branch                                   (gated only; rounded to x's dtype as the reference does)
    n = y / sqrt(mean(y^2) + eps)                           (layer: y - mean(y) in place of y)
    h = n * weight * (1 + scale) + shift

Memory: forward reads x (and branch) and writes h (and y) once; backward reads the cotangents, y (and branch) once and
writes dx (and dbranch) once. Saved for backward: x, or y where gated, and the inputs; the statistics of a row are
recomputed from the row that is in registers anyway, so no result but h and y is ever allocated in the forward.

Gradients of scale, shift, gate and weight are sums over rows. Each backward program owns a fixed range of rows of one
element of one sample and writes its sums as float32; a second kernel adds them in a fixed order. No atomics: the same
inputs give the same bits. With S = sum of dh * n over the rows of a sample, dscale = S * weight and dweight = sum over
samples of S * (1 + scale), so that one sum serves both.

Sums are float32, float64 if x is float64. C is a multiple of 8 up to 2048, in a tile of the next power of two: the
columns beyond C are masked, and as C is a multiple of 8 the mask never splits a 16-byte load.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from copedit_kernels import reference
from copedit_kernels.dispatch import register, use_triton
from copedit_kernels.launch import cdiv, check_contiguous_last, check_device, check_dtype, jit, on, tiles, tl


class Tiles(NamedTuple):
    """rows a tile has forward and backward; about how many backward programs there are, and rows each has at most."""

    forward: int
    backward: int
    programs: int
    span: int


TILES = {80: Tiles(4, 2, 512, 64), 90: Tiles(4, 2, 512, 64)}
# Registers a thread may have: plain, gated, gated with 32-bit x, branch or gate. Without a bound ptxas aims at an
# occupancy and spills a few words to reach it.
REGISTERS = {"forward": (80, 80, 112), "backward": (96, 128, 168)}
SUM_REGISTERS = 64  # of the kernel that adds the partial sums
STAGES = 2  # of the backward pass: the rows that come next are on their way to shared memory while these are computed
SUM_ROWS, SUM_COLUMNS = 32, 64  # tile of the kernel that adds the partial sums


@jit
def load_row(pointer, c, inside, WIDE: tl.constexpr):
    """One vector of C columns, [BLOCK]."""
    return tl.load(pointer + c, mask=inside, other=0.0).to(WIDE)


@jit
def load_rows(pointer, t, stride, c, live, WIDE: tl.constexpr):
    """Tokens t [ROWS, 1] of one element, [ROWS, BLOCK]. Offsets within an element fit 32 bits."""
    return tl.load(pointer + (t * stride + c[None, :]), mask=live, other=0.0).to(WIDE)


@jit
def norm_of(v, exists, inside, C, EPS: tl.constexpr, LAYER: tl.constexpr):
    """The rows of v [ROWS, BLOCK] normed and 1 / their root mean square [ROWS, 1]; zero for what does not exist."""
    if LAYER:
        v = tl.where(inside[None, :], v - (tl.sum(v, 1) / C)[:, None], 0.0)
    inverse = tl.where(exists, tl.rsqrt(tl.sum(v * v, 1) / C + EPS)[:, None], 0.0)
    return v * inverse, inverse


@jit
def norm_forward(
    x, branch, gate, scale, shift, weight, y, out, T, C,
    x_b, x_i, x_t, branch_b, branch_i, branch_t, gate_b, scale_b, shift_b,
    EPS: tl.constexpr, LAYER: tl.constexpr, WEIGHTED: tl.constexpr, GATED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (j, i, b): ROWS tokens from j * ROWS of element i of sample b."""
    NARROW: tl.constexpr = x.dtype.element_ty
    WIDE: tl.constexpr = tl.float64 if NARROW == tl.float64 else tl.float32
    i = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    # [BLOCK]
    c = tl.arange(0, BLOCK)
    inside = c < C
    gain = 1.0 + load_row(scale + b * scale_b, c, inside, WIDE)
    if WEIGHTED:
        gain *= load_row(weight, c, inside, WIDE)
    offset = load_row(shift + b * shift_b, c, inside, WIDE)
    # [ROWS, BLOCK]
    live = (t < T) & inside[None, :]
    element = (b * tl.num_programs(1) + i) * T * C
    to = t * C + c[None, :]
    v = load_rows(x + b * x_b + i * x_i, t, x_t, c, live, WIDE)
    if GATED:
        u = load_rows(branch + b * branch_b + i * branch_i, t, branch_t, c, live, WIDE)
        u *= load_row(gate + b * gate_b, c, inside, WIDE)[None, :]
        if gate.dtype.element_ty == branch.dtype.element_ty:
            u = u.to(branch.dtype.element_ty)
        narrow = (v + u.to(NARROW).to(WIDE)).to(NARROW)
        tl.store(y + element + to, narrow, mask=live)
        v = narrow.to(WIDE)
    n, _ = norm_of(v, t < T, inside, C, EPS, LAYER)
    tl.store(out + element + to, (n * gain[None, :] + offset[None, :]).to(NARROW), mask=live)


@jit(do_not_specialize=["span"])
def norm_backward(
    dh, dy, y, branch, gate, scale, weight, dx, dbranch, partial, T, C, span,
    dh_b, dh_i, dh_t, dy_b, dy_i, dy_t, y_b, y_i, y_t, branch_b, branch_i, branch_t, gate_b, scale_b,
    EPS: tl.constexpr, LAYER: tl.constexpr, WEIGHTED: tl.constexpr, GATED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (j, i, b): `span` tokens from j * span of element i of sample b, ROWS at a time.

    partial [B, m * programs, 2 or 3, C]: sums over those tokens of dh, of dh * n, and of dy_total * branch.
    """
    NARROW: tl.constexpr = y.dtype.element_ty
    WIDE: tl.constexpr = tl.float64 if NARROW == tl.float64 else tl.float32
    SUMS: tl.constexpr = 3 if GATED else 2
    i = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    element = b * tl.num_programs(1) + i
    y += b * y_b + i * y_i
    dh += b * dh_b + i * dh_i
    dx += element * T * C
    # [BLOCK]
    c = tl.arange(0, BLOCK)
    inside = c < C
    gain = 1.0 + load_row(scale + b * scale_b, c, inside, WIDE)
    if WEIGHTED:
        gain *= load_row(weight, c, inside, WIDE)
    shift_sum = tl.zeros([BLOCK], WIDE)
    gain_sum = tl.zeros([BLOCK], WIDE)
    if GATED:
        dy += b * dy_b + i * dy_i
        branch += b * branch_b + i * branch_i
        dbranch += element * T * C
        factor = load_row(gate + b * gate_b, c, inside, WIDE)
        gate_sum = tl.zeros([BLOCK], WIDE)
    for first in tl.range(0, span, ROWS, num_stages=STAGES):
        t = tl.program_id(0) * span + first + tl.arange(0, ROWS)[:, None]
        # [ROWS, BLOCK]
        live = (t < T) & inside[None, :]
        to = t * C + c[None, :]
        v = load_rows(y, t, y_t, c, live, WIDE)
        g = load_rows(dh, t, dh_t, c, live, WIDE)
        n, inverse = norm_of(v, t < T, inside, C, EPS, LAYER)
        shift_sum += tl.sum(g, 0)
        gain_sum += tl.sum(g * n, 0)
        g *= gain[None, :]
        d = g - n * (tl.sum(g * n, 1) / C)[:, None]
        if LAYER:
            d -= (tl.sum(g, 1) / C)[:, None]
        d *= inverse
        if GATED:
            d += load_rows(dy, t, dy_t, c, live, WIDE)
            gate_sum += tl.sum(d * load_rows(branch, t, branch_t, c, live, WIDE), 0)
            tl.store(dbranch + to, (d * factor[None, :]).to(dbranch.dtype.element_ty), mask=live)
        tl.store(dx + to, d.to(NARROW), mask=live)
    row = (element * tl.num_programs(0) + tl.program_id(0)) * SUMS * C
    tl.store(partial + row + c, shift_sum, mask=inside)
    tl.store(partial + row + C + c, gain_sum, mask=inside)
    if GATED:
        tl.store(partial + row + 2 * C + c, gate_sum, mask=inside)


@jit(do_not_specialize=["parts"])
def norm_backward_sum(
    partial, scale, weight, dscale, dshift, dgate, dweight, parts, C, scale_b,
    WEIGHTED: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (j, b): BLOCK columns of sample b, over its `parts` partial sums from first to last.

    dscale, dshift, dgate: [B, C]. dweight: [B, C], this sample's share of it.
    """
    WIDE: tl.constexpr = partial.dtype.element_ty
    SUMS: tl.constexpr = 3 if GATED else 2
    b = tl.program_id(1).to(tl.int64)
    # [BLOCK]
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = c < C
    shift_sum = tl.zeros([BLOCK], WIDE)
    gain_sum = tl.zeros([BLOCK], WIDE)
    if GATED:
        gate_sum = tl.zeros([BLOCK], WIDE)
    for first in range(0, parts, ROWS):
        part = first + tl.arange(0, ROWS)[:, None]
        # [ROWS, BLOCK]
        live = (part < parts) & inside[None, :]
        source = partial + (b * parts + part) * SUMS * C + c[None, :]
        shift_sum += tl.sum(tl.load(source, mask=live, other=0.0), 0)
        gain_sum += tl.sum(tl.load(source + C, mask=live, other=0.0), 0)
        if GATED:
            gate_sum += tl.sum(tl.load(source + 2 * C, mask=live, other=0.0), 0)
    to = b * C + c
    tl.store(dshift + to, shift_sum.to(dshift.dtype.element_ty), mask=inside)
    if WEIGHTED:
        gain = 1.0 + load_row(scale + b * scale_b, c, inside, WIDE)
        tl.store(dweight + to, gain_sum * gain, mask=inside)
        gain_sum *= load_row(weight, c, inside, WIDE)
    tl.store(dscale + to, gain_sum.to(dscale.dtype.element_ty), mask=inside)
    if GATED:
        tl.store(dgate + to, gate_sum.to(dgate.dtype.element_ty), mask=inside)


def _check(
    op: str, x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor | None, kind: str, **gated: Tensor | None
) -> None:
    if kind not in ("rms", "layer"):
        raise ValueError(f"{op}: kind {kind!r} must be 'rms' or 'layer'")
    if x.ndim != 4:
        raise ValueError(f"{op}: x {tuple(x.shape)} must be [B, m, T, C]")
    columns = x.shape[3]
    if columns % 8 or not 8 <= columns <= 2048:
        raise ValueError(f"{op}: C = {columns} of x {tuple(x.shape)} must be a multiple of 8 up to 2048")
    per_sample = {"scale": scale, "shift": shift, "gate": gated.get("gate")}
    for name, tensor in per_sample.items():
        if tensor is not None and (tensor.ndim != 2 or tensor.shape[0] != x.shape[0] or tensor.shape[1] != columns):
            raise ValueError(f"{op}: {name} {tuple(tensor.shape)} must be [B, C] of x {tuple(x.shape)}")
    if weight is not None and (weight.ndim != 1 or weight.shape[0] != columns):
        raise ValueError(f"{op}: weight {tuple(weight.shape)} must be [C] of x {tuple(x.shape)}")
    branch = gated.get("branch")
    if branch is not None and branch.shape != x.shape:
        raise ValueError(f"{op}: branch {tuple(branch.shape)} must have the shape of x {tuple(x.shape)}")
    tensors = {"x": x, "scale": scale, "shift": shift, "weight": weight, **gated}
    for name, tensor in tensors.items():
        if tensor is not None:
            check_dtype(op, name, tensor)
            check_contiguous_last(op, name, tensor)
            if tensor.ndim == 4 and not _within_32_bits(tensor):
                raise ValueError(
                    f"{op}: one element of {name} {tuple(tensor.shape)} with strides {tuple(tensor.stride())} "
                    "spans 2^31 values or more"
                )
    check_device(op, **tensors)


def _within_32_bits(x: Tensor) -> bool:
    return x.shape[2] * max(x.stride(2), x.shape[3]) < 2**31


def _empty(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _strides(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if x is None else x.stride()[:3]


def _readable(g: Tensor) -> Tensor:
    """A cotangent as it is, or copied if the kernel cannot read it, as that of a sum, which is expanded over C."""
    return g if g.stride(3) == 1 and _within_32_bits(g) else g.contiguous()


def _options(kernel: str, x: Tensor, branch: Tensor | None, gate: Tensor | None) -> dict[str, Any]:
    """Compiler options: 8 columns of a row to a thread, and so many registers that none is spilled."""
    wide = any([t is not None and t.itemsize > 2 for t in (x, branch, gate)])
    return _options_of(kernel, x.shape[3], gate is not None, wide, x.dtype == torch.float64)


@functools.cache
def _options_of(kernel: str, columns: int, gated: bool, wide: bool, double: bool) -> dict[str, Any]:
    block = 1 << (columns - 1).bit_length()
    options: dict[str, Any] = {"BLOCK": block, "num_warps": max(1, block // 256)}
    if not double:
        options["maxnreg"] = REGISTERS[kernel][1 + wide if gated else 0]
    return options


def _launch(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor, weight: Tensor | None,
    kind: str, eps: float,
) -> tuple[Tensor | None, Tensor]:  # fmt: skip
    """y, if gated, and its norm."""
    batch, m, tokens, columns = x.shape
    out, y = _empty(x), None if gate is None else _empty(x)
    if not out.numel():
        return y, out
    rows = tiles(TILES, x).forward
    with on(x):
        norm_forward[(cdiv(tokens, rows), m, batch)](
            x, branch, gate, scale, shift, weight, y, out, tokens, columns, *_strides(x), *_strides(branch),
            0 if gate is None else gate.stride(0), scale.stride(0), shift.stride(0),
            EPS=eps, LAYER=kind == "layer", WEIGHTED=weight is not None, GATED=gate is not None, ROWS=rows,
            # gate * branch is rounded before it is added, as in the reference.
            enable_fp_fusion=gate is None or x.itemsize == 2, **_options("forward", x, branch, gate),
        )  # fmt: skip
    return y, out


def _fake_forward(x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor | None, kind: str, eps: float) -> Tensor:
    _check("ada_norm", x, scale, shift, weight, kind)
    return _empty(x)


def _forward(x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor | None, kind: str, eps: float) -> Tensor:
    _check("ada_norm", x, scale, shift, weight, kind)
    return _launch(x, None, None, scale, shift, weight, kind, eps)[1]


def _fake_gated_forward(
    x: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, weight: Tensor | None, kind: str, eps: float
) -> tuple[Tensor, Tensor]:
    _check("gated_residual_ada_norm", x, scale, shift, weight, kind, branch=branch, gate=gate)
    return _empty(x), _empty(x)


def _gated_forward(
    x: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, weight: Tensor | None, kind: str, eps: float
) -> tuple[Tensor | None, Tensor]:
    _check("gated_residual_ada_norm", x, scale, shift, weight, kind, branch=branch, gate=gate)
    return _launch(x, branch, gate, scale, shift, weight, kind, eps)


def _fake_backward(
    dh: Tensor, dy: Tensor | None, y: Tensor, branch: Tensor | None, gate: Tensor | None,
    scale: Tensor, shift: Tensor, weight: Tensor | None, kind: str, eps: float,
) -> list[Tensor]:  # fmt: skip
    return [_empty(x) for x in (y, scale, shift, weight, branch, gate) if x is not None]


def _backward(
    dh: Tensor, dy: Tensor | None, y: Tensor, branch: Tensor | None, gate: Tensor | None,
    scale: Tensor, shift: Tensor, weight: Tensor | None, kind: str, eps: float,
) -> list[Tensor]:  # fmt: skip
    """dx, dscale, dshift, then dweight if weighted, then dbranch and dgate if gated."""
    batch, m, tokens, columns = y.shape
    dh, dy = _readable(dh), None if dy is None else _readable(dy)
    tile = tiles(TILES, y)
    steps = cdiv(batch * m * tokens, tile.programs * tile.backward)
    span = min(max(steps, 1) * tile.backward, tile.span)
    programs = cdiv(tokens, span)
    wide = torch.float64 if y.dtype == torch.float64 else torch.float32
    partial = y.new_empty((batch, m * programs, 2 if gate is None else 3, columns), dtype=wide)
    dx, dscale, dshift = _empty(y), _empty(scale), _empty(shift)
    shares = None if weight is None else y.new_empty((batch, columns), dtype=wide)
    dbranch, dgate = (None if x is None else _empty(x) for x in (branch, gate))
    flags = {"WEIGHTED": weight is not None, "GATED": gate is not None}
    with on(y):
        if y.numel():
            norm_backward[(programs, m, batch)](
                dh, dy, y, branch, gate, scale, weight, dx, dbranch, partial, tokens, columns, span,
                *_strides(dh), *_strides(dy), *_strides(y), *_strides(branch),
                0 if gate is None else gate.stride(0), scale.stride(0),
                EPS=eps, LAYER=kind == "layer", ROWS=tile.backward, STAGES=STAGES, **flags,
                **_options("backward", y, branch, gate),
            )  # fmt: skip
        if batch:
            norm_backward_sum[(cdiv(columns, SUM_COLUMNS), batch)](
                partial, scale, weight, dscale, dshift, dgate, shares, m * programs, columns, scale.stride(0),
                ROWS=SUM_ROWS, BLOCK=SUM_COLUMNS, maxnreg=None if wide == torch.float64 else SUM_REGISTERS, **flags,
            )  # fmt: skip
    dweight = None if weight is None or shares is None else shares.sum(0).to(weight.dtype)
    return [x for x in (dx, dscale, dshift, dweight, dbranch, dgate) if x is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, shift, weight, ctx.kind, ctx.eps = inputs
    ctx.save_for_backward(x, scale, shift, weight)


def _gradient(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, shift, weight = ctx.saved_tensors
    dx, dscale, dshift, *dweight = _BACKWARD(dh, None, x, None, None, scale, shift, weight, ctx.kind, ctx.eps)
    return dx, dscale, dshift, dweight[0] if dweight else None, None, None


def _gated_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, branch, gate, scale, shift, weight, ctx.kind, ctx.eps = inputs
    ctx.save_for_backward(output[0], branch, gate, scale, shift, weight)


def _gated_gradient(ctx: Any, dy: Tensor, dh: Tensor) -> tuple[Tensor | None, ...]:
    dx, dscale, dshift, *dweight, dbranch, dgate = _BACKWARD(dh, dy, *ctx.saved_tensors, ctx.kind, ctx.eps)
    return dx, dbranch, dgate, dscale, dshift, dweight[0] if dweight else None, None, None


_FORWARD = register(
    "ada_norm(Tensor x, Tensor scale, Tensor shift, Tensor? weight, str kind, float eps) -> Tensor",
    _forward, _fake_forward, save=_save, gradient=_gradient, decomposition=reference.ada_norm,
)  # fmt: skip
_GATED_FORWARD = register(
    "gated_residual_ada_norm(Tensor x, Tensor branch, Tensor gate, Tensor scale, Tensor shift, Tensor? weight, "
    "str kind, float eps) -> (Tensor, Tensor)",
    _gated_forward, _fake_gated_forward, save=_gated_save, gradient=_gated_gradient,
    decomposition=reference.gated_residual_ada_norm,
)  # fmt: skip
_BACKWARD = register(
    "ada_norm_backward(Tensor dh, Tensor? dy, Tensor y, Tensor? branch, Tensor? gate, Tensor scale, Tensor shift, "
    "Tensor? weight, str kind, float eps) -> Tensor[]",
    _backward, _fake_backward,
)  # fmt: skip


def ada_norm(
    x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor | None = None, kind: str = "rms", eps: float = 1e-4
) -> Tensor:
    """Norm over C, then x * (1 + scale) + shift (adaLN, Peebles & Xie 2023).

    x: [B, m, T, C] by strides, the last dimension contiguous; float16, bfloat16, float32 or float64. scale, shift:
    [B, C], one per sample, by row stride (chunks of one modulation, or expanded). weight: [C] or None. kind: "rms" or
    "layer". The dtypes may differ. Returns [B, m, T, C], contiguous, in x's dtype, rounded once from float32.

    The Triton kernel raises ValueError for a C that is no multiple of 8 or above 2048 and for a strided last dimension.
    """
    if use_triton(x):
        return _FORWARD(x, scale, shift, weight, kind, eps)
    return reference.ada_norm(x, scale, shift, weight, kind, eps)


def gated_residual_ada_norm(
    x: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, weight: Tensor | None = None,
    kind: str = "rms", eps: float = 1e-4,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, ada_norm(y)) with y = x + gate * branch; branch as x, gate [B, C], the rest as in `ada_norm`.

    y has x's dtype and the reference's bits: the product is rounded to its own dtype, then the sum; the norm is of the
    rounded y. Saved for backward: y, not x.
    """
    if use_triton(x):
        return _GATED_FORWARD(x, branch, gate, scale, shift, weight, kind, eps)
    return reference.gated_residual_ada_norm(x, branch, gate, scale, shift, weight, kind, eps)
