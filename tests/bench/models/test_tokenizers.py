"""What designs of a tokenizer cost and keep: counted, and trained very small."""

import dataclasses
import json

import pytest
import torch
from typer.testing import CliRunner

from copedit_bench.models import tokenizers
from copedit_rt import cli
from copedit_rt.config import PRESETS
from copedit_rt.networks.tokenizer import CoPeVAE

SMALL = dataclasses.replace(tokenizers.QUICK, scale=64)


def sizes(config):
    c = config.tokenizer
    return c.channels, c.strides, c.units, c.hidden, c.latent_channels


def test_the_first_design_is_the_papers_and_the_preset_keeps_the_target():
    paper = tokenizers.design("paper")
    assert sizes(paper) == sizes(PRESETS["brain-brats"])
    cost = tokenizers.tflop(paper)
    assert cost["study"] == pytest.approx(3 * (cost["encode"] + 0.0252) + cost["decode"] + 0.5553, abs=1e-2)
    lean = PRESETS["brain-lean"]
    assert tokenizers.tflop(lean)["study"] <= tokenizers.TARGET < cost["study"]
    assert lean.latent == paper.latent == (24, 24, 8) and lean.tokenizer.latent_channels == 8
    assert lean.denoiser == paper.denoiser
    assert sizes(lean) in [sizes(tokenizers.design(name)) for name in tokenizers.DESIGNS]


@pytest.mark.parametrize("name", tokenizers.DESIGNS)
def test_designs_have_one_interface_at_every_scale(name):
    for scale in (1, 8):
        config = tokenizers.design(name, scale)
        with torch.device("meta"):
            vae = CoPeVAE(config.tokenizer, 4)
            z = vae.encode(torch.empty(1, 1, 1, *config.image))
            assert z.shape[2:] == (8, *config.latent) == (8, 24, 24, 8)
            assert vae.decode(z, joint=False).shape[3:] == config.image


def test_every_design_sees_the_same_crops():
    images = torch.rand(2, 4, 1, *tokenizers.SIZE)
    first, second = (torch.stack(list(tokenizers.crops(images, SMALL, 5))) for _ in range(2))
    assert torch.equal(first, second) and first.shape == (SMALL.steps, SMALL.batch, 1, 1, *tokenizers.CROP)
    assert not torch.equal(first, torch.stack(list(tokenizers.crops(images, SMALL, 6))))


def test_training_learns_and_decibels_are_those_of_the_error():
    images = torch.rand(1, 1, 1, 8, 8, 8)
    vae = CoPeVAE(tokenizers.design("entry", 64).tokenizer, 4).eval()
    with torch.no_grad():
        made = vae.decode(vae.encode(images), joint=False).clamp(0, 1)
    wanted = -10 * (made - images).square().mean().log10().item()
    assert tokenizers.decibels(vae, images) == pytest.approx(wanted, abs=1e-3)
    flat = torch.full((1, 1, 1, *tokenizers.SIZE), 0.6)
    plan = dataclasses.replace(SMALL, steps=30)
    before, after = (
        tokenizers.decibels(
            tokenizers.trained(tokenizers.design("entry", 64), dataclasses.replace(plan, steps=n), 0, flat)[0], flat
        )
        for n in (1, 30)
    )
    assert after > before + 1


def test_the_command(tmp_path, monkeypatch):
    names = ("paper", "entry")
    monkeypatch.setattr(tokenizers, "DESIGNS", {name: tokenizers.DESIGNS[name] for name in names})
    monkeypatch.setattr(tokenizers, "QUICK", SMALL)
    monkeypatch.setattr(tokenizers, "subjects", lambda first, count: torch.rand(count, 4, 1, *tokenizers.SIZE))
    done = CliRunner().invoke(cli.app, ["bench", "tokenizers", "-o", str(tmp_path), "--quick"])
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "tokenizers.json").read_text())
    assert [row["design"] for row in report["designs"]] == list(names)
    assert all(len(row["decibels"]) == len(row["seconds"]) == 1 for row in report["designs"])
    text = (tmp_path / "tokenizers.md").read_text()
    assert "| entry | 16, 256, 512 | 0, 3, 3 | –, 256, 256 |" in text and "33.52" in text
