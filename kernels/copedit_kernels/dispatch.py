"""Which implementation runs, and how an operator is registered with PyTorch.

`COPEDIT_KERNELS` = auto (default): Triton for CUDA tensors, the PyTorch reference elsewhere. reference: always the
reference. triton: always Triton, on CUDA or, with TRITON_INTERPRET=1, through its interpreter on the CPU. (Of tensors
that have shapes only, on any device: what it would allocate is known without running it.)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd.function import once_differentiable

from copedit_kernels.launch import INSTALLED, INTERPRETED, triton

_LIBRARY = torch.library.Library("copedit", "DEF")
_DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {}


def implementation() -> str:
    """What COPEDIT_KERNELS asks for: "auto", "reference" or "triton". ValueError for what cannot be had."""
    wanted = os.environ.get("COPEDIT_KERNELS", "auto")
    if wanted not in ("auto", "reference", "triton"):
        raise ValueError(f"COPEDIT_KERNELS={wanted!r} must be 'auto', 'reference' or 'triton'")
    if wanted == "triton" and not INSTALLED:
        raise ValueError("COPEDIT_KERNELS='triton', but triton cannot be imported: install it or use 'reference'")
    return wanted


@contextmanager
def using(wanted: str) -> Iterator[None]:
    """Inside, COPEDIT_KERNELS is this, whatever it was."""
    before = os.environ.get("COPEDIT_KERNELS")
    os.environ["COPEDIT_KERNELS"] = wanted
    try:
        yield
    finally:
        del os.environ["COPEDIT_KERNELS"]
        if before is not None:
            os.environ["COPEDIT_KERNELS"] = before


def use_triton(*tensors: Tensor) -> bool:
    """Whether an operator on these tensors runs its Triton kernel. Raises ValueError rather than fall back."""
    wanted = implementation()
    if wanted == "reference":
        return False
    cuda = all(x.is_cuda for x in tensors)
    if cuda and triton is None:
        raise ValueError(
            "CUDA tensors need triton, which cannot be imported: install it or set COPEDIT_KERNELS=reference"
        )
    interpreted = INTERPRETED and all(x.is_cpu for x in tensors)
    if wanted == "triton" and not (cuda or interpreted or all(isinstance(x, FakeTensor) for x in tensors)):
        devices = ", ".join(sorted({str(x.device) for x in tensors}))
        raise ValueError(f"COPEDIT_KERNELS='triton' needs CUDA tensors or TRITON_INTERPRET=1, not tensors on {devices}")
    return cuda or wanted == "triton"


def register(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    save: Callable[..., None] | None = None,
    gradient: Callable[..., Any] | None = None,
    decomposition: Callable[..., Any] | None = None,
) -> Any:
    """The overload of a new operator copedit::NAME; `schema` is "NAME(Tensor x, ...) -> ...", without defaults.

    run: the launcher. fake: shapes, strides and dtypes of the results. save(ctx, inputs, output) and
    gradient(ctx, *cotangents): setup_context and backward of torch.library.register_autograd; a gradient has no
    derivative of its own. decomposition: the reference, with the operator's arguments in their order; an operator that
    writes in place cannot have one, since export wraps it first.
    """
    name = schema.split("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    overload = getattr(torch.ops.copedit, name).default
    _LIBRARY.impl(name, run, "CUDA")
    if INTERPRETED:
        _LIBRARY.impl(name, run, "CPU")
    torch.library.register_fake(f"copedit::{name}", fake, lib=_LIBRARY)
    if gradient is not None:
        torch.library.register_autograd(
            f"copedit::{name}", once_differentiable(gradient), setup_context=save, lib=_LIBRARY
        )
    if decomposition is not None:
        _DECOMPOSITIONS[overload] = decomposition
    return overload


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Table for ExportedProgram.run_decompositions that replaces the operators by plain PyTorch."""
    return dict(_DECOMPOSITIONS)
