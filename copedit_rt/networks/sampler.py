"""Partial noise and the deterministic sampler (Section 3.3): the plain loop, and `Plan`, the loop with everything that
does not depend on the latents taken out of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import copedit_kernels
from copedit_kernels import partial_ddim_step_
from copedit_rt.config import DiffusionConfig, ModelConfig
from copedit_rt.networks.denoiser import MDiT3D
from copedit_rt.schedule import solver_tables, timesteps


def add_noise(z0: Tensor, eps: Tensor, level: Tensor, observed: Tensor) -> Tensor:
    """Partially noised latents (Section 3.3): observed elements keep their bits.

    z0, eps: [B, m, ...]. level: alpha-bar per sample [B]. observed: [B, m] bool.
    """
    shape = (-1,) + (1,) * (z0.ndim - 1)
    level = level.reshape(shape).to(z0.dtype)
    noised = level.sqrt() * z0 + (1 - level).sqrt() * eps
    return z0.where(observed.reshape(observed.shape + (1,) * (z0.ndim - 2)), noised)


def sample(
    predict: Callable[[Tensor, Tensor], Tensor],
    z: Tensor,
    observed: Tensor,
    config: DiffusionConfig,
    steps: int,
    progress: Callable[[int, int], None] | None = None,
    solver: str | None = None,
) -> Tensor:
    """A deterministic solver (None: the configuration's) over the strided training schedule.

    predict: (z [B, m, ...], t [B]) -> clean latents [B, m, ...]. z: observed latents, and noise in the missing
    elements; not modified. Returns the latents after the last step; observed elements keep their bits throughout.
    `Plan` does the same for the networks of `denoiser.MDiT3D`, with less work.
    """
    with torch.no_grad():
        z = z.clone()
        tables = [torch.from_numpy(table).to(z.device) for table in solver_tables(config, steps, solver)]
        predictions: list[Tensor] = []
        for i, t in enumerate(timesteps(config, steps)):
            now = predict(z, torch.full((z.shape[0],), int(t), device=z.device))
            predictions = [now, *predictions][: len(tables)]
            for table, x0 in zip(tables, predictions, strict=False):
                partial_ddim_step_(z, x0, observed, table, i)
            if progress:
                progress(i + 1, steps)
        return z


REPAID = 11  # steps after which a captured graph has saved what capturing it took; estimated, not measured


class Plan:
    """The sampling loop for one number of steps, one batch and one pattern of observed elements; `run` it many times.

    What `sample` does with the network, from the network's own weights and operators, but
    - conditions and modulation of every step and block are computed before the loop, one product a block;
    - what is not read is not computed: in the last block and the final layer, all but the missing elements;
    - buffers are static, and the step counter, coefficients and modulation lie on the device, so that the loop never
      waits for it. On CUDA, with the Triton kernels, one step is captured as a CUDA graph and replayed, from the run on
      that brings the steps taken to `REPAID`: a long loop at once, a single step after some studies of a cohort.

    Latents are kept in float32 (float64 for a float64 network) whatever the network's dtype. Modulation takes
    steps * (6 * width * (within-blocks + batch * across-blocks) + 2 * width) values, for the paper's brain model at 200
    steps, batch 1 and bfloat16 30 MB. Rounding may differ from `sample`, as products have other sizes.
    """

    @torch.no_grad()
    def __init__(
        self, net: MDiT3D, config: ModelConfig, steps: int, observed: Tensor, solver: str | None = None
    ) -> None:
        """observed: [B, m] bool, at least one False. Raises CopeditError for steps or a solver that do not exist."""
        weight = net.embed.weight
        self.net, self.steps = net, steps
        self.observed = observed.to(weight.device, copy=True)
        self.rows = (~self.observed).flatten().nonzero().flatten()
        self.tables = [
            torch.from_numpy(table).to(weight.device) for table in solver_tables(config.diffusion, steps, solver)
        ]
        self.times = torch.from_numpy(timesteps(config.diffusion, steps)).to(weight.device)[:, None]
        self.step = torch.zeros((), dtype=torch.int64, device=weight.device)
        shape = (*observed.shape, config.tokenizer.latent_channels, *config.latent)
        self.z = weight.new_zeros(shape, dtype=torch.promote_types(weight.dtype, torch.float32))
        self.prior = weight.new_zeros(shape) if net.config.prior else None
        # Predictions of this step, the one before, ...: one a table. Those of observed elements stay zero.
        self.predictions = [weight.new_zeros(shape) for _ in self.tables]
        parts = self._modulate(weight.new_zeros(len(observed), 3, config.tokenizer.prompt_dim))
        self.shapes = [part.shape[1:] for part in parts]
        self.modulation = torch.cat([part.flatten(1) for part in parts], dim=1)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.capturable = weight.is_cuda and copedit_kernels.implementation() != "reference"
        self.taken = 0  # steps, of all runs

    @torch.no_grad()
    def run(
        self,
        z: Tensor,
        prompts: Tensor | None,
        progress: Callable[[int, int], None] | None = None,
        prior: Tensor | None = None,
    ) -> Tensor:
        """z [B, m, 8, h, w, d]: observed latents, and noise in the missing elements; not modified. prompts: [B, 3, P].
        prior [B, m, 8, h, w, d]: see `MDiT3D.predict`; for networks that take one.

        Returns the latents after the last step, in float32 (float64); observed elements keep their bits. progress is
        called with the steps done and in all; on CUDA with those queued.
        """
        self.taken += self.steps
        if self.capturable and self.graph is None and self.taken >= REPAID:
            self.capture()
        self.z.copy_(z)
        if self.prior is not None:
            assert prior is not None
            self.prior.copy_(prior)
        self.step.zero_()
        for x0 in self.predictions:
            x0.zero_()
        torch.cat([part.flatten(1) for part in self._modulate(prompts)], dim=1, out=self.modulation)
        for i in range(self.steps):
            if self.graph is None:
                self._advance()
            else:
                self.graph.replay()
            if progress:
                progress(i + 1, self.steps)
        return self.z.clone()

    def _modulate(self, prompts: Tensor | None) -> list[Tensor]:
        """Modulation [steps, 1 or B, ...] of each block and of the final layer."""
        return self.net.modulate(self.times, prompts, self.observed)

    def _advance(self) -> None:
        """One step, from the buffers into the buffers."""
        batch = len(self.observed)
        row = self.modulation.index_select(0, self.step.view(1))[0].split([shape.numel() for shape in self.shapes])
        parts = [part.view(shape).expand(batch, -1) for part, shape in zip(row, self.shapes, strict=True)]
        now = self.net.predict(self.z.to(self.modulation.dtype), parts, self.rows, prior=self.prior)
        for i in reversed(range(1, len(self.predictions))):
            self.predictions[i].copy_(self.predictions[i - 1])
        self.predictions[0].flatten(0, 1).index_copy_(0, self.rows, now)
        for table, x0 in zip(self.tables, self.predictions, strict=True):
            partial_ddim_step_(self.z, x0, self.observed, table, self.step)
        self.step += 1

    @torch.no_grad()
    def capture(self) -> None:
        """Record one step as a CUDA graph, which overwrites the buffers."""
        with torch.cuda.device(self.z.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # compiles the kernels; libraries allocate their workspaces
                for _ in range(3):
                    self.step.zero_()
                    self._advance()
            torch.cuda.current_stream().wait_stream(side)
            self.step.zero_()
            graph = torch.cuda.CUDAGraph()
            # torch's own stream for captures is of the device that captured first. Other threads may use other devices.
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                self._advance()
            self.graph = graph
