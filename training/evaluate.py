"""How good is a model: PSNR, SSIM and MAE on held-out phantoms beside honest baselines, per missing pattern.

Brain: a missing modality has no scale of its own, so the synthesised volume is put back on 0..1 with the
intensity range recorded with it, and the truth with its own percentiles, as in preprocessing. Heart: the
observed slices set the file's scale, so output, baselines and truth all use the truth's percentiles, and only
the missing slices count. Everything is measured on the file's grid. Metrics need numpy and scipy only.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import ndimage

from copedit_rt.errors import CopeditError
from copedit_rt.files import write_atomically
from copedit_rt.perception import Perception, contradictions
from copedit_rt.study import STACK, Study, Volume
from training.data import HELD_OUT, phantom_subject

if TYPE_CHECKING:
    from copedit_rt.config import ModelConfig
    from copedit_rt.synthesizer import Result, Synthesizer
    from training.phantom import Phantom

PERCENTILES = (0.5, 99.5)
Progress = Callable[[int, int], None]

# ---------------------------------------------------------------------------------------------------- metrics


def psnr(a: np.ndarray, b: np.ndarray, data_range: float = 1.0) -> float:
    """Peak signal-to-noise ratio in dB over all voxels; infinite where a equals b."""
    error = float(np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2))
    return math.inf if error == 0 else 10 * math.log10(data_range**2 / error)


def mae(a: np.ndarray, b: np.ndarray) -> float:
    """Mean absolute error over all voxels."""
    return float(np.mean(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64))))


def ssim_map(a: np.ndarray, b: np.ndarray, data_range: float = 1.0, window: int = 11, sigma: float = 1.5) -> np.ndarray:
    """Structural similarity at every voxel of two volumes [X, Y, Z], float64.

    Wang et al. 2004: Gaussian window, K1 = 0.01, K2 = 0.03, population variances; borders mirrored. On an
    axis with fewer voxels than the window, the window shrinks to the largest odd number that fits.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"shapes {a.shape} and {b.shape} differ")

    def blur(x: np.ndarray) -> np.ndarray:
        for axis, size in enumerate(_windows(x.shape, window)):
            taps = np.exp(-0.5 * ((np.arange(size) - size // 2) / sigma) ** 2)
            x = ndimage.correlate1d(x, taps / taps.sum(), axis=axis, mode="mirror")
        return x

    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    mu_a, mu_b = blur(a), blur(b)
    var_a, var_b = np.maximum(blur(a * a) - mu_a**2, 0), np.maximum(blur(b * b) - mu_b**2, 0)
    covariance = blur(a * b) - mu_a * mu_b
    return (2 * mu_a * mu_b + c1) * (2 * covariance + c2) / ((mu_a**2 + mu_b**2 + c1) * (var_a + var_b + c2))


def ssim3d(
    a: np.ndarray,
    b: np.ndarray,
    data_range: float = 1.0,
    *,
    slices: Sequence[int] | None = None,
    axis: int = 2,
    window: int = 11,
    sigma: float = 1.5,
) -> float:
    """Mean of `ssim_map` over the volume, borders included, as torchmetrics has it.

    slices: average over these slices along `axis` only. The map is still that of the whole stack, so the
    window sees the neighbouring slices too.
    """
    values = ssim_map(a, b, data_range, window, sigma)
    return float((values if slices is None else values.take(list(slices), axis)).mean())


def _windows(shape: Sequence[int], window: int) -> list[int]:
    return [min(window, n - 1 + n % 2) for n in shape]


# -------------------------------------------------------------------------------------------------- baselines


def normalise(image: np.ndarray, percentiles: tuple[float, float] = PERCENTILES) -> np.ndarray:
    """Percentiles of the whole volume to 0 and 1, clipped; float32. The preprocessing of the models."""
    low, high = np.percentile(image, percentiles)
    return np.clip((image - low) / max(high - low, 1e-12), 0, 1).astype(np.float32)


def mean_of_observed(observed: Mapping[str, np.ndarray]) -> np.ndarray:
    """Voxel-wise mean of the observed images on 0..1."""
    return np.stack(list(observed.values())).mean(axis=0, dtype=np.float32)


class LinearRegression:
    """Voxel-wise least squares with intercept, one set of coefficients per observed subset and target.

    Fitted and applied where any observed image is above 0; elsewhere, in the skull-stripped background, it
    gives 0, which is what is there.
    """

    def __init__(self, elements: Sequence[str]) -> None:
        self.elements = tuple(elements)
        self._moments: dict[tuple[str, ...], np.ndarray] = {}

    def fit(self, studies: Iterator[Mapping[str, np.ndarray]], subsets: Sequence[Sequence[str]] | None = None) -> None:
        """studies: complete sets of images on 0..1. subsets: the observed subsets wanted; all by default."""
        everything = [s for n in range(1, len(self.elements)) for s in itertools.combinations(self.elements, n)]
        wanted = everything if subsets is None else [self._key(s) for s in subsets]
        size = len(self.elements) + 1
        for images in studies:
            table = np.stack([*(images[e].ravel() for e in self.elements), np.ones(images[self.elements[0]].size)])
            for subset in wanted:
                inside = table[:, table[self._rows(subset)].any(axis=0)].astype(np.float64)
                self._moments[subset] = self._moments.get(subset, np.zeros((size, size))) + inside @ inside.T

    def predict(self, observed: Mapping[str, np.ndarray], target: str) -> np.ndarray:
        """observed: images on 0..1. Returns the target on 0..1, float32."""
        subset = self._key(observed)
        moments, rows = self._moments[subset], [*self._rows(subset), len(self.elements)]
        weights = np.linalg.lstsq(moments[np.ix_(rows, rows)], moments[rows, self.elements.index(target)], rcond=None)[
            0
        ]
        images = [observed[e] for e in subset]
        value = weights[-1] + sum(w * x for w, x in zip(weights[:-1], images, strict=True))
        return np.where(np.any([x > 0 for x in images], axis=0), np.clip(value, 0, 1), 0).astype(np.float32)

    def _key(self, names: Mapping[str, Any] | Sequence[str]) -> tuple[str, ...]:
        return tuple(e for e in self.elements if e in names)

    def _rows(self, subset: Sequence[str]) -> list[int]:
        return [self.elements.index(e) for e in subset]


def interpolate_slices(stack: np.ndarray, missing: Sequence[int]) -> np.ndarray:
    """Missing slices of [X, Y, Z] linearly between the nearest observed ones; at the ends, the nearest."""
    there = [z for z in range(stack.shape[2]) if z not in missing]
    out = stack.copy()
    for z in missing:
        below, above = (
            max((t for t in there if t < z), default=None),
            min((t for t in there if t > z), default=None),
        )
        if below is None or above is None:
            out[..., z] = stack[..., above if below is None else below]
        else:
            share = (z - below) / (above - below)
            out[..., z] = (1 - share) * stack[..., below] + share * stack[..., above]
    return out


def nearest_slices(stack: np.ndarray, missing: Sequence[int]) -> np.ndarray:
    """Missing slices of [X, Y, Z] copied from the nearest observed one (the lower of two equally near)."""
    there = np.array([z for z in range(stack.shape[2]) if z not in missing])
    out = stack.copy()
    for z in missing:
        out[..., z] = stack[..., there[np.argmin(np.abs(there - z))]]
    return out


# --------------------------------------------------------------------------------------------------- phantoms


def fit_regression(config: ModelConfig, patterns: Sequence[Sequence[str]], subjects: int) -> LinearRegression:
    """The regression baseline for some missing patterns, fitted on training phantoms (seeds 0, 1, ...)."""
    regression = LinearRegression(config.elements)
    training = (phantom_subject(config, seed).images for seed in range(subjects))
    complete = ({name: normalise(image) for name, image in images.items()} for images in training)
    regression.fit(complete, [[e for e in config.elements if e not in missing] for missing in patterns])
    return regression


def missing_patterns(config: ModelConfig, limit: int | None = None) -> dict[int, list[tuple[str, ...]]]:
    """Missing subsets per count 1..m-1: brain every one, heart runs of consecutive slabs.

    limit: at most that many per count, evenly picked.
    """
    m = len(config.elements)
    patterns = {}
    for count in range(1, m):
        if config.task == "brain":
            every = list(itertools.combinations(config.elements, count))
        else:
            every = [config.elements[i : i + count] for i in range(m - count + 1)]
        picked = range(len(every)) if limit is None else np.linspace(0, len(every) - 1, min(limit, len(every))).round()
        patterns[count] = [every[int(i)] for i in picked]
    return patterns


def phantom_study(
    config: ModelConfig,
    phantom: Phantom,
    missing: Sequence[str],
    name: str,
    swap: Mapping[str, str] | None = None,
) -> Study:
    """A phantom without its `missing` elements. swap: element -> the image put there under its name."""
    if config.task == "cardiac":
        slices = missing_slices(config, phantom, missing)
        stack = phantom.images[STACK].copy()
        stack[..., slices] = 0
        return Study(name, "cardiac", {STACK: Volume.from_array(stack, phantom.affine())}, tuple(slices))
    images = {e: phantom.images[(swap or {}).get(e, e)] for e in config.elements if e not in missing}
    return Study(name, "brain", {e: Volume.from_array(x, phantom.affine()) for e, x in images.items()})


def missing_slices(config: ModelConfig, phantom: Phantom, missing: Sequence[str]) -> list[int]:
    """The slices of the missing slabs of a heart."""
    slabs = np.array_split(np.arange(phantom.images[STACK].shape[2]), len(config.elements))
    return [int(z) for slab, name in zip(slabs, config.elements, strict=True) if name in missing for z in slab]


# ------------------------------------------------------------------------------------------------- evaluation


class Scores:
    """Metrics of methods, collected under a key (missing count or pattern)."""

    def __init__(self) -> None:
        self._values: dict[str, dict[str, list[dict[str, float]]]] = {}

    def add(self, key: str, method: str, values: dict[str, float]) -> None:
        self._values.setdefault(key, {}).setdefault(method, []).append(values)

    def summary(self) -> dict[str, Any]:
        """key -> method -> metric -> mean and standard deviation over the images, and their number."""
        return {
            key: {
                method: {"images": len(rows)}
                | {
                    metric: {
                        "mean": float(np.mean([r[metric] for r in rows])),
                        "sd": float(np.std([r[metric] for r in rows])),
                    }
                    for metric in rows[0]
                }
                for method, rows in methods.items()
            }
            for key, methods in self._values.items()
        }


class Heads:
    """How often the prompt heads are right, per true missing count."""

    def __init__(self) -> None:
        self._right: dict[int, list[tuple[bool, bool]]] = {}

    def add(self, perception: Perception, missing: Sequence[str]) -> None:
        right = (perception.count_missing == len(missing), set(perception.which_missing) == set(missing))
        self._right.setdefault(len(missing), []).append(right)

    def summary(self) -> dict[str, Any]:
        def share(rows: list[tuple[bool, bool]]) -> dict[str, Any]:
            count, which = (float(np.mean(column)) for column in zip(*rows, strict=True))
            return {"studies": len(rows), "count": count, "which": which}

        every = [row for rows in self._right.values() for row in rows]
        return {str(n): share(rows) for n, rows in sorted(self._right.items())} | {"all": share(every)}


def measure(image: np.ndarray, truth: np.ndarray, slices: Sequence[int] | None = None) -> dict[str, float]:
    """PSNR (at most 100: JSON has no infinity), SSIM and MAE of volumes on 0..1, over `slices` along z."""
    a, b = (image, truth) if slices is None else (image[..., list(slices)], truth[..., list(slices)])
    return {"psnr": min(psnr(a, b), 100.0), "ssim": ssim3d(image, truth, slices=slices), "mae": mae(a, b)}


def compare_brain(
    truth: Mapping[str, np.ndarray],
    missing: Sequence[str],
    synthesised: Mapping[str, np.ndarray],
    intensity: tuple[float, float],
    regression: LinearRegression | None,
) -> Iterator[tuple[str, dict[str, float]]]:
    """Method and metrics per missing modality: the model, then the baselines (no regression: the model alone).

    truth: the complete study; synthesised: the outputs, in the file's units, of which `intensity` is 0 and 1.
    """
    normal = {name: normalise(image) for name, image in truth.items()}
    observed = {name: image for name, image in normal.items() if name not in missing}
    low, high = intensity
    for name in missing:
        yield "model", measure(np.clip((synthesised[name] - low) / (high - low), 0, 1), normal[name])
        if regression:
            yield "mean of observed", measure(mean_of_observed(observed), normal[name])
            yield "linear regression", measure(regression.predict(observed, name), normal[name])


def compare_heart(
    truth: np.ndarray, slices: Sequence[int], synthesised: np.ndarray
) -> Iterator[tuple[str, dict[str, float]]]:
    """Method and metrics over the missing slices: model, then baselines. All in the file's units."""
    low, high = np.percentile(truth, PERCENTILES)

    def normal(stack: np.ndarray) -> np.ndarray:
        return np.clip((stack - low) / (high - low), 0, 1)

    for method, stack in (
        ("model", synthesised),
        ("linear interpolation", interpolate_slices(truth, slices)),
        ("nearest slice", nearest_slices(truth, slices)),
    ):
        yield method, measure(normal(stack), normal(truth), slices)


def evaluate(
    model: Synthesizer,
    *,
    subjects: int = 16,
    first_seed: int = HELD_OUT,
    steps: int | None = None,
    seed: int = 0,
    patterns: int | None = None,
    fit_subjects: int = 32,
    progress: Progress | None = None,
    solver: str | None = None,
) -> dict[str, Any]:
    """Evaluate on `subjects` held-out phantoms; JSON-able.

    patterns: at most that many missing patterns per count (None: all). fit_subjects: how many training
    phantoms the regression baseline is fitted on. progress: called with studies done and studies in all.
    """
    _check_held_out(first_seed)
    config = model.config
    wanted = [p for ps in missing_patterns(config, patterns).values() for p in ps]
    by_count, by_pattern, heads = Scores(), Scores(), Heads()
    regression = fit_regression(config, wanted, fit_subjects if config.task == "brain" else 0)
    mislabel = {"studies": 0, "caught": 0, "false_alarms": 0}  # T2 named FLAIR
    seconds, done = 0.0, 0
    for subject in range(first_seed, first_seed + subjects):
        phantom, name = phantom_subject(config, subject), f"phantom{subject}"
        for missing in wanted:
            study = phantom_study(config, phantom, missing, name)
            start = time.perf_counter()
            result = model.synthesize(study, steps=steps, seed=seed, solver=solver)
            seconds += time.perf_counter() - start
            heads.add(result.perception, missing)
            for method, values in compare(config, phantom, missing, result, regression):
                by_count.add(str(len(missing)), method, values)
                by_pattern.add("+".join(missing), method, values)
            done += 1
            if progress:
                progress(done, subjects * len(wanted))
        if {"t2", "flair"} < set(config.elements):
            honest = model.perceive(phantom_study(config, phantom, ["t2"], name))
            renamed = model.perceive(phantom_study(config, phantom, ["t2"], name, {"flair": "t2"}))
            mislabel["studies"] += 1
            mislabel["caught"] += "flair" in misnamed(renamed)
            mislabel["false_alarms"] += bool(misnamed(honest))
    return {
        "model": config.name,
        "task": config.task,
        "data": "phantom",
        "subjects": subjects,
        "first_seed": first_seed,
        "steps": config.diffusion.steps if steps is None else steps,
        "solver": config.diffusion.solver if solver is None else solver,
        "seed": seed,
        "seconds_per_study": seconds / max(done, 1),
        "by_count": by_count.summary(),
        "by_pattern": by_pattern.summary(),
        "heads": heads.summary(),
        "mislabel": mislabel if mislabel["studies"] else None,
    }


def _check_held_out(first_seed: int) -> None:
    if first_seed < HELD_OUT:
        raise CopeditError(f"seed {first_seed} may have been trained on; held-out phantoms start at {HELD_OUT}")


def sweep(
    model: Synthesizer,
    *,
    steps: Sequence[int],
    subjects: int = 16,
    first_seed: int = HELD_OUT,
    seed: int = 0,
    patterns: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Quality and seconds a study of every solver at several numbers of steps; JSON-able.

    Studies and noise are the same for all. "converged": PSNR of all that was synthesised against what the second-order
    solver makes in the most steps, the best estimate of where all of them lead. The rest as in `evaluate`.
    """
    _check_held_out(first_seed)
    config = model.config
    wanted = [p for ps in missing_patterns(config, patterns).values() for p in ps]
    settings = [(solver, n) for n in sorted(set(steps), reverse=True) for solver in ("dpm2m", "ddim")]
    scores, seconds, done = Scores(), dict.fromkeys(settings, 0.0), 0
    for subject in range(first_seed, first_seed + subjects):
        phantom = phantom_subject(config, subject)
        for missing in wanted:
            study = phantom_study(config, phantom, missing, f"phantom{subject}")
            best = None
            for solver, n in settings:
                start = time.perf_counter()
                result = model.synthesize(study, steps=n, seed=seed, solver=solver)
                seconds[solver, n] += time.perf_counter() - start
                volumes = np.stack([result.study.volumes[name].data for name in sorted(result.study.synthetic)])
                best = volumes if best is None else best
                low, high = intensity_of(result.record)
                converged = min(psnr(volumes, best, high - low), 100.0)
                for method, values in compare(config, phantom, missing, result):
                    if method == "model":
                        scores.add(f"{solver} {n}", method, values | {"converged": converged})
            done += 1
            if progress:
                progress(done, subjects * len(wanted))
    found = scores.summary()
    return {
        "model": config.name,
        "task": config.task,
        "data": "phantom",
        "subjects": subjects,
        "first_seed": first_seed,
        "seed": seed,
        "patterns": ["+".join(missing) for missing in wanted],
        "sweep": [
            {"solver": solver, "steps": n, "seconds_per_study": seconds[solver, n] / max(done, 1)}
            | found[f"{solver} {n}"]["model"]
            for solver, n in sorted(settings)
        ],
    }


def misnamed(perception: Perception) -> list[str | None]:
    """The elements that `copedit inspect` would call misnamed."""
    return [f.element for f in contradictions(perception, {}, task="brain") if f.kind == "identity"]


def compare(
    config: ModelConfig,
    phantom: Phantom,
    missing: Sequence[str],
    result: Result,
    regression: LinearRegression | None = None,
) -> Iterator[tuple[str, dict[str, float]]]:
    """`compare_brain` or `compare_heart` of a phantom and what was made of it."""
    volumes = {name: volume.data for name, volume in result.study.volumes.items()}
    if config.task == "cardiac":
        return compare_heart(phantom.images[STACK], missing_slices(config, phantom, missing), volumes[STACK])
    return compare_brain(phantom.images, missing, volumes, intensity_of(result.record), regression)


def intensity_of(record: Mapping[str, Any]) -> tuple[float, float]:
    """What 0 and 1 of a synthesised volume are in the file, from its record: the reference's range."""
    geometry = record["geometry"]
    first = next(iter(geometry["intensity"].values()))
    return first["low"], first["high"]


def sweep_markdown(report: Mapping[str, Any]) -> str:
    """The report of `sweep` as a Markdown table."""
    lines = [
        f"# {report['model']}: quality against steps, on held-out phantoms",
        "",
        f"{report['subjects']} simulated subjects from seed {report['first_seed']}, {len(report['patterns'])} missing "
        "patterns, the same noise for every row. Converged: PSNR against the second-order solver at the most steps.",
        "",
        "| solver | steps | images | PSNR (dB) | SSIM | MAE | converged (dB) | s a study |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in report["sweep"]:
        cells = [f"{row[metric]['mean']:.{digits}f}" for metric, digits in (("psnr", 2), ("ssim", 4), ("mae", 4))]
        lines.append(
            f"| {row['solver']} | {row['steps']} | {row['images']} | {' | '.join(cells)} | "
            f"{row['converged']['mean']:.1f} | {row['seconds_per_study']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def markdown(report: Mapping[str, Any]) -> str:
    """The report as Markdown tables."""
    if "sweep" in report:
        return sweep_markdown(report)
    task = "one image" if report["task"] == "brain" else "one study, over its missing slices"
    lines = [
        f"# {report['model']} on held-out phantoms",
        "",
        f"{report['subjects']} simulated subjects from seed {report['first_seed']}, {report['steps']} steps of "
        f"{report['solver']}, {report['seconds_per_study']:.2f} s a study. Mean ± standard deviation over values of "
        f"{task}; intensities on 0..1.",
    ]
    for title, key, heading in (
        ("missing count", "by_count", "missing"),
        ("missing pattern", "by_pattern", "missing"),
    ):
        lines += [
            "",
            f"## By {title}",
            "",
            f"| {heading} | method | images | PSNR (dB) | SSIM | MAE |",
            "|---|---|--:|--:|--:|--:|",
        ]
        for name, methods in report[key].items():
            for method, row in methods.items():
                cells = [
                    f"{row[metric]['mean']:.{digits}f} ± {row[metric]['sd']:.{digits}f}"
                    for metric, digits in (("psnr", 2), ("ssim", 4), ("mae", 4))
                ]
                lines.append(f"| {name} | {method} | {row['images']} | {' | '.join(cells)} |")
    lines += [
        "",
        "## What the heads perceive",
        "",
        "| missing | studies | number right | which right |",
        "|---|--:|--:|--:|",
    ]
    for name, row in report["heads"].items():
        lines.append(f"| {name} | {row['studies']} | {row['count']:.1%} | {row['which']:.1%} |")
    if mislabel := report["mislabel"]:
        lines += [
            "",
            f"A T2 named FLAIR: caught in {mislabel['caught']} of {mislabel['studies']} studies; "
            f"correctly named studies flagged: {mislabel['false_alarms']} of {mislabel['studies']}.",
        ]
    return "\n".join(lines) + "\n"


def write_report(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """evaluation.json and evaluation.md (of a sweep: sweep.json and sweep.md) in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    name = "sweep" if "sweep" in report else "evaluation"
    paths = [folder / f"{name}.json", folder / f"{name}.md"]
    for path, text in zip(paths, (json.dumps(report, indent=2) + "\n", markdown(report)), strict=True):
        write_atomically(path, text.encode())
    return paths
