"""What tasks on a frozen tokenizer share: latents and prompts, computed once, and which subjects are drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from copedit_rt import checkpoint
from copedit_rt.config import ModelConfig
from copedit_rt.errors import CopeditError
from copedit_rt.networks.tokenizer import CoPeVAE
from copedit_training.data.prepared import Files, grow, mapped
from copedit_training.stages.progress import counted
from copedit_training.stages.settings import Settings
from copedit_training.stages.task import Batch, Task

B = TypeVar("B", bound=Batch)
S = TypeVar("S", bound=Settings)


def _kept(path: Path, key: Tensor, *rows: int) -> Tensor | None:
    """The prompts [rows, m, 3, P], of one of these numbers of rows, that an earlier run left there with the same
    tokenizer; None for anything else."""
    try:
        found = checkpoint.read_tensors(path)[0]
    except CopeditError:
        return None
    own = "prompts" in found and torch.equal(found.get("tokenizer", key[:0]), key)
    return found["prompts"] if own and len(found["prompts"]) in rows else None


class LatentTask(Task[S, B]):
    """A task that reads what a frozen tokenizer makes of the images. views: a row is a subject, or a subject and
    whether it is mirrored."""

    tokenizer: CoPeVAE

    def __init__(self, config: ModelConfig, settings: S):
        super().__init__(config, settings)
        self.views = 2 if config.task.mirrored else 1

    def draw_rows(self, rng: np.random.Generator, batch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """So many rows, and of each its subject and whether it is mirrored (bool)."""
        every = len(self.images) * self.views
        rows = rng.choice(every, batch, replace=every < batch)
        return rows, rows // self.views, rows % self.views == 1

    def _prompts(self, images: np.ndarray, cache: Path | None) -> Tensor:
        """The prompts [subjects, m, 3, P] of each element alone, read from beside `cache` where an earlier run left
        them; a mirrored brain is given those of the brain itself."""
        if cache is None:
            return torch.stack([prompts for _, prompts in self._rows(images, range(len(images)), 1)])
        beside = cache.with_name("prompts.safetensors")
        kept = _kept(beside, self._key(), len(images), self.views * len(images))  # the second by `_encode`
        return self._computed(images, beside, {}, 1) if kept is None else kept[:: len(kept) // len(images)]

    def _key(self) -> Tensor:
        """The tokenizer's hash, [32] uint8."""
        digest = hashlib.sha256(b"".join(x.cpu().numpy().tobytes() for x in self.tokenizer.state_dict().values()))
        return torch.tensor(list(digest.digest()), dtype=torch.uint8)

    def _encode(self, images: np.ndarray, cache: Path | None) -> tuple[Tensor, Tensor]:
        """Normalised latents (float16) and prompts of each element alone, of all subjects and their mirror images.

        Both on the host; the latents are mapped from `cache`, as those of many subjects may not fit into memory.
        """
        if cache is None:
            latents, prompts = zip(*self._rows(images, range(self.views * len(images)), self.views), strict=True)
            return torch.stack(latents).half(), torch.stack(prompts)
        beside = cache.with_name("prompts.safetensors")  # written last: with it all is there
        rows, m = self.views * len(images), len(self.config.elements)
        shape = (rows, m, self.config.tokenizer.latent_channels, *self.config.latent)
        kept = _kept(beside, self._key(), rows) if cache.exists() else None
        if kept is None or mapped(cache).shape != shape:
            beside.unlink(missing_ok=True)
            kept = self._computed(images, beside, {cache: (shape, np.float16)}, self.views)
        return torch.from_numpy(mapped(cache)), kept

    def _computed(self, images: np.ndarray, beside: Path, latents: Files, views: int) -> Tensor:
        """The prompts [rows, m, 3, P] of so many views of each subject, kept `beside`, and the file of the latents
        where there is to be one. A process that is stopped leaves what it has for the next one."""
        key, alone = self._key(), beside.with_suffix(".npy")
        m, kinds = len(self.config.elements), len(self.tokenizer.heads)
        prompts = (views * len(images), m, kinds, self.config.tokenizer.prompt_dim)

        def make(rows: range) -> Iterator[Sequence[np.ndarray]]:
            return ([x.numpy() for x in (row if latents else row[1:])] for row in self._rows(images, rows, views))

        with counted("encoding", "view") as progress:
            grow({**latents, alone: (prompts, np.float32)}, make, progress, bytes(key.tolist()).hex())
        made = torch.from_numpy(np.array(mapped(alone)))
        checkpoint.write_tensors(beside, {"prompts": made, "tokenizer": key})
        alone.unlink()
        return made

    def _rows(self, images: np.ndarray, rows: range, views: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Latents and prompts of these rows: of each subject itself and, where it has two views, its mirror image."""
        for row in rows:
            subject, mirrored = divmod(row, views)
            x = torch.from_numpy(images[subject : subject + 1]).to(self.device).float()
            with torch.no_grad():
                z, prompts = self._encoded(x.flip(3) if mirrored else x)
            yield z[0].cpu(), prompts[0].cpu()

    @torch.no_grad()
    def _encoded(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised latents of images [B, m, 1, H, W, D] and the prompts [B, m, 3, P] of each element alone."""
        z = self._latents_of(images)
        with self.autocast():
            prompts = [self.tokenizer.prompts_of_each(subject) for subject in z.split(1)]
        return self.tokenizer.normalise(z), torch.cat(prompts)

    @torch.no_grad()
    def _encode_alone(self, images: Tensor) -> Tensor:
        """Normalised latents of images [B, m, 1, H, W, D], without prompts."""
        return self.tokenizer.normalise(self._latents_of(images))

    def _latents_of(self, images: Tensor) -> Tensor:
        """Latents of images [B, m, 1, H, W, D], float32; as many images at once as a subject has, since the feature
        maps of a micro-batch take more memory than the rest of its step."""
        few = images.flatten(0, 1).split(len(self.config.elements))
        with self.autocast():
            return torch.cat([self.tokenizer.encode(x[None])[0].float() for x in few]).unflatten(0, images.shape[:2])
