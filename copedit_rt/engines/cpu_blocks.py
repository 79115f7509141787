"""The denoiser's blocks for CPUs: weights once in oneDNN's own layout, fewer passes over the activations."""

from __future__ import annotations

import functools
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from copedit_kernels import axis_attention
from copedit_rt.networks.denoiser import EPS, Block, MDiT3D, Pending, added, pick

ROWS = 2304  # of activations, for which oneDNN chooses the layout; others are right as well


@functools.cache
def packable(dtype: torch.dtype) -> bool:
    """Whether this processor and build of torch can run `PackedBlock` in a dtype: float32, and bfloat16 where the
    processor multiplies it."""
    if not torch.backends.mkldnn.is_available() or dtype not in (torch.float32, torch.bfloat16):
        return False
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    try:
        x, weight = torch.ones(2, 8, dtype=dtype), torch.eye(8, dtype=dtype)
        made = _Packed(weight, weight[0]).times(x, x)
        return bool(torch.equal(made, 1 + weight[:1].expand(2, -1)))
    except (AttributeError, RuntimeError):
        return False  # the operators are those of torch's compiler, not public: gone, changed, or not for this build


def pack(net: MDiT3D) -> MDiT3D:
    """Replace the blocks of a network on the CPU by packed ones, which hold their weights a second time in place of the
    first; it can then neither be trained nor saved. Where that is not possible it stays as it is."""
    weight = net.embed.weight
    if weight.is_cpu and packable(weight.dtype):
        for i, block in enumerate(net.blocks):
            net.blocks[i] = PackedBlock(cast(Block, block))
    return net


class _Packed:
    """A linear layer, with what may follow it done where the product is stored."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), ROWS)
        self.bias = None if bias is None else bias.detach().contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")

    def silu(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "swish", [], "")

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, self.weight, self.bias, "mul")


class PackedBlock(nn.Module):
    """`Block.modulated` with the same weights, for inference.

    Products take what follows them along: bias, SiLU, and the product of SwiGLU's halves. Norms and gates are one pass
    each. In bfloat16 the norm's factor and the rotation are rounded to it, as in PyTorch code that is not fused; sums,
    softmax and products accumulate in float32.
    """

    def __init__(self, block: Block):
        super().__init__()
        self.axis, self.prompted, self.heads = block.axis, block.prompted, block.heads
        self.modulation, self.norm1, self.norm2 = block.modulation, block.norm1, block.norm2
        self.qkv, self.proj, self.out = (_Packed(x.weight, x.bias) for x in (block.qkv, block.proj, block.mlp_out))
        halves = zip(block.mlp_in.weight.chunk(2), block.mlp_in.bias.chunk(2), strict=True)
        self.gate, self.value = (_Packed(*half) for half in halves)

    def modulated(
        self, x: Tensor, modulation: Tensor, rope: Tensor | None, rows: Tensor | None = None, pending: Pending = None
    ) -> tuple[Tensor, Pending]:
        """As `Block.modulated`, with nothing left pending."""
        x = added(x, pending)
        if rows is not None and self.axis == "token":
            x, modulation, rows = pick(x, rows), modulation.index_select(0, rows // x.shape[1]), None
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation[:, None, None].chunk(6, dim=-1)
        h = self.qkv(norm(x, self.norm1, scale1, shift1)).unflatten(-1, (3, self.heads, -1))
        mixed = within(h, rope) if self.axis == "token" else axis_attention(h, rope, self.axis)
        if rows is not None:
            sample = rows // x.shape[1]
            x, mixed = pick(x, rows), pick(mixed, rows)
            gate1, shift2, scale2, gate2 = (part.index_select(0, sample) for part in (gate1, shift2, scale2, gate2))
        x = torch.addcmul(x, gate1, self.proj(mixed.flatten(-2)))
        h = norm(x, self.norm2, scale2, shift2)
        return torch.addcmul(x, gate2, self.out(self.value.times(h, self.gate.silu(h)))), None


def norm(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """`copedit_kernels.ada_norm` of kind "rms"; scale, shift [B, 1, 1, C]."""
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    factor = size.square_().div_(x.shape[-1]).add_(EPS).rsqrt_().to(x.dtype)
    return torch.addcmul(shift, x * factor, weight * (1 + scale))


def within(qkv: Tensor, rope: Tensor | None) -> Tensor:
    """`copedit_kernels.axis_attention` along "token"."""
    B, m, T, _, heads, D = qkv.shape
    if rope is None:
        q, k, v = qkv.flatten(0, 1).permute(2, 0, 3, 1, 4)
    else:
        turned = qkv.new_empty(2, B, m, heads, T, D)
        a, b = qkv[:, :, :, :2].permute(3, 0, 1, 4, 2, 5).chunk(2, dim=-1)
        first, second = turned.chunk(2, dim=-1)
        cos, sin = rope.to(qkv.dtype)
        torch.mul(a, cos, out=first).addcmul_(b, sin, value=-1)
        torch.mul(b, cos, out=second).addcmul_(a, sin)
        (q, k), v = turned.flatten(1, 2), qkv[:, :, :, 2].flatten(0, 1).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).unflatten(0, (B, m))
