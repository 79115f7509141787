"""What is expected of a GPU before anything has been measured, by a model of the machine: bytes over bandwidth,
operations over the rate of products, a fixed time a kernel.

    python -m copedit_bench.predict            tables for the brain on an H100 and an H200
    python -m copedit_bench.predict FOLDER     beside every measurement of ours in FOLDER (predictions.md there)
    python -m copedit_bench.predict --write    the tables in docs/performance.md; --check: are they up to date?

Where a measurement is far from its prediction the model is wrong, or the kernel: either is worth knowing first.
"""

from __future__ import annotations

import json
import math
import re
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from copedit_bench.models.cost import flops
from copedit_bench.models.sampler import operations
from copedit_bench.models.side_by_side import seconds as text
from copedit_bench.operators.cases import OPERATORS, directions, floor
from copedit_kernels import attention_token, convolution
from copedit_kernels.dispatch import using
from copedit_rt.config import PRESETS, ModelConfig
from copedit_rt.files import write_atomically
from copedit_rt.networks.denoiser import MDiT3D
from copedit_rt.networks.sampler import REPAID
from copedit_rt.networks.tokenizer import CoPeVAE, feature_bytes
from copedit_training.evaluation.report import table

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs/performance.md"
MARKED = re.compile(r"<!-- predictions -->\n.*?<!-- end -->", re.DOTALL)
BRAIN = "brain-brats"


@dataclass(frozen=True)
class Gpu:
    """What its maker says. processors: multiprocessors; clock: Hz; bandwidth: bytes a second to memory; products:
    operations a second on tensor cores, 16 bits, dense."""

    name: str
    processors: int
    clock: float
    bandwidth: float
    products: float


GPUS = {
    "H100": Gpu("H100", 132, 1.755e9, 3.35e12, 989e12),
    "H200": Gpu("H200", 132, 1.755e9, 4.8e12, 989e12),
}

# Assumptions, each for the first run to correct.
COPY = 0.90  # share of the bandwidth that a copy reaches
LARGE = 0.80  # share of the rate that the largest product reaches: what floors are counted with
PRODUCT = 0.70  # that the products of the models reach where tiles fill the multiprocessors
ATTENTION = {"forward": 0.40, "backward": 0.35}  # that ours reach within an element
CONVOLUTION = 0.29  # that cuDNN reaches on 3x3x3 layers: 290 TFLOP/s of an H200 in public reports
GATHERED = 0.35  # that conv3 reaches: at 64 multiply-adds a value, more would outrun the cache
LANES, ISSUED = 128, 0.75  # additions or products in float32 of a multiprocessor a clock, and the share that is issued
KERNEL = 1.5e-6  # seconds of a kernel in a graph besides its work: begin, fill, drain
HOST = 12e-6  # seconds in which Python launches a kernel, outside a graph
LINK = 6e9  # bytes a second between ordinary memory of the host and the GPU
LOOP = 5  # kernels of a step of the loop besides the network: index_select, cast, index_copy, the step, its counter
PRODUCTS = ("axis_attention_token", "conv3")  # operators that tensor cores decide
TILES = ((128, 256), (128, 128), (64, 256), (64, 128), (64, 64))  # of a product's result
KERNELS = {  # of an operator, where not one: forward, backward
    "axis_attention_token": (1, 2),
    "ada_norm": (1, 4),  # the rows, their sums, dweight over samples and its type
    "gated_residual_ada_norm": (1, 4),
}


def uneven(programs: int, gpu: Gpu) -> float:
    """What the fullest multiprocessor has to do, of what each would have if programs could be divided."""
    return math.ceil(programs / gpu.processors) * gpu.processors / programs


def product(rows: int, columns: int, inner: int, gpu: Gpu) -> float:
    """Seconds of a product in 16 bits, tiled as it suits best."""
    whole = 2 * rows * columns * inner / (PRODUCT * gpu.products)
    tiles = (math.ceil(rows / a) * math.ceil(columns / b) for a, b in TILES)
    return KERNEL + whole * min(uneven(count, gpu) for count in tiles)


def operator(op: str, direction: str, sizes: Mapping[str, int], itemsize: int, gpu: Gpu) -> float:
    """Seconds of an operator of ours."""
    if direction == "both":
        return sum(operator(op, part, sizes, itemsize, gpu) for part in ("forward", "backward"))
    moved, computed = floor(op, direction, sizes, itemsize)
    by_work = 0.0
    if op == "axis_attention_token":
        rows = attention_token.FORWARD[90][sizes["D"]].BQ
        programs = math.ceil(sizes["T"] / rows) * sizes["B"] * sizes["m"] * sizes["H"]
        by_work = computed / (ATTENTION[direction] * gpu.products) * uneven(programs, gpu)
    elif op == "conv3":
        tile = convolution.TILES[90]
        programs = math.ceil(sizes["P"] * sizes["Q"] * sizes["R"] / tile.BM) * math.ceil(sizes["U"] / tile.BN)
        by_work = computed / (GATHERED * gpu.products) * uneven(programs, gpu)
    elif op == "nearest_code":
        instructions = sizes["N"] * sizes["K"] * (3 * sizes["d"] + 3)  # without fused multiply-adds; three to compare
        by_work = instructions / (LANES * gpu.processors * gpu.clock * ISSUED)
    kernels = KERNELS.get(op, (1, 1))[direction == "backward"]
    return kernels * KERNEL + max(moved / (COPY * gpu.bandwidth), by_work)


# ------------------------------------------------------------------------------------------------------------- models


class _Kernels(TorchDispatchMode):
    """What is launched: operators that are neither views nor allocations."""

    NONE = ("empty", "new_empty", "device", "detach", "_unsafe_view")

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[1].split(".")[0]
        if not (func.is_view or name in self.NONE):
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


@cache
def launches(config: ModelConfig) -> Counter[str]:
    """Kernels of one step of the network with the last element missing, by operator, counted on tensors that have
    shapes only."""
    width, m = config.denoiser.width, len(config.elements)
    with using("triton"), FakeTensorMode():
        net = MDiT3D(config).eval().requires_grad_(False)
        z = torch.empty(1, m, config.tokenizer.latent_channels, *config.latent)
        parts = [torch.empty(1, n * width) for n in (*[6] * len(net.blocks), 2)]
        with _Kernels() as found, torch.no_grad():
            net.predict(z, parts, torch.zeros(1, dtype=torch.int64))
    return found.seen


def blocks(config: ModelConfig, batch: int, gpu: Gpu, direction: str = "forward") -> dict[str, float]:
    """Seconds of all blocks by kind of work; "both" is a training step's forward and backward."""
    c, passes = config.denoiser, 3 if direction == "both" else 1
    times: defaultdict[str, float] = defaultdict(float)
    rows = math.prod(OPERATORS["ada_norm"].sizes(config, batch)[letter] for letter in "BmT")
    shapes = ((3 * c.width, c.width), (c.width, c.width), (2 * c.hidden, c.width), (c.width, c.hidden))
    for i in range(c.blocks):
        axis = "element" if i % 2 else "token"
        times["products"] += passes * sum(product(rows, n, k, gpu) for n, k in shapes)
        for op, count in ((f"axis_attention_{axis}", 1), ("gated_residual_ada_norm", 2), ("swiglu", 1)):
            times[op] += count * operator(op, direction, OPERATORS[op].sizes(config, batch), 2, gpu)
    return dict(times)


def step(config: ModelConfig, batch: int, gpu: Gpu) -> dict[str, float]:
    """Seconds of one replayed step of the denoiser by kind of work."""
    found = blocks(config, batch, gpu)
    counted = launches(config)
    rest = sum(counted.values()) + LOOP - 8 * config.denoiser.blocks
    x = 2 * math.prod(OPERATORS["ada_norm"].sizes(config, batch).values())
    return found | {"the rest": rest * (KERNEL + 2 * x / (COPY * gpu.bandwidth))}


def sampling(config: ModelConfig, batch: int, steps: int, gpu: Gpu, warm: bool = False) -> float:
    """Seconds of a loop: replayed where it repays the capture or has been captured before (warm), else at the pace of
    Python if that is slower."""
    once = sum(step(config, batch, gpu).values())
    if steps < REPAID and not warm:
        once = max(once, HOST * (sum(launches(config).values()) + LOOP))
    return steps * once


@cache
def convolutions(config: ModelConfig) -> tuple[float, float]:
    """Operations of encoding and of decoding one element."""
    m = len(config.elements)
    with torch.device("meta"):
        vae = CoPeVAE(config.tokenizer, m).eval()
        images, codes = torch.empty(1, m, 1, *config.image), torch.empty(1, m, len(vae.latent_mean), *config.latent)
    encode, decode = flops(lambda: vae.encode(images)), flops(lambda: vae.decode(codes, config.task.joint))
    return encode["total"] / m, decode["total"] / m


def tokenizing(config: ModelConfig, encoded: int, decoded: int, gpu: Gpu) -> float:
    """Seconds of encoding and decoding so many elements, images from and to the host included."""
    encode, decode = convolutions(config)
    c = config.tokenizer
    sizes = {"N": decoded * math.prod(config.latent), "K": c.codes, "d": c.latent_channels}
    codes = operator("nearest_code", "forward", sizes, 4, gpu) if decoded else 0.0
    images = 4 * (encoded + decoded) * math.prod(config.image)
    return (encoded * encode + decoded * decode) / (CONVOLUTION * gpu.products) + codes + images / LINK


def study(config: ModelConfig, batch: int, stage: str, steps: int, gpu: Gpu, warm: bool = False) -> float:
    """Seconds of a stage of `copedit bench sampler`, one element missing: encode, sample, decode or all. warm: see
    `sampling`."""
    m = len(config.elements)
    decoded = m if config.task.joint else 1
    parts = {
        "encode": lambda: batch * tokenizing(config, m - 1, 0, gpu),
        "sample": lambda: sampling(config, batch, steps, gpu, warm),
        "decode": lambda: batch * tokenizing(config, 0, decoded, gpu),
    }
    return sum(part() for name, part in parts.items() if stage in (name, "all"))


def training(config: ModelConfig, batch: int, gpu: Gpu) -> float:
    """Seconds of an optimizer step of the denoiser: forward, backward, and AdamW over weights, moments and average."""
    with torch.device("meta"):
        weights = sum(p.numel() for p in MDiT3D(config).parameters())
    return sum(blocks(config, batch, gpu, "both").values()) + 44 * weights / (COPY * gpu.bandwidth)


# ------------------------------------------------------------------------------------------------------------- tables


def operator_table(batch: int) -> list[str]:
    """Every operator and pass in the brain at a batch size."""
    body = []
    for op, row in OPERATORS.items():
        sizes, itemsize = row.sizes(PRESETS[BRAIN], batch), (row.dtype or torch.bfloat16).itemsize
        for direction in directions(op)[:2]:
            moved, computed = floor(op, direction, sizes, itemsize)
            cells = []
            for gpu in GPUS.values():
                seconds = operator(op, direction, sizes, itemsize, gpu)
                peak = computed / gpu.products if op in PRODUCTS else moved / gpu.bandwidth
                cells += [text(seconds), "–" if op == "nearest_code" else f"{peak / seconds:.0%}"]
            body.append([op, direction, *cells])
    header = [cell for gpu in GPUS for cell in (gpu, "of peak")]
    return table(["operator", "pass", *header], body, 2)


def step_table() -> list[str]:
    """One step of the brain's denoiser by kind of work."""
    found = {name: step(PRESETS[BRAIN], 1, gpu) for name, gpu in GPUS.items()}
    kinds = next(iter(found.values()))
    body = [[kind, *(text(parts[kind]) for parts in found.values())] for kind in kinds]
    return table(["a step", *found], [*body, ["all", *(text(sum(parts.values())) for parts in found.values())]], 1)


def target_table() -> list[str]:
    """What the first run should reach on an H100 beside what is expected, and what no one can be faster than."""
    config = PRESETS[BRAIN]
    encode, decode = convolutions(config)
    one, most = operations(config), LARGE * GPUS["H100"].products
    whole = 3 * encode + decode
    rows: list[tuple[str, str, float, Any]] = [
        ("one study, three in and one out, 1 step", "0.08 s", whole + one, lambda g: study(config, 1, "all", 1, g)),
        ("the same, 20 steps", "0.12 s", whole + 20 * one, lambda g: study(config, 1, "all", 20, g)),
        ("a denoising step", "1.2 ms", one, lambda g: sum(step(config, 1, g).values())),
        ("encode a volume", "13 ms", encode, lambda g: tokenizing(config, 1, 0, g)),
        ("decode a volume", "13 ms", decode, lambda g: tokenizing(config, 0, 1, g)),
        ("a training step of stage II, batch 32", "–", 3 * 32 * one, lambda g: training(config, 32, g)),
    ]
    body = []
    for name, goal, work, call in rows:
        body.append([name, goal, text(work / most), *(text(call(gpu)) for gpu in GPUS.values())])
    return table(["", "target", "floor", *GPUS], body, 1)


def memory() -> tuple[float, float]:
    """GB of 16-bit weights and of the feature maps of encoding three elements at once, where a study needs most."""
    config = PRESETS[BRAIN]
    with torch.device("meta"):
        vae, net = CoPeVAE(config.tokenizer, len(config.elements)), MDiT3D(config)
        x = torch.empty(3, 1, *config.image, dtype=torch.bfloat16)
    weights = sum(2 * p.numel() for part in (vae, net) for p in part.parameters())
    return weights / 1e9, feature_bytes(vae.encoder.layers(), x, config.latent[0]) / 1e9


def lines() -> Iterator[str]:
    counted = launches(PRESETS[BRAIN])
    yield "Files are not read or written; images come from the host and go there. Floor: operations at"
    yield f"{LARGE:.0%} of an H100's rate."
    yield from ("", *target_table(), "", *step_table(), "")
    weights, features = memory()
    yield f"Memory of a study: {weights:.2f} GB of weights and {features:.2f} GB of feature maps where they are most"
    yield "(target: 2 GB in all), without what cuDNN takes besides."
    yield ""
    most = ", ".join(f"{count} {name}" for name, count in counted.most_common(5))
    yield f"Kernels a step: {sum(counted.values())} of the network ({most}, ...) and {LOOP} of the loop."
    for batch in (1, 32):
        yield from ("", f"Operators in the brain at batch {batch}, inputs from memory and not from the cache:", "")
        yield from operator_table(batch)


# ------------------------------------------------------------------------------------------------ beside measurements


def beside(folder: Path) -> list[str]:
    """A table of what was measured of ours beside what was expected of that GPU (an H100 if its name is unknown).

    Rows of cpu.json, which have no batch, are left out: nothing is expected of a processor.
    """
    body: list[list[str]] = []
    for path in sorted(folder.glob("*.json")):
        report = json.loads(path.read_text("utf-8"))
        if not isinstance(report, dict) or "timings" not in report:
            continue
        gpu = next((g for name, g in GPUS.items() if name in report["machine"]["name"]), GPUS["H100"])
        graphs = report["machine"]["device"] == "cuda"
        ours = (row for row in report["timings"] if row["contestant"] == "ours" and ("op" in row or "batch" in row))
        body += [compared(row, gpu) for row in ours if not (graphs and row.get("mode") == "eager")]
    header = ["", "measured", "expected", "measured / expected", "of peak"]
    return table(header, body, 1) if body else ["Nothing of ours that is predicted has been measured."]


def compared(row: Mapping[str, Any], gpu: Gpu) -> list[str]:
    """Name, seconds, expected seconds, their ratio, and the share of the peak that was reached."""
    seconds = row["median_us"] / 1e6 if "op" in row else row["median_s"]
    expected = of_row(row, gpu)
    rate = row.get("tflop_s") or 0.0
    peak = max(1e12 * rate / gpu.products, 1e9 * row.get("gb_s", 0.0) / gpu.bandwidth)
    ratio = f"{seconds / expected:.2f}" if expected else "–"
    return [name_of(row), text(seconds), text(expected) if expected else "–", ratio, f"{peak:.0%}" if peak else "–"]


def name_of(row: Mapping[str, Any]) -> str:
    if "op" in row:
        return f"{row['op']} {row['direction']}, {' '.join(f'{k}={v}' for k, v in row['sizes'].items())}"
    return ", ".join(str(row[key]) for key in ("model", "stage", "batch", "steps") if row.get(key))


def of_row(row: Mapping[str, Any], gpu: Gpu) -> float | None:
    """Expected seconds of a row of kernels.json, sampler.json or train-step.json; None where the model says nothing."""
    if "op" in row:
        itemsize = getattr(torch, row["dtype"]).itemsize
        if row["op"] in PRODUCTS and itemsize > 2:
            return None
        return operator(row["op"], row["direction"], row["sizes"], itemsize, gpu)
    config = PRESETS.get(row["model"])
    if config is None or row["stage"] == "tokenizer":
        return None
    if row["stage"] == "denoiser":
        return training(config, row["batch"], gpu)
    return study(config, row["batch"], row["stage"], row["steps"], gpu, warm=True)


def main(arguments: list[str]) -> int:
    parser = ArgumentParser("copedit_bench.predict", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    one = parser.add_mutually_exclusive_group()
    for flag in ("--write", "--check"):
        one.add_argument(flag, action="store_true")
    one.add_argument("folder", nargs="?", type=Path)
    asked = parser.parse_args(arguments)
    if asked.write or asked.check:
        old = DOCUMENT.read_text("utf-8")
        new = MARKED.sub(lambda _: "\n".join(["<!-- predictions -->", "", *lines(), "", "<!-- end -->"]), old)
        if asked.write:
            write_atomically(DOCUMENT, new.encode())
        return int(asked.check and new != old)
    if not asked.folder:
        print("\n".join(lines()))
        return 0
    if not asked.folder.is_dir():
        parser.error(f"{asked.folder}: no such folder; name one with the JSON files of copedit bench")
    found = ["# Measured beside expected", "", *beside(asked.folder)]
    write_atomically(asked.folder / "predictions.md", ("\n".join(found) + "\n").encode())
    print("\n".join(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
