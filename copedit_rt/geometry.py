"""From a study's own grids to the model's grid, and back.

Steps of the way in, for each volume: reorient (brain: to RAS; cardiac: slices last, in the file's own slice
order, the plane towards RAS) -> percentiles to 0..1 -> crop or pad to the field of view about the volume's
centre -> resize to the model's grid. The last two are one small matrix per axis, and so is the way back.
NumPy, SciPy and nibabel only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from nibabel.orientations import inv_ornt_aff, io_orientation
from scipy import ndimage

from copedit_rt.errors import CopeditError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from copedit_rt.config import ModelConfig
    from copedit_rt.study import Study, Volume

GRID_TOLERANCE = 0.01  # mm at the corners: header rounding stays below, a shifted grid does not
SAME_SPACING = 1e-4  # relative: below it two spacings are one, and voxels are copied instead of interpolated


# ---- grids -------------------------------------------------------------------------------------------------


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


def same_grid(a: Volume, b: Volume) -> bool:
    """Whether two volumes sample the same points of the world, in whatever voxel order each is stored."""
    one, two = Orientation.to_ras(a.affine), Orientation.to_ras(b.affine)
    if one.apply(a.data).shape != two.apply(b.data).shape:
        return False
    ends = np.array([[i, j, k] for i in (0, 1) for j in (0, 1) for k in (0, 1)])
    corners = []
    for volume, orientation in ((a, one), (b, two)):
        affine = orientation.affine(volume.affine, volume.data.shape)
        voxels = ends * (np.array(orientation.apply(volume.data).shape) - 1)
        corners.append(voxels @ affine[:3, :3].T + affine[:3, 3])
    return bool(np.abs(corners[0] - corners[1]).max() <= GRID_TOLERANCE)


def resample_onto(volume: Volume, reference: Volume) -> NDArray[np.float32]:
    """Linear interpolation of a volume at the reference's voxels; 0 where the volume does not reach."""
    matrix = np.linalg.inv(volume.affine) @ reference.affine
    return ndimage.affine_transform(
        volume.data, matrix[:3, :3], matrix[:3, 3], reference.data.shape, np.float32, order=1, cval=0.0
    )


# ---- resampling --------------------------------------------------------------------------------------------


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


# ---- a study on the model's grid ---------------------------------------------------------------------------


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
    ) -> Frame:
        """shape and affine are the file's; grid is the model's (X, Y, Z), field_of_view its extent in mm."""
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
        return cls(orientation, tuple(inward), tuple(outward), tuple(extents))

    def to_model(self, array: NDArray[np.float32]) -> NDArray[np.float32]:
        """The file's voxel order and grid -> the model's."""
        return _apply(self.inward, self.orientation.apply(array))

    def to_file(self, array: NDArray[np.float32]) -> NDArray[np.float32]:
        """The model's grid -> the file's voxel order and grid; 0 outside the field of view."""
        return self.orientation.invert(_apply(self.outward, array))

    def coverage(self) -> NDArray[np.float32]:
        """[X, Y, Z] in the file's order: which share of each voxel lies inside the field of view."""
        x, y, z = (matrix.sum(axis=1) for matrix in self.outward)
        return self.orientation.invert(x[:, None, None] * y[None, :, None] * z[None, None, :])


@dataclass(frozen=True)
class Prepared:
    """A study on the model's grid, and the way back.

    images [m, 1, H, W, D] float32 in 0..1, zero for missing elements; observed [m] bool. Axes are RAS: H
    left->right, W posterior->anterior, D inferior->superior (cardiac: the slices, in the file's order).
    """

    images: NDArray[np.float32]
    observed: NDArray[np.bool_]
    elements: tuple[str, ...]
    task: str
    frame: Frame  # the reference volume's: the outputs' grid
    intensity: dict[str, tuple[float, float]]  # per observed volume, what 0 and 1 stand for
    fill: NDArray[np.float32] | float  # outside the field of view; the file's grid or one value
    background: NDArray[np.bool_] | None  # brain: where no observed volume shows anything, file order
    study: Study
    missing_slices: tuple[int, ...] = ()
    version: int = 1

    @property
    def missing(self) -> tuple[str, ...]:
        """Names of the elements that are to be synthesised."""
        return tuple(name for name, there in zip(self.elements, self.observed, strict=True) if not there)

    def restore(self, element_images: NDArray) -> dict[str, NDArray[np.float32]]:
        """Images of all elements [m, 1, H, W, D] on the model's grid -> volumes on the reference file's grid.

        Brain: {missing modality: float32 [X, Y, Z]}, 0..1 mapped to the reference's percentile range.
        Cardiac: {"sax": the stack}, its missing slices filled and every other voxel as it was. Observed
        elements are not used for brain; for cardiac they count only in so far as a missing slice lies partly
        in an observed slab.
        """
        if element_images.shape != self.images.shape:
            raise ValueError(f"element_images has shape {element_images.shape}, expected {self.images.shape}")
        if not np.isfinite(element_images).all():
            raise CopeditError(f"{self.study.name}: the model returned NaN or infinity; nothing is written")
        images = np.clip(np.asarray(element_images, np.float32), 0, 1)
        reference = next(iter(self.study.volumes))
        low, high = (np.float32(value) for value in self.intensity[reference])
        coverage = self.frame.coverage()

        def to_file(image: NDArray[np.float32]) -> NDArray[np.float32]:
            inside = self.frame.to_file(image) * (high - low) + coverage * low
            return inside + (1 - coverage) * self.fill

        if self.task == "cardiac":
            stack = self.study.volumes[reference].data.copy()
            where: list[Any] = [slice(None)] * 3
            where[self.frame.orientation.order[2]] = list(self.missing_slices)
            if self.missing_slices:
                stack[tuple(where)] = to_file(np.concatenate(list(images[:, 0]), axis=-1))[tuple(where)]
            return {reference: stack}
        volumes = {}
        for name, image, there in zip(self.elements, images[:, 0], self.observed, strict=True):
            if not there:
                volumes[name] = np.ascontiguousarray(to_file(image))
                volumes[name][self.background] = self.fill
        return volumes

    def record(self) -> dict[str, Any]:
        """Everything that was done to the reference volume, as JSON can hold it."""
        reference = next(iter(self.study.volumes.values()))
        m, _, *grid = self.images.shape
        if self.task == "cardiac":
            grid[2] *= m
        extent = self.frame.field_of_view
        return {
            "version": self.version,
            "grid": list(reference.data.shape),
            "affine": np.asarray(reference.affine, float).tolist(),
            "order": list(self.frame.orientation.order),
            "flip": list(self.frame.orientation.flip),
            "field_of_view_mm": [round(e, 4) for e in extent],
            "model_grid": grid,
            "model_voxel_mm": [round(e / n, 4) for e, n in zip(extent, grid, strict=True)],
            "intensity": {name: {"low": low, "high": high} for name, (low, high) in self.intensity.items()},
            "observed": {name: bool(o) for name, o in zip(self.elements, self.observed, strict=True)},
            "missing_slices": list(self.missing_slices),
        }


def prepare(study: Study, config: ModelConfig, *, allow_complete: bool = False) -> Prepared:
    """A study's volumes on the model's grid, normalised to 0..1.

    allow_complete: accept a study in which nothing is missing (to look at it, or to train on it).
    Raises CopeditError for a study that is not the model's task, an element that the model does not know,
    nothing missing, nothing observed, and a volume without contrast.
    """
    if study.task != config.task:
        raise CopeditError(
            f"{study.name} is a {study.task} study but the model {config.name} is for {config.task} MRI; "
            f"choose a {study.task} model with --model"
        )
    if not study.volumes:
        raise CopeditError(f"{study.name}: every element is missing; at least one observed image is needed")
    return (_prepare_cardiac if config.task == "cardiac" else _prepare_brain)(study, config, allow_complete)


def _prepare_brain(study: Study, config: ModelConfig, allow_complete: bool) -> Prepared:
    observed = {name: volume for name, volume in study.volumes.items() if name not in study.synthetic}
    unknown = [name for name in observed if name not in config.elements]
    if unknown:
        raise CopeditError(
            f"{study.name}: the model {config.name} does not know {', '.join(unknown)}, only "
            f"{', '.join(config.elements)}; leave that file out or choose another model with --model"
        )
    if not allow_complete and len(observed) == len(config.elements):
        raise CopeditError(
            f"{study.name}: no element is missing: {', '.join(config.elements)} are all there; "
            f"leave one out to have it synthesised"
        )
    for name, volume in observed.items():
        if not same_grid(volume, study.reference):
            raise CopeditError(f"{study.name}: {name} is on a grid of its own; resample it to the first")
    images = np.zeros((len(config.elements), 1, *config.image), np.float32)
    intensity, frames, fills = {}, [], []
    background: NDArray[np.bool_] | None = None
    for name, volume in observed.items():
        low, high = _percentiles(volume.data, config.preprocessing.percentiles, f"{study.name}: {name}")
        normal, empty, fill = to_unit_range(volume.data, low, high)
        orientation = Orientation.to_ras(volume.affine)
        frame = Frame.of(
            volume.data.shape, volume.affine, orientation, config.image, config.preprocessing.field_of_view
        )
        images[config.elements.index(name), 0] = frame.to_model(normal)
        intensity[name] = (low, high)
        frames.append(frame)
        fills.append(fill)
        empty = frames[0].orientation.invert(orientation.apply(empty))
        background = empty if background is None else background & empty
    return Prepared(
        images=images,
        observed=np.array([name in observed for name in config.elements]),
        elements=tuple(config.elements),
        task="brain",
        frame=frames[0],
        intensity=intensity,
        fill=fills[0],
        background=background,
        study=study,
        version=config.preprocessing.version,
    )


def _prepare_cardiac(study: Study, config: ModelConfig, allow_complete: bool) -> Prepared:
    (name, volume), m = next(iter(study.volumes.items())), len(config.elements)
    axis = slice_axis(volume.data.shape, volume.affine)
    count = volume.data.shape[axis]
    missing = tuple(sorted(set(study.missing_slices)))
    if not missing and not allow_complete:
        raise CopeditError(
            f"{study.name}: no element is missing: all {count} slices hold an image; "
            f"name the slices to be synthesised with --missing-slices"
        )
    if len(missing) >= count:
        raise CopeditError(f"{study.name}: every slice is missing; at least one slab of slices is needed")
    present = [index for index in range(count) if index not in missing]
    shown = np.take(volume.data, present, axis)
    low, high = _percentiles(shown, config.preprocessing.percentiles, study.name)
    filled = fill_slices(volume.data, missing, axis)
    height, width, depth = config.image
    frame = Frame.of(
        volume.data.shape,
        volume.affine,
        Orientation.slices_last(volume.affine, axis),
        (height, width, m * depth),
        config.preprocessing.field_of_view,
    )
    stack = frame.to_model(_normalise(filled, low, high))
    images = np.stack(np.split(stack, m, axis=-1))[:, None]
    spaced = spacing(volume.affine)[axis]
    observed = ~slabs_touched(missing, count, spaced, frame.field_of_view[2], m, depth)
    if not observed.any():
        raise CopeditError(
            f"{study.name}: each of the {m} slabs of slices holds a missing slice (missing: "
            f"{', '.join(map(str, missing))} of 0..{count - 1}), so no slab is observed; "
            f"at least one must be complete"
        )
    images[~observed] = 0
    return Prepared(
        images=images,
        observed=observed,
        elements=tuple(config.elements),
        task="cardiac",
        frame=frame,
        intensity={name: (low, high)},
        fill=filled,
        background=None,
        study=study,
        missing_slices=missing,
        version=config.preprocessing.version,
    )


def to_unit_range(data: NDArray[np.float32], low: float, high: float) -> tuple[NDArray[np.float32], NDArray, float]:
    """A skull-stripped image with low..high as 0..1, clipped; where it shows nothing (bool); and the value there.

    Below 0 there is only interpolation ringing, unless the image was standardised (z-scores): then its background is
    the value of its corners, and it has to be told from tissue of the same grey.
    """
    standardised = low < -0.01 * high
    fill = float(np.median(data[np.ix_((0, -1), (0, -1), (0, -1))])) if standardised else 0.0
    empty = data == fill if standardised else data <= 0
    normal = _normalise(data, low, high)
    normal[empty] = 0
    return normal, empty, fill


def slabs_touched(
    missing: Sequence[int], count: int, size: float, extent: float, m: int, depth: int
) -> NDArray[np.bool_]:
    """Which of m slabs of `depth` slices over `extent` mm lack something [m], in a stack of `count` slices of `size` mm
    without the missing ones: slabs with a slice that comes from a missing one, and those that a missing one lies in.
    """
    total = m * depth
    source = ((np.arange(total) + 0.5 - total / 2) * (extent / total) / size + count / 2) // 1
    target = ((np.array(missing) + 0.5 - count / 2) * size / (extent / total) + total / 2) // 1
    absent = np.isin(source, missing) | np.isin(np.arange(total), target)
    return np.any(absent.reshape(m, depth), axis=1)


def _percentiles(data: NDArray, percentiles: tuple[float, float], what: str) -> tuple[float, float]:
    low, high = (float(value) for value in np.percentile(data, percentiles))
    if not high > low:
        raise CopeditError(
            f"{what}: at least {percentiles[1] - percentiles[0]:g} % of the voxels have one value ({low:g}), "
            f"so there is no image to work from; crop the empty surroundings or choose another file"
        )
    return low, high


def _normalise(data: NDArray[np.float32], low: float, high: float) -> NDArray[np.float32]:
    scaled = (data - np.float32(low)) * np.float32(1 / (high - low))
    return np.clip(scaled, 0, 1, out=scaled)


def _apply(matrices: Sequence[NDArray[np.float32]], array: NDArray[np.float32]) -> NDArray[np.float32]:
    for axis, matrix in enumerate(matrices):
        array = np.moveaxis(np.tensordot(matrix, array, (1, axis)), 0, axis)
    return np.ascontiguousarray(array)


def _triple(values: Any, kind: type) -> tuple[Any, Any, Any]:
    a, b, c = (kind(value) for value in values)
    return a, b, c
