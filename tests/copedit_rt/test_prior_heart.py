"""The informed prior of hearts: its features against a naive computation, its fill, and a model that starts from it."""

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage
from small import HEART, saved, study

from copedit_rt import checkpoint
from copedit_rt.errors import CopeditError
from copedit_rt.images.grids import fill_slices
from copedit_rt.images.nifti import Volume
from copedit_rt.images.prepare import prepare
from copedit_rt.images.study import Study
from copedit_rt.prior_heart import FEATURES, FURTHEST, SIGMAS, WIDEST, SlicePrior, blurs, features, gaussian
from copedit_rt.synthesizer import Synthesizer
from copedit_rt.task import Task

MODEL = replace(HEART, name="tiny-prior-heart", denoiser=replace(HEART.denoiser, prior=True))


def weights(scale: float = 0.1) -> SlicePrior:
    classes = [(0, d, 0) for d in (1, 2, 4)] + [(1, d, g) for d, g in ((1, 2), (1, 3), (2, 4), (3, 7))]
    values = np.random.default_rng(5).standard_normal((len(classes), FEATURES)) * scale
    return SlicePrior(np.array(classes, np.int32), values.astype(np.float32))


def stack(count: int = 8) -> np.ndarray:
    return np.random.default_rng(0).random((20, 17, count), dtype=np.float32)


@pytest.mark.parametrize("sigma", [*SIGMAS, 20])
def test_the_blur_is_a_gaussian_mirrored_at_the_ends(sigma):
    image = stack()[..., 0].astype(np.float64)
    made = gaussian(20, sigma) @ image @ gaussian(17, sigma).T
    np.testing.assert_allclose(made, ndimage.gaussian_filter(image, sigma, truncate=3), atol=1e-6)


def naive(data: np.ndarray, kept: list[int], index: int) -> list[np.ndarray]:
    """The features of a missing slice, in words."""
    blurred = [data, *(ndimage.gaussian_filter(data, (s, s, 0), truncate=3) for s in SIGMAS)]
    below, above = [k for k in kept if k < index][::-1], [k for k in kept if k > index]
    if below and above:
        a, b, w = below[0], above[0], (index - below[0]) / (above[0] - below[0])
        c, d = below[1] if len(below) > 1 else a, above[1] if len(above) > 1 else b
        slope = [(x[..., a] - x[..., b]) * (0.5 - w) for x in blurred[:4]]
    else:
        side, w = below or above, 0.0
        a = b = side[0]
        c = d = side[1] if len(side) > 1 else a
        slope = [np.zeros(data.shape[:2])] * 4
    made = [(1 - w) * x[..., a] + w * x[..., b] for x in blurred]
    made += [(1 - w) * x[..., c] + w * x[..., d] for x in blurred[:4]] + slope
    made += [blurred[i][..., kept].mean(-1) for i in (0, 3, 4)]
    return [*made, np.ones(data.shape[:2])]


@pytest.mark.parametrize(
    ("kept", "index", "kind"),
    [
        ([0, 1, 4, 5, 7], 2, (1, 1, 3)),
        ([0, 1, 4, 5, 7], 6, (1, 1, 2)),
        ([1, 6], 4, (1, 2, 5)),
        ([2, 3, 5], 0, (0, 2, 0)),
        ([2, 3, 5], 7, (0, 2, 0)),
        ([3], 6, (0, 3, 0)),
    ],
)
def test_features_are_those_of_a_naive_computation(kept, index, kind):
    data = stack()
    found, made = features(blurs(data[..., kept]), kept, index)
    assert found == kind and made.shape == (FEATURES, 20, 17)
    np.testing.assert_allclose(made, naive(data.astype(np.float64), kept, index), atol=1e-5)


def test_far_slices_and_wide_gaps_are_one_class():
    seen = blurs(stack(2))
    assert features(seen, [0, 40], 20)[0] == (1, FURTHEST, WIDEST)
    assert features(seen, [20, 21], 0)[0] == (0, FURTHEST, 0)


def test_a_class_that_was_not_fitted_takes_the_weights_of_the_most_alike():
    prior = weights()
    for wanted, index in (((0, 1, 0), 0), ((0, 7, 0), 2), ((1, 2, 5), 5), ((1, 4, 9), 6)):
        assert prior.of_class(wanted) is not None and np.array_equal(prior.of_class(wanted), prior.weights[index])


def test_what_is_missing_is_never_read_and_what_is_there_keeps_its_bits():
    data, missing, prior = stack(), (0, 3, 4), weights()
    poisoned = data.copy()
    poisoned[..., missing] = np.nan
    filled = prior.fill_stack(poisoned, missing)
    assert np.array_equal(filled, prior.fill_stack(data, missing)) and np.isfinite(filled).all()
    kept = [i for i in range(8) if i not in missing]
    assert np.array_equal(filled[..., kept], data[..., kept]) and np.isnan(poisoned[..., 3]).all()


def test_a_stack_and_its_reverse_are_filled_alike():
    data, missing, prior = stack(), [1, 2, 6, 7], weights()
    backward = prior.fill_stack(data[..., ::-1], [7 - i for i in missing])[..., ::-1]
    np.testing.assert_allclose(prior.fill_stack(data, missing), backward, atol=1e-6)


def test_without_weights_it_is_interpolation_and_keeps_a_ramp():
    ramp = np.linspace(0.1, 0.9, 8, dtype=np.float32) * np.ones((20, 17, 1), np.float32)
    np.testing.assert_allclose(weights(0).fill_stack(ramp, (2, 3, 4, 6)), ramp, atol=1e-6)
    np.testing.assert_allclose(weights(0).fill_stack(stack(), (0, 3, 4)), fill_slices(stack(), (0, 3, 4), 2), atol=1e-6)


def test_between_thin_slices_it_is_nearly_interpolation():
    """A share of the correction, the cube of the distance to the next slice; classes by distance, not by slices."""
    data, prior, missing = stack(), weights(), (3, 4)
    linear, kept = fill_slices(data, missing, 2), [0, 1, 2, 5, 6, 7]
    found = {apart: prior.fill_stack(data, missing, apart) - linear for apart in (0.5, 2.5, 5.0, 9.0)}
    assert np.array_equal(found[9.0], found[5.0]) and np.array_equal(
        found[5.0], prior.fill_stack(data, missing) - linear
    )
    assert np.abs(found[0.5]).max() < 0.002 * np.abs(found[5.0]).max()
    kind, given = features(blurs(data[..., kept]), kept, 3, 0.5)
    assert kind == (1, 1, 2)
    expected = np.clip(given[0] + np.tensordot(prior.of_class(kind), given, 1) / 8, 0, 1) - linear[..., 3]
    np.testing.assert_allclose(found[2.5][..., 3], expected, atol=1e-6)


def test_missing_slices_of_a_thin_stack_keep_what_their_neighbours_show():
    """Fine texture, which the model's plane cannot hold, between slices of 0.5 mm; none between those of 8 mm."""
    texture = np.random.default_rng(1).random((24, 24, 1)) + 0.2 * np.random.default_rng(2).random((24, 24, 8))
    made = {}
    for apart in (0.5, 8.0):
        volume = Volume.from_array(texture.astype(np.float32), np.diag([1.0, 1.0, apart, 1.0]))
        case = Study("a", Task.HEART, {"sax": volume}, (3,))
        prepared = prepare(case, MODEL)
        fill = weights(0).fill_study(prepared)
        made[apart] = prepared.restore(fill.images, stack=fill.stack)["sax"][..., 3]
    linear = fill_slices(texture, (3,), 2)[..., 3]
    low, high = np.percentile(np.delete(texture, 3, 2), MODEL.preprocessing.percentiles)
    assert np.abs(made[0.5] - linear).mean() < 0.02 * np.ptp(texture)
    assert np.abs(made[8.0] - linear).mean() > 0.05 * np.ptp(texture)
    assert low - 1e-5 <= made[0.5].min() and made[0.5].max() < high + 0.1


def test_a_prior_of_a_brain_is_refused(tmp_path):
    weights().save(tmp_path)
    assert np.array_equal(SlicePrior.load(tmp_path, MODEL).weights, weights().weights)
    with pytest.raises(CopeditError, match="is not of a brain model with 3 elements; copy the model again"):
        checkpoint.load_prior(tmp_path, replace(MODEL, task="brain"))
    fewer = weights()
    SlicePrior(fewer.classes[1:], fewer.weights).save(tmp_path)
    with pytest.raises(CopeditError, match="its classes and weights are not as many; copy the model again"):
        SlicePrior.load(tmp_path, MODEL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = saved(MODEL, tmp_path_factory.mktemp("heart-prior"))
    weights().save(path)
    return path


def test_a_correction_of_nothing_leaves_the_fill(folder):
    synthesizer, case = Synthesizer.load(folder, "cpu"), study(MODEL)
    prepared = prepare(case, MODEL)
    fill = weights().fill_study(prepared)
    corrected = synthesizer.synthesize(case).study.reference.data
    synthesizer.engine.denoiser.final.weight.data.zero_()
    synthesizer.engine.denoiser.final.bias.data.zero_()
    made = synthesizer.synthesize(case).study.reference.data
    expected = prepared.restore(fill.images, stack=fill.stack)["sax"]
    np.testing.assert_allclose(made, expected, atol=1e-4)
    assert np.abs(corrected - expected)[..., [5, 6]].mean() > 0.01
    assert np.array_equal(np.delete(corrected, (5, 6), 2), np.delete(case.reference.data, (5, 6), 2))


def test_real_hearts_are_filled_better_than_by_interpolation(real_data):
    model = Synthesizer.load("heart-3mm", "cpu")
    for path in sorted((real_data / "cardiac").glob("SC-*_ED.nii.gz")):
        truth = np.asarray(nib.load(path).dataobj).astype(np.float32)
        n = truth.shape[2]
        low, high = np.percentile(truth, (0.5, 99.5))
        for missing in (range(n // 4), range(n // 4, n // 4 + n // 2)):
            made = model.synthesize(Study.read(path, missing_slices=missing)).study.reference.data
            error = [
                np.mean(np.clip((x - truth)[..., missing] / (high - low), -1, 1) ** 2)
                for x in (made, fill_slices(truth, missing, 2))
            ]
            assert error[0] < 0.9 * error[1], (path.name, missing)
