"""Model folders: round trip, and every way in which one can be broken."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from copedit_rt import checkpoint, files
from copedit_rt.config import PRESETS, DenoiserConfig, ModelConfig, TokenizerConfig
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


def change_config(folder, **changes):
    data = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": 1}, "config: unknown field 'colour'"),
        ({"task": "knee"}, r"config.task: 'knee' is not a valid"),
        ({"image": [8, 8]}, r"config.image: \[8, 8\] is not a valid"),
        ({"image": [8, 8, 7]}, "does not divide by"),
        ({"elements": ["t1"]}, "1 elements; 2 to 8 are supported"),
        ({"denoiser": {"width": 10, "heads": 2}}, "head dimension divisible by 8"),
        ({"denoiser": {"width": "wide"}}, r"config.denoiser.width: 'wide' is not a valid int"),
        ({"tokenizer": {"channels": [4, 4], "strides": [[2, 2, 2]]}}, "2 channels but 1 strides"),
    ],
)
def test_broken_configuration(folder, changes, message):
    change_config(folder, **changes)
    with pytest.raises(CopeditError, match=message):
        checkpoint.read_config(folder)


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
