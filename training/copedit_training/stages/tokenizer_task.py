"""Stage I: an autoencoder with a codebook, and the prompt encoders beside it (Section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from copedit_rt import checkpoint
from copedit_rt.config import ModelConfig
from copedit_rt.errors import CopeditError
from copedit_rt.networks.tokenizer import CoPeVAE, PromptEncoder
from copedit_training.data.patients import read_patients, varied
from copedit_training.data.prepared import draw_observed
from copedit_training.stages import distributed, prior
from copedit_training.stages.losses import (
    PRETEXT,
    Adversary,
    EMACodebook,
    Perceptual,
    position_loss,
    pretext_losses,
    scale_prompts,
    weigh,
)
from copedit_training.stages.progress import counted
from copedit_training.stages.settings import TokenizerSettings
from copedit_training.stages.task import (
    Batch,
    Task,
    Terms,
    check_crop,
    checkpoint_activations,
    compare,
    picture,
    randomness,
)
from copedit_training.stages.wavelets import start_as_wavelets

READOUT_LR = 3e-3
READOUT_NOISE = 0.05  # deviations of a feature
READOUT_SHARE = 0.25  # of `patients_share`: with all of it a few scanners are learnt by heart (card of brain-2mm)
HELD_OUT = 10  # one subject in so many is left out of the read-out, where there are enough, to calibrate the heads on


@dataclass(frozen=True)
class Views(Batch):
    """A micro-batch of stage I: whole images [B, m, 1, H, W, D], mirrored or augmented; where the crop begins (None:
    whole); the missing patterns [draws, B, m] of the pretext tasks (None: not in this step)."""

    images: Tensor
    corner: tuple[int, int] | None
    observed: Tensor | None
    generator: torch.Generator


@dataclass(frozen=True)
class Shared:
    """What the micro-batches of a step see of each other: latents of all whole images [N, m, c, h, w, d], without
    gradients; this process's own latents by part, with theirs; the missing patterns [draws, N, m]; which of the parts
    is this process's first."""

    latents: Tensor
    own: dict[int, Tensor]
    observed: Tensor
    first: int


def check_prior(config: ModelConfig, settings: TokenizerSettings) -> None:
    """Raises CopeditError for a prior without steps, steps without a prior, patients and phantoms that nothing would be
    learnt from, and shares that leave none."""
    fitted = config.denoiser.prior and not config.task.joint  # that of hearts is solved, not descended to
    if fitted != (settings.prior_steps > 0):
        has, remedy = ("a", "set more than 0") if fitted else ("no", "leave it at 0")
        raise CopeditError(
            f"prior_steps = {settings.prior_steps}: {config.name} has {has} prior that is fitted in steps; {remedy}"
        )
    if settings.patients and not fitted and not settings.readout_steps:
        raise CopeditError(
            f"patients = {settings.patients!r}: patients join a fitted prior and the read-out, but there is neither; "
            f"set readout_steps, or leave it out"
        )
    if not settings.phantoms_share:
        return
    if config.task.joint or not config.denoiser.prior:
        raise CopeditError(
            f"phantoms_share: phantoms join the prior of a brain model, and {config.name} has none; leave it at 0"
        )
    if settings.phantoms_share + settings.patients_share > 0.9:
        raise CopeditError("phantoms_share and patients_share: together at most 0.9; lower one of them")


class TokenizerTask(Task[TokenizerSettings, Views]):
    """L1 + vector quantisation + pretext tasks (equation 4).

    What the micro-batches of a step share: the codes, which move once after it towards the vectors of all; and the
    pretext tasks, which see the latents of all, so that negatives and the statistics of batch normalisation are those
    of the whole batch. Latents are small enough for that; those of other micro-batches are constants, and as the mean
    of the parts' gradients is taken, a micro-batch's own weigh as many times as there are parts.
    """

    def __init__(self, config: ModelConfig, settings: TokenizerSettings, images: np.ndarray | None = None):
        """images: None where they come later, see `on`."""
        super().__init__(config, settings)
        self.centres: prior.Centres | None = None
        if images is not None:
            self.images = images
        check_prior(config, settings)
        self.patients = read_patients(Path(settings.patients), config) if settings.patients else []
        crop = settings.crop
        for size in (crop, settings.prompt_crop):
            check_crop(size, config.tokenizer.compression, config.image)
        self.tokenizer: CoPeVAE = CoPeVAE(config.tokenizer, len(config.elements)).to(
            memory_format=torch.channels_last_3d  # type: ignore[call-overload]
        )
        if settings.wavelets:
            start_as_wavelets(self.tokenizer)
        self.codebook = EMACodebook(config.tokenizer.codes, config.tokenizer.latent_channels)
        (h, w, d), m = config.image, len(config.elements)
        self.adversary: Adversary | None = None
        if settings.adversarial_from >= 0:
            self.adversary = Adversary((crop or h, crop or w, d * m if self.joint else d))
        self.module.tokenizer, self.module.codebook = self.tokenizer, self.codebook
        self.module.adversary = self.adversary  # type: ignore[assignment]
        self.module.register_buffer("scaled", torch.tensor(False))
        self.perceptual = Perceptual(Path(settings.perceptual), self.device) if settings.perceptual else None
        if settings.checkpointing:
            checkpoint_activations(self.tokenizer)
        self.shared: Shared | None = None
        self.quantised: list[tuple[Tensor, Tensor, torch.Generator]] = []  # vectors, indices, of this step
        self.module.to(self.device)

    def on(self, images: np.ndarray, centres: prior.Centres | None = None) -> TokenizerTask:
        """The same task, of these images; centres: of the hearts in them, see `fit_slice_prior`."""
        self.images, self.centres = images, centres
        return self

    @property
    def sparse(self) -> bool:
        settings = self.settings
        return settings.pretext_every > 1 or settings.prompt_steps > 0 or settings.adversarial_from > 0

    def prompts_alone(self, step: int) -> bool:
        return step >= self.settings.steps - self.settings.prompt_steps

    def draw(self, step: int, part: int) -> Views:
        settings, alone = self.settings, self.prompts_alone(step)
        rng, generator = randomness(settings.seed, step, part)
        batch = settings.prompt_batch if alone else settings.batch_size
        rows = np.sort(rng.choice(len(self.images), batch, replace=len(self.images) < batch))
        # Left and right are interchangeable in a brain, not in a chest.
        mirrored = rng.random(batch) < 0.5 if self.config.task.mirrored else np.zeros(batch, dtype=bool)
        corner = None
        if settings.crop and not alone:
            x, y = (int(rng.integers(0, n - settings.crop + 1)) for n in self.config.image[:2])
            corner = x, y
        observed = self.patterns(rng, batch) if alone or step % settings.pretext_every == 0 else None
        seeds, images = rng.integers(2**32, size=batch), self.load(rows, mirrored)
        if self.augmentation:
            images = self.augmentation(images, seeds)
        if alone and (size := settings.prompt_crop):
            x, y = (int(rng.integers(0, n - size + 1)) for n in self.config.image[:2])
            images = images[:, :, :, x : x + size, y : y + size]
        return Views(step, part, rows, images, corner, observed, generator)

    def patterns(self, rng: np.random.Generator, batch: int) -> Tensor:
        """Missing patterns [draws, B, m] (bool, True: observed)."""
        shape, m = (self.settings.draws, batch), len(self.config.elements)
        return draw_observed(rng, shape[0] * shape[1], m, self.config.task).unflatten(0, shape)

    def begin(self, batches: Iterable[Views]) -> Iterable[Views]:
        """Encodes each micro-batch of a step with pretext tasks, once: one's loss needs the latents of all. What the
        backward passes need of the encoder is kept till then."""
        self.shared, self.quantised = None, []
        if self.settings.accumulate == 1:
            return batches
        batches = list(batches)
        if batches[0].observed is not None:
            own = {batch.part: self.encode(batch) for batch in batches}
            patterns = torch.cat([batch.observed for batch in batches if batch.observed is not None], dim=1)
            observed = distributed.gather(patterns.transpose(0, 1).byte()).transpose(0, 1).bool()
            self.shared = Shared(distributed.gather(torch.cat(list(own.values()))), own, observed, batches[0].part)
        return batches

    def encode(self, batch: Views) -> Tensor:
        """Latents of the whole images; without gradients in steps that train the prompts alone."""
        with self.autocast(), torch.set_grad_enabled(torch.is_grad_enabled() and not self.prompts_alone(batch.step)):
            return self.tokenizer.encode(batch.images)

    def pretext(self, batch: Views, z: Tensor) -> dict[str, Tensor]:
        """The pretext terms of the whole batch; z: latents of this micro-batch's whole images."""
        observed, first = batch.observed, True
        if self.shared:
            every, size, parts = self.shared.latents, len(z), self.settings.accumulate
            own = z.detach() + parts * (z - z.detach())
            z = torch.cat((every[: batch.part * size], own, every[(batch.part + 1) * size :]))
            observed, first = self.shared.observed, batch.part == self.shared.first
        norms = [x for x in self.tokenizer.prompt_encoders.modules() if isinstance(x, nn.BatchNorm3d)]
        for norm in norms:  # all micro-batches see the same statistics, which are noted once
            norm.track_running_stats = first
        features = self.tokenizer.features_of_each(z)
        for norm in norms:
            norm.track_running_stats = True
        if not self.module.scaled:
            scale_prompts(self.tokenizer, features.detach().flatten(0, 1))
            distributed.broadcast(*(p.data for p in self.tokenizer.prompt_encoders.parameters()))
            self.module.scaled.fill_(True)  # type: ignore[operator]
        assert observed is not None
        return self.judge(features, observed)

    def judge(self, features: Tensor, observed: Tensor) -> dict[str, Tensor]:
        """The pretext terms of pooled features [B, m, 3, b] under missing patterns [draws, B, m]."""
        each = self.tokenizer.prompts_of_features(features)
        return pretext_losses(self.tokenizer, each, observed, self.settings.position_loss)

    def loss(self, batch: Views) -> tuple[Tensor, Terms]:
        with self.autocast():
            whole = None
            if batch.observed is not None or not batch.corner:
                whole = self.shared.own.pop(batch.part) if self.shared else self.encode(batch)
            terms = self.pretext(batch, whole) if whole is not None and batch.observed is not None else {}
            if self.prompts_alone(batch.step):
                return self.weigh(terms, 1.0), {name: term.item() for name, term in terms.items()}
            images = batch.images
            if batch.corner:
                (x, y), size = batch.corner, self.settings.crop
                images = images[:, :, :, x : x + size, y : y + size]
            z = self.tokenizer.encode(images) if batch.corner else whole
            assert z is not None
            wide = z.float()
            if batch.step >= self.settings.quantise_from:
                wide, terms["commitment"] = self.quantise(wide, batch.generator)
            output = self.tokenizer.decode(wide, joint=self.joint)
            volumes = self.volumes(output), self.volumes(images)
            if self.perceptual:
                terms["perceptual"] = self.perceptual(*volumes)
            if self.adversary and batch.step >= self.settings.adversarial_from:
                terms |= self.adversary(*volumes)
        error = output.float() - images
        terms["l1"] = error.abs().mean()
        state = {"psnr": -10 * math.log10(max(error.detach().square().mean().item(), 1e-10))}
        loss = self.weigh(terms, PRETEXT * self.settings.pretext_every)
        return loss, {name: term.item() for name, term in terms.items()} | state

    def weigh(self, terms: dict[str, Tensor], pretext: float) -> Tensor:
        settings = self.settings
        return weigh(terms, pretext, (settings.count_weight, settings.position_weight, settings.contrast_weight))

    def quantise(self, z: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The codes of latents [B, m, c, h, w, d], straight through: the decoder sees the codes, the encoder the
        decoder's gradient; and the commitment term. Before the first quantisation codes are taken from the latents."""
        vectors = z.detach().movedim(2, -1).reshape(-1, z.shape[2])
        if not self.codebook.started:
            self.codebook.start(vectors, self.tokenizer.codebook, generator)
            self._share_codes()
        codes, index = self.tokenizer.quantise(z.detach())
        self.quantised.append((vectors, index.flatten(), generator))
        return z + (codes - z).detach(), (z - codes).square().mean()

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
                (result,) = self.tokenizer.decode(codes if self.codebook.started else z, joint=self.joint).float()
            found.append(compare(result, subject))
        names = ("val_psnr", "val_ssim")
        terms = dict(zip(names, map(float, np.mean(found, axis=0)), strict=True))
        return terms, picture((images[0], result.cpu().numpy()))

    @torch.no_grad()
    def export(self, folder: Path) -> None:
        """Measure the latents' mean and deviation per channel on the training images, then write the folder; fit the
        prior of a model that has one."""
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
        if self.config.denoiser.prior:
            phantoms = prior.phantoms_of(self.config, self.settings)
            made = prior.fit(self.config, self.settings, self.images, self.centres, self.patients, phantoms)
            made.save(folder)

    def read_out(self) -> None:
        """Fit the prompt encoders' linear layers and the heads to the pooled features of all training subjects, and of
        varied views of the patients where there are any."""
        features = []
        with counted("reading out", "subject") as progress:
            for done, subject in enumerate(self.images, 1):
                x = torch.from_numpy(subject[None]).to(self.device).float()
                for view in (x, x.flip(3)) if self.config.task.mirrored else (x,):
                    features.append(self.pooled(view))
                progress(done, len(self.images))
        complete = len(features)
        there = torch.ones(complete, len(self.config.elements), dtype=torch.bool)
        rng = np.random.default_rng(self.settings.seed)
        for patient in self.patients:
            have = torch.from_numpy(patient.there)
            for number in range(prior.VIEWS):
                x = self.pooled(torch.from_numpy(varied(patient, rng, number)[None, :, None]).to(self.device))
                x[:, ~have] = x[:, have].mean(1, keepdim=True)  # which the contrastive task takes for the rest
                features.append(x)
            there = torch.cat((there, have.expand(prior.VIEWS, -1)))
        views = complete // len(self.images)  # of a subject, which both are held out or neither
        held_out = len(self.images) // HELD_OUT * views * (complete >= 5 * HELD_OUT)
        counts = np.array([complete - held_out, len(features) - complete])
        share = READOUT_SHARE * self.settings.patients_share * bool(counts[1])
        chance = np.repeat(np.array([1 - share, share]) / np.maximum(counts, 1), counts)
        every = torch.cat(features)
        self.fit_heads(every[held_out:], there[held_out:], chance)
        if held_out:
            self.temper(every[:held_out])

    @torch.no_grad()
    def temper(self, features: Tensor) -> None:
        """Divide the logits of number and position by the temperature (Guo et al. 2017) that suits features [N, m, 3,
        b] of subjects that were left out of the read-out best, if it is above 1."""
        vae, rng = self.tokenizer, np.random.default_rng(self.settings.seed)
        weight = self.patterns(rng, len(features)).to(features)
        prompts = vae.prompts_of_features(features)
        weight = weight / weight.sum(-1, keepdim=True)
        count, which, _ = vae.assess(torch.einsum("kbm,bmip->kbip", weight, prompts).flatten(0, 1))
        missing = (weight == 0).flatten(0, 1)
        number = missing.sum(1) - 1
        terms = (lambda t: F.cross_entropy(count / t, number), lambda t: position_loss(which / t, missing))
        for head, term in zip(vae.heads, terms, strict=False):
            temperature = min(np.geomspace(1, 20, 100), key=lambda t: float(term(t)))
            layer = head[-1]  # type: ignore[index]
            layer.weight /= temperature
            layer.bias /= temperature

    def pooled(self, images: Tensor) -> Tensor:
        with self.autocast():
            return self.tokenizer.features_of_each(self.tokenizer.encode(images)).float()

    @torch.enable_grad()
    def fit_heads(self, features: Tensor, there: Tensor, chance: np.ndarray) -> None:
        """The part of `read_out` that trains, on features [N, m, 3, b]; there: [N, m], what each has at all; chance:
        [N], how often each is drawn.

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
            chosen = torch.from_numpy(rng.choice(len(every), min(32, len(every)), replace=False, p=chance))
            observed = self.patterns(rng, len(chosen)) & there[chosen]
            nothing = ~observed.any(-1)  # all that it has was to be missing: now it is what is there
            observed[nothing] = there[chosen].expand_as(observed)[nothing]
            given = every[chosen.to(self.device)]
            noise = READOUT_NOISE * torch.from_numpy(rng.standard_normal(given.shape, np.float32)).to(self.device)
            loss = self.weigh(self.judge(given + noise, observed.to(self.device)), 1.0)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            for mlp, center, scale in zip(layers, mean, deviation, strict=True):
                mlp[0].weight /= scale
                mlp[0].bias -= mlp[0].weight @ center
