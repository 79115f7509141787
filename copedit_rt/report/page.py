"""One page a study that a browser opens from a file, without a network: images with linked cursors, and what was done.

The viewer is NiiVue 0.69.0 (BSD-2-Clause, beside this file with its licence), which is put into every page.
"""

from __future__ import annotations

import base64
import gzip
import html
import json
import math
import os
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from copedit_rt import checkpoint
from copedit_rt.errors import CopeditError, by_name
from copedit_rt.files import write_atomically
from copedit_rt.images import preview
from copedit_rt.images.grids import slice_axis, spacing
from copedit_rt.images.study import Study
from copedit_rt.inspection import Finding, contradictions, examine
from copedit_rt.schedule import drawn
from copedit_rt.synthesizer import Result
from copedit_rt.task import STACK

LARGEST = 8_000_000  # bytes of a page: larger ones crashed browsers
STILL = 2_000_000  # bytes of its still picture in base64, the rest of them are for volumes


@dataclass(frozen=True)
class Panel:
    """A volume to show: data [X, Y, Z] in its window, 0..1; colormap: NiiVue's."""

    name: str
    role: str
    data: NDArray[np.float32]
    affine: NDArray[np.float64]
    synthetic: bool = False
    colormap: str = "gray"


def write(result: Result, model: str | Path, path: Path) -> None:
    """The page of one study, at most LARGEST bytes. model: a built-in one or a folder, whose card is quoted.

    Raises CopeditError where it cannot be written.
    """
    picture = _picture(result)
    room = LARGEST - len(_viewer()) - len(picture) - 200_000  # for text
    volumes = pack(panels(result.study, result.std), room)
    text = Template(_part("page.html")).substitute(
        title=html.escape(f"{result.study.name}: filled in by CoPeDiT {result.record['model']}"),
        body="\n".join(_body(result, model, volumes, picture)),
    )
    write_atomically(path, text.encode("utf-8", "replace"))


def panels(study: Study, std: Mapping[str, NDArray]) -> list[Panel]:
    """What is shown side by side: the observed, the synthesised, and maps of their deviation."""
    if study.task.joint:
        return _heart(study, std)
    shown = []
    for name in sorted(study.volumes, key=lambda n: n in study.synthetic):
        volume, made = study.volumes[name], name in study.synthetic
        role = "synthesised" if made else "observed"
        shown.append(Panel(name, role, preview.window(volume.data), volume.affine, made))
        if name in std:
            shown.append(_spread(name, std[name], study))
    return shown


def _heart(study: Study, std: Mapping[str, NDArray]) -> list[Panel]:
    """The stack as it was given, without the missing slices, and filled."""
    volume = study.volumes[STACK]
    filled = preview.window(volume.data)
    given = np.moveaxis(filled.copy(), slice_axis(filled.shape, volume.affine), 0)
    given[list(study.missing_slices)] = 0
    given = np.moveaxis(given, 0, slice_axis(filled.shape, volume.affine))
    slices = ", ".join(map(str, study.missing_slices))
    shown = [Panel(STACK, f"observed, without slices {slices}", given, volume.affine)]
    shown.append(Panel(STACK, f"slices {slices} synthesised", filled, volume.affine, synthetic=True))
    return [*shown, *(_spread(name, data, study) for name, data in std.items())]


def _spread(name: str, data: NDArray, study: Study) -> Panel:
    varied = data[data > 0]  # few, where one slice of hundreds is missing
    most = float(np.percentile(varied, 99.5)) if varied.size else 1.0
    role = f"standard deviation of the samples, up to {most:.3g}"
    return Panel(name, role, np.clip(data / most, 0, 1), study.reference.affine, True, "hot")


def pack(shown: Sequence[Panel], room: int) -> list[str]:
    """The panels as gzipped NIfTI files of bytes in base64, as fine as `room` bytes hold all of them."""
    size = np.min([spacing(panel.affine) for panel in shown], axis=0)
    steps = np.ones(3, int)
    most = 3 * room / len(shown)  # voxels: packed, they take a third of a byte at least
    while True:
        if all(math.prod(-(-np.array(p.data.shape) // steps)) <= most for p in shown):
            packed = [_packed(panel, steps) for panel in shown]
            if sum(map(len, packed)) <= room:
                return packed
        steps[np.argmin(size * steps)] += 1


def _packed(panel: Panel, steps: NDArray[np.integer]) -> str:
    """Means of blocks of `steps` voxels."""
    data, affine = panel.data, panel.affine.copy()
    for axis, step in enumerate(int(s) for s in steps):
        if step > 1 and data.shape[axis] >= step:
            blocks = np.moveaxis(data, axis, 0)
            blocks = blocks[: len(blocks) // step * step].reshape(-1, step, *blocks.shape[1:]).mean(1)
            data = np.moveaxis(blocks, 0, axis)
            affine[:3, 3] += affine[:3, axis] * (step - 1) / 2
            affine[:3, axis] *= step
    image = nib.Nifti1Image(np.rint(data * 255).astype(np.uint8), affine)
    return base64.b64encode(gzip.compress(image.to_bytes(), 6, mtime=0)).decode()


# ------------------------------------------------------------------------------------------------------ the text


def _body(result: Result, model: str | Path, volumes: Sequence[str], picture: str) -> Iterable[str]:
    """The page's parts, as HTML."""
    study = result.study
    shown = panels(study, result.std)
    yield "<noscript>Without JavaScript the frames stay empty; the still picture below shows the same study.</noscript>"
    yield '<div id="panels">'
    for i, panel in enumerate(shown):
        kind = "synthetic" if panel.synthetic else "observed"
        caption = f'<b>{panel.name}</b> <span class="{"made" if panel.synthetic else "faint"}">{panel.role}</span>'
        yield f'<figure class="{kind}"><figcaption>{caption}</figcaption>'
        label = html.escape(f"{panel.name}, {panel.role}")
        yield f'<div class="view"><canvas id="canvas{i}" role="img" aria-label="{label}"></canvas></div></figure>'
    yield "</div>"
    remark = "Radiological convention; every image has a window of its own, and is coarser here than in its file."
    yield f'<p class="faint">{remark}</p>'
    yield from _findings(result)
    yield from _perception(result)
    yield from _provenance(result)
    yield from _card(model)
    yield f'<details><summary>Still picture</summary><img alt="the same study" src="data:image/png;base64,{picture}">'
    yield "</details>"
    content = [
        {"name": f"{i}-{panel.name}", "colormap": panel.colormap, "content": packed}
        for i, (panel, packed) in enumerate(zip(shown, volumes, strict=True))
    ]
    yield f'<script type="application/json" id="volumes">{_quoted(content)}</script>'
    yield f"<script>/* NiiVue 0.69.0\n{_part('NIIVUE-LICENSE.txt')}*/\n{_viewer()}</script>"
    yield f"<script>{_part('panels.js')}</script>"


def _findings(result: Result) -> Iterable[str]:
    """What `inspect` would point out, and what there is to know."""
    study = result.study
    observed = {n: v for n, v in study.volumes.items() if study.task.joint or n not in study.synthetic}
    names = {n: str(entry["file"] or n) for n, entry in result.record["inputs"].items()}
    found = examine(observed, names, task=study.task)
    found += contradictions(result.perception, names, task=study.task)
    found += [Finding("note", note, flag=False) for note in result.record["notes"]]
    yield "<h2>Findings</h2>"
    rows = (f'<li class="{"flag" if f.flag else "note"}">{html.escape(f.text)}</li>' for f in found)
    yield f"<ul>{''.join(rows)}</ul>" if found else "<p>Files and images agree.</p>"


def _perception(result: Result) -> Iterable[str]:
    """What the network perceives in the observed images."""
    perceived = result.perception
    yield "<h2>What the network perceives in the observed images</h2>"
    chances = ", ".join(f"{count}: {p:.2f}" for count, p in enumerate(perceived.count, start=1))
    yield f"<p>P(number of elements missing) {chances}</p>"
    rows = []
    for element, chance in zip(perceived.elements, perceived.missing, strict=True):
        there = element in perceived.identity
        looks = "{} ({:.2f})".format(*perceived.looks_like(element)) if there else ""
        rows.append([element, "observed" if there else "missing", f"{chance:.2f}", looks])
    yield _table(["element", "files say", "P(missing)", "looks like"], rows)


def _provenance(result: Result) -> Iterable[str]:
    """How it was made."""
    record = result.record
    rows = [
        ["model", record["model"]],
        ["sampler", drawn(record["sampler"])],
        ["computed by", f"{record['engine']} on {record['device']} in {record['dtype']}"],
        ["versions", ", ".join(f"{name} {number}" for name, number in record["versions"].items())],
    ]
    rows += [[f"{n}: {e['file'] or 'no file'}", f"SHA-256 {e['sha256']}"] for n, e in record["inputs"].items()]
    weights = record["weights_sha256"]
    rows += [[f"weights, {n}", f"SHA-256 {digest}"] for n, digest in (weights or {}).items()]
    yield "<h2>How it was made</h2>"
    yield _table(["item", "value"], rows)


def _card(model: str | Path) -> Iterable[str]:
    """What the model was trained on, in the words of its card."""
    yield "<h2>The model and what it was trained on</h2>"
    try:
        text = (checkpoint.locate(model) / "README.md").read_text(encoding="utf-8")
    except (OSError, ValueError, CopeditError):
        yield '<p class="warning">This model has no card: nothing here says what it was trained on.</p>'
        return
    first = text.split("\n\n")[1] if "\n\n" in text else text
    yield f"<p>{html.escape(first)}</p><details><summary>Its card</summary><pre>{html.escape(text)}</pre></details>"


def index(entries: Iterable[Mapping[str, Any]], path: Path) -> None:
    """The page of a cohort: a row a study, with a link to its page. entries: those of `summary.gather`."""
    rows, filled = [], 0
    for entry in entries:
        name = html.escape(str(entry["study"]))
        if page := entry.get("report"):
            link = html.escape(urllib.parse.quote(os.fsencode(page)))
            name = f'<a href="{link}">{name}</a>'
        there = entry["status"] in ("written", "kept")
        filled += there
        made = ", ".join(entry.get("outputs", {})) if there else ""
        flags = len(entry.get("notes", ()))
        # An older version left no remark and no name.
        told = entry.get("remark") or by_name(entry.get("error") or "") or (f"{flags} notes" if flags else "")
        model = entry.get("model_name") or Path(entry.get("model") or "").name
        cells = entry["status"], made, model, f"{entry.get('seconds', 0):.1f}", told
        rows.append([name, *(html.escape(str(cell)) for cell in cells)])
    headings = ["study", "outcome", "synthesised", "model", "seconds", "remarks"]
    body = _table(headings, rows, escape=False)
    title = f"{len(rows)} studies, {filled} filled in by CoPeDiT"
    text = Template(_part("page.html")).substitute(title=title, body=body)
    write_atomically(path, text.encode("utf-8", "replace"))


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]], escape: bool = True) -> str:
    head = "".join(f"<th>{heading}</th>" for heading in headings)
    lines = ("".join(f"<td>{html.escape(cell) if escape else cell}</td>" for cell in row) for row in rows)
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _picture(result: Result) -> str:
    """The preview in base64, at half its size or less where the stack has so many slices that it needs more."""
    picture = preview.draw(result.study, model=result.record["model"])
    while len(encoded := base64.b64encode(preview.encode(picture)).decode()) > STILL:
        picture = picture.reduce(2)
    return encoded


def _quoted(data: Any) -> str:
    """JSON inside of a script element."""
    return json.dumps(data).replace("<", "\\u003c")


@lru_cache
def _part(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")


def _viewer() -> str:
    return _part("niivue.umd.js")
