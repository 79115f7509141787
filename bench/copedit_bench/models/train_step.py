"""The body of `copedit bench train-step`: one optimizer step of each stage, ours beside the same model as users write
it (`plain`), eager and through torch.compile: time, throughput and peak memory."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from copedit_bench.models.plain import PlainCodebook, PlainCoPeVAE, PlainMDiT3D
from copedit_bench.models.side_by_side import BASELINE, SEED, TINY, Answer, Contestant, SideBySide, chosen, perturb
from copedit_rt.config import ModelConfig
from copedit_rt.device import choose_device
from copedit_rt.networks.precision import exact_float32, tried_convolutions
from copedit_rt.networks.tokenizer import CoPeVAE
from copedit_training.stages.denoiser_task import DenoiserTask
from copedit_training.stages.settings import DenoiserSettings, Settings, Stage, TokenizerSettings, load_settings
from copedit_training.stages.step import clip, gradients, optimizers_of
from copedit_training.stages.task import Task
from copedit_training.stages.tokenizer_task import TokenizerTask

N = TypeVar("N", bound=nn.Module)

STAGES: tuple[Stage, ...] = ("tokenizer", "denoiser")
# Subjects a step on one GPU: the paper's batches (Tables 14 and 15), of the brain's tokenizer a micro-batch.
BATCHES = {
    ("brain-brats", "tokenizer"): 2,
    ("brain-brats", "denoiser"): 32,
    ("cardiac", "tokenizer"): 64,
    ("cardiac", "denoiser"): 64,
}
CHECKED = 2  # subjects of which loss and gradients are compared
BUDGET = 10.0  # seconds of samples a contestant


class _Denoising(DenoiserTask):
    """On random latents: what a tokenizer makes of images plays no part in a step of stage II."""

    def _encode(self, images: np.ndarray, cache: Path | None) -> tuple[Tensor, Tensor]:
        generator, config = torch.Generator().manual_seed(SEED), self.config
        shape = (self.views * len(images), len(config.elements))
        latents = (*shape, config.tokenizer.latent_channels, *config.latent)
        found = (torch.randn(size, generator=generator) for size in (latents, (*shape, 3, config.tokenizer.prompt_dim)))
        z, prompts = found
        return z.half(), prompts


class _PlainDenoising(_Denoising):
    """The same weights, computed plainly."""

    def __init__(self, config: ModelConfig, settings: DenoiserSettings, images: np.ndarray, tokenizer: CoPeVAE):
        super().__init__(config, settings, images, tokenizer)
        self.denoiser = self.module.denoiser = self.predict = _same(self.denoiser, PlainMDiT3D(config)).to(self.device)


class _PlainTokenizing(TokenizerTask):
    """The same weights, computed plainly; feature maps as torch lays them."""

    def __init__(self, config: ModelConfig, settings: TokenizerSettings, images: np.ndarray):
        super().__init__(config, settings, images)
        codes, channels = config.tokenizer.codes, config.tokenizer.latent_channels
        self.tokenizer = _same(self.tokenizer, PlainCoPeVAE(config.tokenizer, len(config.elements)))
        self.codebook = _same(self.codebook, PlainCodebook(codes, channels))
        self.module.tokenizer, self.module.codebook = self.tokenizer, self.codebook
        self.module.to(self.device)


def _same(net: nn.Module, plain: N) -> N:
    """plain with the weights of net."""
    plain.load_state_dict(net.state_dict())
    return plain


def run(
    presets: Sequence[str] | None = None,
    stages: Sequence[Stage] = STAGES,
    batch: int | None = None,
    device: str = "auto",
    compiled: bool = True,
    progress: Callable[[str], None] = lambda text: None,
    save: Callable[[dict[str, Any]], Any] = lambda report: None,
) -> dict[str, Any]:
    """JSON-able, see `SideBySide`; "per_second" counts subjects. Everything runs under autocast to bfloat16;
    what is right is the plain model in float32. batch: subjects a step, None for BATCHES. On a CPU a tiny model takes
    the place of the presets: nothing is to be learnt there but that it works. save: hears the report so far.

    Raises CopeditError as `side_by_side.chosen` does, and for devices that do not exist.
    """
    where = choose_device(device)
    models = chosen(presets, ("brain-brats", "cardiac"), where)
    bench = SideBySide("Training step", where, {torch.bfloat16}, "with weights, gradients and optimizer")
    for config in models:
        for stage in stages:
            size = batch or BATCHES.get((config.name, stage), CHECKED)
            settings = _settings(stage, config, size, str(where))
            what = {"model": config.name, "stage": stage, "batch": size}
            progress(", ".join(map(str, what.values())))
            with bench.watch.stream():
                state, exact = _truth(stage, config, settings)
            kinds = [BASELINE, "compile", "ours"] if compiled else [BASELINE, "ours"]
            makers = {kind: partial(_contestant, stage, config, settings, kind, state) for kind in kinds}
            bench.run(what, makers, exact, items=size, budget=BUDGET if where.type == "cuda" else 0.0)
            save(bench.report())
    return bench.report()


def _settings(stage: Stage, config: ModelConfig, batch: int, device: str) -> Settings:
    """Those of the preset, with the adversary where MONAI is installed and without the perceptual term, which needs
    weights from elsewhere."""
    kind = TokenizerSettings if stage == "tokenizer" else DenoiserSettings
    settings: Any = kind(10, batch, 1e-4) if config is TINY else load_settings(stage, config.name)
    own: dict[str, Any] = {"perceptual": ""} if stage == "tokenizer" else {"compile": False}
    if stage == "tokenizer" and importlib.util.find_spec("monai") is None:
        own["adversarial_from"] = -1
    return dataclasses.replace(settings, batch_size=batch, accumulate=1, device=device, **own)


def _task(stage: Stage, config: ModelConfig, settings: Any, kind: str) -> Task[Any, Any]:
    shape = (settings.batch_size, len(config.elements), 1, *config.image)
    images = np.random.default_rng(SEED).random(shape, np.float32)
    torch.manual_seed(SEED)
    if stage == "tokenizer":
        task = (TokenizerTask if kind == "ours" else _PlainTokenizing)(config, settings, images.astype(np.float16))
        if kind == "compile":
            task.tokenizer.encoder.compile(dynamic=False)
            task.tokenizer.decoder.compile(dynamic=False)
        return task
    vae = CoPeVAE(config.tokenizer, len(config.elements))
    found = (_Denoising if kind == "ours" else _PlainDenoising)(config, settings, images, vae)
    if kind == "compile":
        found.predict = torch.compile(found.denoiser, dynamic=False)
    return found


def _number(settings: Settings) -> int:
    """Of a step in which all terms of the loss take part."""
    if isinstance(settings, TokenizerSettings):
        return max(0, settings.quantise_from, settings.adversarial_from)
    return 0


def _truth(stage: Stage, config: ModelConfig, settings: Settings) -> tuple[dict[str, Tensor], Answer]:
    """Weights from which all start, on the host, and the plain model's loss and gradients in float32."""
    task = _task(stage, config, dataclasses.replace(settings, dtype="float32"), BASELINE)
    perturb(task.denoiser if isinstance(task, DenoiserTask) else task.tokenizer)  # type: ignore[attr-defined]
    with exact_float32():
        _answer(task, settings)  # codes and prompt encoders start from the first data that they see
        state = {name: x.detach().cpu().clone() for name, x in task.module.state_dict().items()}
        return state, _answer(task, settings)


def _answer(task: Task[Any, Any], settings: Settings) -> Answer:
    """Loss and gradients of a few subjects."""
    whole = task.settings
    task.settings = dataclasses.replace(whole, batch_size=min(CHECKED, whole.batch_size))
    terms, _ = gradients(task, task.module, [task.draw(_number(settings), 0)])
    every = [p.grad.float().flatten() for p in task.module.parameters() if p.grad is not None]
    found = {"loss": torch.tensor(terms["loss"]), "gradients": torch.cat(every).cpu()}
    task.module.zero_grad(set_to_none=True)
    task.settings = whole
    return found


def _contestant(
    stage: Stage, config: ModelConfig, settings: Settings, kind: str, state: dict[str, Tensor]
) -> Contestant:
    task = _task(stage, config, settings, kind)
    task.module.load_state_dict(state)
    if kind == "ours":
        optimizers = optimizers_of(task)
    else:
        weights = [p for p in task.module.parameters() if p.requires_grad]
        options = {"lr": settings.lr, "betas": (0.9, settings.beta2), "weight_decay": settings.weight_decay}
        optimizers = [torch.optim.AdamW(weights, **options)]  # type: ignore[arg-type]
    return Contestant(partial(_step, task, optimizers, settings), torch.bfloat16, partial(_answer, task, settings))


@tried_convolutions()
def _step(task: Task[Any, Any], optimizers: Sequence[torch.optim.Optimizer], settings: Settings) -> None:
    """As in the loop of `copedit_training.stages.trainer`."""
    number = _number(settings)
    gradients(task, task.module, [task.draw(number, 0)])
    clip(task)
    for optimizer in optimizers:
        optimizer.step()
    task.after_step(number)
