"""Linear layers in float8, on the CPU, where PyTorch emulates the product, and on a GPU."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from small import BRAIN, perturb
from torch import nn

from copedit_rt.config import PRESETS, DenoiserConfig, ModelConfig
from copedit_rt.denoiser import MDiT3D
from copedit_rt.engine_torch import TorchEngine
from copedit_rt.errors import CopeditError
from copedit_rt.float8 import LARGEST, Float8Linear, scaled
from copedit_rt.plan import Plan
from copedit_rt.synthesizer import choose_dtype
from copedit_rt.tokenizer import CoPeVAE

TINY = replace(BRAIN, image=(16, 16, 8), denoiser=DenoiserConfig(width=96, heads=2, blocks=4))


def network(config: ModelConfig) -> MDiT3D:
    torch.manual_seed(0)
    net = MDiT3D(config).eval().requires_grad_(False)
    perturb(net)
    return net


def test_every_row_uses_the_whole_range() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 64) * torch.tensor([1e-3, 1.0, 1e3, 0.0, 1.0])[:, None]
    rows, scale = scaled(x)
    assert scale.dtype == torch.float32 and scale.shape == (5, 1)
    assert (rows.float().abs().amax(1)[[0, 1, 2, 4]] == LARGEST).all() and not rows[3].float().any()
    back = rows.float() * scale
    normal = x.abs() > scale * 2**-6  # below, float8 has fewer digits: steps of 2^-9
    assert ((back - x).abs() <= torch.where(normal, 2**-4 * x.abs() * 1.001, scale * 2**-10 * 1.001)).all()


def test_a_layer_is_the_product_of_what_was_rounded() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 96).bfloat16().requires_grad_(False), torch.randn(2, 3, 16, 64).bfloat16()
    rows, scale = scaled(x.flatten(0, -2))
    weight, per = scaled(layer.weight)
    exact = (rows.double() * scale) @ (weight.double() * per).T + layer.bias.double()
    made = Float8Linear(layer)(x)
    assert made.dtype == torch.bfloat16 and made.shape == (2, 3, 16, 96)
    error = (made.double() - exact.unflatten(0, (2, 3, 16))).abs().max()
    assert error <= 2 * torch.finfo(torch.bfloat16).eps * exact.abs().max()
    plain = layer(x).double() - exact.unflatten(0, (2, 3, 16))
    assert plain.abs().max() > 2 * error, "nothing was rounded to float8"


def test_the_engine_in_float8_is_near_float32() -> None:
    vae, net = CoPeVAE(TINY.tokenizer, 4), network(TINY)
    wide, small = (TorchEngine(TINY, vae, net, torch.device("cpu"), dtype=t) for t in (None, torch.float8_e4m3fn))
    assert (wide.precision, small.precision) == ("float32", "float8")
    blocks = small.denoiser.blocks
    assert all(isinstance(block.mlp_in, Float8Linear) and isinstance(block.modulation, nn.Linear) for block in blocks)
    rng = np.random.default_rng(0)
    z, prompts = (rng.standard_normal(s).astype(np.float32) for s in ((4, 3, *TINY.latent), (3, 16)))
    observed = np.array([True, False, True, False])
    found, exact = (engine.sample(z, prompts, observed, 4, "ddim") for engine in (small, wide))
    error = np.linalg.norm((found - exact)[~observed]) / np.linalg.norm(exact[~observed])
    assert 1e-3 < error < 0.1
    assert np.array_equal(found[observed], z[observed])


def test_float8_is_for_gpus_that_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CopeditError, match="'float8' is for GPUs"):
        choose_dtype("float8", torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    with pytest.raises(CopeditError, match=r"'float8' needs a GPU of compute capability 8.9 or more, not 8.0"):
        choose_dtype("float8", torch.device("cuda"))


@pytest.mark.gpu
def test_the_error_of_a_paper_sized_step(record_property) -> None:
    """brain-brats with random weights: float8 and bfloat16 against float32, of the missing element."""
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no float8 on this GPU")
    small = {"latent_channels": 8, "prompt_dim": 512, "channels": (4, 4, 4), "strides": ((2, 2, 2),) * 3}
    config = replace(PRESETS["brain-brats"], tokenizer=replace(TINY.tokenizer, **small))
    vae, net = CoPeVAE(config.tokenizer, 4), network(config)
    observed = torch.tensor([[True, True, True, False]])
    torch.manual_seed(1)
    z, prompts = torch.randn(1, 4, 8, *config.latent, device="cuda"), torch.randn(1, 3, 512, device="cuda")
    made = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn):
        engine = TorchEngine(config, vae, net, torch.device("cuda"), dtype=dtype)
        made[dtype] = Plan(engine.denoiser, config, 1, observed, "ddim").run(z, prompts)[0, 3]
    exact = made.pop(torch.float32)
    errors = {str(dtype): float((x - exact).norm() / exact.norm()) for dtype, x in made.items()}
    record_property("relative error", errors)
    print(errors)
    assert errors["torch.bfloat16"] < 0.03 and errors["torch.bfloat16"] < errors["torch.float8_e4m3fn"] < 0.1
