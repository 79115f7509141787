"""Fitting the priors of brains and hearts."""

import numpy as np

from copedit_rt.images.grids import fill_slices, nearest_matrices
from copedit_rt.prior import LOCAL, PLACE, features, views
from copedit_training.data.prepared import draw_run
from copedit_training.stages.prior import JITTER, _Pool, _Sample, fit_prior, fit_slice_prior, stack_of


def hearts(count: int, slices: int = 10, seed: int = 0) -> np.ndarray:
    """Stacks [count, H, W, N] of blobs that wander and shrink from base to apex, with grain that no neighbour knows."""
    rng = np.random.default_rng(seed)
    x, y = np.indices((64, 64))
    stacks = []
    for _ in range(count):
        cx, cy, r = 32 + rng.normal(0, 2, 3)
        dx, dy = rng.normal(0, 0.6, 2)
        z = np.arange(slices)
        away = np.hypot(x[..., None] - cx + dx * z, y[..., None] - cy + dy * z)
        ring = np.exp(-(((away - 0.5 * (r - 2 * z)) / 3) ** 2))
        stacks.append(0.2 + 0.5 * ring + rng.normal(0, 0.08, ring.shape))
    return np.clip(stacks, 0, 1).astype(np.float32)


def on_grid(stacks: np.ndarray) -> np.ndarray:
    inward = nearest_matrices(stacks.shape[-1], 1.0, 16, stacks.shape[-1] / 16)[0]
    return np.stack(np.split(stacks @ inward.T.astype(np.float32), 4, axis=-1), 1)[:, :, None].astype(np.float16)


def test_the_stack_of_the_slabs_is_found_again():
    for slices in (1, 5, 10, 16):
        stacks = hearts(2, slices)
        images = on_grid(stacks)
        assert all(np.array_equal(stack_of(x), y.astype(np.float16)) for x, y in zip(images, stacks, strict=True))


def test_the_fit_beats_interpolation_on_other_hearts_and_is_the_same_again():
    images = on_grid(hearts(6))
    prior = fit_slice_prior(images, [(32.0, 32.0)] * 3 + [None] * 3)
    assert np.array_equal(prior.weights, fit_slice_prior(images).weights)
    assert not np.array_equal(prior.weights, fit_slice_prior(images, [(26.0, 32.0)] * 6).weights)
    for missing in ((0, 1), (4,), (3, 4, 5, 6), (5, 6, 7, 8, 9)):
        for stack in hearts(3, seed=1):
            made, linear = prior.fill_stack(stack, missing), fill_slices(stack, missing, 2)
            near = np.s_[12:52, 12:52, list(missing)]
            error = [np.square(x[near] - stack[near]).mean() for x in (made, linear)]
            assert error[0] < 0.95 * error[1], missing


def test_a_brain_s_prior_tells_values_and_which_voxels_are_bright(capfd):
    """The second image is the first turned over, and bright where the third is dark, which its value does not show."""
    rng = np.random.default_rng(0)
    first, third = rng.random((2, 8, 1, 16, 16, 16)) * 0.6 + 0.2
    second = np.where(third < 0.25, np.where(rng.random(first.shape) < 0.5, 0.99, 0.05), 1 - first)
    studies = np.stack((first, second, third), axis=1).astype(np.float32)
    prior = fit_prior(studies, steps=600)
    observed, image = np.array([True, False, True]), studies[0]
    made, chance = prior._made(image, observed)[:, 0, 0]
    dark = third[0, 0] < 0.25
    assert np.square(made - second[0, 0])[~dark].mean() < 0.01
    assert chance[dark].mean() > 3 * chance[~dark].mean() and chance[~dark].mean() < 0.1
    assert np.array_equal(prior.fill(image, observed)[0, 0], made)
    said = capfd.readouterr().err
    assert "study 8 of 8" in said and "fitting the prior: step 600 of 600" in said and "step 240 of 240" in said


def test_voxels_are_drawn_as_a_fill_sees_them():
    rng = np.random.default_rng(0)
    studies, there = rng.random((2, 4, 6, 6, 6), np.float32), np.array([[True] * 4, [True, False, True, True]])
    studies[~there] = 0
    pool = _Pool([_Sample.of(x, t, share, rng) for x, t, share in zip(studies, there, (1, 3), strict=True)])
    rows, values, asked = pool.draw(4000, rng)
    seen = rows[:, -4 - PLACE : -PLACE] > 0
    own = values[:, 1] > 0  # only the first study shows something there
    assert abs(own.mean() - 0.25) < 0.03 and not (asked & seen).any()
    assert np.array_equal(asked | seen, np.where(own[:, None], *there))
    for study, counts in ((own, (1, 2, 3)), (~own, (1, 2))):
        found = np.bincount(asked[study].sum(1), minlength=4)
        assert all(abs(found[n] / study.sum() - 1 / len(counts)) < 0.06 for n in counts) and not found[0]
    for i in np.flatnonzero(own)[:20]:
        x, y, z = np.unravel_index(np.abs(studies[0] - values[i][:, None, None, None]).sum(0).argmin(), (6, 6, 6))
        np.testing.assert_allclose(values[i], studies[0][:, x, y, z], atol=1e-3)
        expected = features(views(studies[0]), seen[i], np.array([np.ravel_multi_index((x, y, z), (6, 6, 6))]))[0]
        np.testing.assert_allclose(rows[i, : 4 * LOCAL], expected[: 4 * LOCAL], atol=2e-3)
        assert np.abs(rows[i] - expected).max() < 6 * JITTER


def test_runs_leave_a_slice_and_are_of_every_length_and_place():
    rng = np.random.default_rng(0)
    runs = [draw_run(rng, 8) for _ in range(2000)]
    assert all(0 <= run.start < run.stop <= 8 and 1 <= len(run) <= 7 for run in runs)
    assert {(run.start, run.stop) for run in runs} == {(a, b) for a in range(8) for b in range(a + 1, 9) if b - a < 8}
    quarters = np.mean([len(run) in (2, 4, 6) for run in runs])
    assert abs(quarters - (0.4 + 0.6 * 3 / 7)) < 0.04
    assert all(len(draw_run(rng, 2)) == 1 for _ in range(20))
