"""The operators against naive float64 versions written for this test: loops, complex numbers, formulas."""

import math
from collections.abc import Callable
from itertools import product

import pytest
import torch
from checks import normal
from torch import Tensor
from torch.autograd import gradcheck

from copedit_kernels import (
    ada_norm,
    axis_attention,
    conv3,
    gated_residual_ada_norm,
    nearest_code,
    partial_ddim_step_,
    rotate,
    swiglu,
)

B, M, T, HEADS, D = 2, 3, 6, 2, 8
C = 10
LOW = (torch.bfloat16, torch.float16)


def angles(tokens: int = T, pairs: int = D // 2) -> Tensor:
    return 3 * normal(tokens, pairs, seed=9)


def rope_of(angle: Tensor) -> Tensor:
    return torch.stack((angle.cos(), angle.sin()))


def within_rounding(found: Tensor, naive: Callable[..., Tensor], *inputs: Tensor) -> None:
    """The tolerance rule: at most twice the naive version's error in that precision, plus one rounding."""
    exact = naive(*(x.double() for x in inputs))
    low = naive(*inputs)
    band = torch.finfo(found.dtype).eps * exact.abs().max()
    assert found.dtype == inputs[0].dtype
    assert (found - exact).abs().max() <= 2 * (low - exact).abs().max() + band


def rounded_once(found: Tensor, exact: Tensor, size: Tensor | float) -> None:
    """Half precision is computed in float32 and rounded at the end; `size` is that of what was added up."""
    info, wide = torch.finfo(found.dtype), 2**-52 if found.dtype == torch.float64 else 2**-23
    bound = 0.5 * info.eps * exact.abs().clamp(min=info.smallest_normal) + 8 * wide * size
    assert ((found - exact).abs() <= bound).all()


# Attention


def naive_rotate(x: Tensor, angle: Tensor) -> Tensor:
    """Channel j and channel j + D/2 are the two parts of a complex number that turns by its token's angle."""
    half = x.shape[-1] // 2
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.cat((turned.real, turned.imag), dim=-1)


def naive_attention(qkv: Tensor, angle: Tensor | None, axis: str) -> Tensor:
    """One query at a time, with the softmax written out."""
    q, k, v = qkv.unbind(3)
    if angle is not None:
        q, k = naive_rotate(q, angle), naive_rotate(k, angle)
    out = torch.full_like(q, math.nan)
    batch, m, tokens, heads, dim = q.shape
    for b in range(batch):
        for i in range(m):
            for t in range(tokens):
                for h in range(heads):
                    where = (b, i, slice(None), h) if axis == "token" else (b, slice(None), t, h)
                    score = (k[where] * q[b, i, t, h]).sum(-1) / math.sqrt(dim)
                    weight = (score - score.max()).exp()
                    out[b, i, t, h] = (weight[:, None] * v[where]).sum(0) / weight.sum()
    return out


@pytest.mark.parametrize("axis", ["token", "element"])
@pytest.mark.parametrize("turned", [False, True])
def test_attention(axis: str, turned: bool) -> None:
    qkv, angle = 2 * normal(B, M, T, 3, HEADS, D), angles() if turned else None
    out = axis_attention(qkv, None if angle is None else rope_of(angle), axis)
    torch.testing.assert_close(out, naive_attention(qkv, angle, axis), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("axis", ["token", "element"])
def test_attention_reads_by_strides(axis: str) -> None:
    stored = normal(3, HEADS, T + 2, M, B, D, seed=1)
    strided = stored[:, :, 1:-1].permute(4, 3, 2, 0, 1, 5)
    expanded = normal(1, 1, T, 3, HEADS, D, seed=2).expand(B, M, -1, -1, -1, -1)
    for qkv in (strided, expanded):
        out = axis_attention(qkv, rope_of(angles()), axis)
        torch.testing.assert_close(out, naive_attention(qkv, angles(), axis), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("axis", ["token", "element"])
@pytest.mark.parametrize("dtype", LOW)
def test_attention_in_low_precision(axis: str, dtype: torch.dtype) -> None:
    qkv = normal(B, M, T, 3, HEADS, D, dtype=dtype)
    within_rounding(axis_attention(qkv, None, axis), lambda x: naive_attention(x, None, axis), qkv)


def test_rotation_keeps_lengths_and_dtype() -> None:
    x = normal(B, M, T, HEADS, D)
    torch.testing.assert_close(rotate(x, rope_of(angles())), naive_rotate(x, angles()))
    torch.testing.assert_close(rotate(x, rope_of(angles())).norm(dim=-1), x.norm(dim=-1))
    assert rotate(x.bfloat16(), rope_of(angles()).float()).dtype == torch.bfloat16


@pytest.mark.parametrize("axis", ["token", "element"])
def test_attention_gradient(axis: str) -> None:
    qkv, rope = normal(1, 2, 3, 3, 2, 4).requires_grad_(), rope_of(angles(3, 2))
    assert gradcheck(lambda x: axis_attention(x, rope, axis), (qkv,))


@pytest.mark.parametrize(
    ("shape", "rope", "axis", "named"),
    [
        ((B, M, T, 3, HEADS, D), None, "modality", "modality"),
        ((B, M, T, 2, HEADS, D), None, "token", "2, 3, 6, 2, 2, 8"),
        ((B, M, T, 3, D), None, "token", "2, 3, 6, 3, 8"),
        ((B, M, T, 3, HEADS, D), (2, T + 1, D // 2), "token", "2, 7, 4"),
        ((B, M, T, 3, HEADS, D), (2, T, D), "token", "2, 6, 8"),
    ],
)
def test_attention_refuses(shape, rope, axis: str, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        axis_attention(torch.zeros(shape), None if rope is None else torch.zeros(rope), axis)


# Norms


def naive_norm(x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor | None, kind: str, eps: float = 1e-4) -> Tensor:
    out = torch.full_like(x, math.nan)
    for b in range(x.shape[0]):
        for row, y in zip(x[b].flatten(0, 1), out[b].view(-1, x.shape[-1]), strict=True):
            centred = row - row.mean() if kind == "layer" else row
            normed = centred / ((centred * centred).sum() / len(row) + eps).sqrt()
            y.copy_(normed * (1 if weight is None else weight) * (1 + scale[b]) + shift[b])
    return out


def norm_inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, scale, shift, weight; the rows of x differ in length and offset."""
    size = torch.tensor([1e-2, 1.0, 30.0]).double()[:, None, None]
    x = normal(B, M, T, C) * size + size
    return tuple(v.to(dtype) for v in (x, normal(B, C, seed=1), normal(B, C, seed=2), 1 + normal(C, seed=3)))  # type: ignore[return-value]


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("weighted", [False, True])
def test_ada_norm(kind: str, weighted: bool) -> None:
    x, scale, shift, weight = norm_inputs()
    weight = weight if weighted else None
    found = ada_norm(x, scale, shift, weight, kind)
    torch.testing.assert_close(found, naive_norm(x, scale, shift, weight, kind), rtol=1e-12, atol=1e-12)
    found = ada_norm(x, scale, shift, weight, kind, 0.5)
    torch.testing.assert_close(found, naive_norm(x, scale, shift, weight, kind, 0.5), rtol=1e-12, atol=1e-12)


def test_ada_norm_reads_by_strides() -> None:
    x, scale, shift, weight = norm_inputs()
    strided = x.movedim(-1, 0).contiguous().movedim(0, -1)
    packed = torch.cat((scale, shift), dim=-1)  # as the chunks of one modulation
    one = packed[:1].expand(B, -1)
    for s in (packed, one):
        a, b = s.chunk(2, dim=-1)
        expected = naive_norm(x, a, b, weight, "rms")
        torch.testing.assert_close(ada_norm(strided, a, b, weight), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("dtype", LOW)
def test_ada_norm_in_low_precision(kind: str, dtype: torch.dtype) -> None:
    inputs = norm_inputs(dtype)
    found = ada_norm(*inputs, kind)
    within_rounding(found, lambda *v: naive_norm(*v, kind), *inputs)
    exact = naive_norm(*(v.double() for v in inputs), kind)
    rounded_once(found, exact, 10 * exact.abs().max())


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_ada_norm_gradient(kind: str) -> None:
    inputs = [v.requires_grad_() for v in (normal(2, 2, 2, 5), normal(2, 5), normal(2, 5), normal(5))]
    assert gradcheck(lambda *v: ada_norm(*v, kind), inputs)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_gated_residual_ada_norm(kind: str) -> None:
    x, scale, shift, weight = norm_inputs()
    branch, gate = normal(B, M, T, C, seed=4), normal(B, C, seed=5)
    y, normed = gated_residual_ada_norm(x, branch, gate, scale, shift, weight, kind, 0.01)
    expected = torch.stack([x[b] + gate[b] * branch[b] for b in range(B)])
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(normed, naive_norm(expected, scale, shift, weight, kind, 0.01))


def test_gated_residual_ada_norm_gradient() -> None:
    shapes = [(2, 2, 2, 5), (2, 2, 2, 5), (2, 5), (2, 5), (2, 5), (5,)]
    inputs = [normal(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
    assert gradcheck(gated_residual_ada_norm, inputs)


def test_norms_refuse() -> None:
    x, scale, shift, weight = norm_inputs()
    with pytest.raises(ValueError, match="instance"):
        ada_norm(x, scale, shift, weight, "instance")
    for bad in (scale[:1], scale[:, :-1], scale[:, None]):
        with pytest.raises(ValueError, match=r"scale|shift"):
            ada_norm(x, bad, shift)
        with pytest.raises(ValueError, match=r"scale|shift"):
            ada_norm(x, scale, bad)
        with pytest.raises(ValueError, match="gate"):
            gated_residual_ada_norm(x, x, bad, scale, shift)


# SwiGLU


def naive_swiglu(h: Tensor) -> Tensor:
    half = h.shape[-1] // 2
    a, b = h[..., :half], h[..., half:]
    return a / (1 + (-a).exp()) * b


def test_swiglu() -> None:
    h = 4 * normal(3, 5, 2 * C)
    torch.testing.assert_close(swiglu(h), naive_swiglu(h), rtol=1e-12, atol=1e-12)
    strided = h.transpose(0, 1)
    torch.testing.assert_close(swiglu(strided), naive_swiglu(strided), rtol=1e-12, atol=1e-12)
    extreme = torch.tensor([-1000.0, 1000.0, 2.0, 3.0])
    assert swiglu(extreme).tolist() == [0.0, 3000.0]
    assert gradcheck(swiglu, (normal(2, 6).requires_grad_(),))


@pytest.mark.parametrize("dtype", LOW)
def test_swiglu_in_low_precision(dtype: torch.dtype) -> None:
    h = 2 * normal(50, 2 * C, dtype=dtype)
    within_rounding(swiglu(h), naive_swiglu, h)
    rounded_once(swiglu(h), naive_swiglu(h.double()), naive_swiglu(h.double()).abs())


# Quantisation


def exact_distances(z: Tensor, codebook: Tensor) -> Tensor:
    return (z.double()[:, None] - codebook.double()).square().sum(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nearest_code(dtype: torch.dtype) -> None:
    """Another code than the nearest only where float32 cannot tell the two apart."""
    z, codebook = normal(3000, 8, dtype=dtype), normal(500, 8, seed=1, dtype=dtype)
    index = nearest_code(z, codebook)
    distance = exact_distances(z, codebook)
    assert index.shape == (3000,) and index.dtype == torch.int64
    best = distance.min(1)
    excess = distance.gather(1, index[:, None])[:, 0] - best.values
    scale = z.double().square().sum(1) + codebook.double().square().sum(1).max()
    assert (excess <= 8 * torch.finfo(dtype).eps * scale).all()
    assert (index == best.indices).double().mean() > 0.999


def test_nearest_code_takes_the_leftmost_of_equals() -> None:
    """Integers, so that every distance is exact: argmin over all pairs, first one first."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randint(-3, 4, (4000, 3), generator=generator).float()
    codebook = torch.randint(-3, 4, (777, 3), generator=generator).float()  # many codes occur more than once
    distance = exact_distances(z, codebook)
    leftmost = (distance == distance.min(1, keepdim=True).values).int().argmax(1)
    assert torch.equal(nearest_code(z, codebook), leftmost)


@pytest.mark.parametrize("codes", [37, 2048, 2049])
def test_nearest_code_takes_the_leftmost_of_copies(codes: int) -> None:
    book = normal(codes, 8, dtype=torch.float32)
    doubled = torch.cat((book, book.flip(0), book))
    z = normal(1000, 8, seed=1, dtype=torch.float32)
    index = nearest_code(z, doubled)
    assert (index < codes).all()
    assert torch.equal(nearest_code(book, doubled), torch.arange(codes))


def test_nearest_code_does_not_depend_on_its_neighbours() -> None:
    z, codebook = normal(1000, 8, dtype=torch.float32), normal(300, 8, seed=1, dtype=torch.float32)
    index = nearest_code(z, codebook)
    assert torch.equal(nearest_code(z[::7], codebook), index[::7])
    assert torch.equal(nearest_code(z.T.contiguous().T, codebook), index)
    assert nearest_code(z[:0], codebook).shape == (0,)


def test_nearest_code_refuses() -> None:
    for z, codebook in (((5, 8), (4, 7)), ((5, 2, 8), (4, 8)), ((5, 8), (8,))):
        with pytest.raises(ValueError, match="codebook"):
            nearest_code(torch.zeros(z), torch.zeros(codebook))


# The sampling step

OBSERVED = torch.tensor([[True, False, True], [False, False, True]])
TABLE = torch.tensor([[0.9, 0.2], [0.5, -0.25], [0.0, 1.0]], dtype=torch.float64)


@pytest.mark.parametrize("step", [0, 1, 2, torch.tensor(1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_partial_step(step: int | Tensor, dtype: torch.dtype) -> None:
    z, x0 = normal(B, M, 4, 2, 3, dtype=dtype), normal(B, M, 4, 2, 3, seed=1, dtype=dtype)
    x0[OBSERVED] = math.nan  # must never be read
    before = z.clone()
    out = partial_ddim_step_(z, x0, OBSERVED, TABLE, step)
    assert out is z
    assert torch.equal(z[OBSERVED], before[OBSERVED])
    a, b = TABLE[int(step)].tolist()
    was, target = a * before[~OBSERVED].double(), b * x0[~OBSERVED].double()
    rounded_once(z[~OBSERVED], was + target, was.abs() + target.abs())


def test_the_last_step_is_the_prediction() -> None:
    z, x0 = normal(B, M, 50, dtype=torch.float32), normal(B, M, 50, seed=1, dtype=torch.float32)
    partial_ddim_step_(z, x0, torch.zeros(B, M, dtype=torch.bool), TABLE, 2)
    assert torch.equal(z, x0)


def test_partial_step_works_through_views() -> None:
    base = normal(4, 2 * M, B)
    z = base[:, ::2].permute(2, 1, 0)
    before, untouched = z.clone(), base[:, 1::2].clone()
    x0 = normal(B, 1, 1, seed=1).expand(B, M, 4)
    partial_ddim_step_(z, x0, OBSERVED, TABLE, 0)
    expected = torch.where(OBSERVED[..., None], before, 0.9 * before + 0.2 * x0)
    torch.testing.assert_close(base[:, ::2].permute(2, 1, 0), expected)
    assert torch.equal(base[:, 1::2], untouched)


def test_partial_step_refuses() -> None:
    z = torch.zeros(B, M, 4)
    for x0, observed in ((torch.zeros(B, M, 5), OBSERVED), (torch.zeros(B, M, 4), OBSERVED[:, :2])):
        with pytest.raises(ValueError, match="observed"):
            partial_ddim_step_(z, x0, observed, TABLE, 0)


@pytest.mark.parametrize("offset", [0.0, 10.0, 100.0])
def test_nearest_code_is_exact_under_a_common_offset(offset: float) -> None:
    """|c|^2 - 2 z.c in float32 would cancel here."""
    z = normal(3000, 8, seed=1, dtype=torch.float32) + offset
    codebook = normal(500, 8, seed=2, dtype=torch.float32) + offset
    distance = torch.cdist(z.double(), codebook.double())
    assert torch.equal(nearest_code(z, codebook), distance.argmin(1))


def test_conv3_tap_by_tap() -> None:
    """Of every voxel the 27 neighbours, those outside left out."""
    x, weight, bias, residual = normal(2, 3, 2, 4, 5), normal(6, 3, 3, 3, 5), normal(6), normal(2, 3, 2, 4, 6)
    expected = residual + bias
    for h, w, d in product(range(3), range(2), range(4)):
        for a, b, c in product(range(3), repeat=3):
            i, j, k = h + a - 1, w + b - 1, d + c - 1
            if 0 <= i < 3 and 0 <= j < 2 and 0 <= k < 4:
                expected[:, h, w, d] += x[:, i, j, k] @ weight[:, a, b, c].T
    torch.testing.assert_close(conv3(x, weight, bias, residual, False), expected)
    torch.testing.assert_close(conv3(x, weight, bias, residual, True), expected.clamp_min(0))
    torch.testing.assert_close(conv3(x, weight, None, None, False), expected - residual - bias)
    half = conv3(x.half(), weight.half(), bias.half(), residual.half(), True)
    torch.testing.assert_close(half, expected.clamp_min(0).half(), rtol=0.02, atol=0.02)
