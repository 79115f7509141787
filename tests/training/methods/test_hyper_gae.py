"""Hyper-GAE: norms set by codes, messages, and the reversed gradient."""

import itertools

import numpy as np
import pytest
import torch

from copedit_rt.config import ModelConfig
from copedit_rt.errors import CopeditError
from copedit_training.methods import hyper_gae
from copedit_training.methods.base import parameters
from copedit_training.methods.guidance import Guidance
from copedit_training.stages.settings import load_settings
from tests.training.methods.small import BRAIN, HEART, noise, observed_of, smooth, task

NONE = torch.zeros(1, 0)


def network(guidance=3, elements=3, stride=(2, 2, 2)):
    torch.manual_seed(0)
    return hyper_gae.Network(elements, Guidance("none", elements, 1, guidance), 2, stride)


def images(batch=1, elements=3, depth=8):
    return torch.rand(batch, elements, 1, 8, 12, depth) * 2 - 1


def test_its_size():
    with torch.device("meta"):
        net, classifier = hyper_gae.Network(4, Guidance("none", 4, 1, 4), 24, (2, 2, 2)), hyper_gae.Classifier(4, 96)
    assert sum(p.numel() for p in net.parameters()) == 6_795_361
    assert sum(p.numel() for p in classifier.parameters()) == 6_068


def test_the_conditional_norm_in_closed_form():
    x, scale, offset = torch.randn(2, 3, 4, 5, 6).double(), torch.randn(2, 3).double(), torch.randn(2, 3).double()
    found = hyper_gae.conditional_norm(x, scale, offset).numpy()
    a = x.numpy()
    normed = (a - a.mean((2, 3, 4), keepdims=True)) / np.sqrt(a.var((2, 3, 4), keepdims=True) + 1e-5)
    s, o = (y.numpy()[:, :, None, None, None] for y in (scale, offset))
    np.testing.assert_allclose(found, s * normed + o, rtol=1e-10, atol=1e-12)


def test_codes_set_the_norms_and_so_what_comes_out():
    net = network()
    x = images()[:, :1].expand(-1, 3, -1, -1, -1, -1)
    features = net.encode(x)
    decoded = net.decode(features[:, 0])
    for one in (features, decoded):
        assert not any(torch.allclose(one[:, i], one[:, j], atol=1e-3) for i in range(3) for j in range(i))
    scales = [s for s, _ in net.encoder.norms(net.codes)] + [s for s, _ in net.decoder.norms(net.codes)]
    assert len(scales) == 15 + 14 and all((s[0] - s[1]).abs().max() > 0.01 for s in scales)


def test_all_four_chains_learn_to_their_last_layer():
    net = network()
    y = net(images(), observed_of([1, 0, 1]), torch.randn(1, 3))
    (y * torch.randn_like(y)).sum().backward()
    chains = [chain for half in (net.encoder, net.decoder) for chain in (half.scales, half.offsets)]
    gradients = [layer.weight.grad.abs().max() for chain in chains for layer in chain.layers]
    assert len(gradients) == 2 * 15 + 2 * 14 and min(gradients) > 0
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())


def test_of_one_observed_element_the_fused_features_are_its_own_message_and_itself():
    net = network().double()
    f, g = torch.randn(1, 3, 8, 2, 3, 2).double(), torch.randn(1, 3).double()
    fused = net.fusion(f, net.codes, observed_of([0, 1, 0]), g)
    # Literally: w = tanh(W2 ReLU(W1 [f_j, c_j, f_i, c_i, v])).
    place = f[0, 1].permute(1, 2, 3, 0)
    code = net.codes[1].expand(*place.shape[:3], -1)
    joined = torch.cat((place, code, place, code, g[0].expand(*place.shape[:3], -1)), -1)
    w = torch.tanh(net.fusion.second(torch.relu(net.fusion.first(joined)))).permute(3, 0, 1, 2)
    assert torch.allclose(fused[0], w * f[0, 1] + f[0, 1], atol=1e-12)


def test_the_fusion_is_the_mean_over_pairs_of_what_is_observed():
    net, there = network(0).double(), [0, 2]
    f = torch.randn(1, 3, 8, 2, 2, 2).double()
    w = net.fusion.weights(f, net.codes, NONE)[0]
    wanted = sum(w[j, i] * f[0, j] + f[0, i] for i in there for j in there) / 4
    f[0, 1] = torch.nan
    assert torch.allclose(net.fusion(f, net.codes, observed_of([1, 0, 1]), NONE)[0], wanted, atol=1e-12)


def test_the_order_of_elements_and_their_codes_does_not_matter():
    net, order = network(0).double(), torch.tensor([2, 0, 1])
    f, observed = torch.randn(2, 3, 8, 2, 2, 2).double(), observed_of([1, 0, 1], [1, 1, 0])
    fused = net.fusion(f, net.codes, observed, NONE)
    assert torch.allclose(net.fusion(f[:, order], net.codes[order], observed[:, order], NONE), fused, atol=1e-12)
    assert not torch.allclose(net.fusion(f[:, order], net.codes, observed[:, order], NONE), fused, atol=1e-3)


def test_what_is_missing_is_not_read():
    net, x, observed = network(), images(2), observed_of([1, 0, 1], [0, 1, 0])
    g = torch.randn(2, 3)
    clean = net(x, observed, g)
    x[~observed] = torch.nan
    assert torch.equal(net(x, observed, g), clean) and clean.isfinite().all() and clean.abs().max() <= 1


def test_a_batch_equals_its_samples():
    net, x, observed, g = network().double(), images(2).double(), observed_of([1, 0, 1], [0, 1, 0]), torch.randn(2, 3)
    whole = net(x, observed, g.double())
    each = [net(x[i : i + 1], observed[i : i + 1], g[i : i + 1].double()) for i in range(2)]
    assert torch.allclose(whole, torch.cat(each), atol=1e-10)
    assert not torch.allclose(whole, net(x, observed, g.double().flip(0)))


def test_the_classifier_teaches_the_network_the_opposite():
    torch.manual_seed(0)
    classifier, fused = hyper_gae.Classifier(3, 12), torch.randn(2, 12, 2, 2, 2, requires_grad=True)
    target = torch.rand(2, 3, 2, 2, 2)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(classifier(fused), target)
    (reversed_one,) = torch.autograd.grad(loss, fused, retain_graph=True)
    own = torch.autograd.grad(loss, list(classifier.parameters()))
    plain = fused
    for layer in classifier.layers[:-1]:
        plain = torch.nn.functional.leaky_relu(layer(plain), 0.2)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(classifier.layers[-1](plain), target)
    (straight,) = torch.autograd.grad(loss, fused, retain_graph=True)
    assert torch.equal(reversed_one, -straight) and straight.abs().max() > 0
    same = torch.autograd.grad(loss, list(classifier.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(own, same, strict=True))


@pytest.mark.parametrize("stride", [(2, 2, 1), (2, 2, 2)])
def test_thin_slabs_keep_their_depth(stride):
    net = network(0, stride=stride)
    x = images(depth=4)
    assert net(x, observed_of([1, 1, 0]), NONE).shape == x.shape
    assert net.encode(x).shape == (1, 3, 8, 2, 3, 4 if stride[2] == 1 else 1)


def test_patches_lie_where_something_is_shown():
    made, config = task("hyper-gae", BRAIN, "patch=8"), BRAIN
    made.images = np.zeros_like(made.images)
    made.images[:, 1, :, 14:28, 4:6] = 0.5
    drawn = [made.draw(step, 0) for step in range(10)]
    assert {tuple(x.images.shape) for x in drawn} == {(2, 3, 1, 8, 8, config.image[2])}
    assert all(x.images.flatten(1).any(1).all() for x in drawn) and len({x.images[0].sum().item() for x in drawn}) > 2
    assert torch.equal(made.draw(3, 0).images, drawn[3].images)
    rng = np.random.default_rng(0)
    corners = {hyper_gae.corner(np.zeros((3, 1, 12, 9, 4)), 8, rng) for _ in range(200)}
    assert {i for i, _ in corners} == set(range(5)) and {j for _, j in corners} == {0, 1}


def test_windows_cover_everything_with_a_fifth_in_common():
    assert hyper_gae.starts(192, 72) == [0, 57, 114, 120] and hyper_gae.starts(32, 32) == [0]
    for size in range(24, 100):
        begin = hyper_gae.starts(size, 24)
        assert begin[0] == 0 and begin[-1] == size - 24 and all(b - a <= 19 for a, b in itertools.pairwise(begin))


def test_what_is_filled_in_is_the_mean_over_windows_of_the_training_size():
    made, images = task("hyper-gae", BRAIN), torch.from_numpy(smooth(BRAIN, 1)).float()
    observed, seen = torch.tensor([[True, False, True]]), []
    made.used.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[3:])))
    found = made.synthesise(images, observed, noise)
    assert seen == [(24, 24, 8)] * 4
    with torch.no_grad():
        net, guidance = made.used, made.used.guidance(observed, None)
        parts = {
            (i, j): net(2 * images[..., i : i + 24, j : j + 24, :] - 1, observed, guidance)
            for i in (0, 8)
            for j in (0, 8)
        }
    middle = sum(part[0, 1, 0, 12 - i, 20 - j] for (i, j), part in parts.items()) / 4
    assert torch.allclose(found[0, 1, 0, 12, 20], (middle + 1) / 2, atol=1e-6)
    assert torch.allclose(found[0, 1, 0, 2, 30], (parts[0, 8][0, 1, 0, 2, 22] + 1) / 2, atol=1e-6)


def test_its_loss_is_over_all_elements_and_the_classifier_sees_complete_subjects_too():
    made = task("hyper-gae", BRAIN)
    batch, seen = made.draw(0, 0), []
    made.module.adversary.register_forward_hook(lambda _, inputs, out: seen.append(out.detach()))
    loss, terms = made.objective(batch)
    with torch.no_grad():
        truth = 2 * batch.images - 1
        error = (made.net(truth, batch.observed, made.net.guidance(batch.observed, None)) - truth).abs()
    assert terms["l1"] == pytest.approx(error.mean().item(), rel=1e-5) and len(seen) == 2
    assert terms["l1_missing"] == pytest.approx(error[~batch.observed].mean().item(), rel=1e-5)
    targets = (batch.observed, torch.ones_like(batch.observed))
    logs = [
        -torch.where(y[:, :, None, None, None], x.sigmoid(), (-x).sigmoid()).log().mean()
        for x, y in zip(seen, targets, strict=True)
    ]
    assert terms["classifier"] == pytest.approx(sum(logs).item(), rel=1e-5)
    assert loss.item() == pytest.approx(terms["l1"] + 0.001 * terms["classifier"], rel=1e-5)


def test_availability_is_told_by_the_guidance_and_by_the_mask():
    made = task("hyper-gae", BRAIN)
    features, net = torch.randn(1, 3, 16, 2, 2, 2), made.net
    one, two = torch.tensor([[True, False, False]]), torch.tensor([[True, True, False]])
    fused = net.fusion(features, net.codes, two, net.guidance(two, None))
    assert not torch.allclose(net.fusion(features, net.codes, one, net.guidance(two, None)), fused, atol=1e-3)
    assert not torch.allclose(net.fusion(features, net.codes, two, net.guidance(one, None)), fused, atol=1e-4)


def test_parameters_at_the_sizes_of_the_presets():
    counts = []
    for preset in ("brain-brats", "cardiac", "demo-brain"):
        told = load_settings("hyper-gae", preset, kind=hyper_gae.HyperGAESettings)
        counts.append(parameters(hyper_gae.HyperGAE, ModelConfig.preset(preset), told))
    assert counts == [6_795_361 + 20, 6_795_361 + 20, 760_353 + 20]


@pytest.mark.parametrize("patch", [10, 36])
def test_patches_that_do_not_fit_are_refused(patch):
    with pytest.raises(CopeditError, match=f"patch = {patch}: must divide by 4 and fit into the image's plane"):
        task("hyper-gae", HEART, f"patch={patch}")
