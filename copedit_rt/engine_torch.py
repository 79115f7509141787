"""The engine on torch: Triton kernels on CUDA, their reference on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from copedit_rt import diffusion
from copedit_rt.config import ModelConfig
from copedit_rt.denoiser import MDiT3D, UNet
from copedit_rt.engine import Encoded
from copedit_rt.plan import Plan
from copedit_rt.tokenizer import CoPeVAE


class TorchEngine:
    """See `engine.Engine`."""

    name = "torch"

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: CoPeVAE,
        denoiser: MDiT3D | UNet,
        device: torch.device,
        max_memory: int | None = None,
    ):
        """max_memory: as in `synthesizer.Synthesizer`."""
        self.config = config
        self.max_memory = max_memory
        self._device = device
        self.device = device.type
        self.versions = {"torch": str(torch.__version__)}
        self.tokenizer = tokenizer.to(device).eval().requires_grad_(False)
        self.denoiser = denoiser.to(device).eval().requires_grad_(False)
        self.plan = lru_cache(maxsize=4)(self._plan)  # a cohort has few missing patterns

    @torch.no_grad()
    def encode(self, images: np.ndarray) -> Encoded:
        vae = self.tokenizer
        z = vae.encode(self._there(images)[None], self.max_memory)
        prompts = vae.prompts(z, torch.ones(z.shape[:2], dtype=torch.bool, device=z.device))
        count, missing, _ = vae.assess(prompts)
        alone = vae.assess(vae.prompts_of_each(z)[0])[1]
        first = (vae.normalise(z)[0], prompts[0], count[0], missing[0], alone)
        return Encoded(*(_here(x) for x in first))

    @torch.no_grad()
    def sample(
        self,
        z: np.ndarray,
        prompts: np.ndarray,
        observed: np.ndarray,
        steps: int,
        solver: str,
        progress: Callable[[int, int], None] | None = None,
    ) -> np.ndarray:
        start, given, net = self._there(z)[None], self._there(prompts)[None], self.denoiser
        if isinstance(net, MDiT3D):
            return _here(self.plan(tuple(observed.tolist()), steps, solver).run(start, given, progress)[0])
        there = self._there(observed)[None]

        def predict(z: Tensor, t: Tensor) -> Tensor:
            return net(z, t, given, there)

        return _here(diffusion.sample(predict, start, there, self.config.diffusion, steps, progress, solver)[0])

    def _plan(self, observed: tuple[bool, ...], steps: int, solver: str) -> Plan:
        assert isinstance(self.denoiser, MDiT3D)
        return Plan(self.denoiser, self.config, steps, torch.tensor([observed]), solver)

    @torch.no_grad()
    def decode(self, z: np.ndarray) -> np.ndarray:
        return _here(self.tokenizer.images(self._there(z)[None], self.config.task == "cardiac", self.max_memory)[0])

    def _there(self, x: np.ndarray) -> Tensor:
        return torch.from_numpy(x).to(self._device)


def _here(x: Tensor) -> np.ndarray:
    return x.float().cpu().numpy()
