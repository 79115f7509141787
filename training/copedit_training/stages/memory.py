"""What training needs of a GPU's memory."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from copedit_kernels import launch
from copedit_kernels.dispatch import using
from copedit_rt.config import ModelConfig
from copedit_rt.networks.tokenizer import CoPeVAE
from copedit_training.stages.denoiser_task import DenoiserTask, Noised, check
from copedit_training.stages.settings import DenoiserSettings, Settings, TokenizerSettings
from copedit_training.stages.step import gradients, optimizers_of
from copedit_training.stages.task import Batch, Task
from copedit_training.stages.tokenizer_task import TokenizerTask


def estimate(config: ModelConfig, settings: Settings, kernels: str = "auto") -> dict[str, int]:
    """Bytes that one process needs for a training step, computed without data and without a GPU.

    A real step, with its backward pass and optimizers, is run on tensors that have shapes only, and the bytes of those
    alive at once are counted. "peak" is the most there are, "weights" what stays between steps (weights, average,
    optimizers' state), "gradients" those of the weights, which several processes hold once more. Not counted: the CUDA
    context, what libraries such as cuDNN use besides, fragmentation.

    kernels: as COPEDIT_KERNELS; "auto" takes Triton's, which save less than the reference, where there is Triton.
    """
    settings = replace(settings, device="cpu")
    if settings.dtype == "float16":  # which a CPU does not train in
        settings = replace(settings, dtype="bfloat16")
    images = np.zeros((1, len(config.elements), 1, *config.image), np.float16)
    if kernels == "auto":
        kernels = "triton" if launch.INSTALLED else "reference"
    with using(kernels), FakeTensorMode(allow_non_fake_inputs=True), _unmoved(), _Alive() as alive:
        task, step = _task(config, settings, images)
        optimizers = optimizers_of(task)
        for _ in range(2):  # the first makes the optimizers' state
            task.module.zero_grad(set_to_none=True)
            between = alive.now
            alive.peak = 0
            gradients(task, task.module, (_drawn(task, step, part, settings) for part in range(settings.accumulate)))
            for optimizer in optimizers:
                optimizer.step()
        held = sum(p.grad.nbytes for p in task.module.parameters() if p.grad is not None)
    return {"peak": alive.peak, "weights": between, "gradients": held}


def _task(config: ModelConfig, settings: Settings, images: np.ndarray) -> tuple[Task[Any, Any], int]:
    """The task of a stage, and a step in which all terms of its loss take part; images are augmented on the host."""
    if isinstance(settings, TokenizerSettings):
        first = max(0, settings.quantise_from, settings.adversarial_from)
        step = math.ceil(first / settings.pretext_every) * settings.pretext_every
        return TokenizerTask(config, replace(settings, perceptual="", augment=False), images), step
    assert isinstance(settings, DenoiserSettings)
    check(config, settings)  # as of a run: some of it is left out below
    if settings.crop:  # whole images of as many tokens
        share = settings.crop**2 / math.prod(config.image[:2])
        settings = replace(settings, crop=0, batch_size=max(1, round(settings.batch_size * share)))
    settings = replace(settings, compile=False, whiten=0.0, augment=False)
    return DenoiserTask(config, settings, images, CoPeVAE(config.tokenizer, len(config.elements))), 0


def _drawn(task: Task[Any, Any], step: int, part: int, settings: Settings) -> Batch:
    """A micro-batch, with the blank images that stage II encodes in the step where they are augmented or there is a
    prior, and of a prior blank fills: they cost the same as real ones."""
    batch: Batch = task.draw(step, part)
    if not isinstance(batch, Noised):
        return batch
    shape = len(batch.subjects), *task.images.shape[1:]
    if task.config.denoiser.prior:
        batch = replace(batch, images=torch.zeros(shape), fill=torch.zeros(shape))
    if settings.augment:
        batch = replace(batch, images=torch.zeros(shape), latents=None, prompts=None)
    return batch


def render(found: dict[str, int], settings: Settings) -> str:
    """`estimate` as lines of text."""
    gib = {name: f"{value / 2**30:.2f} GiB" for name, value in found.items()}
    return (
        f"expected peak {gib['peak']} per GPU, with micro-batches of {settings.batch_size} and checkpointing "
        f"{'on' if settings.checkpointing else 'off'}; {gib['weights']} of it stay between steps\n"
        f"several processes need {gib['gradients']} more, to add up gradients\n"
        f"not counted: the CUDA context, workspaces of cuDNN and cuBLAS, fragmentation"
        f"{', the perceptual term' if getattr(settings, 'perceptual', '') else ''}"
    )


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
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, FakeTensor):
                self._note(x)
        return out

    def _note(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key = id(storage)  # one object for as long as it lives
        if key not in self.known:
            self.known.add(key)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size
