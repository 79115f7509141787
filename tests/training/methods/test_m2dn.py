"""M2DN: what the network may know, and the diffusion around it."""

import torch

from copedit_training.methods import m2dn
from copedit_training.methods.guidance import Guidance


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
