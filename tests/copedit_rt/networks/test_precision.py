"""float32 is float32: no call of an engine may run in TF32, whatever the process has set."""

import threading

import numpy as np
import pytest
import torch
from small import BRAIN, perturb

from copedit_rt.engines.torch_engine import TorchEngine
from copedit_rt.networks import denoiser, sampler, tokenizer
from copedit_rt.networks.precision import exact_float32, tried_convolutions

SETTINGS = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)


def precisions() -> list[str]:
    return [setting.fp32_precision for setting in SETTINGS]


@pytest.fixture
def loose(monkeypatch):
    """A process that allows TF32 everywhere."""
    before = precisions()
    for setting in SETTINGS:
        setting.fp32_precision = "tf32"
    yield
    for setting, value in zip(SETTINGS, before, strict=True):
        setting.fp32_precision = value


def test_every_call_of_an_engine(loose, monkeypatch):
    """Seen from inside the networks, in each of the three calls, and in the making of what is replayed."""
    seen: dict[str, list[list[str]]] = {}

    def spy(owner, name):
        plain = getattr(owner, name)

        def watched(*args, **kwargs):
            seen.setdefault(name, []).append(precisions())
            return plain(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    vae, net = tokenizer.CoPeVAE(BRAIN.tokenizer, len(BRAIN.elements)), denoiser.build_denoiser(BRAIN)
    perturb(vae, net)
    engine = TorchEngine(BRAIN, vae, net, torch.device("cpu"))
    for owner, name in (
        (tokenizer.Encoder, "forward"),
        (tokenizer.CoPeVAE, "prompts_of_each"),
        (tokenizer.CoPeVAE, "assess"),
        (sampler.Plan, "__init__"),
        (sampler.Plan, "run"),
        (denoiser.MDiT3D, "predict"),
        (tokenizer.CoPeVAE, "images"),
    ):
        spy(owner, name)
    encoded = engine.encode(np.random.default_rng(0).random((1, 2, 1, *BRAIN.image), np.float32))
    observed = np.array([True, True, False, False])
    z = np.zeros((1, 4, *encoded.latents.shape[2:]), np.float32)
    engine.decode(engine.sample(z, encoded.prompts, observed[None], 2, "ddim"))
    assert set(seen) == {"forward", "prompts_of_each", "assess", "__init__", "run", "predict", "images"}
    assert all(found == ["ieee", "ieee"] for calls in seen.values() for found in calls)
    assert precisions() == ["tf32", "tf32"]


def test_two_threads_do_not_undo_each_others(loose):
    entered, leave, found = threading.Event(), threading.Event(), []

    def other():
        with exact_float32():
            entered.set()
            leave.wait(10)
            found.append(precisions())

    thread = threading.Thread(target=other)
    with exact_float32():
        thread.start()
        assert entered.wait(10)
    assert precisions() == ["ieee", "ieee"]  # the other is still inside
    leave.set()
    thread.join()
    assert found == [["ieee", "ieee"]] and precisions() == ["tf32", "tf32"]
    with pytest.raises(KeyError), exact_float32():
        raise KeyError
    assert precisions() == ["tf32", "tf32"]


def test_convolutions_are_tried_in_encoder_and_decoder_alone(monkeypatch):
    """And in no other thread's way: what the process had set is back."""
    seen: dict[str, bool] = {}
    vae, net = tokenizer.CoPeVAE(BRAIN.tokenizer, len(BRAIN.elements)), denoiser.build_denoiser(BRAIN)
    perturb(vae, net)
    engine = TorchEngine(BRAIN, vae, net, torch.device("cpu"))
    for owner, name in ((tokenizer.Encoder, "forward"), (denoiser.MDiT3D, "predict"), (tokenizer.Decoder, "forward")):
        plain = getattr(owner, name)

        def watched(*args, plain=plain, name=f"{owner.__name__}.{name}", **kwargs):
            seen[name] = torch.backends.cudnn.benchmark
            return plain(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)
    encoded = engine.encode(np.random.default_rng(0).random((1, 2, 1, *BRAIN.image), np.float32))
    z = np.zeros((1, 4, *encoded.latents.shape[2:]), np.float32)
    engine.decode(engine.sample(z, encoded.prompts, np.array([[True, True, False, False]]), 1, "ddim"))
    assert seen == {"Encoder.forward": True, "MDiT3D.predict": False, "Decoder.forward": True}
    assert not torch.backends.cudnn.benchmark
    with tried_convolutions(), tried_convolutions():
        assert torch.backends.cudnn.benchmark
    assert not torch.backends.cudnn.benchmark
