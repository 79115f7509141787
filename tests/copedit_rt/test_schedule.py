"""The schedule and the sampler against closed forms: for Gaussian x0 the exact prediction and end are known.

Where x0 ~ N(mu, s^2), z = sqrt(a) x0 + sqrt(1-a) n has the posterior mean E[x0|z] = mu + s^2 sqrt(a) d / v
with d = z - sqrt(a) mu and v = a s^2 + 1 - a. DDIM's limit of many steps carries d / sqrt(v) unchanged from
t=499 to alpha-bar 1: it ends at mu + s d / sqrt(v).
"""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from copedit_rt.config import DenoiserConfig, DiffusionConfig, ModelConfig
from copedit_rt.errors import CopeditError
from copedit_rt.networks.denoiser import MDiT3D
from copedit_rt.networks.sampler import add_noise, sample
from copedit_rt.schedule import alpha_bar, begun, ddim_table, drawn, noise, solver_tables, timesteps

CONFIG = DiffusionConfig()


def test_noise_is_the_same_for_numpys_kinds_of_its_key():
    plain = noise(5, "s1", "t1", (4,), 2)
    assert np.array_equal(noise(np.int64(5), np.str_("s1"), np.str_("t1"), (4,), np.uint8(2)), plain)


def naive_alpha_bar() -> list[float]:
    """Running product of 1 - beta, with betas linear in their square root from 0.0015 to 0.0195."""
    product, out = 1.0, []
    for t in range(500):
        beta = (math.sqrt(0.0015) + (math.sqrt(0.0195) - math.sqrt(0.0015)) * t / 499) ** 2
        product *= 1 - beta
        out.append(product)
    return out


A = naive_alpha_bar()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian(mu: Tensor | float, s: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The exact posterior mean of x0 ~ N(mu, s^2), elementwise."""

    def predict(z: Tensor, t: Tensor) -> Tensor:
        a = torch.tensor(A, dtype=z.dtype)[t].reshape(-1, *[1] * (z.ndim - 1))
        return mu + s * s * a.sqrt() * (z - a.sqrt() * mu) / (a * s * s + 1 - a)

    return predict


NONE_OBSERVED = torch.zeros(1, 1, dtype=torch.bool)


# The schedule


def test_alpha_bar() -> None:
    np.testing.assert_allclose(alpha_bar(CONFIG), A, rtol=1e-12)
    assert alpha_bar(CONFIG).dtype == np.float64


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20, 50, 200, 250, 333, 499, 500])
def test_timesteps_stride_the_training_schedule(steps: int) -> None:
    t = timesteps(CONFIG, steps)
    assert len(t) == steps and t[0] == 499 and t[-1] >= 0
    gaps = -np.diff(t)
    assert (gaps >= 1).all()
    if steps > 1:
        assert gaps.max() - gaps.min() <= 1, "uneven strides"


@pytest.mark.parametrize("steps", [0, -1, 501])
def test_impossible_step_counts_are_refused(steps: int) -> None:
    with pytest.raises(CopeditError, match=str(steps)):
        timesteps(CONFIG, steps)


def test_where_a_prior_fills_in_no_steps_are_possible() -> None:
    with pytest.raises(CopeditError, match="steps -1: must be between 0 and 500"):
        timesteps(replace(CONFIG, steps=0), -1)


def test_sampling_can_start_part_of_the_way() -> None:
    part = replace(CONFIG, start=0.3, steps=10)
    assert timesteps(part, 150).tolist() == list(range(149, -1, -1)) and timesteps(part, 1).tolist() == [149]
    x0, drawn = np.full(5, 2.0, np.float32), np.full(5, -1.0, np.float32)
    np.testing.assert_allclose(begun(part, drawn, x0), 2 * A[149] ** 0.5 - (1 - A[149]) ** 0.5, rtol=1e-6)
    (table,) = solver_tables(part, 10, "ddim")
    z = begun(part, drawn, x0)
    for a, b in table:  # with the right answer at every step the noise is gone at the end
        z = a * z + b * x0
    np.testing.assert_allclose(z, x0, rtol=1e-6)
    with pytest.raises(CopeditError, match="between 1 and 150"):
        timesteps(part, 151)


@pytest.mark.parametrize("steps", [1, 3, 20, 200, 500])
def test_table_is_the_ddim_update(steps: int) -> None:
    """z' = sqrt(a') x0 + sqrt(1-a') eps, eps from z and x0; the last step lands on alpha-bar 1."""
    table, t = ddim_table(CONFIG, steps), timesteps(CONFIG, steps)
    assert table.shape == (steps, 2)
    z, x0 = 0.7, -1.3
    for i in range(steps):
        now, after = A[t[i]], A[t[i + 1]] if i + 1 < steps else 1.0
        eps = (z - math.sqrt(now) * x0) / math.sqrt(1 - now)
        expected = math.sqrt(after) * x0 + math.sqrt(1 - after) * eps
        assert math.isclose(table[i, 0] * z + table[i, 1] * x0, expected, rel_tol=1e-10)
    assert table[-1].tolist() == [0.0, 1.0]


# Noise


def test_add_noise_touches_the_missing_alone() -> None:
    z0, eps = normal(3, 2, 4, 2, 2, 2), normal(3, 2, 4, 2, 2, 2, seed=1)
    level = torch.tensor([A[0], A[250], A[499]], dtype=torch.float64)
    observed = torch.tensor([[True, False], [False, False], [False, True]])
    z = add_noise(z0, eps, level, observed)
    for b in range(3):
        for i in range(2):
            if observed[b, i]:
                assert torch.equal(z[b, i], z0[b, i])
            else:
                expected = math.sqrt(level[b]) * z0[b, i] + math.sqrt(1 - level[b]) * eps[b, i]
                torch.testing.assert_close(z[b, i], expected)


def test_observed_values_survive_even_noise_that_is_not_a_number() -> None:
    z0, observed = normal(1, 2, 8, 2, 2, 2).half(), torch.tensor([[True, False]])
    eps = torch.full_like(z0, math.nan)
    z = add_noise(z0, eps, torch.tensor([0.5]), observed)
    assert z.dtype == z0.dtype and torch.equal(z[:, 0], z0[:, 0]) and z[:, 1].isnan().all()


def test_noise_is_keyed_by_seed_study_element_and_sample() -> None:
    shape = (8, 6, 6, 4)
    keys = [
        (0, "sub-01", "t1", 0),
        (1, "sub-01", "t1", 0),
        (0, "sub-02", "t1", 0),
        (0, "sub-01", "t2", 0),
        (0, "sub-01", "t1", 1),
        (0, "sub-0", "1t1", 0),
        (2**63, "sub-01", "t1", 0),
    ]
    drawn = [noise(seed, study, element, shape, sample=n) for seed, study, element, n in keys]
    again = [noise(seed, study, element, shape, sample=n) for seed, study, element, n in reversed(keys)][::-1]
    for x, y in zip(drawn, again, strict=True):
        assert x.dtype == np.float32 and x.shape == shape
        assert x.tobytes() == y.tobytes(), "the order of the calls matters"
    correlation = np.corrcoef([x.ravel() for x in drawn]) - np.eye(len(keys))
    assert np.abs(correlation).max() < 5 / math.sqrt(math.prod(shape))


def test_noise_leaves_global_generators_alone() -> None:
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    first = noise(3, "a", "t1", (16,))
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert noise(3, "a", "t1", (16,)).tobytes() == first.tobytes()
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_is_standard_normal() -> None:
    x = noise(0, "study", "t1", (400_000,)).astype(np.float64)
    n = math.sqrt(len(x))
    assert abs(x.mean()) < 4 / n
    assert abs(x.var() - 1) < 4 * math.sqrt(2) / n
    assert abs((x**3).mean()) < 4 * math.sqrt(15) / n
    assert abs((x**4).mean() - 3) < 4 * math.sqrt(96) / n


def test_noise_is_the_same_in_another_process() -> None:
    code = (
        "import sys; from copedit_rt.schedule import noise\n"
        "sys.stdout.write(noise(7, 'study', 'flair', (50,)).tobytes().hex())"
    )
    root = Path(__file__).resolve().parents[2]
    env = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout == noise(7, "study", "flair", (50,)).tobytes().hex(), done.stderr


# The sampler on Gaussians


@pytest.mark.parametrize("steps", [1, 2, 20, 200, 500])
def test_a_certain_x0_is_hit_exactly(steps: int) -> None:
    mu = normal(1, 1, 50)
    out = sample(gaussian(mu, 0.0), normal(1, 1, 50, seed=1), NONE_OBSERVED, CONFIG, steps)
    assert torch.equal(out, mu)


def exact_end(z: Tensor, mu: float, s: float) -> Tensor:
    a = A[499]
    return mu + s * (z - math.sqrt(a) * mu) / math.sqrt(a * s * s + 1 - a)


@pytest.mark.parametrize("mu, s", [(0.0, 1.0), (1.5, 0.5), (-2.0, 2.0)])
def test_ddim_converges_to_the_exact_map(mu: float, s: float) -> None:
    """First order: halving the stride halves the error, until all 500 training steps are taken."""
    z = normal(1, 1, 1000)
    exact = exact_end(z, mu, s)
    errors = []
    for steps in (31, 62, 125, 250, 500):
        out = sample(gaussian(mu, s), z, NONE_OBSERVED, CONFIG, steps)
        errors.append((out - exact).abs().max().item())
    ratios = [coarse / fine for coarse, fine in pairwise(errors)]
    assert all(1.7 < ratio < 2.3 for ratio in ratios), (errors, ratios)
    assert errors[-1] < 0.02 * s * z.abs().max().item()


@pytest.mark.parametrize("mu, s", [(1.5, 0.5), (-2.0, 2.0)])
@pytest.mark.parametrize("steps", [1, 7, 200])
def test_every_step_count_gives_its_closed_form(mu: float, s: float, steps: int) -> None:
    """On a Gaussian each step scales d by a known factor, so a coarse sampler's end is known to rounding."""
    z = normal(1, 1, 1000)
    levels = [A[t] for t in timesteps(CONFIG, steps)] + [1.0]
    d = z - math.sqrt(levels[0]) * mu
    for now, after in pairwise(levels):
        v = now * s * s + 1 - now
        d = d * (math.sqrt(after * now) * s * s + math.sqrt((1 - after) * (1 - now))) / v
    out = sample(gaussian(mu, s), z, NONE_OBSERVED, CONFIG, steps)
    torch.testing.assert_close(out, mu + d, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mu, s", [(0.0, 1.0), (1.5, 0.5), (-2.0, 2.0)])
def test_dpm2m_converges_to_the_exact_map_at_second_order(mu: float, s: float) -> None:
    """Halving the stride quarters the error, up to all 500 training steps and the exact answer at alpha-bar 1."""
    z = normal(1, 1, 1000)
    exact = exact_end(z, mu, s)
    errors = []
    for steps in (31, 62, 125, 250, 500):
        out = sample(gaussian(mu, s), z, NONE_OBSERVED, CONFIG, steps, solver="dpm2m")
        errors.append((out - exact).abs().max().item())
    ratios = [coarse / fine for coarse, fine in pairwise(errors)]
    assert all(3.3 < ratio < 4.5 for ratio in ratios), (errors, ratios)
    assert errors[-1] < 1e-4 * s * z.abs().max().item()
    first_order = sample(gaussian(mu, s), z, NONE_OBSERVED, CONFIG, 31)
    assert errors[0] < 0.2 * (first_order - exact).abs().max().item()


@pytest.mark.parametrize("steps", [1, 2, 3, 20, 500])
def test_dpm2m_is_the_exact_solution_for_x0_linear_in_log_alpha_bar(steps: int) -> None:
    """Of dy/dk = (y - x0) / k for y = z / sqrt(a), k = sqrt((1 - a) / a), by quadrature where x0 = p + q log a."""
    p, q, z, t = 0.7, -0.3, 1.1, timesteps(CONFIG, steps)
    tables, before = solver_tables(CONFIG, steps, "dpm2m"), math.nan
    for i in range(steps):
        now, after = A[t[i]], A[t[i + 1]] if i + 1 < steps else 1.0
        x0 = p + q * math.log(now) if i else 0.4  # the first step knows one prediction
        k, to = (math.sqrt((1 - a) / a) for a in (now, after))
        nodes, weights = np.polynomial.legendre.leggauss(20)
        # y' = y k'/k + k' * integral of x0 / k^2 over [k', k], which in r = k'/k is a mean over r in [k'/k, 1] ...
        if to:
            at = to + (k - to) * (nodes + 1) / 2
            x = p - q * np.log1p(at**2) if i else np.full_like(at, x0)
            integral = float((weights * x / at**2).sum() * (k - to) / 2)
            expected = math.sqrt(after) * (z / math.sqrt(now) * to / k + to * integral)
        else:  # ... and ends at x0 of alpha-bar 1
            expected = p if i else x0
        got = tables[0][i] @ (z, x0) if i == 0 else tables[1][i] @ (tables[0][i] @ (z, x0), before)
        assert math.isclose(got, expected, rel_tol=1e-9), i
        z, before = got, x0 if i else p + q * math.log(now)


@pytest.mark.parametrize("steps", [1, 2, 20, 500])
def test_dpm2m_starts_as_ddim_and_lands_on_a_certain_x0(steps: int) -> None:
    first, second = solver_tables(CONFIG, steps, "dpm2m")
    np.testing.assert_array_equal(first[0], ddim_table(CONFIG, steps)[0])
    assert second[0].tolist() == [1.0, 0.0] and first[-1, 0] == 0
    np.testing.assert_array_equal(solver_tables(CONFIG, steps)[0], ddim_table(CONFIG, steps))
    mu, seen = normal(1, 1, 50), []

    def predict(z: Tensor, t: Tensor) -> Tensor:
        seen.append(int(t))
        return mu

    out = sample(predict, normal(1, 1, 50, seed=1), NONE_OBSERVED, CONFIG, steps, solver="dpm2m")
    torch.testing.assert_close(out, mu, rtol=1e-12, atol=1e-12)
    assert seen == timesteps(CONFIG, steps).tolist() and seen[0] == 499


def test_the_solver_is_the_configurations_unless_another_is_asked_for() -> None:
    config, z = replace(CONFIG, solver="dpm2m"), normal(1, 1, 10)
    runs = [sample(gaussian(1.0, 0.5), z, NONE_OBSERVED, c, 5, solver=s) for c in (CONFIG, config)
            for s in (None, "ddim", "dpm2m")]  # fmt: skip
    assert [torch.equal(run, runs[1]) for run in runs] == [True, True, False, False, True, False]
    assert torch.equal(runs[2], runs[3]) and torch.equal(runs[3], runs[5])
    with pytest.raises(CopeditError, match="solver 'heun' is unknown; choose one of ddim, dpm2m"):
        sample(gaussian(1.0, 0.5), z, NONE_OBSERVED, CONFIG, 5, solver="heun")


def test_many_steps_give_the_right_mean_and_deviation() -> None:
    mu, s, n, a = 1.5, 0.6, 100_000, A[499]
    start = math.sqrt(a) * mu + math.sqrt(a * s * s + 1 - a) * normal(1, 1, n)
    out = sample(gaussian(mu, s), start, NONE_OBSERVED, CONFIG, 500)
    assert abs(out.mean().item() - mu) < 4 * s / math.sqrt(n) + 0.005
    assert abs(out.std().item() / s - 1) < 0.02


def test_the_missing_is_drawn_given_the_observed() -> None:
    """Two correlated elements, one observed: the other must follow N(r x, 1 - r^2)."""
    r, n, steps = 0.8, 2000, 500
    x = normal(n, seed=3)
    z = torch.stack((x, normal(n, seed=4)))[None]
    observed = torch.tensor([[True, False]])

    def predict(z: Tensor, t: Tensor) -> Tensor:
        missing = gaussian(r * z[:, 0], math.sqrt(1 - r * r))(z[:, 1], t)
        return torch.stack((torch.full_like(missing, math.nan), missing), dim=1)

    out = sample(predict, z, observed, CONFIG, steps)
    assert torch.equal(out[0, 0], x)
    a, v = A[499], 1 - r * r
    exact = r * x + math.sqrt(v) * (z[0, 1] - math.sqrt(a) * r * x) / math.sqrt(a * v + 1 - a)
    assert (out[0, 1] - exact).abs().max() < 0.03


# What the sampler shows the network


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [1, 20])
@pytest.mark.parametrize("solver", ["ddim", "dpm2m"])
def test_observed_latents_keep_their_bits_at_every_step(dtype: torch.dtype, steps: int, solver: str) -> None:
    z = normal(3, 4, 8, 3, 3, 2).to(dtype)
    z[0, 0, 0, 0, 0] = torch.tensor([-0.0, 1e-40], dtype=dtype)  # a signed zero and a denormal
    before = z.clone()
    observed = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0], [0, 0, 0, 1]]).bool()
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    seen: list[int] = []

    def predict(now: Tensor, t: Tensor) -> Tensor:
        assert now.dtype == dtype and torch.equal(now[observed].view(bits), before[observed].view(bits))
        assert t.shape == (3,) and (t == t[0]).all()
        seen.append(int(t[0]))
        out = 0.1 * now
        out[observed] = math.nan
        return out

    out = sample(predict, z, observed, CONFIG, steps, solver=solver)
    assert torch.equal(out[observed].view(bits), before[observed].view(bits))
    assert out.isfinite().all() and not torch.equal(out[~observed], before[~observed])
    assert torch.equal(z.view(bits), before.view(bits)), "the caller's latents were overwritten"
    assert seen == timesteps(CONFIG, steps).tolist() and seen[0] == 499


def test_the_last_prediction_is_the_result() -> None:
    predictions = []

    def predict(z: Tensor, t: Tensor) -> Tensor:
        predictions.append(torch.cos(z) + t[0] / 500)
        return predictions[-1]

    out = sample(predict, normal(1, 2, 8, 2, 2, 1).float(), torch.tensor([[False, True]]), CONFIG, 9)
    assert torch.equal(out[0, 0], predictions[-1][0, 0])


def test_progress_counts_the_steps() -> None:
    calls: list[tuple[int, int]] = []
    sample(lambda z, t: z, normal(1, 1, 4), NONE_OBSERVED, CONFIG, 5, lambda i, n: calls.append((i, n)))
    assert calls == [(i, 5) for i in range(1, 6)]


def start_of(study: str, elements: tuple[str, ...], shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.from_numpy(np.stack([noise(seed, study, element, shape) for element in elements]))


def test_equal_seeds_give_equal_bits_in_any_batch() -> None:
    """A study sampled alone, in a batch, or at another place of the batch ends on the same bits."""
    elements, shape = ("t1", "t1ce", "t2", "flair"), (8, 3, 3, 2)
    observed = torch.tensor([[True, False, False, True]])

    def run(studies: tuple[str, ...], seed: int = 5) -> list[Tensor]:
        z = torch.stack([start_of(study, elements, shape, seed) for study in studies])
        return list(sample(lambda z, t: torch.tanh(z), z, observed.expand(len(z), -1), CONFIG, 10))

    a, b, c = run(("a", "b", "c"))
    for studies, expected in ((("a",), [a]), (("c", "a"), [c, a]), (("b", "c"), [b, c])):
        for x, y in zip(run(studies), expected, strict=True):
            assert torch.equal(x, y)
    assert not torch.equal(a, b) and not torch.equal(a, run(("a",), seed=6)[0])


def test_equal_seeds_give_equal_bits_with_a_network() -> None:
    config = replace(
        ModelConfig.preset("demo-brain"),
        image=(16, 16, 8),
        denoiser=DenoiserConfig(width=32, heads=2, blocks=2, patch=(2, 2, 1)),
    )
    torch.manual_seed(0)
    net = MDiT3D(config).eval()
    with torch.no_grad():
        for p in net.parameters():
            p += 0.05 * torch.randn_like(p)
    observed = torch.tensor([[True, False, True, False], [False, True, True, True]])
    prompts = torch.randn(2, 3, config.tokenizer.prompt_dim)
    z = torch.stack(
        [
            start_of(study, config.elements, (config.tokenizer.latent_channels, *config.latent), 0)
            for study in ("a", "b")
        ]
    )

    def run(part: slice) -> Tensor:
        return sample(lambda z, t: net(z, t, prompts[part], observed[part]), z[part], observed[part], CONFIG, 4)

    both = run(slice(0, 2))
    assert torch.equal(both, run(slice(0, 2)))
    assert both.isfinite().all() and both.abs().mean() > 0.01
    torch.testing.assert_close(both[1:], run(slice(1, 2)), rtol=1e-4, atol=1e-5)


def test_how_a_result_was_drawn_in_words():
    said = {"method": "ddim", "steps": 2, "seed": 3, "samples": 4}
    assert drawn(said) == "2 steps of ddim, 4 samples, seed 3"
    assert drawn({"method": "prior", "steps": 0, "seed": 3, "samples": 1}) == "no steps, the prior's fill as it is"
    assert drawn({}) == "? steps of ?, ? samples, seed ?"
