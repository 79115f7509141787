"""LDM (Rombach et al. 2022, arXiv 2112.10752): a diffusion U-Net on latents that predicts the noise in what is missing,
with what is observed concatenated.

Its input is three groups of channels: the noised latents of the missing elements, the clean ones of the observed, zeros
in either elsewhere, and a mask. Ours: the mask and the place of the observed latents, which the publication has for
other conditions; CoPeVAE in place of its autoencoder; the widths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from copedit_rt.config import ModelConfig
from copedit_rt.networks.sampler import add_noise
from copedit_training.methods.base import Drawn, Noise, of_elements
from copedit_training.methods.latent import LatentMethod, UNet, UNetSettings
from copedit_training.stages.settings import Stage
from copedit_training.stages.task import Terms


@dataclass(frozen=True)
class LDMSettings(UNetSettings):
    stage: ClassVar[Stage] = "ldm"


class Conditioned(UNet):
    """The noise in the missing latents, from these and the observed ones."""

    def __init__(self, config: ModelConfig, settings: LDMSettings):
        own, _ = settings.folded(config)
        super().__init__(config, settings, more=(own + 1) * len(config.elements))

    def forward(self, z: Tensor, t: Tensor, observed: Tensor) -> Tensor:
        """z [B, m, c, h, w, d]: observed latents, and noised ones in what is missing; t [B]. Like z; what is said of
        observed elements means nothing."""
        there = of_elements(observed)
        noised, known = (self.fold(torch.where(there == of, z, 0.0)) for of in (False, True))
        return self.unfold(self.net(torch.cat((noised, known, self.code(observed, noised)), 1), t))


class LDM(LatentMethod[LDMSettings]):
    """Mean squared error of the noise (or clean latents) of what is missing."""

    name, title, kind = "ldm", "LDM", LDMSettings

    @classmethod
    def network(cls, config: ModelConfig, settings: LDMSettings) -> nn.Module:
        return Conditioned(config, settings)

    def objective(self, batch: Drawn) -> tuple[Tensor, Terms]:
        assert batch.latents is not None and batch.noise is not None and batch.timesteps is not None
        zt = add_noise(batch.latents, batch.noise, self.levels[batch.timesteps], batch.observed)
        loss = self.wrong(self.net(zt, batch.timesteps, batch.observed), batch)[~batch.observed].mean()
        return loss, {"mse": loss.item()}

    def sampled(self, z: Tensor, observed: Tensor, noise: Noise) -> Tensor:
        begin = torch.where(of_elements(observed), z, self.begin_with(z, noise))
        return self.ddim(lambda x, t: self.used(x, t, observed), begin, observed)
