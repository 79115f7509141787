"""Which implementation runs: what COPEDIT_KERNELS means, and that nothing falls back in silence."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checks import interpreted, normal
from torch.utils._python_dispatch import TorchDispatchMode

import copedit_kernels as ops
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


class Recorder(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def run_all() -> list[str]:
    """Every public operator once; the registered operators that ran."""
    x, s = normal(2, 2, 3, 16, dtype=torch.float32), normal(2, 16, dtype=torch.float32)
    with Recorder() as recorder:
        ops.axis_attention(normal(1, 2, 3, 3, 1, 32, dtype=torch.float32), None, "token")
        ops.axis_attention(normal(1, 2, 3, 3, 1, 32, dtype=torch.float32), None, "element")
        ops.ada_norm(x, s, s)
        ops.gated_residual_ada_norm(x, x, s, s, s)
        ops.swiglu(x)
        ops.nearest_code(x.view(-1, 16), x.view(-1, 16))
        ops.partial_ddim_step_(x.clone(), x, torch.zeros(2, 2).bool(), normal(3, 2, dtype=torch.float32), 1)
    return [name.removeprefix("copedit::") for name in recorder.names if name.startswith("copedit::")]


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("COPEDIT_KERNELS", "TRITON_INTERPRET")}
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
    public = {"axis_attention", "ada_norm", "gated_residual_ada_norm", "swiglu", "nearest_code", "partial_ddim_step_"}
    ran = run_all()
    assert len(ran) == 7, ran
    assert {name for name in public if any(r.startswith(name.rstrip("_")) for r in ran)} == public, ran


def test_a_tensor_on_another_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("COPEDIT_KERNELS", "triton")
    with pytest.raises(ValueError, match="CUDA tensors or TRITON_INTERPRET=1"):
        dispatch.use_triton(torch.zeros(1, device="meta"))
    with pytest.raises(ValueError, match="CUDA tensors or TRITON_INTERPRET=1"):
        ops.swiglu(torch.zeros(2, 4, device="meta"))


def test_triton_without_gpu_and_interpreter_is_refused() -> None:
    pytest.importorskip("triton")
    code = "import torch, kernels; ops.swiglu(torch.zeros(2, 4))"
    assert python(code).returncode == 0
    done = python(code, COPEDIT_KERNELS="triton", CUDA_VISIBLE_DEVICES="")
    assert done.returncode != 0
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ValueError") and "CUDA tensors" in last and "TRITON_INTERPRET=1" in last


def test_without_triton_the_reference_runs() -> None:
    """macOS and Windows have no triton: everything imports and computes, `triton` is refused with the reason."""
    code = (
        BLOCKED
        + "import torch, kernels\n"
        + "from copedit_rt import denoiser, tokenizer\n"
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


def test_the_public_names_have_the_signatures_of_the_reference() -> None:
    import inspect

    for name in ("axis_attention", "ada_norm", "gated_residual_ada_norm", "swiglu", "partial_ddim_step_", "rotate"):
        public, plain = (inspect.signature(getattr(module, name)) for module in (ops, reference))
        assert [(p.name, p.default) for p in public.parameters.values()] == [
            (p.name, p.default) for p in plain.parameters.values()
        ], name
    assert next(iter(inspect.signature(ops.nearest_code).parameters)) == "z"
