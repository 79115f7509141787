"""The Triton kernels, interpreted on the CPU, against the reference: any shape and layout, forward and backward.

Never in bfloat16, whose matrix products the interpreter computes wrongly without an error.
"""

import importlib
from collections.abc import Iterator

import pytest
import torch
from checks import (
    Layout,
    attention,
    compare,
    gated_norm,
    interpreted,
    layouts,
    leaf,
    norm,
    normal,
    place,
    poisoned_memory,
    rope_table,
    rows,
    swiglu,
    using,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

import copedit_kernels as ops
from copedit_kernels import reference

pytestmark = interpreted

DTYPES = (torch.float16, torch.float32, torch.float64)
DIMS = (32, 48, 64, 96)
EPS = 2.0**-13  # near the models' 1e-4
few = settings(max_examples=12, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
many = settings(few, max_examples=150, derandomize=False)


@pytest.fixture(autouse=True, scope="module")
def triton_kernels() -> Iterator[None]:
    with using("triton"):
        yield


def strided(ndim: int, contiguous: int = 1) -> Layout:
    """The free dimensions backwards in memory, gaps everywhere."""
    free = ndim - contiguous
    order = (*reversed(range(free)), *range(free, ndim))
    return Layout(order, (1,) * ndim, (2,) * ndim, (2,) * free + (1,) * contiguous)


# Gradients against finite differences. The fast mode compares random projections of the Jacobian; the comparisons
# below hold every entry of the gradient to the reference, whose gradients test_reference.py checks in full.


@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize(
    ("axis", "shape", "expanded"),
    [
        ("token", (2, 3, 5, 3, 1, 32), ()),
        ("token", (1, 2, 35, 3, 1, 48), (1,)),  # three tiles of queries, two of keys
        ("element", (2, 3, 5, 3, 1, 32), ()),
        ("element", (2, 3, 3, 3, 1, 96), (0,)),
    ],
)
def test_attention_gradcheck(axis: str, shape: tuple[int, ...], expanded: tuple[int, ...], rope: bool) -> None:
    x = leaf(normal(*(1 if d in expanded else n for d, n in enumerate(shape))), strided(6))
    table = rope_table(shape[2], shape[5]) if rope else None
    assert gradcheck(lambda v: ops.axis_attention(v.expand(shape), table, axis), (x,), fast_mode=True)


@pytest.mark.parametrize(
    ("gated", "kind", "weighted", "one_modulation"),
    [
        (False, "rms", False, True),
        (False, "layer", True, False),
        (True, "rms", True, False),
        (True, "layer", False, True),
    ],
)
def test_norm_gradcheck(gated: bool, kind: str, weighted: bool, one_modulation: bool) -> None:
    batch, m, tokens, channels = 2, 3, 3, 24
    shape = (1 if one_modulation else batch, channels)
    scale, shift, gate = (leaf(normal(*shape, seed=s), Layout.inside(2)) for s in (1, 2, 3))
    x, branch = (leaf(normal(batch, m, tokens, channels, seed=s), strided(4)) for s in (4, 5))
    last = (leaf(1 + normal(channels, seed=6), Layout.inside(1)),) if weighted else ()

    def call(*inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        wide = [v.expand(batch, -1) if v.shape == shape else v for v in inputs]
        return (gated_norm if gated else norm)(kind, EPS)(ops, *wide)

    inputs = (x, branch, gate, scale, shift, *last) if gated else (x, scale, shift, *last)
    assert gradcheck(call, inputs, fast_mode=True)


def test_swiglu_gradcheck() -> None:
    assert gradcheck(ops.swiglu, (leaf(normal(2, 2, 6), strided(3)),))
    shared = leaf(normal(1, 9, 70), strided(3))
    assert gradcheck(lambda h: ops.swiglu(h.expand(2, -1, -1)), (shared,), fast_mode=True)


# What torch.library asks of an operator: schema, fake implementation, autograd registration, AOT dispatch.


def opchecks() -> dict[str, list[tuple]]:
    """Registered operator -> arguments to check it with."""
    x, branch, g = (normal(2, 3, 5, 16, seed=s, dtype=torch.float32) for s in (0, 1, 2))
    scale, shift, gate = (normal(2, 16, seed=s, dtype=torch.float32) for s in (3, 4, 5))
    weight = normal(16, seed=6, dtype=torch.float32)
    wide = place(x, strided(4))
    observed, table = torch.tensor([[1, 0, 1], [0, 0, 1]]).bool(), normal(4, 2, dtype=torch.float32)

    qkv, rope = normal(1, 2, 5, 3, 1, 32, seed=7, dtype=torch.float32), rope_table(5, 32)
    wide_qkv, cotangent = place(qkv, strided(6)), normal(1, 2, 5, 1, 32, seed=8, dtype=torch.float32)
    out, lse = torch.ops.copedit.axis_attention(qkv, rope, "token", True)

    def grad(*inputs: Tensor | str | float | None) -> tuple:
        return tuple(v.clone().requires_grad_() if isinstance(v, Tensor) else v for v in inputs)

    return {
        "axis_attention": [
            (qkv.clone().requires_grad_(), rope, "token", True),
            (wide_qkv, None, "token", False),
            (qkv.clone().requires_grad_(), None, "element", True),
            (wide_qkv, rope, "element", False),
        ],
        "axis_attention_backward": [
            (cotangent, qkv, rope, out, lse, "token"),
            (place(cotangent, strided(5)), wide_qkv, rope, None, None, "element"),
        ],
        "nearest_code": [(x.view(-1, 16), g.view(-1, 16)), (x.view(-1, 4).T[:3].T, g[..., :3].reshape(-1, 3))],
        "ada_norm": [
            grad(x, scale, shift, weight, "rms", EPS),
            grad(x, scale, shift, None, "layer", EPS),
            (wide, scale, shift, weight, "rms", EPS),
        ],
        "gated_residual_ada_norm": [
            grad(x, branch, gate, scale, shift, weight, "rms", EPS),
            (wide, branch, gate, scale, shift, None, "layer", EPS),
        ],
        "ada_norm_backward": [
            (g, None, x, None, None, scale, shift, None, "rms", EPS),
            (g, branch, wide, x, gate, scale, shift, weight, "layer", EPS),
        ],
        "swiglu": [grad(x), (wide,)],
        "swiglu_backward": [(g[..., :8], x), (g[..., 8:], wide)],
        "partial_ddim_step_": [
            (x.clone(), branch, observed, table, 1, None),
            (place(x, strided(4)), branch, observed, table, 0, torch.tensor(2)),
        ],
    }


def test_every_registered_operator_has_an_opcheck() -> None:
    names = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("copedit::")}
    assert names == set(opchecks()), "give the new operator its cases in opchecks()"


OPERATORS = ("axis_attention", "ada_norm", "gated_residual_ada_norm", "swiglu", "nearest_code", "partial_ddim_step_")
BACKWARD = ("axis_attention_backward", "ada_norm_backward", "swiglu_backward")


@pytest.mark.parametrize("op", (*OPERATORS, *BACKWARD))
def test_opcheck(op: str) -> None:
    for arguments in opchecks()[op]:
        torch.library.opcheck(getattr(torch.ops.copedit, op).default, arguments)


# Shapes and layouts


@st.composite
def attention_inputs(draw: st.DrawFn, axis: str) -> tuple[Tensor, Tensor | None, Layout]:
    """A pass of the interpreter takes some milliseconds a program: few sequences, but tiles that end anywhere.

    The reference's error is a measure only where many roundings make it up. Over 2 or 3 tokens or elements, equal ones,
    or with a softmax near 0 and 1, gradients are differences of nearly equal sums, and 8 of 1,210 cases lay over the
    bound by the luck of a reference that was right (median 0.3 of the bound, at most 0.7 from 15 tokens on). Such cases
    are drawn in float64, where the bound is far above any rounding.
    """
    sharp = draw(st.booleans())
    dtype = torch.float64 if sharp else draw(st.sampled_from(DTYPES[:2]))
    if axis == "token":
        batch, m, heads = draw(st.sampled_from(((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2))))
        tokens = draw(st.sampled_from((1, 2, 3, 17, 70) if sharp else (15, 33, 63, 64, 65, 70)))
    else:
        batch, m, heads = draw(st.integers(1, 2)), draw(st.sampled_from((2, 3, 4, 4, 5, 8))), draw(st.integers(1, 2))
        tokens = draw(st.integers(1, 40 // m))
    size = draw(st.sampled_from((0.1, 1.0, 3.0) if sharp or axis == "token" else (0.1, 1.0)))
    attended = 2 if axis == "token" else 1
    expandable = [d for d in range(5) if sharp or d != attended]
    dim = draw(st.sampled_from(DIMS))
    qkv = (size * normal(batch, m, tokens, 3, heads, dim, seed=draw(st.integers(0, 99)))).to(dtype)
    table = place(rope_table(tokens, dim), draw(layouts(3))) if draw(st.booleans()) else None
    return leaf(qkv, draw(layouts(6, expandable=expandable))), table, draw(layouts(5, 0, range(5)))


def check_attention(axis: str, drawn: tuple[Tensor, Tensor | None, Layout]) -> None:
    qkv, rope, cotangent = drawn
    compare(attention(axis), (qkv, rope), cotangent)


@few
@given(attention_inputs("token"))
def test_token_attention(drawn: tuple[Tensor, Tensor | None, Layout]) -> None:
    check_attention("token", drawn)


@few
@given(attention_inputs("element"))
def test_element_attention(drawn: tuple[Tensor, Tensor | None, Layout]) -> None:
    check_attention("element", drawn)


@st.composite
def norm_inputs(draw: st.DrawFn, gated: bool) -> tuple[str, float, list[Tensor | None], Layout]:
    """x in one precision; scale, shift, gate and weight in the same or in another, as under autocast."""
    kind, eps = draw(st.sampled_from(("rms", "layer"))), draw(st.sampled_from((EPS, 0.25)))
    batch, m, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 9))
    channels = 8 * draw(st.integers(1, 36))
    dtype = draw(st.sampled_from(DTYPES))
    other = dtype if dtype == torch.float64 else draw(st.sampled_from(DTYPES[:2]))
    seed = draw(st.integers(0, 99))
    x = rows(batch, m, tokens, channels, seed=seed, dtype=dtype)
    inputs: list[Tensor | None] = [leaf(x, draw(layouts(4, expandable=(0, 1, 2))))]
    if gated:
        branch = normal(batch, m, tokens, channels, seed=seed + 10, dtype=draw(st.sampled_from((dtype, other))))
        inputs.append(leaf(branch, draw(layouts(4, expandable=(0, 1, 2)))))
    layout = draw(layouts(2, expandable=(0,)))
    for i in range(3 if gated else 2):
        inputs.append(leaf(normal(batch, channels, seed=seed + 20 + i, dtype=other), layout))
    weighted = draw(st.booleans())
    weight = leaf(1 + normal(channels, seed=seed + 30).to(other), Layout.inside(1)) if weighted else None
    return kind, eps, [*inputs, weight], draw(layouts(4, 0, (0, 1, 2, 3)))


@few
@given(norm_inputs(gated=False))
def test_ada_norm(drawn: tuple[str, float, list[Tensor | None], Layout]) -> None:
    kind, eps, inputs, cotangent = drawn
    compare(norm(kind, eps), inputs, cotangent)


@few
@given(norm_inputs(gated=True))
def test_gated_residual_ada_norm(drawn: tuple[str, float, list[Tensor | None], Layout]) -> None:
    kind, eps, inputs, cotangent = drawn
    compare(gated_norm(kind, eps), inputs, cotangent)


@st.composite
def swiglu_inputs(draw: st.DrawFn) -> tuple[Tensor, Layout]:
    shape = [*draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)), 2 * draw(st.integers(1, 80))]
    h = rows(*shape, seed=draw(st.integers(0, 99)), dtype=draw(st.sampled_from(DTYPES)))
    n = len(shape)
    free = tuple(range(n - 1))
    return leaf(h, draw(layouts(n, expandable=free))), draw(layouts(n, 0, free))


@few
@given(swiglu_inputs())
def test_swiglu(drawn: tuple[Tensor, Layout]) -> None:
    compare(swiglu, drawn[:1], drawn[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("inputs", "check"),
    [
        (attention_inputs("token"), lambda drawn: check_attention("token", drawn)),
        (attention_inputs("element"), lambda drawn: check_attention("element", drawn)),
        (norm_inputs(False), lambda drawn: compare(norm(*drawn[:2]), drawn[2], drawn[3])),
        (norm_inputs(True), lambda drawn: compare(gated_norm(*drawn[:2]), drawn[2], drawn[3])),
        (swiglu_inputs(), lambda drawn: compare(swiglu, drawn[:1], drawn[1])),
    ],
    ids=["token", "element", "ada_norm", "gated", "swiglu"],
)
def test_many_shapes(inputs: st.SearchStrategy, check) -> None:
    many(given(inputs)(check))()


# Sizes that the models have, in the precision that they run in


@pytest.mark.parametrize("channels", [192, 288, 384, 576, 768, 1152])
def test_norms_at_model_widths(channels: int) -> None:
    batch, m, tokens = 1, 3, 5
    shape = (batch, m, tokens, channels)
    packed = normal(batch, 6 * channels, seed=1, dtype=torch.float16)  # chunks of one modulation, as in a block
    scale, shift, gate = (v.requires_grad_() for v in packed.chunk(6, dim=-1)[1:4])
    weight = leaf(1 + normal(channels, seed=2, dtype=torch.float32))
    for dtype, kind in ((torch.float16, "layer"), (torch.float32, "rms")):
        x, branch = leaf(rows(*shape, dtype=dtype)), leaf(normal(*shape, seed=3, dtype=torch.float16))
        compare(norm(kind, 1e-4), (x, scale, shift, weight))
        compare(gated_norm(kind, 1e-4), (x, branch, gate, scale, shift, weight))


@pytest.mark.parametrize(("programs", "sum_rows"), [(8, 2), (1, 32)])
def test_norm_gradients_over_many_tokens(programs: int, sum_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles to a program and several programs to an element, which the sizes above are too small for."""
    module = importlib.import_module("copedit_kernels.norm")
    monkeypatch.setattr(module, "TILES", {80: module.TILES[80]._replace(programs=programs)})
    monkeypatch.setattr(module, "SUM_ROWS", sum_rows)
    scale, shift, gate = (leaf(normal(2, 24, seed=s, dtype=torch.float32)) for s in (1, 2, 3))
    x, branch = (leaf(rows(2, 2, 9, 24, seed=s, dtype=torch.float32)) for s in (4, 5))
    compare(gated_norm("layer", EPS), (x, branch, gate, scale, shift, leaf(normal(24, dtype=torch.float32))))


@pytest.mark.parametrize("hidden", [512, 768, 1024, 1536, 2048, 3072])  # of the widths 192, 288, 384, 576, 768, 1152
def test_swiglu_at_model_widths(hidden: int) -> None:
    for dtype in (torch.float16, torch.float32):
        compare(swiglu, (leaf(rows(1, 2, 5, 2 * hidden, dtype=dtype), Layout.inside(4)),))


@pytest.mark.parametrize("axis", ["token", "element"])
@pytest.mark.parametrize(("channels", "heads"), [(288, 9), (384, 6), (576, 12), (768, 12), (1152, 12)])
def test_attention_at_model_widths(axis: str, channels: int, heads: int) -> None:
    """The projection's output [.., 3C] unflattened, a ragged last tile."""
    m, tokens = (1, 37) if axis == "token" else (3, 5)
    packed = normal(1, m, tokens, 3 * channels, dtype=torch.float16)
    qkv = packed.unflatten(-1, (3, heads, -1)).requires_grad_()
    compare(attention(axis), (qkv, rope_table(tokens, channels // heads)))


@pytest.mark.parametrize("dim", [48, 64])
def test_rotation_before_the_kernel(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The alternative behind the same name: k, and q for the gradient, are turned once into a buffer."""
    monkeypatch.setattr(importlib.import_module("copedit_kernels.attention"), "ROTATE_BEFORE", True)
    qkv = leaf(normal(1, 2, 35, 3, 2, dim, dtype=torch.float16), strided(6))
    compare(attention("token"), (qkv, rope_table(35, dim)))


@pytest.mark.parametrize("rope", [False, True])
def test_attention_over_one_token(rope: bool) -> None:
    """The output is v, its gradient the cotangent, those of q and k zero.

    They are differences of two equal sums. The reference adds both up in one order and gets 0, so that its error says
    nothing of the rounding that the rule allows; here that of the sums is the bound.
    """
    qkv, g = leaf(normal(2, 2, 1, 3, 2, 48, dtype=torch.float32)), normal(2, 2, 1, 2, 48, seed=1, dtype=torch.float32)
    out = ops.axis_attention(qkv, rope_table(1, 48) if rope else None, "token")
    dq, dk, dv = torch.autograd.grad(out, qkv, g)[0].unbind(3)
    q, k, v = qkv.detach().unbind(3)
    assert torch.equal(out, v) and torch.equal(dv, g)
    rounding = 2 * 48 * torch.finfo(torch.float32).eps * (g * v).abs().sum(-1, keepdim=True) * 48**-0.5
    for gradient, other in ((dq, k), (dk, q)):
        assert (gradient.abs() <= rounding * other.norm(dim=-1, keepdim=True)).all()


def test_attention_of_large_scores() -> None:
    """Scores beyond 1000: a softmax that does not subtract the largest one overflows."""
    for axis, m, tokens in (("token", 1, 35), ("element", 3, 5)):
        qkv = 20 * normal(1, m, tokens, 3, 1, 32)
        compare(attention(axis), (leaf(qkv), rope_table(tokens, 32)))


# Quantisation and the sampling step


@st.composite
def quantisation_inputs(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    n, codes, dim = draw(st.integers(0, 150)), draw(st.integers(1, 300)), draw(st.sampled_from((2, 3, 4, 8, 12, 16)))
    seed, dtype = draw(st.integers(0, 99)), draw(st.sampled_from(DTYPES))
    if draw(st.booleans()):  # whole numbers: exact distances, many ties
        generator = torch.Generator().manual_seed(seed)
        z, book = (torch.randint(-2, 3, (k, dim), generator=generator).to(dtype) for k in (n, codes))
    else:
        offset = draw(st.sampled_from((0.0, 10.0)))
        z, book = ((normal(k, dim, seed=seed + i) + offset).to(dtype) for i, k in enumerate((n, codes)))
    return place(z, draw(layouts(2, expandable=(0,) if n else ()))), place(book, draw(layouts(2, expandable=(0,))))


def check_nearest_code(drawn: tuple[Tensor, Tensor]) -> None:
    """The very index of the reference, which is exact in float32 and leftmost on ties."""
    z, book = drawn
    with poisoned_memory():
        index = ops.nearest_code(z, book)
    assert index.dtype == torch.int64 and torch.equal(index, reference.nearest_code(z, book))


@few
@given(quantisation_inputs())
def test_nearest_code(drawn: tuple[Tensor, Tensor]) -> None:
    check_nearest_code(drawn)


@pytest.mark.slow
@many
@given(quantisation_inputs())
def test_nearest_code_of_many_shapes(drawn: tuple[Tensor, Tensor]) -> None:
    check_nearest_code(drawn)


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_nearest_code_is_exact(offset: float) -> None:
    """Under an offset too, where |c|^2 - 2 z.c cancels; and every code, also a copy, is nearest to itself."""
    z = normal(100, 8, dtype=torch.float32) + offset
    book = normal(200, 8, seed=1, dtype=torch.float32) + offset
    exact = torch.cdist(z.double(), book.double())
    assert torch.equal(ops.nearest_code(z, book), exact.argmin(1))
    assert torch.equal(ops.nearest_code(book, torch.cat((book, book.flip(0)))), torch.arange(len(book)))


@st.composite
def step_inputs(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | int]:
    batch, m = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    rest = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    dtype, seed, steps = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 99)), draw(st.integers(1, 5))
    shape, n = (batch, m, *rest), len(rest) + 2
    z = place(normal(*shape, seed=seed, dtype=dtype), draw(layouts(n)))
    x0 = place(normal(*shape, seed=seed + 1, dtype=dtype), draw(layouts(n, expandable=range(n - 1))))
    observed = torch.rand(batch, m, generator=torch.Generator().manual_seed(seed)) < 0.5
    observed = place(observed, draw(layouts(2, 0)), draw(st.booleans()))
    table = normal(steps, 2, seed=seed + 2, dtype=dtype if dtype == torch.float64 else torch.float32)
    step = draw(st.integers(0, steps - 1))
    return z, x0, observed, place(table, draw(layouts(2))), torch.tensor(step) if draw(st.booleans()) else step


@few
@given(step_inputs())
def test_partial_step(drawn: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | int]) -> None:
    """In place, through any strides; nothing of an observed element is read of x0 nor changed in z, nor around z."""
    z, x0, observed, table, step = drawn
    x0 = x0.clone() if 0 in x0.stride() else x0
    x0[observed] = torch.nan
    before, storage = z.clone(), z.untyped_storage()
    whole = torch.empty(0, dtype=z.dtype).set_(storage)
    around = whole.isnan().sum()
    expected = reference.partial_ddim_step_(z.clone(), x0, observed, table, step)
    exact = reference.partial_ddim_step_(before.double(), x0.double(), observed, table.double(), step)
    assert ops.partial_ddim_step_(z, x0, observed, table, step) is z
    assert torch.equal(z[observed], before[observed])
    size = (table[step].double().abs().sum() * before.double().abs().max().clamp(min=4)).item()
    for found in (z, expected):
        error = (found.double() - exact)[~observed].abs()
        wide = 2.0**-52 if z.dtype == torch.float64 else 2.0**-23
        assert (error <= torch.finfo(z.dtype).eps * exact[~observed].abs() + 4 * wide * size).all()
    assert whole.isnan().sum() == around, "a value around z was overwritten"


# What an operator refuses


QKV = torch.zeros(1, 3, 5, 3, 2, 32)
ROW = torch.zeros(2, 3, 5, 16)
MODULATION = torch.zeros(2, 16)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda k: k.axis_attention(QKV[..., :20], None, "token"), "20"),
        (lambda k: k.axis_attention(QKV.expand(-1, -1, -1, -1, -1, -1).repeat(1, 3, 1, 1, 1, 1), None, "element"), "9"),
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
    x = rows(2, 3, 5, 32, dtype=torch.float32)[..., ::2]
    scale, shift = normal(2, 16, dtype=torch.float32), normal(2, 16, seed=1, dtype=torch.float32)
    arguments = {"ada_norm": (scale, shift), "gated_residual_ada_norm": (x + 1, scale, scale, shift), "swiglu": ()}[op]
    try:
        found = getattr(ops, op)(x, *arguments)
    except ValueError as refusal:
        assert "stride" in str(refusal)
    else:
        torch.testing.assert_close(found, getattr(reference, op)(x, *arguments))


def test_backward_is_deterministic() -> None:
    def gradients() -> list[Tensor]:
        qkv = leaf(normal(1, 2, 70, 3, 1, 32, dtype=torch.float16))
        x, scale, shift = (leaf(normal(*s, dtype=torch.float16)) for s in ((2, 2, 9, 64), (2, 64), (2, 64)))
        outputs = [ops.axis_attention(qkv, rope_table(70, 32), axis) for axis in ("token", "element")]
        outputs.append(ops.ada_norm(x, scale, shift))
        cotangents = [normal(*y.shape, seed=1).to(y.dtype) for y in outputs]
        return list(torch.autograd.grad(outputs, (qkv, x, scale, shift), cotangents))

    first, second = gradients(), gradients()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
