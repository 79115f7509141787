"""What is missing from a study, for Python users: images in, images out, no folders."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError, SpatialImage

from copedit_rt.errors import CopeditError
from copedit_rt.images.names import modality, targets
from copedit_rt.images.nifti import Volume, read_volume, refuse_synthetic
from copedit_rt.images.study import Study
from copedit_rt.listener import Listener
from copedit_rt.task import STACK

if TYPE_CHECKING:
    from copedit_rt.models import Models

# A file, an image of nibabel's, or (array [X, Y, Z], affine [4, 4] from voxels to RAS millimetres).
Image = str | os.PathLike[str] | SpatialImage | tuple[Any, Any]
_CHOOSING = threading.Lock()  # several threads that begin at once share the models


def fill(
    *,
    name: str | None = None,
    model: str | Path | None = None,
    target: str | Sequence[str] | None = None,
    missing_slices: Sequence[int] | None = None,
    steps: int | None = None,
    seed: int = 0,
    samples: int = 1,
    solver: str | None = None,
    detail: bool | None = None,
    resample: bool = False,
    device: str = "auto",
    engine: str = "auto",
    dtype: str = "auto",
    max_memory: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    **images: Image,
) -> dict[str, nib.Nifti1Image]:
    """Synthesise what is missing from one study.

    images: what is there, as t1=, t1ce=, t2=, flair=, pd=, in any spelling of a modality; or a cardiac short-axis stack
    as sax=. Each is a file, an image of nibabel's, or a tuple of an array and its affine (voxels to RAS mm). Outputs
    lie on the grid of the first. missing_slices: of a stack, from 0 along its slice axis, besides the blank ones.

    name: with the seed and the element it determines the noise. By default it is that of the files where all are files,
    so that the same command gives the same voxels, and "study" otherwise. model: a built-in one or a folder (None: one
    that fits); it stays loaded for the next call with the same model, device, engine, dtype and max_memory. The other
    options are those of `Study.read`, `Synthesizer.load` and `Synthesizer.synthesize`.

    Returns {element: image}, for every missing modality or those in `target`, or the whole stack as "sax"; with several
    samples ELEMENT_sd is their standard deviation. Headers say that the images are synthetic. What the user should
    know comes as a UserWarning. Raises CopeditError, in one sentence with the remedy.

    Example:
        >>> made = copedit_rt.fill(t1="t1.nii.gz", t2=nib.load("t2.nii.gz"))
        >>> made["flair"].to_filename("flair.nii.gz")
    """
    study = _study(images, name, missing_slices, resample)
    with _CHOOSING:
        models = _models(None if model is None else str(model), device, max_memory, engine, dtype)
    chosen, _ = models.choose(study.task, study.volumes)
    sampler: dict[str, Any] = {"steps": steps, "seed": seed, "samples": samples, "solver": solver, "detail": detail}
    result = models.load(chosen).synthesize(study, target=targets(target), progress=progress, **sampler)
    for note in result.study.notes:
        warnings.warn(note, stacklevel=2)
    return result.study.images(model=result.record["model"], std=result.std or None)


def _study(images: dict[str, Image], name: str | None, missing_slices: Sequence[int] | None, resample: bool) -> Study:
    """The images, read and checked."""
    if not images:
        raise CopeditError("no image was given; give what is there, as in fill(t1='t1.nii.gz', t2='t2.nii.gz')")
    files = {key: Path(image) for key, image in images.items() if isinstance(image, str | os.PathLike)}
    if len(files) == len(images):
        study = Study.read(files, missing_slices=missing_slices, resample=resample)
        study.name = name or study.name
        return study
    volumes: dict[str, Volume] = {}
    for key, image in images.items():
        element = STACK if key == STACK else modality(key)
        if element in volumes:
            raise CopeditError(f"two images for {element}; give one")
        volumes[element] = _volume(element, image)
    return Study.of(volumes, name or "study", missing_slices=missing_slices, resample=resample)


def _volume(element: str, image: Image) -> Volume:
    """An image of any kind, checked as files are."""
    if isinstance(image, SpatialImage):
        return Volume.from_image(image, element)
    if isinstance(image, str | os.PathLike):
        refuse_synthetic(Path(image))
        return read_volume(Path(image), keep_raw=element == STACK)
    try:
        array, affine = np.asarray(image[0]), np.asarray(image[1], np.float64).reshape(4, 4)
        return Volume.placed(array, affine, element)
    except (TypeError, ValueError, IndexError, HeaderDataError) as error:
        given = f"expected a file, an image of nibabel's or (array, affine), got {type(image).__name__}"
        raise CopeditError(f"{element}: {given} ({error})") from error


class _Warn(Listener):
    def remark(self, text: str) -> None:
        warnings.warn(text, stacklevel=3)


@lru_cache(maxsize=1)
def _models(model: str | None, device: str, max_memory: int | None, engine: str, dtype: str) -> Models:
    """Those of the last call with these options: loaded once."""
    from copedit_rt.models import Models

    return Models(model, device, max_memory=max_memory, engine=engine, dtype=dtype, listener=_Warn())
