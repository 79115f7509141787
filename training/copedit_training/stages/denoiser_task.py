"""Stage II: the diffusion transformer, on the latents of a trained tokenizer (Section 3.3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from copedit_rt import checkpoint
from copedit_rt.config import ModelConfig
from copedit_rt.errors import CopeditError
from copedit_rt.images.grids import nearest_matrices
from copedit_rt.images.prepare import observed_slabs
from copedit_rt.networks.denoiser import MDiT3D, build_denoiser
from copedit_rt.networks.sampler import add_noise, sample
from copedit_rt.networks.tokenizer import CoPeVAE, Decoder
from copedit_rt.prior import WHOLE, Prior
from copedit_rt.prior_heart import SlicePrior
from copedit_rt.schedule import alpha_bar, begun
from copedit_training.data.prepared import draw_observed, draw_run
from copedit_training.evaluation.metrics import psnr
from copedit_training.stages.latent_task import LatentTask
from copedit_training.stages.prior import stack_of
from copedit_training.stages.settings import DenoiserSettings
from copedit_training.stages.task import (
    Batch,
    Terms,
    check_crop,
    checkpoint_activations,
    compare,
    device_of,
    picture,
    randomness,
)

WHITEN_FLOOR = 5e-4  # of the total variance; smaller components are not raised further
RELATIVE_FLOOR = 0.02  # of a prior's squared error, in variances of the latents: what is nearly right already
CROP_RIM = 6  # voxels at the edge of a crop that its image term leaves out, as the decoder knows nothing beyond


@dataclass(frozen=True)
class Noised(Batch):
    """A micro-batch of stage II.

    latents: normalised, of whole images or crops [B, m, c, h, w, d]; prompts: of each element alone [B, m, 3, P]; both
    None where images are augmented and so encoded in the step. corner: where crops begin [B, 2] in tokens (None:
    whole). images: [B, m, 1, H, W, D] of the same place, where they are augmented or joined by the image term (None:
    neither). fill: of the same place, what the prior makes of the missing elements, zeros elsewhere, or slabs with what
    it makes of a heart's missing slices (None: a model without one). observed: [B, m]. timesteps: [B]. noise: like
    latents. chance: [B, m], of the missing modalities that with the largest is the image term's (None: no such term).
    """

    latents: Tensor | None
    prompts: Tensor | None
    corner: Tensor | None
    images: Tensor | None
    fill: Tensor | None
    observed: Tensor
    timesteps: Tensor
    noise: Tensor
    chance: Tensor | None


def check(config: ModelConfig, settings: DenoiserSettings) -> None:
    """Raises CopeditError for settings that do not go together, not with the model, or not with this machine."""
    device_of(settings)
    crop, net = settings.crop, config.denoiser
    if settings.augment and (crop or settings.image_weight):
        raise CopeditError("augment: in stage II it goes neither with crop nor with image_weight; set them to 0")
    if settings.augment and net.prior and config.task.joint:
        raise CopeditError(f"augment: the prior of {config.name} takes hearts as they are; leave it false")
    if settings.image_weight and 0 < crop <= 2 * CROP_RIM:
        raise CopeditError(f"crop = {crop}: image_weight needs more than {2 * CROP_RIM} voxels")
    if settings.relative and not net.prior:
        raise CopeditError(f"relative: there is no prior in {config.name} to measure by; leave it false")
    if settings.whiten and net.backbone == "unet":
        raise CopeditError(f"whiten is for transformers; leave it at 0 for {config.name}")
    if crop:
        (h, w, _), (p, q, _) = config.tokenizer.compression, net.patch
        check_crop(crop, (h * p, w * q, 1), config.image)
        if net.backbone == "unet" and (crop // h % 4 or crop // w % 4):
            raise CopeditError(f"crop = {crop}: a UNet halves latents twice; divide by {4 * h} and {4 * w}")


class DenoiserTask(LatentTask[DenoiserSettings, Noised]):
    """Mean squared error of the predicted clean latents of all elements (equation 5), or with less weight on
    the observed ones, or with the decoded image's beside it."""

    def __init__(
        self,
        config: ModelConfig,
        settings: DenoiserSettings,
        images: np.ndarray,
        tokenizer: CoPeVAE,
        cache: Path | None = None,
        prior: Prior | SlicePrior | None = None,
    ):
        """prior: that of a model that takes one. cache: file for the latents of all images, their prompts beside it,
        read where an earlier run left it."""
        check(config, settings)
        super().__init__(config, settings)
        self.denoiser = build_denoiser(config).to(self.device)
        self.average = build_denoiser(config).requires_grad_(False).to(self.device)
        self.average.load_state_dict(self.denoiser.state_dict())
        self.module.denoiser, self.module.average = self.denoiser, self.average
        if settings.checkpointing:
            checkpoint_activations(self.denoiser)
        # Frozen: latents and the prompts of single elements are computed once, and checkpoints do not hold it.
        self.tokenizer = tokenizer.to(self.device).eval().requires_grad_(False)
        self.images, self.prior, self.exported = images, prior, config
        if settings.augment:
            images, cache = images[:16], None  # enough to whiten with
        if config.denoiser.prior:
            # Fills are drawn with the patterns and have to be encoded in the step; so is the rest of their crop then.
            self.latents, self.prompts = None, self._prompts(images, cache)
        else:
            self.latents, self.prompts = self._encode(images, cache)
        if settings.image_weight:
            self._prepare_decoder()
        if settings.crop:
            self._prepare_crops()
        if settings.whiten:
            self._whiten()
            self.average.load_state_dict(self.denoiser.state_dict())
        self.levels = torch.from_numpy(alpha_bar(config.diffusion)).float().to(self.device)
        self.timesteps = config.diffusion.most_steps  # those that sampling can visit
        if settings.last_timestep and config.diffusion.start == 1:
            # Sampling begins with nothing but noise. What shines through at alpha-bar 0.015 is lost then, and a network
            # that was taught to look for it takes its absence for a dark image (Lin et al. 2024).
            self.levels[-1] = 0.0
        self.predict: Callable[..., Tensor] = self.denoiser
        if settings.compile:
            self.predict = torch.compile(self.denoiser, dynamic=False)

    def _prepare_decoder(self) -> None:
        """The tokenizer's decoder becomes an average, for validation and export, of one that learns."""
        self.average_decoder = self.tokenizer.decoder
        self.decoder = Decoder(self.config.tokenizer).to(self.device)
        self.decoder.load_state_dict(self.average_decoder.state_dict())
        self.module.average_decoder, self.module.decoder = self.average_decoder, self.decoder

    @torch.no_grad()
    def _prepare_crops(self) -> None:
        """How likely each crop of each subject is to be drawn: in proportion to what happens in it.

        Half of a skull-stripped brain's grid is background, which is learned at once. Every backbone is given the same
        crops.
        """
        (h, w, _), (p, q, r) = self.config.tokenizer.compression, self.config.denoiser.patch
        self.size = (self.settings.crop // (h * p), self.settings.crop // (w * q))
        activity, depth = [], r * self.config.tokenizer.compression[2]
        for subject in self.images:
            x = torch.from_numpy(subject[:, 0]).float()
            values = rearrange(x, "m (h p) (w q) (d r) -> m h w d (p q r)", p=h * p, q=w * q, r=depth)
            variance = values.var(-1, correction=0).mean((0, 3)) + 1e-6
            crops = nn.functional.avg_pool2d(variance[None], self.size, stride=1)
            activity += [crops, crops.flip(1)][: self.views]
        every = torch.cat(activity).double()
        self.columns = every.shape[2]
        self.chances = (every / every.sum((1, 2), keepdim=True)).flatten(1).numpy()

    @torch.no_grad()
    def _whiten(self) -> None:
        """Scale the principal components of a token's values in the input layer, see `Settings.whiten`.

        The first component of a token of a simulated brain has 10,000 times the variance of the last; the detail in
        the small ones is learned late, or not at all, where it enters as small as it is.
        """
        net, whiten = self.denoiser, self.settings.whiten
        assert isinstance(net, MDiT3D)
        some = np.random.default_rng(self.settings.seed).permutation(len(self.images))[:16]
        z = torch.cat([self._encoded(torch.from_numpy(self.images[i][None]).to(self.device).float())[0] for i in some])
        tokens = net.patchify(z).flatten(0, 2)
        variance, components = torch.linalg.eigh(tokens.mT @ tokens / len(tokens))
        kept = min(net.config.width, len(variance))
        variance, components = variance[-kept:], components[:, -kept:]
        scale = variance.clamp_min(WHITEN_FLOOR * variance.sum()) ** -whiten
        scale *= (net.config.width / (scale.square() * variance).sum()).sqrt()
        rotation, _ = torch.linalg.qr(torch.randn(net.config.width, kept, device=self.device))
        values = rotation @ (components * scale).mT
        # Where there is a prior it holds all that is known, and what is noised hardly anything at first.
        net.embed.weight.copy_(torch.cat((0.1 * values, values), dim=1) if self.prior else values)

    def _corners(self, chosen: np.ndarray, rng: np.random.Generator) -> Tensor:
        """Where one random crop of each chosen subject begins, [B, 2] in tokens."""
        drawn = [rng.choice(self.chances.shape[1], p=self.chances[i]) for i in chosen]
        return torch.tensor([divmod(int(k), self.columns) for k in drawn])

    def _latents(self, chosen: np.ndarray, corner: Tensor | None) -> Tensor:
        """Latents of the chosen subjects, whole or the crops that begin at `corner`."""
        assert self.latents is not None
        if corner is None:
            return self.latents[torch.from_numpy(chosen)].float()
        (p, q, _), (h, w) = self.config.denoiser.patch, self.size
        crops = [
            self.latents[i, ..., p * x : p * (x + h), q * y : q * (y + w), :]
            for i, (x, y) in zip(chosen, corner.tolist(), strict=True)
        ]
        return torch.stack(crops).float()

    def draw(self, step: int, part: int) -> Noised:
        settings, batch = self.settings, self.settings.batch_size
        rng, generator = randomness(settings.seed, step, part)
        cropped = settings.crop > 0 and step < settings.steps - settings.whole_steps
        if settings.crop and not cropped:
            (h, w, _), (p, q, _) = self.config.latent, self.config.denoiser.patch
            batch = max(1, batch * math.prod(self.size) // (h // p * w // q))
        rows, subjects, mirrored = self.draw_rows(rng, batch)
        latents = prompts = images = fill = chance = None
        corner = self._corners(rows, rng) if cropped else None
        if self.augmentation:
            images = self.augmentation(self.load(subjects, mirrored), rng.integers(2**32, size=batch))
        observed = draw_observed(rng, batch, len(self.config.elements), self.config.task)
        if images is None and (self.prior or settings.image_weight):
            images = self.load(subjects, mirrored)
            if isinstance(self.prior, SlicePrior):
                observed, fill = self._runs(images, [draw_run(rng, stack_of(x).shape[-1]) for x in images.numpy()])
        if isinstance(self.prior, Prior):
            assert images is not None
            fill = self._fill(images, observed, corner)
        elif fill is not None and corner is not None:
            fill = self._cut(fill, corner)
        if images is not None and corner is not None:
            images = self._cut(images, corner)
        if self.latents is not None and not self.augmentation:
            latents = self._latents(rows, corner)
        if not self.augmentation:
            prompts = self.prompts[torch.from_numpy(subjects if self.prior else rows)]
        t = torch.from_numpy(rng.integers(0, self.timesteps, batch))
        if settings.last_timestep:
            t[torch.from_numpy(rng.random(batch) < settings.last_timestep)] = self.timesteps - 1
        noise = torch.randn(self._shape(batch, corner), generator=generator)
        if settings.image_weight:
            chance = torch.from_numpy(rng.random(tuple(observed.shape)))
        return Noised(step, part, subjects, latents, prompts, corner, images, fill, observed, t, noise, chance)

    def _shape(self, batch: int, corner: Tensor | None) -> tuple[int, ...]:
        """That of the latents of a micro-batch of whole images or crops."""
        h, w, d = self.config.latent
        if corner is not None:
            (p, q, _), (rows, columns) = self.config.denoiser.patch, self.size
            h, w = rows * p, columns * q
        return batch, len(self.config.elements), self.config.tokenizer.latent_channels, h, w, d

    def _fill(self, images: Tensor, observed: Tensor, corner: Tensor | None = None) -> Tensor:
        """What the prior makes of the missing elements of images [B, m, 1, H, W, D], zeros elsewhere, or the crops of
        it that begin at corner [B, 2] (in tokens)."""
        assert isinstance(self.prior, Prior)
        fill = []
        for x, there, within in zip(images.numpy(), observed.numpy(), self._crops(corner, len(images)), strict=True):
            made = np.zeros_like(x[:, :, *within])
            made[~there] = self.prior.fill(x, there, within)
            fill.append(made)
        return torch.from_numpy(np.stack(fill))

    def _runs(self, images: Tensor, runs: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Of hearts [B, m, 1, H, W, D] without these of their slices: which slabs count as observed [B, m], and the
        slabs with what the prior makes of those slices, as `prepare` and the prior have them of a file."""
        assert isinstance(self.prior, SlicePrior)
        m, depth = len(self.config.elements), self.config.image[2]
        observed, fills = [], []
        for x, missing in zip(images.numpy(), runs, strict=True):
            stack = stack_of(x)
            n = stack.shape[-1]
            inward = nearest_matrices(n, 1.0, m * depth, n / (m * depth))[0].astype(np.float32)
            observed.append(observed_slabs(missing, n, 1.0, n, m, depth))
            fills.append(np.split(self.prior.fill_stack(stack, missing) @ inward.T, m, axis=-1))
        return torch.from_numpy(np.stack(observed)), torch.from_numpy(np.array(fills))[:, :, None]

    def _crops(self, corner: Tensor | None, count: int) -> list[tuple[slice, slice, slice]]:
        """Where the crops of so many images lie that begin at corner [count, 2] (in tokens; None: they are whole)."""
        if corner is None:
            return [WHOLE] * count
        (a, b, _), (p, q, _), size = self.config.tokenizer.compression, self.config.denoiser.patch, self.settings.crop
        starts = [(a * p * int(i), b * q * int(j)) for i, j in corner]
        return [(slice(i, i + size), slice(j, j + size), slice(None)) for i, j in starts]

    def _cut(self, images: Tensor, corner: Tensor) -> Tensor:
        """Of images [B, m, 1, H, W, D] the crops that begin at corner [B, 2] (in tokens)."""
        crops = self._crops(corner, len(images))
        return torch.stack([x[..., *within] for x, within in zip(images, crops, strict=True)])

    def loss(self, batch: Noised) -> tuple[Tensor, Terms]:
        settings, observed, z0, prompts = self.settings, batch.observed, batch.latents, batch.prompts
        if prompts is None:
            assert batch.images is not None
            z0, prompts = self._encoded(batch.images)
        if z0 is None:
            assert batch.images is not None
            z0 = self._encode_alone(batch.images)
        prior = self._begun(z0, batch)
        weight = (observed.float() / observed.sum(1, keepdim=True))[:, :, None, None]
        prompts = (prompts * weight).sum(1)
        zt = add_noise(z0, batch.noise, self.levels[batch.timesteps], observed)
        if prior is not None:  # a heart's observed slab may lack a slice
            zt = torch.where(observed[:, :, None, None, None, None], prior, zt)
        with self.autocast():
            x0 = self.predict(zt, batch.timesteps, prompts, observed, batch.corner, prior)
        error = (x0.float() - z0).square().mean((2, 3, 4, 5))
        importance = torch.where(observed, settings.observed_weight, 1.0)
        if settings.relative and prior is not None:
            filled = (prior - z0).square().mean((2, 3, 4, 5)) + RELATIVE_FLOOR
            importance = torch.where(observed, importance, importance / filled)
        share = torch.where(observed, settings.observed_weight, 1.0) if settings.relative else importance
        loss = (error * importance).sum() / share.sum()
        terms = {"mse": error.mean().item(), "mse_missing": error.detach()[~observed].mean().item()}
        if settings.image_weight:
            image_error = self._image_error(x0.float(), z0, batch, prior)
            loss = loss + settings.image_weight * image_error.mean().log()
            terms["image_mse"] = image_error.mean().item()
        return loss, terms

    @torch.no_grad()
    def _begun(self, z0: Tensor, batch: Noised) -> Tensor | None:
        """Latents of the fill, and of what is observed its own (None: a model without a prior)."""
        if batch.fill is None:
            return None
        if isinstance(self.prior, SlicePrior):
            return self._encode_alone(batch.fill)
        missing = ~batch.observed
        begun = z0.clone()
        begun[missing] = self._encode_alone(batch.fill[missing][None])[0]
        return begun

    def _image_error(self, x0: Tensor, z0: Tensor, batch: Noised, prior: Tensor | None) -> Tensor:
        """Mean squared error [N] of decoded images against the training images: of all missing slabs, which are decoded
        with the others, or of one missing modality a subject. x0, z0: predicted and true latents; prior: those of the
        fill, whose decoded difference from the prediction is then added to the fill, as in `Synthesizer`."""
        images, observed = batch.images, batch.observed
        assert images is not None and batch.chance is not None
        if self.joint:
            z, fill = torch.where(observed[:, :, None, None, None, None], z0, x0), batch.fill
        else:
            element = batch.chance.masked_fill(observed, -1.0).argmax(1)
            one = torch.arange(len(x0), device=self.device), element
            z, images = x0[one][:, None], images[one][:, None]
            prior, fill = (None if x is None else x[one][:, None] for x in (prior, batch.fill))
        output = self._decoded(z)
        if prior is not None and fill is not None:
            output = fill + output - self._decoded(prior)
        if batch.corner is not None:
            images, output = (x[..., CROP_RIM:-CROP_RIM, CROP_RIM:-CROP_RIM, :] for x in (images, output))
        error = (output - images).square().mean((2, 3, 4, 5))
        return error[~observed] if self.joint else error[:, 0]

    def _decoded(self, z: Tensor) -> Tensor:
        """Images of normalised latents by the decoder that learns."""
        z = self.tokenizer.denormalise(z)
        if self.tokenizer.config.quantise:  # straight through, as in stage I
            z = z + (self.tokenizer.quantise(z.detach())[0] - z).detach()
        with self.autocast():
            output = self.decoder(self.volumes(z)).float()
        return torch.stack(output.chunk(z.shape[1], -1), 1) if self.joint else output[:, None]

    @torch.no_grad()
    def after_step(self, step: int) -> Terms:
        # A short ramp, so that the average forgets the random start.
        decay = min(self.settings.ema, (1 + step) / (10 + step))
        pairs: list[tuple[nn.Module, nn.Module]] = [(self.average, self.denoiser)]
        if self.settings.image_weight:
            pairs.append((self.average_decoder, self.decoder))
        for average, trained in pairs:
            get_ema_multi_avg_fn(decay)(list(average.parameters()), list(trained.parameters()), 0)
        return {}

    @torch.no_grad()
    def validate(self, images: np.ndarray) -> tuple[Terms, np.ndarray]:
        """Per number of missing elements, one pattern a subject, always the same: also the squared error of the
        normalised latents, and what is gained over the fill of a prior; averaged weights, the sampler's defaults."""
        if isinstance(self.prior, SlicePrior):
            return self._validate_runs(images)
        vae, m = self.tokenizer, len(self.config.elements)
        found: dict[str, list[float]] = {}
        for i, subject in reversed(list(enumerate(images))):
            rng, generator = randomness(self.settings.seed, i, 0)
            with self.autocast():
                z = vae.encode(torch.from_numpy(subject[None]).to(self.device).float()).float()
            order, start = rng.permutation(m), int(rng.integers(0, m))
            for count in range(1, m):
                missing = min(start, m - count) + np.arange(count) if self.joint else np.sort(order[:count])
                observed = torch.ones(1, m, dtype=torch.bool)
                observed[:, missing] = False
                observed = observed.to(self.device)
                noise = torch.randn(z.shape, generator=generator).to(self.device)
                there = observed[:, :, None, None, None, None]
                prior = None
                if self.prior:
                    fill = self._fill(torch.from_numpy(subject[None]).float(), observed.cpu()).to(self.device)
                    prior = torch.where(there, vae.normalise(z), self._encode_alone(fill))
                begin = torch.where(there, vae.normalise(z), begun(self.config.diffusion, noise, prior))
                with self.autocast():
                    prompts = vae.prompts(z, observed)

                    def predict(
                        x: Tensor, t: Tensor, p: Tensor = prompts, o: Tensor = observed, b: Tensor | None = prior
                    ) -> Tensor:
                        return self.average(x, t, p, o, prior=b).float()

                    latents = sample(predict, begin, observed, self.config.diffusion, self.config.diffusion.steps)
                    (result,) = vae.images(latents, joint=self.joint).float()
                    if prior is not None:
                        result = fill[0] + result - vae.images(prior, joint=self.joint).float()[0]
                error = (latents - vae.normalise(z))[0, missing].square().mean().item()
                noise_ratio, similarity = compare(result[missing], subject[missing])
                if prior is not None:
                    before, _ = compare(fill[0].cpu()[missing], subject[missing])
                    found.setdefault("val_gain", []).append(noise_ratio - before)
                found.setdefault(f"val_psnr_{count}", []).append(noise_ratio)
                found.setdefault(f"val_ssim_{count}", []).append(similarity)
                found.setdefault(f"val_mse_{count}", []).append(error)
        terms = {name: float(np.mean(values)) for name, values in found.items()}
        return terms, picture((images[0], result.cpu().numpy()))

    def _validate_runs(self, images: np.ndarray) -> tuple[Terms, np.ndarray]:
        """Of hearts: PSNR of a quarter, half and three quarters missing, from the base, the middle and the apex in
        turn; and what it gains over the prior's fill."""
        found: dict[str, list[float]] = {}
        shown: list[np.ndarray] = []
        for i, subject in enumerate(images.astype(np.float32)):
            n = stack_of(subject).shape[-1]
            for quarter in (1, 2, 3):
                length = min(max(1, round(n * quarter / 4)), n - 1)
                start = (0, (n - length) // 2, n - length)[(i + quarter) % 3]
                fill, made = self._made(subject, range(start, start + length))
                truth, fill, made = (np.concatenate(list(x[:, 0]), -1) for x in (subject, fill, made))
                there = (fill == truth).all((0, 1))
                noise, before = (psnr(x[..., ~there], truth[..., ~there]) for x in (made, fill))
                found.setdefault(f"val_psnr_{quarter}", []).append(noise)
                found.setdefault("val_gain", []).append(noise - before)
                shown = shown or [subject, np.stack(np.split(made, len(subject), axis=-1))[:, None]]
        return {name: float(np.mean(values)) for name, values in found.items()}, picture(shown)

    @torch.no_grad()
    def _made(self, subject: np.ndarray, run: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """The prior's fill of a heart [m, 1, H, W, D] without a run of slices, and the model's; averaged weights, the
        sampler's defaults."""
        vae = self.tokenizer
        observed, fill = (x.to(self.device) for x in self._runs(torch.from_numpy(subject[None]), [run]))
        prior, noise = self._encode_alone(fill), randomness(self.settings.seed, len(run), 0)[1]
        begin = torch.randn(prior.shape, generator=noise).to(self.device)
        begin = torch.where(observed[:, :, None, None, None, None], prior, begin)
        with self.autocast():
            prompts = vae.prompts(vae.denormalise(prior), observed)
            predict = lambda x, t: self.average(x, t, prompts, observed, prior=prior).float()  # noqa: E731
            latents = sample(predict, begin, observed, self.config.diffusion, self.config.diffusion.steps)
            made = fill + vae.images(latents, joint=True).float() - vae.images(prior, joint=True).float()
        return fill[0].cpu().numpy(), made[0].clamp(0, 1).cpu().numpy()

    @torch.no_grad()
    def settle(self, images: np.ndarray) -> str:
        """A correction that gains nothing on held-out subjects is left out: the prior alone is exported."""
        if self.prior is None:
            return ""
        gain = self.validate(images)[0]["val_gain"]
        if gain > 0:
            return f"the correction gains {gain:.2f} dB over the prior on {len(images)} held-out subjects"
        self.exported = self.config.prior_alone()
        return f"the correction loses {-gain:.2f} dB on {len(images)} held-out subjects: the model does without"

    def export(self, folder: Path) -> None:
        checkpoint.save(folder, self.exported, tokenizer=self.tokenizer)
        if self.prior:
            self.prior.save(folder)
        half = torch.float16 if self.settings.export == "float16" else None
        checkpoint.save(folder, self.exported, denoiser=self.average, dtype=half)
