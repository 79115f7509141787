"""Small models with weights that do something, and studies for them: for tests of exports and engines."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from copedit_rt import checkpoint
from copedit_rt.config import DenoiserConfig, DiffusionConfig, ModelConfig, Preprocessing, TokenizerConfig
from copedit_rt.engines import onnx_export
from copedit_rt.engines.engine import Engine
from copedit_rt.images.nifti import Volume
from copedit_rt.images.study import Study
from copedit_rt.networks.denoiser import build_denoiser
from copedit_rt.networks.tokenizer import CoPeVAE

BRAIN = ModelConfig(
    "tiny-brain",
    "brain",
    ("t1", "t1ce", "t2", "flair"),
    (16, 16, 8),
    TokenizerConfig(
        channels=(8,), strides=((2, 2, 1),), residual_units=1, residual_channels=8, latent_channels=3, codes=64,
        prompt_channels=(8, 8), prompt_dim=16, contrast_dim=8,
    ),
    DenoiserConfig(width=48, heads=3, blocks=2, patch=(2, 2, 2)),
    DiffusionConfig(steps=4),
    Preprocessing(field_of_view=(32.0, 32.0, 32.0)),
)  # fmt: skip
# No two sizes alike: what counts them or mixes them up shows.
UNEVEN = ModelConfig(
    "tiny",
    "brain",
    ("t1", "t1ce", "t2", "flair"),
    (16, 16, 8),
    TokenizerConfig(
        channels=(6, 10), strides=((2, 2, 2), (2, 2, 2)), residual_units=1, residual_channels=4, codes=50,
        prompt_channels=(6, 10), prompt_dim=12, contrast_dim=5,
    ),
    DenoiserConfig(width=48, heads=2, blocks=4, patch=(2, 2, 1)),
)  # fmt: skip
HEART = replace(
    BRAIN,
    name="tiny-heart",
    task="cardiac",
    elements=("slab0", "slab1", "slab2"),
    image=(16, 16, 4),
    tokenizer=replace(BRAIN.tokenizer, quantise=False),
    denoiser=replace(BRAIN.denoiser, patch=(1, 1, 1), prompts="mask"),
    preprocessing=Preprocessing(field_of_view=(32.0, 32.0, None)),
)
GRID = np.diag([2.0, 2.0, 4.0, 1.0])


@torch.no_grad()
def perturb(*modules: nn.Module) -> None:
    """Move the weights of fresh networks, whose zero-initialised layers would return zeros."""
    for p in (p for module in modules for p in module.parameters()):
        p += (0.5 / p[0].numel() ** 0.5 if p.ndim > 1 else 0.1) * torch.randn_like(p)


def saved(config: ModelConfig, folder: Path) -> Path:
    """A model folder with weights that do something."""
    torch.manual_seed(0)
    vae, net = CoPeVAE(config.tokenizer, len(config.elements)), build_denoiser(config)
    perturb(net, vae.encoder, vae.decoder)
    with torch.no_grad():
        for name, statistic in vae.named_buffers():
            if statistic.is_floating_point():
                statistic.copy_(torch.rand_like(statistic) * (0.1 if "mean" in name else 1) + 0.2)
    checkpoint.save(folder, config, vae, net)
    return folder


def exported(config: ModelConfig, folder: Path, precision: str = "float32") -> Path:
    model = saved(config, folder / "model")
    onnx_export.export_onnx(model, folder / "onnx", precision)
    return folder / "onnx"


def study(config: ModelConfig, *there: str) -> Study:
    generator = np.random.default_rng(3)
    if config.task == "cardiac":
        data = generator.random((16, 16, 12)) + 0.1
        data[..., [5, 6]] = 0
        return Study("h1", "cardiac", {"sax": Volume.from_array(data, GRID)}, missing_slices=(5, 6))
    volumes = {name: Volume.from_array(generator.random((16, 16, 8)) + 0.1, GRID) for name in config.elements}
    return Study("s1", "brain", {name: volumes[name] for name in there})


def write(given: Study, folder: Path) -> Path:
    for name, volume in given.volumes.items():
        volume.save(folder / given.name / f"{given.name}_{name}.nii.gz", "simulated")
    return folder / given.name


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def check_batch(engine: Engine, config: ModelConfig) -> None:
    """Two studies with other patterns at once come out as each by itself, images and prompts to the bit."""
    draw, m, c = np.random.default_rng(4), len(config.elements), config.tokenizer
    images = draw.random((2, m - 1, 1, *config.image), np.float32)
    z = draw.standard_normal((2, m, c.latent_channels, *config.latent), np.float32)
    observed = ~np.eye(m, dtype=bool)[[0, 1]]
    prompts = draw.standard_normal((2, 3, c.prompt_dim), np.float32)
    prior = draw.standard_normal(z.shape, np.float32) if config.denoiser.prior else None
    told: list[tuple[int, int]] = []
    both = engine.sample(z, prompts, observed, 3, "dpm2m", lambda *done: told.append(done), prior)
    encoded = engine.encode(images)
    assert told == sorted(told) and told[-1] == (3, 3)
    shown = z if config.task == "cardiac" else z[:, :2]
    decoded = engine.decode(shown)
    assert encoded.prompts.shape == (2, 3, c.prompt_dim) and encoded.alone.shape == (2, m - 1, m)
    assert not np.allclose(both[0], both[1], atol=0.1)
    for i in range(2):
        one = slice(i, i + 1)
        given = None if prior is None else prior[one]
        alone = engine.sample(z[one], prompts[one], observed[one], 3, "dpm2m", None, given)
        np.testing.assert_allclose(both[one], alone, atol=1e-5)
        assert np.array_equal(both[i][observed[i]], z[i][observed[i]])
        part = engine.encode(images[one])
        for name in ("latents", "prompts", "count", "missing", "alone"):
            assert np.array_equal(getattr(encoded, name)[one], getattr(part, name)), name
        assert np.array_equal(decoded[one], engine.decode(shown[one]))
