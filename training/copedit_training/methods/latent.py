"""What methods on the latents of CoPeVAE share: encoding, decoding, and what the network predicts.

The tokenizer takes the place of each publication's own autoencoder (ours): they differ in nothing but the method.

The publications' networks predict noise, and so do the presets of their sizes. Noise fills every dimension of a latent:
a network that has fewer channels than the latents that it sees at a place cannot pass it on, however long it learns.
The demo presets are such networks, and predict clean latents instead (ours), as CoPeDiT does.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from einops import rearrange
from torch import Tensor, nn

from copedit_rt.config import ModelConfig
from copedit_rt.errors import CopeditError
from copedit_rt.networks.sampler import sample
from copedit_training.methods.base import Drawn, Method, Noise, of_elements
from copedit_training.stages.settings import MethodSettings


@dataclass(frozen=True)
class LatentSettings(MethodSettings):
    """predicts: "noise", with its mean squared error as the loss, or "clean" latents with theirs."""

    predicts: str = "noise"
    ema: float = 0.9999


M = TypeVar("M", bound=LatentSettings)


def clean(z: Tensor, eps: Tensor, level: Tensor) -> Tensor:
    """What noised latents z [B, ...] at alpha-bar `level` [B] are without the noise eps that a network sees in them."""
    level = level.reshape(-1, *(1,) * (z.ndim - 1))
    return (z - (1 - level).sqrt() * eps) / level.sqrt()


class LatentMethod(Method[M]):
    """A diffusion model on latents [B, m, c, h, w, d]; `sampled` is its own."""

    space = "latent"
    noised = True
    adjustable: ClassVar[tuple[str, ...]] = ("sampler_steps",)

    @abstractmethod
    def sampled(self, z: Tensor, observed: Tensor, noise: Noise) -> Tensor:
        """Latents of all elements, given those of the observed ones, zeros elsewhere."""

    def fill(self, known: Tensor, observed: Tensor, noise: Noise) -> Tensor:
        z = self.tokenizer.normalise(self.tokenizer.encode(known).float())
        z = torch.where(of_elements(observed), z, 0.0)
        return self.decoded(self.sampled(z, observed, noise), observed)

    def decoded(self, z: Tensor, observed: Tensor) -> Tensor:
        """Images [B, m, 1, H, W, D] of latents; of a brain's only the missing ones, zeros elsewhere."""
        if self.joint:
            return self.tokenizer.images(z, True).float()
        images = z.new_zeros(*z.shape[:2], 1, *self.config.image)
        images[~observed] = self.tokenizer.images(z[~observed][None], False).float()[0]
        return images

    def begin_with(self, z: Tensor, noise: Noise) -> Tensor:
        """Noise of every element, like latents z."""
        return self.noise_of(noise, len(z), z.shape[2:])

    def wrong(self, out: Tensor, batch: Drawn) -> Tensor:
        """Mean squared error [B, m] of a network's output for a micro-batch."""
        target = batch.noise if self.settings.predicts == "noise" else batch.latents
        assert target is not None
        return (out.float() - target).square().mean((2, 3, 4, 5))

    def clean(self, net: Callable[[Tensor, Tensor], Tensor], z: Tensor, t: Tensor) -> Tensor:
        """Clean latents by what a network (z, t [B]) makes of noised ones."""
        out = net(z, t).float()
        return clean(z, out, self.levels[t]) if self.settings.predicts == "noise" else out

    def ddim(self, net: Callable[[Tensor, Tensor], Tensor], z: Tensor, observed: Tensor) -> Tensor:
        """DDIM (Song et al. 2021, eta 0) of what is not observed in z, by a network (z, t [B])."""
        steps, schedule = self.settings.sampler_steps, self.config.diffusion
        return sample(lambda x, t: self.clean(net, x, t), z, observed, schedule, steps, solver="ddim")


@dataclass(frozen=True)
class UNetSettings(LatentSettings):
    """Of MONAI's diffusion U-Net. width: channels of the first level; the second has twice, the third `widest` times as
    many. residual_blocks: of each level. attention: so many of the lowest levels have it, in heads of 32 channels.
    fold_plane, fold_depth: blocks of latents that become channels first, as the network of a tokenizer that compresses
    little would be large and slow.
    """

    ranges: ClassVar = {
        "width": (8, 4096),
        "widest": (1, 16),
        "residual_blocks": (1, 16),
        "attention": (0, 3),
        "fold_plane": (1, 16),
        "fold_depth": (1, 16),
    }

    width: int = 128
    widest: int = 4
    residual_blocks: int = 2
    attention: int = 2
    fold_plane: int = 1
    fold_depth: int = 1

    def folded(self, config: ModelConfig) -> tuple[int, tuple[int, int, int]]:
        """Channels of an element and the grid that the U-Net sees. Raises CopeditError where blocks do not fit."""
        (h, w, d), p, q = config.latent, self.fold_plane, self.fold_depth
        # A U-Net of three levels halves the plane twice, and the depth where there is any.
        fits = h % (4 * p) == 0 and w % (4 * p) == 0 and d % q == 0 and (d == q or d % (4 * q) == 0)
        if not fits:
            raise CopeditError(
                f"fold_plane = {p}, fold_depth = {q}: latents of {h} x {w} x {d} do not fold into blocks of {p} x {p} "
                f"x {q} that can be halved twice"
            )
        return config.tokenizer.latent_channels * p * p * q, (h // p, w // p, d // q)


class UNet(nn.Module):
    """MONAI's diffusion U-Net on the folded latents of all elements stacked as channels, with `more` beside them; in
    two dimensions where their depth is 1."""

    def __init__(self, config: ModelConfig, settings: UNetSettings, more: int = 0):
        super().__init__()
        from monai.networks.nets import DiffusionModelUNet

        self.settings = settings
        own, grid = settings.folded(config)
        self.elements, self.flat = len(config.elements), grid[2] == 1
        channels = own * self.elements
        self.net = DiffusionModelUNet(in_channels=channels + more, out_channels=channels, **self.parts())

    def parts(self) -> dict[str, Any]:
        """Arguments that a U-Net and its ControlNet have in common."""
        s = self.settings
        return {
            "spatial_dims": 2 if self.flat else 3,
            "channels": (s.width, 2 * s.width, s.widest * s.width),
            "attention_levels": tuple(i >= 3 - s.attention for i in range(3)),
            "num_res_blocks": s.residual_blocks,
            "num_head_channels": 32,
            "norm_num_groups": math.gcd(32, s.width),
        }

    def fold(self, z: Tensor) -> Tensor:
        """Latents [B, m, c, h, w, d] -> [B, channels, h', w', d'], or [B, channels, h', w']."""
        p, q = self.settings.fold_plane, self.settings.fold_depth
        x = rearrange(z, "b m c (h p) (w o) (d q) -> b (m c p o q) h w d", p=p, o=p, q=q)
        return x[..., 0] if self.flat else x

    def unfold(self, x: Tensor) -> Tensor:
        """The inverse of `fold`."""
        p, q = self.settings.fold_plane, self.settings.fold_depth
        x = x[..., None] if self.flat else x
        return rearrange(x, "b (m c p o q) h w d -> b m c (h p) (w o) (d q)", m=self.elements, p=p, o=p, q=q)

    def code(self, observed: Tensor, like: Tensor) -> Tensor:
        """observed [B, m] as m channels of the grid of `like` [B, channels, ...]."""
        mask = observed.to(like.dtype).reshape(*observed.shape, *(1,) * (like.ndim - 2))
        return mask.expand(-1, -1, *like.shape[2:])
