"""Which studies there are in folders and files, from names and the first bytes alone."""

from __future__ import annotations

import itertools
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from unicodedata import normalize

from copedit_rt.archive import Unpacked, is_zip
from copedit_rt.errors import CopeditError
from copedit_rt.files import SUFFIX, is_file, refuse_broken, walk
from copedit_rt.images import bids
from copedit_rt.images.dicom.headers import is_dicom
from copedit_rt.images.dicom.match import left_out, named, perhaps
from copedit_rt.images.dicom.studies import DicomStudy, dicom_studies
from copedit_rt.images.names import (
    FOREIGN,
    FRAME,
    LABELS,
    MODALITIES,
    MSCMR,
    NIFTI,
    OTHER_VIEW,
    OVER_TIME,
    PLAIN,
    STYLES,
    Name,
    Naming,
    channel,
    choose,
    folder_modality,
    is_heart,
    is_nifti,
    meant,
    mentions,
    modality,
    nameless,
    naming_of,
    other,
    parse,
    stem_of,
    without_frame,
)
from copedit_rt.images.nifti import is_synthetic, refuse_synthetic
from copedit_rt.task import STACK, Task

_SERIES = "a series over time; its frames are used instead"
_BESIDE = "DICOM files beside NIfTI files, which are used; give a folder of them alone if they are another study"
_NOT_DICOM = re.compile(r"\.(?:nii(?:\.gz)?|json)$", re.I)
_KNOWN = ", ".join(MODALITIES)
_LABELS = "a label map or mask by its name"
_BY_HAND = "name every file with --file t1=FILE and so on"
_UNKNOWN = (
    f"its name says neither a modality ({_KNOWN}) nor a heart; give it by --file t1=FILE if it is a T1, and so on, "
    f"or with --task cardiac if it is a short-axis stack"
)
_SERIES_OF_ONE = (
    f"look like the series of one patient, one image each and no two of a modality; {_BY_HAND}, or put them in one "
    f"folder under names without the numbers; if they are patients, give each alone"
)
_Key = tuple[Path, str, str | None]  # what the images of a study share: folder, head and tail of their names


@dataclass(frozen=True)
class StudyFiles:
    """One study that was found and not yet read (`Study.read` reads it); the first of its files is the reference.

    problem: why it will be refused, e.g. two files for one modality. unclear: the files beside it that could not be
    understood, where they are the problem: what is missing from it may be among them. source: of DICOM, whose series
    `files` names as if each were a file. keep: what has to live as long, such as the folder that a zip is unpacked in.
    """

    name: str
    task: Task
    files: Mapping[str, Path]
    naming: Naming
    problem: str | None = None
    unclear: tuple[Path, ...] = ()
    source: DicomStudy | None = None
    keep: object = field(default=None, compare=False, repr=False)

    def inputs(self) -> dict[str, tuple[Path, ...]]:
        """{element: the files that hold it}."""
        return {e: self.source.parts(e) if self.source else (path,) for e, path in self.files.items()}

    def outputs(self, folder: Path, elements: Sequence[str]) -> dict[str, Path]:
        """{missing element: file it would be written to}, of a model's elements; cardiac: the whole stack."""
        names = self.task.volumes(elements)
        return {name: self.output_path(folder, name) for name in names if self.task.joint or name not in self.files}

    def output_path(self, folder: Path, element: str) -> Path:
        """`output_path` of an element."""
        return output_path(self.naming, folder, element, list(self.files.values()))


class Found(list[StudyFiles]):
    """Studies, and the files that were passed over with the reason. dataset: the BIDS data set that they are of."""

    def __init__(
        self,
        studies: Sequence[StudyFiles] = (),
        skipped: Sequence[tuple[Path, str]] = (),
        dataset: Path | None = None,
    ) -> None:
        super().__init__(studies)
        self.skipped, self.dataset = list(skipped), dataset

    def reasons(self, series: bool = True) -> dict[str, list[str]]:
        """The files, and series of DICOM, that were passed over for each reason."""
        reasons: dict[str, list[str]] = {}
        left_out = [
            (study.source.folder / one.file_name, reason)
            for study in self
            if series and study.source
            for one, reason in study.source.left_out
        ]
        for path, reason in [*self.skipped, *left_out]:
            reasons.setdefault(reason, []).append(str(path))
        return reasons


def find_studies(
    inputs: Sequence[Path | str] | Path | str = (),
    explicit: Mapping[str, Path | str] | None = None,
    *,
    task: Task | str | None = None,
    select: Sequence[str] = (),
    labels: Mapping[str, Sequence[str]] | None = None,
    scratch: Path | None = None,
) -> Found:
    """Which studies there are in folders and files, from names alone; of DICOM series, from their headers.

    inputs: files, study folders, folders of these; grouped by folder and subject. Recognised are the names of
    BraTS to 2021 (`ID_t1ce`) and from 2023 (`ID-t1c`), IXI (`IXI002-Guys-0828-T1`, also in three folders side
    by side), BIDS, nnU-Net with its dataset.json, and what common tools add (`T1w_acpc_dc_restore_brain`); and as
    hearts those of ACDC, MSCMR, UKBB, M&Ms, Sunnybrook, MESA, and names that say heart, sax or short-axis. Label maps,
    long-axis views, a stack over time beside its frames, hidden files and our own outputs are passed over
    (`.skipped`), and so is what could not be understood; a study that it may belong to has a `problem`, and
    so have images that numbers alone tell apart, where no two are of one modality: series of one patient, or patients?
    A folder with DICOM files and no NIfTI files is a DICOM study, or a folder of these, each in one of its own; series
    are matched to modalities by their descriptions, and `StudyFiles.source` tells the match. A zip is taken as the
    folder that it holds.
    explicit: instead of inputs, {modality: file}, or {"sax": file}: one study whose files may have any name. Beside a
    DICOM study, {modality: number, UID or description of its series, or "none"}.
    task: pass over the studies of the other task; "cardiac" also makes a stack of every image that is not a brain's by
    its name, and of every file that is given itself.
    select: of several files of one modality those that carry these marks: run-01, acq-highres, brain (or plain).
    labels: of files named as BIDS has it those with these labels, {"sub": ["01"], "ses": ..., "run": ...}. A folder
    that is a BIDS data set (`bids.is_dataset`) is walked as the standard says, anat folders alone, and outputs are
    named as those of a derivative.
    scratch: where zips are unpacked and series are converted, by default the system's folder for temporary files.
    Raises CopeditError where a path does not exist or no study is found, and for a mark or label that no file carries.
    """
    inputs = [inputs] if isinstance(inputs, str | Path) else list(inputs)
    if explicit and not inputs:
        if task or select or labels:
            raise CopeditError("--task, --select and labels choose among files; leave them out beside named files")
        return Found([_explicit(explicit)])
    if not inputs:
        raise CopeditError("no input was given; name a study folder, a folder of studies, or NIfTI files")
    roots = [Path(item) for item in inputs]
    search = _Search(roots, Task(task) if task else None, tuple(select), labels or {}, explicit or {}, scratch)
    try:
        return search.found()
    except BaseException:
        search.close()
        raise


@dataclass
class _Search:
    """What is known while names are sorted: files, what was passed over, and what could not be understood."""

    roots: list[Path]
    task: Task | None
    select: tuple[str, ...]
    labels: Mapping[str, Sequence[str]]
    explicit: Mapping[str, Path | str] = field(default_factory=dict)
    scratch: Path | None = None
    zips: dict[Path, Unpacked] = field(default_factory=dict)  # the folders that zips were unpacked in
    medical: list[tuple[Path, DicomStudy]] = field(default_factory=list)  # the root, and a DICOM study below it
    walked: dict[Path, list[tuple[Path, list[str]]]] = field(default_factory=dict)  # root -> its folders, other files
    top: dict[Path, Path] = field(default_factory=dict)  # file -> the subfolder for its outputs
    named: set[Path] = field(default_factory=set)  # files that were given themselves
    images: list[Path] = field(default_factory=list)
    skipped: list[tuple[Path, str]] = field(default_factory=list)
    unclear: dict[Path, str] = field(default_factory=dict)
    given: list[Path] = field(default_factory=list)  # the roots as they were given, zips as such
    dataset: Path | None = None  # the one root, where it is a BIDS data set

    def found(self) -> Found:
        """All studies. Raises CopeditError as `find_studies` does."""
        self.collect()
        if self.explicit and not (self.medical and len(self.roots) == 1):
            raise CopeditError(
                "give either input files and folders or one file per modality, not both; a series of DICOM is named "
                "beside the folder of one study"
            )
        studies = self.studies()
        if not studies:
            where = ", ".join(map(str, self.given))
            if not self.skipped:
                raise CopeditError(f"{where}: no images found; files must end in .nii or .nii.gz, or be DICOM")
            first: dict[str, str] = {}  # file of each reason
            for path, reason in sorted(self.skipped, key=lambda item: item[1] == _LABELS):
                first.setdefault(reason, path.name)
            few = "; ".join(f"{name}: {reason}" for reason, name in list(first.items())[:3])
            few += "; ..." * (len(self.skipped) > min(3, len(first)))
            raise CopeditError(f"{where}: no images found to work on; passed over were {few}")
        return Found(studies, sorted(self.skipped), self.dataset)

    def close(self) -> None:
        """Remove what was unpacked."""
        for unpacked in self.zips.values():
            unpacked.close()

    def collect(self) -> None:
        """All images below the roots, but for those that are no observed images by name or mark."""
        self.given = list(self.roots)
        self.roots = [self._opened(root) for root in self.roots]
        several = sum(map(_is_folder, self.roots)) > 1
        if len(self.roots) == 1 and bids.is_dataset(self.roots[0]):
            self.dataset = self.roots[0]
        for root in self.roots:
            if _is_folder(root):
                for path in bids.images(root) if self.dataset else self._walk(root):
                    self.top.setdefault(path, Path(root.resolve().name) if several else Path())
            elif not root.exists():
                raise CopeditError(f"{root} does not exist; give a NIfTI file or a folder of them")
            elif not root.is_file():
                raise CopeditError(f"{root} is neither a file nor a folder; give a NIfTI file or a folder of them")
            elif not is_nifti(root):
                raise CopeditError(
                    f"{root} is not a NIfTI file (.nii or .nii.gz); convert it, or give the whole folder of DICOM files"
                )
            else:
                self.top.setdefault(root, Path())
                self.named.add(root)
        bids.check_labels(list(self.top), self.labels)
        self.top = {path: top for path, top in self.top.items() if bids.chosen(path, self.labels)}
        self.named &= set(self.top)
        for path in self.top:
            if LABELS.search(stem_of(path)):
                self.skipped.append((path, _LABELS))
            elif path not in self.named and (reason := _not_observed(path)):
                self.skipped.append((path, reason))
            else:
                self.images.append(path)
        for path in self.named.intersection(self.images):
            refuse_synthetic(path)
        above = {folder for path in self.images for folder in path.parents}
        for root, folders in self.walked.items():
            if root in above:
                self._beside(root, folders, above)
            else:
                found = dicom_studies(root, self.explicit, self.scratch, self.zips.get(root))
                self.medical.extend((root, study) for study in found)

    def _walk(self, root: Path) -> Iterator[Path]:
        """The NIfTI files below a folder that are raw data; what else lies there is remembered."""
        images, self.walked[root] = [], []
        for folder, names in walk(root):
            images += [folder / name for name in names if NIFTI.search(name)]
            others = [name for name in names if not _NOT_DICOM.search(name)]
            self.walked[root].append((folder, others[:2] + [name for name in others[2:] if not SUFFIX.search(name)]))
        for path in sorted(images):
            if _no_raw_data(path, root):
                self.skipped.append((path, "not raw data (BIDS derivatives or sourcedata)"))
            else:
                yield path

    def _beside(self, root: Path, folders: Iterable[tuple[Path, list[str]]], above: Set[Path]) -> None:
        """Tell the DICOM files beside NIfTI files, by two files of each folder: there may be millions.

        above: the folders that lie above a NIfTI file. CopeditError for a broken link that may have led to a folder;
        among many files only in these.
        """
        told = set()
        for folder, names in folders:
            few = [folder / name for name in names[:2]]
            for path in (folder / name for name in names) if folder in above else few:
                if not _no_raw_data(path, root):
                    refuse_broken(path)
            if any(is_dicom(path) for path in few if os.path.exists(path)):
                told.add(next(path for path in (folder, *folder.parents) if {path, path.parent} & above))
        self.skipped.extend((folder, _BESIDE) for folder in sorted(told))

    def _opened(self, root: Path) -> Path:
        """The folder that a zip holds; anything else as it is."""
        if not (is_zip(root) and is_file(root)):
            return root
        unpacked = Unpacked(root, self.scratch)
        self.zips[unpacked.folder] = unpacked
        return unpacked.folder

    def _from_dicom(self) -> list[tuple[Path, StudyFiles]]:
        """The DICOM studies that are of the task."""
        found = []
        for root, study in self.medical:
            if self.task is Task.HEART and STACK in study.chosen:
                study = replace(study, chosen={STACK: study.chosen[STACK]})
            files = study.files()
            task = Task.HEART if STACK in files else Task.BRAIN if files else self.task or Task.BRAIN
            if self.task not in (None, task):
                self.skipped.append((study.folder, f"a DICOM study of the other task than --task {self.task}"))
                continue
            top = Path(root.resolve().name) if sum(map(_is_folder, self.roots)) > 1 else Path()
            subfolder = top / study.folder.relative_to(root)
            naming = Naming(f"{study.name}_", STYLES[0], subfolder)
            if task is Task.HEART:
                naming = Naming(study.name, {STACK: ""}, subfolder)
            called = _called(study.folder, root)
            found.append((study.folder, StudyFiles(called, task, files, naming, study.problem, source=study)))
        return found

    def _kept(self, found: list[tuple[Path, StudyFiles]]) -> list[tuple[Path, StudyFiles]]:
        """With the folders that their files were unpacked in."""
        return [
            (folder, replace(study, keep=next((z for p, z in self.zips.items() if folder.is_relative_to(p)), None)))
            for folder, study in found
        ]

    def studies(self) -> list[StudyFiles]:
        """Brain studies and stacks, each with a name of its own."""
        names, stacks = self._sort()
        groups: dict[_Key, list[Name]] = {}
        for name in names:
            groups.setdefault((name.folder, normalize("NFC", name.head), name.tail), []).append(name)
        for key, group in list(groups.items()):
            if len({name.element for name in group}) == 1 and (bad := [n for n in group if n.doubtful]):
                del groups[key]
                reason = "it may be with contrast agent or without; rename it (t1ce, t1) or give it by --file t1ce=FILE"
                self._not_understood((name.path for name in bad), reason)
        marks = sorted({mark for name in names for mark in name.marks} | {PLAIN})
        if unknown := [mark for mark in self.select if mark.lower() not in marks]:
            raise CopeditError(f"--select {unknown[0]}: no file carries that; there are {', '.join(marks)}")
        found = []
        tails = Counter((folder, head) for folder, head, _ in groups)
        for (folder, head, tail), group in groups.items():
            group.sort(key=lambda n: MODALITIES.index(n.element))
            label = group[0].head + (tail or "") * (tails[folder, head] > 1)
            label = label.strip("-_. ") or _called(folder, self._root(folder))
            found.append((folder, self._brain(label, group, self._subfolder(folder, self.top[group[0].path]))))
        for path in stacks:
            derived = self.dataset is not None
            called = re.sub(r"([^_]*)$", rf"{bids.DERIVED * derived}\1", stem_of(path), count=1)
            naming = Naming(called, {STACK: ""}, self._subfolder(path.parent, self.top[path]), derived)
            found.append((path.parent, StudyFiles(stem_of(path), Task.HEART, {STACK: path}, naming)))
        scans = self._scans(groups)
        for i, key in enumerate(groups):
            folder, study = found[i]
            if key in scans and not study.problem:
                found[i] = folder, replace(study, problem=f"{study.name}: {scans[key]}")
        found = [*self._with_unclear(found), *self._from_dicom()]
        found.sort(key=lambda item: (str(item[0]), item[1].name))
        return _distinct(self._kept(found), [self._root(folder) for folder, _ in found])

    def _scans(self, groups: Mapping[_Key, Sequence[Name]]) -> dict[_Key, str]:
        """Why groups that numbers alone tell apart are stopped: each holds one modality, no two the same one."""
        held = {key: {name.element for name in group} for key, group in groups.items()}
        inside = Counter(folder for folder, *_ in held)
        held |= {(path.parent, "", str(path)): {str(path)} for path in self.unclear if path.parent not in inside}
        beside: dict[Path, list[_Key]] = {}
        for folder, head, tail in held:
            if _is_number(head) and inside[folder] > 1:
                beside.setdefault(folder, []).append((folder, head, tail))
            elif _is_number(folder.name):
                beside.setdefault(folder.parent, []).append((folder, head, tail))
        stopped: dict[_Key, str] = {}
        for keys in beside.values():
            called = {head for _, head, _ in keys if head and not _is_number(head)}
            kinds = {kind for key in keys for kind in held[key]}
            if len(keys) > 1 and len(called) < 2 and sum(len(held[key]) for key in keys) == len(keys) == len(kinds):
                numbers = ", ".join(head.strip("-_. ") if _is_number(head) else folder.name for folder, head, _ in keys)
                stopped |= dict.fromkeys(keys, f"{numbers} {_SERIES_OF_ONE}")
        return stopped

    def _sort(self) -> tuple[list[Name], list[Path]]:
        """Brain images and stacks; all other files are passed over with the reason."""
        folders = self._modality_folders()
        channels, parsed = self._channels(), {}
        for path in self.images:
            parsed[path] = channels.get(path) or parse(path, by_folder=path.parent in folders)
        alone = Counter((n.folder, n.head) for n in parsed.values() if n)
        patients = {(p.parent, m[1].lower()) for p in self.images if (m := MSCMR.search(stem_of(p)))}
        names, stacks = [], []
        for path, name in parsed.items():
            stem = stem_of(path)
            # T2 is also an image of the heart; with other modalities beside it, it is a brain's.
            lone = name is None or (name.element == "t2" and alone[name.folder, name.head] == 1)
            heart = lone and (
                self.task is Task.HEART or is_heart(stem) or (path.parent, stem.rpartition("_")[0].lower()) in patients
            )
            if path in self.unclear:
                continue
            if (heart or (self.task is Task.HEART and path in self.named)) and not other(stem):
                if self.task is Task.BRAIN:
                    self.skipped.append((path, "a heart by its name"))
                else:
                    stacks.append(path)
            elif name and self.task is not Task.HEART:
                names.append(name)
            elif name:
                self.skipped.append((path, f"a brain image ({name.element}) by its name; give it itself if it is not"))
            elif word := other(stem):
                self.skipped.append((path, f"unknown modality {word!r}; known modalities are {_KNOWN}"))
            elif inside := _mentioned(stem):
                hint = f"rename it to end in {inside} or give it by --file {inside}=FILE, if it is that"
                self._not_understood([path], f"its name holds {inside} and words that may change what it is; {hint}")
            else:
                self._not_understood([path], _UNKNOWN)
        framed = {(p.parent, without_frame(stem_of(p))) for p in stacks if FRAME.search(stem_of(p))}
        series = {p for p in stacks if (p.parent, stem_of(p)) in framed and p not in self.named}
        self.skipped.extend((path, _SERIES) for path in series)
        return names, [path for path in stacks if path not in series]

    def _not_understood(self, paths: Iterable[Path], reason: str) -> None:
        for path in paths:
            self.unclear[path] = reason
            self.skipped.append((path, reason))

    def _modality_folders(self) -> set[Path]:
        """Folders that hold one modality each, side by side or named by nothing else: IXI-T1, IXI-T2; T1, FLAIR."""
        read = {p: found for p in {path.parent for path in self.images} if (found := folder_modality(p.resolve()))}
        inside: dict[Path, set[str]] = {}
        for path in self.images:
            if path.parent in read and (name := parse(path)):
                inside.setdefault(path.parent, set()).add(name.element)
        beside = Counter((p.parent, head) for p, (_, head) in read.items())
        return {
            p
            for p, (element, head) in read.items()
            if inside.get(p, {element}) == {element} and (not head or beside[p.parent, head] > 1)
        }

    def _channels(self) -> dict[Path, Name]:
        found = {}
        for path in self.images:
            try:
                if self.task is not Task.HEART and not is_heart(stem_of(path)) and (name := channel(path)):
                    found[path] = name
            except CopeditError as error:
                self._not_understood([path], str(error))
        return found

    def _with_unclear(self, found: list[tuple[Path, StudyFiles]]) -> list[tuple[Path, StudyFiles]]:
        """Studies that a file which was not understood may belong to are stopped: what seems missing may be there."""
        beside: dict[int, list[tuple[Path, str]]] = {}
        for path, reason in {**self.unclear, **self._foreign(found)}.items():
            there = [
                (len(study.naming.head), i)
                for i, (folder, study) in enumerate(found)
                if not study.task.joint and path.parent in {folder, *(file.parent for file in study.files.values())}
            ]
            heads = [(n, i) for n, i in there if n and stem_of(path).startswith(found[i][1].naming.head)]
            anyones = nameless(stem_of(path)) and not left_out(stem_of(path)) and _mentioned(stem_of(path))
            maybe = perhaps(anyones, stem_of(path)) if anyones else set()
            lacking = [(n, i) for n, i in there if maybe - found[i][1].files.keys()]
            for n, i in heads or (there if len(there) == 1 else lacking):
                if not heads or n == max(heads)[0]:
                    beside.setdefault(i, []).append((path, reason))
        for i, files in beside.items():
            folder, study = found[i]
            if not study.problem:
                path, reason = files[0]
                problem = f"{study.name}: {path} could not be understood and may be what seems missing ({reason})"
                problem += f"; rename it, move it away, or {_BY_HAND}"
                found[i] = folder, replace(study, problem=problem, unclear=tuple(path for path, _ in files))
        return found

    def _foreign(self, found: list[tuple[Path, StudyFiles]]) -> dict[Path, str]:
        """Images of modalities that a study lacks, in another format than NIfTI, beside its files."""
        reasons = {}
        folders = {file.parent for _, study in found for file in study.files.values() if file not in self.named}
        for path in (p for folder in sorted(folders) for p in sorted(folder.iterdir()) if FOREIGN.search(p.name)):
            name = None if LABELS.search(stem_of(path)) or path.name.startswith(".") else parse(path)
            there = {e for _, s in found for e, f in s.files.items() if f.parent == path.parent and _same(s, name)}
            if name and name.element not in there:
                reasons[path] = f"it looks like {name.element} but is no NIfTI file; convert it to .nii.gz"
        return reasons

    def _root(self, folder: Path) -> Path:
        """The folder that was given and holds a study's; that itself where its files were given."""
        return next((root for root in self.roots if root.is_dir() and folder.is_relative_to(root)), folder)

    def _subfolder(self, folder: Path, top: Path) -> Path:
        """Outputs mirror the inputs' folders below the folder that was given."""
        return top / folder.relative_to(self._root(folder))

    def _brain(self, label: str, names: Sequence[Name], subfolder: Path) -> StudyFiles:
        problem = None
        files: dict[str, Path] = {}
        chosen: list[Name] = []
        for element in dict.fromkeys(name.element for name in names):
            one, *more = choose([name for name in names if name.element == element], self.select)
            files[element] = one.path
            chosen += [one, *more]
            if more:
                problem = f"{label}: two files for {element}: {one.path} and {more[0].path}; {_choices([one, *more])}"
        return StudyFiles(label, Task.BRAIN, files, naming_of(chosen, subfolder, self.dataset is not None), problem)


def _choices(names: Sequence[Name]) -> str:
    """How to choose one of several files of a modality."""
    common = frozenset.intersection(*(name.marks for name in names))
    marks = [",".join(sorted(name.marks - common)) or PLAIN for name in names]
    if len(set(marks)) < len(marks):
        return f"remove one, or {_BY_HAND}"
    return f"choose with --select {' or --select '.join(marks)}, remove one, or {_BY_HAND}"


def _same(study: StudyFiles, name: Name | None) -> bool:
    return name is not None and name.head in ("", study.naming.head)


def _called(folder: Path, root: Path) -> str:
    """The name that a folder gives its study: its path below the root, so that nothing else in a cohort matters."""
    return "_".join((*folder.relative_to(root).parts[:-1], folder.resolve().name))


def _distinct(found: Sequence[tuple[Path, StudyFiles]], roots: Sequence[Path]) -> list[StudyFiles]:
    """The studies, those of one name told apart by the folders above, or else numbered, and refused where outputs would
    clash."""
    outputs = Counter(place for _, s in found for place in _places(s))
    labels = Counter(s.name for _, s in found)
    names, above = [], []  # above: a root where there are several, and the folders below it, not yet in the name
    for (folder, study), root in zip(found, roots, strict=True):
        own, called = folder.resolve().name, _called(folder, root)
        told = labels[study.name] == 1 or study.name in (own, called)
        names.append(study.name if told else f"{own}_{study.name}")
        parts = [root.resolve().name, *folder.relative_to(root).parts][:-1]
        above.append(parts[len(set(roots)) == 1 : 1 if study.name == called else None])
    while len(set(names)) < len(names) and any(above):
        count = Counter(names)
        last = [folders.pop() if folders else "" for folders in above]
        pairs = zip(last, names, strict=True)
        names = [f"{folder}_{name}" if count[name] > 1 and folder else name for folder, name in pairs]
    while len(set(names)) < len(names):  # A/v1 and A_v1
        count, numbers = Counter(names), defaultdict[str, Iterator[int]](lambda: itertools.count(1))
        names = [f"{name}-{next(numbers[name])}" if count[name] > 1 else name for name in names]
    studies = []
    for (_, study), name in zip(found, names, strict=True):
        if any(outputs[place] > 1 for place in _places(study)):
            problem = f"{study.name}: another input would have the same output; give each alone, with an -o of its own"
            study = replace(study, problem=study.problem or problem)
        studies.append(replace(study, name=name))
    return studies


def _places(study: StudyFiles) -> set[tuple[Path, str]]:
    """Where outputs may go, whatever the case of their modalities."""
    naming = study.naming
    return {(naming.subfolder, f"{naming.head}{spelled.lower()}") for spelled in naming.spelling.values()}


def _is_number(head: str) -> bool:
    """Whether all that a head or folder says is a number, of a series or of a patient."""
    return bool(re.fullmatch(r"\d{1,4}", head.strip("-_. ")))


def _mentioned(stem: str) -> str | None:
    """The modality that a name most likely means, if it holds one: `t2_tirm_dark-fluid` is the fluid's."""
    inside = mentions(stem)
    words = meant({inside, *named(stem)}) if inside else ()
    return next(iter(words)) if len(words) == 1 else inside


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError as error:  # a name that is too long, for one
        raise CopeditError(f"cannot read {str(path)[:200]}: {error.strerror or error}") from error


def _no_raw_data(path: Path, root: Path) -> bool:
    return not {"derivatives", "sourcedata"}.isdisjoint(path.relative_to(root).parts)


def _not_observed(path: Path) -> str | None:
    if OVER_TIME.search(stem_of(path)):
        return _SERIES
    if OTHER_VIEW.search(stem_of(path)):
        return "another view than the short axis by its name"
    if is_synthetic(path):
        return "synthetic, written by CoPeDiT"
    return None


def _explicit(explicit: Mapping[str, Path | str]) -> StudyFiles:
    files: dict[str, Path] = {}
    for key, value in explicit.items():
        element, path = (STACK if key == STACK else modality(key)), Path(value)
        if os.path.isdir(path):  # False for a name that is too long
            hint = f"of a DICOM study give the folder with -i and the series' number with --file {element}=NUMBER"
            raise CopeditError(f"{path} is a folder; give the NIfTI file of {key}, or {hint}")
        if not is_file(path):
            raise CopeditError(f"{path} does not exist or is no file; give the NIfTI file of {key}")
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
        return StudyFiles(stem_of(first), Task.HEART, files, Naming(stem_of(first), {STACK: ""}))
    names = [
        name
        if (name := parse(path)) and name.element == element
        else Name(path, element, f"{stem_of(path)}_", element, path.parent)
        for element, path in files.items()
    ]
    label = names[0].head.strip("-_. ") or first.resolve().parent.name
    return StudyFiles(label, Task.BRAIN, files, naming_of(names, Path()))


def output_path(naming: Naming, folder: Path, element: str, inputs: Sequence[Path]) -> Path:
    """Where an element's output goes; CopeditError if an image lies there that is not synthetic, an input or not."""
    path = naming.path(folder, element)
    if path.resolve() in {p.resolve() for p in inputs}:
        raise CopeditError(f"the output {path} would replace an input; choose another output folder with -o")
    if is_file(path) and not is_synthetic(path):
        raise CopeditError(f"{path} is there and not of CoPeDiT; choose another output folder with -o, or move it away")
    return path
