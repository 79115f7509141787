"""The whole path on tiny random models: what is returned, what is repeatable, what is refused."""

import dataclasses
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from processors import Faulty

from copedit_rt import checkpoint, schedule, synthesizer
from copedit_rt.config import DenoiserConfig, DiffusionConfig, ModelConfig, Preprocessing, TokenizerConfig
from copedit_rt.device import choose_device
from copedit_rt.engines import torch_engine
from copedit_rt.errors import CopeditError
from copedit_rt.images import nifti
from copedit_rt.images.nifti import Volume
from copedit_rt.images.prepare import prepare
from copedit_rt.images.study import Study
from copedit_rt.networks import sampler
from copedit_rt.networks.denoiser import build_denoiser
from copedit_rt.networks.tokenizer import CoPeVAE
from copedit_rt.synthesizer import Synthesizer
from copedit_rt.trained import TrainedOn

BRAIN = ModelConfig(
    "tiny-brain",
    "brain",
    ("t1", "t1ce", "t2", "flair"),
    (16, 16, 8),
    TokenizerConfig(
        channels=(8, 8), strides=((2, 2, 2), (2, 2, 2)), residual_units=1, residual_channels=8, codes=64,
        prompt_channels=(8, 8), prompt_dim=16, contrast_dim=8,
    ),
    DenoiserConfig(width=32, heads=2, blocks=4),
    DiffusionConfig(steps=4),
    Preprocessing(field_of_view=(32.0, 32.0, 32.0)),
)  # fmt: skip
HEART = dataclasses.replace(
    BRAIN,
    name="tiny-heart",
    task="cardiac",
    elements=("slab0", "slab1", "slab2", "slab3"),
    image=(16, 16, 4),
    denoiser=dataclasses.replace(BRAIN.denoiser, patch=(1, 1, 1)),
    preprocessing=Preprocessing(field_of_view=(32.0, 32.0, None)),
)
GRID = np.diag([2.0, 2.0, 4.0, 1.0])


def networks(config):
    torch.manual_seed(0)
    vae, net = CoPeVAE(config.tokenizer, len(config.elements)), build_denoiser(config)
    with torch.no_grad():  # zero-initialised layers would return zeros
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
        vae.latent_mean.copy_(torch.randn(8) * 0.1)
        vae.latent_std.copy_(torch.rand(8) + 0.5)
    return vae, net


def build(config, **options):
    return Synthesizer(config, *networks(config), "cpu", **options)


@pytest.fixture(scope="module")
def brain_model():
    return build(BRAIN)


@pytest.fixture(scope="module")
def heart_model():
    return build(HEART)


def brain(*names, shape=(16, 16, 8), name="s1", seed=0):
    images = {e: np.random.default_rng((seed, i)).random(shape) + 0.1 for i, e in enumerate(BRAIN.elements)}
    return Study(name, "brain", {e: Volume.from_array(images[e], GRID) for e in names})


def heart(missing, slices=16):
    data = np.random.default_rng(3).random((16, 16, slices)) + 0.1
    data[..., list(missing)] = 0
    return Study("h1", "cardiac", {"sax": Volume.from_array(data, GRID)}, missing_slices=tuple(missing))


def test_all_that_is_missing_comes_back_on_the_reference_grid(brain_model):
    study = brain("t2", "t1")
    result = brain_model.synthesize(study)
    assert result.study.synthetic == {"t1ce", "flair"} and set(result.study.volumes) == set(BRAIN.elements)
    for name in ("t1ce", "flair"):
        volume = result.study.volumes[name]
        assert volume.data.shape == (16, 16, 8) and np.array_equal(volume.affine, GRID)
        assert np.isfinite(volume.data).all() and volume.data.std() > 0
    assert result.study.volumes["t1"] is study.volumes["t1"], "what was there is not touched"
    assert result.std == {}


def test_steps_run_from_the_noisiest_and_observed_latents_keep_their_bits(brain_model, monkeypatch):
    seen, times = [], []
    net = brain_model.engine.denoiser
    predict, modulate = net.predict, net.modulate
    monkeypatch.setattr(net, "predict", lambda z, *a, **k: seen.append(z.clone()) or predict(z, *a, **k))
    monkeypatch.setattr(net, "modulate", lambda t, *rest: times.append(t[:, 0].tolist()) or modulate(t, *rest))
    brain_model.synthesize(brain("t1", "flair"), steps=5)
    assert times[-1] == schedule.timesteps(BRAIN.diffusion, 5).tolist() and times[-1][0] == 499
    assert len(seen) == 5
    for z in seen[1:]:
        assert torch.equal(z[0, [0, 3]], seen[0][0, [0, 3]])
        assert not torch.equal(z[0, [1, 2]], seen[0][0, [1, 2]])


@pytest.mark.parametrize("solver", ["ddim", "dpm2m"])
def test_a_synthesis_is_what_the_plain_sampler_makes(brain_model, monkeypatch, solver):
    made = brain_model.synthesize(brain("t1", "t2"), steps=5, solver=solver)
    net = networks(BRAIN)[1]

    class Plain:
        def __init__(self, prompts_of, config, steps, observed, solver):
            self.observed, self.rest = observed, (config.diffusion, steps)

        def run(self, z, prompts, progress, prior):
            assert prior is None

            def predict(z, t):
                return net(z, t, prompts, self.observed)

            return sampler.sample(predict, z, self.observed, *self.rest, progress, solver)

    monkeypatch.setattr(torch_engine, "Plan", Plain)
    brain_model.engine.plan.cache_clear()
    plain = brain_model.synthesize(brain("t1", "t2"), steps=5, solver=solver)
    brain_model.engine.plan.cache_clear()
    assert made.record == plain.record and made.record["sampler"]["method"] == solver
    for name in ("t1ce", "flair"):
        np.testing.assert_allclose(made.study.volumes[name].data, plain.study.volumes[name].data, atol=1e-4)


def test_two_threads_take_turns_and_get_what_one_alone_gets(brain_model, monkeypatch):
    studies = [brain(*names, name="+".join(names)) for names in (["t1"], ["t1", "t2"], ["flair"], ["t2", "flair"])] * 2
    alone = [brain_model.synthesize(study) for study in studies]
    inside, original = [], brain_model.engine.sample

    def denoise(*args):
        inside.append(threading.get_ident())
        time.sleep(0.01)  # lets the other thread in, if it may
        z = original(*args)
        assert len(inside) == 1, "two threads at once"
        inside.pop()
        return z

    monkeypatch.setattr(brain_model.engine, "sample", denoise)
    users = set()
    with ThreadPoolExecutor(2) as pool:

        def work(study):
            users.add(threading.get_ident())
            return brain_model.perceive(study), brain_model.synthesize(study)

        together = list(pool.map(work, studies))
    assert len(users) == 2
    for one, (perception, other) in zip(alone, together, strict=True):
        assert perception == one.perception == other.perception
        for name, volume in one.study.volumes.items():
            assert np.array_equal(volume.data, other.study.volumes[name].data), name


def test_all_synthesizers_on_a_device_share_its_turns(brain_model, heart_model, monkeypatch):
    entered, original = threading.Event(), brain_model.engine.encode

    def encode(images):
        entered.set()
        time.sleep(0.05)
        assert not other, "two models at once on one device"
        return original(images)

    monkeypatch.setattr(brain_model.engine, "encode", encode)
    other: list[bool] = []
    monkeypatch.setattr(heart_model.engine, "encode", lambda images: other.append(True) or [][0])
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(brain_model.perceive, brain("t1"))
        entered.wait()
        with pytest.raises(IndexError):
            heart_model.perceive(heart([1]))
        first.result()


def test_networks_that_are_given_stay_as_they_are_and_are_not_shared():
    vae, net = networks(BRAIN)
    before = {name: x.clone() for part in (vae, net) for name, x in part.state_dict().items()}
    vae.train(), net.train()
    for options in ({}, {"dtype": "bfloat16"}):
        Synthesizer(BRAIN, vae, net, "cpu", **options).synthesize(brain("t1"))
    after = {name: x for part in (vae, net) for name, x in part.state_dict().items()}
    assert vae.training and net.training and all(p.requires_grad for p in net.parameters())
    assert before.keys() == after.keys()
    for name, x in before.items():
        assert torch.equal(x, after[name]) and x.dtype == after[name].dtype and after[name].is_contiguous(), name


def test_folded_norms_change_nothing():
    vae, _ = networks(BRAIN)
    for module in vae.modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            for x in (module.weight, module.bias, module.running_mean, module.running_var):
                torch.nn.init.uniform_(x, 0.5, 1.5)
    lean, z = torch_engine.lean_tokenizer(vae, torch.device("cpu")), torch.randn(1, 4, 8, 4, 4, 2)
    assert not any(isinstance(x, torch.nn.BatchNorm3d) for x in lean.modules())
    with torch.no_grad():
        torch.testing.assert_close(lean.prompts_of_each(z), vae.eval().prompts_of_each(z))
    assert lean.encoder.out.weight.is_contiguous(memory_format=torch.channels_last_3d)


def test_every_image_goes_through_the_prompt_encoders_once():
    made, seen = build(BRAIN), []
    for encoder in made.engine.tokenizer.prompt_encoders:
        encoder.conv.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    made.synthesize(brain("t1", "t2"))
    assert seen == [2, 2, 2]


@pytest.mark.parametrize("which", [BRAIN, HEART], ids=lambda config: config.task)
@pytest.mark.parametrize("processor", [nullcontext, Faulty], ids=["here", "faulty"])
def test_bfloat16_is_near_float32(which, processor):
    study = brain("t1", "t2") if which is BRAIN else heart([5, 6])
    wide, half = build(which), build(which, dtype="bfloat16")
    with processor():
        a, b = wide.synthesize(study), half.synthesize(study)
    assert (a.record["dtype"], b.record["dtype"]) == ("float32", "bfloat16")
    vae = half.engine.tokenizer
    assert vae.encoder.out.weight.dtype == torch.bfloat16 and half.engine.denoiser.final.weight.dtype == torch.bfloat16
    assert vae.codebook.dtype == vae.prompt_encoders[0].mlp[0].weight.dtype == torch.float32
    np.testing.assert_allclose(a.perception.missing, b.perception.missing, atol=0.02)
    # Latents; voxels may jump where a latent lies between two codes.
    z = np.random.default_rng(0).standard_normal((1, 4, 8, *which.latent)).astype(np.float32)
    prompts, observed = np.ones((1, 3, 16), np.float32), np.array([[True, False, True, True]])
    found, exact = (model.engine.sample(z, prompts, observed, 4, "ddim") for model in (half, wide))
    error = np.abs(found - exact).max()
    assert 0 < error < 0.05 * np.abs(exact).max()
    assert np.array_equal(found[observed], z[observed])


@pytest.mark.gpu
@pytest.mark.parametrize("which", [BRAIN, HEART], ids=lambda config: config.task)
def test_a_gpu_gives_what_the_cpu_gives(which):
    """In float32, and nearly in the default of GPUs. Latents: voxels may jump where one lies between codes."""
    which = dataclasses.replace(which, denoiser=dataclasses.replace(which.denoiser, heads=1))  # 32 channels a head
    z = np.random.default_rng(0).standard_normal((1, 4, 8, *which.latent)).astype(np.float32)
    prompts, observed = np.ones((1, 3, 16), np.float32), np.array([[True, False, True, True]])
    exact = build(which).engine.sample(z, prompts, observed, 4, "ddim")
    for dtype, allowed in (("float32", 1e-4), ("auto", 0.05)):
        engine = Synthesizer(which, *networks(which), "cuda", dtype=dtype).engine
        assert engine.precision == ("float32" if dtype == "float32" else "bfloat16")
        found = engine.sample(z, prompts, observed, 4, "ddim")
        assert np.abs(found - exact).max() < allowed * np.abs(exact).max()
        assert np.array_equal(found[observed], z[observed])


def test_a_memory_ceiling_changes_nothing_but_the_memory(brain_model, heart_model, monkeypatch):
    for model, study, name in ((brain_model, brain("t1", "t2"), "flair"), (heart_model, heart([5, 6]), "sax")):
        whole = model.synthesize(study).study.volumes[name].data
        monkeypatch.setattr(model.engine, "max_memory", 100 * 2**10)
        np.testing.assert_allclose(model.synthesize(study).study.volumes[name].data, whole, atol=1e-4)
        monkeypatch.setattr(model.engine, "max_memory", 2**10)
        with pytest.raises(CopeditError, match="max_memory of"):
            model.synthesize(study)


def test_what_a_model_was_trained_on_stands_in_the_record_and_what_is_unlike_it_in_the_notes(brain_model, monkeypatch):
    assert brain_model.synthesize(brain("t1", "t2")).record["trained_on"] is None
    known = {"t1": [[0.0, 1.0]] * 5, "t2": [[2.0, 3.0]] * 5}
    monkeypatch.setattr(brain_model, "trained", TrainedOn("noise", known))
    result = brain_model.synthesize(brain("t1", "t2"))
    (note,) = [note for note in result.study.notes if "unlike what the model was trained on" in note]
    assert note.startswith("t2 ") and result.record["trained_on"] == "noise" and result.perception.unlike == (note,)


def test_noise_comes_from_seed_study_and_element(brain_model):
    def made(seed=0, name="s1"):
        return brain_model.synthesize(brain("t1", name=name), seed=seed).study.volumes["t2"].data

    assert np.array_equal(made(), made())
    assert not np.array_equal(made(), made(seed=1))
    assert not np.array_equal(made(), made(name="s2"))


def test_numbers_of_numpy_are_numbers(brain_model):
    plain = brain_model.synthesize(brain("t1"), seed=5, steps=2, samples=2, detail=True)
    options = {"seed": np.int64(5), "steps": np.int8(2), "samples": np.uint16(2), "detail": np.True_}
    result = brain_model.synthesize(brain("t1"), **options)
    assert json.dumps(result.record) == json.dumps(plain.record)
    assert np.array_equal(result.study.volumes["t2"].data, plain.study.volumes["t2"].data)


@pytest.mark.parametrize("several", [list, iter, lambda names: "FLAIR,"])
def test_target_returns_a_part_of_the_same_synthesis(brain_model, several):
    whole = brain_model.synthesize(brain("t1", "t2"))
    part = brain_model.synthesize(brain("t1", "t2"), target=several(["flair"]))
    assert part.study.synthetic == {"flair"} and "t1ce" not in part.study.volumes
    assert np.array_equal(part.study.volumes["flair"].data, whole.study.volumes["flair"].data)


def test_samples_give_mean_and_standard_deviation(brain_model, monkeypatch):
    original, drawn = brain_model.engine.sample, []

    def denoise(*args):
        made = original(*args)
        drawn.extend(made)
        return made

    monkeypatch.setattr(brain_model.engine, "sample", denoise)
    study, calls = brain("t1", "t2", "flair"), []
    result = brain_model.synthesize(study, samples=3, progress=lambda i, n: calls.append((i, n)))
    prepared = prepare(study, BRAIN)
    each = np.stack([prepared.restore(brain_model.decode(z, prepared.observed))["t1ce"] for z in drawn]).astype(
        np.float64
    )
    assert not np.array_equal(each[0], each[1])
    np.testing.assert_allclose(result.study.volumes["t1ce"].data, each.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(result.std["t1ce"], each.std(0, ddof=1), rtol=1e-4, atol=1e-6)
    assert calls == [(3, 12), (6, 12), (9, 12), (12, 12)]


def test_samples_whose_moments_do_not_fit_are_refused(brain_model, monkeypatch):
    study = brain("t1", "t2")
    needed = study.reference.data.size * (2 * 2 * 8 + nifti.WORKING)
    monkeypatch.setattr(synthesizer, "available_memory", lambda: needed - 1)
    with pytest.raises(CopeditError, match=f"{study.name}: samples 2: .* 2 x {study.reference.data.size} voxels"):
        brain_model.synthesize(study, samples=2, steps=1)
    brain_model.synthesize(study, samples=1, steps=1)
    monkeypatch.setattr(synthesizer, "available_memory", lambda: needed)
    brain_model.synthesize(study, samples=2, steps=1)


def test_more_samples_than_fit_come_in_turns(brain_model, monkeypatch):
    monkeypatch.setattr(synthesizer, "TOGETHER", 2)
    study, calls = brain("t1", "t2", "flair"), []
    turns = brain_model.synthesize(study, samples=3, steps=2, progress=lambda i, n: calls.append((i, n)))
    monkeypatch.undo()
    once = brain_model.synthesize(study, samples=3, steps=2)
    np.testing.assert_allclose(turns.std["t1ce"], once.std["t1ce"], atol=1e-5)
    assert calls == [(2, 6), (4, 6), (5, 6), (6, 6)]


def test_a_heart_keeps_every_slice_that_was_there(heart_model):
    study = heart([5, 6])
    result = heart_model.synthesize(study)
    before, after = study.volumes["sax"].data, result.study.volumes["sax"].data
    there = [i for i in range(16) if i not in (5, 6)]
    assert np.array_equal(before[..., there], after[..., there])
    assert (after[..., [5, 6]].std((0, 1)) > 0).all()
    assert result.record["missing"] == ["slab1"] and result.record["missing_slices"] == [5, 6]


def test_slabs_are_decoded_as_one_stack(heart_model):
    codes = torch.randn(1, 4, 8, 4, 4, 1)
    joint = heart_model.engine.tokenizer.decode(codes, joint=True)
    stack = heart_model.engine.tokenizer.decoder(torch.cat(list(codes[0]), -1)[None])
    torch.testing.assert_close(torch.cat(list(joint[0]), -1), stack[0])
    assert not torch.allclose(joint, heart_model.engine.tokenizer.decode(codes, joint=False), atol=1e-3)


def test_decoding_only_what_is_missing_equals_decoding_all(brain_model):
    prepared = prepare(brain("t1", "flair"), BRAIN)
    z = torch.randn(1, 4, 8, 4, 4, 2)
    images = brain_model.decode(z[0].numpy(), prepared.observed)
    codes, _ = brain_model.engine.tokenizer.quantise(brain_model.engine.tokenizer.denormalise(z))
    every = brain_model.engine.tokenizer.decode(codes, joint=False)[0].numpy()
    np.testing.assert_allclose(images[[1, 2]], every[[1, 2]], atol=1e-5)
    assert not images[[0, 3]].any()


def test_latents_are_decoded_as_they_are_where_the_model_says_so(brain_model):
    vae = brain_model.engine.tokenizer
    plain = CoPeVAE(dataclasses.replace(vae.config, quantise=False), 4).eval()
    plain.load_state_dict(networks(BRAIN)[0].state_dict())
    z = torch.randn(1, 4, 8, 4, 4, 2)
    with torch.no_grad():
        torch.testing.assert_close(plain.images(z, False), vae.decode(vae.denormalise(z), False))  # lean, and not
        codes = vae.quantise(vae.denormalise(z))[0]
        assert torch.equal(vae.images(z, False), vae.decode(codes, False))
        assert not torch.allclose(plain.images(z, False), vae.images(z, False), atol=1e-3)


def test_perception_names_probabilities_and_does_not_need_anything_missing(brain_model):
    seen = brain_model.perceive(brain(*BRAIN.elements))
    assert len(seen.count) == 3 and sum(seen.count) == pytest.approx(1)
    assert len(seen.missing) == 4 and all(0 <= p <= 1 for p in seen.missing)
    assert set(seen.identity) == set(BRAIN.elements)
    study = brain("t1", "flair")
    assert brain_model.synthesize(study).perception == brain_model.perceive(study)


def test_identity_is_the_heads_verdict_on_one_image_alone(brain_model):
    alone = brain_model.perceive(brain("t2"))
    pair = brain_model.perceive(brain("t2", "t1"))
    np.testing.assert_allclose(alone.identity["t2"], pair.identity["t2"], atol=1e-5)


def test_record_holds_what_is_needed_to_repeat(brain_model, tmp_path):
    checkpoint.save(tmp_path / "m", BRAIN, *networks(BRAIN))
    loaded = Synthesizer.load(tmp_path / "m", "cpu")
    result = loaded.synthesize(brain("t1"), steps=3, seed=7)
    record = json.loads(json.dumps(result.record))
    assert record["model"] == "tiny-brain" and record["sampler"] == {
        "method": "ddim", "steps": 3, "seed": 7, "samples": 1,
    }  # fmt: skip
    assert all(len(digest) == 64 for digest in record["weights_sha256"].values())
    assert record["notes"] == list(result.study.notes)
    again = brain_model.synthesize(brain("t1"), steps=3, seed=7)
    for name, volume in again.study.volumes.items():
        assert np.array_equal(volume.data, result.study.volumes[name].data), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": ["pd"]}, "target 'pd' is unknown to tiny-brain; choose among t1, t1ce, t2, flair"),
        ({"target": ["t1"]}, "s1 has a file for it"),
        ({"steps": 0}, "steps 0: must be between 1 and 500"),
        ({"steps": 501}, "steps 501: must be between 1 and 500"),
        ({"steps": 2.5}, "steps 2.5, seed 0, samples 1: each must be a whole number"),
        ({"seed": "7"}, "seed '7', samples 1: each must be a whole number"),
        ({"samples": 0}, "samples 0: must be between 1 and 10000"),
        ({"detail": "none"}, "detail 'none': must be True or False"),
        ({"target": "t2,pd"}, "target 'pd' is unknown"),
        ({"target": []}, "names no modality"),
        ({"solver": "euler"}, "solver 'euler' is unknown; choose one of ddim, dpm2m"),
    ],
)
def test_options_out_of_range(brain_model, options, message):
    with pytest.raises(CopeditError, match=message):
        brain_model.synthesize(brain("t1"), **options)


def test_a_study_of_the_other_task_is_refused(brain_model, heart_model):
    with pytest.raises(CopeditError, match="choose a cardiac model"):
        brain_model.synthesize(heart([1]))
    with pytest.raises(CopeditError, match="leave target out"):
        heart_model.synthesize(heart([1]), target=["sax"])
    assert heart_model.synthesize(heart([1]), target="all").study.synthetic


@pytest.mark.parametrize(
    ("name", "message"), [("int8", "'int8' is unknown; use auto, float32"), ("float16", "'float16' is for GPUs")]
)
def test_a_type_that_cannot_be_had(name, message):
    with pytest.raises(CopeditError, match=message):
        build(BRAIN, dtype=name)


@pytest.mark.parametrize("name", ["gpu", "cpu:", "cpu:1", "cuda:x", "cuda:99", "cuda:²"])
def test_a_device_that_is_not_there(name):
    with pytest.raises(CopeditError, match=f"device '{name}'"):
        choose_device(name)
