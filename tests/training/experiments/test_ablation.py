"""Ablations: that nothing but the variant differs, that finished runs are kept, and what the tables say."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from copedit_rt import checkpoint
from copedit_rt.cli import app
from copedit_rt.errors import CopeditError
from copedit_training.data import layouts
from copedit_training.evaluation.features import Networks
from copedit_training.evaluation.metrics import measure
from copedit_training.experiments import ablation
from copedit_training.experiments.ablation import VARIANTS, DenoiserExperiment, DenoiserVariant
from copedit_training.experiments.experiment import held_out_words
from copedit_training.stages.prior import fit_prior

FAST = ("steps=3", "warmup=1", "crop=8", "batch_size=4", "subjects=4", "checkpoint_every=2", "dtype=float32")
SIZE = ("width=32", "heads=2", "blocks=2")


def smooth(config, subjects, cache, progress=None, first=0):
    """Random smooth volumes in place of phantoms, which cost 0.3 s each."""
    rng = np.random.default_rng(first)
    coarse = rng.random((subjects, len(config.elements), 1, 4, 4, config.image[2] // 4), dtype=np.float32)
    return coarse.repeat(4, 3).repeat(4, 4).repeat(4, 5).astype(np.float16)


@pytest.fixture(autouse=True)
def no_phantoms(monkeypatch):
    monkeypatch.setattr("copedit_training.experiments.experiment.phantom_images", smooth)


@pytest.fixture
def experiment(model_folder, tmp_path):
    folder = model_folder("demo-brain")

    def build(*overrides, where=tmp_path / "run", **options):
        options = {"runs": 2, "test_subjects": 3, "config": checkpoint.read_config(folder)} | options
        return DenoiserExperiment(where, "demo-brain", (*FAST, *SIZE, f"tokenizer={folder}", *overrides), **options)

    return build


class Moments(torch.nn.Module):
    """Mean and deviation of each image."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(1)
        return torch.stack((flat.mean(1), flat.std(1)), 1)


def networks_in(folder):
    """Files of networks for FID and FVD."""
    files = {name: folder / f"{name}.pt" for name in ("fid", "fvd")}
    for path in files.values():
        torch.jit.script(Moments()).save(str(path))
    return files


def batch(task):
    """What the network is given in a step."""
    seen = []
    task.predict = lambda *given: seen.append(given) or torch.zeros_like(given[0])
    task.loss(task.draw(1, 0))
    return seen[0]


@pytest.mark.parametrize("kind", ["prompts", "injection", "backbone", "identity"])
def test_all_variants_see_the_same_batches(experiment, kind):
    if kind == "backbone":
        pytest.importorskip("monai", reason="the UNet baseline needs the extra `train`")
    made = experiment("crop=16")  # the UNet wants four latents
    first, *others = (batch(made.task(v, 0)) for v in VARIANTS[kind])
    assert len(others) == len(VARIANTS[kind]) - 1 and len(first) == 6 and first[5] is None
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first[:5], other[:5], strict=True))
    assert not torch.equal(first[0], batch(made.task(VARIANTS[kind][0], 1))[0])


def test_variants_share_their_first_weights(experiment):
    made = experiment()
    full, none, within = (
        dict(made.task(v, 0).denoiser.named_parameters())
        for v in (VARIANTS["prompts"][0], VARIANTS["prompts"][4], VARIANTS["injection"][1])
    )
    for other in (none, within):
        shared = [n for n in other if n in full and other[n].shape == full[n].shape]
        assert {"embed.weight", "blocks.0.qkv.weight", "time.0.weight"} <= set(shared)
        assert all(torch.equal(full[n], other[n]) for n in shared)
    assert not any(n.startswith("prompt.") for n in none)
    other_seed = dict(made.task(VARIANTS["prompts"][0], 1).denoiser.named_parameters())
    assert not torch.equal(full["blocks.0.qkv.weight"], other_seed["blocks.0.qkv.weight"])


def test_variants_are_those_of_the_paper(experiment):
    config = experiment().config
    made = {v.name: ablation.variant_config(config, v).denoiser for v in VARIANTS["backbone"]}
    assert [c.backbone for c in made.values()] == ["mdit3d", "dit3d", "dit3d", "dit", "unet"]
    assert made["dit3d-wide"].width == 2 * config.denoiser.width
    assert made["dit3d-wide"].head_dim == config.denoiser.head_dim
    prompts = [ablation.variant_config(config, v).denoiser.prompts for v in VARIANTS["prompts"]]
    assert prompts == ["full", "no-count", "no-position", "no-contrast", "none", "mask"]
    places = [ablation.variant_config(config, v).denoiser.injection for v in VARIANTS["injection"]]
    assert places == ["across", "within", "both"]


def test_a_network_of_another_size(experiment):
    made = experiment("patch=2,2,1", "heads=4").config.denoiser
    assert (made.width, made.heads, made.blocks, made.patch) == (32, 4, 2, (2, 2, 1))


def test_an_ablation_is_reported_resumed_and_kept(experiment, tmp_path, monkeypatch):
    report = ablation.ablate("injection", experiment())
    assert list(report["table"]) == ["full", "within", "both"]
    runs = {
        name: [json.loads((tmp_path / "run" / f"{name}-seed{s}" / "scores.json").read_text()) for s in (0, 1)]
        for name in report["table"]
    }
    # By hand: PSNR of `both` at two missing, over seeds and subjects, and its difference to the reference.
    values = {n: np.array([[s["2"]["psnr"] for s in run["subjects"]] for run in runs[n]]) for n in runs}
    cell = report["table"]["both"]["2"]["psnr"]
    assert cell["mean"] == pytest.approx(values["both"].mean())
    assert cell["sd"] == pytest.approx(values["both"].mean(0).std(ddof=1))
    change = (values["both"] - values["full"]).mean(0)
    assert cell["difference"]["mean"] == pytest.approx(change.mean())
    assert cell["difference"]["standard_error"] == pytest.approx(change.std(ddof=1) / np.sqrt(3))
    for row in report["variants"].values():
        assert row["parameters"] > 1000 and row["gflop"] > 0
    # Three subjects, three elements: each alone is missing in one of them.
    alone = np.array([[s["1"]["psnr"] for s in run["subjects"]] for run in runs["both"]]).mean(0)
    names = experiment().config.elements[:3]
    assert report["variants"]["both"]["by_element"] == pytest.approx(dict(zip(names, alone, strict=True)))
    # The model folder of a variant is whole.
    assert checkpoint.load_denoiser(tmp_path / "run" / "within-seed0" / "model")[0].denoiser.injection == "within"
    paths = ablation.write_report(report, tmp_path / "run")
    assert json.loads(paths[0].read_text()) == json.loads(json.dumps(report))
    text = paths[1].read_text()
    assert text.count("| both |") == 4 and f"patch {' x '.join(map(str, experiment().config.denoiser.patch))}, " in text

    def refuse(*args, **options):
        raise AssertionError("trained again")

    monkeypatch.setattr("copedit_training.experiments.experiment.fit", refuse)
    assert ablation.ablate("injection", experiment()) == report
    with pytest.raises(AssertionError, match="trained again"):
        ablation.ablate("prompts", experiment())  # only the reference is there


def test_networks_give_an_ablation_fid_and_fvd(experiment, tmp_path, monkeypatch):
    plain = ablation.ablate("identity", experiment(runs=1))
    with_networks = experiment(runs=1, networks=Networks(**networks_in(tmp_path)))
    seen, look = [], ablation.look
    monkeypatch.setattr(ablation, "look", lambda *given: (seen.append(given), look(*given)))
    report = ablation.ablate("identity", with_networks)
    assert report["table"] == plain["table"], "scored again, not trained again"
    # By hand: the features are means and deviations of what was shown, in closed form of the same module.
    want, n = Networks(**networks_in(tmp_path)), 3 * (1 + 2 + 3)
    for _, key, element, image, truth, joint in seen[:n]:
        want.next_subject()
        look(want, key, element, image, truth, joint)
    found, own = report["variants"]["full"]["frechet"], want.summary()
    assert {c: row["fid"] for c, row in found.items()} == pytest.approx({c: own[c]["model"]["fid"] for c in "123"})
    assert all(row["fvd"] > 0 for row in found.values()) and len(seen) == 2 * n
    text = ablation.markdown(report)
    assert "2 missing: FID | 2 missing: FVD" in text and "FID: network fid.pt." in text
    monkeypatch.setattr("copedit_training.experiments.experiment.fit", None)  # what is kept is of these networks
    assert ablation.ablate("identity", experiment(runs=1, networks=with_networks.networks)) == report
    assert "networks" not in ablation.ablate("identity", experiment(runs=1))


def test_a_network_that_starts_from_a_fill_corrects_it(experiment, monkeypatch):
    monkeypatch.setattr(ablation, "fit_prior", lambda images, seed: fit_prior(images, seed, steps=30))
    report = ablation.ablate("prior", experiment(runs=1))
    assert list(report["table"]) == ["full", "fill", "prior", "noised"]
    made = experiment()
    noised = made.task(VARIANTS["prior"][3], 0)
    assert noised.config.diffusion.start == 0.3 and noised.draw(1, 0).timesteps.max() < 150 and noised.levels[-1] > 0
    # A network that has learnt nothing returns the fill, bit for bit what the prior makes.
    images, observed = made.held_out[0], torch.ones(3, 4, dtype=torch.bool)
    for row, missing in zip(observed, ablation.patterns_of(made.config, 0), strict=True):
        row[list(missing)] = False
    own = ablation.filled(made.prior(), images, observed).numpy()
    shown, values = np.any(images[:, 0] > 0, axis=0), []
    for i in np.flatnonzero(~observed[0].numpy()):
        values.append(measure(own[0, i, 0].clip(0, 1), images[i, 0].astype(np.float32), mask=shown)["psnr_inside"])
    task = made.task(VARIANTS["prior"][1], 0)
    found = ablation.score(task.average, made.tokenizer, task.config, task.settings, images, 0, made.prior())
    assert found["1"]["psnr"] == pytest.approx(np.mean(values), abs=0.01)
    assert report["variants"]["fill"]["seconds_per_step"] == 0


def test_an_interrupted_variant_ends_as_one_that_was_not(experiment, tmp_path, monkeypatch):
    variant, subject = VARIANTS["injection"][1], {"1": {"psnr": 1.0, "ssim": 1.0, "mse": 1.0}}
    monkeypatch.setattr(ablation, "score", lambda *given: subject)
    whole = experiment(where=tmp_path / "a")
    whole.run(variant, 0)
    begun = experiment(where=tmp_path / "b")
    task, steps = begun.task(variant, 0), []
    inner = task.after_step

    def stop(step):
        steps.append(step)
        if step == 2:
            raise KeyboardInterrupt
        return inner(step)

    task.after_step = stop
    monkeypatch.setattr(begun, "task", lambda *given: task)
    with pytest.raises(KeyboardInterrupt):
        begun.run(variant, 0)
    assert steps == [0, 1, 2]
    experiment(where=tmp_path / "b").run(variant, 0)
    one, two = (
        checkpoint.read_tensors(tmp_path / x / "within-seed0" / "model" / "denoiser.safetensors")[0] for x in "ab"
    )
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_tiles_are_predicted_where_they_lie(experiment):
    made = experiment()
    config, task = made.config, made.task(VARIANTS["prompts"][0], 0)
    net = task.denoiser
    with torch.no_grad():
        for weight in net.parameters():
            weight.normal_(std=0.1)
    predict = ablation.in_tiles(net, task.settings, config)
    z = (
        torch.randn(2, 4, 3, *config.latent)
        if config.tokenizer.latent_channels == 3
        else torch.randn(2, 4, config.tokenizer.latent_channels, *config.latent)
    )
    t, observed = torch.tensor([499, 20]), torch.tensor([[True, False, True, True]] * 2)
    prompts = torch.randn(2, 3, config.tokenizer.prompt_dim)
    out = predict(z, t, prompts, observed)
    for x in (0, 2):
        for y in (0, 2):  # crops of 8 voxels are 2 latents and as many tokens
            corner = torch.tensor([[x, y]] * 2)
            part = net(z[..., x : x + 2, y : y + 2, :], t, prompts, observed, corner)
            assert torch.allclose(out[..., x : x + 2, y : y + 2, :], part, atol=1e-5)
    assert ablation.in_tiles(net, replace(task.settings, whole_steps=1), config) is net


def test_a_perfect_network_is_as_good_as_the_tokenizer(experiment):
    made = experiment()
    vae, config, settings = made.tokenizer, made.config, replace(made.settings, crop=0)
    images = made.held_out[0].copy()
    images[..., : images.shape[-2] // 2, :] = 0
    truth = vae.normalise(vae.encode(torch.from_numpy(images.astype(np.float32))[None]))

    class Perfect(torch.nn.Linear):
        def forward(self, z, t, prompts, observed):
            return truth.expand_as(z)

    found = ablation.score(Perfect(1, 1), vae, config, settings, images, 0)
    assert set(found) == {"1", "2", "3"}
    (missing,) = ablation.patterns_of(config, 0)[0]
    back = vae.images(truth[:, [missing]], joint=False)[0, 0, 0].clamp(0, 1).detach().numpy()
    assert found["1"]["mse"] == pytest.approx(0, abs=1e-9)
    shown = (images[:, 0] > 0).any(0)
    assert 0 < shown.mean() < 0.6
    error = np.mean((back - images[missing, 0])[shown] ** 2)
    assert found["1"]["psnr"] == pytest.approx(-10 * np.log10(error), abs=1e-3)


def test_patterns_take_turns(experiment):
    config = experiment().config
    seen = [ablation.patterns_of(config, i) for i in range(12)]
    assert all([len(p) for p in row] == [1, 2, 3] for row in seen)
    assert [len({row[c] for row in seen}) for c in range(3)] == [4, 6, 4]


def test_differences_are_paired():
    base = np.array([[10.0, 20.0, 30.0], [11.0, 21.0, 31.0]])
    found = ablation.paired(base + np.array([0.9, 1.0, 1.1]), base)
    assert found["mean"] == pytest.approx(1) and found["per_seed"] == pytest.approx([1, 1])
    assert found["standard_error"] == pytest.approx(0.1 / np.sqrt(3)) and found["resolved"]
    assert not ablation.paired(base + np.array([[2.0], [-1.0]]), base)["resolved"], "seeds disagree"
    assert not ablation.paired(base + np.array([-1.0, 0.1, 2.0]), base)["resolved"], "within the error"
    assert not ablation.paired(base[:1] + 1, base[:1])["resolved"], "one seed is no evidence"


def test_one_subject_has_no_deviation():
    run = {"subjects": [{"1": {"psnr": 20.0, "ssim": 0.5, "mse": 0.1}}]}
    cell = ablation.summarise({"full": [run]}, "full")["full"]["1"]["psnr"]
    assert cell == {"mean": 20, "sd": None} and ablation.spread(cell, 2) == "20.00"


def test_noise_shows():
    ramp = torch.linspace(-2, 2, 16)[:, None, None].expand(3, 4, 2, 16, 8, 4)
    assert ablation.visible(SimpleNamespace(latents=ramp)) == 1
    rough = torch.randn(3, 4, 2, 16, 8, 4, generator=torch.Generator().manual_seed(0))
    assert ablation.visible(SimpleNamespace(latents=rough)) == pytest.approx(0.5, abs=0.1)


def test_a_data_set_is_counted_as_it_is(model_folder, tmp_path, monkeypatch):
    data, folder = layouts.DataSet(tmp_path, [], [], [], {}), model_folder("demo-brain")
    config, settings = checkpoint.read_config(folder), (*SIZE, f"tokenizer={folder}")
    made = smooth(config, 7, None)
    monkeypatch.setattr(layouts, "find", lambda *_: data)
    for name, images in (("folder_images", made[:5]), ("held_out_images", made[5:])):
        monkeypatch.setattr(f"copedit_training.experiments.experiment.{name}", lambda *_, x=images, **__: x)
    experiment = DenoiserExperiment(tmp_path / "set", "demo-brain", settings, data=str(tmp_path), config=config)
    assert held_out_words(experiment.described | {"seeds": [0]}) == "5 studies to train on, 2 held out, seeds 0."


def test_what_is_refused(experiment, tmp_path):
    made = experiment()
    with pytest.raises(CopeditError, match="variant 'nope' is unknown"):
        ablation.ablate("prompts", made, ["nope"])
    with pytest.raises(CopeditError, match="was started with other settings"):
        experiment("lr=1.0")
    with pytest.raises(CopeditError, match="--set width=big"):
        experiment("width=big")
    with pytest.raises(CopeditError, match="--set patch=4,4: expected 3 positive numbers"):
        experiment("patch=4,4")
    with pytest.raises(CopeditError, match="its tokenizer is not the one of preset"):
        experiment(config=replace(made.config, image=(32, 32, 8)), where=tmp_path / "other")
    assert DenoiserVariant("x", "x", {}).changes == {}
    refused = CliRunner().invoke(app, ["ablate", "depth", "-o", str(tmp_path / "o")])
    assert refused.exit_code == 1 and "prompts, injection, backbone" in refused.stderr


def test_the_command_hands_over_data_and_device(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(ablation, "DenoiserExperiment", lambda *given, **more: seen.update(more, given=given))
    monkeypatch.setattr(ablation, "ablate", lambda kind, experiment: seen.update(kind=kind) or {})
    monkeypatch.setattr(ablation, "markdown", lambda report: "")
    monkeypatch.setattr(ablation, "write_report", lambda report, folder: [])
    command = ["ablate", "backbone", "-o", str(tmp_path), "--data", "brats", "--device", "cpu", "--set", "lr=1.0"]
    assert CliRunner().invoke(app, command).exit_code == 0
    assert seen["kind"] == "backbone" and seen["given"] == (tmp_path, "demo-brain", ["lr=1.0", "device=cpu"])
    assert seen["data"] == "brats" and seen["test_subjects"] == 16 and not seen["full"] and seen["runs"] is None
