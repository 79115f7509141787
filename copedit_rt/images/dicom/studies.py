"""DICOM studies in folders: which files are of one, which of its series is which modality."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from copedit_rt.errors import CopeditError
from copedit_rt.files import scratch_folder
from copedit_rt.images.dicom import convert
from copedit_rt.images.dicom.headers import Header, dicom_files, need_extra, read_headers
from copedit_rt.images.dicom.match import BY_DESCRIPTION, SYNTHETIC, judge, unusable
from copedit_rt.images.dicom.series import Series, group
from copedit_rt.images.names import MODALITIES, modality
from copedit_rt.images.nifti import Volume, read_volumes
from copedit_rt.task import STACK

NONE = "none"  # --file t1=none: there is no such series
_HINT = "name the right one with --file"


@dataclass(frozen=True)
class DicomStudy:
    """One study's series. folder: that it lies in, whose name is the study's.

    chosen: {modality, or sax: (series, by what)}; left_out: the others with the reason. duplicates: files that were
    there already. problem: why the study is refused. scratch: where series are converted, by default the system's
    folder for temporary files. keep: what has to live as long, such as the folder of a zip.
    """

    folder: Path
    chosen: Mapping[str, tuple[Series, str]]
    left_out: tuple[tuple[Series, str], ...] = ()
    duplicates: int = 0
    problem: str | None = None
    scratch: Path | None = field(default=None, compare=False)
    keep: object = field(default=None, compare=False)

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    def files(self) -> dict[str, Path]:
        """{modality: a name for the whole series, as if it were one file}; the brain's, or else the stack."""
        order = [element for element in MODALITIES if element in self.chosen] or [STACK] * (STACK in self.chosen)
        return {element: self.folder / self.chosen[element][0].file_name for element in order}

    def parts(self, element: str) -> tuple[Path, ...]:
        """The files of a modality's series, in the order of its slices."""
        return tuple(header.path for header in self.chosen[element][0].headers)

    def told(self) -> list[str]:
        """The match in one or two lines."""
        chosen = {e: self.chosen[e] for e in self.files()}
        how = {e: f" {why}" * (why != BY_DESCRIPTION) for e, (_, why) in chosen.items()}
        lines = [", ".join(f"{e} is series {series}{how[e]}" for e, (series, _) in chosen.items())]
        lines += ["left out: " + ", ".join(f"{one}: {why}" for one, why in self.left_out)] * bool(self.left_out)
        return lines + [f"{self.duplicates} files are copies of others"] * bool(self.duplicates)

    def read(self, elements: Mapping[str, Path], *, keep_raw: bool = False) -> dict[str, Volume]:
        """The series of these modalities as volumes, by dcm2niix, whose files are gone at the end.

        elements: {modality: what its series is called}, of `files`. Raises CopeditError as `read_volumes` does, and for
        what dcm2niix does not convert.
        """
        with scratch_folder(self.scratch or Path(tempfile.gettempdir())) as folder:
            made = {e: convert.convert(self.chosen[e][0], folder / e, called) for e, called in elements.items()}
            try:
                volumes = read_volumes(made, keep_raw=keep_raw)
            except CopeditError as error:
                said = str(error)
                for element, path in made.items():
                    said = said.replace(str(path), str(elements[element]))
                raise CopeditError(said) from error
        return {e: self._described(volume, e, elements[e]) for e, volume in volumes.items()}

    def _described(self, volume: Volume, element: str, called: Path) -> Volume:
        """With what a record holds of an input; without what dcm2niix may write of patients into the header."""
        header, parts = volume.header.copy(), self.parts(element)
        for name in ("descrip", "aux_file", "db_name", "intent_name"):
            if name in header:
                header[name] = b""
        digest = hashlib.sha256()
        for path in parts:
            digest.update(path.read_bytes())
        states = [path.stat() for path in parts]
        stamp = sum(state.st_size for state in states), max(state.st_mtime_ns for state in states)
        return replace(volume, header=header, path=called, sha256=digest.hexdigest(), stamp=stamp)

    def notes(self) -> tuple[str, ...]:
        """What the user should know of the series together."""
        frames = {self.chosen[e][0].first.frame_of_reference for e in self.files()}
        if len(frames) < 2:
            return ()
        return (f"{self.name}: its series are of several frames of reference: the patient may have moved between them",)


def dicom_studies(
    root: Path, explicit: Mapping[str, str | Path] | None = None, scratch: Path | None = None, keep: object = None
) -> list[DicomStudy]:
    """The studies of the DICOM files below a folder, empty where there are none; each is a folder of its own.

    explicit: {modality: number, UID or description of its series, or "none"}, of a single study. Raises CopeditError
    where the extra is not installed, and for a series that is not there or no image.
    """
    paths = list(dicom_files(root))
    if not paths:
        return []
    need_extra(root)
    convert.program()
    headers, damaged = read_headers(paths)
    made = {header.series for header in headers if header.synthetic}
    divided = _divide(root, [header for header in headers if header.series not in made])
    outputs = [header for header in headers if header.series in made]
    for folder, files in divided:  # an output is told beside its study; it makes no other folder that study's
        study = files[0].study
        files += [header for header in outputs if header.study == study and header.path.is_relative_to(folder)]
    if explicit and len(divided) > 1:
        raise CopeditError(f"--file names series of one study, and {root} holds {len(divided)}; give one of them")
    several = (_study(folder, files, explicit or {}) for folder, files in divided)
    found = [replace(study, scratch=scratch, keep=keep) for study in several if study is not None]
    if lost := [one for one in damaged if not any(one[0].is_relative_to(study.folder) for study in found)]:
        path, reason = lost[0]  # of a study of its own, perhaps
        raise CopeditError(f"{path} is {reason}; copy or export it again, or move it away")
    return [_with_damaged(study, damaged) for study in found]


def _with_damaged(study: DicomStudy, damaged: Sequence[tuple[Path, str]]) -> DicomStudy:
    """Refused where a file that cannot be read may be one of its slices."""
    mine = [(path, reason) for path, reason in damaged if path.is_relative_to(study.folder)]
    if not mine:
        return study
    (path, reason), more = mine[0], f", and {len(mine) - 1} more" * (len(mine) > 1)
    return replace(study, problem=f"{study.name}: {path} is {reason}{more}; copy or export it again, or move it away")


def _divide(folder: Path, headers: Sequence[Header]) -> list[tuple[Path, list[Header]]]:
    """Folders that hold one study each; one of which files of several lie side by side is left as it is."""
    below: dict[str, list[Header]] = {}
    for header in headers:
        below.setdefault(header.path.relative_to(folder).parts[0], []).append(header)
    apart = {study for part in below.values() for study in {h.study for h in part}}
    spread = sum(len({h.study for h in part}) for part in below.values())
    here = any(header.path.parent == folder for header in headers)
    if len(apart) < 2 or here or spread > len(apart):
        return [(folder, list(headers))] if headers else []
    return [one for name, part in below.items() for one in _divide(folder / name, part)]


def _study(folder: Path, headers: Sequence[Header], explicit: Mapping[str, str | Path]) -> DicomStudy | None:
    """One folder's study; None where it holds no image at all but our own."""
    name = folder.resolve().name
    if several := _several(folder, headers):
        return DicomStudy(folder, {}, problem=f"{name}: {several}; move each into a folder of its own")
    series, duplicates = group(headers)
    verdicts = [(one, *judge(one)) for one in series]
    if all(reason == SYNTHETIC for _, _, reason in verdicts):
        return None
    asked = _asked(name, series, explicit)
    chosen: dict[str, tuple[Series, str]] = {e: (one, "as asked for") for e, one in asked.items() if one}
    taken, problem = [one for one, _ in chosen.values()], None
    left_out = []
    for one, element, why in verdicts:
        if one in taken:
            continue
        if element is None:
            left_out.append((one, why))
        elif asked.get(STACK):
            left_out.append((one, f"the {STACK} was asked for"))
        elif element in asked:
            left_out.append((one, f"{'another' if asked[element] else 'no'} {element} was asked for"))
        elif element in chosen:
            problem = problem or _rivals(name, element, [s for s, e, _ in verdicts if e == element and s not in taken])
        else:
            chosen[element] = one, why
    study = DicomStudy(folder, chosen, tuple(left_out), duplicates, problem)
    return replace(study, problem=problem or _problem(study))


def _rivals(name: str, element: str, series: Sequence[Series]) -> str:
    """That several series may be one modality, and how to choose."""
    few, keys = ", ".join(map(str, series)), " or ".join(f"--file {element}={one.key}" for one in series)
    return f"{name}: {len(series)} series may be the {element}: {few}; choose with {keys}"


def _several(folder: Path, headers: Sequence[Header]) -> str | None:
    """That files of several studies or patients are mixed, with one of each; None where they are not."""
    for of, what in (("study", "studies"), ("patient", "patients")):
        each = {value: header.path for header in reversed(headers) if (value := getattr(header, of))}
        if len(each) > 1:
            few = ", ".join(str(path.relative_to(folder)) for path in list(each.values())[:2])
            return f"DICOM files of {len(each)} {what} lie side by side, for example {few}"
    return None


def _problem(study: DicomStudy) -> str | None:
    """What is wrong with the series that were chosen."""
    if not study.files():
        few = ", ".join(f"{series}: {reason}" for series, reason in study.left_out[:8])
        few += ", ..." * (len(study.left_out) > 8)
        hint = f"{_HINT} t1=NUMBER and so on"
        return f"{study.name}: no series could be matched with a modality; there are {few or 'none'}; {hint}"
    for element in study.files():
        series, _ = study.chosen[element]
        if fault := series.fault():
            away = f", or leave it out with --file {element}={NONE}"
            return f"{study.name}: series {series}, the {element}: {fault}{away}"
    return None


def _asked(name: str, series: Sequence[Series], explicit: Mapping[str, str | Path]) -> dict[str, Series | None]:
    """{modality: the series that the user named, None for none}."""
    asked: dict[str, Series | None] = {}
    for key, value in explicit.items():
        element = STACK if key == STACK else modality(key)
        if str(value).lower() == NONE:
            asked[element] = None
            continue
        one = _named(name, series, element, str(value))
        if reason := unusable(one):
            raise CopeditError(f"--file {element}={value}: series {one} of {name} cannot be taken: {reason}")
        if one in asked.values():
            raise CopeditError(f"--file {element}={value}: series {one} was named twice; name one for each modality")
        asked[element] = one
    if asked.get(STACK) and sum(one is not None for one in asked.values()) > 1:
        raise CopeditError(f"--file {STACK} stands beside modalities of the brain; give one or the other")
    return asked


def _named(name: str, series: Sequence[Series], element: str, text: str) -> Series:
    """The one series of this number, UID or description, or else with this in its description."""
    low = text.strip().lower()
    ways = (
        lambda s: low in (s.key.lower(), s.first.series),
        lambda s: low == s.said.lower(),
        lambda s: not low.isdecimal() and low in s.said.lower(),
    )
    for way in ways:
        fitting = [one for one in series if way(one)]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            uids = ", ".join(f"{one}: {one.first.series}" for one in fitting[:4])
            said = f"{len(fitting)} series of {name} are that; name its UID ({uids})"
            raise CopeditError(f"--file {element}={text}: {said}")
    there = ", ".join(map(str, series[:12])) + ", ..." * (len(series) > 12)
    raise CopeditError(f"--file {element}={text}: {name} has no such series; there are {there}")
