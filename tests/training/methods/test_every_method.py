"""What every method of the paper's tables promises, of brains with three modalities and of hearts."""

import dataclasses
import json
import shutil

import pytest
import torch

from copedit_rt.errors import CopeditError
from copedit_training.evaluation.baselines import mean_of_observed
from copedit_training.methods import METHODS, method
from copedit_training.methods.base import load_method
from copedit_training.stages import trainer
from copedit_training.stages.denoiser_task import DenoiserTask
from copedit_training.stages.settings import load_settings
from tests.training.methods.small import (
    CONFIGS,
    OPTIONS,
    OVERFIT,
    noise,
    settings,
    smooth,
    steps,
    stir,
    task,
    tokenizer,
    train,
)
from tests.training.stages.tiny import SMALL, same_weights

EVERY = [(name, where) for name in OPTIONS for where in CONFIGS]


@pytest.mark.parametrize(("name", "where"), EVERY)
def test_synthesis_keeps_what_is_observed_and_reads_nothing_else(name, where):
    config = CONFIGS[where]
    made = task(name, config)
    stir(made.used)
    images = torch.from_numpy(smooth(config, 2)).float()
    observed = torch.tensor([[True, False, False], [False, True, True]])
    out = made.synthesise(images, observed, noise)
    assert out.shape == images.shape and torch.equal(out[observed], images[observed])
    assert out.min() >= 0 and out.max() <= 1 and not torch.equal(out[~observed], images[~observed])

    poisoned = images.clone()
    poisoned[~observed] = torch.nan
    assert torch.equal(made.synthesise(poisoned, observed, noise), out), "what is missing is not read"
    other = images.clone()
    other[0, 0] = 1 - other[0, 0]
    assert not torch.equal(made.synthesise(other, observed, noise)[0, 1], out[0, 1]), "what is observed is"

    alone = [made.synthesise(images[i : i + 1], observed[i : i + 1], noise) for i in (0, 1)]
    torch.testing.assert_close(torch.cat(alone), out, rtol=0, atol=2e-4)  # of noise, enlarged by sampling


@pytest.mark.parametrize(("name", "where"), EVERY)
def test_a_resumed_run_has_the_same_bits_and_its_folder_the_same_method(name, where, tmp_path, monkeypatch):
    config = CONFIGS[where]
    whole = train(name, tmp_path / "a", config)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "model")
    shutil.rmtree(tmp_path / "b" / "checkpoint-00000004")
    again = train(name, tmp_path / "b", config, resume=True)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "fit", lambda *_: pytest.fail("a finished run was finished again"))
        assert train(name, tmp_path / "b", config, resume=True) == again
    for file in ("task.safetensors", "optimizer.safetensors"):
        assert same_weights(*(tmp_path / run / "checkpoint-00000004" for run in "ab"), file), file
    assert same_weights(whole, again, "method.safetensors")
    log = [json.loads(line) for line in (tmp_path / "b" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [0, 1, 2, 3] and all(line["seconds"] > 0 for line in log)
    assert json.loads((tmp_path / "a" / "run.json").read_text())["method"] == name

    images, observed = torch.from_numpy(smooth(config, 1)).float(), torch.tensor([[False, True, False]])
    folders = (whole, tmp_path / "b")  # a model's, and a run's
    first, second = (load_method(folder, "cpu").synthesise(images, observed, noise) for folder in folders)
    assert torch.equal(first, second) and type(load_method(whole)) is method(name)


@pytest.mark.parametrize("name", OPTIONS)
def test_settings_that_a_method_does_not_go_by_are_refused(name, tmp_path):
    idle = [key for key in ("slices", "sampler_steps") if key not in OPTIONS[name]]
    for key in idle:
        with pytest.raises(CopeditError, match=f"--set {key}=4: .* does not go by it; leave it out"):
            train(name, tmp_path / "run", CONFIGS["brain"], f"{key}=4")
    assert len(idle) == (2 if name == "hyper-gae" else 0 if name == "m2dn" else 1)


@pytest.mark.parametrize("name", OPTIONS)
def test_one_subject_is_learnt_beyond_the_mean_of_the_observed(name):
    where, size, options = OVERFIT[name]
    config = dataclasses.replace(CONFIGS[where], image=size)
    images = smooth(config, 1)
    made = task(name, config, *options.split(), images=images)
    steps(made, made.settings.steps)
    truth = torch.from_numpy(images).float()
    for missing in (0, 2):
        observed = torch.ones(1, 3, dtype=torch.bool)
        observed[0, missing] = False
        found = made.synthesise(truth, observed, noise)[0, missing]
        names = {str(i): images[0, i].astype("float32") for i in range(3) if i != missing}
        plain = torch.from_numpy(mean_of_observed(names))
        error, before = ((x - truth[0, missing]).square().mean().item() for x in (found, plain))
        assert error < 0.9 * before, (missing, error, before)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_same_subjects_and_patterns_as_the_denoiser_draws(name):
    config = CONFIGS["brain"]
    made = task(name, config, "steps=10", "dtype=float32")
    told = load_settings("denoiser", "demo-brain", (*SMALL["denoiser"], "crop=0"))
    denoiser = DenoiserTask(config, told, smooth(config, 4), tokenizer(config))
    for step in (8, 9):  # MMGAN's last phase has all patterns
        ours, theirs = made.draw(step, 0), denoiser.draw(step, 0)
        assert (ours.subjects == theirs.subjects).all()
        if type(made).patterns is type(made).__mro__[1].patterns:
            assert torch.equal(ours.observed, theirs.observed)
        if made.noised:
            assert torch.equal(ours.timesteps, theirs.timesteps)
        if made.noised and made.space == "latent":
            assert torch.equal(ours.noise, theirs.noise) and torch.equal(ours.latents, theirs.latents)


@pytest.mark.parametrize("name", OPTIONS)
def test_validation_is_of_every_number_missing(name):
    made = task(name, CONFIGS["heart"])
    terms, picture = made.validate(smooth(CONFIGS["heart"], 2, first=5))
    assert set(terms) == {f"val_{what}_{n}" for what in ("psnr", "ssim") for n in (1, 2)} and picture.ndim == 2
    assert made.validate(smooth(CONFIGS["heart"], 2, first=5))[0] == terms


@pytest.mark.parametrize("name", OPTIONS)
def test_every_number_of_a_method_has_a_range(name):
    sound = settings(name, CONFIGS["brain"])
    for key, value in dataclasses.asdict(sound).items():
        if not isinstance(value, (bool, str)):
            with pytest.raises(CopeditError, match=f"^{key} = -2: must be "):
                dataclasses.replace(sound, **{key: -2})


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("preset", ["brain-brats", "brain-ixi", "cardiac", "demo-brain", "demo-cardiac"])
def test_every_preset_has_settings_of_every_method(name, preset):
    told = load_settings(name, preset, kind=method(name).kind)
    quick = load_settings(name, preset, quick=True, kind=method(name).kind)
    assert told.stage == name and (quick.steps, quick.subjects) == (4, 4) and quick.ema <= told.ema


def test_what_is_no_method_or_not_for_one_is_refused(tmp_path):
    config = CONFIGS["brain"]
    with pytest.raises(CopeditError, match=f"method 'gan' is unknown; choose one of {', '.join(METHODS)}"):
        method("gan")
    for override, message in (
        ("crop=8", "crop = 8: MM-GAN is trained without; leave it at 0"),
        ("augment=true", "augment = True: MM-GAN is trained without"),
        ("guidance=mask", "guidance = 'mask': there is no place for it in MM-GAN"),
        ("guidance=some", "guidance = 'some': must be full or mask or none"),
        ("tokenizer=demo-brain", "--set tokenizer=demo-brain: MM-GAN does not go by it; leave it out"),
        ("speed=1", "--set speed=1: expected key=value with a key among steps, "),
    ):
        with pytest.raises(CopeditError, match=message):
            train("mmgan", tmp_path / "a", config, override)
    assert not (tmp_path / "a").exists()
    with pytest.raises(CopeditError, match="no trained method there"):
        load_method(tmp_path)
    with pytest.raises(CopeditError, match="preset 'heart-3mm' has no settings of mmgan; choose one of brain-brats, "):
        load_settings("mmgan", "heart-3mm", kind=method("mmgan").kind)
