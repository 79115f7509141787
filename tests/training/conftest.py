"""Tiny models with random weights, for what needs a whole model but not a good one."""

from dataclasses import replace
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """model_folder(preset): a folder with a tiny model of that preset's task."""
    import torch

    from copedit_rt import checkpoint
    from copedit_rt.config import ModelConfig
    from copedit_rt.networks.denoiser import build_denoiser
    from copedit_rt.networks.tokenizer import CoPeVAE

    root = tmp_path_factory.mktemp("models")
    small = {
        "channels": (4, 8),
        "strides": ((2, 2, 2), (2, 2, 2)),
        "residual_units": 1,
        "residual_channels": 4,
    }
    small |= {"codes": 16, "prompt_channels": (4, 8), "prompt_dim": 16, "contrast_dim": 8}

    def build(preset: str) -> Path:
        folder = root / preset
        if not folder.exists():
            config = ModelConfig.preset(preset)
            config = replace(
                config,
                image=(16, 16, 8 if config.task == "brain" else 4),
                tokenizer=replace(config.tokenizer, **small),
                denoiser=replace(config.denoiser, width=32, heads=2, blocks=2, patch=(1, 1, 1)),
                diffusion=replace(config.diffusion, steps=2),
            )
            torch.manual_seed(0)
            tokenizer = CoPeVAE(config.tokenizer, len(config.elements))
            denoiser = build_denoiser(config)
            for weight in denoiser.parameters():  # untrained output layers are zero
                torch.nn.init.normal_(weight, std=0.05)
            checkpoint.save(folder, config, tokenizer, denoiser)
        return folder

    return build


@pytest.fixture(autouse=True)
def few_voxels(monkeypatch):
    """A prior is fitted in steps of a quarter of the voxels."""
    monkeypatch.setattr("copedit_training.stages.prior.BATCH", 1024)
