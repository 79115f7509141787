"""The main job: a study in, the same study with what was missing out. torch is loaded only for its own engine."""

from __future__ import annotations

import operator
import platform
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import copedit_rt
from copedit_rt import checkpoint, schedule
from copedit_rt.config import ModelConfig
from copedit_rt.device import choose_device, choose_dtype
from copedit_rt.engines.engine import Encoded, Engine, Whole, choose_engine
from copedit_rt.errors import CopeditError, by_name
from copedit_rt.images.names import targets
from copedit_rt.images.nifti import WORKING, available_memory
from copedit_rt.images.prepare import Prepared, prepare
from copedit_rt.images.study import Study
from copedit_rt.perception import Perception
from copedit_rt.prior import PRIOR, Fill, Prior
from copedit_rt.prior_heart import SlicePrior
from copedit_rt.task import STACK
from copedit_rt.trained import TrainedOn

if TYPE_CHECKING:
    from copedit_rt.engines.tensorrt_engine import TensorRTEngine
    from copedit_rt.networks.denoiser import MDiT3D, UNet
    from copedit_rt.networks.tokenizer import CoPeVAE


SAMPLES = 10_000  # at most
MOMENTS = 2 * 8  # bytes a voxel of the mean and the squares of samples
# A turn of each device: see `Synthesizer`.
_TURNS: dict[str, threading.RLock] = {}
TOGETHER = 8  # samples of a study in the sampler at once
_TURNS_LOCK = threading.Lock()


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


@dataclass(frozen=True)
class Begun:
    """What sampling starts from besides noise, in a model with a prior.

    latents [m, 8, h, w, d]: of the fill, and of what is observed its own. beyond [m, 1, H, W, D]: what the fill shows
    and its decoded latents do not. It is added to what is decoded, so that a correction of nothing changes nothing.
    """

    latents: np.ndarray | None = None
    beyond: np.ndarray | float = 0.0


class Synthesizer:
    """A loaded model on one device and engine, for many studies.

    Safe to call from several threads: each prepares and restores its study by itself; with the device they take turns,
    one study's encoder or one of its samples at a time, in no particular order. All Synthesizers of a process that are
    on one device share its turns; different devices work at the same time.
    """

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: CoPeVAE,
        denoiser: MDiT3D | UNet,
        device: str = "auto",
        weights: Any = None,
        max_memory: int | None = None,
        dtype: str = "auto",
        prior: Prior | SlicePrior | None = None,
    ):
        """On torch; `load` knows the other engines. The networks that are given are not changed.

        weights: what identifies them, kept in the record of each result.

        max_memory: bytes that the feature maps of the tokenizer, the largest thing in memory, may take; volumes are
        then encoded and decoded one at a time, and in slabs if one alone takes more. None: all at once.

        dtype: of autoencoder and denoiser, see `choose_dtype`.
        """
        from copedit_rt.engines.torch_engine import TorchEngine

        where = choose_device(device)
        engine = TorchEngine(config, tokenizer, denoiser, where, max_memory, choose_dtype(dtype, where))
        self._use(config, engine, weights, prior)

    def _use(self, config: ModelConfig, engine: Engine, weights: Any, prior: Prior | SlicePrior | None) -> None:
        self.config, self.engine, self.weights, self.prior = config, engine, weights, prior
        self.trained: TrainedOn | None = None
        with _TURNS_LOCK:
            self._turn = _TURNS.setdefault("cuda:0" if engine.device == "cuda" else engine.device, threading.RLock())

    @classmethod
    def on(cls, engine: Whole, folder: Path) -> Synthesizer:
        """On an engine that is loaded; folder: of its model, where prior and training lie."""
        self = cls.__new__(cls)
        prior = checkpoint.load_prior(folder, engine.config)
        more = checkpoint.digests(folder, [PRIOR]) if prior else {}
        self._use(engine.config, engine, engine.weights | more, prior)
        self.trained = TrainedOn.load(folder)
        return self

    @classmethod
    def load(
        cls,
        model: str | Path,
        device: str = "auto",
        max_memory: int | None = None,
        engine: str = "auto",
        dtype: str = "auto",
        progress: Callable[[str, int, int], None] | None = None,
    ) -> Synthesizer:
        """A built-in model by name or a model folder; max_memory and dtype as above.

        engine: "torch", or "onnxruntime" or "openvino" for a folder that `copedit export onnx` wrote, on the CPU and
        without torch; "auto": torch where it is installed, otherwise one of the other two.
        "tensorrt": for a folder that `copedit export tensorrt` or `onnx` wrote, on a CUDA GPU; plans that are not there
        yet are built, which may take minutes. ONNX files that are damaged, stale or foreign are refused: torch takes
        over with a warning (UserWarning), as it does for what TensorRT cannot do. progress: called while plans are
        built, with what is being done and its steps done and in all.

        Raises CopeditError for a folder that is not a model, damaged weights, a device that is not there, an engine
        that is unknown, not installed or cannot do what is asked, and ONNX files that are refused where there is no
        torch.
        """
        engine = choose_engine(engine)
        folder = checkpoint.locate(model, exported=engine != "torch")
        if engine != "torch":
            from copedit_rt.engines.onnx_engine import OnnxEngine, Refused

            built: OnnxEngine | TensorRTEngine
            try:
                if engine == "tensorrt":
                    from copedit_rt.engines.tensorrt_engine import TensorRTEngine

                    built = TensorRTEngine(folder, device, max_memory, progress)
                elif engine == "openvino":
                    from copedit_rt.engines.openvino_engine import OpenVinoEngine

                    built = OpenVinoEngine(folder, device, max_memory, dtype)
                else:
                    built = OnnxEngine(folder, device, max_memory)
            except Refused as error:
                if find_spec("torch") is None:
                    raise CopeditError(f"{error} (torch, which could take over, is not installed)") from error
                warnings.warn(f"{error}; torch takes over", stacklevel=2)
            else:
                if dtype not in ("auto", built.precision):
                    raise CopeditError(f"dtype {dtype!r}: {folder} was exported in {built.precision}; use auto")
                return cls.on(built, folder)
        config, tokenizer, first = checkpoint.load_tokenizer(folder)
        _, denoiser, second = checkpoint.load_denoiser(folder)
        prior, digests = checkpoint.load_prior(folder, config), {"tokenizer": first, "denoiser": second}
        digests |= checkpoint.digests(folder, [PRIOR]) if prior else {}
        self = cls(config, tokenizer, denoiser, device, digests, max_memory, dtype, prior)
        self.trained = TrainedOn.load(folder)
        return self

    def perceive(self, study: Study) -> Perception:
        """What the prompt heads say about a study; nothing needs to be missing.

        Raises CopeditError as `prepare.prepare` does.
        """
        prepared = prepare(study, self.config, allow_complete=True)
        with self._turn:
            return self._perception(prepared, self._encode(prepared))

    def synthesize(
        self,
        study: Study,
        *,
        target: str | Sequence[str] | None = None,
        steps: int | None = None,
        seed: int = 0,
        samples: int = 1,
        progress: Callable[[int, int], None] | None = None,
        solver: str | None = None,
        detail: bool | None = None,
    ) -> Result:
        """Synthesise what is missing from a study.

        target: which missing elements to return (brain; None: all). steps: sampler steps (None: the model's default;
        0: the prior's fill as it is, of a model that has one, in which nothing is drawn).
        seed: with the study's name and the element it determines the noise. samples: with more than one, the returned
        volume is their mean, and `std` their standard deviation (n - 1 in the denominator). progress: called with
        the denoising steps done (on a GPU: queued) and in all. solver: "ddim" or "dpm2m" (None: the model's default).
        detail: brain; whether to carry over what the model's grid cannot hold from the observed images (None: the
        model's).

        Raises CopeditError for a study that the model cannot take, an unknown target or solver, numbers that are not
        whole or out of range, and a max_memory that is too small.
        """
        config = self.config
        try:
            steps = operator.index(config.diffusion.steps if steps is None else steps)
            seed, samples = operator.index(seed), operator.index(samples)
        except TypeError as error:
            said = f"steps {steps!r}, seed {seed!r}, samples {samples!r}"
            raise CopeditError(f"{said}: each must be a whole number") from error
        self._check_sampling(steps, solver, samples)
        if detail is not None and config.task.joint:
            raise CopeditError(f"{study.name}: detail is carried over among a brain's images; leave it out for a stack")
        if not isinstance(detail, bool | np.bool_ | None):
            raise CopeditError(f"detail {detail!r}: must be True or False, or None for the model's default")
        detail = config.preprocessing.detail if detail is None else bool(detail)
        prepared = prepare(study, config)
        wanted = self._targets(prepared, target)
        if samples > 1:
            _check_moments(study, len(wanted), samples)
        mean: dict[str, np.ndarray] = {}
        spread: dict[str, np.ndarray] = {}
        fill = self.prior.fill_study(prepared) if self.prior else None
        with self._turn:
            encoded = self._encode(prepared, fill)
        solver = config.diffusion.solver if solver is None else solver
        whole = config.preprocessing.whole_range
        stack, bright = (fill.stack, fill.bright) if fill else (None, None)
        for sample, made in enumerate(self._draw(prepared, encoded, fill, seed, samples, steps, solver, progress)):
            images = prepared.restore(made, detail, whole, stack, bright)
            for name in wanted:
                value = images.pop(name)
                if samples == 1:
                    mean[name] = value
                    continue
                if not sample:
                    mean[name], spread[name] = np.zeros((2, *value.shape))
                # Welford's running mean and sum of squares, a plane at a time: MOMENTS bytes a voxel in all.
                for centre, squares, plane in zip(mean[name], spread[name], value, strict=True):
                    delta = plane - centre
                    centre += delta / (sample + 1)
                    squares += delta * (plane - centre)
        std = {k: np.sqrt(v / (samples - 1)).astype(np.float32) for k, v in spread.items()} if samples > 1 else {}
        volumes = {name: value.astype(np.float32, copy=False) for name, value in mean.items()}
        method = solver if steps else schedule.PRIOR_ALONE
        sampling = {"method": method, "steps": steps, "seed": seed, "samples": samples}
        if steps and config.diffusion.start < 1:
            sampling["start"] = config.diffusion.start
        record = self._record(prepared, wanted, sampling)
        record["output"] = {"detail": detail, "whole_range": config.preprocessing.whole_range}
        result = study.with_synthetic(volumes)
        perception = self._perception(prepared, encoded)
        result.notes += (*prepared.notes, *perception.unlike)
        if seed and not steps:
            result.notes += (f"seed {seed} changes nothing: {config.name} draws nothing without sampling steps",)
        record["notes"] = notes_of(result)
        return Result(result, perception, record, std)

    def _check_sampling(self, steps: int, solver: str | None, samples: int) -> None:
        """Raises CopeditError for steps, a solver or samples that do not exist, or that nothing is drawn for."""
        if not 1 <= samples <= SAMPLES:
            raise CopeditError(f"samples {samples}: must be between 1 and {SAMPLES}")
        if steps or self.prior is None:
            schedule.solver_tables(self.config.diffusion, steps, solver)
            return
        for name, value in (("solver", solver), ("samples", samples if samples > 1 else None)):
            if value is not None:
                raise CopeditError(
                    f"{name} {value}: {self.config.name} takes no sampling steps here, its prior fills in what is "
                    f"missing and nothing is drawn; leave {name} out, or take 1 step or more (--steps)"
                )

    def _draw(
        self,
        prepared: Prepared,
        encoded: Encoded,
        fill: Fill | None,
        seed: int,
        samples: int,
        steps: int,
        solver: str,
        progress: Callable[[int, int], None] | None,
    ) -> Iterator[np.ndarray]:
        """Images [m, 1, H, W, D] of each sample of a study; of a brain's, those that are not observed."""
        there, name = prepared.observed, prepared.study.name
        if not steps:
            assert fill is not None
            yield fill.images
            return
        with self._turn:
            begun = self._begun(there, encoded, fill, name)
        for first in range(0, samples, TOGETHER):
            some = range(first, min(first + TOGETHER, samples))
            report = None
            if progress:
                report = lambda i, n, some=some: progress(some.start * n + i * len(some), samples * n)  # noqa: E731
            z = begun.latents
            start = np.stack([self.start(encoded.latents[0], there, name, seed, sample, z) for sample in some])
            prompts, observed = encoded.prompts.repeat(len(some), 0), there[None].repeat(len(some), 0)
            prior = None if z is None else z[None].repeat(len(some), 0)
            with self._turn:
                drawn = self.sample(start, prompts, observed, steps, solver, report, prior, about=name)
            for latents in drawn:
                with self._turn:
                    decoded = self.decode(latents, there)
                yield decoded + begun.beyond

    def _targets(self, prepared: Prepared, target: str | Sequence[str] | None) -> list[str]:
        """Names of the volumes to return."""
        if self.config.task.joint:
            if target is not None and str(target).strip().lower() != "all":
                asked = target if isinstance(target, str) else ", ".join(target)
                raise CopeditError(f"target {asked}: a cardiac stack is filled as a whole; leave target out")
            return [STACK]
        wanted = targets(target) or prepared.missing
        for name in wanted:
            if name not in self.config.elements:
                raise CopeditError(
                    f"target {name!r} is unknown to {self.config.name}; choose among {', '.join(self.config.elements)}"
                )
            if name not in prepared.missing:
                raise CopeditError(f"target {name!r}: {prepared.study.name} has a file for it; nothing to synthesise")
        return [name for name in prepared.missing if name in wanted]

    def _encode(self, prepared: Prepared, fill: Fill | None = None) -> Encoded:
        # A slab that counts as observed and lacks a slice all the same is taken with that slice filled.
        return self.encode((fill or prepared).images[prepared.observed], prepared.study.name)

    def _begun(self, there: np.ndarray, encoded: Encoded, fill: Fill | None, about: str) -> Begun:
        """What the prior knows of a study in which these elements are observed."""
        if fill is None:
            return Begun()
        z = np.empty((len(there), *encoded.latents.shape[2:]), np.float32)
        z[there] = encoded.latents[0]
        z[~there] = self.encode(fill.images[~there], about).latents[0]
        return Begun(z, fill.images - self.decode(z, there))

    def _perception(self, prepared: Prepared, encoded: Encoded) -> Perception:
        elements = self.config.elements
        names = [name for name, there in zip(elements, prepared.observed, strict=True) if there]
        alone = dict(zip(names, encoded.alone[0], strict=True))
        perceived = Perception.from_logits(self.config.task, elements, encoded.count[0], encoded.missing[0], alone)
        if self.trained is None:
            return perceived
        unlike = self.trained.remarks(elements, prepared.images, prepared.observed)
        return replace(perceived, unlike=unlike, seen_only=self.trained.perception)

    def encode(self, images: np.ndarray, about: str = "images") -> Encoded:
        """`Engine.encode` of observed images [k, 1, H, W, D] as a batch of one; about: whose they are.

        Raises CopeditError for latents that are not finite: a tokenizer that quantises would make a plausible image of
        them.
        """
        encoded = self.engine.encode(images[None])
        self._check_finite(f"{about}: the encoder", encoded.latents)
        return encoded

    def sample(self, z: np.ndarray, *arguments: Any, about: str = "images") -> np.ndarray:
        """`Engine.sample`; about: whose latents they are. Raises CopeditError for latents that are not finite."""
        made = self.engine.sample(z, *arguments)
        self._check_finite(f"{about}: the denoiser", made)
        return made

    def _check_finite(self, what: str, latents: np.ndarray) -> None:
        if not np.isfinite(latents).all():
            raise CopeditError(
                f"{what} of {self.config.name} returned NaN or infinity ({self.engine.name}, {self.engine.precision}), "
                f"so nothing is written; compute in float32 (--dtype), or choose another model with --model"
            )

    def start(
        self,
        latents: np.ndarray,
        observed: np.ndarray,
        study: str,
        seed: int = 0,
        sample: int = 0,
        fill: np.ndarray | None = None,
    ) -> np.ndarray:
        """Where sampling starts [m, 8, h, w, d]: latents [k, 8, h, w, d] of what is observed [m], noise elsewhere, or
        the fill's latents [m, 8, h, w, d] with noise, in a model whose `diffusion.start` is below 1."""
        z = np.empty((len(observed), *latents.shape[1:]), np.float32)
        z[observed] = latents
        for i in np.flatnonzero(~observed):
            noise = schedule.noise(seed, study, self.config.elements[i], z.shape[1:], sample)
            z[i] = schedule.begun(self.config.diffusion, noise, None if fill is None else fill[i])
        return z

    def decode(self, z: np.ndarray, observed: np.ndarray) -> np.ndarray:
        """Images [m, 1, H, W, D] of latents [m, 8, h, w, d]; brain: only what is not observed [m], 0 elsewhere."""
        chosen = self.config.task.decoded(observed)
        images = np.zeros((len(observed), 1, *self.config.image), np.float32)
        images[chosen] = self.engine.decode(z[None, chosen])[0]
        return images

    def _record(self, prepared: Prepared, wanted: list[str], sampler: dict[str, Any]) -> dict[str, Any]:
        study = prepared.study
        return {
            "model": self.config.name,
            "weights_sha256": self.weights,
            "trained_on": self.trained.words if self.trained else None,
            "study": study.name,
            "inputs": inputs_of(study),
            "missing": list(prepared.missing),
            "missing_slices": list(prepared.missing_slices),
            "synthesised": wanted,
            "sampler": sampler,
            "geometry": prepared.record(),
            "engine": self.engine.name,
            "device": self.engine.device,
            "dtype": self.engine.precision,
            "versions": {
                "copedit": copedit_rt.__version__,
                **self.engine.versions,
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
        }


def _check_moments(study: Study, count: int, samples: int) -> None:
    """Raises CopeditError where the moments of samples of `count` volumes do not fit into memory beside the rest."""
    voxels = study.reference.data.size
    needed, available = (MOMENTS * count + WORKING) * voxels, available_memory()
    if needed > available:
        raise CopeditError(
            f"{study.name}: samples {samples}: the mean and spread of {count} x {voxels} voxels and the filling in "
            f"take {needed / 2**30:.1f} GiB, more than the {available / 2**30:.1f} GiB of memory available; leave "
            f"samples out, or name fewer targets"
        )


def notes_of(study: Study) -> list[str]:
    """What there is to know of a study, as a record says it: with names of files in the place of their paths."""
    folders = {volume.path.parent for volume in study.volumes.values() if volume.path}
    return [by_name(note, folders) for note in study.notes]


def inputs_of(study: Study) -> dict[str, Any]:
    """A study's files as a record names them."""
    return {
        name: {
            "file": volume.path.name if volume.path else None,
            "sha256": volume.sha256,
            "size_mtime_ns": list(volume.stamp) if volume.stamp else None,
        }
        for name, volume in study.volumes.items()
    }
