"""Fitting a model's informed prior (`copedit_rt.prior`) to its training images: minutes on one core."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from copedit_rt.prior import Prior, features, views
from copedit_training.data.prepared import draw_observed

VOXELS = 4096  # of each study
HIDDEN = (96, 96)
STEPS, BATCH, LR = 6000, (64, 64), 3e-3  # studies and voxels of each in a step


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
    patterns = draw_observed(rng, 256, m, False).numpy()
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
        observed = draw_observed(rng, BATCH[0], m, False).numpy()
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
