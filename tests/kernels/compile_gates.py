"""Compiles for a GPU that is not there what the operators would launch on it; run as a script by test_compile.py.

Standard input: a JSON list of cases: architecture, op, dtype and, where not the usual ones, sizes, variant and ours, as
in `copedit_bench.operators.cases`. Standard output: a JSON list with, for each case, the kernels that
it launches, each with what the compiler says of it. The launchers run as they are, on CPU tensors: the launch itself
stops after the compilation, as Triton's own `warmup` does. So the gates see the very tile sizes, warps, stages and
argument specialisations that a GPU would get.
"""

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
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "training"), str(ROOT / "bench")]

from copedit_bench.operators.cases import OPERATORS, Fill  # noqa: E402
from copedit_kernels import dispatch, launch  # noqa: E402
from copedit_rt.config import PRESETS  # noqa: E402


def tiles(table: dict[int, Any], x: torch.Tensor) -> Any:
    return table[max(a for a in table if a <= architecture)]


dispatch.INTERPRETED = True  # what `use_triton` asks before it lets CPU tensors through
original_tiles = launch.tiles
for module in [m for name, m in sys.modules.items() if name.startswith("copedit_kernels.")]:
    if getattr(module, "tiles", None) is original_tiles:
        module.tiles = tiles  # type: ignore[attr-defined]


class Zeros(Fill):
    """The values do not matter."""

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype or self.dtype)


def run(case: dict[str, Any]) -> None:
    """Forward and, where there are gradients, backward of one operator."""
    row = OPERATORS[case["op"]]
    sizes = row.sizes(PRESETS["brain-brats"], 2) | case.get("sizes", {})
    inputs = row.inputs(sizes, Zeros(getattr(torch, case["dtype"])), **case.get("variant", {}))
    for name in row.learn:
        if inputs[name] is not None:
            inputs[name].requires_grad_()
    ours = row.contestants[case.get("ours", "ours")]
    with ours.context():
        out = ours.call(*inputs.values())
        if row.learn:
            outputs = out if isinstance(out, tuple) else (out,)
            torch.autograd.backward(outputs, [torch.zeros_like(y) for y in outputs])


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
        run(case)
        seconds = time.process_time() - start
        answers.append({"case": case, "seconds": seconds, "kernels": [figures(*item) for item in launched]})
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
