"""Training images simulated from label maps, and the brain's prior fitted to images."""

import dataclasses

import numpy as np
import pytest

from copedit_rt.config import ModelConfig
from copedit_rt.errors import CopeditError
from copedit_rt.images.prepare import prepare
from copedit_training.data.prepared import HELD_OUT, VALIDATION, Labels, held_out_images, simulated_images
from copedit_training.evaluation.subjects import held_out
from copedit_training.stages.prior import fit_prior
from tests.training.data.test_anatomy import made_up

CONFIG = dataclasses.replace(ModelConfig.preset("brain-2mm"), image=(16, 16, 16))


def test_images_of_label_maps_are_normalised_cached_and_not_those_held_out(tmp_path):
    labels = Labels.of(f"labels:{made_up(tmp_path)}", CONFIG)
    images = simulated_images(CONFIG, labels, 2, tmp_path / "run" / "simulated.npy")
    assert images.shape == (2, 4, 1, 16, 16, 16) and images.dtype == np.float16
    assert images.min() == 0 and images.max() == 1 and not np.array_equal(images[0], images[1])
    assert all(np.quantile(x, 0.995) == pytest.approx(1, abs=0.01) for subject in images for x in subject[:, 0])
    again = simulated_images(CONFIG, labels, 2, tmp_path / "other" / "simulated.npy")
    assert np.array_equal(images, again)
    (held_out,) = held_out_images(CONFIG, labels, tmp_path / "run", 1)
    assert VALIDATION > 1 and not any(np.array_equal(held_out, x) for x in images)


def test_studies_of_label_maps_are_evaluated_on_that_no_training_has_seen(tmp_path):
    cohort = held_out(CONFIG, f"labels:{made_up(tmp_path)}", subjects=2)
    (name, truth, prepared), (_, other, _) = cohort
    assert name == truth.name == f"simulated{HELD_OUT}" and list(truth.volumes) == list(CONFIG.elements)
    assert cohort.about() == {"data": f"labels:{tmp_path.resolve()}", "first_seed": HELD_OUT}
    assert not prepared.missing and prepared.images.shape == (4, 1, *CONFIG.image)
    # On the model's grid, as training takes them.
    trained = simulated_images(CONFIG, Labels.of(f"labels:{tmp_path}", CONFIG), 1, tmp_path / "simulated.npy")
    (first,) = cohort.training(1)
    np.testing.assert_allclose(prepare(first, CONFIG, allow_complete=True).images, trained[0], atol=0.01)
    assert not np.array_equal(truth.volumes["t1"].data, other.volumes["t1"].data)
    assert np.array_equal(next(iter(cohort))[1].volumes["t1"].data, truth.volumes["t1"].data)
    with pytest.raises(CopeditError, match="--split test is of a data set, not of simulated subjects"):
        held_out(CONFIG, f"labels:{tmp_path}", split="test")
    with pytest.raises(CopeditError, match="seed 5 may have been trained on"):
        held_out(CONFIG, f"labels:{tmp_path}", first_seed=5)


def test_other_data_and_hearts_have_no_label_maps(tmp_path):
    assert Labels.of("phantom", CONFIG) is None and Labels.of(str(tmp_path), CONFIG) is None
    with pytest.raises(CopeditError, match="studies of brains are simulated from label maps, not of hearts"):
        Labels.of(f"labels:{tmp_path}", ModelConfig.preset("heart-3mm"))


def test_a_fitted_prior_fills_what_the_others_tell_and_better_than_their_mean():
    rng = np.random.default_rng(0)
    x = rng.random((6, 12, 12, 12), np.float32).clip(0.05, 1)
    x[:, :2] = 0
    images = np.stack([x, 1 - x, x**2, 0.5 + 0.5 * x], 1)[:, :, None] * (x > 0)[:, None, None]
    prior = fit_prior(images[:5], steps=400)
    for missing in range(4):
        observed = np.arange(4) != missing
        (made,), truth = prior.fill(images[5], observed), images[5, missing]
        error, of_mean = (np.square(y - truth).mean() for y in (made, images[5, observed].mean(0)))
        assert error < 0.2 * of_mean, missing


def test_phantoms_have_their_share_of_the_priors_fit():
    """Studies say y = 1 - x, phantoms y = x; what tells them apart is their quantiles."""
    rng = np.random.default_rng(0)
    studies, phantoms = (rng.random((6, 12, 12, 12), np.float32).clip(0.05, 1) for _ in range(2))
    phantoms **= 4
    images = np.stack([studies, 1 - studies, studies, studies], 1)[:, :, None]
    others = np.stack([phantoms, phantoms, phantoms, phantoms], 1)[:, :, None]
    observed = np.array([True, False, True, True])

    def errors(prior):
        return [float(np.abs(prior.fill(x[0], observed)[0] - x[0, 1]).mean()) for x in (images, others)]

    alone = errors(fit_prior(images, steps=200))
    mixed = errors(fit_prior(images, phantoms=list(others), phantoms_share=0.3, steps=200))
    assert alone[0] < 0.1 < alone[1] and max(mixed) < 0.6 * alone[1]
