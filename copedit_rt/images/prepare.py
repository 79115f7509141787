"""From a study's own grids to the model's grid, and back.

Steps of the way in, for each volume: reorient (brain: to RAS; cardiac: slices last, in the file's own slice
order, the plane towards RAS) -> percentiles to 0..1 -> crop or pad to the field of view (brain: about the head, where
the grid is larger than the view) -> resize to the model's grid. The last two are one small matrix per axis, and so is
the way back. Slices of a stack are copied to the nearest slices of the grid, never mixed. Voxels are computed with slab
by slab: beside the images, all of it takes at most `nifti.WORKING` bytes a voxel.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from copedit_rt.config import ModelConfig
from copedit_rt.errors import CopeditError, Fault
from copedit_rt.images.detail import Detail, lift_to_full_range
from copedit_rt.images.grids import (
    SAME_SPACING,
    Frame,
    Orientation,
    closing,
    fill_slices,
    nearest_matrices,
    slabs,
    slice_axis,
    spacing,
    surroundings,
)
from copedit_rt.images.intensity import NOTHING, TISSUE, Backdrop, normalise, percentile_range, unit_range
from copedit_rt.images.nifti import Volume, same_grid
from copedit_rt.images.study import Study
from copedit_rt.task import Task

ELSEWHERE = 0.15  # of what one image shows: where so much is empty in another, they do not show the same
THICK = 5.0  # mm from slice to slice of a stack
WHOLE_HEAD = 150.0  # mm: a view this high is meant for a whole head, and what does not fit into it is neck
CISTERN = 7.0  # mm: half the width of a gap in what is bright that is taken for fluid, not for what lies around a head


@dataclass(frozen=True)
class Prepared:
    """A study on the model's grid, and the way back.

    images [m, 1, H, W, D] float32 in 0..1, zero for missing elements; observed [m] bool. Axes are RAS: H
    left->right, W posterior->anterior, D inferior->superior (cardiac: the slices, in the file's order).
    """

    images: NDArray[np.float32]
    observed: NDArray[np.bool_]
    elements: tuple[str, ...]
    task: Task
    frame: Frame  # the reference volume's: the outputs' grid
    intensity: dict[str, tuple[float, float]]  # per observed volume, what 0 and 1 stand for
    fill: NDArray[np.float32] | float  # outside the field of view; the file's grid or one value
    background: NDArray[np.bool_]  # at the border, where no observed volume shows anything, file order
    study: Study
    stack: NDArray[np.float32] | None = None  # cardiac: [H, W, slices of the file], 0..1; missing ones interpolated
    missing_slices: tuple[int, ...] = ()
    version: int = 1
    outside: int = 0  # brain: voxels of tissue that the model's field of view does not reach
    unlike_coverage: tuple[str, ...] = ()  # brain: sentences about volumes that show other parts of a head
    backdrops: Mapping[str, Backdrop] = field(default_factory=dict)  # brain: what shows nothing in each observed volume

    @property
    def missing(self) -> tuple[str, ...]:
        """Names of the elements that are to be synthesised."""
        return tuple(name for name, there in zip(self.elements, self.observed, strict=True) if not there)

    def restore(
        self,
        element_images: NDArray,
        detail: bool = False,
        whole_range: bool = False,
        stack: NDArray[np.float32] | None = None,
        bright: NDArray[np.float32] | None = None,
    ) -> dict[str, NDArray[np.float32]]:
        """Images of all elements [m, 1, H, W, D] on the model's grid -> volumes on the reference file's grid.

        Brain: {missing modality: float32 [X, Y, Z]}, 0..1 mapped to the reference's percentile range; observed
        elements are not used. detail: what the grid could not hold is carried over from the observed images
        (`detail.Detail`); whole_range: the brightest voxels are lifted to the top of the range
        (`detail.lift_to_full_range`), by the chances bright [m, 1, H, W, D] if they are given.
        Cardiac: {"sax": the stack}, its missing slices filled and every other voxel as it was. stack [H, W, slices of
        the file]: a heart's own fill (None: `self.stack`). What it holds and the model's grid cannot, as that has fewer
        slices, is kept.
        """
        if element_images.shape != self.images.shape:
            raise ValueError(f"element_images has shape {element_images.shape}, expected {self.images.shape}")
        if not np.isfinite(element_images).all():
            raise Fault(f"{self.study.name}: the model returned NaN or infinity; nothing is written")
        images = np.asarray(element_images, np.float32)
        if self.task.joint:
            return {next(iter(self.study.volumes)): self._filled(images, stack)}
        images = np.clip(images, 0, 1)
        volumes = {}
        chances: Any = [None] * len(images) if bright is None else bright[:, 0]
        for name, image, chance, there in zip(self.elements, images[:, 0], chances, self.observed, strict=True):
            if not there:
                volumes[name] = self._restore_image(image, detail, whole_range, chance)
        return volumes

    def _restore_image(
        self, image: NDArray[np.float32], detail: bool, whole_range: bool, bright: NDArray[np.float32] | None
    ) -> NDArray[np.float32]:
        """One modality on the file's grid, in the reference's intensities."""
        volume = self._rendered(image, detail, whole_range)
        volume[self.background] = 0
        if whole_range:
            lift_to_full_range(volume, None if bright is None else self._on_file(bright))
        low, high = (np.float32(value) for value in next(iter(self.intensity.values())))
        volume *= high - low
        volume += low
        volume[self.background] = self.fill
        return volume

    def _rendered(self, image: NDArray[np.float32], detail: bool, whole_range: bool) -> NDArray[np.float32]:
        """One modality on the file's grid, in 0..1."""
        guided = Detail(image, self.images[self.observed, 0], self.frame) if detail else None
        beyond = self._beyond(image)
        volume = np.empty(self.study.reference.data.shape, np.float32)
        turned = self.frame.orientation.apply(volume)
        planes = self.frame.to_plane(image)
        for part in slabs(turned.shape):
            slab = self.frame.to_slab(planes, part)
            if guided:
                slab += guided.slab(self._shown(part), part)
            slab += (1 - self.frame.coverage(part)) * beyond(part)
            # Above 0: an exact 0 would say that there is nothing.
            turned[..., part] = np.clip(slab, NOTHING, 1, out=slab) if detail or whole_range else slab
        return volume

    def _on_file(self, image: NDArray[np.float32]) -> NDArray[np.float32]:
        """An image [H, W, D] of the model's grid on the file's."""
        made = np.empty(self.study.reference.data.shape, np.float32)
        turned, planes = self.frame.orientation.apply(made), self.frame.to_plane(image)
        for part in slabs(turned.shape):
            turned[..., part] = self.frame.to_slab(planes, part)
        return made

    def _shown(self, part: slice) -> Iterator[NDArray[np.float32]]:
        """Slices `part` of the observed images in 0..1, in the model's orientation."""
        for name, there in zip(self.elements, self.observed, strict=True):
            if there:
                volume = self.study.volumes[name]
                turned = Orientation.to_ras(volume.affine).apply(volume.data)
                yield unit_range(*self.intensity[name], self.backdrops[name])(turned[..., part])

    def _beyond(self, image: NDArray[np.float32]) -> Callable[[slice], Any]:
        """What stands for an image where the model does not see, in 0..1: a linear relation to what is observed."""
        if not self.frame.cuts:
            return lambda part: np.float32(0)
        constant, *slopes = linear_relation(image, self.images[self.observed, 0])

        def beyond(part: slice) -> NDArray[np.float32]:
            made: Any = np.float32(constant)
            for shown, slope in zip(self._shown(part), slopes, strict=True):
                made = made + np.float32(slope) * shown
            return np.clip(made, NOTHING, 1)

        return beyond

    def elements_of(self, stack: NDArray[np.float32]) -> NDArray[np.float32]:
        """Slabs [m, 1, H, W, D] of a stack in the model's plane [H, W, slices of the file]."""
        return np.stack(np.split(stack @ self.frame.inward[2].T, len(self.elements), axis=-1))[:, None]

    def _filled(self, images: NDArray[np.float32], stack: NDArray[np.float32] | None) -> NDArray[np.float32]:
        """The stack of a file with its missing slices made of images [m, 1, H, W, D]."""
        kept = self.stack if stack is None else stack
        assert kept is not None
        inward, outward = (matrices[2] for matrices in (self.frame.inward, self.frame.outward))
        made = np.concatenate(list(images[:, 0]), axis=-1) @ outward.T
        beyond = ~inward.any(0)  # slices that the model's grid has no room for
        made[..., beyond] += (kept - kept @ inward.T @ outward.T)[..., beyond]
        volume = self._to_range(self.frame.stack_to_file(np.clip(made, 0, 1)) + self._lost())
        np.copyto(volume, self.fill, where=self.background)
        where: list[Any] = [slice(None)] * 3
        where[self.frame.orientation.order[2]] = list(self.missing_slices)
        result = self.study.reference.data.copy()
        result[tuple(where)] = volume[tuple(where)]
        return result

    @property
    def apart(self) -> float:
        """mm from slice to slice of a heart's stack."""
        return float(spacing(self.study.reference.affine)[self.frame.orientation.order[2]])

    def _lost(self) -> NDArray[np.float32] | float:
        """What the model's plane cannot hold of interpolated slices, in 0..1 on the file's grid; the nearer the next
        one is, the more of it."""
        assert isinstance(self.fill, np.ndarray) and self.stack is not None
        axis, (low, high) = self.frame.orientation.order[2], next(iter(self.intensity.values()))
        count = self.fill.shape[axis]
        kept = [index for index in range(count) if index not in self.missing_slices]
        share = np.zeros(count, np.float32)
        for index in self.missing_slices:
            share[index] = 1 - remoteness(kept, index, self.apart)
        if not share.any():
            return 0.0
        lost = normalise(self.fill.copy(), low, high)
        lost *= self.frame.orientation.invert(self.frame.coverage())
        lost -= self.frame.stack_to_file(self.stack)
        return lost * np.expand_dims(share, [other for other in range(3) if other != axis])

    def _to_range(self, image: NDArray[np.float32]) -> NDArray[np.float32]:
        """0..1 on the file's grid to the reference's intensities; `fill` outside the field of view."""
        low, high = (np.float32(value) for value in next(iter(self.intensity.values())))
        coverage = self.frame.orientation.invert(self.frame.coverage())
        return np.asarray(image * (high - low) + coverage * low + (1 - coverage) * self.fill, np.float32)

    @property
    def outside_ml(self) -> float:
        """Tissue that the model's field of view does not reach, in millilitres."""
        return self.outside * float(np.prod(spacing(self.study.reference.affine))) / 1000

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of the way in."""
        if not self.outside:
            return self.unlike_coverage
        extent = " x ".join(f"{e:g}" for e in self.frame.field_of_view)
        return (
            *self.unlike_coverage,
            f"{self.outside_ml:.3g} ml of tissue lie outside the model's field of view of {extent} mm; there, a linear "
            f"relation to the observed images stands for what is synthesised",
        )

    def record(self) -> dict[str, Any]:
        """Everything that was done to the reference volume, as JSON can hold it."""
        reference = next(iter(self.study.volumes.values()))
        m, _, *grid = self.images.shape
        if self.task.joint:
            grid[2] *= m
        extent = self.frame.field_of_view
        return {
            "version": self.version,
            "grid": list(reference.data.shape),
            "affine": np.asarray(reference.affine, float).tolist(),
            "order": list(self.frame.orientation.order),
            "flip": list(self.frame.orientation.flip),
            "field_of_view_mm": [round(e, 4) for e in extent],
            "view_shift_mm": [round(s, 4) for s in self.frame.shift],
            "outside_view": {"voxels": self.outside, "millilitres": round(self.outside_ml, 3)},
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
    return (_prepare_cardiac if config.task.joint else _prepare_brain)(study, config, allow_complete)


def complete_brain(name: str, config: ModelConfig) -> CopeditError:
    """What there is to say of a brain that has a file for every element."""
    there = ", ".join(config.elements)
    return CopeditError(f"{name}: no element is missing: {there} are all there; leave one out to have it synthesised")


def complete_stack(study: Study) -> CopeditError:
    """What there is to say of a heart that lacks no slice."""
    volume = study.reference
    count = volume.data.shape[slice_axis(volume.data.shape, volume.affine)]
    return CopeditError(
        f"{study.name}: no element is missing: all {count} slices hold an image; "
        f"name the slices to be synthesised with --missing-slices"
    )


def _prepare_brain(study: Study, config: ModelConfig, allow_complete: bool) -> Prepared:
    observed = {name: volume for name, volume in study.volumes.items() if name not in study.synthetic}
    unknown = [name for name in observed if name not in config.elements]
    if unknown:
        raise CopeditError(
            f"{study.name}: the model {config.name} does not know {', '.join(unknown)}, only "
            f"{', '.join(config.elements)}; leave that file out or choose another model with --model"
        )
    if not allow_complete and len(observed) == len(config.elements):
        raise complete_brain(study.name, config)
    for name, volume in observed.items():
        if not same_grid(volume, study.reference):
            raise CopeditError(f"{study.name}: {name} is on a grid of its own; resample it to the first")
    intensity, backdrops, masks = {}, {}, {}
    first = Orientation.to_ras(study.reference.affine)
    for name, volume in observed.items():
        low, high = percentile_range(volume.data, config.preprocessing.percentiles, f"{study.name}: {name}")
        intensity[name] = (low, high)
        backdrops[name] = Backdrop.of(volume.data, low, high)
        empty = backdrops[name].where(volume.data)
        bright = volume.data > np.float32(low + TISSUE * (high - low))
        bright &= ~empty
        way = Orientation.to_ras(volume.affine)
        masks[name] = tuple(first.invert(way.apply(mask)) for mask in (bright, empty))
    tissue = functools.reduce(np.logical_or, (bright for bright, _ in masks.values()))
    background = functools.reduce(np.logical_and, (empty for _, empty in masks.values()))
    voxel = spacing(study.reference.affine)
    around = surroundings(background)
    if around.any():  # nothing is around a head in noise
        around &= ~closing(tissue, [round(CISTERN / mm) for mm in voxel])
    turned = first.apply(tissue)
    view = config.preprocessing.field_of_view
    offset = _head_centre(turned, voxel[list(first.order)], view)
    images = np.zeros((len(config.elements), 1, *config.image), np.float32)
    frames = []
    for name, volume in observed.items():
        orientation = Orientation.to_ras(volume.affine)
        frames.append(Frame.of(volume.data.shape, volume.affine, orientation, config.image, view, offset))
        unit = unit_range(*intensity[name], backdrops[name])
        images[config.elements.index(name), 0] = frames[-1].to_model(volume.data, unit)
    return Prepared(
        images=images,
        observed=np.array([name in observed for name in config.elements]),
        elements=tuple(config.elements),
        task=config.task,
        frame=frames[0],
        intensity=intensity,
        fill=next(iter(backdrops.values())).fill,
        backdrops=backdrops,
        background=around,
        study=study,
        version=config.preprocessing.version,
        outside=_unseen(turned, frames[0]) if frames[0].cuts else 0,
        unlike_coverage=tuple(_unlike_coverage(masks)),
    )


def _unlike_coverage(masks: Mapping[str, tuple[NDArray[np.bool_], ...]]) -> Iterator[str]:
    """A sentence about each pair of volumes of which one, skull-stripped or cut, shows little of what the other does.

    masks: per volume what is bright and what is empty in it, on one grid.
    """
    for (name, (bright, _)), (other, (_, empty)) in itertools.permutations(masks.items(), 2):
        share = np.count_nonzero(bright & empty) / (np.count_nonzero(bright) or 1)
        if share > ELSEWHERE:
            yield (
                f"{share:.0%} of what {name} shows lies where {other} shows nothing: it is skull-stripped or covers "
                f"less; give both alike if you can, as its edges become edges of what is made"
            )


def remoteness(kept: Sequence[int], index: int, apart: float) -> float:
    """How little a slice has to do with the nearest of those that are there, 0..1: the cube of its distance over THICK.

    apart: mm from slice to slice. The cube was the best compromise on brains cut into slices of 1 to 4 mm, where what
    has been learnt of thick slices is far behind interpolation.
    """
    return min(1.0, min(abs(index - other) for other in kept) * apart / THICK) ** 3


def _head_centre(
    tissue: NDArray[np.bool_], size: NDArray[np.float64], view: Sequence[float | None]
) -> tuple[float, ...]:
    """Where the view's centre lies, in voxels from the grid's centre along each RAS axis: in the middle of the head.

    0 where the whole grid fits into the view. A head that is higher than a view meant for whole heads keeps its crown.
    """
    offset = []
    for axis, extent in enumerate(view):
        count = np.count_nonzero(tissue, axis=tuple(a for a in range(3) if a != axis))
        n, middle = len(count), len(count) / 2
        if extent is not None and n * size[axis] > extent * (1 + SAME_SPACING) and count.any():
            there = np.flatnonzero(count > 0.01 * count.max())  # specks of noise are no head
            first, last = there[0], there[-1] + 1
            middle = (first + last) / 2
            if axis == 2 and extent >= WHOLE_HEAD and (last - first) * size[axis] > extent:
                middle = last - round(extent / size[axis]) / 2
        offset.append(float(middle - n / 2))
    return tuple(offset)


def _unseen(tissue: NDArray[np.bool_], frame: Frame) -> int:
    """How many voxels of tissue lie outside the view, most of them at least."""
    return sum(int((tissue[..., part] & (frame.coverage(part) < 0.5)).sum()) for part in slabs(tissue.shape))


def linear_relation(prediction: NDArray, observed: NDArray) -> NDArray[np.float64]:
    """Constant and slopes [1 + k] of the least-squares relation of an image to observed ones [k, ...], on one grid.

    Only where something is observed; of many voxels, every so manieth.
    """
    there = np.flatnonzero(observed.any(axis=0))
    there = there[:: max(1, len(there) // 200_000)]
    rows = np.stack([np.ones(len(there)), *(image.ravel()[there] for image in observed)], axis=1)
    return np.linalg.lstsq(rows, prediction.ravel()[there].astype(np.float64), rcond=1e-6)[0]


def _prepare_cardiac(study: Study, config: ModelConfig, allow_complete: bool) -> Prepared:
    (name, volume), m = next(iter(study.volumes.items())), len(config.elements)
    axis = slice_axis(volume.data.shape, volume.affine)
    count = volume.data.shape[axis]
    missing = tuple(sorted(set(study.missing_slices)))
    if not missing and not allow_complete:
        raise complete_stack(study)
    if len(missing) >= count:
        raise CopeditError(f"{study.name}: every slice is missing; at least one slab of slices is needed")
    present = [index for index in range(count) if index not in missing]
    shown = np.take(volume.data, present, axis)
    values, counts = np.unique(shown[np.ix_((0, -1), (0, -1), (0, -1))], return_counts=True)
    border = empty_border((shown == values[counts.argmax()]).all(axis))
    low, high = percentile_range(np.moveaxis(shown, axis, 0)[:, ~border], config.preprocessing.percentiles, study.name)
    filled = fill_slices(volume.data, missing, axis)
    frame, spaced = stack_frame(volume, config), spacing(volume.affine)[axis]
    prepared = Prepared(
        images=np.zeros((m, 1, *config.image), np.float32),
        observed=observed_slabs(missing, count, spaced, frame.field_of_view[2], m, config.image[2]),
        elements=tuple(config.elements),
        task=config.task,
        frame=frame,
        intensity={name: (low, high)},
        fill=filled,
        background=np.broadcast_to(np.expand_dims(border, axis), filled.shape),
        study=study,
        stack=frame.stack_to_model(normalise(filled.copy(), low, high)),
        missing_slices=missing,
        version=config.preprocessing.version,
    )
    assert prepared.stack is not None
    prepared.images[prepared.observed] = prepared.elements_of(prepared.stack)[prepared.observed]
    return prepared


def stack_frame(volume: Volume, config: ModelConfig) -> Frame:
    """A stack's way to the grid of a cardiac model and back."""
    height, width, depth = config.image
    return Frame.of(
        volume.data.shape,
        volume.affine,
        Orientation.slices_last(volume.affine, slice_axis(volume.data.shape, volume.affine)),
        (height, width, len(config.elements) * depth),
        config.preprocessing.field_of_view,
        slices=True,
    )


def empty_border(empty: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Of pixels that show nothing [X, Y] those of the border: an edge is reached over nothing else, along a row or a
    column."""
    ways = (np.logical_and.accumulate(empty[::step, :], 0)[::step, :] for step in (1, -1))
    across = (np.logical_and.accumulate(empty[:, ::step], 1)[:, ::step] for step in (1, -1))
    return np.any([*ways, *across], axis=0)


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


def observed_slabs(
    missing: Sequence[int], count: int, size: float, extent: float, m: int, depth: int
) -> NDArray[np.bool_]:
    """Which of m slabs count as observed [m]: those that `slabs_touched` leaves.

    Where every slab lacks something, the (first) one that lacks least. Perception, prompts and the network need one
    that is given; as few with gaps as can be, for the slices in those gaps stay what the fill made of them.
    """
    touched = slabs_touched(missing, count, size, extent, m, depth)
    if not touched.all():
        return ~touched
    inward, _ = nearest_matrices(count, size, m * depth, extent / (m * depth))
    lacking = inward[:, list(missing)].sum(1).reshape(m, depth).sum(1)
    return np.arange(m) == np.argmin(lacking)
