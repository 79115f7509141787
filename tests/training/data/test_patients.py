"""Real studies beside simulated ones."""

import dataclasses

import nibabel as nib
import numpy as np
import pytest

from copedit_rt.config import ModelConfig
from copedit_rt.errors import CopeditError
from copedit_training.data.patients import Patient, bent, read_patients, varied
from copedit_training.stages.prior import fit_prior

CONFIG = dataclasses.replace(ModelConfig.preset("brain-2mm"), image=(16, 16, 16))


def head(seed: int, size: int = 24) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x, y, z = np.indices((size,) * 3) - size / 2
    return ((x**2 + y**2 + z**2 < 100) * rng.uniform(100, 900, (size,) * 3)).astype(np.float32)


def write(folder, subject: str, names) -> None:
    (folder / subject).mkdir(parents=True)
    for i, name in enumerate(names):
        image = nib.Nifti1Image(head(i), np.diag([6.0, 6, 6, 1]))
        nib.save(image, folder / subject / f"{subject}_{name}.nii.gz")


def test_complete_and_incomplete_studies_are_read_on_the_model_grid(tmp_path):
    write(tmp_path, "a", ("t1", "t1ce", "t2", "flair"))
    write(tmp_path, "b", ("t1", "flair"))
    a, b = read_patients(tmp_path, CONFIG)
    assert (a.name, b.name) == ("a", "b") and a.images.shape == (4, 16, 16, 16)
    assert a.there.all() and b.there.tolist() == [True, False, False, True]
    assert not b.images[1].any() and 0.6 < b.images[3].max() <= 1
    with pytest.raises(CopeditError, match=r"no such file or folder|does not exist"):
        read_patients(tmp_path / "nothing", CONFIG)


def test_a_bent_image_keeps_background_and_order():
    image = np.linspace(0, 1, 4096, dtype=np.float32).reshape(16, 16, 16)
    for seed in range(20):
        made = bent(image, np.random.default_rng(seed))
        assert np.array_equal(made > 0, image > 0) and made.max() <= 1
        smooth = made.reshape(-1, 256).mean(1)
        assert (np.diff(smooth) > 0).all(), "monotone but for its noise"
    assert not np.array_equal(made, bent(image, np.random.default_rng(0)))


def test_views_are_mirrored_in_turn_and_some_are_as_they_are():
    images = np.stack([head(0)[:16, :16, :16] / 900, np.zeros((16, 16, 16))]).astype(np.float32)
    patient = Patient("a", images, np.array([True, False]))
    rng = np.random.default_rng(0)
    assert np.array_equal(varied(patient, rng, 0), images)
    first = varied(patient, rng, 1)
    assert np.array_equal(first[0] > 0, images[0, ::-1] > 0) and not np.array_equal(first[0], images[0, ::-1])
    assert not first[1].any(), "what is not there stays away"


def test_patients_teach_the_prior_what_simulation_does_not_know_and_lacking_elements_nothing():
    rng = np.random.default_rng(0)
    x = rng.random((4, 12, 12, 12), np.float32).clip(0.05, 1)
    images = np.stack([x, x, 1 - x], 1)[:, :, None]
    y = rng.random((12, 12, 12), np.float32).clip(0.05, 1)
    other = Patient("p", np.stack([y, np.zeros_like(y), 0.3 + 0 * y]), np.array([True, False, True]))
    plain = fit_prior(images, steps=200)
    mixed = fit_prior(images, patients=[other, Patient("one", other.images, np.array([True, False, False]))],
                      share=0.5, steps=200)  # fmt: skip
    study = np.stack([y, y, y])[:, None]

    def third(prior) -> float:
        return float(prior.fill(study, np.array([True, False, False]))[1].mean())

    def second(prior) -> np.ndarray:
        return prior.fill(study, np.array([True, False, False]))[0, 0]

    assert abs(third(mixed) - 0.3) < abs(third(plain) - 0.3)
    assert np.square(second(mixed) - y).mean() < 0.02, "of what it lacks nothing is learnt, least of all that it is 0"
