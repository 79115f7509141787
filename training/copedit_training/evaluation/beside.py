"""Other methods beside a model on the same studies: what is asked of them, and whether a difference is one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from copedit_rt.images.study import Study

Volumes = Mapping[str, np.ndarray]  # what was missing, on the study's grid and in its units
Fill = Callable[[Study, int], Volumes]  # an incomplete study, and the seed of the noise
METRICS = ("psnr", "ssim", "mae", "psnr_inside", "ssim_inside")


@dataclass(frozen=True)
class Beside:
    """A method beside the model. runs: trained with several seeds, or one. budget: what it has cost, for the report."""

    runs: Sequence[Fill]
    budget: Mapping[str, Any] = field(default_factory=dict)

    def fill(self, study: Study, seed: int, turn: int) -> Volumes:
        """What a run makes of a study; turn: the how many-th seed this is, for which the runs take turns."""
        return self.runs[turn % len(self.runs)](study, seed)


def deviation(values: Sequence[float] | np.ndarray) -> float | None:
    """Standard deviation of a sample (n - 1); None of a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def paired(a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    """Difference a - b of [seeds, subjects] on the same subjects: mean, standard error over subjects (after averaging
    over seeds), and the mean under each seed.

    "resolved" is whether the mean is more than two standard errors from zero and all seeds (at least two) agree.
    """
    difference = a - b
    each, per_subject = difference.mean(1), difference.mean(0)
    mean, n = float(per_subject.mean()), len(per_subject)
    error = float(per_subject.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan
    agree = len(each) > 1 and bool((np.sign(each) == np.sign(mean)).all())
    return {
        "mean": mean,
        "standard_error": None if math.isnan(error) else error,
        "per_seed": each.tolist(),
        "resolved": bool(agree and n > 1 and abs(mean) > 2 * error),
    }


class Differences:
    """Metrics of methods under each seed, of each subject (the mean of its images), and how they differ from the
    model's."""

    def __init__(self) -> None:
        self._values: dict[tuple[str, str], dict[tuple[int, str], list[Mapping[str, float]]]] = {}

    def add(self, key: str, method: str, turn: int, subject: str, values: Mapping[str, float]) -> None:
        """key: missing count; turn: of the seeds."""
        self._values.setdefault((key, method), {}).setdefault((turn, subject), []).append(values)

    def summary(self, methods: Sequence[str]) -> dict[str, Any]:
        """key -> method -> metric -> `paired` of the method and the model."""
        keys = dict.fromkeys(key for key, _ in self._values)
        return {key: {method: self._of(key, method) for method in methods} for key in keys}

    def _of(self, key: str, method: str) -> dict[str, Any]:
        own, model = (self._values[key, name] for name in (method, "model"))
        first = next(iter(own.values()))[0]
        return {metric: paired(_table(own, metric), _table(model, metric)) for metric in METRICS if metric in first}


def _table(values: Mapping[tuple[int, str], Sequence[Mapping[str, float]]], metric: str) -> np.ndarray:
    """[seeds, subjects]."""
    turns, people = dict.fromkeys(turn for turn, _ in values), dict.fromkeys(who for _, who in values)
    return np.array([[np.mean([row[metric] for row in values[turn, who]]) for who in people] for turn in turns])
