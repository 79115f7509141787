"""What a step needs is what it is expected to need; computing again changes no gradient."""

import gc
import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

import copedit_kernels
from copedit_bench.operators.cases import OPERATORS, Fill
from copedit_rt.config import DenoiserConfig, ModelConfig, TokenizerConfig
from copedit_rt.errors import CopeditError
from copedit_rt.networks.tokenizer import CoPeVAE
from copedit_rt.prior import Prior
from copedit_training.stages import memory
from copedit_training.stages.denoiser_task import DenoiserTask
from copedit_training.stages.settings import DenoiserSettings, TokenizerSettings
from copedit_training.stages.step import gradients, optimizers_of
from copedit_training.stages.tokenizer_task import TokenizerTask

CONFIG = ModelConfig(
    "small",
    "brain",
    ("t1", "t2"),
    (32, 32, 16),
    TokenizerConfig(
        channels=(16, 16), strides=((2, 2, 2), (2, 2, 2)), residual_channels=16, codes=64, prompt_channels=(8, 8)
    ),
    DenoiserConfig(width=96, heads=3, blocks=4, patch=(2, 2, 2)),
)
SETTINGS = {
    kind.stage: kind(10, 4, 1e-3, dtype="float32", device="cpu") for kind in (TokenizerSettings, DenoiserSettings)
}


def task_of(settings):
    torch.manual_seed(0)
    images = np.random.default_rng(0).random((8, 2, 1, *CONFIG.image)).astype(np.float16)
    if settings.stage == "tokenizer":
        return TokenizerTask(CONFIG, settings, images)
    return DenoiserTask(CONFIG, settings, images, CoPeVAE(CONFIG.tokenizer, 2))


def measured(settings):
    """Bytes of the gradients, and those saved for the backward pass, in a real step."""
    task = task_of(settings)
    optimizers = optimizers_of(task)
    gradients(task, task.module, [task.draw(0, 0)])
    for optimizer in optimizers:
        optimizer.step()
    kept = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in (*task.module.parameters(), *task.module.buffers())
    }
    kept |= {id(v): v.nbytes for o in optimizers for s in o.state.values() for v in s.values()}
    held = sum(p.grad.nbytes for p in task.module.parameters() if p.grad is not None)
    saved = {}

    def pack(x):
        if x.untyped_storage().data_ptr() not in kept:
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        task.loss(task.draw(0, 0))
    return held, sum(saved.values())


@pytest.mark.parametrize("stage", ["tokenizer", "denoiser"])
def test_the_estimate_is_that_of_a_real_step(stage):
    found = memory.estimate(CONFIG, SETTINGS[stage], kernels="reference")
    held, saved = measured(SETTINGS[stage])
    assert found["gradients"] == held
    assert found["peak"] - found["weights"] >= saved
    # Above what is saved: gradients of weights and of activations while the backward pass is under way.
    assert found["peak"] - found["weights"] <= 1.5 * saved + held


def tracked(call, folder):
    """Bytes allocated at the worst moment of a call over what was there before, as torch's profiler notes them."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    profiler.export_chrome_trace(str(folder / "trace.json"))
    events = [e for e in json.loads((folder / "trace.json").read_text())["traceEvents"] if e["name"] == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        now += event["args"]["Bytes"]
        most = max(most, now)
    return most


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stage", ["tokenizer", "denoiser"])
def test_the_estimate_is_what_torch_notes_of_a_step(stage, checkpointing, tmp_path):
    settings = replace(SETTINGS[stage], checkpointing=checkpointing)
    task = task_of(settings)
    optimizers = optimizers_of(task)

    def step():
        task.module.zero_grad(set_to_none=True)
        gradients(task, task.module, [task.draw(0, 0)])
        for optimizer in optimizers:
            optimizer.step()

    step()  # the first makes the optimizers' state
    task.module.zero_grad(set_to_none=True)
    found = memory.estimate(CONFIG, settings, kernels="reference")
    assert found["peak"] - found["weights"] == pytest.approx(tracked(step, tmp_path), rel=0.01)


class Blank(Prior):
    """A prior that fills with zeros."""

    def __init__(self):
        pass

    def fill(self, images, observed, within):
        return np.zeros_like(images[~observed])


def test_the_estimate_of_a_model_with_a_prior_is_what_torch_notes(tmp_path):
    config, settings = replace(CONFIG, denoiser=replace(CONFIG.denoiser, prior=True)), SETTINGS["denoiser"]
    images = np.zeros((8, 2, 1, *CONFIG.image), np.float16)
    task = DenoiserTask(config, settings, images, CoPeVAE(CONFIG.tokenizer, 2), prior=Blank())
    found = memory.estimate(config, settings, kernels="reference")
    real = tracked(lambda: gradients(task, task.module, [task.draw(0, 0)]), tmp_path)
    assert found["peak"] - found["weights"] == pytest.approx(real, rel=0.05)


@pytest.mark.parametrize("prior", [False, True])
def test_the_estimate_counts_the_encoder_where_images_are_augmented(prior, tmp_path):
    small = replace(CONFIG.denoiser, width=32, heads=1, blocks=1, prior=prior)  # so that the encoder takes the most
    config, settings = replace(CONFIG, denoiser=small), replace(SETTINGS["denoiser"], augment=True, batch_size=2)
    images = np.zeros((8, 2, 1, *CONFIG.image), np.float16)
    task = DenoiserTask(config, settings, images, CoPeVAE(CONFIG.tokenizer, 2), prior=Blank() if prior else None)
    task.augmentation = lambda images, seeds: images  # on the host, whose memory is not asked for
    found = memory.estimate(config, settings, kernels="reference")
    real = tracked(lambda: gradients(task, task.module, [task.draw(0, 0)]), tmp_path)
    # On a CPU a convolution of the encoder holds a copy of a feature map besides, in an order of its own.
    assert found["peak"] - found["weights"] == pytest.approx(real, rel=0.3)


def test_the_estimate_refuses_what_a_run_refuses():
    with pytest.raises(CopeditError, match="augment: in stage II it goes neither with crop nor with image_weight"):
        memory.estimate(CONFIG, replace(SETTINGS["denoiser"], augment=True, crop=16), kernels="reference")


def test_images_are_encoded_a_subject_at_a_time(tmp_path):
    """So many in a micro-batch, or missing elements among them, take hardly more memory than one subject."""
    task = task_of(SETTINGS["denoiser"])
    images = torch.rand(8, 2, 1, *CONFIG.image)
    one, all_of_them, missing = (
        tracked(lambda x=x: task._encoded(x), tmp_path) for x in (images[:1], images, images.flatten(0, 1)[None])
    )
    assert max(all_of_them, missing) < 1.5 * one
    z, prompts = task._encoded(images)
    whole = task.tokenizer.encode(images)
    torch.testing.assert_close(z, task.tokenizer.normalise(whole), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(prompts, task.tokenizer.prompts_of_each(whole), rtol=1e-5, atol=1e-5)


# Bytes that a launcher holds besides its results, of sizes: one sum a row of attention, the norms' partial sums.
BESIDES = {
    "axis_attention_token": lambda s: 4 * s["B"] * s["m"] * s["T"] * s["H"],
    "ada_norm": lambda s: 4 * s["C"] * (2 * s["B"] * s["m"] * s["T"] + s["B"]),
    "gated_residual_ada_norm": lambda s: 4 * s["C"] * (3 * s["B"] * s["m"] * s["T"] + s["B"]),
}


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs the Triton interpreter")
@pytest.mark.parametrize("op", OPERATORS)
def test_an_operator_takes_what_is_promised(op, tmp_path, monkeypatch):
    """Forward and backward of the kernels, interpreted, beside the count on shapes that the estimate is made of."""
    monkeypatch.setenv("COPEDIT_KERNELS", "triton")
    row = OPERATORS[op]

    def inputs():
        found = row.inputs(row.small, Fill(torch.float32))
        learnt = {name: found[name].detach().requires_grad_() for name in row.learn if found[name] is not None}
        return found | learnt

    def run(given):
        out = getattr(copedit_kernels, row.function)(*given.values())
        if row.learn:
            outputs = out if isinstance(out, tuple) else (out,)
            torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])

    run(inputs())
    given = inputs()
    real = tracked(lambda: run(given), tmp_path)
    with FakeTensorMode(allow_non_fake_inputs=True):
        given = inputs()
        with memory._Alive() as alive:
            run(given)
    assert 0 <= real - alive.peak <= BESIDES.get(op, lambda s: 0)(row.small)
    assert bool(alive.peak) != bool(row.mutated)  # what writes in place allocates nothing


# Of a residual unit two feature maps are saved without, one with checkpointing; of a block many and one.
@pytest.mark.parametrize(("stage", "share"), [("tokenizer", 0.75), ("denoiser", 0.5)])
def test_checkpointing_saves_memory_and_keeps_gradients(stage, share):
    both = SETTINGS[stage], replace(SETTINGS[stage], checkpointing=True)
    plain, thrifty = map(task_of, both)
    for task in (plain, thrifty):
        with torch.no_grad():
            for index, p in enumerate(task.module.parameters()):  # fresh denoisers return zeros
                p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(index)))
        gradients(task, task.module, [task.draw(0, 0)])
    for (name, a), b in zip(plain.module.named_parameters(), thrifty.module.parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0, msg=name)
    saved, less = (measured(settings)[1] for settings in both)
    assert less < share * saved
    peaks = [memory.estimate(CONFIG, settings, kernels="reference")["peak"] for settings in both]
    assert peaks[1] < 0.9 * peaks[0]


def test_fused_operators_save_less_than_the_reference():
    pytest.importorskip("triton")
    fused, plain = (memory.estimate(CONFIG, SETTINGS["denoiser"], k)["peak"] for k in ("triton", "reference"))
    assert fused < 0.9 * plain


def test_the_command_says_the_estimate_and_starts_nothing(tmp_path):
    from typer.testing import CliRunner

    from copedit_rt.cli import app

    options = ["--preset", "demo-cardiac", "-o", str(tmp_path / "run"), "--estimate", "--set", "batch_size=1"]
    result = CliRunner().invoke(app, ["train", "tokenizer", *options])
    assert result.exit_code == 0, result.output
    peak = float(result.stdout.split("expected peak ")[1].split(" GiB per GPU")[0])
    assert 0.01 < peak < 2
    assert not (tmp_path / "run").exists()
