"""One DDIM step in place, on the missing elements only.

Memory: reads z and x0 and writes z of the missing elements; nothing of an observed element is read or written. The
coefficients, and where wanted the step counter, are read on the device, so that a whole sampling loop can be captured
once and replayed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from copedit_kernels import reference
from copedit_kernels.dispatch import register, use_triton
from copedit_kernels.launch import cdiv, check_device, check_dtype, collapse, jit, on, tiles, tl


class Tiles(NamedTuple):
    """Values a program moves."""

    block: int
    warps: int


TILES = {80: Tiles(1024, 4), 90: Tiles(1024, 4)}


@jit(do_not_specialize=["index", "steps"])
def partial_ddim(
    z, x0, observed, table, step, index, steps, N, size_1, size_2, size_3,
    z_b, z_i, z_0, z_1, z_2, z_3, x_b, x_i, x_0, x_1, x_2, x_3, observed_b, observed_i, table_s, table_k,
    ON_DEVICE: tl.constexpr, FLAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (j, i, b): BLOCK of the N values of element i of sample b, in up to four dimensions (FLAT: one).

    A step outside the table makes the missing elements NaN.
    """
    WIDE: tl.constexpr = tl.float64 if z.dtype.element_ty == tl.float64 else tl.float32
    i = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    if tl.load(observed + b * observed_b + i * observed_i) == 0:
        row = tl.load(step).to(tl.int64) if ON_DEVICE else index.to(tl.int64)
        row = tl.where(row < 0, row + steps, row)
        known = (row >= 0) & (row < steps)
        keep = tl.load(table + row * table_s, mask=known, other=float("nan")).to(WIDE)
        rate = tl.load(table + row * table_s + table_k, mask=known, other=float("nan")).to(WIDE)
        # [BLOCK]
        k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        live = k < N
        if FLAT:
            from_z = k * z_3
            from_x = k * x_3
        else:
            at_3 = k % size_3
            k = k // size_3
            at_2 = k % size_2
            k = k // size_2
            at_1 = k % size_1
            k = k // size_1
            from_z = k * z_0 + at_1 * z_1 + at_2 * z_2 + at_3 * z_3
            from_x = k * x_0 + at_1 * x_1 + at_2 * x_2 + at_3 * x_3
        place = z + b * z_b + i * z_i + from_z
        was = tl.load(place, mask=live, other=0.0).to(WIDE)
        target = tl.load(x0 + b * x_b + i * x_i + from_x, mask=live, other=0.0).to(WIDE)
        tl.store(place, (keep * was + rate * target).to(z.dtype.element_ty), mask=live)


def _check(z: Tensor, x0: Tensor, observed: Tensor, table: Tensor, step: Tensor | None) -> None:
    op = "partial_ddim_step_"
    if z.ndim < 2 or z.shape != x0.shape or observed.shape != z.shape[:2]:
        raise ValueError(f"{op}: z {tuple(z.shape)}, x0 {tuple(x0.shape)}, observed {tuple(observed.shape)} do not fit")
    if table.ndim != 2 or table.shape[1] != 2:
        raise ValueError(f"{op}: table {tuple(table.shape)} must be [S, 2]")
    for name, tensor in (("z", z), ("x0", x0)):
        check_dtype(op, name, tensor)
    check_dtype(op, "table", table, (torch.float64, torch.float32))
    check_dtype(op, "observed", observed, (torch.bool,))
    if step is not None:
        check_dtype(op, "step", step, (torch.int64, torch.int32))
        if step.numel() != 1:
            raise ValueError(f"{op}: step {tuple(step.shape)} must have one element")
    check_device(op, z=z, x0=x0, observed=observed, table=table, step=step)
    if any(size > 1 and stride == 0 for size, stride in zip(z.shape, z.stride(), strict=True)):
        raise ValueError(
            f"{op}: z {tuple(z.shape)} with strides {tuple(z.stride())} is expanded: it is written in place"
        )


def _fake_forward(z: Tensor, x0: Tensor, observed: Tensor, table: Tensor, index: int, step: Tensor | None) -> None:
    _check(z, x0, observed, table, step)


def _forward(z: Tensor, x0: Tensor, observed: Tensor, table: Tensor, index: int, step: Tensor | None) -> None:
    _check(z, x0, observed, table, step)
    inner = collapse(z.shape[2:], z.stride()[2:], x0.stride()[2:], dims=4)
    if inner is None:
        raise ValueError(
            f"partial_ddim_step_: z {tuple(z.shape)} with strides {z.stride()} and x0 with strides {x0.stride()} "
            "need more than four inner dimensions"
        )
    if not z.numel():
        return
    (size_0, size_1, size_2, size_3), (z_inner, x_inner) = inner
    batch, m, values = *z.shape[:2], z[0, 0].numel()
    tile = tiles(TILES, z)
    with on(z):
        partial_ddim[(cdiv(values, tile.block), m, batch)](
            z, x0, observed, table, step, index, table.shape[0], values, size_1, size_2, size_3,
            *z.stride()[:2], *z_inner, *x0.stride()[:2], *x_inner, *observed.stride(), *table.stride(),
            ON_DEVICE=step is not None, FLAT=size_0 * size_1 * size_2 == 1, BLOCK=tile.block, num_warps=tile.warps,
        )  # fmt: skip
    torch.autograd.graph.increment_version(z)


_FORWARD = register(
    "partial_ddim_step_(Tensor(a!) z, Tensor x0, Tensor observed, Tensor table, SymInt index, Tensor? step) -> ()",
    _forward, _fake_forward,
)  # fmt: skip


def partial_ddim_step_(z: Tensor, x0: Tensor, observed: Tensor, table: Tensor, step: Tensor | int) -> Tensor:
    """One DDIM step (eta 0, Song et al. 2021, eq. 12) in place on z [B, m, ...], missing elements only; returns z.

    z <- table[step, 0] * z + table[step, 1] * x0, computed in float32 (float64 if z is) and rounded once. observed:
    bool [B, m]; observed elements keep their bits and their x0 is not read. table: [S, 2]. step: an int, or an int
    tensor of one element, read on the device. z and x0 have any strides that four inner dimensions can describe. No
    gradient.

    The Triton kernel raises ValueError if anything lies on another device than z, if z overlaps itself, or if a
    gradient is asked for, and IndexError for an int step outside the table.
    """
    if use_triton(z):
        if torch.is_grad_enabled() and (z.requires_grad or x0.requires_grad):
            raise ValueError("partial_ddim_step_: there is no gradient through it: call it under torch.no_grad()")
        if isinstance(step, Tensor):
            _FORWARD(z, x0, observed, table, 0, step)
            return z
        if not -table.shape[0] <= step < table.shape[0]:
            raise IndexError(f"partial_ddim_step_: step {step} lies outside the table of {table.shape[0]} steps")
        _FORWARD(z, x0, observed, table, step, None)
        return z
    return reference.partial_ddim_step_(z, x0, observed, table, step.reshape(()) if isinstance(step, Tensor) else step)
