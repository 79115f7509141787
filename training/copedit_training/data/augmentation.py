"""Random augmentation of training images, by MONAI, drawn from seeds."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import torch
from torch import Tensor

from copedit_rt.config import ModelConfig
from copedit_rt.errors import CopeditError

ROTATION, SCALING, SHIFT = math.radians(10.0), 0.1, 0.05  # augmentation; of the plane's extent
CONTRAST, BRIGHTNESS = 0.1, 0.05  # augmentation; of an intensity, and of 0..1


class Augmentation:
    """Random rotation, scaling and shift in the plane, the same for all elements of a subject, and each element's
    intensities scaled and shifted (Section B.1), by MONAI. What is empty in a skull-stripped brain stays empty."""

    def __init__(self, config: ModelConfig):
        """Raises CopeditError without MONAI."""
        try:
            from monai.transforms import RandAffine, RandScaleIntensity, RandShiftIntensity
            from monai.utils import convert_to_tensor
        except ImportError as error:
            raise CopeditError("augment needs MONAI: install the extra `train`, or set it to false") from error
        self.joint = config.task.joint
        self._plain = partial(convert_to_tensor, track_meta=False)
        h, w, _ = config.image
        self.place = RandAffine(
            prob=1.0,
            rotate_range=(0.0, 0.0, ROTATION),
            scale_range=(SCALING, SCALING, 0.0),
            translate_range=(SHIFT * h, SHIFT * w, 0.0),
            padding_mode="border" if self.joint else "zeros",
        )
        self.brightness = (
            RandScaleIntensity(CONTRAST, prob=1.0, channel_wise=True),
            RandShiftIntensity(BRIGHTNESS, prob=1.0, channel_wise=True),
        )

    def __call__(self, images: Tensor, seeds: np.ndarray) -> Tensor:
        """images: [B, m, 1, H, W, D] in 0..1; seeds: [B], what each subject's transforms are drawn from."""
        return torch.stack([self._one(x, int(seed)) for x, seed in zip(images, seeds, strict=True)])

    def _one(self, images: Tensor, seed: int) -> Tensor:
        m = len(images)
        # Slabs are one stack. Elements are channels, so that all are moved alike.
        x = torch.cat(tuple(images), dim=-1) if self.joint else images.flatten(0, 1)
        for i, transform in enumerate((self.place, *self.brightness)):
            transform.set_random_state(seed=(seed + i) % 2**32)
        x = self._plain(self.place(x))
        empty = torch.zeros_like(x, dtype=torch.bool) if self.joint else x <= 0
        for transform in self.brightness:
            x = self._plain(transform(x))
        x = x.clamp(0, 1).masked_fill(empty, 0.0)
        return torch.stack(x.chunk(m, dim=-1)) if self.joint else x.unflatten(0, (m, 1))
