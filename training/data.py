"""Training images on the model grid, and what is drawn from them at every step."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from copedit_rt.config import ModelConfig
from copedit_rt.geometry import prepare
from copedit_rt.study import Study, Volume
from training import phantom
from training.phantom import Phantom

HELD_OUT = 1_000_000  # first seed of the phantoms that no training run sees
HEART_LENGTH = 96.0  # mm that a simulated short-axis stack covers, base to apex


def phantom_subject(config: ModelConfig, seed: int) -> Phantom:
    """A simulated subject whose grid is the model's own, so that preparing it resamples nothing."""
    h, w, d = config.image
    x, y, z = config.preprocessing.field_of_view
    if config.task == "brain":
        assert z is not None
        return phantom.brain(seed, (h, w, d), (x / h, y / w, z / d), config.elements)
    slices = d * len(config.elements)
    return phantom.heart(seed, (h, w, slices), (x / h, y / w, (z or HEART_LENGTH) / slices))


def model_images(config: ModelConfig, seed: int) -> np.ndarray:
    """A complete simulated subject through the runtime's preprocessing: float32 [m, 1, H, W, D] in 0..1."""
    subject = phantom_subject(config, seed)
    volumes = {name: Volume.from_array(image, subject.affine()) for name, image in subject.images.items()}
    return prepare(Study(f"phantom-{seed}", config.task, volumes), config, allow_complete=True).images


def phantom_images(
    config: ModelConfig, subjects: int, cache: Path, progress: Callable[[int, int], None] | None = None
) -> np.ndarray:
    """Simulated training subjects, seeds 0 to subjects - 1: float16 [subjects, m, 1, H, W, D], mapped from `cache`.

    float16 steps are at most 2^-11 of an intensity in 0..1, a fortieth of the phantoms' noise.
    """
    shape = (subjects, len(config.elements), 1, *config.image)
    if cache.exists():
        images = np.load(cache, mmap_mode="c")
        if images.shape == shape:
            return images
    cache.parent.mkdir(parents=True, exist_ok=True)
    temporary = cache.with_name(f".{cache.name}.{os.getpid()}.tmp.npy")
    images = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float16, shape=shape)
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        for i, subject in enumerate(pool.map(model_images, [config] * subjects, range(subjects))):
            images[i] = subject
            if progress:
                progress(i + 1, subjects)
    images.flush()
    os.replace(temporary, cache)
    return np.load(cache, mmap_mode="c")


def draw_observed(rng: np.random.Generator, batch: int, elements: int, consecutive: bool) -> Tensor:
    """Observed masks [batch, elements] (bool) by the dual-random strategy (Section 3.2).

    First how many are missing, uniform in 1..m-1, then which: any subset (brain), or a run of slabs (cardiac).
    """
    observed = np.ones((batch, elements), dtype=bool)
    for row in observed:
        count = rng.integers(1, elements)
        if consecutive:
            start = rng.integers(0, elements - count + 1)
            row[start : start + count] = False
        else:
            row[rng.permutation(elements)[:count]] = False
    return torch.from_numpy(observed)
