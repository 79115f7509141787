"""What every engine offers to the synthesizer: three networks that take and return numpy arrays on the host.

m elements, k of them given; latents [8, h, w, d] are normalised; everything is float32 but `observed`, which is bool.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

ENGINES = ("torch", "onnxruntime", "openvino", "tensorrt")
TORCHLESS = ("onnxruntime", "openvino")


@dataclass(frozen=True)
class Encoded:
    """What the tokenizer makes of the observed images of one study.

    latents: [k, 8, h, w, d]. prompts: [3, P], averaged over the images. count [m-1] and missing [m]: logits of how
    many and which elements are missing. alone [k, m]: the latter from each image by itself.
    """

    latents: np.ndarray
    prompts: np.ndarray
    count: np.ndarray
    missing: np.ndarray
    alone: np.ndarray


class Engine(Protocol):
    """Not safe to call from several threads at once. Memory that runs out is a MemoryError or torch's RuntimeError."""

    @property
    def name(self) -> str:
        """That of the engine, and which parts another one does."""
        ...

    @property
    def device(self) -> str:
        """cpu, cuda or cuda:N."""
        ...

    precision: str  # of the large products: float32, float16 or bfloat16
    versions: dict[str, str]  # of the libraries that it runs on

    def encode(self, images: np.ndarray) -> Encoded:
        """images: the observed ones [k, 1, H, W, D] in 0..1."""
        ...

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
        """The sampling loop. z [m, 8, h, w, d]: latents of the observed elements, noise in the others; not modified.

        prompts [3, P], observed [m]. prior [m, 8, h, w, d], for models that take one: latents of the fill of what is
        missing, and of what is observed its own. progress is called with the steps done and in all. Returns the latents
        after the last step; those of observed elements keep their bits.
        """
        ...

    def decode(self, z: np.ndarray) -> np.ndarray:
        """Images [k, 1, H, W, D] of latents [k, 8, h, w, d]; cardiac: of all slabs, which are decoded together."""
        ...
