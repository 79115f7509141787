"""What a model and other methods make of the same studies, side by side with the truth (Figures 4, 5 and 9).

A pair of rows for each image that was missing: what is observed, the truth and what each has made of it; below, how far
each is off, all on one scale. Of a brain an axial slice is shown, of a heart a missing slice between its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from copedit_rt.errors import CopeditError
from copedit_rt.images.grids import Orientation
from copedit_training.evaluation.beside import Beside
from copedit_training.evaluation.compare import Pair, incomplete, normalise, pairs, possible
from copedit_training.evaluation.evaluate import missing_patterns
from copedit_training.evaluation.report import table, write
from copedit_training.evaluation.subjects import Cohort

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from copedit_rt.config import ModelConfig
    from copedit_rt.images.study import Study
    from copedit_rt.synthesizer import Synthesizer

Progress = Callable[[int, int], None]
WHOLE, CELL = 99.5, 1.5  # percentile of the errors that is the end of their scale; inches


@dataclass(frozen=True)
class Row:
    """An image that was missing. observed, truth, made (by method): slices [H, W] in 0..1, as they are shown."""

    subject: str
    missing: str
    element: str
    slice: int
    observed: Sequence[np.ndarray]
    truth: np.ndarray
    made: Mapping[str, np.ndarray]
    scores: Mapping[str, Mapping[str, float]]


def wanted_patterns(config: ModelConfig, asked: Sequence[str] = ()) -> list[tuple[str, ...]]:
    """Missing patterns as they are asked for (t1+flair), or one of every count. Raises CopeditError for another."""
    every = {"+".join(p): p for patterns in missing_patterns(config).values() for p in patterns}
    for text in asked:
        if "+".join(_sorted(config, text)) not in every:
            raise CopeditError(f"--missing {text}: {config.name} fills in {', '.join(every)}")
    chosen = ["+".join(_sorted(config, text)) for text in asked]
    return [every[name] for name in chosen] or [p for (p,) in missing_patterns(config, 1).values()]


def _sorted(config: ModelConfig, text: str) -> list[str]:
    names = text.lower().split("+")
    return sorted(names, key=lambda name: config.elements.index(name) if name in config.elements else -1)


def rows_of(config: ModelConfig, truth: Study, missing: Sequence[str], found: Sequence[Pair]) -> Iterator[Row]:
    """A row for each element (heart: for the stack) of the pairs of one study."""
    for element in dict.fromkeys(pair.element for pair in found):
        own = {pair.method: pair for pair in found if pair.element == element}
        first = own["model"]
        z = _shown(first)
        yield Row(
            truth.name,
            "+".join(missing),
            element,
            z,
            _observed(config, truth, missing, first, z),
            _slice(first, first.truth, z),
            {method: _slice(pair, pair.image, z) for method, pair in own.items()},
            {method: pair.measure() for method, pair in own.items()},
        )


def _shown(pair: Pair) -> int:
    """The slice that shows most of what counts: of a heart the middle one of those missing."""
    if pair.slices is not None:
        return pair.slices[len(pair.slices) // 2]
    return int(pair.upright(pair.where()).sum((0, 1)).argmax())


def _slice(pair: Pair, image: np.ndarray, z: int) -> np.ndarray:
    """Slice z as it is shown: of a brain with the front above."""
    return np.rot90(pair.upright(image)[..., z])


def _observed(config: ModelConfig, truth: Study, missing: Sequence[str], pair: Pair, z: int) -> list[np.ndarray]:
    """Of a brain slice z of all observed modalities, of a heart the observed slices next to z."""
    if pair.slices is None:
        there = [truth.volumes[e] for e in config.elements if e not in missing]
        return [np.rot90(normalise(Orientation.to_ras(v.affine).apply(v.data))[..., z]) for v in there]
    seen = [k for k in range(pair.truth.shape[2]) if k not in pair.slices]
    near = [*[k for k in seen if k < z][-1:], *[k for k in seen if k > z][:1]]
    return [_slice(pair, pair.truth, k) for k in near]


def compare(
    model: Synthesizer,
    cohort: Cohort,
    beside: Mapping[str, Beside],
    patterns: Sequence[Sequence[str]],
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], list[Row]]:
    """What is drawn, and a JSON-able report of it; the first run of each method. Raises CopeditError where no study can
    lack any of the patterns."""
    rows: list[Row] = []
    for count, (_, truth, _) in enumerate(cohort):
        for tried, missing in enumerate(patterns, 1):
            if possible(model.config, truth, missing):
                study = incomplete(model.config, truth, missing)
                result = model.synthesize(study, seed=seed)
                made = {name: other.fill(study, seed, 0) for name, other in beside.items()}
                every = pairs(model.config, truth, missing, result, None, made)
                found = [pair for pair in every if pair.method in ("model", *beside)]
                rows += rows_of(model.config, truth, missing, found)
            if progress:
                progress(count * len(patterns) + tried, cohort.studies * len(patterns))
    if not rows:
        raise CopeditError(f"{cohort.about()['data']}: no study there can lack {' or '.join(map('+'.join, patterns))}")
    named = ("subject", "missing", "element", "slice", "scores")
    report = {"model": model.config.name, "seed": seed, "beside": list(beside), **cohort.about()}
    return report | {"rows": [{name: getattr(row, name) for name in named} for row in rows]}, rows


def montage(images: Sequence[np.ndarray]) -> np.ndarray:
    """Images [H, W] in as many columns as rows, or one more."""
    columns = int(np.ceil(np.sqrt(len(images))))
    h, w = images[0].shape
    out = np.zeros((-(-len(images) // columns) * h, columns * w), np.float32)
    for i, image in enumerate(images):
        y, x = divmod(i, columns)
        out[y * h : (y + 1) * h, x * w : (x + 1) * w] = image
    return out


def error_scale(rows: Sequence[Row]) -> float:
    """Where the scale of all error maps ends."""
    errors = [abs(x - row.truth).ravel() for row in rows for x in row.made.values()]
    return max(float(np.percentile(np.concatenate(errors), WHOLE)), 1e-3)


def draw(rows: Sequence[Row]) -> Figure:
    """The figure."""
    from matplotlib.figure import Figure

    methods, end = list(rows[0].made), error_scale(rows)
    ratio = rows[0].truth.shape[0] / rows[0].truth.shape[1]
    size = (CELL * (2 + len(methods)) + 0.6, 2 * CELL * ratio * len(rows) + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(2 * len(rows), 2 + len(methods), squeeze=False)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    for title, ax in zip(("observed", "truth", *methods), axes[0], strict=True):
        ax.set_title(title, fontsize=8)
    for row, (above, below) in zip(rows, axes.reshape(len(rows), 2, -1), strict=True):
        above[0].set_ylabel(f"{row.subject}\nwithout {row.missing.replace('+', ', ')}", fontsize=6)
        below[0].set_ylabel(f"error\n{row.element.upper()}, slice {row.slice}", fontsize=6)
        for ax, image in zip(above, (montage(row.observed), row.truth, *row.made.values()), strict=True):
            ax.imshow(image, cmap="gray", vmin=0, vmax=1)
        for ax, (method, image) in zip(below[2:], row.made.items(), strict=True):
            shown = ax.imshow(abs(image - row.truth), cmap="magma", vmin=0, vmax=end)
            ax.set_xlabel(f"{row.scores[method]['psnr']:.2f} dB", fontsize=6)
    figure.colorbar(shown, ax=axes[1::2, :], shrink=0.6, aspect=40).set_label("absolute error", fontsize=7)
    return figure


def markdown(report: Mapping[str, Any]) -> str:
    """What the figure shows, and the whole images' scores."""
    header = ["subject", "missing", "element", "slice", "method", "PSNR (dB)", "SSIM"]
    body = [
        [*(str(row[key]) for key in header[:4]), method, f"{values['psnr']:.2f}", f"{values['ssim']:.4f}"]
        for row in report["rows"]
        for method, values in row["scores"].items()
    ]
    lines = [f"# {report['model']} side by side", "", f"Seed {report['seed']}; scores of whole images.", ""]
    return "\n".join([*lines, *table(header, body, 5)]) + "\n"


def write_report(report: Mapping[str, Any], rows: Sequence[Row], folder: Path) -> list[Path]:
    """side-by-side.json, .md and .png in a folder."""
    return write(report, markdown(report), folder, "side-by-side", lambda: [("side-by-side", draw(rows))])
