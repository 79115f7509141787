"""Detail that the model's grid could not hold, carried over from the observed images; and the range of what is made.

Local linear coefficients between a prediction and the observed images, fitted on the model's grid, are upsampled and
multiplied with what the grid lost of each observed image: the linear model of the guided filter (He et al. 2013). The
prediction's own low frequencies stay, because no offset is carried over. NumPy only.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from copedit_rt.images.grids import Frame, slabs

RADIUS = 1  # windows of 3 x 3 x 3 grid voxels; of the sizes tried on real brains the best
RIDGE = 1e-2  # in squared units of images that run from 0 to 1: a contrast below 0.1 is not followed
LIMIT = 2.0  # largest coefficient: beyond it noise of a flat observed image would be amplified
TOP = 0.995  # quantile: what becomes 1 in every image a model has seen
BRIGHT, BRIGHTEST = 0.98, 0.99  # where lifting begins, of grey values and of the chances of being bright

Array = NDArray[np.float32]


class Detail:
    """What observed images add to a prediction of the same study, slab by slab of the file's grid."""

    def __init__(self, prediction: Array, guides: Array, frame: Frame, ridge: float = RIDGE):
        """prediction [H, W, D] and guides [k, H, W, D], the observed images, float32 in 0..1 on the model's grid."""
        self._frame = frame
        self._slopes = [frame.to_plane(slope) for slope in local_slopes(prediction, guides, ridge=ridge)]
        self._guides = [frame.to_plane(guide) for guide in guides]

    def slab(self, images: Iterable[Array], part: slice) -> Array | float:
        """The detail of slices `part`: images, the observed ones there, in 0..1 and the model's orientation."""
        out: Array | float = 0.0
        seen = self._frame.coverage(part) if self._frame.cuts else None  # of a voxel that the view cuts, a share
        for image, slope, guide in zip(images, self._slopes, self._guides, strict=True):
            lost = (image if seen is None else image * seen) - self._frame.to_slab(guide, part)
            lost *= self._frame.to_slab(slope, part)
            out = lost + out
        return out


def local_slopes(prediction: Array, guides: Array, radius: int = RADIUS, ridge: float = RIDGE) -> Array:
    """Coefficients a_j [k, H, W, D] of the local ridge regression prediction ~ sum_j a_j guide_j + b.

    One regression for each window of 2 radius + 1 voxels an axis, cut at the grid's border; within -LIMIT..LIMIT.
    """
    means = [window_mean(guide, radius) for guide in guides]
    own = window_mean(prediction, radius)
    system = [
        [_covariance(a, b, ma, mb, radius) for b, mb in zip(guides[: i + 1], means, strict=False)]
        for i, (a, ma) in enumerate(zip(guides, means, strict=True))
    ]
    right = [_covariance(guide, prediction, mean, own, radius) for guide, mean in zip(guides, means, strict=True)]
    for i, row in enumerate(system):
        row[i] += np.float32(ridge)
    slopes = np.array(_solve(system, right), np.float32).reshape(guides.shape)
    return np.clip(slopes, -LIMIT, LIMIT, out=slopes)


def window_mean(array: Array, radius: int) -> Array:
    """The mean over windows of 2 radius + 1 voxels along each of three axes, cut at the border; a new array."""
    for axis, size in enumerate(array.shape):
        total, source = array.copy(), np.moveaxis(array, axis, 0)
        view = np.moveaxis(total, axis, 0)
        for step in range(1, min(radius, size - 1) + 1):
            view[step:] += source[:-step]
            view[:-step] += source[step:]
        place = np.arange(size)
        count = np.minimum(place + radius, size - 1) - np.maximum(place - radius, 0) + 1
        view *= (1 / count).astype(np.float32)[:, None, None]
        array = total
    return array


def _covariance(a: Array, b: Array, mean_a: Array, mean_b: Array, radius: int) -> Array:
    return window_mean(a * b, radius) - mean_a * mean_b


def _solve(system: list[list[Array]], right: list[Array]) -> list[Array]:
    """Cholesky's solution for each voxel: system is the lower triangle, row by row; both lists are overwritten."""
    for i, row in enumerate(system):
        for j in range(i + 1):
            for n in range(j):
                row[j] -= row[n] * system[j][n]
            row[j] = np.sqrt(row[j]) if i == j else row[j] / system[j][j]
        for n in range(i):
            right[i] -= row[n] * right[n]
        right[i] /= row[i]
    for i in reversed(range(len(system))):
        for n in range(i + 1, len(system)):
            right[i] -= system[n][i] * right[n]
        right[i] /= system[i][i]
    return right


def lift_to_full_range(image: Array, bright: Array | None = None) -> None:
    """Lifts the brightest voxels of an image [X, Y, Z] in place, so that its 99.5 percentile is 1, as that of every
    image in a model's training is.

    An expectation is duller than any image that it is the mean of: whoever scales it by its own range brightens all of
    it. bright [X, Y, Z]: the chance of each voxel to be among the brightest. The one hundredth with the best is lifted;
    what is brightest in an expectation may be what is least known (fluid's borders in a FLAIR). Without it the lift is
    monotone, and what lies below the 98th percentile stays as it is. So does an image that reaches 1.
    """
    start, top = (float(x) for x in np.quantile(image, (BRIGHT, TOP)))
    if not 0 < start < top < 1:
        return
    slope = (1 - start) / (top - start)
    least, most = (0.0, 0.0) if bright is None else (float(x) for x in np.quantile(bright, (BRIGHTEST, TOP)))
    for part in slabs(image.shape):
        slab = image[..., part]
        if bright is None:
            slab[...] = np.where(slab > start, start + slope * (slab - start), slab)
        else:
            share = np.clip((bright[..., part] - least) / max(most - least, 1e-6), 0, 1)
            slab += share * np.maximum(1 - slab, 0)
