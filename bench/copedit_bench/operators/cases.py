"""The one table of the operators: what goes in, at which sizes, and the least that each must move and compute.

Tests, compile gates and benchmarks walk over `OPERATORS`; a new operator is a row here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from sympy import Expr, symbols
from torch import Tensor

import copedit_kernels
from copedit_bench.operators import contestants
from copedit_bench.operators.contestants import EPS, STEP, Contestant, Verdict, four
from copedit_kernels import reference
from copedit_rt.config import PRESETS, ModelConfig
from copedit_rt.networks.precision import exact_float32, tried_convolutions

BATCHES = (1, 4, 32)
TARGET_BATCH = 2  # nearest_code also at the 36,864 vectors that its target speaks of
DIMS = (32, 48, 64, 96)  # of attention's heads

Sizes = Mapping[str, int]
Inputs = Callable[..., dict[str, Any]]


class Fill:
    """The random tensors of a case, in its dtype unless another is asked for."""

    def __init__(self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0):
        self.dtype, self.generator = dtype, torch.Generator(device).manual_seed(seed)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        device = self.generator.device
        return torch.randn(shape, generator=self.generator, device=device).to(dtype or self.dtype)

    def modulation(self, batch: int, channels: int, count: int, dtype: torch.dtype) -> list[Tensor]:
        """[B, C] each, as the denoiser has them: slices of one [B, 6 C]."""
        return [part.detach() for part in self(batch, 6 * channels, dtype=dtype).chunk(6, dim=-1)[:count]]

    def rows(self, *shape: int) -> Tensor:
        """Rows, the last dimension, that differ in size and offset."""
        return self(*shape) * 2 ** (2 * self(*shape[:-1], 1)).clamp(-4, 4) + self(*shape[:-1], 1) / 2


@dataclass(frozen=True)
class Operator:
    """A row of the table: an operator, or one way to use it.

    function: its public name. inputs: (sizes, fill, **variant) -> arguments by name, in order. sizes: its letters in a
    model at a batch size. floors: pass -> (bytes, operations). learn: the arguments that get gradients. mutated: those
    that a call writes to.

    Benchmarks: contestants: who computes it, "ours" first. baseline: the one whose error in low precision sets the
    tolerance. exact: None for the reference. dtype: the only one that is measured, None for all. judge: None for the
    usual comparison of values. compute_bound: a fast kernel meets the speed of products first, not that of a copy.

    Tests: small: a few ragged tiles. ranges: what each letter is drawn from; few: what float64 draws as well, where the
    reference's error in low precision would say nothing. gates: sizes whose machine code is looked at, in place of
    those of brain-brats. variants: what `inputs` also takes; the first is what benchmarks measure. strided: the last
    dimension may have gaps too.
    """

    function: str
    inputs: Inputs
    sizes: Callable[[ModelConfig, int], dict[str, int]]
    floors: Mapping[str, tuple[Expr, Expr]]
    contestants: Mapping[str, Contestant]
    small: Sizes
    ranges: Mapping[str, tuple[int, ...]]
    baseline: str = "eager"
    learn: tuple[str, ...] = ()
    mutated: tuple[str, ...] = ()
    exact: Callable[..., Any] | None = None
    dtype: torch.dtype | None = None
    judge: Callable[..., Verdict] | None = None
    compute_bound: bool = False
    few: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    gates: tuple[Sizes, ...] = ({},)
    variants: tuple[Mapping[str, Any], ...] = ({},)
    strided: bool = False

    @property
    def reference(self) -> Callable[..., Any]:
        return getattr(reference, self.function)

    @property
    def ours(self) -> list[str]:
        """The contestants that are ours."""
        return [name for name in self.contestants if name.startswith("ours")]


@dataclass(frozen=True)
class Case:
    """One operator at one shape.

    presets: the models that use it. sizes: letter -> number, as in the floors. tier: 0 is measured with every
    contestant, 1 without the costly compilers, 2 with nothing that is compiled for the shape.
    """

    op: str
    presets: tuple[str, ...]
    sizes: Sizes
    tier: int = 2

    @property
    def label(self) -> str:
        return " ".join(f"{letter}={number}" for letter, number in self.sizes.items())


# The letters' values in a model


def _token_sizes(config: ModelConfig, batch: int) -> dict[str, int]:
    tokens = math.prod(n // p for n, p in zip(config.latent, config.denoiser.patch, strict=True))
    return {"B": batch, "m": len(config.elements), "T": tokens}


def _attention_sizes(config: ModelConfig, batch: int) -> dict[str, int]:
    return _token_sizes(config, batch) | {"H": config.denoiser.heads, "D": config.denoiser.head_dim}


def _norm_sizes(config: ModelConfig, batch: int) -> dict[str, int]:
    return _token_sizes(config, batch) | {"C": config.denoiser.width}


def _swiglu_sizes(config: ModelConfig, batch: int) -> dict[str, int]:
    return _token_sizes(config, batch) | {"F": config.denoiser.hidden}


def _code_sizes(config: ModelConfig, batch: int) -> dict[str, int]:
    vectors = batch * len(config.elements) * math.prod(config.latent)
    return {"N": vectors, "K": config.tokenizer.codes, "d": config.tokenizer.latent_channels}


def _step_sizes(config: ModelConfig, batch: int) -> dict[str, int]:
    values = config.tokenizer.latent_channels * math.prod(config.latent)
    return {"B": batch, "m": len(config.elements), "M": 1, "E": values}


def _conv_sizes(config: ModelConfig, batch: int) -> dict[str, int]:
    """The residual units of the first level that has any, where most of the tokenizer's operations are; a study's
    elements come one by one, whatever the batch."""
    c = config.tokenizer
    level = next((i for i, count in enumerate(c.units) if count), 0)
    strides = (math.prod(along) for along in zip(*c.strides[: level + 1], strict=True))
    plane = (n // s for n, s in zip(config.image, strides, strict=True))
    return dict(zip("PQR", plane, strict=True)) | {"C": c.channels[level], "U": c.hidden[level]}


# What goes in


def _attention(axis: str, sizes: Sizes, fill: Fill, turned: bool = True, size: float = 1.0) -> dict[str, Any]:
    B, m, T, H, D = (sizes[letter] for letter in "BmTHD")
    angle = 3 * fill(T, D // 2, dtype=torch.float32)
    rope = torch.stack((angle.cos(), angle.sin())) if turned else None
    return {"qkv": size * fill(B, m, T, 3, H, D), "rope": rope, "axis": axis}


def _norm(
    gated: bool, sizes: Sizes, fill: Fill, kind: str = "rms", weighted: bool = True, autocast: bool = False
) -> dict[str, Any]:
    """autocast: parameters stay float32 under activations of 16 bits."""
    B, m, T, C = (sizes[letter] for letter in "BmTC")
    dtype = torch.promote_types(fill.dtype, torch.float32) if autocast else fill.dtype
    shift, scale, gate = fill.modulation(B, C, 3, dtype)
    return {
        "x": fill.rows(B, m, T, C),
        **({"branch": fill(B, m, T, C), "gate": gate} if gated else {}),
        "scale": scale,
        "shift": shift,
        "weight": 1 + fill(C, dtype=dtype) / 2 if weighted else None,
        "kind": kind,
        "eps": EPS,
    }


def _swiglu(sizes: Sizes, fill: Fill) -> dict[str, Any]:
    return {"h": fill.rows(sizes["B"], sizes["m"], sizes["T"], 2 * sizes["F"])}


def _codes(sizes: Sizes, fill: Fill, ties: bool = False) -> dict[str, Any]:
    """ties: whole numbers, so that many codes are equally near, all of them far away."""
    z, book = (fill(sizes[letter], sizes["d"]) for letter in "NK")
    return {"z": z.round(), "codebook": book.round() + 5} if ties else {"z": z, "codebook": book}


def _step(sizes: Sizes, fill: Fill, on_device: bool = True) -> dict[str, Any]:
    """Of an observed element x0 is never read, hence NaN here."""
    B, m, missing, E = (sizes[letter] for letter in ("B", "m", "M", "E"))
    z, x0 = (fill(B, m, E // 8, 2, 2, 2) for _ in range(2))
    observed = (torch.arange(m, device=z.device) >= missing).expand(B, m).contiguous()
    keep = torch.linspace(0.95, 0.0, 20, dtype=torch.float64, device=z.device)
    table = torch.stack((keep, 1 - keep), dim=1)
    step = torch.tensor(STEP, device=z.device) if on_device else STEP
    x0 = x0.masked_fill(observed.view(B, m, 1, 1, 1, 1), torch.nan)
    return {"z": z, "x0": x0, "observed": observed, "table": table, "step": step}


def _conv(sizes: Sizes, fill: Fill, plain: bool = False) -> dict[str, Any]:
    """As the second convolution of a residual unit. plain: without bias, residual and ReLU."""
    P, Q, R, C, U = (sizes[letter] for letter in "PQRCU")
    x, weight = fill(sizes.get("N", 1), P, Q, R, C), fill(U, 3, 3, 3, C) * (27 * C) ** -0.5
    bias, residual = (None, None) if plain else (fill(U), fill(*x.shape[:4], U))
    return {"x": x, "weight": weight, "bias": bias, "residual": residual, "relu": not plain}


def _exact_code(z: Tensor, codebook: Tensor) -> Tensor:
    """The reference in float32, which the contract is about, in larger pieces than the models need."""
    return reference.nearest_code(z.float(), codebook.float(), rows=4096)


def _exact_conv(x: Tensor, *given: Any) -> Tensor:
    """The reference; on a GPU, where a convolution in float64 may take minutes or 16 GB, in float32 without TF32."""
    if not x.is_cuda:
        return reference.conv3(x, *given)
    single = [t.float() if isinstance(t, Tensor) else t for t in (x, *given)]
    with exact_float32():
        return reference.conv3(*single).double()  # type: ignore[arg-type]


# The table. Letters: B samples, m elements, T tokens, H heads, D channels a head, C channels, F hidden width,
# N vectors, K codes, d channels a code, E values an element, M missing elements a sample, s bytes a value.
#
# Bytes: every input once, every output once. Operations: additions, multiplications, divisions and exponentials one
# each; of attention only the matrix products, as is usual (2 forward; 5 backward: the scores again, dV, dP, dQ, dK).
# Row-wise operators: what does not depend on the token (weight * (1 + scale), gradients of the modulation after the sum
# over tokens) is left out.

# P, Q, R voxels along the axes, U filters.

B, m, T, H, D, C, F, N, K, d, E, M, s = symbols("B m T H D C F N K d E M s")
P, Q, R, U = symbols("P Q R U")
_NORM_TESTS: dict[str, Any] = {
    "small": {"B": 2, "m": 3, "T": 5, "C": 24},
    "ranges": {"B": (1, 2, 3), "m": (1, 2, 4), "T": (1, 2, 5, 9), "C": (8, 24, 64, 104, 192, 288)},
    "gates": ({"C": 192}, {"C": 384}, {"C": 1152}, {"C": 768}),
    "variants": ({}, {"autocast": True}, {"kind": "layer", "weighted": False}),
}

OPERATORS: dict[str, Operator] = {
    "axis_attention_token": Operator(
        function="axis_attention",
        inputs=partial(_attention, "token"),
        sizes=_attention_sizes,
        floors={
            "forward": (4 * B * m * T * H * D * s + 4 * T * D, 4 * B * m * H * T * T * D),
            "backward": (7 * B * m * T * H * D * s + 4 * T * D, 10 * B * m * H * T * T * D),
        },
        contestants=contestants.attention("token"),
        baseline="sdpa-math",
        learn=("qkv",),
        compute_bound=True,
        small={"B": 1, "m": 2, "T": 20, "H": 1, "D": 48},
        ranges={"B": (1, 2), "m": (1,), "T": (15, 33, 63, 64, 65, 70), "H": (1, 2), "D": DIMS},
        few={"T": (1, 2, 3, 17)},
        gates=tuple({"H": 2, "D": dim} for dim in DIMS),
        variants=({}, {"turned": False}),
    ),
    "axis_attention_element": Operator(
        function="axis_attention",
        inputs=lambda sizes, fill, turned=False, size=1.0: _attention("element", sizes, fill, turned, size),
        sizes=_attention_sizes,
        floors={
            "forward": (4 * B * m * T * H * D * s, 4 * B * T * H * m * m * D),
            "backward": (7 * B * m * T * H * D * s, 10 * B * T * H * m * m * D),
        },
        contestants=contestants.attention("element"),
        baseline="sdpa-math",
        learn=("qkv",),
        small={"B": 2, "m": 3, "T": 5, "H": 2, "D": 48},
        ranges={"B": (1, 2), "m": (3, 4, 5, 8), "T": (1, 2, 5), "H": (1, 2), "D": DIMS},
        few={"m": (1, 2)},
        gates=(*({"H": 2, "D": dim} for dim in DIMS), {"H": 2, "D": 32, "m": 8}, {"H": 2, "D": 96, "m": 2}),
        variants=({}, {"turned": True}),
    ),
    "ada_norm": Operator(
        function="ada_norm",
        inputs=partial(_norm, False),
        sizes=_norm_sizes,
        floors={
            "forward": (2 * B * m * T * C * s + (2 * B + 1) * C * s, 5 * B * m * T * C),
            "backward": (3 * B * m * T * C * s + (3 * B + 2) * C * s, 12 * B * m * T * C),
        },
        contestants=four(copedit_kernels.ada_norm, contestants.eager_ada_norm),
        learn=("x", "scale", "shift", "weight"),
        **_NORM_TESTS,
    ),
    "gated_residual_ada_norm": Operator(
        function="gated_residual_ada_norm",
        inputs=partial(_norm, True),
        sizes=_norm_sizes,
        floors={
            "forward": (4 * B * m * T * C * s + (3 * B + 1) * C * s, 7 * B * m * T * C),
            "backward": (6 * B * m * T * C * s + (5 * B + 2) * C * s, 16 * B * m * T * C),
        },
        contestants=four(copedit_kernels.gated_residual_ada_norm, contestants.eager_gated),
        learn=("x", "branch", "gate", "scale", "shift", "weight"),
        **_NORM_TESTS,
    ),
    "swiglu": Operator(
        function="swiglu",
        inputs=_swiglu,
        sizes=_swiglu_sizes,
        floors={
            "forward": (3 * B * m * T * F * s, 5 * B * m * T * F),
            "backward": (5 * B * m * T * F * s, 10 * B * m * T * F),
        },
        contestants=four(copedit_kernels.swiglu, contestants.eager_swiglu),
        learn=("h",),
        small={"B": 2, "m": 3, "T": 5, "F": 19},
        ranges={"B": (1, 2), "m": (1, 3), "T": (1, 5), "F": (1, 7, 19, 64, 80)},
    ),
    "conv3": Operator(
        function="conv3",
        inputs=_conv,
        sizes=_conv_sizes,
        floors={"forward": (P * Q * R * (C + 2 * U) * s + (27 * C + 1) * U * s, 54 * P * Q * R * C * U)},
        contestants={
            "ours": Contestant(copedit_kernels.conv3),
            "eager": Contestant(contestants.eager_conv3, context=tried_convolutions),
            "compile": Contestant(
                contestants.eager_conv3, tier=1, options=contestants.DEFAULT, context=tried_convolutions
            ),
            "compile-max": Contestant(
                contestants.eager_conv3, tier=0, options=contestants.AUTOTUNE, context=tried_convolutions
            ),
        },
        exact=_exact_conv,
        compute_bound=True,
        small={"P": 3, "Q": 4, "R": 5, "C": 24, "U": 16},
        ranges={"N": (1, 2), "P": (1, 3), "Q": (1, 4), "R": (1, 2, 5), "C": (8, 24, 64), "U": (1, 16, 40)},
        gates=({"P": 8, "Q": 8, "R": 4, "C": 64, "U": 64}, {"P": 8, "Q": 8, "R": 4}),
        variants=({}, {"plain": True}),
    ),
    "nearest_code": Operator(
        function="nearest_code",
        inputs=_codes,
        sizes=_code_sizes,
        floors={"forward": ((N + K) * d * s + 8 * N, 3 * N * K * d)},
        contestants={
            "ours": Contestant(copedit_kernels.nearest_code),
            "cdist": Contestant(contestants.cdist_code),
            "product": Contestant(contestants.product_code),
            "compile": Contestant(contestants.product_code, tier=1, options=contestants.DEFAULT),
            "compile-max": Contestant(contestants.product_code, tier=0, options=contestants.AUTOTUNE),
        },
        baseline="cdist",
        exact=_exact_code,
        dtype=torch.float32,
        judge=contestants.judge_code,
        compute_bound=True,
        small={"N": 150, "K": 300, "d": 4},
        ranges={"N": (1, 31, 33, 150), "K": (1, 15, 17, 300), "d": (2, 3, 4, 8, 12, 16)},
        variants=({}, {"ties": True}),
        strided=True,
    ),
    "partial_ddim_step_": Operator(
        function="partial_ddim_step_",
        inputs=_step,
        sizes=_step_sizes,
        floors={"forward": (3 * B * M * E * s + B * m, 3 * B * M * E)},
        contestants={
            "ours": Contestant(copedit_kernels.partial_ddim_step_),
            "eager": Contestant(contestants.eager_step),
            "compile": Contestant(contestants.eager_step, tier=1, options=contestants.DEFAULT),
        },
        mutated=("z",),
        dtype=torch.float32,
        small={"B": 2, "m": 3, "M": 2, "E": 24},
        ranges={"B": (1, 2, 3), "m": (1, 2, 5), "M": (0, 1, 2), "E": (8, 24, 72)},
        variants=({}, {"on_device": False}),
        strided=True,
    ),
}


def directions(op: str) -> tuple[str, ...]:
    """forward, backward, both; forward alone where there is no gradient."""
    return ("forward", "backward", "both") if "backward" in OPERATORS[op].floors else ("forward",)


def floor(op: str, direction: str, sizes: Sizes, itemsize: int) -> tuple[int, int]:
    """(bytes, operations) that the operator cannot do without; "both" is the sum of the two passes."""
    if direction == "both":
        passes = [floor(op, part, sizes, itemsize) for part in ("forward", "backward")]
        return passes[0][0] + passes[1][0], passes[0][1] + passes[1][1]
    moved, computed = (int(formula.subs({**sizes, "s": itemsize})) for formula in OPERATORS[op].floors[direction])
    return moved, computed


def preset_cases(
    ops: Iterable[str] = tuple(OPERATORS),
    presets: Sequence[str] = tuple(PRESETS),
    batches: Sequence[int] = BATCHES,
) -> list[Case]:
    """Every distinct shape that the presets use, those of the fullest comparison first."""
    found: dict[tuple[str, tuple[tuple[str, int], ...]], Case] = {}
    for op in ops:
        for name in presets:
            extra = (TARGET_BATCH,) if op == "nearest_code" and name == "brain-brats" else ()
            for batch in sorted({*batches, *extra}):
                shape = OPERATORS[op].sizes(PRESETS[name], batch)
                key = (op, tuple(shape.items()))
                same = found.get(key)
                tier = min(_tier(op, name, batch), same.tier if same else 2)
                found[key] = Case(op, (*(same.presets if same else ()), name), shape, tier)
    return sorted(found.values(), key=lambda case: case.tier)


def _tier(op: str, preset: str, batch: int) -> int:
    """Compilers take seconds a shape, so only a few shapes are compiled for: the brain's and, partly, the heart's."""
    if op == "nearest_code":
        return 0 if (preset, batch) == ("brain-brats", TARGET_BATCH) else 2
    if (preset, batch) == ("brain-brats", max(BATCHES)):
        return 0
    return 1 if (preset, batch) in (("brain-brats", min(BATCHES)), ("cardiac", max(BATCHES))) else 2
