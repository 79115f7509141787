"""From a study's own grids to the model's grid, and back.

Steps of the way in, for each volume: reorient (brain: to RAS; cardiac: slices last, in the file's own slice
order, the plane towards RAS) -> percentiles to 0..1 -> crop or pad to the field of view about the volume's
centre -> resize to the model's grid. The last two are one small matrix per axis, and so is the way back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from copedit_rt.config import ModelConfig
from copedit_rt.errors import CopeditError
from copedit_rt.images.grids import Frame, Orientation, fill_slices, slice_axis, spacing
from copedit_rt.images.nifti import same_grid
from copedit_rt.images.study import Study


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
