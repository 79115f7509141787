"""ControlNet's own: it equals its base at first, and never changes it."""

import pytest
import torch

from copedit_rt.config import ModelConfig
from copedit_rt.errors import CopeditError
from copedit_training.methods.controlnet import Controlled, ControlNetSettings
from copedit_training.stages.step import learning_rate
from tests.training.methods.small import BRAIN, CONFIGS, HEART, settings, steps, stir, task


def begun(config) -> Controlled:
    """At the start of the second part, on a base whose output is not zero."""
    torch.manual_seed(0)
    net = Controlled(config, settings("controlnet", config))
    stir(net.base)
    net.start()
    return net


def test_our_sizes():
    told = ControlNetSettings(100_000, 1, 1.0)
    with torch.device("meta"):
        net = Controlled(ModelConfig.preset("brain-brats"), told)
    base, control = (sum(p.numel() for p in part.parameters()) for part in (net.base, net.control))
    assert (base, control) == (166_692_384, 70_341_056)
    assert sum(p.numel() for p in net.parameters()) == base + control


@pytest.mark.parametrize("where", CONFIGS)
def test_at_first_it_equals_its_base_and_learns_through_its_zeros_alone(where):
    config = CONFIGS[where]
    net = begun(config)
    given = net.control.load_state_dict(net.base.net.state_dict(), strict=False)
    assert given.missing_keys and all(key.startswith("controlnet_") for key in given.missing_keys)
    z, known = torch.randn(2, 2, 3, 8, *config.latent)
    t, observed = torch.tensor([3, 400]), torch.tensor([[True, False, True], [False, True, False]])
    # The base frozen, as it is inside: of weights that learn torch folds some products, which rounds differently.
    net.base.requires_grad_(False)
    free = net.free(z, t)
    net.base.requires_grad_(True)
    steered = net(z, t, known, observed)
    assert free.std() > 0.1 and torch.equal(free, steered)

    (steered * torch.randn_like(steered)).sum().backward()
    assert all(p.grad is None for p in net.base.parameters()), "the base is frozen, decoder included"
    zeros = ("controlnet_down_blocks", "controlnet_mid_block")
    for name, p in net.control.named_parameters():
        assert p.grad is not None, name
        if name.startswith(zeros):
            assert not p.any() and p.grad.any(), name
        else:
            assert not p.grad.any(), name


def test_the_condition_matters_once_the_zeros_have_moved():
    net = begun(BRAIN)
    stir(net.control)
    z, known = torch.randn(2, 2, 3, 8, *BRAIN.latent)
    t, observed = torch.tensor([3, 400]), torch.tensor([[True, False, True], [False, True, False]])
    with torch.no_grad():
        steered = net(z, t, known, observed)
        assert not torch.equal(steered, net.free(z, t))
        assert not torch.equal(net(z, t, known + 1, observed), steered)
        assert not torch.equal(net(z, t, known, observed.flip(0)), steered)
        known[~observed] = torch.nan
        assert torch.equal(net(z, t, known, observed), steered)


def test_the_second_part_begins_with_the_averaged_base_and_leaves_it():
    made = task("controlnet", HEART, "steps=6", "control_steps=3", "weight_decay=0.1")
    seen = []
    for step in range(6):
        net, average = made.net, made.used
        seen.append([{k: v.clone() for k, v in x.state_dict().items()} for x in (net, average)])
        _one(made, step)
    seen.append([{k: v.clone() for k, v in x.state_dict().items()} for x in (made.net, made.used)])

    def base(state):
        return {k: v for k, v in state.items() if k.startswith("base.")}

    def same(a, b):
        return all(torch.equal(a[k], b[k]) for k in a)

    for net, average in seen[3:]:
        assert same(base(net), base(seen[3][1])) and same(base(average), base(seen[3][1]))
    assert not same(base(seen[2][0]), base(seen[3][0]))
    copied = {k: v for k, v in seen[3][0].items() if k.startswith("control.down_blocks")}
    assert same(copied, {k: seen[3][0][k.replace("control.", "base.net.")] for k in copied})
    first, last = ({k: v for k, v in seen[i][0].items() if k.startswith("control.")} for i in (0, 2))
    assert same(first, last) and not same(copied, {k: seen[6][0][k] for k in copied}), "each part trains its own"


def _one(made, step):
    from copedit_training.stages.step import Optimization, gradients

    made.optimization = getattr(made, "optimization", None) or Optimization(made)
    made.optimization.set_rate(learning_rate(made.settings, step))
    terms, _ = gradients(made, made.module, [made.draw(step, 0)])
    assert terms["control"] == float(step >= 3)
    made.optimization.step()
    made.after_step(step)


def test_each_part_has_a_schedule_of_its_own():
    told = settings("controlnet", BRAIN, "steps=100", "control_steps=40", "warmup=10", "lr=1e-3", "control_lr=1e-4")
    rates = [learning_rate(told, step) for step in range(100)]
    assert rates[0] == pytest.approx(1e-4) and max(rates) == rates[9] == rates[10] == 1e-3 and rates[59] < 2e-6
    assert rates[60] == pytest.approx(1e-5) and max(rates[60:]) == pytest.approx(1e-4)
    with pytest.raises(CopeditError, match="control_steps = 100: must be below steps = 100"):
        settings("controlnet", BRAIN, "steps=100", "control_steps=100")


def test_the_loss_is_of_the_noise_in_every_element():
    made = task("controlnet", BRAIN, "predicts=noise")
    batch = made.draw(0, 0)
    assert made.loss(batch)[0].item() == pytest.approx(batch.noise.square().mean().item())
    assert made.sparse and len(steps(made, 4)) == 4
