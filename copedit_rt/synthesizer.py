"""The main job: a study in, the same study with what was missing out."""

from __future__ import annotations

import platform
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import copedit_rt
from copedit_rt import checkpoint, diffusion
from copedit_rt.config import ModelConfig
from copedit_rt.denoiser import MDiT3D, UNet
from copedit_rt.errors import CopeditError
from copedit_rt.geometry import Prepared, prepare
from copedit_rt.perception import Perception
from copedit_rt.plan import Plan
from copedit_rt.study import STACK, Study
from copedit_rt.tokenizer import CoPeVAE


@dataclass(frozen=True)
class Result:
    """What `Synthesizer.synthesize` made of a study.

    study: the given one plus the synthesised volumes, on its own grid. std: with several samples, their voxel-wise
    standard deviation per synthesised volume. perception: what the heads said. record: how it was made, JSON-able.
    """

    study: Study
    perception: Perception
    record: dict[str, Any]
    std: dict[str, np.ndarray] = field(default_factory=dict)


class Synthesizer:
    """A loaded model on one device, for many studies.

    Safe to call from several threads: each prepares its study by itself, then they take turns with the network, one at
    a time. (One Synthesizer, that is: several on one device know nothing of each other.)
    """

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: CoPeVAE,
        denoiser: MDiT3D | UNet,
        device: str = "auto",
        weights: Any = None,
        max_memory: int | None = None,
    ):
        """weights: what identifies them, kept in the record of each result.

        max_memory: bytes that the feature maps of the tokenizer, the largest thing in memory, may take; volumes are
        then encoded and decoded one at a time, and in slabs if one alone takes more. None: all at once.
        """
        self.config = config
        self.max_memory = max_memory
        self.device = choose_device(device)
        self.tokenizer = tokenizer.to(self.device).eval().requires_grad_(False)
        self.denoiser = denoiser.to(self.device).eval().requires_grad_(False)
        self.weights = weights
        self._turn = threading.RLock()
        self._plan = lru_cache(maxsize=4)(self._make_plan)  # a cohort has few missing patterns

    @classmethod
    def load(cls, model: str | Path, device: str = "auto", max_memory: int | None = None) -> Synthesizer:
        """A built-in model by name or a model folder; max_memory as above. Raises CopeditError for a folder that is not
        one, damaged weights or a device that is not there."""
        folder = checkpoint.locate(model)
        config, tokenizer, first = checkpoint.load_tokenizer(folder)
        _, denoiser, second = checkpoint.load_denoiser(folder)
        return cls(config, tokenizer, denoiser, device, {"tokenizer": first, "denoiser": second}, max_memory)

    @torch.no_grad()
    def perceive(self, study: Study) -> Perception:
        """What the prompt heads say about a study; nothing needs to be missing.

        Raises CopeditError as `geometry.prepare` does.
        """
        prepared = prepare(study, self.config, allow_complete=True)
        with self._turn:
            return self._encode(prepared)[2]

    @torch.no_grad()
    def synthesize(
        self,
        study: Study,
        *,
        target: Sequence[str] | None = None,
        steps: int | None = None,
        seed: int = 0,
        samples: int = 1,
        progress: Callable[[int, int], None] | None = None,
        solver: str | None = None,
    ) -> Result:
        """Synthesise what is missing from a study.

        target: which missing elements to return (brain; None: all). steps: sampler steps (None: the model's default).
        seed: with the study's name and the element it determines the noise. samples: with more than one, the returned
        volume is their mean, and `std` their standard deviation (n - 1 in the denominator). progress: called with
        the denoising steps done (on a GPU: queued) and in all. solver: "ddim" or "dpm2m" (None: the model's default).

        Raises CopeditError for a study that the model cannot take, an unknown target or solver, steps or samples out of
        range, and a max_memory that is too small.
        """
        config = self.config
        steps = config.diffusion.steps if steps is None else steps
        solver = config.diffusion.solver if solver is None else solver
        diffusion.solver_tables(config.diffusion, steps, solver)
        if samples < 1:
            raise CopeditError(f"samples {samples}: must be at least 1")
        prepared = prepare(study, config)
        wanted = self._targets(prepared, target)
        mean: dict[str, np.ndarray] = {}
        spread: dict[str, np.ndarray] = {}
        with self._turn:
            latents, observed, perception, prompts = self._encode(prepared)
            for sample in range(samples):
                report = (lambda i, n, s=sample: progress(s * n + i, samples * n)) if progress else None
                z = self._denoise(latents, observed, prompts, study.name, steps, solver, seed, sample, report)
                images = prepared.restore(self._decode(z, prepared))
                for name in wanted:
                    # Welford's running mean and sum of squares: one volume in memory whatever the number of samples.
                    value = images[name].astype(np.float64)
                    if name not in mean:
                        mean[name], spread[name] = value, np.zeros_like(value)
                    else:
                        delta = value - mean[name]
                        mean[name] += delta / (sample + 1)
                        spread[name] += delta * (value - mean[name])
        std = {k: np.sqrt(v / (samples - 1)).astype(np.float32) for k, v in spread.items()} if samples > 1 else {}
        volumes = {name: value.astype(np.float32) for name, value in mean.items()}
        record = self._record(prepared, wanted, {"method": solver, "steps": steps, "seed": seed, "samples": samples})
        return Result(study.with_synthetic(volumes), perception, record, std)

    def _targets(self, prepared: Prepared, target: Sequence[str] | None) -> list[str]:
        """Names of the volumes to return."""
        if self.config.task == "cardiac":
            if target:
                raise CopeditError(
                    f"target {', '.join(target)}: a cardiac stack is filled as a whole; leave target out"
                )
            return [STACK]
        for name in target or ():
            if name not in self.config.elements:
                raise CopeditError(
                    f"target {name!r} is unknown to {self.config.name}; choose among {', '.join(self.config.elements)}"
                )
            if name not in prepared.missing:
                raise CopeditError(f"target {name!r}: {prepared.study.name} has a file for it; nothing to synthesise")
        return [name for name in prepared.missing if not target or name in target]

    def _encode(self, prepared: Prepared) -> tuple[Tensor, Tensor, Perception, Tensor]:
        """Latents [1, m, 8, h, w, d] (zero where missing), observed [1, m], perception, prompts [1, 3, P]."""
        config, vae = self.config, self.tokenizer
        observed = torch.from_numpy(prepared.observed).to(self.device)
        images = torch.from_numpy(prepared.images[prepared.observed]).to(self.device)
        seen = vae.encode(images[None], self.max_memory)[0]
        z = seen.new_zeros(len(observed), *seen.shape[1:])
        z[observed] = seen
        prompts = vae.prompts(z[None], observed[None])
        count, which, _ = vae.assess(prompts)
        alone = vae.assess(vae.prompts_of_each(seen[None])[0])[1].float().cpu().numpy()
        names = [name for name, there in zip(config.elements, prepared.observed, strict=True) if there]
        perception = Perception.from_logits(
            config.elements,
            count[0].float().cpu().numpy(),
            which[0].float().cpu().numpy(),
            dict(zip(names, alone, strict=True)),
        )
        return z[None], observed[None], perception, prompts

    def _denoise(
        self,
        latents: Tensor,
        observed: Tensor,
        prompts: Tensor,
        study: str,
        steps: int,
        solver: str,
        seed: int,
        sample: int,
        progress: Callable[[int, int], None] | None,
    ) -> Tensor:
        z = self.tokenizer.normalise(latents)
        for i, element in enumerate(self.config.elements):
            if not observed[0, i]:
                eps = diffusion.noise(seed, study, element, tuple(z.shape[2:]), sample)
                z[0, i] = torch.from_numpy(eps).to(z)
        net = self.denoiser
        if isinstance(net, MDiT3D):
            return self._plan(tuple(observed[0].tolist()), steps, solver).run(z, prompts, progress)

        def predict(z: Tensor, t: Tensor) -> Tensor:
            return net(z, t, prompts, observed)

        return diffusion.sample(predict, z, observed, self.config.diffusion, steps, progress, solver)

    def _make_plan(self, observed: tuple[bool, ...], steps: int, solver: str) -> Plan:
        assert isinstance(self.denoiser, MDiT3D)
        return Plan(self.denoiser, self.config, steps, torch.tensor([observed]), solver)

    def _decode(self, z: Tensor, prepared: Prepared) -> np.ndarray:
        """Images [m, 1, H, W, D] of normalised latents [1, m, 8, h, w, d]; brain: only the missing are decoded."""
        joint = self.config.task == "cardiac"
        # Slabs are decoded together, so that no seam appears between them.
        chosen = slice(None) if joint else torch.from_numpy(~prepared.observed)
        codes, _ = self.tokenizer.quantise(self.tokenizer.denormalise(z[:, chosen]))
        images = np.zeros_like(prepared.images)
        images[chosen] = self.tokenizer.decode(codes, joint, self.max_memory)[0].float().cpu().numpy()
        return images

    def _record(self, prepared: Prepared, wanted: list[str], sampler: dict[str, Any]) -> dict[str, Any]:
        study = prepared.study
        return {
            "model": self.config.name,
            "weights_sha256": self.weights,
            "study": study.name,
            "inputs": {
                name: {"file": volume.path.name if volume.path else None, "sha256": volume.sha256}
                for name, volume in study.volumes.items()
            },
            "missing": list(prepared.missing),
            "missing_slices": list(prepared.missing_slices),
            "synthesised": wanted,
            "sampler": sampler,
            "geometry": prepared.record(),
            "device": self.device.type,
            "versions": {
                "copedit": copedit_rt.__version__,
                "torch": torch.__version__,
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
        }


def choose_device(name: str) -> torch.device:
    """auto (CUDA where there is one), cpu, cuda or cuda:N. Raises CopeditError for anything else or a missing GPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and (kind == "cpu" or not index.isdigit())):
        raise CopeditError(f"device {name!r} is unknown; use auto, cpu, cuda or cuda:N")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise CopeditError(
            f"device {name!r} is not there ({torch.cuda.device_count()} CUDA devices found); use auto or cpu"
        )
    return torch.device(name)
