"""Linear layers in float8 for GPUs from Hopper on; off unless asked for. Has not been run on a GPU yet."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from copedit_rt.denoiser import Block, MDiT3D

KIND = torch.float8_e4m3fn
LARGEST = torch.finfo(KIND).max  # 448


def scaled(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [N, K] as float8, each row scaled to use its whole range, and the scales [N, 1] in float32."""
    scale = x.abs().amax(1, keepdim=True).float().clamp_min(1e-12) / LARGEST
    return (x / scale).clamp(-LARGEST, LARGEST).to(KIND), scale


class Float8Linear(nn.Module):
    """A linear layer whose weights and inputs are rounded to float8 (e4m3), with a scale for each output and each
    token; products accumulate in float32, results are bfloat16."""

    def __init__(self, layer: nn.Linear):
        """layer: in bfloat16, sizes multiples of 16."""
        super().__init__()
        weight, scale = scaled(layer.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.T.contiguous())
        self.register_buffer("bias", layer.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        rows, scale = scaled(x.flatten(0, -2))
        made = torch._scaled_mm(
            rows, cast(Tensor, self.weight).T, scale, cast(Tensor, self.scale),
            bias=cast(Tensor, self.bias), out_dtype=torch.bfloat16, use_fast_accum=False,
        )  # fmt: skip
        return made.unflatten(0, x.shape[:-1])


def float8(net: MDiT3D) -> MDiT3D:
    """Replace the products of every block, all but those of its modulation: a hundredth of the work, and the most
    sensitive. The network, in bfloat16, can then neither be trained nor saved."""
    for block in net.blocks:
        for name in ("qkv", "proj", "mlp_in", "mlp_out"):
            setattr(block, name, Float8Linear(getattr(cast(Block, block), name)))
    return net
