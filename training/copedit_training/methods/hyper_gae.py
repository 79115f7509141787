"""Hyper-GAE: one autoencoder for all modalities, whose norms a hypernetwork sets from the modality's code, and a graph
that passes messages between those observed (Yang et al., MICCAI 2023 and IEEE TMI), on patches in 3D.

What is known of its published code is kept: layers, norms, messages, losses, the classifier that must not see which
modalities were there. Ours: the hypernetwork's weights start larger, as its chains of tanh would vanish.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from copedit_rt.config import ModelConfig, Triple
from copedit_rt.errors import CopeditError
from copedit_rt.networks.tokenizer import CoPeVAE
from copedit_training.methods.base import Drawn, Method, Noise, of_elements
from copedit_training.methods.guidance import Guidance
from copedit_training.stages.settings import MethodSettings, Stage
from copedit_training.stages.task import Terms

RESIDUALS = 6  # blocks of the encoder and of the decoder
OVERLAP = 0.2  # of neighbouring windows
ADVERSARIAL = 0.001


@dataclass(frozen=True)
class HyperGAESettings(MethodSettings):
    """width: channels of the first convolution. patch: voxels a side, in the plane, of what is trained on and of the
    windows that are filled in, as norms are those of a patch; its depth is the image's. Published guidance is the mask.
    """

    stage: ClassVar[Stage] = "hyper-gae"
    ranges: ClassVar = {"width": (3, 512), "patch": (8, 1024)}

    width: int = 24
    patch: int = 72
    beta1: float = 0.5
    guidance: str = "mask"


class Chain(nn.Module):
    """Tanh layers one after the other, each of which gives the scales, or offsets, of one norm."""

    def __init__(self, code: int, widths: Sequence[int]):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise((code, *widths)))
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            nn.init.xavier_uniform_(layer.weight, nn.init.calculate_gain("tanh"))
            nn.init.zeros_(layer.bias)

    def forward(self, code: Tensor) -> list[Tensor]:
        """code: [N, k]; [N, width] of each layer."""
        out: list[Tensor] = []
        for layer in self.layers:
            code = torch.tanh(layer(code))
            out.append(code)
        return out


def conditional_norm(x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """scale * instance norm of x [N, C, H, W, D] + offset, both [N, C]."""
    scale, offset = (y.to(x.dtype)[:, :, None, None, None] for y in (scale, offset))
    return scale * F.instance_norm(x) + offset


class Half(nn.Module):
    """What encoder and decoder have in common: convolutions, each with a norm that the code sets."""

    def __init__(self, code: int, convolutions: Sequence[nn.Module], widths: Sequence[int]):
        """widths: channels of the norms in the order in which the chains reach them."""
        super().__init__()
        self.convolutions = nn.ModuleList(convolutions)
        self.scales, self.offsets = Chain(code, widths), Chain(code, widths)

    def norms(self, code: Tensor) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.scales(code), self.offsets(code), strict=True))

    def residual(self, x: Tensor, first: int, norms: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """The six blocks, whose convolutions begin at `first`; no ReLU after the sum."""
        for i in range(first, first + 2 * RESIDUALS, 2):
            y = F.relu(conditional_norm(self.convolutions[i](x), *norms[i]))
            x = x + conditional_norm(self.convolutions[i + 1](y), *norms[i + 1])
        return x


def _same(width: int) -> list[nn.Module]:
    return [nn.Conv3d(width, width, 3, padding=1, bias=False) for _ in range(2 * RESIDUALS)]


class Encoder(Half):
    """Images [N, 1, H, W, D] of elements with codes [N, k] to features [N, 4 width, h, w, d]."""

    def __init__(self, code: int, width: int, stride: Triple):
        a, b, c = width, 2 * width, 4 * width
        layers: list[nn.Module] = [nn.Conv3d(1, a, 7, bias=False)]
        layers += [nn.Conv3d(n, 2 * n, 3, stride, 1, bias=False) for n in (a, b)]
        super().__init__(code, layers + _same(c), (a, b, c, *[c] * (2 * RESIDUALS)))

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        norms = self.norms(code)
        x = F.pad(x, (3,) * 6, "reflect")
        for i in range(3):
            x = F.relu(conditional_norm(self.convolutions[i](x), *norms[i]))
        return self.residual(x, 3, norms)


class Decoder(Half):
    """The mirror image of the encoder; its chains run from the last norm to the first. Values in -1..1."""

    def __init__(self, code: int, width: int, stride: Triple):
        a, b, c = width, 2 * width, 4 * width
        rest = {"stride": stride, "padding": 1, "bias": False}
        layers: list[nn.Module] = [nn.ConvTranspose3d(n, n // 2, 3, **_exact(rest)) for n in (c, b)]
        super().__init__(code, _same(c) + layers, (a, b, *[c] * (2 * RESIDUALS)))
        self.last = nn.Conv3d(a, 1, 7)

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        norms = self.norms(code)[::-1]
        x = self.residual(x, 0, norms)
        for i in range(2 * RESIDUALS, len(norms)):
            x = F.relu(conditional_norm(self.convolutions[i](x), *norms[i]))
        return torch.tanh(self.last(F.pad(x, (3,) * 6, "reflect")))


def _exact(rest: dict[str, Any]) -> dict[str, Any]:
    """Of a transposed convolution, with what its output is exactly `stride` times as large."""
    return rest | {"output_padding": tuple(n - 1 for n in rest["stride"])}


class Fusion(nn.Module):
    """Messages between the features of all observed elements, and their mean."""

    def __init__(self, elements: int, guidance: int, width: int):
        super().__init__()
        hidden = width * 3 // 2
        self.first = nn.Linear(2 * (width + elements) + guidance, hidden)
        self.second = nn.Linear(hidden, width)

    def weights(self, features: Tensor, codes: Tensor, guidance: Tensor) -> Tensor:
        """w [B, j, i, width, h, w, d] of the message of element j to element i, in -1..1.

        The first layer is linear, so what it makes of j, of i and of the guidance is added up."""
        width, k = features.shape[2], codes.shape[-1]
        each = width + k
        sender, receiver, last = self.first.weight.tensor_split((each, 2 * each), 1)
        a, b = (self._project(features, codes, part) for part in (sender, receiver))
        y = a[:, :, None] + b[:, None]
        bias = F.linear(guidance.to(last.dtype), last, self.first.bias)
        y = F.relu(y + bias.reshape(-1, 1, 1, bias.shape[-1], 1, 1, 1))
        y = torch.einsum("oc,bjicxyz->bjioxyz", self.second.weight, y) + self.second.bias[:, None, None, None]
        return torch.tanh(y)

    @staticmethod
    def _project(features: Tensor, codes: Tensor, weight: Tensor) -> Tensor:
        """[B, m, hidden, h, w, d] of features [B, m, width, h, w, d] and codes [m, k] that they are joined to."""
        width = features.shape[2]
        y = torch.einsum("oc,bmcxyz->bmoxyz", weight[:, :width], features)
        return y + (codes @ weight[:, width:].mT)[None, :, :, None, None, None]

    def forward(self, features: Tensor, codes: Tensor, observed: Tensor, guidance: Tensor) -> Tensor:
        """features: [B, m, width, h, w, d]; codes: [m, k]; observed: [B, m]. Returns [B, width, h, w, d]; nothing of a
        missing element's features is in it."""
        there = observed[:, :, None, None, None, None]
        features = features.where(there, features.new_zeros(()))
        share = (observed.float() / observed.sum(1, keepdim=True)).to(features.dtype)
        w = self.weights(features, codes, guidance)
        messages = torch.einsum("bj,bjicxyz,bjcxyz->bicxyz", share, w, features)
        return torch.einsum("bi,bicxyz->bcxyz", share, messages + features)


class Reversal(torch.autograd.Function):
    """The identity, whose gradient is turned round (Ganin & Lempitsky 2015)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return -gradients[0]


class Classifier(nn.Module):
    """Which elements were observed, from the fused features at each place; what it is taught reaches the rest of the
    network with the sign reversed."""

    def __init__(self, elements: int, width: int):
        super().__init__()
        widths = (width, width // 2, width // 4, width // 12, elements)
        self.layers = nn.ModuleList(nn.Conv3d(a, max(b, 1), 1) for a, b in itertools.pairwise(widths))

    def forward(self, fused: Tensor) -> Tensor:
        """[B, width, h, w, d] to logits [B, m, h, w, d]."""
        x = Reversal.apply(fused)
        for layer in self.layers[:-1]:
            x = F.leaky_relu(layer(x), 0.2)
        return self.layers[-1](x)


class Network(nn.Module):
    """Images of all elements from those observed.

    width: channels of the first convolution, a quarter of the features'. stride: of the two downsampling convolutions.
    guidance: its values join the messages.
    """

    codes: Tensor

    def __init__(self, elements: int, guidance: Guidance, width: int, stride: Triple):
        super().__init__()
        self.guidance = guidance
        self.encoder, self.decoder = Encoder(elements, width, stride), Decoder(elements, width, stride)
        self.fusion = Fusion(elements, guidance.width, 4 * width)
        self.register_buffer("codes", torch.eye(elements), persistent=False)

    def encode(self, images: Tensor) -> Tensor:
        """Features [B, m, c, h, w, d] of images [B, m, 1, H, W, D] in -1..1, each by itself."""
        b, m = images.shape[:2]
        return self.encoder(images.flatten(0, 1), self.codes.repeat(b, 1)).unflatten(0, (b, m))

    def decode(self, fused: Tensor) -> Tensor:
        """All elements [B, m, 1, H, W, D] in -1..1 of fused features [B, c, h, w, d]."""
        b, m = len(fused), len(self.codes)
        every = fused[:, None].expand(-1, m, *fused.shape[1:]).flatten(0, 1)
        return self.decoder(every, self.codes.repeat(b, 1)).unflatten(0, (b, m))

    def forward(self, images: Tensor, observed: Tensor, guidance: Tensor) -> Tensor:
        """images: [B, m, 1, H, W, D] in -1..1, observed: [B, m]; all elements. What is missing is not read."""
        there = observed[:, :, None, None, None, None]
        features = self.encode(images.where(there, images.new_zeros(())))
        return self.decode(self.fusion(features, self.codes, observed, guidance))


def starts(size: int, window: int) -> list[int]:
    """Where windows along an axis begin, a fifth of each in the one before at least, the last one flush."""
    step = max(1, int(window * (1 - OVERLAP)))
    return [*range(0, size - window, step), size - window]


def corner(image: np.ndarray, patch: int, rng: np.random.Generator) -> tuple[int, int]:
    """Where a patch of an image [m, 1, H, W, D] begins: about a place in the plane that shows something, if any."""
    places = np.argwhere(image.any((0, 1, 4)))
    centre = places[rng.integers(len(places))] if len(places) else rng.integers(image.shape[2:4])
    x, y = (int(np.clip(c - patch // 2, 0, n - patch)) for c, n in zip(centre, image.shape[2:4], strict=True))
    return x, y


class HyperGAE(Method[HyperGAESettings]):
    """L1 of all elements in -1..1, and the classifier whose gradient is reversed, on patches with some of the elements
    and, for it, with all of them."""

    name, title, space, kind = "hyper-gae", "Hyper-GAE", "image", HyperGAESettings
    guided = True

    def __init__(self, config: ModelConfig, settings: HyperGAESettings, tokenizer: CoPeVAE | None = None):
        (*plane, depth), patch = config.image, settings.patch
        if patch % 4 or patch > min(plane):
            raise CopeditError(f"patch = {patch}: must divide by 4 and fit into the image's plane {tuple(plane)}")
        if depth < 4 or depth % self.stride(config)[2] ** 2:
            raise CopeditError(f"{self.title}: images of {depth} slices; it needs 4 or more, of brains a multiple of 4")
        super().__init__(config, settings, tokenizer)

    @staticmethod
    def stride(config: ModelConfig) -> Triple:
        """Thin slabs keep their depth."""
        return (2, 2, 1) if config.task.joint else (2, 2, 2)

    @classmethod
    def network(cls, config: ModelConfig, settings: HyperGAESettings) -> nn.Module:
        m = len(config.elements)
        guidance = Guidance(settings.guidance, m, config.tokenizer.prompt_dim, m)
        return Network(m, guidance, settings.width, cls.stride(config))

    @classmethod
    def critic(cls, config: ModelConfig, settings: HyperGAESettings) -> nn.Module:
        return Classifier(len(config.elements), 4 * settings.width)

    def draw(self, step: int, part: int) -> Drawn:
        drawn, patch = super().draw(step, part), self.settings.patch
        assert drawn.images is not None
        rng = np.random.default_rng((self.settings.seed, step, part, 2))
        corners = [corner(x.numpy(), patch, rng) for x in drawn.images]
        cut = [x[..., i : i + patch, j : j + patch, :] for x, (i, j) in zip(drawn.images, corners, strict=True)]
        return dataclasses.replace(drawn, images=torch.stack(cut))

    def objective(self, batch: Drawn) -> tuple[Tensor, Terms]:
        net, classifier = cast(Network, self.net), cast(Classifier, self.module.adversary)
        assert batch.images is not None
        truth, observed = 2 * batch.images - 1, batch.observed
        guidance = net.guidance(observed, self.prompts_of(batch))
        features = net.encode(truth)
        fused = net.fusion(features, net.codes, observed, guidance)
        error = (net.decode(fused).float() - truth).abs().mean((2, 3, 4, 5))
        every = torch.ones_like(observed)
        whole = net.fusion(features, net.codes, every, net.guidance(every, self.prompts_of_all(batch)))
        told = sum(told_apart(classifier(x), y) for x, y in ((fused, observed), (whole, every)))
        terms = {"l1": error.mean(), "l1_missing": error.detach()[~observed].mean(), "classifier": cast(Tensor, told)}
        return error.mean() + ADVERSARIAL * terms["classifier"], {name: x.item() for name, x in terms.items()}

    def prompts_of_all(self, batch: Drawn) -> Tensor | None:
        """Prompts [B, 3, P] of the complete subjects."""
        return None if batch.prompts is None else batch.prompts.mean(1)

    def fill(self, known: Tensor, observed: Tensor, noise: Noise) -> Tensor:
        """The mean over sliding windows."""
        net, patch = cast(Network, self.used), self.settings.patch
        guidance = net.guidance(observed, self.prompted(known, observed))
        total, count = torch.zeros_like(known), torch.zeros_like(known[:1, :1])
        for i, j in itertools.product(*(starts(n, patch) for n in known.shape[3:5])):
            at = (..., slice(i, i + patch), slice(j, j + patch), slice(None))
            total[at] += net(2 * known[at] - 1, observed, guidance).float()
            count[at] += 1
        return (total / count + 1) / 2


def told_apart(logits: Tensor, observed: Tensor) -> Tensor:
    """Cross-entropy of the classifier's logits [B, m, h, w, d] against what was observed [B, m]."""
    return F.binary_cross_entropy_with_logits(logits.float(), of_elements(observed).float()[:, :, 0].expand_as(logits))
