"""What the tests of the Triton operators share: the tolerance rule, inputs of any layout, one comparison for all."""

import importlib.util
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from copedit_bench.operators.cases import OPERATORS, Fill
from copedit_kernels.dispatch import using

HAS_TRITON = importlib.util.find_spec("triton") is not None
interpreted = pytest.mark.skipif(
    not HAS_TRITON or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs the Triton interpreter: triton and no GPU in sight (with a GPU, CUDA_VISIBLE_DEVICES=)",
)
Call = Callable[..., Tensor | tuple[Tensor, ...]]


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


# The comparison


def inputs_of(
    op: str,
    sizes: Mapping[str, int],
    dtype: torch.dtype,
    layout: Callable[[str, Tensor], Layout] = lambda name, x: Layout.plain(x.ndim),
    device: str = "cpu",
    seed: int = 0,
    **variant: Any,
) -> dict[str, Any]:
    """The arguments of a row of the table, each in its layout, those that are learnt as leaves."""
    row = OPERATORS[op]
    found = row.inputs(sizes, Fill(dtype, device, seed), **variant)
    for name, x in found.items():
        if isinstance(x, Tensor) and x.ndim:
            found[name] = place(x, layout(name, x)).requires_grad_(name in row.learn)
    return found


def strided(name: str, x: Tensor) -> Layout:
    """The free dimensions backwards in memory, gaps everywhere, which differ between arguments."""
    free, gap = x.ndim - 1, 1 + len(name)
    return Layout((*reversed(range(free)), free), (1,) * x.ndim, (gap,) * x.ndim, (2,) * free + (1,))


class Recorder(TorchDispatchMode):
    """The registered operators that run, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "copedit":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def results(call: Call, op: str, inputs: Mapping[str, Any], cotangents: Sequence[Tensor]) -> dict[str, Tensor]:
    """Outputs and gradients by name."""
    out = call(*inputs.values())
    outputs = out if isinstance(out, tuple) else (out,)
    found = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    learnt = {name: inputs[name] for name in OPERATORS[op].learn if inputs[name] is not None}
    if learnt:
        wide = [c.to(y.dtype) for c, y in zip(cotangents, outputs, strict=True)]
        gradients = torch.autograd.grad(outputs, list(learnt.values()), wide)
        found |= {f"gradient of {name}": g for name, g in zip(learnt, gradients, strict=True)}
    return found


def changed(inputs: Mapping[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """The same arguments, each tensor changed."""
    return {
        name: change(x.detach()).requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x
        for name, x in inputs.items()
    }


def memory(x: Tensor) -> Tensor:
    """All of the buffer that x is a view of."""
    return torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage())


def cotangents_of(op: str, inputs: Mapping[str, Any], layout: Layout | None = None) -> list[Tensor]:
    """Random ones, of the shapes that the reference gives."""
    if not OPERATORS[op].learn:
        return []
    with torch.no_grad():
        out = OPERATORS[op].reference(*inputs.values())
    outputs = out if isinstance(out, tuple) else (out,)
    return [
        place(normal(*y.shape, seed=7 + i, dtype=y.dtype, device=str(y.device)), layout or Layout.plain(y.ndim))
        for i, y in enumerate(outputs)
    ]


def compare(op: str, inputs: Mapping[str, Any], cotangent: Layout | None = None, ours: str = "ours") -> None:
    """Holds ours, outputs and gradients, to the rule; indices must be the reference's, and no input may change but
    those that the operator writes to, nor what lies around them.

    inputs: as the operator shall see them; the reference sees the same values, contiguous. cotangent: the layout of
    the random cotangents, by default contiguous.
    """
    row = OPERATORS[op]
    low_inputs = changed(inputs, lambda x: x.clone(memory_format=torch.contiguous_format))
    exact_inputs = changed(inputs, lambda x: x.to(torch.float64 if x.is_floating_point() else x.dtype, copy=True))
    cotangents = cotangents_of(op, inputs, cotangent)
    plain = [c.contiguous() for c in cotangents]
    exact = results(row.reference, op, exact_inputs, plain)
    low = results(row.reference, op, low_inputs, plain)
    tensors = {name: x.detach() for name, x in inputs.items() if isinstance(x, Tensor)}
    before = {name: memory(x).clone() for name, x in tensors.items()}
    contestant = row.contestants[ours]
    with poisoned_memory(), using("triton"), contestant.context():
        found = results(contestant.call, op, inputs, cotangents)
    for name, value in found.items():
        if value.is_floating_point():
            assert_rule(value, low[name], exact[name], name)
        else:
            assert value.dtype == low[name].dtype and torch.equal(value, low[name]), f"{name}: not equal"
    for name, x in tensors.items():
        if name in row.mutated:
            before[name].as_strided(x.shape, x.stride(), x.storage_offset()).copy_(x)
        assert torch.equal(before[name].nan_to_num(), memory(x).nan_to_num()), f"{name}: written, not equal any more"


def once(op: str, sizes: Mapping[str, int], dtype: torch.dtype, device: str = "cpu", **variant: Any) -> list[Tensor]:
    """Outputs and gradients of one call."""
    row = OPERATORS[op]
    inputs = inputs_of(op, sizes, row.dtype or dtype, device=device, **variant)
    cotangents = cotangents_of(op, inputs)
    with using("triton"):
        return list(results(row.contestants["ours"].call, op, inputs, cotangents).values())
