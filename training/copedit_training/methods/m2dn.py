"""M2DN: one diffusion network for every missing pattern, on axial slices (Meng et al., IEEE TMI 43(7), 2024).

Only missing modalities are noised, the clean images of all are predicted, and those observed are reconstructed. Known
of it: encoders a modality, a U-shaped fusion with channel attention, the code of what is missing at the bottleneck,
the loss. Widths, decoders, schedule and optimiser were not published anywhere within reach: they are ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GROUPS = 8  # of the group norms


class Residual(nn.Module):
    """Two 3x3 convolutions after group norms, the embedding of the timestep added between them."""

    def __init__(self, inside: int, outside: int, time: int):
        super().__init__()
        self.before, self.first = nn.GroupNorm(_groups(inside), inside), nn.Conv2d(inside, outside, 3, padding=1)
        self.time = nn.Linear(time, outside)
        self.between, self.second = nn.GroupNorm(_groups(outside), outside), nn.Conv2d(outside, outside, 3, padding=1)
        self.skip = nn.Conv2d(inside, outside, 1) if inside != outside else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x: [N, inside, h, w]; time: [N, time]."""
        y = self.first(F.silu(self.before(x))) + self.time(time)[:, :, None, None]
        return self.skip(x) + self.second(F.silu(self.between(y)))


def _groups(channels: int) -> int:
    """The most groups up to `GROUPS` that channels divide into."""
    return next(n for n in range(GROUPS, 0, -1) if channels % n == 0)


class ChannelAttention(nn.Module):
    """Squeeze and excitation (Hu et al. 2018)."""

    def __init__(self, channels: int, ratio: int = 8):
        super().__init__()
        inner = max(4, channels // ratio)
        self.squeeze, self.excite = nn.Linear(channels, inner), nn.Linear(inner, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3))))))[:, :, None, None]


def _convolution(inside: int, outside: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inside, outside, 3, stride, 1), nn.GroupNorm(_groups(outside), outside), nn.ReLU(inplace=True)
    )


class Network(nn.Module):
    """Clean slices of all elements from those of which the missing ones are noised.

    widths: of an encoder's two levels, a half and a quarter of the plane; fusion: of the three levels of the U, the
    first at a quarter of the plane; bottleneck: channels that guidance is joined to. guidance: its values, 0 for none.
    """

    frequencies: Tensor

    def __init__(
        self,
        elements: int,
        guidance: int,
        widths: Sequence[int] = (32, 64),
        fusion: Sequence[int] = (128, 256, 256),
        bottleneck: int = 128,
        time: int = 192,
    ):
        super().__init__()
        (fine, coarse), (a, b, c) = widths, fusion
        self.guidance = guidance
        self.register_buffer("frequencies", frequencies(a), persistent=False)
        self.time = nn.Sequential(nn.Linear(a, time), nn.SiLU(), nn.Linear(time, time), nn.SiLU())
        self.first = nn.ModuleList(_convolution(1, fine, 2) for _ in range(elements))
        self.second = nn.ModuleList(_convolution(fine, coarse, 2) for _ in range(elements))
        self.down = nn.ModuleList((Residual(elements * coarse, a, time), Residual(a, b, time), Residual(b, c, time)))
        self.middle = nn.ModuleList((Residual(c, bottleneck, time), Residual(bottleneck + guidance, c, time)))
        self.up = nn.ModuleList((Residual(2 * c, c, time), Residual(c + b, b, time), Residual(b + a, a, time)))
        self.attention = nn.ModuleList(ChannelAttention(n) for n in (c, b, a))
        self.wide = nn.ModuleList(_convolution(a + elements * fine, coarse) for _ in range(elements))
        self.last = nn.ModuleList(
            nn.Sequential(_convolution(coarse, fine), nn.Conv2d(fine, 1, 3, padding=1)) for _ in range(elements)
        )

    def forward(self, x: Tensor, t: Tensor, guidance: Tensor | None) -> Tensor:
        """x: [N, m, h, w]; t: [N] timesteps; guidance: [N, k] or None. Returns [N, m, h, w].

        Which elements are observed it learns from the guidance alone, as of the published network."""
        h, w = x.shape[2:]
        x = F.pad(x, (0, -w % 16, 0, -h % 16), "replicate")
        angle = t.float()[:, None] * self.frequencies
        time = self.time(torch.cat((angle.sin(), angle.cos()), 1).to(x.dtype))
        fine = [net(x[:, i : i + 1]) for i, net in enumerate(self.first)]
        y = torch.cat([net(z) for net, z in zip(self.second, fine, strict=True)], 1)
        y = self._fuse(y, time, guidance)
        y = torch.cat((_twice(y), *fine), 1)
        every = [last(_twice(wide(y))) for wide, last in zip(self.wide, self.last, strict=True)]
        return torch.cat(every, 1)[..., :h, :w]

    def _fuse(self, y: Tensor, time: Tensor, guidance: Tensor | None) -> Tensor:
        """The U: features [N, c, h, w] of all encoders to those of the decoders."""
        kept = []
        for i, block in enumerate(self.down):
            y = block(_half(y) if i else y, time)
            kept.append(y)
        into, out = self.middle
        y = into(y, time)
        if self.guidance:
            assert guidance is not None
            y = torch.cat((y, guidance.to(y.dtype)[:, :, None, None].expand(-1, -1, *y.shape[2:])), 1)
        y = out(y, time)
        for i, (block, attention) in enumerate(zip(self.up, self.attention, strict=True)):
            y = attention(block(torch.cat((_twice(y) if i else y, kept[-1 - i]), 1), time))
        return y


def frequencies(dim: int) -> Tensor:
    """Of the sine-cosine embedding [dim] of timesteps, [dim / 2]."""
    return torch.exp(torch.arange(dim // 2) * (-math.log(10000.0) / (dim // 2)))


def _half(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=False)


def _twice(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
