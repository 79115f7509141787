"""The Triton kernels on a GPU: precision at every preset's shapes, repeatability, compilations, memory accesses.

pytest -m gpu tests/kernels
"""

import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checks import (
    HAS_TRITON,
    Layout,
    attention,
    compare,
    gated_norm,
    leaf,
    norm,
    normal,
    place,
    rope_table,
    rows,
    swiglu,
)
from torch import Tensor

import copedit_kernels as ops
from copedit_kernels import reference
from copedit_rt.config import PRESETS
from copedit_rt.networks.denoiser import rope_table as model_rope

HERE = Path(__file__).parent
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_TRITON, reason="needs triton")]
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def shape_of(preset: str) -> tuple[int, int, int, int, int]:
    """m, tokens, heads, head dim and hidden width of a preset."""
    config = PRESETS[preset]
    c = config.denoiser
    tokens = 1
    for size, patch in zip(config.latent, c.patch, strict=True):
        tokens *= size // patch
    return len(config.elements), tokens, c.heads, c.head_dim, c.hidden


def preset_rope(preset: str) -> Tensor:
    config = PRESETS[preset]
    grid = tuple(n // p for n, p in zip(config.latent, config.denoiser.patch, strict=True))
    return model_rope(grid, config.denoiser.head_dim).cuda()  # type: ignore[arg-type]


# Precision


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("axis", ["token", "element"])
def test_attention(axis: str, preset: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    m, tokens, heads, dim, _ = shape_of(preset)
    qkv = leaf(normal(1, m, tokens, 3, heads, dim, dtype=dtype, device="cuda"))
    for rope in (preset_rope(preset), None):
        compare(attention(axis), (qkv, rope))
    monkeypatch.setattr(importlib.import_module("copedit_kernels.attention"), "ROTATE_BEFORE", True)
    compare(attention(axis), (qkv, preset_rope(preset)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [32, 48, 64, 96])
@pytest.mark.parametrize(("m", "tokens"), [(2, 130), (8, 577), (4, 2304)])
def test_attention_at_every_head_dimension(m: int, tokens: int, dim: int, dtype: torch.dtype) -> None:
    layout = Layout((2, 1, 0, 4, 3, 5), (1, 0, 2, 0, 1, 8), (0, 1, 0, 1, 0, 8), (1, 1, 2, 1, 1, 1))
    qkv = leaf(normal(1, m, tokens, 3, 2, dim, dtype=dtype, device="cuda"), layout)
    for axis in ("token", "element"):
        compare(attention(axis), (qkv, rope_table(tokens, dim).cuda()), Layout.inside(5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norms(kind: str, preset: str, dtype: torch.dtype) -> None:
    m, tokens, heads, dim, _ = shape_of(preset)
    batch, channels = 2, heads * dim
    packed = normal(batch, 6 * channels, seed=1, dtype=dtype, device="cuda")
    scale, shift, gate = (v.requires_grad_() for v in packed.chunk(6, dim=-1)[1:4])
    x, branch = (leaf(rows(batch, m, tokens, channels, seed=s, dtype=dtype, device="cuda")) for s in (2, 3))
    for other in {dtype, torch.float32}:  # float32 parameters, as under autocast
        weight = leaf(1 + normal(channels, seed=4, device="cuda").to(other))
        for last in ((weight,), ()):
            compare(norm(kind, 1e-4), (x, scale, shift, *last))
            compare(gated_norm(kind, 1e-4), (x, branch, gate, scale, shift, *last))
    compare(norm(kind, 1e-4), (leaf(x.detach().float()), scale, shift, weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("preset", PRESETS)
def test_swiglu(preset: str, dtype: torch.dtype) -> None:
    m, tokens, _, _, hidden = shape_of(preset)
    h = rows(1, m, tokens, 2 * hidden, dtype=dtype, device="cuda")
    for layout in (Layout.plain(4), Layout.inside(4)):
        compare(swiglu, (leaf(h, layout),))


@pytest.mark.parametrize("codes", [1024, 8192])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_nearest_code(codes: int, offset: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COPEDIT_KERNELS", "triton")
    for dim in (4, 8):
        z = normal(36_864, dim, dtype=torch.float32, device="cuda") + offset
        book = normal(codes, dim, seed=1, dtype=torch.float32, device="cuda") + offset
        # On the CPU, where the reference rounds product and sum apart; its CUDA build may fuse them.
        expected = reference.nearest_code(z.cpu(), book.cpu()).cuda()
        assert torch.equal(ops.nearest_code(z, book), expected)
        assert torch.equal(ops.nearest_code(z.T.contiguous().T, book), expected)  # channels first, as latents come
        assert torch.equal(ops.nearest_code(book, torch.cat((book, book))), torch.arange(codes, device="cuda"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_partial_step(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COPEDIT_KERNELS", "triton")
    z = place(normal(3, 4, 8, 24, 24, 8, dtype=dtype, device="cuda"), Layout.inside(6))
    x0 = normal(3, 4, 8, 24, 24, 8, seed=1, dtype=dtype, device="cuda")
    observed = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]], device="cuda").bool()
    x0[observed] = torch.nan
    table, step = normal(20, 2, dtype=torch.float32, device="cuda"), torch.tensor(7, device="cuda")
    before = z.clone()
    expected = reference.partial_ddim_step_(z.clone(), x0, observed, table, step)
    exact = table[7, 0].double() * before.double() + table[7, 1].double() * x0.double()
    ops.partial_ddim_step_(z, x0, observed, table, step)
    assert torch.equal(z[observed], before[observed])
    error, allowed = ((v.double() - exact)[~observed].abs().max() for v in (z, expected))
    assert error <= 2 * allowed + torch.finfo(dtype).eps * exact[~observed].abs().max()


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


def everything(dtype: torch.dtype, batch: int = 2, tokens: int = 576) -> list[Callable[[], list[Tensor]]]:
    """Each operator, forward and backward, as a function that returns outputs and gradients."""
    m, heads, dim = 4, 12, 64
    channels = heads * dim
    qkv = leaf(normal(batch, m, tokens, 3, heads, dim, dtype=dtype, device="cuda"))
    x, branch = (leaf(normal(batch, m, tokens, channels, seed=s, dtype=dtype, device="cuda")) for s in (1, 2))
    scale, shift, gate = (leaf(normal(batch, channels, seed=s, dtype=dtype, device="cuda")) for s in (3, 4, 5))
    weight = leaf(normal(channels, seed=6, dtype=dtype, device="cuda"))
    h = leaf(normal(batch, m, tokens, 4096, seed=7, dtype=dtype, device="cuda"))
    rope = rope_table(tokens, dim).cuda()
    z = normal(batch * 1000, 8, dtype=torch.float32, device="cuda")
    book = normal(1024, 8, dtype=torch.float32, device="cuda")
    observed = torch.arange(batch * m, device="cuda").view(batch, m) % 3 == 0
    table = normal(20, 2, dtype=torch.float32, device="cuda")

    def gradients(call: Callable, *inputs: Tensor) -> Callable[[], list[Tensor]]:
        def run() -> list[Tensor]:
            out = call(ops, *inputs)
            outputs = out if isinstance(out, tuple) else (out,)
            cotangents = [normal(*y.shape, seed=8, device="cuda").to(y.dtype) for y in outputs]
            leaves = [v for v in inputs if v.requires_grad]
            return [*outputs, *torch.autograd.grad(outputs, leaves, cotangents)]

        return run

    return [
        gradients(attention("token"), qkv, rope),
        gradients(attention("element"), qkv),
        gradients(norm("rms", 1e-4), x, scale, shift, weight),
        gradients(norm("layer", 1e-4), x, scale, shift, weight),
        gradients(gated_norm("rms", 1e-4), x, branch, gate, scale, shift, weight),
        gradients(swiglu, h),
        lambda: [ops.nearest_code(z, book)],
        lambda: [ops.partial_ddim_step_(x.detach().clone(), branch.detach(), observed, table, 3)],
    ]


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_twenty_runs_give_the_same_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COPEDIT_KERNELS", "triton")
    for run in everything(dtype):
        first = run()
        for _ in range(19):
            assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


# Compilations


def test_no_compilation_for_another_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.jit import JITFunction

    monkeypatch.setenv("COPEDIT_KERNELS", "triton")
    jitted = {
        id(value): value
        for name, module in list(sys.modules.items())
        if name.startswith("kernels.")
        for value in vars(module).values()
        if isinstance(value, JITFunction)
    }

    def compiled() -> int:
        return sum(len(cache[0]) for kernel in jitted.values() for cache in kernel.device_caches.values())

    for run in everything(torch.float16, batch=4, tokens=64):
        run()
    before = compiled()
    assert before > 0
    for batch in (1, 2, 3, 16, 32):
        for run in everything(torch.float16, batch, tokens=64):
            run()
        assert compiled() == before, f"batch {batch} compiled {compiled() - before} more kernels"


# Memory accesses


SANITIZED = {
    "axis_attention": """
for axis in ("token", "element"):
    for dim in (48, 64):
        qkv = torch.randn(1, 3, 67, 3, 2, dim, device="cuda", dtype=torch.float16, requires_grad=True)
        rope = torch.randn(2, 67, dim // 2, device="cuda")
        ops.axis_attention(qkv, rope, axis).square().sum().backward()
""",
    "ada_norm": """
x = torch.randn(2, 3, 7, 288, device="cuda", dtype=torch.float16, requires_grad=True)
s = torch.randn(2, 288, device="cuda", dtype=torch.float16, requires_grad=True)
w = torch.randn(288, device="cuda", dtype=torch.float16, requires_grad=True)
for kind in ("rms", "layer"):
    ops.ada_norm(x, s, s, w, kind).square().sum().backward()
""",
    "gated_residual_ada_norm": """
x = torch.randn(2, 3, 7, 288, device="cuda", dtype=torch.float16, requires_grad=True)
s = torch.randn(2, 288, device="cuda", dtype=torch.float16, requires_grad=True)
y, n = ops.gated_residual_ada_norm(x, x, s, s, s, None)
(y * n).sum().backward()
""",
    "swiglu": """
h = torch.randn(2, 3, 7, 2 * 1023, device="cuda", dtype=torch.float16, requires_grad=True)
ops.swiglu(h).square().sum().backward()
""",
    "nearest_code": """
ops.nearest_code(torch.randn(1001, 8, device="cuda"), torch.randn(777, 8, device="cuda"))
""",
    "partial_ddim_step_": """
z = torch.randn(3, 4, 8, 5, 7, 3, device="cuda")
observed = torch.rand(3, 4, device="cuda") < 0.5
ops.partial_ddim_step_(z, z.clone(), observed, torch.randn(5, 2, device="cuda"), 2)
""",
}


@pytest.mark.parametrize("op", SANITIZED)
def test_no_access_out_of_bounds(op: str) -> None:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        pytest.skip("needs compute-sanitizer, of the CUDA toolkit, on PATH")
    code = "import torch, kernels\n" + SANITIZED[op] + "torch.cuda.synchronize()\n"
    # Without torch's caching allocator every tensor is an allocation of its own, whose ends the tool knows.
    environment = os.environ | {"COPEDIT_KERNELS": "triton", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
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
