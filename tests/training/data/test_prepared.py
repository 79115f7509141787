import dataclasses

import numpy as np
import pytest
import torch

from copedit_rt.config import ModelConfig
from copedit_rt.task import Task
from copedit_training.data import prepared
from copedit_training.data.augmentation import Augmentation
from copedit_training.data.prepared import draw_observed, model_images, phantom_images

BRAIN, HEART = (
    dataclasses.replace(ModelConfig.preset(name), image=image)
    for name, image in (("demo-brain", (48, 48, 16)), ("demo-cardiac", (48, 48, 4)))
)
SEEDS = np.array([3, 4])


@pytest.fixture(scope="module")
def brains():
    return torch.from_numpy(np.stack([model_images(BRAIN, seed) for seed in (0, 0)]))


def correlation(a, b):
    return float(np.corrcoef(a.flatten(), b.flatten())[0, 1])


def test_all_elements_of_a_brain_are_moved_alike_and_each_by_its_own_brightness(brains):
    same = brains[:, :1].expand_as(brains)
    augmented = Augmentation(BRAIN)(same, SEEDS)
    assert augmented.shape == same.shape and augmented.dtype == torch.float32
    assert 0 <= augmented.min() and augmented.max() <= 1 and type(augmented) is torch.Tensor
    for subject in augmented:
        inside = ((subject > 0.02) & (subject < 0.98)).all(0)
        values = torch.stack([element[inside] for element in subject])
        for other in values[1:]:  # related by a scale and a shift, no more
            slope, offset = np.polyfit(values[0], other, 1)
            assert np.abs(slope * values[0] + offset - other).max() < 1e-4 and abs(slope - 1) > 1e-4
            assert 0.8 < slope < 1.25 and abs(offset) < 0.12
    assert correlation(augmented[0], augmented[1]) < 0.99, "each seed its own"
    for subject in augmented[:, 0]:
        assert 0.5 < correlation(subject, same[0, 0]) < 0.99


def test_empty_stays_empty_and_equal_seeds_give_equal_bits(brains):
    augment = Augmentation(BRAIN)
    first = augment(brains, SEEDS)
    assert torch.equal(first, augment(brains, SEEDS)) and torch.equal(first[1:], augment(brains[1:], SEEDS[1:]))
    assert (first == 0).float().mean().item() == pytest.approx((brains == 0).float().mean().item(), abs=0.1)
    assert not augment(torch.zeros_like(brains), SEEDS).any()


def test_the_slabs_of_a_heart_stay_one_stack():
    heart = torch.from_numpy(model_images(HEART, 1))[None]
    m, depth = heart.shape[1], heart.shape[-1]
    column = heart[:, :1, ..., :1].expand(-1, m, -1, -1, -1, depth)  # the same slice everywhere
    augmented = Augmentation(HEART)(column, SEEDS[:1])[0]
    assert torch.allclose(augmented, augmented[:1, ..., :1].expand_as(augmented), atol=1e-5)
    assert correlation(augmented, column[0]) < 0.9999


@pytest.mark.parametrize("task", Task)
def test_patterns_are_uniform_in_count_then_in_subset(task):
    drawn = (~draw_observed(np.random.default_rng(0), 12_000, 4, task)).int().numpy()
    counts = np.bincount(drawn.sum(1), minlength=5)
    assert counts[0] == counts[4] == 0
    np.testing.assert_allclose(counts[1:4] / len(drawn), 1 / 3, atol=0.02)
    pairs = {tuple(row) for row in drawn[drawn.sum(1) == 2]}
    assert len(pairs) == len(task.patterns("abcd", 2)) == (3 if task.joint else 6)
    one = drawn[drawn.sum(1) == 1].mean(0)
    np.testing.assert_allclose(one, 0.25, atol=0.03)
    if task.joint:
        edges = np.abs(np.diff(np.pad(drawn, ((0, 0), (1, 1))), axis=1)).sum(1)
        assert (edges == 2).all()


def test_phantom_images_are_the_runtimes_preprocessing_and_cached(tmp_path):
    config = dataclasses.replace(ModelConfig.preset("demo-brain"), image=(32, 32, 8))
    images = phantom_images(config, 2, tmp_path / "p.npy")
    assert images.shape == (2, 4, 1, 32, 32, 8) and images.dtype == np.float16
    np.testing.assert_allclose(images[1], model_images(config, 1), atol=1e-3)
    stamp = (tmp_path / "p.npy").stat().st_mtime_ns
    phantom_images(config, 2, tmp_path / "p.npy")
    assert (tmp_path / "p.npy").stat().st_mtime_ns == stamp
    assert phantom_images(config, 1, tmp_path / "p.npy").shape[0] == 1


def test_a_stopped_preparation_goes_on_from_the_subjects_it_has_made(tmp_path, monkeypatch):
    config = dataclasses.replace(ModelConfig.preset("demo-brain"), image=(16, 16, 8))
    whole = phantom_images(config, 5, tmp_path / "whole.npy")
    monkeypatch.setattr(prepared, "SAFE_ROWS", 2)

    def stop(done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        phantom_images(config, 5, tmp_path / "p.npy", stop)
    assert not (tmp_path / "p.npy").exists() and (tmp_path / "p.npy.rows").read_text() == "3\n"
    made, ahead = [], prepared.ahead
    monkeypatch.setattr(prepared, "ahead", lambda f, c, seeds: made.extend(seeds) or ahead(f, c, seeds))
    np.testing.assert_array_equal(phantom_images(config, 5, tmp_path / "p.npy"), whole)
    assert made == [3, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.npy", "whole.npy"]


@pytest.mark.parametrize("rows", ["", "-1", "6", "two"])
def test_what_a_stopped_preparation_left_is_used_only_if_it_can_be(tmp_path, rows):
    config = dataclasses.replace(ModelConfig.preset("demo-brain"), image=(16, 16, 8))
    (tmp_path / "p.npy.rows").write_text(rows)
    np.save(tmp_path / "p.npy.partial.npy", np.full((5, 4, 1, 16, 16, 8), 7, np.float16))
    (tmp_path / "p.npy.partial.npy").rename(tmp_path / "p.npy.partial")
    assert phantom_images(config, 5, tmp_path / "p.npy").max() == 1


def test_rows_of_other_images_are_not_counted_as_those_of_a_new_start(tmp_path, monkeypatch):
    """As a process leaves it that is killed before it notes anything."""
    config = dataclasses.replace(ModelConfig.preset("demo-brain"), image=(16, 16, 8))
    (tmp_path / "p.npy.rows").write_text("4")
    noted = []
    monkeypatch.setattr(prepared, "_note", lambda *_: noted.append((tmp_path / "p.npy.rows").exists()))

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        phantom_images(config, 5, tmp_path / "p.npy", stop)
    assert noted == [False] and (tmp_path / "p.npy.partial").exists()
