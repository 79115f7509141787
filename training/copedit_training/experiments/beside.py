"""Trained methods and denoisers beside a model: read from their runs, refused where comparing would not be fair."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from copedit_rt import checkpoint
from copedit_rt.config import ModelConfig
from copedit_rt.errors import CopeditError
from copedit_rt.files import read_json
from copedit_rt.images.prepare import prepare
from copedit_rt.images.study import Study
from copedit_rt.networks.denoiser import build_denoiser
from copedit_rt.schedule import noise
from copedit_rt.synthesizer import Synthesizer
from copedit_training.evaluation.beside import Beside, Fill, Volumes
from copedit_training.experiments.analysis import fill as sampled
from copedit_training.methods.base import Method, load_method

FREE = ("seed", "device", "checkpoint_every", "keep", "validate_every", "validate_subjects", "tokenizer")
# Images [m, 1, H, W, D] on the grid of a model, which of them are observed [m], the seed of the noise, and whose they
# are: all of them, with what was missing filled in.
OnGrid = Callable[[np.ndarray, np.ndarray, int, str], np.ndarray]


@dataclass(frozen=True)
class Run:
    """A finished run. said: its `run.json`. label: its row. tokenizer: the SHA-256 of the one that it was trained with,
    None for a method on images. fill, on_grid: the run as what fills in studies, and images on its grid."""

    folder: Path
    said: Mapping[str, Any]
    label: str
    config: ModelConfig
    tokenizer: str | None
    fill: Fill
    on_grid: OnGrid
    space: str
    parameters: int

    @property
    def digest(self) -> str:
        """Of its weights, and of what was changed for sampling."""
        files = (file for file in sorted((self.folder / "model").iterdir()) if file.is_file())
        return hashlib.sha256(" ".join([self.label, *map(checkpoint.digest, files)]).encode()).hexdigest()

    @property
    def data(self) -> dict[str, Any]:
        """What it was trained on."""
        split, data = self.folder / "split.json", self.said.get("data", "phantom")
        simulated = data == "phantom" or data.startswith("labels:")
        return {
            "data": data,
            "subjects": self.said["settings"]["subjects"] if simulated else None,
            "split": hashlib.sha256(split.read_bytes()).hexdigest() if split.is_file() else None,
        }

    def budget(self) -> dict[str, Any]:
        """What its training has cost, by its log."""
        settings = self.said["settings"]
        lines = [json.loads(x) for x in (self.folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        volumes = settings["steps"] * settings["batch_size"] * settings["accumulate"]
        depth = self.config.image[2]
        sliced = getattr(_kind(self.said), "sliced", False)
        return {
            "space": self.space,
            "parameters": self.parameters,
            "steps": settings["steps"],
            "volumes": volumes,
            "slices": volumes * min(depth, settings["slices"]) if sliced else None,
            "seconds": sum(line["seconds"] for line in lines),
            "processor_seconds": sum(line.get("processor_seconds", 0) for line in lines),
            "run": str(self.folder),
        }


def load(
    specs: Sequence[str], model: Synthesizer, name: str, device: str = "auto", **sampling: Any
) -> tuple[dict[str, Beside], dict[str, Any]]:
    """`rows` as what fills in studies, with what each has cost."""
    found, budget = rows(specs, model, name, device, **sampling)
    return {label: Beside([run.fill for run in runs], cost(runs)) for label, runs in found.items()}, budget


def rows(
    specs: Sequence[str], model: Synthesizer, name: str, device: str = "auto", **sampling: Any
) -> tuple[dict[str, list[Run]], dict[str, Any]]:
    """Runs by their rows, those of several seeds together, and the budget of the model.

    specs: run folders, or RUN@KEY=VALUE,... with settings of sampling. name: what the model was loaded from; where that
    is a run of the denoiser it is held to the same data. sampling: steps and solver with which denoisers fill in
    studies, as the model does; methods have their own.
    Raises CopeditError for what is no finished run, another grid, and unequal data, tokenizers or settings.
    """
    runs = [_read(spec, device, sampling) for spec in specs]
    for run in runs:
        for field in ("task", "elements", "image", "preprocessing"):
            if getattr(run.config, field) != getattr(model.config, field):
                raise CopeditError(f"{run.folder}: its {field} is not that of {name}; compare models of one preset")
    own = _run_of(name)
    said = read_json(own / "run.json") if own else {}
    budget: dict[str, Any] = {"space": "latent", "parameters": _weights(model)}
    if own and said.get("stage") == "denoiser":
        trained = _denoiser(own, said, model, sampling)
        runs_of_all, budget = [trained, *runs], trained.budget()
    else:
        runs_of_all = runs
        _check_tokenizer(runs, model, name)
    _check_equal(runs_of_all)
    by_label: dict[str, list[Run]] = {}
    for run in runs:
        by_label.setdefault(run.label, []).append(run)
    for label, some in by_label.items():
        _check_seeds(label, some)
    return by_label, budget


def _weights(model: Synthesizer) -> int:
    """Of the denoiser as it is trained: on a CPU the engine's own are packed, and count for less."""
    with torch.device("meta"):
        return sum(p.numel() for p in build_denoiser(model.config).parameters())


def _read(spec: str, device: str, sampling: Mapping[str, Any]) -> Run:
    path, _, given = spec.rpartition("@") if "=" in spec.rpartition("@")[2] else (spec, "", "")
    folder = _run_of(path)
    if folder is None:
        raise CopeditError(f"--beside {spec}: no run there; give the output of copedit train method or train denoiser")
    if not (folder / "model").is_dir():
        raise CopeditError(f"--beside {spec}: is not finished; go on with it by --resume")
    said = read_json(folder / "run.json")
    if said.get("stage") == "tokenizer":
        raise CopeditError(f"--beside {spec}: a run of stage I, which fills in nothing; give one of train denoiser")
    changed = dict(_changed(spec, item) for item in given.split(",") if item)
    if "method" in said:
        return _method(folder, said, load_method(folder, device, **changed), changed)
    if changed:
        raise CopeditError(f"--beside {spec}: settings of sampling can be given for methods, not for a denoiser")
    return _denoiser(folder, said, Synthesizer.load(folder / "model", device), sampling)


def _changed(spec: str, item: str) -> tuple[str, int]:
    key, _, text = item.partition("=")
    if not text.isdecimal() or not int(text):
        raise CopeditError(f"--beside {spec}: expected RUN@KEY=NUMBER, found {item}")
    return key, int(text)


def _run_of(name: str) -> Path | None:
    """The run folder that holds a model folder, or is named itself."""
    folders = (Path(name), Path(name).resolve().parent) if Path(name).is_dir() else ()
    return next((f for f in folders if (f / "run.json").is_file()), None)


def _kind(said: Mapping[str, Any]) -> type[Method[Any]] | None:
    from copedit_training.methods import method

    return method(said["method"]) if "method" in said else None


def _method(folder: Path, said: Mapping[str, Any], made: Method[Any], changed: Mapping[str, int]) -> Run:
    notes = [made.settings.guidance] if made.guided else []
    notes += [f"{key}={value}" for key, value in changed.items()]
    label = f"{made.title}: {', '.join(notes)}" if notes else made.title
    count = sum(p.numel() for p in made.net.parameters())
    fills = filled(made), method_on_grid(made)
    return Run(folder, said, label, made.config, said.get("tokenizer"), *fills, made.space, count)


def _denoiser(folder: Path, said: Mapping[str, Any], made: Synthesizer, sampling: Mapping[str, Any]) -> Run:
    prompts = made.config.denoiser.prompts
    label = "CoPeDiT, trained beside" + ("" if prompts == "full" else f": {prompts}")
    digest = said.get("tokenizer")
    if digest is None:  # a run of an older version
        try:
            source = checkpoint.locate(said["settings"]["tokenizer"])
        except CopeditError:
            source = folder / "model"
        digest = checkpoint.digest(source / checkpoint.TOKENIZER)

    def fill(study: Study, seed: int) -> Volumes:
        result = made.synthesize(study, seed=seed, **sampling)
        return {name: volume.data for name, volume in result.study.volumes.items()}

    return Run(folder, said, label, made.config, digest, fill, model_on_grid(made), "latent", _weights(made))


def model_on_grid(model: Synthesizer) -> OnGrid:
    """A model as what fills in images on its grid, by its own sampler."""

    def fill(images: np.ndarray, observed: np.ndarray, seed: int, study: str) -> np.ndarray:
        encoded, made = model.encode(images[observed]), images.copy()
        made[~observed, 0] = sampled(model, encoded.latents[0], observed, encoded.prompts[0], study, seed)
        return made

    return fill


def method_on_grid(made: Method[Any]) -> OnGrid:
    """A method as what fills in images on its grid, with the noise of a `Synthesizer`."""

    def fill(images: np.ndarray, observed: np.ndarray, seed: int, study: str) -> np.ndarray:
        given, there = (torch.from_numpy(np.asarray(x))[None] for x in (images, observed))
        out = made.synthesise(given, there, lambda element, shape: noise(seed, study, element, shape))
        return out[0].cpu().numpy()

    return fill


def filled(made: Method[Any]) -> Fill:
    """A method as what fills in a study: the preprocessing, the noise and the way back of `Synthesizer`."""
    on_grid = method_on_grid(made)

    def fill(study: Study, seed: int) -> Volumes:
        prepared, told = prepare(study, made.config), made.config.preprocessing
        out = on_grid(prepared.images, prepared.observed, seed, study.name)
        return prepared.restore(out, told.detail, told.whole_range)

    return fill


def _check_tokenizer(runs: Sequence[Run], model: Synthesizer, name: str) -> None:
    """Raises CopeditError for a run with another tokenizer than that of a model that is no run."""
    for run in runs:
        if run.tokenizer not in (None, model.weights.get("tokenizer")):
            raise CopeditError(f"{run.folder}: its tokenizer is not that of {name}; train it with that one")


def _check_equal(runs: Sequence[Run]) -> None:
    """Raises CopeditError unless all were trained on the same data, and with the same tokenizer if with one."""
    with_one = [run for run in runs if run.tokenizer]
    for some, field, what in ((runs, "data", "on the same data"), (with_one, "tokenizer", "with the same tokenizer")):
        for run in some[1:]:
            if getattr(run, field) != getattr(some[0], field):
                raise CopeditError(f"{run.folder} and {some[0].folder}: not trained {what}; compare runs that are")


def _check_seeds(label: str, runs: Sequence[Run]) -> None:
    """Raises CopeditError unless several runs of a row differ in their seeds, and in them alone."""
    told = [{k: v for k, v in run.said["settings"].items() if k not in FREE} for run in runs]
    seeds = [run.said["settings"]["seed"] for run in runs]
    if any(one != told[0] for one in told) or len(set(seeds)) < len(seeds):
        raise CopeditError(
            f"{', '.join(str(run.folder) for run in runs)}: several runs of {label} must differ in their seed, and in "
            f"nothing else"
        )


def cost(runs: Sequence[Run]) -> dict[str, Any]:
    """The budget of a row: of its first run, with the means of the seconds."""
    budgets = [run.budget() for run in runs]
    means = {name: float(np.mean([b[name] for b in budgets])) for name in ("seconds", "processor_seconds")}
    return {**budgets[0], **means, "runs": len(runs)}
