"""How good is a model: PSNR, SSIM and MAE on held-out subjects beside honest baselines, per missing pattern.

Everything is measured on the file's grid, but for the tokenizer's reconstruction, which is measured on the model's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from copedit_rt.config import Solver
from copedit_rt.errors import CopeditError
from copedit_rt.inspection import contradictions
from copedit_rt.perception import Perception
from copedit_rt.task import Task
from copedit_training.evaluation.baselines import (
    LinearRegression,
)
from copedit_training.evaluation.beside import Beside, Differences, deviation
from copedit_training.evaluation.calibration import Calibration
from copedit_training.evaluation.compare import (
    compare,
    in_order_of,
    incomplete,
    intensity_of,
    made_of,
    normalise,
    pairs,
    possible,
)
from copedit_training.evaluation.metrics import measure, psnr
from copedit_training.evaluation.subjects import Cohort, Phantoms

if TYPE_CHECKING:
    from copedit_rt.config import ModelConfig
    from copedit_rt.images.prepare import Prepared
    from copedit_rt.synthesizer import Synthesizer
    from copedit_training.evaluation.features import Networks

Progress = Callable[[int, int], None]


def fit_regression(
    config: ModelConfig, patterns: Sequence[Sequence[str]], subjects: int, cohort: Cohort | None = None
) -> LinearRegression | None:
    """The regression baseline for some missing patterns, fitted on training subjects of the cohort (phantoms); None
    where there are none."""
    regression = LinearRegression(config.elements)
    training = (cohort or Phantoms(config)).training(subjects)
    complete = (
        {name: normalise(in_order_of(study.reference, volume)) for name, volume in study.volumes.items()}
        for study in training
    )
    regression.fit(complete, [[e for e in config.elements if e not in missing] for missing in patterns])
    return regression if regression.fitted else None


def missing_patterns(config: ModelConfig, limit: int | None = None) -> dict[int, list[tuple[str, ...]]]:
    """Missing subsets per count 1..m-1: brain every one, heart runs of consecutive slabs.

    limit: at most that many per count, evenly picked.
    """
    patterns = {}
    for count in range(1, len(config.elements)):
        every = config.task.patterns(config.elements, count)
        picked = range(len(every)) if limit is None else np.linspace(0, len(every) - 1, min(limit, len(every))).round()
        patterns[count] = [every[int(i)] for i in picked]
    return patterns


def reconstruct(model: Synthesizer, prepared: Prepared) -> Iterator[tuple[str, str, dict[str, float]]]:
    """Element ("stack" for a heart, whose slabs are decoded together), method and metrics of a complete study that the
    tokenizer encodes and decodes, on the model's grid (Table 6): as it is and by way of the codebook."""
    import torch

    engine: Any = model.engine
    vae, limit = engine.tokenizer, engine.max_memory
    device = vae.latent_mean.device
    joint = model.config.task.joint
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
        """key -> method -> metric -> mean and standard deviation (n - 1; None of a single one) over the subjects, each
        the mean of its images, and the number of both."""
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
            means = [float(np.mean([values[metric] for values in images])) for images in people.values()]
            out[metric] = {"mean": float(np.mean(means)), "sd": deviation(means)}
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
    cohort: Cohort,
    *,
    steps: int | None = None,
    seed: int = 0,
    patterns: int | None = None,
    fit_subjects: int = 32,
    progress: Progress | None = None,
    solver: str | None = None,
    samples: int = 1,
    networks: Networks | None = None,
    beside: Mapping[str, Beside] | None = None,
    budget: Mapping[str, Any] | None = None,
    seeds: int = 1,
) -> dict[str, Any]:
    """Evaluate on a cohort; JSON-able.

    patterns: at most that many missing patterns per count (None: all). fit_subjects: how many training subjects of the
    cohort the regression baseline is fitted on. progress: called with studies done and studies in all. samples: with
    more than one their mean is measured, and how well their spread tells its error. networks: for FID, FVD and LPIPS.
    beside: other methods, by name, which get the same incomplete studies and seeds; budget: what the model has cost, as
    `Beside.budget`. seeds: so many, from `seed` on, and
    scores are of all of them; the Fréchet distances are of the first.
    Raises CopeditError where no study of the cohort can be used.
    """
    config = model.config
    wanted = [p for ps in missing_patterns(config, patterns).values() for p in ps]
    by_count, by_pattern, reconstruction, every = Scores(), Scores(), Scores(), Scores()
    heads, calibration, differences = Heads(), Calibration(), Differences()
    others, taken = dict(beside or {}), dict.fromkeys(beside or {}, 0.0)  # seconds
    regression = None if config.task.joint else fit_regression(config, wanted, fit_subjects, cohort)
    mislabel = {"studies": 0, "caught": 0, "false_alarms": 0}  # T2 named FLAIR
    seconds, done, people, studies, impossible = 0.0, 0, set(), [], []
    for count, (subject, truth, prepared) in enumerate(cohort):
        people.add(subject)
        studies.append(truth.name)
        if networks:
            networks.next_subject()
        for element, method, values in reconstruct(model, prepared):
            reconstruction.add(element, method, values, subject)
            if not config.task.joint:
                every.add("all", method, values, subject)
        for tried, missing in enumerate(wanted, 1):
            if not possible(config, truth, missing):
                impossible.append({"study": truth.name, "missing": "+".join(missing)})
                continue
            study, number = incomplete(config, truth, missing), str(len(missing))
            for turn in range(seeds):
                start = time.perf_counter()
                result = model.synthesize(study, steps=steps, seed=seed + turn, solver=solver, samples=samples)
                seconds += time.perf_counter() - start
                if not turn:
                    heads.add(result.perception, missing)
                made = {}
                for name, other in others.items():
                    start = time.perf_counter()
                    made[name] = other.fill(study, seed + turn, turn)
                    taken[name] += time.perf_counter() - start
                for pair in pairs(config, truth, missing, result, regression, made):
                    values = pair.measure()
                    if networks:
                        values |= networks.distances(pair)
                        if not turn:
                            networks.add(number, pair, first=pair.method == "model")
                    if pair.std is not None:
                        where = pair.where()
                        calibration.add((pair.image - pair.truth)[where], pair.std[where], samples)
                    by_count.add(number, pair.method, values, subject)
                    by_pattern.add("+".join(missing), pair.method, values, subject)
                    differences.add(number, pair.method, turn, subject, values)
            done += 1
            if progress:
                progress(count * len(wanted) + tried, cohort.studies * len(wanted))
        if {"t2", "flair"} < set(config.elements):
            honest = model.perceive(incomplete(config, truth, ["t2"]))
            renamed = model.perceive(incomplete(config, truth, ["t2"], {"flair": "t2"}))
            mislabel["studies"] += 1
            mislabel["caught"] += "flair" in misnamed(renamed)
            mislabel["false_alarms"] += bool(misnamed(honest))
    about, costs = cohort.about(), {name: other.budget for name, other in others.items()}
    if others:
        costs, taken = {"model": budget or {}, **costs}, {"model": seconds, **taken}
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
        "seeds": seeds,
        "samples": samples,
        "seconds_per_study": seconds / (done * seeds),
        "by_count": by_count.summary(),
        "by_pattern": by_pattern.summary(),
        "beside": {name: {**cost, "seconds_per_study": taken[name] / (done * seeds)} for name, cost in costs.items()},
        "differences": differences.summary(list(others)) if others else {},
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
    cohort: Cohort,
    *,
    steps: Sequence[int],
    seed: int = 0,
    patterns: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Quality and seconds a study of every solver at several numbers of steps; JSON-able.

    Studies and noise are the same for all. "converged": PSNR of all that was synthesised against what the second-order
    solver makes in the most steps, the best estimate of where all of them lead. The rest as in `evaluate`.
    """
    if 0 in steps:
        raise CopeditError("--steps 0: there is no solver to compare; leave 0 out, `copedit evaluate` measures it")
    config = model.config
    wanted = [p for ps in missing_patterns(config, patterns).values() for p in ps]
    settings = [(solver, n) for n in sorted(set(steps), reverse=True) for solver in reversed(get_args(Solver))]
    scores, seconds, done, people = Scores(), dict.fromkeys(settings, 0.0), 0, set()
    for count, (subject, truth, _) in enumerate(cohort):
        people.add(subject)
        for tried, missing in enumerate(wanted, 1):
            if not possible(config, truth, missing):
                continue
            study = incomplete(config, truth, missing)
            best = None
            for solver, n in settings:
                start = time.perf_counter()
                result = model.synthesize(study, steps=n, seed=seed, solver=solver)
                seconds[solver, n] += time.perf_counter() - start
                volumes = made_of(result.study)
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
    return [f.element for f in contradictions(perception, {}, task=Task.BRAIN) if f.kind == "identity"]
