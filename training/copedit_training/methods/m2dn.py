"""M2DN: one diffusion network for every missing pattern, on axial slices (Meng et al., IEEE TMI 43(7), 2024).

Only missing modalities are noised, the clean images of all are predicted, and those observed are reconstructed. Known
of it: encoders a modality, a U-shaped fusion with channel attention, the code of what is missing at the bottleneck,
the loss. Widths, decoders, schedule and optimiser were not published anywhere within reach: they are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from copedit_rt.config import ModelConfig
from copedit_rt.networks.sampler import add_noise, sample
from copedit_training.methods.base import Drawn, Method, Noise, from_slices, of_elements, of_slices, to_slices
from copedit_training.methods.guidance import Guidance
from copedit_training.stages.settings import MethodSettings, Stage
from copedit_training.stages.task import Terms

GROUPS = 8  # of the group norms
PART = 64  # slices that are sampled at a time


@dataclass(frozen=True)
class M2DNSettings(MethodSettings):
    """width: channels of an encoder's first level; all others are multiples of it. Published guidance is the mask."""

    stage: ClassVar[Stage] = "m2dn"
    ranges: ClassVar = {"width": (4, 512)}

    width: int = 32
    ema: float = 0.9999
    guidance: str = "mask"


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

    Encoders of width w and 2 w at a half and a quarter of the plane, the U of 4 w, 8 w and 8 w from there to a
    sixteenth, 4 w in its middle, where the guidance joins them.
    """

    frequencies: Tensor

    def __init__(self, elements: int, guidance: Guidance, width: int):
        super().__init__()
        fine, coarse, time = width, 2 * width, 6 * width
        a, b, c, bottleneck = 4 * width, 8 * width, 8 * width, 4 * width
        self.guidance = guidance
        self.register_buffer("frequencies", frequencies(a), persistent=False)
        self.time = nn.Sequential(nn.Linear(a, time), nn.SiLU(), nn.Linear(time, time), nn.SiLU())
        self.first = nn.ModuleList(_convolution(1, fine, 2) for _ in range(elements))
        self.second = nn.ModuleList(_convolution(fine, coarse, 2) for _ in range(elements))
        self.down = nn.ModuleList((Residual(elements * coarse, a, time), Residual(a, b, time), Residual(b, c, time)))
        self.middle = nn.ModuleList((Residual(c, bottleneck, time), Residual(bottleneck + guidance.width, c, time)))
        self.up = nn.ModuleList((Residual(2 * c, c, time), Residual(c + b, b, time), Residual(b + a, a, time)))
        self.attention = nn.ModuleList(ChannelAttention(n) for n in (c, b, a))
        self.wide = nn.ModuleList(_convolution(a + elements * fine, coarse) for _ in range(elements))
        self.last = nn.ModuleList(
            nn.Sequential(_convolution(coarse, fine), nn.Conv2d(fine, 1, 3, padding=1)) for _ in range(elements)
        )

    def forward(self, x: Tensor, t: Tensor, guidance: Tensor) -> Tensor:
        """x: [N, m, h, w]; t: [N] timesteps; guidance: [N, k]. Returns [N, m, h, w].

        Which elements are observed it learns from the guidance alone, as of the published network."""
        h, w = x.shape[2:]
        x = F.pad(x, (0, -w % 16, 0, -h % 16), "replicate")
        angle = t.float()[:, None] * self.frequencies
        time = self.time(torch.cat((angle.sin(), angle.cos()), 1).to(x.dtype))
        fine = [net(x[:, i : i + 1]) for i, net in enumerate(self.first)]
        y = torch.cat([net(z) for net, z in zip(self.second, fine, strict=True)], 1)
        y = self._fuse(y, time, guidance.to(y.dtype))
        y = torch.cat((_twice(y), *fine), 1)
        every = [last(_twice(wide(y))) for wide, last in zip(self.wide, self.last, strict=True)]
        return torch.cat(every, 1)[..., :h, :w]

    def _fuse(self, y: Tensor, time: Tensor, guidance: Tensor) -> Tensor:
        """The U: features [N, c, h, w] of all encoders to those of the decoders."""
        kept = []
        for i, block in enumerate(self.down):
            y = block(_half(y) if i else y, time)
            kept.append(y)
        into, out = self.middle
        y = into(y, time)
        y = out(torch.cat((y, guidance[:, :, None, None].expand(-1, -1, *y.shape[2:])), 1), time)
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


class M2DN(Method[M2DNSettings]):
    """Squared error of the clean slices of all elements, of which the missing ones were noised; in -1..1."""

    name, title, space, kind = "m2dn", "M2DN (our sizes)", "image", M2DNSettings
    noised = sliced = guided = True
    adjustable = ("sampler_steps",)

    @classmethod
    def network(cls, config: ModelConfig, settings: M2DNSettings) -> nn.Module:
        m = len(config.elements)
        return Network(m, Guidance(settings.guidance, m, config.tokenizer.prompt_dim, m), settings.width)

    def objective(self, batch: Drawn) -> tuple[Tensor, Terms]:
        assert batch.images is not None and batch.noise is not None and batch.timesteps is not None
        observed, clean, depth = batch.observed, 2 * batch.images - 1, batch.images.shape[-1]
        noised = add_noise(clean, batch.noise, self.levels[batch.timesteps], observed)
        guidance = cast(Network, self.net).guidance(observed, self.prompts_of(batch))
        out = self.net(to_slices(noised), of_slices(batch.timesteps, depth), of_slices(guidance, depth))
        error = (from_slices(out.float(), len(clean)) - clean).square().mean((2, 3, 4, 5))
        return error.mean(), {"mse": error.mean().item(), "mse_missing": error.detach()[~observed].mean().item()}

    def fill(self, known: Tensor, observed: Tensor, noise: Noise) -> Tensor:
        guidance = cast(Network, self.used).guidance(observed, self.prompted(known, observed))
        eps = self.noise_of(noise, len(known), known.shape[2:])
        z = torch.where(of_elements(observed), 2 * known - 1, eps)

        def predict(z: Tensor, t: Tensor) -> Tensor:
            told = (of_slices(x, z.shape[-1]).split(PART) for x in (t, guidance))
            parts = [self.used(*part).float() for part in zip(to_slices(z).split(PART), *told, strict=True)]
            return from_slices(torch.cat(parts), len(z))

        return (sample(predict, z, observed, self.config.diffusion, self.settings.sampler_steps, solver="ddim") + 1) / 2
