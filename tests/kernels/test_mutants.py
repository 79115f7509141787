"""Kernels broken on purpose: the comparisons that the other tests rest on must notice."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checks import Layout, compare, inputs_of, interpreted
from torch import Tensor

from copedit_bench.operators.cases import OPERATORS
from copedit_kernels import dispatch, norm

pytestmark = interpreted


def break_kernels(patch: pytest.MonkeyPatch, folder: Path, name: str, old: str, new: str) -> None:
    """Replaces `old` by `new` in the kernels of copedit_kernels.NAME; launchers stay as they are."""
    from triton.runtime.interpreter import InterpretedFunction

    module = sys.modules[f"copedit_kernels.{name}"]
    assert module.__file__ is not None
    source = Path(module.__file__).read_text("utf-8")
    assert old in source, f"copedit_kernels/{name}.py has no {old!r} any more: give this test another mutation"
    path = folder / f"broken_{name}.py"  # a file, because Triton reads the source of a kernel from it
    path.write_text(source.replace(old, new), "utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    broken = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as alone:
        alone.setattr(dispatch, "register", lambda *_, **__: None)  # the operators are registered already
        spec.loader.exec_module(broken)
    for attribute, value in vars(broken).items():
        if isinstance(value, InterpretedFunction) and value.fn.__module__ == broken.__name__:
            replace_everywhere(patch, getattr(module, attribute), attribute, value)


def replace_everywhere(patch: pytest.MonkeyPatch, old: object, name: str, new: object) -> None:
    for module in [m for n, m in sys.modules.items() if n.startswith("copedit_kernels.")]:
        if getattr(module, name, None) is old:
            patch.setattr(module, name, new)


def spaced(name: str, x: Tensor) -> Layout:
    """Room around, so that wrong strides stay inside the buffer; other room for each argument."""
    return replace(Layout.inside(x.ndim), after=(2 + len(name),) * x.ndim)


def check(op: str) -> None:
    """A few ragged tiles in every variant, with gaps; large enough scores that a softmax differs from a mean, and
    backward programs of the norms that walk over two tiles."""
    row, dtype = OPERATORS[op], torch.float32
    more = {"size": 2.0} if row.function == "axis_attention" else {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(norm, "TILES", {80: norm.TILES[80]._replace(programs=8)})
        for variant in row.variants:
            compare(op, inputs_of(op, row.small, dtype, spaced, **variant, **more))


# Module and operator -> what is broken -> text and replacement
MUTATIONS: dict[tuple[str, str], dict[str, tuple[str, str]]] = {
    ("attention_token", "axis_attention_token"): {
        "the mask of keys beyond the last": ('s = tl.where(there[None, :], s, float("-inf"))', "s = s"),
        "the scale of the scores": ("1.4426950408889634 * D**-0.5", "1.4426950408889634"),
        "the place of v": ("v = k + x_c", "v = k"),
        "the scale of dk": ("dk0 * D**-0.5", "dk0"),
        "the softmax's share in dq": ("p * (dp - delta_i[:, None])", "p * dp"),
    },
    ("attention_element", "axis_attention_element"): {
        "base e for base 2": ("1.4426950408889634 * D**-0.5", "D**-0.5"),
        "strides of token and head": ("token * x_t + head * x_h", "token * x_h + head * x_t"),
    },
    ("rotary", "axis_attention_element"): {
        "the sense of the rotation": ("a_wide * cos - b_wide * sin", "a_wide * cos + b_wide * sin"),
        "the rotation of the gradient": ("(a * cos + b * sin)", "(a * cos - b * sin)"),
    },
    ("norm", "gated_residual_ada_norm"): {
        "1 + scale": ("gain = 1.0 + load_row", "gain = load_row"),
        "the mask of the mean": ("tl.where(inside[None, :], v - ", "tl.where(C > 0, v - "),
        "strides of element and token": ("x + b * x_b + i * x_i, t, x_t", "x + b * x_b + i * x_t, t, x_i"),
        "the mask of columns": ("c[None, :]), mask=live", "c[None, :]), mask=t < 5"),
        "the projection in dx": ("d = g - n * ", "d = g - 0 * n * "),
        "the sum of dshift": ("shift_sum += tl.sum(g, 0)", "shift_sum = tl.sum(g, 0)"),
        "eps": ("/ C + EPS)", "/ C)"),
    },
    ("activation", "swiglu"): {
        "strides of h": ("at_1 * h_1 + at_2 * h_2", "at_1 * h_2 + at_2 * h_1"),
        "the sigmoid's derivative": ("(1.0 + a * (1.0 - s))", "(1.0 + a * s)"),
    },
    ("convolution", "conv3"): {
        "the edge along an axis": ("(h < H - 1)", "(h < H)"),
        "the strides of taps": ("a * w_h + b * w_w", "a * w_w + b * w_h"),
        "the residual": ("if ADDED:", "if False:"),
    },
    ("codes", "nearest_code"): {
        "the leftmost of equals": ("closer = distance < best", "closer = distance <= best"),
        "the mask of codes": ('other=float("inf")', "other=0.0"),
        "strides of z": ("z + row * z_n", "z + row * (z_n - 1)"),
    },
    ("sampler_step", "partial_ddim_step_"): {
        "which elements move": ("observed_i) == 0", "observed_i) != 0"),
        "strides of x0": ("b * x_b + i * x_i", "b * z_b + i * x_i"),
    },
}
CASES = [
    pytest.param(module, op, *change, id=f"{op}: {what}")
    for (module, op), changes in MUTATIONS.items()
    for what, change in changes.items()
]


@pytest.mark.parametrize("op", sorted({op for _, op in MUTATIONS}))
def test_the_kernels_as_they_are_pass(op: str) -> None:
    check(op)


@pytest.mark.parametrize(("module", "op", "old", "new"), CASES)
def test_a_broken_kernel_is_noticed(
    module: str, op: str, old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_kernels(monkeypatch, tmp_path, module, old, new)
    with pytest.raises(AssertionError, match=r"error|equal"):
        check(op)
