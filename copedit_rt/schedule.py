"""The noise schedule, the solvers' tables and the noise itself (Section 3.3, Appendix B.3). NumPy only."""

from __future__ import annotations

import hashlib
import typing
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np

from copedit_rt.config import DiffusionConfig, Solver
from copedit_rt.errors import CopeditError

PRIOR_ALONE = "prior"  # how a result was made that no sampler has touched, as a record has it

Array = typing.TypeVar("Array", bound=Any)


def alpha_bar(config: DiffusionConfig) -> np.ndarray:
    """Cumulative signal variance [train_steps], float64: betas linear in their square root ("scaled linear")."""
    betas = np.linspace(config.beta_start**0.5, config.beta_end**0.5, config.train_steps, dtype=np.float64) ** 2
    return np.cumprod(1.0 - betas)


def timesteps(config: DiffusionConfig, steps: int) -> np.ndarray:
    """The `steps` training timesteps that sampling visits, int64, descending.

    They end evenly below the one at which sampling starts ("trailing", Lin et al. 2024), so that it is the noisiest,
    and the step after the last lands on alpha-bar 1. Raises CopeditError unless 1 <= steps <= `most_steps`.
    """
    if not 1 <= steps <= config.most_steps:
        least = 0 if steps and not config.steps else 1  # without steps a prior fills in
        raise CopeditError(f"steps {steps}: must be between {least} and {config.most_steps}")
    return np.round(np.arange(steps, 0, -1) * (config.most_steps / steps)).astype(np.int64) - 1


def begun(config: DiffusionConfig, noise: Array, fill: Array | None = None) -> Array:
    """Where sampling starts: noise, or with a `start` below 1 the fill, noised as far as its timestep is; latents of a
    shape, of NumPy or torch."""
    if fill is None or config.start == 1:
        return noise
    kept = float(alpha_bar(config)[config.most_steps - 1])
    return kept**0.5 * fill + (1 - kept) ** 0.5 * noise


def ddim_table(config: DiffusionConfig, steps: int) -> np.ndarray:
    """Coefficients [steps, 2], float64: z <- a z + b x0 is a DDIM step with eta 0 (Song et al. 2021, eq. 12)."""
    now = alpha_bar(config)[timesteps(config, steps)]
    after = np.append(now[1:], 1.0)
    keep = np.sqrt((1 - after) / (1 - now))
    return np.stack((keep, np.sqrt(after) - keep * np.sqrt(now)), axis=1)


def solver_tables(config: DiffusionConfig, steps: int, solver: str | None = None) -> list[np.ndarray]:
    """What a step adds up, newest prediction first: a table [steps, 2] each, float64, applied one after the other.

    z <- a z + b x0 by the first with this step's prediction, then by the second with that of the step before. solver
    (None: the configuration's): "ddim", first order, or "dpm2m", DPM-Solver++(2M) (Lu et al. 2022), second order: x0 is
    extrapolated linearly from the last two predictions; its first step is DDIM's. Raises CopeditError for another one.

    Lu et al. extrapolate in log(signal / noise), in which the last step, to alpha-bar 1, is infinitely long: it falls
    back to first order, and so does the whole, as this schedule's noise variance ends linearly in t. Here x0 is linear
    in w = -log(alpha-bar), which ends at 0, and integrated exactly: second order up to the end.
    """
    first = ddim_table(config, steps)
    if solver is None:
        solver = config.solver
    if solver not in typing.get_args(Solver):
        raise CopeditError(f"solver {solver!r} is unknown; choose one of {', '.join(typing.get_args(Solver))}")
    if solver == "ddim":
        return [first]
    w = np.append(-np.log(alpha_bar(config)[timesteps(config, steps)]), 0.0)
    k = np.sqrt(np.expm1(w))  # noise over signal, with which x0 weighs 1 / k^2 in the exact solution
    weighted = 2 * np.arctan(k) - np.divide(w, k, out=np.zeros_like(k), where=k > 0)  # integral of w / k^2 up to k
    mean = (weighted[:-1] - weighted[1:]) * k[:-1] * k[1:] / (k[:-1] - k[1:])  # of w, over each step
    further = np.zeros(steps)  # how far beyond this prediction, in distances between the two, the step's x0 lies
    further[1:] = (mean - w[:-1])[1:] / np.diff(w[:-1])
    keep, rate = first.T
    return [np.stack((keep, rate * (1 + further)), axis=1), np.stack((np.ones(steps), -rate * further), axis=1)]


def step_coefficients(config: DiffusionConfig, steps: int, solver: str | None = None) -> np.ndarray:
    """`solver_tables` as the exported step takes them: [steps, 2, 2], float32; (1, 0) for a table that is not there."""
    tables = solver_tables(config, steps, solver)
    tables += [np.tile((1.0, 0.0), (steps, 1))] * (2 - len(tables))
    return np.stack(tables, axis=1).astype(np.float32)


def drawn(sampler: Mapping[str, Any]) -> str:
    """How a result was drawn, for people, by the "sampler" of its record."""
    if sampler.get("steps") == 0:
        return "no steps, the prior's fill as it is"
    return "{steps} steps of {method}, {samples} samples, seed {seed}".format_map(defaultdict(lambda: "?", sampler))


def noise(seed: int, study: str, element: str, shape: tuple[int, ...], sample: int = 0) -> np.ndarray:
    """Standard normal float32 noise that depends on nothing but its key.

    Counter-based (Philox) and drawn by numpy, so that a seed gives the same bits on every engine, device and batch.
    """
    plain = int(seed), str(study), str(element), int(sample)  # NumPy's numbers and texts have a repr of their own
    digest = hashlib.sha256(repr(plain).encode()).digest()
    key = np.frombuffer(digest[:16], dtype="<u8")
    return np.random.Generator(np.random.Philox(key=key)).standard_normal(shape, dtype=np.float32)
