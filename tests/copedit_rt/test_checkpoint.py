"""Model folders: round trip, and every way in which one can be broken."""

import json
import pickle
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from copedit_rt import checkpoint, files
from copedit_rt.config import PRESETS, DenoiserConfig, ModelConfig, Preprocessing, TokenizerConfig
from copedit_rt.errors import CopeditError
from copedit_rt.networks.denoiser import build_denoiser
from copedit_rt.networks.tokenizer import CoPeVAE

CONFIG = ModelConfig(
    "tiny",
    "brain",
    ("t1", "t2"),
    (8, 8, 8),
    TokenizerConfig(
        channels=(4,), strides=((2, 2, 2),), residual_units=1, residual_channels=4, codes=8,
        prompt_channels=(4, 4), prompt_dim=8, contrast_dim=4,
    ),
    DenoiserConfig(width=16, heads=2, blocks=2),
)  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    checkpoint.save(tmp_path / "m", CONFIG, CoPeVAE(CONFIG.tokenizer, 2), build_denoiser(CONFIG))
    return tmp_path / "m"


def test_round_trip_is_exact_and_leaves_nothing_else(folder):
    config, vae, digest = checkpoint.load_tokenizer(folder)
    assert config == CONFIG and len(digest) == 64 and not vae.training
    torch.manual_seed(0)
    for name, tensor in CoPeVAE(CONFIG.tokenizer, 2).state_dict().items():
        assert torch.equal(vae.state_dict()[name], tensor), name
    checkpoint.load_denoiser(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "denoiser.safetensors", "tokenizer.safetensors"]


def test_no_weight_is_drawn_that_is_then_loaded(folder, monkeypatch):
    """Loading leaves torch's generator alone, and nothing of the network is left undefined."""
    before = torch.get_rng_state()
    _, denoiser, _ = checkpoint.load_denoiser(folder)
    assert torch.equal(torch.get_rng_state(), before)
    fresh = build_denoiser(CONFIG)
    for name, table in fresh.named_buffers():
        assert torch.equal(denoiser.get_buffer(name), table), name
    assert not torch.equal(torch.get_rng_state(), before)  # which a network of one's own does not


def test_half_precision_weights_load_as_float32(folder):
    _, vae, _ = checkpoint.load_tokenizer(folder)
    checkpoint.save(folder, CONFIG, tokenizer=vae, dtype=torch.float16)
    _, half, _ = checkpoint.load_tokenizer(folder)
    for name, tensor in vae.state_dict().items():
        assert half.state_dict()[name].dtype == tensor.dtype
        torch.testing.assert_close(half.state_dict()[name], tensor, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name):
    assert ModelConfig.from_dict(json.loads(json.dumps(PRESETS[name].to_dict()))) == PRESETS[name]


def test_a_configuration_written_before_there_were_solvers_still_loads(folder):
    data = json.loads((folder / "config.json").read_text())
    assert data["diffusion"].pop("solver") == "ddim"
    (folder / "config.json").write_text(json.dumps(data))
    assert checkpoint.read_config(folder) == CONFIG
    data["diffusion"]["solver"] = "euler"
    (folder / "config.json").write_text(json.dumps(data))
    with pytest.raises(CopeditError, match=r"config\.diffusion\.solver: 'euler'"):
        checkpoint.read_config(folder)


def edit(folder, change, name="tokenizer.safetensors"):
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name)


def test_missing_tensor(folder):
    edit(folder, lambda t: t.pop("codebook"))
    with pytest.raises(CopeditError, match=r"tokenizer\.safetensors: tensor codebook is missing"):
        checkpoint.load_tokenizer(folder)


def test_unknown_tensor(folder):
    edit(folder, lambda t: t.update(extra=torch.zeros(1)))
    with pytest.raises(CopeditError, match="tensor extra is unknown"):
        checkpoint.load_tokenizer(folder)


def test_wrong_shape(folder):
    edit(folder, lambda t: t.update({"final.bias": torch.zeros(3)}), "denoiser.safetensors")
    with pytest.raises(CopeditError, match=r"final\.bias has shape \(3,\), expected \(64,\)"):
        checkpoint.load_denoiser(folder)


@pytest.mark.parametrize("write", [torch.save, lambda x, p: p.write_bytes(pickle.dumps(x))], ids=["torch", "pickle"])
def test_pickle_is_refused_without_being_read(folder, write):
    write({"codebook": torch.zeros(2)}, folder / "tokenizer.safetensors")
    with pytest.raises(CopeditError, match=r"this is a pickle.*convert the weights to safetensors"):
        checkpoint.load_tokenizer(folder)


@pytest.mark.parametrize("keep", [0, 5, 1000])
def test_truncated_weights(folder, keep):
    path = folder / "tokenizer.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CopeditError, match="not a safetensors file"):
        checkpoint.load_tokenizer(folder)


def test_absent_weights(folder):
    (folder / "denoiser.safetensors").unlink()
    with pytest.raises(CopeditError, match="the model folder is incomplete"):
        checkpoint.load_denoiser(folder)


NESTED: dict = {}
for _ in range(60):
    NESTED = {"x": NESTED}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": 1}, "config: unknown field 'colour'"),
        ({"task": "knee"}, r"config.task: 'knee' is not a valid"),
        ({"image": [8, 8]}, r"config.image: \[8, 8\] is not a valid"),
        ({"image": [8, 8, 7]}, "does not divide by"),
        ({"image": [8, 8, 0]}, r"model tiny.image: 0 is out of range; it must be from 1 to 1024"),
        ({"image": [8, 8, -8]}, "model tiny.image: -8 is out of range"),
        ({"image": [8, 8, 10**12]}, "model tiny.image: 1000000000000 is out of range"),
        ({"image": [1024, 1024, 64]}, "134217728 voxels a study; at most 67108864"),
        ({"image": [512, 512, 64], "denoiser": {"patch": [1, 1, 1]}}, "tokens a study; at most 131072"),
        ({"elements": ["t1"]}, "1 elements; 2 to 8 are supported"),
        ({"elements": ["t1"] * 9}, "9 elements; 2 to 8 are supported"),
        ({"elements": ["t1", "t1"]}, "an element is named twice: t1, t1"),
        ({"elements": ["t1", "../t2"]}, r"element '../t2' is no name"),
        ({"elements": ["t1", "swi"]}, r"config.json: unknown element 'swi'; known modalities are t1, t1ce"),
        ({"name": "x\x1b[31m"}, r"model 'x\\x1b\[31m': its name must be"),
        ({"name": NESTED}, r"config.name: \{'x': \{'x': .{60,70}\.\.\. is not a valid str"),
        ({"denoiser": {"width": 10, "heads": 2}}, "head dimension divisible by 8"),
        ({"denoiser": {"width": "wide"}}, r"config.denoiser.width: 'wide' is not a valid int"),
        ({"denoiser": {"width": True}}, r"config.denoiser.width: True is not a valid int"),
        ({"denoiser": {"heads": 0}}, "denoiser.heads: 0 is out of range; it must be from 1 to 128"),
        ({"denoiser": {"blocks": 10**9}}, "denoiser.blocks: 1000000000 is out of range"),
        ({"denoiser": {"patch": [2, 2, 0]}}, "denoiser.patch: 0 is out of range"),
        ({"tokenizer": {"channels": [4, 4], "strides": [[2, 2, 2]]}}, "2 channels but 1 strides"),
        ({"tokenizer": {"channels": [], "strides": []}}, "tokenizer.channels: 0 levels; 1 to 8"),
        ({"tokenizer": {"strides": [[2, 2, 3]]}}, "tokenizer.strides: 3 is out of range"),
        ({"tokenizer": {"channels": [-4]}}, "tokenizer.channels: -4 is out of range"),
        ({"tokenizer": {"codes": 2**40}}, "tokenizer.codes: 1099511627776 is out of range"),
        ({"tokenizer": {"latent_channels": 0}}, "tokenizer.latent_channels: 0 is out of range"),
        ({"diffusion": {"train_steps": 10**12}}, "diffusion.train_steps: 1000000000000 is out of range"),
        ({"diffusion": {"steps": 501}}, "diffusion.steps: 501 must be from 0 to train_steps, 500"),
        ({"diffusion": {"steps": 0}}, "diffusion.steps is 0, and without denoiser.prior there is no fill"),
        ({"diffusion": {"start": 0}}, "diffusion.start: 0.0 is out of range; it must be from 0.01 to 1"),
        ({"diffusion": {"start": 0.5}}, "without denoiser.prior there is nothing to start from but noise"),
        ({"diffusion": {"start": 0.1, "steps": 51}}, "steps: 51 must be from 0 to start x train_steps, 50"),
        ({"diffusion": {"beta_start": 0}}, "diffusion.beta_start: 0.0 is out of range"),
        ({"diffusion": {"beta_start": 0.1}}, "diffusion.beta_start: 0.1 is above beta_end, 0.0195"),
        ({"preprocessing": {"version": 2}}, "preprocessing.version: 2 is out of range"),
        ({"preprocessing": {"percentiles": [-1, 99]}}, "preprocessing.percentiles: -1.0 is out of range"),
        ({"preprocessing": {"percentiles": [1, 100.5]}}, "preprocessing.percentiles: 100.5 is out of range"),
        ({"preprocessing": {"percentiles": [99, 99]}}, "preprocessing.percentiles: 99 is not below 99"),
        ({"preprocessing": {"field_of_view": [192, 192, 1e9]}}, "preprocessing.field_of_view: 1000000000.0 is out of"),
        ({"preprocessing": {"field_of_view": [192, 192, float("nan")]}}, r"not valid JSON \(NaN is no number"),
        ({"preprocessing": {"field_of_view": [192, 1e999, 90]}}, "not valid JSON .Infinity is no number"),
    ],
)
def test_broken_configuration(folder, changes, message):
    data = json.loads((folder / "config.json").read_text())
    for name, value in changes.items():
        data[name] = data[name] | value if isinstance(value, dict) and name != "name" else value
    (folder / "config.json").write_text(json.dumps(data))
    with pytest.raises(CopeditError, match=message):
        checkpoint.read_config(folder)


def test_numbers_that_python_alone_can_say_are_out_of_range():
    for value in (float("nan"), float("inf"), -1.0):
        with pytest.raises(CopeditError, match=rf"preprocessing.field_of_view: {value} is out of range"):
            Preprocessing(field_of_view=(192.0, value, None))


LONG = {"lists": "[" * 100_000, "objects": '{"a":' * 100_000, "digits": "1" * 100_000, "no text": "\xff"}


@pytest.mark.parametrize("text", [*LONG.values(), '{"name": "' + "x" * (64 << 20)], ids=[*LONG, "64 MiB"])
def test_a_configuration_that_would_be_much_to_read(folder, text):
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CopeditError, match=r"config\.json: not valid JSON") as refused:
        checkpoint.read_config(folder)
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize(("part", "load"), [("tokenizer", "load_tokenizer"), ("denoiser", "load_denoiser")])
def test_a_configuration_of_other_weights_allocates_nothing(folder, part, load):
    """As large as the ranges allow: gigabytes, were it built before it is compared with the weights."""
    data = json.loads((folder / "config.json").read_text())
    large = {"channels": [4096], "residual_channels": 4096, "codes": 2**20, "residual_units": 16}
    data[part] |= large if part == "tokenizer" else {"width": 8192, "heads": 64, "blocks": 64}
    (folder / "config.json").write_text(json.dumps(data))
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, limits[1]))
    try:
        words = "(the config.json beside it asks|tensor .*; the weights do not)"
        with pytest.raises(CopeditError, match=f"{part}.safetensors: {words}"):
            getattr(checkpoint, load)(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.parametrize("low", [640, 896, 1152, 1408, 19280])
def test_sound_weights_whose_length_begins_like_a_pickle(folder, low):
    """A safetensors file begins with the length of its header; padded with blanks, as the format allows."""
    path = folder / "tokenizer.safetensors"
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    padded = low + 65536 * (size > low) + 65536 * (size > low + 65536)
    path.write_bytes(padded.to_bytes(8, "little") + content[8 : 8 + size].ljust(padded) + content[8 + size :])
    assert path.read_bytes()[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
    assert checkpoint.load_tokenizer(folder)[0] == CONFIG


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_that_are_not_finite_are_refused(folder, value, dtype):
    edit(folder, lambda t: t.update(codebook=t["codebook"].to(dtype)))
    checkpoint.load_tokenizer(folder)
    edit(folder, lambda t: t["codebook"].view(-1).__setitem__(17, value))
    with pytest.raises(CopeditError, match=r"tokenizer\.safetensors: tensor codebook holds NaN or infinity"):
        checkpoint.load_tokenizer(folder)


def test_missing_field_and_bad_json(folder):
    data = json.loads((folder / "config.json").read_text())
    del data["task"]
    (folder / "config.json").write_text(json.dumps(data))
    with pytest.raises(CopeditError, match="missing 1 required positional argument: 'task'"):
        checkpoint.read_config(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CopeditError, match="not valid JSON"):
        checkpoint.read_config(folder)


def test_unknown_model_names_the_built_in_ones(tmp_path):
    with pytest.raises(CopeditError, match=r"model 'nope': no folder with a config\.json and no built-in name"):
        checkpoint.locate("nope")


def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(folder, monkeypatch):
    old = (folder / "config.json").read_bytes()

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(CopeditError, match=r"cannot write .*: No space left on device"):
        checkpoint.write_config(folder, CONFIG)
    assert (folder / "config.json").read_bytes() == old
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "denoiser.safetensors", "tokenizer.safetensors"]


def test_a_folder_that_is_a_file_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CopeditError, match=r"cannot write .*config\.json"):
        checkpoint.write_config(tmp_path / "file" / "m", CONFIG)
