"""Training images on the model grid, and what is drawn from them at every step."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from copedit_rt.config import ModelConfig
from copedit_rt.errors import CopeditError
from copedit_rt.files import read_json, unwritable, write_atomically
from copedit_rt.images.nifti import Volume
from copedit_rt.images.prepare import prepare, to_unit_range
from copedit_rt.images.study import Study
from copedit_rt.task import Task
from copedit_training.data import phantom
from copedit_training.data.anatomy import read_folder
from copedit_training.data.layouts import DataSet, Skipped, ahead, heart_centre, load, read_all, split
from copedit_training.data.phantom import Phantom
from copedit_training.data.simulated import STRIPPED, Simulator

HELD_OUT = 1_000_000  # first seed of the phantoms that no training run sees
VALIDATION = 1_500_000  # first seed of those that training is watched on, and `evaluate` does not use
SAFE_ROWS = 20  # subjects between two notes of how many are on the disk
HEART_LENGTH = 96.0  # mm that a simulated short-axis stack covers, base to apex


def phantom_subject(config: ModelConfig, seed: int) -> Phantom:
    """A simulated subject whose grid is the model's own, so that preparing it resamples nothing."""
    h, w, d = config.image
    x, y, z = config.preprocessing.field_of_view
    if not config.task.joint:
        assert z is not None
        return phantom.brain(seed, (h, w, d), (x / h, y / w, z / d), config.elements)
    slices = d * len(config.elements)
    return phantom.heart(seed, (h, w, slices), (x / h, y / w, (z or HEART_LENGTH) / slices))


def model_images(config: ModelConfig, seed: int) -> np.ndarray:
    """A complete simulated subject through the runtime's preprocessing: float32 [m, 1, H, W, D] in 0..1."""
    subject = phantom_subject(config, seed)
    volumes = {name: Volume.from_array(image, subject.affine()) for name, image in subject.images.items()}
    return prepare(Study(f"phantom-{seed}", config.task, volumes), config, allow_complete=True).images


@dataclasses.dataclass(frozen=True)
class Labels:
    """A folder of label maps that studies are simulated from, see `anatomy.read_folder`."""

    folder: Path

    @classmethod
    def of(cls, data: str, config: ModelConfig) -> Labels | None:
        """Of `labels:FOLDER`; None for other data. Raises CopeditError for a folder that holds none, and for hearts."""
        kind, _, folder = data.partition(":")
        if kind != "labels":
            return None
        if config.task.joint:
            raise CopeditError(f"--data {data}: studies of brains are simulated from label maps, not of hearts")
        read_folder(Path(folder))
        return cls(Path(folder).resolve())

    def simulator(self, config: ModelConfig, cache: Path | None, stripped: float = STRIPPED) -> Simulator:
        """What draws studies on a model's grid, this share of them without a skull; prepared maps are kept in `cache`,
        if any."""
        extent = (x or 192.0 for x in config.preprocessing.field_of_view)
        spacing = [mm / n for mm, n in zip(extent, config.image, strict=True)]
        return Simulator(self.folder, config.elements, config.image, spacing, stripped, cache=cache)


def simulated_study(config: ModelConfig, simulator: Simulator, seed: int) -> np.ndarray:
    """The study of a seed, float32 [m, 1, H, W, D] in 0..1. It lies on the model's grid and stays where it was drawn,
    off the centre, as the heads of patients are not found exactly either."""
    study = simulator.study(seed)
    images = [study.images[name].numpy() for name in config.elements]
    ranges = [np.percentile(image, config.preprocessing.percentiles) for image in images]
    normal = [to_unit_range(x, float(low), float(high))[0] for x, (low, high) in zip(images, ranges, strict=True)]
    return np.stack(normal)[:, None]


def simulated_images(
    config: ModelConfig,
    labels: Labels,
    subjects: int,
    cache: Path,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Studies simulated from label maps, seeds from 0 on: float16 [subjects, m, 1, H, W, D], mapped from `cache`."""
    simulator: Simulator | None = None

    def make(seeds: range) -> Iterator[np.ndarray]:
        nonlocal simulator
        simulator = simulator or labels.simulator(config, cache.with_name("maps"))
        return (simulated_study(config, simulator, seed) for seed in seeds)

    return _of_seeds(config, subjects, cache, make, progress)


def phantom_images(
    config: ModelConfig,
    subjects: int,
    cache: Path,
    progress: Callable[[int, int], None] | None = None,
    first: int = 0,
) -> np.ndarray:
    """Simulated subjects, seeds from `first` on: float16 [subjects, m, 1, H, W, D], mapped from `cache`.

    float16 steps are at most 2^-11 of an intensity in 0..1, a fortieth of the phantoms' noise.
    """
    return _of_seeds(
        config,
        subjects,
        cache,
        lambda seeds: ahead(model_images, config, range(first + seeds.start, first + seeds.stop)),
        progress,
    )


def _of_seeds(
    config: ModelConfig,
    subjects: int,
    cache: Path,
    make: Callable[[range], Iterable[np.ndarray]],
    progress: Callable[[int, int], None] | None,
) -> np.ndarray:
    """Subjects made one after another by their seeds: float16 [subjects, m, 1, H, W, D], mapped from `cache`.

    A process that is stopped leaves `NAME.partial` and, in `NAME.rows`, how many of its rows are whole; the next one
    goes on from there, as an hour of simulation may be in it.
    """
    shape = (subjects, len(config.elements), 1, *config.image)
    if cache.exists():
        images = mapped(cache)
        if images.shape == shape and images.dtype == np.float16:
            return images
    partial, count = (cache.with_name(f"{cache.name}.{end}") for end in ("partial", "rows"))
    begun, done = _begun(partial, count, shape)
    try:
        if begun is not None:
            images = begun
        else:
            _check_room(cache, shape)
            count.unlink(missing_ok=True)  # of other rows
            images = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float16, shape=shape)
        try:
            for subject in make(range(done, subjects)):
                images[done] = subject
                done += 1
                if done % SAFE_ROWS == 0:
                    _note(images, count, done)
                if progress:
                    progress(done, subjects)
        finally:
            _note(images, count, done)
        os.replace(partial, cache)
        count.unlink(missing_ok=True)
    except OSError as error:
        raise unwritable(cache, error) from error
    return mapped(cache)


def _begun(partial: Path, count: Path, shape: tuple[int, ...]) -> tuple[np.ndarray | None, int]:
    """What a stopped process has left of images of this shape, and how many rows of it are whole; None and 0 where it
    left nothing that can be used."""
    try:
        done = int(count.read_text(encoding="ascii"))
        images = np.lib.format.open_memmap(partial, mode="r+")
    except (OSError, ValueError, EOFError):
        return None, 0
    if images.shape != shape or images.dtype != np.float16 or not 0 <= done <= len(images):
        return None, 0
    return images, done


def _note(images: np.ndarray, count: Path, done: int) -> None:
    """So many rows are on the disk."""
    assert isinstance(images, np.memmap)
    images.flush()
    write_atomically(count, f"{done}\n".encode("ascii"))


def folder_images(
    config: ModelConfig,
    data: DataSet,
    output: Path,
    progress: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] = print,
    most: int | None = None,
) -> np.ndarray:
    """The training side of a data set through the runtime's preprocessing: float16 [studies, m, 1, H, W, D].

    Mapped from `images.npy` in the run's folder; `images.json` beside it says which study is where and what was
    skipped, `split.json` which subjects are held out. Once the first two are there they are used as they are, so a
    resumed run sees the same images whatever became of the folder. most: no more studies than that. A study that
    cannot be used is told to `say` once.
    Raises CopeditError if more than three and more than one in twenty are damaged, and if nothing is left.
    """
    cache, index = output / "images.npy", output / "images.json"
    preparation = {"elements": config.elements, "image": config.image, **dataclasses.asdict(config.preprocessing)}
    preparation |= {"most": most} if most else {}
    about = json.loads(json.dumps({"folder": str(data.folder.resolve()), "preparation": preparation}))
    if index.exists() and cache.exists() and (done := _read_index(index))["about"] == about:
        kept, rows = mapped(cache), done["studies"]
        if len(kept) < len(rows) or kept.shape[1:] != (len(config.elements), 1, *config.image):
            raise CopeditError(f"{cache}: not the images that {index.name} lists; delete both, and --resume")
        return kept[: len(rows)]
    train = set(split(data.subjects, output / "split.json")["train"])
    studies = [entry for entry in data.studies if entry.subject in train][:most]
    say(
        f"{data.folder}: {len(studies)} studies of {len(train)} subjects to train on; held out: "
        f"{len(data.subjects) - len(train)} subjects ({output / 'split.json'})"
    )
    for kind, count in Counter(item.kind for item in data.skipped).items():
        first = next(item.reason for item in data.skipped if item.kind == kind)
        say(f"{count} {kind} studies are left out, such as {first}")
    rows = []
    skipped: list[Skipped] = []
    damaged: list[Skipped] = []
    shape = (max(1, len(studies)), len(config.elements), 1, *config.image)
    with new_cache(cache, shape) as images:
        for i, (entry, subject) in enumerate(zip(studies, read_all(config, studies), strict=True), 1):
            if isinstance(subject, Skipped):
                say(f"left out: {subject.reason}")
                (damaged if subject.kind == "damaged" else skipped).append(subject)
                if len(damaged) > max(3, len(studies) // 20):
                    raise CopeditError(
                        f"{data.folder}: {len(damaged)} of the first {i} studies are damaged "
                        f"({', '.join(item.study for item in damaged)}); repair or remove them, "
                        f"`copedit train check-data --deep` lists all"
                    )
            else:
                images[len(rows)] = subject
                centre = heart_centre(config, entry) if config.task.joint else None
                rows.append({"study": entry.files.name, "subject": entry.subject, "centre": centre})
            if progress:
                progress(i, len(studies))
        if not rows:
            raise CopeditError(
                f"{data.folder}: no complete study to train on; `copedit train check-data` says what is wrong with each"
            )
    left_out = [dataclasses.asdict(item) for item in (*data.skipped, *skipped, *damaged)]
    report = {"about": about, "studies": rows, "skipped": left_out}
    write_atomically(index, (json.dumps(report, indent=1) + "\n").encode())
    return mapped(cache)[: len(rows)]


def held_out_images(
    config: ModelConfig, data: DataSet | Labels | None, output: Path, subjects: int
) -> np.ndarray:
    """The first held-out studies that can be used, at most `subjects`: float16 [n, m, 1, H, W, D].

    data None: phantoms from `VALIDATION` on, and so for label maps; otherwise those of `split.json` in the run's
    folder.
    """
    if isinstance(data, Labels):
        simulator = data.simulator(config, output / "maps")
        found = [simulated_study(config, simulator, VALIDATION + i).astype(np.float16) for i in range(subjects)]
    elif data is None:
        found = [model_images(config, VALIDATION + i).astype(np.float16) for i in range(subjects)]
    else:
        test = set(split(data.subjects, output / "split.json")["test"])
        every = (load(config, entry) for entry in data.studies if entry.subject in test)
        found = list(itertools.islice((images for images in every if not isinstance(images, Skipped)), subjects))
    return np.stack(found) if found else np.empty(0, np.float16)


def _read_index(index: Path) -> dict[str, Any]:
    """What `folder_images` noted; CopeditError for anything else."""
    try:
        read = read_json(index)
        rows = [{"study": str(row["study"]), "centre": row.get("centre")} for row in read["studies"]]
        return {"about": read["about"], "studies": rows}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CopeditError(f"{index}: does not list images ({error}); delete it, and --resume") from error


def study_names(output: Path) -> list[str]:
    """The study of each row of a run's images, as `folder_images` noted them; none for phantoms."""
    index = output / "images.json"
    return [row["study"] for row in _read_index(index)["studies"]] if index.exists() else []


def heart_centres(output: Path) -> list[tuple[float, float] | None] | None:
    """Where the heart lies in each row of a run's images (`layouts.heart_centre`); None for phantoms."""
    index = output / "images.json"
    if not index.exists():
        return None
    return [row["centre"] for row in _read_index(index)["studies"]]


def mapped(cache: Path) -> np.ndarray:
    """A map of a file of numpy's, whose changes stay in memory. Raises CopeditError for anything else."""
    try:
        return np.lib.format.open_memmap(cache, mode="c")
    except (OSError, ValueError, EOFError) as error:
        raise CopeditError(f"{cache}: not what a run keeps there ({error}); delete it and start again") from error


@contextlib.contextmanager
def new_cache(cache: Path, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """A float16 map to be filled, complete under its name or not there at all."""
    temporary = cache.with_name(f".{cache.name}.{secrets.token_hex(8)}.{os.getpid()}.tmp.npy")
    try:
        _check_room(cache, shape)
        images = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float16, shape=shape)
        yield images
        images.flush()
        os.replace(temporary, cache)
    except OSError as error:
        raise unwritable(cache, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def _check_room(cache: Path, shape: tuple[int, ...]) -> None:
    """Raises CopeditError where a float16 map does not fit on the disk: writing to it would kill the process."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    size, free = 2 * math.prod(shape), shutil.disk_usage(cache.parent).free
    if size > free:
        raise CopeditError(
            f"{cache} takes {size / 2**30:.1f} GiB and only {free / 2**30:.1f} GiB are free there; "
            f"choose another output folder with -o"
        )


def draw_observed(rng: np.random.Generator, batch: int, elements: int, task: Task) -> Tensor:
    """Observed masks [batch, elements] (bool), each by `Task.draw`."""
    return torch.from_numpy(np.stack([task.draw(rng, elements) for _ in range(batch)]))


def draw_run(rng: np.random.Generator, slices: int) -> range:
    """A run of missing slices of a stack of at least two, of any length that leaves one: two in five a quarter, half or
    three quarters of the stack; nearly half of the runs at an end."""
    length = int(rng.integers(1, slices))
    if rng.random() < 0.4:
        length = min(max(1, round(slices * int(rng.integers(1, 4)) / 4)), slices - 1)
    last = slices - length
    start = int(rng.choice([0, last]) if rng.random() < 0.45 else rng.integers(0, last + 1))
    return range(start, start + length)
