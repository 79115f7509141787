"""What training needs of a GPU's memory, and how to need less."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from copedit_kernels import launch
from copedit_rt.config import ModelConfig
from copedit_rt.networks.denoiser import Block
from copedit_rt.networks.tokenizer import CoPeVAE, ResidualUnit
from copedit_training.stages.settings import Settings, Stage


def checkpoint_activations(module: nn.Module) -> None:
    """Of each block of a transformer and each residual unit of a tokenizer keep the input alone and compute the rest
    again in the backward pass (Chen et al. 2016); gradients are the same."""
    for part in module.modules():
        name = {Block: "modulated", ResidualUnit: "forward"}.get(type(part))
        if name:
            again = partial(checkpoint, getattr(part, name), use_reentrant=False, preserve_rng_state=False)
            setattr(part, name, again)


def estimate(
    stage: Stage, config: ModelConfig, settings: Settings, subjects: int, kernels: str = "auto"
) -> dict[str, int]:
    """Bytes that one process needs for a training step, computed without data and without a GPU.

    A real step, with its backward pass and optimizers, is run on tensors that have shapes only, and the bytes of those
    alive at once are counted. "peak" is the most there are, "weights" what stays between steps (weights, average,
    optimizers' state, of stage II the latents of all `subjects`), "gradients" those of the weights, which several
    processes hold once more. Not counted: the CUDA context, what libraries such as cuDNN use besides, fragmentation.

    kernels: as COPEDIT_KERNELS; "auto" takes Triton's, which save less than the reference, where there is Triton.
    """
    from copedit_training.stages.trainer import DenoiserTask, TokenizerTask, _gradients, _optimizers

    settings = dataclasses.replace(settings, device="cpu", compile=False, whiten=0.0, perceptual="")
    settings = dataclasses.replace(settings, augment=False)  # done before the step begins, an image at a time
    if stage == "denoiser" and settings.crop:  # whole images of as many tokens
        share = settings.crop**2 / math.prod(config.image[:2])
        settings = dataclasses.replace(settings, crop=0, batch_size=max(1, round(settings.batch_size * share)))
    step = max(0, settings.quantise_from, settings.adversarial_from)
    step = math.ceil(step / settings.pretext_every) * settings.pretext_every
    images = np.zeros((1, len(config.elements), 1, *config.image), np.float16)
    if kernels == "auto":
        kernels = "triton" if launch.triton is not None else "reference"
    with _kernels(kernels), FakeTensorMode(allow_non_fake_inputs=True), _unmoved(), _Alive() as alive:
        if stage == "tokenizer":
            task: Any = TokenizerTask(config, settings, images)
        else:
            task = DenoiserTask(config, settings, images, CoPeVAE(config.tokenizer, len(config.elements)))
        optimizers = _optimizers(task, settings)
        for _ in range(2):  # the first makes the optimizers' state
            task.zero_grad(set_to_none=True)
            between = alive.now
            alive.peak = 0
            _gradients(task, task, step, range(settings.accumulate))
            for optimizer in optimizers:
                optimizer.step()
        gradients = sum(p.grad.nbytes for p in task.parameters() if p.grad is not None)
        latents = 0
        if stage == "denoiser":
            latents = (task.latents.nbytes + task.prompts.nbytes) * (subjects - 1)
    return {"peak": alive.peak + latents, "weights": between + latents, "gradients": gradients}


def render(found: dict[str, int], settings: Settings) -> str:
    """`estimate` as lines of text."""
    gib = {name: f"{value / 2**30:.2f} GiB" for name, value in found.items()}
    return (
        f"expected peak {gib['peak']} per GPU, with micro-batches of {settings.batch_size} and checkpointing "
        f"{'on' if settings.checkpointing else 'off'}; {gib['weights']} of it stay between steps\n"
        f"several processes need {gib['gradients']} more, to add up gradients\n"
        f"not counted: the CUDA context, workspaces of cuDNN and cuBLAS, fragmentation"
        f"{', the perceptual term' if settings.perceptual else ''}"
    )


@contextlib.contextmanager
def _kernels(wanted: str) -> Iterator[None]:
    before = os.environ.get("COPEDIT_KERNELS")
    os.environ["COPEDIT_KERNELS"] = wanted
    try:
        yield
    finally:
        del os.environ["COPEDIT_KERNELS"]
        if before is not None:
            os.environ["COPEDIT_KERNELS"] = before


@contextlib.contextmanager
def _unmoved() -> Iterator[None]:
    """Inside, modules stay where they are: torch cannot convert the weights of one that has shapes only."""
    to = nn.Module.to
    nn.Module.to = lambda self, *_, **__: self  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.to = to  # type: ignore[method-assign]


class _Alive(TorchDispatchMode):
    """Bytes of all tensors without data that are alive: now, and the most so far. A value that is asked for is 1."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        if func is aten._local_scalar_dense.default:
            return 1
        if func is aten.index.Tensor and (mask := args[1][0]) is not None and mask.dtype == torch.bool:
            return args[0].flatten(0, mask.ndim - 1)  # as if all were chosen
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, FakeTensor):
                self._note(x)
        return out

    def _note(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key not in self.known:
            self.known.add(key)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size
