"""Data sets as they are published: which studies a folder holds, whose they are, and what is wrong with them.

What an image shows by its name is known to `copedit_rt.images.names`; here is whose it is, as the frames, visits
and sessions of one person may not be on both sides of a split. Finding reads no voxels. No torch.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from copedit_rt.errors import CopeditError
from copedit_rt.files import read_json, write_atomically
from copedit_rt.images.find import StudyFiles, find_studies
from copedit_rt.images.names import NIFTI, without_frame
from copedit_rt.images.nifti import Volume, read_outline, read_volume, same_grid
from copedit_rt.images.prepare import prepare, stack_frame
from copedit_rt.images.study import Study
from copedit_rt.task import STACK

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from copedit_rt.config import ModelConfig

TEST_SHARE = 0.2
Progress = Callable[[int, int], None]
Sides = dict[str, list[str]]

# Names of studies, or of a study and its folder; the group is the person. BIDS and everything else: see `_whose`.
_LAYOUTS = {
    layout: re.compile(pattern, re.I)
    for layout, pattern in {
        "BraTS": r"^(BraTS-[A-Z]+-\d+)(?=-\d+$)|^(BraTS\d+_\w+)$",  # from 2023 with the number of the visit
        "IXI": r"^(IXI\d+)-",
        "ACDC": r"^(patient\d{3})_frame\d+$",
        "MSCMR": r"^(patient\d+)_(?:C0|LGE|DE|T2)$",
        "Sunnybrook": r"^(SC-(?:HF-I|HF-NI|HYP|N)-\d+)(?:_E[DS])?$",
        "MESA": r"^(MES(?:A[-_]?)?\d+)(?:[-_/]|$)",
        "M&Ms-2": r"^(\d{3})_SA_E[DS]$",
        "UPENN-GBM": r"^(UPENN-GBM-\d+)_\d+$",  # with the number of the visit
        "UCSF-PDGM": r"^(UCSF-PDGM-\d+)(?:_FU\d+d)?(?:$|[_/])",
        "UKBB": r"^(\d{4,})[^/]*/sa(?:_E[DS])?$",
    }.items()
}


@dataclass(frozen=True)
class Entry:
    """A study that has all its files."""

    files: StudyFiles
    layout: str
    subject: str


@dataclass(frozen=True)
class Skipped:
    """A study that is not trained on: what it lacks, what is wrong with a file, or whose copy it is."""

    study: str
    kind: Literal["incomplete", "damaged", "duplicate"]
    reason: str


@dataclass
class DataSet:
    """What a folder holds for a model, by names: complete studies, the others, and files that are no study's.

    images: how many there are of each element (cardiac: stacks), in all studies.
    """

    folder: Path
    studies: list[Entry]
    skipped: list[Skipped]
    passed_over: list[tuple[Path, str]]
    images: dict[str, int]

    @property
    def subjects(self) -> list[str]:
        return sorted({entry.subject for entry in self.studies})


def find(folder: Path, config: ModelConfig) -> DataSet:
    """The studies of a folder that a model can be trained on, and why not the others.

    Layouts are recognised by themselves and may lie side by side: BraTS to 2021 and from 2023, IXI, BIDS, ACDC, MSCMR,
    MESA, UKBB, and any other names that `find_studies` takes. Of a study that is there twice, the first is used. Images
    that the model has no element for are left out. Raises CopeditError for a path that is no folder and a folder
    without images.
    """
    if not folder.is_dir():
        raise CopeditError(f"--data {folder} is not a folder; give the folder of a data set, or phantom")
    try:
        found = find_studies(folder, task=config.task)
    except CopeditError as error:
        some = () if config.task.joint else islice(folder.rglob("*.nii*"), 9)
        remedy = ""
        if labels := next(filter(_is_label_map, some), None):
            there = labels.parent.name == "synthseg"
            move = "" if there else f"move these into {folder}/synthseg and "
            where = labels.parent.parent if there else folder
            remedy = f"; {labels.name} looks like a label map: {move}give --data labels:{where}"
        raise CopeditError(_without_options(str(error)) + remedy) from error
    wanted = config.task.volumes(config.elements)
    passed_over = [(path, _without_options(reason)) for path, reason in found.skipped]
    data = DataSet(folder, [], [], passed_over, dict.fromkeys(wanted, 0))
    places: dict[str, Path] = {}
    for study in found:
        if not study.files:  # of DICOM, no series of which was understood
            data.skipped.append(Skipped(study.name, "incomplete", _without_options(str(study.problem))))
            continue
        layout, subject, name = _whose(study, folder)
        files = {element: path for element, path in study.files.items() if element in wanted}
        place = next(iter(study.files.values())).parent
        for element in files:
            data.images[element] += 1
        if missing := [element for element in wanted if element not in files]:
            reason = f"{name}: {', '.join(missing)} missing; {', '.join(files) or 'nothing'} found in {place}"
            data.skipped.append(Skipped(name, "incomplete", reason))
        elif name in places:
            reason = f"{name} is in {places[name]}, which is used, and in {place}; remove one"
            data.skipped.append(Skipped(name, "duplicate", reason))
        elif study.problem and not study.unclear:  # nothing that the model wants can be among the unclear
            data.skipped.append(Skipped(name, "duplicate", f"{study.problem.partition(';')[0]}; remove one"))
        else:
            places[name] = place
            data.studies.append(Entry(replace(study, name=name, files=files, problem=None), layout, subject))
    return data


def _without_options(text: str) -> str:
    """Without remedies by options such as --file, which the commands on data sets lack."""
    parts = (re.sub(r"(?:^| )or (?:give|name|with)\b.* --.*", "", part) for part in text.split("; "))
    return "; ".join(part for part in parts if part and " --" not in part)


def _is_label_map(path: Path) -> bool:
    """Whether a file holds few whole numbers, FreeSurfer's for white matter among them."""
    try:
        values = np.unique(read_volume(path).data)
    except CopeditError:
        return False
    return values.size < 200 and not (values % 1).any() and bool(np.isin((2, 41), values).any())


def _whose(study: StudyFiles, folder: Path) -> tuple[str, str, str]:
    """(layout, person, study): names that hold for the published data set wherever it lies, or in this folder."""
    where = study.naming.subfolder
    name = study.naming.head.strip("-_. ") or where.name or folder.resolve().name
    for layout, pattern in _LAYOUTS.items():
        for text in (name, f"{where.name}/{name}"):
            if match := pattern.search(text):
                return layout, f"{layout}/{match[match.lastindex or 0]}", text
    if person := re.match(r"sub-[^_]+", name):  # BIDS: the same names in every data set
        first = next((i for i, part in enumerate(where.parts) if part.startswith("sub-")), len(where.parts))
        above = Path(*where.parts[:first])
        return "BIDS", (above / person[0]).as_posix(), (above / name).as_posix()
    own = (where if where.name == name else where / name).as_posix()
    return "other", without_frame(own), own


# ---- the two sides -----------------------------------------------------------------------------------------


def split(subjects: Iterable[str], path: Path | None = None, write: bool = True) -> Sides:
    """{"train": subjects, "test": subjects}, about 80 to 20, read from and (write) written to `path`.

    A subject's name decides (SHA-256), so that others coming or going do not move it; a subject that the file has stays
    where that says. If one side were empty, the subject nearest to the limit goes there. Raises CopeditError for a
    damaged file and one with a subject on both sides.
    """
    known = read_split(path) if path and path.exists() else {"train": [], "test": []}
    side = {subject: name for name, members in known.items() for subject in members}
    draw = {s: int.from_bytes(hashlib.sha256(s.encode()).digest()[:8], "big") / 2**64 for s in subjects}
    new = {s: "test" if value < TEST_SHARE else "train" for s, value in draw.items() if s not in side}
    if new and not side and len(set(new.values())) == 1:
        nearest = min(new, key=lambda s: abs(draw[s] - TEST_SHARE))
        new[nearest] = "train" if len(new) == 1 or new[nearest] == "test" else "test"
    side |= new
    sides = {name: sorted(s for s in side if side[s] == name) for name in ("train", "test")}
    if path and write and (new or not path.exists()):
        write_atomically(path, (json.dumps(sides, indent=1) + "\n").encode())
    return {name: [s for s in members if s in draw] for name, members in sides.items()}


def read_split(path: Path) -> Sides:
    """The two sides that a file names; CopeditError for a damaged one."""
    try:
        read = read_json(path)
        sides = {name: [str(s) for s in read[name]] for name in ("train", "test")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CopeditError(f"{path} is not a split (train and test, a list each); restore or delete it") from error
    if both := set(sides["train"]) & set(sides["test"]):
        raise CopeditError(f"{path}: {min(both)} is on both sides; remove it from one")
    return sides


# ---- reading -----------------------------------------------------------------------------------------------


def load(config: ModelConfig, entry: Entry) -> NDArray[np.float16] | Skipped:
    """A study through the runtime's preprocessing: [m, 1, H, W, D] in 0..1, or why it cannot be trained on.

    Files on different grids, as IXI's, are resampled onto the first one's.
    """
    name = entry.files.name
    try:
        study = Study.read(entry.files, resample=True)
        prepared = prepare(study, config, allow_complete=True)
        heart_mask(entry, study)
    except CopeditError as error:
        return Skipped(name, "damaged", str(error))
    if blank := study.missing_slices:
        return Skipped(
            name, "incomplete", f"{name}: blank slices {', '.join(map(str, blank))} in {study.reference.path}"
        )
    return prepared.images.astype(np.float16)


def heart_mask(entry: Entry, study: Study, read: Callable[[Path], Volume] = read_volume) -> Volume | None:
    """The mask of the left ventricle, NAME_lv beside a stack; None where there is none. Raises CopeditError for one
    that cannot be read or is not on the stack's grid."""
    path = entry.files.files.get(STACK)
    mask = path and path.with_name(NIFTI.sub(r"_lv\g<0>", path.name))
    if not mask or mask == path or not mask.exists():  # the same: of DICOM
        return None
    volume = read(mask)
    if not same_grid(volume, study.reference):
        raise CopeditError(f"{mask} is on another grid than {path}; resample it onto that one, or remove it")
    return volume


def heart_centre(config: ModelConfig, entry: Entry) -> tuple[float, float] | None:
    """Where in the plane of the model's grid the left ventricle lies, by its mask; None where there is none."""
    volume = heart_mask(entry, Study.outline(entry.files))
    if volume is None:
        return None
    weight = np.maximum(stack_frame(volume, config).stack_to_model(volume.data), 0).sum(-1)
    if not weight.any():
        return None
    x, y = (float(np.average(np.indices(weight.shape)[axis], weights=weight)) for axis in (0, 1))
    return x, y


def read_all(config: ModelConfig, studies: Iterable[Entry]) -> Iterator[NDArray[np.float16] | Skipped]:
    """`load` of each study, in order; the images of an earlier one under another name are a duplicate."""
    seen: dict[bytes, str] = {}
    studies = list(studies)
    for entry, images in zip(studies, ahead(load, config, studies), strict=True):
        if not isinstance(images, Skipped):
            name = entry.files.name
            first = seen.setdefault(hashlib.sha256(images).digest(), name)
            if first != name:
                images = Skipped(name, "duplicate", f"{name} has the same images as {first}, which is used; remove one")
        yield images


def ahead(work: Callable[[ModelConfig, Any], Any], config: ModelConfig, items: Iterable[Any]) -> Iterator[Any]:
    """work(config, item) of each item, in order, by one process a core; few results wait, as each may be large."""
    workers = os.cpu_count() or 1
    pending: deque[Future[Any]] = deque()
    pool = ProcessPoolExecutor(workers, initializer=_serve)
    try:
        for item in items:
            pending.append(pool.submit(work, config, item))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise CopeditError("a process that prepared images was killed, mostly for lack of memory; free some") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _serve() -> None:
    """In a worker: signals are the parent's matter, and its end, however it came, is the worker's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


# ---- the check ---------------------------------------------------------------------------------------------


def check(
    data: DataSet, config: ModelConfig, *, deep: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Open every file of every complete study, JSON-able; deep: read and prepare them as training does.

    Without deep, what only voxels show stays hidden: a wrong checksum, blank slices, constant or NaN images.
    """
    good, skipped, resampled, total = [], list(data.skipped), 0, len(data.studies) * (1 + deep)
    for done, entry in enumerate(data.studies, 1):
        try:
            study = Study.outline(entry.files)
            heart_mask(entry, study, read_outline)
            resampled += not all(same_grid(volume, study.reference) for volume in study.volumes.values())
            good.append(entry)
        except CopeditError as error:
            skipped.append(Skipped(entry.files.name, "damaged", str(error)))
        if progress:
            progress(done, total)
    if deep:
        readable, good = good, []
        for done, (entry, images) in enumerate(zip(readable, read_all(config, readable), strict=True), 1):
            if isinstance(images, Skipped):
                skipped.append(images)
            else:
                good.append(entry)
            if progress:
                progress(len(data.studies) + done, total)
    sides = split({entry.subject for entry in good})
    reasons: dict[str, list[str]] = {}
    for path, reason in data.passed_over:
        reasons.setdefault(reason, []).append(str(path))
    return {
        "folder": str(data.folder),
        "model": config.name,
        "deep": deep,
        "layouts": dict(Counter(entry.layout for entry in data.studies)),
        "images": data.images,
        "studies": len(good),
        "subjects": {side: len(members) for side, members in sides.items()},
        "resampled": resampled,
        "skipped": [asdict(item) for item in skipped],
        "passed_over": reasons,
    }


def render(report: dict[str, Any]) -> str:
    """The report of `check` as lines of text."""

    def counts(numbers: dict[str, int]) -> str:
        return ", ".join(f"{name} {number}" for name, number in numbers.items()) or "none"

    train, test = (report["subjects"][side] for side in ("train", "test"))
    lines = [
        f"{report['folder']} for {report['model']}, {'every voxel' if report['deep'] else 'headers and sizes'} read",
        f"complete studies   {counts(report['layouts'])}",
        f"images             {counts(report['images'])}",
        f"can be used        {report['studies']} studies; subjects: {train} to train on, {test} held out",
    ]
    if report["resampled"]:
        lines.append(f"resampled          {report['resampled']} studies with files on different grids")
    lines += [f"{item['kind']:<19}{item['reason']}" for item in report["skipped"]]
    for reason, paths in report["passed_over"].items():
        several = len(paths) > 1
        lines.append(f"passed over        {len(paths)} file{'s' * several}: {reason} ({paths[0]}{', ...' * several})")
    return "\n".join(lines)
