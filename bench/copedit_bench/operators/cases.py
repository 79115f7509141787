"""What is measured: the shapes of the presets, and the least that each operator must move and compute at them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from copedit_rt.config import PRESETS, ModelConfig

BATCHES = (1, 4, 32)
TARGET_BATCH = 2  # nearest_code also at the 36,864 vectors that its target speaks of

# Letters: B samples, m elements, T tokens, H heads, D channels a head, C channels, F hidden width, N vectors, K codes,
# d channels a code, E values an element, M missing elements a sample, s bytes a value.
#
# Bytes: every input once, every output once. Operations: additions, multiplications, divisions and exponentials one
# each; of attention only the matrix products, as is usual (2 forward; 5 backward: the scores again, dV, dP, dQ, dK).
# Row-wise operators: what does not depend on the token (weight * (1 + scale), gradients of the modulation after the sum
# over tokens) is left out.
FLOORS: dict[str, dict[str, tuple[str, str]]] = {
    "axis_attention_token": {
        "forward": ("4*B*m*T*H*D*s + 4*T*D", "4*B*m*H*T*T*D"),
        "backward": ("7*B*m*T*H*D*s + 4*T*D", "10*B*m*H*T*T*D"),
    },
    "axis_attention_element": {
        "forward": ("4*B*m*T*H*D*s", "4*B*T*H*m*m*D"),
        "backward": ("7*B*m*T*H*D*s", "10*B*T*H*m*m*D"),
    },
    "ada_norm": {
        "forward": ("2*B*m*T*C*s + (2*B + 1)*C*s", "5*B*m*T*C"),
        "backward": ("3*B*m*T*C*s + (3*B + 2)*C*s", "12*B*m*T*C"),
    },
    "gated_residual_ada_norm": {
        "forward": ("4*B*m*T*C*s + (3*B + 1)*C*s", "7*B*m*T*C"),
        "backward": ("6*B*m*T*C*s + (5*B + 2)*C*s", "16*B*m*T*C"),
    },
    "swiglu": {
        "forward": ("3*B*m*T*F*s", "5*B*m*T*F"),
        "backward": ("5*B*m*T*F*s", "10*B*m*T*F"),
    },
    "nearest_code": {"forward": ("(N + K)*d*s + 8*N", "3*N*K*d")},
    "partial_ddim_step_": {"forward": ("3*B*M*E*s + B*m", "3*B*M*E")},
}
OPERATORS = tuple(FLOORS)
# Which floor a fast kernel meets first: operators are reported against a matrix product or against a copy.
COMPUTE_BOUND = ("axis_attention_token", "nearest_code")


@dataclass(frozen=True)
class Case:
    """One operator at one shape.

    presets: the models that use it. sizes: letter -> number, as in `FLOORS`. tier: 0 is measured with every provider,
    1 without the costly compilers, 2 with nothing that is compiled for the shape.
    """

    op: str
    presets: tuple[str, ...]
    sizes: Mapping[str, int]
    tier: int = 2

    @property
    def label(self) -> str:
        return " ".join(f"{letter}={number}" for letter, number in self.sizes.items())


def directions(op: str) -> tuple[str, ...]:
    """forward, backward, both; forward alone where there is no gradient."""
    return ("forward", "backward", "both") if "backward" in FLOORS[op] else ("forward",)


def floor(op: str, direction: str, sizes: Mapping[str, int], itemsize: int) -> tuple[int, int]:
    """(bytes, operations) that the operator cannot do without; "both" is the sum of the two passes."""
    if direction == "both":
        passes = [floor(op, part, sizes, itemsize) for part in ("forward", "backward")]
        return passes[0][0] + passes[1][0], passes[0][1] + passes[1][1]
    moved, computed = FLOORS[op][direction]
    return evaluate(moved, sizes, itemsize), evaluate(computed, sizes, itemsize)


def evaluate(formula: str, sizes: Mapping[str, int], itemsize: int) -> int:
    """A formula of `FLOORS` in numbers."""
    return int(eval(formula, {"__builtins__": {}}, {**sizes, "s": itemsize}))


def sizes(op: str, config: ModelConfig, batch: int) -> dict[str, int]:
    """The operator's letters in a model at a batch size."""
    c, m = config.denoiser, len(config.elements)
    values = config.tokenizer.latent_channels
    places = math.prod(config.latent)
    tokens = math.prod(n // p for n, p in zip(config.latent, c.patch, strict=True))
    if op.startswith("axis_attention"):
        return {"B": batch, "m": m, "T": tokens, "H": c.heads, "D": c.head_dim}
    if op in ("ada_norm", "gated_residual_ada_norm"):
        return {"B": batch, "m": m, "T": tokens, "C": c.width}
    if op == "swiglu":
        return {"B": batch, "m": m, "T": tokens, "F": c.hidden}
    if op == "nearest_code":
        return {"N": batch * m * places, "K": config.tokenizer.codes, "d": values}
    return {"B": batch, "m": m, "M": 1, "E": values * places}


def preset_cases(
    ops: Iterable[str] = OPERATORS,
    presets: Sequence[str] = tuple(PRESETS),
    batches: Sequence[int] = BATCHES,
) -> list[Case]:
    """Every distinct shape that the presets use, those of the fullest comparison first."""
    found: dict[tuple[str, tuple[tuple[str, int], ...]], Case] = {}
    for op in ops:
        for name in presets:
            extra = (TARGET_BATCH,) if op == "nearest_code" and name == "brain-brats" else ()
            for batch in sorted({*batches, *extra}):
                shape = sizes(op, PRESETS[name], batch)
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
