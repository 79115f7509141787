"""The models as users write them today, on our weights: what the benchmarks of whole models compare with.

Separate operators and permutes (those of `contestants`), modulation inside every block of every step, every element
computed to the end, codes by a vectors x codes matrix. Parameters have our names, so that weights and gradients can be
compared one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from copedit_bench.operators.contestants import eager_ada_norm, eager_gated, eager_swiglu, product_code, sdpa
from copedit_rt.config import DiffusionConfig
from copedit_rt.networks.denoiser import Block, MDiT3D
from copedit_rt.networks.tokenizer import CoPeVAE
from copedit_rt.schedule import ddim_table, timesteps
from copedit_training.stages.losses import EMACodebook


def _plainly(block: Block, x: Tensor, condition: Tensor, rope: Tensor | None) -> Tensor:
    """What a block computes."""
    shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(condition).chunk(6, dim=-1)
    h = block.qkv(eager_ada_norm(x, scale1, shift1, block.norm1)).unflatten(-1, (3, block.heads, -1))
    branch = block.proj(sdpa(h, rope, block.axis).flatten(-2))
    x, h = eager_gated(x, branch, gate1, scale2, shift2, block.norm2)
    return x + gate2[:, None, None] * block.mlp_out(eager_swiglu(block.mlp_in(h)))


class PlainMDiT3D(MDiT3D):
    """`MDiT3D` with the backbone "mdit3d"."""

    def forward(
        self,
        z: Tensor,
        t: Tensor,
        prompts: Tensor | None,
        observed: Tensor,
        corner: Tensor | None = None,
        prior: Tensor | None = None,
    ) -> Tensor:
        assert prior is None  # no preset of the benchmarks starts from one
        time, prompted = self.condition(t, prompts, observed)
        x = self.embed(self.patchify(z)) + self.position.to(z.dtype)
        for i, block in enumerate(cast(Sequence[Block], self.blocks)):
            if i == 1:
                x = x + self.element[:, None].to(x.dtype)
            rope = self.rope if block.axis == "token" else None
            x = _plainly(block, x, prompted if block.prompted else time, rope)
        shift, scale = self.final_modulation(time).chunk(2, dim=-1)
        return self.unpatchify(self.final(eager_ada_norm(x, scale, shift, self.final_norm)), z.shape)


class PlainCoPeVAE(CoPeVAE):
    def quantise(self, z: Tensor) -> tuple[Tensor, Tensor]:
        flat = z.movedim(2, -1)
        index = product_code(flat.reshape(-1, flat.shape[-1]).float(), self.codebook.float())
        return self.codebook[index].view(flat.shape).movedim(-1, 2).to(z.dtype), index.view(flat.shape[:-1])


class PlainCodebook(EMACodebook):
    """Counts and sums by a matrix of one-hot rows, as most vector quantisers do."""

    def assigned(self, z: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        chosen = F.one_hot(index, len(self.count)).to(z.dtype)
        return chosen.sum(0), chosen.T @ z


@torch.no_grad()
def sample(
    net: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    z: Tensor,
    prompts: Tensor,
    observed: Tensor,
    config: DiffusionConfig,
    steps: int,
    dtype: torch.dtype,
) -> Tensor:
    """DDIM as a loop over the network, which takes latents in `dtype`; they are kept in their own."""
    there = observed.reshape(observed.shape + (1,) * (z.ndim - 2))
    table, times = ddim_table(config, steps).tolist(), timesteps(config, steps).tolist()
    for (keep, rate), t in zip(table, times, strict=True):
        x0 = net(z.to(dtype), torch.full((len(z),), t, device=z.device), prompts, observed)
        z = torch.where(there, z, keep * z + rate * x0)
    return z
