"""MMT: windows over all contrasts, masked and shifted, and the queries."""

import math

import pytest
import torch

from copedit_rt.config import ModelConfig
from copedit_rt.errors import CopeditError
from copedit_training.methods import mmt
from copedit_training.methods.base import parameters, to_slices
from copedit_training.methods.guidance import Guidance
from copedit_training.stages.settings import load_settings
from tests.training.methods.small import BRAIN, observed_of, task

SMALL = mmt.MMTSettings(1, 1, 1.0, width=8, heads=2, stages=2, window=2, patch=2, stem=3)


def network(elements=3):
    torch.manual_seed(0)
    net = mmt.Network(elements, Guidance("none", elements, 1, 8 + 16), SMALL).double()
    for name, p in net.named_parameters():
        if "bias" in name or "queries" in name:
            torch.nn.init.normal_(p, std=0.5)  # biases start near zero, and would go unseen
    return net


def drawn(net, batch=2, size=(16, 16)):
    return torch.rand(batch, 3, *size).double(), torch.randn(batch, 8 + 16).double()


def test_its_size():
    with torch.device("meta"):
        net = mmt.Network(4, Guidance("none", 4, 1, 96 + 192 + 384), mmt.MMTSettings(1, 1, 1.0))
    assert sum(p.numel() for p in net.parameters()) == 12_135_942


def test_windows_are_those_of_all_contrasts_and_come_back():
    x = torch.arange(2 * 3 * 4 * 6 * 5).reshape(2, 3, 4, 6, 5)
    parts = mmt.windows(x, 2)
    assert parts.shape == (2, 6, 12, 5) and torch.equal(mmt.joined(parts, x.shape), x)
    assert torch.equal(parts[1, 4], x[1, :, 2:4, 2:4].flatten(0, 2))
    assert torch.equal(mmt.expand(mmt.merge(x), 2), x)


def test_one_window_is_plain_attention():
    torch.manual_seed(0)
    layer = mmt.WindowAttention(8, 2, 4, 0, 3).double()
    torch.nn.init.normal_(layer.bias)
    x, to = torch.randn(1, 2, 4, 4, 8).double(), torch.randn(1, 3, 4, 4, 8).double()
    own, others, observed = torch.tensor([2, 0]), torch.tensor([0, 1, 2]), observed_of([1, 0, 1])
    found = layer(x, to, observed, own, others)
    q, (k, v) = layer.query(x), layer.both(to).chunk(2, -1)
    for at in [(0, 0, 0), (1, 3, 2), (1, 1, 3)]:
        i, row, column = at
        heads = []
        for h in range(2):
            part = slice(4 * h, 4 * h + 4)
            scores, values = [], []
            for j in (0, 2):
                for r in range(4):
                    for c in range(4):
                        bias = layer.bias[h, own[i] - others[j] + 2, row - r + 3, column - c + 3]
                        scores.append(q[0, i, row, column, part] @ k[0, j, r, c, part] / math.sqrt(4) + bias)
                        values.append(v[0, j, r, c, part])
            heads.append(torch.stack(scores).softmax(0) @ torch.stack(values))
        assert torch.allclose(found[0, i, row, column], layer.out(torch.cat(heads)), atol=1e-12)


@pytest.mark.parametrize(("shift", "reached"), [(0, ([0, 1, 2, 3], [0, 1, 2, 3])), (2, ([0, 1], [0, 1]))])
def test_shifted_windows_do_not_join_opposite_borders(shift, reached):
    torch.manual_seed(0)
    block = mmt.EncoderBlock(8, 2, 4, shift, 2).double()
    x = torch.randn(1, 2, 8, 8, 8).double().requires_grad_()
    y = block(x, observed_of([1, 1]), torch.arange(2))
    (gradient,) = torch.autograd.grad((y[0, 0, 0, 0] * torch.randn(8)).sum(), x)
    rows, columns = (sorted(set(axis.tolist())) for axis in gradient[0, 1].abs().sum(-1).nonzero().T)
    assert (rows, columns) == reached
    (gradient,) = torch.autograd.grad((block(x, observed_of([1, 1]), torch.arange(2))[0, 0, 4, 4]).sum(), x)
    rows = sorted(set(gradient[0, 1].abs().sum(-1).nonzero()[:, 0].tolist()))
    assert rows == ([2, 3, 4, 5] if shift else [4, 5, 6, 7]), "a window over the borders of the others"


def test_a_masked_batch_equals_the_subset_alone():
    net = network()
    x, g = drawn(net)
    observed = observed_of([1, 0, 1], [1, 0, 1])
    masked = net(x, observed, g)
    alone = net(x[:, [0, 2]], observed[:, [0, 2]], g, contrasts=(0, 2))
    assert torch.allclose(masked, alone, atol=1e-12)
    assert not torch.allclose(alone, net(x[:, [0, 2]], observed[:, [0, 2]], g, contrasts=(0, 1)), atol=1e-3)


def test_what_is_missing_is_not_read_and_nothing_is_nan():
    net = network()
    x, g = drawn(net, 3)
    observed = observed_of([1, 0, 0], [0, 1, 1], [0, 0, 1])
    clean = net(x, observed, g)
    x[~observed] = torch.nan
    y = net(x, observed, g)
    assert torch.equal(y, clean) and y.isfinite().all()
    y.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


def test_no_row_is_fully_masked(monkeypatch):
    seen, original = [], torch.nn.functional.scaled_dot_product_attention

    def attention(q, k, v, mask):
        seen.append(mask.isfinite().any(-1).all().item())
        return original(q, k, v, mask)

    monkeypatch.setattr(mmt.F, "scaled_dot_product_attention", attention)
    net = network()
    x, g = drawn(net)
    net(x, observed_of([1, 0, 0], [0, 0, 1]), g)
    assert len(seen) == 2 * (2 + 2 * 2) and all(seen)


def test_a_batch_equals_its_slices_and_all_weights_learn():
    net = network()
    x, g = drawn(net, 2)
    observed = observed_of([1, 0, 1], [0, 1, 1])
    y = net(x, observed, g)
    each = torch.cat([net(x[i : i + 1], observed[i : i + 1], g[i : i + 1]) for i in range(2)])
    assert torch.allclose(y, each, atol=1e-12)
    (y * torch.randn_like(y)).sum().backward()
    silent = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not silent


def test_queries_and_guidance_alter_what_comes_out():
    net = network()
    x, g = drawn(net)
    observed = observed_of([1, 1, 0], [1, 1, 0])
    y = net(x, observed, g)
    assert not torch.allclose(y, net(x, observed, -g), atol=1e-3)
    with torch.no_grad():
        net.queries[-1][2] += 1.0
    assert not torch.allclose(net(x, observed, g)[:, 2], y[:, 2], atol=1e-3)


def test_slices_of_any_size_are_padded():
    net = network()
    x, g = drawn(net, 1, (10, 12))
    padded = torch.nn.functional.pad(x, (0, 4, 0, 6), "replicate")
    observed = observed_of([1, 0, 1])
    assert net.multiple == 8
    assert torch.equal(net(x, observed, g), net(padded, observed, g)[..., :10, :12])


def test_each_contrast_has_a_critic_of_its_own():
    torch.manual_seed(0)
    critic, x = mmt.Critic(3, 4), torch.randn(1, 3, 32, 32)
    before = critic(x)
    x[:, 1] += torch.randn(32, 32)
    after = critic(x)
    assert before.shape == (1, 3, 4, 4)
    assert [torch.equal(before[:, i], after[:, i]) for i in range(3)] == [True, False, True]


def test_its_loss_weighs_what_is_missing_four_times_and_the_critic_is_told_what_is_copied(monkeypatch):
    made, seen = task("mmt", BRAIN), []
    original = mmt.least_squares

    def spy(critic, candidate, real, wanted):
        seen.append((candidate, real, wanted))
        return original(critic, candidate, real, wanted)

    monkeypatch.setattr(mmt, "least_squares", spy)
    batch = made.draw(0, 0)
    loss, terms = made.objective(batch)
    ((candidate, real, wanted),) = seen
    observed = batch.observed.repeat_interleave(2, 0)
    assert torch.equal(real, 2 * to_slices(batch.images) - 1) and torch.equal(wanted[:, :, 0, 0], observed)
    assert torch.equal(candidate[observed], real[observed]) and not torch.equal(candidate[~observed], real[~observed])
    error = (candidate - real).abs()
    assert terms["l1"] == pytest.approx(error[~observed].mean().item(), rel=1e-5)
    total = 20 * terms["l1"] + 5 * terms["l1_observed"] + 0.1 * terms["adversarial"] + terms["discriminator"]
    assert loss.item() == pytest.approx(total, rel=1e-5)


def test_guidance_is_added_to_the_queries_of_every_stage():
    made = task("mmt", BRAIN, "guidance=mask")
    x, observed = torch.rand(1, 3, 32, 32), torch.tensor([[True, False, True]])
    guidance = made.net.guidance(observed, None)
    plain = made.net(x, observed, guidance)
    assert guidance.shape == (1, 8 + 16)
    for part in (slice(0, 8), slice(8, 24)):
        other = guidance.clone()
        other[:, part] += torch.randn_like(other[:, part])
        assert not torch.allclose(made.net(x, observed, other), plain, atol=1e-5)


def test_parameters_at_the_sizes_of_the_presets():
    counts = []
    for preset in ("brain-brats", "cardiac", "demo-brain"):
        told = load_settings("mmt", preset, kind=mmt.MMTSettings)
        counts.append(parameters(mmt.MMT, ModelConfig.preset(preset), told))
    assert counts == [12_135_942, 12_135_942, 771_486]


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(CopeditError, match="width = 8: must divide by heads = 3"):
        task("mmt", BRAIN, "heads=3")
