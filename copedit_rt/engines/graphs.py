"""Three graphs as an engine: what runs them differs, how they are put together does not. NumPy only."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np

from copedit_rt import schedule
from copedit_rt.config import ModelConfig
from copedit_rt.engines.engine import Encoded

ENCODER, STEP, DECODER = "encoder.onnx", "step.onnx", "decoder.onnx"
GRAPHS = (ENCODER, STEP, DECODER)


class GraphEngine(ABC):
    """See `engine.Engine`; what inherits from this runs a graph."""

    config: ModelConfig

    @abstractmethod
    def _run(self, graph: str, **inputs: np.ndarray) -> list[np.ndarray]:
        """Outputs of a graph; inputs that it does not have are left out, as a network without prompts has none."""

    def encode(self, images: np.ndarray) -> Encoded:
        there = np.ones((1, images.shape[1]), bool)
        return Encoded.join([Encoded(*self._run(ENCODER, images=one, observed=there)) for one in images[:, None]])

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
        config = self.config.diffusion
        coefficients = schedule.step_coefficients(config, steps, solver)[:, None].repeat(len(z), 1)
        now, previous = z, np.zeros_like(z)
        begun = {} if prior is None else {"prior": prior}
        for i, t in enumerate(schedule.timesteps(config, steps)):
            now, previous = self._run(
                STEP,
                z=now,
                t=np.full(len(z), t),
                prompts=prompts,
                observed=observed,
                previous=previous,
                coefficients=coefficients[i],
                **begun,
            )
            if progress:
                progress(i + 1, steps)
        return now

    def decode(self, z: np.ndarray) -> np.ndarray:
        return np.concatenate([self._run(DECODER, z=one)[0] for one in z[:, None]])
