"""Stacks on the grid of a cardiac model: slices are copied, never mixed; any run of them may be missing."""

import numpy as np
import pytest

from copedit_rt.images.grids import fill_slices, nearest_matrices
from copedit_rt.images.nifti import Volume
from copedit_rt.images.prepare import empty_border, prepare
from tests.copedit_rt.images.test_grids import RAS, heart, heart_config, stack


def blanked(count, missing, data=None):
    data = (stack(count) if data is None else data).copy()
    data[..., list(missing)] = 0
    return heart(Volume.from_array(data, RAS), missing)


@pytest.mark.parametrize("count", [1, 2, 5, 9, 11, 15, 16])
def test_each_slice_of_the_grid_is_a_copy_of_the_nearest_and_back_nothing_is_lost(count):
    inward, outward = nearest_matrices(count, 8.0, 16, count * 8 / 16)
    for j in range(16):
        assert np.flatnonzero(inward[j]).tolist() == [int((j + 0.5) * count / 16)] and inward[j].max() == 1
    np.testing.assert_allclose(outward @ inward, np.eye(count), atol=1e-12)


def test_of_more_slices_than_the_grid_has_each_comes_back_from_the_nearest():
    inward, outward = nearest_matrices(21, 1.0, 16, 21 / 16)
    assert (inward.sum(1) == 1).all() and (outward.sum(1) == 1).all()
    assert (inward @ outward == np.eye(16)).all()
    assert (~inward.any(0)).sum() == 5


def test_the_grid_holds_the_files_slices():
    data = stack(11)
    images = prepare(heart(Volume.from_array(data, RAS), ()), heart_config(), allow_complete=True).images
    on_grid = np.concatenate(list(images[:, 0]), -1)
    assert all(np.array_equal(on_grid[..., j], data[..., (2 * j + 1) * 11 // 32]) for j in range(16))


@pytest.mark.parametrize("count", [9, 21])
def test_what_is_made_is_the_fill_where_the_model_changes_nothing(count):
    fill = stack(count, seed=1)
    prepared = prepare(blanked(count, range(2, 6)), heart_config())
    restored = prepared.restore(prepared.elements_of(fill), stack=fill)["sax"]
    low, high = prepared.intensity["sax"]
    np.testing.assert_allclose(restored[..., 2:6], fill[..., 2:6] * (high - low) + low, atol=1e-6)


@pytest.mark.parametrize(
    ("count", "missing", "given"),
    [(16, (1, 5, 6, 9, 13), 0), (8, range(1, 7), 0), (5, range(1, 5), 0), (7, range(6), 3)],
)
def test_where_every_slab_lacks_a_slice_that_which_lacks_least_is_given(count, missing, given):
    study = blanked(count, missing)
    prepared = prepare(study, heart_config())
    assert prepared.observed.tolist() == [i == given for i in range(4)]
    assert not prepared.images[~prepared.observed].any() and prepared.images[given].any()
    restored = prepared.restore(np.random.default_rng(0).random(prepared.images.shape))["sax"]
    kept = [i for i in range(count) if i not in missing]
    assert np.array_equal(restored[..., kept], study.reference.data[..., kept])
    assert (restored[..., list(missing)].std((0, 1)) > 0).all()


def test_the_border_is_what_an_edge_reaches_over_nothing():
    empty = np.zeros((6, 7), bool)
    empty[:2], empty[:, 5:], empty[4, 2] = True, True, True
    expected = empty.copy()
    expected[4, 2] = False  # a hole inside
    assert np.array_equal(empty_border(empty), expected)


@pytest.mark.parametrize(("nothing", "part"), [(0, np.s_[5:12, 6:20]), (-100, np.s_[5:12, 6:20]), (0, np.s_[5:])])
def test_an_empty_border_stays_empty_and_is_not_measured(nothing, part):
    data = np.full((16, 24, 12), nothing, np.float32)
    data[part] = stack(12)[part]
    prepared = prepare(blanked(12, (4, 5), data), heart_config())
    inside = np.delete(data[part], (4, 5), 2)
    np.testing.assert_allclose(prepared.intensity["sax"], np.percentile(inside, (0.5, 99.5)), rtol=1e-6)
    restored = prepared.restore(np.ones_like(prepared.images))["sax"]
    shown = restored[..., 4:6] != nothing
    assert shown[part].all() and shown.sum() == shown[part].size
    assert np.array_equal(np.delete(restored, (4, 5), 2), np.delete(data, (4, 5), 2))


def test_where_the_view_cuts_a_voxel_nothing_is_added_that_was_not_lost():
    """Of thin slices, which get back what the plane of the model cannot hold of the interpolated ones: here nothing."""
    data = np.broadcast_to(np.linspace(1, 9, 9, dtype=np.float32), (13, 19, 9))
    study = heart(Volume.from_array(data.copy(), np.diag([3.2, 3.2, 4.0, 1.0])), (4,))
    prepared = prepare(study, heart_config())
    share = prepared.frame.coverage()
    assert ((share > 0.2) & (share < 0.8)).any()
    restored = prepared.restore(prepared.elements_of(prepared.stack), stack=prepared.stack)["sax"]
    np.testing.assert_allclose(restored[..., 4], 5, atol=1e-4)


def test_the_interpolated_stack_is_at_hand_in_the_models_plane():
    prepared = prepare(blanked(9, (3, 4)), heart_config())
    low, high = prepared.intensity["sax"]
    expected = fill_slices(prepared.study.reference.data, (3, 4), 2)
    np.testing.assert_allclose(prepared.stack, np.clip((expected - low) / (high - low), 0, 1), atol=1e-6)
