"""Anatomies from label maps: read once, then drawn anew with every seed, as tissue fractions on the wanted grid.

A folder holds `synthseg/*.nii.gz`, whole-head maps with FreeSurfer's labels and extracerebral tissue 500-530 (published
with SynthSeg, Billot et al., Medical Image Analysis 2023, github.com/BBillot/SynthSeg, `data/training_label_maps`), and
perhaps `ms_lesions_mni/*.nii.gz`, lesion masks in MNI152 (Lesjak et al., Neuroinformatics 2017).

A draw paints lesions into a copy of one map, warps the voxels of the wanted grid into it, reads the tissue at several
points of each voxel and counts: partial volume comes from the fractions.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from copedit_rt.errors import CopeditError
from copedit_training.data.phantom import (
    BACKGROUND,
    CORE,
    CSF,
    DEEP_GREY,
    GREY,
    HYPERINTENSITY,
    OEDEMA,
    RIM,
    VESSEL,
    WHITE,
)

if TYPE_CHECKING:  # otherwise imported where a map is read
    import nibabel as nib

# Every tissue, with the labels of the maps that become it and the label it has in a study. Lesions have none in the
# maps but 25 and 57, FreeSurfer's white-matter lesions; fat, muscle, dura and sulcal vessels are told apart by place.
TISSUES: dict[str, tuple[tuple[int, ...], int]] = {
    "air": ((), BACKGROUND),
    "ventricle": ((4, 5, 14, 15, 43, 44, 72), CSF),
    "sulcus": ((24,), CSF),
    "cortex": ((3, 42), GREY),
    "white": ((2, 41, 85, 251, 252, 253, 254, 255), WHITE),
    "thalamus": ((10, 49), DEEP_GREY),
    "caudate": ((11, 26, 50, 58), DEEP_GREY),
    "putamen": ((12, 51), DEEP_GREY),
    "pallidum": ((13, 52), DEEP_GREY),
    "hippocampus": ((17, 18, 53, 54), GREY),
    "cerebellar grey": ((8, 47), GREY),
    "cerebellar white": ((7, 46), WHITE),
    "brainstem": ((16, 28, 60), WHITE),
    "plexus": ((31, 63, 136, 137, 163, 164), VESSEL),
    "artery": ((30, 62, 502), VESSEL),
    "vein": ((514,), VESSEL),
    "dura": ((), VESSEL),
    "fat": ((), BACKGROUND),
    "muscle": ((507, 508), BACKGROUND),
    "skin": ((511,), BACKGROUND),
    "bone": ((515,), BACKGROUND),
    "marrow": ((516,), BACKGROUND),
    "eye": ((506,), BACKGROUND),
    "mucosa": ((509,), BACKGROUND),
    "nerve": ((512, 530), BACKGROUND),
    "lesion": ((25, 57, 77), HYPERINTENSITY),
    "active lesion": ((), HYPERINTENSITY),
    "necrosis": ((), CORE),
    "solid tumour": ((), CORE),
    "rim": ((), RIM),
    "oedema": ((), OEDEMA),
}
NAMES = tuple(TISSUES)
INDEX = {name: i for i, name in enumerate(NAMES)}
STUDY_LABEL = np.array([label for _, label in TISSUES.values()], np.uint8)
_LESIONS = ("lesion", "active lesion", "necrosis", "solid tumour", "rim", "oedema")
_BRAIN = ("cortex", "white", "thalamus", "caudate", "putamen", "pallidum", "hippocampus", "cerebellar grey")
BRAIN = (*_BRAIN, "cerebellar white", "brainstem", "plexus", "ventricle", *_LESIONS)
INFILTRATED = ("white", "thalamus", "lesion", "brainstem", "oedema")  # where oedema spreads and small lesions lie

# Centres of structures in MNI152, mm, left side (|x| on the right), read off the Harvard-Oxford and MNI structural
# atlases (Desikan et al. 2006; Mazziotta et al. 2001) to about 2 mm: enough to lay lesion masks over a map.
_MNI = {
    (10, 49): (11, -18, 7),
    (11, 50): (13, 10, 11),
    (12, 51): (25, 2, 0),
    (13, 52): (19, -4, -1),
    (17, 53): (26, -22, -14),
    (18, 54): (23, -4, -18),
    (26, 58): (10, 12, -7),
    (8, 47): (24, -64, -35),
}
_MNI_MIDDLE = {16: (0, -29, -32)}
_STEP = 0.125  # mm a unit of the stored distances, which are clipped to about +-16 mm
_ZERO = 128
VERSION = 2  # of prepared maps
_UNKNOWN = 1000.0  # mm^3 of labels outside the table that a map may hold; they become air
_COARSE = 4.0  # mm of the maps of what is near the head and of the push of growing ventricles


@dataclass(frozen=True)
class HeadMap:
    """One label map, prepared. Volumes are [X, Y, Z] in RAS order, cropped to the head and 30 mm below the brain.

    tissue: uint8, an index of `NAMES`. hull, brain: uint8, signed distance to the brain with its sulci filled, and to
    the brain alone (128 at the surface, `_STEP` mm a unit, smaller inside). fluid: uint8, how much sulcal fluid there
    is around (255 all). ventricle: uint8, distance to the ventricles, `_STEP` mm a unit. head: uint8, near the head,
    every 4 mm. push: float32 [3, x, y, z], every 4 mm, where tissue goes when the ventricles grow by 1 mm.
    spots: float32 [n, 3], places in white matter, mm. spacing mm; brain_centre, head_centre: mm from the corner.
    to_mni: float64 [4, 4], mm from the corner to MNI152.
    """

    tissue: Tensor
    hull: Tensor
    brain: Tensor
    fluid: Tensor
    ventricle: Tensor
    head: Tensor
    push: Tensor
    spots: np.ndarray
    spacing: np.ndarray
    brain_centre: np.ndarray
    head_centre: np.ndarray
    to_mni: np.ndarray

    def to(self, device: torch.device) -> HeadMap:
        """The same on another device."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in values.items()}
        return HeadMap(**moved)


@dataclass(frozen=True)
class Anatomies:
    """What a folder holds: files of label maps, and lesion masks uint8 [X, Y, Z] with affines voxel <- MNI mm."""

    maps: tuple[Path, ...]
    lesions: tuple[tuple[Tensor, np.ndarray], ...]


def read_folder(folder: Path) -> Anatomies:
    """The label maps and lesion masks under `folder`.

    Raises CopeditError if there is no label map or a lesion mask cannot be read.
    """
    maps = tuple(sorted(folder.glob("synthseg/*.nii.gz")))
    if not maps:
        raise CopeditError(
            f"{folder} holds no label map: put whole-head maps with FreeSurfer labels into {folder / 'synthseg'} "
            f"as *.nii.gz, such as those published with SynthSeg"
        )
    return Anatomies(maps, tuple(_read_lesion(path) for path in sorted(folder.glob("ms_lesions_mni/*.nii.gz"))))


def _read(path: Path) -> nib.Nifti1Image:
    import nibabel as nib

    try:
        image = nib.as_closest_canonical(nib.load(path))
        np.asanyarray(image.dataobj)
    except (OSError, EOFError, ValueError, nib.filebasedimages.ImageFileError) as error:
        raise CopeditError(f"{path} cannot be read ({error}); remove it or copy it again") from error
    return image


def _read_lesion(path: Path) -> tuple[Tensor, np.ndarray]:
    image = _read(path)
    mask = np.asanyarray(image.dataobj) > 0
    return torch.from_numpy(mask.astype(np.uint8)), np.linalg.inv(image.affine)


# ------------------------------------------------------------------------------------------- preparing a map


def read_map(path: Path) -> HeadMap:
    """Prepares one label map, some seconds of CPU. Raises CopeditError if the file is no whole-head label map
    or holds unknown labels."""
    image = _read(path)
    values = np.asanyarray(image.dataobj)
    with np.errstate(invalid="ignore"):  # of infinity
        broken = values[values % 1 != 0]
    if broken.size:
        raise CopeditError(
            f"{path} is no label map (it holds {broken[0]:g}); resample it with nearest neighbour, or remove it"
        )
    labels = values.astype(np.int32)
    for first, cortex in ((1000, 3), (2000, 42)):  # its regions, of aparc+aseg
        labels[(labels >= first) & (labels < first + 36)] = cortex
    zooms = np.asarray(image.header.get_zooms()[:3], float)
    inside = np.isin(labels, [n for name in BRAIN for n in TISSUES[name][0]])
    if labels.ndim != 3 or inside.sum() * zooms.prod() < 2e5 or not np.isin(labels, (2, 41)).any():
        raise CopeditError(f"{path} holds no brain in FreeSurfer labels (2, 3, 41, 42 and so on); remove it")
    known = [n for numbers, _ in TISSUES.values() for n in numbers]
    unknown, counts = np.unique(labels[~np.isin(labels, (0, *known))], return_counts=True)
    if counts.sum() * zooms.prod() > _UNKNOWN:
        named = ", ".join(map(str, unknown[:8])) + ", ..." * (len(unknown) > 8)
        raise CopeditError(
            f"{path} holds {counts.sum() * zooms.prod() / 1000:.0f} ml of labels that are no known tissue's ({named}); "
            f"give them labels of FreeSurfer's aseg, or remove the map"
        )
    labels = _crop(labels, inside, zooms)
    return _prepare(labels, zooms)


def _crop(labels: np.ndarray, inside: np.ndarray, zooms: np.ndarray) -> np.ndarray:
    """The head from 30 mm below the brain on, with 4 mm of air around."""
    lowest = np.flatnonzero(inside.any((0, 1)))[0] - int(30 / zooms[2])
    labels = labels[:, :, max(0, lowest) :]
    used = ndimage.find_objects((labels > 0).astype(np.int8))[0]
    margin = np.ceil(4 / zooms).astype(int)
    even = [(m, m + (cut.stop - cut.start) % 2) for m, cut in zip(margin, used, strict=True)]
    return np.pad(labels[used], even)


def _prepare(labels: np.ndarray, zooms: np.ndarray) -> HeadMap:
    tissue = _tissues(labels, zooms)
    inside = np.isin(tissue, [INDEX[name] for name in BRAIN])
    distance = _signed_distance(inside, zooms)
    hull = _hull_distance(inside, zooms)
    fluid = ndimage.gaussian_filter((tissue == INDEX["sulcus"]).astype(np.float32), np.maximum(0.8 / zooms, 0.6))
    chambers = np.isin(tissue, (INDEX["ventricle"], INDEX["plexus"]))
    ventricle = _distance(chambers, zooms)
    extent = [np.flatnonzero(inside.any(axes))[[0, -1]] for axes in ((1, 2), (0, 2), (0, 1))]
    head = np.array(labels.shape) / 2
    white = np.argwhere(np.isin(tissue, (INDEX["white"], INDEX["lesion"])))
    places = np.random.default_rng(0).choice(len(white), min(len(white), 20000), replace=False)
    return HeadMap(
        torch.from_numpy(tissue),
        torch.from_numpy(_pack(hull)),
        torch.from_numpy(_pack(distance)),
        torch.from_numpy((fluid * 255).astype(np.uint8)),
        torch.from_numpy(np.clip(ventricle / _STEP, 0, 255).astype(np.uint8)),
        torch.from_numpy(_near(tissue, zooms)),
        torch.from_numpy(_push(ventricle, chambers, zooms)),
        (white[np.sort(places)] * zooms).astype(np.float32),
        zooms,
        np.array([e.mean() for e in extent]) * zooms,
        head * zooms,
        _to_mni(labels, zooms),
    )


def _tissues(labels: np.ndarray, zooms: np.ndarray) -> np.ndarray:
    """Tissue indices of a map: what the labels say, and fat, falx and dura by place."""
    table = np.zeros(1024, np.uint8)
    for i, (numbers, _) in enumerate(TISSUES.values()):
        table[list(numbers)] = i
    tissue = table[np.clip(labels, 0, 1023)]
    soft = labels == 507
    near_skin = _distance(labels == 511, zooms) < 6  # subcutaneous
    top = np.flatnonzero(np.isin(labels, (8, 47)).any((0, 1)))
    high = np.arange(labels.shape[2]) > (top[-1] if top.size else labels.shape[2] // 2)
    tissue[soft & (near_skin | high)] = INDEX["fat"]  # above the cerebellum soft tissue is scalp
    fluid = tissue == INDEX["sulcus"]
    skull = _distance(np.isin(tissue, (INDEX["bone"], INDEX["marrow"])), zooms) < 1.0
    tissue[fluid & skull] = INDEX["dura"]
    tissue[fluid & _falx(labels, zooms)] = INDEX["dura"]
    return tissue


def _falx(labels: np.ndarray, zooms: np.ndarray) -> np.ndarray:
    """Fluid as far from one hemisphere as from the other, above the ventricles."""
    left, right = (_distance(np.isin(labels, side), zooms) for side in ((2, 3), (41, 42)))
    third = np.flatnonzero(np.isin(labels, (14, 4, 43)).any((0, 1)))
    high = np.arange(labels.shape[2]) > (np.median(third) if third.size else labels.shape[2] // 2)
    return (np.abs(left - right) < 0.8) & (left + right < 12) & high


def _distance(inside: np.ndarray, zooms: np.ndarray) -> np.ndarray:
    """Mm to a structure, 0 in it, float32: measured at half the resolution, an eighth of the time."""
    half = torch.nn.functional.max_pool3d(torch.from_numpy(inside.astype(np.float32))[None], 2)[0].numpy()
    return _doubled(ndimage.distance_transform_edt(half == 0, 2 * zooms))


def _doubled(values: np.ndarray) -> np.ndarray:
    coarse = torch.from_numpy(values.astype(np.float32))[None, None]
    return torch.nn.functional.interpolate(coarse, scale_factor=2, mode="trilinear")[0, 0].numpy()


def _hull_distance(inside: np.ndarray, zooms: np.ndarray) -> np.ndarray:
    """Signed distance in mm to the brain closed by 8 mm, its sulci filled."""
    half = torch.nn.functional.avg_pool3d(torch.from_numpy(inside.astype(np.float32))[None], 2)[0].numpy() >= 0.5
    wide = ndimage.distance_transform_edt(~half, 2 * zooms) < 8
    return _doubled(_signed_distance(ndimage.distance_transform_edt(wide, 2 * zooms) > 8, 2 * zooms))


def _signed_distance(inside: np.ndarray, zooms: np.ndarray) -> np.ndarray:
    """Signed distance in mm, negative inside, zero half a voxel off the last voxel."""
    outer = ndimage.distance_transform_edt(~inside, zooms)
    half = 0.5 * float(np.mean(zooms))
    return np.where(inside, half - ndimage.distance_transform_edt(inside, zooms), outer - half).astype(np.float32)


def _pack(distance: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(distance / _STEP) + _ZERO, 0, 255).astype(np.uint8)


def _stride(zooms: np.ndarray) -> list[int]:
    return [max(1, round(_COARSE / z)) for z in zooms]


def _near(tissue: np.ndarray, zooms: np.ndarray) -> np.ndarray:
    """Whether there is head within a few mm, every 4 mm."""
    step = _stride(zooms)
    wide = ndimage.maximum_filter((tissue > 0).astype(np.uint8), [3 * s for s in step])
    return np.ascontiguousarray(wide[tuple(slice(None, None, s) for s in step)])


def _push(ventricle: np.ndarray, chambers: np.ndarray, zooms: np.ndarray) -> np.ndarray:
    """Towards the ventricles, of length 1 at their wall, fading with 15 mm outside and to nothing in their middle."""
    inner = _distance(~chambers, zooms)
    signed = ndimage.gaussian_filter(ventricle - inner, 2.0 / zooms)
    step = _stride(zooms)
    cut = tuple(slice(None, None, s) for s in step)
    slope = np.gradient(signed[cut], *(s * z for s, z in zip(step, zooms, strict=True)))
    fade = np.exp(-np.clip(ventricle[cut], 0, None) / 15)
    return np.stack([-g * fade for g in slope]).astype(np.float32)


def _to_mni(labels: np.ndarray, zooms: np.ndarray) -> np.ndarray:
    """Affine mm from the corner -> MNI152 by least squares over the centres of structures."""
    points, targets = [], []
    for pair, (x, y, z) in _MNI.items():
        for label, side in zip(pair, (-1, 1), strict=True):
            points.append((label, (side * x, y, z)))
    points += list(_MNI_MIDDLE.items())
    centres = []
    for label, target in points:
        found = np.argwhere(labels == label)
        if len(found):
            centres.append([*(found.mean(0) * zooms), 1])
            targets.append(target)
    out = np.eye(4)
    if len(centres) >= 6:
        out[:3] = np.linalg.lstsq(np.array(centres), np.array(targets, float), rcond=None)[0].T
    else:  # too little to go by: the centre of the brain in the centre of MNI152's
        out[:3, 3] = np.array([0.0, -17, 10]) - np.argwhere(labels > 0).mean(0) * zooms
    return out


def save_map(head: HeadMap, path: Path) -> None:
    """Writes a prepared map, uncompressed, to be read back with `load_map`."""
    values: dict[str, Any] = {f.name: getattr(head, f.name) for f in fields(head)}
    arrays: dict[str, Any] = {k: v.cpu().numpy() if isinstance(v, Tensor) else v for k, v in values.items()}
    np.savez(path, **arrays)


def load_map(path: Path) -> HeadMap:
    """Reads what `save_map` wrote."""
    plain = ("spots", "spacing", "brain_centre", "head_centre", "to_mni")
    with np.load(path, allow_pickle=False) as stored:
        values: dict[str, Any] = {k: stored[k] if k in plain else torch.from_numpy(stored[k]) for k in stored.files}
    return HeadMap(**values)


# ------------------------------------------------------------------------------------------------- fields


def smooth_field(
    rng: np.random.Generator, axes: Sequence[np.ndarray], length: float, channels: int, device: torch.device
) -> Tensor:
    """Smooth random fields, mean 0 and variance 1: float32 [channels, X, Y, Z].

    Gaussian bumps `length` mm wide on a lattice of `length` mm, their weights from `rng`; axes: mm along each axis.
    """
    knots = [np.arange(a[0] - 2 * length, a[-1] + 3 * length, length) for a in axes]
    weights = rng.standard_normal((channels, *(len(k) for k in knots)), dtype=np.float32) * np.float32(np.pi**-0.75)
    out = torch.from_numpy(weights).to(device)
    for axis, knot in zip(axes, knots, strict=True):  # each product takes a lattice axis and appends the sampled one
        basis = np.exp(-0.5 * ((knot[:, None] - axis) / length) ** 2).astype(np.float32)
        out = torch.tensordot(out, torch.from_numpy(basis).to(device), dims=([1], [0]))
    return out


def axes_of(shape: Sequence[int], spacing: Sequence[float]) -> list[np.ndarray]:
    """Millimetres of the voxels' centres along each axis, 0 in the middle of the grid."""
    return [(np.arange(n) - 0.5 * (n - 1)) * s for n, s in zip(shape, spacing, strict=True)]


def rotation(degrees: Sequence[float] | np.ndarray) -> np.ndarray:
    """Rotation matrix [3, 3] about x, then y, then z."""
    out = np.eye(3)
    for i, angle in enumerate(np.deg2rad(degrees)):
        j, k = (i + 1) % 3, (i + 2) % 3
        turn = np.eye(3)
        turn[j, j] = turn[k, k] = np.cos(angle)
        turn[j, k], turn[k, j] = -np.sin(angle), np.sin(angle)
        out = turn @ out
    return out


def noise_block(size: int = 96, seed: int = 0) -> np.ndarray:
    """Periodic tubes, uint8 [size, size, size] at 1 mm: the smaller, the nearer to the middle of a tube.

    Where two smooth random fields are both zero there are curves: a stand-in for small vessels in the sulci.
    """
    rng = np.random.default_rng(seed)
    pair = [ndimage.gaussian_filter(rng.standard_normal((size,) * 3), 3.5, mode="wrap") for _ in range(2)]
    return np.clip(np.hypot(*(f / f.std() for f in pair)) * 100, 0, 255).astype(np.uint8)


# ------------------------------------------------------------------------------------------------- lesions


@dataclass(frozen=True)
class Push:
    """Mass effect: tissue within about `radius` mm of `centre` (mm in the map) is moved outwards by up to `share`."""

    centre: np.ndarray
    radius: float
    share: float


class Painter:
    """Paints lesions into a copy of a map's tissues. Box by box, so that a small lesion costs little."""

    def __init__(self, head: HeadMap, rng: np.random.Generator):
        self.head, self.rng = head, rng
        self.tissue = head.tissue.clone()
        self.device = self.tissue.device
        self.host = torch.zeros(len(NAMES), dtype=torch.bool, device=self.device)
        self.host[[INDEX[name] for name in INFILTRATED]] = True
        self.brain = torch.zeros_like(self.host)
        self.brain[[INDEX[name] for name in _BRAIN + _LESIONS]] = True

    def _box(self, centre: np.ndarray, reach: float) -> tuple[slice, ...]:
        spacing, shape = self.head.spacing, self.tissue.shape
        low = np.maximum(np.floor((centre - reach) / spacing).astype(int), 0)
        high = np.minimum(np.ceil((centre + reach) / spacing).astype(int) + 1, shape)
        return tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))

    def _depth(self, box: tuple[slice, ...], centre: np.ndarray, radii: np.ndarray, rough: float) -> Tensor:
        """Mm inside an ellipsoid of a rough surface, negative outside, at the voxels of a box."""
        axes = [(np.arange(s.start, s.stop)) * z - c for s, z, c in zip(box, self.head.spacing, centre, strict=True)]
        turn = rotation(self.rng.uniform(-90, 90, 3)) / radii[:, None]
        grid = [torch.from_numpy(a.astype(np.float32)).to(self.device) for a in axes]
        square = torch.zeros(1, device=self.device)
        for r in (turn[0], turn[1], turn[2]):
            slope = float(r[0]) * grid[0][:, None, None] + float(r[1]) * grid[1][:, None] + float(r[2]) * grid[2]
            square = square + slope.square()
        mean = float(np.mean(radii))
        depth = (1 - square.sqrt()) * mean
        if rough:
            length = max(1.5, 0.45 * mean)
            depth += rough * mean * smooth_field(self.rng, axes, length, 1, self.device)[0]
        return depth

    def blob(self, centre: np.ndarray, radius: float, name: str, rough: float = 0.25) -> None:
        """One lesion in white matter."""
        radii = radius * self.rng.uniform(0.65, 1.4, 3)
        box = self._box(centre, 1.6 * float(radii.max()) + 1)
        part = self.tissue[box]
        inside = (self._depth(box, centre, radii, rough) > 0) & self.host[part.long()]
        part[inside] = INDEX[name]

    def blobs(self, count: int, smallest: float, largest: float, active: float = 0.0) -> None:
        """Lesions with radii between two mm (log-uniform) in white matter; a share of them active."""
        for place in self.rng.integers(0, len(self.head.spots), count):
            radius = np.exp(self.rng.uniform(np.log(smallest), np.log(largest)))
            self.blob(self.head.spots[place], radius, "active lesion" if self.rng.random() < active else "lesion")

    def band(self, width: float, rough: float) -> None:
        """Hyperintensity along the ventricles, of uneven width (mm)."""
        axes = [np.arange(n) * z for n, z in zip(self.tissue.shape, self.head.spacing, strict=True)]
        coarse = [a[::4] for a in axes]
        field = smooth_field(self.rng, coarse, 14.0, 1, self.device)[0]
        reach = (width * (1 + rough * field)).clamp(0, 30) / _STEP
        for i in range(3):
            reach = reach.repeat_interleave(4, i).narrow(i, 0, self.tissue.shape[i])
        inside = (self.head.ventricle < reach) & self.host[self.tissue.int()]
        self.tissue[inside] = INDEX["lesion"]

    def mask(self, mask: Tensor, voxel: np.ndarray, active: float) -> None:
        """A patient's lesions, laid over the map through MNI152, where there is white matter."""
        to_voxel = voxel @ self.head.to_mni @ np.diag([*self.head.spacing, 1.0])
        places = torch.nonzero(mask).float().cpu().numpy()
        low = np.linalg.inv(to_voxel)[:3] @ np.c_[places, np.ones(len(places))].T if len(places) else np.zeros((3, 0))
        if not low.size:
            return
        shape = self.tissue.shape
        box = tuple(
            slice(int(max(0, a)), int(min(n, b)))
            for a, b, n in zip(np.floor(low.min(1)) - 1, np.ceil(low.max(1)) + 2, shape, strict=True)
        )
        grid = torch.meshgrid(*(torch.arange(s.start, s.stop, device=self.device) for s in box), indexing="ij")
        rows = torch.from_numpy(to_voxel[:3].astype(np.float32)).to(self.device)
        index = [(r[0] * grid[0] + r[1] * grid[1] + r[2] * grid[2] + r[3]).round().long() for r in rows]
        inside = torch.ones_like(index[0], dtype=torch.bool)
        for i, n in enumerate(mask.shape):
            inside &= (index[i] >= 0) & (index[i] < n)
            index[i].clamp_(0, n - 1)
        part = self.tissue[box]
        inside &= (mask[index[0], index[1], index[2]] > 0) & self.host[part.long()]
        part[inside] = INDEX["active lesion" if self.rng.random() < active else "lesion"]

    def tumour(self, radius: float) -> Push:
        """A tumour of about `radius` mm: a ring about a necrotic core, irregular, or solid; mostly with oedema."""
        rng = self.rng
        centre = self.head.spots[rng.integers(len(self.head.spots))].astype(float)
        radii = radius * rng.uniform(0.7, 1.3, 3)
        kind = rng.choice(["ring", "irregular", "solid", "diffuse"], p=[0.45, 0.2, 0.15, 0.2])
        swelling = 0.0 if rng.random() < 0.25 else rng.uniform(3, 22)
        box = self._box(centre, 1.5 * float(radii.max()) + 1.6 * swelling + 2)
        depth = self._depth(box, centre, radii, rng.uniform(0.1, 0.35))
        part = self.tissue[box]
        if swelling:
            axes = [np.arange(s.start, s.stop) * z for s, z in zip(box, self.head.spacing, strict=True)]
            spread = swelling * (1 + 0.6 * smooth_field(rng, axes, 9.0, 1, self.device)[0])
            spread += 1.5 * smooth_field(rng, axes, 2.5, 1, self.device)[0]
            cortex = (part == INDEX["cortex"]) & (depth > -0.35 * spread)
            part[(depth > -spread) & (self.host[part.long()] | cortex)] = INDEX["oedema"]
        brain = self.brain[part.long()]
        self._fill(part, depth, brain, kind, radius)
        return Push(centre, radius + swelling, float(rng.uniform(0, 0.35)))

    def _fill(self, part: Tensor, depth: Tensor, brain: Tensor, kind: str, radius: float) -> None:
        rng = self.rng
        if kind == "diffuse":  # low grade: no rim, no core
            part[(depth > 0) & brain] = INDEX["solid tumour"]
            return
        part[(depth > 0) & brain] = INDEX["rim" if kind != "irregular" else "solid tumour"]
        if kind == "irregular":
            axes = [np.arange(n) * z for n, z in zip(part.shape, self.head.spacing, strict=True)]
            patches = smooth_field(rng, axes, max(2.0, 0.3 * radius), 1, self.device)[0]
            part[(depth > 0) & brain & (patches > rng.uniform(-0.3, 0.6))] = INDEX["rim"]
            part[(depth > 0.25 * radius) & brain & (patches < -0.7)] = INDEX["necrosis"]
        elif kind == "ring":
            part[(depth > rng.uniform(1.5, 0.2 * radius + 3)) & brain] = INDEX["necrosis"]


@dataclass(frozen=True)
class Disease:
    """What a draw may have, as probabilities: multiple sclerosis, small-vessel disease by age, tumours."""

    sclerosis: float = 0.35
    tumour: float = 0.4


def paint_lesions(
    head: HeadMap, lesions: Sequence[tuple[Tensor, np.ndarray]], rng: np.random.Generator, age: float, disease: Disease
) -> tuple[Tensor, list[Push]]:
    """The tissues of a map with lesions, uint8 [X, Y, Z], and the mass effects of its tumours."""
    painter = Painter(head, rng)
    if age > 45 and rng.random() < 0.6:  # small-vessel disease: nearly all brains over 65 have some (de Leeuw 2001)
        painter.blobs(int(np.exp(rng.uniform(0, np.log(30)))), 0.8, 2.5 if age < 65 else 4.0)
    if age > 55 and rng.random() < 0.4:
        painter.band(rng.uniform(0.5, 2 + (age - 55) / 12), rng.uniform(0.2, 0.8))
    if rng.random() < disease.sclerosis:
        _sclerosis(painter, lesions, rng)
    pushes = []
    if rng.random() < disease.tumour:
        count = int(rng.integers(2, 5)) if rng.random() < 0.2 else 1
        for _ in range(count):
            pushes.append(painter.tumour(np.exp(rng.uniform(np.log(5), np.log(30))) / np.sqrt(count)))
    return painter.tissue, pushes


def _sclerosis(painter: Painter, lesions: Sequence[tuple[Tensor, np.ndarray]], rng: np.random.Generator) -> None:
    active = 0.3 if rng.random() < 0.25 else 0.0
    masks = lesions if rng.random() < 0.6 else ()
    for i in rng.permutation(len(masks))[: int(rng.integers(1, 3))]:
        mask, voxel = lesions[i]
        painter.mask(mask, voxel, active)
    if not masks or rng.random() < 0.5:
        painter.blobs(int(np.exp(rng.uniform(0, np.log(40)))), 1.2, 6.0, active)
    if rng.random() < 0.35:
        painter.band(rng.uniform(0.5, 3.5), rng.uniform(0.2, 1.0))


# ------------------------------------------------------------------------------------------------- a draw


@dataclass(frozen=True)
class Draw:
    """One anatomy on a grid. voxels: int64 [N], flat indices of the voxels that were read; fractions: float32
    [N, tissues], each row sums to 1; mask: float32 [N], the share of a voxel that is kept (1 everywhere in a head);
    shape, spacing (mm) of the grid; stripped: whether the skull is off; age in years."""

    voxels: Tensor
    fractions: Tensor
    mask: Tensor
    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    stripped: bool
    age: float

    def labels(self) -> Tensor:
        """The study's labels, uint8 [X, Y, Z]: the most frequent tissue, background where little is kept."""
        table = torch.from_numpy(STUDY_LABEL).to(self.fractions.device)
        names = table[self.fractions.argmax(1)]
        out = torch.zeros(int(np.prod(self.shape)), dtype=torch.uint8, device=names.device)
        out[self.voxels] = torch.where(self.mask >= 0.5, names, torch.zeros_like(names))
        return out.view(*self.shape)


@dataclass(frozen=True)
class Place:
    """From a grid into a map: mm from the middle of the grid -> mm from the corner of the map, x -> turn x + shift."""

    turn: np.ndarray
    shift: np.ndarray


def _place(head: HeadMap, rng: np.random.Generator, stripped: bool) -> Place:
    """Flip, rotation, scale and a small offset. Stripped brains mostly stand as templates do, heads as people lie."""
    aligned = rng.random() < (0.85 if stripped else 0.3)
    u, _, vt = np.linalg.svd(head.to_mni[:3, :3])
    turn = (u @ vt).T if aligned else np.eye(3)
    turn = turn @ rotation(rng.normal(0, (4, 2.5, 2.5) if stripped else (8, 4, 5)))
    # 8 % between people (adult brain volume varies by about 10 % about its mean, Allen et al. 2002), 3 % an axis.
    scale = np.clip(rng.normal(1, 0.05), 0.88, 1.12) * rng.uniform(0.96, 1.04, 3)
    flip = np.diag([rng.choice([-1.0, 1.0]), 1.0, 1.0])
    centre = head.brain_centre if stripped or rng.random() < 0.5 else head.head_centre
    offset = rng.normal(0, (2, 3, 3)) * (1.0 if stripped else 1.5)
    turn = turn @ flip @ np.diag(1 / scale)
    return Place(turn, centre + turn @ offset)


def _coarse_points(
    head: HeadMap, place: Place, axes: Sequence[np.ndarray], rng: np.random.Generator, pushes: list[Push], growth: float
) -> Tensor:
    """Where the voxels of a grid lie in the map: mm from its corner, float32 [3, X, Y, Z]."""
    device = head.tissue.device
    grid = [torch.from_numpy(a.astype(np.float32)).to(device) for a in axes]
    turn, shift = place.turn, place.shift
    points = torch.stack(
        [
            float(turn[i, 0]) * grid[0][:, None, None]
            + float(turn[i, 1]) * grid[1][:, None]
            + (float(turn[i, 2]) * grid[2] + float(shift[i]))
            for i in range(3)
        ]
    )
    points += rng.uniform(0.5, 3.0) * smooth_field(rng, axes, 30.0, 3, device)
    points += rng.uniform(0.0, 0.9) * smooth_field(rng, axes, 12.0, 3, device)
    for push in pushes:
        centre = torch.from_numpy(push.centre.astype(np.float32)).to(device)[:, None, None, None]
        away = points - centre
        near = torch.exp(-0.5 * away.square().sum(0) / max(6.0, 0.8 * push.radius) ** 2)
        points -= push.share * near * away
    if growth:
        points += growth * _sample_push(head, points)
    return points


def _sample_push(head: HeadMap, points: Tensor) -> Tensor:
    """Trilinear values of the push field at points [3, X, Y, Z] mm."""
    shape = head.push.shape[1:]
    steps = [s * z for s, z in zip(_stride(head.spacing), head.spacing, strict=True)]
    grid = torch.stack([points[i] / float(steps[i]) * (2 / max(1, shape[i] - 1)) - 1 for i in (2, 1, 0)], -1)
    return torch.nn.functional.grid_sample(head.push[None], grid[None], align_corners=True)[0]


def _flat(points: Sequence[Tensor] | Tensor, shape: Sequence[int], steps: Sequence[float] | np.ndarray) -> Tensor:
    """Flat index of the voxel nearest to points in mm, clamped to the volume (whose border is air): int64."""
    index: Tensor | None = None
    for p, n, s in zip(points, shape, steps, strict=True):
        i = (p * (1 / float(s)) + 0.5).clamp_(0, n - 1).to(torch.int32)
        index = i if index is None else index.mul_(n).add_(i)
    assert index is not None
    return index.long()


@dataclass(frozen=True)
class Edge:
    """How a skull is stripped: along which surface, how far out (mm), how ragged (mm), and whether what lies outside
    the fluid is kept."""

    surface: str
    reach: float
    ragged: float
    fluid_only: bool


def _edge(rng: np.random.Generator) -> Edge:
    """From masks that eat into the cortex to those that leave fluid and some dura and skull."""
    surface = "hull" if rng.random() < 0.8 else "brain"
    low, high = (-1.5, 1) if surface == "hull" and rng.random() < 0.3 else (0, 4)
    reach = float(rng.uniform(low, high))
    return Edge(surface, reach, float(rng.uniform(0.1, 1.5)), bool(rng.random() < 0.75))


def draw(
    head: HeadMap,
    lesions: Sequence[tuple[Tensor, np.ndarray]],
    tubes: Tensor,
    rng: np.random.Generator,
    shape: Sequence[int],
    spacing: Sequence[float],
    stripped: bool,
    disease: Disease,
) -> Draw:
    """One anatomy from a prepared map; tubes: `noise_block` on the map's device.

    Points lie at most one and a half of the map's voxels apart, at least two along each axis."""
    axes = axes_of(shape, spacing)
    age = float(rng.uniform(18, 90))
    tissue, pushes = paint_lesions(head, lesions, rng, age, disease)
    growth = float(np.clip(rng.normal((age - 60) / 25, 1.2), -2.5, 6.0))  # ventricles widen with age
    place = _place(head, rng, stripped)
    points = _coarse_points(head, place, axes, rng, pushes, growth)
    edge = _edge(rng)
    ragged = (
        edge.ragged
        * (
            0.7 * smooth_field(rng, axes, 6.0, 1, tissue.device) + 0.7 * smooth_field(rng, axes, 20.0, 1, tissue.device)
        )[0]
    )
    voxels = _voxels(head, points, edge, stripped)
    sub = [max(2, int(np.ceil(s / (1.5 * z)))) for s, z in zip(spacing, head.spacing, strict=True)]
    fine = [p.reshape(-1)[voxels] for p in points]
    index = _fine_index(head, fine, place, spacing, sub)
    kinds = tissue.reshape(-1)[index]
    kinds = _atrophy(head, kinds, index, float(np.clip(rng.normal(0.56 - (age - 50) / 160, 0.12), 0.12, 0.9)))
    if rng.random() < 0.7:
        kinds = _vessels(kinds, index, tissue.shape, tubes, rng)
    mask = torch.ones(len(voxels), device=kinds.device)
    if stripped:
        kept = _kept(head, kinds, index, edge, ragged.reshape(-1)[voxels])
        mask = kept.float().mean(1)
    fractions = _fractions(kinds)
    return Draw(voxels, fractions, mask, tuple(shape), tuple(spacing), stripped, age)


def _voxels(head: HeadMap, points: Tensor, edge: Edge, stripped: bool) -> Tensor:
    """Which voxels need to be read, int64 [N]: around the brain, or around the head."""
    if stripped:
        index = _flat(points, head.hull.shape, head.spacing)
        near = getattr(head, edge.surface).reshape(-1)[index] < _ZERO + min(126, (edge.reach + 8) / _STEP)
    else:
        steps = [s * z for s, z in zip(_stride(head.spacing), head.spacing, strict=True)]
        near = head.head.reshape(-1)[_flat(points, head.head.shape, steps)] > 0
    return torch.nonzero(near.reshape(-1)).reshape(-1)


def _fine_index(
    head: HeadMap, fine: Sequence[Tensor], place: Place, spacing: Sequence[float], sub: Sequence[int]
) -> Tensor:
    """Flat indices into the map at the points of every voxel, int64 [N, points]."""
    steps = [((np.arange(k) + 0.5) / k - 0.5) * s for k, s in zip(sub, spacing, strict=True)]
    offsets = place.turn @ np.array(list(itertools.product(*steps))).T
    offset = torch.from_numpy(offsets.astype(np.float32)).to(fine[0].device)
    return _flat([p[:, None] + o for p, o in zip(fine, offset, strict=True)], head.tissue.shape, head.spacing)


def _atrophy(head: HeadMap, kinds: Tensor, index: Tensor, level: float) -> Tensor:
    """The border of cortex and sulcal fluid moves: level 0.5 leaves it, less widens the sulci, more narrows them."""
    cortex, sulcus = INDEX["cortex"], INDEX["sulcus"]
    either = (kinds == cortex) | (kinds == sulcus)
    fluid = head.fluid.reshape(-1)[index] > int(level * 255)
    fluid = torch.where(fluid, sulcus, cortex).to(torch.uint8)
    return torch.where(either, fluid, kinds)


def _vessels(kinds: Tensor, index: Tensor, shape: Sequence[int], tubes: Tensor, rng: np.random.Generator) -> Tensor:
    """Part of the sulcal fluid becomes small arteries or veins."""
    at = torch.nonzero((kinds == INDEX["sulcus"]).reshape(-1)).reshape(-1)
    flat = index.reshape(-1)[at]
    n = tubes.shape[0]
    start = [int(v) for v in rng.integers(0, n, 3)]
    x = (torch.div(flat, shape[1] * shape[2], rounding_mode="floor") + start[0]) % n
    y = (torch.div(flat, shape[2], rounding_mode="floor") % shape[1] + start[1]) % n
    z = (flat % shape[2] + start[2]) % n
    thick = int(rng.uniform(10, 42))
    hit = tubes.reshape(-1)[(x * n + y) * n + z] < thick
    out = kinds.reshape(-1).clone()
    out[at[hit]] = INDEX["vein" if rng.random() < 0.6 else "artery"]
    return out.view_as(kinds)


def _kept(head: HeadMap, kinds: Tensor, index: Tensor, edge: Edge, ragged: Tensor) -> Tensor:
    """Which points the brain mask keeps, bool [N, points]."""
    distance = (getattr(head, edge.surface).reshape(-1)[index].float() - _ZERO) * _STEP
    kept = distance + ragged[:, None] < edge.reach
    allowed = torch.zeros(len(NAMES), dtype=torch.bool, device=kinds.device)
    outer = (
        ("sulcus", "artery", "vein", "dura")
        if edge.fluid_only
        else ("sulcus", *NAMES[INDEX["artery"] : INDEX["marrow"] + 1])
    )
    allowed[[INDEX[name] for name in (*BRAIN, *outer)]] = True
    return kept & allowed[kinds.long()]


def _fractions(kinds: Tensor) -> Tensor:
    """Shares of the tissues among the points of each voxel: [N, points] -> float32 [N, tissues]."""
    n, k = len(kinds), len(NAMES)
    place = kinds.int() + k * torch.arange(n, device=kinds.device, dtype=torch.int32)[:, None]
    counts = torch.bincount(place.reshape(-1), minlength=n * k)
    return counts.view(n, k).float() / kinds.shape[1]
