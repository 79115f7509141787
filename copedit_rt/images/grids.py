"""Arithmetic of voxel grids: axes, orientations, and one small matrix an axis that resamples it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from nibabel.orientations import inv_ornt_aff, io_orientation
from numpy.typing import NDArray

GRID_TOLERANCE = 0.01  # mm at the corners: header rounding stays below, a shifted grid does not
SAME_SPACING = 1e-4  # relative: below it two spacings are one, and voxels are copied instead of interpolated


def spacing(affine: NDArray) -> NDArray[np.float64]:
    """Voxel size [3] in mm of a 4x4 affine, in the order of its voxel axes."""
    return np.linalg.norm(np.asarray(affine, np.float64)[:3, :3], axis=0)


def slice_axis(shape: Sequence[int], affine: NDArray) -> int:
    """The axis along which a stack was sliced: clearly the coarsest one, else the shortest, else the last."""
    size = spacing(affine)
    if size.max() > 1.2 * np.median(size):
        return int(size.argmax())
    return max(range(3), key=lambda axis: (-shape[axis], axis))


@dataclass(frozen=True)
class Orientation:
    """A permutation of the voxel axes, then flips: lossless, and so is the way back.

    order[a] is the file's axis that becomes axis a; flip[a] says whether axis a is then reversed.
    """

    order: tuple[int, int, int]
    flip: tuple[bool, bool, bool]

    @classmethod
    def to_ras(cls, affine: NDArray) -> Orientation:
        """Axes nearest to left->right, posterior->anterior, inferior->superior."""
        world, sign = io_orientation(affine).T
        order = np.argsort(world)
        return cls(_triple(order, int), _triple(sign[order] < 0, bool))

    @classmethod
    def slices_last(cls, affine: NDArray, axis: int) -> Orientation:
        """Slice axis last and never reversed; the two axes of the plane in RAS order and direction."""
        world, sign = io_orientation(affine).T
        order = [int(a) for a in np.argsort(world) if a != axis] + [axis]
        return cls(_triple(order, int), (bool(sign[order[0]] < 0), bool(sign[order[1]] < 0), False))

    def apply(self, array: NDArray) -> NDArray:
        """[X, Y, Z] in the file's voxel order -> the same voxels in the new order (a view)."""
        return array.transpose(self.order)[self._steps]

    def invert(self, array: NDArray) -> NDArray:
        """The way back (a view)."""
        return array[self._steps].transpose(np.argsort(self.order))

    @property
    def _steps(self) -> tuple[slice, ...]:
        return tuple(slice(None, None, -1 if flip else None) for flip in self.flip)

    def affine(self, affine: NDArray, shape: Sequence[int]) -> NDArray[np.float64]:
        """The affine of apply(array), where shape is the array's shape in the file's order."""
        ornt = np.empty((3, 2))
        for axis, (source, flip) in enumerate(zip(self.order, self.flip, strict=True)):
            ornt[source] = axis, -1 if flip else 1
        return np.asarray(affine, np.float64) @ inv_ornt_aff(ornt, shape)


def resample_matrix(
    n_in: int, spacing_in: float, n_out: int, spacing_out: float, shift: float = 0.0
) -> NDArray[np.float64]:
    """The matrix [n_out, n_in] that resamples one axis; spacings and shift in one unit, for example mm.

    The output's centre lies at the input's centre plus shift. Coarser output: each voxel is the mean over its
    extent (overlap weights). Finer or equal: linear interpolation between voxel centres, the outermost half
    voxel held. Voxel extents outside the input count as 0, so rows sum to 1 inside and to 0 outside. A pure
    copy where grids coincide.
    """
    step = spacing_out / spacing_in  # everything below in input voxels
    if abs(step - 1) < SAME_SPACING:
        step = 1.0
    start = n_in / 2 - step * n_out / 2 + shift / spacing_in
    if step > 1:
        edge = start + step * np.arange(n_out + 1)
        left = np.arange(n_in)
        overlap = np.minimum(edge[1:, None], left + 1) - np.maximum(edge[:-1, None], left)
        return np.clip(overlap, 0, None) / step
    matrix = np.zeros((n_out, n_in))
    centre = start + step * (np.arange(n_out) + 0.5) - 0.5
    rows = np.flatnonzero((centre > -0.5 - 1e-9) & (centre < n_in - 0.5 + 1e-9))
    centre = centre[rows].clip(0, n_in - 1)
    left = np.minimum(np.floor(centre).astype(int), max(n_in - 2, 0))
    matrix[rows, left] = 1 - (centre - left)
    matrix[rows, np.minimum(left + 1, n_in - 1)] += centre - left
    return matrix


def nearest_matrices(
    n_in: int, spacing_in: float, n_out: int, spacing_out: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Matrices [n_out, n_in] and [n_in, n_out] of the way to the nearest slice and back, both about one centre.

    There each slice is a copy of the nearest one, or 0 outside; back, one is the mean of its copies, or the nearest
    where it has none. So nothing is lost where n_in <= n_out over one extent, and no two slices are mixed.
    """
    step = spacing_out / spacing_in
    source = np.floor((np.arange(n_out) + 0.5 - n_out / 2) * step + n_in / 2 + 1e-9).astype(int)
    inward = (source[:, None] == np.arange(n_in)).astype(float)
    target = np.floor((np.arange(n_in) + 0.5 - n_in / 2) / step + n_out / 2 + 1e-9).astype(int)
    nearest = (target[:, None] == np.arange(n_out)).astype(float)
    copies = inward.sum(0)[:, None]
    return inward, np.where(copies > 0, inward.T / np.maximum(copies, 1), nearest)


def fill_slices(data: NDArray, missing: Sequence[int], axis: int) -> NDArray[np.float32]:
    """A copy of a stack, its missing slices interpolated between their neighbours; the nearest at an end."""
    filled = np.array(data, np.float32)
    present = np.setdiff1d(np.arange(data.shape[axis]), missing)
    view = np.moveaxis(filled, axis, 0)
    for index in missing:
        after = int(np.searchsorted(present, index))
        low, high = present[max(after - 1, 0)], present[min(after, len(present) - 1)]
        weight = np.float32((index - low) / (high - low)) if low < high else np.float32(0)
        view[index] = (1 - weight) * view[low] + weight * view[high]
    return filled


@dataclass(frozen=True)
class Frame:
    """One volume's way to the model's grid and back: an orientation and one matrix per axis for each way."""

    orientation: Orientation
    inward: tuple[NDArray[np.float32], ...]
    outward: tuple[NDArray[np.float32], ...]
    field_of_view: tuple[float, ...]

    @classmethod
    def of(
        cls,
        shape: Sequence[int],
        affine: NDArray,
        orientation: Orientation,
        grid: Sequence[int],
        field_of_view: Sequence[float | None],
        *,
        slices: bool = False,
    ) -> Frame:
        """shape and affine are the file's; grid is the model's (X, Y, Z), field_of_view its extent in mm. slices: the
        last axis is of slices, which are copied (`nearest_matrices`) and not resampled."""
        inward, outward, extents = [], [], []
        size = spacing(affine)
        for source, n_out, extent in zip(orientation.order, grid, field_of_view, strict=True):
            n_in, s_in = shape[source], float(size[source])
            extent = n_in * s_in if extent is None else float(extent)
            s_out = extent / n_out
            # Equal voxels, counts of different parity: half a voxel aside, so that voxels are copied.
            shift = s_in / 2 if abs(s_out / s_in - 1) < SAME_SPACING and (n_in - n_out) % 2 else 0.0
            inward.append(resample_matrix(n_in, s_in, n_out, s_out, shift).astype(np.float32))
            outward.append(resample_matrix(n_out, s_out, n_in, s_in, -shift).astype(np.float32))
            extents.append(extent)
        if slices:
            into, back = nearest_matrices(n_in, s_in, n_out, s_out)
            inward[2], outward[2] = into.astype(np.float32), back.astype(np.float32)
        return cls(orientation, tuple(inward), tuple(outward), tuple(extents))

    def to_model(self, array: NDArray[np.float32]) -> NDArray[np.float32]:
        """The file's voxel order and grid -> the model's."""
        return _apply(self.inward, self.orientation.apply(array))

    def to_file(self, array: NDArray[np.float32]) -> NDArray[np.float32]:
        """The model's grid -> the file's voxel order and grid; 0 outside the field of view."""
        return self.orientation.invert(_apply(self.outward, array))

    def to_plane(self, array: NDArray[np.float32]) -> NDArray[np.float32]:
        """A stack in the file's voxel order -> the model's plane, slices last, as many as the file has."""
        return _apply(self.inward[:2], self.orientation.apply(array))

    def from_plane(self, array: NDArray[np.float32]) -> NDArray[np.float32]:
        """The way back; 0 outside the field of view."""
        return self.orientation.invert(_apply(self.outward[:2], array))

    def coverage(self) -> NDArray[np.float32]:
        """[X, Y, Z] in the file's order: which share of each voxel lies inside the field of view."""
        x, y, z = (matrix.sum(axis=1) for matrix in self.outward)
        return self.orientation.invert(x[:, None, None] * y[None, :, None] * z[None, None, :])


def _apply(matrices: Sequence[NDArray[np.float32]], array: NDArray[np.float32]) -> NDArray[np.float32]:
    for axis, matrix in enumerate(matrices):
        array = np.moveaxis(np.tensordot(matrix, array, (1, axis)), 0, axis)
    return np.ascontiguousarray(array)


def _triple(values: Any, kind: type) -> tuple[Any, Any, Any]:
    a, b, c = (kind(value) for value in values)
    return a, b, c
