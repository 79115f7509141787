"""MM-GAN's own: sizes, the curriculum, what the critic is told."""

import numpy as np
import torch

from copedit_rt.config import ModelConfig
from copedit_rt.task import Task
from copedit_training.methods import mmgan
from copedit_training.methods.base import parameters
from copedit_training.methods.mmgan import MMGAN, Critic, MMGANSettings, phase, phases
from tests.training.methods.small import BRAIN, task


def test_the_published_size():
    config = ModelConfig.preset("brain-brats")
    assert parameters(MMGAN, config, MMGANSettings(1, 1, 1.0)) == 54_407_172
    with torch.device("meta"):
        critic = Critic(4, 64)
        assert critic(torch.empty(1, 8, 192, 192)).shape == (1, 4, 12, 12)
        net = mmgan.Generator(4, 64, 8)
        assert net(torch.empty(1, 4, 192, 192)).shape == (1, 4, 192, 192)
    assert sum(p.numel() for p in critic.parameters()) == 2_794_432


def test_more_go_missing_as_the_run_goes_on():
    sizes = [len(some) for some in phases(Task.BRAIN, ("a", "b", "c", "d"))]
    assert sizes == [4, 7, 11, 14]
    assert [len(max(some, key=len)) for some in phases(Task.BRAIN, ("a", "b", "c", "d"))] == [1, 2, 3, 3]
    assert [phase(step, 60) for step in (0, 9, 10, 19, 20, 29, 30, 59)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert phases(Task.HEART, ("a", "b", "c"))[3] == [("a",), ("b",), ("c",), ("a", "b"), ("b", "c")]
    made = task("mmgan", BRAIN, "steps=60", "batch_size=40")
    for part, step in enumerate((0, 12, 22, 40)):
        drawn = {tuple((~row).nonzero().flatten().tolist()) for row in made.draw(step, 0).observed}
        able = {tuple(BRAIN.elements.index(e) for e in p) for p in phases(BRAIN.task, BRAIN.elements)[part]}
        assert drawn == able


def test_the_critic_is_told_which_channels_are_real(monkeypatch):
    made = task("mmgan", BRAIN)
    seen = []
    original = mmgan.least_squares

    def spy(critic, pair, real, wanted):
        seen.append((pair, real, wanted))
        return original(critic, pair, real, wanted)

    monkeypatch.setattr(mmgan, "least_squares", spy)
    batch = made.draw(0, 0)
    made.loss(batch)
    pair, real, wanted = seen[0]
    truth = batch.images.permute(0, 5, 1, 2, 3, 4).flatten(0, 1)[:, :, 0]
    assert torch.equal(wanted[:, :, 0, 0], batch.observed.repeat_interleave(2, 0)), "1 for copied, 0 for made"
    assert torch.equal(pair[:, 3:], truth) and torch.equal(real, torch.cat((truth, truth), 1))
    there = wanted.expand_as(truth)
    assert torch.equal(pair[:, :3][there], truth[there]) and not torch.equal(pair[:, :3][~there], truth[~there])


def test_its_error_is_of_what_is_missing_alone():
    made = task("mmgan", BRAIN)
    out = torch.rand(2, 3, 16, 16, requires_grad=True)
    made.net.forward = lambda x: out
    observed = torch.tensor([[True, False, True], [False, False, True]])
    _, l1 = made.candidate(torch.zeros(2, 3, 16, 16), observed)
    l1.backward()
    assert not out.grad[observed].any() and (out.grad[~observed] > 0).all()
    assert np.isclose(l1.item(), out[~observed].mean().item())


def test_both_sides_learn_in_one_backward_pass():
    made = task("mmgan", BRAIN)
    loss, terms = made.loss(made.draw(0, 0))
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in made.net.parameters() if p.ndim > 1)
    assert all(p.grad is not None for p in made.module.adversary.parameters())
    assert set(terms) == {"l1", "adversarial", "discriminator", "phase"} and terms["phase"] == 0
