"""Geometry: nothing moves, nothing is mirrored, and what was there comes back."""

import dataclasses
import itertools
import json
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.orientations import axcodes2ornt, inv_ornt_aff
from scipy import ndimage
from scipy.spatial.transform import Rotation

from copedit_rt.config import ModelConfig
from copedit_rt.errors import CopeditError
from copedit_rt.images import nifti
from copedit_rt.images.grids import (
    SAME_SPACING,
    Orientation,
    _along,
    closing,
    fill_slices,
    from_border,
    resample_matrix,
    slice_axis,
    surroundings,
)
from copedit_rt.images.nifti import Volume, same_grid
from copedit_rt.images.prepare import prepare
from copedit_rt.images.study import Study

QUICK = settings(max_examples=60, deadline=None)
RAS = np.array([[2.0, 0, 0, -17], [0, 2, 0, 5], [0, 0, 5, 30], [0, 0, 0, 1]])
AXES = [
    codes
    for pairs in itertools.permutations(("LR", "PA", "IS"))
    for codes in itertools.product(*pairs)  # all 48 ways to store a volume
]


def config(name="demo-brain", image=(16, 24, 8), field_of_view=(32.0, 48.0, 40.0)):
    model = ModelConfig.preset(name)
    preprocessing = dataclasses.replace(model.preprocessing, field_of_view=field_of_view)
    return dataclasses.replace(model, image=image, preprocessing=preprocessing)


def heart_config(depth=4, field_of_view=(32.0, 48.0, None)):
    return config("demo-cardiac", (16, 24, depth), field_of_view)


def brain(volumes):
    return Study("subject", "brain", volumes)


def heart(volume, missing):
    return Study("subject", "cardiac", {"sax": volume}, missing_slices=tuple(missing))


def unit_image(shape, seed=0):
    """0..1 with enough of both ends that the percentiles are exactly 0 and 1, so that nothing is rounded."""
    image = np.random.default_rng(seed).uniform(0.01, 1, shape).astype(np.float32)
    flat = image.reshape(-1)
    flat[::40], flat[1::40] = 0, 1
    return image


def stored_as(data, affine, codes):
    """The same image with its voxels stored in another order."""
    ornt = nib.orientations.ornt_transform(nib.io_orientation(affine), axcodes2ornt(codes))
    return Volume.from_array(nib.apply_orientation(data, ornt), affine @ inv_ornt_aff(ornt, data.shape))


# ---- resampling --------------------------------------------------------------------------------------------

grids = st.tuples(st.integers(2, 40), st.floats(0.3, 9), st.integers(1, 40), st.floats(0.3, 9), st.floats(-30, 30))


@QUICK
@given(grids)
def test_resampling_averages_and_keeps_straight_lines(grid):
    n_in, s_in, n_out, s_out, shift = grid
    matrix = resample_matrix(*grid)
    assert matrix.shape == (n_out, n_in)
    assert matrix.min() >= 0
    centre_in = (np.arange(n_in) - (n_in - 1) / 2) * s_in
    centre_out = (np.arange(n_out) - (n_out - 1) / 2) * s_out + shift
    half = s_out / 2 if s_out / s_in > 1 else 0
    edge = n_in * s_in / 2
    inside = np.abs(centre_out) + half < edge - 1e-6
    outside = np.abs(centre_out) - half > edge + 1e-6
    np.testing.assert_allclose(matrix.sum(1)[inside], 1, atol=1e-12)
    assert not matrix[outside].any()
    assert matrix.sum(1).max() <= 1 + 1e-12
    if s_out <= s_in:  # between the outermost centres a straight line stays one: nothing is shifted
        straight = np.abs(centre_out) <= edge - s_in / 2
        np.testing.assert_allclose((matrix @ centre_in)[straight], centre_out[straight], atol=s_in * 1e-3)


@QUICK
@given(grids, st.integers(0, 2**32 - 1))
def test_resampling_agrees_with_an_independent_reference(grid, seed):
    n_in, s_in, n_out, s_out, shift = grid
    values = np.random.default_rng(seed).normal(size=n_in)
    edges_in = (np.arange(n_in + 1) - n_in / 2) * s_in
    edges_out = (np.arange(n_out + 1) - n_out / 2) * s_out + shift
    if s_out > s_in * (1 + SAME_SPACING):  # mean over the voxel = difference of the integral
        integral = np.concatenate([[0], np.cumsum(values * s_in)])
        expected = np.diff(np.interp(edges_out, edges_in, integral)) / s_out
    elif s_out < s_in * (1 - SAME_SPACING):
        centres = (edges_out[1:] + edges_out[:-1]) / 2
        expected = np.interp(centres, (edges_in[1:] + edges_in[:-1]) / 2, values)
        near = np.abs(np.abs(centres) - edges_in[-1]) < 1e-6  # on the edge either answer is right
        expected[np.abs(centres) > edges_in[-1]] = 0
        expected[near] = (resample_matrix(*grid) @ values)[near]
    else:
        return
    np.testing.assert_allclose(resample_matrix(*grid) @ values, expected, atol=1e-9)


@QUICK
@given(st.integers(2, 30), st.integers(-10, 10), st.floats(0.2, 9))
def test_equal_voxels_are_copied(n, margin, spacing):
    m = max(n + 2 * margin, 1)
    margin = (m - n) // 2 if (m - n) % 2 == 0 else 0
    if m != n + 2 * margin:
        return
    expected = np.pad(np.eye(n), ((max(margin, 0),) * 2, (0, 0)))[max(-margin, 0) :][:m]
    np.testing.assert_array_equal(resample_matrix(n, spacing, m, spacing * (1 + 1e-7)), expected)


def test_coarse_voxels_are_means():
    np.testing.assert_allclose(resample_matrix(4, 1, 2, 2), [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]])
    np.testing.assert_allclose(resample_matrix(3, 1, 2, 1.5), [[2 / 3, 1 / 3, 0], [0, 1 / 3, 2 / 3]])


def test_fine_voxels_are_interpolated_between_centres():
    np.testing.assert_allclose(resample_matrix(2, 2, 4, 1), [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])


@pytest.mark.parametrize("standardised", [False, True])
def test_resample_onto_shows_the_outer_half_of_border_voxels_and_background_beyond(standardised):
    data = 3 + unit_image((6, 7, 4))
    if standardised:
        data = data - data.mean()
        data[np.ix_((0, -1), (0, -1), (0, -1))] = -9
    volume = Volume.from_array(data, np.diag([1, 1, 5, 1.0]))
    affine = np.eye(4)
    affine[2, 3] = -4  # the first slice reaches from -2.5 to 2.5 mm, the last to 17.5
    made = nifti.resample_onto(volume, Volume.from_array(np.zeros((6, 7, 24)), affine))
    height = np.arange(24) - 4
    inside = made[..., (-2.5 < height) & (height < 17.5)]
    at = np.clip((np.arange(-2, 18) / 5), 0, 3)
    low = np.minimum(at.astype(int), 2)
    expected = volume.data[..., low] * (1 - (at - low)) + volume.data[..., low + 1] * (at - low)
    np.testing.assert_allclose(inside, expected, atol=1e-5)
    outside = made[..., (height < -2.5) | (height > 17.5)]
    assert (outside == (-9 if standardised else 0)).all()


def test_resample_onto_shifts_by_whole_voxels_exactly_and_pads_with_zero():
    volume = Volume.from_array(unit_image((6, 7, 8)), np.diag([1, 2, 3, 1.0]))
    affine = volume.affine.copy()
    affine[:3, 3] = 2, -2, 3  # two, minus one and one voxels
    reference = Volume.from_array(np.zeros((6, 7, 8)), affine)
    expected = np.zeros((6, 7, 8), np.float32)
    expected[:4, 1:, :7] = volume.data[2:, :6, 1:]
    np.testing.assert_allclose(nifti.resample_onto(volume, reference), expected, atol=1e-6)


def test_resample_onto_an_oblique_grid_agrees_with_float64():
    volume = Volume.from_array(unit_image((12, 13, 14)), np.diag([1, 1.5, 2, 1.0]))
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", [20, -10, 35], degrees=True).as_matrix() * [0.7, 0.9, 1.1]
    affine[:3, 3] = 3, 4, 5
    reference = Volume.from_array(np.zeros((9, 8, 7)), affine)
    points = np.stack(np.indices((9, 8, 7)).reshape(3, -1)).T @ affine[:3, :3].T + affine[:3, 3]
    voxels = (points / [1, 1.5, 2]).T
    expected = ndimage.map_coordinates(volume.data.astype(np.float64), voxels, order=1, mode="nearest")
    half = np.array([[6, 6.5, 7]]).T
    expected[(abs(voxels - half + 0.5) > half).any(0)] = 0
    np.testing.assert_allclose(nifti.resample_onto(volume, reference).reshape(-1), expected, atol=1e-5)


# ---- orientation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codes", AXES, ids="".join)
def test_every_voxel_order_gives_the_same_image_and_comes_back_exactly(codes):
    data = unit_image((16, 24, 8))
    volume = stored_as(data, RAS, codes)
    assert nib.aff2axcodes(volume.affine) == codes
    prepared = prepare(brain({"t1": volume}), config())
    np.testing.assert_array_equal(prepared.images[0, 0], data)
    images = prepared.images.copy()
    images[2] = images[0]
    np.testing.assert_array_equal(prepared.restore(images)["t2"], volume.data)


@QUICK
@given(st.lists(st.floats(-180, 180), min_size=3, max_size=3), st.sampled_from(AXES), st.booleans())
def test_oblique_volumes_come_back_within_interpolation_error(angles, codes, mirrored):
    smooth = ndimage.gaussian_filter(np.random.default_rng(1).normal(size=(22, 26, 12)), 3)
    smooth = ((smooth - smooth.min()) / np.ptp(smooth)).astype(np.float32) + 0.1
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() * [1.3, 1.4, 3.1]
    if mirrored:
        affine[:, 0] *= -1
    volume = stored_as(smooth, affine, codes)
    # A model grid finer than the file, over all of it, whichever way it lies.
    prepared = prepare(brain({"flair": volume}), config(image=(64, 64, 64), field_of_view=(48.0, 48.0, 48.0)))
    images = prepared.images.copy()
    images[0] = images[3]
    low, high = prepared.intensity["flair"]
    error = prepared.restore(images)["t1"] - np.clip(volume.data, low, high)
    inner = error[2:-2, 2:-2, 2:-2]
    assert np.abs(inner).max() < 0.06
    assert abs(inner.mean()) < 2e-3


def test_the_model_sees_right_anterior_and_superior_at_high_indices():
    data = np.zeros((16, 24, 8), np.float32)
    data[12:, :, :], data[:, 20:, :], data[:, :, 7:] = 1, 2, 3  # seen as: right, anterior, superior
    for codes in (("R", "A", "S"), ("L", "P", "S"), ("P", "I", "R")):
        image = prepare(brain({"t1": stored_as(data, RAS, codes)}), config()).images[0, 0]
        assert image[14, 4, 2] == pytest.approx(1 / 3)
        assert image[2, 22, 2] == pytest.approx(2 / 3)
        assert image[2, 4, 7] == 1
        assert image[2, 4, 2] == 0


def test_modalities_may_be_stored_in_different_orders():
    t1, t2 = unit_image((16, 24, 8), 1), unit_image((16, 24, 8), 2)
    t1.reshape(-1)[2::40] = 0  # empty here, while the T2 is not
    volumes = {"t1": stored_as(t1, RAS, ("L", "A", "S")), "t2": stored_as(t2, RAS, ("S", "P", "R"))}
    assert same_grid(*volumes.values())
    prepared = prepare(brain(volumes), config())
    np.testing.assert_array_equal(prepared.images[2, 0], t2)
    images = prepared.images.copy()
    images[3] = images[2]
    both_empty = (t1 == 0) & (t2 == 0)
    assert both_empty.any()
    restored = prepared.restore(images)["flair"]
    np.testing.assert_array_equal(restored, stored_as(t2 * ~both_empty, RAS, ("L", "A", "S")).data)


def test_grids_less_than_a_tenth_of_a_voxel_apart_are_one():
    a = Volume.from_array(np.zeros((5, 6, 7)), RAS)
    moved = [RAS.copy() for _ in range(3)]
    moved[0][0, 3] += 0.19  # of voxels of 2 mm
    moved[1][0, 3] += 0.21
    moved[2][0, 0] *= 1.03
    assert [same_grid(a, Volume.from_array(a.data, m)) for m in moved] == [True, False, False]
    assert not same_grid(a, Volume.from_array(np.zeros((5, 6, 8)), RAS))


@pytest.mark.parametrize("codes", AXES[::5], ids="".join)
def test_orientation_affine_keeps_points_in_place(codes):
    data = np.arange(16 * 24 * 8, dtype=np.float32).reshape(16, 24, 8)
    volume = stored_as(data, RAS, codes)
    orientation = Orientation.to_ras(volume.affine)
    np.testing.assert_allclose(orientation.affine(volume.affine, volume.data.shape), RAS, atol=1e-9)
    np.testing.assert_array_equal(orientation.apply(volume.data), data)


# ---- intensities and field of view -------------------------------------------------------------------------


def test_intensities_run_between_percentiles():
    data = np.random.default_rng(3).gamma(2, 150, (16, 24, 8)).astype(np.float32)
    prepared = prepare(brain({"t2": Volume.from_array(data, RAS)}), config())
    low, high = np.percentile(data.astype(np.float64), (0.5, 99.5))
    assert prepared.intensity["t2"] == pytest.approx((low, high), rel=1e-6)
    expected = np.clip((data.astype(np.float64) - low) / (high - low), 0, 1)
    np.testing.assert_allclose(prepared.images[2, 0], expected, atol=2e-6)


def test_output_is_mapped_to_the_references_range_and_clipped():
    t1, t2 = unit_image((16, 24, 8), 1) * 500, unit_image((16, 24, 8), 2) * 90
    prepared = prepare(brain({"t1": Volume.from_array(t1, RAS), "t2": Volume.from_array(t2, RAS)}), config())
    images = np.full_like(prepared.images, 0.5)
    images[3] = 1.5
    restored = prepared.restore(images)
    assert set(restored) == {"t1ce", "flair"} == set(prepared.missing)
    assert restored["t1ce"].max() == pytest.approx(250)
    assert restored["flair"].max() == pytest.approx(500)


def test_stripped_background_stays_background():
    data = unit_image((16, 24, 8)) * 100 + 1
    data[:4] = 0
    data[0, 0, :4] = -0.5  # ringing
    prepared = prepare(brain({"t1": Volume.from_array(data, RAS)}), config())
    restored = prepared.restore(np.full_like(prepared.images, 0.7))["t2"]
    assert not restored[:4].any()
    assert (restored[4:] > 0).all()


def test_standardised_images_keep_their_background_value():
    rng = np.random.default_rng(5)
    data = np.zeros((16, 24, 8), np.float32)
    data[4:12, 4:20, 1:7] = rng.normal(size=(8, 16, 6))  # z-scores: half of the tissue is negative
    prepared = prepare(brain({"t1": Volume.from_array(data, RAS)}), config())
    assert not prepared.images[0, 0][data == 0].any()
    images = prepared.images.copy()
    images[1] = images[0]
    restored = prepared.restore(images)["t1ce"]
    assert not restored[data == 0].any()
    low, high = prepared.intensity["t1"]
    np.testing.assert_allclose(restored, np.clip(data, low, high), atol=1e-5)


@pytest.mark.parametrize("order", [3, 5])
def test_ringing_is_no_standardised_image(order):
    """A brain that splines have moved by half a voxel rings below and above 0, all the way to the corners."""
    places = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in (64, 72, 56)), indexing="ij"))
    radius = np.sqrt((places**2).sum(0)) / 0.7
    data = ndimage.shift((radius < 1) * (500 + 200 * np.sin(5 * places[0])), 0.5, order=order).astype(np.float32)
    prepared = prepare(brain({"t1": Volume.from_array(data, RAS)}), config(field_of_view=(128.0, 144.0, 280.0)))
    low, high = prepared.intensity["t1"]
    assert low < -0.05 * high and (data[radius > 1.4] > 0).mean() > 0.3
    assert prepared.fill == 0 and prepared.background[radius > 1.4].all()
    assert not prepared.restore(np.full_like(prepared.images, 0.5))["t2"][radius > 1.4].any()


def test_a_stripped_brain_beside_a_whole_head_is_said():
    head = unit_image((16, 24, 8)) + 0.5
    stripped = head.copy()
    stripped[:4] = 0
    volumes = {"t1": Volume.from_array(stripped, RAS), "t2": Volume.from_array(head, RAS)}
    (note,) = prepare(brain(volumes), config()).notes
    assert note.startswith("25% of what t2 shows lies where t1 shows nothing")
    stripped[2:4] = 1
    assert prepare(brain(volumes), config()).notes == ()


def test_tissue_outside_the_field_of_view_is_said_and_never_zero():
    data = unit_image((16, 24, 8)) + 0.5
    data[:, :, 7] = 0
    volumes = {"t1": Volume.from_array(data, RAS), "t2": Volume.from_array(data * 2, RAS)}
    prepared = prepare(brain(volumes), config(image=(8, 8, 4), field_of_view=(16, 16, 20)))
    seen = np.zeros(data.shape, bool)
    seen[4:12, 8:16, 2:6] = True
    assert prepared.outside == ((data > 0) & ~seen).sum()
    assert prepared.record()["outside_view"] == {"voxels": prepared.outside, "millilitres": prepared.outside * 0.02}
    assert "ml of tissue lie outside" in prepared.notes[0]
    images = prepared.images.copy()
    images[1] = 0.25 + 0.5 * images[0]
    images[3] = 1 - images[0]
    restored = prepared.restore(images)
    low, high = prepared.intensity["t1"]
    unit = np.clip((data - low) / (high - low), 0, 1)
    there = data > 0
    np.testing.assert_allclose(restored["t1ce"][there], ((0.25 + 0.5 * unit) * (high - low) + low)[there], atol=1e-4)
    assert (restored["flair"][there & ~seen] > 0).all()
    assert not restored["t1ce"][~there].any()


@pytest.mark.parametrize("shift", [-30, 0, 17, 40])
def test_the_view_follows_the_head(shift):
    head = np.zeros((120, 60, 20), np.float32)
    head[44:76, 20:40, 4:16] = unit_image((32, 20, 12)) + 0.2
    small = config(image=(24, 24, 8), field_of_view=(72.0, 120.0, 100.0))
    still = prepare(brain({"t1": Volume.from_array(head, RAS)}), small)
    moved = prepare(brain({"t1": Volume.from_array(np.roll(head, shift, 0), RAS)}), small)
    np.testing.assert_array_equal(moved.images, still.images)
    assert moved.outside == 0 and moved.record()["view_shift_mm"] == [2.0 * shift, 0, 0]
    made = [prepared.restore(np.full_like(prepared.images, 0.5))["t2"] for prepared in (still, moved)]
    np.testing.assert_array_equal(made[1], np.roll(made[0], shift, 0))


def test_of_a_head_that_is_too_high_the_crown_is_kept():
    data = np.zeros((40, 40, 60), np.float32)
    data[5:35, 5:35, 0:56] = unit_image((30, 30, 56)) + 0.2  # 280 mm with the neck
    view = config(image=(16, 16, 32), field_of_view=(64.0, 64.0, 160.0))
    prepared = prepare(brain({"t1": Volume.from_array(data, RAS)}), view)
    np.testing.assert_array_equal(prepared.images[0, 0][2, 2] > 0, np.ones(32, bool))
    assert prepared.frame.coverage()[20, 20].nonzero()[0].tolist() == list(range(24, 56))


def test_holes_deep_inside_are_filled_and_background_is_not():
    data = unit_image((16, 24, 8)) * 100 + 1
    data[:4] = data[:, :, 0] = 0
    data[8:10, 10:12, 4] = 0  # a hole
    data[13:, 4:14, 2:6] = 0  # a bay of 20 x 20 mm
    data[12:, 20:22, 2:6] = 0  # a cistern, 4 mm wide
    prepared = prepare(brain({"t1": Volume.from_array(data, RAS)}), config())
    restored = prepared.restore(np.full_like(prepared.images, 0.7))["t2"]
    assert (restored[8:10, 10:12, 4] > 0).all()
    assert not restored[:4].any() and not restored[13:, 4:14, 2:6].any()
    assert (restored[12:, 20:22, 2:6] > 0).all()


def test_fluid_that_a_narrow_way_joins_to_the_border_is_no_background():
    empty = np.ones((20, 20, 20), bool)
    empty[3:17, 3:17, 3:17] = False
    empty[8:12, 8:12, 8:12] = True  # a ventricle
    empty[3:8, 9, 9] = True  # a way to it, one voxel wide
    expected = empty.copy()
    expected[8:12, 8:12, 8:12] = False
    expected[6:8, 9, 9] = False  # followed for three voxels
    np.testing.assert_array_equal(surroundings(empty), expected)


@QUICK
@given(st.integers(0, 2**32 - 1), st.tuples(*[st.integers(0, 4)] * 3), st.sampled_from("CF"))
def test_closing_is_the_morphological_one(seed, reach, order):
    rng = np.random.default_rng(seed)
    region = np.asarray(rng.random(rng.integers(1, 14, 3)) < rng.choice([0.0, 0.03, 0.2]), order=order)
    box = np.ones([2 * n + 1 for n in reach], bool)
    expected = ndimage.binary_closing(np.pad(region, 8), box)[8:-8, 8:-8, 8:-8]
    np.testing.assert_array_equal(closing(region, reach), expected)


def test_a_cistern_is_no_background_and_specks_of_noise_close_no_air():
    data = np.zeros((40, 40, 24), np.float32)
    data[8:32, 8:32, 4:20] = 100
    data[16:20, 8:24, 5:19] = 0  # 8 mm wide along the first axis alone, open to the border
    data[::4, ::4, ::3] += 3
    prepared = prepare(brain({"t1": Volume.from_array(data, RAS)}), config())
    expected = data == 0
    expected[8:32, 8:32, 4:20] = False
    np.testing.assert_array_equal(prepared.background, expected)


def test_a_frame_one_voxel_wide_is_background():
    empty = np.ones((6, 7, 8), bool)
    empty[1:-1, 1:-1, 1:-1] = False
    np.testing.assert_array_equal(surroundings(empty), empty)


@QUICK
@given(st.integers(0, 2**32 - 1), st.floats(0.2, 0.95), st.permutations((5, 6, 7)), st.sampled_from("CF"))
def test_the_border_is_flooded_as_scipy_labels(seed, share, shape, order):
    """Rows of up to three words of 64 voxels, of either memory order."""
    shape[seed % 3] += (0, 60, 124)[seed % 5 % 3]
    region = np.array(np.random.default_rng(seed).random(shape) < share, order=order)
    labels, _ = ndimage.label(region)
    edge = np.ones(region.shape, bool)
    edge[1:-1, 1:-1, 1:-1] = False
    expected = np.isin(labels, np.setdiff1d(labels[edge], 0))
    np.testing.assert_array_equal(from_border(region), expected)


@pytest.mark.parametrize("scale", [1e38, 1e-44])
def test_values_that_cannot_be_computed_with_are_refused(scale):
    data = (unit_image((16, 24, 8)).astype(np.float64) * 3 * scale).astype(np.float32)
    with pytest.raises(CopeditError, match="too large or too small to compute with; rescale"):
        prepare(brain({"t1": Volume.from_array(np.where(data > 2 * scale, -data, data), RAS)}), config())


def test_odd_sizes_with_equal_voxels_are_copied_not_blurred():
    data = unit_image((17, 25, 9))
    prepared = prepare(brain({"t1": Volume.from_array(data, RAS)}), config())
    np.testing.assert_array_equal(prepared.images[0, 0], data[1:, 1:, 1:])
    images = prepared.images.copy()
    images[1] = images[0]
    restored = prepared.restore(images)["t1ce"]
    np.testing.assert_array_equal(restored[1:, 1:, 1:], data[1:, 1:, 1:])
    np.testing.assert_allclose(restored, data, atol=2e-3)  # what is outside the view follows the T1 that is there


def test_a_restored_image_must_be_finite_and_of_the_right_shape():
    prepared = prepare(brain({"t1": Volume.from_array(unit_image((16, 24, 8)), RAS)}), config())
    with pytest.raises(ValueError, match="shape"):
        prepared.restore(prepared.images[0])
    with pytest.raises(CopeditError, match="NaN or infinity"):
        prepared.restore(np.full_like(prepared.images, np.nan))


def test_the_record_is_json():
    prepared = prepare(brain({"t1": stored_as(unit_image((16, 24, 8)), RAS, ("L", "P", "S"))}), config())
    record = json.loads(json.dumps(prepared.record()))
    assert record["flip"] == [True, True, False]
    assert record["model_voxel_mm"] == [2, 2, 5]
    assert record["intensity"] == {"t1": {"low": 0.0, "high": 1.0}}
    assert record["observed"] == {"t1": True, "t1ce": False, "t2": False, "flair": False}


# ---- stacks ------------------------------------------------------------------------------------------------


def stack(count=16, seed=0):
    return unit_image((16, 24, count), seed)


def test_slice_axis():
    assert slice_axis((12, 256, 256), np.diag([8, 1.25, 1.25, 1])) == 0
    assert slice_axis((256, 10, 256), np.eye(4)) == 1
    assert slice_axis((64, 64, 100), np.diag([1, 1, 3, 1.0])) == 2  # coarse, though long
    assert slice_axis((9, 9, 9), np.eye(4)) == 2


def test_filling_is_linear_inside_and_repeats_the_end():
    data = np.arange(8, dtype=np.float32)[None, None] ** 2 * np.ones((2, 3, 1), np.float32)
    data[..., [0, 3, 4, 7]] = np.nan
    filled = fill_slices(data, (0, 3, 4, 7), 2)
    np.testing.assert_allclose(filled[0, 0], [1, 1, 4, 11, 18, 25, 36, 36], rtol=1e-6)
    assert np.isnan(data[0, 0, 0])


@pytest.mark.parametrize("codes", AXES, ids="".join)
def test_stacks_keep_their_slice_order_and_their_present_slices(codes):
    data = stack()
    volume = stored_as(data, RAS, codes)
    axis = [c in "IS" for c in codes].index(True)
    assert slice_axis(volume.data.shape, volume.affine) == axis
    missing = (5, 6)
    prepared = prepare(heart(volume, missing), heart_config())
    assert prepared.observed.tolist() == [True, False, True, True]
    upward = codes[axis] == "S"
    in_file_order = data if upward else data[..., ::-1]
    for slab in (0, 2, 3):
        np.testing.assert_array_equal(prepared.images[slab, 0], in_file_order[..., slab * 4 : slab * 4 + 4])
    assert not prepared.images[1].any()
    full = prepare(heart(volume, ()), heart_config(), allow_complete=True)
    np.testing.assert_array_equal(prepared.restore(full.images)["sax"], volume.data)


@pytest.mark.parametrize("count", [5, 8, 14, 16, 21])
def test_present_slices_are_bit_identical_whatever_is_synthesised(count):
    volume = Volume.from_array(stack(count) * 255, RAS)
    prepared = prepare(heart(volume, (1,)), heart_config())
    noise = np.random.default_rng(0).uniform(0, 1, prepared.images.shape)
    restored = prepared.restore(noise)["sax"]
    keep = [i for i in range(count) if i != 1]
    np.testing.assert_array_equal(restored[..., keep], volume.data[..., keep])
    assert np.abs(restored[..., 1] - volume.data[..., 1]).mean() > 10


@QUICK
@given(st.integers(4, 40), st.data())
def test_a_slab_is_missing_where_a_missing_slice_is_nearest(count, data):
    missing = data.draw(st.sets(st.integers(0, count - 1), min_size=1, max_size=count - 1))
    nearest = [min(range(count), key=lambda k: abs((k + 0.5) / count - (j + 0.5) / 16)) for j in range(16)]
    slabs = {j // 4 for j in range(16) if nearest[j] in missing}
    ties = {  # a model slice midway between two file slices may count as either
        j // 4
        for j in range(16)
        if any(abs(abs((k + 0.5) / count - (j + 0.5) / 16) - 0.5 / count) < 1e-9 for k in missing)
    }
    holding = {int((k + 0.5) * 16 / count) // 4 for k in missing}
    volume = Volume.from_array(np.random.default_rng(0).random((8, 8, count)), np.diag([4, 6, 8, 1.0]))
    observed = prepare(heart(volume, missing), heart_config()).observed
    if len(slabs | ties | holding) == 4 and observed.sum() == 1:
        return  # every slab lacks something: see `test_stacks`
    absent = set(np.flatnonzero(~observed).tolist())
    assert slabs - ties <= absent <= slabs | ties | holding
    assert holding <= absent


def test_observed_slabs_do_not_depend_on_what_missing_slices_hold():
    results = []
    for value in (0, np.nan, 1e6):
        data = stack(14)
        data[..., 3:6] = value
        results.append(prepare(heart(Volume.from_array(data, RAS), (3, 4, 5)), heart_config()))
    for other in results[1:]:
        np.testing.assert_array_equal(results[0].images, other.images)
        assert results[0].intensity == other.intensity


def test_outside_the_plane_of_the_model_neighbouring_slices_fill_in():
    data = stack()
    prepared = prepare(heart(Volume.from_array(data, RAS), (5, 6)), heart_config(field_of_view=(16.0, 16.0, None)))
    restored = prepared.restore(np.zeros_like(prepared.images))["sax"]
    expected = fill_slices(data, (5, 6), 2)
    seen = np.zeros((16, 24), bool)
    seen[4:12, 8:16] = True
    np.testing.assert_allclose(restored[~seen], expected[~seen], atol=1e-6)
    assert not restored[seen][:, 5:7].any()


def test_no_torch():
    code = "import sys, copedit_rt.images.study, copedit_rt.images.prepare; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("order", "CF")
def test_a_matrix_along_an_axis_is_tensordot(axis, order):
    rng = np.random.default_rng(0)
    array = np.array(rng.random((5, 6, 7), np.float32), order=order)
    matrix = rng.random((4, array.shape[axis]), np.float32)
    made = _along(matrix, array, axis)
    expected = np.moveaxis(np.tensordot(matrix.astype(np.float64), array.astype(np.float64), (1, axis)), 0, axis)
    np.testing.assert_allclose(made, expected, rtol=7 * np.finfo(np.float32).eps)
