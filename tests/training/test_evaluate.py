import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from torchmetrics.functional.image import structural_similarity_index_measure
from typer.testing import CliRunner

from copedit_rt.cli import app
from copedit_rt.errors import CopeditError
from copedit_rt.perception import Perception
from copedit_rt.synthesizer import Synthesizer
from training import data
from training import evaluate as ev


@pytest.fixture(scope="module")
def brain(model_folder):
    return Synthesizer.load(model_folder("demo-brain"), device="cpu")


@pytest.fixture(scope="module")
def heart(model_folder):
    return Synthesizer.load(model_folder("demo-cardiac"), device="cpu")


def pair(shape, seed=0, noise=0.1):
    rng = np.random.default_rng(seed)
    a = rng.random(shape)
    return a, np.clip(a + noise * rng.standard_normal(shape), 0, 1)


def test_psnr_and_mae_closed_form():
    a = np.zeros((4, 4, 4))
    assert ev.psnr(a, a + 0.1) == pytest.approx(20)
    assert ev.psnr(a, a + 10, data_range=100) == pytest.approx(20)
    assert ev.psnr(a, a) == math.inf
    assert ev.mae(a, a - 0.25) == pytest.approx(0.25)


def test_ssim_is_torchmetrics():
    a, b = pair((24, 20, 16))
    one, two = (torch.from_numpy(x)[None, None] for x in (a, b))
    expected = structural_similarity_index_measure(one, two, data_range=1.0, sigma=1.5)
    assert ev.ssim3d(a, b) == pytest.approx(float(expected), abs=1e-9)


def test_ssim_closed_forms():
    a, _ = pair((16, 16, 16))
    assert ev.ssim3d(a, a) == pytest.approx(1)
    # Two constants have no variance: only the luminance term is left.
    x, y = np.full((12, 12, 12), 0.4), np.full((12, 12, 12), 0.6)
    assert ev.ssim3d(x, y) == pytest.approx((2 * 0.24 + 1e-4) / (0.16 + 0.36 + 1e-4))


def test_ssim_shrinks_the_window_on_thin_axes():
    a, b = pair((24, 20, 4))
    assert ev.ssim_map(a, b).shape == a.shape
    assert 0 < ev.ssim3d(a, b) < 1
    assert ev.ssim3d(a[..., :1], a[..., :1]) == pytest.approx(1)


def test_ssim_over_slices_sees_only_these():
    a, b = pair((20, 20, 16))
    b[..., :14] = a[..., :14]
    far, near = ev.ssim3d(a, b, slices=[2, 3]), ev.ssim3d(a, b, slices=[14, 15])
    assert far == pytest.approx(1) and near < 0.99


def test_regression_recovers_a_linear_relation():
    rng = np.random.default_rng(0)
    studies = []
    for _ in range(3):
        x, y = rng.random((2, 8, 8, 8))
        x[:2], y[:2] = 0, 0
        z = np.where((x > 0) | (y > 0), 0.1 + 0.5 * x + 0.2 * y, 0)
        studies.append({"a": x, "b": y, "c": z})
    model = ev.LinearRegression(("a", "b", "c"))
    model.fit(iter(studies))
    for target, given in (("c", ("b", "a")), ("a", ("c", "b"))):
        observed = {name: studies[0][name] for name in given}
        assert np.allclose(model.predict(observed, target), studies[0][target], atol=1e-5)
    assert (model.predict({"a": studies[0]["a"]}, "c")[:2] == 0).all()  # background stays background


def test_slice_baselines():
    stack = np.broadcast_to(np.arange(6.0), (3, 3, 6)).copy()
    holes = stack.copy()
    holes[..., [0, 2, 3]] = -9
    assert np.allclose(ev.interpolate_slices(holes, [0, 2, 3])[0, 0], [1, 1, 2, 3, 4, 5])
    assert ev.nearest_slices(holes, [0, 2, 3])[0, 0].tolist() == [1, 1, 1, 4, 4, 5]


def test_normalise_spans_the_percentiles():
    image = np.random.default_rng(0).normal(300, 40, (20, 20, 20))
    out = ev.normalise(image)
    assert out.dtype == np.float32 and out.min() == 0 and out.max() == 1
    assert np.mean(out == 1) == pytest.approx(0.005, abs=1e-3)


# ---- with a tiny model of random weights -------------------------------------------------------------------


def test_patterns(brain, heart):
    every = ev.missing_patterns(brain.config)
    assert [len(every[n]) for n in (1, 2, 3)] == [4, 6, 4]
    runs = ev.missing_patterns(heart.config)
    assert runs[2] == [("slab0", "slab1"), ("slab1", "slab2"), ("slab2", "slab3")]
    assert [len(p) for p in ev.missing_patterns(brain.config, 2).values()] == [2, 2, 2]
    assert ev.missing_patterns(brain.config, 2)[1] == [("t1",), ("flair",)]


def test_phantom_study_removes_and_swaps(brain, heart):
    phantom = data.phantom_subject(brain.config, data.HELD_OUT)
    study = ev.phantom_study(brain.config, phantom, ["t2"], "x", {"flair": "t2"})
    assert list(study.volumes) == ["t1", "t1ce", "flair"]
    assert np.array_equal(study.volumes["flair"].data, phantom.images["t2"])
    phantom = data.phantom_subject(heart.config, data.HELD_OUT)
    study = ev.phantom_study(heart.config, phantom, ["slab1"], "x")
    assert study.missing_slices == (4, 5, 6, 7) and not study.volumes["sax"].data[..., 4:8].any()
    assert phantom.images["sax"][..., 4:8].any()


class Perfect:
    """Returns the truth: what the metrics must then say is known."""

    def __init__(self, model):
        self.config, self.perceive, self._model = model.config, model.perceive, model

    def synthesize(self, study, **options):
        result = self._model.synthesize(study, **options)
        phantom = data.phantom_subject(self.config, int(study.name.removeprefix("phantom")))
        low, high = ev.intensity_of(result.record)
        for name in result.study.synthetic:
            image = phantom.images[name]
            if not study.missing_slices:
                image = ev.normalise(image) * (high - low) + low
            result.study.volumes[name].data = image
        return result


@pytest.mark.parametrize("task", ["brain", "heart"])
def test_evaluation_of_a_perfect_model(task, request, tmp_path):
    model = request.getfixturevalue(task)
    seen = []
    options = {"subjects": 1, "patterns": 1, "fit_subjects": 2, "progress": lambda *p: seen.append(p)}
    report = ev.evaluate(Perfect(model), **options)
    assert seen == [(1, 3), (2, 3), (3, 3)]
    for rows in report["by_count"].values():
        baselines = [row for method, row in rows.items() if method != "model"]
        assert len(baselines) == 2
        assert rows["model"]["psnr"]["mean"] > 99 > max(row["psnr"]["mean"] for row in baselines)
        assert rows["model"]["ssim"]["mean"] == pytest.approx(1)
    assert set(report["heads"]) == {"1", "2", "3", "all"} and report["heads"]["all"]["studies"] == 3
    if task == "brain":
        assert report["mislabel"]["studies"] == 1
    paths = ev.write_report(report, tmp_path / "new")
    assert json.loads(paths[0].read_text())["by_pattern"].keys() == report["by_pattern"].keys()
    text = paths[1].read_text()
    assert text.count("| model |") == 6 and "number right" in text


@pytest.mark.parametrize("task", ["brain", "heart"])
def test_sweep(task, request, tmp_path):
    model = request.getfixturevalue(task)
    seen, calls = [], []

    class Shifted:
        """Outputs that differ by a tenth of their range a step, from those of three steps."""

        config = model.config

        def synthesize(self, study, **options):
            calls.append((study.name, options["solver"], options["steps"]))
            result = model.synthesize(study, **options)
            low, high = ev.intensity_of(result.record)
            for name in result.study.synthetic:
                result.study.volumes[name].data = result.study.volumes[name].data + 0.1 * (3 - options["steps"]) * (
                    high - low
                )
            return result

    report = ev.sweep(Shifted(), steps=[3, 1, 3], subjects=1, patterns=1, progress=lambda *p: seen.append(p))
    assert seen == [(1, 3), (2, 3), (3, 3)] and len(calls) == 3 * 4
    rows = {(row["solver"], row["steps"]): row for row in report["sweep"]}
    assert list(rows) == [("ddim", 1), ("ddim", 3), ("dpm2m", 1), ("dpm2m", 3)]
    assert rows["dpm2m", 3]["converged"]["mean"] == 100
    assert rows["dpm2m", 1]["converged"]["mean"] == pytest.approx(-20 * math.log10(0.2), abs=0.01)
    for metric in ("psnr", "ssim", "mae", "converged"):  # the first step of both is the same
        assert rows["ddim", 1][metric] == rows["dpm2m", 1][metric]
    # By hand, for one row: the model's own score in an evaluation of the same studies.
    whole = ev.evaluate(model, steps=3, solver="ddim", subjects=1, patterns=1, fit_subjects=2)
    images = [row["model"] for row in whole["by_pattern"].values()]
    mean = np.average([row["psnr"]["mean"] for row in images], weights=[row["images"] for row in images])
    assert rows["ddim", 3]["psnr"]["mean"] == pytest.approx(mean)
    assert rows["ddim", 3]["images"] == sum(row["images"] for row in images)
    paths = ev.write_report(report, tmp_path)
    assert [p.name for p in paths] == ["sweep.json", "sweep.md"]
    assert json.loads(paths[0].read_text())["sweep"] == report["sweep"]
    assert paths[1].read_text().count("\n| d") == 4


def test_evaluation_keeps_off_the_training_seeds(brain):
    for run in (ev.evaluate, partial(ev.sweep, steps=[1])):
        with pytest.raises(CopeditError, match="held-out"):
            run(brain, first_seed=5)


def test_heads_count_what_is_right():
    heads = ev.Heads()
    seen = Perception([0.8, 0.1, 0.1], [0.9, 0.1, 0.2, 0.3], {}, ("t1", "t1ce", "t2", "flair"))
    heads.add(seen, ["t1"])
    heads.add(seen, ["t2"])
    heads.add(seen, ["t1", "t2"])
    summary = heads.summary()
    assert summary["1"] == {"studies": 2, "count": 1.0, "which": 0.5}
    assert summary["2"]["count"] == 0 and summary["all"]["studies"] == 3


def test_the_command(model_folder, tmp_path):
    command = [
        "evaluate",
        "--model",
        str(model_folder("demo-cardiac")),
        "-o",
        str(tmp_path / "out"),
        "--subjects",
        "1",
    ]
    result = CliRunner().invoke(app, [*command, "--patterns", "1", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["task"] == "cardiac"
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"evaluation.json", "evaluation.md"}
    result = CliRunner().invoke(app, [*command, "--patterns", "1", "--sweep", "1-2"])
    assert result.exit_code == 0, result.output
    assert {p.name for p in (tmp_path / "out").glob("sweep*")} == {"sweep.json", "sweep.md"}
    assert "| dpm2m | 2 |" in result.stdout
    for options in (["--sweep", "few"], ["--sweep", "2", "--solver", "ddim"]):
        refused = CliRunner().invoke(app, [*command, *options])
        assert refused.exit_code == 1 and refused.stderr.count("\n") == 1 and "--sweep" in refused.stderr
    refused = CliRunner().invoke(app, [*command, "--data", "brats"])
    assert refused.exit_code == 1 and refused.stderr.count("\n") == 1 and "brats" in refused.stderr
