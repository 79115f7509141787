"""What computes the same as an operator: ours, PyTorch as users write it, compilers, libraries."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

import copedit_kernels
from copedit_kernels import attention_token

EPS = 1e-4  # of the norms, as in the denoiser


@dataclass(frozen=True)
class Contestant:
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
    """`missing` of a contestant that needs CUDA and a module."""

    def missing(device: torch.device) -> str | None:
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed"
        return cuda_only(device)

    return missing


def four(ours: Callable[..., Any], eager: Callable[..., Any], **others: Callable[..., Any]) -> dict[str, Contestant]:
    """Ours, plain PyTorch, the others, and what compilers make of plain PyTorch."""
    return {
        "ours": Contestant(ours),
        "eager": Contestant(eager),
        **{name: Contestant(call) for name, call in others.items()},
        "compile": Contestant(eager, tier=1, options=DEFAULT),
        "compile-max": Contestant(eager, tier=0, options=AUTOTUNE),
    }


# Attention


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


def unrolled(qkv: Tensor, rope: Tensor | None, axis: str) -> Tensor:
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
    usual, attention_token.ROTATE_BEFORE = attention_token.ROTATE_BEFORE, True
    try:
        yield
    finally:
        attention_token.ROTATE_BEFORE = usual


def triton_on_cuda(device: torch.device) -> str | None:
    if copedit_kernels.implementation() == "reference":
        return "COPEDIT_KERNELS=reference"
    return cuda_only(device)


def attention(axis: str) -> dict[str, Contestant]:
    backends = {
        "cudnn": (SDPBackend.CUDNN_ATTENTION, cuda_only),
        "flash": (SDPBackend.FLASH_ATTENTION, lambda device: None),
        "efficient": (SDPBackend.EFFICIENT_ATTENTION, cuda_only),
        "math": (SDPBackend.MATH, lambda device: None),
    }
    ours = copedit_kernels.axis_attention
    found = {"ours": Contestant(ours)}
    if axis == "token":
        found["ours-rotated-before"] = Contestant(ours, missing=triton_on_cuda, context=rotated_before)
    for name, (backend, missing) in backends.items():
        found[f"sdpa-{name}"] = Contestant(sdpa, missing=missing, context=partial(sdpa_kernel, backend))
    found["compile"] = Contestant(sdpa, tier=1, options=DEFAULT)
    found["compile-max"] = Contestant(sdpa, tier=0, options=AUTOTUNE)
    if axis == "element":
        found["compile-unrolled"] = Contestant(unrolled, tier=0, options=DEFAULT)
    found["flex"] = Contestant(flex, tier=1 if axis == "token" else 0, options=DEFAULT, missing=cuda_only)
    found["flash-attn"] = Contestant(flash_attn, missing=library("flash_attn"))
    found["xformers"] = Contestant(xformers, missing=library("xformers"))
    return found


# Rows


def eager_ada_norm(
    x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, kind: str = "rms", eps: float = EPS
) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps) * (1 + scale[:, None, None]) + shift[:, None, None]


def eager_gated(
    x: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, weight: Tensor,
    kind: str = "rms", eps: float = EPS,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    y = x + gate[:, None, None] * branch
    return y, eager_ada_norm(y, scale, shift, weight, kind, eps)


def eager_swiglu(h: Tensor) -> Tensor:
    a, b = h.chunk(2, dim=-1)
    return F.silu(a) * b


# Codes and the sampler's step


def eager_conv3(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, relu: bool) -> Tensor:
    """cuDNN or oneDNN by way of PyTorch, then residual and ReLU by themselves."""
    y = F.conv3d(x.movedim(-1, 1), weight.movedim(-1, 1), bias, padding=1).movedim(1, -1)
    y = y if residual is None else y + residual
    return y.relu() if relu else y


def cdist_code(z: Tensor, codebook: Tensor) -> Tensor:
    return torch.cdist(z, codebook).argmin(1)


def product_code(z: Tensor, codebook: Tensor) -> Tensor:
    """|c|^2 - 2 z.c, as most vector quantisers do."""
    return torch.addmm(codebook.square().sum(1), z, codebook.T, alpha=-2).argmin(1)


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


STEP = 3  # the row of the table that a step uses


def eager_step(z: Tensor, x0: Tensor, observed: Tensor, table: Tensor, step: Tensor) -> Tensor:
    """As a sampling loop in Python does it; its step is a Python integer."""
    keep, rate = table[STEP].to(z.dtype)
    return z.copy_(torch.where(observed.reshape(observed.shape + (1,) * (z.ndim - 2)), z, keep * z + rate * x0))
