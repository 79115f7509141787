"""What the two stages share: a task draws micro-batches, says their loss, and writes the model in the end.

Everything random in micro-batch k of step i is drawn from generators seeded by (seed, i, k), so that a resumed run
needs no generator state, and how many processes there are changes nothing but rounding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from copedit_rt.config import ModelConfig, Triple
from copedit_rt.errors import CopeditError
from copedit_rt.networks.denoiser import Block
from copedit_rt.networks.tokenizer import ResidualUnit
from copedit_training.data.augmentation import Augmentation
from copedit_training.evaluation.metrics import psnr, ssim_map
from copedit_training.stages import distributed
from copedit_training.stages.settings import Settings

Terms = dict[str, float]


def randomness(seed: int, step: int, part: int) -> tuple[np.random.Generator, torch.Generator]:
    """Generators of a micro-batch. numpy pads seeds with zeros: those of part 0 are those of (seed, step)."""
    rng = np.random.default_rng((seed, step, part))
    return rng, torch.Generator().manual_seed(int(rng.integers(2**63)))


def checkpoint_activations(module: nn.Module) -> None:
    """Of each block of a transformer and each residual unit of a tokenizer keep the input alone and compute the rest
    again in the backward pass (Chen et al. 2016); gradients are the same."""
    for part in module.modules():
        if names := {Block: ("modulated", "closed"), ResidualUnit: ("forward", "forward")}.get(type(part)):
            name, kept = names
            again = partial(checkpoint, getattr(part, kept), use_reentrant=False, preserve_rng_state=False)
            setattr(part, name, again)


def device_of(settings: Settings) -> torch.device:
    """The device of this process. Raises CopeditError where there is no such one, or it does not train in the dtype."""
    device = distributed.own_device(settings.device)
    if settings.dtype == "float16" and device.type != "cuda":
        raise CopeditError(f"dtype = 'float16': needs a GPU; on {device.type} use bfloat16 or float32")
    return device


def check_crop(crop: int, divisors: Triple, image: Triple) -> None:
    """Raises CopeditError for a crop that does not divide by what the plane's axes must divide by, or is too large."""
    if crop < 0 or any(crop % c or crop > n for c, n in zip(divisors[:2], image[:2], strict=True)):
        raise CopeditError(f"crop = {crop}: must divide by {divisors[:2]} and fit into the image's plane {image[:2]}")


@dataclass(frozen=True)
class Batch:
    """All that is random in micro-batch `part` of a step, and its data, on the host.

    subjects: rows of the training images [B].
    """

    step: int
    part: int
    subjects: np.ndarray

    def to(self, device: torch.device) -> Self:
        """The same with its tensors there."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        values = {name: x.to(device) for name, x in values.items() if isinstance(x, Tensor)}
        return replace(self, **values)


B = TypeVar("B", bound=Batch)
S = TypeVar("S", bound=Settings)


class Trained(nn.Module):
    """Weights and buffers that a checkpoint holds besides the optimizer's. Called, it gives its task's loss, so that
    DistributedDataParallel may stand in its place."""

    def __init__(self, task: Task[Any, Any]):
        super().__init__()
        self.task = task  # no module, so no part of it

    def forward(self, batch: Batch) -> tuple[Tensor, Terms]:
        return self.task.loss(batch)


class Task(ABC, Generic[S, B]):
    """What is trained. images: float16 [subjects, m, 1, H, W, D]; module: all that learns or is kept."""

    images: np.ndarray

    def __init__(self, config: ModelConfig, settings: S):
        self.config, self.settings = config, settings
        self.joint = config.task.joint
        self.device = device_of(settings)
        self.augmentation = Augmentation(config) if settings.augment else None
        self.module = Trained(self)

    def load(self, rows: np.ndarray, mirrored: np.ndarray) -> Tensor:
        """Whole training images [B, m, 1, H, W, D], some of them mirrored [B] (bool); float32, on the host."""
        images = torch.from_numpy(self.images[rows]).float()
        if mirrored.any():
            flip = torch.from_numpy(mirrored)
            images = torch.where(flip[:, None, None, None, None, None], images.flip(3), images)
        return images

    def autocast(self) -> torch.autocast:
        low = torch.float16 if self.settings.dtype == "float16" else torch.bfloat16
        return torch.autocast(self.device.type, low, enabled=self.settings.dtype != "float32")

    @property
    def sparse(self) -> bool:
        """Whether there are steps in which some weights get no gradient."""
        return False

    @abstractmethod
    def draw(self, step: int, part: int) -> B:
        """Micro-batch `part` of a step, the same in whichever process. It may run in a thread beside the rest: it
        touches neither weights nor the accelerator."""

    def begin(self, batches: Iterable[B]) -> Iterable[B]:
        """Called at the start of a step with the micro-batches that this process has in it; gives them back."""
        return batches

    @abstractmethod
    def loss(self, batch: B) -> tuple[Tensor, Terms]:
        """Loss of one micro-batch, and what goes to the log."""

    def after_step(self, step: int) -> Terms:
        """Called after each optimizer step; more for the log."""
        return {}

    @abstractmethod
    def validate(self, images: np.ndarray) -> tuple[Terms, np.ndarray]:
        """PSNR (dB) and SSIM on held-out images [N, m, 1, H, W, D]; a picture [rows, columns] in 0..1 of the first
        one's middle slices, truth above result."""

    def settle(self, images: np.ndarray) -> str:
        """Called once at the end with the held-out images: a last decision about what is exported, in words."""
        return ""

    @abstractmethod
    def export(self, folder: Path) -> None:
        """Write the model folder of the finished run."""

    def volumes(self, images: Tensor) -> Tensor:
        """Images or latents [B, m, c, H, W, D] as volumes [N, c, H, W, D]: one a modality, or one a stack of slabs."""
        return images.permute(0, 2, 3, 4, 1, 5).flatten(4) if self.joint else images.flatten(0, 1)


def compare(result: Tensor, truth: np.ndarray) -> tuple[float, float]:
    """PSNR and SSIM of volumes [N, 1, H, W, D], the slabs of a heart [m, 1, H, W, D] each by itself."""
    pairs = list(zip(result.float().clamp(0, 1).cpu().numpy(), truth.astype(np.float32), strict=True))
    noise = float(np.mean([min(psnr(a[0], b[0]), 100.0) for a, b in pairs]))
    return noise, float(np.mean([ssim_map(a[0], b[0]).mean() for a, b in pairs]))


def picture(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Middle slices of elements [m, 1, H, W, D], a row each, upright."""
    return np.vstack([np.hstack([np.rot90(x[0, :, :, x.shape[-1] // 2]) for x in row]) for row in rows]).clip(0, 1)
