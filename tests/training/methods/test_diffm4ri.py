"""DiffM4RI's own: a loss without a pattern, and the bias of replacement."""

import math

import numpy as np
import pytest
import torch

from copedit_rt.config import DiffusionConfig, ModelConfig
from copedit_rt.schedule import alpha_bar, timesteps
from copedit_training.methods.base import parameters
from copedit_training.methods.diffm4ri import DiffM4RI, DiffM4RISettings, replaced
from tests.training.methods.small import BRAIN, task

SCHEDULE = DiffusionConfig()
LEVELS = alpha_bar(SCHEDULE)


def test_our_size():
    assert parameters(DiffM4RI, ModelConfig.preset("brain-brats"), DiffM4RISettings(1, 1, 1.0)) == 129_935_104


def test_the_loss_knows_no_pattern():
    made = task("diffm4ri", BRAIN)
    with torch.no_grad():
        made.net.final.weight.normal_()
    batch = made.draw(0, 0)
    first = made.loss(batch)[0].item()
    batch.observed.logical_not_()
    assert made.loss(batch)[0].item() == first > 0


def denoised(rho: float, t: int) -> np.ndarray:
    """[2, 2]: E[x0 | z] = denoised @ z of two standard Gaussians with correlation rho, noised to timestep t."""
    sigma = np.array([[1, rho], [rho, 1]])
    return math.sqrt(LEVELS[t]) * sigma @ np.linalg.inv(LEVELS[t] * sigma + (1 - LEVELS[t]) * np.eye(2))


def sampled(rho: float, steps: int, eta: float, resample: int = 1, count: int = 20_000) -> torch.Tensor:
    """Samples [count] of the missing one, the observed one at 1."""
    generator = torch.Generator().manual_seed(0)
    known = torch.zeros(count, 2, 1, dtype=torch.float64)
    known[:, 0] = 1
    made = replaced(
        lambda z, t: z[..., 0].matmul(torch.from_numpy(denoised(rho, int(t[0]))).T)[..., None],
        known,
        torch.tensor([[True, False]]).expand(count, 2),
        SCHEDULE,
        steps,
        lambda: torch.randn(known.shape, generator=generator, dtype=torch.float64),
        resample,
        eta,
    )
    assert (made[:, 0] == 1).all()
    return made[:, 1, 0]


def recursion(rho: float, steps: int, eta: float) -> tuple[float, float]:
    """Mean and deviation of the missing one by the 2 x 2 recursion: every step is linear in z and its noise."""
    visited = timesteps(SCHEDULE, steps)
    mean, covariance = np.zeros(2), np.eye(2)
    for i, t in enumerate(visited):
        now, after = LEVELS[t], LEVELS[visited[i + 1]] if i + 1 < steps else 1.0
        variance = eta**2 * (1 - after) / (1 - now) * (1 - now / after)
        x0 = denoised(rho, int(t))
        eps = (np.eye(2) - math.sqrt(now) * x0) / math.sqrt(1 - now)
        step = math.sqrt(after) * x0 + math.sqrt(max(0.0, 1 - after - variance)) * eps
        mean, covariance = step @ mean, step @ covariance @ step.T + variance * np.eye(2)
        mean = np.array([math.sqrt(after), mean[1]])
        covariance = np.diag([1 - after, covariance[1, 1]])
    return mean[1], math.sqrt(covariance[1, 1])


@pytest.mark.parametrize(
    ("rho", "steps", "eta", "mean", "deviation"),
    [(0.8, 200, 0.0, 0.345, 0.77), (0.8, 250, 1.0, 0.49, 0.69), (0.0, 250, 0.0, 0.0, 1.0)],
)
def test_replacement_is_biased_as_the_recursion_says(rho, steps, eta, mean, deviation):
    expected = recursion(rho, steps, eta)
    assert expected == pytest.approx((mean, deviation), abs=0.012)
    found = sampled(rho, steps, eta)
    assert found.mean().item() == pytest.approx(expected[0], abs=4 * expected[1] / math.sqrt(len(found)))
    assert found.std().item() == pytest.approx(expected[1], rel=0.025)


def test_visiting_each_level_again_repairs_most_of_the_bias():
    """The truth is 0.8 and 0.6."""
    once, often = (sampled(0.8, 50, 1.0, visits, 4000).mean().item() for visits in (1, 10))
    assert abs(often - 0.8) < 0.3 * abs(once - 0.8)


def test_sampling_draws_anew_at_every_visit():
    made, asked = task("diffm4ri", BRAIN, "sampler_steps=2", "resample=3"), []

    def noise(element, shape):
        asked.append(element)
        return np.random.default_rng(len(asked)).standard_normal(shape, dtype=np.float32)

    made.synthesise(torch.rand(1, 3, 1, *BRAIN.image), torch.tensor([[True, False, True]]), noise)
    assert asked[:4] == ["t1", "t2", "pd", "t1-2"] and len(set(asked)) == len(asked)
    assert len(asked) == 3 * (1 + (2 + 1) * 2 + 2 + 2)  # begin, two visits and back, the third, the last step
