"""One optimizer step: micro-batches, their mean gradient, clipping, optimizers, learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from copedit_training.stages import distributed
from copedit_training.stages.settings import DenoiserSettings, Settings, TokenizerSettings
from copedit_training.stages.task import B, Task, Terms


@dataclass(frozen=True)
class Share:
    """A micro-batch of this process: its own terms, and its subjects as rows of the training images."""

    terms: Terms
    subjects: np.ndarray

    @property
    def finite(self) -> bool:
        return all(map(math.isfinite, self.terms.values()))


def ahead(draw: Callable[[int, int], B], wanted: Iterable[tuple[int, int]]) -> Iterator[B]:
    """draw(step, part) of each, in order; the next one is under way in a thread while one is in use."""
    with ThreadPoolExecutor(1, "micro-batches") as pool:
        under_way: Future[B] | None = None
        for step, part in wanted:
            following = pool.submit(draw, step, part)
            if under_way:
                yield under_way.result()
            under_way = following
        if under_way:
            yield under_way.result()


def gradients(task: Task[Any, B], model: nn.Module, batches: Iterable[B]) -> tuple[Terms, list[Share]]:
    """Leave the gradients of the mean loss over all micro-batches in the weights.

    model: the task's module, or what reduces its gradients over the processes. batches: those of this process. Returns
    the mean of the terms over all, and this process's own.
    """
    task.module.zero_grad(set_to_none=True)
    parts = task.settings.accumulate // distributed.world()
    each: list[Share] = []
    for batch in task.begin(batch.to(task.device) for batch in batches):
        alone = isinstance(model, DistributedDataParallel) and len(each) < parts - 1
        with model.no_sync() if alone else nullcontext():  # type: ignore[operator]
            loss, terms = model(batch)
            each.append(Share(terms | {"loss": loss.item()}, batch.subjects))
            (loss / parts).backward()
    sums = torch.tensor([list(share.terms.values()) for share in each], dtype=torch.float64).sum(0)
    means = distributed.total(sums.to(task.device)) / task.settings.accumulate
    return dict(zip(each[0].terms, means.tolist(), strict=True)), each


def clip(task: Task[Any, Any]) -> float:
    """Clip the gradients, an adversary's by themselves; returns the norm of the others before."""
    named = [(name.startswith("adversary."), p) for name, p in task.module.named_parameters() if p.requires_grad]
    groups = ([p for adverse, p in named if adverse is wanted] for wanted in (False, True))
    norm, _ = (nn.utils.clip_grad_norm_(group, task.settings.clip).item() for group in groups)
    return norm


def optimizers_of(task: Task[Any, Any]) -> list[torch.optim.Optimizer]:
    """AdamW (Adam where weight_decay is 0) for everything, or beside Muon for what it is not for."""
    settings = task.settings
    every = [(name, p) for name, p in task.module.named_parameters() if p.requires_grad]
    opponent = [p for name, p in every if name.startswith("adversary.")]
    named = [(name, p) for name, p in every if not name.startswith("adversary.")]
    by_muon = isinstance(settings, DenoiserSettings) and settings.optimizer == "muon"
    muon = (".blocks.", ".embed.", ".final.") if by_muon else ()
    matrices = [p for name, p in named if p.ndim == 2 and any(part in name for part in muon)]
    chosen = {id(p) for p in matrices}
    rest = [p for _, p in named if id(p) not in chosen]
    decay = settings.weight_decay
    # The fused one needs no copies of all weights, but is not there for every device.
    adam = partial(
        torch.optim.AdamW,
        lr=settings.lr,
        betas=(0.9, settings.beta2),
        weight_decay=decay,
        fused=task.device.type == "cuda" or None,
    )
    optimizers: list[torch.optim.Optimizer] = [adam(group) for group in (rest, opponent) if group]
    if matrices:
        # Its step is scaled to the size of Adam's, so that both follow one learning rate.
        factor = (settings.muon_lr or settings.lr) / settings.lr
        group = {"params": matrices, "factor": factor}
        optimizers.append(torch.optim.Muon([group], settings.lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def learning_rate(settings: Settings, step: int) -> float:
    """Linear warm-up, then a cosine to zero (Tables 14 and 15)."""
    peak, steps = settings.lr, settings.steps
    if isinstance(settings, TokenizerSettings) and settings.prompt_steps:
        steps -= settings.prompt_steps
        if step >= steps:
            peak, step, steps = settings.prompt_lr or peak, step - steps, settings.prompt_steps
    if step < settings.warmup:
        return peak * (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, steps - settings.warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def set_learning_rate(optimizers: Sequence[torch.optim.Optimizer], rate: float) -> None:
    """The rate of a step; a group may follow it with a factor of its own."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("factor", 1.0)
