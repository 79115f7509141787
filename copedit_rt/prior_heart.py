"""The informed prior of hearts: missing slices of a stack, from those on either side.

Linear interpolation keeps all detail of slices that may be centimetres away, and pays for what has moved. Here the
interpolated slice, the same blurred more and more, the next slices and the mean of all are summed with weights fitted
by ridge regression (Hoerl and Kennard 1970), a set for each class of missing slice: whether there are slices on both
sides, how many slices away the nearest is, and how wide the gap is. Distances are counted in slices, not mm: stacks of
8 to 10 mm are the rule, and the spacing of the published training data is nominal. Slices that are nearer than `THICK`
count as parts of one, and the nearer the next one is, the more interpolation is left as it is. A stack and its reverse
are filled alike. NumPy alone, for every engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from copedit_rt.config import ModelConfig
from copedit_rt.errors import CopeditError
from copedit_rt.images.prepare import THICK, Prepared, remoteness
from copedit_rt.prior import PRIOR, Fill, read, write

SIGMAS = (1, 2, 4, 8)  # voxels in the plane
FURTHEST, WIDEST = 7, 9  # slices: what is further away, or a wider gap, counts as this
FEATURES = 17

Array = NDArray[np.float32]
Class = tuple[int, int, int]  # 1 between two slices, else 0; slices to the nearest; slices from one side to the other


def gaussian(n: int, sigma: float) -> Array:
    """The matrix [n, n] that blurs an axis, mirrored at its ends; cut at three sigmas."""
    reach = int(3 * sigma + 0.5)
    offsets = np.arange(-reach, reach + 1)
    kernel = np.exp(-0.5 * (offsets / sigma) ** 2)
    position = (np.arange(n)[:, None] + offsets) % (2 * n)
    mirrored = np.minimum(position, 2 * n - 1 - position)
    matrix = np.zeros((n, n))
    np.add.at(matrix, (np.arange(n)[:, None], mirrored), kernel / kernel.sum())
    return matrix.astype(np.float32)


def blurs(slices: Array) -> Array:
    """Slices [H, W, k] as they are and blurred in the plane [1 + SIGMAS, H, W, k]."""
    h, w, k = slices.shape

    def blur(sigma: float) -> Array:
        return gaussian(w, sigma) @ (gaussian(h, sigma) @ slices.reshape(h, w * k)).reshape(h, w, k)

    return np.stack([slices, *(blur(sigma) for sigma in SIGMAS)])


def features(seen: Array, kept: Sequence[int], index: int, scale: float = 1.0) -> tuple[Class, Array]:
    """The class of missing slice `index`, and what its voxels are made of [FEATURES, H, W]; the first is the
    interpolated slice.

    seen: `blurs` of the slices that are there [1 + SIGMAS, H, W, k]; kept [k]: their indices, ascending. scale: slices
    that a slice counts as.
    """
    last, after = len(kept) - 1, int(np.searchsorted(kept, index))
    low, high = max(after - 1, 0), min(after, last)
    two, gap = low != high, kept[high] - kept[low]
    part = np.float32((index - kept[low]) / gap if two else 0)
    # At an end of the stack the slice next to the nearest stands on both sides.
    beyond = (max(low - 1, 0), min(high + 1, last)) if two else (min(1, last) if after == 0 else max(last - 1, 0),) * 2

    def between(a: int, b: int) -> Array:
        return (1 - part) * seen[..., a] + part * seen[..., b]

    mean, sharp = seen.mean(-1), seen[:-1]
    made = [
        between(low, high),
        between(*beyond)[:-1],
        (sharp[..., low] - sharp[..., high]) * (np.float32(0.5) - part),
        mean[[0, 3, 4]],
        np.ones_like(mean[:1]),
    ]
    nearest = min(abs(index - kept[low]), abs(kept[high] - index))
    wide = min(max(round(scale * gap), 2), WIDEST) if two else 0
    return (int(two), min(max(round(scale * nearest), 1), FURTHEST), wide), np.concatenate(made)


class SlicePrior:
    """The fill of a heart's missing slices: interpolation, and weights of `features` that are added to it."""

    def __init__(self, classes: NDArray[np.int32], weights: Array):
        """classes [K, 3], weights [K, FEATURES]."""
        self.classes, self.weights = classes, weights

    @classmethod
    def load(cls, folder: Path, config: ModelConfig) -> SlicePrior:
        """Of a model folder. Raises CopeditError for a file that is missing, damaged or of another kind of model."""
        tensors = read(folder, {"classes": (None, 3), "weights": (None, FEATURES)}, config)
        if not 0 < len(tensors["classes"]) == len(tensors["weights"]):
            raise CopeditError(f"{folder / PRIOR}: its classes and weights are not as many; copy the model again")
        return cls(tensors["classes"].astype(np.int32), tensors["weights"])

    def save(self, folder: Path) -> None:
        """Into a model folder."""
        write(folder, {"classes": self.classes, "weights": self.weights})

    def of_class(self, wanted: Class) -> Array:
        """The weights of a class, or of the one most like it, on as many sides if there is one."""
        unlike = np.abs(self.classes - np.array(wanted)) @ (100, 1, 1)
        return self.weights[np.argmin(unlike)]

    def fill_stack(self, stack: Array, missing: Sequence[int], apart: float = THICK) -> Array:
        """A copy of a stack [H, W, N] in 0..1 with its missing slices filled; what they hold is not read.

        apart: mm from slice to slice; what is added to interpolation falls as `remoteness` does.
        """
        scale = min(1.0, apart / THICK)
        kept = [index for index in range(stack.shape[-1]) if index not in missing]
        seen, filled = blurs(np.ascontiguousarray(stack[..., kept])), stack.copy()
        for index in missing:
            kind, given = features(seen, kept, index, scale)
            share = remoteness(kept, index, apart)
            filled[..., index] = np.clip(given[0] + share * np.tensordot(self.of_class(kind), given, 1), 0, 1)
        return filled

    def fill_study(self, prepared: Prepared) -> Fill:
        """Of a heart: all slabs, and the stack that they are of."""
        assert prepared.stack is not None
        stack = self.fill_stack(prepared.stack, prepared.missing_slices, prepared.apart)
        return Fill(prepared.elements_of(stack), stack)
