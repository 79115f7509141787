"""Arithmetic of voxel grids: axes, orientations, and one small matrix an axis that resamples it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

GRID_TOLERANCE = 0.01  # mm at the corners: header rounding stays below, a shifted grid does not
# Voxels that are computed with at a time, in and out. Studies of 1 mm go in as one, as products of other sizes round
# otherwise; on the way out there are several images already.
SLAB_IN, SLAB_OUT = 10_000_000, 500_000
SAME_SPACING = 1e-4  # relative: below it two spacings are one, and voxels are copied instead of interpolated


def spacing(affine: NDArray) -> NDArray[np.float64]:
    """Voxel size [3] in mm of a 4x4 affine, in the order of its voxel axes."""
    return np.linalg.norm(np.asarray(affine, np.float64)[:3, :3], axis=0)


def apart(a: NDArray, b: NDArray, shape: Sequence[int]) -> float:
    """The largest distance in mm between the places that two affines give a corner of a grid of this shape."""
    corners = np.array([[i, j, k, 1] for i in (0, 1) for j in (0, 1) for k in (0, 1)], np.float64)
    corners[:, :3] *= np.array(shape) - 1
    return float(np.linalg.norm((corners @ (a - b).T)[:, :3], axis=1).max())


def slice_axis(shape: Sequence[int], affine: NDArray) -> int:
    """The axis along which a stack was sliced: clearly the coarsest one, else the shortest, else the last."""
    size = spacing(affine)
    if size.max() > 1.2 * np.median(size):
        return int(size.argmax())
    return max(range(3), key=lambda axis: (-shape[axis], axis))


@dataclass(frozen=True)
class Orientation:
    """A permutation of the voxel axes, then flips: lossless, and so is the way back.

    order[a] is the file's axis that becomes axis a; flip[a] says whether axis a is then reversed. The arithmetic is
    `nibabel.orientations`', which is imported where an orientation is computed: networks need no files.
    """

    order: tuple[int, int, int]
    flip: tuple[bool, bool, bool]

    @classmethod
    def to_ras(cls, affine: NDArray) -> Orientation:
        """Axes nearest to left->right, posterior->anterior, inferior->superior."""
        from nibabel.orientations import io_orientation

        return cls._of(io_orientation(affine))

    @classmethod
    def slices_last(cls, affine: NDArray, axis: int) -> Orientation:
        """Slice axis last and never reversed; the two axes of the plane in RAS order and direction."""
        from nibabel.orientations import io_orientation

        ornt = io_orientation(affine)
        ornt[axis] = 3, 1  # after the other two
        ornt[:, 0] = ornt[:, 0].argsort().argsort()
        return cls._of(ornt)

    @classmethod
    def _of(cls, ornt: NDArray) -> Orientation:
        order = ornt[:, 0].argsort()
        (a, b, c), (x, y, z) = order.tolist(), (ornt[order, 1] < 0).tolist()
        return cls((a, b, c), (x, y, z))

    @property
    def _ornt(self) -> NDArray:
        return np.array(sorted((source, a, -1 if self.flip[a] else 1) for a, source in enumerate(self.order)))[:, 1:]

    def apply(self, array: NDArray) -> NDArray:
        """[X, Y, Z] in the file's voxel order -> the same voxels in the new order (a view)."""
        from nibabel.orientations import apply_orientation

        return apply_orientation(array, self._ornt)

    def invert(self, array: NDArray) -> NDArray:
        """The way back (a view)."""
        from nibabel.orientations import apply_orientation

        return apply_orientation(array, np.array([self.order, [-1 if flip else 1 for flip in self.flip]]).T)

    def affine(self, affine: NDArray, shape: Sequence[int]) -> NDArray[np.float64]:
        """The affine of apply(array), where shape is the array's shape in the file's order."""
        from nibabel.orientations import inv_ornt_aff

        return np.asarray(affine, np.float64) @ inv_ornt_aff(self._ornt, shape)


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


def from_border(region: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The voxels of a region [X, Y, Z] that are connected to the grid's border through faces, within the region.

    Swept to and fro along the axes, a plane at a time, until nothing is added; 64 voxels of a row are one word, which
    makes it ten times as fast.
    """
    if region.flags.f_contiguous:  # rows lie along the first axis
        return _from_border(region.T).T
    return _from_border(region)


def surroundings(empty: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """What lies around a head: of the voxels that show nothing [X, Y, Z], those that the border leads to.

    A way one or two voxels wide is followed for three voxels only. Fluid that is 0 in the one observed image is joined
    to the border by such ways, and what is synthesised there would be cut out: holes deep in the brain of a patient.
    """
    if empty.flags.f_contiguous and not empty.flags.c_contiguous:
        return surroundings(empty.T).T
    wide = empty.copy()
    for here, there in _neighbours(wide.ndim):
        wide[here] &= empty[there]
    around = from_border(wide)
    for end, axis in itertools.product((0, -1), range(empty.ndim)):  # a frame one voxel wide counts as well
        np.moveaxis(around, axis, 0)[end] |= np.moveaxis(empty, axis, 0)[end]
    for _ in range(3):
        grown = around.copy()
        for here, there in _neighbours(grown.ndim):
            grown[here] |= around[there]
        around = grown & empty
    return around


def closing(region: NDArray[np.bool_], reach: Sequence[int]) -> NDArray[np.bool_]:
    """The morphological closing of a region [X, Y, Z] by a box that reaches so many voxels to either side along each
    axis. Nothing beyond the grid belongs to the region."""
    if region.flags.f_contiguous and not region.flags.c_contiguous:
        return closing(region.T, reach[::-1]).T
    out = np.zeros_like(region)
    where = [np.flatnonzero(region.any(tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    if not all(map(len, where)):
        return out
    box = tuple(slice(index[0], index[-1] + 1) for index in where)
    grown = np.pad(region[box], [(n, n) for n in reach])
    _spread(grown, reach)
    np.logical_not(grown, out=grown)
    _spread(grown, reach)  # what the complement does not reach: an erosion
    out[box] = ~grown[tuple(slice(n, grown.shape[axis] - n) for axis, n in enumerate(reach))]
    return out


def _spread(region: NDArray[np.bool_], reach: Sequence[int]) -> None:
    """Dilate, in place, by so many voxels to either side along each axis, in steps that double."""
    for axis, count in enumerate(reach):
        for planes in (np.moveaxis(region, axis, 0), np.moveaxis(region, axis, 0)[::-1]):
            done = 0
            while done < count:
                step = min(done + 1, count - done)
                planes[step:] |= planes[:-step].copy()
                done += step


def _neighbours(dimensions: int) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """For each of the faces: the voxels that have a neighbour there, and these neighbours."""
    for axis in range(dimensions):
        low, high = ((slice(None),) * axis + (part,) for part in (slice(None, -1), slice(1, None)))
        yield low, high
        yield high, low


def _from_border(region: NDArray[np.bool_]) -> NDArray[np.bool_]:
    start = region.copy()
    start[1:-1, 1:-1, 1:-1] = False
    reached, open_ = _words(start), _words(region)
    before = np.zeros_like(reached)
    while not np.array_equal(before, reached):
        before[:] = reached
        for axis in (0, 1):
            planes, free = np.moveaxis(reached, axis, 0), np.moveaxis(open_, axis, 0)
            for i in range(1, len(planes)):
                planes[i] |= planes[i - 1] & free[i]
            for i in range(len(planes) - 2, -1, -1):
                planes[i] |= planes[i + 1] & free[i]
        _sweep_rows(reached, open_, np.left_shift)
        _sweep_rows(reached[..., ::-1], open_[..., ::-1], np.right_shift)
    bits = np.unpackbits(reached.view(np.uint8), axis=2, count=region.shape[2], bitorder="little")
    return bits.view(np.bool_)


def _words(mask: NDArray[np.bool_]) -> NDArray[np.uint64]:
    """Rows [X, Y, Z] as words of 64 voxels [X, Y, ceil(Z / 64)], the first voxel in the lowest bit."""
    packed = np.packbits(mask, axis=2, bitorder="little")
    return np.pad(packed, ((0, 0), (0, 0), (0, -packed.shape[2] % 8))).view(np.dtype("<u8"))


def _sweep_rows(reached: NDArray[np.uint64], region: NDArray[np.uint64], shift: np.ufunc) -> None:
    """Spread, in place, what is reached along the rows in the direction of a shift, in steps that double (Kogge and
    Stone), then from the last voxel of a word to the first of the next."""
    back = np.right_shift if shift is np.left_shift else np.left_shift
    for i in range(reached.shape[2]):
        word, free = reached[..., i], region[..., i].copy()
        if i:
            word |= back(reached[..., i - 1], np.uint64(63)) & free
        for step in (1, 2, 4, 8, 16, 32):
            word |= shift(word, np.uint64(step)) & free
            free &= shift(free, np.uint64(step))


@dataclass(frozen=True)
class Frame:
    """One volume's way to the model's grid and back: an orientation and one matrix per axis for each way.

    shift: by how many mm the centre of the view is off the grid's centre, along each of the model's axes.
    """

    orientation: Orientation
    inward: tuple[NDArray[np.float32], ...]
    outward: tuple[NDArray[np.float32], ...]
    field_of_view: tuple[float, ...]
    shift: tuple[float, ...] = (0.0, 0.0, 0.0)

    @classmethod
    def of(
        cls,
        shape: Sequence[int],
        affine: NDArray,
        orientation: Orientation,
        grid: Sequence[int],
        field_of_view: Sequence[float | None],
        offset: Sequence[float] = (0.0, 0.0, 0.0),
        slices: bool = False,
    ) -> Frame:
        """shape and affine are the file's; grid is the model's (X, Y, Z), field_of_view its extent in mm.

        offset: of the view's centre from the grid's, in the file's voxels, along the model's axes. slices: the last
        axis is of slices, which are copied (`nearest_matrices`) and not resampled.
        """
        inward, outward, extents, shifts = [], [], [], []
        size = spacing(affine)
        for source, n_out, extent, off in zip(orientation.order, grid, field_of_view, offset, strict=True):
            n_in, s_in = shape[source], float(size[source])
            extent = n_in * s_in if extent is None else float(extent)
            s_out = extent / n_out
            if abs(s_out / s_in - 1) < SAME_SPACING:  # equal voxels are copied: by whole voxels
                off = np.ceil((n_in - n_out) / 2 + off) - (n_in - n_out) / 2
            shift = float(off) * s_in
            inward.append(resample_matrix(n_in, s_in, n_out, s_out, shift).astype(np.float32))
            outward.append(resample_matrix(n_out, s_out, n_in, s_in, -shift).astype(np.float32))
            extents.append(extent)
            shifts.append(shift)
        if slices:
            into, back = nearest_matrices(n_in, s_in, n_out, s_out)
            inward[2], outward[2] = into.astype(np.float32), back.astype(np.float32)
        return cls(orientation, tuple(inward), tuple(outward), tuple(extents), tuple(shifts))

    def to_model(
        self, array: NDArray[np.float32], unit: Callable[[NDArray], NDArray[np.float32]] | None = None
    ) -> NDArray[np.float32]:
        """The file's voxel order and grid -> the model's; unit: done to each slab of voxels before."""
        x, y, z = self.inward
        turned = self.orientation.apply(array)
        coarse = np.empty((len(x), len(y), turned.shape[2]), np.float32)
        for part in slabs(turned.shape, SLAB_IN):
            slab = turned[..., part] if unit is None else unit(turned[..., part])
            coarse[..., part] = _along(y, _along(x, slab, 0), 1)
        return np.ascontiguousarray(_along(z, coarse, 2))

    def to_plane(self, array: NDArray[np.float32]) -> NDArray[np.float32]:
        """The model's grid -> the file's in the two axes of the plane; `to_slab` does the third."""
        x, y, _ = self.outward
        return _along(y, _along(x, array, 0), 1)

    def to_slab(self, planes: NDArray[np.float32], part: slice) -> NDArray[np.float32]:
        """Slices `part` of the file's grid, in the model's orientation; 0 outside the field of view."""
        return _along(self.outward[2][part], planes, 2)

    def stack_to_model(self, array: NDArray[np.float32]) -> NDArray[np.float32]:
        """A stack in the file's voxel order -> the model's plane, slices last, as many as the file has."""
        x, y, _ = self.inward
        return np.ascontiguousarray(_along(y, _along(x, self.orientation.apply(array), 0), 1))

    def stack_to_file(self, array: NDArray[np.float32]) -> NDArray[np.float32]:
        """The way back; 0 outside the field of view."""
        return self.orientation.invert(self.to_plane(array))

    def coverage(self, part: slice = slice(None)) -> NDArray[np.float32]:
        """Which share of each voxel lies inside the field of view: slices `part`, in the model's orientation."""
        x, y, z = (matrix.sum(axis=1) for matrix in self.outward)
        return x[:, None, None] * y[None, :, None] * z[part]

    @property
    def cuts(self) -> bool:
        """Whether some of the grid lies outside the field of view."""
        return any(matrix.sum(axis=1).min() < 1 - 1e-6 for matrix in self.outward)


def slabs(shape: Sequence[int], voxels: int = SLAB_OUT) -> Iterator[slice]:
    """The last axis in parts of about so many voxels, so that what is computed takes little memory."""
    step = max(2, voxels // (shape[0] * shape[1]))
    return (slice(start, start + step) for start in range(0, shape[2], step))


def _along(matrix: NDArray[np.float32], array: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
    """The matrix [n, N] applied to an axis of N of an array [X, Y, Z]; a new array whose last axis is contiguous.

    `numpy.tensordot` would copy the whole array into another order first: twice the time of the products.
    """
    if axis == 2:
        return np.matmul(array, matrix.T)
    if axis == 1:
        return np.matmul(matrix, array)
    flat = np.ascontiguousarray(array).reshape(len(array), -1)
    return np.matmul(matrix, flat).reshape(-1, *array.shape[1:])
