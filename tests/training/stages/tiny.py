"""A tiny model of each task, random smooth subjects, and training runs on them."""

import dataclasses
import json

import numpy as np
import torch

from copedit_rt import checkpoint
from copedit_rt.config import DenoiserConfig, DiffusionConfig, ModelConfig, TokenizerConfig
from copedit_training.stages import trainer
from copedit_training.stages.settings import load_settings

TINY = ModelConfig(
    "tiny",
    "brain",
    ("t1", "t2"),
    (16, 16, 8),
    TokenizerConfig(
        channels=(8, 8),
        strides=((2, 2, 2), (2, 2, 2)),
        residual_units=1,
        residual_channels=8,
        codes=32,
        prompt_channels=(8, 8),
        prompt_dim=16,
        contrast_dim=8,
    ),
    DenoiserConfig(width=32, heads=1, blocks=2, patch=(2, 2, 2)),
    DiffusionConfig(steps=4),
)
HEART = dataclasses.replace(
    TINY,
    name="tiny-heart",
    task="cardiac",
    elements=("slab0", "slab1", "slab2"),
    image=(16, 16, 4),
    denoiser=dataclasses.replace(TINY.denoiser, patch=(1, 1, 1)),
)
_COMMON = "dtype=float32 crop=8 batch_size=2 subjects=4 checkpoint_every=2 warmup=2"
SMALL = {
    "tokenizer": f"{_COMMON} quantise_from=0 pretext_every=2 prompt_steps=0 readout_steps=0".split(),
    "denoiser": f"{_COMMON} compile=false optimizer=adam whole_steps=0 whiten=0 last_timestep=0 observed_weight=1 "
    "image_weight=0 muon_lr=0".split(),
}


def smooth(config, subjects, cache=None, progress=None):
    """Random smooth volumes in place of phantoms, which cost 0.3 s each."""
    rng = np.random.default_rng(0)
    coarse = rng.random((subjects, len(config.elements), 1, 4, 4, config.image[2] // 2), dtype=np.float32)
    return coarse.repeat(4, 3).repeat(4, 4).repeat(2, 5)


def settings(stage, *overrides):
    return load_settings(stage, "demo-brain", (*SMALL[stage], *overrides))


def train(stage, folder, *overrides, config=TINY, resume=False):
    preset = "demo-cardiac" if config.task == "cardiac" else "demo-brain"
    return trainer.run(stage, preset, folder, overrides=(*SMALL[stage], *overrides), config=config, resume=resume)


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def weights(folder, name="task.safetensors"):
    return checkpoint.read_tensors(folder / name)[0]


def same_weights(a, b, name):
    first, second = weights(a, name), weights(b, name)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
