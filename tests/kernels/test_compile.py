"""What the compiler makes of every kernel for sm_80 and sm_90, without a GPU: spills, shared memory, instructions."""

import json
import os
import subprocess
import sys
from itertools import product
from typing import Any

import pytest
from checks import HAS_TRITON

from copedit_bench.operators.cases import OPERATORS
from copedit_rt.config import PRESETS

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")

SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes a program can have
HALF = ("float16", "bfloat16")
SWITCHED_ON = [op for op in OPERATORS if op != "conv3"]  # which takes as long to compile as the rest
# Kernels that walk over rows: every load of theirs moves 16 bytes a thread. Those that also read scalars or columns:
# at least two do.
ROW_WISE = {"norm_forward", "norm_backward", "swiglu_forward", "swiglu_backward"}
PARTLY = {"norm_backward_sum", "partial_ddim"}
# Those that gather, or load tiles by their strides: their loads are held to nothing.
GATHERING = {
    *("element_forward", "element_backward", "token_forward", "token_backward_q", "token_backward_kv"),
    *("rotate_rows", "nearest", "conv3_forward"),
}


def compiled(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The answers of `machine_code`; in a process of its own, as this one may interpret."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"COPEDIT_KERNELS": "triton"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-m", "copedit_bench.operators.machine_code"],
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
    if name.startswith(("token_", "conv3_")) and half:
        wanted = "wgmma" if architecture == 90 else "mma"
        if not kernel[wanted]:
            found.append(f"no {wanted}")
    if name not in ROW_WISE | PARTLY | GATHERING:
        found.append("name it in ROW_WISE, PARTLY or GATHERING, that its loads are held to what they can be")
    if (name in ROW_WISE and kernel["wide_loads"] < kernel["loads"]) or (name in PARTLY and kernel["wide_loads"] < 2):
        found.append(f"{kernel['wide_loads']} of {kernel['loads']} global loads are of 16 bytes")
    if name in ROW_WISE and kernel["wide_copies"] < kernel["copies"]:
        found.append(f"{kernel['wide_copies']} of {kernel['copies']} copies to shared memory are of 16 bytes")
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
    good |= {"copies": 2, "wide_copies": 2}
    assert not complaints(case, {"kernel": "token_forward", **good})
    assert not complaints(case, {"kernel": "norm_forward", **good})
    for kernel, change in (
        ("norm_forward", {"stack": 8}),
        ("norm_forward", {"local": 8}),
        ("element_forward", {"shared": 164 * 1024}),
        ("token_forward", {"mma": 0}),
        ("norm_forward", {"wide_loads": 5}),
        ("norm_backward", {"wide_copies": 1}),
        ("partial_ddim", {"wide_loads": 1}),
        ("another", {}),
    ):
        assert len(complaints(case, {"kernel": kernel, **good, **change})) == 1, (kernel, change)
    assert complaints(case | {"architecture": 90}, {"kernel": "token_forward", **good}) == ["token_forward: no wgmma"]


DTYPES = (*HALF, "float32")


def cases(op: str, everything: bool = False) -> list[dict[str, Any]]:
    """float16 in the usual variant at every size, in others and our other ways at the last one, which is the largest
    (the widest head, where registers are scarcest); float32 at the last one, and bfloat16, whose code is much like
    float16's, in the usual variant there. Or everything."""
    row, found = OPERATORS[op], []
    for ours, variant, sizes, dtype in product(row.ours, row.variants, row.gates, DTYPES):
        usual = ours == "ours" and variant == row.variants[0]
        last = sizes == row.gates[-1]
        if everything or (usual and (last or dtype == "float16")) or (last and dtype != "bfloat16"):
            found.append({"op": op, "ours": ours, "variant": variant, "sizes": sizes, "dtype": dtype})
    return found


def on(architecture: int, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"architecture": architecture} | case for case in found]


@pytest.mark.parametrize("architecture", [80, 90])
def test_token_attention(architecture: int) -> None:
    hold(on(architecture, cases("axis_attention_token")), launches=3)


def test_the_others() -> None:
    """For sm_80 in float16 at the largest size alone; `test_everything` has it all."""
    found = [case for op in SWITCHED_ON if op != "axis_attention_token" for case in cases(op)]
    largest = [c for c in found if c["dtype"] == "float16" and c["sizes"] == OPERATORS[c["op"]].gates[-1]]
    hold([*on(80, largest), *on(90, found)])


def test_one_compilation_for_every_batch_size() -> None:
    """Triton compiles again where an integer argument becomes 1 or stops being a multiple of 16."""
    batches = (4, 1, 3, 32)
    found = []
    for op, row in ((op, OPERATORS[op]) for op in SWITCHED_ON):
        dtype = "float32" if row.dtype else "float16"
        for batch in batches:
            sizes = row.sizes(PRESETS["brain-brats"], batch) | {"T": 64}
            found.append({"architecture": 90, "op": op, "sizes": sizes, "dtype": dtype})
    answers = compiled(found)
    for i in range(0, len(answers), len(batches)):
        variants = [{k["kernel"]: k["variants"] for k in answer["kernels"]} for answer in answers[i : i + len(batches)]]
        assert variants[0] and all(v == variants[0] for v in variants), f"{answers[i]['case']}: {variants}"


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("op", OPERATORS)
def test_everything(op: str, architecture: int) -> None:
    hold(on(architecture, cases(op, everything=True)))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("dim", [32, 48, 64, 96])
def test_token_attention_of_any_length(dim: int, architecture: int) -> None:
    found = [c | {"sizes": c["sizes"] | {"T": T}} for T in (577, 2304) for c in cases("axis_attention_token", True)]
    hold(on(architecture, [c for c in found if c["sizes"]["D"] == dim]))
