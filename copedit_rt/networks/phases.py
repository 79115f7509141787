"""Strided convolutions from and to one channel, as convolutions without strides: the voxels that a stride steps over
become channels, eight for strides of 2.

The same numbers are multiplied, and summed in another order. Libraries do badly with one channel: tensor cores take
eight, and oneDNN computes eight to keep one.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from copedit_rt.config import Triple

_LAST = torch.channels_last_3d


def from_one(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Triple) -> Tensor:
    """`F.conv3d(x, weight, bias, stride, padding=1)` of x [N, 1, H, W, D] by weight [C, 1, ...].

    Extents of x and of the kernel must be multiples of the stride along each axis.
    """
    padded = F.pad(x[:, 0], (1,) * 6)
    for axis in (3, 2, 1):
        padded = padded.unflatten(axis, (-1, stride[axis - 1]))
    channels = padded.permute(0, 2, 4, 6, 1, 3, 5).flatten(1, 3)
    return F.conv3d(channels.contiguous(memory_format=_LAST), _taps(weight[:, 0], stride), bias)


def to_one(x: Tensor, weight: Tensor, bias: Tensor, stride: Triple) -> Tensor:
    """`F.conv_transpose3d(x, weight, bias, stride, padding=1)` of x [N, C, h, w, d] by weight [C, 1, ...].

    The kernel, 3 along axes of stride 1 and 4 along those of stride 2, is turned around and cut into phases: each voxel
    of the result is the work of one of them.
    """
    phases = _taps(weight[:, 0].flip(1, 2, 3), stride).transpose(0, 1)
    y = F.conv3d(x, phases.contiguous(memory_format=_LAST), bias.expand(len(phases)), padding=1)
    out = y.new_empty(len(x), 1, *(n * s for n, s in zip(x.shape[2:], stride, strict=True)))
    for channel, shift in enumerate(itertools.product(*map(range, stride))):
        at = tuple(slice(a, None, s) for a, s in zip(shift, stride, strict=True))
        source = tuple(slice(a, a + n) for a, n in zip(shift, x.shape[2:], strict=True))
        out[(slice(None), 0, *at)] = y[(slice(None), channel, *source)]
    return out


def _taps(kernel: Tensor, stride: Triple) -> Tensor:
    """Kernels [C, a, b, c] as [C, phases, a / stride, ...], channels last."""
    for axis in (3, 2, 1):
        kernel = kernel.unflatten(axis, (-1, stride[axis - 1]))
    return kernel.permute(0, 2, 4, 6, 1, 3, 5).flatten(1, 3).contiguous(memory_format=_LAST)
