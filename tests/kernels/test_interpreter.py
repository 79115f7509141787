"""The Triton kernels, interpreted on the CPU, against the reference: every row of the table, any shape and layout.

Never in bfloat16, whose matrix products the interpreter computes wrongly without an error.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from checks import Layout, Recorder, compare, inputs_of, interpreted, layouts, normal, once, strided
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

import copedit_kernels as ops
from copedit_bench.operators.cases import OPERATORS
from copedit_kernels import norm, reference
from copedit_kernels.dispatch import using
from copedit_rt.config import PRESETS

pytestmark = interpreted

DTYPES = (torch.float16, torch.float32, torch.float64)
ROWS = [pytest.param(op, variant, id=f"{op} {variant}") for op, row in OPERATORS.items() for variant in row.variants]
few = settings(max_examples=8, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
many = settings(few, max_examples=150)


@pytest.fixture(autouse=True, scope="module")
def triton_kernels() -> Iterator[None]:
    with using("triton"):
        yield


# What torch asks of an operator


@pytest.mark.parametrize(("op", "variant"), [p for p in ROWS if OPERATORS[p.values[0]].learn])
def test_gradients_are_those_of_finite_differences(op: str, variant: dict[str, Any]) -> None:
    """Fast mode: random projections of the Jacobian. The comparisons below hold every entry to the reference's."""
    row = OPERATORS[op]
    inputs = inputs_of(op, row.small, torch.float64, strided, **variant)
    learnt = [name for name in row.learn if inputs[name] is not None]

    def call(*values: Tensor) -> Any:
        return getattr(ops, row.function)(*(inputs | dict(zip(learnt, values, strict=True))).values())

    assert gradcheck(call, [inputs[name] for name in learnt], fast_mode=True)


def recorded(op: str, variant: dict[str, Any], learn: bool) -> list[tuple[Any, tuple[Any, ...]]]:
    """What a row of the table registers, as it is called: forward and, where it learns, backward."""
    row = OPERATORS[op]
    inputs = inputs_of(op, row.small, torch.float32, strided, **variant)
    with Recorder() as recorder, torch.set_grad_enabled(learn):
        out = getattr(ops, row.function)(*inputs.values())
        if learn and row.learn:
            outputs = out if isinstance(out, tuple) else (out,)
            torch.autograd.backward(outputs, [torch.randn_like(y) for y in outputs])
    return recorder.calls


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("learn", [True, False])
def test_opcheck(op: str, learn: bool) -> None:
    """Schema, fake implementation, autograd registration, AOT dispatch."""
    calls = recorded(op, dict(OPERATORS[op].variants[-1 if learn else 0]), learn)
    assert len(calls) == (2 if learn and OPERATORS[op].learn else 1)
    for func, args in calls:
        learns = learn and not func.name().endswith("_backward")
        fresh = [x.detach().requires_grad_(x.requires_grad and learns) if isinstance(x, Tensor) else x for x in args]
        torch.library.opcheck(func, tuple(fresh))


def test_every_registered_operator_is_in_the_table() -> None:
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("copedit::")}
    ran = {func.name() for op, row in OPERATORS.items() for func, _ in recorded(op, dict(row.variants[0]), True)}
    assert ran == names


# Shapes and layouts


@st.composite
def drawn(draw: st.DrawFn, op: str) -> tuple[dict[str, Any], Layout | None, str]:
    """Arguments in any precision and layout, and that of the cotangents.

    The reference's error is a measure only where many roundings make it up. Over 2 or 3 tokens, equal ones, or with a
    softmax near 0 and 1, gradients are differences of nearly equal sums, and 8 of 1,210 cases lay over the bound by the
    luck of a reference that was right. Such cases are drawn in float64, where the bound is far above any rounding.
    """
    row, dtype = OPERATORS[op], draw(st.sampled_from(DTYPES))
    exact = dtype == torch.float64
    sizes = {k: draw(st.sampled_from(v + (row.few.get(k, ()) if exact else ()))) for k, v in row.ranges.items()}
    variant = dict(draw(st.sampled_from(row.variants)))
    if exact and row.function == "axis_attention":
        variant["size"] = draw(st.sampled_from((0.1, 1.0, 3.0, 20.0)))

    def layout(name: str, x: Tensor) -> Layout:
        expandable = range(x.ndim - 1) if exact and x.is_floating_point() and name not in row.mutated else ()
        return draw(layouts(x.ndim, 0 if row.strided else 1, expandable))

    inputs = inputs_of(op, sizes, dtype, layout, seed=draw(st.integers(0, 99)), **variant)
    ndim = inputs[row.learn[0]].ndim if row.learn else 0
    ndim -= row.function == "axis_attention"
    cotangent = draw(layouts(ndim, 0, range(ndim))) if ndim else None
    return inputs, cotangent, draw(st.sampled_from(row.ours))


@pytest.mark.parametrize("op", OPERATORS)
def test_any_shape_and_layout(op: str) -> None:
    few(given(drawn(op))(lambda case: compare(op, *case)))()


@pytest.mark.slow
@pytest.mark.parametrize("op", OPERATORS)
def test_many_shapes_and_layouts(op: str) -> None:
    many(given(drawn(op))(lambda case: compare(op, *case)))()


@pytest.mark.parametrize("op", OPERATORS)
def test_at_the_widths_of_the_models(op: str) -> None:
    """In the precision that they run in; as many rows as an interpreter can afford."""
    row, seen = OPERATORS[op], set()
    for config in PRESETS.values():
        sizes = row.sizes(config, 1)
        sizes |= {letter: row.small[letter] for letter in "mTNKEPQR" if letter in sizes}
        if tuple(sizes.items()) not in seen:
            compare(op, inputs_of(op, sizes, torch.float16, strided))
            seen.add(tuple(sizes.items()))


@pytest.mark.parametrize("op", OPERATORS)
def test_the_same_bits_again(op: str) -> None:
    first, second = (once(op, OPERATORS[op].small, torch.float16) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# Single operators


@pytest.mark.parametrize(("programs", "sum_rows"), [(8, 2), (1, 32)])
def test_norm_gradients_over_many_tokens(programs: int, sum_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles to a program and several programs to an element, which the sizes above are too small for."""
    monkeypatch.setattr(norm, "TILES", {80: norm.TILES[80]._replace(programs=programs)})
    monkeypatch.setattr(norm, "SUM_ROWS", sum_rows)
    op = "gated_residual_ada_norm"
    compare(op, inputs_of(op, {"B": 2, "m": 2, "T": 9, "C": 24}, torch.float32, kind="layer"))


def test_attention_over_one_token() -> None:
    """The output is v, its gradient the cotangent, those of q and k zero.

    They are differences of two equal sums. The reference adds both up in one order and gets 0, so that its error says
    nothing of the rounding that the rule allows; here that of the sums is the bound.
    """
    qkv = normal(2, 2, 1, 3, 2, 48, dtype=torch.float32).requires_grad_()
    g = normal(2, 2, 1, 2, 48, seed=1, dtype=torch.float32)
    out = ops.axis_attention(qkv, None, "token")
    dq, dk, dv = torch.autograd.grad(out, qkv, g)[0].unbind(3)
    q, k, v = qkv.detach().unbind(3)
    assert torch.equal(out, v) and torch.equal(dv, g)
    rounding = 2 * 48 * torch.finfo(torch.float32).eps * (g * v).abs().sum(-1, keepdim=True) * 48**-0.5
    for gradient, other in ((dq, k), (dk, q)):
        assert (gradient.abs() <= rounding * other.norm(dim=-1, keepdim=True)).all()


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_nearest_code_is_exact(offset: float) -> None:
    """Under an offset too, where |c|^2 - 2 z.c cancels; and every code, also a copy, is nearest to itself."""
    z = normal(100, 8, dtype=torch.float32) + offset
    book = normal(200, 8, seed=1, dtype=torch.float32) + offset
    exact = torch.cdist(z.double(), book.double())
    assert torch.equal(ops.nearest_code(z, book), exact.argmin(1))
    assert torch.equal(ops.nearest_code(book, torch.cat((book, book.flip(0)))), torch.arange(len(book)))


# What an operator refuses


QKV = torch.zeros(1, 3, 5, 3, 2, 32)
ROW = torch.zeros(2, 3, 5, 16)
MODULATION = torch.zeros(2, 16)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (
            lambda k: k.axis_attention(QKV[..., :20], None, "token"),
            "20, not one of 32, 48, 64, 96; COPEDIT_KERNELS=ref",
        ),
        (
            lambda k: k.axis_attention(QKV.expand(-1, -1, -1, -1, -1, -1).repeat(1, 3, 1, 1, 1, 1), None, "element"),
            "9.*=ref",
        ),
        (lambda k: k.axis_attention(QKV, None, "modality"), "modality"),
        (lambda k: k.axis_attention(QKV[:, :, :, :2], None, "token"), r"\b2\b"),
        (lambda k: k.axis_attention(QKV, torch.zeros(2, 6, 16), "token"), r"\b6\b"),
        (lambda k: k.axis_attention(QKV.transpose(4, 5).contiguous().transpose(4, 5), None, "token"), "stride"),
        (lambda k: k.axis_attention(QKV.long(), None, "token"), "int64"),
        (lambda k: k.ada_norm(ROW, MODULATION, MODULATION, None, "instance"), "instance"),
        (lambda k: k.ada_norm(ROW, MODULATION[:1], MODULATION, None), r"scale|shift"),
        (lambda k: k.ada_norm(ROW, MODULATION, MODULATION[:, :-1], None), r"scale|shift"),
        (lambda k: k.ada_norm(ROW, MODULATION, MODULATION, torch.zeros(17)), "17"),
        (lambda k: k.ada_norm(ROW.int(), MODULATION, MODULATION, None), "int32"),
        (lambda k: k.gated_residual_ada_norm(ROW, ROW, MODULATION[:1], MODULATION, MODULATION), "gate"),
        (lambda k: k.gated_residual_ada_norm(ROW, ROW[:, :1], MODULATION, MODULATION, MODULATION), "branch"),
        (lambda k: k.swiglu(torch.zeros(3, 7)), "7"),
        (lambda k: k.swiglu(torch.zeros(3, 8).int()), "int32"),
        (lambda k: k.nearest_code(torch.zeros(5, 8), torch.zeros(4, 7)), "codebook"),
        (lambda k: k.nearest_code(torch.zeros(5, 8), torch.zeros(0, 8)), r"\b0\b"),
        (lambda k: k.nearest_code(torch.zeros(5, 8).int(), torch.zeros(4, 8).int()), "int32"),
        (lambda k: k.conv3(QKV[0], torch.zeros(4, 3, 3, 3, 31), None, None, False), "31"),
        (lambda k: k.conv3(QKV[0], torch.zeros(4, 3, 3, 3, 32), torch.zeros(5), None, False), r"\b5\b"),
        (lambda k: k.conv3(QKV[0], torch.zeros(4, 3, 3, 3, 32), None, QKV[0], False), "residual"),
        (lambda k: k.conv3(QKV[0], torch.zeros(4, 3, 3, 3, 32).half(), None, None, False), "float16"),
        (lambda k: k.partial_ddim_step_(ROW, ROW[:, :2], torch.zeros(2, 3) > 0, torch.zeros(4, 2), 0), "x0"),
        (lambda k: k.partial_ddim_step_(ROW, ROW, torch.zeros(2, 2) > 0, torch.zeros(4, 2), 0), "observed"),
        (lambda k: k.partial_ddim_step_(ROW, ROW, torch.zeros(2, 3), torch.zeros(4, 2), 0), "bool|float32"),
    ],
)
def test_refusals(call, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        call(ops)


@pytest.mark.parametrize("op", ["ada_norm", "gated_residual_ada_norm", "swiglu"])
def test_a_last_dimension_with_gaps_is_right_or_refused(op: str) -> None:
    x = normal(2, 3, 5, 32, dtype=torch.float32)[..., ::2]
    scale, shift = normal(2, 16, dtype=torch.float32), normal(2, 16, seed=1, dtype=torch.float32)
    arguments = {"ada_norm": (scale, shift), "gated_residual_ada_norm": (x + 1, scale, scale, shift), "swiglu": ()}[op]
    try:
        found = getattr(ops, op)(x, *arguments)
    except ValueError as refusal:
        assert "stride" in str(refusal)
    else:
        torch.testing.assert_close(found, getattr(reference, op)(x, *arguments))
