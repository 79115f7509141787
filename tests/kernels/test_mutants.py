"""Kernels broken on purpose: the comparisons that the other tests rest on must notice."""

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checks import (
    Layout,
    attention,
    compare,
    gated_norm,
    interpreted,
    leaf,
    norm,
    normal,
    place,
    rope_table,
    swiglu,
    using,
)

import copedit_kernels as ops
from copedit_kernels import dispatch, reference

pytestmark = interpreted
INSIDE = Layout.inside(4)


def break_kernels(patch: pytest.MonkeyPatch, folder: Path, name: str, old: str, new: str) -> None:
    """The kernels of kernels/NAME.py with `old` replaced by `new` wherever it stands; launchers stay as they are."""
    from triton.runtime.interpreter import InterpretedFunction

    module = importlib.import_module(f"kernels.{name}")
    assert module.__file__ is not None
    source = Path(module.__file__).read_text("utf-8")
    assert old in source, f"kernels/{name}.py has no {old!r} any more: give this test another mutation"
    path = folder / f"broken_{name}.py"  # a file, because Triton reads the source of a kernel from it
    path.write_text(source.replace(old, new), "utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    broken = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as alone:
        alone.setattr(dispatch, "register", lambda *_, **__: None)  # the operators are registered already
        spec.loader.exec_module(broken)
    for attribute, value in vars(broken).items():
        if isinstance(value, InterpretedFunction):
            patch.setattr(module, attribute, value)


def token() -> None:
    """Ragged tiles of queries and keys; large enough scores that a softmax differs from a mean."""
    qkv = leaf(2 * normal(1, 2, 35, 3, 1, 48, dtype=torch.float32), Layout.inside(6))
    compare(attention("token"), (qkv, rope_table(35, 48)), Layout.inside(5))


def element() -> None:
    qkv = leaf(2 * normal(2, 3, 5, 3, 2, 48), Layout.inside(6))
    compare(attention("element"), (qkv, rope_table(5, 48)), Layout.inside(5))


def norms() -> None:
    """24 of 32 columns, a last tile of tokens that is not full, and backward programs that walk over two tiles."""
    module = importlib.import_module("copedit_kernels.norm")
    scale, shift, gate = (leaf(normal(2, 24, seed=s, dtype=torch.float32), Layout.inside(2)) for s in (1, 2, 3))
    weight = leaf(normal(24, seed=4, dtype=torch.float32))
    x, branch = (leaf(1 + normal(2, 3, 5, 24, seed=s, dtype=torch.float32), INSIDE) for s in (5, 6))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TILES", {80: module.TILES[80]._replace(programs=8)})
        compare(norm("layer", 0.1), (x, scale, shift, weight), INSIDE)
        compare(gated_norm("rms", 0.1), (x, branch, gate, scale, shift, weight), INSIDE)


def gated_linear() -> None:
    compare(swiglu, (leaf(normal(2, 3, 5, 38, dtype=torch.float32), INSIDE),), INSIDE)


def codes() -> None:
    """Whole numbers, so that many codes are equally near; then codes that all are far away."""
    generator = torch.Generator().manual_seed(0)
    z, book = (torch.randint(-2, 3, (n, 4), generator=generator).float() for n in (150, 300))
    for codebook in (book, book + 5):
        with using("triton"):
            index = ops.nearest_code(place(z, Layout.inside(2)), codebook)
        assert torch.equal(index, reference.nearest_code(z, codebook))


def step() -> None:
    z = place(normal(2, 3, 4, 7, dtype=torch.float32), INSIDE)
    x0 = place(normal(2, 3, 4, 7, seed=1, dtype=torch.float32), Layout.plain(4))
    observed, table = torch.tensor([[1, 0, 1], [0, 0, 1]]).bool(), normal(4, 2, dtype=torch.float32)
    expected = reference.partial_ddim_step_(z.clone(), x0, observed, table, 2)
    with using("triton"):
        ops.partial_ddim_step_(z, x0, observed, table, torch.tensor(2))
    torch.testing.assert_close(z, expected)


# File and what notices -> what is broken -> text and replacement
MUTATIONS: dict[tuple[str, Callable[[], None]], dict[str, tuple[str, str]]] = {
    ("axis_attention", token): {
        "the mask of keys beyond the last": ('s = tl.where(there[None, :], s, float("-inf"))', "s = s"),
        "the scale of the scores": ("1.4426950408889634 * D**-0.5", "1.4426950408889634"),
        "the place of v": ("v = k + x_c", "v = k"),
        "the rotation of the gradient": ("(a * cos + b * sin)", "(a * cos - b * sin)"),
        "the scale of dk": ("dk0 * D**-0.5", "dk0"),
        "the softmax's share in dq": ("p * (dp - rest[:, None])", "p * dp"),
    },
    ("axis_attention", element): {
        "base e for base 2": ("1.4426950408889634 * D**-0.5", "D**-0.5"),
        "strides of token and head": ("token * x_t + head * x_h", "token * x_h + head * x_t"),
        "the sense of the rotation": ("a_wide * cos - b_wide * sin", "a_wide * cos + b_wide * sin"),
    },
    ("ada_norm", norms): {
        "1 + scale": ("gain = 1.0 + load_row", "gain = load_row"),
        "the mask of the mean": ("tl.where(inside[None, :], v - ", "tl.where(C > 0, v - "),
        "strides of element and token": ("x + b * x_b + i * x_i, t, x_t", "x + b * x_b + i * x_t, t, x_i"),
        "the mask of columns": ("c[None, :]), mask=live", "c[None, :]), mask=t < 5"),
        "the projection in dx": ("d = g - n * ", "d = g - 0 * n * "),
        "the sum of dshift": ("shift_sum += tl.sum(g, 0)", "shift_sum = tl.sum(g, 0)"),
        "eps": ("/ C + EPS)", "/ C)"),
    },
    ("swiglu", gated_linear): {
        "strides of h": ("at_1 * h_1 + at_2 * h_2", "at_1 * h_2 + at_2 * h_1"),
        "the sigmoid's derivative": ("(1.0 + a * (1.0 - s))", "(1.0 + a * s)"),
    },
    ("nearest_code", codes): {
        "the leftmost of equals": ("closer = distance < best", "closer = distance <= best"),
        "the mask of codes": ('other=float("inf")', "other=0.0"),
        "strides of z": ("z + row * z_n", "z + row * (z_n - 1)"),
    },
    ("partial_ddim", step): {
        "which elements move": ("observed_i) == 0", "observed_i) != 0"),
        "strides of x0": ("b * x_b + i * x_i", "b * z_b + i * x_i"),
    },
}
CASES = [
    pytest.param(name, check, *change, id=f"{name}: {what}")
    for (name, check), changes in MUTATIONS.items()
    for what, change in changes.items()
]


@pytest.mark.parametrize("check", [token, element, norms, gated_linear, codes, step])
def test_the_kernels_as_they_are_pass(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize(("name", "check", "old", "new"), CASES)
def test_a_broken_kernel_is_noticed(
    name: str, check: Callable[[], None], old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_kernels(monkeypatch, tmp_path, name, old, new)
    with pytest.raises(AssertionError, match=r"error|not close|equal"):
        check()
