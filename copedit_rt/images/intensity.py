"""Grey values: from an image's own range to 0..1, and what shows nothing in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from copedit_rt.errors import CopeditError

NOTHING = np.float32(1e-3)  # the least that tissue may be
TISSUE = 0.1  # of the percentile range: brighter is taken for the head
RINGING = 0.3  # of the voxels of tissue: so many below 0 are z-scores, fewer the ringing of splines


@dataclass(frozen=True)
class Backdrop:
    """What shows nothing in an image: one value where it was standardised (z-scores), else whatever is not above it."""

    value: float
    standardised: bool = False

    @classmethod
    def of(cls, data: NDArray[np.float32], low: float, high: float) -> Backdrop:
        """The background of a standardised image has the value of its corners, and has to be told from tissue of the
        same grey. Elsewhere little is below 0, as interpolation rings; then it rings above 0, too."""
        below = -0.01 * high
        if low >= below:
            return cls(0.0)
        if np.count_nonzero(data < below) < RINGING * np.count_nonzero(data > TISSUE * high):
            return cls(float(NOTHING) * high)
        return cls(float(np.median(data[np.ix_((0, -1), (0, -1), (0, -1))])), standardised=True)

    def where(self, data: NDArray[np.float32]) -> NDArray[np.bool_]:
        """The voxels that show nothing."""
        return data == self.value if self.standardised else data <= self.value

    @property
    def fill(self) -> float:
        """The value that stands for nothing."""
        return self.value if self.standardised else 0.0


def percentile_range(data: NDArray, percentiles: tuple[float, float], what: str) -> tuple[float, float]:
    """The two percentiles of an image; raises CopeditError, which names `what`, where they leave no range."""
    with np.errstate(over="ignore", invalid="ignore"):
        low, high = (float(value) for value in np.percentile(data, percentiles))
        span = np.float32(high - low)
        sound = bool(np.isfinite([low, high, float(span)]).all())
        sound = sound and (span == 0 or bool(np.isfinite(np.float32(1 / (high - low)))))
    if not sound:
        raise CopeditError(
            f"{what}: its values, {low:g} to {high:g}, are too large or too small to compute with; rescale the image"
        )
    if not high > low:
        raise CopeditError(
            f"{what}: at least {percentiles[1] - percentiles[0]:g} % of the voxels have one value ({low:g}), "
            f"so there is no image to work from; crop the empty surroundings or choose another file"
        )
    return low, high


def normalise(data: NDArray[np.float32], low: float, high: float) -> NDArray[np.float32]:
    """low..high as 0..1, clipped."""
    scaled = (data - np.float32(low)) * np.float32(1 / (high - low))
    return np.clip(scaled, 0, 1, out=scaled)


def unit_range(low: float, high: float, backdrop: Backdrop) -> Callable[[NDArray], NDArray[np.float32]]:
    """What takes voxels of an image to 0..1: low..high, clipped, 0 where it shows nothing."""

    def unit(part: NDArray[np.float32]) -> NDArray[np.float32]:
        normal = normalise(part, low, high)
        normal[backdrop.where(part)] = 0
        return normal

    return unit


def to_unit_range(
    data: NDArray[np.float32], low: float, high: float, backdrop: Backdrop | None = None
) -> NDArray[np.float32]:
    """A skull-stripped image with low..high as 0..1, clipped, and 0 where it shows nothing.

    backdrop: of the image that low and high are of, where that is another.
    """
    return unit_range(low, high, backdrop or Backdrop.of(data, low, high))(data)
