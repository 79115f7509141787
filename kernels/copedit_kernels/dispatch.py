"""Which implementation runs, and what the Triton operators share: registration, checks, tile configurations.

`COPEDIT_KERNELS` = auto (default): Triton for CUDA tensors, the PyTorch reference elsewhere. reference: always the
reference. triton: always Triton, on CUDA or, with TRITON_INTERPRET=1, through its interpreter on the CPU. (Of tensors
that have shapes only, on any device: what it would allocate is known without running it.)
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS and Windows: the reference runs
    triton = tl = None

INTERPRETED = triton is not None and triton.knobs.runtime.interpret  # TRITON_INTERPRET when the kernels are defined
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_LIBRARY = torch.library.Library("copedit", "DEF")
_DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {}
_NOWHERE = nullcontext()

_T = TypeVar("_T")


def implementation() -> str:
    """What COPEDIT_KERNELS asks for: "auto", "reference" or "triton". ValueError for what cannot be had."""
    wanted = os.environ.get("COPEDIT_KERNELS", "auto")
    if wanted not in ("auto", "reference", "triton"):
        raise ValueError(f"COPEDIT_KERNELS={wanted!r} must be 'auto', 'reference' or 'triton'")
    if wanted == "triton" and triton is None:
        raise ValueError("COPEDIT_KERNELS='triton', but triton cannot be imported: install it or use 'reference'")
    return wanted


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


def jit(fn: Callable[..., Any] | None = None, **options: Any) -> Any:
    """`triton.jit`, and nothing where there is no Triton: a kernel is then defined and never run."""
    if triton is None:
        return fn if fn is not None else lambda kernel: kernel
    return triton.jit(fn, **options)


def register(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    decomposition: Callable[..., Any] | None = None,
) -> Any:
    """The overload of a new operator copedit::NAME; `schema` is "NAME(Tensor x, ...) -> ...", without defaults.

    run: the launcher. fake: shapes, strides and dtypes of the results. setup_context(ctx, inputs, output),
    backward(ctx, *cotangents): as in torch.library.register_autograd; what backward calls has no derivative.
    decomposition: the reference, with the operator's arguments in their order; an operator that writes in place cannot
    have one, since export wraps it first.
    """
    name = schema.split("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    overload = getattr(torch.ops.copedit, name).default
    _LIBRARY.impl(name, run, "CUDA")
    if INTERPRETED:
        _LIBRARY.impl(name, run, "CPU")
    torch.library.register_fake(f"copedit::{name}", fake, lib=_LIBRARY)
    if backward is not None:
        assert setup_context is not None
        _LIBRARY.impl(name, _autograd(overload, setup_context, backward), "Autograd", with_keyset=True)
    if decomposition is not None:
        _DECOMPOSITIONS[overload] = decomposition
    return overload


def _autograd(overload: Any, setup_context: Callable[..., None], backward: Callable[..., Any]) -> Callable[..., Any]:
    """What torch.library.register_autograd makes, without its walk through nested arguments.

    A call with a stubbed launcher takes 15 us of processor time under autograd, against 27 with register_autograd and
    31 with custom_op; with its backward 57, 78 and 79; without gradients 6, 8 and 11; under inference_mode 3, 3 and 6
    (torch 2.13, one busy core).
    """

    class Operator(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keys: Any, *args: Any) -> Any:
            output = overload.redispatch(keys, *args)
            setup_context(ctx, args, output)
            return output

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *cotangents: Any) -> Any:
            gradients = backward(ctx, *cotangents)
            return (None, *gradients) if isinstance(gradients, tuple) else (None, gradients)

    def call(keys: Any, *args: Any) -> Any:
        keys = keys & torch._C._after_autograd_keyset
        if torch.is_grad_enabled() and any([isinstance(arg, Tensor) and arg.requires_grad for arg in args]):
            return Operator.apply(keys, *args)
        return overload.redispatch(keys, *args)

    return call


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Table for ExportedProgram.run_decompositions that replaces the operators by plain PyTorch."""
    return dict(_DECOMPOSITIONS)


def cdiv(a: int, b: int) -> int:
    """a / b rounded up, in 0.1 us; triton.cdiv takes 2 us outside a kernel."""
    return -(-a // b)


def on(x: Tensor) -> AbstractContextManager[Any]:
    """Context to launch a kernel in: Triton launches on the current device, which need not be x's."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return _NOWHERE
    return torch.cuda.device(x.device)


@functools.cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def tiles(table: Mapping[int, _T], x: Tensor) -> _T:
    """The entry of `table` (keys: 80 for sm_80, 90 for sm_90, ...) for x's device: the newest that is not too new.

    The interpreter takes the oldest.
    """
    if not x.is_cuda:
        return table[min(table)]
    capability = _capability(x.get_device())
    usable = [architecture for architecture in table if architecture <= capability]
    return table[max(usable, default=min(table))]


def check_dtype(op: str, name: str, x: Tensor, dtypes: tuple[torch.dtype, ...] = FLOATS) -> None:
    """Raises ValueError unless x has one of the dtypes."""
    if x.dtype not in dtypes:
        wanted = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(f"{op}: {name} has dtype {x.dtype}, not one of {wanted}")


def check_contiguous_last(op: str, name: str, x: Tensor) -> None:
    """Raises ValueError unless the last dimension of x is contiguous in memory."""
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(
            f"{op}: {name} {tuple(x.shape)} has strides {tuple(x.stride())}: the last dimension must be contiguous"
        )


def check_device(op: str, **tensors: Tensor | None) -> None:
    """Raises ValueError unless all tensors that are given are on one device."""
    given = {name: x for name, x in tensors.items() if x is not None}
    first = next(iter(given.values())).device
    if any([x.device != first for x in given.values()]):
        places = ", ".join(f"{name} on {x.device}" for name, x in given.items())
        raise ValueError(f"{op}: tensors on different devices: {places}")


def collapse(shape: Sequence[int], *strides: Sequence[int], dims: int) -> tuple[list[int], list[list[int]]] | None:
    """The same elements in `dims` dimensions: sizes, and for each tensor its strides; None if they need more.

    Neighbouring dimensions become one where every tensor can step through both with one stride. The list is filled up
    in front with dimensions of size 1.
    """
    sizes: list[int] = []
    steps: list[list[int]] = [[] for _ in strides]
    for axis, size in enumerate(shape):
        if size == 1:
            continue
        if sizes and all(own[-1] == size * given[axis] for own, given in zip(steps, strides, strict=True)):
            sizes[-1] *= size
            for own, given in zip(steps, strides, strict=True):
                own[-1] = given[axis]
            continue
        sizes.append(size)
        for own, given in zip(steps, strides, strict=True):
            own.append(given[axis])
    missing = dims - len(sizes)
    if missing < 0:
        return None
    return [1] * missing + sizes, [[0] * missing + own for own in steps]
