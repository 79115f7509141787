"""Fitting a model's informed prior (`copedit_rt.prior`, of hearts `prior_heart`) to its training images: minutes on one
core."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from copedit_rt.config import ModelConfig
from copedit_rt.prior import Prior, views
from copedit_rt.prior_heart import FEATURES, Class, SlicePrior, blurs
from copedit_rt.prior_heart import features as slice_features
from copedit_training.data.patients import Patient, varied
from copedit_training.data.prepared import model_images
from copedit_training.stages.progress import counted
from copedit_training.stages.settings import TokenizerSettings

VOXELS = 4096  # of each study
JITTER = 0.08  # of quantiles: a protocol is more than its quantiles, and without it simulated ones are learnt by heart
PHANTOMS = 40  # with their left and right exchanged as many again
VIEWS, PATIENTS = 24, 0.15  # of each patient; share of the draws that are patients'
HIDDEN = (192, 192)
STEPS, BATCH, LR, DECAY = 8000, 4096, 3e-3, 0.01  # voxels in a step
BRIGHT, BRIGHT_HIDDEN, BRIGHT_STEPS = 0.9, 32, 0.4  # grey value; width of the layer that tells it; share of the steps
NEAR, STRIDE = 22, 2  # voxels in the plane: how far from the heart's centre, and every which one, is fitted
BORDERED = 0.35  # share of the stacks that are seen a second time with a border of zeros
ENDS, MIDDLE, SLICES = 0.8, 0.3, 0.4  # shares of the runs at an end, of the others, and of their slices that are fitted
RIDGE, FLOOR = 1e-4, 1e-3  # of the sum of squares; of a slice's mean squared error, whose inverse is its weight
TOP_UP = 100  # slices

Centres = Sequence[tuple[float, float] | None]


@dataclass(frozen=True)
class _Sample:
    """Voxels of a study: their `views` local [VOXELS, m, LOCAL] and place [VOXELS, PLACE] (float16) and quantiles
    [m, quantiles], the elements that it has [m], and how often it is drawn."""

    local: np.ndarray
    place: np.ndarray
    quantiles: np.ndarray
    there: np.ndarray
    share: float

    @classmethod
    def of(cls, images: np.ndarray, there: np.ndarray, share: float, rng: np.random.Generator) -> _Sample:
        """Of images [m, H, W, D]: half of the voxels drawn evenly from what any of them shows, half in proportion to
        their distance from the mean grey, so that what is rare (fluid, lesions, vessels) counts."""
        seen = views(images.astype(np.float32))
        where = np.flatnonzero((images > 0).any(0))
        values = seen.local[:, 0].reshape(len(images), -1)[:, where]
        far = np.abs(values - values.mean(1, keepdims=True)).max(0) + 1e-6
        chosen = np.concatenate((rng.choice(where, VOXELS // 2), rng.choice(where, VOXELS // 2, p=far / far.sum())))
        local, place = (np.moveaxis(x, -1, 0).astype(np.float16) for x in seen.at(chosen))
        return cls(local, place, seen.quantiles, there, share)


class _Pool:
    """The voxels of all studies."""

    def __init__(self, samples: Sequence[_Sample]):
        self.local, self.place, self.quantiles, self.there = (
            np.stack([getattr(sample, name) for sample in samples]) for name in ("local", "place", "quantiles", "there")
        )
        shares = np.array([sample.share for sample in samples])
        self.share = shares / shares.sum()

    def draw(self, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows of `features` [count, inputs], values [count, m] and which of them are asked for [count, m].

        Each row is a voxel of any study with a missing pattern of its own: of the elements that are there, how many are
        missing is uniform, then which.
        """
        study = rng.choice(len(self.share), count, p=self.share)
        voxel = rng.integers(0, self.local.shape[1], count)
        local = self.local[study, voxel].astype(np.float32)
        quantiles = self.quantiles[study]
        quantiles = np.clip(quantiles + JITTER * rng.standard_normal(quantiles.shape, np.float32), 0, 1)
        there = self.there[study]
        order = np.where(there, rng.random(there.shape), 2).argsort(1).argsort(1)
        asked = there & (order < rng.integers(1, there.sum(1))[:, None])
        seen = there & ~asked
        rows = [(x * seen[..., None]).reshape(count, -1) for x in (local, quantiles)]
        return np.concatenate((*rows, seen, self.place[study, voxel]), axis=1, dtype=np.float32), local[..., 0], asked


def phantoms_of(config: ModelConfig, settings: TokenizerSettings) -> list[np.ndarray]:
    """The phantoms [m, 1, H, W, D] that the settings mix in."""
    return [model_images(config, seed) for seed in range(PHANTOMS)] if settings.phantoms_share else []


def fit(
    config: ModelConfig,
    settings: TokenizerSettings,
    images: np.ndarray,
    centres: Centres | None = None,
    patients: Sequence[Patient] = (),
    phantoms: Sequence[np.ndarray] = (),
) -> Prior | SlicePrior:
    """The prior of a model, as its settings of stage I say; images and what may stand beside them: see `fit_prior` and,
    of hearts, `fit_slice_prior`."""
    if config.task.joint:
        return fit_slice_prior(images, centres, settings.seed)
    shares = settings.patients_share, settings.phantoms_share
    with torch.enable_grad():
        return fit_prior(images, settings.seed, patients, shares[0], phantoms, shares[1], settings.prior_steps)


def fit_prior(
    images: np.ndarray,
    seed: int = 0,
    patients: Sequence[Patient] = (),
    share: float = PATIENTS,
    phantoms: Sequence[np.ndarray] = (),
    phantoms_share: float = 0.0,
    steps: int = STEPS,
) -> Prior:
    """The fill with the least squared error on images [studies, m, 1, H, W, D], over all missing patterns.

    patients: real studies that are mixed in with this share of the draws, `VIEWS` varied views of each
    (`patients.varied`); of what one lacks nothing is learnt. Those with fewer than two elements are left out.
    phantoms: further studies [m, 1, H, W, D], with a share of their own.
    """
    rng = np.random.default_rng(seed)
    real = [patient for patient in patients if patient.there.sum() > 1]
    share, phantoms_share = share if real else 0.0, phantoms_share if len(phantoms) else 0.0
    samples, every = [], np.ones(images.shape[1], bool)
    with counted("reading for the prior", "study") as progress:
        for done, study in enumerate(images, 1):
            samples.append(_Sample.of(study[:, 0], every, (1 - share - phantoms_share) / len(images), rng))
            progress(done, len(images))
    samples += [_Sample.of(study[:, 0], every, phantoms_share / len(phantoms), rng) for study in phantoms]
    for patient in real:
        shown = (varied(patient, rng, view) for view in range(VIEWS))
        samples += [_Sample.of(view, patient.there, share / len(real) / VIEWS, rng) for view in shown]
    return _train(samples, rng, steps)


def _train(samples: Sequence[_Sample], rng: np.random.Generator, steps: int) -> Prior:
    """First what the voxels are, then on the same hidden layers the chance that they are bright."""
    pool = _Pool(samples)
    x, y, _ = pool.draw(4 * BATCH, rng)
    mean, scale = x.mean(0), 1 / (x.std(0) + 1e-3)
    generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
    net = _perceptron((x.shape[1], *HIDDEN, y.shape[1]), 0.4, generator)

    def squared(x: np.ndarray, y: np.ndarray) -> Tensor:
        return (net(torch.from_numpy((x - mean) * scale)) - torch.from_numpy(y)).square()

    with counted("fitting the prior", "step") as progress:
        _descend(net, squared, pool, rng, steps, progress)
    weights = {"mean": mean.astype(np.float32), "scale": scale.astype(np.float32), **_layers(net, "w", "b")}
    prior = Prior(weights)
    chances = _perceptron((HIDDEN[-1], BRIGHT_HIDDEN, y.shape[1]), -3.0, generator)

    def crossed(x: np.ndarray, y: np.ndarray) -> Tensor:
        bright = torch.from_numpy((y > BRIGHT).astype(np.float32))
        return F.binary_cross_entropy_with_logits(chances(torch.from_numpy(prior.hidden(x))), bright, reduction="none")

    with counted("fitting the prior, what is bright", "step") as progress:
        _descend(chances, crossed, pool, rng, math.ceil(BRIGHT_STEPS * steps), progress)
    return Prior(weights | _layers(chances, "v", "c"))


def _descend(
    net: nn.Module,
    error: Callable[[np.ndarray, np.ndarray], Tensor],
    pool: _Pool,
    rng: np.random.Generator,
    steps: int,
    progress: Callable[[int, int], None],
) -> None:
    """Train a network by its error [N, m] on rows of features and their values, where they are asked for."""
    optimizer = torch.optim.AdamW(net.parameters(), LR, weight_decay=DECAY)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LR * 0.5 * (1 + math.cos(math.pi * step / steps))
        x, y, asked = pool.draw(BATCH, rng)
        loss = error(x, y)[torch.from_numpy(asked)].mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        progress(step + 1, steps)


def _layers(net: nn.Sequential, weight: str, bias: str) -> dict[str, np.ndarray]:
    """A perceptron's weights [inputs, outputs] and biases, by these letters and the number of the layer."""
    found: dict[str, np.ndarray] = {}
    for i, layer in enumerate(x for x in net if isinstance(x, nn.Linear)):
        found |= {
            f"{weight}{i}": layer.weight.detach().numpy().T.copy(),
            f"{bias}{i}": layer.bias.detach().numpy().copy(),
        }
    return found


def _perceptron(widths: Sequence[int], bias: float, generator: torch.Generator) -> nn.Sequential:
    """bias: of the last layer."""
    layers: list[nn.Module] = []
    for inputs, width in pairwise(widths):
        layer = nn.Linear(inputs, width)
        nn.init.normal_(layer.weight, std=math.sqrt(2 / inputs), generator=generator)
        nn.init.zeros_(layer.bias)
        layers += [layer, nn.ReLU()]
    nn.init.constant_(layers[-2].bias, bias)  # type: ignore[arg-type]
    return nn.Sequential(*layers[:-1])


def stack_of(images: np.ndarray) -> np.ndarray:
    """The stack [H, W, N] that slabs [m, 1, H, W, D] are of: without the copies of slices that fill the grid."""
    stack = np.concatenate(list(images[:, 0].astype(np.float32)), axis=-1)
    new = (stack[..., 1:] != stack[..., :-1]).any((0, 1))
    return stack[..., np.concatenate(([True], new))]


def fit_slice_prior(images: np.ndarray, centres: Centres | None = None, seed: int = 0) -> SlicePrior:
    """The fill of missing slices with the least squared error, relative to interpolation's, near the hearts of
    images [studies, m, 1, H, W, D], over runs of missing slices of every length and place.

    centres [studies]: of the heart in the plane, in voxels (None: the grid's own). Some stacks come again with a border
    of zeros. Base and apex need not be exchanged: `features` treat a stack and its reverse alike.
    """
    rng = np.random.default_rng(seed)
    sums: dict[Class, _Sums] = {}
    for i, study in enumerate(images):
        stack = stack_of(study)
        known = centres[i] if centres else None
        centre = np.array(known if known else [n / 2 for n in stack.shape[:2]]).round().astype(int)
        for shown in (stack, _bordered(stack, centre, rng)) if rng.random() < BORDERED else (stack,):
            for kind, given, truth in _samples(shown, centre, rng):
                sums[kind] = sums.get(kind, _Sums()) + _Sums.of(given.astype(np.float64), truth)
    classes = sorted(sums)
    return SlicePrior(np.array(classes, np.int32), np.array([_solved(sums, kind) for kind in classes], np.float32))


@dataclass(frozen=True)
class _Sums:
    """What least squares need of so many slices."""

    products: np.ndarray | float = 0.0
    answer: np.ndarray | float = 0.0
    slices: int = 0

    @classmethod
    def of(cls, given: np.ndarray, truth: np.ndarray) -> _Sums:
        weight = 1 / (np.mean(truth**2) + FLOOR) / len(truth)
        return cls(weight * given @ given.T, weight * given @ truth, 1)

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(self.products + other.products, self.answer + other.answer, self.slices + other.slices)


def _solved(sums: Mapping[Class, _Sums], kind: Class) -> np.ndarray:
    """The weights of a class, topped up with the mean of those about as far from the nearest slice, whatever their gap:
    few stacks are long enough for wide gaps, and weights of few slices make edges where there are none."""
    near = (x for other, x in sums.items() if other[0] == kind[0] and abs(other[1] - kind[1]) <= 1)
    alike = sum(near, _Sums())
    own, share = sums[kind], TOP_UP / alike.slices
    products = own.products + share * alike.products
    ridge = RIDGE * np.trace(products) * np.eye(FEATURES)
    return np.linalg.solve(products + ridge, own.answer + share * alike.answer)


def _bordered(stack: np.ndarray, centre: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A stack that shows only a rectangle of at least NEAR about the heart."""
    masked = np.zeros_like(stack)
    sides = [
        slice(*(max(0, c + sign * int(rng.integers(min(NEAR, n // 2), n // 2 + 1))) for sign in (-1, 1)))
        for c, n in zip(centre, stack.shape[:2], strict=True)
    ]
    masked[tuple(sides)] = stack[tuple(sides)]
    return masked


def _samples(
    stack: np.ndarray, centre: np.ndarray, rng: np.random.Generator
) -> Iterator[tuple[Class, np.ndarray, np.ndarray]]:
    """Class, features [FEATURES, voxels] and what interpolation lacks [voxels], near the heart, of missing slices."""
    near = tuple(slice(max(0, int(c) - NEAR), int(c) + NEAR, STRIDE) for c in centre)
    seen = blurs(stack)[:, *near]
    n = stack.shape[-1]
    for length in range(1, n):
        for start in range(n - length + 1):
            if rng.random() > (ENDS if start in (0, n - length) else MIDDLE):
                continue
            missing = range(start, start + length)
            kept = [index for index in range(n) if index not in missing]
            for index in missing:
                if rng.random() <= SLICES:
                    kind, given = slice_features(seen[..., kept], kept, index)
                    yield kind, given.reshape(FEATURES, -1), (seen[0, ..., index] - given[0]).ravel()
