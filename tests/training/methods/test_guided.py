"""Guidance plugged into M2DN, Hyper-GAE and MMT (Tables 5 and 17)."""

import pytest
import torch

from copedit_training.methods import method
from copedit_training.methods.base import load_method, parameters
from tests.training.methods.small import BRAIN, noise, settings, smooth, steps, task, train

GUIDED = ("m2dn", "hyper-gae", "mmt")
WIDTH = {"m2dn": 3, "hyper-gae": 3, "mmt": 8 + 16}  # of what is joined, or added


@pytest.mark.parametrize("name", GUIDED)
def test_the_three_kinds_differ_in_their_own_weights_alone(name):
    none, mask, full = (
        parameters(method(name), BRAIN, settings(name, BRAIN, f"guidance={kind}")) for kind in ("none", "mask", "full")
    )
    prompts = 3 * BRAIN.tokenizer.prompt_dim
    assert (mask - none, full - none) == (WIDTH[name] * (3 + 1), WIDTH[name] * (prompts + 1))


@pytest.mark.parametrize("kind", ["mask", "full"])
@pytest.mark.parametrize("name", GUIDED)
def test_guidance_learns(name, kind):
    made = task(name, BRAIN, f"guidance={kind}")
    made.loss(made.draw(0, 0))[0].backward()
    assert all(p.grad.abs().max() > 0 for p in made.net.guidance.parameters())
    assert all(p.grad is None for p in made.tokenizer.parameters()) if kind == "full" else True


@pytest.mark.parametrize("name", GUIDED)
def test_prompts_are_of_the_observed_images_and_count(name):
    made = task(name, BRAIN, "guidance=full")
    steps(made, 2)
    images, observed = (
        torch.from_numpy(smooth(BRAIN, 2)).float(),
        torch.tensor([[True, False, True], [True, True, False]]),
    )
    found = made.synthesise(images, observed, noise)
    poisoned = images.where(observed[:, :, None, None, None, None], torch.nan)
    assert torch.equal(made.synthesise(poisoned, observed, noise), found) and found.isfinite().all()
    each = made.prompts_of(made.draw(0, 0))
    batch = made.draw(0, 0)
    wanted = [x[seen].mean(0) for x, seen in zip(batch.prompts, batch.observed, strict=True)]
    assert torch.allclose(each, torch.stack(wanted), atol=1e-5)
    for layer in made.used.guidance.parameters():
        layer.data.mul_(-3)
    assert not torch.equal(made.synthesise(images, observed, noise), found)


def test_a_run_with_prompts_comes_with_its_tokenizer(tmp_path):
    folder = train("mmt", tmp_path / "run", BRAIN, "steps=2", "guidance=full")
    images, observed = torch.from_numpy(smooth(BRAIN, 1)).float(), torch.tensor([[True, False, True]])
    made, again = load_method(folder, "cpu"), load_method(tmp_path / "run", "cpu")
    found = made.synthesise(images, observed, noise)
    assert (folder / "tokenizer.safetensors").exists() and torch.equal(again.synthesise(images, observed, noise), found)
