"""Who runs a whole model: PyTorch as users write it, eager or compiled; our engine; ONNX Runtime.

All take and return tensors of B studies, k of whose m elements are observed: encode, images [B, k, 1, H, W, D] ->
latents and prompts; sample, latents [B, m, 8, h, w, d] -> "z"; decode, latents [B, n, 8, h, w, d] -> "images". Studies
are encoded and decoded one after the other, as their feature maps are the largest thing in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from copedit_bench.models import plain
from copedit_bench.models.side_by_side import SEED, perturb
from copedit_rt.config import ModelConfig
from copedit_rt.engines.onnx_engine import OnnxEngine
from copedit_rt.engines.torch_engine import TorchEngine
from copedit_rt.networks.denoiser import MDiT3D
from copedit_rt.networks.sampler import Plan
from copedit_rt.networks.tokenizer import CoPeVAE

Answer = dict[str, Tensor]
Networks = tuple[CoPeVAE, MDiT3D]


def random_networks(config: ModelConfig) -> Networks:
    """Of a preset, with weights that are random but return no zeros."""
    torch.manual_seed(SEED)
    vae, net = CoPeVAE(config.tokenizer, len(config.elements)), MDiT3D(config)
    for part in (vae, net):
        perturb(part)
        part.eval().requires_grad_(False)
    return vae, net


class Inputs:
    """Random images, latents and prompts of a batch of studies, of which one element is missing."""

    def __init__(self, config: ModelConfig, vae: CoPeVAE, batch: int, device: torch.device):
        generator = torch.Generator().manual_seed(SEED)
        m, prompt = len(config.elements), config.tokenizer.prompt_dim
        missing = 1 if config.task == "cardiac" else m - 1  # a slab with neighbours; the last modality
        self.observed = (torch.arange(m) != missing).expand(batch, -1).contiguous().to(device)
        self.images = torch.rand((batch, m - 1, 1, *config.image), generator=generator).to(device)
        shape = (batch, m, config.tokenizer.latent_channels, *config.latent)
        self.z = torch.randn(shape, generator=generator).to(device)
        self.prompts = torch.randn((batch, 3, prompt), generator=generator).to(device)
        # Exactly at codes, so that rounding does not choose another one.
        wanted = m if config.task == "cardiac" else 1
        index = torch.randint(config.tokenizer.codes, (batch, wanted, *config.latent), generator=generator)
        self.codes = vae.normalise(vae.codebook[index].movedim(-1, 2)).to(device)


class Runner(Protocol):
    def encode(self, images: Tensor) -> Answer: ...

    def sample(self, z: Tensor, prompts: Tensor, observed: Tensor, steps: int) -> Answer: ...

    def decode(self, z: Tensor) -> Answer: ...


def whole(runner: Runner, config: ModelConfig, inputs: Inputs, steps: int) -> Answer:
    """Images to images: encode, start from noise, sample, decode what is missing (of a heart, all)."""
    encoded = runner.encode(inputs.images)
    z = inputs.z.clone()
    z[inputs.observed] = encoded["latents"].flatten(0, 1).float().to(z.device)
    made = runner.sample(z, encoded["prompts"], inputs.observed, steps)["z"]
    wanted = made if config.task == "cardiac" else made[~inputs.observed].unflatten(0, (len(z), -1))
    return runner.decode(wanted)


def _each(call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.cat([call(one) for one in x.split(1)])


class Eager:
    """As users write it: `plain`. Every element is encoded once; prompts and heads stay in float32, as in ours."""

    def __init__(
        self, config: ModelConfig, networks: Networks, device: torch.device, dtype: torch.dtype, compiled: bool = False
    ):
        self.config, self.dtype, self.compiled = config, dtype, compiled
        vae, net = networks
        self.vae = plain.PlainCoPeVAE(config.tokenizer, len(config.elements))
        self.vae.load_state_dict(vae.state_dict())
        self.net: Any = plain.write_plainly(MDiT3D(config))
        self.net.load_state_dict(net.state_dict())
        self.vae.to(device, torch.float64 if dtype == torch.float64 else None).eval().requires_grad_(False)
        self.net.to(device).eval().requires_grad_(False)
        large = (*self.vae.encoder.parameters(), *self.vae.decoder.parameters(), *self.net.parameters())
        for p in large:  # not the tables of positions and frequencies
            p.data = p.to(dtype)
        if compiled:
            options: dict[str, Any] = {"mode": "max-autotune", "dynamic": False}
            self.net = torch.compile(self.net, **options)
            self.vae.encoder.compile(**options)
            self.vae.decoder.compile(**options)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Answer:
        def one(x: Tensor) -> Tensor:
            self._begin()
            return self.vae.encode(x).to(self.vae.latent_mean.dtype)

        z = _each(one, images)
        prompts = self.vae.prompts(z, torch.ones(z.shape[:2], dtype=torch.bool, device=z.device))
        return {"latents": self.vae.normalise(z), "prompts": prompts}

    @torch.no_grad()
    def sample(self, z: Tensor, prompts: Tensor, observed: Tensor, steps: int) -> Answer:
        if self.dtype == torch.float64:
            z = z.double()
        prompts = prompts.to(self.dtype)
        return {"z": plain.sample(self._predict, z, prompts, observed, self.config.diffusion, steps, self.dtype)}

    def _predict(self, *given: Tensor) -> Tensor:
        self._begin()
        return self.net(*given)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Answer:
        def one(x: Tensor) -> Tensor:
            self._begin()
            return self.vae.images(x.to(self.vae.latent_mean.dtype), self.config.task == "cardiac").clone()

        return {"images": _each(one, z)}

    def _begin(self) -> None:
        if self.compiled:  # results of the call before may be overwritten
            torch.compiler.cudagraph_mark_step_begin()


class Ours:
    """The engine of `copedit synth` on torch, with its plan for whole batches."""

    def __init__(
        self,
        config: ModelConfig,
        networks: Networks,
        device: torch.device,
        dtype: torch.dtype,
        max_memory: int | None = None,
    ):
        self.config, self.joint, self.dtype = config, config.task == "cardiac", dtype
        self.engine = TorchEngine(config, *networks, device, max_memory, dtype)
        self._plan = cache(self._new_plan)

    def _new_plan(self, observed: tuple[tuple[bool, ...], ...], steps: int) -> Plan:
        return Plan(cast(MDiT3D, self.engine.denoiser), self.config, steps, torch.tensor(observed), "ddim")

    @torch.no_grad()
    def encode(self, images: Tensor) -> Answer:
        vae, limit = self.engine.tokenizer, self.engine.max_memory
        z = _each(lambda x: vae.encode(x, limit).to(vae.latent_mean.dtype), images)
        prompts = vae.prompts(z, torch.ones(z.shape[:2], dtype=torch.bool, device=z.device))
        return {"latents": vae.normalise(z), "prompts": prompts}

    @torch.no_grad()
    def sample(self, z: Tensor, prompts: Tensor, observed: Tensor, steps: int) -> Answer:
        plan = self._plan(tuple(map(tuple, observed.tolist())), steps)
        return {"z": plan.run(z, prompts)}

    @torch.no_grad()
    def decode(self, z: Tensor) -> Answer:
        vae, limit = self.engine.tokenizer, self.engine.max_memory
        return {"images": _each(lambda x: vae.images(x, self.joint, limit), z)}


class Onnx:
    """An engine on exported files, ONNX Runtime's or OpenVINO's, one study after the other."""

    def __init__(self, engine: OnnxEngine, dtype: torch.dtype = torch.float32):
        self.engine, self.dtype = engine, dtype

    def encode(self, images: Tensor) -> Answer:
        found = [self.engine.encode(x.numpy()) for x in images]
        return {
            "latents": torch.from_numpy(np.stack([x.latents for x in found])),
            "prompts": torch.from_numpy(np.stack([x.prompts for x in found])),
        }

    def sample(self, z: Tensor, prompts: Tensor, observed: Tensor, steps: int) -> Answer:
        given = zip(z.numpy(), prompts.float().numpy(), observed.numpy(), strict=True)
        return {"z": torch.from_numpy(np.stack([self.engine.sample(*one, steps, "ddim") for one in given]))}

    def decode(self, z: Tensor) -> Answer:
        return {"images": torch.from_numpy(np.stack([self.engine.decode(x.numpy()) for x in z]))}
