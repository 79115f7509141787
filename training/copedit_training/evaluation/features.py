"""How real images look to networks that the user brings: Frechet distances (FID, FVD) and LPIPS.

The networks are files of `torch.jit.save` (TorchScript, as published FID and I3D weights are). Their code runs in
torch's own interpreter, which knows no Python; what of it reads or writes files is refused. Files of
`torch.export.save` are not taken, as reading one may unpickle it. What each is called with, all float32 in 0..1, grey
repeated in three channels; any resizing and scaling is its own matter:

- fid: slices [N, 3, H, W] -> features [N, F] (or [N, F, 1, 1]);
- fvd: volumes [N, 3, D, H, W], D through the slices -> features [N, F];
- lpips: two sets of slices [N, 3, H, W] -> their distances, N numbers.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from copedit_rt.checkpoint import digest
from copedit_rt.errors import CopeditError
from copedit_rt.files import is_file
from copedit_training.evaluation.compare import Pair

BATCH = 16  # slices at a time
_FILES = re.compile(r"\b(save|from_file)\s*\(")  # operators of TorchScript that read or write files
PLANES = {"axial": 2, "coronal": 1, "sagittal": 0}  # of a volume in RAS order: the axis that its slices are taken along


class Gaussian:
    """Mean and covariance (n - 1 in the denominator) of features [N, F] that come in parts; float64."""

    def __init__(self) -> None:
        self.count = 0
        self._sum: Any = 0.0
        self._products: Any = 0.0

    def add(self, features: np.ndarray) -> None:
        x = np.asarray(features, np.float64)
        self.count += len(x)
        self._sum = self._sum + x.sum(0)
        self._products = self._products + x.T @ x

    @property
    def mean(self) -> np.ndarray:
        return self._sum / self.count

    @property
    def covariance(self) -> np.ndarray:
        return (self._products - self.count * np.outer(self.mean, self.mean)) / (self.count - 1)


def frechet_distance(a: Gaussian, b: Gaussian) -> float | None:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) of two sets of features (Heusel et al. 2017), in float64.

    The trace of the root is the sum of the roots of the eigenvalues of A^(1/2) B A^(1/2), which is symmetric, so that
    fewer samples than features do no harm to it. None where a set has fewer than two samples.
    """
    if min(a.count, b.count) < 2:
        return None
    one, two = a.covariance, b.covariance
    values, vectors = np.linalg.eigh(one)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    shared = np.sqrt(np.linalg.eigvalsh(root @ two @ root).clip(0)).sum()
    gap = a.mean - b.mean
    return float(gap @ gap + np.trace(one) + np.trace(two) - 2 * shared)


def load_network(path: Path, option: str, device: torch.device) -> Callable[..., Tensor]:
    """A TorchScript file. Raises CopeditError for a file that is missing, another, or works with files itself."""
    if not is_file(path):
        raise CopeditError(f"{option} {path}: no such file; give a TorchScript file (torch.jit.save), or leave it out")
    try:
        if words := _FILES.search(_code(path)):
            raise CopeditError(f"{option} {path}: its code calls {words[1]}, which works with files; use another")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated, but what weights are published as
            return torch.jit.load(str(path), map_location=device).eval()
    except CopeditError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CopeditError(f"{option} {path}: not a TorchScript file ({reason}); write one with torch.jit") from error


def _code(path: Path) -> str:
    """The text of all code in a TorchScript file."""
    with zipfile.ZipFile(path) as archive:
        texts = [archive.read(name) for name in archive.namelist() if "/code/" in name and name.endswith(".py")]
    if not texts:
        raise ValueError("it holds no code of TorchScript's")
    return "\n".join(text.decode("utf-8", "replace") for text in texts)


def grey(x: np.ndarray) -> Tensor:
    """Images [N, ...] as [N, 3, ...] float32."""
    images = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))[:, None]
    return images.expand(-1, 3, *images.shape[2:])


class Networks:
    """The networks that were given, and the features of all that they have seen so far."""

    def __init__(
        self,
        fid: Path | None = None,
        fvd: Path | None = None,
        lpips: Path | None = None,
        device: torch.device | str = "cpu",
    ):
        self.device = torch.device(device)
        self.files = {"fid": fid, "fvd": fvd, "lpips": lpips}
        self._networks = {
            name: load_network(path, f"--{name}-network", self.device) for name, path in self.files.items() if path
        }
        self._seen: dict[tuple[str, str, str], Gaussian] = {}  # (key, method or "truth", plane or "volume")
        self._truths: dict[Any, dict[str, np.ndarray]] = {}  # features of this subject's own images

    def again(self) -> Networks:
        """The same networks, which have seen nothing."""
        other = copy.copy(self)
        other._seen, other._truths = {}, {}
        return other

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of each file."""
        return {name: digest(path) for name, path in self.files.items() if path}

    def next_subject(self) -> None:
        """The truths that come are others'."""
        self._truths.clear()

    def distances(self, pair: Pair) -> dict[str, float]:
        """{"lpips": mean over the axial slices that show something}; nothing without that network."""
        if "lpips" not in self._networks:
            return {}
        image, truth = (_slices(pair, x, PLANES["axial"]) for x in (pair.image, pair.truth))
        found = [
            self._run("lpips", len(a), grey(a), grey(b)).reshape(len(a))
            for a, b in zip(_batches(image), _batches(truth), strict=True)
        ]
        return {"lpips": float(np.concatenate(found).mean())}

    def add(self, key: str, pair: Pair, first: bool) -> None:
        """Note the features of a synthesised image under key, and (first: of its methods) those of its truth."""
        found = self._features(pair, pair.image)
        for place, features in found.items():
            self._seen.setdefault((key, pair.method, place), Gaussian()).add(features)
        if first and found:
            name = (pair.element, tuple(pair.slices or ()))
            if name not in self._truths:
                self._truths[name] = self._features(pair, pair.truth)
            for place, features in self._truths[name].items():
                self._seen.setdefault((key, "truth", place), Gaussian()).add(features)

    def summary(self) -> dict[str, Any]:
        """key -> method -> fid (mean over the planes, and each), fvd, and the slices and volumes they rest on."""
        out: dict[str, Any] = {}
        for (key, method, place), fake in self._seen.items():
            if method == "truth":
                continue
            distance = frechet_distance(fake, self._seen[key, "truth", place])
            row = out.setdefault(key, {}).setdefault(method, {})
            if place == "volume":
                row |= {"fvd": distance, "volumes": fake.count}
            else:
                row.setdefault("planes", {})[place] = distance
                row["slices"] = row.get("slices", 0) + fake.count
        for row in (row for methods in out.values() for row in methods.values()):
            if planes := row.get("planes"):
                known = [value for value in planes.values() if value is not None]
                row["fid"] = float(np.mean(known)) if len(known) == len(planes) else None
        return out

    def _features(self, pair: Pair, image: np.ndarray) -> dict[str, np.ndarray]:
        found = {}
        if "fid" in self._networks:
            for plane in PLANES if pair.slices is None else ("axial",):
                parts = [self._run("fid", len(x), grey(x)) for x in _batches(_slices(pair, image, PLANES[plane]))]
                found[plane] = np.concatenate(parts)
        if "fvd" in self._networks:
            volume = pair.upright(image).transpose(2, 0, 1)[None]
            found["volume"] = self._run("fvd", 1, grey(volume))
        return found

    @torch.no_grad()
    def _run(self, name: str, count: int, *images: Tensor) -> np.ndarray:
        """What a network makes of `count` images: [count, F]."""
        try:
            out = self._networks[name](*(x.to(self.device) for x in images))
            found = out.float().cpu().numpy().reshape(count, -1)
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
            shapes = " and ".join(str(list(x.shape)) for x in images)
            raise CopeditError(f"--{name}-network {self.files[name]} cannot take {shapes}: {reason}") from error
        if not np.isfinite(found).all():
            raise CopeditError(f"--{name}-network {self.files[name]} returned NaN or infinity")
        return found


def _slices(pair: Pair, image: np.ndarray, axis: int) -> np.ndarray:
    """The slices [N, H, W] along an axis that count and in which the truth shows something; all, if it does in none."""
    image, truth = (np.moveaxis(pair.upright(x), axis, 0) for x in (image, pair.truth))
    if pair.slices is not None:
        image, truth = image[list(pair.slices)], truth[list(pair.slices)]
    shown = truth.any(axis=(1, 2))
    return image[shown] if shown.any() else image


def _batches(images: np.ndarray) -> Sequence[np.ndarray]:
    return np.array_split(images, math.ceil(len(images) / BATCH))


def said(files: Mapping[str, Path | None]) -> list[str]:
    """A line of the report per network: the file, or that it was not given."""
    titles = {"fid": "FID", "fvd": "FVD", "lpips": "LPIPS"}
    return [
        f"{titles[name]}: network {path.name}." if path else f"{titles[name]}: off, no --{name}-network was given."
        for name, path in files.items()
    ]
