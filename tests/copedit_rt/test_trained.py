"""What a model was trained on, and studies that are unlike it."""

import json

import numpy as np
import pytest

from copedit_rt.errors import CopeditError
from copedit_rt.prior import QUANTILES
from copedit_rt.trained import TrainedOn

ELEMENTS = ("t1", "t2")
ALL = np.ones(2, bool)


def subject(seed: int, power: float = 1.0) -> np.ndarray:
    images = np.random.default_rng(seed).random((2, 1, 12, 12, 6), np.float32) ** power
    images[:, :, :3] = 0
    return images


@pytest.fixture
def trained() -> TrainedOn:
    return TrainedOn.of("noise", ELEMENTS, (subject(seed) for seed in range(50)))


def test_it_is_kept_with_the_model(trained, tmp_path):
    assert TrainedOn.load(tmp_path) is None
    trained.save(tmp_path)
    assert TrainedOn.load(tmp_path) == trained
    assert np.allclose([np.mean(r) for r in trained.known["t1"]], QUANTILES, atol=0.03), "background does not count"


def test_what_is_alike_passes_and_what_is_not_is_named(trained):
    assert trained.remarks(ELEMENTS, subject(99), ALL) == ()
    strange = subject(99)
    strange[1] **= 4
    (remark,) = trained.remarks(ELEMENTS, strange, ALL)
    assert remark.startswith("t2 is unlike what the model was trained on: 50% of its grey values lie below 0.0")
    assert trained.remarks(ELEMENTS, strange, np.array([True, False])) == ()


def test_the_slabs_of_a_heart_are_one_image():
    slabs = ("slab0", "slab1")
    trained = TrainedOn.of("noise", slabs, (subject(seed) for seed in range(50)))
    assert list(trained.known) == ["stack"]
    (remark,) = trained.remarks(slabs, subject(99, 4), np.array([True, False]))
    assert remark.startswith("stack is unlike")


@pytest.mark.parametrize(
    "content", ["", "[]", '{"words": "x"}', '{"words": "x", "known": {"t1": [[0, 1]]}}', '{"words": "x", "known": 3}']
)
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "training.json").write_text(content)
    with pytest.raises(CopeditError, match=r"training.json: not what a model was trained on .*; copy the model again"):
        TrainedOn.load(tmp_path)


def test_it_is_plain_json(trained, tmp_path):
    trained.save(tmp_path)
    assert set(json.loads((tmp_path / "training.json").read_text())) == {"words", "quantiles", "known", "perception"}
