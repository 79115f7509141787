"""Whom a model is evaluated on: complete subjects, simulated or of a data set, that no training has seen."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from copedit_rt.errors import CopeditError
from copedit_rt.images.nifti import Volume
from copedit_rt.images.prepare import Prepared, prepare
from copedit_rt.images.study import Study
from copedit_training.data import layouts
from copedit_training.data.layouts import Skipped
from copedit_training.data.prepared import HELD_OUT, Labels, phantom_subject, watched

if TYPE_CHECKING:
    from copedit_rt.config import ModelConfig
    from copedit_training.data.phantom import Phantom


def phantom_truth(config: ModelConfig, phantom: Phantom, name: str) -> Study:
    """A phantom as a complete study."""
    volumes = {element: Volume.from_array(image, phantom.affine()) for element, image in phantom.images.items()}
    return Study(name, config.task, volumes)


class Cohort(ABC):
    """Complete studies, read one at a time.

    studies: how many there are before any is opened. skipped: those that turned out to be unusable, as they are met.
    """

    def __init__(self, config: ModelConfig, studies: int):
        self.config, self.studies = config, studies
        self.skipped: list[Skipped] = []

    @abstractmethod
    def __iter__(self) -> Iterator[tuple[str, Study, Prepared]]:
        """Whose it is, the study in its own grid, and on the model's."""

    @abstractmethod
    def training(self, subjects: int) -> Iterator[Study]:
        """At most so many complete studies of others, to fit a baseline on."""

    @abstractmethod
    def about(self) -> dict[str, Any]:
        """What the report says of it; JSON-able."""


class Simulated(Cohort):
    """Subjects made of seeds, on the model's grid; raises CopeditError for seeds that training may have seen."""

    data: str

    def __init__(self, config: ModelConfig, subjects: int = 16, first_seed: int = HELD_OUT):
        if first_seed < HELD_OUT:
            raise CopeditError(f"seed {first_seed} may have been trained on; held-out subjects start at {HELD_OUT}")
        super().__init__(config, subjects)
        self.first_seed = first_seed

    @abstractmethod
    def truth(self, seed: int) -> Study:
        """The complete study of a seed."""

    def __iter__(self) -> Iterator[tuple[str, Study, Prepared]]:
        for seed in range(self.first_seed, self.first_seed + self.studies):
            truth = self.truth(seed)
            yield truth.name, truth, prepare(truth, self.config, allow_complete=True)

    def training(self, subjects: int) -> Iterator[Study]:
        return map(self.truth, range(subjects))

    def about(self) -> dict[str, Any]:
        return {"data": self.data, "first_seed": self.first_seed}


class Phantoms(Simulated):
    """Of mathematical phantoms."""

    data = "phantom"

    def truth(self, seed: int) -> Study:
        return phantom_truth(self.config, phantom_subject(self.config, seed), f"phantom{seed}")


class OfLabels(Simulated):
    """Of label maps. Those that are trained on have the same maps, of other shapes, diseases and sequences."""

    def __init__(self, config: ModelConfig, labels: Labels, subjects: int = 16, first_seed: int = HELD_OUT):
        super().__init__(config, subjects, first_seed)
        self.data, self._simulator = f"labels:{labels.folder}", labels.simulator(config, None)

    def truth(self, seed: int) -> Study:
        made = self._simulator.study(seed)
        return Study(
            f"simulated{seed}",
            self.config.task,
            {name: Volume.from_array(image.cpu().numpy(), made.affine()) for name, image in made.images.items()},
        )


class Folder(Cohort):
    """The complete studies of a data set in a published layout; the others are in `skipped`, with the reason.

    side: "test" for the subjects that training holds out, "all" for every one (of a model that was trained on others),
    or the split.json of a training run, whose `watched` subjects are left out. subjects: at most so many persons
    (None: all). watched: how many were left out so.
    Raises CopeditError as `layouts.find` does, and where nobody is left.
    """

    def __init__(self, config: ModelConfig, folder: Path, subjects: int | None = None, side: str = "test"):
        data = layouts.find(folder, config)
        file = None if side in ("test", "all") else Path(side)
        if file and not file.is_file():
            raise CopeditError(f"--split {side}: no such file; give test, all, or the split.json of a training run")
        sides = layouts.split(data.subjects, file, write=False)
        if file and not any(set(data.subjects) & set(named) for named in layouts.read_split(file).values()):
            raise CopeditError(f"{file} names none of the subjects of {folder}; give the --data folder of its run")
        self.folder, self.side = folder, side
        away = watched(file.parent) if file else set()
        self.people = data.subjects if side == "all" else [s for s in sides["test"] if s not in away]
        self.watched = len(away.intersection(sides["test"]))
        chosen = set(self.people[:subjects])
        self._entries = [entry for entry in data.studies if entry.subject in chosen]
        self._others = [] if side == "all" else [e for e in data.studies if e.subject in set(sides["train"])]
        if not self._entries:
            raise CopeditError(
                f"{folder}: no complete study to evaluate {config.name} on; `copedit train check-data` says what is "
                f"wrong with each, and --split all takes those that training would use"
            )
        super().__init__(config, len(self._entries))
        self.skipped = list(data.skipped)

    def __iter__(self) -> Iterator[tuple[str, Study, Prepared]]:
        for entry in self._entries:
            try:
                truth = _read(entry)
                prepared = prepare(truth, self.config, allow_complete=True)
            except CopeditError as error:
                self.skipped.append(Skipped(entry.files.name, "damaged", str(error)))
                continue
            if blank := truth.missing_slices:
                reason = f"{entry.files.name}: blank slices {', '.join(map(str, blank))}"
                self.skipped.append(Skipped(entry.files.name, "incomplete", reason))
                continue
            yield entry.subject, truth, prepared

    def training(self, subjects: int) -> Iterator[Study]:
        for entry in self._others[:subjects]:
            try:
                yield _read(entry)
            except CopeditError as error:
                self.skipped.append(Skipped(entry.files.name, "damaged", str(error)))

    def about(self) -> dict[str, Any]:
        return {
            "data": str(self.folder),
            "split": self.side,
            "people_held_out": len(self.people),
            "people_watched": self.watched,
            "skipped": [asdict(item) for item in self.skipped],
        }


def held_out(
    config: ModelConfig,
    data: str = "phantom",
    subjects: int | None = None,
    first_seed: int | None = None,
    split: str | None = None,
) -> Cohort:
    """Simulated subjects, "phantom" or "labels:FOLDER" (16, unless told otherwise), or those of a data set's folder
    (all).

    Raises CopeditError as `Simulated`, `Labels.of` and `Folder` do, and for an option of the one that is given with the
    other.
    """
    labels = Labels.of(data, config)
    if labels or data == "phantom":
        if split is not None:
            raise CopeditError(f"--split {split} is of a data set, not of simulated subjects; name one with --data")
        some = subjects or 16, HELD_OUT if first_seed is None else first_seed
        return OfLabels(config, labels, *some) if labels else Phantoms(config, *some)
    if first_seed is not None:
        raise CopeditError(f"--first-seed is of simulated subjects, not of --data {data}; leave it out")
    return Folder(config, Path(data), subjects, split or "test")


def _read(entry: layouts.Entry) -> Study:
    return Study.read(entry.files, resample=True)
