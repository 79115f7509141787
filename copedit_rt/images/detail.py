"""Detail that the model's grid could not hold, carried over from the observed images; and the range of what is made.

Local linear coefficients between a prediction and the observed images, fitted on the model's grid, are upsampled and
multiplied with what the grid lost of each observed image: the linear model of the guided filter (He et al. 2013). The
prediction's own low frequencies stay, because no offset is carried over. NumPy only.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

RADIUS = 1  # windows of 3 x 3 x 3 grid voxels; of the sizes tried on real brains the best
RIDGE = 1e-2  # in squared units of images that run from 0 to 1: a contrast below 0.1 is not followed
LIMIT = 2.0  # largest coefficient: beyond it noise of a flat observed image would be amplified
TOP, BRIGHT = 0.995, 0.98  # quantiles: what becomes 1 in every image a model has seen, and where lifting begins

Array = NDArray[np.float32]
ToFile = Callable[[Array], Array]


class Detail:
    """The sum of what observed images add to predictions of the same study, one observed image at a time."""

    def __init__(self, predictions: Array, guides: Array, to_file: ToFile, ridge: float = RIDGE):
        """predictions [n, H, W, D] and guides [k, H, W, D], the observed images, float32 in 0..1 on the model's grid;
        to_file: the model's grid -> the file's."""
        self._slopes = [local_slopes(prediction, guides, ridge=ridge) for prediction in predictions]
        self._guides, self._to_file = guides, to_file

    def add(self, made: list[Array], index: int, image: Array, background: NDArray[np.bool_] | None = None) -> None:
        """Add to each image [X, Y, Z] made of a prediction, in place, what observed image `index` shows beyond its own
        copy on the grid: image [X, Y, Z] in 0..1, background [X, Y, Z] is left as it is."""
        lost = np.subtract(image, self._to_file(self._guides[index]), dtype=np.float32)
        if background is not None:
            lost[background] = 0
        for out, slopes in zip(made, self._slopes, strict=True):
            out += self._to_file(slopes[index]) * lost


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


def full_range(image: Array) -> Array:
    """An image [X, Y, Z] whose brightest voxels are lifted so that its 99.5 percentile is 1, as that of every image in
    a model's training is.

    An expectation is duller than any image that it is the mean of: without this, T1 made of the others of a real brain
    ends at 0.85, and whoever scales it by its own range brightens all of it. Monotone; what lies below the 98th
    percentile stays as it is, and so does an image that reaches 1.
    """
    start, top = (float(x) for x in np.quantile(image, (BRIGHT, TOP)))
    if not 0 < start < top < 1:
        return image
    return np.where(image > start, start + (image - start) * ((1 - start) / (top - start)), image).astype(np.float32)
