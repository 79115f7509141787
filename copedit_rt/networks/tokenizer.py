"""CoPeVAE, the completeness-aware tokenizer (Section 3.2): a 3D VQ autoencoder with three prompt encoders."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils import fuse_conv_bn_eval

from copedit_kernels import conv3, convolution, nearest_code
from copedit_kernels.dispatch import use_triton
from copedit_rt.config import TokenizerConfig, Triple
from copedit_rt.errors import CopeditError
from copedit_rt.networks import phases


def _kernel(stride: Triple) -> tuple[Triple, Triple]:
    """Kernel size and padding that divide or multiply every axis by its stride exactly."""
    return tuple(4 if s == 2 else 3 for s in stride), (1, 1, 1)  # type: ignore[return-value]


def full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """Autocast off on x's device; nothing on devices that have none, such as meta."""
    return torch.autocast(x.device.type, enabled=False) if x.device.type in ("cpu", "cuda") else nullcontext()


def on_cpu(x: Tensor) -> bool:
    """Whether a CPU computes with x: no GPU, no graph that is being exported, no tensor that has a shape only."""
    return x.device.type == "cpu" and not isinstance(x, FakeTensor) and not torch.compiler.is_exporting()


def float32_on_cpu(x: Tensor) -> AbstractContextManager[Any]:
    """Autocast off where a CPU computes with x, for networks of convolutions that are not ours: see `unsafe_type`."""
    return full_precision(x) if on_cpu(x) else nullcontext()


def unsafe_type(x: Tensor, extents: Sequence[int]) -> torch.dtype | None:
    """The 16-bit type, autocast's or its own, in which a CPU would convolve x to what may be garbage; None elsewhere.

    extents: of the result along the axes (of the input, if transposed). With torch 2.13, oneDNN on processors with AMX
    gets strided 3-D convolutions in bfloat16 wrong where one is 1: relative errors above 1, infinities, NaN; on those
    with AVX-512 and no bfloat16 of their own, the gradient of the weights where the first one is 2. Other convolutions
    with such an extent are treated alike, as they are small.
    """
    if min(extents) > 2 or not on_cpu(x):
        return None
    casts = torch.is_autocast_enabled("cpu") and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype("cpu") if casts else x.dtype
    return dtype if dtype.itemsize < 4 else None


def _wide(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float()


def _quick(lean: bool, x: Tensor, *others: Tensor) -> bool:
    """Whether a lean layer may compute x in its own way: in inference, of one type, neither exported nor compiled; on
    a CPU in float32."""
    if not lean or torch.is_grad_enabled() or torch.compiler.is_compiling() or any(t.dtype != x.dtype for t in others):
        return False
    on_float32 = x.dtype == torch.float32 and on_cpu(x) and torch.backends.mkldnn.is_available()
    return (x.is_cuda or on_float32) and not torch.is_autocast_enabled(x.device.type)


class Conv3d(nn.Conv3d):
    """nn.Conv3d without dilation or groups, padded with zeros, that is right on every processor: see `unsafe_type`.

    lean: in inference, computed in the way that is fastest for its size; `lean` sets it.
    """

    lean = False

    def forward(self, input: Tensor) -> Tensor:
        padding = cast(Triple, self.padding)
        if _quick(self.lean, input, self.weight):
            if input.is_cuda and self._phased(input):
                return phases.from_one(input, self.weight, self.bias, cast(Triple, self.stride))
            if not input.is_cuda and input.numel():
                return phases.on_cpu(input, self.weight, self.bias, cast(Triple, self.stride), padding)
        sizes = zip(input.shape[2:], self.kernel_size, self.stride, padding, strict=True)
        extents = [(n + 2 * p - k) // s + 1 for n, k, s, p in sizes]
        dtype = unsafe_type(input, extents)
        return super().forward(input) if dtype is None else self._exact(input, extents).to(dtype)

    def _phased(self, x: Tensor) -> bool:
        sizes = zip(x.shape[2:], self.kernel_size, self.stride, strict=True)
        whole = all(n % s == k % s == 0 for n, k, s in sizes)
        return self.in_channels == 1 < max(self.stride) and whole and self.padding == (1, 1, 1)

    def _exact(self, x: Tensor, extents: Sequence[int]) -> Tensor:
        """In float32; along an axis of one result only the taps that meet the input, so that of three often one."""
        weight, padding = self.weight, list(cast(Triple, self.padding))
        for axis, extent in enumerate(extents):
            if extent == 1:
                first, padding[axis] = padding[axis], 0
                taps = min(self.kernel_size[axis] - first, x.shape[axis + 2])
                weight, x = weight.narrow(axis + 2, first, taps), x.narrow(axis + 2, 0, taps)
        with full_precision(x):
            return F.conv3d(x.float(), weight.float(), _wide(self.bias), self.stride, padding)


class ConvTranspose3d(nn.ConvTranspose3d):
    """nn.ConvTranspose3d without dilation or groups that is right on every processor: see `unsafe_type`.

    lean: as of `Conv3d`.
    """

    lean = False

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if output_size is None and self._phased and _quick(self.lean, input, self.weight):
            return phases.to_one(input, self.weight, cast(Tensor, self.bias), cast(Triple, self.stride))
        dtype = unsafe_type(input, input.shape[2:])
        if dtype is None or output_size is not None:
            return super().forward(input, output_size)
        with full_precision(input):
            weight, bias, padding = self.weight.float(), _wide(self.bias), cast(Triple, self.padding)
            return F.conv_transpose3d(input.float(), weight, bias, self.stride, padding, self.output_padding).to(dtype)

    @property
    def _phased(self) -> bool:
        kernels = _kernel(cast(Triple, self.stride)) == (self.kernel_size, self.padding)
        return self.out_channels == 1 and kernels and self.bias is not None and self.output_padding == (0, 0, 0)


class ResidualUnit(nn.Module):
    """x + conv(relu(conv(x))), then ReLU; 3x3x3, no normalisation.

    lean: in inference, sums and ReLU are done in place; `lean` sets it.
    """

    lean = False

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.conv1 = Conv3d(channels, hidden, 3, padding=1)
        self.conv2 = Conv3d(hidden, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if convolution.FUSED and self._fits(x):
            return self._fused(x)
        if _quick(self.lean, x, self.conv1.weight):
            return self.conv2(self.conv1(x).relu_()).add_(x).relu_()
        return F.relu(x + self.conv2(F.relu(self.conv1(x))))

    def _fits(self, x: Tensor) -> bool:
        """Whether x can be computed by `copedit_kernels.conv3`: on its device, without gradients, channels last."""
        tensors = (x, self.conv1.weight, self.conv2.weight)
        alike = all(t.stride(1) == 1 and t.dtype == x.dtype for t in tensors)
        return alike and not torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type) and use_triton(x)

    def _fused(self, x: Tensor) -> Tensor:
        (first, bias1), (second, bias2) = ((c.weight.movedim(1, -1), c.bias) for c in (self.conv1, self.conv2))
        last = x.movedim(1, -1)
        return conv3(conv3(last, first, bias1, None, True), second, bias2, last, True).movedim(-1, 1)


def lean(net: nn.Module) -> None:
    """For inference: the layers above compute in the way that is fastest for their size, see docs/performance.md."""
    for module in net.modules():
        if isinstance(module, Conv3d | ConvTranspose3d | ResidualUnit):
            module.lean = True
        if isinstance(module, nn.ReLU):
            module.inplace = True


def _size(layer: nn.Module, n: int, axis: int = 0) -> int:
    """Length that a layer makes of n along H, W or D; n a multiple of its stride."""
    if isinstance(layer, nn.ConvTranspose3d):
        return n * layer.stride[axis]
    return n // layer.stride[axis] if isinstance(layer, nn.Conv3d) else n


def _reach(layer: nn.Module, first: int, end: int, rows: int) -> tuple[int, int]:
    """The part [from, to) of a layer's `rows` input rows that its output rows [first, end) depend on."""
    last = end - 1
    if isinstance(layer, ResidualUnit):
        first, last = first - 2, last + 2
    elif isinstance(layer, nn.Conv3d | nn.ConvTranspose3d):
        kernel, stride, padding = layer.kernel_size[0], layer.stride[0], int(layer.padding[0])
        if isinstance(layer, nn.ConvTranspose3d):
            first, last = -((kernel - 1 - padding - first) // stride), (last + padding) // stride
        else:
            first, last = first * stride - padding, last * stride - padding + kernel - 1
            first -= first % stride  # what is left out comes to whole rows of output
    return max(0, first), min(rows, last + 1)


def _spans(layers: Sequence[nn.Module], rows: int, height: int) -> Iterator[list[tuple[int, int]]]:
    """Per slab of `height` rows of the result: the rows that each layer is given, then those of the result."""
    sizes = [rows]
    for layer in layers:
        sizes.append(_size(layer, sizes[-1]))
    for start in range(0, sizes[-1], height):
        spans = [(start, min(start + height, sizes[-1]))]
        for layer, size in zip(reversed(layers), reversed(sizes[:-1]), strict=True):
            spans.insert(0, _reach(layer, *spans[0], size))
        yield spans


def in_slabs(layers: Sequence[nn.Module], x: Tensor, height: int) -> Tensor:
    """The layers applied to x [N, C, H, W, D], `height` rows of the result at a time.

    A slab is computed from all that it depends on, so that the result is that of the whole up to rounding.
    """
    slabs = []
    for *spans, (first, end) in _spans(layers, x.shape[2], height):
        y, origin = x, 0
        for layer, (a, b) in zip(layers, spans, strict=True):
            y, origin = y[:, :, a - origin : b - origin].contiguous(), _size(layer, a)
            y = layer(y)
        slabs.append(y[:, :, first - origin : end - origin].clone())
    return torch.cat(slabs, dim=2)


def feature_bytes(layers: Sequence[nn.Module], x: Tensor, height: int) -> int:
    """Bytes of the feature maps that `in_slabs` holds at once: those of the layer where they are largest.

    Without weights, the result, and what a convolution's library uses besides.
    """
    most = 0
    for spans in _spans(layers, x.shape[2], height):
        channels, (_, *plane) = x.shape[1], x.shape[2:]
        for layer, (a, b) in zip(layers, spans[:-1], strict=True):
            before = channels * (b - a) * math.prod(plane)
            if isinstance(layer, ResidualUnit):
                between = 2 * max(channels, layer.conv1.out_channels) * before // channels
            else:
                channels = getattr(layer, "out_channels", channels)
                plane = [_size(layer, n, axis) for axis, n in enumerate(plane, 1)]
                after = channels * _size(layer, b - a) * math.prod(plane)
                # To one channel: once more, before its phases are put together.
                between = max(before, 2 * after if channels == 1 else after)
            most = max(most, before + between)
    return most * x.shape[0] * x.element_size()


def within_memory(layers: Sequence[nn.Module], x: Tensor, limit: int) -> Tensor:
    """The layers applied to x [N, C, H, W, D] one sample at a time, in slabs such that `feature_bytes` <= limit.

    Raises CopeditError where slabs of one row still need more: what a row of the paper's latents depends on is nearly
    the whole volume, so that its encoder gains nothing from slabs, its decoder much.
    """
    height = x.shape[2]
    for layer in layers:
        height = _size(layer, height)
    while (needed := feature_bytes(layers, x[:1], height)) > limit and height > 1:
        height = (height + 1) // 2
    if needed > limit:
        raise CopeditError(
            f"max_memory of {limit / 2**20:.1f} MiB: even the thinnest slabs of the model need {needed / 2**20:.1f} MiB"
        )
    return torch.cat([in_slabs(layers, one, height) for one in x.split(1)])


class Encoder(nn.Module):
    """[N, 1, H, W, D] -> [N, 8, h, w, d]."""

    def __init__(self, c: TokenizerConfig):
        super().__init__()
        self.levels = nn.ModuleList()
        width = 1
        for channels, stride, count, hidden in zip(c.channels, c.strides, c.units, c.hidden, strict=True):
            kernel, padding = _kernel(stride)
            units = [ResidualUnit(channels, hidden) for _ in range(count)]
            self.levels.append(nn.Sequential(Conv3d(width, channels, kernel, stride, padding), nn.ReLU(), *units))
            width = channels
        self.out = Conv3d(width, c.latent_channels, 3, padding=1)

    def layers(self) -> list[nn.Module]:
        """What `forward` applies, one after the other."""
        return [*(layer for level in self.levels for layer in cast(nn.Sequential, level)), self.out]

    def forward(self, x: Tensor) -> Tensor:
        for level in self.levels:
            x = level(x)
        return self.out(x)


class Decoder(nn.Module):
    """[N, 8, h, w, d] -> [N, 1, H, W, D]; the encoder mirrored."""

    def __init__(self, c: TokenizerConfig):
        super().__init__()
        self.inp = Conv3d(c.latent_channels, c.channels[-1], 3, padding=1)
        self.levels = nn.ModuleList()
        widths = (1, *c.channels)
        for i in reversed(range(len(c.channels))):
            kernel, padding = _kernel(c.strides[i])
            units = [ResidualUnit(c.channels[i], c.hidden[i]) for _ in range(c.units[i])]
            up = ConvTranspose3d(c.channels[i], widths[i], kernel, c.strides[i], padding)
            self.levels.append(nn.Sequential(*units, up, nn.ReLU() if i else nn.Identity()))

    def layers(self) -> list[nn.Module]:
        """What `forward` applies, one after the other."""
        return [self.inp, *(layer for level in self.levels for layer in cast(nn.Sequential, level))]

    def forward(self, z: Tensor) -> Tensor:
        x = self.inp(z)
        for level in self.levels:
            x = level(x)
        return x


def _apply(net: Encoder | Decoder, x: Tensor, limit: int | None) -> Tensor:
    return net(x) if limit is None else within_memory(net.layers(), x, limit)


class PromptEncoder(nn.Module):
    """Latent of one element [N, 8, h, w, d] -> prompt [N, P] (Table 13, at the widths that give Table 10's count)."""

    def __init__(self, c: TokenizerConfig):
        super().__init__()
        a, b = c.prompt_channels
        self.conv = nn.Sequential(
            Conv3d(c.latent_channels, a, 3, c.prompt_stride, padding=1),
            nn.BatchNorm3d(a),
            nn.ReLU(),
            Conv3d(a, b, 3, padding=1),
            nn.BatchNorm3d(b),
            nn.ReLU(),
        )
        self.mlp = nn.Sequential(nn.Linear(b, c.prompt_dim), nn.ReLU(), nn.Linear(c.prompt_dim, c.prompt_dim))

    def pool(self, z: Tensor) -> Tensor:
        """Latent [N, 8, h, w, d] -> features averaged over it [N, b], in the linear layers' precision."""
        x, wide = self.conv(z), torch.promote_types(z.dtype, torch.float32)
        if torch.compiler.is_exporting():
            # Axis by axis: ONNX Runtime adds up in order, and of 73,728 values at once prompts were off by 2e-5.
            pooled = x.mean(4, dtype=wide).mean(3).mean(2)
        else:  # as exact in torch, and seven times as fast on a CPU
            pooled = x.mean((2, 3, 4), dtype=wide)
        return pooled.to(self.mlp[0].weight.dtype)

    def forward(self, z: Tensor) -> Tensor:
        pooled = self.pool(z)
        with full_precision(z):  # elements differ by less than bfloat16 resolves
            return self.mlp(pooled)


def fold_norms(encoder: PromptEncoder) -> None:
    """For inference: each BatchNorm becomes a part of the convolution before it, and ReLU works in place."""
    layers: list[nn.Module] = []
    for layer in encoder.eval().conv:
        if isinstance(layer, nn.BatchNorm3d):
            layers[-1] = fuse_conv_bn_eval(cast(nn.Conv3d, layers[-1]), layer)
        else:
            layers.append(nn.ReLU(inplace=True) if isinstance(layer, nn.ReLU) else layer)
    encoder.conv = nn.Sequential(*layers)


class CoPeVAE(nn.Module):
    """The tokenizer of m elements.

    Latents come in two scales: `encode` and `quantise` speak the autoencoder's own, the denoiser sees `normalise`d
    ones (per channel, by the mean and standard deviation stored in the checkpoint).
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: TokenizerConfig, elements: int):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.codebook = nn.Parameter(torch.randn(config.codes, config.latent_channels), requires_grad=False)
        self.prompt_encoders = nn.ModuleList(PromptEncoder(config) for _ in range(3))
        sizes = (elements - 1, elements, config.contrast_dim)
        self.heads = nn.ModuleList(nn.Sequential(nn.SiLU(), nn.Linear(config.prompt_dim, n)) for n in sizes)
        self.register_buffer("latent_mean", torch.zeros(config.latent_channels))
        self.register_buffer("latent_std", torch.ones(config.latent_channels))
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        # Without normalisation layers the scale must survive by itself: He's variance for every convolution, and
        # residual units that start as the identity.
        for module in (*self.encoder.modules(), *self.decoder.modules()):
            if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
                fan = module.in_channels * math.prod(module.kernel_size)
                if isinstance(module, nn.ConvTranspose3d):
                    fan //= math.prod(module.stride)
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan))
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        for module in self.modules():
            if isinstance(module, ResidualUnit):
                nn.init.zeros_(module.conv2.weight)
            if isinstance(module, nn.BatchNorm3d):
                # Thresholds from the common to the rare: what tells contrasts apart, such as enhanced vessels, fills
                # few voxels. Features of untrained encoders then tell simulated T1 from T1ce in 97 % of images, with
                # shifts of zero in 88 %.
                module.bias.copy_(torch.linspace(-3.0, 0.5, module.num_features))

    def encode(self, images: Tensor, limit: int | None = None) -> Tensor:
        """Images [B, m, 1, H, W, D] in 0..1 -> latents before quantisation [B, m, 8, h, w, d], each by itself.

        limit: bytes of feature maps to stay within, see `within_memory`.
        """
        x = images.flatten(0, 1).to(self.encoder.out.weight.dtype)
        return _apply(self.encoder, x, limit).unflatten(0, images.shape[:2])

    def quantise(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [B, m, 8, h, w, d] -> (their nearest codes, same shape; indices [B, m, h, w, d])."""
        flat = z.movedim(2, -1)
        index = nearest_code(flat.reshape(-1, flat.shape[-1]).float(), self.codebook.float())
        return self.codebook[index].view(flat.shape).movedim(-1, 2).to(z.dtype), index.view(flat.shape[:-1])

    def decode(self, codes: Tensor, joint: bool, limit: int | None = None) -> Tensor:
        """Codes [B, m, 8, h, w, d] -> images [B, m, 1, H, W, D].

        joint: the elements are slabs of one stack along depth and are decoded together, so that no seam appears
        between them (cardiac). limit: bytes of feature maps to stay within, see `within_memory`.
        """
        codes = codes.to(self.decoder.inp.weight.dtype)
        if not joint:
            return _apply(self.decoder, codes.flatten(0, 1), limit).unflatten(0, codes.shape[:2])
        batch, m, channels, h, w, d = codes.shape
        stack = codes.permute(0, 2, 3, 4, 1, 5).reshape(batch, channels, h, w, m * d)
        x = _apply(self.decoder, stack, limit)
        return x.unflatten(-1, (m, x.shape[-1] // m)).permute(0, 4, 1, 2, 3, 5)

    def images(self, z: Tensor, joint: bool, limit: int | None = None) -> Tensor:
        """Normalised latents [B, m, 8, h, w, d] -> images [B, m, 1, H, W, D], by way of their nearest codes where the
        configuration says so; joint, limit: as in `decode`."""
        z = self.denormalise(z)
        return self.decode(self.quantise(z)[0] if self.config.quantise else z, joint, limit)

    def normalise(self, z: Tensor) -> Tensor:
        """Latents [..., 8, h, w, d] -> mean 0 and deviation 1 per channel, the denoiser's scale."""
        return (z - self._per_channel(self.latent_mean)) / self._per_channel(self.latent_std)

    def denormalise(self, z: Tensor) -> Tensor:
        """Inverse of `normalise`."""
        return z * self._per_channel(self.latent_std) + self._per_channel(self.latent_mean)

    def _per_channel(self, statistic: Tensor) -> Tensor:
        return statistic[:, None, None, None]

    def prompts(self, z: Tensor, observed: Tensor) -> Tensor:
        """Latents [B, m, 8, h, w, d] and observed [B, m] (bool) -> prompts [B, 3, P]: how many, which, what.

        Run on each observed element, averaged over them; what is missing is never read. At least one element must be
        observed.
        """
        each = torch.stack([encoder(z[observed]) for encoder in self.prompt_encoders], dim=1)
        share = observed.to(each.dtype) / observed.sum(1, keepdim=True)
        sample = observed.nonzero()[:, 0]
        out = each.new_zeros(z.shape[0], 3, each.shape[-1])
        return out.index_add(0, sample, each * share[observed][:, None, None])

    def features_of_each(self, z: Tensor) -> Tensor:
        """Latents [B, m, 8, h, w, d] -> what the three prompt encoders pool from each element [B, m, 3, b]."""
        flat = z.flatten(0, 1)
        pooled = [encoder.pool(flat) for encoder in self.prompt_encoders]  # type: ignore[operator]
        return torch.stack(pooled, dim=1).unflatten(0, z.shape[:2])

    def prompts_of_features(self, features: Tensor) -> Tensor:
        """Pooled features [..., 3, b] -> prompts [..., 3, P]."""
        with full_precision(features):  # elements differ by less than bfloat16 resolves
            each = zip(self.prompt_encoders, features.unbind(-2), strict=True)
            return torch.stack([encoder.mlp(x) for encoder, x in each], dim=-2)  # type: ignore[operator]

    def prompts_of_each(self, z: Tensor) -> Tensor:
        """Latents [B, m, 8, h, w, d] -> the prompts [B, m, 3, P] of every element as if it alone were observed.

        Those of any observed set are their mean over it.
        """
        return self.prompts_of_features(self.features_of_each(z))

    def assess(self, prompts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Prompts [B, 3, P] -> logits of the number missing [B, m-1] (class 0 is one), of each element being missing
        [B, m], and the contrastive embedding [B, E]."""
        with full_precision(prompts):
            count, which, what = (head(prompts[:, i]) for i, head in enumerate(self.heads))
        return count, which, what
