"""LDM's own: its size, its first loss, what conditions it."""

import pytest
import torch

from copedit_rt.config import ModelConfig
from copedit_training.methods.base import parameters
from copedit_training.methods.ldm import LDM, LDMSettings
from tests.training.methods.small import BRAIN, CONFIGS, steps, task


def test_our_sizes():
    told = LDMSettings(1, 1, 1.0)
    found = [parameters(LDM, ModelConfig.preset(name), told) for name in ("brain-brats", "cardiac")]
    assert found == [166_816_800, 64_251_936]


@pytest.mark.parametrize("where", CONFIGS)
def test_the_first_loss_is_the_noises_mean_square(where):
    """The last convolution starts at zero."""
    made = task("ldm", CONFIGS[where], "predicts=noise")
    batch = made.draw(0, 0)
    loss, terms = made.loss(batch)
    expected = batch.noise[~batch.observed].square().mean()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert terms == {"mse": loss.item()} and abs(loss.item() - 1) < 0.05


def test_clean_latents_may_be_what_is_predicted():
    made = task("ldm", BRAIN, "predicts=clean")
    batch = made.draw(0, 0)
    torch.testing.assert_close(made.loss(batch)[0], batch.latents[~batch.observed].square().mean())


def test_the_loss_is_of_what_is_missing_alone():
    made = task("ldm", BRAIN, "predicts=noise")
    batch = made.draw(0, 0)
    made.net.forward = lambda z, t, observed: torch.where(
        observed[:, :, None, None, None, None], torch.full_like(z, 1e6), batch.noise
    )
    assert made.loss(batch)[0].item() == 0


def test_after_one_step_observed_latents_matter():
    made = task("ldm", BRAIN)
    batch = made.draw(0, 0)
    z, t, observed = batch.latents, batch.timesteps, torch.tensor([[True, True, False]] * 2)
    swapped = z[:, [1, 0, 2]]
    with torch.no_grad():
        assert torch.equal(made.net(z, t, observed), made.net(swapped, t, observed))
    steps(made, 2)
    with torch.no_grad():
        first, second, third = (
            made.net(x, t, there)[:, 2]
            for x, there in ((z, observed), (swapped, observed), (z, torch.tensor([[True, False, False]] * 2)))
        )
    assert not torch.allclose(first, second) and not torch.allclose(first, third)
