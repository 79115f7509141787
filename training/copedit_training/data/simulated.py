"""Simulated studies of brains: an anatomy of a folder of label maps, seen by a scanner that is drawn anew each time.

    simulator = Simulator(Path("labels"), shape=(96, 112, 48), spacing=(2.0, 2.0, 4.0))
    study = simulator.study(7)

The numbers that are drawn come from numpy's generator, whatever the device, so that a seed is the same patient and the
same protocol everywhere; only the noise comes from the device's own generator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from copedit_rt.errors import CopeditError
from copedit_training.data import physics
from copedit_training.data.anatomy import (
    INDEX,
    VERSION,
    Disease,
    Draw,
    HeadMap,
    axes_of,
    draw,
    load_map,
    noise_block,
    read_folder,
    read_map,
    save_map,
    smooth_field,
)

STRIPPED = 0.65  # share of studies whose skull is off


@dataclass(frozen=True)
class Simulated:
    """One simulated study. images: name -> float32 [X, Y, Z] >= 0, RAS order, scanner units, on the simulator's device;
    labels: uint8 [X, Y, Z]; about: what was drawn, for reports."""

    images: dict[str, Tensor]
    labels: Tensor
    spacing: tuple[float, float, float]
    stripped: bool
    about: dict[str, object]

    def affine(self) -> np.ndarray:
        """Voxel index to RAS millimetres, float64 [4, 4], the origin in the centre of the volume."""
        out = np.diag([*self.spacing, 1.0])
        out[:3, 3] = [-0.5 * (n - 1) * s for n, s in zip(self.labels.shape, self.spacing, strict=True)]
        return out


class Simulator:
    """Draws studies from the label maps of a folder.

    Parameters
    ----------
    folder: see `anatomy.read_folder`.
    elements: names out of `physics.CONTRASTS`.
    shape, spacing: the wanted grid and mm of its voxels.
    stripped: the share of studies without a skull, exactly 0 outside the brain.
    disease: how often there are plaques and tumours.
    device: where volumes are kept and computed.
    cache: a folder for prepared maps (about 30 MB each), which take seconds each to prepare; none if None.
    maps: which of the folder's maps to use, all if None, so that some can be held out.

    Raises
    ------
    CopeditError: an unknown element, or a folder that holds no label maps or broken ones.
    """

    def __init__(
        self,
        folder: Path,
        elements: Sequence[str] = ("t1", "t1ce", "t2", "flair"),
        shape: Sequence[int] = (96, 112, 48),
        spacing: Sequence[float] = (2.0, 2.0, 4.0),
        stripped: float = STRIPPED,
        disease: Disease = Disease(),
        device: str | torch.device = "cpu",
        cache: Path | None = None,
        maps: Sequence[int] | None = None,
    ):
        unknown = [name for name in elements if name not in physics.CONTRASTS]
        if unknown:
            raise CopeditError(f"{unknown[0]} cannot be simulated; choose from {', '.join(physics.CONTRASTS)}")
        x, y, z = (float(s) for s in spacing)
        self.elements, self.shape, self.spacing = tuple(elements), tuple(int(n) for n in shape), (x, y, z)
        self.stripped, self.disease, self.cache = stripped, disease, cache
        self.device = torch.device(device)
        anatomies = read_folder(Path(folder))
        self.files = anatomies.maps if maps is None else tuple(anatomies.maps[i] for i in maps)
        self.lesions = [(mask.to(self.device), voxel) for mask, voxel in anatomies.lesions]
        self.tubes = torch.from_numpy(noise_block()).to(self.device)
        self._heads: dict[int, HeadMap] = {}

    def head(self, index: int) -> HeadMap:
        """A prepared map, read when it is first wanted."""
        if index not in self._heads:
            self._heads[index] = self._load(self.files[index]).to(self.device)
        return self._heads[index]

    def _load(self, path: Path) -> HeadMap:
        if self.cache is None:
            return read_map(path)
        stored = self.cache / f"{path.name.split('.')[0]}-{path.stat().st_size}-{VERSION}.npz"
        if not stored.exists():
            self.cache.mkdir(parents=True, exist_ok=True)
            temporary = stored.with_suffix(".tmp.npz")
            save_map(read_map(path), temporary)
            temporary.replace(stored)
        return load_map(stored)

    @torch.no_grad()
    def study(self, seed: int) -> Simulated:
        """The study of a seed."""
        rng = np.random.default_rng(seed)
        which = int(rng.integers(len(self.files)))
        stripped = bool(rng.random() < self.stripped)
        anatomy = draw(
            self.head(which), self.lesions, self.tubes, rng, self.shape, self.spacing, stripped, self.disease
        )
        tissues = physics.draw_tissues(rng, anatomy.age)
        protocols = self._protocols(rng, tissues)
        clean, box = self._clean(anatomy, protocols, rng)
        images = {}
        whole = _volume(anatomy.mask, anatomy)
        mask = whole[box]
        occupied = None if stripped else _volume(1 - anatomy.fractions[:, INDEX["air"]], anatomy) > 0
        gain = float(np.exp(rng.uniform(np.log(100), np.log(2000))))
        cover = self._cover(whole > 0 if occupied is None else occupied, stripped, rng)
        for (name, (_, sequence)), volume in zip(protocols.items(), clean, strict=True):
            images[name] = self._image(name, sequence, volume, mask, box, occupied, gain, rng) * cover()
        about = {"map": self.files[which].name, "age": anatomy.age, "field": tissues.field}
        about |= {name: sequence for name, (_, sequence) in protocols.items()}
        return Simulated(images, anatomy.labels(), self.spacing, stripped, about)

    def _protocols(
        self, rng: np.random.Generator, tissues: physics.Tissues
    ) -> dict[str, tuple[physics.Tissues, physics.Protocol]]:
        """Tissues and a sequence per element; T1 with gadolinium is mostly the same sequence as without."""
        enhanced = physics.with_gadolinium(tissues, rng)
        out: dict[str, tuple[physics.Tissues, physics.Protocol]] = {}
        for name in self.elements:
            own = enhanced if name == "t1ce" else tissues
            sequence = physics.draw_sequence(name, rng, tissues)
            if name == "t1ce" and "t1" in out and rng.random() < 0.6:
                sequence = out["t1"][1]
            out[name] = (own, sequence)
        return out

    def _clean(
        self, anatomy: Draw, protocols: dict[str, tuple[physics.Tissues, physics.Protocol]], rng: np.random.Generator
    ) -> tuple[Tensor, tuple[slice, ...]]:
        """Signed signals over white matter's, float32 [elements, x, y, z], in the box that is not empty."""
        rows = []
        for tissues, sequence in protocols.values():
            signals = physics.signal_with_texture(tissues, sequence)
            rows.append(signals / max(abs(signals[0, INDEX["white"]]), 1e-6))
        table = torch.from_numpy(np.concatenate(rows).astype(np.float32)).to(self.device)
        values = (anatomy.fractions @ table.T).view(-1, len(rows), 1 + len(physics.FIELDS))
        out = values[..., 0].clone()
        axes = axes_of(self.shape, self.spacing)
        for i, length in enumerate(physics.FIELDS):
            field = smooth_field(rng, axes, length, 1, self.device).reshape(-1)[anatomy.voxels]
            out += values[..., 1 + i] * field.clamp(-2.5, 2.5)[:, None]
        box = _box(anatomy) if anatomy.stripped else (slice(None),) * 3
        return torch.stack([_volume(column, anatomy)[box] for column in out.T]), box

    def _cover(self, tissue: Tensor, stripped: bool, rng: np.random.Generator) -> Callable[[], Tensor]:
        """What draws, for one image after the other, the part of the grid that it shows, bool [Y, Z]: two in three
        heads end about the base of the brain, as axial slices do (26 of 5.5 mm, 143 mm), some without crown or face.

        Real heads seldom have a neck; perception that has been fitted on heads that all have one does not carry over to
        other hospitals."""
        u, (_, dy, dz) = rng.uniform, self.spacing
        shown = torch.ones(self.shape[1:], dtype=torch.bool, device=tissue.device)
        there = tissue.any(0).nonzero()
        if not len(there):
            return lambda: shown
        front, top = ((int(last) + 1) * mm for last, mm in zip(there.amax(0), (dy, dz), strict=True))
        crown = top + u(-15, 5) if rng.random() < (0.1 if stripped else 0.4) else np.inf
        height = u(85, 130) if stripped else u(105, 165)
        low = top - height if rng.random() < (0.15 if stripped else 0.65) else -np.inf
        face = not stripped and rng.random() < 0.35
        depth, chin = u(10, 35), top - u(75, 110)
        y, z = (torch.arange(n, device=tissue.device) * mm for n, mm in zip(self.shape[1:], (dy, dz), strict=True))
        if face:
            shown &= (y[:, None] < front - depth) | (z > chin)

        def cover() -> Tensor:
            a, b = rng.normal(0, 4, 2)
            return shown & (z >= low + a) & (z < crown + b)

        return cover

    def _image(
        self,
        name: str,
        sequence: physics.Protocol,
        clean: Tensor,
        mask: Tensor,
        box: tuple[slice, ...],
        occupied: Tensor | None,
        gain: float,
        rng: np.random.Generator,
    ) -> Tensor:
        scan = physics.draw_scan(rng, name, occupied is None)
        own = gain * float(np.exp(rng.normal(0, 0.5)))
        image = own * physics.acquire(clean, scan, self.spacing, sequence.magnitude, rng)
        if scan.floor:
            tissue = image[(mask if occupied is None else occupied) > 0.5]
            image = (image - scan.floor * _darkest(tissue)).clamp(min=0)
        if occupied is not None:
            return image * occupied if scan.silent_air else image
        out = torch.zeros(self.shape, device=image.device)
        out[box] = image * mask
        return out


def _darkest(values: Tensor) -> Tensor:
    """The 3rd percentile of grey values [N]: fluid, or in T2 the darkest of the tissue."""
    return values.kthvalue(max(1, int(0.03 * len(values))))[0] if len(values) else values.new_zeros(())


def _volume(values: Tensor, anatomy: Draw) -> Tensor:
    out = torch.zeros(int(np.prod(anatomy.shape)), device=values.device)
    out[anatomy.voxels] = values
    return out.view(*anatomy.shape)


def _box(anatomy: Draw) -> tuple[slice, ...]:
    """The smallest box around the voxels that are kept, with two voxels more on each side."""
    kept = anatomy.voxels[anatomy.mask > 0]
    if not len(kept):
        return (slice(None),) * 3
    _, ny, nz = anatomy.shape
    index = (
        torch.div(kept, ny * nz, rounding_mode="floor"),
        torch.div(kept, nz, rounding_mode="floor") % ny,
        kept % nz,
    )
    return tuple(
        slice(max(0, int(i.min()) - 2), min(n, int(i.max()) + 3)) for i, n in zip(index, anatomy.shape, strict=True)
    )
