"""The informed prior: its features and fill, and a model that starts from one, on every engine."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from small import BRAIN, perturb, saved, study

from copedit_rt import changes, checkpoint
from copedit_rt.engines import onnx_export
from copedit_rt.errors import CopeditError
from copedit_rt.images.prepare import prepare
from copedit_rt.networks.denoiser import build_denoiser
from copedit_rt.networks.sampler import Plan, sample
from copedit_rt.prior import LOCAL, PLACE, PRIOR, QUANTILES, WINDOWS, Prior, features, shown, views
from copedit_rt.schedule import begun as noised_fill
from copedit_rt.synthesizer import Synthesizer

MODEL = replace(BRAIN, name="tiny-prior", denoiser=replace(BRAIN.denoiser, prior=True))
M = len(MODEL.elements)
WIDTH = M * (LOCAL + len(QUANTILES) + 1) + PLACE
OBSERVED = np.array([True, False, True, False])


def perceptron(seed: int = 0) -> Prior:
    rng = np.random.default_rng(seed)
    sizes = (WIDTH, 16, M)
    weights = {"mean": rng.random(WIDTH), "scale": 1 + rng.random(WIDTH)}
    for i, (a, b) in enumerate(pairwise(sizes)):
        weights |= {f"w{i}": rng.standard_normal((a, b)) / a**0.5, f"b{i}": 0.3 + 0.1 * rng.standard_normal(b)}
    return Prior({name: x.astype(np.float32) for name, x in weights.items()})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = saved(MODEL, tmp_path_factory.mktemp("prior"))
    perceptron().save(path)
    return path


def images(seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).random((M, 1, 12, 10, 9), dtype=np.float32)
    x[..., :3, :, :] = 0  # background
    return x


@pytest.mark.parametrize("window", WINDOWS)
def test_local_means_and_deviations_are_those_of_naive_sums(window):
    given, half, i = images()[:, 0], window // 2, WINDOWS.index(window)
    padded = np.pad(given.astype(np.float64), [(0, 0)] + 3 * [(half, half)])
    local = views(given).local
    for x, y, z in np.ndindex(given[0].shape):
        if window <= 7 or (x + y + z) % 11 == 0:
            cubes = padded[:, x : x + window, y : y + window, z : z + window]
            np.testing.assert_allclose(local[:, 1 + i, x, y, z], cubes.mean((1, 2, 3)), atol=1e-6)
            np.testing.assert_allclose(local[:, 1 + len(WINDOWS) + i, x, y, z], cubes.std((1, 2, 3)), atol=1e-4)
    assert np.array_equal(local[:, 0], given) and not views(np.zeros_like(given)).local.any()


def test_a_place_is_relative_to_the_head_and_tells_how_much_of_it_is_near():
    given = np.zeros((M, 12, 10, 9), np.float32)
    given[1, 2:9, 1:6, 3:] = 0.5  # 7 x 5 x 6 voxels
    place = views(given).place
    assert place.shape == (PLACE, 12, 10, 9)
    np.testing.assert_allclose(place[0, 2:9, 4, 4], [1, 2 / 3, 1 / 3, 0, 1 / 3, 2 / 3, 1], atol=1e-6)
    np.testing.assert_allclose(place[1, 4, 1:6, 4], [-1, -0.5, 0, 0.5, 1], atol=1e-6)
    np.testing.assert_allclose(place[2, 4, 4, 3:], np.linspace(-1, 1, 6), atol=1e-6)
    assert not place[0, :2].any() and not place[1, :, 6:].any() and not place[2, :, :, :3].any()
    np.testing.assert_allclose(place[3, 5, 3, 6], 7 * 5 * 6 / 7**3, rtol=1e-5)
    np.testing.assert_allclose(place[5, 5, 3, 6], 7 * 5 * 6 / 31**3, rtol=1e-5)
    np.testing.assert_allclose(views(given[:, ::-1]).place[:, ::-1], place, atol=1e-6, err_msg="left and right alike")
    assert not views(np.zeros_like(given)).place.any()


def test_quantiles_are_of_what_an_image_shows():
    image = images()[0, 0]
    np.testing.assert_allclose(shown(image), np.quantile(image[image > 0], QUANTILES), rtol=1e-6)
    assert not shown(np.zeros((3, 3, 3), np.float32)).any()


def test_what_is_missing_is_never_read():
    given, prior = images(), perceptron()
    poisoned = given.copy()
    poisoned[~OBSERVED] = np.nan
    filled = prior.fill(poisoned, OBSERVED)
    assert filled.shape == (2, 1, 12, 10, 9) and np.array_equal(filled, prior.fill(given, OBSERVED))
    assert not np.array_equal(filled, prior.fill(given[[2, 1, 0, 3]], OBSERVED))


def test_the_fill_is_the_perceptron_of_each_voxel():
    given, prior = images(), perceptron()
    x, y, z = 6, 5, 4
    row = features(views(given[:, 0]), OBSERVED, np.array([np.ravel_multi_index((x, y, z), given.shape[2:])]))
    w = {name: value.astype(np.float64) for name, value in prior.weights.items()}
    hidden = np.maximum((row[0] - w["mean"]) * w["scale"] @ w["w0"] + w["b0"], 0)
    expected = np.clip(hidden @ w["w1"] + w["b1"], 0, 1)
    np.testing.assert_allclose(prior.fill(given, OBSERVED)[:, 0, x, y, z], expected[~OBSERVED], atol=1e-5)


def test_background_stays_empty_and_a_part_is_that_of_the_whole():
    given, prior = images(), perceptron()
    whole = prior.fill(given, OBSERVED)
    assert not whole[..., :3, :, :].any()
    within = slice(1, 7), slice(2, 10), slice(0, 9)
    part = prior.fill(given, OBSERVED, within)
    assert part.shape == (2, 1, 6, 8, 9) and part.any()
    np.testing.assert_allclose(part, whole[..., *within], atol=1e-5)  # products of other shapes round otherwise


def test_what_shows_next_to_nothing_is_filled_there_alone():
    given, prior = np.zeros((M, 1, 12, 10, 9), np.float32), perceptron()
    assert not prior.fill(given, OBSERVED).any()
    given[0, 0, 4, 5:7, 8] = 0.5  # fewer voxels than a window has
    filled = prior.fill(given, OBSERVED)[:, 0]
    assert np.count_nonzero(filled[:, 4, 5:7, 8]) == np.count_nonzero(filled) > 0


def test_a_prior_of_another_model_or_none_is_refused(tmp_path):
    with pytest.raises(CopeditError, match=r"prior.safetensors: cannot be read .* copy the model again"):
        Prior.load(tmp_path, MODEL)
    perceptron().save(tmp_path)
    assert np.array_equal(Prior.load(tmp_path, MODEL).fill(images(), OBSERVED), perceptron().fill(images(), OBSERVED))
    with pytest.raises(CopeditError, match="is not of a brain model with 3 elements"):
        Prior.load(tmp_path, replace(MODEL, elements=MODEL.elements[:3]))
    weights = perceptron().weights
    last = max(name for name in weights if name.startswith("w"))
    for spoilt, words in (
        ({last: weights[last][:-1]}, "is not of a brain model with 4 elements"),  # no longer fits the layer before it
        ({"scale": weights["scale"][:-1]}, "is not of a brain model"),
        ({"b0": np.full_like(weights["b0"], np.nan)}, "tensor b0 holds NaN or infinity"),
    ):
        Prior(weights | spoilt).save(tmp_path)
        with pytest.raises(CopeditError, match=words):
            Prior.load(tmp_path, MODEL)
    (tmp_path / PRIOR).write_bytes(b"no tensors")
    with pytest.raises(CopeditError, match=r"prior.safetensors: cannot be read"):
        Prior.load(tmp_path, MODEL)


def network(**changes):
    config = replace(MODEL, denoiser=replace(MODEL.denoiser, **changes))
    torch.manual_seed(0)
    return config, build_denoiser(config).double().eval()


@pytest.mark.parametrize("backbone", ["mdit3d", "dit3d", "dit"])
def test_a_fresh_network_returns_its_prior_and_a_trained_one_corrects_it(backbone):
    config, net = network(backbone=backbone)
    z, prior = torch.randn(2, 2, M, 3, *config.latent, dtype=torch.float64).unbind()
    arguments = torch.tensor([3, 499]), torch.randn(2, 3, 16, dtype=torch.float64), torch.ones(2, M, dtype=torch.bool)
    assert torch.equal(net(z, *arguments, prior=prior), prior)
    perturb(net)
    made = net(z, *arguments, prior=prior)
    assert (made - prior).abs().max() > 0.01 and (net(z, *arguments, prior=prior + 1) - made - 1).abs().max() > 0.01


def test_the_plan_samples_as_the_plain_loop_does():
    config, net = network()
    perturb(net)
    z, prior = torch.randn(2, 1, M, 3, *config.latent, dtype=torch.float64).unbind()
    prompts, observed = torch.randn(1, 3, 16, dtype=torch.float64), torch.from_numpy(OBSERVED)[None]
    plain = sample(lambda x, t: net(x, t, prompts, observed, prior=prior), z, observed, config.diffusion, 3)
    planned = Plan(net, config, 3, observed).run(z, prompts, prior=prior)
    assert (planned - plain).abs().max() <= 1e-10 * plain.abs().max()
    assert torch.equal(planned[observed], z[observed])


def test_sampling_may_start_from_the_noised_fill(folder, tmp_path):
    diffusion = replace(MODEL.diffusion, start=0.2, steps=2)
    perceptron().save(saved(replace(MODEL, diffusion=diffusion), tmp_path))
    plain, part = Synthesizer.load(folder, "cpu"), Synthesizer.load(tmp_path, "cpu")
    z = np.random.default_rng(0).standard_normal((2, M, *MODEL.latent), dtype=np.float32)
    begun = part.start(z[0][OBSERVED], OBSERVED, "a", fill=z[1])
    noise = plain.start(z[0][OBSERVED], OBSERVED, "a", fill=z[1])
    np.testing.assert_array_equal(begun[OBSERVED], z[0][OBSERVED])
    np.testing.assert_allclose(begun[~OBSERVED], noised_fill(diffusion, noise, z[1])[~OBSERVED], rtol=1e-6)
    made, other = part.synthesize(study(MODEL, "t1", "t2")), plain.synthesize(study(MODEL, "t1", "t2"), steps=2)
    assert made.record["sampler"]["start"] == 0.2 and "start" not in other.record["sampler"]
    assert not np.array_equal(made.study.volumes["flair"].data, other.study.volumes["flair"].data)


def test_no_steps_are_the_fill_as_it_is(folder, tmp_path, monkeypatch):
    perceptron().save(saved(MODEL.prior_alone(), tmp_path))
    model, alone = Synthesizer.load(folder, "cpu"), Synthesizer.load(tmp_path, "cpu")
    case = study(MODEL, "t1", "t2")
    sampled = model.synthesize(case)
    for own in (model, alone):
        monkeypatch.delattr(type(own.engine), "sample")
        monkeypatch.delattr(type(own.engine), "decode")
        for seed in (0, 7):
            made = own.synthesize(case, steps=0 if own is model else None, seed=seed)
            ready = prepare(case, MODEL)
            filled = perceptron().fill_study(ready)
            for name, volume in ready.restore(filled.images, bright=filled.bright).items():
                np.testing.assert_array_equal(made.study.volumes[name].data, volume)
            assert made.perception == sampled.perception
            drawn = {"steps": 0, "seed": seed, "samples": 1}
            assert made.record["sampler"] == {"method": "prior", **drawn}
            assert changes.request(own.config, drawn, {})["sampler"] == made.record["sampler"]
            assert any("seed 7 changes nothing" in note for note in made.study.notes) == (seed == 7)
        monkeypatch.undo()
    for option in ({"solver": "ddim"}, {"samples": 2}):
        with pytest.raises(CopeditError, match=f"{next(iter(option))} .*takes no sampling steps here.*--steps"):
            alone.synthesize(case, **option)
        alone.synthesize(case, steps=1, **option)
    perceptron().save(saved(BRAIN, tmp_path / "none"))
    with pytest.raises(CopeditError, match="steps 0: must be between 1 and 500"):
        Synthesizer.load(tmp_path / "none", "cpu").synthesize(case, steps=0)


def test_a_study_is_the_same_on_every_engine(folder, tmp_path):
    pytest.importorskip("onnxruntime", reason="needs the extra export")
    onnx_export.export_onnx(folder, tmp_path / "onnx")
    case = study(MODEL, "t1", "t2")
    torch_made = Synthesizer.load(folder, "cpu").synthesize(case)
    other = Synthesizer.load(tmp_path / "onnx", engine="onnxruntime").synthesize(case)
    for name in ("t1ce", "flair"):
        a, b = (x.study.volumes[name].data for x in (torch_made, other))
        np.testing.assert_allclose(a, b, atol=1e-3 * np.ptp(a))
    assert torch_made.record["weights_sha256"] == other.record["weights_sha256"]
    assert set(other.record["weights_sha256"]) == {"tokenizer", "denoiser", "prior"}
    plain = checkpoint.load_denoiser(folder)[1]
    assert plain.config.prior and (tmp_path / "onnx" / PRIOR).exists()
