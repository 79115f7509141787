"""What was synthesised beside the truth and beside baselines, on one scale.

Brain: a missing modality has no scale of its own, so the synthesised volume is put back on 0..1 with the intensity
range recorded with it, and the truth with its own percentiles, as in preprocessing. Heart: the observed slices set the
file's scale, so output, baselines and truth all use the truth's percentiles, and only the missing slices count.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from copedit_rt.images.grids import Orientation, slice_axis, spacing
from copedit_rt.images.intensity import Backdrop, to_unit_range
from copedit_rt.images.nifti import Volume
from copedit_rt.images.prepare import slabs_touched
from copedit_rt.images.study import Study
from copedit_rt.task import STACK, Task
from copedit_training.evaluation.baselines import (
    LinearRegression,
    interpolate_slices,
    mean_of_observed,
    nearest_slices,
)
from copedit_training.evaluation.metrics import measure
from copedit_training.evaluation.subjects import phantom_truth

if TYPE_CHECKING:
    from copedit_rt.config import ModelConfig
    from copedit_rt.synthesizer import Result
    from copedit_training.data.phantom import Phantom

PERCENTILES = (0.5, 99.5)


def normalise(image: np.ndarray, percentiles: tuple[float, float] = PERCENTILES) -> np.ndarray:
    """A skull-stripped volume with its percentiles as 0 and 1, clipped; float32. The preprocessing of the models."""
    low, high = np.percentile(image, percentiles)
    return to_unit_range(image, low, max(high, low + 1e-12)).astype(np.float32)


def incomplete(
    config: ModelConfig, truth: Study, missing: Sequence[str], swap: Mapping[str, str] | None = None
) -> Study:
    """A complete study without its `missing` elements. swap: element -> the image put there under its name."""
    if config.task.joint:
        slices, volume = missing_slices(config, truth, missing), truth.volumes[STACK]
        stack = volume.data.copy()
        np.moveaxis(stack, _axis(volume), 2)[..., slices] = 0
        return Study(truth.name, Task.HEART, {STACK: Volume.from_array(stack, volume.affine)}, tuple(slices))
    volumes = {e: truth.volumes[(swap or {}).get(e, e)] for e in config.elements if e not in missing}
    return Study(truth.name, Task.BRAIN, volumes)


def missing_slices(config: ModelConfig, truth: Study | Phantom, missing: Sequence[str]) -> list[int]:
    """The slices of a heart, in the file's order, that lie in the missing slabs and in no other.

    None where others would be missing with them, or not all of these: a stack of few slices has some that lie in two.
    """
    truth = as_study(config, truth)
    volume, m, depth = truth.volumes[STACK], len(config.elements), config.image[2]
    axis = _axis(volume)
    count, size = volume.data.shape[axis], float(spacing(volume.affine)[axis])
    extent = config.preprocessing.field_of_view[2] or count * size
    wanted = np.array([name in missing for name in config.elements])
    touched = np.stack([slabs_touched([z], count, size, extent, m, depth) for z in range(count)])
    slices = np.flatnonzero(touched.any(axis=1) & ~(touched & ~wanted).any(axis=1))
    return slices.tolist() if (touched[slices].any(axis=0) == wanted).all() else []


def made_of(study: Study) -> np.ndarray:
    """All that was made of a study, on one array: missing modalities, or a heart's missing slices."""
    volumes = [study.volumes[name] for name in sorted(study.synthetic)]
    slices = study.missing_slices
    return np.stack([v.data.take(slices, _axis(v)) if slices else v.data for v in volumes])


def possible(config: ModelConfig, truth: Study | Phantom, missing: Sequence[str]) -> bool:
    """Whether a study can lack exactly these elements, see `missing_slices`; a brain always can."""
    return not config.task.joint or bool(missing_slices(config, truth, missing))


def as_study(config: ModelConfig, truth: Study | Phantom) -> Study:
    """A phantom as a complete study; a study as it is."""
    return truth if isinstance(truth, Study) else phantom_truth(config, truth, "phantom")


def _axis(volume: Volume) -> int:
    return slice_axis(volume.data.shape, volume.affine)


@dataclass(frozen=True)
class Pair:
    """What a method made of an element, and the truth: volumes [X, Y, Z] on 0..1, in the file's order (heart: slices
    last).

    slices: those along z that were missing and count (None: all). inside: the brain (bool); None for a heart.
    orientation: the file's way to RAS. std: of the samples that the image is the mean of, on the same scale.
    """

    method: str
    element: str
    image: np.ndarray
    truth: np.ndarray
    slices: tuple[int, ...] | None = None
    inside: np.ndarray | None = None
    orientation: Orientation | None = None
    std: np.ndarray | None = None

    def measure(self) -> dict[str, float]:
        return measure(self.image, self.truth, self.slices, self.inside)

    def upright(self, image: np.ndarray) -> np.ndarray:
        """An image of this pair's grid in RAS order (a view)."""
        return image if self.orientation is None else self.orientation.apply(image)

    def where(self) -> np.ndarray:
        """The voxels that count, bool [X, Y, Z]: the inside, or the missing slices."""
        if self.inside is not None:
            return self.inside
        chosen = np.zeros(self.truth.shape, bool)
        chosen[..., slice(None) if self.slices is None else list(self.slices)] = True
        return chosen


def compare_brain(
    truth: Mapping[str, np.ndarray],
    missing: Sequence[str],
    synthesised: Mapping[str, np.ndarray],
    intensity: tuple[float, float],
    regression: LinearRegression | None,
    *,
    std: Mapping[str, np.ndarray] | None = None,
    orientation: Orientation | None = None,
    others: Mapping[str, Mapping[str, np.ndarray]] | None = None,
) -> Iterator[Pair]:
    """Per missing modality the model, other methods, then the baselines (no regression: without that one).

    truth: the complete study; synthesised, std: the outputs, in the units of its first observed volume, of which
    `intensity` is 0 and 1; others: those of each other method.
    """
    normal = {name: normalise(image) for name, image in truth.items()}
    observed = {name: image for name, image in normal.items() if name not in missing}
    inside = np.any([image > 0 for image in normal.values()], axis=0)
    low, high = intensity
    reference = next(image for name, image in truth.items() if name not in missing)
    backdrop = Backdrop.of(reference, low, high)  # an output has the reference's, whatever its own voxels look like
    for name in missing:
        outputs = {"model": synthesised, **(others or {})}
        made = {method: to_unit_range(volumes[name], low, high, backdrop) for method, volumes in outputs.items()}
        made["mean of observed"] = mean_of_observed(observed)
        if regression:
            made["linear regression"] = regression.predict(observed, name)
        for method, image in made.items():
            spread = std[name] / (high - low) if std and method == "model" else None
            yield Pair(method, name, image, normal[name], None, inside, orientation, spread)


def compare_heart(
    truth: np.ndarray,
    slices: Sequence[int],
    synthesised: np.ndarray,
    *,
    std: np.ndarray | None = None,
    others: Mapping[str, np.ndarray] | None = None,
) -> Iterator[Pair]:
    """Over the missing slices the model, other methods, then the baselines. Stacks [X, Y, slices], all in the file's
    units."""
    low, high = np.percentile(truth, PERCENTILES)

    def normal(stack: np.ndarray) -> np.ndarray:
        return np.clip((stack - low) / (high - low), 0, 1)

    reference = normal(truth)
    for method, stack in (
        ("model", synthesised),
        *(others or {}).items(),
        ("linear interpolation", interpolate_slices(truth, slices)),
        ("nearest slice", nearest_slices(truth, slices)),
    ):
        spread = std / (high - low) if std is not None and method == "model" else None
        yield Pair(method, STACK, normal(stack), reference, tuple(slices), std=spread)


def pairs(
    config: ModelConfig,
    truth: Study | Phantom,
    missing: Sequence[str],
    result: Result,
    regression: LinearRegression | None = None,
    others: Mapping[str, Mapping[str, np.ndarray]] | None = None,
) -> Iterator[Pair]:
    """`compare_brain` or `compare_heart` of a complete study and what was made of it without its missing elements, by
    the model and by others (method -> volume -> array)."""
    truth = as_study(config, truth)
    volumes = {name: volume.data for name, volume in result.study.volumes.items()}
    if config.task.joint:
        axis, slices = _axis(truth.volumes[STACK]), missing_slices(config, truth, missing)
        stacks = [truth.volumes[STACK].data, volumes[STACK], result.std.get(STACK)]
        whole, made, std = (None if x is None else np.moveaxis(x, axis, 2) for x in stacks)
        assert whole is not None and made is not None
        more = {method: np.moveaxis(found[STACK], axis, 2) for method, found in (others or {}).items()}
        return compare_heart(whole, slices, made, std=std, others=more)
    reference = result.study.reference
    images = {name: in_order_of(reference, truth.volumes[name]) for name in config.elements}
    upright = Orientation.to_ras(reference.affine)
    intensity = intensity_of(result.record)
    return compare_brain(
        images, missing, volumes, intensity, regression, std=result.std, orientation=upright, others=others
    )


def in_order_of(reference: Volume, volume: Volume) -> np.ndarray:
    """The voxels of a volume in the order of another one's, on one grid: outputs have that of the first observed."""
    upright = Orientation.to_ras(volume.affine).apply(volume.data)
    return Orientation.to_ras(reference.affine).invert(upright)


def compare(
    config: ModelConfig,
    truth: Study | Phantom,
    missing: Sequence[str],
    result: Result,
    regression: LinearRegression | None = None,
) -> Iterator[tuple[str, dict[str, float]]]:
    """Method and metrics of `pairs`."""
    return ((pair.method, pair.measure()) for pair in pairs(config, truth, missing, result, regression))


def intensity_of(record: Mapping[str, Any]) -> tuple[float, float]:
    """What 0 and 1 of a synthesised volume are in the file, from its record: the reference's range."""
    geometry = record["geometry"]
    first = next(iter(geometry["intensity"].values()))
    return first["low"], first["high"]
