"""What the compiler makes of every kernel for sm_80 and sm_90, without a GPU: spills, shared memory, instructions."""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from checks import HAS_TRITON

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")

SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes a program can have
HALF = ("float16", "bfloat16")
# Kernels that walk over rows: every load of theirs moves 16 bytes a thread. Those that also read scalars or columns:
# at least two do.
ROW_WISE = {"norm_forward", "norm_backward", "swiglu_forward", "swiglu_backward"}
PARTLY = {"norm_backward_sum", "partial_ddim"}


def compiled(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The answers of compile_gates.py; in a process of its own, as this one may interpret."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"COPEDIT_KERNELS": "triton"}
    done = subprocess.run(
        [sys.executable, str(HERE / "compile_gates.py")],
        input=json.dumps(cases),
        env=environment,
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def complaints(case: dict[str, Any], kernel: dict[str, Any]) -> list[str]:
    name, architecture, half = kernel["kernel"], case["architecture"], case.get("dtype", "float16") in HALF
    found = []
    if kernel["stack"] or kernel["local"]:
        found.append(f"spills: {kernel['stack']} bytes of stack, {kernel['local']} of local memory")
    if kernel["shared"] > SHARED[architecture]:
        found.append(f"{kernel['shared']} bytes of shared memory, of {SHARED[architecture]}")
    if name.startswith("token_") and half:
        wanted = "wgmma" if architecture == 90 else "mma"
        if not kernel[wanted]:
            found.append(f"no {wanted}")
    if (name in ROW_WISE and kernel["wide_loads"] < kernel["loads"]) or (name in PARTLY and kernel["wide_loads"] < 2):
        found.append(f"{kernel['wide_loads']} of {kernel['loads']} global loads are of 16 bytes")
    return [f"{name}: {text}" for text in found]


def hold(cases: list[dict[str, Any]], launches: int = 1) -> None:
    """Every gate for every kernel of every case; all that fails is listed."""
    failed = []
    for answer in compiled(cases):
        assert len(answer["kernels"]) >= launches, f"{answer['case']}: launches {answer['kernels']}"
        for kernel in answer["kernels"]:
            failed += [f"{answer['case']}: {text}" for text in complaints(answer["case"], kernel)]
    assert not failed, "\n".join(failed)


def test_the_gates_themselves() -> None:
    case = {"architecture": 80, "dtype": "bfloat16"}
    good = {"stack": 0, "local": 0, "shared": 1024, "mma": 8, "wgmma": 0, "loads": 6, "wide_loads": 6}
    assert not complaints(case, {"kernel": "token_forward", **good})
    assert not complaints(case, {"kernel": "norm_forward", **good})
    for kernel, change in (
        ("norm_forward", {"stack": 8}),
        ("norm_forward", {"local": 8}),
        ("element_forward", {"shared": 164 * 1024}),
        ("token_forward", {"mma": 0}),
        ("norm_forward", {"wide_loads": 5}),
        ("partial_ddim", {"wide_loads": 1}),
    ):
        assert len(complaints(case, {"kernel": kernel, **good, **change})) == 1, (kernel, change)
    assert complaints(case | {"architecture": 90}, {"kernel": "token_forward", **good}) == ["token_forward: no wgmma"]


def crossed(**choices: tuple) -> list[dict[str, Any]]:
    return [dict(zip(choices, values, strict=True)) for values in product(*choices.values())]


DIMS, DTYPES = (32, 48, 64, 96), (*HALF, "float32")
# Every operator, dtype and head dim; the product with every shape and flag is below.
TOKEN = [
    *crossed(dtype=DTYPES, dim=DIMS, rope=(True,)),
    {"dtype": "float16", "dim": 96, "rope": False},
    {"dtype": "float32", "dim": 96, "rope": False},
    {"dtype": "float16", "dim": 64, "rope": True, "before": True},
]
ELEMENT = [
    *crossed(dtype=DTYPES, dim=DIMS, rope=(False,), m=(4,)),
    {"dtype": "bfloat16", "dim": 48, "rope": True, "m": 3},
    {"dtype": "float32", "dim": 32, "rope": False, "m": 8},
    {"dtype": "float32", "dim": 96, "rope": True, "m": 2},
]
NORMS = ("ada_norm", "gated_residual_ada_norm")
NORM = [
    *crossed(op=NORMS, kind=("rms",), channels=(768,), dtype=DTYPES, parameters=("float32",), weight=(True,)),
    *crossed(op=NORMS, kind=("rms",), channels=(768,), dtype=("bfloat16",), parameters=("bfloat16",), weight=(True,)),
    *crossed(op=NORMS, kind=("layer",), channels=(1152,), dtype=DTYPES, parameters=("float32",), weight=(False,)),
    *crossed(op=NORMS[1:], kind=("rms",), channels=(192, 384), dtype=DTYPES, parameters=("float32",), weight=(True,)),
]
FLAT = [
    *crossed(op=("swiglu",), channels=(2048,), dtype=DTYPES),
    *crossed(op=("nearest_code", "partial_ddim_step_"), dtype=DTYPES),
]


def on_both(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"architecture": architecture, **case} for architecture in (80, 90) for case in cases]


@pytest.mark.parametrize("architecture", [80, 90])
def test_token_attention(architecture: int) -> None:
    case = {"architecture": architecture, "op": "axis_attention", "axis": "token"}
    hold([case | c for c in TOKEN], launches=3)


def test_element_attention_and_rows() -> None:
    element = [{"op": "axis_attention", "axis": "element"} | c for c in ELEMENT]
    hold(on_both([*element, *NORM, *FLAT]))


def test_one_compilation_for_every_batch_size() -> None:
    """Triton compiles again where an integer argument becomes 1 or stops being a multiple of 16."""
    base = [
        {"op": "axis_attention", "axis": "token", "dim": 64, "rope": True, "heads": 12},
        {"op": "axis_attention", "axis": "element", "dim": 64, "heads": 12},
        {"op": "gated_residual_ada_norm", "kind": "rms", "channels": 768},
        {"op": "swiglu", "channels": 2048},
        {"op": "nearest_code", "dtype": "float32"},
        {"op": "partial_ddim_step_", "dtype": "float32"},
    ]
    for case, group in zip(base, _by_batch(base), strict=True):
        variants = [{kernel["kernel"]: kernel["variants"] for kernel in answer["kernels"]} for answer in group]
        assert variants[0] and all(v == variants[0] for v in variants), f"{case}: {variants}"


def _by_batch(base: list[dict[str, Any]], batches: tuple[int, ...] = (4, 1, 3, 32)) -> list[list[dict[str, Any]]]:
    cases = [{"architecture": 90, "batch": batch, "tokens": 64, **case} for case in base for batch in batches]
    answers = compiled(cases)
    return [answers[i : i + len(batches)] for i in range(0, len(answers), len(batches))]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("dim", [32, 48, 64, 96])
def test_every_attention(architecture: int, dim: int) -> None:
    flags = {"architecture": (architecture,), "op": ("axis_attention",), "dim": (dim,), "rope": (True, False)}
    dtypes = (*HALF, "float32")
    ragged = crossed(**flags, axis=("token",), dtype=dtypes, tokens=(576, 577, 2304))
    before = crossed(**flags | {"rope": (True,)}, axis=("token",), dtype=dtypes, before=(True,))
    hold(ragged + before + crossed(**flags, axis=("element",), dtype=dtypes, m=(2, 3, 4, 8)))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90])
def test_every_row_wise_kernel(architecture: int) -> None:
    dtypes = (*HALF, "float32")
    norms = crossed(
        architecture=(architecture,),
        op=("ada_norm", "gated_residual_ada_norm"),
        kind=("rms", "layer"),
        channels=(192, 288, 384, 576, 768, 1152),
        dtype=dtypes,
        parameters=dtypes,
        weight=(True, False),
    )
    mixed = [c for c in norms if c["parameters"] in (c["dtype"], "float32")]
    gates = crossed(
        architecture=(architecture,), op=("swiglu",), channels=(512, 768, 1024, 1536, 2048, 3072), dtype=dtypes
    )
    flat = crossed(architecture=(architecture,), op=("nearest_code", "partial_ddim_step_"), dtype=dtypes)
    hold(mixed + gates + flat)
