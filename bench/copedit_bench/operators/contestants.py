"""The operators and, side by side, what computes the same: ours, PyTorch as users write it, compilers, libraries."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

import copedit_kernels
from copedit_kernels import reference

EPS = 1e-4  # of the norms, as in the denoiser
STEPS, STEP = 20, 3  # of the sampler's table, and the row that is used


@dataclass(frozen=True)
class Provider:
    """One way to compute an operator.

    tier: the costliest `Case.tier` that it is measured at (2: everywhere). options: passed to torch.compile; None runs
    `call` as it is. missing: why it cannot run on a device, None if it can. context: entered around a run of calls.
    """

    call: Callable[..., Any]
    tier: int = 2
    options: Mapping[str, Any] | None = None
    missing: Callable[[torch.device], str | None] = lambda device: None
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(frozen=True)
class Operator:
    """An operator: what goes in, what is exact, and who computes it.

    inputs: (sizes, dtype, device, generator) -> arguments by name. learn: the arguments that get gradients. mutated:
    those that a call writes to. baseline: the provider whose error in low precision sets the tolerance. dtype: the only
    one that is measured, None for all. judge: None for the usual comparison of values.
    """

    inputs: Callable[..., dict[str, Any]]
    exact: Callable[..., Any]
    providers: Mapping[str, Provider]
    baseline: str = "eager"
    learn: tuple[str, ...] = ()
    mutated: tuple[str, ...] = ()
    dtype: torch.dtype | None = None
    judge: Callable[..., Verdict] | None = None
    tiny: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """Error and tolerance of the worst output, relative to its largest value; note: which one, and what else to say."""

    error: float
    tolerance: float
    note: str

    @property
    def right(self) -> bool:
        return self.error <= self.tolerance  # false for NaN


DEFAULT = {"dynamic": False, "fullgraph": True}
# max-autotune without its own CUDA graphs: whole calls are captured here as everyone else's are.
AUTOTUNE = {**DEFAULT, "mode": "max-autotune-no-cudagraphs"}


def cuda_only(device: torch.device) -> str | None:
    return None if device.type == "cuda" else "needs CUDA"


def library(name: str) -> Callable[[torch.device], str | None]:
    """`missing` of a provider that needs CUDA and a module."""

    def missing(device: torch.device) -> str | None:
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed"
        return cuda_only(device)

    return missing


def normal(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device).to(dtype)


def modulations(generator: torch.Generator, dtype: torch.dtype, batch: int, channels: int, count: int) -> list[Tensor]:
    """[B, C] each, as the denoiser has them: slices of one [B, 6 C]."""
    whole = normal(generator, dtype, batch, 6 * channels)
    return [part.detach() for part in whole.chunk(6, dim=-1)[:count]]


# -------------------------------------------------------------------------------------------------- attention


def _qkv(axis: str, sizes: Mapping[str, int], dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    b, m, t, h, d = (sizes[k] for k in "BmTHD")
    qkv = normal(generator, dtype, b, m, t, 3, h, d)
    if axis == "element":
        return {"qkv": qkv, "rope": None}
    angle = 3 * normal(generator, torch.float32, t, d // 2)
    return {"qkv": qkv, "rope": torch.stack((angle.cos(), angle.sin()))}


def _turned(qkv: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v [B, m, T, heads, D], rotated in their own precision, as is usual."""
    q, k, v = qkv.unbind(3)
    if rope is None:
        return q, k, v
    cos, sin = rope.to(qkv.dtype).repeat(1, 1, 2)[:, :, None]

    def turn(x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-b, a), dim=-1) * sin

    return turn(q), turn(k), v


def _rows(x: Tensor, axis: str) -> Tensor:
    """[B, m, T, heads, D] -> [sequences, length, heads, D]; across elements that is a copy."""
    return x.flatten(0, 1) if axis == "token" else x.transpose(1, 2).flatten(0, 1)


def _back(x: Tensor, like: Tensor, axis: str) -> Tensor:
    """Inverse of `_rows`; like: the qkv that x comes from."""
    b, m, t = like.shape[:3]
    return x.unflatten(0, (b, m)) if axis == "token" else x.unflatten(0, (b, t)).transpose(1, 2)


def sdpa(qkv: Tensor, rope: Tensor | None, axis: str) -> Tensor:
    """Rotate, permute, scaled_dot_product_attention, permute back."""
    q, k, v = (_rows(x, axis).transpose(1, 2) for x in _turned(qkv, rope))
    return _back(F.scaled_dot_product_attention(q, k, v).transpose(1, 2), qkv, axis)


def unrolled(qkv: Tensor, rope: Tensor | None) -> Tensor:
    """Attention across elements as products and sums, which a compiler fuses into one pass."""
    q, k, v = (x.float() for x in qkv.unbind(3))
    scores = (q[:, :, None] * k[:, None]).sum(-1) * q.shape[-1] ** -0.5
    weights = scores.softmax(2)[..., None]
    return (weights * v[:, None]).sum(2).to(qkv.dtype)


def flex(qkv: Tensor, rope: Tensor | None, axis: str) -> Tensor:
    q, k, v = (_rows(x, axis).transpose(1, 2) for x in _turned(qkv, rope))
    return _back(flex_attention(q, k, v).transpose(1, 2), qkv, axis)


def flash_attn(qkv: Tensor, rope: Tensor | None, axis: str) -> Tensor:
    """flash-attn with its own rotation, q and k in one call of it."""
    from flash_attn import flash_attn_func
    from flash_attn.layers.rotary import apply_rotary_emb

    packed = _rows(qkv.flatten(3, 4), axis).unflatten(2, qkv.shape[3:5])
    q, k, v = packed.unbind(2)
    if rope is not None:
        cos, sin = rope.to(qkv.dtype)
        turned = apply_rotary_emb(packed[:, :, :2].flatten(2, 3), cos, sin)
        q, k = turned.unflatten(2, (2, -1)).unbind(2)
    return _back(flash_attn_func(q, k, v), qkv, axis)


def xformers(qkv: Tensor, rope: Tensor | None, axis: str) -> Tensor:
    from xformers.ops import memory_efficient_attention

    return _back(memory_efficient_attention(*(_rows(x, axis) for x in _turned(qkv, rope))), qkv, axis)


@contextmanager
def rotated_before() -> Iterator[None]:
    """Ours with q or k turned once, into a buffer, instead of where each tile reads it."""
    module: Any = importlib.import_module("copedit_kernels.attention")  # as an attribute it is the operator
    usual, module.ROTATE_BEFORE = module.ROTATE_BEFORE, True
    try:
        yield
    finally:
        module.ROTATE_BEFORE = usual


def triton_on_cuda(device: torch.device) -> str | None:
    if copedit_kernels.implementation() == "reference":
        return "COPEDIT_KERNELS=reference"
    return cuda_only(device)


def _attention(axis: str) -> Operator:
    call = partial(sdpa, axis=axis)
    backends = {
        "cudnn": (SDPBackend.CUDNN_ATTENTION, cuda_only),
        "flash": (SDPBackend.FLASH_ATTENTION, lambda device: None),
        "efficient": (SDPBackend.EFFICIENT_ATTENTION, cuda_only),
        "math": (SDPBackend.MATH, lambda device: None),
    }
    providers = {"ours": Provider(partial(copedit_kernels.axis_attention, axis=axis))}
    if axis == "token":
        ours = providers["ours"].call
        providers["ours-rotated-before"] = Provider(ours, missing=triton_on_cuda, context=rotated_before)
    for name, (backend, missing) in backends.items():
        providers[f"sdpa-{name}"] = Provider(call, missing=missing, context=partial(sdpa_kernel, backend))
    providers["compile"] = Provider(call, tier=1, options=DEFAULT)
    providers["compile-max"] = Provider(call, tier=0, options=AUTOTUNE)
    if axis == "element":
        providers["compile-unrolled"] = Provider(unrolled, tier=0, options=DEFAULT)
    providers["flex"] = Provider(
        partial(flex, axis=axis), tier=1 if axis == "token" else 0, options=DEFAULT, missing=cuda_only
    )
    providers["flash-attn"] = Provider(partial(flash_attn, axis=axis), missing=library("flash_attn"))
    providers["xformers"] = Provider(partial(xformers, axis=axis), missing=library("xformers"))
    return Operator(
        inputs=partial(_qkv, axis),
        exact=partial(reference.axis_attention, axis=axis),
        providers=providers,
        baseline="sdpa-math",
        learn=("qkv",),
        tiny={"B": 1, "m": 2, "T": 16, "H": 1, "D": 32},
    )


# -------------------------------------------------------------------------------------------------- row-wise


def _ada_inputs(sizes: Mapping[str, int], dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    b, m, t, c = (sizes[k] for k in "BmTC")
    scale, shift = modulations(generator, dtype, b, c, 2)
    return {
        "x": normal(generator, dtype, b, m, t, c),
        "scale": scale,
        "shift": shift,
        "weight": 1 + 0.1 * normal(generator, dtype, c),
    }


def _gated_inputs(sizes: Mapping[str, int], dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    b, m, t, c = (sizes[k] for k in "BmTC")
    gate, scale, shift = modulations(generator, dtype, b, c, 3)
    return {
        "x": normal(generator, dtype, b, m, t, c),
        "branch": normal(generator, dtype, b, m, t, c),
        "gate": gate,
        "scale": scale,
        "shift": shift,
        "weight": 1 + 0.1 * normal(generator, dtype, c),
    }


def eager_ada_norm(x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, EPS) * (1 + scale[:, None, None]) + shift[:, None, None]


def eager_gated(
    x: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    y = x + gate[:, None, None] * branch
    return y, eager_ada_norm(y, scale, shift, weight)


def eager_swiglu(h: Tensor) -> Tensor:
    a, b = h.chunk(2, dim=-1)
    return F.silu(a) * b


def _swiglu_inputs(sizes: Mapping[str, int], dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    return {"h": normal(generator, dtype, sizes["B"], sizes["m"], sizes["T"], 2 * sizes["F"])}


def _four(ours: Callable[..., Any], eager: Callable[..., Any]) -> dict[str, Provider]:
    return {
        "ours": Provider(ours),
        "eager": Provider(eager),
        "compile": Provider(eager, tier=1, options=DEFAULT),
        "compile-max": Provider(eager, tier=0, options=AUTOTUNE),
    }


# ---------------------------------------------------------------------------------------- codes, sampler step


def _code_inputs(sizes: Mapping[str, int], dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    n, k, d = (sizes[key] for key in "NKd")
    return {"z": normal(generator, dtype, n, d), "codebook": normal(generator, dtype, k, d)}


def cdist_code(z: Tensor, codebook: Tensor) -> Tensor:
    return torch.cdist(z, codebook).argmin(1)


def product_code(z: Tensor, codebook: Tensor) -> Tensor:
    """|c|^2 - 2 z.c, as most vector quantisers do."""
    return torch.addmm(codebook.square().sum(1), z, codebook.T, alpha=-2).argmin(1)


def exact_code(z: Tensor, codebook: Tensor) -> Tensor:
    """The reference in float32, which the contract is about, in larger pieces than the models need."""
    return reference.nearest_code(z.float(), codebook.float(), rows=4096)


def judge_code(found: Tensor, exact: Tensor, baseline: Tensor, z: Tensor, codebook: Tensor, name: str) -> Verdict:
    """Ours must give the reference's indices. Others may take a code that is farther by float32 rounding of the
    squared norms, since |c|^2 - 2 z.c cancels; the note says how many they take."""
    different = (found != exact).nonzero()[:, 0]
    note = f"{len(different)} of {len(exact)} indices differ"
    if name == "ours" or not len(different):
        return Verdict(float(len(different)), 0.0, note)
    point, here, best = (x.double() for x in (z[different], codebook[found[different]], codebook[exact[different]]))
    excess = (point - here).square().sum(1) - (point - best).square().sum(1)
    size = point.square().sum(1) + here.square().sum(1)
    return Verdict(float((excess / size).max()), 32 * torch.finfo(torch.float32).eps, note)


def _step_inputs(sizes: Mapping[str, int], dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    b, m, missing, e = (sizes[k] for k in ("B", "m", "M", "E"))
    device = generator.device
    keep = torch.linspace(0.95, 0.0, STEPS, dtype=torch.float64, device=device)
    return {
        "z": normal(generator, dtype, b, m, e),
        "x0": normal(generator, dtype, b, m, e),
        "observed": (torch.arange(m, device=device) >= missing).expand(b, m).contiguous(),
        "table": torch.stack((keep, 1 - keep), dim=1),
        "step": torch.tensor(STEP, device=device),
    }


def eager_step(z: Tensor, x0: Tensor, observed: Tensor, table: Tensor, step: Tensor) -> Tensor:
    """As a sampling loop in Python does it; its step is a Python integer."""
    keep, rate = table[STEP].to(z.dtype)
    return z.copy_(torch.where(observed[..., None], z, keep * z + rate * x0))


# ------------------------------------------------------------------------------------------------------- all

OPERATORS: dict[str, Operator] = {
    "axis_attention_token": _attention("token"),
    "axis_attention_element": _attention("element"),
    "ada_norm": Operator(
        inputs=_ada_inputs,
        exact=partial(reference.ada_norm, eps=EPS),
        providers=_four(partial(copedit_kernels.ada_norm, eps=EPS), eager_ada_norm),
        learn=("x", "scale", "shift", "weight"),
        tiny={"B": 1, "m": 2, "T": 4, "C": 64},
    ),
    "gated_residual_ada_norm": Operator(
        inputs=_gated_inputs,
        exact=partial(reference.gated_residual_ada_norm, eps=EPS),
        providers=_four(partial(copedit_kernels.gated_residual_ada_norm, eps=EPS), eager_gated),
        learn=("x", "branch", "gate", "scale", "shift", "weight"),
        tiny={"B": 1, "m": 2, "T": 4, "C": 64},
    ),
    "swiglu": Operator(
        inputs=_swiglu_inputs,
        exact=reference.swiglu,
        providers=_four(copedit_kernels.swiglu, eager_swiglu),
        learn=("h",),
        tiny={"B": 1, "m": 2, "T": 4, "F": 64},
    ),
    "nearest_code": Operator(
        inputs=_code_inputs,
        exact=exact_code,
        providers={
            "ours": Provider(copedit_kernels.nearest_code),
            "cdist": Provider(cdist_code),
            "product": Provider(product_code),
            "compile": Provider(product_code, tier=1, options=DEFAULT),
            "compile-max": Provider(product_code, tier=0, options=AUTOTUNE),
        },
        baseline="cdist",
        dtype=torch.float32,
        judge=judge_code,
        tiny={"N": 16, "K": 16, "d": 8},
    ),
    "partial_ddim_step_": Operator(
        inputs=_step_inputs,
        exact=reference.partial_ddim_step_,
        providers={
            "ours": Provider(copedit_kernels.partial_ddim_step_),
            "eager": Provider(eager_step),
            "compile": Provider(eager_step, tier=1, options=DEFAULT),
        },
        mutated=("z",),
        dtype=torch.float32,
        tiny={"B": 1, "m": 2, "M": 1, "E": 16},
    ),
}
