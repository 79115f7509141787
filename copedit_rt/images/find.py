"""Which studies there are in folders and files, from names and the first bytes alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from copedit_rt.errors import CopeditError
from copedit_rt.images.names import (
    FRAME,
    INSIDE,
    LABELS,
    MODALITIES,
    MSCMR,
    OTHER,
    OTHER_VIEW,
    STACK,
    Name,
    Naming,
    is_nifti,
    modality,
    naming_of,
    parse,
    stem_of,
    without_frame,
)
from copedit_rt.images.nifti import is_synthetic, refuse_synthetic
from copedit_rt.task import Task

_SERIES = "a series over time; its frames are used instead"


@dataclass(frozen=True)
class StudyFiles:
    """One study that was found and not yet read (`Study.read` reads it); the first of its files is the reference."""

    name: str
    task: Task
    files: Mapping[str, Path]
    naming: Naming
    problem: str | None = None  # why it will be refused, e.g. two files for one modality

    def outputs(self, folder: Path, elements: Sequence[str]) -> dict[str, Path]:
        """{missing element: file it would be written to}, of a model's elements; cardiac: the whole stack."""
        names = [STACK] if self.task == "cardiac" else [e for e in elements if e not in self.files]
        return {name: self.output_path(folder, name) for name in names}

    def output_path(self, folder: Path, element: str) -> Path:
        """Where an element's output goes; CopeditError if that is where an input lies."""
        return output_path(self.naming, folder, element, list(self.files.values()))


class Found(list[StudyFiles]):
    """Studies, and the files that were passed over with the reason."""

    def __init__(self, studies: Sequence[StudyFiles] = (), skipped: Sequence[tuple[Path, str]] = ()) -> None:
        super().__init__(studies)
        self.skipped = list(skipped)

    def reasons(self) -> dict[str, list[str]]:
        """The files that were passed over for each reason."""
        reasons: dict[str, list[str]] = {}
        for path, reason in self.skipped:
            reasons.setdefault(reason, []).append(str(path))
        return reasons


def find_studies(
    inputs: Sequence[Path | str] | Path | str = (),
    explicit: Mapping[str, Path | str] | None = None,
    *,
    task: Task | None = None,
) -> Found:
    """Which studies there are in folders and files, from names alone.

    inputs: files, study folders, folders of these; grouped by folder and subject. Recognised are the names of
    BraTS to 2021 (`ID_t1ce`) and from 2023 (`ID-t1c`), IXI (`IXI002-Guys-0828-T1`, also in three folders side
    by side) and BIDS; an image whose name ends in no modality is a cardiac stack, unless brain images lie
    beside it. Label maps, long-axis views, a stack over time beside its frames, hidden files and our own outputs are
    passed over (`.skipped`).
    explicit: instead of inputs, {modality: file}, or {"sax": file}: one study whose files may have any name.
    task: pass over the studies of the other task; "cardiac" also makes stacks of MSCMR's T2 images.
    Raises CopeditError where a path does not exist or no study is found.
    """
    inputs = [inputs] if isinstance(inputs, str | Path) else list(inputs)
    if explicit:
        if inputs:
            raise CopeditError("give either input files and folders or one file per modality, not both")
        return Found([_explicit(explicit)])
    if not inputs:
        raise CopeditError("no input was given; name a study folder, a folder of studies, or NIfTI files")
    candidates: dict[Path, Path] = {}  # file -> the subfolder for its outputs
    skipped: list[tuple[Path, str]] = []
    named: set[Path] = set()
    roots = [Path(item) for item in inputs]
    several = sum(root.is_dir() for root in roots) > 1
    for root in roots:
        if root.is_dir():
            for path in _walk(root, skipped):
                candidates.setdefault(path, Path(root.resolve().name) if several else Path())
        elif not root.exists():
            raise CopeditError(f"{root} does not exist; give a NIfTI file or a folder of them")
        elif not is_nifti(root):
            raise CopeditError(
                f"{root} is not a NIfTI file (.nii or .nii.gz); convert it, DICOM for example with dcm2niix"
            )
        else:
            candidates.setdefault(root, Path())
            named.add(root)
    images = []
    for path in candidates:
        if LABELS.search(stem_of(path)):
            skipped.append((path, "a label map or mask by its name"))
        elif path not in named and (reason := _not_observed(path)):
            skipped.append((path, reason))
        else:
            images.append(path)
    for path in named.intersection(images):
        refuse_synthetic(path)
    studies = _group(images, roots, candidates, named, task, skipped)
    if not studies:
        where = ", ".join(map(str, roots))
        if not skipped:
            raise CopeditError(f"{where}: no images found; files must end in .nii or .nii.gz")
        few = "; ".join(f"{path.name}: {reason}" for path, reason in skipped[:3])
        few += "; ..." * (len(skipped) > 3)
        raise CopeditError(f"{where}: no images found to work on; passed over were {few}")
    return Found(studies, sorted(skipped))


def _walk(root: Path, skipped: list[tuple[Path, str]]) -> Iterator[Path]:
    try:
        paths = sorted(p for p in root.rglob("*") if is_nifti(p))
    except OSError as error:
        raise CopeditError(f"cannot read {root}: {error.strerror or error}") from error
    for path in paths:
        parts = path.relative_to(root).parts
        if any(part.startswith(".") for part in parts) or path.is_dir():
            continue
        if not path.is_file():
            skipped.append((path, "a broken link"))
        elif "derivatives" in parts or "sourcedata" in parts:
            skipped.append((path, "not raw data (BIDS derivatives or sourcedata)"))
        else:
            yield path


def _not_observed(path: Path) -> str | None:
    if re.search(r"_4d$", stem_of(path), re.I):
        return _SERIES
    if OTHER_VIEW.search(stem_of(path)):
        return "another view than the short axis by its name"
    if is_synthetic(path):
        return "synthetic, written by CoPeDiT"
    return None


def _group(
    images: Sequence[Path],
    roots: Sequence[Path],
    top: Mapping[Path, Path],
    named: set[Path],
    task: Task | None,
    skipped: list[tuple[Path, str]],
) -> list[StudyFiles]:
    known = ", ".join(MODALITIES)
    hearts = {path for path in images if task == "cardiac" and MSCMR.search(stem_of(path))}
    parsed = {path: None if path in hearts else parse(path) for path in images}
    brain_folders = {n.folder for n in parsed.values() if n} | {p.parent for p, n in parsed.items() if n}
    groups: dict[tuple[Path, str, str | None], list[Name]] = {}
    stacks = []
    for path, name in parsed.items():
        if name and task != "cardiac":
            groups.setdefault((name.folder, name.head, name.tail), []).append(name)
        elif task == "cardiac" and path in named:
            stacks.append(path)
        elif name:
            skipped.append((path, f"a brain image ({name.element}) by its name"))
        elif other := OTHER.search(stem_of(path)):
            skipped.append((path, f"unknown modality {other[1]!r}; known modalities are {known}"))
        elif (inside := INSIDE.search(stem_of(path))) and task != "cardiac":
            hint = f"rename it to end in {inside.lastgroup} or give it with --{inside.lastgroup}"
            skipped.append((path, f"its name does not end in its modality; {hint}"))
        elif task == "brain" or path.parent in brain_folders:
            skipped.append((path, f"its name ends in no known modality ({known})"))
        else:
            stacks.append(path)
    framed = {(p.parent, without_frame(stem_of(p))) for p in stacks if FRAME.search(stem_of(p))}
    series = {p for p in stacks if (p.parent, stem_of(p)) in framed and p not in named}
    skipped.extend((path, _SERIES) for path in series)
    stacks = [path for path in stacks if path not in series]
    studies = []
    for (folder, head, _), names in groups.items():
        names.sort(key=lambda n: MODALITIES.index(n.element))
        label = head.strip("-_. ") or folder.resolve().name
        studies.append((folder, _brain_study(label, names, _subfolder(folder, roots, top[names[0].path]))))
    for path in stacks:
        naming = Naming(stem_of(path), {STACK: ""}, _subfolder(path.parent, roots, top[path]))
        studies.append((path.parent, StudyFiles(stem_of(path), "cardiac", {STACK: path}, naming)))
    studies.sort(key=lambda item: (str(item[0]), item[1].name))
    labels, outputs = Counter(s.name for _, s in studies), Counter(_place(s) for _, s in studies)
    unique = []
    for folder, study in studies:
        if outputs[_place(study)] > 1:
            problem = f"{study.name}: another input would have the same output; give one at a time"
            study = replace(study, problem=study.problem or problem)
        if labels[study.name] > 1:
            study = replace(study, name=f"{folder.resolve().name}_{study.name}")
        unique.append(study)
    return unique


def _place(study: StudyFiles) -> tuple[Path, str]:
    return study.naming.subfolder, study.naming.head


def _subfolder(folder: Path, roots: Sequence[Path], top: Path) -> Path:
    """Outputs mirror the inputs' folders below the folder that was given."""
    for root in roots:
        if root.is_dir() and folder.is_relative_to(root):
            return top / folder.relative_to(root)
    return Path()


def _brain_study(label: str, names: Sequence[Name], subfolder: Path) -> StudyFiles:
    problem = None
    files: dict[str, Path] = {}
    for name in names:
        if name.element in files:
            problem = (
                f"{label}: two files for {name.element}: {files[name.element]} and {name.path}; "
                f"remove one, or name every file with --t1 FILE, --t2 FILE and so on"
            )
        files.setdefault(name.element, name.path)
    return StudyFiles(label, "brain", files, naming_of(names, subfolder), problem)


def _explicit(explicit: Mapping[str, Path | str]) -> StudyFiles:
    files: dict[str, Path] = {}
    for key, value in explicit.items():
        element, path = (STACK if key == STACK else modality(key)), Path(value)
        if not path.is_file():
            raise CopeditError(f"{path} does not exist; give the NIfTI file of {key}")
        if element in files:
            raise CopeditError(f"two files for {element}: {files[element]} and {path}; give one")
        files[element] = path
        refuse_synthetic(path)
    if len({path.resolve() for path in files.values()}) < len(files):
        raise CopeditError(f"one file was given for several modalities: {', '.join(map(str, files.values()))}")
    first = next(iter(files.values()))
    if STACK in files:
        if len(files) > 1:
            raise CopeditError(
                f"{files[STACK]} was given as a cardiac stack beside brain modalities; give one or the other"
            )
        return StudyFiles(stem_of(first), "cardiac", files, Naming(stem_of(first), {STACK: ""}))
    names = [
        name
        if (name := parse(path)) and name.element == element
        else Name(path, element, f"{stem_of(path)}_", element, path.parent)
        for element, path in files.items()
    ]
    label = names[0].head.strip("-_. ") or first.resolve().parent.name
    return StudyFiles(label, "brain", files, naming_of(names, Path()))


def output_path(naming: Naming, folder: Path, element: str, inputs: Sequence[Path]) -> Path:
    path = naming.path(folder, element)
    if path.resolve() in {p.resolve() for p in inputs}:
        raise CopeditError(f"the output {path} would replace an input; choose another output folder with -o")
    return path
