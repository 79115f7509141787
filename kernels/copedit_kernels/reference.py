"""The specification of every operator, in plain PyTorch that also runs in float64.

Shapes: B samples, m elements, T tokens per element, C channels, D channels per head. Half-precision inputs are
computed in float32 and rounded once at the end.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotary embedding (Su et al. 2024) of x [B, m, T, heads, D] by rope [2, T, D/2] (cos, sin).

    Channel j turns with channel j + D/2.
    """
    cos, sin = rope.to(_wide(x).dtype)[:, None, None, :, None]
    a, b = _wide(x).chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def axis_attention(qkv: Tensor, rope: Tensor | None, axis: str) -> Tensor:
    """Attention within an element or across elements (Section 3.3).

    qkv: [B, m, T, 3, heads, D]. rope: [2, T, D/2] or None, applied to q and k by token.
    axis: "token" attends over the T tokens of each element, "element" over the m elements at each token.
    Returns [B, m, T, heads, D] in qkv's dtype.
    """
    if axis not in ("token", "element"):
        raise ValueError(f"axis_attention: axis {axis!r} must be 'token' or 'element'")
    if qkv.ndim != 6 or qkv.shape[3] != 3:
        raise ValueError(f"axis_attention: qkv {tuple(qkv.shape)} must be [B, m, T, 3, heads, D]")
    q, k, v = qkv.unbind(3)
    if rope is not None:
        if rope.shape != (2, qkv.shape[2], qkv.shape[5] // 2):
            raise ValueError(f"axis_attention: rope {tuple(rope.shape)} does not fit qkv {tuple(qkv.shape)}")
        q, k = rotate(q, rope), rotate(k, rope)
    order = (0, 1, 3, 2, 4) if axis == "token" else (0, 2, 3, 1, 4)
    q, k, v = (x.permute(order) for x in (q, k, v))
    if axis == "element" and (torch.compiler.is_exporting() or not torch.compiler.is_compiling()):
        return F.scaled_dot_product_attention(q, k, v).permute(0, 3, 1, 2, 4)
    # Four dimensions choose the fused kernel, five the one that writes every score: right for m x m only. torch.compile
    # (2.13, on a CPU, float32) makes five into four with heads and elements exchanged, without an error in a network.
    out = F.scaled_dot_product_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)).unflatten(0, q.shape[:2])
    return out.transpose(2, 3) if axis == "token" else out.permute(0, 3, 1, 2, 4)


def ada_norm(
    x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor | None = None, kind: str = "rms", eps: float = 1e-4
) -> Tensor:
    """Norm over C, then x * (1 + scale) + shift (adaLN, Peebles & Xie 2023).

    x: [B, m, T, C]. scale, shift: [B, C], one per sample. weight: [C] or None. kind: "rms" or "layer".
    """
    if kind not in ("rms", "layer"):
        raise ValueError(f"ada_norm: kind {kind!r} must be 'rms' or 'layer'")
    if scale.shape != (x.shape[0], x.shape[-1]) or shift.shape != scale.shape:
        raise ValueError(f"ada_norm: scale {tuple(scale.shape)} and shift {tuple(shift.shape)} must be [B, C] of x")
    y = _wide(x)
    if kind == "layer":
        y = y - y.mean(-1, keepdim=True)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(y.dtype)
    y = y * (1 + scale[:, None, None].to(y.dtype)) + shift[:, None, None].to(y.dtype)
    return y.to(x.dtype)


def gated_residual_ada_norm(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor | None = None,
    kind: str = "rms",
    eps: float = 1e-4,
) -> tuple[Tensor, Tensor]:
    """(y, ada_norm(y)) with y = x + gate * branch; gate [B, C], the rest as in `ada_norm`."""
    if gate.shape != (x.shape[0], x.shape[-1]):
        raise ValueError(f"gated_residual_ada_norm: gate {tuple(gate.shape)} must be [B, C] of x {tuple(x.shape)}")
    y = x + (gate[:, None, None] * branch).to(x.dtype)
    return y, ada_norm(y, scale, shift, weight, kind, eps)


def swiglu(h: Tensor) -> Tensor:
    """silu(h[..., :F]) * h[..., F:] for h [..., 2F] (Shazeer 2020)."""
    a, b = _wide(h).chunk(2, dim=-1)
    return (F.silu(a) * b).to(h.dtype)


def conv3(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, relu: bool) -> Tensor:
    """3x3x3 convolution of x [N, H, W, D, C] by weight [U, 3, 3, 3, C], padded with zeros, then + bias [U],
    + residual [N, H, W, D, U], and ReLU where asked for."""
    added = None if bias is None else _wide(bias)
    y = F.conv3d(_wide(x).movedim(-1, 1), _wide(weight).movedim(-1, 1), added, padding=1).movedim(1, -1)
    y = y if residual is None else y + _wide(residual)
    return (y.relu() if relu else y).to(x.dtype)


def nearest_code(z: Tensor, codebook: Tensor, rows: int = 256) -> Tensor:
    """Index [N] (int64) of the code nearest to each z [N, d] in codebook [K, d]; the leftmost on ties.

    `rows` vectors at a time, so that no N x K matrix exists. Differences are squared and summed one channel after the
    other: |c|^2 - 2 z.c cancels where vectors share an offset (1.3 % wrong at +100 in float32), and a matrix product
    may round equal codes differently.
    """
    if z.ndim != 2 or codebook.ndim != 2 or z.shape[1] != codebook.shape[1]:
        raise ValueError(
            f"nearest_code: z {tuple(z.shape)} and codebook {tuple(codebook.shape)} must be [N, d], [K, d]"
        )
    codes = _wide(codebook).to(_wide(z).dtype)
    index = torch.empty(len(z), dtype=torch.int64, device=z.device)
    for part, out in zip(_wide(z).split(rows), index.split(rows), strict=True):
        distance = part.new_zeros(len(part), len(codes))
        for channel, code in zip(part.T, codes.T, strict=True):
            difference = channel[:, None] - code
            distance += difference.square_()  # not addcmul: fused, it rounds otherwise than the kernel
        out.copy_(distance.argmin(1))
    return index


def partial_ddim_step_(z: Tensor, x0: Tensor, observed: Tensor, table: Tensor, step: Tensor | int) -> Tensor:
    """One DDIM step (eta 0, Song et al. 2021, eq. 12) in place on z [B, m, ...], missing elements only.

    observed: bool [B, m]. table: [S, 2], z <- table[step, 0] * z + table[step, 1] * x0. Observed elements keep their
    bits.
    """
    if z.shape != x0.shape or observed.shape != z.shape[:2]:
        raise ValueError(
            f"partial_ddim_step_: z {tuple(z.shape)}, x0 {tuple(x0.shape)}, observed {tuple(observed.shape)} do not fit"
        )
    keep, rate = table[step].to(_wide(z).dtype)
    moved = (keep * _wide(z) + rate * _wide(x0)).to(z.dtype)
    return z.copy_(torch.where(observed.reshape(observed.shape + (1,) * (z.ndim - 2)), z, moved))
