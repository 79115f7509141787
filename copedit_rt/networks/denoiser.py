"""MDiT3D, the denoiser (Section 3.3), and the backbones it is compared with (Table 8)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn

from copedit_kernels import ada_norm, axis_attention, gated_residual_ada_norm, swiglu
from copedit_rt.config import DenoiserConfig, ModelConfig, Triple
from copedit_rt.networks.tokenizer import float32_on_cpu

EPS = 1e-4
_TIME_FREQUENCIES = 256
# Prompts [B, 3, P] that each setting keeps: how many, which, what.
_KEPT = {"full": (0, 1, 2), "no-count": (1, 2), "no-position": (0, 2), "no-contrast": (0, 1), "none": (), "mask": ()}


def sincos(position: Tensor, dim: int) -> Tensor:
    """Sine-cosine features [..., dim] of positions [...] (Vaswani et al. 2017); dim even."""
    angle = position[..., None] * torch.exp(torch.arange(dim // 2) * (-math.log(10000.0) / (dim // 2)))
    return torch.cat((angle.sin(), angle.cos()), dim=-1)


def orthogonal(count: int, dim: int) -> Tensor:
    """Directions [count, dim] that are orthogonal and as long as those of `sincos`: rows of the cosine transform."""
    row, column = torch.arange(1.0, count + 1)[:, None], torch.arange(dim) + 0.5
    return (math.pi / dim * row * column).cos()


def _grid(size: Triple) -> Tensor:
    """Positions [T, 3] of the tokens of a grid, depth fastest."""
    return torch.stack(torch.meshgrid(*(torch.arange(float(n)) for n in size), indexing="ij"), -1).reshape(-1, 3)


def position_embedding(size: Triple, dim: int) -> Tensor:
    """Fixed 3D sine-cosine embedding [T, dim]: a third of the channels an axis, the remainder zero."""
    part = dim // 6 * 2
    feats = [sincos(axis, part) for axis in _grid(size).unbind(-1)]
    return torch.cat((*feats, torch.zeros(len(feats[0]), dim - 3 * part)), dim=-1)


def rope_table(size: Triple, head_dim: int) -> Tensor:
    """cos and sin [2, T, head_dim / 2] of the 3D rotary embedding.

    A quarter of the head dimension turns with depth, the rest is split over the plane.
    """
    depth = head_dim // 8
    plane = (head_dim // 2 - depth) // 2
    pairs = (head_dim // 2 - depth - plane, plane, depth)
    angles = [
        position[:, None] * 10000.0 ** (-torch.arange(n, dtype=torch.float64) / n)
        for position, n in zip(_grid(size).double().unbind(-1), pairs, strict=True)
    ]
    angle = torch.cat(angles, dim=-1)
    return torch.stack((angle.cos(), angle.sin())).float()


def pick(x: Tensor, rows: Tensor) -> Tensor:
    """Elements of x [B, m, ...] as samples of one element each [N, 1, ...]; rows [N] count through B, then m."""
    return x.flatten(0, 1).index_select(0, rows)[:, None]


Pending = tuple[Tensor, Tensor] | None  # branch [B, m, T, C] and gate [B, C] of a residual that is still to be added


def added(x: Tensor, pending: Pending) -> Tensor:
    """x with what is pending."""
    if pending is None:
        return x
    branch, gate = pending
    return x + (gate[:, None, None] * branch).to(x.dtype)


def normed(x: Tensor, pending: Pending, scale: Tensor, shift: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """x with what is pending, and its adaptive norm: one pass over x for both."""
    if pending is None:
        return x, ada_norm(x, scale, shift, weight, "rms", EPS)
    return gated_residual_ada_norm(x, *pending, scale, shift, weight, "rms", EPS)


class Block(nn.Module):
    """Attention along one axis and a SwiGLU MLP, both with adaLN-zero."""

    def __init__(self, c: DenoiserConfig, axis: str, prompted: bool):
        super().__init__()
        self.axis, self.prompted, self.heads = axis, prompted, c.heads
        self.modulation = nn.Linear(c.width, 6 * c.width)
        self.norm1 = nn.Parameter(torch.ones(c.width))
        self.qkv = nn.Linear(c.width, 3 * c.width)
        self.proj = nn.Linear(c.width, c.width)
        self.norm2 = nn.Parameter(torch.ones(c.width))
        self.mlp_in = nn.Linear(c.width, 2 * c.hidden)
        self.mlp_out = nn.Linear(c.hidden, c.width)

    def forward(self, x: Tensor, condition: Tensor, rope: Tensor | None) -> Tensor:
        """x [B, m, T, C], condition [B, C] after SiLU, rope [2, T, D/2] or None -> [B, m, T, C]."""
        return added(*self.modulated(x, self.modulation(condition), rope))

    def modulated(
        self, x: Tensor, modulation: Tensor, rope: Tensor | None, rows: Tensor | None = None, pending: Pending = None
    ) -> tuple[Tensor, Pending]:
        """`forward` given `modulation` [B, 6C] of the condition, but for its last residual, which is left pending: the
        norm that comes next adds it.

        rows [N]: only the output of these elements is wanted (see `pick`), [N, 1, T, C]. The others still give keys and
        values to an across-block; a within-block need not see them at all. pending: of the block before.
        """
        if rows is not None and self.axis == "token":
            sample = rows // x.shape[1]
            if pending is not None:
                pending = pick(pending[0], rows), pending[1].index_select(0, sample)
            x, modulation, rows = pick(x, rows), modulation.index_select(0, sample), None
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        x, h = normed(x, pending, scale1, shift1, self.norm1)
        mixed = axis_attention(self.qkv(h).unflatten(-1, (3, self.heads, -1)), rope, self.axis)
        if rows is not None:
            sample = rows // x.shape[1]
            x, mixed = pick(x, rows), pick(mixed, rows)
            gate1, shift2, scale2, gate2 = (part.index_select(0, sample) for part in (gate1, shift2, scale2, gate2))
        x, h = normed(x, (self.proj(mixed.flatten(-2)), gate1), scale2, shift2, self.norm2)
        return x, (self.mlp_out(swiglu(self.mlp_in(h))), gate2)

    def closed(
        self, x: Tensor, modulation: Tensor, rope: Tensor | None, rows: Tensor | None = None, pending: Pending = None
    ) -> tuple[Tensor, Pending]:
        """`modulated` with nothing left pending: one tensor to keep between blocks, not two."""
        return added(*Block.modulated(self, x, modulation, rope, rows, pending)), None


class MDiT3D(nn.Module):
    """The denoiser: predicts the clean latents of all elements.

    Backbones: "mdit3d" alternates attention within an element and across elements. "dit3d" stacks the elements as
    channels and attends over one 3D grid; "dit" does so slice by slice, with no way through the plane. Both take time
    and prompts in every block. ("unet" is `UNet`, by `build_denoiser`.)
    """

    rope: Tensor
    position: Tensor
    element: Tensor
    frequencies: Tensor

    def __init__(self, config: ModelConfig):
        super().__init__()
        c = config.denoiser
        m, channels = len(config.elements), config.tokenizer.latent_channels
        self.config = c
        patch, (h, w, d) = c.patch, config.latent
        self.alternate = c.backbone == "mdit3d"
        if not self.alternate:
            channels, m = channels * m, 1
        if c.backbone == "dit":
            patch, m, d = (patch[0], patch[1], 1), d, 1
        grid: Triple = (h // patch[0], w // patch[1], d // patch[2])
        self.patch, self.grid, self.channels = patch, grid, channels
        values = channels * math.prod(patch)

        self.embed = nn.Linear(values * (1 + c.prior), c.width)
        self.time = nn.Sequential(nn.Linear(_TIME_FREQUENCIES, c.width), nn.SiLU(), nn.Linear(c.width, c.width))
        kept = _KEPT[c.prompts]
        inputs = len(config.elements) if c.prompts == "mask" else len(kept) * config.tokenizer.prompt_dim
        self.kept = kept
        self.prompt = nn.Sequential(nn.SiLU(), nn.Linear(inputs, c.width)) if inputs else None
        places = {"across": (False, True), "within": (True, False), "both": (True, True)}[c.injection]
        self.blocks = nn.ModuleList(
            Block(c, "element" if self.alternate and i % 2 else "token", places[i % 2] if self.alternate else True)
            for i in range(c.blocks)
        )
        self.final_norm = nn.Parameter(torch.ones(c.width))
        self.final_modulation = nn.Linear(c.width, 2 * c.width)
        self.final = nn.Linear(c.width, values)
        # Fixed tables are rebuilt from the configuration, not stored.
        self.register_buffer("rope", rope_table(grid, c.head_dim), persistent=False)
        self.register_buffer("position", position_embedding(grid, c.width), persistent=False)
        element = sincos(torch.arange(float(m)), c.width) if c.identity == "sincos" else orthogonal(m, c.width)
        self.register_buffer("element", element, persistent=False)
        self.register_buffer(
            "frequencies",
            torch.exp(torch.arange(_TIME_FREQUENCIES // 2) * (-math.log(10000.0) / (_TIME_FREQUENCIES // 2))),
            persistent=False,
        )
        self._initialise()

    def _blocks(self) -> list[Block]:
        return cast("list[Block]", list(self.blocks))

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        # adaLN-zero: every block starts as the identity and the output at zero.
        modulations = [block.modulation for block in self._blocks()]
        for layer in (*modulations, self.final_modulation, self.final):
            nn.init.zeros_(layer.weight)

    def condition(self, t: Tensor, prompts: Tensor | None, observed: Tensor) -> tuple[Tensor, Tensor]:
        """What the blocks are conditioned on, after SiLU: [B, C] from time alone, and [B, C] with the prompts.

        t [B], or [S, 1] for S timesteps of every sample: then [S, 1, C], and [S, B, C] with the prompts.
        """
        angle = t.to(self.frequencies.dtype)[..., None] * self.frequencies
        time = self.time(torch.cat((angle.cos(), angle.sin()), dim=-1).to(self.embed.weight.dtype))
        prompted = time
        if self.prompt is not None:
            if self.config.prompts == "mask":
                given = (~observed).to(time.dtype)
            else:
                assert prompts is not None
                # One by one: a list of indices would be copied to the GPU, which waits for it.
                given = torch.cat([prompts[:, i] for i in self.kept], dim=-1).to(time.dtype)
            prompted = time + self.prompt(given)
        silu = nn.functional.silu
        return silu(time), silu(prompted)

    def patchify(self, z: Tensor) -> Tensor:
        """Latents [B, m, 8, h, w, d] -> token values [B, m', T, V]; m' is 1 for dit3d, the slices for dit."""
        p, q, r = self.patch
        if self.config.backbone == "dit":
            z = rearrange(z, "b m c h w d -> b d (m c) h w 1")
        elif not self.alternate:
            z = rearrange(z, "b m c h w d -> b 1 (m c) h w d")
        # Batch and elements as one axis: TensorRT takes at most eight.
        x = rearrange(z.flatten(0, 1), "n c (h p) (w q) (d r) -> n (h w d) (p q r c)", p=p, q=q, r=r)
        return x.unflatten(0, z.shape[:2])

    def unpatchify(self, x: Tensor, shape: torch.Size) -> Tensor:
        """Inverse of `patchify`; shape is that of the latents, whole or cropped in the plane."""
        (p, q, r), (h, w, d) = self.patch, (shape[-3] // self.patch[0], shape[-2] // self.patch[1], self.grid[2])
        n, x = x.shape[:2], x.flatten(0, 1)
        x = rearrange(x, "n (h w d) (p q r c) -> n c (h p) (w q) (d r)", p=p, q=q, r=r, h=h, w=w, d=d).unflatten(0, n)
        if self.config.backbone == "dit":
            return rearrange(x, "b d (m c) h w 1 -> b m c h w d", m=shape[1])
        return x if self.alternate else rearrange(x, "b 1 (m c) h w d -> b m c h w d", m=shape[1])

    def forward(
        self,
        z: Tensor,
        t: Tensor,
        prompts: Tensor | None,
        observed: Tensor,
        corner: Tensor | None = None,
        prior: Tensor | None = None,
    ) -> Tensor:
        """Clean latents [B, m, 8, h, w, d] from partially noised ones.

        z: [B, m, 8, h, w, d] normalised latents, noise at timestep t in the missing elements. t: [B] in 0..499.
        prompts: [B, 3, P] (None only for prompts = none or mask). observed: [B, m] bool, read only by the "mask"
        ablation: the full model is told nothing about what is missing but what the prompts say. corner, prior: see
        `predict`.
        """
        return self.predict(z, self.modulate(t, prompts, observed), corner=corner, prior=prior)

    def modulate(self, t: Tensor, prompts: Tensor | None, observed: Tensor) -> list[Tensor]:
        """All that time and prompts do: modulation [B, 6C] of each block, then [B, 2C] of the final layer.

        With t [S, 1], that of S timesteps in one product each: [S, B, ...], or [S, 1, ...] where prompts play no part.
        """
        time, prompted = self.condition(t, prompts, observed)
        parts = [block.modulation(prompted if block.prompted else time) for block in self._blocks()]
        return [*parts, self.final_modulation(time)]

    def positions(self, shape: torch.Size, corner: Tensor) -> tuple[Tensor, Tensor]:
        """Of crops of latents of this shape: their part of the position embedding [B, 1, T', C], and their rope.

        corner [B, 2]: where each crop begins in the plane, in tokens. Rotary positions are relative: the same for all.
        """
        h, w, _ = (n // p for n, p in zip(shape[-3:], self.patch, strict=True))
        _, columns, depth = self.grid
        local = torch.arange(h)[:, None, None] * columns + torch.arange(w)[:, None]
        local = (local * depth + torch.arange(depth)).flatten().to(corner.device)
        first = (corner[:, 0] * columns + corner[:, 1]) * depth
        return self.position[first[:, None] + local][:, None], self.rope[:, local]

    def predict(
        self,
        z: Tensor,
        modulation: Sequence[Tensor],
        rows: Tensor | None = None,
        corner: Tensor | None = None,
        prior: Tensor | None = None,
    ) -> Tensor:
        """`forward` given what `modulate` returns for t [B].

        rows [N]: predict only these elements (see `pick`), [N, 8, h, w, d]; "mdit3d" then leaves out what nothing else
        reads, from the last block's attention on. corner [B, 2]: z holds crops of whole latents in the plane that begin
        at these tokens (training). prior [B, m, 8, h, w, d], for a network that takes one: latents of the fill of what
        is missing, and of what is observed its own; what the network computes is added to it.
        """
        *parts, final = modulation
        position, table = (self.position, self.rope) if corner is None else self.positions(z.shape, corner)
        values = self.patchify(z)
        if prior is not None:
            prior = prior.to(z.dtype)
            values = torch.cat((values, self.patchify(prior)), dim=-1)
        x, pending = self.embed(values) + position.to(z.dtype), cast(Pending, None)
        last = rows if self.alternate else None
        for i, (block, part) in enumerate(zip(self._blocks(), parts, strict=True)):
            if i == 1 and self.alternate:
                x, pending = added(x, pending) + self.element[:, None].to(x.dtype), None
            # Rotary positions belong to attention over tokens; across elements there is no order to encode.
            rope = table if self.alternate and block.axis == "token" else None
            x, pending = block.modulated(x, part, rope, last if i == len(parts) - 1 else None, pending)
        if last is not None:
            final = final.index_select(0, last // z.shape[1])
        shift, scale = final.chunk(2, dim=-1)
        _, h = normed(x, pending, scale, shift, self.final_norm)
        out = self.unpatchify(self.final(h), z.shape)
        if rows is not None:
            out = (pick(out, rows) if last is None else out)[:, 0]
            prior = None if prior is None else pick(prior, rows)[:, 0]
        return out if prior is None else out + prior


class UNet(nn.Module):
    """MONAI's 3D diffusion U-Net on the elements stacked as channels, the prompts as cross-attention context.

    The baseline of Table 8; needs the extra `train`. Its first level has a sixth of the denoiser's `width`: at the
    paper's size it then has about the parameters of MDiT3D.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        from monai.networks.nets import DiffusionModelUNet

        c, channels = config.denoiser, config.tokenizer.latent_channels * len(config.elements)
        self.config, self.kept = c, _KEPT[c.prompts]
        width = max(16, c.width // 6 // 16 * 16)
        self.mask = nn.Linear(len(config.elements), config.tokenizer.prompt_dim) if c.prompts == "mask" else None
        context = bool(self.kept) or self.mask is not None
        # Depth 1 (a cardiac slab's latent) cannot be halved: two-dimensional then.
        self.flat = config.latent[2] == 1
        self.net = DiffusionModelUNet(
            spatial_dims=2 if self.flat else 3,
            in_channels=channels * (1 + c.prior),
            out_channels=channels,
            channels=(width, 2 * width, 4 * width),
            attention_levels=(False, True, True),
            num_res_blocks=2,
            num_head_channels=32,
            norm_num_groups=32 if width % 32 == 0 else 16,
            with_conditioning=context,
            cross_attention_dim=config.tokenizer.prompt_dim if context else None,
        )

    def forward(
        self,
        z: Tensor,
        t: Tensor,
        prompts: Tensor | None,
        observed: Tensor,
        corner: Tensor | None = None,
        prior: Tensor | None = None,
    ) -> Tensor:
        """As `MDiT3D.forward`; convolutions know no positions, so where a crop begins (corner) changes nothing."""
        with float32_on_cpu(z):  # MONAI's convolutions are not ours
            return self._predict(z, t, prompts, observed, prior)

    def _predict(self, z: Tensor, t: Tensor, prompts: Tensor | None, observed: Tensor, prior: Tensor | None) -> Tensor:
        context = None
        if self.mask is not None:
            context = self.mask((~observed).to(z.dtype))[:, None]
        elif self.kept:
            assert prompts is not None
            context = prompts[:, self.kept].to(z.dtype)
        x = (z if prior is None else torch.cat((z, prior.to(z.dtype)), dim=2)).flatten(1, 2)
        out = self.net(x[..., 0] if self.flat else x, t, context=context)
        out = (out[..., None] if self.flat else out).view_as(z)
        return out if prior is None else out + prior.to(z.dtype)


def build_denoiser(config: ModelConfig) -> MDiT3D | UNet:
    """The denoiser that the configuration names."""
    return UNet(config) if config.denoiser.backbone == "unet" else MDiT3D(config)
