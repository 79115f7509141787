"""Attention along one axis of packed qkv, with rotary embedding inside (Section 3.3).

The two axes have kernels of their own, in `attention_token` and `attention_element`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from copedit_kernels import attention_element, attention_token, reference
from copedit_kernels.dispatch import register, use_triton
from copedit_kernels.launch import INTERPRETED, check_contiguous_last, check_device, check_dtype, on
from copedit_kernels.rotary import HALVES

PLAIN = "COPEDIT_KERNELS=reference computes it in plain PyTorch"
LARGEST = 128  # rows of a tile at most, whose offsets are int32


def _check(qkv: Tensor, rope: Tensor | None, axis: str) -> None:
    op = "axis_attention"
    if axis not in ("token", "element"):
        raise ValueError(f"{op}: axis {axis!r} must be 'token' or 'element'")
    if qkv.ndim != 6 or qkv.shape[3] != 3:
        raise ValueError(f"{op}: qkv {tuple(qkv.shape)} must be [B, m, T, 3, heads, D]")
    m, T, D = qkv.shape[1], qkv.shape[2], qkv.shape[5]
    if D not in HALVES:
        raise ValueError(
            f"{op}: qkv {tuple(qkv.shape)} has head dimension {D}, not one of {', '.join(map(str, HALVES))}; {PLAIN}"
        )
    if axis == "element" and m > 8:
        raise ValueError(f"{op}: qkv {tuple(qkv.shape)} has {m} elements to attend over, more than 8; {PLAIN}")
    check_dtype(op, "qkv", qkv)
    if qkv.dtype == torch.bfloat16 and INTERPRETED and qkv.is_cpu:
        raise ValueError(f"{op}: qkv is bfloat16, whose products Triton's interpreter gets wrong")
    if qkv.dtype == torch.float64 and not qkv.is_cpu:
        raise ValueError(f"{op}: qkv is float64, which only Triton's interpreter runs")
    check_contiguous_last(op, "qkv", qkv)
    _check_stride("qkv", qkv)
    if rope is not None:
        if rope.shape != (2, T, D // 2):
            raise ValueError(f"{op}: rope {tuple(rope.shape)} does not fit qkv {tuple(qkv.shape)}")
        if rope.requires_grad:
            raise ValueError(f"{op}: rope {tuple(rope.shape)} requires a gradient, which it does not get")
        check_dtype(op, "rope", rope)
        check_contiguous_last(op, "rope", rope)
        check_device(op, qkv=qkv, rope=rope)


def _check_stride(name: str, x: Tensor) -> None:
    if x.stride(2) * LARGEST >= 2**31:
        raise ValueError(
            f"axis_attention: {name} {tuple(x.shape)} has strides {tuple(x.stride())}: tokens are too far apart"
        )


def _wide(qkv: Tensor) -> torch.dtype:
    return torch.float64 if qkv.dtype == torch.float64 else torch.float32


def _fake_forward(qkv: Tensor, rope: Tensor | None, axis: str, save: bool) -> tuple[Tensor, Tensor]:
    B, m, T, _, heads, D = qkv.shape
    lse = (B, m, heads, T) if save and axis == "token" else (0,)
    return qkv.new_empty(B, m, T, heads, D), qkv.new_empty(lse, dtype=_wide(qkv))


def _forward(qkv: Tensor, rope: Tensor | None, axis: str, save: bool) -> tuple[Tensor, Tensor]:
    """out and, for the token axis if save, the log-sum-exp of its scores (empty otherwise)."""
    _check(qkv, rope, axis)
    out, lse = _fake_forward(qkv, rope, axis, save)
    if out.numel():
        with on(qkv):
            if axis == "token":
                attention_token.forward(qkv, rope, out, lse if save else None)
            else:
                attention_element.forward(qkv, rope, out)
    return out, lse


def _fake_backward(
    dout: Tensor, qkv: Tensor, rope: Tensor | None, out: Tensor | None, lse: Tensor | None, axis: str
) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _backward(
    dout: Tensor, qkv: Tensor, rope: Tensor | None, out: Tensor | None, lse: Tensor | None, axis: str
) -> Tensor:
    """dqkv [B, m, T, 3, heads, D], contiguous. out and lse: of the forward pass, for the token axis."""
    _check(qkv, rope, axis)
    _check_stride("the gradient", dout)
    dqkv = _fake_backward(dout, qkv, rope, out, lse, axis)
    if dqkv.numel():
        with on(qkv):
            if axis == "token":
                assert out is not None and lse is not None
                attention_token.backward(dout, qkv, rope, out, lse, dqkv)
            else:
                attention_element.backward(dout, qkv, rope, dqkv)
    return dqkv


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, rope, ctx.axis, save = inputs
    out, lse = output
    if not save:
        raise ValueError("axis_attention: save=False keeps nothing for a gradient")
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, rope, *((out, lse) if ctx.axis == "token" else (None, None)))


def _gradient(ctx: Any, dout: Tensor | None, _: None) -> tuple[Tensor | None, None, None, None]:
    if dout is None:  # nothing that was asked for depends on the output
        return None, None, None, None
    return _BACKWARD(dout, *ctx.saved_tensors, ctx.axis), None, None, None


def _decomposition(qkv: Tensor, rope: Tensor | None, axis: str, save: bool) -> tuple[Tensor, Tensor]:
    """The reference; of the log-sum-exp, which only the gradient reads, no more than its shape."""
    _, lse = _fake_forward(qkv, rope, axis, save)
    return reference.axis_attention(qkv, rope, axis).contiguous(), lse


_FORWARD = register(
    "axis_attention(Tensor qkv, Tensor? rope, str axis, bool save) -> (Tensor, Tensor)",
    _forward, _fake_forward, save=_save, gradient=_gradient, decomposition=_decomposition,
)  # fmt: skip
_BACKWARD = register(
    "axis_attention_backward(Tensor dout, Tensor qkv, Tensor? rope, Tensor? out, Tensor? lse, str axis) -> Tensor",
    _backward, _fake_backward,
)  # fmt: skip


def axis_attention(qkv: Tensor, rope: Tensor | None, axis: str) -> Tensor:
    """Attention within an element or across elements (Section 3.3).

    qkv: [B, m, T, 3, heads, D] by strides, the last dimension contiguous; D 32, 48, 64 or 96. rope: [2, T, D/2] or
    None, cos and sin that turn q and k by token; a constant. axis: "token" attends over the T tokens of each element,
    "element" over the m <= 8 elements at each token. float16, bfloat16, float32, and float64 in Triton's interpreter,
    which has no bfloat16. Returns [B, m, T, heads, D], contiguous.

    Scores, softmax and sums are float32 (float64 of float64); q and k are rounded after turning, the token axis rounds
    the weights before they meet v, and the output is rounded once. Saved for the gradient: qkv, rope, and for the token
    axis the output and one float32 log-sum-exp a row; scores are computed again. Without gradients only the output is
    allocated. Gradients are deterministic. Raises ValueError for what does not fit.
    """
    if use_triton(qkv):
        save = torch.is_grad_enabled() and qkv.requires_grad
        return _FORWARD(qkv, rope, axis, save)[0]
    return reference.axis_attention(qkv, rope, axis)
