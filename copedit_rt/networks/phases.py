"""Convolutions in the way that suits the libraries below, with the results of torch's up to rounding.

From and to one channel: the voxels that a stride steps over become channels, eight for strides of 2, and nothing is
strided any more. The same numbers are multiplied, and summed in another order. Libraries do badly with one channel:
tensor cores take eight, and oneDNN computes eight to keep one.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from copedit_rt.config import Triple

_LAST = torch.channels_last_3d


def on_cpu(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Triple, padding: Triple) -> Tensor:
    """`F.conv3d` of float32 by oneDNN, which F.conv3d does not ask for one sample with few channels.

    It works along the last axis. If the depth is shorter than the axis before, as a slab's is, x and the result lie in
    memory depth first, channels last: only strides say so, and between such layers nothing is copied.
    """
    sizes = zip(x.shape[3:], weight.shape[3:], stride[1:], padding[1:], strict=True)
    width, depth = ((n + 2 * p - k) // s for n, k, s, p in sizes)
    turned = depth < width
    if turned:
        x, weight = x.movedim(4, 2), weight.movedim(4, 2)
        stride, padding = (stride[2], *stride[:2]), (padding[2], *padding[:2])
    y = torch.mkldnn_convolution(x, weight.contiguous(memory_format=_LAST), bias, padding, stride, (1, 1, 1), 1)
    return y.movedim(2, 4) if turned else y


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
    every = phases.contiguous(memory_format=_LAST), bias.expand(len(phases)).contiguous()
    ours = x.dtype == torch.float32 and not x.is_cuda
    y = on_cpu(x, *every, (1, 1, 1), (1, 1, 1)) if ours else F.conv3d(x, *every, padding=1)
    out = y.new_empty(len(x), 1, *(n * s for n, s in zip(x.shape[2:], stride, strict=True)))
    for channel, shift in enumerate(itertools.product(*map(range, stride))):
        h, w, d = (slice(a, None, s) for a, s in zip(shift, stride, strict=True))
        p, q, r = (slice(a, a + n) for a, n in zip(shift, x.shape[2:], strict=True))
        out[:, 0, h, w, d] = y[:, channel, p, q, r]
    return out


def _taps(kernel: Tensor, stride: Triple) -> Tensor:
    """Kernels [C, a, b, c] as [C, phases, a / stride, ...], channels last."""
    for axis in (3, 2, 1):
        kernel = kernel.unflatten(axis, (-1, stride[axis - 1]))
    return kernel.permute(0, 2, 4, 6, 1, 3, 5).flatten(1, 3).contiguous(memory_format=_LAST)
