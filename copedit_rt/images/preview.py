"""One picture per study: observed and synthesised images side by side, the latter framed and labelled.

Radiological convention: the patient's right is on the left of axial and coronal panels, anterior is up (left
in sagittal ones), superior is up; in long-axis cuts of a heart the first slice of the file is at the bottom.
Voxel aspect is respected. Every image has its own window, percentiles 0.5 to 99.5. Needs numpy and Pillow,
not torch.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from copedit_rt.errors import CopeditError
from copedit_rt.files import write_atomically
from copedit_rt.images.grids import Orientation, slice_axis, spacing

if TYPE_CHECKING:
    from copedit_rt.images.study import Study

BACKGROUND, INK, FAINT, SYNTHETIC = (14, 14, 17), (225, 225, 230), (130, 130, 140), (255, 150, 30)
GAP, LINE = 6, 16
DIFFERENCE = 0.3  # the |difference| that is shown at full brightness, in units of the window
PLANES = {"axial": 2, "coronal": 1, "sagittal": 0}  # name -> RAS axis along which the plane is cut


def draw(
    study: Study, *, model: str, trained: str | None = None, truth: Mapping[str, np.ndarray] | None = None
) -> Image.Image:
    """Picture of a study whose synthesised volumes are in `study.synthetic` (cardiac: `missing_slices`).

    trained: what the model was trained on, to be said under the picture.
    truth: for simulated studies, the true volumes [X, Y, Z] on the files' grid, to show beside the
    synthesised together with their |difference|.
    """
    body = (_heart if study.task.joint else _brain)(study, truth or {})
    notes = [
        f"{study.name} · filled in by CoPeDiT {model}; framed images are synthesised, not measured",
        "radiological convention: the patient's right is on the left · every image has a window of its own",
    ]
    if trained:
        notes.append(f"{model} was trained on {trained}")
    if truth:
        notes[1] += f" · |difference| up to {DIFFERENCE:g} of the window"
    width = max([body.width, *(round(_font().getlength(n)) + 2 * GAP for n in notes)])
    page = _page(width, body.height + LINE * len(notes) + 2 * GAP)
    page.paste(body, (0, 0))
    pen = ImageDraw.Draw(page)
    for i, note in enumerate(notes):
        pen.text((GAP, body.height + GAP + i * LINE), note, fill=FAINT, font=_font())
    return page


def stack(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures under one another."""
    page = _page(max(p.width for p in pictures), sum(p.height for p in pictures))
    top = 0
    for picture in pictures:
        page.paste(picture, (0, top))
        top += picture.height
    return page


def save(picture: Image.Image, path: Path) -> None:
    """Write a PNG in one step. Raises CopeditError if the folder cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CopeditError(f"cannot write {path}: {error.strerror}; choose another output folder with -o") from error
    write_atomically(path, encode(picture))


def encode(picture: Image.Image) -> bytes:
    """As PNG."""
    content = io.BytesIO()
    picture.save(content, format="PNG", optimize=True)
    return content.getvalue()


def _brain(study: Study, truth: Mapping[str, np.ndarray]) -> Image.Image:
    """Rows: axial, coronal, sagittal through the centre of the head. Columns: the elements."""
    columns: list[tuple[str, str, np.ndarray]] = []  # element, role, image on 0..1 in RAS order
    for name in sorted(study.volumes, key=lambda n: n in study.synthetic):
        volume = study.volumes[name]
        turn = Orientation.to_ras(volume.affine)  # files of one grid may still differ in voxel order
        image = turn.apply(window(volume.data))
        columns.append((name, "synthesised" if name in study.synthetic else "observed", image))
        if name in study.synthetic and name in truth:
            true = turn.apply(window(truth[name]))
            columns += [(name, "truth", true), (name, "|difference|", np.abs(image - true))]
    affine = next(iter(study.volumes.values())).affine
    zooms = spacing(affine)[list(Orientation.to_ras(affine).order)]
    box = _foreground(columns[0][2])
    centre = _centre(columns[0][2][box])
    extent = [(b.stop - b.start) * z for b, z in zip(box, zooms, strict=True)]
    scale = 200 / max(extent)
    across, down = round(max(extent[0], extent[1]) * scale), [round(extent[a] * scale) for a in (1, 2, 2)]
    page = _page(LINE + GAP + len(columns) * (across + GAP), 2 * LINE + 2 * GAP + sum(down) + 3 * GAP)
    pen = ImageDraw.Draw(page)
    for column, (name, role, image) in enumerate(columns):
        left, top = LINE + GAP + column * (across + GAP), 2 * LINE + 2 * GAP
        made = role == "synthesised"
        _centred(pen, left + across / 2, GAP, name, SYNTHETIC if made else INK, 14)
        _centred(pen, left + across / 2, GAP + LINE, role, SYNTHETIC if made else FAINT)
        for (plane, axis), height in zip(PLANES.items(), down, strict=True):
            sides = [zooms[a] * scale for a in range(3) if a != axis]
            panel = _panel(image[box].take(centre[axis], axis), sides, heat=role == "|difference|")
            page.paste(panel, (left + (across - panel.width) // 2, top + (height - panel.height) // 2))
            if column == 0:
                _sideways(page, plane, top + height // 2)
            top += height + GAP
        if made:
            pen.rectangle((left - 3, 2, left + across + 2, page.height - 2), outline=SYNTHETIC, width=2)
    return page


def _heart(study: Study, truth: Mapping[str, np.ndarray]) -> Image.Image:
    """The slices in file order, then two long-axis cuts; these and up to six slices beside a truth."""
    (name, volume), *_ = study.volumes.items()
    missing = sorted(study.missing_slices)
    axis = slice_axis(volume.data.shape, volume.affine)
    turn = Orientation.slices_last(volume.affine, axis)
    zooms = spacing(volume.affine)[list(turn.order)]
    limits = _limits(volume.data)
    images = {"synthesised": turn.apply(window(volume.data, limits))}
    if name in truth:
        images["truth"] = turn.apply(window(truth[name], limits))
        images["|difference|"] = np.abs(images["synthesised"] - images["truth"])
    width, height, count = images["synthesised"].shape
    scale = 150 / max(width * zooms[0], height * zooms[1])

    def cell(label: str, z: int, role: str = "") -> Image.Image:
        panel = _panel(images[label][..., z], zooms[:2] * scale, heat=label == "|difference|")
        made = label == "synthesised" and z in missing
        return _captioned(panel, f"slice {z}" + f" · {role}" * bool(role), made, frame=made)

    def cut(label: str, axis: int, role: str = "") -> Image.Image:
        image = images[label]
        sides = zooms[[1 - axis, 2]] * scale * 1.25
        panel = _panel(image.take(image.shape[axis] // 2, axis), sides, heat=label == "|difference|")
        made = label == "synthesised"
        return _captioned(_marked(panel, missing if made else [], count), "long axis" + f" · {role}" * bool(role), made)

    rows = [
        [cell("synthesised", z, "synthesised" if z in missing else "") for z in run.tolist()]
        for run in np.array_split(np.arange(count), -(-count // 8))
    ]
    if len(images) == 1:
        rows.append([cut("synthesised", axis) for axis in (0, 1)])
    else:
        shown = [missing[i] for i in np.linspace(0, len(missing) - 1, min(6, len(missing))).astype(int)]
        for label in images:
            rows.append([*(cell(label, z, label) for z in shown), *(cut(label, axis, label) for axis in (0, 1))])
    return stack([_side_by_side(row) for row in rows])


def _marked(cut: Image.Image, slices: Sequence[int], count: int) -> Image.Image:
    """Coloured bars beside the synthesised of the `count` slices of a cut, the first at the bottom."""
    margin = 5
    page = _page(cut.width + 2 * margin, cut.height)
    page.paste(cut, (margin, 0))
    pen = ImageDraw.Draw(page)
    for z in slices:
        top, bottom = (round((count - i) * cut.height / count) for i in (z + 1, z))
        for left in (0, page.width - 3):
            pen.rectangle((left, top, left + 2, max(top, bottom - 1)), fill=SYNTHETIC)  # a slice may be no pixel
    return page


def _panel(cut: np.ndarray, sides: Sequence[float] | np.ndarray, heat: bool = False) -> Image.Image:
    """A plane [U, V] on 0..1 as a picture, u from right to left, v from bottom to top. sides: pixels a voxel.

    For u = left->right that is the radiological convention; for u = posterior->anterior, anterior is left.
    """
    pixels = np.clip(cut[::-1, ::-1].T, 0, 1)
    width, height = (max(1, round(n * float(side))) for n, side in zip(cut.shape, sides, strict=True))
    grey = Image.fromarray((pixels * 255).astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    if not heat:
        return grey.convert("RGB")
    value = np.asarray(grey, dtype=np.float32)[..., None] / (255 * DIFFERENCE)
    return Image.fromarray((np.clip(3 * value - np.arange(3), 0, 1) * 255).astype(np.uint8))


def _captioned(panel: Image.Image, caption: str, made: bool = False, frame: bool = False) -> Image.Image:
    width = max(panel.width, round(_font().getlength(caption)))
    page = _page(width + GAP, panel.height + LINE + GAP)
    left = (page.width - panel.width) // 2
    page.paste(panel, (left, LINE))
    pen = ImageDraw.Draw(page)
    _centred(pen, page.width / 2, 0, caption, SYNTHETIC if made else FAINT)
    if frame:
        pen.rectangle((left - 2, LINE - 2, left + panel.width + 1, LINE + panel.height + 1), outline=SYNTHETIC, width=2)
    return page


def _side_by_side(panels: Sequence[Image.Image]) -> Image.Image:
    page = _page(2 * GAP + sum(p.width for p in panels), GAP + max(p.height for p in panels))
    left = GAP
    for panel in panels:
        page.paste(panel, (left, GAP))
        left += panel.width
    return page


def _limits(image: np.ndarray) -> tuple[float, float]:
    finite = image[np.isfinite(image)]
    low, high = np.percentile(finite, (0.5, 99.5)) if finite.size else (0.0, 1.0)
    return float(low), float(high) if high > low else float(low) + 1.0


def window(image: np.ndarray, limits: tuple[float, float] | None = None) -> np.ndarray:
    """Image on 0..1 between limits, by default its own percentiles; float32."""
    low, high = limits or _limits(image)
    return np.clip((np.nan_to_num(image, nan=low) - low) / (high - low), 0, 1).astype(np.float32)


def _foreground(image: np.ndarray) -> tuple[slice, ...]:
    """Box around what is brighter than a tenth of the window, with a margin of three voxels."""
    box = []
    for axis in range(3):
        filled = np.flatnonzero((image > 0.1).any(axis=tuple(a for a in range(3) if a != axis)))
        first, last = (filled[0], filled[-1]) if filled.size else (0, image.shape[axis] - 1)
        box.append(slice(max(0, first - 3), last + 4))
    return tuple(box)


def _centre(image: np.ndarray) -> list[int]:
    """Index of the centre of mass of the foreground."""
    where = np.argwhere(image > 0.1)
    return [n // 2 for n in image.shape] if not where.size else [int(i) for i in where.mean(axis=0)]


def _font(size: int = 11) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _centred(
    pen: ImageDraw.ImageDraw, x: float, y: float, text: str, fill: tuple[int, int, int], size: int = 11
) -> None:
    pen.text((x - pen.textlength(text, font=_font(size)) / 2, y), text, fill=fill, font=_font(size))


def _sideways(page: Image.Image, text: str, middle: int) -> None:
    strip = _page(round(_font().getlength(text)) + 4, LINE)
    ImageDraw.Draw(strip).text((2, 1), text, fill=FAINT, font=_font())
    strip = strip.rotate(90, expand=True)
    page.paste(strip, (2, middle - strip.height // 2))


def _page(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), BACKGROUND)
