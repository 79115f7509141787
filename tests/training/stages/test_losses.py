"""Losses of stage I by their formulas, and the codebook's rule."""

import numpy as np
import pytest
import torch

from copedit_rt import checkpoint
from copedit_rt.errors import CopeditError
from copedit_rt.networks.tokenizer import CoPeVAE
from copedit_training.stages.losses import Adversary, EMACodebook, Perceptual, pretext_losses, scale_prompts, weigh
from tests.training.stages.tiny import TINY


def test_codebook_starts_from_data_follows_its_vectors_and_revives_the_dead():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(500, 3, generator=generator)
    learner, codes = EMACodebook(4, 3, decay=0.9), torch.zeros(4, 3)
    learner.start(z, codes, generator)
    assert torch.cdist(codes, z).min(1).values.max() < 0.1
    codes[3] = 100.0
    learner.total[3] = 100.0
    index = torch.cdist(z, codes).argmin(1)
    before = codes[0].clone()
    perplexity = learner.update(z, index, codes, generator)
    n = int((index == 0).sum())
    torch.testing.assert_close(codes[0], (0.9 * before + 0.1 * z[index == 0].sum(0)) / (0.9 + 0.1 * n))
    assert torch.cdist(codes[3:], z).min() < 0.1, "a code without vectors must be restarted"
    share = np.bincount(index.numpy(), minlength=4) / 500
    assert perplexity == pytest.approx(np.exp(-sum(p * np.log(p) for p in share if p)), rel=1e-5)


def heads_of(elements):
    """A tokenizer whose heads tell subjects and patterns apart, latents of 3 subjects, and what was observed."""
    torch.manual_seed(0)
    vae = CoPeVAE(TINY.tokenizer, elements).eval()
    z = torch.randn(3, elements, 8, 4, 4, 2)
    with torch.no_grad():
        scale_prompts(vae, vae.features_of_each(z).flatten(0, 1))
    observed = torch.tensor([[True, False, False, False], [True, True, False, True], [False, True, True, False]])
    return vae, vae.prompts_of_each(z), observed[:, :elements]


@pytest.mark.parametrize("position", ["bce", "cross-entropy"])
def test_pretext_losses_are_those_of_the_heads(position):
    vae, each, observed = heads_of(4)
    terms = pretext_losses(vae, each, observed[None], position)

    def mean_of(which):
        return torch.stack([prompts[chosen].mean(0) for prompts, chosen in zip(each, which, strict=True)])

    count, which, anchor = (x.double() for x in vae.assess(mean_of(observed)))
    other = vae.assess(mean_of(~observed))[2].double()
    wanted = -count.log_softmax(1)[torch.arange(3), [2, 0, 1]].mean()  # three, one and two are missing
    assert terms["count"].item() == pytest.approx(wanted.item(), rel=1e-5)
    missing = (~observed).double()
    if position == "bce":
        p = which.sigmoid()
        wanted = -(missing * p.log() + (1 - missing) * (1 - p).log()).mean()
    else:
        wanted = -((missing * which.log_softmax(1)).sum(1) / missing.sum(1)).mean()
    assert terms["position"].item() == pytest.approx(wanted.item(), rel=1e-5)
    a, b = (torch.nn.functional.normalize(x, dim=1) for x in (anchor, other))
    similarity = torch.exp(a @ b.T / 0.2)
    nce = -(similarity.diagonal() / similarity.sum(1)).log().mean()
    turned = -(similarity.flip(1).diagonal() / similarity.sum(1)).log().mean()
    assert abs(nce - turned) > 0.05, "the subjects' embeddings differ"
    assert terms["contrast"].item() == pytest.approx(nce.item(), rel=1e-4)


def test_several_patterns_give_the_mean_of_their_losses():
    vae, each, observed = heads_of(4)
    both = pretext_losses(vae, each, torch.stack((observed, ~observed)))
    one, two = (pretext_losses(vae, each, pattern[None]) for pattern in (observed, ~observed))
    for name, value in both.items():
        assert value.item() == pytest.approx((one[name] + two[name]).item() / 2, rel=1e-5)


def test_the_weights_of_the_terms():
    names = ("l1", "commitment", "perceptual", "adversarial", "discriminator", "count", "position", "contrast")
    terms = {name: torch.tensor(10.0**i) for i, name in enumerate(names)}
    ours = 1 + 0.25e1 + 0.05e2 + 0.01e3 + 1e4 + 0.01 * (1e5 + 0.5e6 + 0.5e7)
    assert weigh(terms, 0.01).item() == pytest.approx(ours)
    assert weigh(terms, 0.01, (1, 1, 1)).item() == pytest.approx(ours + 0.01 * (0.5e6 + 0.5e7))


def test_prompts_start_at_unit_scale_even_under_autocast():

    torch.manual_seed(0)
    vae = CoPeVAE(TINY.tokenizer, 2).train()
    z = torch.randn(6, 2, 8, 4, 4, 2) * torch.rand(6, 2, 8, 1, 1, 1)
    flat = z.flatten(0, 1)
    before = torch.stack([encoder(flat) for encoder in vae.prompt_encoders])
    features = vae.features_of_each(z).flatten(0, 1)
    with torch.autocast("cpu", torch.bfloat16):
        scale_prompts(vae, features)
    after = torch.stack([encoder(flat) for encoder in vae.prompt_encoders])
    assert before.std(1).max() < 0.3, "the case that the scaling is for"
    torch.testing.assert_close(after.mean(1), torch.zeros(3, 16), atol=1e-3, rtol=0)
    assert ((after.std(1) - 1).abs() < 1e-2).float().mean() > 0.8  # units that hardly move are scaled less
    assert after.std(1).max() < 1.01


def test_adversarial_losses_are_least_squares_with_separate_gradients():
    torch.manual_seed(0)
    adversary = Adversary((16, 16, 12))
    output, images = (torch.rand(2, 1, 16, 16, 12, requires_grad=True) for _ in range(2))
    terms = adversary(output, images)
    fake, real = adversary.net(output)[-1], adversary.net(images)[-1]
    torch.testing.assert_close(terms["adversarial"], (fake - 1).square().mean())
    torch.testing.assert_close(terms["discriminator"], (fake.square().mean() + (real - 1).square().mean()) / 2)
    (wanted,) = torch.autograd.grad((fake - 1).square().mean(), output)
    terms["adversarial"].backward(retain_graph=True)
    torch.testing.assert_close(output.grad, wanted)
    assert all(p.grad is None for p in adversary.parameters())
    output.grad = None
    terms["discriminator"].backward()
    assert output.grad is None and all(p.grad.abs().sum() > 0 for p in adversary.net[-1].parameters())
    with pytest.raises(CopeditError, match=r"adversarial_from: \(16, 16, 4\) voxels are too few"):
        Adversary((16, 16, 4))


def test_the_perceptual_term_reads_medicalnets_names_and_is_zero_for_equals(tmp_path):
    from monai.networks.nets import ResNetFeatures

    torch.manual_seed(0)
    net = ResNetFeatures("resnet10", pretrained=False).eval()
    state = {f"module.{name}": x for name, x in net.state_dict().items() if "num_batches" not in name}
    checkpoint.write_tensors(tmp_path / "net.safetensors", state | {"module.conv_seg.0.bias": torch.zeros(3)})
    perceptual = Perceptual(tmp_path / "net.safetensors", torch.device("cpu"))
    a, b = torch.rand(2, 1, 16, 16, 16, requires_grad=True), torch.rand(2, 1, 16, 16, 16)
    assert perceptual(a, a.detach() * 3 + 1).item() < 1e-4, "scale and offset do not count"
    total = 0.0
    for x, y in zip(a.detach(), b, strict=True):
        u, v = (net(((k - k.mean()) / k.std(correction=0))[None])[-1][0] for k in (x, y))
        total += ((u / u.norm(dim=0) - v / v.norm(dim=0)) ** 2).sum(0).mean().item() / 2
    distance = perceptual(a, b)
    assert distance.item() == pytest.approx(total, rel=1e-3)
    distance.backward()
    assert a.grad.abs().sum() > 0 and all(p.grad is None for p in perceptual.net.parameters())
    with pytest.raises(CopeditError, match=r"perceptual = .*: no such file"):
        Perceptual(tmp_path / "none", torch.device("cpu"))
    with pytest.raises(CopeditError, match=r"tensor bn1\.bias is missing; .* not belong to MedicalNet's ResNet-10"):
        checkpoint.write_tensors(tmp_path / "part.safetensors", {"conv1.weight": state["module.conv1.weight"]})
        Perceptual(tmp_path / "part.safetensors", torch.device("cpu"))
