import math

import numpy as np
import pytest

from copedit_training.evaluation.calibration import Calibration


def drawn(n, scale=1.0, seed=0):
    """Errors whose deviation is `scale` times the one that is given."""
    rng = np.random.default_rng(seed)
    std = rng.uniform(0.01, 0.3, n)
    return scale * std * rng.standard_normal(n), std


def test_bins_are_those_of_sorted_voxels():
    error, std = drawn(60_000)
    calibration = Calibration()
    for part in range(3):  # in parts, as images come
        calibration.add(error[part::3].reshape(100, -1), std[part::3].reshape(100, -1), samples=4)
    found = calibration.summary(bins=10)
    order = np.argsort(std)
    factor = math.sqrt(1 + 1 / 4)
    wanted = [
        (factor * np.sqrt((std[part] ** 2).mean()), np.sqrt((error[part] ** 2).mean()))
        for part in np.array_split(order, 10)
    ]
    assert found["voxels"] == sum(row["voxels"] for row in found["bins"]) == len(std)
    for row, (predicted, actual) in zip(found["bins"], wanted, strict=True):
        assert row["voxels"] == pytest.approx(6000, rel=0.03)
        assert row["predicted"] == pytest.approx(predicted, rel=0.01)
        assert row["actual"] == pytest.approx(actual, rel=0.02)
    assert found["ence"] == pytest.approx(np.mean([abs(p - a) / p for p, a in wanted]), abs=0.01)
    assert found["predicted"] == pytest.approx(factor * np.sqrt((std**2).mean()))
    assert found["actual"] == pytest.approx(np.sqrt((error**2).mean()))


def test_ence_of_a_known_miscalibration():
    """Errors twice as large as predicted: |1 - 2| / 1 in every bin; samples of the truth's own distribution: 0."""
    error, std = drawn(200_000, scale=2.0)
    calibration = Calibration()
    calibration.add(error, std, samples=10**9)
    assert calibration.summary()["ence"] == pytest.approx(1.0, abs=0.02)
    rng = np.random.default_rng(0)
    deviation = rng.uniform(0.01, 0.3, 100_000)
    truth, *samples = deviation * rng.standard_normal((9, 100_000))
    calibration = Calibration()
    # Deviations of 8 samples scatter about the true one; within a true deviation they must fit.
    spread = np.sqrt(np.mean(np.var(samples, axis=0, ddof=1).reshape(1000, 100), axis=1))
    calibration.add(np.mean(samples, axis=0) - truth, np.repeat(spread, 100), samples=8)
    found = calibration.summary()
    assert found["predicted"] == pytest.approx(found["actual"], rel=0.02)


def test_what_does_not_vary():
    assert Calibration().summary() is None
    calibration = Calibration()
    calibration.add(np.full(1000, 0.1), np.zeros(1000), samples=2)
    found = calibration.summary()
    assert found["ence"] is None and found["predicted"] == 0 and found["actual"] == pytest.approx(0.1)
