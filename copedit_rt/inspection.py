"""What the files of a study say beside what the network perceives. What `copedit inspect` does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from copedit_rt.errors import CopeditError, failure, printable
from copedit_rt.images.find import StudyFiles
from copedit_rt.images.nifti import Volume
from copedit_rt.images.study import Study, blank_slices
from copedit_rt.listener import Listener
from copedit_rt.models import Models, UnusableModel
from copedit_rt.perception import Perception
from copedit_rt.task import Task

if TYPE_CHECKING:
    from rich.console import RenderableType

SPECKS = 1e-3  # of a plane: fewer voxels than this are no image
SURE = 0.95  # what is less likely than this is not held against the files


def inspect(
    found: Sequence[StudyFiles],
    models: Models,
    missing_slices: Sequence[int] | None = None,
    listener: Listener | None = None,
) -> list[Report]:
    """A report on every study that `find_studies` found. missing_slices: those of `Study.read`. listener: hears of
    each study that it began, and what failed.

    What is wrong with a file is a finding. Raises CopeditError where of a single study nothing can be read, and where a
    model cannot be used.
    """
    reports, listener = [], listener or Listener()
    for files in found:
        listener.began(files.name)
        reports.append(_look(files, models, missing_slices, listener, several=len(found) > 1))
    return reports


def _look(
    files: StudyFiles, models: Models, missing_slices: Sequence[int] | None, listener: Listener, *, several: bool
) -> Report:
    shown = {element: path.name for element, path in files.files.items()}
    report = Report(files.name, files.task, shown)
    try:
        study, unreadable = _read_what_can_be_read(files, missing_slices)
    except Exception as error:
        told = failure(files.name, error, "free some, or give a smaller image")
        if not several:
            raise told from told.__cause__
        listener.failed(told)
        report.findings.append(Finding("unreadable", str(told)))
        return report
    report.missing_slices = study.missing_slices
    report.findings += [Finding("unreadable", text) for text in unreadable]
    report.findings += [Finding("note", note, flag=False) for note in study.notes]
    report.findings += examine(study.volumes, shown, task=files.task)
    constant = {f.element for f in report.findings if f.kind == "constant" and f.element}
    _perceive(report, _only_finite(study, constant), files, models, listener)
    return report


def _perceive(report: Report, study: Study, files: StudyFiles, models: Models, listener: Listener) -> None:
    """Fill in what the network perceives, and where it disagrees with the files."""
    name, config = models.choose(files.task, files.files)
    if not files.task.joint:
        report.missing = tuple(element for element in config.elements if element not in files.files)
    if not study.volumes:
        return
    try:
        perceived = models.introduced(name).perceive(study)
    except UnusableModel:
        raise
    except Exception as error:
        told = failure(files.name, error, "use a smaller model with --model, or another --device")
        listener.failed(told)
        report.findings.append(Finding("unperceived", str(told)))
        return
    report.perception = perceived
    report.findings += [Finding("unlike", text, flag=False) for text in perceived.unlike]
    if files.task.joint:
        report.missing = tuple(e for e in config.elements if e not in perceived.identity)
    report.findings += contradictions(perceived, report.files, task=files.task)


def _read_what_can_be_read(files: StudyFiles, missing_slices: Sequence[int] | None) -> tuple[Study, list[str]]:
    """The study without the files that cannot be read, and a sentence for each of these."""
    options: dict[str, Any] = {"missing_slices": missing_slices, "resample": True, "check_content": False}
    sentences = [files.problem] if files.problem else []
    if not files.files:  # a DICOM study of which no series was understood
        raise CopeditError(str(files.problem))
    files = replace(files, problem=None)
    try:
        return Study.read(files, **options), sentences
    except CopeditError:
        good = {}
        for element, path in files.files.items():
            try:
                Study.read(replace(files, files={element: path}), **options)
                good[element] = path
            except CopeditError as error:
                sentences.append(str(error))
        if not good or len(good) == len(files.files):
            raise
        return Study.read(replace(files, files=good), **options), sentences


def _only_finite(study: Study, left_out: set[str]) -> Study:
    """The study as the network can look at it: without constant volumes, NaN and infinities as 0."""
    volumes = {
        name: replace(volume, data=np.nan_to_num(volume.data, nan=0.0, posinf=0.0, neginf=0.0))
        for name, volume in study.volumes.items()
        if name not in left_out
    }
    return replace(study, volumes=volumes)


@dataclass(frozen=True)
class Finding:
    """One thing that `inspect` points out. flag: something is wrong; otherwise it is a remark.

    element: the volume it is about, where it is about one.
    """

    kind: str
    text: str
    flag: bool = True
    element: str | None = None


@dataclass
class Report:
    """One study: what the files say, what the network perceives, what was found."""

    name: str
    task: Task
    files: dict[str, str]
    missing: tuple[str, ...] = ()
    missing_slices: tuple[int, ...] = ()
    perception: Perception | None = None
    findings: list[Finding] = field(default_factory=list)

    @property
    def flagged(self) -> bool:
        return any(finding.flag for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        perceived = self.perception
        return {
            "study": self.name,
            "task": self.task,
            "files": self.files,
            "missing": list(self.missing),
            "missing_slices": list(self.missing_slices),
            "perceived": None
            if perceived is None
            else {
                "count_missing": perceived.count_missing,
                "which_missing": list(perceived.which_missing),
                "looks_like": {name: perceived.looks_like(name)[0] for name in perceived.identity},
                "probability": perceived.to_dict(),
            },
            "findings": [asdict(finding) for finding in self.findings],
            "consistent": not self.flagged,
        }

    def render(self) -> RenderableType:
        """A Rich table over the elements, and the findings under it."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        perceived = self.perception
        table = Table(title=Text(printable(self.name)), title_justify="left", title_style="bold")
        for heading in ("element", "files say", "P(missing)", "looks like"):
            table.add_column(heading)
        elements = perceived.elements if perceived else tuple(dict.fromkeys([*self.files, *self.missing]))
        for i, element in enumerate(elements):
            there = "missing" if element in self.missing else self.files.get(element, "observed")
            chance, looks = "", ""
            if perceived:
                chance = f"{perceived.missing[i]:.2f}"
                if element in perceived.identity:
                    best, sure = perceived.looks_like(element)
                    looks = f"{best} ({sure:.2f})" if sure >= SURE else f"not sure ({best} {sure:.2f})"
                    if not self.task.joint and best != element and sure >= SURE:
                        looks = f"[red]{looks}[/red]"
            table.add_row(element, Text(printable(there)), chance, looks)
        lines: list[RenderableType] = [table]
        if perceived:
            chances = ", ".join(f"{c}: {p:.2f}" for c, p in enumerate(perceived.count, start=1))
            lines.append(f"missing: {len(self.missing)} by the files; P(number missing) {chances}")
        for finding in self.findings:
            style = "red" if finding.flag else "yellow"
            lines.append(Text(f"{'!' if finding.flag else '-'} {printable(finding.text)}", style=style))
        if not self.flagged:
            lines.append(Text("files and images agree", style="green"))
        return Group(*lines)


def examine(volumes: Mapping[str, Volume], files: Mapping[str, str], *, task: Task) -> list[Finding]:
    """What the voxels show without a network: constant and non-finite volumes, blank planes.

    Blank planes at the ends of a brain volume are background; those between planes that hold an image are
    flagged. Blank slices of a cardiac stack are how a file says that they are missing, so they are not looked
    for here.
    """
    found = []
    for name, volume in volumes.items():
        data, file = np.asarray(volume.data), files.get(name, name)
        finite = np.isfinite(data)
        if not finite.any() or np.ptp(data[finite]) == 0:
            found.append(Finding("constant", f"{file} is constant: it holds no image", element=name))
            continue
        if task.joint:
            continue
        if bad := data.size - int(finite.sum()):
            found.append(Finding("non-finite", f"{file} has {bad} NaN or infinite voxels", element=name))
        for axis in range(3):
            blank = blank_slices(data, axis)
            full = _shown(data, axis, blank)
            inner = [i for i in blank if full.size and full.min() < i < full.max()]
            if inner:
                text = f"{file} is blank inside the image at {'ijk'[axis]} = {_runs(inner)}"
                found.append(Finding("blank", text, element=name))
    return found


def _shown(data: np.ndarray, axis: int, blank: Sequence[int]) -> np.ndarray:
    """The planes that hold more than specks, such as masks leave at their edges."""
    planes = np.moveaxis(data, axis, 0)
    empty = planes[blank[0]].flat[0] if blank else np.nan
    return np.setdiff1d(np.flatnonzero((planes != empty).mean((1, 2)) > SPECKS), blank)


def contradictions(perception: Perception, files: Mapping[str, str], *, task: Task) -> list[Finding]:
    """Where the network disagrees with the files: what each image is, how many are missing, and which.

    files: shown name per observed element. The observed elements are those in `perception.identity`. Of a network that
    has seen phantoms alone they are remarks, one of which says so.
    """
    found = list(_contradictions(perception, files, task))
    if found and perception.seen_only:
        text = f"what is perceived may mean nothing on a patient: the network has seen {perception.seen_only} alone"
        found = [replace(finding, flag=False) for finding in (*found, Finding("note", text))]
    return found


def _contradictions(perception: Perception, files: Mapping[str, str], task: Task) -> Iterator[Finding]:
    for name in perception.identity:
        looks, chance = perception.looks_like(name)
        if looks == name or chance < SURE:  # unsure is not a contradiction
            continue
        text = f"{files.get(name, name)} is named {name} but looks like {looks} ({chance:.2f})"
        if task.joint:
            text = f"{name} looks like {looks} ({chance:.2f}): do the slices run from apex to base?"
        yield Finding("identity", text, element=name)
    missing = tuple(e for e in perception.elements if e not in perception.identity)
    if not missing:  # the heads know only studies with something missing
        return
    chance = perception.count[perception.count_missing - 1]
    if perception.count_missing != len(missing) and chance >= SURE:
        says = f"the files say {len(missing)} missing"
        text = f"{says}, the images look like {perception.count_missing} ({chance:.2f})"
        yield Finding("count", text)
    for name, chance in zip(perception.elements, perception.missing, strict=True):
        if (chance > 0.5) != (name in missing) and max(chance, 1 - chance) >= SURE:
            says = "missing" if name in missing else "present"
            text = f"{name} is {says} by the files, but P(missing) is {chance:.2f} by the images"
            yield Finding("missing", text, element=name)


def _runs(numbers: Iterable[int]) -> str:
    """3, 4, 5, 9 as "3-5, 9"."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
