"""How good is a model: PSNR, SSIM and MAE on held-out subjects beside honest baselines, per missing pattern.

Brain: a missing modality has no scale of its own, so the synthesised volume is put back on 0..1 with the
intensity range recorded with it, and the truth with its own percentiles, as in preprocessing. Heart: the
observed slices set the file's scale, so output, baselines and truth all use the truth's percentiles, and only
the missing slices count. Everything is measured on the file's grid, but for the tokenizer's reconstruction, which is
measured on the model's.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from copedit_rt.errors import CopeditError
from copedit_rt.images.grids import Orientation, slice_axis, spacing
from copedit_rt.images.names import STACK
from copedit_rt.images.nifti import Volume
from copedit_rt.images.prepare import slabs_touched, to_unit_range
from copedit_rt.images.study import Study
from copedit_rt.inspection import contradictions
from copedit_rt.perception import Perception
from copedit_training.data.prepared import HELD_OUT
from copedit_training.evaluation.baselines import (
    LinearRegression,
    interpolate_slices,
    mean_of_observed,
    nearest_slices,
)
from copedit_training.evaluation.calibration import Calibration
from copedit_training.evaluation.metrics import measure, psnr
from copedit_training.evaluation.subjects import Cohort, Phantoms, phantom_truth

if TYPE_CHECKING:
    from copedit_rt.config import ModelConfig
    from copedit_rt.images.prepare import Prepared
    from copedit_rt.synthesizer import Result, Synthesizer
    from copedit_training.data.phantom import Phantom
    from copedit_training.evaluation.features import Networks

PERCENTILES = (0.5, 99.5)
Progress = Callable[[int, int], None]

# ------------------------------------------------------------------------------------- what is there and what is not


def normalise(image: np.ndarray, percentiles: tuple[float, float] = PERCENTILES) -> np.ndarray:
    """A skull-stripped volume with its percentiles as 0 and 1, clipped; float32. The preprocessing of the models."""
    low, high = np.percentile(image, percentiles)
    return to_unit_range(image, low, max(high, low + 1e-12))[0].astype(np.float32)


def fit_regression(
    config: ModelConfig, patterns: Sequence[Sequence[str]], subjects: int, cohort: Cohort | None = None
) -> LinearRegression | None:
    """The regression baseline for some missing patterns, fitted on training subjects of the cohort (phantoms); None
    where there are none."""
    regression = LinearRegression(config.elements)
    training = (cohort or Phantoms(config)).training(subjects)
    complete = ({name: normalise(volume.data) for name, volume in study.volumes.items()} for study in training)
    regression.fit(complete, [[e for e in config.elements if e not in missing] for missing in patterns])
    return regression if regression.fitted else None


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
    """A phantom without its `missing` elements; swap as in `incomplete`."""
    return incomplete(config, phantom_truth(config, phantom, name), missing, swap)


def incomplete(
    config: ModelConfig, truth: Study, missing: Sequence[str], swap: Mapping[str, str] | None = None
) -> Study:
    """A complete study without its `missing` elements. swap: element -> the image put there under its name."""
    if config.task == "cardiac":
        slices, volume = missing_slices(config, truth, missing), truth.volumes[STACK]
        stack = volume.data.copy()
        np.moveaxis(stack, _axis(volume), 2)[..., slices] = 0
        return Study(truth.name, "cardiac", {STACK: Volume.from_array(stack, volume.affine)}, tuple(slices))
    volumes = {e: truth.volumes[(swap or {}).get(e, e)] for e in config.elements if e not in missing}
    return Study(truth.name, "brain", volumes)


def missing_slices(config: ModelConfig, truth: Study | Phantom, missing: Sequence[str]) -> list[int]:
    """The slices of a heart, in the file's order, that lie in the missing slabs and in no other.

    None where others would be missing with them, or not all of these: a stack of few slices has some that lie in two.
    """
    truth = as_study(config, truth)
    volume, m, depth = truth.volumes[STACK], len(config.elements), config.image[2]
    axis = _axis(volume)
    count, size = volume.data.shape[axis], float(spacing(volume.affine)[axis])
    extent = config.preprocessing.field_of_view[2] or count * size
    wanted = np.array([name in missing for name in config.elements])
    touched = np.stack([slabs_touched([z], count, size, extent, m, depth) for z in range(count)])
    slices = np.flatnonzero(touched.any(axis=1) & ~(touched & ~wanted).any(axis=1))
    return slices.tolist() if (touched[slices].any(axis=0) == wanted).all() else []


def as_study(config: ModelConfig, truth: Study | Phantom) -> Study:
    """A phantom as a complete study; a study as it is."""
    return truth if isinstance(truth, Study) else phantom_truth(config, truth, "phantom")


def _axis(volume: Volume) -> int:
    return slice_axis(volume.data.shape, volume.affine)


# ---------------------------------------------------------------------------------------------------------- comparing


@dataclass(frozen=True)
class Pair:
    """What a method made of an element, and the truth: volumes [X, Y, Z] on 0..1, in the file's order (heart: slices
    last).

    slices: those along z that were missing and count (None: all). inside: the brain (bool); None for a heart.
    orientation: the file's way to RAS. std: of the samples that the image is the mean of, on the same scale.
    """

    method: str
    element: str
    image: np.ndarray
    truth: np.ndarray
    slices: tuple[int, ...] | None = None
    inside: np.ndarray | None = None
    orientation: Orientation | None = None
    std: np.ndarray | None = None

    def measure(self) -> dict[str, float]:
        return measure(self.image, self.truth, self.slices, self.inside)

    def upright(self, image: np.ndarray) -> np.ndarray:
        """An image of this pair's grid in RAS order (a view)."""
        return image if self.orientation is None else self.orientation.apply(image)

    def where(self) -> np.ndarray:
        """The voxels that count, bool [X, Y, Z]: the inside, or the missing slices."""
        if self.inside is not None:
            return self.inside
        chosen = np.zeros(self.truth.shape, bool)
        chosen[..., slice(None) if self.slices is None else list(self.slices)] = True
        return chosen


def compare_brain(
    truth: Mapping[str, np.ndarray],
    missing: Sequence[str],
    synthesised: Mapping[str, np.ndarray],
    intensity: tuple[float, float],
    regression: LinearRegression | None,
    *,
    std: Mapping[str, np.ndarray] | None = None,
    orientation: Orientation | None = None,
) -> Iterator[Pair]:
    """Per missing modality the model, then the baselines (no regression: without that one).

    truth: the complete study; synthesised, std: the outputs, in the file's units, of which `intensity` is 0 and 1.
    """
    normal = {name: normalise(image) for name, image in truth.items()}
    observed = {name: image for name, image in normal.items() if name not in missing}
    inside = np.any([image > 0 for image in normal.values()], axis=0)
    low, high = intensity
    for name in missing:
        made = {"model": to_unit_range(synthesised[name], low, high)[0], "mean of observed": mean_of_observed(observed)}
        if regression:
            made["linear regression"] = regression.predict(observed, name)
        for method, image in made.items():
            spread = std[name] / (high - low) if std and method == "model" else None
            yield Pair(method, name, image, normal[name], None, inside, orientation, spread)


def compare_heart(
    truth: np.ndarray, slices: Sequence[int], synthesised: np.ndarray, *, std: np.ndarray | None = None
) -> Iterator[Pair]:
    """Over the missing slices the model, then the baselines. Stacks [X, Y, slices], all in the file's units."""
    low, high = np.percentile(truth, PERCENTILES)

    def normal(stack: np.ndarray) -> np.ndarray:
        return np.clip((stack - low) / (high - low), 0, 1)

    reference = normal(truth)
    for method, stack in (
        ("model", synthesised),
        ("linear interpolation", interpolate_slices(truth, slices)),
        ("nearest slice", nearest_slices(truth, slices)),
    ):
        spread = std / (high - low) if std is not None and method == "model" else None
        yield Pair(method, STACK, normal(stack), reference, tuple(slices), std=spread)


def pairs(
    config: ModelConfig,
    truth: Study | Phantom,
    missing: Sequence[str],
    result: Result,
    regression: LinearRegression | None = None,
) -> Iterator[Pair]:
    """`compare_brain` or `compare_heart` of a complete study and what was made of it without its missing elements."""
    truth = as_study(config, truth)
    volumes = {name: volume.data for name, volume in result.study.volumes.items()}
    if config.task == "cardiac":
        axis, slices = _axis(truth.volumes[STACK]), missing_slices(config, truth, missing)
        stacks = [truth.volumes[STACK].data, volumes[STACK], result.std.get(STACK)]
        whole, made, std = (None if x is None else np.moveaxis(x, axis, 2) for x in stacks)
        assert whole is not None and made is not None
        return compare_heart(whole, slices, made, std=std)
    images = {name: truth.volumes[name].data for name in config.elements}
    upright = Orientation.to_ras(truth.reference.affine)
    intensity = intensity_of(result.record)
    return compare_brain(images, missing, volumes, intensity, regression, std=result.std, orientation=upright)


def compare(
    config: ModelConfig,
    truth: Study | Phantom,
    missing: Sequence[str],
    result: Result,
    regression: LinearRegression | None = None,
) -> Iterator[tuple[str, dict[str, float]]]:
    """Method and metrics of `pairs`."""
    return ((pair.method, pair.measure()) for pair in pairs(config, truth, missing, result, regression))


def intensity_of(record: Mapping[str, Any]) -> tuple[float, float]:
    """What 0 and 1 of a synthesised volume are in the file, from its record: the reference's range."""
    geometry = record["geometry"]
    first = next(iter(geometry["intensity"].values()))
    return first["low"], first["high"]


def reconstruct(model: Synthesizer, prepared: Prepared) -> Iterator[tuple[str, str, dict[str, float]]]:
    """Element ("stack" for a heart, whose slabs are decoded together), method and metrics of a complete study that the
    tokenizer encodes and decodes, on the model's grid (Table 6): as it is and by way of the codebook."""
    import torch

    engine: Any = model.engine
    vae, limit = engine.tokenizer, engine.max_memory
    device = vae.latent_mean.device
    joint = model.config.task == "cardiac"
    with torch.no_grad():
        z = vae.encode(torch.from_numpy(prepared.images[None]).to(device), limit)
        for method, latent in (("as it is", z), ("nearest codes", vae.quantise(z)[0])):
            found = vae.decode(latent, joint, limit)[0, :, 0].float().clamp(0, 1).cpu().numpy()
            truth = prepared.images[:, 0]
            if joint:
                found, truth = (np.concatenate(list(x), axis=-1)[None] for x in (found, truth))
            names = ("stack",) if joint else model.config.elements
            for name, a, b in zip(names, found, truth, strict=True):
                yield name, method, measure(a, b, mask=None if joint else np.any(truth, axis=0))


# ------------------------------------------------------------------------------------------------- evaluation


class Scores:
    """Metrics of methods, collected under a key (missing count or pattern)."""

    def __init__(self) -> None:
        self._values: dict[str, dict[str, list[tuple[str | None, dict[str, float]]]]] = {}

    def add(self, key: str, method: str, values: dict[str, float], subject: str | None = None) -> None:
        """subject: whose image it is; None: nobody else's."""
        self._values.setdefault(key, {}).setdefault(method, []).append((subject, values))

    def summary(self) -> dict[str, Any]:
        """key -> method -> metric -> mean and standard deviation (n - 1) over the subjects, each the mean of its
        images, and the number of both."""
        return {
            key: {method: self._over_subjects(rows) for method, rows in methods.items()}
            for key, methods in self._values.items()
        }

    @staticmethod
    def _over_subjects(rows: list[tuple[str | None, dict[str, float]]]) -> dict[str, Any]:
        people: dict[Any, list[dict[str, float]]] = {}
        for i, (subject, values) in enumerate(rows):
            people.setdefault(i if subject is None else subject, []).append(values)
        out: dict[str, Any] = {"images": len(rows), "subjects": len(people)}
        for metric in rows[0][1]:
            means = [np.mean([values[metric] for values in images]) for images in people.values()]
            out[metric] = {
                "mean": float(np.mean(means)),
                "sd": float(np.std(means, ddof=1)) if len(means) > 1 else 0.0,
            }
        return out


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


def evaluate(
    model: Synthesizer,
    cohort: Cohort | None = None,
    *,
    subjects: int = 16,
    first_seed: int = HELD_OUT,
    steps: int | None = None,
    seed: int = 0,
    patterns: int | None = None,
    fit_subjects: int = 32,
    progress: Progress | None = None,
    solver: str | None = None,
    samples: int = 1,
    networks: Networks | None = None,
) -> dict[str, Any]:
    """Evaluate on a cohort (None: `subjects` held-out phantoms from `first_seed` on); JSON-able.

    patterns: at most that many missing patterns per count (None: all). fit_subjects: how many training subjects of the
    cohort the regression baseline is fitted on. progress: called with studies done and studies in all. samples: with
    more than one their mean is measured, and how well their spread tells its error. networks: for FID, FVD and LPIPS.
    Raises CopeditError where no study of the cohort can be used.
    """
    config = model.config
    cohort = cohort or Phantoms(config, subjects, first_seed)
    wanted = [p for ps in missing_patterns(config, patterns).values() for p in ps]
    by_count, by_pattern, reconstruction, every = Scores(), Scores(), Scores(), Scores()
    heads, calibration = Heads(), Calibration()
    regression = fit_regression(config, wanted, fit_subjects, cohort) if config.task == "brain" else None
    mislabel = {"studies": 0, "caught": 0, "false_alarms": 0}  # T2 named FLAIR
    seconds, done, people, studies, impossible = 0.0, 0, set(), [], []
    for count, (subject, truth, prepared) in enumerate(cohort):
        people.add(subject)
        studies.append(truth.name)
        if networks:
            networks.next_subject()
        for element, method, values in reconstruct(model, prepared):
            reconstruction.add(element, method, values, subject)
            if config.task == "brain":
                every.add("all", method, values, subject)
        for tried, missing in enumerate(wanted, 1):
            if config.task == "cardiac" and not missing_slices(config, truth, missing):
                impossible.append({"study": truth.name, "missing": "+".join(missing)})
                continue
            start = time.perf_counter()
            result = model.synthesize(
                incomplete(config, truth, missing), steps=steps, seed=seed, solver=solver, samples=samples
            )
            seconds += time.perf_counter() - start
            heads.add(result.perception, missing)
            number = str(len(missing))
            for pair in pairs(config, truth, missing, result, regression):
                values = pair.measure()
                if networks:
                    values |= networks.distances(pair)
                    networks.add(number, pair, first=pair.method == "model")
                if pair.std is not None:
                    where = pair.where()
                    calibration.add((pair.image - pair.truth)[where], pair.std[where], samples)
                by_count.add(number, pair.method, values, subject)
                by_pattern.add("+".join(missing), pair.method, values, subject)
            done += 1
            if progress:
                progress(count * len(wanted) + tried, cohort.studies * len(wanted))
        if {"t2", "flair"} < set(config.elements):
            honest = model.perceive(incomplete(config, truth, ["t2"]))
            renamed = model.perceive(incomplete(config, truth, ["t2"], {"flair": "t2"}))
            mislabel["studies"] += 1
            mislabel["caught"] += "flair" in misnamed(renamed)
            mislabel["false_alarms"] += bool(misnamed(honest))
    about = cohort.about()
    if not done:
        first = f" ({cohort.skipped[0].reason})" if cohort.skipped else ""
        raise CopeditError(
            f"{about['data']}: no study could be evaluated on{first}; `copedit train check-data` says why"
        )
    return {
        "model": config.name,
        "task": config.task,
        "subjects": len(people),
        **about,
        "studies": studies,
        "impossible": impossible,
        "steps": config.diffusion.steps if steps is None else steps,
        "solver": config.diffusion.solver if solver is None else solver,
        "seed": seed,
        "samples": samples,
        "seconds_per_study": seconds / done,
        "by_count": by_count.summary(),
        "by_pattern": by_pattern.summary(),
        "frechet": networks.summary() if networks else {},
        "networks": {name: str(path) if path else None for name, path in networks.files.items()} if networks else {},
        "reconstruction": reconstruction.summary() | every.summary(),
        "quantise": config.tokenizer.quantise,
        "calibration": calibration.summary(),
        "heads": heads.summary(),
        "mislabel": mislabel if mislabel["studies"] else None,
    }


def sweep(
    model: Synthesizer,
    cohort: Cohort | None = None,
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
    config = model.config
    cohort = cohort or Phantoms(config, subjects, first_seed)
    wanted = [p for ps in missing_patterns(config, patterns).values() for p in ps]
    settings = [(solver, n) for n in sorted(set(steps), reverse=True) for solver in ("dpm2m", "ddim")]
    scores, seconds, done, people = Scores(), dict.fromkeys(settings, 0.0), 0, set()
    for count, (subject, truth, _) in enumerate(cohort):
        people.add(subject)
        for tried, missing in enumerate(wanted, 1):
            if config.task == "cardiac" and not missing_slices(config, truth, missing):
                continue
            study = incomplete(config, truth, missing)
            best = None
            for solver, n in settings:
                start = time.perf_counter()
                result = model.synthesize(study, steps=n, seed=seed, solver=solver)
                seconds[solver, n] += time.perf_counter() - start
                volumes = np.stack([result.study.volumes[name].data for name in sorted(result.study.synthetic)])
                best = volumes if best is None else best
                low, high = intensity_of(result.record)
                converged = min(psnr(volumes, best, high - low), 100.0)
                for method, values in compare(config, truth, missing, result):
                    if method == "model":
                        scores.add(f"{solver} {n}", method, values | {"converged": converged}, subject)
            done += 1
            if progress:
                progress(count * len(wanted) + tried, cohort.studies * len(wanted))
    if not done:
        raise CopeditError(f"{cohort.about()['data']}: no study could be evaluated on")
    found = scores.summary()
    return {
        "model": config.name,
        "task": config.task,
        "subjects": len(people),
        **cohort.about(),
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
