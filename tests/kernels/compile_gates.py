"""Compiles for a GPU that is not there what the operators would launch on it; run as a script by test_compile.py.

Standard input: a JSON list of cases (see `launch`). Standard output: a JSON list with, for each case, the kernels that
it launches, each with what the compiler says of it. The launchers run as they are, on CPU tensors: the launch itself
stops after the compilation, as Triton's own `warmup` does. So the gates see the very tile sizes, warps, stages and
argument specialisations that a GPU would get.
"""

import importlib
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import triton
from torch.library import Library
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

ROOT = Path(__file__).resolve().parents[2]
architecture = 0
launched: list[tuple[str, Any, int]] = []  # name, compiled kernel, number of variants that this kernel has by now


class Driver:
    """A GPU of `architecture`, as far as Triton asks before it launches."""

    def get_current_device(self) -> int:
        return architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", architecture, 32)


def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
    compiled = launch_kernel(kernel, *args, grid=grid, warmup=True, **options)
    launched.append((kernel.fn.__name__, compiled, len(kernel.device_caches[architecture][0])))
    return compiled


def also_on_cpu(library: Library, name: Any, run: Any, key: str = "", **options: Any) -> None:
    implement(library, name, run, key, **options)
    if library.ns == "copedit" and key == "CUDA":
        implement(library, name, run, "CPU", **options)


launch_kernel, JITFunction.run = JITFunction.run, compile_only
implement, Library.impl = Library.impl, also_on_cpu  # type: ignore[method-assign]
triton.runtime.driver.set_active(Driver())
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import copedit_kernels as ops  # noqa: E402
from copedit_kernels import dispatch  # noqa: E402


def tiles(table: dict[int, Any], x: torch.Tensor) -> Any:
    return table[max(a for a in table if a <= architecture)]


dispatch.INTERPRETED = True  # what `use_triton` asks before it lets CPU tensors through
original_tiles = dispatch.tiles
for module in [m for name, m in sys.modules.items() if name.startswith("kernels")]:
    if getattr(module, "tiles", None) is original_tiles:
        module.tiles = tiles  # type: ignore[attr-defined]


def launch(case: dict[str, Any]) -> None:
    """Forward and, unless `backward` is false, backward of one operator; the values do not matter."""
    dtype = getattr(torch, case.get("dtype", "float16"))
    wide = getattr(torch, case.get("parameters", case.get("dtype", "float16")))  # of scale, shift, gate and weight
    batch, m, tokens = case.get("batch", 2), case.get("m", 4), case.get("tokens", 576)
    channels = case.get("channels", 768)
    grad = case.get("backward", True)

    def zeros(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, requires_grad=grad)

    def modulation() -> torch.Tensor:
        """[B, C] as a chunk of one [B, 6C], the way the blocks have it."""
        return torch.zeros(batch, 6 * channels, dtype=wide).chunk(6, -1)[1].requires_grad_(grad)

    op = case["op"]
    if op == "axis_attention":
        heads, dim = case.get("heads", 2), case["dim"]
        importlib.import_module("copedit_kernels.attention").ROTATE_BEFORE = case.get("before", False)  # type: ignore
        rope = torch.zeros(2, tokens, dim // 2) if case.get("rope") else None
        out = (ops.axis_attention(zeros(batch, m, tokens, 3, heads, dim), rope, case["axis"]),)
    elif op in ("ada_norm", "gated_residual_ada_norm"):
        x, weight = zeros(batch, m, tokens, channels), zeros(channels, dtype=wide) if case.get("weight", True) else None
        if op == "ada_norm":
            out = (ops.ada_norm(x, modulation(), modulation(), weight, case["kind"]),)
        else:
            branch, gate = zeros(batch, m, tokens, channels), modulation()
            out = ops.gated_residual_ada_norm(x, branch, gate, modulation(), modulation(), weight, case["kind"])
    elif op == "swiglu":
        out = (ops.swiglu(zeros(batch, m, tokens, 2 * channels)),)
    elif op == "nearest_code":
        ops.nearest_code(torch.zeros(batch * 4608, 8, dtype=dtype), torch.zeros(8192, 8, dtype=dtype))
        return
    elif op == "partial_ddim_step_":
        z, x0, observed = (*torch.zeros(2, batch, m, 8, 24, 24, 8, dtype=dtype).unbind(0), torch.zeros(batch, m) > 0)
        ops.partial_ddim_step_(z, x0, observed, torch.zeros(200, 2), torch.zeros((), dtype=torch.int64))
        return
    else:
        raise ValueError(op)
    if grad:
        torch.autograd.backward(out, [torch.zeros_like(y) for y in out])


def resources(cubin: bytes) -> dict[str, int]:
    """registers, stack (where spills go) and static shared memory of the kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text.stdout)
    assert found, text.stdout
    return dict(zip(("registers", "stack", "shared", "local"), map(int, found.groups()), strict=True))


def figures(name: str, compiled: Any, variants: int) -> dict[str, Any]:
    ptx = compiled.asm["ptx"]
    used = resources(compiled.asm["cubin"])
    used["shared"] += compiled.metadata.shared
    loads = re.findall(r"\bld\.global[\w.:]*", ptx)
    wide = [x for x in loads if re.search(r"\.v4\.[bfus]32|\.v2\.[bfus]64", x)]
    # Asynchronous copies to shared memory name their size in bytes.
    copies = re.findall(r"\bcp\.async\.c[ag]\.shared\.global[^;]*?,\s*(?:0x)?([0-9a-f]+)\s*[,;]", ptx)
    return {
        "kernel": name,
        **used,
        "warps": compiled.metadata.num_warps,
        "stages": compiled.metadata.num_stages,
        "mma": len(re.findall(r"\bmma\.sync", ptx)),
        "wgmma": len(re.findall(r"\bwgmma\.mma_async", ptx)),
        "loads": len(loads),
        "wide_loads": len(wide),
        "wide_copies": sum(int(x, 16) == 16 for x in copies),
        "copies": len(copies),
        "variants": variants,
    }


def main() -> None:
    global architecture
    answers = []
    for case in json.load(sys.stdin):
        architecture = case["architecture"]
        launched.clear()
        start = time.process_time()
        launch(case)
        seconds = time.process_time() - start
        answers.append({"case": case, "seconds": seconds, "kernels": [figures(*item) for item in launched]})
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
