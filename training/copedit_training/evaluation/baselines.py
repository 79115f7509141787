"""What needs no network and always stands beside it: simple ways to fill in modalities and slices."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np


def mean_of_observed(observed: Mapping[str, np.ndarray]) -> np.ndarray:
    """Voxel-wise mean of the observed images on 0..1."""
    return np.stack(list(observed.values())).mean(axis=0, dtype=np.float32)


class LinearRegression:
    """Voxel-wise least squares with intercept, one set of coefficients per observed subset and target.

    Fitted and applied where any observed image is above 0; elsewhere, in the skull-stripped background, it
    gives 0, which is what is there.
    """

    def __init__(self, elements: Sequence[str]) -> None:
        self.elements = tuple(elements)
        self._moments: dict[tuple[str, ...], np.ndarray] = {}

    @property
    def fitted(self) -> bool:
        """Whether it has seen any study."""
        return bool(self._moments)

    def fit(self, studies: Iterator[Mapping[str, np.ndarray]], subsets: Sequence[Sequence[str]] | None = None) -> None:
        """studies: complete sets of images on 0..1. subsets: the observed subsets wanted; all by default."""
        everything = [s for n in range(1, len(self.elements)) for s in itertools.combinations(self.elements, n)]
        wanted = everything if subsets is None else [self._key(s) for s in subsets]
        size = len(self.elements) + 1
        for images in studies:
            table = np.stack([*(images[e].ravel() for e in self.elements), np.ones(images[self.elements[0]].size)])
            for subset in wanted:
                inside = table[:, table[self._rows(subset)].any(axis=0)].astype(np.float64)
                self._moments[subset] = self._moments.get(subset, np.zeros((size, size))) + inside @ inside.T

    def predict(self, observed: Mapping[str, np.ndarray], target: str) -> np.ndarray:
        """observed: images on 0..1. Returns the target on 0..1, float32."""
        subset = self._key(observed)
        moments, rows = self._moments[subset], [*self._rows(subset), len(self.elements)]
        weights = np.linalg.lstsq(moments[np.ix_(rows, rows)], moments[rows, self.elements.index(target)], rcond=None)[
            0
        ]
        images = [observed[e] for e in subset]
        value = weights[-1] + sum(w * x for w, x in zip(weights[:-1], images, strict=True))
        return np.where(np.any([x > 0 for x in images], axis=0), np.clip(value, 0, 1), 0).astype(np.float32)

    def _key(self, names: Mapping[str, Any] | Sequence[str]) -> tuple[str, ...]:
        return tuple(e for e in self.elements if e in names)

    def _rows(self, subset: Sequence[str]) -> list[int]:
        return [self.elements.index(e) for e in subset]


def interpolate_slices(stack: np.ndarray, missing: Sequence[int]) -> np.ndarray:
    """Missing slices of [X, Y, Z] linearly between the nearest observed ones; at the ends, the nearest."""
    there = [z for z in range(stack.shape[2]) if z not in missing]
    out = stack.copy()
    for z in missing:
        below, above = (
            max((t for t in there if t < z), default=None),
            min((t for t in there if t > z), default=None),
        )
        if below is None or above is None:
            out[..., z] = stack[..., above if below is None else below]
        else:
            share = (z - below) / (above - below)
            out[..., z] = (1 - share) * stack[..., below] + share * stack[..., above]
    return out


def nearest_slices(stack: np.ndarray, missing: Sequence[int]) -> np.ndarray:
    """Missing slices of [X, Y, Z] copied from the nearest observed one (the lower of two equally near)."""
    there = np.array([z for z in range(stack.shape[2]) if z not in missing])
    out = stack.copy()
    for z in missing:
        out[..., z] = stack[..., there[np.argmin(np.abs(there - z))]]
    return out
