"""What methods on latents share: noise and clean latents, folding, DDIM."""

import numpy as np
import pytest
import torch

from copedit_rt.config import ModelConfig
from copedit_rt.errors import CopeditError
from copedit_rt.schedule import alpha_bar, timesteps
from copedit_training.methods.latent import UNet, clean
from tests.training.methods.small import BRAIN, HEART, noise, settings, task, tokenizer


def test_clean_latents_are_found_from_the_noise():
    z0, eps, level = torch.randn(3, 2, 1, 4, 4, 2).double(), torch.randn(3, 2, 1, 4, 4, 2).double(), torch.rand(3)
    a = level.double()[:, None, None, None, None, None]
    torch.testing.assert_close(clean(a.sqrt() * z0 + (1 - a).sqrt() * eps, eps, level.double()), z0)


def test_a_step_is_the_textbooks():
    """Song et al. 2021, equation 12, with eta 0, for a network that sees noise."""
    made = task("ldm", BRAIN, "sampler_steps=5", "predicts=noise")
    observed = torch.tensor([[True, False, False]])
    z = torch.randn(1, 3, 8, 16, 16, 4)
    weight = torch.randn(8, 8) / 8

    def eps(x, t):
        return torch.einsum("bmchwd,ce->bmehwd", x, weight) * (1 + t[0] / 1000)

    found = made.ddim(eps, z, observed)
    visited, x = timesteps(BRAIN.diffusion, 5), z.double()
    levels = [*alpha_bar(BRAIN.diffusion)[visited], 1.0]
    for i, t in enumerate(visited):
        e = eps(x.float(), torch.tensor([t])).double()
        x0 = (x - np.sqrt(1 - levels[i]) * e) / np.sqrt(levels[i])
        step = np.sqrt(levels[i + 1]) * x0 + np.sqrt(1 - levels[i + 1]) * e
        x = torch.where(observed[:, :, None, None, None, None], x, step)
    torch.testing.assert_close(found.double(), x, rtol=1e-4, atol=1e-4)
    assert torch.equal(found[:, 0], z[:, 0])


@pytest.mark.parametrize("config", [BRAIN, HEART], ids=["brain", "heart"])
def test_folding_loses_nothing_and_keeps_elements_apart(config):
    heart = config is HEART
    net = UNet(config, settings("ldm", config, "fold_plane=2"))
    z = torch.randn(2, 3, 8, *config.latent)
    x = net.fold(z)
    assert x.shape == ((2, 3 * 64, 8, 8) if heart else (2, 3 * 32, 8, 8, 4)) and net.flat == heart
    assert torch.equal(net.unfold(x), z)
    own = x.shape[1] // 3
    z[:, 1] = 0
    assert not net.fold(z)[:, own : 2 * own].any() and torch.equal(net.fold(z)[:, :own], x[:, :own])
    mask = net.code(torch.tensor([[True, False, True], [False, False, True]]), x)
    assert mask.shape == (2, 3, *x.shape[2:]) and mask.flatten(2).mean(2).tolist() == [[1, 0, 1], [0, 0, 1]]


def test_blocks_that_do_not_fit_are_refused():
    with pytest.raises(CopeditError, match="fold_plane = 3, fold_depth = 1: latents of 16 x 16 x 4 do not fold"):
        task("ldm", BRAIN, "fold_plane=3")
    with pytest.raises(CopeditError, match="fold_depth = 2"):  # 2 slices cannot be halved twice
        task("ldm", BRAIN, "fold_depth=2")


def test_decoding_is_the_tokenizers_and_of_what_is_missing():
    made = task("ldm", BRAIN)
    z, observed = torch.randn(2, 3, 8, 16, 16, 4), torch.tensor([[True, False, True], [False, True, True]])
    whole = tokenizer(BRAIN).images(z, False)
    found = made.decoded(z, observed)
    torch.testing.assert_close(found[~observed], whole[~observed])
    assert not found[observed].any()


def test_begins_with_the_runtimes_noise():
    made = task("ldm", BRAIN)
    z = torch.zeros(2, 3, 8, 16, 16, 4)
    eps = made.begin_with(z, noise)
    assert torch.equal(eps[0], eps[1]) and np.array_equal(eps[0, 1].numpy(), noise("t2", (8, 16, 16, 4)))


def test_the_presets_fold_to_the_papers_grid():
    for preset, grid, channels in (("demo-brain", (24, 24, 8), 48), ("demo-cardiac", (24, 24, 1), 48)):
        from copedit_training.methods.ldm import LDMSettings
        from copedit_training.stages.settings import load_settings

        for name in ("ldm", "controlnet"):
            from copedit_training.methods import method

            told = load_settings(name, preset, kind=method(name).kind)
            assert told.folded(ModelConfig.preset(preset)) == (channels, grid)
        assert LDMSettings(1, 1, 1.0).folded(ModelConfig.preset("brain-brats")) == (8, (24, 24, 8))
