"""Muon in float32 on a CPU, against torch's and against singular values in float64."""

import copy

import pytest
import torch

from copedit_training.stages.muon import Muon, orthogonal

USUAL = (3.4445, -4.7750, 2.0315)


@pytest.mark.parametrize("shape", [(24, 64), (64, 24), (32, 32)])
def test_singular_values_are_those_of_the_iteration(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = USUAL[0] * s + USUAL[1] * s**3 + USUAL[2] * s**5
    torch.testing.assert_close(orthogonal(matrix, USUAL, 5, 1e-7).double(), u @ s.diag() @ v, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["match_rms_adamw", "original", None])
def test_steps_and_states_are_torch_s_to_bfloat16(kind):
    generator = torch.Generator().manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((16, 48), (48, 16))]
    ours.append(torch.nn.Parameter(torch.randn(8, 8, generator=generator)))  # without a gradient
    theirs, before = copy.deepcopy(ours), copy.deepcopy(ours)
    settings = {"lr": 0.02, "weight_decay": 0.1, "adjust_lr_fn": kind}
    optimizers = Muon(ours, **settings), torch.optim.Muon(theirs, **settings)
    for _ in range(3):
        for a, b in list(zip(ours, theirs, strict=True))[:2]:
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b, old in zip(ours, theirs, before, strict=True):
        assert (a - b).norm() <= 0.02 * (b - old).norm()
    assert torch.equal(ours[2], before[2])
    states = [optimizer.state_dict() for optimizer in optimizers]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    for i in (0, 1):
        assert torch.equal(states[0]["state"][i]["momentum_buffer"], states[1]["state"][i]["momentum_buffer"])
    assert optimizers[0].step(lambda: torch.tensor(3.0)) == 3
