"""Which implementation runs: what COPEDIT_KERNELS means, and that nothing falls back in silence."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checks import Recorder, interpreted

import copedit_kernels as ops
from copedit_bench.operators.cases import OPERATORS, Fill
from copedit_kernels import dispatch, reference

ROOT = Path(__file__).resolve().parents[2]
BLOCKED = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ImportError("no triton here")
sys.meta_path.insert(0, Refuse())
"""


def run_all() -> list[str]:
    """Every public operator once; the registered operators that ran."""
    names = []
    for row in OPERATORS.values():
        with Recorder() as recorder:
            getattr(ops, row.function)(*row.inputs(row.small, Fill(torch.float32)).values())
        names += [func.name().removeprefix("copedit::") for func, _ in recorder.calls]
    return names


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("COPEDIT_KERNELS", "TRITON_INTERPRET")}
    kept["PYTHONPATH"] = f"{ROOT}:{ROOT / 'kernels'}"
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, env=kept | environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("choice", ["auto", "reference", "triton"])
def test_the_values(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("COPEDIT_KERNELS", choice)
    assert ops.implementation() == choice
    monkeypatch.delenv("COPEDIT_KERNELS")
    assert ops.implementation() == "auto"


@pytest.mark.parametrize("choice", ["", "Triton", "cuda", "fastest"])
def test_another_value_is_refused_by_every_operator(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COPEDIT_KERNELS", choice)
    for call in (ops.implementation, run_all, lambda: dispatch.use_triton(torch.zeros(1))):
        with pytest.raises(ValueError, match=rf"COPEDIT_KERNELS='{choice}'.*auto.*reference.*triton"):
            call()


@pytest.mark.parametrize("choice", ["auto", "reference"])
def test_the_reference_runs_on_cpu_tensors(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COPEDIT_KERNELS", choice)
    assert not dispatch.use_triton(torch.zeros(1))
    assert run_all() == []


@interpreted
def test_triton_runs_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COPEDIT_KERNELS", "triton")
    assert dispatch.use_triton(torch.zeros(1))
    assert run_all() == [row.function for row in OPERATORS.values()]


def test_a_tensor_on_another_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("COPEDIT_KERNELS", "triton")
    with pytest.raises(ValueError, match="CUDA tensors or TRITON_INTERPRET=1"):
        dispatch.use_triton(torch.zeros(1, device="meta"))
    with pytest.raises(ValueError, match="CUDA tensors or TRITON_INTERPRET=1"):
        ops.swiglu(torch.zeros(2, 4, device="meta"))


def test_triton_without_gpu_and_interpreter_is_refused() -> None:
    pytest.importorskip("triton")
    code = "import torch, copedit_kernels as ops; ops.swiglu(torch.zeros(2, 4))"
    assert python(code).returncode == 0
    done = python(code, COPEDIT_KERNELS="triton", CUDA_VISIBLE_DEVICES="")
    assert done.returncode != 0
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ValueError") and "CUDA tensors" in last and "TRITON_INTERPRET=1" in last


def test_without_triton_the_reference_runs() -> None:
    """macOS and Windows have no triton: everything imports and computes, `triton` is refused with the reason."""
    code = (
        BLOCKED
        + "import torch, copedit_kernels as ops\n"
        + "from copedit_rt.networks import denoiser, tokenizer\n"
        + "assert 'triton' not in sys.modules\n"
        + "h = torch.randn(3, 8)\n"
        + "assert torch.equal(ops.swiglu(h), ops.reference.swiglu(h))\n"
        + "print(ops.implementation())"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["auto"]
    done = python(code, COPEDIT_KERNELS="triton")
    assert done.returncode != 0
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ValueError") and "triton cannot be imported" in last


def test_triton_is_loaded_only_where_a_kernel_may_run() -> None:
    pytest.importorskip("triton")
    code = "import sys, copedit_kernels as ops; print('triton' in sys.modules)"
    nowhere = {"CUDA_VISIBLE_DEVICES": ""}
    assert python(code, **nowhere).stdout.split() == ["False"]
    assert python(code, COPEDIT_KERNELS="triton", **nowhere).stdout.split() == ["True"]
    assert python(code, TRITON_INTERPRET="1", **nowhere).stdout.split() == ["True"]


def test_the_public_names_have_the_signatures_of_the_reference() -> None:
    for name in {row.function for row in OPERATORS.values()} - {"nearest_code"}:  # whose reference takes pieces
        public, plain = (inspect.signature(getattr(module, name)) for module in (ops, reference))
        assert [(p.name, p.default) for p in public.parameters.values()] == [
            (p.name, p.default) for p in plain.parameters.values()
        ], name
