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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike
from torch import Tensor

from copedit_rt.config import ModelConfig
from copedit_rt.errors import CopeditError
from copedit_rt.files import read_json, unwritable, write_atomically
from copedit_rt.images.intensity import to_unit_range
from copedit_rt.images.nifti import Volume
from copedit_rt.images.prepare import prepare
from copedit_rt.images.study import Study
from copedit_rt.task import Task
from copedit_training.data import phantom
from copedit_training.data.anatomy import read_folder
from copedit_training.data.layouts import DataSet, Skipped, ahead, heart_centre, load, read_all, split
from copedit_training.data.phantom import Phantom
from copedit_training.data.simulated import STRIPPED, Simulator

HELD_OUT = 1_000_000  # first seed of the phantoms that no training run sees
VALIDATION = 1_500_000  # first seed of those that training is watched on, and `evaluate` does not use
WATCHED = "watched.json"
SAFE_ROWS = 20  # subjects between two notes of how many are on the disk
HEART_LENGTH = 96.0  # mm that a simulated short-axis stack covers, base to apex

Files = Mapping[Path, tuple[tuple[int, ...], DTypeLike]]  # of numpy's: their shapes and dtypes


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
    normal = [to_unit_range(x, float(low), float(high)) for x, (low, high) in zip(images, ranges, strict=True)]
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
    """Subjects made one after another by their seeds: float16 [subjects, m, 1, H, W, D], mapped from `cache`."""
    shape = (subjects, len(config.elements), 1, *config.image)
    if cache.exists():
        images = mapped(cache)
        if images.shape == shape and images.dtype == np.float16:
            return images
    grow({cache: (shape, np.float16)}, lambda rows: ((image,) for image in make(rows)), progress)
    return mapped(cache)


def grow(
    files: Files,
    make: Callable[[range], Iterable[Sequence[np.ndarray]]],
    progress: Callable[[int, int], None] | None = None,
    of: str = "",
) -> None:
    """Write files of numpy's, of these shapes and dtypes, row by row.

    make: for a range of rows, one array for each file and row. of: one word for what the rows were made of.
    A process that is stopped leaves each file as `NAME.partial` and, in `NAME.rows` of the first, how many rows are
    whole; the next one goes on from there where `of` is the same, as an hour of computing may be in it.
    Raises CopeditError for a disk that is full or cannot be written to.
    """
    first = next(iter(files))
    count = first.with_name(f"{first.name}.rows")
    partial = [path.with_name(f"{path.name}.partial") for path in files]
    total = files[first][0][0]
    try:
        done = _begun(count, of)
        open_files = _reopened(partial, list(files.values())) if 0 < done <= total else None
        if open_files is None:
            done = 0
            count.unlink(missing_ok=True)  # of other rows
            first.parent.mkdir(parents=True, exist_ok=True)
            for path in partial:
                path.unlink(missing_ok=True)
            _check_room(first, sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in files.values()))
            open_files = [
                np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
                for path, (shape, dtype) in zip(partial, files.values(), strict=True)
            ]
        try:
            for arrays in make(range(done, total)):
                for file, array in zip(open_files, arrays, strict=True):
                    file[done] = array
                done += 1
                if done % SAFE_ROWS == 0:
                    _note(open_files, count, done, of)
                if progress:
                    progress(done, total)
        finally:
            _note(open_files, count, done, of)
        for path, whole in zip(partial, files, strict=True):
            os.replace(path, whole)
        count.unlink(missing_ok=True)
    except OSError as error:
        raise unwritable(first, error) from error


def _begun(count: Path, of: str) -> int:
    """How many whole rows, made of the same, a stopped process has left."""
    try:
        done, _, source = count.read_text(encoding="ascii").partition(" ")
        return int(done) if source.strip() == of else 0
    except (OSError, ValueError):
        return 0


def _reopened(partial: Sequence[Path], wanted: Sequence[tuple[tuple[int, ...], DTypeLike]]) -> list[np.ndarray] | None:
    """The files that a stopped process has left; None where one is gone, damaged or of another kind."""
    try:
        files: list[np.ndarray] = [np.lib.format.open_memmap(path, mode="r+") for path in partial]
    except (OSError, ValueError, EOFError):
        return None
    return files if [(x.shape, x.dtype) for x in files] == [(s, np.dtype(d)) for s, d in wanted] else None


def _note(files: Sequence[np.ndarray], count: Path, done: int, of: str) -> None:
    """So many rows are on the disk."""
    for file in files:
        assert isinstance(file, np.memmap)
        file.flush()
    write_atomically(count, f"{done} {of}".strip().encode("ascii") + b"\n")


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


def held_out_images(config: ModelConfig, data: DataSet | Labels | None, output: Path, subjects: int) -> np.ndarray:
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


def watched_images(config: ModelConfig, data: DataSet | Labels | None, output: Path, subjects: int) -> np.ndarray:
    """`held_out_images` that a training run is watched on; of a data set, those of at most half of the held-out
    subjects, who are noted in the run's folder: `evaluate` is to report on the others."""
    if isinstance(data, DataSet):
        test = split(data.subjects, output / "split.json")["test"]
        chosen = test[: min(subjects, len(test) // 2)]
        write_atomically(output / WATCHED, (json.dumps(chosen, indent=1) + "\n").encode())
        data = dataclasses.replace(data, studies=[entry for entry in data.studies if entry.subject in chosen])
    return held_out_images(config, data, output, subjects)


def watched(run: Path) -> set[str]:
    """The subjects that `watched_images` noted in a run's folder; none where it noted none."""
    path = run / WATCHED
    try:
        return set(map(str, read_json(path))) if path.exists() else set()
    except (OSError, ValueError, TypeError) as error:
        raise CopeditError(f"{path}: does not list subjects ({error}); restore it") from error


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
        cache.parent.mkdir(parents=True, exist_ok=True)
        _check_room(cache, 2 * math.prod(shape))
        images = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float16, shape=shape)
        yield images
        images.flush()
        os.replace(temporary, cache)
    except OSError as error:
        raise unwritable(cache, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def _check_room(cache: Path, size: int) -> None:
    """Raises CopeditError where a map of so many bytes does not fit on the disk: writing to it would kill the
    process."""
    free = shutil.disk_usage(cache.parent).free
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
