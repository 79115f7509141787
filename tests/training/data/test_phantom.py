"""The embedded phantom: deterministic, one anatomy at every resolution, tissues ordered as in real MRI."""

from functools import cache

import numpy as np
import pytest

from copedit_training.data import phantom
from copedit_training.data.phantom import BRAIN_CONTRASTS, Phantom

TINY = {"shape": (32, 32, 12), "spacing": (6.0, 6.0, 13.0)}


@cache
def subject(seed: int) -> Phantom:
    return phantom.brain(seed, (80, 80, 32), (2.6, 2.6, 5.2), BRAIN_CONTRASTS)


@cache
def stack(seed: int) -> Phantom:
    return phantom.heart(seed)


def median(study: Phantom, name: str, code: int) -> float:
    """Median signal of a label, in units of white matter (blood pool for the heart)."""
    image, unit = study.images[name], phantom.LV_BLOOD if name == "sax" else phantom.WHITE
    return float(np.median(image[study.labels == code]) / np.median(image[study.labels == unit]))


def pool(image: np.ndarray, k: tuple[int, int, int]) -> np.ndarray:
    x, y, z = (n // m for n, m in zip(image.shape, k, strict=True))
    return image.reshape(x, k[0], y, k[1], z, k[2]).mean((1, 3, 5))


@pytest.mark.parametrize("make", [phantom.brain, phantom.heart])
def test_same_seed_same_study_other_seed_another(make):
    a, b, c = make(3, **TINY), make(3, **TINY), make(4, **TINY)
    assert np.array_equal(a.labels, b.labels)
    for name, image in a.images.items():
        assert np.array_equal(image, b.images[name])
        assert np.corrcoef(image.ravel(), c.images[name].ravel())[0, 1] < 0.97
    assert not np.array_equal(a.labels, c.labels)


def test_contrast_does_not_depend_on_the_others():
    every = phantom.brain(5, contrasts=BRAIN_CONTRASTS, **TINY)
    for name in BRAIN_CONTRASTS:
        alone = phantom.brain(5, contrasts=(name,), **TINY)
        assert list(alone.images) == [name]
        assert np.array_equal(alone.images[name], every.images[name])


def test_unknown_contrast_is_named():
    with pytest.raises(ValueError, match="dwi"):
        phantom.brain(0, contrasts=("t1", "dwi"), **TINY)


@pytest.mark.parametrize("make", [phantom.brain, phantom.heart])
@pytest.mark.parametrize("shape", [(40, 36, 11), (33, 48, 1)])
def test_shape_type_and_range(make, shape):
    study = make(1, shape, (4.5, 4.7, 9.0))
    assert study.labels.shape == shape and study.labels.dtype == np.uint8
    assert study.spacing == (4.5, 4.7, 9.0)
    for image in study.images.values():
        assert image.shape == shape and image.dtype == np.float32
        assert np.isfinite(image).all() and image.min() >= 0 and image.max() > 0


def test_affine_is_ras_and_centred():
    study = phantom.heart(0, (20, 30, 8), (9.0, 8.0, 12.0))
    affine = study.affine()
    assert np.array_equal(np.diag(affine), [9, 8, 12, 1])
    assert np.allclose(affine @ [9.5, 14.5, 3.5, 1], [0, 0, 0, 1])


@pytest.mark.parametrize("seed", range(3))
def test_background_is_zero_and_the_brain_fits(seed):
    study = subject(seed)
    brain = study.labels > 0
    for image in study.images.values():
        assert (image[~brain] == 0).all() and (image[brain] > 0).mean() > 0.999
    for axis in range(2):  # nothing touches the border, in z the medulla may end at it
        assert not np.take(brain, [0, -1], axis).any()
    assert not brain[..., -1].any()
    assert 0.9e6 < brain.sum() * np.prod(study.spacing) < 1.9e6  # mm3


@pytest.mark.parametrize("make, fine", [(phantom.brain, subject), (phantom.heart, stack)])
def test_one_anatomy_at_every_resolution(make, fine):
    a, k = fine(1), (2, 2, 2)
    half = {"shape": [n // 2 for n in a.labels.shape], "spacing": [2 * s for s in a.spacing]}
    b, other = make(1, **half), make(9, **half)
    for name in b.images:  # not PD, whose contrast is near its noise
        image = a.images[name]
        x, y, z = pool(image, k), b.images[name], other.images[name]
        inside = (pool(image > 0, k) > 0.999) & (y > 0) & (z > 0)
        x, y, z = x[inside], y[inside], z[inside]
        assert np.corrcoef(x, y)[0, 1] > 0.95, name
        assert np.corrcoef(x, z)[0, 1] < 0.85, name
        assert 0.97 < np.median(y / x) < 1.03, name


@pytest.mark.parametrize("seed", range(3))
def test_tissue_order_per_contrast(seed):
    study = subject(seed)
    csf, grey = ({c: median(study, c, code) for c in BRAIN_CONTRASTS} for code in (phantom.CSF, phantom.GREY))
    assert csf["t1"] < grey["t1"] < 0.95  # white matter is 1
    assert csf["t2"] > grey["t2"] > 1.1
    assert csf["flair"] < 0.6 and grey["flair"] > 0.88  # fluid in its voxels darkens grey matter
    assert grey["pd"] > 1
    assert abs(grey["t1ce"] - grey["t1"]) < 0.08  # T1ce is T1 but for what enhances


def test_fluid_filled_spaces_are_null_in_flair():
    study = subject(0)
    pure = (study.labels == phantom.CSF) & (study.images["t2"] > np.percentile(study.images["t2"], 99.5))
    dark = study.images["flair"][pure] / np.percentile(study.images["flair"], 90)
    # Null where it is at rest; it flows in patches.
    assert np.percentile(dark, 15) < 0.15 and np.median(dark) < 0.35


def test_glioma_signals():
    study = subject(6)
    rim, core, oedema = (
        {c: median(study, c, code) for c in BRAIN_CONTRASTS} for code in (phantom.RIM, phantom.CORE, phantom.OEDEMA)
    )
    assert rim["t1ce"] > 1.2 and rim["t1"] < 0.95
    assert core["t1"] < 0.8 and core["t1ce"] < 0.8 and core["t2"] > 1.8
    assert oedema["flair"] > 1.3 and oedema["t2"] > 1.3 and 0.6 < oedema["t1"] < 1


def test_hyperintensities_are_bright_in_flair_and_t2():
    study = subject(15)
    assert median(study, "flair", phantom.HYPERINTENSITY) > 1.15
    assert median(study, "t2", phantom.HYPERINTENSITY) > 1.15
    assert not (study.labels == phantom.CORE).any()


def test_about_seven_in_ten_have_lesions():
    plans = [phantom._lesion_plan(phantom._rng(s, "plan")) for s in range(1000)]
    assert 0.65 < np.mean([gliomas > 0 or spots for gliomas, spots in plans]) < 0.75
    assert {gliomas for gliomas, _ in plans} == {0, 1, 2, 3}
    assert not any(gliomas and spots for gliomas, spots in plans)
    assert [bool((subject(s).labels >= phantom.CORE).any()) for s in (0, 1, 2)] == [False, True, True]


@pytest.mark.parametrize("seed", range(2))
def test_heart_signals_and_course_along_the_axis(seed):
    study = stack(seed)
    assert median(study, "sax", phantom.MYOCARDIUM) < 0.6
    assert 0.7 < median(study, "sax", phantom.RV_BLOOD) < 1.2
    assert median(study, "sax", 0) < 0.3  # lung and air
    left, right, liver = (
        (study.labels == code).sum((0, 1)) for code in (phantom.LV_BLOOD, phantom.RV_BLOOD, phantom.LIVER)
    )
    assert left[:8].sum() > left[8:].sum() and left[5] > 50  # from base to apex
    assert np.flatnonzero(right)[-1] < np.flatnonzero(left)[-1]  # the right ventricle ends short of the apex
    assert liver[0] < liver[-1]  # the diaphragm rises towards the apex


def test_distant_slices_do_not_interpolate():
    """Content of a middle slice is not the mean of its neighbours three slices away."""
    image = stack(0).images["sax"]
    error = [np.abs(image[..., k] - 0.5 * (image[..., k - 3] + image[..., k + 3])) for k in range(3, 13)]
    near = [np.abs(image[..., k] - image[..., k + 1]) for k in range(3, 13)]
    heart = (slice(25, 65), slice(35, 75))
    assert np.mean([e[heart].mean() for e in error]) > np.mean([n[heart].mean() for n in near])
