"""Whether the spread of several samples tells how far off their mean is, voxel by voxel."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

FINE = 4000  # cells of the histogram over log10 of the deviation, 1e-10 to 1
LOWEST = -10.0
BINS = 15


class Calibration:
    """Predicted deviation against actual error, collected over images (Levi et al. 2022).

    A calibrated model's squared error is, among voxels of one predicted variance, that variance on average. Voxels are
    kept as sums in fine cells of the deviation's logarithm (0.6 % wide), so that any number of images takes one size.
    """

    def __init__(self) -> None:
        self._cells = np.zeros((3, FINE + 1))  # voxels, sum of variances, sum of squared errors

    def add(self, error: np.ndarray, std: np.ndarray, samples: int) -> None:
        """error: mean of the samples minus truth; std: of the samples (n - 1 in the denominator); same shape.

        If samples and truth are drawn from one distribution, the mean of n samples misses the truth by
        sqrt(1 + 1/n) times its deviation: that is what is predicted.
        """
        variance = np.square(np.asarray(std, np.float64)).ravel() * (1 + 1 / samples)
        squared = np.square(np.asarray(error, np.float64)).ravel()
        with np.errstate(divide="ignore"):
            place = 0.5 * np.log10(variance)
        cell = np.clip((place - LOWEST) / -LOWEST * FINE, 0, FINE).astype(np.int64)
        for row, weights in zip(self._cells, (None, variance, squared), strict=True):
            row += np.bincount(cell, weights, FINE + 1)

    def summary(self, bins: int = BINS) -> dict[str, Any] | None:
        """Bins of about equally many voxels, from the least to the largest deviation; None without voxels.

        "ence": expected normalised calibration error, the mean over bins of |predicted - actual| / predicted, both root
        mean squares. "predicted" and "actual": of all voxels. "ence" is None where a bin's prediction is 0.
        """
        count = self._cells[0].sum()
        if not count:
            return None
        # A cell belongs to the bin that its middle voxel would be in.
        middle = (np.cumsum(self._cells[0]) - 0.5 * self._cells[0]) / count
        which = np.minimum((middle * bins).astype(int), bins - 1)
        rows = []
        for i in range(bins):
            voxels, variance, squared = self._cells[:, which == i].sum(axis=1)
            if voxels:
                rows.append(
                    {
                        "voxels": int(voxels),
                        "predicted": math.sqrt(variance / voxels),
                        "actual": math.sqrt(squared / voxels),
                    }
                )
        sure = all(row["predicted"] > 0 for row in rows)
        _, variance, squared = self._cells.sum(axis=1)
        return {
            "voxels": int(count),
            "predicted": math.sqrt(variance / count),
            "actual": math.sqrt(squared / count),
            "ence": float(np.mean([abs(r["predicted"] - r["actual"]) / r["predicted"] for r in rows]))
            if sure
            else None,
            "bins": rows,
        }
