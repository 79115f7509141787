"""Index of the nearest code, exact in float32, without an N x K matrix.

A program owns 32 vectors times GROUPS and walks over the codes. Lanes are vectors and warps are codes: a code is one
broadcast read for the vectors of all groups, each thread keeps the best of the codes that it has met, and the winners
of a vector meet once, at the end. Squared differences are summed channel after channel, products rounded before they
are added, as the reference does it: same sums, same index. A code or vector that holds NaN is at no distance that is
less than another; a vector without a nearest code gets 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from copedit_kernels import reference
from copedit_kernels.dispatch import register, use_triton
from copedit_kernels.launch import cdiv, check_device, check_dtype, jit, on, tl

# Codes of a tile, and warps.
CODES, WARPS = 16, 8


@jit
def nearest(
    z, codebook, index, z_n, z_c, c_k, c_c, N, K,
    D: tl.constexpr, GROUPS: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    """index [N] of the nearest of codebook [K, D] to each of z [N, D], both by strides."""
    WIDE: tl.constexpr = tl.float64 if z.dtype.element_ty == tl.float64 else tl.float32
    n = tl.program_id(0).to(tl.int64) * (32 * GROUPS) + tl.arange(0, 32)
    channels: tl.tuple = ()
    best: tl.tuple = ()
    where: tl.tuple = ()
    for g in tl.static_range(GROUPS):
        row = n + g * 32
        at = z + row * z_n
        for _ in tl.static_range(D):
            # [32]
            channels += (tl.load(at, mask=row < N, other=0.0).to(WIDE),)
            at += z_c
        # [CODES, 32]
        best += (tl.full([CODES, 32], float("inf"), WIDE),)
        where += (tl.zeros([CODES, 32], tl.int32),)
    for first in range(0, K, CODES):
        k = first + tl.arange(0, CODES)
        code_at = codebook + k.to(tl.int64) * c_k
        code: tl.tuple = ()
        for _ in tl.static_range(D):
            # [CODES]; beyond K infinitely far
            code += (tl.load(code_at, mask=k < K, other=float("inf")).to(WIDE),)
            code_at += c_c
        best_before, where_before = best, where
        best, where = (), ()
        for g in tl.static_range(GROUPS):
            distance = tl.zeros([CODES, 32], WIDE)
            for c in tl.static_range(D):
                difference = channels[g * D + c][None, :] - code[c][:, None]
                distance += difference * difference
            closer = distance < best_before[g]
            best += (tl.where(closer, distance, best_before[g]),)
            where += (tl.where(closer, k[:, None], where_before[g]),)
    for g in tl.static_range(GROUPS):
        row = n + g * 32
        least = tl.min(best[g], 0)
        leftmost = tl.min(tl.where(best[g] == least[None, :], where[g], K), 0)
        tl.store(index + row, leftmost.to(tl.int64), mask=row < N)


def _check(z: Tensor, codebook: Tensor) -> None:
    if z.ndim != 2 or codebook.ndim != 2 or z.shape[1] != codebook.shape[1]:
        raise ValueError(
            f"nearest_code: z {tuple(z.shape)} and codebook {tuple(codebook.shape)} must be [N, d], [K, d]"
        )
    if not 2 <= z.shape[1] <= 16:
        raise ValueError(f"nearest_code: z {tuple(z.shape)} has {z.shape[1]} channels, not 2 to 16")
    if not 1 <= len(codebook) < 2**31 - CODES:
        raise ValueError(f"nearest_code: codebook {tuple(codebook.shape)} must have 1 to {2**31 - CODES - 1} codes")
    check_dtype("nearest_code", "z", z)
    check_dtype("nearest_code", "codebook", codebook)
    check_device("nearest_code", z=z, codebook=codebook)


def _groups(D: int, dtype: torch.dtype) -> int:
    """Groups of vectors whose channels a thread can hold in registers."""
    size = D * (8 if dtype == torch.float64 else 4)
    return 4 if size <= 32 else 2 if size <= 64 else 1


def _fake_forward(z: Tensor, codebook: Tensor) -> Tensor:
    _check(z, codebook)
    return z.new_empty(z.shape[:1], dtype=torch.int64)


def _forward(z: Tensor, codebook: Tensor) -> Tensor:
    index = _fake_forward(z, codebook)
    if len(z):
        groups = _groups(z.shape[1], z.dtype)
        with on(z):
            nearest[(cdiv(len(z), 32 * groups),)](
                z, codebook, index, *z.stride(), *codebook.stride(), len(z), len(codebook),
                D=z.shape[1], GROUPS=groups, CODES=CODES, num_warps=WARPS, enable_fp_fusion=False,
            )  # fmt: skip
    return index


_FORWARD = register(
    "nearest_code(Tensor z, Tensor codebook) -> Tensor", _forward, _fake_forward, decomposition=reference.nearest_code
)


def nearest_code(z: Tensor, codebook: Tensor) -> Tensor:
    """Index [N] (int64) of the code nearest to each z [N, d] in codebook [K, d]; the leftmost on ties.

    d from 2 to 16, any strides; z in float16, bfloat16, float32 or float64 is compared in float32, or float64 if it
    is. Distances have the bits of the reference's, so indices are equal. Nothing is saved: no gradient. Raises
    ValueError for other shapes, dtypes or tensors on different devices.
    """
    if use_triton(z, codebook):
        return _FORWARD(z, codebook)
    return reference.nearest_code(z, codebook)
