import itertools

import numpy as np
import pytest

from copedit_rt.perception import DOUBT, TWICE, Perception
from copedit_rt.task import Task

BRATS = ("t1", "t1ce", "t2", "flair")


def test_from_logits_gives_probabilities():
    position = np.array([-3.0, 2.0, 0.0, -40.0])
    perceived = Perception.from_logits(Task.BRAIN, BRATS, [0.0, 1.0, 2.0], position, {"t1": [-4.0, 3.0, 2.0, 1.0]})
    assert perceived.count == pytest.approx([0, 0, 1]), "there is one image"
    assert perceived.which_missing == BRATS[1:]
    by_heads = Perception.from_logits(Task.BRAIN, BRATS, [0.0, 1.0, 2.0], position, {})
    assert by_heads.missing == pytest.approx(1 / (1 + np.exp(-position)))
    assert by_heads.count == pytest.approx(np.exp([0, 1, 2]) / np.exp([0, 1, 2]).sum())
    # The heads say P(missing) per element; given that exactly one is present, Bayes' rule says which.
    p = 1 / (1 + np.exp(-np.array([-4.0, 3.0, 2.0, 1.0])))
    only = np.array([np.prod(np.delete(p, i)) * (1 - p[i]) for i in range(4)])
    assert perceived.identity["t1"] == pytest.approx(only / only.sum())
    assert perceived.looks_like("t1")[0] == "t1"


@pytest.mark.parametrize("task", Task)
def test_number_positions_and_single_images_agree_as_every_set_of_elements_says(task):
    all_together, one_by_one = task.trust
    rng = np.random.default_rng(0)
    for images in (1, 2, 3, 4):
        count, position = rng.normal(0, 2, 3), rng.normal(0, 2, 4)
        alone = {name: rng.normal(0, 2, 4) for name in BRATS[:images]}
        perceived = Perception.from_logits(task, BRATS, count, position, alone)

        def doubted(p):
            return (1 - DOUBT) * np.asarray(p) + DOUBT / len(p)

        number = doubted(np.exp(count) / np.exp(count).sum())
        missing = (1 - DOUBT) / (1 + np.exp(-position)) + DOUBT / 2
        looks = [doubted(perceived.identity[name]) for name in alone]
        chance = dict.fromkeys((s for k in range(1, 5) for s in itertools.combinations(range(4), k)), 0.0)
        for guess in itertools.product(range(4), repeat=images):  # what each image is
            chance[tuple(sorted(set(guess)))] += np.prod([p[i] for p, i in zip(looks, guess, strict=True)])
        for s in chance:
            heads = number[max(4 - len(s), 1) - 1] * np.prod([1 - p if i in s else p for i, p in enumerate(missing)])
            alike = TWICE if len(s) < images else 1
            chance[s] = heads**all_together * (alike * chance[s]) ** one_by_one
        total = sum(chance.values())
        expected = [sum(p for s, p in chance.items() if i not in s) / total for i in range(4)]
        np.testing.assert_allclose(perceived.missing, expected)
        several = np.array([sum(p for s, p in chance.items() if len(s) == 4 - c) for c in (1, 2, 3)])
        np.testing.assert_allclose(perceived.count, several / several.sum())


def test_two_images_of_one_kind_are_one_element():
    """Both look like T2, and the heads do not know."""
    t2 = [4.0, 4.0, -4.0, 4.0]
    perceived = Perception.from_logits(Task.BRAIN, BRATS, [0.0, 0.0, 0.0], [0.0] * 4, {"t2": t2, "flair": t2})
    assert perceived.count_missing == 3 and perceived.which_missing == ("t1", "t1ce", "flair")


def test_two_images_are_rather_two_elements_than_one():
    """The second is a little more like T1 than like T1ce, but there is a clear T1 already."""
    t1, unsure = [-6.0, 6.0, 6.0, 6.0], [-1.4, -1.0, 6.0, 6.0]
    perceived = Perception.from_logits(Task.BRAIN, BRATS, [0.0, 0.0, 0.0], [0.0] * 4, {"t1": t1, "t1ce": unsure})
    assert perceived.looks_like("t1ce")[0] == "t1"
    assert perceived.count_missing == 2 and perceived.which_missing == ("t2", "flair")


def test_from_logits_survives_extreme_logits():
    alone = {"t1": [-900.0, 900.0, 0.0, 0.0]}
    perceived = Perception.from_logits(Task.BRAIN, BRATS, [900.0, -900.0, 0.0], [900.0] * 4, alone)
    assert np.isfinite([*perceived.count, *perceived.missing, *perceived.identity["t1"]]).all()
