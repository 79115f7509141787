"""M2DN: what the network may know, and the diffusion around it."""

import pytest
import torch

from copedit_rt.config import ModelConfig
from copedit_training.methods import m2dn
from copedit_training.methods.base import load_method, parameters, to_slices
from copedit_training.methods.guidance import Guidance
from copedit_training.stages.settings import load_settings
from tests.training.methods.small import BRAIN, HEART, noise, smooth, task, train


def network(guidance=4, elements=4):
    torch.manual_seed(0)
    return m2dn.Network(elements, Guidance("none", elements, 1, guidance), 4).eval()


def test_its_size():
    with torch.device("meta"):
        net = m2dn.Network(4, Guidance("none", 4, 1, 4), 32)
    assert sum(p.numel() for p in net.parameters()) == 9_590_620


def test_every_weight_has_a_gradient_and_the_bottleneck_is_a_sixteenth():
    net, x = network(), torch.randn(2, 4, 32, 48)
    seen = []
    net.middle[1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    y = net(x, torch.tensor([3, 400]), torch.randn(2, 4))
    (y * torch.randn_like(y)).sum().backward()
    assert y.shape == x.shape and seen == [(2, 16 + 4, 2, 3)]
    assert not [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]


def test_a_batch_equals_its_slices_and_time_and_guidance_count():
    net, x, t, g = network().double(), torch.randn(3, 4, 32, 32).double(), torch.tensor([0, 9, 499]), torch.randn(3, 4)
    whole = net(x, t, g.double())
    each = torch.cat([net(x[i : i + 1], t[i : i + 1], g[i : i + 1].double()) for i in range(3)])
    assert torch.allclose(whole, each, atol=1e-12)
    assert not torch.allclose(whole, net(x, t.flip(0), g.double()))
    assert not torch.allclose(whole, net(x, t, g.flip(0).double()))


def test_each_modality_has_an_encoder_and_a_decoder_of_its_own():
    net, x = network(0), torch.randn(1, 4, 32, 32)
    same = x[:, :1].expand_as(x)
    y = net(same, torch.tensor([5]), torch.zeros(1, 0))
    assert not any(torch.allclose(y[:, i], y[:, j]) for i in range(4) for j in range(i))
    swapped = net(x[:, [1, 0, 2, 3]], torch.tensor([5]), torch.zeros(1, 0))
    assert not torch.allclose(swapped, net(x, torch.tensor([5]), torch.zeros(1, 0)))


def test_slices_of_any_size_are_padded():
    net, x = network(0), torch.randn(1, 4, 20, 33)
    padded = torch.nn.functional.pad(x, (0, 15, 0, 12), "replicate")
    t = torch.tensor([7])
    assert torch.equal(net(x, t, torch.zeros(1, 0)), net(padded, t, torch.zeros(1, 0))[..., :20, :33])


def test_noise_is_on_what_is_missing_alone_and_the_loss_over_all(monkeypatch):
    made = task("m2dn", BRAIN)
    batch, seen = made.draw(3, 0), []
    answer = torch.rand(2 * 2, 3, 32, 32)

    def predict(x, t, guidance):
        seen.append((x, t, guidance))
        return answer

    made.net.forward = predict
    loss, terms = made.objective(batch)
    (x, t, _), depth = seen[0], 2
    clean = to_slices(batch.images) * 2 - 1
    level = made.levels[batch.timesteps].repeat_interleave(depth)[:, None, None, None]
    noised = level.sqrt() * clean + (1 - level).sqrt() * to_slices(batch.noise)
    there = batch.observed.repeat_interleave(depth, 0)
    assert torch.equal(x[there], clean[there]) and torch.allclose(x[~there], noised[~there])
    assert torch.equal(t, batch.timesteps.repeat_interleave(depth))
    error = (answer - clean).square()
    assert loss.item() == pytest.approx(error.mean().item(), rel=1e-5)
    assert terms["mse_missing"] == pytest.approx(error[~there].mean().item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["none", "mask"])
def test_which_are_observed_is_known_by_the_guidance_alone(kind):
    made = task("m2dn", BRAIN, f"guidance={kind}")
    x, t = torch.randn(1, 3, 32, 32), torch.tensor([100])
    first, second = torch.tensor([[True, False, False]]), torch.tensor([[True, True, False]])
    one, other = (made.net(x, t, made.net.guidance(observed, None)) for observed in (first, second))
    assert torch.equal(one, other) == (kind == "none")


def test_the_code_of_the_mask_is_never_constant():
    made = task("m2dn", HEART, "batch_size=4")
    observed = torch.cat([made.draw(step, 0).observed for step in range(20)])
    assert observed.any(1).all() and not observed.all(1).any() and len(observed.unique(dim=0)) == 5


def test_a_single_step_from_noise_is_what_the_network_says():
    made = task("m2dn", BRAIN, "sampler_steps=1")
    images, observed = torch.from_numpy(smooth(BRAIN, 1)).float(), torch.tensor([[True, False, True]])
    found = made.synthesise(images, observed, noise)
    begin = 2 * images - 1
    begin[0, 1] = torch.from_numpy(noise(BRAIN.elements[1], (1, 32, 32, 8)))
    last = torch.full((8,), BRAIN.diffusion.train_steps - 1)
    guidance = made.used.guidance(observed, None).expand(8, -1)
    with torch.no_grad():
        wanted = (made.used(to_slices(begin), last, guidance)[:, 1].movedim(0, -1) + 1) / 2
    assert torch.allclose(found[0, 1, 0], wanted.clamp(0, 1), atol=1e-6) and 0 < wanted.std() < 1


def test_more_steps_are_taken_where_they_are_asked_for(tmp_path):
    folder = train("m2dn", tmp_path / "run", BRAIN)
    images, observed = torch.from_numpy(smooth(BRAIN, 1)).float(), torch.tensor([[True, False, True]])
    two, five = (load_method(folder, "cpu", sampler_steps=n) for n in (2, 5))
    calls = []
    five.used.register_forward_hook(lambda *_: calls.append(1))
    assert not torch.equal(two.synthesise(images, observed, noise), five.synthesise(images, observed, noise))
    assert len(calls) == 5


def test_parameters_at_the_sizes_of_the_presets():
    counts = []
    for preset in ("brain-brats", "cardiac", "demo-brain"):
        config = ModelConfig.preset(preset)
        counts.append(parameters(m2dn.M2DN, config, load_settings("m2dn", preset, kind=m2dn.M2DNSettings)))
    assert counts == [9_590_620 + 20, 9_590_620 + 20, 1_355_870]
