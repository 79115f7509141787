"""What tells a method which elements are missing (Tables 5 and 17): a code of the mask, prompts, or nothing.

The three go in at the same place of a method, as a vector of the same width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Guidance(nn.Module):
    """kind: "mask", a linear layer of what is missing; "full", of the prompts after SiLU, as in `MDiT3D`; "none",
    zeros without any weight. elements: m. prompt_dim: P. width: k."""

    def __init__(self, kind: str, elements: int, prompt_dim: int, width: int):
        super().__init__()
        self.kind, self.width = kind, width
        self.layer: nn.Module | None = None
        if kind == "mask":
            self.layer = nn.Linear(elements, width)
        elif kind == "full":
            self.layer = nn.Sequential(nn.SiLU(), nn.Linear(3 * prompt_dim, width))

    def forward(self, observed: Tensor, prompts: Tensor | None) -> Tensor:
        """observed [B, m] (bool), prompts [B, 3, P] of the observed elements (read by "full" alone) -> [B, k], float32
        or the autocast's type."""
        if self.layer is None:
            return torch.zeros(len(observed), self.width, device=observed.device)
        if self.kind == "mask":
            return self.layer((~observed).float())
        assert prompts is not None
        return self.layer(prompts.flatten(1))
