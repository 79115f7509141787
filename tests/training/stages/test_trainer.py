"""Both stages on a tiny model: what is learnt, resumed, refused."""

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback

import numpy as np
import pytest
import torch
from torch import Tensor

from copedit_rt import checkpoint
from copedit_rt.config import DenoiserConfig, ModelConfig, TokenizerConfig
from copedit_rt.errors import CopeditError
from copedit_rt.networks.tokenizer import CoPeVAE
from copedit_training.data.prepared import draw_observed, model_images, phantom_images
from copedit_training.stages import trainer
from copedit_training.stages.losses import Adversary, EMACodebook, Perceptual, pretext_losses, scale_prompts, weigh
from copedit_training.stages.settings import Settings, load_settings

TINY = ModelConfig(
    "tiny",
    "brain",
    ("t1", "t2"),
    (16, 16, 8),
    TokenizerConfig(
        channels=(8, 8),
        strides=((2, 2, 2), (2, 2, 2)),
        residual_units=1,
        residual_channels=8,
        codes=32,
        prompt_channels=(8, 8),
        prompt_dim=16,
        contrast_dim=8,
    ),
    DenoiserConfig(width=32, heads=2, blocks=2, patch=(2, 2, 2)),
)
HEART = dataclasses.replace(
    TINY,
    name="tiny-heart",
    task="cardiac",
    elements=("slab0", "slab1", "slab2"),
    image=(16, 16, 4),
    denoiser=dataclasses.replace(TINY.denoiser, patch=(1, 1, 1)),
)
SMALL = (
    "dtype=float32",
    "crop=8",
    "quantise_from=0",
    "compile=false",
    "optimizer=adam",
    "pretext_every=2",
    "prompt_steps=0",
    "readout_steps=0",
    "whole_steps=0",
    "whiten=0",
    "last_timestep=0",
    "observed_weight=1",
    "image_weight=0",
    "muon_lr=0",
    "batch_size=2",
    "subjects=4",
    "checkpoint_every=2",
    "warmup=2",
)


@pytest.fixture(scope="module", autouse=True)
def smooth_subjects():
    """Random smooth volumes in place of phantoms, which cost 0.3 s each."""
    patch = pytest.MonkeyPatch()

    def images(config, subjects, cache, progress=None):
        rng = np.random.default_rng(0)
        coarse = rng.random((subjects, len(config.elements), 1, 4, 4, config.image[2] // 2), dtype=np.float32)
        return coarse.repeat(4, 3).repeat(4, 4).repeat(2, 5)

    patch.setattr(trainer, "phantom_images", images)
    yield
    patch.undo()


def train(stage, folder, *overrides, config=TINY, resume=False):
    preset = "demo-cardiac" if config.task == "cardiac" else "demo-brain"
    return trainer.run(stage, preset, folder, overrides=(*SMALL, *overrides), config=config, resume=resume)


def losses(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def same_weights(a, b, name):
    first, second = (checkpoint.read_tensors(folder / name)[0] for folder in (a, b))
    assert first.keys() == second.keys()
    return all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("config", [TINY, HEART], ids=lambda c: c.task)
def test_both_stages_learn_and_give_a_model_that_loads(tmp_path, config):
    tokenizer = train("tokenizer", tmp_path / "a", "steps=60", "lr=5e-3", config=config)
    log = losses(tmp_path / "a")
    assert np.mean([x["l1"] for x in log[-5:]]) < 0.7 * np.mean([x["l1"] for x in log[:5]])
    model = train("denoiser", tmp_path / "b", "steps=60", "lr=5e-3", f"tokenizer={tokenizer}", config=config)
    log = losses(tmp_path / "b")
    assert np.mean([x["mse"] for x in log[-5:]]) < 0.8 * np.mean([x["mse"] for x in log[:5]])
    loaded, vae, _ = checkpoint.load_tokenizer(model)
    assert loaded == config
    assert (vae.latent_std != 1).all() and (vae.latent_std > 0).all()
    checkpoint.load_denoiser(model)


def test_the_last_steps_train_the_prompts_alone(tmp_path):
    train("tokenizer", tmp_path / "a", "steps=40", "prompt_steps=36", "prompt_batch=4", "lr=1e-2", config=HEART)
    before, after = (
        checkpoint.read_tensors(tmp_path / "a" / f"checkpoint-{step:08d}" / "task.safetensors")[0] for step in (38, 40)
    )
    moved = {name.split(".")[1] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"prompt_encoders", "heads"}
    log = losses(tmp_path / "a")
    assert "l1" in log[3] and "l1" not in log[4]
    assert np.mean([x["loss"] for x in log[-6:]]) < 0.9 * np.mean([x["loss"] for x in log[4:10]])
    rates = [
        trainer.learning_rate(Settings(steps=40, batch_size=1, lr=1.0, warmup=2, prompt_steps=36), s) for s in (3, 4, 5)
    ]
    assert rates[0] < 1 and rates[1:] == [0.5, 1.0], "a schedule of their own"
    other = Settings(steps=40, batch_size=1, lr=1.0, warmup=2, prompt_steps=36, prompt_lr=0.1)
    assert trainer.learning_rate(other, 3) == rates[0] and trainer.learning_rate(other, 5) == pytest.approx(0.1)


def test_quantisation_can_start_later_with_codes_from_the_data(tmp_path):
    train("tokenizer", tmp_path / "a", "steps=8", "quantise_from=5", "lr=5e-3")
    log = losses(tmp_path / "a")
    assert ["commitment" in x for x in log] == ["perplexity" in x for x in log] == [False] * 5 + [True] * 3
    assert log[5]["commitment"] < 0.1 * log[5]["l1"], "the codes are vectors of that batch"


def test_muon_moves_the_matrices_of_the_blocks_along_orthogonal_directions(tmp_path):
    vae = train("tokenizer", tmp_path / "vae", "steps=1")
    settings = ("steps=2", "warmup=0", "lr=1e-3", "optimizer=muon", "checkpoint_every=1", f"tokenizer={vae}")
    train("denoiser", tmp_path / "a", *settings)
    first, second = (
        checkpoint.read_tensors(tmp_path / "a" / f"checkpoint-{step:08d}" / "task.safetensors")[0] for step in (1, 2)
    )
    step = second["denoiser.blocks.0.modulation.weight"] - first["denoiser.blocks.0.modulation.weight"]
    rate = 0.2 * max(step.shape) ** 0.5 * trainer.learning_rate(Settings(2, 1, 1e-3, 0), 1)
    first, second = torch.linalg.svdvals(step / rate)[:2]  # a batch of two gives a gradient of rank two
    assert 0.5 < second <= first < 1.3, "five Newton-Schulz steps bring singular values near 1"


def test_the_read_out_fits_the_linear_layers_to_whole_images(tmp_path):
    settings = ("steps=6", "prompt_steps=2", "prompt_lr=1e-3")
    plain = train("tokenizer", tmp_path / "a", *settings, config=HEART)
    fitted = train("tokenizer", tmp_path / "b", *settings, "readout_steps=300", config=HEART)
    before, after = (checkpoint.read_tensors(f / "tokenizer.safetensors")[0] for f in (plain, fitted))
    moved = {".".join(name.split(".")[::2][:2]) for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"prompt_encoders.mlp", "heads.1"}, "neither convolutions nor the autoencoder"

    images = torch.from_numpy(trainer.phantom_images(HEART, 4, None))
    observed = draw_observed(np.random.default_rng(1), 40, 3, True).unflatten(0, (10, 4))

    def loss(folder):
        vae = checkpoint.load_tokenizer(folder)[1]
        return float(weigh(pretext_losses(vae, vae.prompts_of_each(vae.encode(images)), observed), 1.0))

    with torch.no_grad():
        assert loss(fitted) < 0.5 * loss(plain)


def denoiser_task(tmp_path, *overrides, images=None):
    vae = checkpoint.load_tokenizer(train("tokenizer", tmp_path / "vae", "steps=2"))[1]
    images = trainer.phantom_images(TINY, 4, None) if images is None else images
    settings = load_settings("denoiser", "demo-brain", (*SMALL, "crop=0", *overrides))
    return trainer.DenoiserTask(TINY, settings, images, vae, tmp_path / "latents.npy")


def test_the_input_layer_can_start_with_all_components_equally_large(tmp_path):
    torch.manual_seed(0)
    task = denoiser_task(tmp_path, "whiten=0.5")
    tokens = task.denoiser.patchify(task.latents.float()).flatten(0, 2)
    variance = torch.linalg.eigvalsh(tokens.mT @ tokens / len(tokens)).flip(0)
    embedded = tokens @ task.denoiser.embed.weight.detach().mT
    found = torch.linalg.eigvalsh(embedded.mT @ embedded / len(embedded)).flip(0)
    raised = variance[: len(found)] > trainer.WHITEN_FLOOR * variance.sum()
    assert raised.sum() > 5 and torch.allclose(found[raised], found[0], rtol=1e-3)
    assert found.sum() == pytest.approx(len(found), rel=1e-3), "as large as the position embedding beside it"
    assert torch.equal(task.average.embed.weight, task.denoiser.embed.weight)
    assert variance[0] > 20 * variance[raised.nonzero()[-1]], "which they are not by themselves"


def test_crops_are_drawn_where_something_happens(tmp_path):
    images = trainer.phantom_images(TINY, 4, None)
    images[:, :, :, 8:] = 0.0  # which the encoder sees across the border
    task = denoiser_task(tmp_path, "crop=8", images=images)
    rng = np.random.default_rng(0)
    drawn = [task._crop(np.array([0]), rng) for _ in range(200)]
    corners = np.array([corner[0].tolist() for _, corner in drawn])
    assert corners.min() == 0 and corners.max() == 1 and task.chances.shape == (8, 4)
    chances = task.chances[0].reshape(2, 2)
    assert chances[1].sum() < 0.4 and chances.sum() == pytest.approx(1)
    assert (corners == 1).mean(0) == pytest.approx([chances[1].sum(), chances[:, 1].sum()], abs=0.1)
    for crop, corner in drawn[:5]:
        x, y = (2 * int(n) for n in corner[0])
        assert torch.equal(crop[0], task.latents[0, ..., x : x + 2, y : y + 2, :].float())


def test_the_last_steps_see_whole_images_and_as_many_tokens(tmp_path, monkeypatch):
    vae = train("tokenizer", tmp_path / "vae", "steps=1")
    seen, original = [], trainer.MDiT3D.forward

    def forward(self, z, *args):
        seen.append((tuple(z.shape[::3][:1] + z.shape[3:]), len(args)))
        return original(self, z, *args)

    monkeypatch.setattr(trainer.MDiT3D, "forward", forward)
    train("denoiser", tmp_path / "a", "steps=3", "batch_size=8", "crop=8", "whole_steps=1", f"tokenizer={vae}")
    assert seen == [((8, 2, 2, 2), 4), ((8, 2, 2, 2), 4), ((2, 4, 4, 2), 3)]


def test_a_share_of_the_samples_is_drawn_at_the_last_timestep(tmp_path):
    task = denoiser_task(tmp_path, "last_timestep=0.5", "batch_size=8")
    drawn, predict = [], task.predict[0]
    task.predict = [lambda zt, t, *rest: drawn.append(t) or predict(zt, t, *rest)]
    for step in range(40):
        task.loss(step, np.random.default_rng(step), torch.Generator().manual_seed(step))
    last = (torch.cat(drawn) == len(task.levels) - 1).float().mean()
    assert task.levels[-1] == 0 < task.levels[-2] and denoiser_task(tmp_path / "b").levels[-1] > 0
    assert 0.4 < last < 0.6 and torch.cat(drawn).unique().numel() > 50


def test_observed_elements_can_weigh_less(tmp_path):
    whole, none = (denoiser_task(tmp_path / str(w), f"observed_weight={w}", "batch_size=4") for w in (1, 0))
    none.denoiser.load_state_dict(whole.denoiser.state_dict())
    (first, terms), (second, same) = whole(0, 0), none(0, 0)
    assert same == terms and terms["mse"] == pytest.approx(first.item()) != pytest.approx(second.item())
    assert second.item() == pytest.approx(terms["mse_missing"])


def test_augmented_latents_are_computed_anew(tmp_path):
    task = denoiser_task(tmp_path, "augment=true", "batch_size=4")
    assert not (tmp_path / "latents.npy").exists()
    encoded, encode = [], task._encoded
    task._encoded = lambda images: encoded.append(images) or encode(images)
    losses = [task(step, 0)[0].item() for step in (0, 1, 0)]
    assert losses[0] == losses[2] != losses[1] and torch.equal(encoded[0], encoded[2])
    originals = torch.from_numpy(task.images).float()
    for x in encoded[0]:
        for view in (originals, originals.flip(3)):
            assert (x - view).abs().amax((1, 2, 3, 4, 5)).min() > 0.1, "none as it is on disk"
    with pytest.raises(CopeditError, match="augment: in stage II it goes neither with crop nor with image_weight"):
        denoiser_task(tmp_path / "b", "augment=true", "crop=8")


@pytest.mark.parametrize("config", [TINY, HEART], ids=lambda c: c.task)
@pytest.mark.parametrize("crop", [0, 14])
def test_the_image_term_is_the_error_of_what_the_decoder_shows(tmp_path, config, crop):
    config = dataclasses.replace(config, tokenizer=dataclasses.replace(config.tokenizer, quantise=not crop))
    if crop:  # tokens of two voxels, so that there are several crops
        config = dataclasses.replace(
            config,
            tokenizer=dataclasses.replace(config.tokenizer, channels=(8,), strides=((2, 2, 2),)),
            denoiser=dataclasses.replace(config.denoiser, patch=(1, 1, 1)),
        )
    images, vae = trainer.phantom_images(config, 4, None), CoPeVAE(config.tokenizer, len(config.elements))
    settings = load_settings("denoiser", "demo-brain", (*SMALL, f"crop={crop}", "image_weight=0.1"))
    task = trainer.DenoiserTask(config, settings, images, vae)
    rng, rows = np.random.default_rng(0), np.array([0, 1, 3])
    observed = draw_observed(rng, 3, len(config.elements), config.task == "cardiac")
    chance = rng.random(observed.shape)
    z0, corner = task._crop(rows, rng) if crop else (task.latents[rows].float(), None)
    found = task._image_error(z0, z0, observed, rows, corner, chance)

    views = torch.from_numpy(images).float()
    if config.task == "brain":
        views = torch.stack((views, views.flip(3)), 1).flatten(0, 1)
    expected = (vae.images(z0, config.task == "cardiac") - cropped(views[rows], corner, crop)).square()
    if crop:
        expected = expected[..., trainer.CROP_RIM : -trainer.CROP_RIM, trainer.CROP_RIM : -trainer.CROP_RIM, :]
    shown = ~observed
    if config.task == "brain":  # of two modalities, one at a time
        assert (shown.sum(1) == 1).all()
    assert torch.allclose(found, expected[shown].mean((1, 2, 3, 4)), rtol=1e-4)


def cropped(images, corner, crop):
    if corner is None:
        return images
    starts = (2 * corner).tolist()
    return torch.stack([x[..., i : i + crop, j : j + crop, :] for x, (i, j) in zip(images, starts, strict=True)])


def test_with_the_image_term_the_decoder_learns_what_is_synthesised(tmp_path):
    vae = train("tokenizer", tmp_path / "vae", "steps=4")
    found = train("denoiser", tmp_path / "a", "steps=3", "crop=0", "image_weight=0.1", f"tokenizer={vae}")
    before, after = (checkpoint.read_tensors(f / "tokenizer.safetensors")[0] for f in (vae, found))
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"decoder"}, "latents and prompts stay what they were"

    task = denoiser_task(tmp_path / "b", "image_weight=0.1", "batch_size=4")
    with torch.no_grad():  # an untrained denoiser's output is zero whatever comes in
        task.denoiser.final.weight.normal_(0, 0.1)
    gradients = []
    for weight in (0.1, 0.2):
        task.settings = dataclasses.replace(task.settings, image_weight=weight)
        task.zero_grad()
        loss, terms = task(0, 0)
        loss.backward()
        gradients.append([p.grad.clone() for p in (task.denoiser.final.weight, task.decoder.inp.weight)])
    (final, decoder), (final2, decoder2) = gradients
    assert torch.allclose(decoder2, 2 * decoder, rtol=1e-4) and decoder.abs().sum() > 0
    assert not torch.allclose(final2, final, rtol=1e-2) and terms["image_mse"] > 0
    with pytest.raises(CopeditError, match="crop = 8: image_weight needs more than 12 voxels"):
        denoiser_task(tmp_path / "c", "image_weight=0.1", "crop=8")


def test_latents_are_kept_for_as_long_as_the_tokenizer_is_the_same(tmp_path, monkeypatch):
    first = denoiser_task(tmp_path)
    vae = first.frozen[0]
    encoded, encode = [], type(vae).encode
    monkeypatch.setattr(type(vae), "encode", lambda self, x, *a: encoded.append(1) or encode(self, x, *a))
    args = (first.config, first.settings, trainer.phantom_images(TINY, 4, None))
    again = trainer.DenoiserTask(*args, vae, tmp_path / "latents.npy")
    assert not encoded and torch.equal(again.latents, first.latents) and torch.equal(again.prompts, first.prompts)
    with torch.no_grad():
        vae.latent_mean += 1
    other = trainer.DenoiserTask(*args, vae, tmp_path / "latents.npy")
    assert len(encoded) == 8 and not torch.equal(other.latents, first.latents)
    (tmp_path / "prompts.safetensors").unlink()  # as a run leaves it that was killed in between
    after = trainer.DenoiserTask(*args, vae, tmp_path / "latents.npy")
    assert (
        len(encoded) == 16 and torch.equal(after.latents, other.latents) and torch.equal(after.prompts, other.prompts)
    )


@pytest.mark.parametrize("stage", ["tokenizer", "denoiser", "denoiser muon"])
def test_a_stopped_run_resumes_to_the_same_bits(tmp_path, stage, monkeypatch):
    stage, _, optimizer = stage.partition(" ")
    extra = ("steps=5", f"optimizer={optimizer or 'adam'}", f"augment={str(not optimizer).lower()}", "crop=0")
    if optimizer:
        extra += ("muon_lr=1e-2", "whiten=0.5", "last_timestep=0.5", "whole_steps=1", "crop=16", "image_weight=0.1")
    if stage == "denoiser":
        extra += (f"tokenizer={train('tokenizer', tmp_path / 'vae', 'steps=2')}",)
    whole = train(stage, tmp_path / "whole", *extra)

    class Stop(Exception):
        pass

    kind = {"tokenizer": trainer.TokenizerTask, "denoiser": trainer.DenoiserTask}[stage]
    original = kind.after_step

    def after_step(self, step):
        if step == 3:  # after the checkpoint at 2, before the one at 4
            raise Stop
        return original(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "after_step", after_step)
        with pytest.raises(Stop):
            train(stage, tmp_path / "stopped", *extra)
    resumed = train(stage, tmp_path / "stopped", *extra, resume=True)
    assert same_weights(whole, resumed, f"{stage}.safetensors")
    assert [p.name for p in sorted((tmp_path / "stopped").glob("checkpoint-*"))] == [
        "checkpoint-00000004",
        "checkpoint-00000005",
    ]


FORK = multiprocessing.get_context("fork")


def forked(*arguments, environment=None, gate=None, **options):
    """train(...) in a process of its own, which has all imports already; no step beyond gate.value begins."""
    original = trainer.learning_rate

    def paced(settings, step):
        while gate is not None and step > gate.value:
            time.sleep(0.001)
        return original(settings, step)

    def body():
        os.environ.update(environment or {})
        torch.set_num_threads(1)
        trainer.learning_rate = paced
        try:
            train(*arguments, **options)
        except CopeditError as error:
            print(error)
            os._exit(error.exit_code)
        except BaseException:
            traceback.print_exc()
            os._exit(99)
        os._exit(0)

    process = FORK.Process(target=body)
    process.start()
    return process


def steps_done(folder):
    log = folder / "log.jsonl"
    if not log.exists():
        return 0
    lines = log.read_text().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]  # the last may be on its way
    return json.loads(whole[-1])["step"] + 1 if whole else 0


def until(condition, process):
    while process.is_alive() and not condition():
        time.sleep(0.002)
    assert process.is_alive(), "it was to be interrupted"


@pytest.mark.parametrize("stage", ["tokenizer", "denoiser"])
def test_a_run_killed_ten_times_ends_with_the_same_bits(tmp_path, stage):
    extra = ["steps=60", "checkpoint_every=3"]
    if stage == "denoiser":
        extra.append(f"tokenizer={train('tokenizer', tmp_path / 'vae', 'steps=2')}")
    whole = forked(stage, tmp_path / "whole", *extra)
    whole.join()
    random = np.random.default_rng(0)
    for kill in range(10):
        moment = 5 * kill + int(random.integers(1, 6))
        process = forked(stage, tmp_path / "killed", *extra, resume=kill > 0, gate=FORK.Value("i", moment + 3))
        until(lambda moment=moment: steps_done(tmp_path / "killed") >= moment, process)
        time.sleep(random.uniform(0, 0.03))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    last = forked(stage, tmp_path / "killed", *extra, resume=True)
    last.join()
    assert whole.exitcode == last.exitcode == 0
    assert same_weights(tmp_path / "whole" / "model", tmp_path / "killed" / "model", f"{stage}.safetensors")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_step_and_says_so(tmp_path, number, capfd):
    extra = ("steps=40", "checkpoint_every=1000")
    gate = FORK.Value("i", 9)
    process = forked("tokenizer", tmp_path / "stopped", *extra, gate=gate)
    until(lambda: steps_done(tmp_path / "stopped") >= 3, process)
    os.kill(process.pid, number)
    gate.value = 100
    process.join()
    assert process.exitcode == 128 + number
    done = steps_done(tmp_path / "stopped")
    said = f"{number.name}: stopped after step {done - 1}, and all is saved; go on with --resume"
    assert said in capfd.readouterr().out
    assert [p.name for p in (tmp_path / "stopped").glob("checkpoint-*")] == [f"checkpoint-{done:08d}"]
    for folder, resume in (("stopped", True), ("whole", False)):  # in processes alike: threads change the bits
        process = forked("tokenizer", tmp_path / folder, *extra, resume=resume)
        process.join()
        assert process.exitcode == 0
    assert same_weights(tmp_path / "whole" / "model", tmp_path / "stopped" / "model", "tokenizer.safetensors")


def together(*arguments, count=2, **options):
    """The same as the processes of torchrun; returns their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        forked(*arguments, environment=shared | {"RANK": str(i), "LOCAL_RANK": str(i)}, **options) for i in range(count)
    ]
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


@pytest.mark.parametrize("stage", ["tokenizer", "denoiser"])
def test_two_processes_do_what_one_does_with_accumulation(tmp_path, stage):
    extra = ["steps=8", "batch_size=1", "accumulate=4", "lr=1e-3", "checkpoint_every=4"]
    if stage == "denoiser":
        extra.append(f"tokenizer={train('tokenizer', tmp_path / 'vae', 'steps=2', config=HEART)}")
    else:
        extra += ["quantise_from=2", "prompt_steps=2", "prompt_batch=1", "draws=2"]
    alone = train(stage, tmp_path / "alone", *extra, config=HEART)
    assert together(stage, tmp_path / "both", *extra, config=HEART) == [0, 0]
    both = losses(tmp_path / "both")
    assert len(both) == 8, "one process writes"
    for a, b in zip(losses(tmp_path / "alone"), both, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"seconds"}:
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5), name
    models = (alone, tmp_path / "both" / "model")
    first, second = (checkpoint.read_tensors(model / f"{stage}.safetensors")[0] for model in models)
    for name, value in first.items():
        # The biases before a batch norm are normalised away: their gradient is rounding, which the means then follow.
        if not name.endswith(("conv.0.bias", "conv.3.bias", "running_mean")):
            torch.testing.assert_close(value.float(), second[name].float(), rtol=0.01, atol=2e-4, msg=name)
    if stage == "tokenizer":
        assert all(x["contrast"] > 0.1 for x in both if "contrast" in x), "one subject alone has no negatives"


def test_processes_resume_stop_and_refuse_together(tmp_path, monkeypatch, capfd):
    extra = ("steps=4", "batch_size=1", "accumulate=2", "checkpoint_every=2")
    train("tokenizer", tmp_path / "alone", *extra)
    assert together("tokenizer", tmp_path / "both", *extra) == [0, 0]
    (tmp_path / "both" / "checkpoint-00000004").rename(tmp_path / "hidden")
    assert together("tokenizer", tmp_path / "both", *extra, resume=True) == [0, 0]
    assert same_weights(tmp_path / "hidden", tmp_path / "both" / "checkpoint-00000004", "task.safetensors")

    assert together("tokenizer", tmp_path / "odd", *extra, "accumulate=3") == [1, 1]
    assert "accumulate = 3: 2 processes cannot share so many micro-batches" in capfd.readouterr().out
    original = trainer.TokenizerTask.forward

    def broken(self, step, part):
        loss, terms = original(self, step, part)
        if part == 1:
            terms["l1"] = float("inf")
            loss = loss * float("inf")
        return loss, terms

    monkeypatch.setattr(trainer.TokenizerTask, "forward", broken)
    assert together("tokenizer", tmp_path / "broken", *extra) == [1, 99], "process 0 speaks, the other leaves"
    row = trainer.TokenizerTask(TINY, Settings(4, 1, 1.0, accumulate=2), np.zeros((4, 2, 1, 16, 16, 8))).choose(0, 1)[0]
    assert f"step 0: l1 inf, loss inf on phantom {row.rows[0]};" in capfd.readouterr().out


@pytest.mark.parametrize("config", [TINY, HEART], ids=lambda c: c.task)
def test_micro_batches_add_up_to_the_loss_of_the_whole_batch(config):
    settings = Settings(8, 2, 1e-3, accumulate=3, dtype="float32", draws=2)
    rng = np.random.default_rng(0)
    images = rng.random((7, len(config.elements), 1, *config.image), dtype=np.float32)
    torch.manual_seed(0)
    task = trainer.TokenizerTask(config, settings, images).double()
    before = {name: x.clone() for name, x in task.state_dict().items()}
    images = task.images = images.astype(np.float64)
    monkey = pytest.MonkeyPatch()
    monkey.setattr(Tensor, "float", Tensor.double)
    task.scaled.fill_(True)
    task.codebook.started.fill_(True)
    terms, _ = trainer._gradients(task, task, 0, range(3))
    gradients = {name: p.grad for name, p in task.named_parameters() if p.grad is not None}
    norm = task.tokenizer.prompt_encoders[0].conv[1]
    assert norm.num_batches_tracked == 1
    running = norm.running_mean.clone()
    task.load_state_dict(before)
    task.zero_grad()

    chosen = [task.choose(0, part)[0] for part in range(3)]
    x = torch.cat([task.show(drawn) for drawn in chosen])
    z = task.tokenizer.encode(x)
    each = task.tokenizer.prompts_of_each(z)
    observed = torch.cat([drawn.observed for drawn in chosen], 1)
    pretext = pretext_losses(task.tokenizer, each, observed)
    codes, _ = task.tokenizer.quantise(z.detach())
    l1 = (task.tokenizer.decode(z + (codes - z).detach(), task.cardiac) - x).abs().mean()
    commitment = (z - codes).square().mean()
    loss = l1 + 0.25 * commitment + 0.01 * (pretext["count"] + 0.5 * pretext["position"] + 0.5 * pretext["contrast"])
    loss.backward()
    monkey.undo()
    assert terms["loss"] == pytest.approx(loss.item(), rel=1e-9)
    assert terms["contrast"] == pytest.approx(pretext["contrast"].item(), rel=1e-9)
    torch.testing.assert_close(running, norm.running_mean)
    for name, p in task.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(gradients[name], p.grad, rtol=1e-6, atol=1e-12, msg=name)


def test_the_papers_settings():
    for preset, sizes, steps in (
        ("brain-brats", (8, 32), (400_000, 100_000)),
        ("brain-ixi", (8, 32), (400_000, 100_000)),
        ("cardiac", (64, 64), (100_000, 100_000)),
    ):
        first, second = (load_settings(stage, preset) for stage in ("tokenizer", "denoiser"))
        assert (first.batch_size * first.accumulate, second.batch_size * second.accumulate) == sizes
        assert (first.steps, second.steps) == steps
        assert (first.lr, second.lr) == (1e-4, 5e-5) and first.beta2 == second.beta2 == 0.999
        assert second.ema == 0.9999 and first.weight_decay == 0 and 0 <= first.adversarial_from < first.steps
        assert ModelConfig.preset(preset)


def test_the_adversary_is_trained_beside_and_resumed(tmp_path):
    extra = ("steps=6", "adversarial_from=2", "crop=0", "lr=1e-3")
    whole = train("tokenizer", tmp_path / "whole", *extra, config=HEART)
    log = losses(tmp_path / "whole")
    assert ["adversarial" in x for x in log] == ["discriminator" in x for x in log] == [False] * 2 + [True] * 4
    folders = (tmp_path / "whole" / f"checkpoint-{step:08d}" for step in (4, 6))
    first, second = (checkpoint.read_tensors(folder / "task.safetensors")[0] for folder in folders)
    names = [name for name in first if name.startswith("adversary.")]
    assert names and all(not torch.equal(first[name], second[name]) for name in names if name.endswith("weight"))
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-00000006")
    resumed = train("tokenizer", tmp_path / "resumed", *extra, config=HEART, resume=True)
    assert same_weights(whole, resumed, "tokenizer.safetensors")
    assert not any("adversary" in name for name in checkpoint.read_tensors(whole / "tokenizer.safetensors")[0])


def test_adversarial_losses_are_least_squares_with_separate_gradients():
    torch.manual_seed(0)
    adversary = Adversary((16, 16, 12))
    output, images = (torch.rand(2, 1, 16, 16, 12, requires_grad=True) for _ in range(2))
    terms = adversary(output, images)
    fake, real = adversary.net(output)[-1], adversary.net(images)[-1]
    torch.testing.assert_close(terms["adversarial"], (fake - 1).square().mean())
    torch.testing.assert_close(terms["discriminator"], (fake.square().mean() + (real - 1).square().mean()) / 2)
    (wanted,) = torch.autograd.grad((fake - 1).square().mean(), output)
    terms["adversarial"].backward(retain_graph=True)
    torch.testing.assert_close(output.grad, wanted)
    assert all(p.grad is None for p in adversary.parameters())
    output.grad = None
    terms["discriminator"].backward()
    assert output.grad is None and all(p.grad.abs().sum() > 0 for p in adversary.net[-1].parameters())
    with pytest.raises(CopeditError, match=r"adversarial_from: \(16, 16, 4\) voxels are too few"):
        Adversary((16, 16, 4))


def test_the_perceptual_term_reads_medicalnets_names_and_is_zero_for_equals(tmp_path):
    from monai.networks.nets import ResNetFeatures

    torch.manual_seed(0)
    net = ResNetFeatures("resnet10", pretrained=False).eval()
    state = {f"module.{name}": x for name, x in net.state_dict().items() if "num_batches" not in name}
    checkpoint.write_tensors(tmp_path / "net.safetensors", state | {"module.conv_seg.0.bias": torch.zeros(3)})
    perceptual = Perceptual(tmp_path / "net.safetensors", torch.device("cpu"))
    a, b = torch.rand(2, 1, 16, 16, 16, requires_grad=True), torch.rand(2, 1, 16, 16, 16)
    assert perceptual(a, a.detach() * 3 + 1).item() < 1e-4, "scale and offset do not count"
    total = 0.0
    for x, y in zip(a.detach(), b, strict=True):
        u, v = (net(((k - k.mean()) / k.std(correction=0))[None])[-1][0] for k in (x, y))
        total += ((u / u.norm(dim=0) - v / v.norm(dim=0)) ** 2).sum(0).mean().item() / 2
    distance = perceptual(a, b)
    assert distance.item() == pytest.approx(total, rel=1e-3)
    distance.backward()
    assert a.grad.abs().sum() > 0 and all(p.grad is None for p in perceptual.net.parameters())
    with pytest.raises(CopeditError, match=r"perceptual = .*: no such file"):
        Perceptual(tmp_path / "none", torch.device("cpu"))
    with pytest.raises(CopeditError, match=r"tensor bn1\.bias is missing"):
        checkpoint.write_tensors(tmp_path / "part.safetensors", {"conv1.weight": state["module.conv1.weight"]})
        Perceptual(tmp_path / "part.safetensors", torch.device("cpu"))


def test_validation_is_logged_and_changes_nothing(tmp_path, monkeypatch):
    held_out = np.random.default_rng(5).random((2, 3, 1, 16, 16, 4)).astype(np.float16)
    monkeypatch.setattr(trainer, "held_out_images", lambda *_: held_out)
    config = dataclasses.replace(HEART, diffusion=dataclasses.replace(HEART.diffusion, steps=2))
    plain = train("tokenizer", tmp_path / "a", "steps=4", config=config)
    watched = train("tokenizer", tmp_path / "b", "steps=4", "validate_every=2", config=config)
    assert same_weights(plain, watched, "tokenizer.safetensors")
    assert ["val_psnr" in x for x in losses(tmp_path / "b")] == [False, True, False, True]
    model = train("denoiser", tmp_path / "c", "steps=2", "validate_every=2", f"tokenizer={watched}", config=config)
    line = losses(tmp_path / "c")[1]
    measured = {name for name in line if name.startswith("val_")}
    assert measured == {f"val_{what}_{count}" for what in ("psnr", "ssim", "mse") for count in (1, 2)}
    assert 0 < line["val_psnr_1"] < 40 and -1 < line["val_ssim_2"] < 1 and line["val_mse_1"] > 0
    assert checkpoint.read_config(model) == config
    assert list((tmp_path / "c" / "tensorboard").iterdir()), "TensorBoard's file"


@pytest.mark.slow
def test_torchrun_runs_the_command(tmp_path):
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    settings = "steps=1 subjects=2 batch_size=1 accumulate=2 prompt_steps=0 readout_steps=0 crop=16 warmup=0"
    sets = [word for item in settings.split() for word in ("--set", item)]
    train = ("-m", "copedit_rt", "train", "tokenizer", "--preset", "demo-cardiac", "-o", str(tmp_path / "a"))
    done = subprocess.run([*command, *train, *sets], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(tmp_path / "a" / "model")], "one process prints"
    assert len(losses(tmp_path / "a")) == 1
    checkpoint.load_tokenizer(tmp_path / "a" / "model")


def test_seeds_differ(tmp_path):
    a, b, c = (train("tokenizer", tmp_path / n, "steps=2", f"seed={s}") for n, s in (("a", 0), ("b", 0), ("c", 1)))
    assert same_weights(a, b, "tokenizer.safetensors")
    assert not same_weights(a, c, "tokenizer.safetensors")


def test_a_run_folder_is_not_overwritten_nor_resumed_with_other_settings(tmp_path):
    train("tokenizer", tmp_path / "a", "steps=2")
    with pytest.raises(CopeditError, match="holds a run already; add --resume"):
        train("tokenizer", tmp_path / "a", "steps=2")
    with pytest.raises(CopeditError, match="other settings"):
        train("tokenizer", tmp_path / "a", "steps=3", resume=True)
    described = json.loads((tmp_path / "a" / "run.json").read_text())
    del described["model"]["diffusion"]["solver"]  # as written before there were solvers
    del described["settings"]["accumulate"]
    (tmp_path / "a" / "run.json").write_text(json.dumps(described))
    train("tokenizer", tmp_path / "a", f"steps={described['settings']['steps']}", resume=True)


def test_a_loss_that_is_not_finite_stops_with_step_term_and_subjects(tmp_path, monkeypatch):
    original = trainer.DenoiserTask.loss
    tokenizer = train("tokenizer", tmp_path / "vae", "steps=1")

    def broken(self, step, rng, generator):
        loss, terms = original(self, step, rng, generator)
        if step == 3 and 2 in self.drawn:
            loss = loss * float("nan")
        return loss, terms

    monkeypatch.setattr(trainer.DenoiserTask, "loss", broken)
    settings = ("steps=5", "accumulate=8", "batch_size=1", "checkpoint_every=1", f"tokenizer={tokenizer}")
    with pytest.raises(CopeditError, match=r"step 3: loss nan on phantom 2; look"):
        train("denoiser", tmp_path / "a", *settings)
    task = checkpoint.read_tensors(tmp_path / "a" / "checkpoint-00000003" / "task.safetensors")[0]
    assert all(value.isfinite().all() for value in task.values()), "nothing of that step is kept"


def test_bad_settings_are_named(tmp_path):
    for override, message in (
        ("speed=3", "--set speed=3: expected key=value"),
        ("steps=many", "'many' is not a valid int"),
        ("steps=0", "steps = 0: must be at least 1"),
        ("prompt_steps=99999", "prompt_steps = 99999: must be at least 0 and below steps = "),
        ("draws=0", "draws = 0: must be at least 1"),
        ("optimizer=sgd", "optimizer = 'sgd': must be adam or muon"),
        ("compile=maybe", "'maybe' is not a valid switch"),
        ("dtype=int8", "dtype = 'int8'"),
        ("export=int8", "export = 'int8'"),
    ):
        with pytest.raises(CopeditError, match=message):
            load_settings("tokenizer", "demo-brain", [override])
    with pytest.raises(CopeditError, match="preset 'nope' has no training settings; choose one of brain-brats"):
        load_settings("tokenizer", "nope")
    with pytest.raises(CopeditError, match=r"crop = 10: must divide by \(4, 4\) and fit"):
        train("tokenizer", tmp_path / "c", "steps=2", "crop=10")
    vae = train("tokenizer", tmp_path / "vae", "steps=1")
    for override, message in (
        ("crop=6", r"crop = 6: must divide by \(8, 8\) and fit"),
        ("whole_steps=-1", "whole_steps = -1: must be at least 0"),
        ("last_timestep=1.5", "last_timestep = 1.5: must be from 0 to 1"),
        ("whiten=-1.0", "whiten = -1.0: must be from 0 to 1"),
    ):
        with pytest.raises(CopeditError, match=message):
            train("denoiser", tmp_path / override, "steps=2", "whole_steps=0", override, f"tokenizer={vae}")
    flat = dataclasses.replace(TINY, denoiser=dataclasses.replace(TINY.denoiser, backbone="unet", width=96))
    for overrides, message in (
        (("crop=0", "whiten=0.5"), "whiten is for transformers"),
        (("crop=8",), "crop = 8: a UNet halves latents twice; divide by 16"),
    ):
        with pytest.raises(CopeditError, match=message):
            train("denoiser", tmp_path / f"unet{overrides[0]}", "steps=2", *overrides, f"tokenizer={vae}", config=flat)
    with pytest.raises(CopeditError, match="needs its tokenizer"):
        train("denoiser", tmp_path / "a", "steps=2")
    with pytest.raises(CopeditError, match="--data /nowhere is not a folder"):
        trainer.run("tokenizer", "demo-brain", tmp_path / "b", data="/nowhere")


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    vae = train("tokenizer", tmp_path / "a", "steps=1")
    other = dataclasses.replace(TINY, elements=("t1", "flair"))
    with pytest.raises(CopeditError, match="its tokenizer is not the one of preset"):
        train("denoiser", tmp_path / "b", "steps=1", f"tokenizer={vae}", config=other)


def test_learning_rate_warms_up_and_decays_to_zero():
    settings = Settings(steps=110, batch_size=1, lr=2.0, warmup=10)
    rates = [trainer.learning_rate(settings, step) for step in range(111)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == pytest.approx(2.0) and rates[10] == pytest.approx(2.0)
    assert rates[60] == pytest.approx(1.0) and rates[110] == pytest.approx(0.0, abs=1e-12)
    assert max(rates) == pytest.approx(2.0)


@pytest.mark.parametrize("consecutive", [False, True])
def test_patterns_are_uniform_in_count_then_in_subset(consecutive):
    drawn = (~draw_observed(np.random.default_rng(0), 12_000, 4, consecutive)).int().numpy()
    counts = np.bincount(drawn.sum(1), minlength=5)
    assert counts[0] == counts[4] == 0
    np.testing.assert_allclose(counts[1:4] / len(drawn), 1 / 3, atol=0.02)
    pairs = {tuple(row) for row in drawn[drawn.sum(1) == 2]}
    assert len(pairs) == (3 if consecutive else 6)
    one = drawn[drawn.sum(1) == 1].mean(0)
    np.testing.assert_allclose(one, 0.25, atol=0.03)
    if consecutive:
        edges = np.abs(np.diff(np.pad(drawn, ((0, 0), (1, 1))), axis=1)).sum(1)
        assert (edges == 2).all()


def test_codebook_starts_from_data_follows_its_vectors_and_revives_the_dead():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(500, 3, generator=generator)
    learner, codes = EMACodebook(4, 3, decay=0.5), torch.zeros(4, 3)
    learner.start(z, codes, generator)
    assert torch.cdist(codes, z).min(1).values.max() < 0.1
    codes[3] = 100.0
    learner.total[3] = 100.0
    index = torch.cdist(z, codes).argmin(1)
    before = codes[0].clone()
    perplexity = learner.update(z, index, codes, generator)
    n = int((index == 0).sum())
    torch.testing.assert_close(codes[0], (0.5 * before + 0.5 * z[index == 0].sum(0)) / (0.5 + 0.5 * n))
    assert torch.cdist(codes[3:], z).min() < 0.1, "a code without vectors must be restarted"
    share = np.bincount(index.numpy(), minlength=4) / 500
    assert perplexity == pytest.approx(np.exp(-sum(p * np.log(p) for p in share if p)), rel=1e-5)


def test_pretext_losses_are_those_of_the_heads():
    torch.manual_seed(0)
    from copedit_rt.networks.tokenizer import CoPeVAE

    vae = CoPeVAE(TINY.tokenizer, 2).eval()
    z = torch.randn(3, 2, 8, 4, 4, 2)
    observed = torch.tensor([[True, False], [False, True], [True, False]])
    each = vae.prompts_of_each(z)
    terms = pretext_losses(vae, each, observed[None])
    _, which, anchor = vae.assess(vae.prompts(z, observed))
    other = vae.assess(vae.prompts(z, ~observed))[2]
    p = which.sigmoid().double()
    missing = (~observed).double()
    bce = -(missing * p.log() + (1 - missing) * (1 - p).log()).mean()
    assert terms["position"].item() == pytest.approx(bce.item(), rel=1e-5)
    assert terms["count"].item() == 0.0, "two elements: one is missing, the only class"
    a, b = (torch.nn.functional.normalize(x.double(), dim=1) for x in (anchor, other))
    similarity = torch.exp(a @ b.T / 0.2)
    nce = -(similarity.diagonal() / similarity.sum(1)).log().mean()
    assert terms["contrast"].item() == pytest.approx(nce.item(), rel=1e-5)

    other_pattern = ~observed
    both = pretext_losses(vae, each, torch.stack((observed, other_pattern)))
    second = pretext_losses(vae, each, other_pattern[None])
    for name, value in both.items():
        assert value.item() == pytest.approx((terms[name] + second[name]).item() / 2, rel=1e-5)


def test_phantom_images_are_the_runtimes_preprocessing_and_cached(tmp_path):
    config = dataclasses.replace(ModelConfig.preset("demo-brain"), image=(32, 32, 8))
    images = phantom_images(config, 2, tmp_path / "p.npy")
    assert images.shape == (2, 4, 1, 32, 32, 8) and images.dtype == np.float16
    np.testing.assert_allclose(images[1], model_images(config, 1), atol=1e-3)
    stamp = (tmp_path / "p.npy").stat().st_mtime_ns
    phantom_images(config, 2, tmp_path / "p.npy")
    assert (tmp_path / "p.npy").stat().st_mtime_ns == stamp
    assert phantom_images(config, 1, tmp_path / "p.npy").shape[0] == 1


def test_prompts_start_at_unit_scale_even_under_autocast():
    from copedit_rt.networks.tokenizer import CoPeVAE

    torch.manual_seed(0)
    vae = CoPeVAE(TINY.tokenizer, 2).train()
    z = torch.randn(6, 2, 8, 4, 4, 2) * torch.rand(6, 2, 8, 1, 1, 1)
    flat = z.flatten(0, 1)
    before = torch.stack([encoder(flat) for encoder in vae.prompt_encoders])
    features = vae.features_of_each(z).flatten(0, 1)
    with torch.autocast("cpu", torch.bfloat16):
        scale_prompts(vae, features)
    after = torch.stack([encoder(flat) for encoder in vae.prompt_encoders])
    assert before.std(1).max() < 0.3, "the case that the scaling is for"
    torch.testing.assert_close(after.mean(1), torch.zeros(3, 16), atol=1e-3, rtol=0)
    assert ((after.std(1) - 1).abs() < 1e-2).float().mean() > 0.8  # units that hardly move are scaled less
    assert after.std(1).max() < 1.01
