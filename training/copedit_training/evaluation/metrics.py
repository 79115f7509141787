"""PSNR, SSIM and MAE of volumes, computed in float64; numpy and scipy only."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import ndimage

WINDOW, SIGMA = 11, 1.5  # voxels, of the SSIM


def psnr(a: np.ndarray, b: np.ndarray, data_range: float = 1.0) -> float:
    """Peak signal-to-noise ratio in dB over all voxels; infinite where a equals b."""
    error = float(np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2))
    return math.inf if error == 0 else 10 * math.log10(data_range**2 / error)


def mae(a: np.ndarray, b: np.ndarray) -> float:
    """Mean absolute error over all voxels."""
    return float(np.mean(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64))))


def ssim_map(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Structural similarity at every voxel of two volumes [X, Y, Z] on 0..1, float64.

    Wang et al. 2004: Gaussian window, K1 = 0.01, K2 = 0.03, population variances; borders mirrored. On an
    axis with fewer voxels than the window, the window shrinks to the largest odd number that fits. What lies further
    than a window from all that is not 0 in both, such as air, is 1 and not computed.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"shapes {a.shape} and {b.shape} differ")
    out = np.ones(a.shape)
    shown = _box((a != 0) | (b != 0), WINDOW)
    sizes = [min(WINDOW, n - 1 + n % 2) for n in a.shape]
    a, b = a[shown], b[shown]
    if not a.size:
        return out

    def blur(x: np.ndarray) -> np.ndarray:
        for axis, size in enumerate(sizes):
            taps = np.exp(-0.5 * ((np.arange(size) - size // 2) / SIGMA) ** 2)
            x = ndimage.correlate1d(x, taps / taps.sum(), axis=axis, mode="mirror")
        return x

    c1, c2 = 0.01**2, 0.03**2
    mu_a, mu_b = blur(a), blur(b)
    var_a, var_b = np.maximum(blur(a * a) - mu_a**2, 0), np.maximum(blur(b * b) - mu_b**2, 0)
    covariance = blur(a * b) - mu_a * mu_b
    out[shown] = (2 * mu_a * mu_b + c1) * (2 * covariance + c2) / ((mu_a**2 + mu_b**2 + c1) * (var_a + var_b + c2))
    return out


def measure(
    image: np.ndarray, truth: np.ndarray, slices: Sequence[int] | None = None, mask: np.ndarray | None = None
) -> dict[str, float]:
    """PSNR (at most 100: JSON has no infinity), SSIM and MAE of volumes [X, Y, Z] on 0..1, over `slices` along z.

    mask: bool [X, Y, Z]; the same over its voxels alone as psnr_inside, ssim_inside and mae_inside, where the window
    of the SSIM still sees what is around them. All of it where the mask is empty.
    """
    values = ssim_map(image, truth)
    a, b = np.asarray(image, np.float64), np.asarray(truth, np.float64)
    if slices is not None:
        a, b, values = (x[..., list(slices)] for x in (a, b, values))
    found = {"psnr": min(psnr(a, b), 100.0), "ssim": float(values.mean()), "mae": mae(a, b)}
    if mask is not None:
        mask = mask if slices is None else mask[..., list(slices)]
        inside = mask if mask.any() else np.ones_like(mask)
        a, b, values = a[inside], b[inside], values[inside]
        found |= {
            "psnr_inside": min(psnr(a, b), 100.0),
            "ssim_inside": float(values.mean()),
            "mae_inside": mae(a, b),
        }
    return found


def _box(shown: np.ndarray, margin: int) -> tuple[slice, ...]:
    """The box around all that is shown, and a margin: within it mirrored borders mirror what lies outside, zeros."""
    if not shown.any():
        return (slice(0, 0),) * shown.ndim
    ends = []
    for axis, n in enumerate(shown.shape):
        where = np.flatnonzero(shown.any(axis=tuple(i for i in range(shown.ndim) if i != axis)))
        ends.append(slice(max(0, int(where[0]) - margin), min(n, int(where[-1]) + 1 + margin)))
    return tuple(ends)
