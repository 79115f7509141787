"""Both training stages on one device: a loop that can be stopped anywhere and goes on exactly where it was.

Everything random at step i is drawn from generators seeded by (seed, i), so a resumed run needs no generator state.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from copedit_rt import checkpoint
from copedit_rt.config import ModelConfig, Triple
from copedit_rt.denoiser import MDiT3D, build_denoiser
from copedit_rt.diffusion import add_noise, alpha_bar
from copedit_rt.errors import CopeditError
from copedit_rt.files import write_atomically
from copedit_rt.synthesizer import choose_device
from copedit_rt.tokenizer import CoPeVAE, PromptEncoder
from training import layouts
from training.data import draw_observed, folder_images, phantom_images
from training.losses import PRETEXT, EMACodebook, pretext_losses, scale_prompts, weigh
from training.settings import Settings, Stage, load_settings

Terms = dict[str, float]
READOUT_LR = 3e-3
WHITEN_FLOOR = 5e-4  # of the total variance; smaller components are not raised further


class Task(nn.Module, ABC):
    """What is trained: its weights are all that a checkpoint needs besides the optimizer."""

    def __init__(self, config: ModelConfig, settings: Settings):
        super().__init__()
        self.config, self.settings = config, settings
        self.cardiac = config.task == "cardiac"
        self.device = choose_device(settings.device)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.dtype == "bfloat16")

    @abstractmethod
    def loss(self, step: int, rng: np.random.Generator, generator: torch.Generator) -> tuple[Tensor, Terms]:
        """Loss of one freshly drawn batch, and what goes to the log. generator is the CPU's on every device."""

    def after_step(self, step: int) -> None:
        """Called after each optimizer step."""

    @abstractmethod
    def export(self, folder: Path) -> None:
        """Write the model folder of the finished run."""


class TokenizerTask(Task):
    """Stage I: L1 + vector quantisation + pretext tasks (equation 4)."""

    scaled: Tensor

    def __init__(self, config: ModelConfig, settings: Settings, images: np.ndarray):
        super().__init__(config, settings)
        self.images = images
        _check_crop(settings.crop, config.tokenizer.compression, config.image)
        self.tokenizer: CoPeVAE = CoPeVAE(config.tokenizer, len(config.elements)).to(
            memory_format=torch.channels_last_3d  # type: ignore[call-overload]
        )
        self.codebook = EMACodebook(config.tokenizer.codes, config.tokenizer.latent_channels)
        self.register_buffer("scaled", torch.tensor(False))
        self.to(self.device)

    def draw(self, rng: np.random.Generator, batch: int) -> Tensor:
        """Whole images [batch, m, 1, H, W, D]."""
        chosen = rng.choice(len(self.images), batch, replace=len(self.images) < batch)
        images = torch.from_numpy(self.images[np.sort(chosen)]).to(self.device).float()
        if not self.cardiac:  # left and right are interchangeable in a brain, not in a chest
            flip = torch.from_numpy(rng.random(batch) < 0.5).to(self.device)
            images = torch.where(flip[:, None, None, None, None, None], images.flip(3), images)
        return images

    def pretext(self, rng: np.random.Generator, z: Tensor) -> dict[str, Tensor]:
        features = self.tokenizer.features_of_each(z)
        if not self.scaled:
            scale_prompts(self.tokenizer, features.detach().flatten(0, 1))
            self.scaled.fill_(True)
        return self.judge(rng, features)

    def judge(self, rng: np.random.Generator, features: Tensor) -> dict[str, Tensor]:
        """The pretext terms of pooled features [B, m, 3, b] under freshly drawn missing patterns."""
        shape = (self.settings.draws, len(features))
        observed = draw_observed(rng, shape[0] * shape[1], features.shape[1], self.cardiac).unflatten(0, shape)
        each = self.tokenizer.prompts_of_features(features)
        return pretext_losses(self.tokenizer, each, observed.to(self.device))

    def loss(self, step: int, rng: np.random.Generator, generator: torch.Generator) -> tuple[Tensor, Terms]:
        if step >= self.settings.steps - self.settings.prompt_steps:
            with self.autocast():
                with torch.no_grad():
                    z = self.tokenizer.encode(self.draw(rng, self.settings.prompt_batch))
                terms = self.pretext(rng, z)
            return weigh(terms, 1.0), {name: term.item() for name, term in terms.items()}
        whole = images = self.draw(rng, self.settings.batch_size)
        if size := self.settings.crop:
            x, y = (int(rng.integers(0, n - size + 1)) for n in images.shape[3:5])
            images = images[:, :, :, x : x + size, y : y + size]
        every, terms = self.settings.pretext_every, {}
        with self.autocast():
            z = self.tokenizer.encode(images)
            if step % every == 0:
                terms = self.pretext(rng, self.tokenizer.encode(whole) if size else z)
            wide, state = z.float(), {}
            if step >= self.settings.quantise_from:
                vectors = wide.detach().movedim(2, -1).reshape(-1, z.shape[2])
                self.codebook.start(vectors, self.tokenizer.codebook, generator)
                codes, index = self.tokenizer.quantise(wide.detach())
                terms["commitment"] = (wide - codes).square().mean()
                state["perplexity"] = self.codebook.update(vectors, index.flatten(), self.tokenizer.codebook, generator)
                state["codes_used"] = (self.codebook.count > 1).float().mean().item()
                # Straight through: the decoder sees the codes, the encoder the decoder's gradient.
                wide = wide + (codes - wide).detach()
            output = self.tokenizer.decode(wide, joint=self.cardiac)
        error = output.float() - images
        terms["l1"] = error.abs().mean()
        state["psnr"] = -10 * math.log10(max(error.detach().square().mean().item(), 1e-10))
        return weigh(terms, PRETEXT * every), {name: term.item() for name, term in terms.items()} | state

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
    """Stage II: mean squared error of the predicted clean latents, all elements (equation 5)."""

    def __init__(
        self, config: ModelConfig, settings: Settings, images: np.ndarray, tokenizer: CoPeVAE, cache: Path | None = None
    ):
        """cache: file for the latents and prompts of all images, read where an earlier run left it."""
        super().__init__(config, settings)
        self.denoiser = build_denoiser(config)
        self.average = build_denoiser(config).requires_grad_(False)
        self.average.load_state_dict(self.denoiser.state_dict())
        self.to(self.device)
        # The tokenizer is frozen: latents and the prompts of single elements are computed once. In a list, so that
        # checkpoints do not hold it.
        self.frozen = [tokenizer.to(self.device).requires_grad_(False)]
        self.latents, self.prompts = self._encode(images, cache)
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
        """Normalised latents (float16) and prompts of each element alone, of all subjects and their mirror images."""
        (vae,), latents, prompts = self.frozen, [], []
        digest = hashlib.sha256(b"".join(x.cpu().numpy().tobytes() for x in vae.state_dict().values())).digest()
        key = torch.tensor(list(digest), dtype=torch.uint8)
        if cache and cache.exists():
            found, _ = checkpoint.read_tensors(cache)
            if torch.equal(found["tokenizer"], key):
                return found["latents"].to(self.device), found["prompts"].to(self.device)
        for subject in images:
            x = torch.from_numpy(subject[None]).to(self.device).float()
            for view in (x,) if self.cardiac else (x, x.flip(3)):
                with self.autocast():
                    z = vae.encode(view).float()
                    prompts.append(vae.prompts_of_each(z))
                latents.append(vae.normalise(z).half())
        every = torch.cat(latents), torch.cat(prompts)
        if cache:
            checkpoint.write_tensors(cache, {"latents": every[0], "prompts": every[1], "tokenizer": key})
        return every

    def _net(self) -> MDiT3D:
        if not isinstance(self.denoiser, MDiT3D):
            raise CopeditError(f"crop and whiten are for transformers; leave them at 0 for {self.config.name}")
        return self.denoiser

    @torch.no_grad()
    def _prepare_crops(self) -> None:
        """How likely each crop of each subject is to be drawn: in proportion to what happens in it.

        Half of a skull-stripped brain's grid is background, which is learned at once.
        """
        (h, w, _), image, net = self.config.tokenizer.compression, self.config.image, self._net()
        divisors = (h * net.patch[0], w * net.patch[1], 1)
        _check_crop(self.settings.crop, divisors, image)
        self.size = (self.settings.crop // divisors[0], self.settings.crop // divisors[1])
        activity = []
        for z in self.latents.split(16):
            values = net.patchify(z.float()).unflatten(-1, (-1, net.channels))
            variance = values.var(-2).mean(-1).unflatten(2, net.grid).mean((1, 4)) + 1e-6
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
        (p, q, _), (h, w) = self._net().patch, self.size
        crops = [
            self.latents[i, ..., p * x : p * (x + h), q * y : q * (y + w), :]
            for i, (x, y) in zip(chosen, corner.tolist(), strict=True)
        ]
        return torch.stack(crops).float(), corner.to(self.device)

    def loss(self, step: int, rng: np.random.Generator, generator: torch.Generator) -> tuple[Tensor, Terms]:
        settings, batch = self.settings, self.settings.batch_size
        cropped = settings.crop > 0 and step < settings.steps - settings.whole_steps
        if settings.crop and not cropped:
            batch = max(1, batch * math.prod(self.size) // math.prod(self._net().grid[:2]))
        chosen = torch.from_numpy(rng.choice(len(self.latents), batch, replace=len(self.latents) < batch))
        if cropped:
            z0, corner = self._crop(chosen.numpy(), rng)
        else:
            z0, corner = self.latents[chosen.to(self.device)].float(), None
        observed = draw_observed(rng, batch, z0.shape[1], self.cardiac).to(self.device)
        weight = (observed.float() / observed.sum(1, keepdim=True))[:, :, None, None]
        prompts = (self.prompts[chosen.to(self.device)] * weight).sum(1)
        t = torch.from_numpy(rng.integers(0, len(self.levels), batch))
        if settings.last_timestep:
            t[torch.from_numpy(rng.random(batch) < settings.last_timestep)] = len(self.levels) - 1
        eps = torch.randn(z0.shape, generator=generator).to(self.device)
        zt = add_noise(z0, eps, self.levels[t].to(self.device), observed)
        with self.autocast():
            where = () if corner is None else (corner,)
            x0 = self.predict[0](zt, t.to(self.device), prompts, observed, *where)
        error = (x0.float() - z0).square().mean((2, 3, 4, 5))
        loss = error.mean()
        return loss, {"mse": loss.item(), "mse_missing": error.detach()[~observed].mean().item()}

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        # A short ramp, so that the average forgets the random start.
        decay = min(self.settings.ema, (1 + step) / (10 + step))
        for slow, fast in zip(self.average.parameters(), self.denoiser.parameters(), strict=True):
            slow.lerp_(fast, 1 - decay)

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
    """Train one stage and return the model folder `output/model`.

    data: "phantom" or the folder of a data set, see `layouts.find`. config replaces the preset's model (its training
    settings stay). Raises CopeditError for bad settings, unusable data, an output folder in use, or a loss that is not
    finite.
    """
    settings = load_settings(stage, preset, overrides)
    config = config or ModelConfig.preset(preset)
    found = None if data == "phantom" else layouts.find(Path(data), config)
    described: dict[str, Any] = {"stage": stage, "settings": dataclasses.asdict(settings), "model": config.to_dict()}
    if found:
        described["data"] = str(Path(data).resolve())
    _claim(output, described, resume)
    console = Console(stderr=True)
    console.print_json(data=described["settings"])

    torch.manual_seed(settings.seed)
    with _progress(console) as bar:
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
        task = DenoiserTask(config, settings, images, tokenizer, output / "latents.safetensors")

    weights = [p for p in task.parameters() if p.requires_grad]
    optimizers = _optimizers(task, settings)
    start = _restore(output, task, optimizers) if resume else 0
    with _progress(console) as bar, open(output / "log.jsonl", "a", buffering=1, encoding="utf-8") as log:
        shown = bar.add_task(stage, total=settings.steps, completed=start, note="")
        for step in range(start, settings.steps):
            began = time.perf_counter()
            rng = np.random.default_rng((settings.seed, step))
            generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(settings, step) * group.get("factor", 1.0)
            loss, terms = task.loss(step, rng, generator)
            if not math.isfinite(loss.item()):
                raise CopeditError(f"step {step}: the loss is {loss.item()} ({terms}); resume with a lower lr")
            task.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(weights, settings.clip)
            for optimizer in optimizers:
                optimizer.step()
            task.after_step(step)
            terms |= {"loss": loss.item(), "gradient": norm.item(), "seconds": time.perf_counter() - began}
            log.write(json.dumps({"step": step} | {k: float(f"{v:.6g}") for k, v in terms.items()}) + "\n")
            bar.update(shown, advance=1, note=" ".join(f"{k} {v:.3g}" for k, v in terms.items()))
            if (step + 1) % settings.checkpoint_every == 0 or step + 1 == settings.steps:
                _store(output, step + 1, task, optimizers, settings.keep)
    task.export(output / "model")
    return output / "model"


def _optimizers(task: Task, settings: Settings) -> list[torch.optim.Optimizer]:
    """AdamW (Adam where weight_decay is 0) for everything, or beside Muon for what it is not for."""
    named = [(name, p) for name, p in task.named_parameters() if p.requires_grad]
    muon = (".blocks.", ".embed.", ".final.") if settings.optimizer == "muon" else ()
    matrices = [p for name, p in named if p.ndim == 2 and any(part in name for part in muon)]
    chosen = {id(p) for p in matrices}
    rest = [p for _, p in named if id(p) not in chosen]
    decay = settings.weight_decay
    found: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, settings.lr, betas=(0.9, settings.beta2), weight_decay=decay)
    ]
    if matrices:
        # Its step is scaled to the size of Adam's, so that both follow one learning rate.
        factor = (settings.muon_lr or settings.lr) / settings.lr
        group = {"params": matrices, "factor": factor}
        found.append(torch.optim.Muon([group], settings.lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
    return found


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, TextColumn("{task.fields[note]}"), console=console)


def _claim(output: Path, described: dict[str, Any], resume: bool) -> None:
    path = output / "run.json"
    if not path.exists():
        write_atomically(path, (json.dumps(described, indent=2) + "\n").encode())
    elif not resume:
        raise CopeditError(f"{output}: holds a run already; add --resume to go on with it, or choose another folder")
    elif _complete(json.loads(path.read_text())) != json.loads(json.dumps(described)):
        raise CopeditError(f"{output}: was started with other settings (see {path}); resume with the same ones")


def _complete(described: dict[str, Any]) -> dict[str, Any]:
    """A run as an older version described it, with the fields of the model that have been added since."""
    model = ModelConfig.from_dict(described["model"])
    return described | {"model": json.loads(json.dumps(model.to_dict()))}


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
