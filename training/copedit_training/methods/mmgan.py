"""MM-GAN (Sharma and Hamarneh 2019, arXiv 1904.12200): an image-to-image GAN on axial slices with every contrast as a
channel, zeros where one is missing, and a critic that judges each channel of a slice by itself.

A U-Net of strided convolutions fills in all channels; the observed ones are copied over its output, so that the L1 term
and the critic are about what is missing. The critic sees the complete real slice beside the candidate, in training
alone. How many contrasts are missing grows in the first half of the run.

Ours: slices are padded with zeros to a multiple of 2^levels (the published code resizes them), intensities are 0..1
(there, divided by their mean), the curriculum is in shares of the steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from copedit_rt.config import ModelConfig
from copedit_rt.task import Task
from copedit_training.methods.base import Drawn, Method, Noise, from_slices, least_squares, of_slices, to_slices
from copedit_training.stages.settings import MethodSettings, Stage
from copedit_training.stages.task import Terms

ADVERSARIAL, L1 = 0.1, 0.9
DROPOUT = 0.2


@dataclass(frozen=True)
class MMGANSettings(MethodSettings):
    """width: channels of the generator's first level, 8 times as many at most. levels: how often it halves a slice.
    critic_width: of the critic's first."""

    stage: ClassVar[Stage] = "mmgan"
    ranges: ClassVar = {"width": (1, 1024), "levels": (2, 10), "critic_width": (1, 1024)}

    width: int = 64
    levels: int = 8
    critic_width: int = 64
    beta1: float = 0.5


def phases(task: Task, elements: Sequence[str]) -> list[list[tuple[str, ...]]]:
    """The missing patterns that are drawn from in each part of a run: one missing; half of those with two; the other
    half and the first with three; all (of four: 4, 7, 11 and 14)."""
    by_count = [task.patterns(elements, count) for count in range(1, len(elements))]
    ones, twos, threes = (by_count[i] if i < len(by_count) else [] for i in range(3))
    half = ones + twos[: len(twos) // 2]
    return [ones, half, ones + twos + threes[:1], [pattern for each in by_count for pattern in each]]


def phase(step: int, steps: int) -> int:
    """Which of the four parts of a run a step is in; they end after a sixth, a third and half of it."""
    return sum(6 * step >= part * steps for part in (1, 2, 3))


class Down(nn.Module):
    """Half the size: convolution, instance norm (where there is one) and leaky ReLU."""

    def __init__(self, channels: int, out: int, norm: bool = True, dropout: float = 0.0):
        super().__init__()
        self.conv = nn.Conv2d(channels, out, 4, 2, 1, bias=False)
        self.norm = nn.InstanceNorm2d(out) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(F.leaky_relu(self.norm(self.conv(x)), 0.2))


class Up(nn.Module):
    """Twice the size, with the encoder's output of that size beside it."""

    def __init__(self, channels: int, out: int, dropout: float = 0.0):
        super().__init__()
        self.conv = nn.ConvTranspose2d(channels, out, 4, 2, 1, bias=False)
        self.norm = nn.InstanceNorm2d(out)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, beside: Tensor) -> Tensor:
        return torch.cat((self.dropout(F.relu(self.norm(self.conv(x)))), beside), 1)


class Generator(nn.Module):
    """U-Net from m channels to m channels."""

    def __init__(self, elements: int, width: int, levels: int):
        super().__init__()
        sizes = [min(width * 2**i, 8 * width) for i in range(levels)]
        last = levels - 1  # too small for a norm
        self.down = nn.ModuleList(
            Down(a, b, norm=0 < i < last, dropout=DROPOUT if i >= 3 else 0.0)
            for i, (a, b) in enumerate(itertools.pairwise([elements, *sizes]))
        )
        outs = sizes[-2::-1]
        self.up = nn.ModuleList(
            Up(sizes[-1] if i == 0 else 2 * outs[i - 1], out, dropout=DROPOUT if i < levels - 4 else 0.0)
            for i, out in enumerate(outs)
        )
        self.last = nn.Conv2d(2 * width, elements, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Slices [N, m, H, W] of any size -> the same shape, 0 or more."""
        h, w = x.shape[2:]
        step = 2 ** len(self.down)
        x = F.pad(x, (0, -w % step, 0, -h % step))
        kept = []
        for layer in self.down:
            x = layer(x)
            kept.append(x)
        for layer, beside in zip(self.up, kept[-2::-1], strict=True):
            x = layer(x, beside)
        x = F.pad(F.interpolate(x, scale_factor=2.0), (2, 1, 2, 1))
        return F.relu(self.last(x))[..., :h, :w]


class Critic(nn.Module):
    """Patches of each channel: a candidate beside the real slice [N, 2m, H, W] -> [N, m, H / 16, W / 16]."""

    def __init__(self, elements: int, width: int):
        super().__init__()
        layers: list[nn.Module] = []
        sizes = [2 * elements, *(width * 2**i for i in range(4))]
        for i, (a, b) in enumerate(itertools.pairwise(sizes)):
            layers += [nn.Conv2d(a, b, 4, 2, 1), nn.InstanceNorm2d(b) if i else nn.Identity(), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.ZeroPad2d((2, 1, 2, 1)), nn.Conv2d(sizes[-1], elements, 4, bias=False))

    def forward(self, pair: Tensor) -> Tensor:
        return self.layers(pair)


class MMGAN(Method[MMGANSettings]):
    """0.9 of L1 over what is missing and 0.1 of the least-squares adversarial term."""

    name, title, space, kind = "mmgan", "MM-GAN", "image", MMGANSettings
    sliced = True

    @classmethod
    def network(cls, config: ModelConfig, settings: MMGANSettings) -> nn.Module:
        return Generator(len(config.elements), settings.width, settings.levels)

    @classmethod
    def critic(cls, config: ModelConfig, settings: MMGANSettings) -> nn.Module:
        return Critic(len(config.elements), settings.critic_width)

    def patterns(self, rng: np.random.Generator, step: int, batch: int) -> Tensor:
        elements = self.config.elements
        able = phases(self.config.task, elements)[phase(step, self.settings.steps)]
        drawn = [able[i] for i in rng.integers(0, len(able), batch)]
        return torch.tensor([[name not in missing for name in elements] for missing in drawn])

    def objective(self, batch: Drawn) -> tuple[Tensor, Terms]:
        assert batch.images is not None
        truth = to_slices(batch.images)
        observed = of_slices(batch.observed, batch.images.shape[-1])
        made, l1 = self.candidate(truth, observed)
        adversarial, critic = least_squares(
            self.module.adversary,  # type: ignore[arg-type]
            torch.cat((made, truth), 1),
            torch.cat((truth, truth), 1),
            observed[:, :, None, None],
        )
        terms = {"l1": l1.item(), "adversarial": adversarial.item(), "discriminator": critic.item()}
        terms["phase"] = float(phase(batch.step, self.settings.steps))
        return L1 * l1 + ADVERSARIAL * adversarial + critic, terms

    def candidate(self, truth: Tensor, observed: Tensor) -> tuple[Tensor, Tensor]:
        """Slices [N, m, H, W] with what is not observed [N, m] filled in, and the mean error of that."""
        there = observed[:, :, None, None]
        out = self.net(torch.where(there, truth, 0.0)).float()
        wrong = torch.where(there, 0.0, (out - truth).abs())
        return torch.where(there, truth, out), wrong.sum() / (~there).expand_as(wrong).sum()

    def fill(self, known: Tensor, observed: Tensor, noise: Noise) -> Tensor:
        return from_slices(self.used(to_slices(known)), len(known))
