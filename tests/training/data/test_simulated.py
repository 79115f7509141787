"""Whole studies from a made-up label map; and one from real maps, where there are some."""

import dataclasses
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from copedit_rt.config import ModelConfig
from copedit_rt.errors import CopeditError
from copedit_training.cli import train as app
from copedit_training.data import physics, reality
from copedit_training.data.anatomy import CSF, RIM, WHITE, Disease
from copedit_training.data.prepared import Labels
from copedit_training.data.simulated import Simulator
from tests.training.data.test_anatomy import made_up

ELEMENTS = ("t1", "t1ce", "t2", "flair")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return made_up(tmp_path_factory.mktemp("labels"))


def simulator(folder, **settings):
    return Simulator(folder, shape=(48, 56, 24), spacing=(4.0, 4.0, 8.0), **settings)


@pytest.fixture(scope="module")
def brains(folder):
    return simulator(folder, stripped=1.0, disease=Disease(0.5, 1.0))


def test_a_seed_is_a_study(folder, brains):
    again = simulator(folder, stripped=1.0, disease=Disease(0.5, 1.0))
    one, two, other = brains.study(3), again.study(3), brains.study(4)
    for name in ELEMENTS:
        assert torch.equal(one.images[name], two.images[name])
        assert not torch.equal(one.images[name], other.images[name])
    assert torch.equal(one.labels, two.labels)


def test_images_are_non_negative_numbers_in_float32(brains):
    study = brains.study(0)
    assert set(study.images) == set(ELEMENTS) and study.labels.dtype == torch.uint8
    for image in study.images.values():
        assert image.dtype == torch.float32 and image.shape == (48, 56, 24)
        assert torch.isfinite(image).all() and float(image.min()) >= 0 and float(image.max()) > 0


def test_a_stripped_study_is_exactly_zero_outside(brains, folder):
    study = brains.study(1)
    empty = [image == 0 for image in study.images.values()]
    outside = torch.stack(empty).all(0)
    assert outside.float().mean() > 0.5 and outside[:3].all() and outside[..., :1].all()
    assert sum(torch.equal(mask, outside) for mask in empty) >= 2  # the others have their fluid cut off
    head = simulator(folder, stripped=0.0).study(1)
    assert not head.stripped and all((image > 0).float().mean() > 0.15 for image in head.images.values())


def test_a_floor_sets_the_darkest_tissue_to_zero_in_one_image_alone(brains, monkeypatch):
    drawn = physics.draw_scan

    def study(t1_floor):
        def scan(rng, name, stripped):
            return dataclasses.replace(drawn(rng, name, stripped), floor=t1_floor if name == "t1" else 0.0)

        monkeypatch.setattr(physics, "draw_scan", scan)
        return brains.study(1)

    plain, cut = study(0.0), study(1.0)
    assert torch.equal(plain.images["t2"], cut.images["t2"])
    brain = plain.images["t1"] > 0
    taken = brain & (cut.images["t1"] == 0)
    assert 0.01 < float(taken.sum() / brain.sum()) < 0.06
    lost = (plain.images["t1"] - cut.images["t1"])[brain & ~taken & (plain.labels == WHITE)]
    assert float((lost > 0.999 * lost.max()).float().mean()) > 0.8  # the others are at the ragged edge


def test_some_heads_end_below_the_brain_in_every_image_at_about_the_same_place(folder):
    heads, ends = simulator(folder, stripped=0.0), []
    for seed in range(10):
        study = heads.study(seed)
        shown = [image.any(0).any(0).nonzero() for image in study.images.values()]
        low = [float(planes[0]) * study.spacing[2] for planes in shown]
        tissue = float((study.labels > 0).any(0).any(0).nonzero()[0]) * study.spacing[2]
        ends.append(max(low) > tissue + study.spacing[2])
        if ends[-1]:
            assert max(low) - min(low) < 30  # deviation 4 mm, and slices of 8
    assert 0.2 < np.mean(ends) < 1  # the made-up head is lower than a real one


@pytest.mark.parametrize("stripped, low, face", [(False, 0.65, 0.35), (True, 0.15, 0.0)])
def test_how_often_the_lowest_slices_and_the_face_are_not_shown(folder, stripped, low, face):
    heads, rng = simulator(folder), np.random.default_rng(0)
    tissue = torch.ones(heads.shape, dtype=torch.bool)  # 192 mm high
    shown = torch.stack([heads._cover(tissue, stripped, rng)() for _ in range(400)])
    assert shown.shape == (400, *heads.shape[1:])
    assert float((~shown[:, 0, 0]).float().mean()) == pytest.approx(low, abs=0.07)
    above = shown[shown[:, 0, 9]]  # 72 mm up, below every chin
    assert float((~above[:, -1, 9]).float().mean()) == pytest.approx(face, abs=0.07)
    assert torch.equal(above[:, -1, 16], above[:, 0, 16])  # a forehead is a forehead


def test_contrasts_are_in_order(brains):
    dark = []
    for seed in range(6):
        study = brains.study(seed)
        inside = [study.labels == label for label in (CSF, WHITE)]
        fluid, white = ({k: float(v[m].mean()) for k, v in study.images.items()} for m in inside)
        assert fluid["t1"] < white["t1"] and fluid["t2"] > white["t2"]
        dark.append(fluid["flair"] < white["flair"])
    assert np.mean(dark) > 0.8  # badly nulled sulci in voxels of 8 mm may pass white matter


def test_most_rims_enhance(brains):
    brighter = []
    for seed in range(12):
        study = brains.study(seed)
        rim, white = study.labels == RIM, study.labels == WHITE
        if rim.sum() > 20:
            ratio = {k: float(study.images[k][rim].mean() / study.images[k][white].mean()) for k in ("t1", "t1ce")}
            brighter.append(ratio["t1ce"] > ratio["t1"])
    assert len(brighter) >= 3 and np.mean(brighter) > 0.7


def test_other_elements_and_grids(folder):
    study = Simulator(folder, ("t1", "pd"), (40, 40, 40), (5.0,) * 3).study(0)
    assert set(study.images) == {"t1", "pd"} and study.images["pd"].shape == (40, 40, 40)
    np.testing.assert_allclose(study.affine() @ [19.5, 19.5, 19.5, 1], [0, 0, 0, 1], atol=1e-9)
    with pytest.raises(CopeditError, match="ct cannot be simulated"):
        Simulator(folder, ("ct",))


def test_a_cached_map_gives_the_same_study(folder, brains, tmp_path):
    settings = {"stripped": 1.0, "disease": Disease(0.5, 1.0), "cache": tmp_path / "cache"}
    for _ in range(2):  # written, then read
        study = simulator(folder, **settings).study(3)
        assert torch.equal(study.images["t2"], brains.study(3).images["t2"])


def test_reality_ranks_a_study_among_its_like(brains):
    drawn = [{k: v.numpy() for k, v in brains.study(seed).images.items()} for seed in range(9)]
    strange = {k: v.max() * 1.01 - v for k, v in drawn[0].items()}  # inverted contrast
    rows = reality.compare([drawn[0], strange], drawn[1:])
    by_name = {row.name: row for row in rows}
    assert by_name["t2 in fluid"].simulated[1] > by_name["t2 in white"].simulated[1]
    assert np.mean([5 <= row.ranks[0] <= 95 for row in rows]) > np.mean([5 <= row.ranks[1] <= 95 for row in rows])
    assert len(reality.table(rows, ("like", "unlike")).splitlines()) == len(rows) + 1


def test_the_check_reads_studies_and_compares_what_they_have_in_common(folder, brains, tmp_path):
    def write(name, study, elements):
        (tmp_path / name).mkdir()
        for element in elements:
            image = nib.Nifti1Image(study.images[element].numpy(), study.affine())
            nib.save(image, tmp_path / name / f"{name}_{element}.nii.gz")

    write("one", brains.study(20), ELEMENTS)
    write("two", brains.study(21), ("t1", "t2"))
    config = dataclasses.replace(ModelConfig.preset("brain-2mm"), image=(48, 56, 24))
    labels, counted = Labels(folder), []
    rows, names, left_out = reality.check(
        tmp_path, labels, config, 12, lambda done, total: counted.append((done, total))
    )
    assert left_out == [f"{element} is left out, as it is missing in two" for element in ("t1ce", "flair")]
    assert names == ["one", "two"] and counted[-1] == (12, 12)
    assert {row.name.split()[0] for row in rows if "%" in row.name} == {"t1", "t2"}
    assert np.mean([row.inside() for row in rows]) > 0.5, "they are of the simulation themselves"
    write("three", brains.study(22), ("t2", "flair"))
    rows, _, left_out = reality.check(tmp_path, labels, config, 3)
    assert left_out[0] == "t1 is left out, as it is missing in three"
    assert left_out[-1] == "tissue ratios are left out, as they need t1 and t2 of every study"
    assert not any("grey" in row.name for row in rows)
    write("head", simulator(folder, stripped=0.0).study(1), ("t1", "t2"))
    with pytest.raises(CopeditError, match="head: the check is of brains whose skull is off"):
        reality.check(tmp_path, labels, config, 1)
    runner = CliRunner()
    refused = runner.invoke(app, ["check-simulation", str(tmp_path), "--data", "phantom"])
    assert isinstance(refused.exception, CopeditError) and "give label maps" in str(refused.exception)


def test_real_label_maps():
    if "COPEDIT_REAL_DATA" not in os.environ:
        pytest.skip("COPEDIT_REAL_DATA is not set")
    labels = Path(os.environ["COPEDIT_REAL_DATA"]) / "labels"
    study = Simulator(labels, shape=(48, 56, 48), spacing=(4.0, 4.0, 4.0), stripped=1.0, maps=[2]).study(0)
    volume = float((study.labels > 0).sum()) * 0.064
    assert 900 < volume < 2200  # ml, with fluid
