"""Simulated MRI from tissue maps: the default data set, deterministic by seed and unlimited.

Anatomy is a set of soft signed-distance shapes and smooth random fields in continuous millimetres, so a
seed is the same subject at every shape and spacing. Tissue fractions are averaged over sub-voxel samples
(partial volume) and turned into images by the signal equation of each contrast, a bias field and Rician
noise.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import ndimage

# Brain labels.
BACKGROUND, CSF, GREY, WHITE, DEEP_GREY, VESSEL = 0, 1, 2, 3, 4, 5
CORE, OEDEMA, RIM, HYPERINTENSITY = 10, 11, 12, 13

# Heart labels (0 is air and lung).
BODY, FAT, LV_BLOOD, MYOCARDIUM, RV_BLOOD, OTHER_BLOOD, LIVER = 1, 2, 3, 4, 5, 6, 7

# T1 ms, T2 ms, PD at 1.5 T. CSF, grey and white: BrainWeb (Kwan, Evans and Pike 1999). Deep grey lies
# between, the pallidum shortened by iron. Lesions: typical values in the ranges of Just and Thelen 1988.
# A vessel is mostly flow void in a spin echo.
_BRAIN = {
    "csf": (2569, 329, 1.00, CSF),
    "grey": (833, 83, 0.86, GREY),
    "white": (500, 70, 0.77, WHITE),
    "deep": (690, 76, 0.83, DEEP_GREY),
    "pallidum": (570, 62, 0.80, DEEP_GREY),
    "vessel": (1200, 90, 0.45, VESSEL),
    "core": (1900, 350, 0.97, CORE),
    "oedema": (900, 150, 0.90, OEDEMA),
    "rim": (950, 110, 0.88, RIM),
    "spot": (800, 135, 0.86, HYPERINTENSITY),
}
_ENHANCED = {"vessel": (180, 70, 0.80), "rim": (300, 90, 0.88)}  # with gadolinium

# T1 ms, T2 ms at 1.5 T after Stanisz 2005 (blood, muscle, heart, liver) and de Bazelaire 2004 (fat, marrow);
# PD, and so the brightness of fat and lung beside blood, by eye.
_HEART = {
    "lung": (1200, 40, 0.12, 0),
    "muscle": (1008, 44, 0.85, BODY),
    "bone": (549, 49, 0.85, BODY),
    "fat": (343, 58, 0.90, FAT),
    "lv": (1441, 290, 1.00, LV_BLOOD),
    "myocardium": (1030, 42, 0.85, MYOCARDIUM),
    "rv": (1441, 240, 1.00, RV_BLOOD),
    "blood": (1441, 260, 1.00, OTHER_BLOOD),
    "liver": (586, 46, 0.85, LIVER),
}

# The nested regions that segmentation of gliomas is judged by (BraTS), as brain labels.
TUMOUR = {"whole tumour": (CORE, OEDEMA, RIM), "tumour core": (CORE, RIM), "enhancing tumour": (RIM,)}

Axes = Sequence[np.ndarray]
Number = float | np.floating


@dataclass(frozen=True)
class Phantom:
    """One simulated study. images: name -> float32 [X, Y, Z] >= 0, RAS order, scanner units."""

    images: dict[str, np.ndarray]
    labels: np.ndarray
    spacing: tuple[float, float, float]

    def affine(self) -> np.ndarray:
        """Voxel index to RAS millimetres, float64 [4, 4], the origin in the centre of the volume."""
        out = np.diag([*self.spacing, 1.0])
        out[:3, 3] = [-0.5 * (n - 1) * s for n, s in zip(self.labels.shape, self.spacing, strict=True)]
        return out


def _rng(seed: int, tag: str) -> np.random.Generator:
    """An independent stream per subject and purpose."""
    return np.random.default_rng((seed, zlib.crc32(tag.encode())))


def _axes(shape: Sequence[int], spacing: Sequence[float]) -> list[np.ndarray]:
    return [((np.arange(n) - 0.5 * (n - 1)) * s).astype(np.float32) for n, s in zip(shape, spacing, strict=True)]


def _supersample(
    shape: Sequence[int], spacing: Sequence[float], target: Sequence[float]
) -> tuple[list[int], list[int], list[float]]:
    """Samples per voxel and axis (at most 3) to come down to `target` mm, with the fine shape and spacing."""
    sub = [min(3, max(1, int(np.ceil(s / h - 1e-6)))) for s, h in zip(spacing, target, strict=True)]
    return (
        sub,
        [n * k for n, k in zip(shape, sub, strict=True)],
        [s / k for s, k in zip(spacing, sub, strict=True)],
    )


def _field(rng: np.random.Generator, length: float, axes: Axes, extent: float = 150.0) -> np.ndarray:
    """Smooth random field, mean 0, variance 1, on a tensor grid: Gaussian bumps, `length` mm wide.

    Their lattice is fixed in millimetres, so any grid samples the same function."""
    knots = np.arange(-extent, extent + length, length, dtype=np.float32)
    out = rng.standard_normal((knots.size,) * 3, dtype=np.float32) * np.float32(np.pi**-0.75)
    for axis in axes:  # each product takes the leading dimension and appends the sampled one
        use = (knots > axis[0] - 5 * length) & (knots < axis[-1] + 5 * length)
        basis = np.exp(-0.5 * ((axis[:, None] - knots[use]) / np.float32(length)) ** 2)
        out = np.tensordot(out[use], basis, axes=(0, 1))
    return out


def _folds(rng: np.random.Generator, wavelength: float, pitch: float = 3.0, n: int = 72) -> np.ndarray:
    """Periodic lattice [n, n, n]: signed distance (mm) to the labyrinth where a band-pass field is zero."""
    k = np.fft.fftfreq(n, pitch)
    k = np.sqrt(k[:, None, None] ** 2 + k[None, :, None] ** 2 + np.fft.rfftfreq(n, pitch) ** 2)
    ring = np.exp(-0.5 * ((k * wavelength - 1.0) / 0.25) ** 2)
    f = np.fft.irfftn(np.fft.rfftn(rng.standard_normal((n, n, n))) * ring, s=(n, n, n), axes=(0, 1, 2))
    f = (f / f.std()).astype(np.float32)
    slope = sum(((np.roll(f, -1, a) - np.roll(f, 1, a)) / (2 * pitch)) ** 2 for a in range(3))
    return f / np.sqrt(slope + 0.2 * slope.mean())


def _sample(lattice: np.ndarray, points: np.ndarray, pitch: float = 3.0) -> np.ndarray:
    """Trilinear value of a periodic lattice at points [3, N] mm."""
    return ndimage.map_coordinates(lattice, points / np.float32(pitch), order=1, mode="grid-wrap")


def _ellipsoid(p: Axes, centre: Sequence[float], radii: Sequence[float]) -> np.ndarray:
    """Approximate signed distance to an ellipsoid (exact at the surface to first order), negative inside."""
    k0: Any = np.float32(1e-9)
    k1: Any = k0
    for a, c, r in zip(p, centre, radii, strict=True):
        q = a - np.float32(c)
        q *= q
        q *= np.float32(r**-2.0)
        k0 = k0 + q
        q *= np.float32(r**-2.0)
        k1 = k1 + q
    return (k0 - np.sqrt(k0)) / np.sqrt(k1)


def _tube(p: Axes, a: Sequence[float], b: Sequence[float], ra: float, rb: float) -> np.ndarray:
    """Signed distance to a capsule from a to b whose radius runs from ra to rb."""
    o = np.asarray(a, np.float32)
    d = np.asarray(b, np.float32) - o
    e = d / (d @ d)
    t = np.clip(p[0] * e[0] + p[1] * e[1] + p[2] * e[2] - o @ e, 0, 1)
    square: Any = np.float32(0)
    for i in range(3):
        q = p[i] - o[i]
        q -= t * d[i]
        q *= q
        square = square + q
    return np.sqrt(square) - (np.float32(ra) + t * np.float32(rb - ra))


def _round(a: np.ndarray, b: np.ndarray, ra: Number, rb: Number) -> np.ndarray:
    """Approximate signed distance to an ellipse with half axes ra, rb."""
    return (np.sqrt((a / np.float32(ra)) ** 2 + (b / np.float32(rb)) ** 2) - 1) * np.float32(min(ra, rb))


def _union(a: np.ndarray, b: np.ndarray, k: float) -> np.ndarray:
    """Smooth minimum: shapes merge with a fillet of k mm."""
    h = np.maximum(np.float32(k) - np.abs(a - b), 0)
    return np.minimum(a, b) - h * h * np.float32(0.25 / k)


def _inside(d: np.ndarray, width: float) -> np.ndarray:
    """Soft membership of a signed distance, 1 inside, with an edge of `width` mm."""
    return np.clip(np.float32(0.5) - d / np.float32(width), 0, 1)


def _rotation(angles: np.ndarray) -> np.ndarray:
    """Rotation matrix from angles (degrees) about x, y, z."""
    out = np.eye(3)
    for i, t in enumerate(np.deg2rad(angles)):
        j, k = (i + 1) % 3, (i + 2) % 3
        r = np.eye(3)
        r[j, j] = r[k, k] = np.cos(t)
        r[j, k], r[k, j] = -np.sin(t), np.sin(t)
        out = r @ out
    return out


def _vary(rng: np.random.Generator, table: dict[str, tuple], share: float = 0.04) -> dict[str, np.ndarray]:
    """Own T1, T2, PD per tissue: normal about the table, sigma `share` (PD a quarter), cut at 1.5 sigma."""
    return {
        k: np.array(v[:3]) * (1 + np.clip(rng.normal(size=3), -1.5, 1.5) * [share, share, 0.25 * share])
        for k, v in table.items()
    }


def _finish(signal: np.ndarray, mask: np.ndarray, axes: Axes, reference: float, seed: int, tag: str) -> np.ndarray:
    """Bias field, Rician noise (2.5 to 4.5 % of `reference`) and gain; signal [V] lists the mask."""
    rng = _rng(seed, "acquire " + tag)
    bias = np.exp(np.float32(rng.uniform(0.04, 0.07)) * _field(rng, 60.0, axes))[mask]
    sigma = np.float32(reference * rng.uniform(0.025, 0.045))
    gain = np.float32(np.exp(rng.uniform(np.log(150), np.log(900))) / reference)
    noise = rng.standard_normal((2, signal.size), dtype=np.float32) * sigma
    out = np.zeros(mask.shape, np.float32)
    out[mask] = gain * np.hypot(signal * bias + noise[0], noise[1])
    return out


# ------------------------------------------------------------------------------------------------- brain

# Lateral ventricle of one side as chains (MNI mm: |x|, y, z, radius), frontal to occipital and temporal horn.
_VENTRICLE = (
    (9, 31, 4, 2.5),
    (11, 16, 13, 5),
    (13, -8, 21, 5),
    (18, -28, 20, 5.5),
    (26, -43, 10, 6.5),
    (25, -66, 5, 2),
)
_TEMPORAL_HORN = ((26, -43, 8, 5), (35, -30, -10, 2.2), (32, -12, -18, 1.5))


def _hull(p: Axes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Signed distances (MNI mm) of cerebrum, cerebellum and brainstem hulls; p is 3 x [N]."""
    x, y, z = p
    ax = np.abs(x)
    taper = 1 + np.float32(0.0010) * (y + 17) + np.float32(1.2e-5) * (y + 17) ** 2  # narrower in front
    zc = z - 12
    zc = np.where(zc < 0, zc * np.float32(66 / 40), zc)  # flat base
    upper = _ellipsoid((ax * taper, y, zc), (0, -17, 0), (69, 87, 65))
    temporal = _ellipsoid((ax, y + np.float32(0.25) * (z + 20), z), (45, -14, -20), (23, 42, 22))
    cerebrum = _union(upper, temporal, 10)
    cerebellum = _ellipsoid((ax, y, z), (21, -66, -38), (31, 29, 23))
    stem = _union(_ellipsoid(p, (0, -25, -33), (17, 13, 17)), _tube(p, (0, -25, -20), (0, -36, -62), 11, 8), 6)
    return cerebrum, cerebellum, stem


def _ventricles(p: Axes, size: float, asymmetry: float) -> np.ndarray:
    """Signed distance to lateral, third and fourth ventricles; size scales the calibre."""
    x, y, z = p
    grow = np.float32(size) * (1 + np.float32(asymmetry) * np.sign(x))
    q = (np.abs(x), y, z)
    out: Any = None
    for chain in (_VENTRICLE, _TEMPORAL_HORN):
        for a, b in itertools.pairwise(chain):
            d = _tube(q, a[:3], b[:3], a[3], b[3]) - (grow - 1) * (0.5 * (a[3] + b[3]))
            out = d if out is None else _union(out, d, 3)
    out = np.maximum(out, np.float32(1.0) - q[0])  # septum
    out = np.minimum(out, _ellipsoid(p, (0, -12, -1), (1.6 + 1.2 * size, 15, 11)))
    return np.minimum(out, _ellipsoid(p, (0, -45, -33), (6.5, 5, 10)))


def _deep(p: Axes) -> tuple[np.ndarray, np.ndarray]:
    """Signed distances of (thalamus, caudate, putamen) and of the pallidum."""
    q = (np.abs(p[0]), p[1], p[2])
    thalamus = _ellipsoid((q[0] + np.float32(0.35) * (q[1] + 18), q[1], q[2]), (11.5, -18, 8), (8, 14, 9))
    caudate = np.minimum(
        _ellipsoid((q[0] + np.float32(0.25) * (q[1] - 14), q[1], q[2]), (14, 14, 6), (5.5, 11, 12)),
        _tube(q, (17, 5, 18), (22, -28, 22), 4, 2),
    )
    slant = q[0] + np.float32(0.30) * (q[1] - 2)
    putamen = _ellipsoid((slant, q[1], q[2]), (28, 2, 2), (5.0, 17, 11))
    pallidum = _ellipsoid((slant, q[1], q[2]), (20.5, -2, 0), (3.8, 10, 7))
    return np.minimum(np.minimum(thalamus, caudate), putamen), pallidum


def _lesion_plan(rng: np.random.Generator) -> tuple[int, bool]:
    """Number of gliomas (53 % of subjects), and whether white-matter hyperintensities instead (17 %)."""
    kind = rng.random()
    gliomas = 0 if kind > 0.53 else int(rng.choice([1, 2, 3], p=[0.75, 0.17, 0.08]))
    return gliomas, bool(0.53 < kind <= 0.70)


def _brain_fractions(seed: int, shape: Sequence[int], spacing: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Tissue fractions [len(_BRAIN), V] over the voxels of the brain mask, and that mask [X, Y, Z]."""
    rng = _rng(seed, "anatomy")
    sub, fine, step = _supersample(shape, spacing, (1.3, 1.3, 2.6))
    edge = max(1.0, float(np.mean(step)))

    # Head frame: MNI millimetres, hull centre near (0, -17, 5).
    turn = _rotation(rng.uniform(-1, 1, 3) * (6, 5, 7))
    size = np.array([1.0, 0.96, 0.93]) * rng.uniform(0.92, 1.07) * rng.uniform(0.965, 1.035, 3)
    shift = rng.uniform(-1, 1, 3) * (4, 3, 3)
    m = (turn.T / size[:, None]).astype(np.float32)
    # Only the box around the head is sampled finely, and in it only a loose ellipsoid.
    half = np.sqrt(((turn * size) ** 2) @ np.array([76, 93, 82]) ** 2)
    axes = _axes(fine, step)
    start = [int(np.searchsorted(a, c - h)) for a, c, h in zip(axes, shift, half, strict=True)]
    axes = [a[n : np.searchsorted(a, c + h)] for a, n, c, h in zip(axes, start, shift, half, strict=True)]
    grid = [a.reshape([-1 if i == j else 1 for j in range(3)]) - np.float32(shift[i]) for i, a in enumerate(axes)]
    p = [m[i, 0] * grid[0] + m[i, 1] * grid[1] + m[i, 2] * grid[2] + np.float32((0, -17, 5)[i]) for i in range(3)]

    near = (p[0] / 76) ** 2 + ((p[1] + 17) / 93) ** 2 + ((p[2] - 5) / 82) ** 2 < 1.0
    at = np.flatnonzero(near)
    p = [a.ravel()[at] for a in p]

    # Individual shape: a slow warp of the frame.
    for a in p:
        a += np.float32(1.5) * _field(rng, 30.0, axes).ravel()[at]
    wave = _field(rng, 9.0, axes).ravel()[at]
    slow = _field(rng, 22.0, axes).ravel()[at]

    cerebrum, cerebellum, stem = _hull(p)
    hull = _union(_union(cerebrum, cerebellum, 14), stem, 12)
    keep = hull < 1.5
    at, wave, slow, hull = at[keep], wave[keep], slow[keep], hull[keep]
    cerebrum, cerebellum, stem = cerebrum[keep], cerebellum[keep], stem[keep]
    p = [a[keep] for a in p]

    # Lesions, and the mass effect that pushes the anatomy outwards.
    count, spots = _lesion_plan(rng)
    core = np.zeros_like(wave)
    rim = np.zeros_like(wave)
    oedema = np.zeros_like(wave)
    q = [a.copy() for a in p]
    for _ in range(count):
        c = np.array([rng.choice([-1, 1]) * rng.uniform(16, 42), rng.uniform(-62, 32), rng.uniform(-2, 42)])
        r = rng.uniform(9, 21) / np.sqrt(count)
        thick, spread, enhancing = rng.uniform(3.0, 6.0), rng.uniform(7, 20), rng.random() < 0.85
        stretch = _rotation(rng.uniform(-90, 90, 3)) @ np.diag(rng.uniform(0.8, 1.25, 3))
        v = (stretch.T @ (np.stack(p) - c[:, None].astype(np.float32))).astype(np.float32)
        dist = np.sqrt((v * v).sum(0))
        push = np.float32(rng.uniform(0.15, 0.35)) * np.exp(-0.5 * (dist / np.float32(1.7 * r)) ** 2)
        for a, b, o in zip(q, p, c, strict=True):
            a -= (b - np.float32(o)) * push
        d = dist - np.float32(r) + np.float32(0.16 * r) * wave + np.float32(0.12 * r) * slow
        tumour = _inside(d, edge)
        if enhancing:  # otherwise the tumour is a solid mass with the values of oedema
            shell = np.float32(thick) * (1 + np.float32(0.45) * np.clip(wave - slow, -2, 2))
            inner = _inside(d + shell, 1.5 * edge)
            core = np.maximum(core, inner)
            rim = np.maximum(rim, tumour - inner)
        reach = d - np.float32(spread) * (1 + np.float32(0.6) * slow + np.float32(0.45) * wave)
        oedema = np.maximum(oedema, np.maximum(tumour, _inside(reach, 6.0)))
    rim = np.minimum(rim, 1 - core)

    # Cortex: pial surface = hull, fissures and a labyrinth of sulci that runs in along the radii.
    x, y, z = q
    r = np.sqrt(x * x + (y + 17) ** 2 + (z - 8) ** 2) + np.float32(1)
    depth = -cerebrum
    atrophy = rng.uniform(0.0, 1.0)
    out = np.float32(0.55) * np.maximum(depth, 0) / r
    radial = np.stack([x * (1 + out) + 2 * wave, y + (y + 17) * out, z + (z - 8) * out + 2 * slow])
    sheet = np.abs(_sample(_folds(rng, rng.uniform(22, 27)), radial)) / (1 + out)
    mid = x - np.float32(1.2) * slow
    callosum = 1 - np.sqrt(((y + 6) / 45) ** 2 + ((z + 1) / 27) ** 2)
    fissure = np.sqrt(mid**2 + (np.maximum(callosum, 0) * 27) ** 2)
    ax = np.abs(x)
    slope = (z + 1 + np.float32(0.45) * (y + 5)) * np.float32(0.91)
    sylvian = np.sqrt(
        (slope + wave) ** 2 + np.maximum(np.float32(39) - ax, 0) ** 2 + np.maximum(np.abs(y + 8) - 30, 0) ** 2
    )
    insula = np.sqrt(
        (ax - 40 + np.float32(0.012) * (y + 2) ** 2 + 2 * slow + wave) ** 2
        + np.maximum(np.abs(y + 3) - 19, 0) ** 2
        + np.maximum(np.abs(z - 2) - 11, 0) ** 2
    )
    lateral = np.minimum(sylvian, insula)
    surface = np.minimum(np.minimum(depth, np.maximum(fissure + 7, 0.4 * depth)), lateral + 12)
    bottom = 17 + np.float32(4.5) * np.clip(slow + wave, -2, 1.5)
    sulci = np.sqrt(sheet**2 + np.maximum(surface - bottom, 0) ** 2)
    gap = np.float32(0.35 + 0.9 * atrophy) * np.clip(1 + np.float32(0.5) * slow, 0.3, 2)
    pial = np.minimum(sulci - gap * np.clip(np.float32(1.3) - surface / 25, 0.3, 1.3), fissure - gap - np.float32(0.5))
    pial = np.minimum(pial, lateral - gap - np.float32(0.8))
    trim = np.float32(0.8) + np.float32(0.7) * slow  # uneven skull stripping
    pial = np.minimum(pial, depth - np.maximum(trim, 0) - np.float32(0.5) * gap * (1 + np.float32(0.6) * wave))

    # Cerebellum: thin folia radiating from its centre.
    ycb, zcb = y + 58, z + 38
    theta = np.arctan2(zcb, ycb)
    rcb = np.sqrt(ycb * ycb + zcb * zcb)
    leaf = np.abs(np.sin(13 * theta + np.float32(0.9) * wave + np.float32(0.03) * ax)) * rcb / 13
    inner = np.maximum(-cerebellum - 11 - 3 * slow - 2 * wave, 0)
    cortex_cb = np.minimum(np.sqrt(leaf**2 + inner**2) - np.float32(0.25), -cerebellum - np.float32(1))
    # The larger pial depth wins, so fluid stays where neither claims.
    in_cb = cortex_cb > pial
    ribbon = np.where(in_cb, np.float32(2.0), np.float32(rng.uniform(3.0, 3.6)) + np.float32(0.35) * slow)
    brain = np.maximum(pial, cortex_cb)

    # Compose by priority, each tissue taking its share of what is left.
    left = np.ones_like(wave)
    part: dict[str, Any] = {}

    def take(name: str, share: np.ndarray) -> None:
        nonlocal left
        share = share * left
        part[name] = part.get(name, 0) + share
        left = left - share

    sinus = np.sqrt(mid**2 + (hull + 3) ** 2) - np.where((z > -5) & (y < 60), np.float32(2.6), np.float32(-9))
    vein = np.sqrt(np.minimum(sulci, lateral) ** 2 + (9 * wave) ** 2) - np.float32(0.9)
    basilar = _tube(p, (0, -9, -18), (1, -14, -50), 1.8, 1.5)
    vent_size = rng.uniform(0.6, 1.5) + 0.4 * atrophy
    vent = _ventricles(q, vent_size, rng.uniform(-0.15, 0.15)) + np.float32(0.6) * wave
    choroid = _tube((ax, y, z), (19, -32, 17), (26, -43, 7), 1.6, 2.4) + wave
    take(
        "vessel",
        np.maximum(
            _inside(np.minimum(np.minimum(sinus, vein), basilar), edge),
            _inside(np.maximum(choroid, vent), edge) * np.float32(0.7),
        ),
    )
    take("core", core)
    take("rim", rim)
    take("csf", _inside(vent, edge))
    deep, pallidum = _deep(q)
    take("pallidum", _inside(pallidum, edge))
    take("deep", _inside(deep + np.float32(0.5) * wave, edge))
    # Brainstem: white matter with nuclei, in its cistern.
    midbrain = _ellipsoid(q, (0, -27, -11), (17, 11, 12))
    trunk = _inside(np.minimum(stem + 1, midbrain), edge) * left
    take("csf", _inside(_ellipsoid(q, (0, -29, -13), (20, 13, 8)) + wave, edge) * (1 - trunk))
    part["white"] = np.float32(0.72) * trunk
    part["grey"] = np.float32(0.28) * trunk
    left = np.maximum(left - trunk, 0)
    take("csf", _inside(brain, edge))
    take("grey", _inside(brain - ribbon, edge * 1.2))
    take("white", np.ones_like(left))
    part["oedema"] = np.zeros_like(left)
    for name, share in (("white", 1.0), ("grey", 0.45), ("deep", 0.6)):
        moved = part[name] * oedema * np.float32(share)
        part[name] = part[name] - moved
        part["oedema"] = part["oedema"] + moved
    part["spot"] = np.zeros_like(left)
    if spots:
        load = rng.uniform(2.2, 2.7)
        speck = _field(rng, 3.5, axes).ravel()[at] + np.float32(1.5) * np.exp(-np.maximum(vent, 0) / 6)
        cap = np.maximum(speck - np.float32(load), np.float32(0.15) - np.maximum(vent, 0) / 12)
        moved = part["white"] * np.clip(cap * 4, 0, 1) * (brain > 7)
        part["white"] = part["white"] - moved
        part["spot"] = moved

    # Average the sub-voxel samples.
    index = np.unravel_index(at, near.shape)
    voxel = np.ravel_multi_index([(i + n) // k for i, n, k in zip(index, start, sub, strict=True)], shape)
    total = int(np.prod(shape))
    cover = np.bincount(voxel, weights=_inside(hull + trim, edge), minlength=total) / np.prod(sub)
    mask = cover > 0.5
    weight = np.maximum(np.bincount(voxel, minlength=total)[mask], 1)
    out = np.stack([np.bincount(voxel, weights=part[t], minlength=total)[mask] / weight for t in _BRAIN])
    return out.astype(np.float32), mask.reshape(shape)


def _spin(name: str, t1: np.ndarray, t2: np.ndarray, pd: np.ndarray, t: Mapping[str, float]) -> np.ndarray:
    """Signal of a contrast: spin echo, or for FLAIR inversion recovery with a spin echo readout."""
    if name == "flair":
        mz = np.abs(1 - 2 * np.exp(-t["ti"] / t1) + np.exp(-t["tr"] / t1))
    else:
        mz = 1 - np.exp(-t["tr"] / t1)
    return pd * mz * np.exp(-t["te"] / t2)


# TR, TE ms. A contrast is a row; but for FLAIR, a spin echo.
_TIMING = {
    "t1": (500, 11),
    "t1ce": (500, 11),
    "t2": (4200, 100),
    "flair": (9000, 115),
    "pd": (3200, 18),
}
BRAIN_CONTRASTS = tuple(_TIMING)


def brain(
    seed: int,
    shape: Sequence[int] = (96, 96, 32),
    spacing: Sequence[float] = (2.0, 2.0, 5.0),
    contrasts: Sequence[str] = ("t1", "t1ce", "t2", "flair"),
) -> Phantom:
    """Skull-stripped brain, in about 70 % of subjects with lesions. spacing in mm.

    The images of a seed do not depend on which other contrasts are asked for."""
    unknown = set(contrasts) - set(BRAIN_CONTRASTS)
    if unknown:
        raise ValueError(f"unknown contrasts {sorted(unknown)}; known: {BRAIN_CONTRASTS}")
    shape = tuple(int(n) for n in shape)
    dx, dy, dz = (float(s) for s in spacing)
    part, mask = _brain_fractions(seed, shape, (dx, dy, dz))
    axes = _axes(shape, (dx, dy, dz))
    rng = _rng(seed, "tissue")
    tissue = _vary(rng, _BRAIN)
    agent = {k: np.array(v) * (1, 1, tissue[k][2] / _BRAIN[k][2]) for k, v in _ENHANCED.items()}
    agent = {k: v * (rng.uniform(0.85, 1.3), 1, 1) for k, v in agent.items()}
    # Myelin changes T1 and T2 together; on a finer scale each has its own texture, PD a faint one. Without it three
    # contrasts fix the tissue fractions and the fourth is a linear map of them, which it is not in patients.
    lesion = np.array([v[3] >= CORE for v in _BRAIN.values()])
    solid = np.array([v[3] != CSF for v in _BRAIN.values()])
    # Width of a field in mm, the tissues that follow it, relative change of their T1, T2 and PD for one deviation.
    variation = [
        (_field(rng, length, axes)[mask], who, change)
        for length, who, change in (
            (24.0, solid & ~lesion, (0.05, 0.04, 0.0)),
            (7.0, solid, (0.08, 0.0, 0.0)),
            (7.0, solid, (0.0, 0.11, 0.0)),
            (12.0, solid, (0.0, 0.0, 0.02)),
            (6.0, lesion, (0.10, 0.12, 0.0)),
        )
    ]

    images = {}
    for name in contrasts:
        own = _rng(seed, "timing " + name)
        tr, te = _TIMING[name] * own.uniform(0.92, 1.08, 2)
        timing = {"tr": tr, "te": te}
        if name == "flair":  # nulls CSF but for a few per cent
            csf = tissue["csf"][0]
            timing["ti"] = csf * np.log(2 / (1 + np.exp(-tr / csf))) * own.uniform(0.98, 1.03)
        value = tissue | (agent if name == "t1ce" else {})
        t1, t2, pd = np.array([value[k] for k in _BRAIN]).T
        base = _spin(name, t1, t2, pd, timing)
        signal = base.astype(np.float32) @ part
        for field, who, (dt1, dt2, dpd) in variation:
            slope = _spin(name, t1 * (1 + dt1 * who), t2 * (1 + dt2 * who), pd * (1 + dpd * who), timing) - base
            signal += field * (slope.astype(np.float32) @ part)
        if name in ("t2", "flair"):
            # Fluid that flows is not at rest between the pulses: patches of it lose or gain signal.
            flow = _field(own, 10.0, axes)[mask]
            signal += np.float32(0.08 * base.max() if name == "flair" else -0.12 * base[0]) * np.abs(flow) * part[0]
        images[name] = _finish(signal, mask, axes, float(base[2]), seed, name)

    labels = np.zeros(shape, np.uint8)
    labels[mask] = np.array([v[3] for v in _BRAIN.values()], np.uint8)[part.argmax(0)]
    return Phantom(images, labels, (dx, dy, dz))


# ------------------------------------------------------------------------------------------------- heart


def _heart_fractions(seed: int, shape: Sequence[int], spacing: Sequence[float]) -> np.ndarray:
    """Tissue fractions [len(_HEART), X * Y * Z] of a short-axis stack; z runs from apex to base."""
    rng = _rng(seed, "anatomy")
    sub, fine, step = _supersample(shape, spacing, (1.6, 1.6, 3.1))
    axes = _axes(fine, step)
    edge = float(np.mean(step))

    def u(a: float, b: float) -> np.float32:
        return np.float32(rng.uniform(a, b))

    x, y, z = (a.reshape([-1 if i == j else 1 for j in range(3)]) for i, a in enumerate(axes))
    wave = _field(rng, 10.0, axes)
    slow = _field(rng, 28.0, axes)
    fine_wave = _field(rng, 4.0, axes)

    # LV long axis: t = 0 at the epicardial apex, 1 at the mitral plane; the axis bends, so the centre shifts.
    length, apex = u(78, 98), u(-49, -41)
    t = (z - apex) / length
    bend = np.clip(t, -0.2, 1.4) - np.float32(0.5)
    cx = u(-28, -16) + u(-26, -12) * -bend + u(6, 20) * bend**2
    cy = u(4, 16) + u(-14, -2) * bend - u(10, 26) * bend**2
    turn = u(0.25, 0.75)  # direction of the septum normal, from +x towards +y
    ex, ey = np.cos(turn), np.sin(turn)
    dx, dy = x - cx + np.float32(0.8) * slow, y - cy + np.float32(0.8) * wave
    a, b = dx * ex + dy * ey, dy * ex - dx * ey  # towards the right ventricle, along the septum

    cavity, wall = u(20, 26), u(8, 11.5)

    def profile(t0: np.float32, full: np.float32) -> np.ndarray:
        """Radius of a half ellipsoid that starts at t0 and is widest near 0.85; 0 below t0."""
        s = np.clip((t - t0) / (np.float32(0.85) - t0), 0, 2)
        return full * np.sqrt(np.maximum(s * (2 - s), 0) + np.float32(1e-6)) * (1 - np.float32(0.1) * (1 - s) ** 2)

    squash = u(0.92, 1.08)
    rho = np.sqrt((a * squash) ** 2 + (b / squash) ** 2)
    base = (t - 1) * length + np.float32(0.25) * a  # signed distance above the tilted mitral plane
    epi = np.maximum(rho - profile(np.float32(0), cavity + wall), base)
    rough = np.float32(0.9) * fine_wave * np.clip(np.float32(1.5) - t, 0.4, 1.5)
    endo = rho - profile(u(0.09, 0.13), cavity) + rough
    angle = u(-0.3, 0.3)
    papillary = np.full_like(rho, 99)
    for phi in (np.float32(2.2) + angle, np.float32(4.0) + angle):
        reach = cavity * u(0.60, 0.72)
        pa, pb = reach * np.cos(phi), reach * np.sin(phi)
        radius = u(4.0, 5.5) * np.sqrt(np.maximum(1 - ((t - u(0.50, 0.58)) / u(0.24, 0.30)) ** 2, 0)) - 1
        papillary = np.minimum(papillary, np.sqrt((a - pa) ** 2 + (b - pb) ** 2) - radius)

    # Right ventricle: an ellipse beside the LV, minus the LV; ends short of the apex, sweeps to the front.
    grow = profile(u(0.16, 0.28), np.float32(1))
    rv_a, rv_b = (cavity + wall) * grow * u(0.62, 0.78), u(-6, 0) + u(8, 18) * np.maximum(bend, 0)
    rv_r = u(25, 31), u(32, 40)
    rv = (np.sqrt(((a - rv_a) / rv_r[0]) ** 2 + ((b - rv_b) / rv_r[1]) ** 2) - grow) * rv_r[0]
    rv = np.where(grow < 0.02, np.float32(99), rv)
    rv = np.maximum(rv, base - 4)
    rv_blood = np.maximum(rv + 1.6 * rough, np.float32(0.5) - epi)

    # Above the valves: left atrium behind, right atrium, aortic root and outflow tract in front.
    top = -base
    la = np.maximum(_round(a + 2, b + u(8, 16), u(22, 28), u(17, 22)), top + 1)
    ra = np.maximum(_round(a - u(36, 44), b + u(6, 14), u(18, 23), u(20, 26)), top - 2)
    root = np.maximum(_round(a - u(14, 19), b - u(14, 18), u(11, 14), u(11, 14)), top - u(6, 10))
    outflow = np.maximum(_round(a - u(10, 18), b - u(40, 46), u(12, 15), u(10, 13)), top - u(4, 12))
    vessels = np.minimum(np.minimum(la, ra), np.minimum(root, outflow))

    # Trunk: skin fat, muscle with ribs, lungs; diaphragm rises towards the apex; spine and aorta behind.
    body_x, body_y = u(-18, 4), u(-30, -16)
    wide, tall = u(140, 168), u(98, 112)
    bx, by = x - body_x, y - body_y - np.float32(0.12) * z
    body = (np.sqrt((bx / wide) ** 2 + (by / tall) ** 2) - 1) * tall + 2 * slow
    theta = np.arctan2(by, bx)
    skin = u(7, 16) * (1 + u(0, 0.5) * np.cos(2 * theta + u(-1, 1)) + np.float32(0.15) * slow)
    muscle = u(10, 15) * (1 + u(0.1, 0.4) * np.cos(theta * 2))
    chest = body + skin + muscle
    rib = np.sin(theta * 9 + z * u(0.10, 0.16) + u(0, 6)) - np.float32(0.35)
    heart = _union(_union(epi, rv - 3, 6), vessels - 2, 6)
    groove = u(1, 5) * np.exp(-(((t - np.float32(0.95)) / np.float32(0.18)) ** 2))
    sac = heart - (2 + 2 * np.clip(slow + wave, -0.6, 2) + groove)
    dome = u(-26, -12) - z * u(0.35, 0.6) - (np.float32(0.0035) + u(0, 0.004)) * (x - u(20, 55)) ** 2 + 3 * slow
    dome = dome - u(0.002, 0.006) * (z + 48) ** 2 * np.float32(0.5)
    liver = np.maximum(y - _union(dome, cy - 18 - np.float32(0.004) * (x - cx) ** 2 + 3 * slow, 12), chest + 1)
    gut = np.sqrt((x - u(-75, -50)) ** 2 + (y - u(-70, -55)) ** 2 + (0.6 * (z + 40)) ** 2) - u(26, 38)
    gut = np.maximum(liver, gut)
    spine = _round(x - u(0, 16), y - u(-104, -96), 19, 16) + wave
    mediastinum = _round(x - cx - 14, y + 45, 20, 38) + 5 * slow + 3 * wave + np.maximum(20 - z, 0) * np.float32(0.3)
    canal = _round(x - 8, y + 126, 9, 7)
    bow = np.float32(0.004) * z * z
    aorta = _round(x - u(-26, -14) + bow, y - u(-80, -72) + np.float32(0.08) * z, u(10, 13), u(10, 13))

    left = np.ones(fine, np.float32)
    part = {k: np.zeros(fine, np.float32) for k in _HEART}

    def take(name: str, share: np.ndarray) -> None:
        share = share * left
        part[name] += share
        np.subtract(left, share, out=left)

    take("lung", _inside(-body, edge))  # air
    # Heart first: it lies over everything in the chest.
    ring = _inside(epi, edge)
    blood = _inside(np.maximum(endo, epi), edge) * (1 - _inside(papillary, edge))
    take("lv", ring * blood)
    take("myocardium", ring)
    take("rv", _inside(rv_blood, edge))
    take("myocardium", _inside(rv - 2.5, edge))
    take("blood", _inside(vessels, edge))
    take("myocardium", _inside(vessels - 1.8, edge))
    take("fat", _inside(sac, edge) * _inside(chest - 6, edge))
    take("fat", _inside(-(body + skin), edge))
    take("bone", _inside(spine, edge))
    take("blood", _inside(aorta, edge))
    take("muscle", _inside(aorta - 1.8, edge))
    take("bone", _inside(np.maximum(np.abs(chest - 5) - 3.5, -rib * 8), edge))
    take("muscle", _inside(-chest, edge))
    take("blood", _inside(canal, edge) * np.float32(0.8))
    take("muscle", _inside(gut, edge))
    take("liver", _inside(liver, edge) * np.where(fine_wave > 2.0, np.float32(0.6), np.float32(1)))
    middle = _inside(mediastinum, 2 * edge)
    take("fat", middle * np.clip(np.float32(0.45) + np.float32(0.25) * wave, 0, 1))
    take("muscle", middle)
    take("blood", _inside(np.float32(2.6) - fine_wave - np.float32(0.3) * wave, 0.8) * np.float32(0.7))
    take("lung", np.ones((1, 1, 1), np.float32))

    blocks = [n for pair in zip(shape, sub, strict=True) for n in pair]
    return np.stack([part[k].reshape(blocks).mean((1, 3, 5)).ravel() for k in _HEART])


def heart(seed: int, shape: Sequence[int] = (96, 96, 16), spacing: Sequence[float] = (3.0, 3.0, 6.0)) -> Phantom:
    """Short-axis balanced SSFP stack across the LV axis, from base to apex as scanners mostly store it; mm."""
    shape = tuple(int(n) for n in shape)
    dx, dy, dz = (float(s) for s in spacing)
    part = _heart_fractions(seed, shape, (dx, dy, dz))
    axes = _axes(shape, (dx, dy, dz))
    rng = _rng(seed, "tissue")
    t1, t2, pd = np.array(list(_vary(rng, _HEART).values())).T
    flip = np.deg2rad(rng.uniform(45, 60))
    base = pd * np.sin(flip) / (t1 / t2 * (1 - np.cos(flip)) + 1 + np.cos(flip))
    signal = base.astype(np.float32) @ part
    signal *= 1 + np.float32(0.04) * _field(rng, 8.0, axes).ravel() + np.float32(0.04) * _field(rng, 25.0, axes).ravel()
    image = _finish(signal, np.ones(shape, bool), axes, float(base[list(_HEART).index("lv")]), seed, "sax")
    labels = np.array([v[3] for v in _HEART.values()], np.uint8)[part.argmax(0)].reshape(shape)
    # The anatomy above is laid out from the apex upwards.
    return Phantom({"sax": image[..., ::-1].copy()}, labels[..., ::-1].copy(), (dx, dy, dz))
