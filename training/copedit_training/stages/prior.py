"""Fitting a model's informed prior (`copedit_rt.prior`, of hearts `prior_heart`) to its training images: minutes on one
core."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from copedit_rt.prior import Prior, features, views
from copedit_rt.prior_heart import FEATURES, Class, SlicePrior, blurs
from copedit_rt.prior_heart import features as slice_features
from copedit_rt.task import Task
from copedit_training.data.prepared import draw_observed

VOXELS = 4096  # of each study
HIDDEN = (96, 96)
STEPS, BATCH, LR = 6000, (64, 64), 3e-3  # studies and voxels of each in a step
NEAR, STRIDE = 22, 2  # voxels in the plane: how far from the heart's centre, and every which one, is fitted
BORDERED = 0.35  # share of the stacks that are seen a second time with a border of zeros
ENDS, MIDDLE, SLICES = 0.8, 0.3, 0.4  # shares of the runs at an end, of the others, and of their slices that are fitted
RIDGE, FLOOR = 1e-4, 1e-3  # of the sum of squares; of a slice's mean squared error, whose inverse is its weight
TOP_UP = 100  # slices

Centres = Sequence[tuple[float, float] | None]


def fit_prior(
    images: np.ndarray,
    seed: int = 0,
    shares: np.ndarray | None = None,
    steps: int = STEPS,
    progress: Callable[[int, int], None] | None = None,
) -> Prior:
    """The fill with the least squared error on images [studies, m, 1, H, W, D], over all missing patterns.

    shares [studies]: how often each study is drawn (None: all alike). Half of the voxels are drawn evenly from what
    any image of a study shows, half in proportion to their distance from its mean grey, so that what is rare (fluid,
    lesions, vessels) counts.
    """
    rng = np.random.default_rng(seed)
    local, quantiles, truth = [], [], []
    for i, study in enumerate(images):
        near, whole = views(study[:, 0].astype(np.float32))
        chosen = _choose(near[:, 0], rng)
        local.append(near.reshape(*near.shape[:2], -1)[..., chosen].astype(np.float16))
        truth.append(local[-1][:, 0].T)
        quantiles.append(whole)
        if progress:
            progress(i + 1, len(images))
    return _train(np.stack(local), np.stack(quantiles), np.stack(truth), rng, shares, steps)


def _choose(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """VOXELS indices into the grid of images [m, H, W, D]."""
    where = np.flatnonzero((images > 0).any(0))
    values = images.reshape(len(images), -1)[:, where]
    far = np.abs(values - values.mean(1, keepdims=True)).max(0) + 1e-6
    even = rng.choice(where, VOXELS // 2)
    return np.concatenate((even, rng.choice(where, VOXELS // 2, p=far / far.sum())))


def _rows(local: np.ndarray, quantiles: np.ndarray, observed: np.ndarray) -> np.ndarray:
    return features(local.astype(np.float32), quantiles, observed)


def _train(
    local: np.ndarray,
    quantiles: np.ndarray,
    truth: np.ndarray,
    rng: np.random.Generator,
    shares: np.ndarray | None,
    steps: int,
) -> Prior:
    studies, m = local.shape[:2]
    chance = None if shares is None else shares / shares.sum()
    patterns = draw_observed(rng, 256, m, Task.BRAIN).numpy()
    chosen = rng.integers(studies, size=len(patterns))
    some = [_rows(local[i][..., :64], quantiles[i], p) for i, p in zip(chosen, patterns, strict=True)]
    sample = np.concatenate(some)
    mean, scale = sample.mean(0), 1 / (sample.std(0) + 1e-3)
    generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
    net = _perceptron(sample.shape[1], m, generator)
    optimizer = torch.optim.Adam(net.parameters(), LR)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LR * 0.5 * (1 + math.cos(math.pi * step / steps))
        chosen = rng.choice(studies, BATCH[0], p=chance)
        observed = draw_observed(rng, BATCH[0], m, Task.BRAIN).numpy()
        voxels = rng.integers(0, local.shape[-1], (BATCH[0], BATCH[1]))
        x = np.concatenate(
            [_rows(local[i][..., v], quantiles[i], p) for i, v, p in zip(chosen, voxels, observed, strict=True)]
        )
        y = np.concatenate([truth[i][v] for i, v in zip(chosen, voxels, strict=True)]).astype(np.float32)
        missing = torch.from_numpy(np.repeat(~observed, BATCH[1], axis=0))
        error: Tensor = (net(torch.from_numpy((x - mean) * scale)) - torch.from_numpy(y)).square()
        loss = error[missing].mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    weights = {"mean": mean.astype(np.float32), "scale": scale.astype(np.float32)}
    for i, layer in enumerate(x for x in net if isinstance(x, nn.Linear)):
        weights |= {f"w{i}": layer.weight.detach().numpy().T.copy(), f"b{i}": layer.bias.detach().numpy().copy()}
    return Prior(weights)


def _perceptron(inputs: int, outputs: int, generator: torch.Generator) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in (*HIDDEN, outputs):
        layer = nn.Linear(inputs, width)
        nn.init.normal_(layer.weight, std=math.sqrt(2 / inputs), generator=generator)
        nn.init.zeros_(layer.bias)
        layers += [layer, nn.ReLU()]
        inputs = width
    nn.init.constant_(layers[-2].bias, 0.4)  # type: ignore[arg-type]
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
