"""The figure side by side: what is shown of a brain and a heart, on one scale of errors."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from copedit_rt import checkpoint
from copedit_rt.cli import app
from copedit_rt.config import ModelConfig
from copedit_rt.errors import CopeditError
from copedit_rt.images.nifti import Volume
from copedit_rt.synthesizer import Synthesizer
from copedit_training.data.prepared import HELD_OUT, phantom_subject
from copedit_training.evaluation.beside import Beside
from copedit_training.evaluation.compare import normalise
from copedit_training.evaluation.subjects import Phantoms
from copedit_training.experiments import pictures


def perfect(cohort):
    """A method that knows the truth."""
    known = {truth.name: truth for _, truth, _ in cohort}
    return Beside([lambda study, seed: {name: v.data for name, v in known[study.name].volumes.items()}])


def test_a_brain_from_the_observed_to_the_error(model_folder, tmp_path):
    pytest.importorskip("matplotlib", reason="figures need the extra `train`")
    model = Synthesizer.load(model_folder("demo-brain"), "cpu")
    cohort = Phantoms(model.config, 2)
    found = [(name, "+".join(p)) for name in ("phantom1000000", "phantom1000001") for p in (("t1",), ("t2", "flair"))]
    patterns = pictures.wanted_patterns(model.config, ["t1", "FLAIR+t2"])
    report, rows = pictures.compare(model, cohort, {"perfect": perfect(cohort)}, patterns)
    assert list(dict.fromkeys((row.subject, row.missing) for row in rows)) == found
    assert [row.element for row in rows] == ["t1", "t2", "flair"] * 2
    first, truth = rows[1], next(iter(cohort))[1]
    wanted = [np.rot90(normalise(truth.volumes[e].data)[..., first.slice]) for e in ("t1", "t1ce")]
    assert all(np.array_equal(a, b) for a, b in zip(first.observed, wanted, strict=True))
    assert np.array_equal(first.truth, np.rot90(normalise(truth.volumes["t2"].data)[..., first.slice]))
    inside = np.any([v.data > np.percentile(v.data, 0.5) for v in truth.volumes.values()], 0).sum((0, 1))
    assert inside[first.slice] == inside.max()
    # One scale for all; what is right is black, and what is written below is the whole image's.
    figure = pictures.draw(rows)
    shown = [image for ax in figure.axes for image in ax.images if image.get_cmap().name == "magma"]
    assert len(shown) == 2 * len(rows) and len({image.get_clim() for image in shown}) == 1
    errors = [np.asarray(image.get_array()) for image in shown]
    assert np.array_equal(errors[2], abs(first.made["model"] - first.truth)) and errors[2].max() > 0
    assert f"{first.scores['model']['psnr']:.2f} dB" in {ax.get_xlabel() for ax in figure.axes}
    paths = pictures.write_report(report, rows, tmp_path)
    assert [p.suffix for p in paths] == [".json", ".md", ".png"] and paths[2].read_bytes()[:4] == b"\x89PNG"
    assert json.loads(paths[0].read_text())["rows"][1]["scores"]["model"] == first.scores["model"]


def test_a_heart_between_its_neighbours(model_folder, tmp_path):
    model = Synthesizer.load(model_folder("demo-cardiac"), "cpu")
    cohort = Phantoms(model.config, 1)
    patterns = [model.config.elements[1:2]]
    _, (row,) = pictures.compare(model, cohort, {"perfect": perfect(cohort)}, patterns)
    stack = next(iter(cohort))[1].volumes["sax"].data
    low, high = np.percentile(stack, (0.5, 99.5))
    shown = [np.rot90(((stack - low) / (high - low)).clip(0, 1)[..., k]) for k in range(stack.shape[2])]
    assert np.allclose(row.truth, shown[row.slice]) and np.allclose(row.made["perfect"], row.truth)
    below, above = (next(k for k, x in enumerate(shown) if np.allclose(x, y)) for y in row.observed)
    assert below < row.slice < above and set(range(below + 1, above)) == set(range(4, 8)), "the second slab's"
    assert row.scores["perfect"]["psnr"] == 100


def test_images_side_by_side():
    made = pictures.montage([np.full((2, 3), i + 1) for i in range(3)])
    assert made.shape == (4, 6) and made[0, 0] == 1 and made[0, 3] == 2 and made[2, 0] == 3 and made[2, 3] == 0


def test_patterns_that_are_asked_for():
    brain, heart = ModelConfig.preset("demo-brain"), ModelConfig.preset("demo-cardiac")
    assert [len(p) for p in pictures.wanted_patterns(brain)] == [1, 2, 3]
    with pytest.raises(CopeditError, match=r"--missing slab0.slab2: demo-cardiac fills in slab0, slab1"):
        pictures.wanted_patterns(heart, ["slab0+slab2"])


def test_subjects_are_persons(model_folder, tmp_path):
    for seed, name in enumerate(("SC-HF-I-01_ED", "SC-HF-I-01_ES", "SC-HF-I-02_ED")):
        subject = phantom_subject(checkpoint.read_config(model_folder("demo-cardiac")), HELD_OUT + seed)
        Volume.from_array(subject.images["sax"], subject.affine()).save(tmp_path / f"{name}.nii.gz")
    command = ["figure", "--model", str(model_folder("demo-cardiac")), "-o", str(tmp_path / "out"), "--device", "cpu"]
    command += ["--data", str(tmp_path), "--split", "all", "--subjects", "1", "--missing", "slab1", "--json"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    shown = [row["subject"] for row in json.loads(done.stdout)["rows"]]
    assert shown == ["SC-HF-I-01_ED", "SC-HF-I-01_ES"]


def test_the_command(model_folder, tmp_path):
    command = ["figure", "--model", str(model_folder("demo-cardiac")), "-o", str(tmp_path), "--device", "cpu", "--json"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["model"] == command[2] and set(report["weights"]) == {"tokenizer", "denoiser"}
    assert report["beside"] == [] and {row["element"] for row in report["rows"]} == {"sax"}
    assert (tmp_path / "side-by-side.md").read_text().count("| model |") == len(report["rows"])
