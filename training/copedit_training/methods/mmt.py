"""MMT (our sizes): a transformer with windows that span all contrasts, and a query per contrast to be synthesised
(Liu et al., arXiv 2204.13738), on axial slices.

Known of it: convolutional stems, 4 x 4 patches, shifted windows over space and all contrasts (Liu et al. 2021), a
coarse-to-fine decoder driven by contrast queries, any subset of inputs, an adversarial term. Widths, window, stages,
weights of the loss and the optimiser were not published within reach: they are ours, so tables name it "MMT (our
sizes)".
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from copedit_rt.config import ModelConfig
from copedit_rt.errors import CopeditError
from copedit_training.methods.base import Drawn, Method, Noise, from_slices, least_squares, of_slices, to_slices
from copedit_training.methods.guidance import Guidance
from copedit_training.stages.settings import MethodSettings, Stage
from copedit_training.stages.task import Terms

MISSING, OBSERVED, ADVERSARIAL = 20.0, 5.0, 0.1  # weights of the loss
PART = 8  # slices that are filled in at a time; their attention takes the most memory
DEPTH = 2  # blocks a stage: the first with windows where they are, the second with shifted ones


@dataclass(frozen=True)
class MMTSettings(MethodSettings):
    """width, heads: of the first of `stages` stages, twice as much at each of the next. window: tokens a side. patch:
    pixels a token's side. stem: channels of the convolutions. critic_width: of the critics' first."""

    stage: ClassVar[Stage] = "mmt"
    ranges: ClassVar = {
        **dict.fromkeys(("width", "stem", "critic_width"), (1, 1024)),
        "heads": (1, 64),
        "stages": (1, 6),
        **dict.fromkeys(("window", "patch"), (2, 64)),
    }

    width: int = 96
    heads: int = 3
    stages: int = 3
    window: int = 6
    patch: int = 4
    stem: int = 32
    critic_width: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.heads:
            raise CopeditError(f"width = {self.width}: must divide by heads = {self.heads}")


def windows(x: Tensor, size: int) -> Tensor:
    """Tokens [N, m, h, w, C] as windows [N, h w / size^2, m size^2, C], contrasts slowest."""
    x = x.unflatten(3, (-1, size)).unflatten(2, (-1, size))
    return x.permute(0, 2, 4, 1, 3, 5, 6).flatten(3, 5).flatten(1, 2)


def joined(x: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of `windows`; shape: [N, m, h, w, C]."""
    m, h, w = shape[1:4]
    size = round((x.shape[2] / m) ** 0.5)
    x = x.unflatten(2, (m, size, size)).unflatten(1, (h // size, w // size))
    return x.permute(0, 3, 1, 4, 2, 5, 6).flatten(4, 5).flatten(2, 3)


class WindowAttention(nn.Module):
    """Attention of tokens to those of all observed contrasts in their window, with a learned bias for each difference
    in contrast and place."""

    def __init__(self, width: int, heads: int, window: int, shift: int, elements: int):
        super().__init__()
        self.heads, self.window, self.shift, self.elements = heads, window, shift, elements
        self.query, self.both = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.bias = nn.Parameter(torch.zeros(heads, 2 * elements - 1, 2 * window - 1, 2 * window - 1))
        nn.init.trunc_normal_(self.bias, std=0.02)

    def forward(self, x: Tensor, to: Tensor, observed: Tensor | None, own: Tensor, others: Tensor) -> Tensor:
        """x: [N, m, h, w, C] of contrasts own [m], to: [N, n, h, w, C] of contrasts others [n], those of them that
        observed [N, n] holds (None: all)."""
        shape, size, shift = x.shape, self.window, self.shift
        if shift:
            x, to = (y.roll((-shift, -shift), (2, 3)) for y in (x, to))
        q = self.query(windows(x, size))
        k, v = self.both(windows(to, size)).chunk(2, -1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(2, 3) for y in (q, k, v))
        mask = self._bias(own, others).to(q.dtype)[None, None]
        if shift:
            apart = self._apart(shape[2], shape[3], len(own), len(others)).to(q.device)
            mask = mask.masked_fill(apart[None, :, None], -torch.inf)
        if observed is not None:
            unseen = ~observed.repeat_interleave(size * size, 1)
            mask = mask.masked_fill(unseen[:, None, None, None], -torch.inf)
        y = F.scaled_dot_product_attention(q, k, v, mask.expand(len(x), q.shape[1], -1, -1, -1))
        y = joined(self.out(y.transpose(2, 3).flatten(3)), shape)
        return y.roll((shift, shift), (2, 3)) if shift else y

    def _bias(self, own: Tensor, others: Tensor) -> Tensor:
        """[heads, m size^2, n size^2]."""
        size, m = self.window, self.elements
        place = torch.arange(size, device=own.device)
        apart = place[:, None] - place + size - 1
        contrast = own[:, None] - others + m - 1
        # [heads, m, n, size, size (rows), size, size (columns)]
        bias = self.bias[:, contrast][:, :, :, apart][:, :, :, :, :, apart]
        bias = bias.permute(0, 1, 3, 5, 2, 4, 6)
        return bias.flatten(4).flatten(1, 3)

    def _apart(self, h: int, w: int, m: int, n: int) -> Tensor:
        """Which tokens of a shifted window [h w / size^2, m size^2, n size^2] lay at opposite borders of the image."""
        size, shift = self.window, self.shift
        rows, columns = ((torch.arange(k) >= k - shift).long() for k in (h, w))
        region = (2 * rows[:, None] + columns)[None, None, :, :, None]
        own, others = (windows(region.expand(1, k, h, w, 1), size)[0, :, :, 0] for k in (m, n))
        return own[:, :, None] != others[:, None]


class Mlp(nn.Sequential):
    def __init__(self, width: int):
        super().__init__(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class EncoderBlock(nn.Module):
    def __init__(self, width: int, heads: int, window: int, shift: int, elements: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attention, self.mlp = WindowAttention(width, heads, window, shift, elements), Mlp(width)

    def forward(self, x: Tensor, observed: Tensor, contrasts: Tensor) -> Tensor:
        """x: [N, n, h, w, C] of these contrasts [n]; observed: [N, n]."""
        y = self.norms[0](x)
        x = x + self.attention(y, y, observed, contrasts, contrasts)
        return x + self.mlp(self.norms[1](x))


class DecoderBlock(nn.Module):
    def __init__(self, width: int, heads: int, window: int, shift: int, elements: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.attention = WindowAttention(width, heads, window, shift, elements)
        self.cross, self.mlp = WindowAttention(width, heads, window, shift, elements), Mlp(width)

    def forward(self, x: Tensor, to: Tensor, observed: Tensor, every: Tensor, contrasts: Tensor) -> Tensor:
        """x: [N, m, h, w, C] of every contrast; to: the encoder's [N, n, h, w, C] of these contrasts [n], those of them
        that observed [N, n] holds."""
        y = self.norms[0](x)
        x = x + self.attention(y, y, None, every, every)
        x = x + self.cross(self.norms[1](x), to, observed, every, contrasts)
        return x + self.mlp(self.norms[2](x))


def _blocks(kind: type[nn.Module], width: int, heads: int, window: int, elements: int) -> nn.ModuleList:
    return nn.ModuleList(kind(width, heads, window, i % 2 * (window // 2), elements) for i in range(DEPTH))


def merge(x: Tensor) -> Tensor:
    """Four neighbours [N, m, h, w, C] as one token [N, m, h / 2, w / 2, 4 C]."""
    return x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).transpose(3, 4).flatten(4)


def expand(x: Tensor, by: int) -> Tensor:
    """A token [N, m, h, w, by^2 C] as its neighbours [N, m, by h, by w, C]."""
    x = x.unflatten(4, (by, by, -1)).transpose(3, 4)
    return x.flatten(4, 5).flatten(2, 3)


def widths(settings: MMTSettings) -> list[int]:
    """Of a token of each stage, the finest first."""
    return [settings.width * 2**i for i in range(settings.stages)]


class Network(nn.Module):
    """Slices of all contrasts from those observed.

    guidance: its values are added to the queries, those of the finest stage first. The rest: see `MMTSettings`.
    """

    def __init__(self, elements: int, guidance: Guidance, s: MMTSettings):
        super().__init__()
        self.elements, self.patch, self.multiple = elements, s.patch, s.patch * s.window * 2 ** (s.stages - 1)
        self.widths, self.guidance = widths(s), guidance
        width, stem, window, patch = s.width, s.stem, s.window, s.patch
        stages = [(c, s.heads * 2**i) for i, c in enumerate(self.widths)]
        self.stems = nn.ModuleList(_five(1, stem, stem) for _ in range(elements))
        self.patches = nn.Linear(stem * patch**2, width)
        self.contrast = nn.Parameter(0.02 * torch.randn(elements, width))
        self.encoder = nn.ModuleList(_blocks(EncoderBlock, c, n, window, elements) for c, n in stages)
        self.norms = nn.ModuleList(nn.LayerNorm(c) for c in self.widths)
        self.down = nn.ModuleList(nn.Sequential(nn.LayerNorm(4 * c), nn.Linear(4 * c, 2 * c)) for c in self.widths[:-1])
        self.queries = nn.ParameterList(0.02 * torch.randn(elements, c) for c in self.widths)
        self.encodings = nn.ParameterList(0.02 * torch.randn(elements, c) for c in self.widths)
        self.decoder = nn.ModuleList(_blocks(DecoderBlock, c, n, window, elements) for c, n in stages)
        self.up = nn.ModuleList(nn.Sequential(nn.Linear(2 * c, 4 * c), nn.LayerNorm(4 * c)) for c in self.widths[:-1])
        self.finish = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, stem * patch**2))
        self.heads = nn.ModuleList(_five(stem, stem, 1) for _ in range(elements))

    def forward(
        self, images: Tensor, observed: Tensor, guidance: Tensor, contrasts: Sequence[int] | None = None
    ) -> Tensor:
        """images: [N, n, h, w] of these contrasts (None: all), observed: [N, n], at least one a sample; guidance:
        [N, k]. Returns [N, m, h, w]. What is missing is not read."""
        every = torch.arange(self.elements, device=images.device)
        given = every if contrasts is None else every[list(contrasts)]
        h, w = images.shape[2:]
        images = images.where(observed[:, :, None, None], images.new_zeros(()))
        images = F.pad(images, (0, -w % self.multiple, 0, -h % self.multiple), "replicate")
        kept = self._encode(images, observed, given)
        x = self._decode(kept, observed, guidance, every, given)
        x = expand(self.finish(x), self.patch).permute(0, 1, 4, 2, 3)
        return torch.cat([head(x[:, i]) for i, head in enumerate(self.heads)], 1)[..., :h, :w]

    def _encode(self, images: Tensor, observed: Tensor, given: Tensor) -> list[Tensor]:
        """Tokens [N, n, h, w, C] of each stage, the finest first."""
        stems = [self.stems[i](images[:, j, None]) for j, i in enumerate(given.tolist())]
        x = torch.stack(stems, 1).permute(0, 1, 3, 4, 2)
        x = x.unflatten(3, (-1, self.patch)).unflatten(2, (-1, self.patch)).transpose(3, 4).flatten(4)
        x = self.patches(x) + self.contrast[given][None, :, None, None]
        kept = []
        for i, blocks in enumerate(self.encoder):
            x = self.down[i - 1](merge(x)) if i else x
            for block in blocks:  # type: ignore[attr-defined]
                x = block(x, observed, given)
            kept.append(self.norms[i](x))
        return kept

    def _decode(self, kept: list[Tensor], observed: Tensor, guidance: Tensor, every: Tensor, given: Tensor) -> Tensor:
        """Tokens [N, m, h, w, C] of the finest stage, from the coarsest on."""
        added = guidance.split(self.widths, 1)
        x: Tensor | None = None
        for i in reversed(range(len(kept))):
            query = (self.queries[i] + self.encodings[i] + added[i][:, None])[:, :, None, None]
            x = query.expand(-1, -1, *kept[i].shape[2:4], -1) if x is None else expand(self.up[i](x), 2) + query
            for block in self.decoder[i]:  # type: ignore[attr-defined]
                x = block(x, kept[i], observed, every, given)
        assert x is not None
        return x


def _five(inside: int, width: int, outside: int) -> nn.Sequential:
    """Five 3x3 convolutions of a contrast's own."""
    layers: list[nn.Module] = [nn.Conv2d(inside, width, 3, padding=1)]
    for channels in (width, width, width, outside):
        layers += [nn.LeakyReLU(0.2), nn.Conv2d(width, channels, 3, padding=1)]
    for layer in layers[: 10 if inside == 1 else 8 : 2]:  # torch's own weights make what comes in a tenth as large
        assert isinstance(layer, nn.Conv2d) and layer.bias is not None
        nn.init.kaiming_normal_(layer.weight, 0.2)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


class Critic(nn.Module):
    """Patches of each contrast, by a network of its own: [N, m, H, W] -> [N, m, h, w]."""

    def __init__(self, elements: int, width: int):
        super().__init__()
        sizes = [elements * n for n in (1, width, 2 * width, 4 * width)]
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(itertools.pairwise(sizes)):
            layers += [nn.Conv2d(a, b, 4, 2, 1, groups=elements), nn.InstanceNorm2d(b) if i else nn.Identity()]
            layers.append(nn.LeakyReLU(0.2))
        self.layers = nn.Sequential(*layers, nn.Conv2d(sizes[-1], elements, 3, padding=1, groups=elements))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class MMT(Method[MMTSettings]):
    """20 of L1 over what is missing, 5 over what is reconstructed, 0.1 of the least-squares adversarial term; values
    in -1..1."""

    name, title, space, kind = "mmt", "MMT (our sizes)", "image", MMTSettings
    sliced = guided = True

    @classmethod
    def network(cls, config: ModelConfig, settings: MMTSettings) -> nn.Module:
        m, k = len(config.elements), sum(widths(settings))
        return Network(m, Guidance(settings.guidance, m, config.tokenizer.prompt_dim, k), settings)

    @classmethod
    def critic(cls, config: ModelConfig, settings: MMTSettings) -> nn.Module:
        return Critic(len(config.elements), settings.critic_width)

    def objective(self, batch: Drawn) -> tuple[Tensor, Terms]:
        assert batch.images is not None
        truth, depth = to_slices(2 * batch.images - 1), batch.images.shape[-1]
        guidance = cast(Network, self.net).guidance(batch.observed, self.prompts_of(batch))
        observed = of_slices(batch.observed, depth)
        out = self.net(truth, observed, of_slices(guidance, depth)).float()
        error = (out - truth).abs().mean((2, 3))
        there = observed[:, :, None, None]
        adversarial, critic = least_squares(
            self.module.adversary,  # type: ignore[arg-type]
            torch.where(there, truth, out),
            truth,
            there,
        )
        terms = {"l1": error[~observed].mean(), "l1_observed": error[observed].mean(), "adversarial": adversarial}
        loss = MISSING * terms["l1"] + OBSERVED * terms["l1_observed"] + ADVERSARIAL * adversarial + critic
        return loss, {name: x.item() for name, x in terms.items()} | {"discriminator": critic.item()}

    def fill(self, known: Tensor, observed: Tensor, noise: Noise) -> Tensor:
        guidance = cast(Network, self.used).guidance(observed, self.prompted(known, observed))
        told = (of_slices(x, known.shape[-1]).split(PART) for x in (observed, guidance))
        parts = [self.used(*part) for part in zip(to_slices(2 * known - 1).split(PART), *told, strict=True)]
        return from_slices((torch.cat(parts) + 1) / 2, len(known))
