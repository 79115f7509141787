"""The Triton kernels on a GPU: precision at every preset's shapes, repeatability, compilations, memory accesses.

pytest -m gpu tests/kernels
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checks import HAS_TRITON, Layout, compare, inputs_of, normal, once, strided

import copedit_kernels as ops
from copedit_bench.operators.cases import DIMS, OPERATORS
from copedit_kernels import reference
from copedit_rt.config import PRESETS

HERE = Path(__file__).parent
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_TRITON, reason="needs triton")]
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


# Precision


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("op", [op for op, row in OPERATORS.items() if not row.judge])
def test_every_preset(op: str, preset: str, dtype: torch.dtype) -> None:
    row = OPERATORS[op]
    for variant in row.variants:
        for ours in row.ours:
            for layout in (lambda name, x: Layout.plain(x.ndim), lambda name, x: Layout.inside(x.ndim)):
                sizes = row.sizes(PRESETS[preset], 2)
                sizes |= {axis: min(sizes[axis], 20) for axis in "PQR" if axis in sizes}  # float64 takes long
                inputs = inputs_of(op, sizes, dtype, layout, "cuda", **variant)
                compare(op, inputs, ours=ours)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize(("m", "tokens"), [(2, 130), (8, 577), (4, 2304)])
@pytest.mark.parametrize("op", ["axis_attention_token", "axis_attention_element"])
def test_attention_at_every_head_dimension(op: str, m: int, tokens: int, dim: int, dtype: torch.dtype) -> None:
    sizes = {"B": 1, "m": m, "T": tokens, "H": 2, "D": dim}
    compare(op, inputs_of(op, sizes, dtype, strided, "cuda", turned=True), Layout.inside(5))


@pytest.mark.parametrize("codes", [1024, 8192])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_nearest_code(codes: int, offset: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COPEDIT_KERNELS", "triton")
    for dim in (4, 8):
        z = normal(36_864, dim, dtype=torch.float32, device="cuda") + offset
        book = normal(codes, dim, seed=1, dtype=torch.float32, device="cuda") + offset
        expected = reference.nearest_code(z.cpu(), book.cpu()).cuda()
        assert torch.equal(reference.nearest_code(z, book), expected)
        assert torch.equal(ops.nearest_code(z, book), expected)
        assert torch.equal(ops.nearest_code(z.T.contiguous().T, book), expected)  # channels first, as latents come
        assert torch.equal(ops.nearest_code(book, torch.cat((book, book))), torch.arange(codes, device="cuda"))


def test_a_captured_loop_counts_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step counter lives on the device: one CUDA graph, replayed, walks through the table."""
    monkeypatch.setenv("COPEDIT_KERNELS", "triton")
    z, x0 = (normal(2, 4, 8, 24, 24, 1, seed=s, dtype=torch.float32, device="cuda") for s in (0, 1))
    observed = torch.arange(8, device="cuda").view(2, 4) % 3 == 0
    table, step = normal(5, 2, dtype=torch.float32, device="cuda"), torch.zeros((), dtype=torch.int64, device="cuda")
    expected = z.clone()
    for i in range(5):
        ops.partial_ddim_step_(expected, x0, observed, table, i)
    ops.partial_ddim_step_(z.clone(), x0, observed, table, step)  # compiles before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.partial_ddim_step_(z, x0, observed, table, step)
        step.add_(1)
    for _ in range(5):
        graph.replay()
    assert step.item() == 5 and torch.equal(z, expected)


# Repeatability


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("op", OPERATORS)
def test_twenty_runs_give_the_same_bits(op: str, dtype: torch.dtype) -> None:
    row = OPERATORS[op]
    for variant in row.variants:
        first, *others = (once(op, row.sizes(PRESETS["brain-brats"], 2), dtype, "cuda", **variant) for _ in range(20))
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


# Compilations


def test_no_compilation_for_another_batch_size() -> None:
    from triton.runtime.jit import JITFunction

    jitted = {
        id(value): value
        for name, module in list(sys.modules.items())
        if name.startswith("copedit_kernels.")
        for value in vars(module).values()
        if isinstance(value, JITFunction)
    }

    def compiled(batch: int) -> int:
        for op, row in OPERATORS.items():
            for variant in row.variants:
                once(op, row.sizes(PRESETS["brain-brats"], batch) | {"T": 64}, torch.float16, "cuda", **variant)
        return sum(len(cache[0]) for kernel in jitted.values() for cache in kernel.device_caches.values())

    before = compiled(4)
    assert before > 0
    for batch in (1, 2, 3, 16, 32):
        found = compiled(batch)
        assert found == before, f"batch {batch} compiled {found - before} more kernels"


# Memory accesses


@pytest.mark.parametrize("op", OPERATORS)
def test_no_access_out_of_bounds(op: str) -> None:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        pytest.skip("needs compute-sanitizer, of the CUDA toolkit, on PATH")
    folders = [HERE.parents[1] / folder for folder in ("", "kernels", "training", "bench", "tests/kernels")]
    code = f"import sys; sys.path[:0] = {list(map(str, folders))}; import torch, checks\n"
    code += f"for variant in checks.OPERATORS[{op!r}].variants:\n"
    code += f"    checks.once({op!r}, checks.OPERATORS[{op!r}].small, torch.float16, 'cuda', **variant)\n"
    code += "torch.cuda.synchronize()\n"
    # Without torch's caching allocator every tensor is an allocation of its own, whose ends the tool knows.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [tool, "--tool", "memcheck", "--error-exitcode", "99", sys.executable, "-c", code]
    done = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


# What a process with a GPU in sight cannot run


def test_the_interpreted_kernels() -> None:
    """The files that need the interpreter, in a process that sees no GPU."""
    files = [str(path) for path in sorted(HERE.glob("test_*.py")) if path != Path(__file__)]
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", *files]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-8000:]
