"""Real studies beside simulated ones: as they are, and with their grey values bent at random.

A handful of patients is of a scanner or two. Mixed in as they are, a fit learns these scanners by heart, and is the
worse on others. Bent, they keep the anatomy and its relations that no simulation has, and no scanner.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from copedit_rt.config import ModelConfig
from copedit_rt.images.find import find_studies
from copedit_rt.images.prepare import prepare
from copedit_rt.images.study import Study
from copedit_rt.task import Task

Array = NDArray[np.float32]
AS_THEY_ARE = 6  # one view in so many is not bent


@dataclass(frozen=True)
class Patient:
    """A study on a model's grid: images [m, H, W, D] in 0..1, those of elements that it lacks 0; there [m]."""

    name: str
    images: Array
    there: NDArray[np.bool_]


def read_patients(folder: Path, config: ModelConfig) -> list[Patient]:
    """Every brain study in a folder, found and read as `copedit synth` does, images resampled onto the first.

    Raises CopeditError for what `find_studies` and `Study.read` refuse.
    """
    patients = []
    for files in find_studies(folder, task=Task.BRAIN):
        prepared = prepare(Study.read(files, resample=True), config, allow_complete=True)
        patients.append(Patient(files.name, prepared.images[:, 0], prepared.observed))
    return patients


def varied(patient: Patient, rng: np.random.Generator, view: int) -> Array:
    """View number `view` of a patient [m, H, W, D]: mirrored left to right in every second, and bent (`bent`) in all
    but every `AS_THEY_ARE`th."""
    images = patient.images[:, ::-1] if view % 2 else patient.images
    if view % AS_THEY_ARE == 0:
        return np.ascontiguousarray(images)
    return np.stack([bent(image, rng) if there else image for image, there in zip(images, patient.there, strict=True)])


def bent(image: Array, rng: np.random.Generator) -> Array:
    """The image [H, W, D] in 0..1 through a random monotone curve (a gamma, a bend, a scale), with noise; what is 0
    stays 0 and nothing else becomes it."""
    gamma, bend, scale = np.exp(rng.normal(0, 0.18)), 0.15 * rng.normal(), rng.uniform(0.85, 1.03)
    value = image.astype(np.float32) ** np.float32(gamma)
    value = scale * (value + np.clip(bend, -0.9, 0.9) * value * (1 - value))
    value += rng.uniform(0.003, 0.025) * rng.standard_normal(image.shape, np.float32)
    return np.where(image > 0, np.clip(value, 1e-4, 1), 0).astype(np.float32)
