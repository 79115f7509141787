"""What tasks on a frozen tokenizer share: latents and prompts, computed once, and which subjects are drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from copedit_rt import checkpoint
from copedit_rt.config import ModelConfig
from copedit_rt.errors import CopeditError
from copedit_rt.networks.tokenizer import CoPeVAE
from copedit_training.data.prepared import mapped, new_cache
from copedit_training.stages.settings import Settings
from copedit_training.stages.task import Batch, Task

B = TypeVar("B", bound=Batch)
S = TypeVar("S", bound=Settings)


def _kept(path: Path, key: Tensor, rows: int) -> Tensor | None:
    """The prompts [rows, m, 3, P] that an earlier run left there with the same tokenizer; None for anything else."""
    try:
        found = checkpoint.read_tensors(path)[0]
    except CopeditError:
        return None
    own = "prompts" in found and torch.equal(found.get("tokenizer", key[:0]), key)
    return found["prompts"] if own and len(found["prompts"]) == rows else None


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
        key, beside = self._key(), cache and cache.with_name("prompts.safetensors")
        kept = _kept(beside, key, len(images)) if beside else None
        if kept is None:
            each = (self._encoded(torch.from_numpy(x[None]).to(self.device).float())[1].cpu() for x in images)
            kept = torch.cat(list(each))
            if beside:
                checkpoint.write_tensors(beside, {"prompts": kept, "tokenizer": key})
        return kept

    def _key(self) -> Tensor:
        """The tokenizer's hash, [32] uint8."""
        digest = hashlib.sha256(b"".join(x.cpu().numpy().tobytes() for x in self.tokenizer.state_dict().values()))
        return torch.tensor(list(digest.digest()), dtype=torch.uint8)

    @torch.no_grad()
    def _encode(self, images: np.ndarray, cache: Path | None) -> tuple[Tensor, Tensor]:
        """Normalised latents (float16) and prompts of each element alone, of all subjects and their mirror images.

        Both on the host; the latents are mapped from `cache`, as those of many subjects may not fit into memory.
        """
        if cache is None:
            pairs = list(self._views(images))
            return torch.cat([z.half().cpu() for z, _ in pairs]), torch.cat([prompts.cpu() for _, prompts in pairs])
        key, beside = self._key(), cache.with_name("prompts.safetensors")  # written last: with it all is there
        rows, m = self.views * len(images), len(self.config.elements)
        shape = (rows, m, self.config.tokenizer.latent_channels, *self.config.latent)
        kept = _kept(beside, key, rows) if cache.exists() else None
        if kept is None or mapped(cache).shape != shape:
            beside.unlink(missing_ok=True)
            each = []
            with new_cache(cache, shape) as latents:
                for i, (z, prompts) in enumerate(self._views(images)):
                    latents[i] = z[0].half().cpu().numpy()
                    each.append(prompts.cpu())
            kept = torch.cat(each)
            checkpoint.write_tensors(beside, {"prompts": kept, "tokenizer": key})
        return torch.from_numpy(mapped(cache)), kept

    def _views(self, images: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
        for subject in images:
            x = torch.from_numpy(subject[None]).to(self.device).float()
            for view in (x, x.flip(3))[: self.views]:
                yield self._encoded(view)

    @torch.no_grad()
    def _encoded(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised latents of images [B, m, 1, H, W, D] and the prompts [B, m, 3, P] of each element alone."""
        with self.autocast():
            z = self.tokenizer.encode(images).float()
            return self.tokenizer.normalise(z), self.tokenizer.prompts_of_each(z)

    @torch.no_grad()
    def _encode_alone(self, images: Tensor) -> Tensor:
        """Normalised latents of images [B, m, 1, H, W, D], without prompts."""
        with self.autocast():
            return self.tokenizer.normalise(self.tokenizer.encode(images).float())
