"""Both training stages: a loop that can be stopped anywhere and goes on exactly where it was.

A step is the mean over `accumulate` micro-batches, one after the other in one process or spread over those of torchrun.
Everything random in micro-batch k of step i is drawn from generators seeded by (seed, i, k), so that a resumed run
needs no generator state, and how many processes there are changes nothing but rounding.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shutil
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import numpy as np
import torch
from einops import rearrange
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from copedit_rt import checkpoint
from copedit_rt.config import ModelConfig, Triple
from copedit_rt.errors import CopeditError, Stopped
from copedit_rt.files import write_atomically
from copedit_rt.networks.denoiser import MDiT3D, build_denoiser
from copedit_rt.networks.sampler import add_noise, sample
from copedit_rt.networks.tokenizer import CoPeVAE, Decoder, PromptEncoder
from copedit_rt.schedule import alpha_bar
from copedit_training.data import layouts
from copedit_training.data.augmentation import Augmentation
from copedit_training.data.prepared import (
    draw_observed,
    folder_images,
    held_out_images,
    new_cache,
    phantom_images,
    study_names,
)
from copedit_training.evaluation.metrics import psnr, ssim3d
from copedit_training.stages import distributed, memory
from copedit_training.stages.losses import (
    PRETEXT,
    Adversary,
    EMACodebook,
    Perceptual,
    pretext_losses,
    scale_prompts,
    weigh,
)
from copedit_training.stages.settings import Settings, Stage, load_settings

Terms = dict[str, float]
READOUT_LR = 3e-3
WHITEN_FLOOR = 5e-4  # of the total variance; smaller components are not raised further
CROP_RIM = 6  # voxels at the edge of a crop that its image term leaves out, as the decoder knows nothing beyond


def randomness(seed: int, step: int, part: int) -> tuple[np.random.Generator, torch.Generator]:
    """Generators of a micro-batch. numpy pads seeds with zeros: those of part 0 are those of (seed, step)."""
    rng = np.random.default_rng((seed, step, part))
    return rng, torch.Generator().manual_seed(int(rng.integers(2**63)))


class Task(nn.Module, ABC):
    """What is trained: its weights are all that a checkpoint needs besides the optimizer.

    images: float16 [subjects, m, 1, H, W, D]. drawn: the subjects of the last micro-batch, as rows of them.
    """

    drawn: np.ndarray
    images: np.ndarray

    def __init__(self, config: ModelConfig, settings: Settings):
        super().__init__()
        self.config, self.settings = config, settings
        self.cardiac = config.task == "cardiac"
        self.device = distributed.own_device(settings.device)
        self.augmentation = Augmentation(config) if settings.augment else None

    def load(self, rows: np.ndarray, mirrored: np.ndarray) -> Tensor:
        """Whole training images [B, m, 1, H, W, D], some of them mirrored [B] (bool)."""
        images = torch.from_numpy(self.images[rows]).to(self.device).float()
        if mirrored.any():
            flip = torch.from_numpy(mirrored).to(self.device)
            images = torch.where(flip[:, None, None, None, None, None], images.flip(3), images)
        return images

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.dtype == "bfloat16")

    @property
    def sparse(self) -> bool:
        """Whether there are steps in which some weights get no gradient."""
        return False

    def before_step(self, step: int, parts: Sequence[int]) -> None:
        """Called before a step with the micro-batches that this process has in it."""

    @abstractmethod
    def forward(self, step: int, part: int) -> tuple[Tensor, Terms]:
        """Loss of one freshly drawn micro-batch, and what goes to the log."""

    def after_step(self, step: int) -> Terms:
        """Called after each optimizer step; more for the log."""
        return {}

    @abstractmethod
    def validate(self, images: np.ndarray) -> tuple[Terms, np.ndarray]:
        """PSNR (dB) and SSIM on held-out images [N, m, 1, H, W, D]; a picture [rows, columns] in 0..1 of the first
        one's middle slices, truth above result."""

    @abstractmethod
    def export(self, folder: Path) -> None:
        """Write the model folder of the finished run."""

    def _volumes(self, images: Tensor) -> Tensor:
        """Images or latents [B, m, c, H, W, D] as volumes [N, c, H, W, D]: one a modality, or one a stack of slabs."""
        return images.permute(0, 2, 3, 4, 1, 5).flatten(4) if self.cardiac else images.flatten(0, 1)

    def _compare(self, result: Tensor, truth: np.ndarray) -> tuple[float, float]:
        """PSNR and SSIM of volumes [N, 1, H, W, D], the slabs of a heart [m, 1, H, W, D] each by itself."""
        pairs = list(zip(result.float().clamp(0, 1).cpu().numpy(), truth.astype(np.float32), strict=True))
        noise = float(np.mean([min(psnr(a[0], b[0]), 100.0) for a, b in pairs]))
        return noise, float(np.mean([ssim3d(a[0], b[0]) for a, b in pairs]))


def _picture(*rows: np.ndarray) -> np.ndarray:
    """Middle slices of elements [m, 1, H, W, D], a row each, upright."""
    return np.vstack([np.hstack([np.rot90(x[0, :, :, x.shape[-1] // 2]) for x in row]) for row in rows]).clip(0, 1)


@dataclass(frozen=True)
class Drawn:
    """A micro-batch of stage I: rows of the images, whether each is mirrored, where the crop begins (None: whole), the
    missing patterns [draws, B, m] of the pretext tasks (None: not in this step), and seeds of the augmentation [B]."""

    rows: np.ndarray
    mirrored: np.ndarray
    corner: tuple[int, int] | None
    observed: Tensor | None
    seeds: np.ndarray


class TokenizerTask(Task):
    """Stage I: L1 + vector quantisation + pretext tasks (equation 4).

    What the micro-batches of a step share: the codes, which move once after it towards the vectors of all; and the
    pretext tasks, which see the latents of all, so that negatives and the statistics of batch normalisation are those
    of the whole batch. Latents are small enough for that; those of other micro-batches are constants, and as the mean
    of the parts' gradients is taken, a micro-batch's own weigh as many times as there are parts.
    """

    scaled: Tensor

    def __init__(self, config: ModelConfig, settings: Settings, images: np.ndarray):
        super().__init__(config, settings)
        self.images = images
        crop = settings.crop
        _check_crop(crop, config.tokenizer.compression, config.image)
        self.tokenizer: CoPeVAE = CoPeVAE(config.tokenizer, len(config.elements)).to(
            memory_format=torch.channels_last_3d  # type: ignore[call-overload]
        )
        self.codebook = EMACodebook(config.tokenizer.codes, config.tokenizer.latent_channels)
        self.register_buffer("scaled", torch.tensor(False))
        (h, w, d), m = config.image, len(config.elements)
        self.adversary: Adversary | None = None
        if settings.adversarial_from >= 0:
            self.adversary = Adversary((crop or h, crop or w, d * m if self.cardiac else d))
        # Not a part of it: its weights never change, and checkpoints do not hold them.
        self.perceptual = [Perceptual(Path(settings.perceptual), self.device)] if settings.perceptual else []
        if settings.checkpointing:
            memory.checkpoint_activations(self.tokenizer)
        self.latents: Tensor | None = None  # of all micro-batches of the step, where the pretext tasks need them
        self.quantised: list[tuple[Tensor, Tensor, torch.Generator]] = []  # vectors, indices, of this step
        self.to(self.device)

    @property
    def sparse(self) -> bool:
        settings = self.settings
        return settings.pretext_every > 1 or settings.prompt_steps > 0 or settings.adversarial_from > 0

    def prompts_alone(self, step: int) -> bool:
        return step >= self.settings.steps - self.settings.prompt_steps

    def choose(self, step: int, part: int) -> tuple[Drawn, torch.Generator]:
        """What micro-batch `part` of a step is, in whichever process."""
        settings, alone = self.settings, self.prompts_alone(step)
        rng, generator = randomness(settings.seed, step, part)
        batch = settings.prompt_batch if alone else settings.batch_size
        rows = np.sort(rng.choice(len(self.images), batch, replace=len(self.images) < batch))
        # Left and right are interchangeable in a brain, not in a chest.
        mirrored = np.zeros(batch, dtype=bool) if self.cardiac else rng.random(batch) < 0.5
        corner = observed = None
        if settings.crop and not alone:
            x, y = (int(rng.integers(0, n - settings.crop + 1)) for n in self.config.image[:2])
            corner = x, y
        if alone or step % settings.pretext_every == 0:
            shape = (settings.draws, batch)
            m = len(self.config.elements)
            observed = draw_observed(rng, shape[0] * shape[1], m, self.cardiac).unflatten(0, shape)
        return Drawn(rows, mirrored, corner, observed, rng.integers(2**32, size=batch)), generator

    def show(self, drawn: Drawn) -> Tensor:
        """Whole images [B, m, 1, H, W, D], mirrored or augmented."""
        images = self.load(drawn.rows, drawn.mirrored)
        return images if self.augmentation is None else self.augmentation(images, drawn.seeds)

    @torch.no_grad()
    def before_step(self, step: int, parts: Sequence[int]) -> None:
        self.first, self.latents, self.quantised = parts[0], None, []
        chosen = [self.choose(step, part)[0] for part in parts]
        if len(parts) > 1 and chosen[0].observed is not None:
            with self.autocast():
                self.latents = distributed.gather(torch.cat([self.tokenizer.encode(self.show(x)) for x in chosen]))

    def pretext(self, step: int, part: int, z: Tensor) -> dict[str, Tensor]:
        """The pretext terms of the whole batch; z: latents of this micro-batch's whole images."""
        parts, size = self.settings.accumulate, len(z)
        if parts > 1:
            every = self.latents if self.latents is not None else distributed.gather(z)
            own = z.detach() + parts * (z - z.detach())
            z = torch.cat((every[: part * size], own, every[(part + 1) * size :]))
        norms = [x for x in self.tokenizer.prompt_encoders.modules() if isinstance(x, nn.BatchNorm3d)]
        for norm in norms:  # all micro-batches see the same statistics, which are noted once
            norm.track_running_stats = part == self.first
        features = self.tokenizer.features_of_each(z)
        for norm in norms:
            norm.track_running_stats = True
        if not self.scaled:
            scale_prompts(self.tokenizer, features.detach().flatten(0, 1))
            distributed.broadcast(*(p.data for p in self.tokenizer.prompt_encoders.parameters()))
            self.scaled.fill_(True)
        patterns = [self.choose(step, i)[0].observed for i in range(parts)]
        observed = torch.cat([x for x in patterns if x is not None], dim=1)
        return pretext_losses(self.tokenizer, self.tokenizer.prompts_of_features(features), observed.to(self.device))

    def judge(self, rng: np.random.Generator, features: Tensor) -> dict[str, Tensor]:
        """The pretext terms of pooled features [B, m, 3, b] under freshly drawn missing patterns."""
        shape = (self.settings.draws, len(features))
        observed = draw_observed(rng, shape[0] * shape[1], features.shape[1], self.cardiac).unflatten(0, shape)
        each = self.tokenizer.prompts_of_features(features)
        return pretext_losses(self.tokenizer, each, observed.to(self.device))

    def forward(self, step: int, part: int) -> tuple[Tensor, Terms]:
        drawn, generator = self.choose(step, part)
        self.drawn = drawn.rows
        whole = images = self.show(drawn)
        if self.prompts_alone(step):
            with self.autocast():
                with torch.no_grad():
                    z = self.tokenizer.encode(whole)
                terms = self.pretext(step, part, z)
            return weigh(terms, 1.0), {name: term.item() for name, term in terms.items()}
        if drawn.corner:
            (x, y), size = drawn.corner, self.settings.crop
            images = images[:, :, :, x : x + size, y : y + size]
        terms = {}
        with self.autocast():
            z = self.tokenizer.encode(images)
            if drawn.observed is not None:
                terms = self.pretext(step, part, self.tokenizer.encode(whole) if drawn.corner else z)
            wide = z.float()
            if step >= self.settings.quantise_from:
                vectors = wide.detach().movedim(2, -1).reshape(-1, z.shape[2])
                if not self.codebook.started:
                    self.codebook.start(vectors, self.tokenizer.codebook, generator)
                    self._share_codes()
                codes, index = self.tokenizer.quantise(wide.detach())
                terms["commitment"] = (wide - codes).square().mean()
                self.quantised.append((vectors, index.flatten(), generator))
                # Straight through: the decoder sees the codes, the encoder the decoder's gradient.
                wide = wide + (codes - wide).detach()
            output = self.tokenizer.decode(wide, joint=self.cardiac)
            volumes = self._volumes(output), self._volumes(images)
            for network in self.perceptual:
                terms["perceptual"] = network(*volumes)
            if self.adversary and step >= self.settings.adversarial_from:
                terms |= self.adversary(*volumes)
        error = output.float() - images
        terms["l1"] = error.abs().mean()
        state = {"psnr": -10 * math.log10(max(error.detach().square().mean().item(), 1e-10))}
        loss = weigh(terms, PRETEXT * self.settings.pretext_every)
        return loss, {name: term.item() for name, term in terms.items()} | state

    def after_step(self, step: int) -> Terms:
        if not self.quantised:
            return {}
        vectors, indices, generators = zip(*self.quantised, strict=True)
        every = distributed.gather(torch.cat(vectors)), distributed.gather(torch.cat(indices))
        self.quantised = []
        perplexity = self.codebook.update(*every, self.tokenizer.codebook, generators[0])
        self._share_codes()
        return {"perplexity": perplexity, "codes_used": (self.codebook.count > 1).float().mean().item()}

    def _share_codes(self) -> None:
        distributed.broadcast(self.tokenizer.codebook.data, *self.codebook.buffers())

    @torch.no_grad()
    def validate(self, images: np.ndarray) -> tuple[Terms, np.ndarray]:
        found = []
        for subject in reversed(images):
            with self.autocast():
                z = self.tokenizer.encode(torch.from_numpy(subject[None]).to(self.device).float())
                codes, _ = self.tokenizer.quantise(z.float())
                (result,) = self.tokenizer.decode(codes if self.codebook.started else z, joint=self.cardiac).float()
            found.append(self._compare(result, subject))
        names = ("val_psnr", "val_ssim")
        terms = dict(zip(names, map(float, np.mean(found, axis=0)), strict=True))
        return terms, _picture(images[0], result.cpu().numpy())

    @torch.no_grad()
    def export(self, folder: Path) -> None:
        """Measure the latents' mean and deviation per channel on the training images, then write the folder."""
        self.tokenizer.eval()
        batches = (torch.from_numpy(x[None]).to(self.device).float() for x in self.images[:64])
        z = torch.cat([self.tokenizer.encode(x) for x in batches])
        flat = z.movedim(2, -1).flatten(0, -2)
        self.tokenizer.latent_mean.copy_(flat.mean(0))
        self.tokenizer.latent_std.copy_(flat.std(0).clamp_min(1e-6))
        if self.settings.readout_steps:
            self.read_out()
        self.tokenizer.train()
        checkpoint.save(folder, self.config, tokenizer=self.tokenizer)

    def read_out(self) -> None:
        """Fit the prompt encoders' linear layers and the heads to the pooled features of all training subjects."""
        vae, features = self.tokenizer, []
        for subject in self.images:
            x = torch.from_numpy(subject[None]).to(self.device).float()
            for view in (x,) if self.cardiac else (x, x.flip(3)):
                with self.autocast():
                    features.append(vae.features_of_each(vae.encode(view)).float())
        self.fit_heads(torch.cat(features))

    @torch.enable_grad()
    def fit_heads(self, features: Tensor) -> None:
        """The part of `read_out` that trains, on features [N, m, 3, b].

        They are computed once, so that thousands of steps take seconds, and brought to mean 0 and deviation 1, which
        the first layer takes over at the end. AdamW, cosine decay, batches of 32.
        """
        vae, settings = self.tokenizer, self.settings
        layers = [e.mlp for e in vae.prompt_encoders if isinstance(e, PromptEncoder)]
        mean, deviation = features.mean((0, 1)), features.std((0, 1)).clamp_min(1e-9)
        every = (features - mean) / deviation
        scale_prompts(vae, every.flatten(0, 1))
        weights = [p for module in (*layers, vae.heads) for p in module.parameters()]
        optimizer = torch.optim.AdamW(weights, READOUT_LR, weight_decay=0.01)
        for step in range(settings.readout_steps):
            rng = np.random.default_rng((settings.seed, settings.steps + step))
            for group in optimizer.param_groups:
                group["lr"] = READOUT_LR * 0.5 * (1 + math.cos(math.pi * step / settings.readout_steps))
            chosen = torch.from_numpy(rng.choice(len(every), min(32, len(every)), replace=False)).to(self.device)
            loss = weigh(self.judge(rng, every[chosen]), 1.0)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            for mlp, center, scale in zip(layers, mean, deviation, strict=True):
                mlp[0].weight /= scale
                mlp[0].bias -= mlp[0].weight @ center


def _check_crop(crop: int, divisors: Triple, image: Triple) -> None:
    if crop < 0 or any(crop % c or crop > n for c, n in zip(divisors[:2], image[:2], strict=True)):
        raise CopeditError(f"crop = {crop}: must divide by {divisors[:2]} and fit into the image's plane {image[:2]}")


class DenoiserTask(Task):
    """Stage II: mean squared error of the predicted clean latents of all elements (equation 5), or with less weight on
    the observed ones, or with the decoded image's beside it."""

    def __init__(
        self, config: ModelConfig, settings: Settings, images: np.ndarray, tokenizer: CoPeVAE, cache: Path | None = None
    ):
        """cache: file for the latents of all images, their prompts beside it, read where an earlier run left it."""
        super().__init__(config, settings)
        self.denoiser = build_denoiser(config)
        self.average = build_denoiser(config).requires_grad_(False)
        self.average.load_state_dict(self.denoiser.state_dict())
        if settings.checkpointing:
            memory.checkpoint_activations(self.denoiser)
        self.to(self.device)
        # The tokenizer is frozen: latents and the prompts of single elements are computed once. In a list, so that
        # checkpoints do not hold it.
        self.frozen = [tokenizer.to(self.device).requires_grad_(False)]
        self.images = images
        if settings.augment:
            if settings.crop or settings.image_weight:
                raise CopeditError(
                    "augment: in stage II it goes neither with crop nor with image_weight; set them to 0"
                )
            images, cache = images[:16], None  # enough to whiten with
        self.views = 1 if self.cardiac else 2  # a row is a subject, or a subject and whether it is mirrored
        self.latents, self.prompts = self._encode(images, cache)
        if settings.image_weight:
            if 0 < settings.crop <= 2 * CROP_RIM:
                raise CopeditError(f"crop = {settings.crop}: image_weight needs more than {2 * CROP_RIM} voxels")
            self.average_decoder = self.frozen[0].decoder  # for validation and export
            self.decoder = Decoder(config.tokenizer).to(self.device)
            self.decoder.load_state_dict(self.average_decoder.state_dict())
        if settings.crop:
            self._prepare_crops()
        if settings.whiten:
            self._whiten()
            self.average.load_state_dict(self.denoiser.state_dict())
        self.levels = torch.from_numpy(alpha_bar(config.diffusion)).float()
        if settings.last_timestep:
            # Sampling begins with nothing but noise. What shines through at alpha-bar 0.015 is lost then, and a network
            # that was taught to look for it takes its absence for a dark image (Lin et al. 2024).
            self.levels[-1] = 0.0
        # Not an attribute of its own either: a compiled module holds the same weights under other names.
        self.predict = [torch.compile(self.denoiser, dynamic=False) if settings.compile else self.denoiser]

    @torch.no_grad()
    def _encode(self, images: np.ndarray, cache: Path | None) -> tuple[Tensor, Tensor]:
        """Normalised latents (float16) and prompts of each element alone, of all subjects and their mirror images.

        On a CPU the latents are mapped from `cache`, as those of many subjects may not fit into memory.
        """
        if cache is None:
            pairs = list(self._views(images))
            return torch.cat([z.half() for z, _ in pairs]), torch.cat([prompts for _, prompts in pairs])
        digest = hashlib.sha256(b"".join(x.cpu().numpy().tobytes() for x in self.frozen[0].state_dict().values()))
        key = torch.tensor(list(digest.digest()), dtype=torch.uint8)
        beside = cache.with_name("prompts.safetensors")  # written last: with it all is there
        found = checkpoint.read_tensors(beside)[0] if cache.exists() and beside.exists() else {}
        if not found or not torch.equal(found["tokenizer"], key):
            beside.unlink(missing_ok=True)
            each = []
            rows, m = self.views * len(images), len(self.config.elements)
            with new_cache(cache, (rows, m, self.config.tokenizer.latent_channels, *self.config.latent)) as kept:
                for i, (z, prompts) in enumerate(self._views(images)):
                    kept[i] = z[0].half().cpu().numpy()
                    each.append(prompts)
            found = {"prompts": torch.cat(each).cpu(), "tokenizer": key}
            checkpoint.write_tensors(beside, found)
        mapped = torch.from_numpy(np.load(cache, mmap_mode="c"))
        return mapped.to(self.device), found["prompts"].to(self.device)

    def _views(self, images: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
        for subject in images:
            x = torch.from_numpy(subject[None]).to(self.device).float()
            for view in (x, x.flip(3))[: self.views]:
                yield self._encoded(view)

    @torch.no_grad()
    def _encoded(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised latents of images [B, m, 1, H, W, D] and the prompts [B, m, 3, P] of each element alone."""
        (vae,) = self.frozen
        with self.autocast():
            z = vae.encode(images).float()
            return vae.normalise(z), vae.prompts_of_each(z)

    def _net(self) -> MDiT3D:
        if not isinstance(self.denoiser, MDiT3D):
            raise CopeditError(f"whiten is for transformers; leave it at 0 for {self.config.name}")
        return self.denoiser

    @torch.no_grad()
    def _prepare_crops(self) -> None:
        """How likely each crop of each subject is to be drawn: in proportion to what happens in it.

        Half of a skull-stripped brain's grid is background, which is learned at once. Every backbone is given the same
        crops.
        """
        (h, w, _), (p, q, r) = self.config.tokenizer.compression, self.config.denoiser.patch
        _check_crop(self.settings.crop, (h * p, w * q, 1), self.config.image)
        self.size = (self.settings.crop // (h * p), self.settings.crop // (w * q))
        if self.config.denoiser.backbone == "unet" and (self.settings.crop // h % 4 or self.settings.crop // w % 4):
            raise CopeditError(
                f"crop = {self.settings.crop}: a UNet halves latents twice; divide by {4 * h} and {4 * w}"
            )
        activity = []
        for z in self.latents.split(16):
            values = rearrange(z.float(), "b m c (h p) (w q) (d r) -> b m h w d (p q r) c", p=p, q=q, r=r)
            variance = values.var(-2, correction=0).mean(-1).mean((1, 4)) + 1e-6
            activity.append(nn.functional.avg_pool2d(variance[:, None], self.size, stride=1)[:, 0])
        crops = torch.cat(activity).double()
        self.columns = crops.shape[2]
        self.chances = (crops / crops.sum((1, 2), keepdim=True)).flatten(1).cpu().numpy()

    @torch.no_grad()
    def _whiten(self) -> None:
        """Scale the principal components of a token's values in the input layer, see `Settings.whiten`.

        The first component of a token of a simulated brain has 10,000 times the variance of the last; the detail in
        the small ones is learned late, or not at all, where it enters as small as it is.
        """
        net, whiten = self._net(), self.settings.whiten
        some = torch.from_numpy(np.random.default_rng(self.settings.seed).permutation(len(self.latents))[:32])
        tokens = net.patchify(self.latents[some.to(self.device)].float()).flatten(0, 2)
        variance, components = torch.linalg.eigh(tokens.mT @ tokens / len(tokens))
        kept = min(net.config.width, len(variance))
        variance, components = variance[-kept:], components[:, -kept:]
        scale = variance.clamp_min(WHITEN_FLOOR * variance.sum()) ** -whiten
        scale *= (net.config.width / (scale.square() * variance).sum()).sqrt()
        rotation, _ = torch.linalg.qr(torch.randn(net.config.width, kept, device=self.device))
        net.embed.weight.copy_(rotation @ (components * scale).mT)

    def _crop(self, chosen: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Latents of one random crop of each chosen subject, and where it begins, [B, 2] in tokens."""
        drawn = [rng.choice(self.chances.shape[1], p=self.chances[i]) for i in chosen]
        corner = torch.tensor([divmod(int(k), self.columns) for k in drawn])
        (p, q, _), (h, w) = self.config.denoiser.patch, self.size
        crops = [
            self.latents[i, ..., p * x : p * (x + h), q * y : q * (y + w), :]
            for i, (x, y) in zip(chosen, corner.tolist(), strict=True)
        ]
        return torch.stack(crops).float(), corner.to(self.device)

    def forward(self, step: int, part: int) -> tuple[Tensor, Terms]:
        return self.loss(step, *randomness(self.settings.seed, step, part))

    def loss(self, step: int, rng: np.random.Generator, generator: torch.Generator) -> tuple[Tensor, Terms]:
        settings, batch = self.settings, self.settings.batch_size
        cropped = settings.crop > 0 and step < settings.steps - settings.whole_steps
        if settings.crop and not cropped:
            (h, w, _), (p, q, _) = self.config.latent, self.config.denoiser.patch
            batch = max(1, batch * math.prod(self.size) // (h // p * w // q))
        every = len(self.images) * self.views
        rows = rng.choice(every, batch, replace=every < batch)
        chosen, self.drawn = torch.from_numpy(rows).to(self.device), rows // self.views
        corner = None
        if self.augmentation:
            images = self.load(rows // self.views, rows % self.views == 1)
            z0, prompts = self._encoded(self.augmentation(images, rng.integers(2**32, size=batch)))
        elif cropped:
            (z0, corner), prompts = self._crop(rows, rng), self.prompts[chosen]
        else:
            z0, prompts = self.latents[chosen].float(), self.prompts[chosen]
        observed = draw_observed(rng, batch, z0.shape[1], self.cardiac).to(self.device)
        weight = (observed.float() / observed.sum(1, keepdim=True))[:, :, None, None]
        prompts = (prompts * weight).sum(1)
        t = torch.from_numpy(rng.integers(0, len(self.levels), batch))
        if settings.last_timestep:
            t[torch.from_numpy(rng.random(batch) < settings.last_timestep)] = len(self.levels) - 1
        eps = torch.randn(z0.shape, generator=generator).to(self.device)
        zt = add_noise(z0, eps, self.levels[t].to(self.device), observed)
        with self.autocast():
            where = () if corner is None else (corner,)
            x0 = self.predict[0](zt, t.to(self.device), prompts, observed, *where)
        error = (x0.float() - z0).square().mean((2, 3, 4, 5))
        importance = torch.where(observed, settings.observed_weight, 1.0)
        loss = (error * importance).sum() / importance.sum()
        terms = {"mse": error.mean().item(), "mse_missing": error.detach()[~observed].mean().item()}
        if settings.image_weight:
            chance = rng.random(tuple(observed.shape))
            image_error = self._image_error(x0.float(), z0, observed, rows, corner, chance)
            loss = loss + settings.image_weight * image_error.mean().log()
            terms["image_mse"] = image_error.mean().item()
        return loss, terms

    def _image_error(
        self, x0: Tensor, z0: Tensor, observed: Tensor, rows: np.ndarray, corner: Tensor | None, chance: np.ndarray
    ) -> Tensor:
        """Mean squared error [N] of decoded images against the training images: of all missing slabs, which are decoded
        with the others, or of one missing modality a subject.

        x0, z0: predicted and true latents, of whole images or of the crops that begin at corner [B, 2] (in tokens).
        chance: [B, m]; of the missing modalities that with the largest is looked at.
        """
        (vae,) = self.frozen
        images = self.load(rows // self.views, rows % self.views == 1)
        if self.cardiac:
            z = torch.where(observed[:, :, None, None, None, None], z0, x0)
        else:
            element = torch.from_numpy(chance).to(self.device).masked_fill(observed, -1.0).argmax(1)
            one = torch.arange(len(x0), device=self.device), element
            z, images = x0[one][:, None], images[one][:, None]
        z = vae.denormalise(z)
        if vae.config.quantise:  # straight through, as in stage I
            z = z + (vae.quantise(z.detach())[0] - z).detach()
        with self.autocast():
            output = self.decoder(self._volumes(z)).float()
        output = torch.stack(output.chunk(z.shape[1], -1), 1) if self.cardiac else output[:, None]
        if corner is not None:
            (a, b, _), (p, q, _) = self.config.tokenizer.compression, self.config.denoiser.patch
            starts = [(a * p * int(i), b * q * int(j)) for i, j in corner]
            h, w = output.shape[3:5]
            images = torch.stack([x[..., i : i + h, j : j + w, :] for x, (i, j) in zip(images, starts, strict=True)])
            images, output = (x[..., CROP_RIM:-CROP_RIM, CROP_RIM:-CROP_RIM, :] for x in (images, output))
        error = (output - images).square().mean((2, 3, 4, 5))
        return error[~observed] if self.cardiac else error[:, 0]

    @torch.no_grad()
    def after_step(self, step: int) -> Terms:
        # A short ramp, so that the average forgets the random start.
        decay = min(self.settings.ema, (1 + step) / (10 + step))
        pairs: list[tuple[nn.Module, nn.Module]] = [(self.average, self.denoiser)]
        if self.settings.image_weight:
            pairs.append((self.average_decoder, self.decoder))
        for average, trained in pairs:
            for slow, fast in zip(average.parameters(), trained.parameters(), strict=True):
                slow.lerp_(fast, 1 - decay)
        return {}

    @torch.no_grad()
    def validate(self, images: np.ndarray) -> tuple[Terms, np.ndarray]:
        """Per number of missing elements, one pattern a subject, always the same: also the squared error of the
        normalised latents; averaged weights, the sampler's defaults."""
        (vae,), m = self.frozen, len(self.config.elements)
        found: dict[str, list[float]] = {}
        for i, subject in reversed(list(enumerate(images))):
            rng, generator = randomness(self.settings.seed, i, 0)
            with self.autocast():
                z = vae.encode(torch.from_numpy(subject[None]).to(self.device).float()).float()
            order, start = rng.permutation(m), int(rng.integers(0, m))
            for count in range(1, m):
                missing = np.sort(order[:count]) if not self.cardiac else min(start, m - count) + np.arange(count)
                observed = torch.ones(1, m, dtype=torch.bool)
                observed[:, missing] = False
                observed = observed.to(self.device)
                noise = torch.randn(z.shape, generator=generator).to(self.device)
                begin = torch.where(observed[:, :, None, None, None, None], vae.normalise(z), noise)
                with self.autocast():
                    prompts = vae.prompts(z, observed)

                    def predict(x: Tensor, t: Tensor, p: Tensor = prompts, o: Tensor = observed) -> Tensor:
                        return self.average(x, t, p, o).float()

                    latents = sample(predict, begin, observed, self.config.diffusion, self.config.diffusion.steps)
                    (result,) = vae.images(latents, joint=self.cardiac).float()
                error = (latents - vae.normalise(z))[0, missing].square().mean().item()
                noise_ratio, similarity = self._compare(result[missing], subject[missing])
                found.setdefault(f"val_psnr_{count}", []).append(noise_ratio)
                found.setdefault(f"val_ssim_{count}", []).append(similarity)
                found.setdefault(f"val_mse_{count}", []).append(error)
        terms = {name: float(np.mean(values)) for name, values in found.items()}
        return terms, _picture(images[0], result.cpu().numpy())

    def export(self, folder: Path) -> None:
        checkpoint.save(folder, self.config, tokenizer=self.frozen[0])
        half = torch.float16 if self.settings.export == "float16" else None
        checkpoint.save(folder, self.config, denoiser=self.average, dtype=half)


def learning_rate(settings: Settings, step: int) -> float:
    """Linear warm-up, then a cosine to zero (Tables 14 and 15)."""
    peak, steps = settings.lr, settings.steps - settings.prompt_steps
    if step >= steps and settings.prompt_steps:
        peak, step, steps = settings.prompt_lr or peak, step - steps, settings.prompt_steps
    if step < settings.warmup:
        return peak * (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, steps - settings.warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def run(
    stage: Stage,
    preset: str,
    output: Path,
    data: str = "phantom",
    overrides: Sequence[str] = (),
    resume: bool = False,
    config: ModelConfig | None = None,
) -> Path:
    """Train one stage, alone or as one of torchrun's processes, and return the model folder `output/model`.

    data: "phantom" or the folder of a data set, see `layouts.find`. config replaces the preset's model (its training
    settings stay). Raises CopeditError for bad settings, unusable data, an output folder in use, or a loss that is not
    finite; Stopped after SIGTERM or SIGINT, with a checkpoint of the step that was under way.
    """
    settings = load_settings(stage, preset, overrides)
    config = config or ModelConfig.preset(preset)
    with distributed.processes(settings.device):
        return _run(stage, preset, output, data, settings, resume, config)


def expected(stage: Stage, preset: str, data: str = "phantom", overrides: Sequence[str] = ()) -> str:
    """What a step of this run is expected to need of a GPU's memory, as text. Raises CopeditError as `run` does."""
    settings, config = load_settings(stage, preset, overrides), ModelConfig.preset(preset)
    subjects = settings.subjects
    if data != "phantom":
        subjects = len(layouts.split(layouts.find(Path(data), config).subjects)["train"])
    return memory.render(memory.estimate(stage, config, settings, subjects), settings)


def _run(
    stage: Stage, preset: str, output: Path, data: str, settings: Settings, resume: bool, config: ModelConfig
) -> Path:
    world = distributed.world()
    if settings.accumulate % world:
        raise CopeditError(
            f"accumulate = {settings.accumulate}: {world} processes cannot share so many micro-batches; set a multiple "
            f"of {world} (a step takes accumulate x batch_size subjects, however many processes there are)"
        )
    found = None if data == "phantom" else layouts.find(Path(data), config)
    described: dict[str, Any] = {"stage": stage, "settings": dataclasses.asdict(settings), "model": config.to_dict()}
    if found:
        described["data"] = str(Path(data).resolve())
    console = Console(stderr=True, quiet=distributed.rank() > 0)
    console.print_json(data=described["settings"])

    torch.manual_seed(settings.seed)
    with distributed.first(), _progress(console) as bar:
        if not distributed.rank():
            claim(output, described, resume)
        drawing = bar.add_task("preparing images", total=None, note="")

        def advance(done: int, total: int) -> None:
            bar.update(drawing, completed=done, total=total)

        if found:
            say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
            images = folder_images(config, found, output, advance, say)
        else:
            images = phantom_images(config, settings.subjects, output / "phantom.npy", advance)
    task: Task
    if stage == "tokenizer":
        task = TokenizerTask(config, settings, images)
    else:
        if not settings.tokenizer:
            raise CopeditError("the denoiser needs its tokenizer: add --set tokenizer=FOLDER (stage I's RUN/model)")
        trained, tokenizer, _ = checkpoint.load_tokenizer(checkpoint.locate(settings.tokenizer))
        if (trained.tokenizer, trained.elements, trained.image) != (config.tokenizer, config.elements, config.image):
            raise CopeditError(
                f"{settings.tokenizer}: its tokenizer is not the one of preset {preset}; train stage I again"
            )
        with distributed.first():
            task = DenoiserTask(config, settings, images, tokenizer, output / "latents.npy")

    held_out = None
    if settings.validate_every:
        with distributed.first():
            held_out = held_out_images(config, found, output, settings.validate_subjects)
        if not len(held_out):
            console.print("no validation: none of the held-out subjects can be used", highlight=False)
            held_out = None
    if stage == "tokenizer" and not settings.perceptual:
        console.print("no perceptual term: no weights are named (--set perceptual=FILE)", highlight=False)
    return fit(stage, output, task, resume, held_out, console)


def fit(stage: str, output: Path, task: Task, resume: bool, held_out: np.ndarray | None, console: Console) -> Path:
    """Train a task to the end, from its newest checkpoint where it resumes; returns the model folder."""
    optimizers = _optimizers(task, task.settings)
    start = _restore(output, task, optimizers) if resume else 0
    _loop(stage, output, task, optimizers, start, held_out, console)
    if not distributed.rank():
        task.export(output / "model")
    distributed.wait()
    return output / "model"


def _loop(
    stage: str,
    output: Path,
    task: Task,
    optimizers: Sequence[torch.optim.Optimizer],
    start: int,
    held_out: np.ndarray | None,
    console: Console,
) -> None:
    """Steps from `start` to the end, with the log, validation and checkpoints.

    Raises CopeditError for what is not finite and, all saved, Stopped after a signal.
    """
    settings, writes = task.settings, not distributed.rank()
    weights = [p for name, p in task.named_parameters() if p.requires_grad and not name.startswith("adversary.")]
    opponent = [p for name, p in task.named_parameters() if name.startswith("adversary.")]
    share = settings.accumulate // distributed.world()
    parts = range(distributed.rank() * share, (distributed.rank() + 1) * share)
    model: nn.Module = task
    if distributed.world() > 1:
        model = DistributedDataParallel(task, find_unused_parameters=task.sparse)
    path = output / "log.jsonl" if writes else Path(os.devnull)
    with (
        _progress(console) as bar,
        _Signals() as signals,
        open(path, "a", buffering=1, encoding="utf-8") as log,
        _board(output / "tensorboard", start, console) if writes else nullcontext() as board,
    ):
        shown = bar.add_task(stage, total=settings.steps, completed=start, note="")
        for step in range(start, settings.steps):
            began = time.perf_counter()
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(settings, step) * group.get("factor", 1.0)
            terms, subjects = _gradients(task, model, step, parts)
            norm, _ = (nn.utils.clip_grad_norm_(x, settings.clip).item() for x in (weights, opponent))
            if not (math.isfinite(terms["loss"]) and math.isfinite(norm)):
                _leave(_not_finite(step, terms, norm, subjects, study_names(output)))
            for optimizer in optimizers:
                optimizer.step()
            terms |= task.after_step(step) | {"gradient": norm, "seconds": time.perf_counter() - began}
            if held_out is not None and (step + 1) % settings.validate_every == 0 and writes:
                found, picture = task.validate(held_out)
                terms |= found
                if board:
                    board.add_image("validation/truth above result", picture, step, dataformats="HW")
            for name, value in terms.items():
                if board and (step % max(1, settings.steps // 10_000) == 0 or name.startswith("val_")):
                    board.add_scalar(name.replace("val_", "validation/"), value, step)
            log.write(json.dumps({"step": step} | {k: float(f"{v:.6g}") for k, v in terms.items()}) + "\n")
            bar.update(shown, advance=1, note=" ".join(f"{k} {v:.3g}" for k, v in terms.items()))
            stop = signals.agreed(task.device)
            if (step + 1) % settings.checkpoint_every == 0 or step + 1 == settings.steps or stop:
                if writes:
                    _store(output, step + 1, task, optimizers, settings.keep)
            if stop and step + 1 < settings.steps:
                distributed.wait()
                name = signal.Signals(stop).name
                _leave(Stopped(f"{name}: stopped after step {step}, and all is saved; go on with --resume", stop))


def _board(folder: Path, start: int, console: Console) -> Any:
    """Context of TensorBoard's writer, which hides what an interrupted run wrote from step `start` on; of None where
    there is no TensorBoard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        console.print("no TensorBoard: install the extra `train`; log.jsonl has all figures", highlight=False)
        return nullcontext()
    return SummaryWriter(str(folder), purge_step=start)


def _gradients(
    task: Task, model: nn.Module, step: int, parts: Sequence[int]
) -> tuple[Terms, list[tuple[Terms, np.ndarray]]]:
    """Leave the gradients of the mean loss over all micro-batches in the weights.

    model: the task, or what reduces its gradients over the processes. Returns the mean of the terms, and of each
    micro-batch of this process its own terms and subjects.
    """
    task.zero_grad(set_to_none=True)
    task.before_step(step, parts)
    each = []
    for part in parts:
        alone = isinstance(model, DistributedDataParallel) and part != parts[-1]
        with model.no_sync() if alone else nullcontext():  # type: ignore[operator]
            loss, terms = model(step, part)
            each.append((terms | {"loss": loss.item()}, task.drawn))
            (loss / len(parts)).backward()
    sums = torch.tensor([list(terms.values()) for terms, _ in each], dtype=torch.float64).sum(0)
    means = distributed.total(sums.to(task.device)) / task.settings.accumulate
    return dict(zip(each[0][0], means.tolist(), strict=True)), each


def _not_finite(
    step: int, terms: Terms, norm: float, each: list[tuple[Terms, np.ndarray]], names: Sequence[str]
) -> CopeditError:
    """The sentence for a loss or gradient that is not finite: which terms, and the subjects of the micro-batches."""
    guilty = [(own, rows) for own, rows in each if not all(map(math.isfinite, own.values()))]
    found: list[tuple[Terms, np.ndarray]] = [x for part in distributed.every_object(guilty or each) for x in part]  # type: ignore[attr-defined]
    found = [x for x in found if not all(map(math.isfinite, x[0].values()))] or found
    culprits = [f"{name} {value}" for own, _ in found[:1] for name, value in own.items() if not math.isfinite(value)]
    subjects = sorted({names[row] if names else f"phantom {row}" for _, rows in found for row in rows})
    return CopeditError(
        f"step {step}: {', '.join(culprits) or f'gradient {norm}'} on {', '.join(subjects)}; look at these images, or "
        f"start again with a lower lr"
    )


def _leave(error: CopeditError) -> NoReturn:
    """What all processes have found at the same time, process 0 says."""
    if distributed.rank():
        raise SystemExit(error.exit_code)
    raise error


class _Signals:
    """Inside, the first SIGTERM or SIGINT is only noted, so that the step can be finished and saved."""

    def __init__(self) -> None:
        self.noted = 0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            self.before = {n: signal.signal(n, self._note) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.noted = number
        if distributed.world() == 1:  # torchrun passes on what a terminal has sent to all already
            self.__exit__()

    def agreed(self, device: torch.device) -> int:
        """The signal that some process has got, for all; 0 if there was none."""
        every = distributed.gather(torch.tensor([self.noted], device=device))
        return int(every.max())


def _optimizers(task: Task, settings: Settings) -> list[torch.optim.Optimizer]:
    """AdamW (Adam where weight_decay is 0) for everything, or beside Muon for what it is not for."""
    every = [(name, p) for name, p in task.named_parameters() if p.requires_grad]
    opponent = [p for name, p in every if name.startswith("adversary.")]
    named = [(name, p) for name, p in every if not name.startswith("adversary.")]
    muon = (".blocks.", ".embed.", ".final.") if settings.optimizer == "muon" else ()
    matrices = [p for name, p in named if p.ndim == 2 and any(part in name for part in muon)]
    chosen = {id(p) for p in matrices}
    rest = [p for _, p in named if id(p) not in chosen]
    decay = settings.weight_decay
    # The fused one needs no copies of all weights, but is not there for every device.
    adam = partial(
        torch.optim.AdamW,
        lr=settings.lr,
        betas=(0.9, settings.beta2),
        weight_decay=decay,
        fused=task.device.type == "cuda" or None,
    )
    found: list[torch.optim.Optimizer] = [adam(group) for group in (rest, opponent) if group]
    if matrices:
        # Its step is scaled to the size of Adam's, so that both follow one learning rate.
        factor = (settings.muon_lr or settings.lr) / settings.lr
        group = {"params": matrices, "factor": factor}
        found.append(torch.optim.Muon([group], settings.lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
    return found


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, TextColumn("{task.fields[note]}"), console=console, disable=console.quiet)


def claim(output: Path, described: dict[str, Any], resume: bool) -> None:
    """Note in a folder which run it holds. Raises CopeditError where it holds another one, or is not to be resumed."""
    path = output / "run.json"
    if not path.exists():
        write_atomically(path, (json.dumps(described, indent=2) + "\n").encode())
    elif not resume:
        raise CopeditError(f"{output}: holds a run already; add --resume to go on with it, or choose another folder")
    elif _complete(json.loads(path.read_text())) != json.loads(json.dumps(described)):
        raise CopeditError(f"{output}: was started with other settings (see {path}); resume with the same ones")


def _complete(described: dict[str, Any]) -> dict[str, Any]:
    """A run as an older version described it, with the fields that have been added since."""
    model = ModelConfig.from_dict(described["model"])
    added = {f.name: f.default for f in dataclasses.fields(Settings) if f.default is not dataclasses.MISSING}
    return described | {"model": json.loads(json.dumps(model.to_dict())), "settings": added | described["settings"]}


def _checkpoints(output: Path) -> list[Path]:
    return sorted(output.glob("checkpoint-*[0-9]"))


def _store(output: Path, step: int, task: nn.Module, optimizers: Sequence[torch.optim.Optimizer], keep: int) -> None:
    """A folder of safetensors, complete or absent: written under another name, then renamed."""
    folder = output / f"checkpoint-{step:08d}"
    temporary = output / f"{folder.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    checkpoint.write_tensors(temporary / "task.safetensors", task.state_dict())
    flat = {
        f"{k}.{i}.{name}": value
        for k, optimizer in enumerate(optimizers)
        for i, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }
    checkpoint.write_tensors(temporary / "optimizer.safetensors", flat)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    for old in _checkpoints(output)[:-keep]:
        shutil.rmtree(old)


def _restore(output: Path, task: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> int:
    """Load the newest checkpoint; returns the number of steps done."""
    found = _checkpoints(output)
    if not found:
        return 0
    checkpoint.fill(task, checkpoint.read_tensors(found[-1] / "task.safetensors")[0], found[-1])
    flat, _ = checkpoint.read_tensors(found[-1] / "optimizer.safetensors")
    states: list[dict[int, dict[str, Tensor]]] = [{} for _ in optimizers]
    for key, value in flat.items():
        k, index, name = key.split(".", 2)
        states[int(k)].setdefault(int(index), {})[name] = value
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(found[-1].name.removeprefix("checkpoint-"))
