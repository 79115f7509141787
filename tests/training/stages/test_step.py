"""One optimizer step."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from copedit_rt.errors import CopeditError
from copedit_rt.networks.tokenizer import CoPeVAE
from copedit_training.data.augmentation import Augmentation
from copedit_training.stages.denoiser_task import DenoiserTask
from copedit_training.stages.losses import pretext_losses
from copedit_training.stages.settings import DenoiserSettings, TokenizerSettings
from copedit_training.stages.step import Optimization, ahead, clip, gradients, learning_rate
from copedit_training.stages.task import Task
from copedit_training.stages.tokenizer_task import TokenizerTask
from tests.training.stages.tiny import HEART, TINY, log_of, settings, smooth, train, weights


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
    l1 = (task.tokenizer.decode(z + (codes - z).detach(), task.config.task.joint) - x).abs().mean()
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


@pytest.mark.parametrize("stage", ["tokenizer", "denoiser"])
def test_a_micro_batch_is_drawn_loaded_augmented_and_encoded_once(tmp_path, stage, monkeypatch):
    extra = ["steps=3", "accumulate=4", "crop=0", "augment=true"]
    extra += (
        ["pretext_every=1"] if stage == "tokenizer" else [f"tokenizer={train('tokenizer', tmp_path / 'a', 'steps=1')}"]
    )
    counts = {"draw": 0, "load": 0, "augment": 0, "encode": 0}
    kind = TokenizerTask if stage == "tokenizer" else DenoiserTask

    def counted(owner, name, what):
        original = getattr(owner, name)

        def call(self, *given):
            if what != "encode" or len(given[0]) == 2:  # of export and preparation they are single subjects
                counts[what] += 1
            return original(self, *given)

        monkeypatch.setattr(owner, name, call)

    for owner, name, what in (
        (kind, "draw", "draw"),
        (Task, "load", "load"),
        (Augmentation, "__call__", "augment"),
        (CoPeVAE, "encode", "encode") if stage == "tokenizer" else (DenoiserTask, "_encoded", "encode"),
    ):
        counted(owner, name, what)
    train(stage, tmp_path / "b", *extra)
    assert counts == dict.fromkeys(counts, 12), "3 steps of 4 micro-batches"


def test_the_next_micro_batch_is_drawn_while_one_is_in_use():
    drawn, second = [], threading.Event()

    def draw(step, part):
        drawn.append((step, part, threading.current_thread() is threading.main_thread()))
        if (step, part) == (0, 1):
            second.set()
        return step, part

    wanted = [(0, 0), (0, 1), (1, 0)]
    batches = ahead(draw, wanted)
    assert next(batches) == (0, 0) and second.wait(10), "nobody has asked for it"
    assert list(batches) == wanted[1:] and drawn == [(*key, False) for key in wanted]


def test_what_goes_wrong_in_drawing_ends_the_run():
    with pytest.raises(ZeroDivisionError):
        list(ahead(lambda step, part: 1 // part, [(0, 1), (0, 0), (0, 1)]))


def test_scaled_losses_move_the_weights_as_others_do_and_an_overflow_is_left_out():
    """float16's scale on a CPU: powers of two change no bit in float32."""
    tasks = []
    for scaled in (False, True):
        torch.manual_seed(0)
        task = TokenizerTask(TINY, settings("tokenizer"), smooth(TINY, 4))
        optimization = Optimization(task)
        optimization.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=scaled)
        for step in range(3):
            optimization.set_rate(1e-3)
            gradients(task, task.module, [task.draw(step, 0)], optimization.scaler)
            optimization.unscale()
            clip(task)
            optimization.step()
            task.after_step(step)
        tasks.append((task, optimization))
    (plain, _), (task, optimization) = tasks
    for (name, a), b in zip(plain.module.state_dict().items(), task.module.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, msg=name)
    before = [p.detach().clone() for p in task.module.parameters()]
    gradients(task, task.module, [task.draw(3, 0)], optimization.scaler)
    task.tokenizer.encoder.out.bias.grad[0] = float("inf")
    optimization.unscale()
    assert optimization.overflowed
    optimization.step()
    assert all(torch.equal(a, b) for a, b in zip(before, task.module.parameters(), strict=True))
    again = Optimization(task)
    again.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    again.load(optimization.state(), Path("x"))
    assert again.scaler.get_scale() == 2.0**7
    gradients(task, task.module, [task.draw(3, 0)], again.scaler)
    again.unscale()
    again.step()
    assert again.scaler.get_scale() == 2.0**7
    assert not all(torch.equal(a, b) for a, b in zip(before, task.module.parameters(), strict=True))


def test_float16_is_for_gpus():
    with pytest.raises(CopeditError, match="dtype = 'float16': needs a GPU; on cpu use bfloat16 or float32"):
        TokenizerTask(TINY, settings("tokenizer", "dtype=float16", "device=cpu"))


@pytest.mark.gpu
def test_float16_learns_on_a_gpu(tmp_path):
    tokenizer = train("tokenizer", tmp_path / "a", "steps=40", "lr=5e-3", "dtype=float16", "device=cuda")
    train("denoiser", tmp_path / "b", "steps=40", "lr=5e-3", "dtype=float16", "device=cuda", f"tokenizer={tokenizer}")
    for folder, name in (("a", "l1"), ("b", "mse")):
        values = [line[name] for line in log_of(tmp_path / folder)]
        assert np.mean(values[-5:]) < 0.9 * np.mean(values[:5])
