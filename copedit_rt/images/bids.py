"""Data sets in the Brain Imaging Data Structure: what lies where, which labels are asked for, what a derivative needs.

By the specification, version 1.10: raw anatomical images lie in sub-LABEL/[ses-LABEL/]anat; a derivative has a
dataset_description.json that says by what and from what it was made.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from copedit_rt.errors import CopeditError
from copedit_rt.files import entries, refuse_broken, write_atomically

DESCRIPTION = "dataset_description.json"
VERSION = "1.10.0"
DERIVED = "desc-copedit_"  # the entity of every output
LABELS = {"sub": "--participant-label", "ses": "--session", "run": "--run"}
_NOT_BIDS = ("copedit_summary*", "index.html", "*_preview.png", "*_report.html", "*_sd.nii.gz")


def is_dataset(folder: Path) -> bool:
    """Whether a folder is the root of a data set of observed images."""
    described = _read(folder / DESCRIPTION)
    return "BIDSVersion" in described and described.get("DatasetType", "raw") == "raw"


def _read(path: Path) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return read if isinstance(read, dict) else {}


def images(root: Path) -> Iterator[Path]:
    """The files in the anat folders of a data set, in order: nothing else there is an anatomical image.

    CopeditError for one of these folders, or those above, that cannot be read: what lies there would count as missing.
    """
    for subject in _folders(root, "sub-.+"):
        for above in (subject, *_folders(subject, "ses-.+")):
            for anat in _folders(above, "anat"):
                yield from (path for path in entries(anat) if re.search(r"\.nii(\.gz)?$", path.name))


def _folders(folder: Path, called: str) -> Iterator[Path]:
    """The folders in a folder whose name is that (a regular expression)."""
    for path in (path for path in entries(folder) if re.fullmatch(called, path.name)):
        if os.path.isdir(path):
            yield path
        else:
            refuse_broken(path)


def entities(path: Path) -> dict[str, str]:
    """{key: label} of a name such as sub-01_ses-2_run-1_T1w.nii.gz."""
    return dict(re.findall(r"(?:^|_)([a-zA-Z]+)-([a-zA-Z0-9+]+)(?=_)", path.name))


def chosen(path: Path, labels: Mapping[str, Sequence[str]]) -> bool:
    """Whether a file has the labels asked for, {key: labels}, with or without the key before them; runs are numbers.

    A file that names no run is of all runs: there was one of its kind.
    """
    there = entities(path)
    return all(
        _label(key, there.get(key, "")) in {_label(key, label) for label in labels[key]}
        for key in labels
        if key in there or key != "run"
    )


def _label(key: str, label: str) -> str:
    bare = label.removeprefix(f"{key}-")
    return str(int(bare)) if key == "run" and bare.isdecimal() else bare


def check_labels(paths: Sequence[Path], labels: Mapping[str, Sequence[str]]) -> None:
    """CopeditError for a label that no file has."""
    for key, wanted in labels.items():
        there = {entities(path).get(key, "") for path in paths} - {""}
        known = {_label(key, label) for label in there}
        if absent := [label for label in wanted if _label(key, label) not in known]:
            few = ", ".join(sorted(there)[:5]) + ", ..." * (len(there) > 5) or "none"
            raise CopeditError(f"{LABELS[key]} {absent[0]}: no file has it; there are {few}")


def derivative(output: Path, root: Path, version: str) -> None:
    """Make the output folder a derivative of the data set. Raises CopeditError where it is the data set itself, or that
    of another program."""
    if output.resolve().is_relative_to(root.resolve()) and _raw(output, root):
        raise CopeditError(
            f"{output} lies among the raw data of {root}, a BIDS data set; choose -o {root / 'derivatives' / 'copedit'}"
        )
    path, raw = output / DESCRIPTION, _read(root / DESCRIPTION)
    made_by = [tool.get("Name") for tool in _read(path).get("GeneratedBy", []) if isinstance(tool, dict)]
    if path.exists() and "CoPeDiT" not in made_by:
        raise CopeditError(f"{path} was not written by CoPeDiT; choose another folder with -o")
    source = {"URL": "bids:raw:"} | ({"DOI": raw["DatasetDOI"]} if raw.get("DatasetDOI") else {})
    text = {
        "Name": f"{raw.get('Name') or root.resolve().name}: what was missing, synthesised",
        "BIDSVersion": VERSION,
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "CoPeDiT", "Version": version, "Description": "Synthetic images; not measured."}],
        "SourceDatasets": [source],
        "DatasetLinks": {"raw": Path(os.path.relpath(root.resolve(), output.resolve())).as_posix()},
    }
    write_atomically(path, (json.dumps(text, indent=2) + "\n").encode())
    write_atomically(output / ".bidsignore", ("\n".join(_NOT_BIDS) + "\n").encode())
    readme = output / "README"
    if not readme.exists():
        write_atomically(readme, b"Images that CoPeDiT synthesised. They are not measured: never diagnose from them.\n")


def _raw(output: Path, root: Path) -> bool:
    return output.resolve().relative_to(root.resolve()).parts[:1] != ("derivatives",)


def sources(paths: Sequence[Path]) -> list[str]:
    """Files of a data set as a derivative's sidecar names them."""
    subjects = [max((i for i, part in enumerate(p.parts[:-1]) if part.startswith("sub-")), default=-1) for p in paths]
    return [f"bids:raw:{'/'.join(p.parts[i:])}" for p, i in zip(paths, subjects, strict=True)]
