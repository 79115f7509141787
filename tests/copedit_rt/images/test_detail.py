"""Detail carried over from the observed images, and the range of what is made."""

import numpy as np
import pytest

from copedit_rt.images.detail import BRIGHT, BRIGHTEST, Detail, lift_to_full_range, local_slopes, window_mean
from copedit_rt.images.grids import Frame, Orientation

FINE, COARSE = (24, 20, 18), (8, 10, 6)


FRAME = Frame.of(FINE, np.eye(4), Orientation.to_ras(np.eye(4)), COARSE, FINE)
ALL = slice(None)


def down(x):
    return FRAME.to_model(x)


def up(x):
    return FRAME.to_slab(FRAME.to_plane(x), ALL)


def images(count, seed=0):
    return np.random.default_rng(seed).random((count, *FINE), dtype=np.float32)


def carried(prediction, observed, **options):
    guides = np.array([down(x) for x in observed]).reshape(-1, *COARSE)
    return up(prediction) + Detail(prediction, guides, FRAME, **options).slab(observed, ALL)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_linear_relation_is_recovered(count):
    observed, weights = images(count), np.array([0.7, -0.4, 1.1], np.float32)[:count]
    truth = np.tensordot(weights, observed, 1) + np.float32(0.2)
    slopes = local_slopes(down(truth), np.stack([down(x) for x in observed]), ridge=0.0)
    np.testing.assert_allclose(slopes, np.broadcast_to(weights[:, None, None, None], slopes.shape), atol=2e-3)
    made = carried(down(truth), observed, ridge=0.0)
    np.testing.assert_allclose(made, truth, atol=5e-3)
    assert np.abs(up(down(truth)) - truth).max() > 0.3


def test_without_observed_images_nothing_changes():
    prediction = down(images(1)[0])
    np.testing.assert_array_equal(carried(prediction, images(0)), up(prediction))


def test_where_the_view_cuts_a_voxel_nothing_is_added_that_was_not_lost():
    affine, plane = np.diag([1.0, 1.0, 5.0, 1.0]), (24, 20)
    frame = Frame.of((*plane, 9), affine, Orientation.to_ras(affine), (*plane, 12), (*plane, 36.0))
    assert frame.cuts
    image = np.broadcast_to(images(1)[0, :, :, :1], (*plane, 9)).astype(np.float32)
    guide = frame.to_model(image)  # which holds all of it
    assert np.abs(Detail(guide, guide[None], frame, ridge=0.0).slab([image], ALL)).max() < 1e-3


def test_slabs_are_parts_of_the_whole():
    prediction, observed = down(images(1)[0]), images(2, seed=1)
    detail = Detail(prediction, np.stack([down(x) for x in observed]), FRAME)
    part = slice(5, 9)
    whole = detail.slab(observed, ALL)
    assert np.abs(whole).max() > 0.01
    np.testing.assert_allclose(detail.slab([x[..., part] for x in observed], part), whole[..., part], atol=1e-6)


def test_slopes_are_the_ridge_regression_of_each_window():
    guides, prediction = images(2)[:, :7, :6, :5], images(1, seed=4)[0, :7, :6, :5]
    slopes = local_slopes(prediction, guides, ridge=0.05)
    for x, y, z in ((3, 3, 2), (0, 0, 0), (6, 5, 4)):
        window = tuple(slice(max(0, i - 1), i + 2) for i in (x, y, z))
        a = guides[(slice(None), *window)].reshape(2, -1).astype(np.float64)
        b = prediction[window].ravel().astype(np.float64)
        a, b = a - a.mean(1, keepdims=True), b - b.mean()
        expected = np.linalg.solve(a @ a.T / b.size + 0.05 * np.eye(2), a @ b / b.size)
        np.testing.assert_allclose(slopes[:, x, y, z], expected, atol=1e-4)


def test_window_means():
    array = images(1)[0]
    mean = window_mean(array, 1)
    assert mean[4, 5, 6] == pytest.approx(array[3:6, 4:7, 5:8].mean(), abs=1e-6)
    assert mean[0, 0, 0] == pytest.approx(array[:2, :2, :2].mean(), abs=1e-6)


def full_range(image, bright=None):
    lifted = image.copy()
    lift_to_full_range(lifted, bright)
    return lifted


def test_the_brightest_voxels_are_lifted_to_the_full_range_and_nothing_else():
    image = 0.7 * images(1)[0]
    lifted = full_range(image)
    assert np.quantile(lifted, 0.995) == pytest.approx(1, abs=1e-3)
    below = image <= np.quantile(image, BRIGHT)
    np.testing.assert_array_equal(lifted[below], image[below])
    order = np.argsort(image, axis=None)
    assert (np.diff(lifted.ravel()[order]) >= 0).all()
    for other in (image / np.quantile(image, 0.995), np.zeros(FINE, np.float32)):
        np.testing.assert_array_equal(full_range(other), other)


def test_with_chances_it_is_the_likeliest_that_are_lifted():
    image, bright = 0.7 * images(2)[0], images(2)[1] ** 2
    lifted = full_range(image, bright)
    assert np.quantile(lifted, 0.995) == pytest.approx(1, abs=0.01)
    changed = bright > np.quantile(bright, BRIGHTEST)
    np.testing.assert_array_equal(lifted[~changed], image[~changed])
    assert (lifted[changed] >= image[changed]).all() and np.allclose(lifted[bright >= np.quantile(bright, 0.995)], 1)
    np.testing.assert_array_equal(full_range(image, np.zeros(FINE, np.float32)), image)  # nothing is known to be bright
