"""The wavelet start of small autoencoders."""

import dataclasses

import pytest
import torch

from copedit_rt.config import TokenizerConfig
from copedit_rt.errors import CopeditError
from copedit_rt.networks.tokenizer import CoPeVAE
from copedit_training.stages.wavelets import patterns, start_as_wavelets

CONFIG = TokenizerConfig(
    channels=(12,), strides=((2, 2, 1),), residual_units=1, residual_channels=4, latent_channels=4, codes=8,
    prompt_channels=(2, 4), prompt_stride=2, prompt_dim=8, contrast_dim=4, quantise=False,
)  # fmt: skip


def started(**changes) -> CoPeVAE:
    torch.manual_seed(0)
    tokenizer = CoPeVAE(dataclasses.replace(CONFIG, **changes), 2).eval()
    start_as_wavelets(tokenizer)
    return tokenizer


def reconstructed(tokenizer: CoPeVAE, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return tokenizer.decode(tokenizer.encode(images), joint=False)


@pytest.mark.parametrize(("strides", "channels"), [((2, 2, 1), 4), ((2, 2, 2), 8), ((2, 1, 1), 2)])
def test_images_come_back_exactly(strides, channels):
    tokenizer = started(strides=(strides,), latent_channels=channels, channels=(16,))
    images = torch.rand(2, 2, 1, 8, 12, 6)
    torch.testing.assert_close(reconstructed(tokenizer, images), images, rtol=0, atol=1e-6)


def test_fewer_channels_lose_the_roughest_pattern_alone():
    images = torch.rand(1, 1, 1, 8, 8, 4)
    lost = images - reconstructed(started(latent_channels=3), images)
    corner = lost[..., ::2, ::2, :]
    assert corner.abs().max() > 0.1
    torch.testing.assert_close(lost[..., 1::2, ::2, :], -corner, rtol=0, atol=1e-6)
    torch.testing.assert_close(lost[..., 1::2, 1::2, :], corner, rtol=0, atol=1e-6)


def test_negative_latents_are_decoded_too():
    """A correction may subtract."""
    tokenizer = started()
    z = torch.randn(1, 1, 4, 4, 4, 4)
    with torch.no_grad():
        there, back = tokenizer.decode(z, joint=False), tokenizer.decode(-z, joint=False)
    torch.testing.assert_close(there, -back, rtol=0, atol=1e-6)


def test_patterns_are_orthonormal_and_ordered():
    flat = patterns((2, 2, 2), 8).flatten(1)
    torch.testing.assert_close(flat @ flat.T, torch.eye(8))
    assert (flat[0] > 0).all()


def test_channels_not_in_use_can_learn():
    tokenizer = started()
    images = torch.rand(1, 2, 1, 8, 8, 4)
    tokenizer.decode(tokenizer.encode(images), joint=False).square().mean().backward()
    assert tokenizer.encoder.out.weight.grad[:, 8:].abs().sum() > 0


def test_an_entry_starts_as_wavelets_and_puts_them_together_again():
    """Only the levels below lie between what it takes apart and what it returns."""
    deep = {"channels": (16, 6), "strides": ((2, 2, 2), (2, 2, 1)), "residual_units": (0, 1)}
    tokenizer = started(**deep)
    down, up = tokenizer.encoder.levels[0], tokenizer.decoder.levels[-1]
    images = torch.rand(2, 1, 8, 12, 6)
    with torch.no_grad():
        waves = down(images)
        torch.testing.assert_close(up(waves), images, rtol=0, atol=1e-6)
    assert (waves[:, :2].sum(1) > 0).all()  # means are positive: one of the two signs
    with pytest.raises(CopeditError, match=r"an entry of stride .* needs two channels for each of 8 patterns"):
        started(**deep | {"channels": (15, 6)})


@pytest.mark.parametrize(
    "changes",
    [{"channels": (12, 12), "strides": ((2, 2, 1), (1, 1, 1))}, {"channels": (7,)}, {"latent_channels": 5}],
)
def test_other_tokenizers_are_refused(changes):
    with pytest.raises(CopeditError, match="wavelets: needs one level"):
        started(**changes)
