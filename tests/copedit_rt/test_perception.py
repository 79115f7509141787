import numpy as np
import pytest

from copedit_rt.perception import Perception

BRATS = ("t1", "t1ce", "t2", "flair")


def test_from_logits_gives_probabilities():
    position = np.array([-3.0, 2.0, 0.0, -40.0])
    perceived = Perception.from_logits(BRATS, [0.0, 1.0, 2.0], position, {"t1": [-4.0, 3.0, 2.0, 1.0]})
    assert sum(perceived.count) == pytest.approx(1)
    assert perceived.count_missing == 3
    assert perceived.missing == pytest.approx(1 / (1 + np.exp(-position)))
    # The heads say P(missing) per element; given that exactly one is present, Bayes' rule says which.
    p = 1 / (1 + np.exp(-np.array([-4.0, 3.0, 2.0, 1.0])))
    only = np.array([np.prod(np.delete(p, i)) * (1 - p[i]) for i in range(4)])
    assert perceived.identity["t1"] == pytest.approx(only / only.sum())
    assert perceived.looks_like("t1")[0] == "t1"


def test_from_logits_survives_extreme_logits():
    perceived = Perception.from_logits(BRATS, [900.0, -900.0, 0.0], [900.0] * 4, {"t1": [-900.0, 900.0, 0.0, 0.0]})
    assert np.isfinite([*perceived.count, *perceived.missing, *perceived.identity["t1"]]).all()
