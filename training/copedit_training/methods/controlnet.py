"""ControlNet (Zhang et al. 2023): an unconditional latent diffusion model, frozen, and a copy of its encoder that
steers it by what is observed, through convolutions that start at zero.

The run has two parts. In the first the base learns to denoise all elements, of complete studies, told nothing. Then
it is frozen, decoder included, and the copy, which begins with the base's own (averaged) encoder, is trained: its
condition is the observed latents, zeros elsewhere, and a mask. What is observed is pasted into the result. The seconds
of both parts are its budget.

Ours: the base, trained on the same studies instead of a large image collection; CoPeVAE; the widths; how the condition
is embedded (one convolution, as it lies on the latents' grid already).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from copedit_rt.config import ModelConfig
from copedit_rt.errors import CopeditError
from copedit_rt.networks.sampler import add_noise
from copedit_training.methods.base import Drawn, Noise, of_elements
from copedit_training.methods.latent import LatentMethod, UNet, UNetSettings
from copedit_training.stages.settings import Stage
from copedit_training.stages.task import Terms


@dataclass(frozen=True)
class ControlNetSettings(UNetSettings):
    """control_steps: so many of the steps, at the end and with a schedule of their own (peak `control_lr`), train the
    copy on the frozen base. embedding: channels of the first convolution of the condition."""

    stage: ClassVar[Stage] = "controlnet"
    ranges: ClassVar = UNetSettings.ranges | {
        "control_steps": (1, 10_000_000),
        "control_lr": (1e-12, 10),
        "embedding": (1, 4096),
    }

    control_steps: int = 50_000
    control_lr: float = 1e-5
    embedding: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.control_steps < self.steps:
            raise CopeditError(f"control_steps = {self.control_steps}: must be below steps = {self.steps}; set both")

    @property
    def base_steps(self) -> int:
        return self.steps - self.control_steps

    def phase(self, step: int) -> tuple[float, int, int]:
        if step < self.base_steps:
            return self.lr, step, self.base_steps
        return self.control_lr, step - self.base_steps, self.control_steps


class Controlled(nn.Module):
    """The base, and MONAI's ControlNet beside it."""

    def __init__(self, config: ModelConfig, settings: ControlNetSettings):
        super().__init__()
        from monai.networks.nets import ControlNet as Copy

        self.base = UNet(config, settings)
        own, _ = settings.folded(config)
        m = len(config.elements)
        self.control = Copy(
            in_channels=own * m,
            conditioning_embedding_in_channels=(own + 1) * m,
            conditioning_embedding_num_channels=(settings.embedding,),  # more would halve the condition
            **self.base.parts(),
        )

    def start(self) -> None:
        """Give the copy the base's encoder. What MONAI's has beyond it starts at zero, or embeds the condition."""
        self.control.load_state_dict(self.base.net.state_dict(), strict=False)

    def free(self, z: Tensor, t: Tensor) -> Tensor:
        """What the base alone makes of latents z [B, m, c, h, w, d] at t [B]."""
        return self.base.unfold(self.base.net(self.base.fold(z), t))

    def forward(self, z: Tensor, t: Tensor, known: Tensor, observed: Tensor) -> Tensor:
        """The same, steered by the latents `known` [B, m, c, h, w, d] of what is observed [B, m]; the gradient is
        the copy's alone."""
        base, x = self.base, self.base.fold(z)
        given = base.fold(torch.where(of_elements(observed), known, 0.0))
        down, middle = self.control(x, t, torch.cat((given, base.code(observed, given)), 1))
        frozen = {name: p.detach() for name, p in base.net.named_parameters()}
        more = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        return base.unfold(functional_call(base.net, frozen, (x, t), more))


class ControlNet(LatentMethod[ControlNetSettings]):
    """Mean squared error of the noise in (or of) all clean latents, in both parts."""

    name, title, kind = "controlnet", "ControlNet", ControlNetSettings

    @classmethod
    def network(cls, config: ModelConfig, settings: ControlNetSettings) -> nn.Module:
        return Controlled(config, settings)

    @property
    def sparse(self) -> bool:
        return True  # each part trains its own weights

    def objective(self, batch: Drawn) -> tuple[Tensor, Terms]:
        assert batch.latents is not None and batch.noise is not None and batch.timesteps is not None
        z0, t, net = batch.latents, batch.timesteps, self.net
        assert isinstance(net, Controlled)
        zt = add_noise(z0, batch.noise, self.levels[t], torch.zeros_like(batch.observed))
        second = batch.step >= self.settings.base_steps
        loss = self.wrong(net(zt, t, z0, batch.observed) if second else net.free(zt, t), batch).mean()
        return loss, {"mse": loss.item(), "control": float(second)}

    @torch.no_grad()
    def after_step(self, step: int) -> Terms:
        terms = super().after_step(step)
        if step + 1 == self.settings.base_steps:
            for net in (self.net, self.used):
                assert isinstance(net, Controlled) and isinstance(self.used, Controlled)
                net.base.load_state_dict(self.used.base.state_dict())
                net.start()
                net.control.load_state_dict(self.net.control.state_dict())  # type: ignore[union-attr]
        return terms

    def sampled(self, z: Tensor, observed: Tensor, noise: Noise) -> Tensor:
        made = self.ddim(
            lambda x, t: self.used(x, t, z, observed), self.begin_with(z, noise), torch.zeros_like(observed)
        )
        return torch.where(of_elements(observed), z, made)
