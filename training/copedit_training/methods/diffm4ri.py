"""DiffM4RI (JBHI 2026): an unconditional diffusion transformer on the stacked latents of all modalities; what is
observed comes in when it is sampled alone, by replacement.

Training knows no pattern: noise is predicted in all elements at one timestep. Sampling is ancestral, and before each
step the observed elements are replaced by themselves, noised to its level, as in RePaint (Lugmayr et al. 2022).
Replacement alone is biased towards the unconditional mean: of two Gaussians with correlation 0.8 and the observed one
at 1 it gives 0.5 where the truth is 0.8 (`tests/training/methods/test_diffm4ri.py`). Several visits of each level,
`resample`, repair most of that, at as many times the cost; the publication has one.

Ours: CoPeVAE in place of a VQ-VAE for each modality, our schedule of 500 steps in place of 1000, the 3D transformer of
Table 8 (RMS norms, SwiGLU), no learned variance.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from copedit_rt.config import DenoiserConfig, DiffusionConfig, ModelConfig
from copedit_rt.networks.denoiser import build_denoiser
from copedit_rt.networks.sampler import add_noise
from copedit_rt.schedule import alpha_bar, timesteps
from copedit_training.methods.base import Drawn, Noise, of_elements
from copedit_training.methods.latent import LatentMethod, LatentSettings
from copedit_training.stages.settings import Stage
from copedit_training.stages.task import Terms


@dataclass(frozen=True)
class DiffM4RISettings(LatentSettings):
    """width, heads, blocks: of the transformer; its patches are the model's. resample: how often each level is visited
    in sampling, 1 for the publication's sampler."""

    stage: ClassVar[Stage] = "diffm4ri"
    ranges: ClassVar = {"width": (8, 8192), "heads": (1, 128), "blocks": (1, 256), "resample": (1, 100)}

    width: int = 768
    heads: int = 12
    blocks: int = 12
    sampler_steps: int = 250
    resample: int = 1


def replaced(
    predict: Callable[[Tensor, Tensor], Tensor],
    known: Tensor,
    observed: Tensor,
    config: DiffusionConfig,
    steps: int,
    draw: Callable[[], Tensor],
    resample: int = 1,
    eta: float = 1.0,
) -> Tensor:
    """Latents of all elements by an unconditional model, whose observed ones are replaced at every level.

    predict: (z, t [B]) -> clean latents of all. known [B, m, ...]: those of what is observed [B, m]. draw: noise like
    known, anew at each call. resample: visits of each level (RePaint's). eta: 1 ancestral, 0 DDIM.
    """
    there = observed.reshape(*observed.shape, *(1,) * (known.ndim - 2))
    visited = timesteps(config, steps)
    levels = [*alpha_bar(config)[visited].tolist(), 1.0]
    z = draw()
    for i, t in enumerate(visited):
        now, after = levels[i], levels[i + 1]
        spread = eta * ((1 - after) / (1 - now) * (1 - now / after)) ** 0.5
        for visit in range(resample):
            x0 = predict(z, torch.full((len(z),), int(t), device=z.device))
            eps = (z - now**0.5 * x0) / (1 - now) ** 0.5
            z = after**0.5 * x0 + max(0.0, 1 - after - spread**2) ** 0.5 * eps + spread * draw()
            z = torch.where(there, after**0.5 * known + (1 - after) ** 0.5 * draw(), z)
            if after == 1.0:
                break
            if visit + 1 < resample:
                z = (now / after) ** 0.5 * z + (1 - now / after) ** 0.5 * draw()
    return z


class DiffM4RI(LatentMethod[DiffM4RISettings]):
    """Mean squared error of the noise in (or of) all clean latents; the loss does not know what is observed."""

    name, title, kind = "diffm4ri", "DiffM4RI", DiffM4RISettings
    adjustable = ("sampler_steps", "resample")

    @classmethod
    def network(cls, config: ModelConfig, settings: DiffM4RISettings) -> nn.Module:
        denoiser = DenoiserConfig(
            width=settings.width,
            heads=settings.heads,
            blocks=settings.blocks,
            patch=config.denoiser.patch,
            backbone="dit3d",
            prompts="none",
        )
        return build_denoiser(dataclasses.replace(config, denoiser=denoiser))

    def precision(self) -> AbstractContextManager[Any]:
        return self.autocast()  # on a CPU, too: it has no convolutions

    def objective(self, batch: Drawn) -> tuple[Tensor, Terms]:
        assert batch.latents is not None and batch.noise is not None and batch.timesteps is not None
        nothing = torch.zeros_like(batch.observed)
        zt = add_noise(batch.latents, batch.noise, self.levels[batch.timesteps], nothing)
        loss = self.wrong(self.net(zt, batch.timesteps, None, nothing), batch).mean()
        return loss, {"mse": loss.item()}

    def sampled(self, z: Tensor, observed: Tensor, noise: Noise) -> Tensor:
        nothing, drawn = torch.zeros_like(observed), 0

        def draw() -> Tensor:
            nonlocal drawn
            drawn += 1
            name = "" if drawn == 1 else f"-{drawn}"
            return self.noise_of(noise, len(z), z.shape[2:], name)

        def predict(x: Tensor, t: Tensor) -> Tensor:
            return self.clean(lambda x, t: self.used(x, t, None, nothing), x, t)

        settings = self.settings
        made = replaced(predict, z, observed, self.config.diffusion, settings.sampler_steps, draw, settings.resample)
        return torch.where(of_elements(observed), z, made)
