"""What ablations share: a folder in which each variant is trained once under each seed, and its scores are kept."""

from __future__ import annotations

import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from copedit_rt.config import ModelConfig
from copedit_rt.errors import CopeditError
from copedit_rt.files import write_atomically
from copedit_training.data import layouts
from copedit_training.data.prepared import HELD_OUT, folder_images, held_out_images, phantom_images
from copedit_training.evaluation.compare import Pair
from copedit_training.evaluation.features import Networks, said
from copedit_training.stages.checkpoints import claim
from copedit_training.stages.denoiser_task import DenoiserTask
from copedit_training.stages.progress import terminal
from copedit_training.stages.settings import Settings
from copedit_training.stages.tokenizer_task import TokenizerTask
from copedit_training.stages.trainer import fit

REDUCED_RUNS, FULL_RUNS = 2, 3  # seeds per variant
TEST_SUBJECTS = 16


@dataclass(frozen=True)
class Variant:
    """A row of a table. trained: whether it is, or as it is built."""

    name: str
    label: str
    trained: bool = dataclasses.field(default=True, kw_only=True)


V = TypeVar("V", bound=Variant)
S = TypeVar("S", bound=Settings)
T = TypeVar("T", DenoiserTask, TokenizerTask)


class Experiment(ABC, Generic[V, S, T]):
    """What all variants of a folder share: data, settings, seeds, held-out subjects; networks for FID and FVD."""

    stage: str  # which stage the variants are trained by

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        settings: S,
        described: Mapping[str, Any],
        *,
        data: str = "phantom",
        full: bool = False,
        runs: int | None = None,
        test_subjects: int = TEST_SUBJECTS,
        networks: Networks | None = None,
        least: int = 1,
    ) -> None:
        """described: what besides these tells one experiment from another. least: held-out subjects that it takes.
        Raises CopeditError for fewer, for data that there are not, and for a folder that holds another experiment."""
        if test_subjects < least:
            raise CopeditError(f"--subjects {test_subjects}: this ablation needs {least} or more; leave it out")
        studies = None if data == "phantom" else layouts.find(Path(data), config)
        self.folder, self.config, self.settings, self.networks = folder, config, settings, networks
        self.seeds = [settings.seed + i for i in range(runs or (FULL_RUNS if full else REDUCED_RUNS))]
        self.described = {
            **described,
            "settings": dataclasses.asdict(settings),
            "model": config.to_dict(),
            "data": data if data == "phantom" else str(Path(data).resolve()),
            "test_subjects": test_subjects,
        }
        claim(folder, self.described, resume=True)
        self.console = terminal()
        self.images, self.held_out = self._images(studies, test_subjects, least)
        self.described |= {"subjects": len(self.images), "test_subjects": len(self.held_out)}

    def _images(self, studies: layouts.DataSet | None, test_subjects: int, least: int) -> tuple[np.ndarray, np.ndarray]:
        """Training images and those of held-out subjects, kept in the folder: of phantoms, or of a data set."""
        config, folder = self.config, self.folder
        if studies is None:
            images = phantom_images(config, self.settings.subjects, folder / "phantom.npy")
            return images, phantom_images(config, test_subjects, folder / "held-out.npy", first=HELD_OUT)
        images = folder_images(config, studies, folder, say=self.console.print)
        held_out = held_out_images(config, studies, folder, test_subjects)
        if len(held_out) < least:
            raise CopeditError(
                f"{studies.folder}: {len(held_out)} of the held-out subjects can be used, and this ablation needs "
                f"{least} or more; add studies"
            )
        return images, held_out

    @abstractmethod
    def task(self, variant: V, seed: int) -> T:
        """A variant under a seed, before its first step."""

    @abstractmethod
    def scores(
        self, variant: V, task: T, log: Sequence[Mapping[str, Any]], networks: Networks | None
    ) -> dict[str, Any]:
        """What is said of a variant after its last step, JSON-able; log: a row a step, none of what is not trained."""

    def run(self, variant: V, seed: int) -> dict[str, Any]:
        """Train and score a variant under a seed; a finished one is read from its folder, a begun one goes on."""
        folder = self.folder / f"{variant.name}-seed{seed}"
        path = folder / "scores.json"
        stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if stored and (not self.networks or stored.get("networks") == self.networks.digests):
            return stored
        task, networks = self.task(variant, seed), self.networks and self.networks.again()
        described = {
            "stage": self.stage,
            "settings": dataclasses.asdict(task.settings),
            "model": task.config.to_dict(),
        }
        claim(folder, described, resume=True)
        log = []
        if variant.trained:
            fit(f"{variant.name}, seed {seed}", folder, task, resume=True, held_out=None, console=self.console)
            log = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        scores = self.scores(variant, task, log, networks)
        if networks:
            summary = networks.summary().items()
            scores |= {"networks": networks.digests, "frechet": {key: row["model"] for key, row in summary}}
        write_atomically(path, (json.dumps(scores, indent=1) + "\n").encode())
        return scores

    def runs(self, variants: Sequence[V]) -> dict[str, list[dict[str, Any]]]:
        """The runs of each variant, by seed: a whole table under the first seed comes before any of the second."""
        runs: dict[str, list[dict[str, Any]]] = {v.name: [] for v in variants}
        for seed in self.seeds:
            for variant in variants:
                runs[variant.name].append(self.run(variant, seed))
        return runs

    def named_networks(self) -> dict[str, Any]:
        """For a report, the files of the networks; nothing without any."""
        if not self.networks:
            return {}
        return {"networks": {name: str(path) for name, path in self.networks.files.items() if path}}


def look(networks: Networks, key: str, element: str, image: np.ndarray, truth: np.ndarray, joint: bool) -> None:
    """Show networks an image [H, W, D] of a subject and its truth, on the model's grid; joint: a slab of a heart, of
    which there are axial slices alone."""
    slices = tuple(range(image.shape[2])) if joint else None
    networks.add(key, Pair("model", element, image, truth.astype(np.float32), slices), first=True)


def distances(runs: Sequence[Mapping[str, Any]], key: str) -> dict[str, float | None]:
    """FID and FVD under a key, as far as there are networks: means over the seeds."""
    rows = [run["frechet"].get(key, {}) for run in runs]
    named = [name for name in ("fid", "fvd") if name in runs[0]["networks"]]
    found = {name: [row[name] for row in rows if row.get(name) is not None] for name in named}
    return {name: float(np.mean(values)) if len(values) == len(runs) else None for name, values in found.items()}


def looked(report: Mapping[str, Any]) -> list[str]:
    """Which networks FID and FVD are by; nothing without any."""
    if not (files := report.get("networks")):
        return []
    names = " ".join(said({name: Path(path) for name, path in files.items()}))
    return [f"{names} Of whole images, means over the seeds; they grow as samples get fewer.", ""]


def held_out_words(report: Mapping[str, Any]) -> str:
    """What a table is of: training and held-out studies, seeds."""
    seeds = ", ".join(map(str, report["seeds"]))
    return f"{report['subjects']} studies to train on, {report['test_subjects']} held out, seeds {seeds}."
