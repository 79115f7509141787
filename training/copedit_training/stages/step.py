"""One optimizer step: micro-batches, their mean gradient, clipping, optimizers, learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from copedit_rt.errors import CopeditError
from copedit_training.stages import distributed
from copedit_training.stages.muon import Muon
from copedit_training.stages.settings import DenoiserSettings, Settings
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


class Optimization:
    """The optimizers of a task, and what scales the losses of float16 (of other types it does nothing)."""

    def __init__(self, task: Task[Any, Any]):
        self.optimizers = optimizers_of(task)
        self.scaler = torch.amp.GradScaler(task.device.type, enabled=task.settings.dtype == "float16")

    def set_rate(self, rate: float) -> None:
        """The learning rate of a step; a group may follow it with a factor of its own."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("factor", 1.0)

    def _moving(self) -> list[torch.optim.Optimizer]:
        """Those that have gradients."""
        return [x for x in self.optimizers if any(p.grad is not None for g in x.param_groups for p in g["params"])]

    def unscale(self) -> None:
        """Divide the gradients by the scale."""
        for optimizer in self._moving():
            self.scaler.unscale_(optimizer)

    @property
    def overflowed(self) -> bool:
        """Whether gradients that are not finite may be a matter of the scale."""
        return self.scaler.is_enabled() and self.scaler.get_scale() > 1

    def step(self) -> None:
        """Move the weights; where a scaled gradient overflowed, only lower the scale."""
        for optimizer in self._moving():
            self.scaler.step(optimizer)
        self.scaler.update()

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it: "optimizer.weight.name" of each, and the scale."""
        flat = {
            f"{k}.{i}.{name}": value
            for k, optimizer in enumerate(self.optimizers)
            for i, state in optimizer.state_dict()["state"].items()
            for name, value in state.items()
        }
        scale = self.scaler.state_dict()
        return flat | {f"scaler.{name}": torch.tensor(value, dtype=torch.float64) for name, value in scale.items()}

    def load(self, tensors: Mapping[str, Tensor], where: Path) -> None:
        """The inverse of `state`; raises CopeditError naming the first tensor that belongs to no weight of these."""
        states: list[dict[int, dict[str, Tensor]]] = [{} for _ in self.optimizers]
        shapes = [[p.shape for g in x.param_groups for p in g["params"]] for x in self.optimizers]
        scale: dict[str, Any] = {}
        for key, value in tensors.items():
            k, _, rest = key.partition(".")
            index, _, name = rest.partition(".")
            if k == "scaler" and value.numel() == 1:
                scale[rest] = value.item()
            elif not _belongs(k, index, name, value, shapes):
                raise CopeditError(f"{where}: {key} is of no optimizer of this run; resume with another checkpoint")
            else:
                states[int(k)].setdefault(int(index), {})[name] = value
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        if self.scaler.is_enabled() and scale:
            self.scaler.load_state_dict(scale | {k: int(scale[k]) for k in ("growth_interval", "_growth_tracker")})


def _belongs(k: str, index: str, name: str, value: Tensor, shapes: Sequence[Sequence[torch.Size]]) -> bool:
    """Whether a tensor is state of weight `index` of optimizer k: of its shape, or a number."""
    if not (k.isdecimal() and index.isdecimal() and name in ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")):
        return False
    if int(k) >= len(shapes) or int(index) >= len(shapes[int(k)]):
        return False
    return value.shape == (() if name == "step" else shapes[int(k)][int(index)])


def gradients(
    task: Task[Any, B], model: nn.Module, batches: Iterable[B], scaler: torch.amp.GradScaler | None = None
) -> tuple[Terms, list[Share]]:
    """Leave the gradients of the mean loss over all micro-batches, scaled, in the weights.

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
            mean = loss / parts
            (scaler.scale(mean) if scaler else mean).backward()
    sums = torch.tensor([list(share.terms.values()) for share in each], dtype=torch.float64).sum(0)
    means = distributed.total(sums.to(task.device)) / task.settings.accumulate
    return dict(zip(each[0].terms, means.tolist(), strict=True)), each


def clip(task: Task[Any, Any]) -> tuple[float, float]:
    """Clip the gradients, an adversary's by themselves; returns the norm of the others before, and of the adversary's
    (0 without one)."""
    named = [(name.startswith("adversary."), p) for name, p in task.module.named_parameters() if p.requires_grad]
    groups = ([p for adverse, p in named if adverse is wanted] for wanted in (False, True))
    norm, adverse = (nn.utils.clip_grad_norm_(group, task.settings.clip).item() for group in groups)
    return norm, adverse


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
        betas=(settings.beta1, settings.beta2),
        weight_decay=decay,
        fused=task.device.type == "cuda" or None,
    )
    optimizers: list[torch.optim.Optimizer] = [adam(group) for group in (rest, opponent) if group]
    if matrices:
        # Its step is scaled to the size of Adam's, so that both follow one learning rate.
        factor = (settings.muon_lr or settings.lr) / settings.lr
        group = {"params": matrices, "factor": factor}
        optimizers.append(Muon([group], settings.lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def learning_rate(settings: Settings, step: int) -> float:
    """Linear warm-up, then a cosine to zero (Tables 14 and 15), in each phase of a run."""
    peak, step, steps = settings.phase(step)
    if step < settings.warmup:
        return peak * (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, steps - settings.warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
