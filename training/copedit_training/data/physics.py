"""Tissues and sequences: from relaxation times to the signal of each contrast, and what a scanner adds.

Signals are closed forms of T1, T2 and PD for spin echo, spoiled gradient echo, inversion recovery and MPRAGE. Every
image draws its own protocol. Times are in ms, angles in degrees, concentrations in mmol/l.

Sources: Stanisz et al., Magn Reson Med 2005 (T1, T2 of white, grey, muscle, blood at 1.5 and 3 T); Wansapura et al.,
J Magn Reson Imaging 1999 (3 T: white 832/80, grey 1331/110); Rooney et al., Magn Reson Med 2007 (T1 against field:
white 656 and 838, grey 1188 and 1607 at 1.5 and 4 T; fluid about 4300); Kwan et al., IEEE TMI 1999 (BrainWeb at 1.5 T:
white 500/70, grey 833/83, fluid 2569/329); de Bazelaire et al., Radiology 2004 (fat 343/58 and 382/68, marrow 549/49
and 586/49); Just and Thelen, Radiology 1988 (tumours, oedema); Neeb et al., NeuroImage 2006 (water: white .70, grey
.84).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from copedit_training.data.anatomy import INDEX, NAMES, axes_of, smooth_field

LESIONS = ("lesion", "active lesion", "necrosis", "solid tumour", "rim", "oedema")
FLUIDS = ("ventricle", "sulcus")


@dataclass(frozen=True)
class Tissues:
    """T1, T2 (ms) and PD (0..1) of every tissue of `NAMES`, float64 [K]; share of the T1 texture (`texture_t1`) and of
    the T2 texture (`texture_t2`), float64 [fields, K], as standard deviations of their logarithms; `flow`: the share of
    a tissue that an inversion misses, because it flowed in; `field`: tesla."""

    t1: np.ndarray
    t2: np.ndarray
    pd: np.ndarray
    texture_t1: np.ndarray
    texture_t2: np.ndarray
    flow: np.ndarray
    field: float


FIELDS = (30.0, 20.0, 8.0, 4.0)  # mm, lengths of the textures within tissue


# ------------------------------------------------------------------------------------------------- tissues


def draw_tissues(rng: np.random.Generator, age: float) -> Tissues:
    """One subject in one scanner of 1.5 or 3 T."""
    u = rng.uniform
    high = rng.random() < 0.6
    t1, t2, pd = (dict.fromkeys(NAMES, v) for v in (1000.0, 50.0, 0.0))

    def put(name: str, a: float, b: float, c: float) -> None:
        t1[name], t2[name], pd[name] = a, b, c

    # White: 1.5 T 500 (BrainWeb), 656 (Rooney), 884 (Stanisz); 3 T 832 (Wansapura), 1084 (Stanisz). Grey over white:
    # 1.6 (Wansapura) to 1.8 (Rooney), 1.3 in Stanisz at 1.5 T (1124 over 884); in T2 1.19 (BrainWeb), 1.43 (Stanisz).
    white = (u(700, 1100) if high else u(520, 900), u(60, 84), u(0.66, 0.75))
    grey = (white[0] * u(1.3, 1.8), white[1] * u(1.14, 1.44), white[2] + u(0.07, 0.16))
    put("white", *white)
    put("cortex", *grey)
    put("hippocampus", grey[0] * u(0.92, 1.08), grey[1] * u(1.0, 1.15), grey[2])
    put("cerebellar grey", grey[0] * u(0.88, 1.05), grey[1] * u(0.92, 1.05), grey[2] - u(0, 0.03))
    put("cerebellar white", white[0] * u(0.95, 1.12), white[1] * u(0.95, 1.1), white[2] + u(0, 0.03))
    put("brainstem", white[0] * u(1.0, 1.2), white[1] * u(0.97, 1.2), white[2] + u(0, 0.04))
    _deep_grey(put, u, white, grey, age)
    _fluids(put, u)
    _vessels(put, u, high)
    _outside(put, u, high)
    _lesions(put, u, white, grey)
    a, b, c = (np.array([d[name] for name in NAMES]) for d in (t1, t2, pd))
    texture_t1, texture_t2 = _textures(rng)
    return Tissues(a, b, c, texture_t1, texture_t2, _flow(rng), 3.0 if high else 1.5)


def _deep_grey(put, u, white: tuple[float, ...], grey: tuple[float, ...], age: float) -> None:
    """Between white and grey in T1; T2 shortened by iron, which rises with age (Hallgren and Sourander 1958)."""
    iron = (age - 18) / 72

    def between(low: float, high: float, short: float, rise: float) -> tuple[float, float, float]:
        share = u(low, high)
        t2 = white[1] * u(1.0, 1.22) * (1 - short * (0.4 + 0.6 * iron) * u(0.6, 1.3))
        return white[0] + share * (grey[0] - white[0]), t2, white[2] + u(0.4, 1) * (grey[2] - white[2]) + rise

    put("thalamus", *between(0.3, 0.7, 0.06, 0))
    put("caudate", *between(0.6, 1.0, 0.12, 0))
    put("putamen", *between(0.5, 0.9, 0.16, 0))
    put("pallidum", *between(0.05, 0.45, 0.38, -0.01))


def _fluids(put, u) -> None:
    """CSF: T1 2569 (BrainWeb) to 4300 (Rooney); T2 329 (BrainWeb) to about 2000 (Piechnik et al. 2009). In the sulci it
    shares voxels with vessels and pia and it flows."""
    t1, t2 = u(2600, 4500), u(350, 2000)
    put("ventricle", t1, t2, 1.0)
    put("sulcus", t1 * u(0.85, 1.0), t2 * u(0.45, 1.0), u(0.88, 1.0))
    put("plexus", t1 * u(0.35, 0.7), u(90, 300), u(0.8, 0.95))
    put("eye", t1 * u(0.9, 1.05), u(500, 1500), 1.0)  # vitreous is nearly water


def _vessels(put, u, high: bool) -> None:
    """Blood: T1 1441 and 1932 (Stanisz), T2 falls with oxygen and field (Zhao et al. 2007); flow voids lose signal."""
    blood = 1932.0 if high else 1441.0
    put("artery", blood * u(0.9, 1.05), u(60, 200), u(0.02, 0.5))
    put("vein", blood * u(0.9, 1.05), u(30, 90) if high else u(60, 180), u(0.1, 0.9))
    put("dura", u(700, 1300), u(25, 70), u(0.4, 0.8))


def _outside(put, u, high: bool) -> None:
    """Fat and marrow (de Bazelaire), muscle 1008/44 and 1412/50, optic nerve 815/77 and 1083/78 (Stanisz). Fat stays
    bright in trains of spin echoes (Henkelman et al. 1992), so its T2 reaches up; bone has hardly a signal."""
    put("fat", u(260, 420), u(58, 150), u(0.75, 1.0))
    put("marrow", u(300, 650), u(45, 110), u(0.4, 0.9))
    put("bone", u(200, 800), u(3, 15), u(0.05, 0.25))
    put("muscle", u(1250, 1550) if high else u(870, 1150), u(32, 52), u(0.7, 0.85))
    put("skin", u(700, 1200), u(20, 50), u(0.5, 0.8))
    put("mucosa", u(1000, 1800), u(70, 180), u(0.8, 0.95))
    put("nerve", u(950, 1200) if high else u(700, 900), u(65, 90), u(0.68, 0.8))


def _lesions(put, u, white: tuple[float, ...], grey: tuple[float, ...]) -> None:
    """Plaques: T1 and T2 above white matter's by tenths to twice (Larsson et al. 1988; Stevenson et al. 2000). Tumours
    T1 900-2000, T2 100-250, oedema in between, necrosis towards fluid (Just and Thelen 1988)."""
    more = u(0.1, 1.0)
    put("lesion", white[0] * (1 + more), white[1] * (1.3 + more * u(0.9, 1.6)), white[2] + u(0.06, 0.2))
    put("active lesion", white[0] * (1 + u(0.2, 0.9)), white[1] * u(1.4, 2.6), white[2] + u(0.08, 0.2))
    put("necrosis", u(1500, 3500), u(140, 700), u(0.9, 1.0))
    put("solid tumour", grey[0] * u(0.9, 1.5), grey[1] * u(1.05, 2.2), u(0.82, 0.95))
    put("rim", grey[0] * u(0.85, 1.35), grey[1] * u(0.9, 1.8), u(0.8, 0.95))
    wet = u(0.3, 1.1)
    put("oedema", white[0] * (1 + 0.9 * wet), white[1] * (1.45 + wet * u(1.0, 1.8)), white[2] + u(0.1, 0.24))


def _textures(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Standard deviations of log T1 and log T2 within tissue. Normal tissue: regional differences of white matter's T1
    of 5 to 10 % (Rooney) and of its T2 (Wansapura: 3 to 8 %); lesions and fluids vary most."""
    t1 = np.zeros((len(FIELDS), len(NAMES)))
    t2 = np.zeros_like(t1)
    level = rng.uniform(0, 1, 4)
    t1[:] = (level * [0.05, 0.02, 0.06, 0.03])[:, None]
    t2[:] = (level * [0.02, 0.03, 0.05, 0.03])[:, None]
    for name in LESIONS:
        t1[2, INDEX[name]], t2[2, INDEX[name]] = rng.uniform(0.05, 0.25, 2)
    for name in (*FLUIDS, "plexus"):
        t1[1:3, INDEX[name]], t2[1:3, INDEX[name]] = rng.uniform(0, 0.12, 2), rng.uniform(0, 0.25, 2)
    for name in ("fat", "muscle", "mucosa", "marrow", "skin", "dura"):
        t1[2:, INDEX[name]], t2[2:, INDEX[name]] = rng.uniform(0.05, 0.2, 2), rng.uniform(0.1, 0.35, 2)
    return t1, t2


def _flow(rng: np.random.Generator) -> np.ndarray:
    """Fluid that the inversion of a FLAIR misses: half of the scans show some in the ventricles (Rydberg et al. 1995).
    Sulci, where it pulses between vessels and pia, are less well nulled: on two patients half as bright as grey."""
    out = np.zeros(len(NAMES))
    if rng.random() < 0.5:
        out[INDEX["ventricle"]] = rng.uniform(0, 0.06)
    if rng.random() < 0.75:
        out[INDEX["sulcus"]] = rng.uniform(0, 0.1)
    return out


def with_gadolinium(tissues: Tissues, rng: np.random.Generator) -> Tissues:
    """Minutes after 0.1 mmol/kg: 1/T = 1/T0 + r C with r1 4.1 and 3.7, r2 4.6 and 5.2 per mmol/l and second for
    Gd-DTPA in plasma at 1.5 and 3 T (Rohrer et al. 2005). Blood then holds about 0.5 mmol/l."""
    u = rng.uniform
    blood = u(0.25, 1.3)
    amount = np.zeros(len(NAMES))
    for name, low, high in (
        ("vein", 0.8, 1.1), ("artery", 0.6, 1.1), ("plexus", 0.5, 1.2), ("mucosa", 0.4, 1.2), ("dura", 0.2, 0.9),
        ("muscle", 0.05, 0.15), ("skin", 0.1, 0.4), ("marrow", 0.02, 0.15), ("cortex", 0.004, 0.02),
        ("caudate", 0.004, 0.02), ("putamen", 0.004, 0.02), ("white", 0.0, 0.008), ("oedema", 0, 0.02),
        ("active lesion", 0.2, 0.9), ("necrosis", 0.0, 0.08),
    ):  # fmt: skip
        amount[INDEX[name]] = blood * u(low, high)
    amount[INDEX["rim"]] = blood * (u(0.3, 1.3) if rng.random() < 0.85 else u(0.0, 0.1))
    amount[INDEX["solid tumour"]] = blood * u(0.0, 0.06)
    r1, r2 = (3.7, 5.2) if tissues.field > 2 else (4.1, 4.6)
    t1 = 1 / (1 / tissues.t1 + r1 * amount / 1000)
    t2 = 1 / (1 / tissues.t2 + r2 * amount / 1000)
    # Slow flow is no longer void once its T1 is short: veins shine.
    pd = tissues.pd.copy()
    pd[INDEX["vein"]] = max(pd[INDEX["vein"]], u(0.5, 0.95))
    return replace(tissues, t1=t1, t2=t2, pd=pd)


# ------------------------------------------------------------------------------------------------- sequences


def spin_echo(t1: np.ndarray, t2: np.ndarray, tr: float, te: float) -> np.ndarray:
    """Signal per PD of a spin echo: (1 - 2 exp(-(TR - TE/2)/T1) + exp(-TR/T1)) exp(-TE/T2) (Bernstein et al. 2004)."""
    return (1 - 2 * np.exp(-(tr - te / 2) / t1) + np.exp(-tr / t1)) * np.exp(-te / t2)


def gradient_echo(t1: np.ndarray, t2s: np.ndarray, tr: float, te: float, flip: float) -> np.ndarray:
    """Spoiled gradient echo in the steady state: sin a (1 - E) / (1 - E cos a) exp(-TE/T2*) (Ernst, Anderson 1966)."""
    a, e = np.deg2rad(flip), np.exp(-tr / t1)
    return np.sin(a) * (1 - e) / (1 - e * np.cos(a)) * np.exp(-te / t2s)


def inversion_recovery(
    t1: np.ndarray, t2: np.ndarray, tr: float, te: float, ti: float, efficiency: float | np.ndarray
) -> np.ndarray:
    """Signed signal of an inversion recovery (turbo) spin echo whose train ends long before TR:
    (1 - (1 + f) exp(-TI/T1) + f exp(-TR/T1)) exp(-TE/T2), f the efficiency of the inversion (Hajnal et al. 1992)."""
    return (1 - (1 + efficiency) * np.exp(-ti / t1) + efficiency * np.exp(-tr / t1)) * np.exp(-te / t2)


def mprage(
    t1: np.ndarray, t2s: np.ndarray, tr: float, te: float, ti: float, flip: float, echo: float, count: int, f: float
) -> np.ndarray:
    """Signed signal of an MPRAGE at the middle of its train, in the steady state (Deichmann et al. 2000).

    tr: from inversion to inversion, ti: to the middle of the train of `count` pulses of `flip` degrees every `echo` ms;
    f: efficiency of the inversion. M before the inversion solves M = recover(train(recover(-f M)))."""
    a = np.deg2rad(flip)
    before = ti - echo * count / 2
    after = tr - before - echo * count
    ea, ed, e = np.exp(-before / t1), np.exp(-after / t1), np.exp(-echo / t1)
    mu = np.cos(a) * e
    settled = (1 - e) / (1 - mu)

    def train(m: np.ndarray, pulses: float) -> np.ndarray:
        return settled + (m - settled) * mu**pulses

    # Every part is affine in M, so two evaluations give the slope and the offset of the whole cycle.
    def cycle(m: np.ndarray) -> np.ndarray:
        return 1 - (1 - train(1 - (1 + f * m) * ea, count)) * ed

    offset = cycle(np.zeros_like(t1))
    steady = offset / (1 - (cycle(np.ones_like(t1)) - offset))
    return np.sin(a) * train(1 - (1 + f * steady) * ea, count / 2) * np.exp(-te / t2s)


@dataclass(frozen=True)
class Protocol:
    """A drawn protocol: kind, its numbers by name, whether its image is a magnitude, and how much magnetisation
    transfer darkens white and grey matter (trains of refocusing pulses; Melki and Mulkern 1992)."""

    kind: str
    values: dict[str, float]
    magnitude: bool = True
    transfer: float = 0.0
    fat: float = 1.0  # what fat suppression leaves


def draw_sequence(contrast: str, rng: np.random.Generator, tissues: Tissues) -> Protocol:
    """A protocol for one of `CONTRASTS`, drawn again until it shows what a radiographer wants from it."""
    for _ in range(60):
        protocol = _SEQUENCES[contrast](rng, tissues)
        if _useful(contrast, signal(tissues, protocol)):
            break
    return protocol


def _useful(contrast: str, value: np.ndarray) -> bool:
    """T1: white over grey, which is not nulled, and fluid dark; FLAIR: fluid dark, grey about as bright as white or a
    little brighter, as in all clinical protocols (Hajnal 1992, Rydberg 1995)."""
    white, grey, fluid = (float(value[INDEX[name]]) for name in ("white", "cortex", "ventricle"))
    if contrast == "flair":
        return abs(fluid) < 0.3 * white and 0.95 * white < grey < 1.4 * white
    return contrast not in ("t1", "t1ce") or (0.4 * white < grey < 0.97 * white and abs(fluid) < 0.7 * grey)


def _draw_t1(rng: np.random.Generator, tissues: Tissues) -> Protocol:
    u = rng.uniform
    kind = str(rng.choice(["spin echo", "gradient echo", "inversion recovery", "mprage"], p=[0.25, 0.2, 0.3, 0.25]))
    if kind == "spin echo":  # clinical 2-D T1 (BraTS sites): TR 400-800, TE 8-20
        return Protocol(kind, {"tr": u(400, 800), "te": u(7, 20)}, True, u(0, 0.1))
    if kind == "gradient echo":  # IXI: 9.8/4.6, 8 degrees; 3-D SPGR 7-35 ms, 2-D FLASH to 250 ms at 60-80 degrees
        if rng.random() < 0.3:
            return Protocol(kind, {"tr": u(120, 300), "te": u(2, 6), "flip": u(60, 80)})
        return Protocol(kind, {"tr": u(7, 35), "te": u(2, 6), "flip": u(12, 35)})
    if kind == "inversion recovery":  # T1 FLAIR; Lesjak 2017: 2000/20, TI 800
        values = {"tr": u(1700, 2700), "te": u(7, 25), "ti": u(650, 1050), "f": u(0.9, 1)}
        return Protocol(kind, values, bool(rng.random() < 0.7), u(0, 0.08))
    # ADNI: 2300/2.98, TI 900, 9 degrees; 2400/3.5, TI 1000, 8 degrees; IR-SPGR 6-12 degrees
    values = {"tr": u(1500, 2600), "te": u(2, 5), "ti": u(750, 1150), "flip": u(7, 13), "echo": u(6, 9.5)}
    values |= {"count": float(rng.integers(110, 190)), "f": u(0.9, 1)}
    # The train, whose middle is TI, begins after one inversion and ends before the next.
    longest = min(1.8 * values["ti"], 2 * (values["tr"] - values["ti"]))
    values["count"] = float(min(values["count"], int(longest / values["echo"])))
    return Protocol(kind, values, bool(rng.random() < 0.8))


def _draw_t2(rng: np.random.Generator, tissues: Tissues) -> Protocol:
    """Turbo spin echo: BraTS sites 2500-6500/80-120; Lesjak 2017 6000/120; IXI 8178/100; ADNI 3000-9000/80-100."""
    u = rng.uniform
    fat = u(0.05, 0.4) if rng.random() < 0.35 else 1.0
    return Protocol("turbo spin echo", {"tr": u(2500, 9000), "te": u(75, 140)}, True, u(0, 0.2), fat)


def _draw_flair(rng: np.random.Generator, tissues: Tissues) -> Protocol:
    """TR 5000-11000, TE 80-175, TI near the null of CSF (Hajnal 1992; ADNI 9000/90/2500; Lesjak 2017, a 3-D one:
    5000/392/1800, whose long train of low flip angles weighs like 90-140 ms (Mugler 2014)). Mostly fat-suppressed, as
    in all three raw development heads, whose scalp is darker than their brain."""
    u = rng.uniform
    tr, f = u(4800, 11000), u(0.95, 1)
    rest = tr - u(0, 0.12) * tr  # a long train leaves less time to recover
    fluid = tissues.t1[INDEX["ventricle"]]
    null = fluid * np.log((1 + f) / (1 + f * np.exp(-rest / fluid)))
    fat = u(0.05, 0.5) if rng.random() < 0.65 else 1.0
    values = {"tr": rest, "te": u(80, 175), "ti": null * u(0.92, 1.03), "f": f}
    return Protocol("flair", values, bool(rng.random() < 0.85), u(0, 0.3), fat)


def _draw_pd(rng: np.random.Generator, tissues: Tissues) -> Protocol:
    """IXI: 8178/8; dual echoes 2000-4000/10-30."""
    u = rng.uniform
    return Protocol("turbo spin echo", {"tr": u(2000, 9000), "te": u(8, 30)}, True, u(0, 0.15))


_SEQUENCES = {
    "t1": _draw_t1,
    "t1ce": _draw_t1,
    "t2": _draw_t2,
    "flair": _draw_flair,
    "pd": _draw_pd,
}
CONTRASTS = tuple(_SEQUENCES)

_BOUND = {"white": 1.0, "cerebellar white": 1.0, "brainstem": 0.9, "cortex": 0.6, "hippocampus": 0.6, "caudate": 0.65}
_BOUND |= {"thalamus": 0.8, "putamen": 0.65, "pallidum": 0.9, "cerebellar grey": 0.6, "muscle": 1.0, "nerve": 0.9}


def signal(tissues: Tissues, s: Protocol) -> np.ndarray:
    """Signed signal of every tissue, float64 [K]."""
    t1, t2, v = tissues.t1, tissues.t2, s.values
    t2s = 0.65 * t2  # T2* of white matter 48-53 ms at 3 T, 66 at 1.5 T (Peters et al. 2007) to T2 of 70-80
    if s.kind == "spin echo":
        out = spin_echo(t1, t2, v["tr"], v["te"])
    elif s.kind == "turbo spin echo":
        out = (1 - np.exp(-v["tr"] / t1)) * np.exp(-v["te"] / t2)
    elif s.kind == "gradient echo":
        out = gradient_echo(t1, t2s, v["tr"], v["te"], v["flip"])
    elif s.kind == "mprage":
        out = mprage(t1, t2s, v["tr"], v["te"], v["ti"], v["flip"], v["echo"], int(v["count"]), v["f"])
    else:
        efficiency = v["f"] * (1 - 2 * tissues.flow if s.kind == "flair" else 1)
        out = inversion_recovery(t1, t2, v["tr"], v["te"], v["ti"], efficiency)
    bound = np.array([_BOUND.get(name, 0.0) for name in NAMES])
    kept = 1 - s.transfer * bound
    kept[INDEX["fat"]] *= s.fat
    kept[INDEX["marrow"]] *= 0.5 + 0.5 * s.fat  # half fat (adults: 40 to 60 %, de Bazelaire)
    return tissues.pd * out * kept


def signal_with_texture(tissues: Tissues, s: Protocol, step: float = 0.03) -> np.ndarray:
    """The signals and their response to the texture fields: float64 [1 + fields, K], to first order."""
    rows = [signal(tissues, s)]
    by_t1, by_t2 = (
        (signal(replace(tissues, **{k: getattr(tissues, k) * np.exp(step)}), s)
         - signal(replace(tissues, **{k: getattr(tissues, k) * np.exp(-step)}), s)) / (2 * step)
        for k in ("t1", "t2")
    )  # fmt: skip
    rows += [by_t1 * a + by_t2 * b for a, b in zip(tissues.texture_t1, tissues.texture_t2, strict=True)]
    return np.stack(rows)


# ------------------------------------------------------------------------------------------------- the scanner


@dataclass(frozen=True)
class Scan:
    """How an image is acquired: mm of its voxels along each axis, width of the point spread (voxels of its own), shift
    against the other images (mm), noise as a share of white matter, ghost share and axis, gamma, bias (log), where the
    first slice lies (voxels), whether the scanner writes 0 where there is only air, and the `floor`: down to which
    share of the darkest tissue grey values are cut off and set to 0, as windows and normalisation do."""

    voxel: tuple[float, float, float]
    spread: float
    shift: tuple[float, float, float]
    noise: float
    ghost: float
    ghost_axis: int
    gamma: float
    bias: float
    offset: tuple[float, float, float]
    silent_air: bool
    floor: float = 0.0


def draw_scan(rng: np.random.Generator, contrast: str, stripped: bool) -> Scan:
    """An isotropic 3-D image (T1 mostly) or slices of 3 to 6 mm, mostly axial.

    Noise 0.4 to 4 % of white matter on the voxels of the model, which average several of the scanner's; two
    registrations of 0.3 mm; ghosts of at most 3 % of the signal in one scan of ten. Fluid at exactly 0 and bias that
    nobody corrected are found in published tumour studies, stripped ones too."""
    u = rng.uniform
    voxel = np.full(3, u(0.8, 1.3))
    if rng.random() > (0.55 if contrast in ("t1", "t1ce") else 0.35):
        plane = int(rng.choice(3, p=[0.12, 0.13, 0.75]))
        voxel[:] = u(0.5, 1.1)
        voxel[plane] = u(3, 6)
    small = 0.3 if stripped else 0.2
    return Scan(
        (float(voxel[0]), float(voxel[1]), float(voxel[2])),
        u(0.3, 0.9),
        tuple(rng.normal(0, small, 3)),
        float(np.exp(u(np.log(0.004), np.log(0.04)))),
        u(0.005, 0.03) if rng.random() < 0.1 else 0.0,
        int(rng.integers(0, 2)),
        float(np.exp(rng.normal(0, 0.18))),
        u(0, 0.1) if stripped and rng.random() < 0.8 else u(0.02, 0.2),  # log; stripped mostly are bias-corrected
        tuple(u(0, 1, 3)),
        bool(rng.random() < 0.3),
        u(0.1, 1.1) if rng.random() < 0.25 else 0.0,
    )  # fmt: skip


def blur_matrix(count: int, spacing: float, voxel: float, spread: float, offset: float, shift: float) -> np.ndarray:
    """What scanning in voxels of `voxel` mm and interpolating back does along an axis of `count` voxels: float32
    [count, count], rows sum to 1. offset: where the first slice lies, in voxels of the scan; shift: mm."""
    grid = (np.arange(count) + 0.5) * spacing
    if voxel <= spacing:  # finer than the grid: only the point spread
        return _gaussian(grid, grid + shift, max(spread * voxel, 1e-3))
    centres = np.arange(-1, count * spacing / voxel + 2) * voxel + offset * voxel
    low, high = centres - voxel / 2, centres + voxel / 2
    left, right = grid - spacing / 2, grid + spacing / 2
    overlap = np.clip(np.minimum(high[:, None], right) - np.maximum(low[:, None], left), 0, None)
    overlap = overlap @ _gaussian(grid, grid, max(spread * voxel * 0.4, 1e-3))
    total = overlap.sum(1, keepdims=True)
    box = np.divide(overlap, total, out=np.zeros_like(overlap), where=total > 0)
    place = np.clip(grid + shift, centres[0], centres[-1])
    back = np.clip(1 - np.abs(place[:, None] - centres) / voxel, 0, None)
    out = back * (total[:, 0] > 0) @ box
    return (out / np.maximum(out.sum(1, keepdims=True), 1e-9)).astype(np.float32)


def _gaussian(source: np.ndarray, target: np.ndarray, sigma: float) -> np.ndarray:
    """Rows: weights of `source` about each of `target`; linear interpolation where sigma is far below the spacing."""
    step = source[1] - source[0] if len(source) > 1 else 1.0
    distance = np.abs(target[:, None] - source)
    weight = np.clip(1 - distance / step, 0, None)
    if sigma > 0.3 * step:
        weight = np.exp(-0.5 * (distance / sigma) ** 2)
    else:  # blend in the neighbours so that the second moment is sigma^2
        share = (sigma / step) ** 2
        near = np.abs(distance / step - 1) < 1
        weight = weight * (1 - share) + 0.5 * share * np.where(near, 1 - np.abs(distance / step - 1), 0)
    total = weight.sum(1, keepdims=True)
    return (weight / np.maximum(total, 1e-9)).astype(np.float32)


def acquire(clean: Tensor, scan: Scan, spacing: Sequence[float], magnitude: bool, rng: np.random.Generator) -> Tensor:
    """A signed volume [X, Y, Z] through the scanner: float32 >= 0, in units where white matter is about 1."""
    for axis in range(3):
        n = clean.shape[0]
        matrix = blur_matrix(n, spacing[axis], scan.voxel[axis], scan.spread, scan.offset[axis], scan.shift[axis])
        weights = torch.from_numpy(matrix).to(clean.device)
        clean = torch.tensordot(clean, weights, dims=([0], [1]))  # the axes rotate: three times is once around
    if not magnitude:
        clean = clean.clamp(min=0)
    if scan.bias:
        axes = axes_of(clean.shape, spacing)
        clean = clean * torch.exp(scan.bias * smooth_field(rng, axes, 60.0, 1, clean.device)[0])
    if scan.ghost:
        half = clean.shape[scan.ghost_axis] // 2
        clean = clean + scan.ghost * torch.roll(clean, half, scan.ghost_axis)
    generator = torch.Generator(clean.device).manual_seed(int(rng.integers(2**62)))
    noise = torch.randn((2, *clean.shape), generator=generator, device=clean.device) * scan.noise
    image = torch.hypot(clean + noise[0], noise[1])  # Rician (Gudbjartsson and Patz 1995)
    return image**scan.gamma
