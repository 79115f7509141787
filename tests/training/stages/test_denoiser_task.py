"""Stage II on a tiny model."""

import dataclasses

import numpy as np
import pytest
import torch

from copedit_rt import checkpoint
from copedit_rt.errors import CopeditError
from copedit_rt.networks.denoiser import MDiT3D
from copedit_rt.networks.tokenizer import CoPeVAE
from copedit_training.stages.denoiser_task import CROP_RIM, RELATIVE_FLOOR, WHITEN_FLOOR, DenoiserTask
from copedit_training.stages.prior import fit_prior, fit_slice_prior, stack_of
from tests.training.stages.tiny import HEART, TINY, settings, smooth, train, weights


def denoiser_task(tmp_path, *overrides, images=None):
    vae = checkpoint.load_tokenizer(train("tokenizer", tmp_path / "vae", "steps=2"))[1]
    images = smooth(TINY, 4) if images is None else images
    return DenoiserTask(TINY, settings("denoiser", "crop=0", *overrides), images, vae, tmp_path / "latents.npy")


def test_the_input_layer_can_start_with_all_components_equally_large(tmp_path):
    torch.manual_seed(0)
    task = denoiser_task(tmp_path, "whiten=0.5")
    z, _ = task._encoded(torch.from_numpy(task.images).float())  # the kept ones are rounded
    tokens = task.denoiser.patchify(z).flatten(0, 2)
    variance = torch.linalg.eigvalsh(tokens.mT @ tokens / len(tokens)).flip(0)
    embedded = tokens @ task.denoiser.embed.weight.detach().mT
    found = torch.linalg.eigvalsh(embedded.mT @ embedded / len(embedded)).flip(0)
    raised = variance[: len(found)] > WHITEN_FLOOR * variance.sum()
    assert raised.sum() > 5 and torch.allclose(found[raised], found[0], rtol=1e-3)
    assert found.sum() == pytest.approx(len(found), rel=1e-3), "as large as the position embedding beside it"
    assert torch.equal(task.average.embed.weight, task.denoiser.embed.weight)
    assert variance[0] > 20 * variance[raised.nonzero()[-1]], "which they are not by themselves"


def test_crops_are_drawn_where_something_happens(tmp_path):
    images = smooth(TINY, 4)
    images[:, :, :, 8:] = 0.0  # which the encoder sees across the border
    task = denoiser_task(tmp_path, "crop=8", images=images)
    rng = np.random.default_rng(0)
    row = np.array([0])
    drawn = [task._corners(row, rng) for _ in range(200)]
    corners = np.array([corner[0].tolist() for corner in drawn])
    assert corners.min() == 0 and corners.max() == 1 and task.chances.shape == (8, 4)
    chances = task.chances[0].reshape(2, 2)
    assert chances[1].sum() < 0.4 and chances.sum() == pytest.approx(1)
    assert (corners == 1).mean(0) == pytest.approx([chances[1].sum(), chances[:, 1].sum()], abs=0.1)
    for corner in drawn[:5]:
        x, y = (2 * int(n) for n in corner[0])
        assert torch.equal(task._latents(row, corner)[0], task.latents[0, ..., x : x + 2, y : y + 2, :].float())


def test_the_last_steps_see_whole_images_and_as_many_tokens(tmp_path, monkeypatch):
    vae = train("tokenizer", tmp_path / "vae", "steps=1")
    seen, original = [], MDiT3D.forward

    def forward(self, z, t, prompts, observed, corner=None, prior=None):
        seen.append((tuple(z.shape[::3][:1] + z.shape[3:]), corner is not None))
        return original(self, z, t, prompts, observed, corner, prior)

    monkeypatch.setattr(MDiT3D, "forward", forward)
    train("denoiser", tmp_path / "a", "steps=3", "batch_size=8", "crop=8", "whole_steps=1", f"tokenizer={vae}")
    assert seen == [((8, 2, 2, 2), True), ((8, 2, 2, 2), True), ((2, 4, 4, 2), False)]


def test_a_share_of_the_samples_is_drawn_at_the_last_timestep(tmp_path):
    task = denoiser_task(tmp_path, "last_timestep=0.5", "batch_size=8")
    drawn = torch.cat([task.draw(step, 0).timesteps for step in range(40)])
    last = (drawn == len(task.levels) - 1).float().mean()
    assert task.levels[-1] == 0 < task.levels[-2] and denoiser_task(tmp_path / "b").levels[-1] > 0
    assert 0.4 < last < 0.6 and drawn.unique().numel() > 50


def test_observed_elements_can_weigh_less(tmp_path):
    whole, none = (denoiser_task(tmp_path / str(w), f"observed_weight={w}", "batch_size=4") for w in (1, 0))
    none.denoiser.load_state_dict(whole.denoiser.state_dict())
    (first, terms), (second, same) = (task.loss(task.draw(0, 0)) for task in (whole, none))
    assert same == terms and terms["mse"] == pytest.approx(first.item()) != pytest.approx(second.item())
    assert second.item() == pytest.approx(terms["mse_missing"])


def test_augmented_latents_are_computed_anew(tmp_path):
    task = denoiser_task(tmp_path, "augment=true", "batch_size=4")
    assert not (tmp_path / "latents.npy").exists()
    encoded, encode = [], task._encoded
    task._encoded = lambda images: encoded.append(images) or encode(images)
    losses = [task.loss(task.draw(step, 0))[0].item() for step in (0, 1, 0)]
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
    images, vae = smooth(config, 4), CoPeVAE(config.tokenizer, len(config.elements))
    task = DenoiserTask(config, settings("denoiser", f"crop={crop}", "image_weight=0.1", "batch_size=3"), images, vae)
    batch = task.draw(0, 0)
    z0, observed = batch.latents, batch.observed
    found = task._image_error(z0, z0, batch, None)

    views = torch.from_numpy(images).float()
    if config.task == "brain":
        views = torch.stack((views, views.flip(3)), 1).flatten(0, 1)
    rows = [int((task.latents.float() - z).abs().mean((1, 2, 3, 4, 5)).argmin()) for z in z0] if not crop else None
    truth = batch.images if crop else views[rows]
    expected = (vae.images(z0, config.task == "cardiac") - truth).square()
    if crop:
        expected = expected[..., CROP_RIM:-CROP_RIM, CROP_RIM:-CROP_RIM, :]
    shown = ~observed
    if config.task == "brain":  # of two modalities, one at a time
        assert (shown.sum(1) == 1).all()
    assert torch.allclose(found, expected[shown].mean((1, 2, 3, 4)), rtol=1e-4)


def test_with_the_image_term_the_decoder_learns_what_is_synthesised(tmp_path):
    vae = train("tokenizer", tmp_path / "vae", "steps=4")
    found = train("denoiser", tmp_path / "a", "steps=3", "crop=0", "image_weight=0.1", f"tokenizer={vae}")
    before, after = (weights(f, "tokenizer.safetensors") for f in (vae, found))
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"decoder"}, "latents and prompts stay what they were"

    task = denoiser_task(tmp_path / "b", "image_weight=0.1", "batch_size=4")
    with torch.no_grad():  # an untrained denoiser's output is zero whatever comes in
        task.denoiser.final.weight.normal_(0, 0.1)
    gradients = []
    for weight in (0.1, 0.2):
        task.settings = dataclasses.replace(task.settings, image_weight=weight)
        task.module.zero_grad()
        loss, terms = task.loss(task.draw(0, 0))
        loss.backward()
        gradients.append([p.grad.clone() for p in (task.denoiser.final.weight, task.decoder.inp.weight)])
    (final, decoder), (final2, decoder2) = gradients
    assert torch.allclose(decoder2, 2 * decoder, rtol=1e-4) and decoder.abs().sum() > 0
    assert not torch.allclose(final2, final, rtol=1e-2) and terms["image_mse"] > 0
    with pytest.raises(CopeditError, match="crop = 8: image_weight needs more than 12 voxels"):
        denoiser_task(tmp_path / "c", "image_weight=0.1", "crop=8")


def test_latents_are_kept_for_as_long_as_the_tokenizer_is_the_same(tmp_path, monkeypatch):
    first = denoiser_task(tmp_path)
    vae = first.tokenizer
    encoded, encode = [], type(vae).encode
    monkeypatch.setattr(type(vae), "encode", lambda self, x, *a: encoded.append(1) or encode(self, x, *a))
    args = (first.config, first.settings, smooth(TINY, 4))
    again = DenoiserTask(*args, vae, tmp_path / "latents.npy")
    assert not encoded and torch.equal(again.latents, first.latents) and torch.equal(again.prompts, first.prompts)
    with torch.no_grad():
        vae.latent_mean += 1
    other = DenoiserTask(*args, vae, tmp_path / "latents.npy")
    assert len(encoded) == 8 and not torch.equal(other.latents, first.latents)
    (tmp_path / "prompts.safetensors").unlink()  # as a run leaves it that was killed in between
    after = DenoiserTask(*args, vae, tmp_path / "latents.npy")
    assert (
        len(encoded) == 16 and torch.equal(after.latents, other.latents) and torch.equal(after.prompts, other.prompts)
    )


def test_latents_of_a_stopped_run_are_not_computed_again(tmp_path, monkeypatch):
    first = denoiser_task(tmp_path / "whole")
    vae, encode = first.tokenizer, type(first.tokenizer).encode
    encoded, path = [], tmp_path / "latents.npy"

    def stopped(self, x, *rest):
        if len(encoded) == 3:
            raise KeyboardInterrupt
        encoded.append(1)
        return encode(self, x, *rest)

    args = (first.config, first.settings, smooth(TINY, 4))
    monkeypatch.setattr(type(vae), "encode", stopped)
    with pytest.raises(KeyboardInterrupt):
        DenoiserTask(*args, vae, path)
    assert not path.exists()
    monkeypatch.setattr(type(vae), "encode", lambda self, x, *a: encoded.append(1) or encode(self, x, *a))
    again = DenoiserTask(*args, vae, path)
    assert len(encoded) == 8 and torch.equal(again.latents, first.latents) and torch.equal(again.prompts, first.prompts)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["latents.npy", "prompts.safetensors", "whole"]

    path.unlink()
    encoded.clear()
    monkeypatch.setattr(type(vae), "encode", stopped)
    with pytest.raises(KeyboardInterrupt):
        DenoiserTask(*args, vae, path)
    monkeypatch.setattr(type(vae), "encode", lambda self, x, *a: encoded.append(1) or encode(self, x, *a))
    with torch.no_grad():
        vae.latent_mean += 1
    other = DenoiserTask(*args, vae, path)
    assert len(encoded) == 3 + 8, "what another tokenizer made is not mixed in"
    assert torch.allclose(
        other.latents.float(), again.latents.float() - 1 / vae.latent_std.view(1, 1, -1, 1, 1, 1), atol=0.01
    )


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    vae = train("tokenizer", tmp_path / "a", "steps=1")
    other = dataclasses.replace(TINY, elements=("t1", "flair"))
    with pytest.raises(CopeditError, match="its tokenizer is not the one of preset"):
        train("denoiser", tmp_path / "b", "steps=1", f"tokenizer={vae}", config=other)


def test_what_does_not_fit_the_model_is_refused(tmp_path):
    with pytest.raises(CopeditError, match=r"crop = 10: must divide by \(4, 4\) and fit"):
        train("tokenizer", tmp_path / "c", "steps=2", "crop=10")
    vae = train("tokenizer", tmp_path / "vae", "steps=1")
    with pytest.raises(CopeditError, match=r"crop = 6: must divide by \(8, 8\) and fit"):
        train("denoiser", tmp_path / "d", "steps=2", "crop=6", f"tokenizer={vae}")
    flat = dataclasses.replace(TINY, denoiser=dataclasses.replace(TINY.denoiser, backbone="unet", width=96))
    for overrides, message in (
        (("crop=0", "whiten=0.5"), "whiten is for transformers"),
        (("crop=8",), "crop = 8: a UNet halves latents twice; divide by 16"),
    ):
        with pytest.raises(CopeditError, match=message):
            train("denoiser", tmp_path / f"unet{overrides[0]}", "steps=2", *overrides, f"tokenizer={vae}", config=flat)


PRIOR_HEART = dataclasses.replace(HEART, denoiser=dataclasses.replace(HEART.denoiser, prior=True))


def heart_task(*overrides):
    torch.manual_seed(0)
    vae, images = CoPeVAE(HEART.tokenizer, len(HEART.elements)).eval(), smooth(HEART, 4)
    made = settings("denoiser", "batch_size=4", "observed_weight=0", "relative=true", *overrides)
    return DenoiserTask(PRIOR_HEART, made, images, vae, prior=fit_slice_prior(images)), images


@pytest.mark.parametrize("crop", [0, 8])
def test_a_heart_may_lack_any_run_and_its_error_is_relative_to_the_fills(crop):
    task, images = heart_task(f"crop={crop}")
    gaps = set()
    for step in range(6):
        batch = task.draw(step, 0)
        assert batch.fill.shape == batch.images.shape and batch.observed.any(1).all() and (~batch.observed).any(1).all()
        differs = (batch.fill != batch.images).any(-1).any(-2).any(-2).any(2)
        gaps |= {(~row).sum().item() for row in differs}
        with torch.no_grad():
            loss, terms = task.loss(batch)  # a fresh network corrects nothing
            z0, prior = task._encode_alone(batch.images), task._encode_alone(batch.fill)
        error = (prior - z0).square().mean((2, 3, 4, 5))[~batch.observed]
        assert loss.item() == pytest.approx((error / (error + RELATIVE_FLOOR)).mean().item(), rel=1e-4)
        assert terms["mse_missing"] == pytest.approx(error.mean().item(), rel=1e-4)
    assert len(gaps) > 1 and stack_of(images[0]).shape[-1] == 6
    with pytest.raises(CopeditError, match="augment: the prior of tiny-heart takes hearts as they are; leave it false"):
        heart_task("crop=0", "augment=true")


def brain_task(crop=0):
    torch.manual_seed(0)
    with_prior = dataclasses.replace(TINY, denoiser=dataclasses.replace(TINY.denoiser, prior=True))
    vae, images = CoPeVAE(TINY.tokenizer, len(TINY.elements)).eval(), smooth(TINY, 4)
    made = settings("denoiser", "batch_size=4", f"crop={crop}")
    return DenoiserTask(with_prior, made, images, vae, prior=fit_prior(images, steps=20)), images


def test_prompts_are_computed_once_for_variants_with_and_without_a_prior(tmp_path, monkeypatch):
    task, images = brain_task()
    made, computed = [], DenoiserTask._computed
    monkeypatch.setattr(DenoiserTask, "_computed", lambda self, *rest: made.append(1) or computed(self, *rest))

    def prompts(config, prior, where="a"):
        cache = tmp_path / where / "latents.npy"
        return DenoiserTask(config, task.settings, images, task.tokenizer, cache, prior).prompts

    both, own, again = prompts(TINY, None), prompts(task.config, task.prior), prompts(TINY, None)
    assert len(made) == 1 and torch.equal(both, again) and torch.equal(own, both[::2])
    assert torch.equal(prompts(task.config, task.prior, "b"), own) and len(made) == 2


def test_a_crop_is_filled_as_in_the_whole_head():
    task, images = brain_task(crop=8)
    corners = set()
    for step in range(4):
        batch = task.draw(step, 0)
        assert batch.fill.shape == batch.images.shape and batch.images.shape[-3:-1] == (8, 8)
        for subject, observed, (i, j), crop, fill in zip(
            batch.subjects, batch.observed.numpy(), batch.corner.tolist(), batch.images, batch.fill, strict=True
        ):
            corners.add((i, j))
            within = slice(8 * i, 8 * i + 8), slice(8 * j, 8 * j + 8), slice(None)
            whole = torch.from_numpy(images[subject]).float()
            head = next(x for x in (whole, whole.flip(2)) if torch.equal(x[..., *within], crop))
            expected = np.zeros_like(crop)
            expected[~observed] = task.prior.fill(head.numpy(), observed)[..., *within]
            np.testing.assert_allclose(fill, expected, atol=1e-5)  # products of other shapes round otherwise
    assert len(corners) > 1


@pytest.mark.parametrize("begun", [brain_task, lambda: heart_task("crop=0")], ids=["brain", "heart"])
def test_a_correction_that_gains_nothing_is_left_out(tmp_path, begun):
    task, images = begun()
    assert task.validate(images)[0]["val_gain"] == pytest.approx(0, abs=1e-3), "a fresh one corrects nothing"
    with torch.no_grad():
        for p in task.average.parameters():
            p += 0.3 * torch.randn_like(p)
    before, _ = task.validate(images)
    counts = range(1, len(task.config.elements)) if not task.joint else (1, 2, 3)
    assert before["val_gain"] < 0 and {f"val_psnr_{count}" for count in counts} < set(before)
    assert "loses" in task.settle(images)
    task.export(tmp_path)
    assert checkpoint.read_config(tmp_path) == task.config.prior_alone()


def test_both_stages_train_a_heart_with_a_prior(tmp_path):
    vae = train("tokenizer", tmp_path / "vae", "steps=2", config=PRIOR_HEART)
    model = train("denoiser", tmp_path / "net", "steps=2", "relative=true", f"tokenizer={vae}", config=PRIOR_HEART)
    prior = checkpoint.load_prior(model, PRIOR_HEART)
    assert np.array_equal(prior.weights, checkpoint.load_prior(vae, PRIOR_HEART).weights) and prior.weights.any()
