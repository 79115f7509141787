"""Stage I on a tiny model."""

import dataclasses
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch
from processors import Faulty

from copedit_rt import checkpoint
from copedit_rt.errors import CopeditError
from copedit_rt.task import Task
from copedit_rt.trained import TrainedOn
from copedit_training.data.patients import read_patients
from copedit_training.data.prepared import draw_observed
from copedit_training.stages import checkpoints, prior, trainer
from copedit_training.stages.losses import pretext_losses, weigh
from copedit_training.stages.settings import TokenizerSettings
from copedit_training.stages.step import gradients, learning_rate
from copedit_training.stages.tokenizer_task import TokenizerTask
from tests.training.stages.tiny import HEART, TINY, log_of, same_weights, settings, smooth, train, weights


def test_the_last_steps_train_the_prompts_alone(tmp_path):
    train("tokenizer", tmp_path / "a", "steps=40", "prompt_steps=36", "prompt_batch=4", "lr=1e-2", config=HEART)
    before, after = (weights(tmp_path / "a" / f"checkpoint-{step:08d}") for step in (38, 40))
    moved = {name.split(".")[1] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"prompt_encoders", "heads"}
    log = log_of(tmp_path / "a")
    assert "l1" in log[3] and "l1" not in log[4]
    assert np.mean([x["loss"] for x in log[-6:]]) < 0.9 * np.mean([x["loss"] for x in log[4:10]])
    rates = [
        learning_rate(TokenizerSettings(steps=40, batch_size=1, lr=1.0, warmup=2, prompt_steps=36), s)
        for s in (3, 4, 5)
    ]
    assert rates[0] < 1 and rates[1:] == [0.5, 1.0], "a schedule of their own"
    other = TokenizerSettings(steps=40, batch_size=1, lr=1.0, warmup=2, prompt_steps=36, prompt_lr=0.1)
    assert learning_rate(other, 3) == rates[0] and learning_rate(other, 5) == pytest.approx(0.1)


def test_prompts_can_be_trained_on_crops():
    values = {"steps": 6, "prompt_steps": 2, "prompt_batch": 3, "prompt_crop": 8, "batch_size": 1, "lr": 1e-3}
    images = smooth(HEART, 4)
    task = TokenizerTask(HEART, TokenizerSettings(dtype="float32", **values), images)
    assert task.draw(3, 0).images.shape[-3:] == HEART.image
    crops = task.draw(4, 0).images
    assert crops.shape == (3, 3, 1, 8, 8, 4)
    windows = np.lib.stride_tricks.sliding_window_view(images, (8, 8), axis=(3, 4))
    found = (np.moveaxis(windows, (3, 4), (1, 2)) == crops[0].numpy().transpose(0, 1, 4, 2, 3)).all((3, 4, 5, 6, 7))
    assert found.any(), "a window of a training image, the same in every slab"
    task.loss(task.draw(5, 0))[0].backward()
    with pytest.raises(CopeditError, match="crop = 6: must divide by"):
        TokenizerTask(HEART, TokenizerSettings(**values | {"prompt_crop": 6}), images)


def test_quantisation_can_start_later_with_codes_from_the_data(tmp_path):
    train("tokenizer", tmp_path / "a", "steps=8", "quantise_from=5", "lr=5e-3")
    log = log_of(tmp_path / "a")
    assert ["commitment" in x for x in log] == ["perplexity" in x for x in log] == [False] * 5 + [True] * 3
    assert log[5]["commitment"] < 0.1 * log[5]["l1"], "the codes are vectors of that batch"


def test_the_read_out_fits_the_linear_layers_to_whole_images(tmp_path):
    settings = ("steps=6", "prompt_steps=2", "prompt_lr=1e-3")
    plain = train("tokenizer", tmp_path / "a", *settings, config=HEART)
    fitted = train("tokenizer", tmp_path / "b", *settings, "readout_steps=300", config=HEART)
    before, after = (weights(f, "tokenizer.safetensors") for f in (plain, fitted))
    moved = {".".join(name.split(".")[::2][:2]) for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"prompt_encoders.mlp", "heads.1"}, "neither convolutions nor the autoencoder"

    images = torch.from_numpy(smooth(HEART, 4))
    observed = draw_observed(np.random.default_rng(1), 40, 3, Task.HEART).unflatten(0, (10, 4))

    def loss(folder):
        vae = checkpoint.load_tokenizer(folder)[1]
        return float(weigh(pretext_losses(vae, vae.prompts_of_each(vae.encode(images)), observed), 1.0))

    with torch.no_grad():
        assert loss(fitted) < 0.5 * loss(plain)


@pytest.fixture
def real(tmp_path):
    """Three patients: T1 is bright, T2 dark, and one has no T2 at all."""
    rng = np.random.default_rng(0)
    for name, elements in (("p1", {"t1": 0.9, "t2": 0.2}), ("p2", {"t1": 0.9, "t2": 0.2}), ("p3", {"t1": 0.9})):
        (tmp_path / "real" / name).mkdir(parents=True)
        for element, level in elements.items():
            data = np.clip(level + 0.05 * rng.standard_normal((16, 16, 8)), 0.01, 1).astype(np.float32)
            data[:2], data[2, 2, 2] = 0, 1
            image = nib.Nifti1Image(data, np.diag([12, 12, 20, 1.0]))
            nib.save(image, tmp_path / "real" / name / f"{name}_{element}.nii")
    return tmp_path / "real"


def test_patients_teach_the_heads_what_simulation_shows_otherwise(tmp_path, real):
    """Simulated T1 and T2 are noise."""
    settings = ("steps=6", "prompt_steps=2", "prompt_lr=1e-3", "readout_steps=400")
    plain = train("tokenizer", tmp_path / "plain", *settings)
    taught = train("tokenizer", tmp_path / "taught", *settings, f"patients={real}", "patients_share=0.5")
    patients = read_patients(real, TINY)[:2]

    def right(folder):
        vae = checkpoint.load_tokenizer(folder)[1]
        images = torch.from_numpy(np.stack([p.images for p in patients]))[:, :, None]
        with torch.no_grad():
            which = vae.assess(vae.prompts_of_each(vae.encode(images)).flatten(0, 1))[1]
        return ((which > 0).numpy() == np.tile([[False, True], [True, False]], (2, 1))).all(1).mean()

    assert right(taught) == 1 > right(plain)
    assert TrainedOn.load(taught).words == "simulated phantoms and 3 patients"


def test_heads_that_are_too_sure_are_tempered():
    task = TokenizerTask(TINY, TokenizerSettings(steps=4, batch_size=1, lr=1e-3, dtype="float32", draws=20))
    features = torch.randn((60, 2, 3, TINY.tokenizer.prompt_channels[1]), generator=torch.Generator().manual_seed(0))
    weights = [head[-1].weight for head in task.tokenizer.heads]
    patterns = task.patterns(np.random.default_rng(1), 60)

    def position() -> float:
        with torch.no_grad():
            return float(task.judge(features, patterns)["position"])

    with torch.no_grad():
        weights[1].mul_(60)  # sure, and of features that say nothing
        before, contrast, sure = weights[1].clone(), weights[2].clone(), position()
        task.temper(features)
        ratio = (before / weights[1]).flatten()
        assert ratio.min() > 2 and torch.allclose(ratio, ratio[0]), "divided by one temperature"
        assert position() < 0.5 * sure and torch.equal(weights[2], contrast)


def test_the_adversary_is_trained_beside_and_resumed(tmp_path):
    extra = ("steps=6", "adversarial_from=2", "crop=0", "lr=1e-3")
    whole = train("tokenizer", tmp_path / "whole", *extra, config=HEART)
    log = log_of(tmp_path / "whole")
    assert ["adversarial" in x for x in log] == ["discriminator" in x for x in log] == [False] * 2 + [True] * 4
    folders = (tmp_path / "whole" / f"checkpoint-{step:08d}" for step in (4, 6))
    first, second = (weights(folder) for folder in folders)
    names = [name for name in first if name.startswith("adversary.")]
    assert names and all(not torch.equal(first[name], second[name]) for name in names if name.endswith("weight"))
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-00000006")
    resumed = train("tokenizer", tmp_path / "resumed", *extra, config=HEART, resume=True)
    assert same_weights(whole, resumed, "tokenizer.safetensors")
    assert not any("adversary" in name for name in weights(whole, "tokenizer.safetensors"))


def test_a_bfloat16_step_is_right_on_a_processor_that_is_not(perceptual_weights):
    """Slabs of 8 slices are halved three times, the discriminator of 24 voxels and the perceptual network end in an
    extent of 1. Terms of stage I and gradients against float32: on the way there, and once more on the way back, 20
    layers each round weights and result."""
    bound = 20 * 2 * 2**-8
    config = dataclasses.replace(
        HEART,
        image=(24, 24, 8),
        tokenizer=dataclasses.replace(HEART.tokenizer, channels=(8, 8, 8), strides=((2, 2, 2),) * 3),
    )
    images = np.random.default_rng(0).random((2, 3, 1, *config.image), np.float32).astype(np.float16)
    base = TokenizerSettings(4, 1, 1e-3, quantise_from=1, adversarial_from=0, accumulate=2)  # codes would jump
    base = dataclasses.replace(base, perceptual=str(perceptual_weights), device="cpu")
    found = {}
    for dtype in ("float32", "bfloat16"):
        torch.manual_seed(0)
        task = TokenizerTask(config, dataclasses.replace(base, dtype=dtype)).on(images)
        with Faulty() as processor:
            terms, _ = gradients(task, task.module, [task.draw(0, part) for part in range(2)])
        assert processor.met == 0
        parts = task.tokenizer.encoder, task.tokenizer.decoder, task.tokenizer.prompt_encoders, task.adversary
        made = [torch.cat([p.grad.flatten() for p in x.parameters() if p.grad is not None]) for x in parts]
        found[dtype] = terms, made
    (exact, wide), (rounded, narrow) = found.values()
    assert {"l1", "adversarial", "discriminator", "perceptual", "count"} <= rounded.keys() == exact.keys()
    for name, value in exact.items():
        assert rounded[name] == pytest.approx(value, rel=bound), name
    for a, b in zip(narrow, wide, strict=True):
        assert a.isfinite().all() and (a - b).norm() < 2 * bound * b.norm()


def test_patients_join_the_read_out_with_a_quarter_of_their_share(tmp_path, real, monkeypatch):
    drawn = []
    fit_heads = TokenizerTask.fit_heads
    monkeypatch.setattr(TokenizerTask, "fit_heads", lambda self, *rest: drawn.append(rest) or fit_heads(self, *rest))
    shares = f"patients={real}", "patients_share=0.4"
    train("tokenizer", tmp_path / "run", "steps=2", "prompt_steps=1", "readout_steps=2", *shares)
    features, there, chance = drawn[0]
    assert len(features) == len(there) == len(chance)
    np.testing.assert_allclose([chance[-3 * prior.VIEWS :].sum(), chance.sum()], [0.1, 1])


@pytest.mark.parametrize(("subjects", "out"), [(24, 0), (26, 2), (27, 2), (30, 3)])
def test_whole_subjects_are_left_out_of_the_read_out(subjects, out, monkeypatch):
    images = np.arange(subjects, dtype=np.float32)[:, None, None, None, None, None] * np.ones((1, 2, 1, 4, 2, 2))
    task, seen = TokenizerTask(TINY, settings("tokenizer"), images), []
    task.pooled = lambda x: x[:, :, 0, 0, 0, :1]
    task.fit_heads = task.temper = lambda features, *rest: seen.append(features[:, 0, 0].int().tolist())
    task.read_out()
    views = [subject for subject in range(subjects) for _ in range(2)]
    assert seen == [views[2 * out :], views[: 2 * out]][: 1 + (out > 0)]


def test_shares_are_checked(tmp_path):
    config = dataclasses.replace(TINY, denoiser=dataclasses.replace(TINY.denoiser, prior=True))
    with pytest.raises(CopeditError, match=r"patients = 'P': patients join .*, but there is neither; set"):
        TokenizerTask(TINY, settings("tokenizer", "patients=P"))
    with pytest.raises(CopeditError, match="phantoms_share and patients_share: together"):
        train("tokenizer", tmp_path / "no", "prior_steps=2", "phantoms_share=0.8", config=config)
    with pytest.raises(CopeditError, match="phantoms_share: phantoms join the prior of a brain model"):
        train("tokenizer", tmp_path / "no", "readout_steps=2", "phantoms_share=0.1")


def test_the_prior_alone_is_that_of_stage_one(tmp_path, real, monkeypatch):
    config = dataclasses.replace(TINY, denoiser=dataclasses.replace(TINY.denoiser, prior=True))
    monkeypatch.setattr(prior, "PHANTOMS", 2)
    mixed = ("subjects=4", "prior_steps=30", f"patients={real}", "patients_share=0.4", "phantoms_share=0.2")
    first = train("tokenizer", tmp_path / "first", "steps=2", *mixed, config=config)

    def alone(name, *overrides, resume=False):
        output = tmp_path / name
        return trainer.fit_prior_alone("brain-2mm", output, "phantom", str(first), overrides, resume, config)

    again = alone("again", *mixed)
    assert same_weights(again, first, "prior.safetensors")
    assert TrainedOn.load(again).words == "simulated phantoms and 3 patients"
    assert not same_weights(alone("without", *mixed[:2]), first, "prior.safetensors")
    assert same_weights(alone("again", *mixed, resume=True), first, "prior.safetensors")
    with pytest.raises(CopeditError, match="holds a run already; add --resume"):
        alone("again", *mixed)
    with pytest.raises(CopeditError, match="other settings"):
        alone("again", *mixed[:2], resume=True)
    with pytest.raises(CopeditError, match="prior_steps = 0: tiny has a prior that is fitted in steps"):
        alone("no", "prior_steps=0")
    assert checkpoints.finished(tmp_path / "first", "tokenizer", 2, prior=True)
    (first / "prior.safetensors").rename(first / "gone")
    assert not checkpoints.finished(tmp_path / "first", "tokenizer", 2, prior=True)
    (first / "gone").rename(first / "prior.safetensors")
    denoiser = tmp_path / "denoiser", "steps=1", f"tokenizer={first}"
    train("denoiser", *denoiser, config=config)
    shutil.copy(tmp_path / "without" / "model" / "prior.safetensors", first)
    with pytest.raises(CopeditError, match=r"started with another prior \(.*run\.json has its SHA-256\)"):
        train("denoiser", *denoiser, resume=True, config=config)


@pytest.mark.parametrize("stage", ["tokenizer", "denoiser", "prior"])
def test_what_a_run_has_read_is_not_needed_at_its_end(tmp_path, real, stage, monkeypatch):
    """The folders of the patients and of the tokenizer are gone before the fit ends."""
    vae = train("tokenizer", tmp_path / "vae", "steps=1")
    owner = prior if stage == "prior" else trainer
    fit = owner.fit

    def gone(*given):
        for folder in (vae, real):
            shutil.rmtree(folder)
        return fit(*given)

    monkeypatch.setattr(owner, "fit", gone)
    patients, output = f"patients={real}", tmp_path / "run"
    if stage == "prior":
        config = dataclasses.replace(TINY, denoiser=dataclasses.replace(TINY.denoiser, prior=True))
        told = ("subjects=4", "prior_steps=2", "phantoms_share=0", patients)
        model = trainer.fit_prior_alone("brain-2mm", output, "phantom", str(vae), told, config=config)
    else:
        told = ("readout_steps=1", patients) if stage == "tokenizer" else (f"tokenizer={vae}",)
        model = train(stage, output, "steps=1", *told)
    words = "simulated phantoms" if stage == "denoiser" else "simulated phantoms and 3 patients"
    assert TrainedOn.load(model).words == words


@pytest.mark.parametrize(("has", "steps"), [(True, 0), (False, 5)])
def test_a_prior_takes_steps_and_steps_take_a_prior(has, steps):
    config = dataclasses.replace(TINY, denoiser=dataclasses.replace(TINY.denoiser, prior=has))
    with pytest.raises(CopeditError, match=rf"prior_steps = {steps}: .* has {'a' if has else 'no'} prior"):
        TokenizerTask(config, settings("tokenizer", f"prior_steps={steps}"))
