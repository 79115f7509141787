"""A study: one subject's images, read and checked, and what was synthesised of it, written. No torch."""

from __future__ import annotations

import hashlib
import itertools
import json
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from copedit_rt.errors import CopeditError
from copedit_rt.files import digest_of, remove, write_atomically
from copedit_rt.images import bids
from copedit_rt.images.dicom.studies import DicomStudy
from copedit_rt.images.find import StudyFiles, find_studies, output_path
from copedit_rt.images.grids import GRID_TOLERANCE, from_border, slice_axis
from copedit_rt.images.names import MODALITIES, STYLES, Naming, stem_of
from copedit_rt.images.nifti import (
    MARK,
    NEAR,
    Volume,
    as_image,
    grid_distance,
    read_outline,
    read_volumes,
    resample_onto,
    same_grid,
    transforms_apart,
    write_nifti,
)
from copedit_rt.task import STACK, Task

if TYPE_CHECKING:
    import nibabel as nib

_NO_SIDECAR = (OSError, ValueError, KeyError, TypeError, RecursionError)  # what reading one that is none may raise
MOST_SLICES = 1000  # of a heart; isotropic ones have some 250, and a model holds all in memory several times over
STRIPPED = 0.6  # of the voxels are background, where a brain alone is left


@dataclass(eq=False)
class Study:
    """One subject's images.

    volumes: brain, {modality: volume}, outputs take the grid of the first; cardiac, {"sax": stack}.
    missing_slices: cardiac, indices along the file's slice axis (`grids.slice_axis`).
    synthetic: names of the volumes that were synthesised (cardiac: in part).
    naming: how the files are called; None for a study that was not read. notes: what the user should know. source: the
    DICOM study that it was read from.
    """

    name: str
    task: Task
    volumes: dict[str, Volume]
    missing_slices: tuple[int, ...] = ()
    synthetic: frozenset[str] = frozenset()
    naming: Naming | None = None
    notes: tuple[str, ...] = field(default=())
    source: DicomStudy | None = None

    def __post_init__(self) -> None:
        self.task = Task(self.task)

    @classmethod
    def read(
        cls,
        files: StudyFiles | Mapping[str, Path | str] | Sequence[Path | str] | Path | str,
        *,
        missing_slices: Sequence[int] | None = None,
        resample: bool = False,
        check_content: bool = True,
    ) -> Study:
        """Read and check every file of one study: of `StudyFiles`, a folder, a file, files, or {modality: file}.

        missing_slices: cardiac, indices from 0 along the slice axis, besides the blank ones that are found.
        resample: put files on other grids onto the first one's, instead of refusing them.
        check_content: False to look at an image that shows nothing (constant or NaN), instead of refusing it.
        Raises CopeditError as `find_studies` does, for several studies, and for what is wrong with a file.
        """
        files = files if isinstance(files, StudyFiles) else _only_study(files)
        if files.problem:
            raise CopeditError(files.problem)
        if files.source:
            volumes, notes = files.source.read(files.files, keep_raw=files.task.joint), files.source.notes()
        else:
            volumes, notes = read_volumes(files.files, keep_raw=files.task.joint), ()
        study = cls(files.name, files.task, volumes, naming=files.naming, notes=notes, source=files.source)
        return study._checked(missing_slices, resample, check_content)

    @classmethod
    def of(
        cls,
        volumes: Mapping[str, Volume],
        name: str = "study",
        *,
        missing_slices: Sequence[int] | None = None,
        resample: bool = False,
    ) -> Study:
        """A study of volumes that are in memory: {modality: volume}, or {"sax": stack}; checked as `read` does.

        Outputs lie on the grid of the first. name: with the seed it determines the noise, and what files are called.
        missing_slices, resample: see `read`.
        """
        if not volumes or (STACK in volumes and len(volumes) > 1):
            raise CopeditError(f"{name}: expected images of a brain, or one short-axis stack of a heart ({STACK})")
        if unknown := [element for element in volumes if element not in (*MODALITIES, STACK)]:
            raise CopeditError(f"{name}: unknown modality {unknown[0]!r}; known are {', '.join(MODALITIES)}")
        copies = {  # of a brain nothing needs the numbers before scaling
            element: deepcopy(volume if element == STACK else replace(volume, raw=None))
            for element, volume in volumes.items()
        }
        return cls(name, Task.HEART if STACK in volumes else Task.BRAIN, copies)._checked(missing_slices, resample)

    def _checked(self, missing_slices: Sequence[int] | None, resample: bool, check_content: bool = True) -> Study:
        """Itself, after all checks of what the images show, with what the user should know."""
        named = named_slices(missing_slices)
        if self.task.joint:
            _read_stack(self, named, check_content)
        elif named:
            raise CopeditError(f"{self.name} is a brain study; missing slices can be named for cardiac stacks only")
        else:
            _read_modalities(self, resample, check_content)
        from nibabel import aff2axcodes

        self.notes += tuple(
            f"{v.called} has no orientation (qform and sform codes are 0); taken as {''.join(aff2axcodes(v.affine))}"
            for v in self.volumes.values()
            if not (v.header["qform_code"] or v.header["sform_code"])
        )
        self.notes += tuple(
            f"{v.called}: qform and sform are {off:.2g} voxels apart; the sform is used"
            for v in self.volumes.values()
            if (off := transforms_apart(v)) > NEAR
        )
        return self

    @classmethod
    def outline(cls, files: StudyFiles) -> Study:
        """The study with zeros for voxels; CopeditError for what names, headers and file sizes give away."""
        if files.problem:
            raise CopeditError(files.problem)
        volumes = (
            files.source.read(files.files)
            if files.source
            else {e: read_outline(path) for e, path in files.files.items()}
        )
        return cls(files.name, files.task, volumes, naming=files.naming)

    @property
    def reference(self) -> Volume:
        return next(iter(self.volumes.values()))

    def with_synthetic(self, images: Mapping[str, NDArray]) -> Study:
        """A new study with these volumes [X, Y, Z] added, on the reference's grid (cardiac: replacing it)."""
        volumes = dict(self.volumes)
        for name, data in images.items():
            old = volumes.get(name)
            volumes[name] = replace(
                self.reference,
                data=np.asarray(data, np.float32),
                path=old.path if old else None,
                sha256=old.sha256 if old else None,
                raw=old.raw if old else None,
                stamp=old.stamp if old else None,
            )
        return replace(self, volumes=volumes, synthetic=self.synthetic | set(images))

    def output_path(self, folder: Path, element: str) -> Path:
        """`find.output_path` of an element."""
        inputs = [volume.path for volume in self.volumes.values() if volume.path]
        return output_path(self._naming, folder, element, inputs)

    @property
    def _naming(self) -> Naming:
        if self.naming:
            return self.naming
        return Naming(f"{self.name}_", STYLES[0]) if not self.task.joint else Naming(self.name, {STACK: ""})

    def write(
        self,
        folder: Path | str,
        *,
        model: str,
        record: Mapping[str, Any] | None = None,
        std: Mapping[str, NDArray] | None = None,
        dicom: bool = True,
    ) -> list[Path]:
        """Write what was synthesised as .nii.gz with a .json sidecar (`record`); every file atomically.

        std: {element: [X, Y, Z]}, written as float32 beside it (`..._sd.nii.gz`). dicom: of a study that was read from
        DICOM also a derived series, in a folder (`..._dicom`) that is there as a whole or not at all. Headers are the
        reference's but for data type, description and (brain) display range. A cardiac stack keeps its type, scaling
        and every number of its present slices. The sidecar is written last and holds the images' sha256: what was
        interrupted, or written by two at once, is not complete (`complete_sidecar`). Existing outputs are replaced,
        other images never; an SD map or series of the image before, by its sidecar, goes. Returns the images' paths.
        """
        folder, written = Path(folder), []
        for element in (name for name in self.volumes if name in self.synthetic):
            path = self.output_path(folder, element)
            before = _told(path)
            sidecar = {
                "synthetic": True,
                "element": element,
                "file": path.name,
                "model": model,
                **(self._bids() if self._naming.derived else {}),
                **({"synthetic_slices": list(self.missing_slices)} if self.task.joint else {}),
                **(record or {}),
            }
            data, header, scaled = self._output(element)
            sd_path = self._naming.path(folder, element, "_sd")
            if std and element in std:
                sd_header = header.copy()
                sd_header["cal_min"] = sd_header["cal_max"] = 0
                spread = np.asarray(std[element], np.float32)
                digest = write_nifti(sd_path, spread, sd_header, f"{MARK} {model}, SD map")
                sidecar["sd"] = {"file": sd_path.name, "sha256": digest}
            if dicom and self.source:
                series = self._write_dicom(folder, element, data, model, record or {})
                slope, inter = header.get_slope_inter() if scaled else (None, None)
                low, step = (inter or 0) + (slope or 1) * series["low"], (slope or 1) * series["step"]
                sidecar["dicom"] = series | {"low": low, "step": step}
            sidecar["sha256"] = write_nifti(path, data, header, f"{MARK} {model}", scaled=scaled)
            for kind, (old, digest) in before.items():
                if kind not in sidecar and old in (sd_path, self.dicom_path(folder, element)) and _is(old, digest):
                    remove(old)  # of an image that is no more
            text = json.dumps(sidecar, indent=2, default=_plain) + "\n"
            write_atomically(self._naming.path(folder, element, ending=".json"), text.encode())
            written.append(path)
        return written

    def dicom_path(self, folder: Path, element: str) -> Path:
        """The folder that an element's DICOM series goes to."""
        return self._naming.path(folder, element, "_dicom", ending="")

    def _write_dicom(
        self, folder: Path, element: str, data: NDArray, model: str, record: Mapping[str, Any]
    ) -> dict[str, Any]:
        """An element's derived series; what the sidecar says of it."""
        from copedit_rt.images.dicom.write import Made, write_series

        assert self.source is not None
        reference = next(iter(self.volumes))
        axis, affine = slice_axis(data.shape, self.reference.affine) if self.task.joint else 2, self.reference.affine
        made = Made(element, data, affine, reference, model, record, self.missing_slices, axis)
        return write_series(self.dicom_path(folder, element), self.source, made)

    def _bids(self) -> dict[str, Any]:
        """What BIDS wants to know of a derivative. Skull-stripped: most of a brain is exactly its background."""
        joint = self.task.joint
        read = (v.path for name, v in self.volumes.items() if v.path and (joint or name not in self.synthetic))
        data = self.reference.data
        stripped = not joint and bool((data == np.median(data[np.ix_((0, -1), (0, -1), (0, -1))])).mean() > STRIPPED)
        return {"Synthetic": True, "Sources": bids.sources(list(read)), "SkullStripped": stripped}

    def images(self, *, model: str, std: Mapping[str, NDArray] | None = None) -> dict[str, nib.Nifti1Image]:
        """What was synthesised as nibabel's images, as `write` would write it; std: {element: map} as ELEMENT_sd."""
        made = {}
        for element in (name for name in self.volumes if name in self.synthetic):
            data, header, scaled = self._output(element)
            made[element] = as_image(data, header, f"{MARK} {model}", scaled=scaled)
            if std and element in std:
                header["cal_min"] = header["cal_max"] = 0
                spread = np.asarray(std[element], np.float32)
                made[f"{element}_sd"] = as_image(spread, header, f"{MARK} {model}, SD map")
        return made

    def _output(self, element: str) -> tuple[NDArray, nib.Nifti1Header, bool]:
        """An element's numbers and header as a file holds them, and whether the header's slope applies."""
        volume, header = self.volumes[element], self.reference.header.copy()
        if not self.task.joint:
            header["cal_min"] = header["cal_max"] = 0  # another image's display range
        elif volume.raw is not None:
            return self._raw_stack(), header, True
        return volume.data, header, False

    def _raw_stack(self) -> NDArray:
        """The file's own numbers with the missing slices put in, rounded where the type is an integer."""
        volume = self.volumes[STACK]
        raw = np.array(volume.raw)
        where: list[Any] = [slice(None)] * 3
        where[slice_axis(raw.shape, volume.affine)] = list(self.missing_slices)
        slope, inter = volume.header.get_slope_inter()
        values = (volume.data[tuple(where)].astype(np.float64) - (inter or 0)) / (slope or 1)
        if raw.dtype.kind in "iu":
            limits = np.iinfo(raw.dtype)
            values = np.rint(values).clip(limits.min, limits.max)
        with np.errstate(over="ignore", invalid="ignore"):
            raw[tuple(where)] = values
            kept = np.isfinite(raw[tuple(where)].astype(np.float64) * (slope or 1) + (inter or 0))
        if not kept.all():
            raise CopeditError(
                f"{volume.called}: its scl_slope of {slope:g} cannot hold the filled slices; rescale the stack"
            )
        return raw


def complete_sidecar(path: Path) -> dict[str, Any] | None:
    """The sidecar of an output that is there with that of the same run, which holds its sha256, and that of the SD map
    if it has one; None otherwise."""
    try:
        sidecar = _sidecar(path)
        images = [(path, sidecar["sha256"]), *_beside(path, sidecar).values()]
        return sidecar if all(_is(image, digest) for image, digest in images) else None
    except _NO_SIDECAR:
        return None


def withdraw(path: Path, sidecar: Mapping[str, Any]) -> None:
    """An output goes, with its SD map, series and `complete_sidecar`."""
    named = {path.with_name(f"{stem_of(path)}{ending}") for ending in ("_sd.nii.gz", "_dicom")}
    beside = {there for there, _ in _beside(path, sidecar).values()}
    for old in (*(named & beside), path, path.with_name(f"{stem_of(path)}.json")):
        remove(old)


def _sidecar(path: Path) -> dict[str, Any]:
    sidecar: dict[str, Any] = json.loads(path.with_name(f"{stem_of(path)}.json").read_text(encoding="utf-8"))
    return sidecar


def _beside(path: Path, sidecar: Mapping[str, Any]) -> dict[str, tuple[Path, str]]:
    """{"sd" or "dicom": (where it lies, its sha256)} of the SD map and the series that belong to an output."""
    names = {kind: sidecar[kind][key] for kind, key in (("sd", "file"), ("dicom", "folder")) if kind in sidecar}
    return {kind: (path.with_name(name), sidecar[kind]["sha256"]) for kind, name in names.items()}


def _told(path: Path) -> dict[str, tuple[Path, str]]:
    """Likewise of an output that is there or was, by its sidecar; empty where that is none of ours."""
    try:
        sidecar = _sidecar(path)
        return _beside(path, sidecar) if sidecar["synthetic"] and sidecar["file"] == path.name else {}
    except _NO_SIDECAR:
        return {}


def _is(path: Path, digest: str) -> bool:
    """Whether a file, or a series' folder, is there with this sha256."""
    try:
        there = digest_of(path) if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return False
    return there == digest


def named_slices(missing_slices: Iterable[int] | None) -> list[int]:
    """The slices that a user names, of whatever kind. Raises CopeditError for what is no whole number."""
    try:
        return [] if missing_slices is None else [operator.index(index) for index in missing_slices]
    except TypeError as error:
        raise CopeditError(f"missing slices {missing_slices}: give whole numbers, as in [4, 5]") from error


def _only_study(files: Mapping[str, Path | str] | Sequence[Path | str] | Path | str) -> StudyFiles:
    found = find_studies((), files) if isinstance(files, Mapping) else find_studies(files)
    if len(found) > 1:
        few = ", ".join(study.name for study in found[:3]) + ", ..." * (len(found) > 3)
        raise CopeditError(f"{files} holds {len(found)} studies ({few}); give one, or use find_studies")
    return found[0]


def _read_modalities(study: Study, resample: bool, check_content: bool) -> None:
    reference, (first, *others) = study.reference, study.volumes
    if check_content:
        for name, volume in study.volumes.items():
            if _empty_background(volume.data):
                study.notes += (f"{volume.called}: the background of {name} is NaN and was set to 0",)
            if bad := volume.data.size - int(np.isfinite(volume.data).sum()):
                raise CopeditError(f"{volume.called}: {bad} voxels of {name} are NaN or infinite; set them to 0")
            if volume.data.min() == volume.data.max():
                raise CopeditError(
                    f"{volume.called}: every voxel of {name} is {volume.data.flat[0]:g}, so it shows nothing; "
                    f"leave it out to have it synthesised"
                )
    differing = [name for name in others if not same_grid(study.volumes[name], reference)]
    if differing and not resample:
        grids = "; ".join(f"{name} ({study.volumes[name].called}): {study.volumes[name].grid}" for name in differing)
        off = grid_distance(reference, study.volumes[differing[0]])
        far = f", {off:.3g} mm apart" if reference.grid == study.volumes[differing[0]].grid else ""
        raise CopeditError(
            f"{study.name}: the files are on different grids, {first} ({reference.called}): {reference.grid}; "
            f"{grids}{far}; use --resample to bring all onto the grid of {first}"
        )
    for name in (name for name in others if name not in differing):
        if (off := grid_distance(study.volumes[name], reference)) > GRID_TOLERANCE:
            near = f"{off:.2g} mm apart, less than {NEAR:g} voxels: equal"
            study.notes += (f"the grids of {name} and {first} are {near}",)
    for name in differing:
        volume = study.volumes[name]
        data = resample_onto(volume, reference)
        if check_content and data.min() == data.max():
            raise CopeditError(
                f"{study.name}: {name} ({volume.called}) does not overlap with {first} "
                f"({reference.called}) in space; check that both are of the same patient and registered"
            )
        study.volumes[name] = replace(volume, data=data, affine=reference.affine)
        study.notes += (f"{name} was resampled from {volume.grid} onto the grid of {first}",)
    study.notes += tuple(_notes_of_copies(study.volumes))


def _notes_of_copies(volumes: Mapping[str, Volume]) -> Iterator[str]:
    """A sentence about each image that is the same file as an earlier one."""
    for (first, a), (name, b) in itertools.combinations(volumes.items(), 2):
        if a.sha256 and a.sha256 == b.sha256:
            yield f"{first} and {name} are one image ({a.called}, {b.called}); leave out the one that it is not"


def _empty_background(data: NDArray[np.float32]) -> bool:
    """Set NaN to 0 in place where that is how a file says background: at most corners, and inwards from the border."""
    nothing = np.isnan(data)
    if nothing[np.ix_((0, -1), (0, -1), (0, -1))].sum() <= 4 or not (from_border(nothing) == nothing).all():
        return False
    data[nothing] = 0
    return True


def _read_stack(study: Study, missing_slices: Sequence[int], check_content: bool) -> None:
    volume = study.volumes[STACK]
    axis = slice_axis(volume.data.shape, volume.affine)
    count = volume.data.shape[axis]
    if count > MOST_SLICES:
        said = f"{volume.called} has {count} slices along its axis {axis}, more than the {MOST_SLICES} of any heart"
        raise CopeditError(f"{said}; check that it is a short-axis stack")
    if wrong := [index for index in missing_slices if not 0 <= index < count]:
        raise CopeditError(
            f"{volume.called} has no slice {wrong[0]}; it has {count} slices, counted from 0 to {count - 1}"
        )
    blank = blank_slices(volume.data, axis)
    missing = sorted({*missing_slices, *blank})
    study.missing_slices = tuple(missing)
    if blank:
        study.notes += (f"slices {', '.join(map(str, blank))} are blank and count as missing",)
    if not check_content:
        return
    if len(missing) == count:
        why = "blank (one value, or NaN)" if len(blank) == count else "blank or named as missing"
        raise CopeditError(f"{volume.called}: all {count} slices are {why}, so nothing is observed; give another file")
    slices = np.moveaxis(volume.data, axis, 0)
    bad = [index for index in range(count) if index not in missing and not np.isfinite(slices[index]).all()]
    if bad:
        raise CopeditError(
            f"{volume.called}: slice {bad[0]} holds NaN or infinite voxels; set them to 0, or the whole "
            f"slice to NaN if it is missing"
        )


def blank_slices(data: NDArray, axis: int) -> tuple[int, ...]:
    """Indices of the slices along an axis that hold one value only, or only NaN."""
    slices = np.moveaxis(data, axis, 0).reshape(data.shape[axis], -1)
    return tuple(i for i, s in enumerate(slices) if np.isnan(s).all() or s.min() == s.max())


def _plain(value: Any) -> Any:
    """What JSON does not know by itself."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return str(value)
