"""3x3x3 convolution with channels last as a product: voxels x (27 taps x channels) by (27 taps x channels) x filters.

No matrix of patches exists: a program owns a tile of voxels and filters and walks over taps and channels; of every tap
it reads the voxels' neighbours where they lie, those outside as zeros. Its sums begin at bias and residual and end in
ReLU, in registers.

Memory: reads x 27 times, through the cache but for the first, and each input and output once. Forward only: nothing is
saved, and there is no gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from copedit_kernels import reference
from copedit_kernels.dispatch import register, use_triton
from copedit_kernels.launch import (
    INTERPRETED,
    cdiv,
    check_contiguous_last,
    check_device,
    check_dtype,
    jit,
    on,
    tiles,
    tl,
)


class Tile(NamedTuple):
    """Voxels and filters of a tile of results, channels of a step; warps and pipeline stages of a program."""

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int


# None spills a register; 128 x 256, which would read a third less from the cache, spills up to four.
TILES = {80: Tile(128, 128, 32, 4, 3), 90: Tile(128, 128, 64, 8, 3)}
# Whether residual units of the tokenizer take this kernel in inference, or cuDNN's: for a GPU to say.
FUSED = False
TILES_32 = {80: Tile(64, 64, 16, 4, 2)}  # exact products, outside the tensor cores


@jit
def conv3_forward(
    x, weight, bias, residual, out, x_n, x_h, x_w, x_d, w_o, w_h, w_w, w_d, r_n, r_h, r_w, r_d, rows, H, W, D, C, U,
    BIASED: tl.constexpr, ADDED: tl.constexpr, RELU: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out [N, H, W, D, U] of x [N, H, W, D, C] and weight [U, 3, 3, 3, C]. EVEN: C is a multiple of BK."""
    NARROW: tl.constexpr = x.dtype.element_ty
    WIDE: tl.constexpr = tl.float64 if NARROW == tl.float64 else tl.float32
    filters = tl.cdiv(U, BN)
    row = tl.program_id(0) // filters * BM + tl.arange(0, BM)
    o = tl.program_id(0) % filters * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    exists = row < rows
    d, left = row % D, row // D
    w, left = left % W, left // W
    h, n = left % H, left // H
    # [BM]; a bit for each neighbour along an axis: whether it lies inside
    along_h = tl.where(exists, 2 + (h > 0).to(tl.int32) + 4 * (h < H - 1).to(tl.int32), 0)
    along_w = 2 + (w > 0).to(tl.int32) + 4 * (w < W - 1).to(tl.int32)
    along_d = 2 + (d > 0).to(tl.int32) + 4 * (d < D - 1).to(tl.int32)
    x += n.to(tl.int64) * x_n + (h - 1).to(tl.int64) * x_h + (w - 1).to(tl.int64) * x_w + (d - 1).to(tl.int64) * x_d
    weight += o.to(tl.int64) * w_o
    known = (o < U)[:, None]
    live = exists[:, None] & (o < U)[None, :]
    # [BM, BN]; what is added is added first, while no tile waits in registers
    acc = tl.zeros([BM, BN], WIDE)
    if ADDED:
        at = n.to(tl.int64) * r_n + h.to(tl.int64) * r_h + w.to(tl.int64) * r_w + d.to(tl.int64) * r_d
        acc += tl.load(residual + at[:, None] + o[None, :], mask=live, other=0.0).to(WIDE)
    if BIASED:
        acc += tl.load(bias + o, mask=o < U, other=0.0).to(WIDE)[None, :]
    steps = tl.cdiv(C, BK)
    for step in range(0, 27 * steps):
        tap, c = step // steps, step % steps * BK + k
        a, b, g = tap // 9, tap // 3 % 3, tap % 3
        # [BM, BK], [BN, BK]
        there = ((along_h >> a) & (along_w >> b) & (along_d >> g) & 1 == 1)[:, None]
        given = known
        if not EVEN:
            there = there & (c < C)[None, :]
            given = given & (c < C)[None, :]
        near = tl.load(x[:, None] + (a * x_h + b * x_w + g * x_d + c)[None, :], mask=there, other=0.0)
        filtering = tl.load(weight[:, None] + (a * w_h + b * w_w + g * w_d + c)[None, :], mask=given, other=0.0)
        acc = tl.dot(near, tl.trans(filtering), acc, input_precision="ieee", out_dtype=WIDE)
    if RELU:
        acc = tl.where(acc < 0, 0.0, acc)  # a NaN stays one
    tl.store(out + row.to(tl.int64)[:, None] * U + o[None, :], acc.to(NARROW), mask=live)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    op = "conv3"
    if x.ndim != 5 or weight.ndim != 5 or weight.shape[1:4] != (3, 3, 3) or weight.shape[4] != x.shape[4]:
        raise ValueError(
            f"{op}: x {tuple(x.shape)} and weight {tuple(weight.shape)} must be [N, H, W, D, C], [U, 3, 3, 3, C]"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: bias {tuple(bias.shape)} must be [U] of weight {tuple(weight.shape)}")
    if residual is not None and residual.shape != (*x.shape[:4], len(weight)):
        raise ValueError(f"{op}: residual {tuple(residual.shape)} must be [N, H, W, D, U] of x {tuple(x.shape)}")
    for name, tensor in {"x": x, "weight": weight, "bias": bias, "residual": residual}.items():
        if tensor is not None:
            check_dtype(op, name, tensor)
            check_contiguous_last(op, name, tensor)
            if tensor.dtype != x.dtype:
                raise ValueError(f"{op}: {name} is {tensor.dtype}, x {x.dtype}: they must be of one type")
    if x.dtype == torch.bfloat16 and INTERPRETED and x.is_cpu:
        raise ValueError(f"{op}: x is bfloat16, whose products Triton's interpreter gets wrong")
    if x.dtype == torch.float64 and not x.is_cpu:
        raise ValueError(f"{op}: x is float64, which only Triton's interpreter runs")
    if x.shape[:4].numel() >= 2**31:
        raise ValueError(f"{op}: x {tuple(x.shape)} has 2^31 voxels or more")
    check_device(op, x=x, weight=weight, bias=bias, residual=residual)


def _fake_forward(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, relu: bool) -> Tensor:
    _check(x, weight, bias, residual)
    return x.new_empty((*x.shape[:4], len(weight)))


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, relu: bool) -> Tensor:
    out = _fake_forward(x, weight, bias, residual, relu)
    (N, H, W, D, C), U = x.shape, len(weight)
    tile = tiles(TILES if x.itemsize == 2 else TILES_32, x)
    BN = min(tile.BN, max(16, 1 << (U - 1).bit_length()))
    rows, added = N * H * W * D, (0, 0, 0, 0) if residual is None else residual.stride()[:4]
    if out.numel():
        with on(x):
            conv3_forward[(cdiv(rows, tile.BM) * cdiv(U, BN),)](
                x, weight, bias, residual, out, *x.stride()[:4], *weight.stride()[:4], *added, rows, H, W, D, C, U,
                bias is not None, residual is not None, relu, C % tile.BK == 0, tile.BM, BN, tile.BK,
                num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
    return out


_FORWARD = register(
    "conv3(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, bool relu) -> Tensor",
    _forward, _fake_forward, decomposition=reference.conv3,
)  # fmt: skip


def conv3(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, relu: bool) -> Tensor:
    """3x3x3 convolution of x [N, H, W, D, C] by weight [U, 3, 3, 3, C], padded with zeros, then + bias [U],
    + residual [N, H, W, D, U], and ReLU where asked for: [N, H, W, D, U], contiguous.

    Channels are last and contiguous, everything before them by strides; of one type: float16, bfloat16, float32, and
    float64 in Triton's interpreter, which has no bfloat16. Sums, bias and residual are float32 (float64 of float64),
    rounded once; products of float32 are exact, outside the tensor cores. No gradient. The Triton kernel raises
    ValueError for what does not fit.
    """
    if use_triton(x):
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias, residual)):
            raise ValueError("conv3: there is no gradient through it: call it under torch.no_grad()")
        return _FORWARD(x, weight, bias, residual, relu)
    return reference.conv3(x, weight, bias, residual, relu)
