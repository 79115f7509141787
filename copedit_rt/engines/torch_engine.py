"""The engine on torch: Triton kernels on CUDA, their reference on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache
from typing import TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from copedit_rt.config import ModelConfig
from copedit_rt.engines.cpu_blocks import pack
from copedit_rt.engines.engine import Encoded
from copedit_rt.networks import sampler
from copedit_rt.networks.denoiser import MDiT3D, UNet
from copedit_rt.networks.precision import exact_float32, tried_convolutions
from copedit_rt.networks.sampler import Plan
from copedit_rt.networks.tokenizer import CoPeVAE, PromptEncoder, fold_norms, lean

Net = TypeVar("Net", bound=nn.Module)


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
        dtype: torch.dtype | None = None,
    ):
        """max_memory: as in `synthesizer.Synthesizer`.

        dtype: of the autoencoder's and the denoiser's weights and products (None: their own). The codebook, prompt
        encoders, heads, statistics and the sampler's latents stay in float32, as elements differ by less than bfloat16
        resolves. A U-Net stays in float32 on a CPU, see `tokenizer.unsafe_type`. The networks given are not changed.
        """
        self.config = config
        self.max_memory = max_memory
        self._device = device
        self.device = str(device)
        self.versions = {"torch": str(torch.__version__)}
        self.tokenizer = lean_tokenizer(tokenizer, device, dtype)
        if isinstance(denoiser, UNet) and device.type == "cpu" and dtype == torch.bfloat16:
            dtype = torch.float32
        self.denoiser = _copy(denoiser, set(denoiser.parameters()), device, dtype)
        self._dtype = next(self.denoiser.parameters()).dtype
        self.precision = str(self._dtype).removeprefix("torch.")
        if isinstance(self.denoiser, MDiT3D):
            pack(self.denoiser)
        self.plan = lru_cache(maxsize=4)(self._plan)  # a cohort has few missing patterns

    @exact_float32()
    @tried_convolutions()
    @torch.no_grad()
    def encode(self, images: np.ndarray) -> Encoded:
        return Encoded.join([self._encode(self._there(one)) for one in images[:, None]])

    def _encode(self, images: Tensor) -> Encoded:
        vae = self.tokenizer
        z = vae.encode(images, self.max_memory).to(vae.latent_mean.dtype)
        each = vae.prompts_of_each(z)
        prompts = each.mean(1)
        count, missing, _ = vae.assess(prompts)
        alone = vae.assess(each[0])[1][None]
        return Encoded(*(_here(x) for x in (vae.normalise(z), prompts, count, missing, alone)))

    @exact_float32()
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
        begun = None if prior is None else self._there(prior)
        start, given, net = self._there(z), self._there(prompts), self.denoiser
        if isinstance(net, MDiT3D):
            plan = self.plan(tuple(map(tuple, observed.tolist())), steps, solver)
            return _here(plan.run(start, given, progress, begun))
        there = self._there(observed)

        def predict(z: Tensor, t: Tensor) -> Tensor:
            return net(z.to(self._dtype), t, given, there, prior=begun)

        return _here(sampler.sample(predict, start, there, self.config.diffusion, steps, progress, solver))

    def _plan(self, observed: tuple[tuple[bool, ...], ...], steps: int, solver: str) -> Plan:
        assert isinstance(self.denoiser, MDiT3D)
        return Plan(self.denoiser, self.config, steps, torch.tensor(observed), solver)

    @exact_float32()
    @tried_convolutions()
    @torch.no_grad()
    def decode(self, z: np.ndarray) -> np.ndarray:
        return np.concatenate([_here(self._decode(self._there(one))) for one in z[:, None]])

    def _decode(self, z: Tensor) -> Tensor:
        return self.tokenizer.images(z, self.config.task.joint, self.max_memory)

    def _there(self, x: np.ndarray) -> Tensor:
        return torch.from_numpy(x).to(self._device)


def lean_tokenizer(tokenizer: CoPeVAE, device: torch.device, dtype: torch.dtype | None = None) -> CoPeVAE:
    """A copy for inference: the autoencoder in another type (None: its own), norms folded into convolutions, whose
    weights are laid out with channels last, and which are computed in the way that is fastest for their size."""
    parts = (*tokenizer.encoder.parameters(), *tokenizer.decoder.parameters())
    made = _copy(tokenizer, set(parts), device, dtype)
    for encoder in made.prompt_encoders:
        fold_norms(cast(PromptEncoder, encoder))
    lean(made)
    return made


def _copy(net: Net, convert: set[nn.Parameter], device: torch.device, dtype: torch.dtype | None) -> Net:
    """A copy without gradients on a device, the parameters in `convert` in a type (None: their own); shares what need
    not be changed."""
    copies: dict[int, Tensor] = {id(x): x.detach().to(device) for x in net.buffers()}
    for p in net.parameters():
        x = p.detach().to(device, dtype if p in convert else None)
        if x.ndim == 5:
            x = x.contiguous(memory_format=torch.channels_last_3d)
        copies[id(p)] = nn.Parameter(x, requires_grad=False)
    return copy.deepcopy(net, copies).eval()


def _here(x: Tensor) -> np.ndarray:
    return x.float().cpu().contiguous().numpy()
