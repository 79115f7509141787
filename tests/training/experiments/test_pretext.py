"""Tokenizers trained without one pretext task: that nothing else differs, and what the tables say."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from copedit_rt import checkpoint
from copedit_rt.config import ModelConfig
from copedit_rt.errors import CopeditError
from copedit_rt.networks.tokenizer import CoPeVAE
from copedit_training.evaluation.features import Networks
from copedit_training.experiments import pretext
from copedit_training.experiments.pretext import VARIANTS, Seen, TokenizerExperiment, parameters, score
from tests.training.experiments.test_ablation import networks_in, smooth

FAST = (
    "steps=3 quantise_from=1 readout_steps=3 pretext_every=2 batch_size=2 crop=8 subjects=4 warmup=1 "
    "checkpoint_every=2 dtype=float32".split()
)


@pytest.fixture(autouse=True)
def no_phantoms(monkeypatch):
    monkeypatch.setattr("copedit_training.experiments.experiment.phantom_images", smooth)


@pytest.fixture
def experiment(model_folder, tmp_path):
    config = checkpoint.read_config(model_folder("demo-brain"))

    def build(*overrides, **options):
        options = {"runs": 1, "test_subjects": 3, "config": config} | options
        return TokenizerExperiment(tmp_path / "run", "demo-brain", (*FAST, *overrides), **options)

    return build


def test_variants_differ_in_the_weights_of_the_tasks_alone(experiment):
    made = experiment()
    full, *others = (made.task(v, 0) for v in VARIANTS)
    weights = [[getattr(t.settings, f"{k}_weight") for k in ("count", "position", "contrast")] for t in (full, *others)]
    assert weights == [[1, 0.5, 0.5], [0, 0.5, 0.5], [1, 0, 0.5], [1, 0.5, 0], [0, 0, 0]]
    first = full.draw(2, 0)
    for other in others:
        assert all(
            torch.equal(a, b) for a, b in zip(*(x.module.state_dict().values() for x in (full, other)), strict=True)
        )
        drawn = other.draw(2, 0)
        assert torch.equal(drawn.images, first.images) and torch.equal(drawn.observed, first.observed)
        changed = {"count_weight": 1.0, "position_weight": 0.5, "contrast_weight": 0.5}
        assert replace(other.settings, **changed) == full.settings
    # What is left out teaches its own encoder nothing.
    task = made.task(VARIANTS[1], 0)
    task.loss(first)[0].backward()
    gradients = [max(p.grad.abs().max() for p in e.parameters()) for e in task.tokenizer.prompt_encoders]
    assert gradients[0] == 0 and min(gradients[1:]) > 0


def test_a_task_that_is_left_out_has_no_parameters():
    config = ModelConfig.preset("brain-brats")
    with torch.device("meta"):
        vae = CoPeVAE(config.tokenizer, len(config.elements))
    whole, *others = (parameters(vae, v) for v in VARIANTS)
    assert whole == pytest.approx(137.63e6, abs=5e3)
    each = [
        sum(p.numel() for part in (vae.prompt_encoders[i], vae.heads[i]) for p in part.parameters()) for i in range(3)
    ]
    assert others == [whole - each[0], whole - each[1], whole - each[2], whole - sum(each)]


def test_a_whole_ablation_and_its_tables(experiment, tmp_path):
    pytest.importorskip("sklearn", reason="needs the extra `train`")
    made = experiment()
    report = pretext.ablate(made)
    table = report["table"]
    assert list(table) == [v.name for v in VARIANTS] and "difference" not in table["full"]["psnr"]
    own = [json.loads((tmp_path / "run" / f"{v}-seed0" / "scores.json").read_text()) for v in ("full", "no-count")]
    means = [np.mean([x["psnr"] for x in run["subjects"]]) for run in own]
    assert table["no-count"]["psnr"]["difference"]["mean"] == pytest.approx(means[1] - means[0])
    text = pretext.markdown(report)
    assert "4 studies to train on, 3 held out, seeds 0." in text
    (without,) = [line for line in text.splitlines() if line.startswith("| without task 1") and "%" in line]
    assert without.split("|")[2].strip() == "-" and without.split("|")[3].strip().endswith("%")
    paths = pretext.write_report(report, tmp_path / "run")
    assert all(path.stat().st_size for path in paths) and paths[-1].name == "pretext.png"

    made.task = None  # all is there
    again = pretext.ablate(made)
    assert again == report
    with pytest.raises(CopeditError, match="was started with other settings"):
        experiment("lr=1e-3")


def test_networks_see_the_reconstructions(experiment, tmp_path):
    pytest.importorskip("sklearn", reason="needs the extra `train`")
    made = experiment("steps=2", networks=Networks(**networks_in(tmp_path)))
    report = pretext.ablate(made)
    seen = Seen(made.config, checkpoint.load_tokenizer(tmp_path / "run" / "none-seed0" / "model")[1], made.held_out)
    networks = made.networks.again()
    for i in range(3):
        score(seen, i, networks)
    assert report["table"]["none"]["frechet"]["fid"] == pytest.approx(networks.summary()["all"]["model"]["fid"])
    assert networks.summary()["all"]["model"]["volumes"] == 3 * len(made.config.elements)
    assert "| SSIM | FID | FVD | difference (dB) |" in pretext.markdown(report)


def test_scores_are_of_what_the_tokenizer_decodes_and_its_heads_say(experiment):
    made = experiment()
    seen = Seen(made.config, made.task(VARIANTS[0], 0).tokenizer, made.held_out)
    m = len(made.config.elements)
    assert len(seen.patterns) == 2**m - 2

    missing = ~seen.patterns
    right = (torch.nn.functional.one_hot(missing.sum(1) - 1, m - 1).float(), missing.float() - 0.5, None)
    seen.vae.assess = lambda prompts: right
    seen.vae.images = lambda z, joint: torch.from_numpy(seen.images[1:2] + 0.1)
    found = score(seen, 1)
    assert found["count"] == found["which"] == 1 and found["psnr"] == pytest.approx(20, abs=2)
    right[1][: len(missing) // 2] *= -1
    assert score(seen, 1)["which"] == 0.5


def test_no_folder_is_left_where_no_data_are_found(experiment, tmp_path):
    with pytest.raises(CopeditError, match="--subjects 1: this ablation needs 2 or more"):
        experiment(test_subjects=1)
    with pytest.raises(CopeditError, match="--data brats is not a folder"):
        TokenizerExperiment(tmp_path / "run", "demo-brain", data="brats")
    assert not (tmp_path / "run").exists()


def test_what_is_compared_cannot_be_set(experiment):
    for item in ("count_weight=1", "patients=x", "validate_every=1"):
        with pytest.raises(CopeditError, match="an ablation of the pretext tasks sets it itself"):
            experiment(item)
