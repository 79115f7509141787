"""Tiny models of brains with IXI's three modalities and of hearts, a tokenizer that loses nothing, and runs of methods.

A new method gets a line in `OPTIONS`; the tests of `test_every_method.py` then hold it to what all promise.
"""

import dataclasses
from functools import cache
from pathlib import Path

import numpy as np
import torch

from copedit_rt import checkpoint
from copedit_rt.config import DenoiserConfig, DiffusionConfig, ModelConfig, TokenizerConfig
from copedit_rt.networks.denoiser import build_denoiser
from copedit_rt.networks.tokenizer import CoPeVAE
from copedit_rt.schedule import noise as noise_of
from copedit_training.methods import fit as runs
from copedit_training.methods import method
from copedit_training.stages.settings import load_settings
from copedit_training.stages.wavelets import start_as_wavelets

BRAIN = ModelConfig(
    "tiny-ixi",
    "brain",
    ("t1", "t2", "pd"),
    (32, 32, 8),
    TokenizerConfig(
        channels=(16,),
        strides=((2, 2, 2),),
        residual_units=0,
        latent_channels=8,
        codes=16,
        prompt_channels=(4, 8),
        prompt_dim=16,
        contrast_dim=8,
        quantise=False,
    ),
    DenoiserConfig(width=32, heads=2, blocks=2, patch=(2, 2, 2)),
    DiffusionConfig(steps=4),
)
HEART = dataclasses.replace(
    BRAIN,
    name="tiny-heart",
    task="cardiac",
    elements=("slab0", "slab1", "slab2"),
    image=(32, 32, 4),
)
CONFIGS = {"brain": BRAIN, "heart": HEART}
COMMON = "steps=4 batch_size=2 accumulate=1 subjects=4 checkpoint_every=2 warmup=1 validate_every=0".split()
# Of each method, what makes it small; and where and how it learns one subject by heart in a few seconds.
_UNET = "width=16 widest=2 residual_blocks=1 attention=1 fold_plane=2 fold_depth=1 ema=0.5"
_FLAT = "batch_size=4 fold_depth=2 ema=0.9 sampler_steps=5"
OPTIONS = {
    "m2dn": "width=4 slices=2 sampler_steps=2 ema=0.5",
    "hyper-gae": "width=4 patch=24",
    "mmt": "width=8 heads=2 stages=2 window=2 patch=4 stem=4 critic_width=2 slices=2",
    "mmgan": "width=8 levels=3 critic_width=4 slices=2",
    "ldm": f"{_UNET} sampler_steps=3",
    "controlnet": f"{_UNET} sampler_steps=3 control_steps=2 control_lr=1e-3 embedding=4",
    "diffm4ri": "width=32 heads=2 blocks=2 sampler_steps=3",
}
HEARTS = {"ldm": "fold_depth=2", "controlnet": "fold_depth=2"}  # a latent of depth 1 is seen in two dimensions
OVERFIT = {
    "m2dn": ("heart", (32, 32, 4), "steps=30 lr=1e-2 batch_size=1"),
    "hyper-gae": ("brain", (16, 16, 8), "steps=50 lr=5e-3 batch_size=1 patch=16"),
    "mmt": ("heart", (16, 16, 4), "steps=60 lr=5e-3 batch_size=1"),
    "mmgan": ("brain", (32, 32, 8), "steps=25 lr=5e-3 batch_size=2 slices=4"),
    "ldm": ("heart", (16, 16, 4), "steps=40 lr=5e-3 batch_size=4 ema=0.9 sampler_steps=5"),
    # Fewer than 80 steps of its own are a matter of the seed and of rounding: 0.5 to 1.1 of the mean's error; 80: 0.6.
    "controlnet": ("brain", (16, 16, 4), f"steps=120 lr=5e-3 control_steps=80 control_lr=5e-3 {_FLAT}"),
    "diffm4ri": ("heart", (16, 16, 4), "steps=100 lr=5e-3 batch_size=4 ema=0.9 sampler_steps=5 resample=2"),
}


def smooth(config, subjects, cache=None, progress=None, first=0):
    """Random smooth volumes, whose elements have the same anatomy in other shades."""
    rng = np.random.default_rng(first)
    coarse = rng.random((subjects, 1, 1, 4, 4, config.image[2] // 2), dtype=np.float32)
    shades = np.linspace(0.2, 1, len(config.elements), dtype=np.float32)[None, :, None, None, None, None]
    images = np.abs(shades - coarse).repeat(config.image[0] // 4, 3).repeat(config.image[1] // 4, 4).repeat(2, 5)
    return images.astype(np.float16)


@cache
def tokenizer(config: ModelConfig) -> CoPeVAE:
    torch.manual_seed(0)
    vae = CoPeVAE(config.tokenizer, len(config.elements)).eval().requires_grad_(False)
    start_as_wavelets(vae)
    z = vae.encode(torch.from_numpy(smooth(config, 8)).float()).movedim(2, 0).flatten(1)
    vae.latent_mean.copy_(z.mean(1))
    vae.latent_std.copy_(z.std(1) + 0.1)
    return vae


def model(config: ModelConfig, folder: Path) -> Path:
    """A model folder with that tokenizer."""
    if not folder.exists():
        checkpoint.save(folder, config, tokenizer(config), build_denoiser(config))
    return folder


def preset_of(config: ModelConfig) -> str:
    return "demo-cardiac" if config.task == "cardiac" else "demo-brain"


def options(name: str, config: ModelConfig) -> list[str]:
    return [*COMMON, *OPTIONS[name].split(), *(HEARTS.get(name, "").split() if config.task.joint else ())]


def settings(name: str, config: ModelConfig, *overrides: str):
    given = (*options(name, config), *overrides)
    return load_settings(name, preset_of(config), given, kind=method(name).kind)


def task(name: str, config: ModelConfig, *overrides: str, images: np.ndarray | None = None):
    """A method, ready to be trained on four subjects."""
    torch.manual_seed(0)
    kind, told = method(name), settings(name, config, *overrides)
    made = kind(config, told, tokenizer(config) if kind.needs_tokenizer(told) else None)
    return made.on(smooth(config, 4) if images is None else images)


def train(name: str, folder: Path, config: ModelConfig, *overrides: str, resume: bool = False) -> Path:
    """A run with its checkpoints; the method's model folder."""
    given = [*options(name, config), *overrides]
    told = settings(name, config, *overrides)
    if method(name).needs_tokenizer(told) and not told.tokenizer:
        given.append(f"tokenizer={model(config, folder.parent / 'vae')}")
    return runs.fit(name, preset_of(config), folder, overrides=given, config=config, resume=resume)


def noise(element: str, shape: tuple[int, ...]) -> np.ndarray:
    return noise_of(0, "somebody", element, shape)


def observed_of(*rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.bool)


def stir(net: torch.nn.Module, std: float = 0.1) -> None:
    """Layers that start at zero hide what comes in."""
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in net.parameters():
            if weight.requires_grad is not None and not weight.any():
                weight.normal_(std=std)


def steps(made, count: int) -> list[float]:
    """So many steps of the trainer's, without its folder; the losses."""
    from copedit_training.stages.step import Optimization, clip, gradients, learning_rate

    optimization, losses = Optimization(made), []
    for step in range(count):
        optimization.set_rate(learning_rate(made.settings, step))
        terms, _ = gradients(made, made.module, [made.draw(step, 0)], optimization.scaler)
        optimization.unscale()
        clip(made)
        optimization.step()
        made.after_step(step)
        losses.append(terms["loss"])
    return losses
