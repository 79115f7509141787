"""A method of the paper's tables: a training task whose networks fill in what is missing from an image.

All of them draw the subjects, missing patterns and, where they need it, timesteps and noise that `DenoiserTask` draws
of whole images under the same seed, and are trained by the loop of both stages. What is ours in each is said in its own
file; widths that no publication gives are "our sizes".
"""

from __future__ import annotations

import copy
import dataclasses
import json
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar, cast

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn

from copedit_rt import checkpoint
from copedit_rt.config import ModelConfig
from copedit_rt.errors import CopeditError
from copedit_rt.files import read_json, write_atomically
from copedit_rt.networks.tokenizer import CoPeVAE
from copedit_rt.schedule import alpha_bar
from copedit_training.data.prepared import draw_observed
from copedit_training.methods import method
from copedit_training.stages.latent_task import LatentTask
from copedit_training.stages.settings import MethodSettings
from copedit_training.stages.task import Batch, Terms, compare, picture, randomness

METHOD, WEIGHTS = "method.json", "method.safetensors"  # of a model folder, beside `config.json`
Noise = Callable[[str, tuple[int, ...]], np.ndarray]  # element (or any other name), shape: standard normal, float32
M = TypeVar("M", bound=MethodSettings)


def of_elements(observed: Tensor) -> Tensor:
    """observed [B, m] as a mask that images and latents [B, m, c, H, W, D] are broadcast with."""
    return observed[:, :, None, None, None, None]


def to_slices(images: Tensor) -> Tensor:
    """Images [B, m, 1, H, W, D] as axial slices [B * D, m, H, W] of m channels; of a heart, slice k of each slab."""
    return rearrange(images, "b m 1 h w d -> (b d) m h w")


def from_slices(slices: Tensor, batch: int) -> Tensor:
    """The inverse of `to_slices`."""
    return rearrange(slices, "(b d) m h w -> b m 1 h w d", b=batch)


def of_slices(values: Tensor, depth: int) -> Tensor:
    """What belongs to each volume [B, ...], once for each of its slices [B * depth, ...]."""
    return values.repeat_interleave(depth, 0)


def least_squares(critic: nn.Module, made: Tensor, real: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The adversarial terms (Mao et al. 2017) in one backward pass: what `made` has to learn, whose gradient is made's
    alone, and what the critic has to, whose gradient is the critic's alone.

    wanted: what the critic is to say of `made`; broadcast with its answer. Of `real` it is to say 1.
    """
    frozen = {name: p.detach() for name, p in critic.named_parameters()}
    fooled = functional_call(critic, frozen, (made,)).float()
    fake, true = (critic(x).float() for x in (made.detach(), real))
    wrong = F.mse_loss(fake, wanted.float().expand_as(fake)) + (true - 1).square().mean()
    return (fooled - 1).square().mean(), 0.5 * wrong


@dataclass(frozen=True)
class Drawn(Batch):
    """A micro-batch of a method; what it does not read is None.

    observed: [B, m]. images: [B, m, 1, H, W, D] whole, or of `slices` slices each. latents: normalised [B, m, c, h, w,
    d]. prompts: of each element alone [B, m, 3, P]. timesteps: [B]. noise: like images or latents.
    """

    observed: Tensor
    images: Tensor | None = None
    latents: Tensor | None = None
    prompts: Tensor | None = None
    timesteps: Tensor | None = None
    noise: Tensor | None = None


class Method(LatentTask[M, Drawn], Generic[M]):
    """What a method's own class says:

    name, title: on the command line and in tables. space: whether it works on images or on the tokenizer's latents.
    kind: its settings. noised: whether it draws timesteps and noise. sliced: whether it draws `settings.slices` axial
    slices of each volume. guided: whether `settings.guidance` is for it. adjustable: settings that may be changed when
    a trained one is loaded. `network` (and `critic`), `objective`, `fill`.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    space: ClassVar[Literal["image", "latent"]]
    kind: ClassVar[type[MethodSettings]]
    noised: ClassVar[bool] = False
    sliced: ClassVar[bool] = False
    guided: ClassVar[bool] = False
    adjustable: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: ModelConfig, settings: M, tokenizer: CoPeVAE | None = None):
        """tokenizer: of a method on latents or with prompts. Raises CopeditError for settings that are not for it."""
        check(type(self), settings)
        super().__init__(config, settings)
        if tokenizer is not None:
            self.tokenizer = tokenizer.to(self.device).eval().requires_grad_(False)
        self.net = self.network(config, settings).to(self.device)
        self.module.net = self.net
        self.used: nn.Module = self.net
        if settings.ema:
            self.used = copy.deepcopy(self.net).requires_grad_(False)
            self.module.average = self.used
        if (critic := self.critic(config, settings)) is not None:
            self.module.adversary = critic.to(self.device)
        self.levels = torch.from_numpy(alpha_bar(config.diffusion)).float().to(self.device)

    @classmethod
    def needs_tokenizer(cls, settings: MethodSettings) -> bool:
        return cls.space == "latent" or settings.guidance == "full"

    # ------------------------------------------------------------------------------------- of each method its own

    @classmethod
    @abstractmethod
    def network(cls, config: ModelConfig, settings: M) -> nn.Module:
        """What fills in images: all weights of a trained method. It can be built under `torch.device("meta")`."""

    @classmethod
    def critic(cls, config: ModelConfig, settings: M) -> nn.Module | None:
        """A discriminator, `self.module.adversary`, with an optimizer and clipping of its own."""
        return None

    @abstractmethod
    def objective(self, batch: Drawn) -> tuple[Tensor, Terms]:
        """Loss of a micro-batch on the device, and what goes to the log, always the same names. Whatever draws random
        numbers in it, such as dropout, is seeded by the micro-batch."""

    @abstractmethod
    def fill(self, known: Tensor, observed: Tensor, noise: Noise) -> Tensor:
        """`synthesise` on the device, without its promises: known [B, m, 1, H, W, D] is 0 where nothing is observed,
        and what is returned may be anything where something is."""

    # ------------------------------------------------------------------------------------------------- training

    def on(self, images: np.ndarray, folder: Path | None = None) -> Self:
        """To be trained on images [N, m, 1, H, W, D]; what the tokenizer makes of them is kept in a folder."""
        cache = folder and folder / "latents.npy"
        self.images, self.each = images, cast("Tensor | None", None)
        if self.space == "latent":
            self.latents, self.each = self._encode(images, cache)
        elif self.settings.guidance == "full":
            self.each = self._prompts(images, cache)
        return self

    def patterns(self, rng: np.random.Generator, step: int, batch: int) -> Tensor:
        """Observed masks [B, m] of a micro-batch, as `DenoiserTask` draws them."""
        return draw_observed(rng, batch, len(self.config.elements), self.config.task)

    def draw(self, step: int, part: int) -> Drawn:
        batch = self.settings.batch_size
        rng, generator = randomness(self.settings.seed, step, part)
        rows, subjects, mirrored = self.draw_rows(rng, batch)
        drawn = Drawn(step, part, subjects, self.patterns(rng, step, batch))
        t = torch.from_numpy(rng.integers(0, len(self.levels), batch))
        if self.space == "latent":
            drawn = dataclasses.replace(drawn, latents=self.latents[torch.from_numpy(rows)].float())
        else:
            drawn = dataclasses.replace(drawn, images=self.load(subjects, mirrored, self._chosen(rng, batch)))
        if self.settings.guidance == "full":
            assert self.each is not None
            own = rows if self.space == "latent" else subjects
            drawn = dataclasses.replace(drawn, prompts=self.each[torch.from_numpy(own)])
        if self.noised:
            like = drawn.latents if drawn.images is None else drawn.images
            assert like is not None
            eps = torch.randn(like.shape, generator=generator)
            drawn = dataclasses.replace(drawn, timesteps=t, noise=eps)
        return drawn

    def _chosen(self, rng: np.random.Generator, batch: int) -> list[np.ndarray] | None:
        """The axial slices that are drawn of each volume, without one twice (None: all of them)."""
        depth = self.config.image[2]
        if not self.sliced or self.settings.slices >= depth:
            return None
        return [np.sort(rng.permutation(depth)[: self.settings.slices]) for _ in range(batch)]

    def load(self, rows: np.ndarray, mirrored: np.ndarray, slices: list[np.ndarray] | None = None) -> Tensor:
        """As `Task.load`; slices: of each image those along its depth."""
        if slices is None:
            return super().load(rows, mirrored)
        some = [torch.from_numpy(self.images[i][..., z]).float() for i, z in zip(rows, slices, strict=True)]
        return torch.stack([x.flip(2) if turn else x for x, turn in zip(some, mirrored, strict=True)])

    def prompts_of(self, batch: Drawn) -> Tensor | None:
        """Prompts [B, 3, P] of the observed elements of a micro-batch; None without guidance by them."""
        if batch.prompts is None:
            return None
        weight = batch.observed.float() / batch.observed.sum(1, keepdim=True)
        return (batch.prompts * weight[:, :, None, None]).sum(1)

    def precision(self) -> AbstractContextManager[Any]:
        """Of training: autocast on a GPU, and on a CPU float32, as bfloat16 convolutions can be wrong there."""
        return self._sound()

    def _sound(self) -> AbstractContextManager[Any]:
        return self.autocast() if self.device.type == "cuda" else nullcontext()

    @contextmanager
    def _seeded(self, batch: Drawn) -> Iterator[None]:
        """Torch's own generators as the micro-batch says, so that a resumed run needs no state of theirs."""
        seed = int(np.random.default_rng((self.settings.seed, batch.step, batch.part, 1)).integers(2**63))
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield

    def loss(self, batch: Drawn) -> tuple[Tensor, Terms]:
        with self._seeded(batch), self.precision():
            return self.objective(batch)

    @torch.no_grad()
    def after_step(self, step: int) -> Terms:
        if self.used is not self.net:
            # A short ramp, so that the average forgets the random start.
            decay = min(self.settings.ema, (1 + step) / (10 + step))
            get_ema_multi_avg_fn(decay)(list(self.used.parameters()), list(self.net.parameters()), 0)
        return {}

    def validate(self, images: np.ndarray) -> tuple[Terms, np.ndarray]:
        """Per number of missing elements, one pattern a subject, always the same."""
        found: dict[str, list[float]] = {}
        rows: tuple[np.ndarray, ...] = ()
        for i, subject in enumerate(images):
            truth = torch.from_numpy(subject[None]).float()
            every, elements = self.config.task.patterns, self.config.elements
            for count in range(1, len(elements)):
                missing = every(elements, count)[i % len(every(elements, count))]
                observed = torch.tensor([[name not in missing for name in elements]])
                made = self.synthesise(truth, observed, self._noise(i))[0].cpu()
                there = observed[0].numpy()
                noise_ratio, similarity = compare(made[~observed[0]], subject[~there])
                found.setdefault(f"val_psnr_{count}", []).append(noise_ratio)
                found.setdefault(f"val_ssim_{count}", []).append(similarity)
            rows = rows or (subject, made.numpy())
        return {name: float(np.mean(values)) for name, values in found.items()}, picture(rows)

    def _noise(self, subject: int) -> Noise:
        from copedit_rt.schedule import noise

        return lambda element, shape: noise(self.settings.seed, f"validation-{subject}", element, shape)

    # ------------------------------------------------------------------------------------------------ synthesis

    @torch.no_grad()
    def synthesise(self, images: Tensor, observed: Tensor, noise: Noise) -> Tensor:
        """Images [B, m, 1, H, W, D] in 0..1, float32, with what is not observed [B, m] filled in.

        Observed elements keep their bits, and what the others hold, NaN included, is not read. noise(element, shape):
        the same for every sample of the batch, as `schedule.noise` has it of a study; a sampler that needs more than
        one for an element asks under further names. Every sample needs an observed element.
        """
        images, observed = images.to(self.device), observed.to(self.device)
        there = of_elements(observed)
        training = self.used.training
        self.used.eval()
        with self._sound():
            made = self.fill(torch.where(there, images, 0.0), observed, noise)
        self.used.train(training)
        return torch.where(there, images, made.float().clamp(0, 1))

    def prompted(self, known: Tensor, observed: Tensor) -> Tensor | None:
        """Prompts [B, 3, P] of the observed elements of images; None without guidance by them."""
        if self.settings.guidance != "full":
            return None
        with self._sound():
            return self.tokenizer.prompts(self.tokenizer.encode(known).float(), observed).float()

    def noise_of(self, noise: Noise, batch: int, shape: Sequence[int], name: str = "") -> Tensor:
        """Noise [B, m, ...] of every element, of this shape each; name: set apart from the element's first."""
        each = [torch.from_numpy(noise(element + name, tuple(shape))) for element in self.config.elements]
        return torch.stack(each).expand(batch, *([-1] * (len(shape) + 1))).to(self.device)

    # --------------------------------------------------------------------------------------------------- folder

    def export(self, folder: Path) -> None:
        checkpoint.write_config(folder, self.config)
        said = {"method": self.name, "settings": dataclasses.asdict(self.settings)}
        write_atomically(folder / METHOD, (json.dumps(said, indent=2) + "\n").encode())
        checkpoint.write_tensors(folder / WEIGHTS, self.used.state_dict())
        if self.needs_tokenizer(self.settings):
            checkpoint.write_tensors(folder / checkpoint.TOKENIZER, self.tokenizer.state_dict())


def check(kind: type[Method[Any]], settings: MethodSettings, overrides: Sequence[str] = ()) -> None:
    """Raises CopeditError for settings that a method does not have, and overrides that it does not go by."""
    heeded = {"slices": kind.sliced, "sampler_steps": "sampler_steps" in kind.adjustable}
    heeded["tokenizer"] = kind.needs_tokenizer(settings)
    for item in overrides:
        if not heeded.get(item.partition("=")[0], True):
            raise CopeditError(f"--set {item}: {kind.title} does not go by it; leave it out")
    for name, idle in (("crop", 0), ("augment", False), ("checkpointing", False)):
        if (value := getattr(settings, name)) != idle:
            raise CopeditError(f"{name} = {value}: {kind.title} is trained without; leave it at {idle}")
    if settings.guidance != "none" and not kind.guided:
        raise CopeditError(f"guidance = {settings.guidance!r}: there is no place for it in {kind.title}; leave it out")


def parameters(kind: type[Method[Any]], config: ModelConfig, settings: MethodSettings) -> int:
    """How many weights fill in images; the network is built without any memory."""
    with torch.device("meta"):
        return sum(p.numel() for p in kind.network(config, settings).parameters())


def method_folder(run: Path) -> Path:
    """The model folder of a run, or the folder itself. Raises CopeditError where it holds no method."""
    for folder in (run, run / "model"):
        if (folder / METHOD).is_file():
            return folder
    raise CopeditError(f"{run}: no trained method there ({METHOD} is missing); give the output of copedit train method")


def load_method(run: Path, device: str = "auto", **changed: Any) -> Method[Any]:
    """A trained method of a run or its model folder, to be sampled with. changed: `adjustable` settings.

    Raises CopeditError for what is no such folder, damaged weights, and settings that cannot be changed.
    """
    folder = method_folder(run)
    config = checkpoint.read_config(folder)
    try:
        said = read_json(folder / METHOD)
        kind = method(said["method"])
        settings = kind.kind(**said["settings"] | {"device": device})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CopeditError(f"{folder / METHOD}: does not describe a method ({error}); train it again") from error
    for name in changed:
        if name not in kind.adjustable:
            able = ", ".join(kind.adjustable) or "nothing"
            raise CopeditError(f"{name}: cannot be changed in a trained {kind.title}; what can be is {able}")
    settings = dataclasses.replace(settings, **changed)
    tokenizer = checkpoint.load_tokenizer(folder)[1] if kind.needs_tokenizer(settings) else None
    made = kind(config, settings, tokenizer)
    checkpoint.fill(made.used, checkpoint.read_tensors(folder / WEIGHTS)[0], folder / WEIGHTS)
    return made
