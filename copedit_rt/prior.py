"""An informed prior: what is missing, filled voxel by voxel before any network of the model has looked at it.

The denoiser of a model with a prior is given the encoded fill as a second latent of each missing element and corrects
it (`MDiT3D.predict`). A fill is a small function of the observed images, fitted once (`copedit_training.stages.prior`)
and kept in `prior.safetensors`; NumPy alone computes it, for every engine alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from copedit_rt.config import ModelConfig
from copedit_rt.errors import CopeditError
from copedit_rt.files import write_atomically
from copedit_rt.images.prepare import Prepared

PRIOR = "prior.safetensors"
WINDOWS = (3, 7, 15, 31)  # voxels; of the local means and deviations
LOCAL = 1 + 2 * len(WINDOWS)  # numbers of an image at a voxel
PLACE = 2 + len(WINDOWS)  # and of where it is in the head
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)  # of what an image shows; they tell one protocol from another
ROWS = 1 << 16  # voxels at a time: activations stay in the cache
WHOLE = (slice(None),) * 3

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Fill:
    """A study with what was missing filled.

    images [m, 1, H, W, D]: of all elements. stack [H, W, slices of the file]: hearts, what the slabs were taken from.
    bright [m, 1, H, W, D]: brains, the chance that a voxel is among the brightest of its image; 0 where it is observed.
    """

    images: Array
    stack: Array | None = None
    bright: Array | None = None


def read(folder: Path, shapes: Mapping[str, tuple[int | None, ...]], config: ModelConfig) -> dict[str, Array]:
    """The tensors of a model folder's prior, these of these shapes among them (None: any size).

    Raises CopeditError for a file that is missing, damaged or of another model.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = folder / PRIOR
    try:
        tensors: dict[str, Array] = load_file(path)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, ArithmeticError) as error:
        raise CopeditError(f"{path}: cannot be read ({error}); copy the model again") from error
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise CopeditError(f"{path}: tensor {name} holds NaN or infinity; copy the model again")
    for name, shape in shapes.items():
        there = tensors[name].shape if name in tensors else ()
        if len(there) != len(shape) or any(n not in (None, size) for n, size in zip(shape, there, strict=True)):
            raise CopeditError(
                f"{path}: is not of a {config.task} model with {len(config.elements)} elements; copy the model again"
            )
    return tensors


def write(folder: Path, tensors: Mapping[str, NDArray]) -> None:
    """The prior of a model folder."""
    from safetensors.numpy import save

    write_atomically(folder / PRIOR, save({name: np.ascontiguousarray(x) for name, x in tensors.items()}))


@cache
def _near(length: int, window: int) -> Array:
    """[length, length]: the mean over a window along an axis is the product with this."""
    index = np.arange(length)
    return (np.abs(index[:, None] - index) <= window // 2).astype(np.float32) / np.float32(window)


def box_mean(image: Array, window: int) -> Array:
    """The mean over window^3 voxels around each one [X, Y, Z]; voxels outside the image count as 0. Products of
    matrices are faster than cumulated sums and round less."""
    x, y, z = image.shape
    along = (_near(x, window) @ image.reshape(x, y * z)).reshape(image.shape)
    return np.asarray(_near(y, window) @ along @ _near(z, window))


def shown(image: Array) -> Array:
    """The quantiles of what an image shows, its voxels above 0; zeros where it shows nothing."""
    values = image[image > 0]
    return np.quantile(values, QUANTILES).astype(np.float32) if values.size else np.zeros(len(QUANTILES), np.float32)


@dataclass(frozen=True)
class Views:
    """What the fill looks at in images [m, X, Y, Z].

    local [m, LOCAL, X, Y, Z]: themselves, their local means and their local standard deviations. place [PLACE, X, Y,
    Z]: how far a voxel is to the side, to the front and up, -1 to 1 in what the images show, the side without a sign;
    and how much of the larger windows they show. quantiles [m, quantiles]: of what each shows.
    """

    local: Array
    place: Array
    quantiles: Array

    def at(self, where: NDArray[np.int64]) -> tuple[Array, Array]:
        """local [m, LOCAL, N] and place [PLACE, N] of voxels, by their flat indices [N]."""
        return self.local.reshape(*self.local.shape[:2], -1)[..., where], self.place.reshape(PLACE, -1)[:, where]


def views(images: Array) -> Views:
    """Of images [m, X, Y, Z] in 0..1; of one that shows nothing all is 0."""
    shows: NDArray[np.bool_] = np.asarray((images > 0).any(0))
    place = np.zeros((PLACE, *shows.shape), np.float32)
    for axis in range(3):
        extent = _extent(np.moveaxis(shows, axis, 0))
        along = np.linspace(-1, 1, extent.stop - extent.start, dtype=np.float32)
        np.moveaxis(place[axis], axis, 0)[extent] = (np.abs(along) if axis == 0 else along)[:, None, None]
    for i, window in enumerate(WINDOWS[1:], 3):
        place[i] = box_mean(np.asarray(shows, np.float32), window)
    local = np.zeros((len(images), LOCAL, *images.shape[1:]), np.float32)
    for image, numbers in zip(images, local, strict=True):
        if not image.any():
            continue
        numbers[0] = image
        for i, window in enumerate(WINDOWS, 1):
            numbers[i] = box_mean(image, window)
            spread = box_mean(image * image, window) - numbers[i] ** 2
            numbers[i + len(WINDOWS)] = np.sqrt(np.maximum(spread, 0))
    return Views(local, place, np.stack([shown(image) for image in images]))


def features(seen: Views, observed: NDArray[np.bool_], where: NDArray[np.int64]) -> Array:
    """One row a voxel [N, m (LOCAL + quantiles + 1) + PLACE] of these flat indices [N]; what is not observed [m] is 0
    in it, and not read."""
    local, place = seen.at(where)
    near = np.where(observed[:, None, None], local, np.float32(0)).reshape(-1, len(where))
    quantiles = np.where(observed[:, None], seen.quantiles, np.float32(0))
    whole = np.concatenate((quantiles.ravel(), observed), dtype=np.float32)
    return np.concatenate((near.T, np.broadcast_to(whole, (len(where), len(whole))), place.T), axis=1)


class Prior:
    """The fill of a brain's missing modalities: a perceptron on `features`, the same for every missing pattern."""

    def __init__(self, weights: Mapping[str, Array]):
        """weights: "mean" and "scale" of the features, "w0", "b0", "w1", ... of the layers [inputs, outputs]; where it
        tells chances of brightness, "v0", "c0", "v1", ... of those that do, on what the last layer is given."""
        self.weights = dict(weights)
        self.layers, self.bright = (
            [(weights[f"{w}{i}"], weights[f"{b}{i}"]) for i in range(sum(k[0] == w for k in weights))]
            for w, b in ("wb", "vc")
        )

    @classmethod
    def load(cls, folder: Path, config: ModelConfig) -> Prior:
        """Of a model folder. Raises CopeditError for a file that is missing, damaged or of another model."""
        m = len(config.elements)
        rows = m * (LOCAL + len(QUANTILES) + 1) + PLACE
        tensors = read(folder, {"mean": (rows,), "scale": (rows,)}, config)
        shapes: dict[str, tuple[int | None, ...]] = {}
        for w, b in ("wb", "vc"):
            count = sum(name.startswith(w) for name in tensors) or int(w == "w")
            widths = [rows, *(tensors.get(f"{b}{i}", np.empty(0)).size for i in range(count - 1)), m]
            shapes |= {f"{w}{i}": (widths[i], widths[i + 1]) for i in range(count)}
            shapes |= {f"{b}{i}": (widths[i + 1],) for i in range(count)}
            rows = widths[-2]
        return cls(read(folder, shapes, config))

    def save(self, folder: Path) -> None:
        """Into a model folder."""
        write(folder, self.weights)

    def fill_study(self, prepared: Prepared) -> Fill:
        """Of a brain."""
        images, missing = prepared.images.copy(), ~prepared.observed
        made = self._made(images, prepared.observed)
        images[missing] = made[0]
        if not self.bright:
            return Fill(images)
        bright = np.zeros_like(images)
        bright[missing] = made[1]
        return Fill(images, bright=bright)

    def hidden(self, rows: Array) -> Array:
        """What the last layer is given [N, width] for rows of `features`."""
        x = (rows - self.weights["mean"]) * self.weights["scale"]
        for weight, bias in self.layers[:-1]:
            x = np.maximum(x @ weight + bias, 0)
        return x

    def __call__(self, rows: Array) -> Array:
        """Images' values [N, m] in 0..1 of rows of `features`, and behind them in a prior that tells them the chances
        that the voxels are bright: [N, 2 m]."""
        x = self.hidden(rows)
        weight, bias = self.layers[-1]
        made = np.clip(x @ weight + bias, 0, 1)
        for weight, bias in self.bright[:-1]:
            x = np.maximum(x @ weight + bias, 0)
        for weight, bias in self.bright[-1:]:
            made = np.concatenate((made, 1 / (1 + np.exp(-(x @ weight + bias)))), axis=1)
        return made

    def fill(self, images: Array, observed: NDArray[np.bool_], within: tuple[slice, slice, slice] = WHOLE) -> Array:
        """Images of the missing elements [missing, 1, H, W, D]; 0 where no observed image shows anything.

        images [m, 1, H, W, D] in 0..1, observed [m]; images of missing elements are not read. within: of these only
        what lies here, as it is in the whole.
        """
        return self._made(images, observed, within)[0]

    def _made(self, images: Array, observed: NDArray[np.bool_], within: tuple[slice, slice, slice] = WHOLE) -> Array:
        """What `fill` says, and the chances of brightness if there are any [1 or 2, missing, 1, H, W, D]."""
        given = np.where(observed[:, None, None, None], images[:, 0], np.float32(0))
        wanted = np.concatenate([~observed] * (2 if self.bright else 1))
        out = np.zeros((int(wanted.sum()), *given.shape[1:]), np.float32)
        shows: NDArray[np.bool_] = np.asarray((given > 0).any(0))
        box = tuple(_extent(np.moveaxis(shows, axis, 0)) for axis in range(3))
        seen, asked = views(given[:, *box]), np.zeros_like(shows)
        asked[within] = shows[within]
        where = np.flatnonzero(asked[box])
        filled = np.zeros((len(out), asked[box].size), np.float32)
        for start in range(0, len(where), ROWS):
            some = where[start : start + ROWS]
            filled[:, some] = self(features(seen, observed, some))[:, wanted].T
        out[:, *box] = filled.reshape(len(out), *asked[box].shape)
        return out[:, *within].reshape(2 if self.bright else 1, -1, 1, *asked[within].shape)


def _extent(there: NDArray[np.bool_]) -> slice:
    """Along the first axis, from the first to the last of what is there."""
    found = np.flatnonzero(there.any(axis=tuple(range(1, there.ndim))))
    return slice(int(found[0]), int(found[-1]) + 1) if found.size else slice(0, 0)
