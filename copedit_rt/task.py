"""Brain or heart: what differs between the two tasks of the product, in one place."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from copedit_rt.errors import CopeditError

STACK = "sax"  # the one volume of a cardiac study


class Task(StrEnum):
    """The kind of a study and of a model. A name of a task equals the task."""

    BRAIN = "brain"
    HEART = "cardiac"

    @classmethod
    def _missing_(cls, value: object) -> Task:
        raise CopeditError(f"task {value!r} is unknown; it must be {' or '.join(cls)}")

    @property
    def joint(self) -> bool:
        """Whether elements are slabs of one stack: one volume in files, decoded together so that no seam appears."""
        return self is Task.HEART

    @property
    def mirrored(self) -> bool:
        """Whether left and right are interchangeable, as they are in a brain and not in a chest."""
        return self is Task.BRAIN

    @property
    def trust(self) -> tuple[float, float]:
        """How much the heads over all observed elements, and what single images look like, count in a perception.

        A modality is recognised by itself, on a scanner that training has not seen better than a set of them is. A slab
        of a heart is hard to tell from its neighbours.
        """
        return (0.25, 1.0) if self is Task.BRAIN else (1.0, 0.5)

    def volumes(self, elements: Sequence[str]) -> tuple[str, ...]:
        """Names of the volumes that hold all elements."""
        return (STACK,) if self.joint else tuple(elements)

    def decoded(self, observed: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Which elements the decoder has to be given where these are observed [..., m]."""
        return np.ones_like(observed) if self.joint else ~observed

    def patterns(self, elements: Sequence[str], count: int) -> list[tuple[str, ...]]:
        """Every way in which so many elements can be missing: any of them, or consecutive slabs."""
        if self.joint:
            return [tuple(elements[i : i + count]) for i in range(len(elements) - count + 1)]
        return list(itertools.combinations(elements, count))

    def draw(self, rng: np.random.Generator, elements: int) -> NDArray[np.bool_]:
        """What is observed [m] by the dual-random strategy (Section 3.2): how many are missing is uniform in 1..m-1,
        then which, of any elements or as a run of slabs."""
        observed, count = np.ones(elements, dtype=bool), rng.integers(1, elements)
        if self.joint:
            start = rng.integers(0, elements - count + 1)
            observed[start : start + count] = False
        else:
            observed[rng.permutation(elements)[:count]] = False
        return observed
