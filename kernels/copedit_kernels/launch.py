"""What the launchers of the Triton operators share: compilation, the device, tile configurations, checks."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor


def _installed() -> bool:
    """Whether there is Triton; macOS and Windows have none, and the reference runs."""
    try:
        return find_spec("triton") is not None
    except ImportError:
        return False


def _of_use() -> bool:
    """Whether a kernel of this process may be compiled or interpreted."""
    asked = os.environ.get("COPEDIT_KERNELS") == "triton" or os.environ.get("TRITON_INTERPRET", "0") != "0"
    return INSTALLED and (asked or torch.cuda.is_available())


INSTALLED = _installed()
if TYPE_CHECKING:
    import triton
    import triton.language as tl
else:  # None where only the reference runs: importing Triton takes a quarter of a second
    triton, tl = (importlib.import_module(name) if _of_use() else None for name in ("triton", "triton.language"))
INTERPRETED = triton is not None and triton.knobs.runtime.interpret  # TRITON_INTERPRET when the kernels are defined
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_NOWHERE = nullcontext()
_T = TypeVar("_T")


def jit(fn: Callable[..., Any] | None = None, **options: Any) -> Any:
    """`triton.jit`, and nothing where Triton is not loaded: a kernel is then defined and never run."""
    if triton is None:
        return fn if fn is not None else lambda kernel: kernel
    return triton.jit(fn, **options)


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
