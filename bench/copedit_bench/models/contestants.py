"""Who computes a whole model: PyTorch as users write it, eager or compiled, with the methods of an engine
(`copedit_rt.engines.engine.Engine`), so that it takes part beside the engines of `copedit synth` themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from copedit_bench.models import plain
from copedit_bench.models.side_by_side import SEED, Answer, perturb
from copedit_rt.config import ModelConfig, TokenizerConfig
from copedit_rt.engines.engine import Encoded, Engine
from copedit_rt.errors import CopeditError
from copedit_rt.networks.denoiser import MDiT3D
from copedit_rt.networks.precision import tried_convolutions
from copedit_rt.networks.tokenizer import CoPeVAE

Networks = tuple[CoPeVAE, MDiT3D]
SOLVER = "ddim"


def random_networks(config: ModelConfig) -> Networks:
    """Of a preset, with weights that are random but return no zeros."""
    torch.manual_seed(SEED)
    vae, net = CoPeVAE(config.tokenizer, len(config.elements)), MDiT3D(config)
    for part in (vae, net):
        perturb(part)
        part.eval().requires_grad_(False)
    return vae, net


class Inputs:
    """Random images, latents and prompts of a batch of studies, of which one element is missing; on the host."""

    def __init__(self, config: ModelConfig, vae: CoPeVAE, batch: int):
        generator = torch.Generator().manual_seed(SEED)
        m, prompt = len(config.elements), config.tokenizer.prompt_dim
        missing = 1 if config.task.joint else m - 1  # a slab with neighbours; the last modality
        self.observed = np.tile(np.arange(m) != missing, (batch, 1))
        self.decoded = np.flatnonzero(config.task.decoded(self.observed[0]))
        self.images = torch.rand((batch, m - 1, 1, *config.image), generator=generator).numpy()
        shape = (batch, m, config.tokenizer.latent_channels, *config.latent)
        self.z = torch.randn(shape, generator=generator).numpy()
        self.prompts = torch.randn((batch, 3, prompt), generator=generator).numpy()
        # Exactly at codes, so that rounding does not choose another one.
        wanted = batch, len(self.decoded), *config.latent
        index = torch.randint(config.tokenizer.codes, wanted, generator=generator)
        self.codes = vae.normalise(vae.codebook[index].movedim(-1, 2)).numpy()


def encode(engine: Engine, inputs: Inputs) -> Answer:
    """Latents and prompts of what is observed."""
    encoded = engine.encode(inputs.images)
    return {"latents": torch.from_numpy(encoded.latents), "prompts": torch.from_numpy(encoded.prompts)}


def sample(engine: Engine, inputs: Inputs, steps: int) -> Answer:
    """Latents after the sampling loop."""
    return {"z": torch.from_numpy(engine.sample(inputs.z, inputs.prompts, inputs.observed, steps, SOLVER))}


def decode(engine: Engine, inputs: Inputs) -> Answer:
    """Images of what is missing (of a heart, all)."""
    return {"images": torch.from_numpy(engine.decode(inputs.codes))}


def whole(engine: Engine, inputs: Inputs, steps: int) -> Answer:
    """Images to images: encode, start from noise, sample, decode what is missing (of a heart, all)."""
    encoded, z = engine.encode(inputs.images), inputs.z.copy()
    z[inputs.observed] = encoded.latents.reshape(-1, *z.shape[2:])
    made = engine.sample(z, encoded.prompts.astype(np.float32), inputs.observed, steps, SOLVER)
    return {"images": torch.from_numpy(engine.decode(made[:, inputs.decoded]))}


class PlainEngine:
    """As users write it: `plain`. Every element is encoded once; prompts and heads stay in float32, as in ours."""

    def __init__(
        self,
        config: ModelConfig,
        networks: Networks,
        device: torch.device,
        dtype: torch.dtype,
        compiled: bool = False,
        mode: str = "max-autotune",
    ):
        """mode: of torch.compile."""
        self.config, self.dtype, self.compiled, self._device = config, dtype, compiled, device
        self.name, self.device = "compile" if compiled else "eager", str(device)
        self.precision = str(dtype).removeprefix("torch.")
        self.versions = {"torch": str(torch.__version__)}
        vae, net = networks
        self.vae = plain.PlainCoPeVAE(config.tokenizer, len(config.elements))
        self.vae.load_state_dict(vae.state_dict())
        self.net: Any = plain.PlainMDiT3D(config)
        self.net.load_state_dict(net.state_dict())
        self.vae.to(device, torch.float64 if dtype == torch.float64 else None).eval().requires_grad_(False)
        self.net.to(device).eval().requires_grad_(False)
        large = (*self.vae.encoder.parameters(), *self.vae.decoder.parameters(), *self.net.parameters())
        for p in large:  # not the tables of positions and frequencies
            p.data = p.to(dtype)
        if compiled:
            options: dict[str, Any] = {"mode": mode, "dynamic": False}
            self.net = torch.compile(self.net, **options)
            self.vae.encoder.compile(**options)
            self.vae.decoder.compile(**options)

    @tried_convolutions()
    @torch.no_grad()
    def encode(self, images: np.ndarray) -> Encoded:
        return Encoded.join([self._encode(self._there(one)) for one in images[:, None]])

    def _encode(self, images: Tensor) -> Encoded:
        self._begin()
        z = self.vae.encode(images).to(self.vae.latent_mean.dtype)
        each = self.vae.prompts_of_each(z)
        prompts = each.mean(1)
        count, missing, _ = self.vae.assess(prompts)
        alone = self.vae.assess(each[0])[1][None]
        return Encoded(*(_here(x) for x in (self.vae.normalise(z), prompts, count, missing, alone)))

    @torch.no_grad()
    def sample(
        self,
        z: np.ndarray,
        prompts: np.ndarray,
        observed: np.ndarray,
        steps: int,
        solver: str,
        progress: Callable[[int, int], None] | None = None,
        prior: np.ndarray | None = None,
    ) -> np.ndarray:
        assert solver == SOLVER and progress is prior is None  # what `plain` knows
        start, given = self._there(z), self._there(prompts).to(self.dtype)
        if self.dtype == torch.float64:
            start = start.double()
        net, there = self._predict, self._there(observed)
        return _here(plain.sample(net, start, given, there, self.config.diffusion, steps, self.dtype))

    def _predict(self, *given: Tensor) -> Tensor:
        self._begin()
        return self.net(*given)

    @tried_convolutions()
    @torch.no_grad()
    def decode(self, z: np.ndarray) -> np.ndarray:
        return np.concatenate([_here(self._decode(self._there(one))) for one in z[:, None]])

    def _decode(self, z: Tensor) -> Tensor:
        self._begin()
        return self.vae.images(z.to(self.vae.latent_mean.dtype), self.config.task.joint)

    def _there(self, x: np.ndarray) -> Tensor:
        return torch.from_numpy(x).to(self._device)

    def _begin(self) -> None:
        if self.compiled:  # results of the call before may be overwritten
            torch.compiler.cudagraph_mark_step_begin()


class MonaiEngine(PlainEngine):
    """`PlainEngine` with encoder and decoder of MONAI's layers, on the same weights, as that library has them:
    contiguous, every layer by itself. It encodes and decodes; the rest is PlainEngine's.

    Raises ImportError without MONAI, CopeditError for levels that differ in their residual units: it has no such.
    """

    def __init__(self, config: ModelConfig, networks: Networks, device: torch.device, dtype: torch.dtype):
        super().__init__(config, networks, device, dtype)
        encoder, decoder = monai_layers(config.tokenizer)
        for made, given in ((encoder, self.vae.encoder), (decoder, self.vae.decoder)):
            names, weights = made.state_dict(), given.state_dict().values()  # in the order of the layers, both
            made.load_state_dict(dict(zip(names, weights, strict=True)))
            made.to(device, dtype).eval().requires_grad_(False)
        encoder.out, decoder.inp = encoder.blocks[-1].conv, decoder.blocks[0].conv  # whose type `CoPeVAE` asks for
        self.vae.encoder, self.vae.decoder = encoder, decoder
        self.name = "monai"


def monai_layers(c: TokenizerConfig) -> tuple[Any, Any]:
    """Encoder and decoder of MONAI's VQVAE with a tokenizer's sizes, weights at random."""
    from monai.networks.nets.vqvae import Decoder, Encoder

    if len(set(c.units)) > 1:
        raise CopeditError(f"monai: its VQVAE has as many residual units in every level, not {c.units}")
    down: list[Any] = [(s, tuple(4 if n == 2 else 3 for n in s), 1, 1) for s in c.strides]
    up: list[Any] = [(*level, 0) for level in reversed(down)]
    sizes: dict[str, Any] = {
        "spatial_dims": 3,
        "channels": c.channels,
        "num_res_layers": c.units[0],
        "num_res_channels": c.hidden,
        "dropout": 0.0,
        "act": "RELU",
    }
    latent = c.latent_channels
    encoder = Encoder(in_channels=1, out_channels=latent, downsample_parameters=down, **sizes)
    return encoder, Decoder(in_channels=latent, out_channels=1, upsample_parameters=up, output_act=None, **sizes)


def _here(x: Tensor) -> np.ndarray:
    return (x if x.dtype == torch.float64 else x.float()).cpu().numpy()
