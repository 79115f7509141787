"""What every engine offers to the synthesizer: three networks that take and return numpy arrays on the host.

They take a batch of B studies, and what comes out of a study does not depend on the others. m elements, k of them
given; latents [8, h, w, d] are normalised; everything is float32 but `observed`, which is bool. The sampler runs on the
whole batch; studies are encoded and decoded one after the other, as their feature maps are the largest thing in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from importlib.util import find_spec
from typing import Protocol

import numpy as np

from copedit_rt.config import ModelConfig
from copedit_rt.errors import CopeditError

ENGINES = ("torch", "onnxruntime", "openvino", "tensorrt")
TORCHLESS = ("onnxruntime", "openvino")


def choose_engine(name: str) -> str:
    """The engine of a name; auto is torch where it is installed, and otherwise what is there that needs none.

    Raises CopeditError for an unknown name, and where what it stands for is not installed.
    """
    if name not in ("auto", *ENGINES):
        raise CopeditError(f"engine {name!r} is unknown; choose one of auto, {', '.join(ENGINES)}")
    if name in TORCHLESS or find_spec("torch"):
        return "torch" if name == "auto" else name
    there = [engine for engine in TORCHLESS if find_spec(engine)]
    if name != "auto":
        raise CopeditError(
            f"engine {name}: torch is not installed; install it, or choose the engine {' or '.join(TORCHLESS)} "
            "and a folder that copedit export onnx wrote"
        )
    if not there:
        raise CopeditError(
            "nothing that computes is installed; pip install 'copedit[torch]', or 'copedit[cpu]' for ONNX Runtime alone"
        )
    return there[0]


@dataclass(frozen=True)
class Encoded:
    """What the tokenizer makes of the observed images.

    latents: [B, k, 8, h, w, d]. prompts: [B, 3, P], averaged over the images. count [B, m-1] and missing [B, m]: logits
    of how many and which elements are missing. alone [B, k, m]: the latter from each image by itself.
    """

    latents: np.ndarray
    prompts: np.ndarray
    count: np.ndarray
    missing: np.ndarray
    alone: np.ndarray

    @classmethod
    def join(cls, parts: Sequence[Encoded]) -> Encoded:
        """The batches as one."""
        return cls(*(np.concatenate([getattr(part, x.name) for part in parts]) for x in fields(cls)))


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
        """images: the observed ones [B, k, 1, H, W, D] in 0..1."""
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
        """The sampling loop. z [B, m, 8, h, w, d]: latents of the observed elements, noise in the others; not modified.

        prompts [B, 3, P]; observed [B, m], another pattern in each study if need be. prior [B, m, 8, h, w, d], for
        models that take one: latents of the fill of what is missing, and of what is observed its own. progress is
        called with the steps done and in all. Returns the latents after the last step; those of observed elements keep
        their bits.
        """
        ...

    def decode(self, z: np.ndarray) -> np.ndarray:
        """Images [B, k, 1, H, W, D] of latents [B, k, 8, h, w, d]; cardiac: of all slabs, decoded together."""
        ...


class Whole(Engine, Protocol):
    """An engine that knows which model it computes."""

    config: ModelConfig
    weights: dict[str, str]  # SHA-256 of each file
