"""Where real studies lie among simulated ones: what a model trained on the simulation can be expected to know.

Every image is scaled as studies are scored, by its percentiles 0.5 and 99.5 to 0..1, 0 staying 0. Measured in the
brain: quantiles of each image, correlations between images, and the means of each image in three classes that k-means
finds on all of them, fluid, grey-like and white-like. A real value should lie within the simulated distribution, and
not at its ends.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage

from copedit_rt.config import ModelConfig
from copedit_rt.errors import CopeditError
from copedit_training.data.patients import read_patients
from copedit_training.data.prepared import Labels

QUANTILES = (5, 25, 50, 75, 95)
CLASSES = ("fluid", "grey", "white")
INSIDE = (5.0, 95.0)  # percent: a real value within these ranks is expected by the simulation
FIRST = 2_000_000  # seed of the studies that are compared with: none is trained on
BRAIN_ALONE = 0.35  # of the grid's voxels: a brain fills less of it, a head more
_VOXELS = 20000  # of a study that k-means looks at

Images = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Row:
    """One measure: the simulated 5, 50 and 95 %, and the value of every real study with its rank in percent."""

    name: str
    simulated: tuple[float, float, float]
    values: tuple[float, ...]
    ranks: tuple[float, ...]

    def inside(self) -> bool:
        """Whether every real value lies within 5 to 95 % of the simulated ones."""
        return all(INSIDE[0] <= rank <= INSIDE[1] for rank in self.ranks)


def scaled(image: np.ndarray) -> np.ndarray:
    """An image by its percentiles 0.5 and 99.5 as float32 in 0..1; what is 0 stays 0."""
    low, high = np.percentile(image, (0.5, 99.5))
    out = np.clip((image - low) / max(high - low, 1e-9), 0, 1).astype(np.float32)
    out[image <= 0] = 0
    return out


def measures(images: Images) -> dict[str, float]:
    """The measures of one skull-stripped study; images: name -> [X, Y, Z], one grid, exactly 0 outside the brain."""
    volumes = {name: scaled(np.asarray(image)) for name, image in images.items()}
    brain = ndimage.binary_fill_holes(np.any([v > 0 for v in volumes.values()], axis=0))
    values = {name: v[brain] for name, v in volumes.items()}
    out: dict[str, float] = {}
    for name, v in values.items():
        out |= {f"{name} {q} %": float(x) for q, x in zip(QUANTILES, np.percentile(v, QUANTILES), strict=True)}
    for a, b in itertools.combinations(values, 2):
        out[f"correlation {a} {b}"] = float(np.corrcoef(values[a], values[b])[0, 1])
    deep = ndimage.binary_erosion(brain, iterations=2)  # off the edge, which is neither of the classes
    return out | _classes({name: v[deep] for name, v in volumes.items()})


def _classes(values: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Means and shares of three classes: the fluid is the brightest in T2 less T1, the white then the brightest in T1.

    Without T1 and T2 there are no such names, and no measures."""
    if "t1" not in values or "t2" not in values:
        return {}
    from sklearn.cluster import KMeans

    names = list(values)
    step = max(1, len(values["t1"]) // _VOXELS)
    points = np.stack([values[name][::step] for name in names], 1)
    found = KMeans(3, n_init=3, random_state=0).fit(points)
    centres = found.cluster_centers_
    t1, t2 = centres[:, names.index("t1")], centres[:, names.index("t2")]
    fluid = int(np.argmax(t2 - t1))
    grey, white = sorted({0, 1, 2} - {fluid}, key=lambda i: t1[i])
    out: dict[str, float] = {}
    for label, i in zip(CLASSES, (fluid, grey, white), strict=True):
        out[f"share of {label}"] = float(np.mean(found.labels_ == i))
        out |= {f"{name} in {label}": float(centres[i, names.index(name)]) for name in names}
    ratio = centres[grey] / np.maximum(centres[white], 1e-3)
    return out | {f"{name} grey / white": float(r) for name, r in zip(names, ratio, strict=True)}


def compare(studies: Sequence[Images], simulated: Iterable[Images]) -> list[Row]:
    """Where each measure of the real studies lies in the simulated distribution; both skull-stripped, both on grids of
    about the same spacing, with the same images. A rank is the percentage of simulated values below the real one."""
    real = [measures(images) for images in studies]
    drawn = [measures(images) for images in simulated]
    rows = []
    for name in real[0]:
        values = np.sort([m[name] for m in drawn if name in m])
        own = tuple(m[name] for m in real)
        ranks = tuple(100.0 * float(np.searchsorted(values, x)) / len(values) for x in own)
        low, middle, high = (float(x) for x in np.percentile(values, (5, 50, 95)))
        rows.append(Row(name, (low, middle, high), own, ranks))
    return rows


def check(
    folder: Path, labels: Labels, config: ModelConfig, count: int, progress: Callable[[int, int], None] | None = None
) -> tuple[list[Row], list[str], list[str]]:
    """`compare` of the skull-stripped studies in a folder with `count` simulated ones on a model's grid, in the images
    that all of them have; their names; and a sentence for all that is left out.

    Raises CopeditError for a folder without studies, and for one whose image has no empty background.
    """
    patients = read_patients(folder, config)
    common = np.logical_and.reduce([patient.there for patient in patients])
    names = [name for name, there in zip(config.elements, common, strict=True) if there]
    if not names:
        raise CopeditError(f"{folder}: no image is there in all of its studies; give studies with the same images")
    left_out = []
    for i in np.flatnonzero(~common):
        lacking = ", ".join(patient.name for patient in patients if not patient.there[i])
        left_out.append(f"{config.elements[i]} is left out, as it is missing in {lacking}")
    if not {"t1", "t2"} <= set(names):
        left_out.append("tissue ratios are left out, as they need t1 and t2 of every study")
    for patient in patients:
        if np.mean((patient.images > 0).any(0)) > BRAIN_ALONE:
            raise CopeditError(f"{patient.name}: the check is of brains whose skull is off; strip it, or leave it out")
    real = [dict(zip(names, patient.images[common], strict=True)) for patient in patients]
    simulator = labels.simulator(config, None, stripped=1.0)

    def drawn() -> Iterator[Images]:
        for seed in range(count):
            study = simulator.study(FIRST + seed)
            yield {name: study.images[name].numpy() for name in names}
            if progress:
                progress(seed + 1, count)

    return compare(real, drawn()), [patient.name for patient in patients], left_out


def table(rows: Sequence[Row], names: Sequence[str]) -> str:
    """Rows as text, one measure a line: the simulated 5, 50, 95 %, then value and rank of each study of `names`."""
    lines = [f"{'measure':24}{'simulated 5/50/95 %':>24}  " + "".join(f"{name:>20}" for name in names)]
    for row in rows:
        span = " / ".join(f"{v:.2f}" for v in row.simulated)
        cells = "".join(f"{v:>12.2f} {r:>5.0f} %" for v, r in zip(row.values, row.ranks, strict=True))
        lines.append(f"{row.name:24}{span:>24}  {cells}" + ("" if row.inside() else "   outside"))
    return "\n".join(lines)
