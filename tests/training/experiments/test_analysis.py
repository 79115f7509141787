"""Analyses of the prompts: each number against a closed form or a naive computation, each command once."""

import json

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from copedit_rt import checkpoint
from copedit_rt.cli import app
from copedit_rt.errors import CopeditError
from copedit_rt.images.nifti import Volume
from copedit_rt.networks.denoiser import build_denoiser
from copedit_rt.networks.tokenizer import CoPeVAE
from copedit_training.data import layouts, phantom, prepared
from copedit_training.experiments import analysis
from tests.training.data.test_layouts import PUBLISHED, fill

plt = pytest.importorskip("matplotlib.pyplot", reason="figures need the extra `train`")
plt.switch_backend("Agg")
pytest.importorskip("sklearn", reason="t-SNE needs the extra `train`")


@pytest.fixture(scope="module")
def probe(model_folder):
    return analysis.Probe(str(model_folder("demo-brain")), 3, "cpu")


@pytest.fixture
def fresh(model_folder, probe):
    """A probe whose model a test may change; the images are those of the other one."""
    made = object.__new__(analysis.Probe)
    made.__dict__ = {name: value for name, value in vars(probe).items() if name != "synthesizer"}
    folder = model_folder("demo-brain")
    made.vae = checkpoint.load_tokenizer(folder)[1]
    made.net = checkpoint.load_denoiser(folder)[1]
    return made


def test_prompts_are_those_of_the_tokenizer(probe):
    subject = torch.tensor([0, 2, 1])
    observed = torch.tensor([[True, False, True, True], [False, False, False, True], [True, True, False, False]])
    with torch.no_grad():
        expected = probe.vae.prompts(probe.raw[subject], observed)
    assert torch.allclose(probe.prompts(subject, observed), expected, atol=1e-5)


def test_samples_have_every_count_and_all_patterns_take_turns(probe):
    subject, observed = probe.turns()
    assert subject.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert (~observed).sum(1).tolist() == [1, 2, 3] * 3
    assert len({tuple(row) for row in observed.tolist()}) == 9


def test_labels_lie_on_the_images(probe):
    for i in range(len(probe.images)):
        outside = probe.labels(i) == phantom.BACKGROUND
        assert np.abs(probe.images[i, :, 0][outside]).max() == 0
        assert probe.images[i, :, 0][~outside].mean() > 0.2


def test_labels_of_a_heart_are_in_slabs(model_folder):
    heart = analysis.Probe(str(model_folder("demo-cardiac")), 1, "cpu")
    labels = heart.labels(0)
    assert labels.shape == heart.images[0, :, 0].shape
    blood = heart.images[0, :, 0][labels == phantom.LV_BLOOD].mean()
    assert blood > 2 * heart.images[0, :, 0][labels == 0].mean()


def test_gradcam_of_a_linear_task_is_its_weights(fresh):
    """Where the score is linear in the mean of the features, Grad-CAM is the positive part of w . A."""
    observed = torch.tensor([True, False, True, True])
    wide = fresh.vae.config.prompt_channels[1]
    for encoder in fresh.vae.prompt_encoders:
        encoder.mlp = nn.Sequential(nn.Linear(wide, wide))
        nn.init.eye_(encoder.mlp[0].weight)
        nn.init.zeros_(encoder.mlp[0].bias)
    fresh.vae.heads[0] = nn.Linear(wide, 3)
    fresh.vae.heads[1] = nn.Linear(wide, 4)
    fresh.vae.heads[2] = nn.Identity()
    maps = analysis.gradcam(fresh, 0, observed)
    assert maps.shape == (3, 4, *fresh.raw.shape[-3:]) and (maps[:, 1] == 0).all()
    for task, rows in ((0, [0]), (1, None)):
        weight = fresh.vae.heads[task].weight
        w = weight[0] if rows else weight[1] - weight[[0, 2, 3]].mean(0)
        features = fresh.vae.prompt_encoders[task].conv(fresh.raw[0][observed])
        expected = torch.einsum("c,ncxyz->nxyz", w, features).clamp_min(0)
        if expected.max() > 0:
            expected = expected / expected.max()
        assert torch.allclose(maps[task][observed], expected, atol=1e-5)


def test_attention_maps_are_a_naive_softmax(probe):
    net, z = probe.net, probe.vae.normalise(probe.raw[:1])
    prompts, observed = probe.prompts(torch.tensor([0]), torch.tensor([[True, True, False, True]])), torch.ones(1, 4)
    kept = []
    (block,) = (b for b in net.blocks if b.axis == "element")
    hook = block.qkv.register_forward_hook(lambda layer, given, out: kept.append(out))
    tokens = torch.zeros(1, z[0, 0, 0].numel(), dtype=torch.bool)
    tokens[0, [3, 7]] = True
    maps = analysis.attention_maps(net, z, torch.tensor([499]), prompts, observed.bool(), tokens)
    hook.remove()
    qkv = kept[0].detach().double().numpy()[0]  # [m, T, 3C]
    heads, width = block.heads, qkv.shape[-1] // 3
    expected = np.zeros((4, 4))
    for token in (3, 7):
        for head in range(heads):
            own = slice(head * width // heads, (head + 1) * width // heads)
            q, k = qkv[:, token, :width][:, own], qkv[:, token, width : 2 * width][:, own]
            scores = np.exp(q @ k.T / np.sqrt(width // heads))
            expected += scores / scores.sum(1, keepdims=True) / heads / 2
    assert np.allclose(maps[0, 0].numpy(), expected, atol=1e-5)


def test_attention_needs_across_blocks():
    with pytest.raises(CopeditError, match="only the backbone mdit3d"):
        analysis.attention_maps(nn.Identity(), *[torch.zeros(1)] * 4)


def test_donors_are_wrong_in_every_respect(probe):
    subject, observed = probe.turns()
    chosen = analysis.donors(subject, observed, np.random.default_rng(0))
    assert (subject[chosen] != subject).all() and (observed[chosen].sum(1) != observed.sum(1)).all()


def test_interventions():
    prompts = torch.randn(400, 3, 2, generator=torch.Generator().manual_seed(0)) * 3 + 5
    subject, rng = torch.arange(400), np.random.default_rng(0)
    made = {how: analysis.intervened(prompts, how, subject, rng) for how in analysis.INTERVENTIONS}
    assert (made["zeroed"] == 0).all()
    assert torch.equal(made["type-swapped"], prompts[:, [1, 2, 0]])
    assert (made["shuffled"] != prompts).all() and torch.equal(made["shuffled"].sort(0).values, prompts.sort(0).values)
    assert torch.allclose(made["random"].mean(0), prompts.mean(0), atol=0.6)
    assert torch.allclose(made["random"].std(0), prompts.std(0), rtol=0.15)
    part = analysis.replaced(prompts, 1, made["zeroed"])
    assert (part[:, 1] == 0).all() and torch.equal(part[:, [0, 2]], prompts[:, [0, 2]])
    assert analysis.replaced(prompts, 3, made["zeroed"]) is made["zeroed"]


def test_corruption_goes_from_right_prompts_to_wrong_ones(probe, monkeypatch):
    """A quality that counts how many prompts are the sample's own."""
    subject, observed = probe.turns()
    own = probe.prompts(subject, observed)

    def quality(subject, observed, prompts):
        return 20 + (prompts == own).all(2).sum(1).numpy().astype(float)

    monkeypatch.setattr(probe, "quality", quality)
    report, _ = analysis.corruption(probe)
    for kind, loss in (("count", 1), ("position", 1), ("contrast", 1), ("all", 3)):
        row = report["psnr"][kind]
        expected = [23 - loss * round(r * 9) / 9 for r in analysis.RATES]
        assert row["mean"] == pytest.approx(expected)
        assert row["difference_at_1"] == pytest.approx(-loss) and row["standard_error"] == pytest.approx(0)


def test_errors_are_over_subjects():
    values, subject = np.array([1.0, 3.0, 5.0, 7.0]), torch.tensor([0, 0, 1, 1])
    mean, error = analysis.over_subjects(values, subject)
    assert mean == 4 and error == pytest.approx(2.0)


def test_neighbours_are_of_other_subjects():
    rng = np.random.default_rng(0)
    subject, labels = np.repeat(np.arange(8), 4), np.tile([0, 0, 1, 1], 8)
    apart = labels[:, None] * 10 + rng.standard_normal((32, 2))
    assert analysis.neighbour_accuracy(apart, labels, subject) == 1
    # Each subject is a cluster of its own with both labels: neighbours of other subjects say nothing.
    alone = subject[:, None] * 100 + labels[:, None] * 0 + rng.standard_normal((32, 2))
    assert analysis.neighbour_accuracy(alone, labels, subject) < 0.8


def test_quality_is_that_of_what_was_made(probe):
    subject, observed = torch.tensor([1]), torch.tensor([[True, False, True, False]])
    prompts = probe.prompts(subject, observed)
    there = observed[0].numpy()
    encoded = probe.synthesizer.engine.encode(probe.images[1][None, there])
    made = analysis.fill(probe.synthesizer, encoded.latents[0], there, encoded.prompts[0], "analysis-1")
    truth = probe.images[1, [1, 3], 0]
    expected = np.mean([-10 * np.log10(np.mean((a - b) ** 2)) for a, b in zip(made, truth, strict=True)])
    assert probe.quality(subject, observed, prompts) == pytest.approx([expected], rel=1e-4)


@pytest.mark.parametrize("kind", list(analysis.ANALYSES))
def test_each_analysis_writes_its_figure_and_numbers(kind, model_folder, tmp_path):
    command = ["analyse", kind, "--model", str(model_folder("demo-brain"))]
    done = CliRunner().invoke(app, [*command, "-o", str(tmp_path), "--subjects", "3", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / f"{kind}.json").read_text())
    assert report["analysis"] == kind and (tmp_path / f"{kind}.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / f"{kind}.md").read_text() in done.stdout
    assert report["model"] == command[3] and set(report["weights"]) == {"tokenizer", "denoiser"}
    if kind == "attention":
        maps = np.array([row["true"]["map"] for row in report["missing"].values()])
        assert np.allclose(maps.sum(-1), 1, atol=1e-4)
    if kind == "gradcam":
        for rows in report["regions"].values():
            assert sum(row["share_of_volume"] for row in rows.values()) == pytest.approx(1)
    if kind == "tsne":
        assert len(report["embedding"]["count"]["x"]) == 3 * 14 and len(report["embedding"]["identity"]["x"]) == 12


def test_an_unknown_analysis_is_refused(tmp_path):
    refused = CliRunner().invoke(app, ["analyse", "pca", "-o", str(tmp_path / "o")])
    assert refused.exit_code == 1 and "gradcam, tsne" in refused.stderr


QUICK = ("BIDS", "ACDC")  # two persons, one of them twice; one person. The others only have other names.


@pytest.mark.parametrize("layout", [x if x in QUICK else pytest.param(x, marks=pytest.mark.slow) for x in PUBLISHED])
def test_every_analysis_of_every_layout(layout, tmp_path):
    """Of studies of one person none is another's neighbour or donor, and errors are over persons."""
    config, files, complete, _ = PUBLISHED[layout]
    root, people = fill(tmp_path / "in", files), set(complete.values())
    torch.manual_seed(0)
    vae, net = CoPeVAE(config.tokenizer, len(config.elements)), build_denoiser(config)
    checkpoint.save(tmp_path / "model", config, vae, net)
    probe = analysis.Probe(str(tmp_path / "model"), 9, "cpu", data=str(root), split="all")
    assert set(probe.names) == people and len(probe.images) == len(complete) and probe.persons == len(people)
    for i, j in np.ndindex(len(probe.names), len(probe.names)):
        assert (probe.people[i] == probe.people[j]) == (probe.names[i] == probe.names[j])
    for kind, analyse in analysis.ANALYSES.items():
        if kind == "tsne" and len(people) == 1:
            with pytest.raises(CopeditError, match="give studies of several"):
                analyse(probe)
            continue
        report, figure = analyse(probe)
        report |= {"analysis": kind, "model": config.name} | probe.whom.about()
        assert "nan" not in (text := analysis.markdown(report)) and str(root) in text
        assert figure.axes and report.get("subjects", len(people)) == len(people)
        if kind == "corruption" and len(people) == 1:
            assert {row["standard_error"] for row in report["psnr"].values()} == {0}
        plt.close(figure)


def test_the_subjects_of_a_data_set(model_folder, tmp_path):
    """Held out as by `copedit evaluate`; without tissues the thirds of an image's intensities stand for them."""
    model, root = str(model_folder("demo-brain")), tmp_path / "data"
    config = checkpoint.read_config(model_folder("demo-brain"))
    for i in range(6):
        subject = prepared.phantom_subject(config, prepared.HELD_OUT + i)
        for element, image in subject.images.items():
            path = root / f"BraTS2021_{i:05d}" / f"BraTS2021_{i:05d}_{element}.nii.gz"
            Volume.from_array(image, subject.affine()).save(path)
    sides = layouts.split(layouts.find(root, config).subjects)
    command = ["analyse", "gradcam", "--model", model, "--data", str(root), "-o", str(tmp_path / "out"), "--json"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["data"] == str(root) and report["split"] == "test" and report["shown"]["subject"] in sides["test"]
    assert report["samples"] == 3 * len(sides["test"]) and str(root) in (tmp_path / "out" / "gradcam.md").read_text()
    volume = [row["share_of_volume"] for row in report["regions"]["count"].values()]
    assert sum(volume) == pytest.approx(1) and volume[1:] == pytest.approx([(1 - volume[0]) / 3] * 3, rel=0.02)
    every = CliRunner().invoke(app, [*command, "--split", "all", "--subjects", "2"])
    assert json.loads(every.stdout)["samples"] == 6
    refused = CliRunner().invoke(app, [*command, "--first-seed", "1000000"])
    assert refused.exit_code == 1 and "--first-seed" in refused.stderr
