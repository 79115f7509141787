"""What compilers make of the kernels for a GPU that is not there.

    python -m copedit_bench.operators.machine_code < CASES > ANSWERS
    python -m copedit_bench.operators.machine_code --table [OPERATOR ...]

Cases: a JSON list with architecture, op, dtype and, where not the usual ones, sizes, batch, variant and ours, as in
`cases`. Answers: a JSON list with, for each case, the kernels that it launches, each with registers, spills, shared
memory, loads and machine instructions. --table: the same as Markdown, at the sizes of the brain in bfloat16, with the
programs that a multiprocessor holds at once and the waves that batches 1 and 32 take.

The launchers run as they are, on CPU tensors: the launch itself stops after the compilation, as Triton's own `warmup`
does. So one sees the very tile sizes, warps, stages and argument specialisations that a GPU would get.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
from torch.library import Library
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

architecture = 0
# Name, compiled kernel, number of variants that this kernel has by now, number of programs.
launched: list[tuple[str, Any, int, int]] = []


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
    launched.append((kernel.fn.__name__, compiled, len(kernel.device_caches[architecture][0]), math.prod(grid)))
    return compiled


def also_on_cpu(library: Library, name: Any, run: Any, key: str = "", **options: Any) -> None:
    implement(library, name, run, key, **options)
    if library.ns == "copedit" and key == "CUDA":
        implement(library, name, run, "CPU", **options)


launch_kernel, implement = JITFunction.run, Library.impl
if __name__ == "__main__":  # before the operators are defined: this process launches nothing any more
    os.environ["COPEDIT_KERNELS"] = "triton"
    os.environ.pop("TRITON_INTERPRET", None)
    JITFunction.run, Library.impl = compile_only, also_on_cpu  # type: ignore[method-assign, assignment]
    triton.runtime.driver.set_active(Driver())

from copedit_bench.operators.cases import OPERATORS, Fill  # noqa: E402
from copedit_kernels import dispatch, launch  # noqa: E402
from copedit_rt.config import PRESETS  # noqa: E402


def tiles(table: dict[int, Any], x: torch.Tensor) -> Any:
    return table[max(a for a in table if a <= architecture)]


def deceive() -> None:
    """The operators take CPU tensors, and tiles for the architecture at hand."""
    dispatch.INTERPRETED = True  # what `use_triton` asks before it lets CPU tensors through
    usual = launch.tiles
    for module in [m for name, m in sys.modules.items() if name.startswith("copedit_kernels.")]:
        if getattr(module, "tiles", None) is usual:
            module.tiles = tiles  # type: ignore[attr-defined]


class Blank(Fill):
    """The values do not matter, and most are never touched."""

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype)

    def rows(self, *shape: int) -> torch.Tensor:
        return self(*shape)


def run(case: dict[str, Any]) -> None:
    """Forward and, where there are gradients, backward of one operator."""
    row = OPERATORS[case["op"]]
    sizes = row.sizes(PRESETS["brain-brats"], case.get("batch", 2)) | case.get("sizes", {})
    inputs = row.inputs(sizes, Blank(getattr(torch, case["dtype"])), **case.get("variant", {}))
    for name in row.learn:
        if inputs[name] is not None:
            inputs[name].requires_grad_()
    ours = row.contestants[case.get("ours", "ours")]
    with ours.context():
        out = ours.call(*inputs.values())
        if row.learn:
            outputs = out if isinstance(out, tuple) else (out,)
            torch.autograd.backward(outputs, [torch.empty_like(y) for y in outputs])


@functools.cache
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


@functools.cache
def instructions(cubin: bytes) -> dict[str, int]:
    """Machine instructions of the kernel, and of them those of its longest loop without another inside."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", text)
    code = [(int(place, 16), name, rest) for place, name, rest in lines if name != "NOP"]
    places = [place for place, *_ in code]
    loops = []
    for place, name, rest in code:
        target = re.search(r"0x([0-9a-f]+)", rest) if name.startswith("BRA") else None
        # A jump to itself ends the code.
        if target and int(target[1], 16) < place:
            loops.append((int(target[1], 16), place))
    inner = [(a, b) for a, b in loops if not any(a <= c and d < b for c, d in loops)]
    lengths = [sum(a <= place <= b for place in places) for a, b in inner]
    return {"instructions": len(code), "loop": max(lengths, default=0)}


def figures(name: str, compiled: Any, variants: int, programs: int) -> dict[str, Any]:
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
        "programs": programs,
        **instructions(compiled.asm["cubin"]),
    }


def answer(cases: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    global architecture
    answers = []
    for case in cases:
        architecture = case["architecture"]
        launched.clear()
        start = time.process_time()
        run(case)
        seconds = time.process_time() - start
        answers.append({"case": case, "seconds": seconds, "kernels": [figures(*item) for item in launched]})
    return answers


# ------------------------------------------------------------------------------------------------------ the table

# Of sm_80 (A100) and sm_90 (H100): multiprocessors; of each registers, warps, programs and bytes of shared memory.
MULTIPROCESSORS = {80: 108, 90: 132}
REGISTERS, WARPS, PROGRAMS, SHARED = 65536, 64, 32, {80: 164 * 1024, 90: 228 * 1024}


def resident(kernel: Mapping[str, Any], on: int) -> int:
    """Programs of a kernel that a multiprocessor of an architecture holds at once; registers are given out to a warp
    in pieces of 256, and of shared memory the system takes 1 KiB a program."""
    registers = 256 * -(-32 * kernel["registers"] // 256) * kernel["warps"]
    by_shared = SHARED[on] // (kernel["shared"] + 1024)
    return min(REGISTERS // registers, WARPS // kernel["warps"], by_shared, PROGRAMS)


def table(ops: Sequence[str]) -> list[str]:
    """One row a kernel and architecture."""
    keys = [(op, ours, on) for op in ops for ours in OPERATORS[op].ours for on in (80, 90)]
    batches = (1, 32)
    cases = [
        {"architecture": on, "op": op, "ours": ours, "batch": batch}
        | {"dtype": str(OPERATORS[op].dtype or torch.bfloat16).removeprefix("torch.")}
        for op, ours, on in keys
        for batch in batches
    ]
    found = answer(cases)
    lines = [
        "| kernel | sm | registers | spilled | shared, KiB | instructions | in the loop | loads of 16 bytes "
        "| occupancy | waves, batch 1 | batch 32 |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for place, (op, ours, on) in enumerate(keys):
        small, large = (entry["kernels"] for entry in found[2 * place : 2 * place + 2])
        for one, many in zip(small, large, strict=True):
            lines.append(row_of(one, many["programs"], f"{op} {ours}".removesuffix(" ours"), on))
    return lines


def row_of(kernel: Mapping[str, Any], many: int, label: str, on: int) -> str:
    """many: programs at batch 32."""
    there = resident(kernel, on)
    waves = (count / (there * MULTIPROCESSORS[on]) for count in (kernel["programs"], many))
    loads, wide = kernel["loads"] + kernel["copies"], kernel["wide_loads"] + kernel["wide_copies"]
    cells = [
        f"{kernel['kernel']} ({label})", on, kernel["registers"], kernel["stack"] + kernel["local"],
        f"{kernel['shared'] / 1024:.0f}", kernel["instructions"], kernel["loop"] or "–", f"{wide} of {loads}",
        f"{there * kernel['warps'] / WARPS:.0%}", *(f"{n:.2f}" for n in waves),
    ]  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    deceive()
    if "--table" in sys.argv:
        ops = [name for name in sys.argv[1:] if name != "--table"] or list(OPERATORS)
        print("\n".join([f"triton {triton.__version__}", "", *table(ops)]))
    else:
        json.dump(answer(json.load(sys.stdin)), sys.stdout)


if __name__ == "__main__":
    main()
