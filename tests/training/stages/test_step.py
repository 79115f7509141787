"""One optimizer step."""

import numpy as np
import pytest
import torch
from torch import Tensor

from copedit_training.stages.losses import pretext_losses
from copedit_training.stages.settings import DenoiserSettings, TokenizerSettings
from copedit_training.stages.step import gradients, learning_rate
from copedit_training.stages.tokenizer_task import TokenizerTask
from tests.training.stages.tiny import HEART, TINY, train, weights


def test_learning_rate_warms_up_and_decays_to_zero():
    settings = DenoiserSettings(steps=110, batch_size=1, lr=2.0, warmup=10)
    rates = [learning_rate(settings, step) for step in range(111)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == pytest.approx(2.0) and rates[10] == pytest.approx(2.0)
    assert rates[60] == pytest.approx(1.0) and rates[110] == pytest.approx(0.0, abs=1e-12)
    assert max(rates) == pytest.approx(2.0)


def test_muon_moves_the_matrices_of_the_blocks_along_orthogonal_directions(tmp_path):
    vae = train("tokenizer", tmp_path / "vae", "steps=1")
    settings = ("steps=2", "warmup=0", "lr=1e-3", "optimizer=muon", "checkpoint_every=1", f"tokenizer={vae}")
    train("denoiser", tmp_path / "a", *settings)
    first, second = (weights(tmp_path / "a" / f"checkpoint-{step:08d}") for step in (1, 2))
    step = second["denoiser.blocks.0.modulation.weight"] - first["denoiser.blocks.0.modulation.weight"]
    rate = 0.2 * max(step.shape) ** 0.5 * learning_rate(DenoiserSettings(2, 1, 1e-3, 0), 1)
    first, second = torch.linalg.svdvals(step / rate)[:2]  # a batch of two gives a gradient of rank two
    assert 0.5 < second <= first < 1.3, "five Newton-Schulz steps bring singular values near 1"


@pytest.mark.parametrize("config", [TINY, HEART], ids=lambda c: c.task)
def test_micro_batches_add_up_to_the_loss_of_the_whole_batch(config):
    settings = TokenizerSettings(8, 2, 1e-3, accumulate=3, dtype="float32", draws=2)
    rng = np.random.default_rng(0)
    images = rng.random((7, len(config.elements), 1, *config.image), dtype=np.float32)
    torch.manual_seed(0)
    task = TokenizerTask(config, settings, images)
    task.module.double()
    before = {name: x.clone() for name, x in task.module.state_dict().items()}
    images = task.images = images.astype(np.float64)
    monkey = pytest.MonkeyPatch()
    monkey.setattr(Tensor, "float", Tensor.double)
    task.module.scaled.fill_(True)
    task.codebook.started.fill_(True)
    batches = [task.draw(0, part) for part in range(3)]
    terms, _ = gradients(task, task.module, batches)
    found = {name: p.grad for name, p in task.module.named_parameters() if p.grad is not None}
    norm = task.tokenizer.prompt_encoders[0].conv[1]
    assert norm.num_batches_tracked == 1
    running = norm.running_mean.clone()
    task.module.load_state_dict(before)
    task.module.zero_grad()

    x = torch.cat([batch.images for batch in batches])
    z = task.tokenizer.encode(x)
    each = task.tokenizer.prompts_of_each(z)
    observed = torch.cat([batch.observed for batch in batches], 1)
    pretext = pretext_losses(task.tokenizer, each, observed)
    codes, _ = task.tokenizer.quantise(z.detach())
    l1 = (task.tokenizer.decode(z + (codes - z).detach(), task.cardiac) - x).abs().mean()
    commitment = (z - codes).square().mean()
    loss = l1 + 0.25 * commitment + 0.01 * (pretext["count"] + 0.5 * pretext["position"] + 0.5 * pretext["contrast"])
    loss.backward()
    monkey.undo()
    assert terms["loss"] == pytest.approx(loss.item(), rel=1e-9)
    assert terms["contrast"] == pytest.approx(pretext["contrast"].item(), rel=1e-9)
    torch.testing.assert_close(running, norm.running_mean)
    for name, p in task.module.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(found[name], p.grad, rtol=1e-6, atol=1e-12, msg=name)
