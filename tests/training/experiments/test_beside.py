"""Methods beside a model: the same studies and noise, fair or refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from copedit_rt import checkpoint
from copedit_rt.cli import app
from copedit_rt.errors import CopeditError
from copedit_rt.images.prepare import prepare
from copedit_rt.networks.tokenizer import CoPeVAE
from copedit_rt.schedule import noise as noise_of
from copedit_rt.synthesizer import Synthesizer
from copedit_training.evaluation import evaluate as ev
from copedit_training.evaluation.beside import Beside, Differences, paired
from copedit_training.evaluation.subjects import Phantoms
from copedit_training.experiments import beside, segmentation
from copedit_training.methods.base import load_method
from copedit_training.stages import trainer
from tests.training.methods.small import BRAIN, CONFIGS, HEART, model, smooth, task, train
from tests.training.stages.tiny import SMALL


@pytest.fixture(autouse=True)
def smooth_subjects(monkeypatch):
    monkeypatch.setattr(trainer, "phantom_images", smooth)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Of IXI's three modalities: two seeds of MM-GAN, LDM, DiffM4RI, and a denoiser on the same data."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "phantom_images", smooth)
        for seed in (0, 1):
            train("mmgan", root / f"mmgan-{seed}", BRAIN, f"seed={seed}")
        train("ldm", root / "ldm", BRAIN)
        train("diffm4ri", root / "diffm4ri", BRAIN)
        given = (*SMALL["denoiser"], "crop=0", "steps=2", f"tokenizer={root / 'vae'}")
        trainer.run("denoiser", "demo-brain", root / "denoiser", overrides=given, config=BRAIN)
    return root


def test_a_table_of_all_from_the_command(runs, tmp_path):
    command = ["evaluate", "--model", str(runs / "denoiser" / "model"), "-o", str(tmp_path), "--subjects", "2"]
    command += ["--patterns", "1", "--steps", "3", "--json", "--device", "cpu"]
    for name in ("mmgan-0", "mmgan-1", "ldm/model", "diffm4ri", "diffm4ri@resample=2,sampler_steps=2", "denoiser"):
        command += ["--beside", str(runs / name)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    names = ["MM-GAN", "LDM", "DiffM4RI", "DiffM4RI: resample=2, sampler_steps=2", "CoPeDiT, trained beside"]
    assert list(found["beside"]) == ["model", *names] and found["seeds"] == 2, "as many as a method has runs"
    for rows in found["by_count"].values():
        assert {"model", *names, "mean of observed", "linear regression"} == set(rows)
        assert {row["images"] for row in rows.values()} == {rows["model"]["images"]}
    budget = found["beside"]["MM-GAN"]
    assert (budget["steps"], budget["volumes"], budget["slices"], budget["runs"]) == (4, 8, 16, 2)
    lines = [x for i in (0, 1) for x in (runs / f"mmgan-{i}" / "log.jsonl").read_text().splitlines()]
    for name in ("seconds", "processor_seconds"):
        assert budget[name] == pytest.approx(sum(json.loads(x)[name] for x in lines) / 2) and budget[name] > 0
    assert budget["seconds_per_study"] > 0
    ldm, own = found["beside"]["LDM"], found["beside"]["model"]
    assert ldm["slices"] is None and ldm["space"] == "latent" and own["steps"] == 2
    weights, _ = checkpoint.read_tensors(runs / "denoiser" / "model" / checkpoint.DENOISER)
    assert own["parameters"] == sum(x.numel() for x in weights.values()), "packed or not"

    same = found["differences"]["1"]["CoPeDiT, trained beside"]["psnr"]
    assert same["per_seed"] == [0, 0] and not same["resolved"], "the same model with the same noise"
    other = found["differences"]["2"]["LDM"]["psnr_inside"]
    rows = found["by_count"]["2"]
    mean = rows["LDM"]["psnr_inside"]["mean"] - rows["model"]["psnr_inside"]["mean"]
    assert other["mean"] == pytest.approx(mean) and len(other["per_seed"]) == 2 and other["standard_error"] > 0
    text = (tmp_path / "evaluation.md").read_text()
    assert "## Beside the model" in text and "Seeds 0 to 1." in text and "| MM-GAN | image |" in text


@pytest.mark.parametrize("where", CONFIGS)
def test_a_study_goes_the_way_of_the_synthesizer(where, tmp_path):
    """A method that does what the model does writes what the model writes."""
    config = CONFIGS[where]
    synthesizer = Synthesizer.load(model(config, tmp_path / "model"), device="cpu")
    made = task("ldm", config)
    seen = []

    def fill(known, observed, noise):
        seen.append((known, observed))
        there = observed[0].numpy()
        z = synthesizer.encode(known[0].numpy()[there]).latents[0]
        begin = np.empty((3, *z.shape[1:]), np.float32)
        begin[there] = z
        for i in np.flatnonzero(~there):
            begin[i] = noise(config.elements[i], z.shape[1:])
        prompts = synthesizer.encode(known[0].numpy()[there]).prompts
        latents = synthesizer.sample(begin[None], prompts, observed.numpy(), 4, "ddim", None, None)
        return torch.from_numpy(synthesizer.decode(latents[0], there))[None]

    made.fill = fill
    _, truth, _ = next(iter(Phantoms(config, 1)))
    study = ev.incomplete(config, truth, config.elements[1:2])
    volumes = beside.filled(made)(study, 7)
    result = synthesizer.synthesize(study, seed=7, steps=4, solver="ddim")
    known, observed = seen[0]
    assert observed.tolist() == [[True, False, True]]
    assert torch.equal(known[0, [0, 2]], torch.from_numpy(prepare(study, config).images[[0, 2]]))
    for name in volumes:
        own = result.study.volumes[name].data
        assert volumes[name].shape == own.shape and np.allclose(volumes[name], own, atol=1e-3 * own.max())


def test_hearts_are_compared_over_the_missing_slices_alone(tmp_path):
    synthesizer = Synthesizer.load(model(HEART, tmp_path / "vae"), device="cpu")
    _, truth, _ = next(iter(Phantoms(HEART, 1)))
    whole = truth.volumes["sax"].data

    def perfect(study, seed):
        assert study.missing_slices and seed in (3, 4)
        wrong = np.full_like(whole, 1e6)
        wrong[..., list(study.missing_slices)] = whole[..., list(study.missing_slices)]
        return {"sax": wrong}

    others = {"perfect": Beside([perfect])}
    found = ev.evaluate(synthesizer, Phantoms(HEART, 1), steps=1, patterns=1, seed=3, seeds=2, beside=others)
    assert [rows["perfect"]["psnr"]["mean"] for rows in found["by_count"].values()] == [100, 100]
    gain = found["differences"]["1"]["perfect"]["psnr"]
    assert gain["mean"] > 50 and gain["standard_error"] is None and not gain["resolved"], "one subject resolves nothing"


def test_runs_take_turns_and_every_method_gets_the_same_study(tmp_path):
    synthesizer = Synthesizer.load(model(BRAIN, tmp_path / "vae"), device="cpu")
    asked = []

    def run(name):
        def fill(study, seed):
            asked.append((name, seed, tuple(study.volumes)))
            missing = [e for e in BRAIN.elements if e not in study.volumes]
            return dict.fromkeys(missing, np.zeros(study.reference.data.shape, np.float32))

        return fill

    others = {"a": Beside([run("a0"), run("a1")]), "b": Beside([run("b")])}
    ev.evaluate(synthesizer, Phantoms(BRAIN, 1), steps=1, patterns=1, seed=5, seeds=3, beside=others, fit_subjects=1)
    first = [(name, seed) for name, seed, there in asked if there == ("t2", "pd")]
    assert first == [("a0", 5), ("b", 5), ("a1", 6), ("b", 6), ("a0", 7), ("b", 7)]


def test_a_difference_is_of_the_same_subjects_and_seeds():
    found = Differences()
    rng = np.random.default_rng(0)
    ours, theirs = rng.random((2, 2, 3, 2))  # seeds, subjects, images
    for turn in range(2):
        for who in range(3):
            for image in range(2):
                found.add("1", "model", turn, f"s{who}", {"psnr": ours[turn, who, image]})
                found.add("1", "other", turn, f"s{who}", {"psnr": theirs[turn, who, image]})
    assert found.summary(["other"])["1"]["other"]["psnr"] == paired(theirs.mean(2), ours.mean(2))


def test_what_would_not_be_fair_is_refused(runs, tmp_path, monkeypatch):
    synthesizer = Synthesizer.load(runs / "denoiser" / "model", device="cpu")
    name = str(runs / "denoiser" / "model")

    def refused(words, *specs, of=name):
        with pytest.raises(CopeditError, match=words):
            beside.load([str(spec) for spec in specs], synthesizer, of, "cpu")

    train("mmgan", tmp_path / "fewer", BRAIN, "subjects=3")
    refused("fewer and .*denoiser: not trained on the same data", tmp_path / "fewer")
    train("mmgan", tmp_path / "wider", BRAIN, "width=12", "seed=5")
    refused("must differ in their seed, and in nothing else", runs / "mmgan-0", tmp_path / "wider")
    refused("several runs of MM-GAN must differ in their seed", runs / "mmgan-0", runs / "mmgan-0")
    refused("no run there", tmp_path)
    shutil.copytree(runs / "vae", tmp_path / "stage-one" / "model")
    (tmp_path / "stage-one" / "run.json").write_text('{"stage": "tokenizer"}')
    refused("stage-one: a run of stage I, which fills in nothing", tmp_path / "stage-one")
    monkeypatch.chdir(runs / "ldm")
    refused("no run there", "mistyped")
    refused("settings of sampling can be given for methods", f"{runs / 'denoiser'}@steps=2")
    refused("expected RUN@KEY=NUMBER, found resample=x", f"{runs / 'diffm4ri'}@resample=x")
    refused("resample: cannot be changed in a trained LDM; what can be is sampler_steps", f"{runs / 'ldm'}@resample=2")
    train("mmgan", tmp_path / "heart", HEART)
    refused("its task is not that of", tmp_path / "heart")

    vae = checkpoint.load_tokenizer(runs / "vae")[1]
    with torch.no_grad():
        vae.latent_mean += 1
    checkpoint.save(tmp_path / "other-vae", BRAIN, vae)
    train("ldm", tmp_path / "other-tokenizer", BRAIN, f"tokenizer={tmp_path / 'other-vae'}")
    refused("not trained with the same tokenizer", tmp_path / "other-tokenizer")
    refused("its tokenizer is not that of elsewhere", tmp_path / "other-tokenizer", of="elsewhere")
    monkeypatch.chdir(runs / "mmgan-0")  # the name of a model is not that of a folder
    others, budget = beside.load([str(runs / "mmgan-0")], synthesizer, "elsewhere", "cpu")
    assert list(others) == ["MM-GAN"] and set(budget) == {"space", "parameters"}


def test_a_denoiser_is_compared_by_the_tokenizer_that_it_was_trained_with(runs, tmp_path):
    """What lies in its place by now is asked only where the run does not say, as those of older versions."""
    shutil.copytree(runs / "denoiser", tmp_path / "run")
    path, vae = tmp_path / "run" / "run.json", model(BRAIN, tmp_path / "vae")
    said = json.loads(path.read_text())
    said["settings"]["tokenizer"] = str(vae)
    checkpoint.save(vae, BRAIN, CoPeVAE(BRAIN.tokenizer, len(BRAIN.elements)))
    for wanted in (runs / "vae", vae):
        path.write_text(json.dumps(said))
        run = beside._read(str(tmp_path / "run"), "cpu", {})
        assert run.tokenizer == checkpoint.digest(wanted / checkpoint.TOKENIZER)
        said.pop("tokenizer", None)


def test_methods_go_into_a_segmentation(runs, tmp_path, monkeypatch):
    pytest.importorskip("monai", reason="the U-Net needs the extra `train`")
    regions = np.random.default_rng(0).random((3, 32, 32, 8)) < 0.3
    source = [(smooth(BRAIN, 1, first=i)[0, :, 0].astype(np.float32), regions) for i in range(3)]
    monkeypatch.setattr(segmentation, "phantom_cases", lambda config, first, count: source[:count])
    budget = segmentation.Budget(train=3, test=1, steps=1, batch=1, crop=16, seeds=1)
    model, specs = str(runs / "denoiser" / "model"), [str(runs / x) for x in ("mmgan-0", "mmgan-1", "denoiser")]
    report = segmentation.compare(model, tmp_path, device="cpu", budget=budget, beside=specs)
    dice, ours = report["dice"], "CoPeDiT, trained beside"
    assert list(dice) == ["missing", "synthesised", "MM-GAN", ours, "complete"] and report["budget"]["seeds"] == 2
    same = dice[ours]["average"]
    assert same["to_model"]["per_seed"] == [0, 0] and same["mean"] == dice["synthesised"]["average"]["mean"]
    assert dice["MM-GAN"]["average"]["to_model"]["mean"] == pytest.approx(
        dice["MM-GAN"]["average"]["mean"] - dice["synthesised"]["average"]["mean"]
    )
    assert report["beside"]["MM-GAN"]["runs"] == 2 and report["beside"]["model"]["steps"] == 2
    # What is kept of a run is what it makes of each modality by the others.
    (run, other), there = beside.rows(specs[:2], Synthesizer.load(model, "cpu"), model, "cpu")[0]["MM-GAN"], [0, 1, 1]
    images = torch.from_numpy(source[0][0].astype(np.float16).astype(np.float32))[None, :, None]
    wanted = load_method(runs / "mmgan-0").synthesise(images, torch.tensor([there]).bool(), noise_of)
    (path,) = tmp_path.glob(f"test-*-1-{segmentation._short(run.digest)}.npy")
    assert np.array_equal(np.load(path)[0, 0], wanted[0, 0, 0].numpy().astype(np.float16))
    assert run.digest != other.digest
    text = segmentation.markdown(report)
    assert text.count("| synthesised by MM-GAN |") == 4 and "| MM-GAN | image |" in text
    monkeypatch.setattr(segmentation, "train", None)  # all is there
    assert segmentation.compare(model, tmp_path, device="cpu", budget=budget, beside=specs) == report


def test_the_same_noise_as_the_model_begins_with():
    made = task("ldm", BRAIN)
    seen = {}
    made.synthesise = lambda images, observed, noise: seen.update(eps=noise("t2", (8, 16, 16, 4))) or images
    _, truth, _ = next(iter(Phantoms(BRAIN, 1)))
    beside.filled(made)(ev.incomplete(BRAIN, truth, ("t2",)), 3)
    assert np.array_equal(seen["eps"], noise_of(3, truth.name, "t2", (8, 16, 16, 4)))
