"""What the tests of the Triton operators share: the tolerance rule, inputs of any layout, one comparison for all."""

import importlib.util
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import copedit_kernels as ops
from copedit_kernels import reference

HAS_TRITON = importlib.util.find_spec("triton") is not None
interpreted = pytest.mark.skipif(
    not HAS_TRITON or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs the Triton interpreter: triton and no GPU in sight (with a GPU, CUDA_VISIBLE_DEVICES=)",
)
Call = Callable[..., Tensor | tuple[Tensor, ...]]  # of the implementation and the inputs


@contextmanager
def using(choice: str) -> Iterator[None]:
    """COPEDIT_KERNELS = choice."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COPEDIT_KERNELS", choice)
        yield


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Every uninitialised tensor is filled with NaN, so that what a kernel forgets to write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


# The tolerance rule


def assert_rule(found: Tensor, low: Tensor, exact: Tensor, what: str = "output") -> None:
    """The error against float64 is at most twice that of an independent reference in `found`'s precision, plus one
    rounding of the result; in the largest value and in the root mean square. Finite wherever `exact` is.

    There is no exact reference for float64: its band is 1e-10, where an accumulation in float32 errs by 1e-7.
    """
    assert found.dtype == low.dtype and found.shape == exact.shape, f"{what}: {found.dtype} {tuple(found.shape)}"
    band = 1e-10 if found.dtype == torch.float64 else torch.finfo(found.dtype).eps
    exact = exact.double()
    error, allowed = found.double() - exact, low.double() - exact
    for name, size in (("largest", lambda x: x.abs().max()), ("mean square", lambda x: x.square().mean().sqrt())):
        bound = 2 * size(allowed) + band * size(exact)
        # Written so that a NaN fails.
        assert size(error) <= bound, f"{what}: {name} error {size(error):.3g} over {bound:.3g}, of {size(exact):.3g}"


# Inputs of any layout


@dataclass(frozen=True)
class Layout:
    """How a tensor lies in a larger buffer: the dimensions from the outermost to the innermost in memory, what lies
    before and after in each, the step (every second value ...), and which dimensions have stride 0."""

    order: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    step: tuple[int, ...]
    expanded: frozenset[int] = frozenset()

    @classmethod
    def plain(cls, ndim: int) -> "Layout":
        return cls(tuple(range(ndim)), (0,) * ndim, (0,) * ndim, (1,) * ndim)

    @classmethod
    def inside(cls, ndim: int) -> "Layout":
        """Standard order with something around in every dimension."""
        return replace(cls.plain(ndim), before=(1,) * ndim, after=(2,) * ndim)


def place(x: Tensor, layout: Layout, poison: float | bool = math.nan) -> Tensor:
    """x as a view into a buffer of poison. Expanded dimensions repeat their first entry."""
    sizes = [b + s * n + a for n, b, a, s in zip(x.shape, layout.before, layout.after, layout.step, strict=True)]
    fill = poison if x.is_floating_point() else (bool(poison) if x.dtype == torch.bool else 2**30)
    buffer = torch.full([sizes[d] for d in layout.order], fill, dtype=x.dtype, device=x.device)
    view = buffer.permute([layout.order.index(d) for d in range(x.ndim)])
    for d, n in enumerate(x.shape):
        view = view[(slice(None),) * d + (slice(layout.before[d], layout.before[d] + layout.step[d] * n),)]
        view = view[(slice(None),) * d + (slice(None, None, layout.step[d]),)]
    view.copy_(x)
    for d in layout.expanded:
        view = view.narrow(d, 0, 1)
    return view.expand(x.shape)


@st.composite
def layouts(draw: st.DrawFn, ndim: int, contiguous: int = 1, expandable: Sequence[int] = ()) -> Layout:
    """Layouts whose last `contiguous` dimensions (0 or 1) stay innermost, without gaps between values."""
    free = ndim - contiguous
    order = (*draw(st.permutations(range(free))), *range(free, ndim))
    step = tuple(draw(st.sampled_from((1, 1, 2))) for _ in range(free)) + (1,) * contiguous
    margin = st.tuples(*[st.integers(0, 2)] * free, *[st.integers(0, 8)] * contiguous)
    expanded = draw(st.frozensets(st.sampled_from(tuple(expandable)), max_size=2)) if expandable else frozenset()
    return Layout(order, draw(margin), draw(margin), step, expanded)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def rows(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
    """Like `normal`, but rows (the last dimension) differ in size and offset."""
    x = normal(*shape, seed=seed)
    size = 2 ** (2 * normal(*shape[:-1], 1, seed=seed + 1)).clamp(-4, 4)
    return (x * size + 0.5 * normal(*shape[:-1], 1, seed=seed + 2)).to(device, dtype)


def rope_table(tokens: int, dim: int, seed: int = 9) -> Tensor:
    """cos and sin [2, tokens, dim / 2] of random angles, in float32 as the models have it."""
    angle = 3 * normal(tokens, dim // 2, seed=seed)
    return torch.stack((angle.cos(), angle.sin())).float()


# The comparison


def values_and_gradients(
    call: Call, implementation: ModuleType, inputs: Sequence[Any], cotangents: Sequence[Tensor]
) -> list[Tensor]:
    out = call(implementation, *inputs)
    outputs = out if isinstance(out, tuple) else (out,)
    leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    if not leaves:
        return list(outputs)
    wide = [c.to(y.dtype) if c.dtype != y.dtype else c for c, y in zip(cotangents, outputs, strict=True)]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, wide)]


def compare(
    call: Call,
    inputs: Sequence[Any],
    cotangent: Layout | None = None,
    implementation: ModuleType = ops,
    seed: int = 7,
) -> None:
    """Holds the outputs of `call` and the gradients of the inputs that require one to the rule.

    inputs: as the operator shall see them, in their layout and dtype. The reference sees the same values, contiguous.
    cotangent: layout of the random cotangents, by default contiguous.
    """

    def twin(x: Any, change: Callable[[Tensor], Tensor]) -> Any:
        return change(x.detach()).requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x

    low_inputs = [twin(x, lambda t: t.clone(memory_format=torch.contiguous_format)) for x in inputs]
    exact_inputs = [twin(x, lambda t: t.double() if t.is_floating_point() else t.clone()) for x in inputs]
    with torch.no_grad():
        out = call(reference, *low_inputs)
    outputs = out if isinstance(out, tuple) else (out,)
    cotangents = []
    for i, y in enumerate(outputs):
        c = normal(*y.shape, seed=seed + i, device=str(y.device)).to(y.dtype)
        cotangents.append(place(c, cotangent or Layout.plain(y.ndim)))
    plain = [c.contiguous() for c in cotangents]
    exact = values_and_gradients(call, reference, exact_inputs, plain)
    low = values_and_gradients(call, reference, low_inputs, plain)
    with poisoned_memory(), using("triton"):
        found = values_and_gradients(call, implementation, inputs, cotangents)
    for i, triple in enumerate(zip(found, low, exact, strict=True)):
        what = f"output {i}" if i < len(outputs) else f"gradient {i - len(outputs)}"
        assert_rule(*triple, what)


# The operators as `compare` calls them: the first argument is the implementation.


def attention(axis: str) -> Call:
    return lambda k, qkv, rope=None: k.axis_attention(qkv, rope, axis)


def norm(kind: str, eps: float) -> Call:
    return lambda k, x, scale, shift, weight=None: k.ada_norm(x, scale, shift, weight, kind, eps)


def gated_norm(kind: str, eps: float) -> Call:
    return lambda k, x, branch, gate, scale, shift, weight=None: k.gated_residual_ada_norm(
        x, branch, gate, scale, shift, weight, kind, eps
    )


def swiglu(k: ModuleType, h: Tensor) -> Tensor:
    return k.swiglu(h)


def leaf(x: Tensor, layout: Layout | None = None) -> Tensor:
    """x in a layout, as an input whose gradient is compared."""
    return place(x, layout or Layout.plain(x.ndim)).requires_grad_()
