import json
import math

import numpy as np
import pytest
from typer.testing import CliRunner

from copedit_rt.cli import app
from copedit_rt.errors import CopeditError
from copedit_rt.images.nifti import Volume
from copedit_rt.images.study import Study
from copedit_rt.perception import Perception
from copedit_rt.synthesizer import Synthesizer
from copedit_training.data import layouts, prepared
from copedit_training.evaluation import compare, subjects
from copedit_training.evaluation import evaluate as ev
from copedit_training.evaluation import report as pages
from copedit_training.evaluation.subjects import phantom_truth
from tests.training.data.test_anatomy import made_up


@pytest.fixture(scope="module")
def brain(model_folder):
    return Synthesizer.load(model_folder("demo-brain"), device="cpu")


@pytest.fixture(scope="module")
def heart(model_folder):
    return Synthesizer.load(model_folder("demo-cardiac"), device="cpu")


def test_normalise_spans_the_percentiles():
    image = np.random.default_rng(0).normal(300, 40, (20, 20, 20))
    out = ev.normalise(image)
    assert out.dtype == np.float32 and out.min() == 0 and out.max() == 1
    assert np.mean(out == 1) == pytest.approx(0.005, abs=1e-3)


def test_outputs_in_the_units_of_a_standardised_image_keep_their_dark_tissue():
    """z-scores are told by the observed image. A bright output has few voxels below 0, and those are tissue, too.

    T1 holds equally many of -2 and 3, so that these are its percentiles; 0 is air in it and in what is made of it.
    """
    inside = np.zeros((12, 12, 12), bool)
    inside[2:-2, 2:-2, 2:-2] = True
    rng = np.random.default_rng(0)
    t1, t2 = np.zeros((2, *inside.shape), np.float32)
    t1[inside] = rng.permutation(np.repeat(np.float32([-2, 3]), inside.sum() // 2))
    t2[inside] = rng.uniform(1, 100, inside.sum())
    made, wanted = {}, {}
    for method, dark in (("model", 0.12), ("other", 0.5)):
        grey = np.where(rng.random(inside.shape) < dark, 0.2, 0.9)
        made[method] = {"t2": np.where(inside, 5 * grey - 2, 0).astype(np.float32)}
        wanted[method] = np.where(inside, grey, 0)
    others = {"other": made["other"]}
    found = compare.compare_brain({"t1": t1, "t2": t2}, ["t2"], made["model"], (-2, 3), None, others=others)
    images = {pair.method: pair.image for pair in found}
    for method, image in wanted.items():
        assert images[method] == pytest.approx(image, abs=1e-6), method


# ---- with a tiny model of random weights -------------------------------------------------------------------


def test_patterns(brain, heart):
    every = ev.missing_patterns(brain.config)
    assert [len(every[n]) for n in (1, 2, 3)] == [4, 6, 4]
    runs = ev.missing_patterns(heart.config)
    assert runs[2] == [("slab0", "slab1"), ("slab1", "slab2"), ("slab2", "slab3")]
    assert [len(p) for p in ev.missing_patterns(brain.config, 2).values()] == [2, 2, 2]
    assert ev.missing_patterns(brain.config, 2)[1] == [("t1",), ("flair",)]


def test_incomplete_studies_lack_and_swap_elements(brain, heart):
    phantom = prepared.phantom_subject(brain.config, prepared.HELD_OUT)
    study = ev.incomplete(brain.config, phantom_truth(brain.config, phantom, "x"), ["t2"], {"flair": "t2"})
    assert list(study.volumes) == ["t1", "t1ce", "flair"]
    assert np.array_equal(study.volumes["flair"].data, phantom.images["t2"])
    phantom = prepared.phantom_subject(heart.config, prepared.HELD_OUT)
    study = ev.incomplete(heart.config, phantom_truth(heart.config, phantom, "x"), ["slab1"])
    assert study.missing_slices == (4, 5, 6, 7) and not study.volumes["sax"].data[..., 4:8].any()
    assert phantom.images["sax"][..., 4:8].any()


class Perfect:
    """Returns the truth: what the metrics must then say is known."""

    def __init__(self, model):
        self.config, self.perceive, self.engine, self._model = model.config, model.perceive, model.engine, model

    def synthesize(self, study, **options):
        result = self._model.synthesize(study, **options)
        phantom = prepared.phantom_subject(self.config, int(study.name.removeprefix("phantom")))
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
    options = {"patterns": 1, "fit_subjects": 2, "progress": lambda *p: seen.append(p)}
    found = ev.evaluate(Perfect(model), subjects.Phantoms(model.config, 1), **options)
    assert seen == [(1, 3), (2, 3), (3, 3)]
    for rows in found["by_count"].values():
        baselines = [row for method, row in rows.items() if method != "model"]
        assert len(baselines) == 2
        assert rows["model"]["psnr"]["mean"] > 99 > max(row["psnr"]["mean"] for row in baselines)
        assert rows["model"]["ssim"]["mean"] == pytest.approx(1)
        assert ("psnr_inside" in rows["model"]) == (task == "brain")
    assert set(found["heads"]) == {"1", "2", "3", "all"} and found["heads"]["all"]["studies"] == 3
    if task == "brain":
        assert found["mislabel"]["studies"] == 1
        assert set(found["reconstruction"]) == {"t1", "t1ce", "t2", "flair", "all"}
    (tmp_path / "new").mkdir()
    for name in ("calibration", "frechet", "another"):  # of an earlier evaluation, and of somebody else
        (tmp_path / "new" / f"{name}.png").touch()
    paths = pages.write_report(found, tmp_path / "new")
    assert {p.stem for p in (tmp_path / "new").glob("*.png")} - {p.stem for p in paths} == {"another"}
    assert json.loads(paths[0].read_text())["by_pattern"].keys() == found["by_pattern"].keys()
    text = paths[1].read_text()
    assert text.count("| model |") == 6 and "number right" in text and "±" not in text.partition("##")[2], "of one"
    for line in ("FID: off", "FVD: off", "LPIPS: off", "Off: it needs several samples"):
        assert line in text
    assert pages.unplotted() is None and {p.name for p in paths[2:]} == {
        "counts.png",
        "patterns.png",
        "reconstruction.png",
        "heads.png",
    }
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths[2:])


def test_reconstruction_is_the_tokenizers_own(brain, heart):
    import torch

    for model in (brain, heart):
        prepared = next(iter(subjects.Phantoms(model.config, 1)))[2]
        vae, joint = model.engine.tokenizer, model.config.task == "cardiac"
        with torch.no_grad():
            z = vae.encode(torch.from_numpy(prepared.images[None]))
            codes = vae.codebook[(z.movedim(2, -1)[..., None, :] - vae.codebook).square().sum(-1).argmin(-1)]
            wanted = {"as it is": z, "nearest codes": codes.movedim(-1, 2)}
            images = {name: vae.decode(x, joint)[0, :, 0].clamp(0, 1).numpy() for name, x in wanted.items()}
        rows = {(element, method): values for element, method, values in ev.reconstruct(model, prepared)}
        assert len(rows) == (2 if joint else 8)
        for (element, method), values in rows.items():
            where = slice(None) if joint else model.config.elements.index(element)
            error = (images[method] - prepared.images[:, 0])[where]
            assert values["mae"] == pytest.approx(np.abs(error).mean(), rel=1e-5), (element, method)
            assert values["psnr"] == pytest.approx(-10 * math.log10((error.astype(np.float64) ** 2).mean()), rel=1e-5)


def test_scores_are_of_subjects():
    """The mean of each subject's images, then the mean and deviation (n - 1) over subjects."""
    scores = ev.Scores()
    for subject, value in (("a", 1.0), ("a", 3.0), ("b", 6.0)):
        scores.add("1", "model", {"psnr": value}, subject)
    assert scores.summary()["1"]["model"] == {
        "images": 3,
        "subjects": 2,
        "psnr": {"mean": 4.0, "sd": pytest.approx(math.sqrt(8))},
    }
    scores.add("2", "model", {"psnr": 1.0})
    assert scores.summary()["2"]["model"]["psnr"] == {"mean": 1.0, "sd": None}


@pytest.mark.parametrize("task", ["brain", "heart"])
def test_sweep(task, request, tmp_path):
    model = request.getfixturevalue(task)
    seen, calls = [], []

    class Shifted:
        """Always one step; outputs that differ by a tenth of their range a step from those asked for in three."""

        config = model.config

        def synthesize(self, study, **options):
            calls.append((options["solver"], options["steps"]))
            result = model.synthesize(study, **options | {"steps": 1})
            low, high = ev.intensity_of(result.record)
            for name in result.study.synthetic:
                data = result.study.volumes[name].data.astype(np.float64)
                data[..., list(study.missing_slices) or slice(None)] += 0.1 * (3 - options["steps"]) * (high - low)
                result.study.volumes[name].data = data
            return result

    cohort = subjects.Phantoms(model.config, 1)
    found = ev.sweep(Shifted(), cohort, steps=[3, 1, 3], patterns=1, progress=lambda *p: seen.append(p))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert calls == 3 * [("dpm2m", 3), ("ddim", 3), ("dpm2m", 1), ("ddim", 1)]  # the best estimate comes first
    rows = {(row["solver"], row["steps"]): row for row in found["sweep"]}
    assert list(rows) == [("ddim", 1), ("ddim", 3), ("dpm2m", 1), ("dpm2m", 3)]
    assert rows["dpm2m", 3]["converged"]["mean"] == 100
    assert rows["dpm2m", 1]["converged"]["mean"] == pytest.approx(-20 * math.log10(0.2))
    for metric in ("psnr", "ssim", "mae", "converged"):  # the first step of both is the same
        assert rows["ddim", 1][metric] == rows["dpm2m", 1][metric]
    # By hand, for one row: the model's own score in an evaluation of the same studies.
    whole = ev.evaluate(model, cohort, steps=1, solver="ddim", patterns=1, fit_subjects=2)
    images = [row["model"] for row in whole["by_pattern"].values()]
    mean = np.average([row["psnr"]["mean"] for row in images], weights=[row["images"] for row in images])
    assert rows["ddim", 3]["psnr"]["mean"] == pytest.approx(mean)
    assert rows["ddim", 3]["images"] == sum(row["images"] for row in images)
    paths = pages.write_report(found, tmp_path)
    assert [p.name for p in paths] == ["sweep.json", "sweep.md", "sweep.png"]
    assert json.loads(paths[0].read_text())["sweep"] == found["sweep"]
    assert paths[1].read_text().count("\n| d") == 4


def test_evaluation_keeps_off_the_training_seeds(brain):
    with pytest.raises(CopeditError, match="held-out"):
        subjects.Phantoms(brain.config, first_seed=5)


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
    options = ["--model", str(model_folder("demo-cardiac")), "-o", str(tmp_path / "out"), "--subjects", "1"]
    result = CliRunner().invoke(app, ["evaluate", *options, "--patterns", "1", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["task"] == "cardiac"
    weights = Synthesizer.load(options[1], "cpu").weights
    assert json.loads(result.stdout)["model"] == options[1] and json.loads(result.stdout)["weights"] == weights
    assert (tmp_path / "out" / "evaluation.md").read_text().startswith(f"# {options[1]}: quality")
    names = ["counts", "heads", "patterns", "reconstruction"]
    assert {p.name for p in (tmp_path / "out").glob("*.png")} == {f"{name}.png" for name in names}
    result = CliRunner().invoke(app, ["sweep", *options, "--patterns", "1", "--steps", "1-2"])
    assert result.exit_code == 0, result.output
    assert {p.name for p in (tmp_path / "out").glob("sweep*")} == {"sweep.json", "sweep.md", "sweep.png"}
    assert "| dpm2m | 2 |" in result.stdout and f"# {options[1]}: quality" in result.stdout
    refused = [
        (["sweep", "--steps", "few"], "--steps few"),
        (["sweep", "--steps", "0,1"], "--steps 0: there is no solver to compare"),
        (["sweep", "--steps", "2", "--split", "all"], "--split all"),
        (["evaluate", "--data", "brats"], "brats"),
        (["evaluate", "--split", "all"], "--split all"),
    ]
    for command, named in refused:
        result = CliRunner().invoke(app, [*command, *options])
        assert result.exit_code == 1 and result.stderr.count("\n") == 1 and named in result.stderr


# ---- a data set ------------------------------------------------------------------------------------------------------


def brains(root, count, config):
    """A BraTS folder of simulated brains, in LPS order and with ringing below 0 on one side of them."""
    flip = np.diag([-1.0, -1.0, 1.0, 1.0])
    for i in range(count):
        phantom = prepared.phantom_subject(config, prepared.HELD_OUT + i)
        name = f"BraTS2021_{i:05d}"
        for element, image in phantom.images.items():
            shown = np.where(image > 0, image, -0.002 * image.max()).astype(np.float32)
            shown[: len(shown) // 2][image[: len(shown) // 2] == 0] = 0
            path = root / name / f"{name}_{element}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            affine = phantom.affine() @ flip
            if element == "flair":  # its file has another voxel order
                turn = np.diag([-1.0, -1.0, 1.0, 1.0])
                turn[:2, 3] = np.array(shown.shape[:2]) - 1
                shown, affine = shown[::-1, ::-1], affine @ turn
            Volume.from_array(shown, affine).save(path)
    return root


def test_a_folder(brain, model_folder, tmp_path):
    """The complete studies of the held-out side; the others reported. Values are those of the phantoms themselves."""
    root = brains(tmp_path / "data", 6, brain.config)
    (root / "BraTS2021_00005" / "BraTS2021_00005_t2.nii.gz").unlink()
    sides = layouts.split(layouts.find(root, brain.config).subjects)
    assert 0 < len(sides["test"]) < 5
    options = ["--data", str(root), "-o", str(tmp_path / "out"), "--patterns", "1", "--json"]
    command = ["evaluate", "--model", str(model_folder("demo-brain")), *options]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert sorted(f"BraTS/{name}" for name in found["studies"]) == sides["test"]
    assert found["subjects"] == len(sides["test"]) and found["data"] == str(root)
    assert [item["study"] for item in found["skipped"]] == ["BraTS2021_00005"]
    assert "linear regression" in found["by_count"]["1"]  # fitted on the other side
    assert "BraTS2021_00005: t2 missing" in (tmp_path / "out" / "evaluation.md").read_text()
    # Baselines know no grid and no noise: those of the phantom itself.
    expected = {"mae": [], "mae_inside": []}
    for name in found["studies"]:
        phantom = prepared.phantom_subject(brain.config, prepared.HELD_OUT + int(name[-5:]))
        normal = {element: ev.normalise(image) for element, image in phantom.images.items()}
        error = np.abs(np.mean([normal[element] for element in ("t1ce", "t2", "flair")], axis=0) - normal["t1"])
        expected["mae"].append(error.mean())
        expected["mae_inside"].append(error[np.any([image > 0 for image in normal.values()], axis=0)].mean())
    for metric, values in expected.items():
        row = found["by_pattern"]["t1"]["mean of observed"]
        assert row[metric]["mean"] == pytest.approx(np.mean(values), rel=5e-3)
    # All of them, with nobody left to fit on; and those of a split of one's own, which stays as it is.
    every = CliRunner().invoke(app, [*command, "--split", "all", "--subjects", "2"])
    assert json.loads(every.stdout)["subjects"] == 2
    assert "linear regression" not in json.loads(every.stdout)["by_count"]["1"]
    own = tmp_path / "split.json"
    own.write_text(json.dumps({"train": ["BraTS/another"], "test": []}))
    of_another = CliRunner().invoke(app, [*command, "--split", str(own)])
    assert of_another.exit_code == 1 and "names none of the subjects" in of_another.stderr
    own.write_text(json.dumps({"train": [], "test": ["BraTS/BraTS2021_00003", "BraTS/BraTS2021_00002"]}))
    (tmp_path / "watched.json").write_text(json.dumps(["BraTS/BraTS2021_00002"]))
    before = own.read_bytes()
    chosen = CliRunner().invoke(app, [*command, "--split", str(own)])
    report = json.loads(chosen.stdout)
    assert "BraTS2021_00003" in report["studies"] and "BraTS2021_00002" not in report["studies"]
    assert own.read_bytes() == before and report["people_watched"] == 1 and found["people_watched"] == 0
    assert ", without the 1 that the run was watched on" in (tmp_path / "out" / "evaluation.md").read_text()


def test_a_folder_that_cannot_be_used(model_folder, tmp_path):
    command = ["evaluate", "--model", str(model_folder("demo-brain")), "-o", str(tmp_path / "out"), "--data"]
    root = tmp_path / "data"
    for file in ("a_t1.nii.gz", "a_t2.nii.gz"):
        root.mkdir(exist_ok=True)
        Volume.from_array(np.random.default_rng(0).random((8, 8, 8)), np.diag([3.0, 3.0, 3.0, 1.0])).save(root / file)
    for options in ([str(root)], [str(tmp_path / "nothing")], [str(root), "--split", "nothing.json"]):
        refused = CliRunner().invoke(app, [*command, *options])
        assert refused.exit_code == 1 and refused.stderr.count("\n") == 1, refused.output
        assert (options[-1] if len(options) > 1 else options[0]) in refused.stderr


def test_other_simulated_subjects(model_folder, tmp_path):
    """--first-seed: other subjects, whose seeds the report names; neither those of training nor beside a data set."""
    command = ["evaluate", "--model", str(model_folder("demo-cardiac")), "--patterns", "1", "--json", "--subjects", "1"]
    command += ["-o", str(tmp_path / "out"), "--first-seed"]
    result = CliRunner().invoke(app, [*command, str(prepared.HELD_OUT + 7)])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["first_seed"] == prepared.HELD_OUT + 7 and found["studies"] == [f"phantom{prepared.HELD_OUT + 7}"]
    assert f"from seed {prepared.HELD_OUT + 7}" in (tmp_path / "out" / "evaluation.md").read_text()
    for options, named in (["999999"], "999999"), (["1000007", "--data", str(tmp_path)], "--first-seed"):
        refused = CliRunner().invoke(app, [*command, *options])
        assert refused.exit_code == 1 and refused.stderr.count("\n") == 1, refused.output
        assert named in refused.stderr


def test_subjects_of_label_maps(model_folder, tmp_path):
    """Every command that takes them, to the page that it writes."""
    data = f"labels:{made_up(tmp_path)}"
    model = str(model_folder("demo-brain"))
    shared = ["--model", model, "-o", str(tmp_path / "out"), "--data", data, "--subjects", "1"]
    few = ["--patterns", "1"]
    for command in (["evaluate", *few], ["sweep", "--steps", "1", *few], ["analyse", "gradcam"], ["figure"]):
        result = CliRunner().invoke(app, [*command, *shared, "--json"])
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["data"] == data
    pages = {path.stem: path.read_text() for path in (tmp_path / "out").glob("*.md")}
    for name in ("evaluation", "sweep"):
        assert f"1 simulated subjects ({data}) from seed {prepared.HELD_OUT}" in pages[name]
    assert f"3 samples, simulated ({data})." in pages["gradcam"]


def stack(config, count, axis=2):
    """A complete heart of `count` slices along an axis."""
    image = np.moveaxis(np.random.default_rng(0).uniform(10, 200, (12, 12, count)), 2, axis)
    size = np.ones(3)
    size[axis] = 8
    return Study("heart", "cardiac", {"sax": Volume.from_array(image, np.diag([*size, 1.0]))})


def test_slabs_of_real_stacks(heart):
    """Exactly the named slabs are missing afterwards, however many slices there are and wherever they lie."""
    from copedit_rt.images.prepare import prepare

    config = heart.config
    for count, axis in ((16, 2), (10, 2), (13, 0), (8, 1)):
        truth = stack(config, count, axis)
        for missing in (("slab0",), ("slab1",), ("slab1", "slab2"), ("slab1", "slab2", "slab3")):
            slices = compare.missing_slices(config, truth, missing)
            study = ev.incomplete(config, truth, missing)
            assert prepare(study, config).missing == missing, (count, missing)
            blank = np.flatnonzero(~np.moveaxis(study.volumes["sax"].data, axis, 2).any(axis=(0, 1)))
            assert blank.tolist() == slices == list(study.missing_slices)
    assert compare.missing_slices(config, stack(config, 10), ("slab0",)) == [0, 1]
    assert compare.missing_slices(config, stack(config, 10), ("slab0", "slab1")) == [0, 1, 2, 3, 4]
    assert compare.missing_slices(config, stack(config, 3), ("slab1",)) == []  # its middle slice lies in two


def test_a_heart_with_slices_along_the_first_axis(heart):
    """The scores are those of the same heart with its slices last."""
    config, found = heart.config, []
    for axis in (2, 0):
        truth = stack(config, 16, axis)
        result = heart.synthesize(ev.incomplete(config, truth, ("slab1",)), steps=1)
        made = np.moveaxis(result.study.volumes["sax"].data, axis, 2)
        whole = np.moveaxis(truth.volumes["sax"].data, axis, 2)
        rows = dict(ev.compare(config, truth, ("slab1",), result))
        low, high = np.percentile(whole, (0.5, 99.5))
        a, b = (np.clip((x[..., 4:8] - low) / (high - low), 0, 1) for x in (made, whole))
        assert rows["model"]["mae"] == pytest.approx(np.abs(a - b).mean())
        found.append(rows)
    for method in ("linear interpolation", "nearest slice"):
        assert found[0][method] == pytest.approx(found[1][method])
