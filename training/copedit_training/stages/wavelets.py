"""A start for autoencoders: the Haar wavelets (Haar 1910) of the voxels that one latent stands for, or of those that an
entry without residual units halves.

Random layers of one level need long to come near them; training goes on from there.
"""

from __future__ import annotations

import itertools
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from copedit_rt.errors import CopeditError
from copedit_rt.networks.tokenizer import Conv3d, ConvTranspose3d, CoPeVAE


def patterns(strides: tuple[int, ...], count: int) -> Tensor:
    """The `count` smoothest Haar patterns of a block [count, *strides], orthonormal; strides of 1 or 2."""
    signs = itertools.product(*(((1, 1), (1, -1))[:s] if s == 2 else ((1,),) for s in strides))
    ordered = sorted(signs, key=lambda axes: sum(-1 in axis for axis in axes))
    blocks = [np.multiply.outer(np.multiply.outer(a, b), c) for a, b, c in ordered[:count]]
    return torch.from_numpy(np.stack(blocks).astype(np.float32)) / np.sqrt(np.prod(strides))


@torch.no_grad()
def start_as_wavelets(tokenizer: CoPeVAE) -> None:
    """Set a tokenizer of one level so that its latents are the smoothest wavelets of their blocks, which its decoder
    puts together again: exactly where there are as many latent channels as voxels in a block.

    As ReLU follows, every wavelet takes two channels, one for each sign. The other channels start at random and are not
    read, but learn to be.

    Of a tokenizer of more levels whose first is an entry, one without residual units, that level alone is set.

    Raises CopeditError for other tokenizers of more levels, or one with too few or too many channels for it.
    """
    c = tokenizer.config
    latent, (width, *deeper) = c.latent_channels, c.channels
    if deeper and not c.units[0]:
        _start_entry(tokenizer)
        return
    if deeper or 2 * latent > width or latent > int(np.prod(c.strides[0])):
        raise CopeditError(
            "wavelets: needs one level, at most as many latent channels as voxels in a block, and two channels for each"
        )
    down, up = (cast(nn.Sequential, net.levels[0]) for net in (tokenizer.encoder, tokenizer.decoder))
    first, last = cast(Conv3d, down[0]), cast(ConvTranspose3d, up[-2])
    waves, taps = patterns(c.strides[0], latent), tuple(slice(1, 1 + s) for s in c.strides[0])
    sign = torch.tensor([1.0, -1.0])
    both = torch.kron(torch.eye(latent), sign[:, None])  # [2 latent, latent]
    for weight in (first.weight, tokenizer.decoder.inp.weight):
        weight[: 2 * latent] = 0
    for weight in (tokenizer.encoder.out.weight, last.weight):
        weight.zero_()
    signed = _signed(waves)
    where: tuple[Any, ...] = (slice(2 * latent), 0, *taps)
    first.weight[where] = last.weight[where] = signed
    tokenizer.decoder.inp.weight[: 2 * latent, :, 1, 1, 1] = both
    tokenizer.encoder.out.weight[:, : 2 * latent, 1, 1, 1] = both.T


def _signed(waves: Tensor) -> Tensor:
    """Every pattern with both signs [2 patterns, *strides]."""
    return torch.stack([waves, -waves], 1).flatten(0, 1)


def _start_entry(tokenizer: CoPeVAE) -> None:
    """All patterns of the first level's blocks, in its first channels; the decoder's last level puts them together."""
    c = tokenizer.config
    count = int(np.prod(c.strides[0]))
    if 2 * count > c.channels[0]:
        raise CopeditError(
            f"wavelets: an entry of stride {c.strides[0]} needs two channels for each of {count} patterns, and "
            f"tokenizer.channels begins with {c.channels[0]}"
        )
    taps = tuple(slice(1, 1 + s) for s in c.strides[0])
    where: tuple[Any, ...] = (slice(2 * count), 0, *taps)
    for layer in (tokenizer.encoder.levels[0][0], tokenizer.decoder.levels[-1][-2]):  # type: ignore[index]
        layer.weight[: 2 * count] = 0
        layer.weight[where] = _signed(patterns(c.strides[0], count))
