"""What a request asks for: its fields as options, its files in a folder of its own. Nothing of it is trusted."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from copedit_rt import archive, terminal
from copedit_rt.archive import safe_name
from copedit_rt.errors import CopeditError, Fault, by_name
from copedit_rt.images.find import StudyFiles, find_studies
from copedit_rt.images.names import MODALITIES, is_nifti, modality, targets
from copedit_rt.task import STACK, Task

MOST_FILES, MOST_FIELDS, MOST_MEMBERS = 64, 32, 10_000
MOST_SAMPLES = 100
FILE = "file"  # the field of files that are known by their names
_TRUE = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_DETAIL = {"guided": True, "none": False}
_TASKS = {str(task): str(task) for task in Task}


class Refused(CopeditError):
    """A request that is not served: the status of HTTP, and for how many seconds it is no use to try again."""

    def __init__(self, message: str, status: int = 400, after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.after = status, after


@dataclass
class Asked:
    """One request.

    folder: its own, gone after the answer. name: the study's, where its files have none.
    sampler: options of `Synthesizer.synthesize`; reading: of `Study.read`. series: {modality: what names its series}.
    """

    folder: Path
    name: str = "study"
    model: str | None = None
    target: list[str] | None = None
    task: Any = None
    select: tuple[str, ...] = ()
    preview: bool = False
    report: bool = False
    dicom: bool = True
    sampler: dict[str, Any] = field(default_factory=dict)
    reading: dict[str, Any] = field(default_factory=dict)
    explicit: dict[str, Path] = field(default_factory=dict)
    series: dict[str, str] = field(default_factory=dict)

    @property
    def home(self) -> Path:
        return self.folder / "in" / self.name

    @property
    def output(self) -> Path:
        return self.folder / "out"

    def study(self) -> StudyFiles:
        """The one study that the files are. Raises CopeditError as `find_studies` does, and for several."""
        paths = [] if self.explicit else [self.home]
        explicit: Mapping[str, Path | str] = self.explicit or self.series
        found = find_studies(paths, explicit, task=self.task, select=self.select, scratch=self.folder)
        if len(found) > 1:
            few = ", ".join(study.name for study in found[:3]) + ", ..." * (len(found) > 3)
            raise CopeditError(f"the files are of {len(found)} studies ({few}); send one study a request")
        return found[0]


def read_fields(fields: Mapping[str, str], folder: Path, models: Iterable[str]) -> Asked:
    """A request without its files. Raises Refused for a field that is unknown or has no such value."""
    if unknown := sorted(set(fields) - set(_FIELDS)):
        raise Refused(f"the field {unknown[0][:40]!r} is unknown; known are {', '.join(sorted(_FIELDS))}")
    asked = Asked(folder)
    for name, text in fields.items():
        if text.strip():
            try:
                _FIELDS[name](asked, text.strip())
            except CopeditError as error:
                raise Refused(str(error)) from error
    if asked.model is not None and asked.model not in set(models):
        raise Refused(f"the model {asked.model!r} is not served here; choose among {', '.join(models)}")
    return asked


def _whole(text: str, name: str, least: int, most: int) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", text) or not least <= int(text) <= most:
        raise CopeditError(f"{name} {text[:40]}: expected a whole number from {least} to {most}")
    return int(text)


def _set(part: str, name: str, read: Any) -> Any:
    def put(asked: Asked, text: str) -> None:
        getattr(asked, part)[name] = read(text)

    return put


def _attribute(name: str, read: Any) -> Any:
    return lambda asked, text: setattr(asked, name, read(text))


_FIELDS = {
    "name": _attribute("name", lambda text: safe_name(text)),
    "model": _attribute("model", str),
    "target": _attribute("target", targets),
    "task": _attribute("task", lambda text: terminal.choice(text, "--task", _TASKS)),
    "select": _attribute("select", terminal.words),
    "preview": _attribute("preview", lambda text: terminal.choice(text, "--preview", _TRUE)),
    "report": _attribute("report", lambda text: terminal.choice(text, "--report", _TRUE)),
    "dicom": _attribute("dicom", lambda text: terminal.choice(text, "--dicom", _TRUE)),
    **{element: _set("series", element, str) for element in (*MODALITIES, STACK)},
    "steps": _set("sampler", "steps", lambda text: _whole(text, "--steps", 0, 1000)),
    "seed": _set("sampler", "seed", lambda text: _whole(text, "--seed", 0, 2**53)),
    "samples": _set("sampler", "samples", lambda text: _whole(text, "--samples", 1, MOST_SAMPLES)),
    "solver": _set("sampler", "solver", str),
    "detail": _set("sampler", "detail", lambda text: terminal.choice(text, "--detail", _DETAIL)),
    "missing_slices": _set("reading", "missing_slices", terminal.numbers),
    "resample": _set("reading", "resample", lambda text: terminal.choice(text, "--resample", _TRUE)),
}


# ------------------------------------------------------------------------------------------------------- files


def keep_files(asked: Asked, files: Iterable[tuple[str, str, BinaryIO]], limit: int) -> None:
    """Put the files (field, name, content) into the request's folder, zips unpacked.

    Fields are modalities, sax, or `file` for files that are known by their names. limit: bytes, of all files unpacked.
    Raises Refused for no file, fields that do not go together, names that are no names, and more bytes; Fault
    where they cannot be written.
    """
    said = "the files are larger, unpacked, than this server takes; send fewer or smaller ones"
    try:
        _keep(asked, files, archive.Room(limit, said))
    except (Refused, Fault):
        raise
    except CopeditError as error:
        status = {archive.TooLarge: 413, archive.Damaged: 422}.get(type(error), 400)
        raise Refused(str(error), status) from error


def _keep(asked: Asked, files: Iterable[tuple[str, str, BinaryIO]], room: archive.Room) -> None:
    home = asked.home
    for key, name, content in files:
        try:
            element = "" if key == FILE else STACK if key == STACK else modality(key)
        except CopeditError as error:
            raise Refused(f"the field of a file, {key[:40]!r}, is neither {FILE} nor a modality ({error})") from error
        name = safe_name(PurePosixPath(name.replace("\\", "/")).name)
        if name.lower().endswith(".zip") and not element:
            archive.unpack(content, home, room, MOST_MEMBERS)
            continue
        if element and not is_nifti(Path(name)):
            raise Refused(f"{name}: expected a NIfTI file (.nii or .nii.gz) as {key}", 422)
        if element in asked.explicit:
            raise Refused(f"two files for {element}; send one")
        path = home / name if not (home / name).exists() else home / (element or "file") / name
        if path.exists():
            raise Refused(f"two files are called {name}; rename one")
        archive.write(path, iter(lambda source=content: source.read(1 << 20), b""), room)  # type: ignore[misc]
        if element:
            asked.explicit[element] = path
    if not home.exists():
        raise Refused(f"no file was sent; send NIfTI files as {FILE}, or as t1, t2 and so on")
    if asked.explicit and any(p not in asked.explicit.values() for p in home.rglob("*") if p.is_file()):
        raise Refused(f"send files either all as {FILE}, or each as its modality")
    if asked.explicit and asked.series:
        raise Refused(f"the field {next(iter(asked.series))} names a series of DICOM; send its files as {FILE}")


def public(said: BaseException | str, folder: Path) -> str:
    """A sentence as a stranger may read it: without paths, options of the command as fields."""
    homes = [path for path in (folder / "in").glob("*") if path.is_dir()]
    text = by_name(str(said), (*homes, folder / "in", folder / "out", folder))
    text = re.sub(r"--file (\w+)=[A-Z]+\b", r"the field \1", text)
    text = re.sub(r"--file (\w+=)", r"the field \1", text)
    return re.sub(r"--([a-z]+(?:-[a-z]+)*)", lambda match: f"the field {match[1].replace('-', '_')}", text)
