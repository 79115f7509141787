"""Counted cost against formulas written here, measured cost on tiny models."""

import dataclasses
import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from small import UNEVEN
from typer.testing import CliRunner

from copedit_bench.models import cost
from copedit_rt import config as configs
from copedit_rt.cli import app
from copedit_rt.config import ModelConfig
from copedit_training.stages.settings import DenoiserSettings, TokenizerSettings
from tests.training.methods import small

pytest.importorskip("monai", reason="the UNet among the backbones needs the extra `train`")

TINY = replace(UNEVEN, elements=("t1", "t2", "pd"), image=(16, 16, 16), diffusion=configs.DiffusionConfig(steps=3))
PRIOR = replace(TINY, name="prior", denoiser=replace(TINY.denoiser, prior=True))
COMMON = {"steps": 10, "batch_size": 2, "lr": 1e-3, "subjects": 8, "dtype": "float32", "device": "cpu"}
SETTINGS = {"tokenizer": TokenizerSettings(**COMMON, pretext_every=3), "denoiser": DenoiserSettings(**COMMON)}


def step_by_hand(config, backbone):
    """Linear and attention operations of a step at batch 1 from the configuration, two a multiply-add."""
    c, (h, w, d), m = config.denoiser, config.latent, len(config.elements)
    (p, q, r), width, values = c.patch, c.width, config.tokenizer.latent_channels
    if backbone == "dit":
        sequences, length, values = d, (h // p) * (w // q), values * m * p * q
    elif backbone == "dit3d":
        sequences, length, values = 1, (h // p) * (w // q) * (d // r), values * m * p * q * r
    else:
        sequences, length, values = m, (h // p) * (w // q) * (d // r), values * p * q * r
    tokens = sequences * length
    block = 3 * width * width + width * width + 2 * width * c.hidden + c.hidden * width
    once = 256 * width + width * width + 3 * config.tokenizer.prompt_dim * width  # time and prompts
    once += c.blocks * 6 * width * width + 2 * width * width  # modulation
    linear = 2 * (tokens * (c.blocks * block + 2 * values * width) + once)
    within = 4 * sequences * length * length * width
    across = 4 * length * sequences * sequences * width
    attention = c.blocks // 2 * (within + across) if backbone == "mdit3d" else c.blocks * within
    return linear, attention


@pytest.mark.parametrize("backbone", ["mdit3d", "dit3d", "dit"])
@pytest.mark.parametrize("name", ["brain-brats", "cardiac", "demo-cardiac"])
def test_a_step_is_counted_as_by_hand(name, backbone):
    config = ModelConfig.preset(name)
    found = cost.count_denoiser(cost.with_backbone(config, backbone))["flops"]
    linear, attention = step_by_hand(config, backbone)
    assert (found["linear"], found["attention"], found["convolution"]) == (linear, attention, 0)
    assert found["total"] == linear + attention


def test_the_unet_is_counted_whole():
    """What it sums up to is what the counter saw; its attention is some of it."""
    found = cost.count_denoiser(cost.with_backbone(ModelConfig.preset("demo-cardiac"), "unet"))["flops"]
    assert found["convolution"] > found["linear"] > 0 and found["attention"] > 0
    assert found["total"] == found["convolution"] + found["linear"] + found["attention"]


def test_a_tokenizer_is_counted_as_by_hand():
    config, t = TINY, TINY.tokenizer
    found = cost.count_tokenizer(config)
    brats = cost.count_tokenizer(ModelConfig.preset("brain-brats"))
    assert brats["parameters"] == pytest.approx(137.63e6, abs=5e3)
    # Multiply-adds of a level: a strided convolution to it, and a residual unit on it.
    sizes, width, encode = [8 * 8 * 8, 4 * 4 * 4], 1, 0
    for voxels, channels in zip(sizes, t.channels, strict=True):
        encode += voxels * channels * width * 4**3 + 2 * voxels * channels * t.residual_channels * 3**3
        width = channels
    encode += sizes[-1] * width * t.latent_channels * 3**3
    assert found["flops"]["encode"] == 2 * encode == found["flops"]["decode"]
    (a, b), place = t.prompt_channels, sizes[-1]
    prompt = place * 27 * (t.latent_channels * a + a * b) + b * t.prompt_dim + t.prompt_dim**2
    assert found["flops"]["prompts"] == 2 * 3 * prompt
    weights = [
        27 * t.latent_channels * a + a + 2 * a + 27 * a * b + b + 2 * b + b * 12 + 12 + 12 * 12 + 12 + 13 * outputs
        for outputs in (2, 3, t.contrast_dim)
    ]
    assert [found["parameters"] - n for n in found["without_task"]] == weights
    assert found["autoencoder"] == found["parameters"] - sum(weights)


def test_a_study_adds_up(monkeypatch):
    heart = replace(ModelConfig.preset("demo-cardiac"), name="heart")
    for config in (TINY, heart, PRIOR):
        monkeypatch.setitem(configs.PRESETS, config.name, config)
    rows = {(row["preset"], row["backbone"]): row for row in cost.count(["tiny", "heart", "prior"])}
    assert len(rows) == 3 * 4
    # Encoded and decoded; a prior's fill of what is missing goes there and back, too.
    often = {"tiny": (2, 1), "heart": (3, 4), "prior": (3, 2)}
    for (name, _), row in rows.items():
        part, (encoded, decoded) = row["tokenizer"]["flops"], often[name]
        assert row["study"]["tokenizer"] == encoded * (part["encode"] + part["prompts"]) + decoded * part["decode"]
        assert row["study"]["denoiser"] == row["study"]["steps"] * row["denoiser"]["flops"]["total"]
    for backbone in ("mdit3d", "dit3d", "dit"):
        without, given = (rows[name, backbone]["denoiser"]["parameters"] for name in ("tiny", "prior"))
        assert given > without


@pytest.mark.parametrize("name", [name for name, config in configs.PRESETS.items() if config.denoiser.prior])
def test_presets_with_a_prior_are_counted(name):
    config = ModelConfig.preset(name)
    plain = replace(config, denoiser=replace(config.denoiser, prior=False))
    inputs = config.tokenizer.latent_channels * int(np.prod(config.denoiser.patch)) * config.denoiser.width
    more, less = (cost.count_denoiser(x)["parameters"] for x in (config, plain))
    assert more - less == inputs


def test_a_model_with_a_prior_is_measured(monkeypatch):
    warmed = []
    monkeypatch.setattr(cost, "before_capture", lambda device, steps: warmed.append(steps) or 0)
    found = cost.inference(PRIOR, "cpu", 1)
    assert warmed == [1, 3], "each loop has a graph of its own"
    assert found["steps"] == 3 and 0 < found["encode"] < found["study"]
    for settings in (replace(SETTINGS["tokenizer"], prior_steps=2), SETTINGS["denoiser"]):
        assert cost.training_step(PRIOR, settings, 1)["step"] > 0


def test_memory_sees_what_was_in_use():
    size = 64 * 2**20
    code = (
        "import numpy as np, torch\nfrom copedit_bench.models.cost import Memory\n"
        f"memory = Memory(torch.device('cpu')); x = np.ones({size}, np.uint8); del x; print(memory.peak())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=True)
    assert 0.8 * size < int(done.stdout) < 2 * size


def test_repeats_end_when_the_time_is_up(monkeypatch):
    monkeypatch.setattr(cost, "LONGEST", 10.0)
    for samples, median in (([9, 1, 2, 6, 5], 1), ([1, 2, 1, 2, 1, 2], 2), ([30, 1], 30)):
        given = iter(samples)
        assert cost.repeated(lambda given=given: next(given), 5) == median, samples


def test_another_process_works():
    assert cost.apart(os.getpid) != os.getpid()


def test_measured_and_written(monkeypatch, tmp_path):
    """The command on a tiny preset, in this process: every backbone and both stages, in numbers that fit together."""
    monkeypatch.setitem(configs.PRESETS, "tiny", TINY)
    monkeypatch.setattr(cost, "PRESETS", {"tiny": TINY})
    monkeypatch.setattr(cost, "DEMO", ())
    low = {stage: replace(settings, dtype="bfloat16") for stage, settings in SETTINGS.items()}
    monkeypatch.setattr(cost, "load_settings", lambda stage, name, overrides: low[stage])
    monkeypatch.setattr(cost, "apart", lambda work, *arguments: work(*arguments))
    result = CliRunner().invoke(app, ["bench", "cost", "-o", str(tmp_path), "--measure", "tiny", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "cost.json").read_text())
    inference = {row["backbone"]: row for row in report["measured"] if row["kind"] == "inference"}
    training = {row["stage"]: row for row in report["measured"] if row["kind"] == "training"}
    assert set(inference) == set(cost.BACKBONES) and set(training) == {"tokenizer", "denoiser"}
    for row in inference.values():
        assert row["steps"] == 3 and 0 < row["encode"] < row["study"] and row["decode"] > 0
    for row in training.values():
        assert row["epoch"] == pytest.approx(row["step"] * 8 / 2) and row["batch"] == 2
        assert row["dtype"] == "bfloat16"
    text = (tmp_path / "cost.md").read_text()
    assert text.count("| tiny | unet |") == 2 and "| tiny | unet | float32 |" in text
    assert "| tiny | denoiser | bfloat16 |" in text
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")
    refused = CliRunner().invoke(app, ["bench", "cost", "-o", str(tmp_path), "--measure", "big"])
    assert refused.exit_code == 1 and "big" in refused.stderr and refused.stderr.count("\n") == 1


def test_attention_is_counted_on_a_cpu_as_on_meta():
    for device in ("cpu", "meta"):
        q, k, v = (torch.zeros(2, 3, n, 8, device=device) for n in (5, 7, 7))
        found = cost.flops(lambda q=q, k=k, v=v: torch.nn.functional.scaled_dot_product_attention(q, k, v))
        assert found["attention"] == found["total"] == 2 * 2 * (2 * 3 * 5 * 7 * 8)


def test_methods_are_counted_and_measured(monkeypatch):
    """Of two methods: weights as they are built, and operations as by hand of one convolution more."""
    names = {name: cost.METHODS[name] for name in ("mmgan", "ldm")}
    told = {name: small.settings(name, small.BRAIN, "device=cpu") for name in names}
    monkeypatch.setattr(cost, "METHODS", names)
    monkeypatch.setattr(cost, "method_settings", lambda preset, name, device="cpu": told[name])
    monkeypatch.setitem(configs.PRESETS, "tiny", small.BRAIN)
    rows = cost.method_rows(["tiny"])
    made = {name: cost.build_method(small.BRAIN, told[name], name) for name in names}
    for row in rows:
        assert row["parameters"] == sum(p.numel() for p in made[row["method"]].net.parameters())
    assert [(r["critic"] is None, r["steps"]) for r in rows] == [(False, None), (True, 3)]
    found = {name: cost.method_inference(small.BRAIN, told[name], name, 1) for name in names}
    images, observed = torch.zeros(1, 3, 1, *small.BRAIN.image), torch.tensor([[True, False, True]])
    alone = cost.flops(lambda: made["mmgan"].synthesise(images, observed, small.noise))
    assert found["mmgan"]["flops"] == alone and alone["total"] > 0
    # More steps of LDM are that many more passes of its network, and nothing else.
    more = dataclasses.replace(told["ldm"], sampler_steps=5)
    z = torch.zeros(1, 3, small.BRAIN.tokenizer.latent_channels, *small.BRAIN.latent)
    step = cost.flops(lambda: made["ldm"].used(z, torch.zeros(1, dtype=torch.long), observed))
    gain = cost.method_inference(small.BRAIN, more, "ldm", 1)["flops"]["total"] - found["ldm"]["flops"]["total"]
    assert gain == 2 * step["total"] > 0
    trained = cost.training_step(small.BRAIN, told["mmgan"], 1, "mmgan")
    measured = [{"preset": "tiny", "method": n, "kind": "inference"} | found[n] for n in names]
    measured += [{"preset": "tiny", "method": "mmgan", "kind": "training"} | trained]
    text = "\n".join(cost._methods({"methods": rows, "measured": measured}))
    assert "| tiny | MM-GAN | image |" in text and "| – | – | – |" in text.splitlines()[-1]


def test_what_does_not_fit_is_said(monkeypatch):
    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nmore")

    monkeypatch.setitem(configs.PRESETS, "tiny", TINY)
    monkeypatch.setattr(cost, "PRESETS", {"tiny": TINY})
    monkeypatch.setattr(cost, "load_settings", lambda stage, *_: SETTINGS[stage])
    monkeypatch.setattr(cost, "apart", out_of_memory)
    monkeypatch.setattr(cost, "METHODS", {"mmgan": cost.METHODS["mmgan"]})
    monkeypatch.setattr(cost, "method_settings", lambda preset, name, device: small.settings(name, small.BRAIN))
    row = {"preset": "tiny", "method": "mmgan", "space": "image", "parameters": 1, "critic": None, "steps": None}
    monkeypatch.setattr(cost, "method_rows", lambda presets: [row])
    report = cost.run(["tiny"], "cpu", with_methods=True)
    kinds = [row["kind"] for row in report["measured"] if row.get("method") == "mmgan"]
    assert kinds == ["inference", "training"] and "- tiny, mmgan: CUDA out of memory" in cost.markdown(report)
    assert {row["failed"] for row in report["measured"]} == {"CUDA out of memory. Tried to allocate 9 GiB"}
    assert "- tiny, unet: CUDA out of memory" in cost.markdown(report)
    assert np.isfinite([row["denoiser"]["parameters"] for row in report["counted"]]).all()
