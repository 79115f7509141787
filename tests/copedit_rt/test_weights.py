"""The models inside the package: they load, they are small, and their cards say what they are."""

import pytest

from copedit_rt import checkpoint
from copedit_rt.config import ModelConfig

PRIOR_ALONE = ("brain-2mm", "heart-3mm")  # whose denoiser gains nothing


def test_both_tasks_have_a_built_in_model():
    assert checkpoint.list_models() == ["brain-2mm", "heart-3mm", "demo-brain", "demo-cardiac"]


@pytest.mark.parametrize("name", ["brain-2mm", "heart-3mm", "demo-brain", "demo-cardiac"])
def test_built_in_model(name):
    folder = checkpoint.locate(name)
    config, vae, _ = checkpoint.load_tokenizer(folder)
    files = ["README.md", "config.json", "denoiser.safetensors", "tokenizer.safetensors", "training.json"]
    assert sorted(p.name for p in folder.iterdir()) == sorted(files + ["prior.safetensors"] * config.denoiser.prior)
    checkpoint.load_prior(folder, config)
    checkpoint.load_denoiser(folder)
    preset = ModelConfig.preset(name)
    assert config == (preset.prior_alone() if name in PRIOR_ALONE else preset)
    assert (vae.latent_std != 1).all(), "latent statistics must be measured"
    for weights in folder.glob("*.safetensors"):
        assert weights.stat().st_size <= 12e6
    card = (folder / "README.md").read_text(encoding="utf-8")
    for word in ("copedit train tokenizer", "copedit train denoiser", "seed 0", "rained on", "not a medical device"):
        assert word in card, word
