"""Muon (Jordan et al. 2024) on a CPU: torch's own, with the matrices made orthogonal in float32.

torch does that in bfloat16, as is best on a GPU. A processor without units for it (Zen 3, torch 2.13, one thread) took
7.8 s for a step of `demo-brain`'s denoiser with two crops, by the log of `copedit train denoiser`; in float32 it takes
0.9 s.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Muon(torch.optim.Muon):
    """`torch.optim.Muon` with the same settings and state, whose steps of weights on a CPU are in the weights' type."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; on other devices torch's."""
        if any(p.device.type != "cpu" for group in self.param_groups for p in group["params"]):
            return super().step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p.grad)
                buffer = state["momentum_buffer"]
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer
                p.mul_(1 - group["lr"] * group["weight_decay"])
                made = orthogonal(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
                p.add_(made, alpha=-group["lr"] * _ratio(group["adjust_lr_fn"], p.shape))
        return loss


def orthogonal(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """A matrix [n, k] with its singular values brought near 1, by Newton and Schulz's iteration in its own type."""
    a, b, c = coefficients
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def _ratio(kind: str | None, shape: torch.Size) -> float:
    """What the learning rate is multiplied with, for a matrix of this shape."""
    if kind == "match_rms_adamw":
        return 0.2 * math.sqrt(max(shape))
    return math.sqrt(max(1.0, shape[0] / shape[1]))
