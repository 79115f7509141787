"""The body of `copedit bench cpu`: the demo models stage by stage, on one and two threads, beside all that could
compute them; how time and memory grow; the command line from file to file; what importing costs; and, where asked for,
one step of the paper's brain model."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from copedit_bench.machine import ROOT
from copedit_bench.models import side_by_side
from copedit_bench.models.contestants import (
    Inputs,
    MonaiEngine,
    Networks,
    PlainEngine,
    random_networks,
    sample,
    whole,
)
from copedit_bench.models.cost import Memory, apart
from copedit_bench.models.sampler import maker, operations, pieces
from copedit_bench.models.side_by_side import BASELINE, SideBySide, seconds
from copedit_bench.timing import Yardsticks, quantile
from copedit_rt import checkpoint
from copedit_rt.config import PRESETS, ModelConfig
from copedit_rt.engines import cpu_blocks
from copedit_rt.engines.engine import TORCHLESS, Engine
from copedit_rt.engines.onnx_engine import OnnxEngine
from copedit_rt.engines.openvino_engine import OpenVinoEngine
from copedit_rt.engines.torch_engine import TorchEngine
from copedit_rt.errors import CopeditError
from copedit_training.data import prepared
from copedit_training.evaluation import compare
from copedit_training.evaluation.report import table

MODELS = ("demo-brain", "demo-cardiac")
COMPILED = "demo-brain"  # compilers take a minute for a model and a number of threads
LARGE = "brain-brats"
STEPS = (1,)  # their default
THREADS = (1, 2)
CELL, QUICK_CELL = 0.6, 0.1  # seconds of samples a contestant
REPEATS = 2
SUBJECT = prepared.HELD_OUT + 12
CPU = torch.device("cpu")
TOKENIZER_STAGES = ("encode", "decode")  # what MONAI's layers do
# How a study of demo-brain grows: by axis, the values; of volume, as multiples of the preset's.
GROWTH: dict[str, tuple[int, ...]] = {
    "steps": (1, 2, 4, 8),
    "batch": (1, 2, 4),
    "modalities": (2, 3, 4, 8),
    "volume": (1, 2, 4),
}
GROWN = "demo-brain"


@dataclasses.dataclass(frozen=True)
class Parts:
    """What is measured. threads: numbers of them, rising; compiled: torch.compile too; large: one step of brain-brats
    with random weights as well, 6 GB of memory; commands: the command line and imports; cell: seconds of samples."""

    models: tuple[str, ...] = MODELS
    threads: tuple[int, ...] = THREADS
    compiled: bool = True
    large: bool = False
    commands: bool = True
    growth: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=lambda: GROWTH)
    cell: float = CELL


QUICK = Parts(("demo-cardiac",), (1,), compiled=False, commands=False, growth={"steps": (1, 2)}, cell=QUICK_CELL)


def run(
    parts: Parts = Parts(),
    progress: Callable[[str], None] = lambda text: None,
    save: Callable[[dict[str, Any]], Any] = lambda report: None,
) -> dict[str, Any]:
    """JSON-able, see `SideBySide`; growth and commands beside it.

    ONNX Runtime, OpenVINO and MONAI take part where they and the exporter's packages are installed. Numbers of threads
    beyond the cores are left out. bfloat16 is measured where the processor multiplies it. save: hears the report so
    far.
    """
    types = [torch.float32] + [torch.bfloat16] * cpu_blocks.packable(torch.bfloat16)
    bench = SideBySide("CPU", CPU, set(types), "beside the weights")
    counts = [n for n in parts.threads if n <= bench.machine["cores"]] or [1]
    bench.extra["yardsticks_of_threads"] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folders = {name: Path(temporary) / name for name in parts.models}
        missing = {name: _export(name, folder) for name, folder in folders.items()}
        for count in counts:
            with threads(count):
                bench.sticks = Yardsticks(bench.watch, set(types))
                bench.sticks.measure()
                for name, folder in folders.items():
                    exported = _exported(bench, name, folder, types, missing[name])
                    compiled = parts.compiled and name == COMPILED
                    for piece in _stages(bench, name, exported, types, compiled, parts.cell):
                        progress(f"{piece}, {count} threads")
                        save(bench.report())
                if parts.large and count == counts[-1]:
                    _large(bench, types, progress)
                bench.extra["yardsticks_of_threads"][str(count)] = bench.sticks.report()
        with threads(counts[-1]):
            for axis, values in parts.growth.items():
                progress(f"growth by {axis}")
                rows = [apart(grown, GROWN, axis, value, counts[-1]) for value in values]
                bench.extra.setdefault("growth", {})[axis] = rows
                save(bench.report())
            if parts.commands:
                for name, folder in folders.items():
                    progress(f"{name}, commands")
                    _commands(bench, name, None if missing[name] else folder, Path(temporary))
                progress("imports")
                _imports(bench)
            return bench.report()


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Inside, torch computes on so many threads, and so do engines and processes that are begun there."""
    before, told = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    torch.set_num_threads(count)
    os.environ["OMP_NUM_THREADS"] = str(count)
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # what is compiled is compiled for a number of threads
    try:
        yield
    finally:
        torch.set_num_threads(before)
        os.environ.pop("OMP_NUM_THREADS")
        if told is not None:
            os.environ["OMP_NUM_THREADS"] = told


def _export(name: str, folder: Path) -> str:
    """Write the ONNX files of a model; returns why that was not possible, or nothing."""
    try:
        from copedit_rt.engines import onnx_export

        onnx_export.export_onnx(name, folder)
    except (CopeditError, ImportError) as error:
        return str(error)
    return ""


def _exported(
    bench: SideBySide, name: str, folder: Path, types: list[torch.dtype], missing: str
) -> dict[torch.dtype, dict[str, Engine]]:
    """The engines on exported files by type and name; why others are not there is noted once."""
    exported: dict[torch.dtype, dict[str, Engine]] = {dtype: {} for dtype in types}
    reasons = dict.fromkeys(TORCHLESS, missing) if missing else {}
    for engine, dtype, make in (
        ("onnxruntime", torch.float32, lambda: OnnxEngine(folder, "cpu")),
        ("openvino", torch.float32, lambda: OpenVinoEngine(folder, "cpu")),
        ("openvino", torch.bfloat16, lambda: OpenVinoEngine(folder, "cpu", dtype="bfloat16")),
    ):
        if dtype in exported and not missing:
            try:
                exported[dtype][engine] = make()
            except CopeditError as error:
                reasons[engine] = str(error)
    for engine, reason in reasons.items():
        bench.absent({"model": name, "threads": torch.get_num_threads()}, engine, reason)
    return exported


def _stages(
    bench: SideBySide,
    name: str,
    exported: dict[torch.dtype, dict[str, Engine]],
    types: list[torch.dtype],
    compiled: bool,
    cell: float,
) -> Iterator[str]:
    """Says what comes next before each piece of work."""
    folder = checkpoint.locate(name)
    config, vae, _ = checkpoint.load_tokenizer(folder)
    networks: Any = vae, checkpoint.load_denoiser(folder)[1]
    inputs, exact = Inputs(config, vae, 1), PlainEngine(config, networks, CPU, torch.float64)
    # Of images that are noise, these models make 1e-5 of rounding's 3e-7; of a subject's they make 2e-7.
    inputs.images = prepared.model_images(config, SUBJECT)[None, inputs.observed[0]]
    what = {"model": name, "threads": torch.get_num_threads()}
    engines = {dtype: _engines(config, networks, dtype, compiled) | exported[dtype] for dtype in types}
    for dtype in types:
        try:
            engines[dtype]["monai"] = MonaiEngine(config, networks, CPU, dtype)
        except (CopeditError, ImportError) as error:
            bench.absent(what, "monai", str(error))
    for work, call, _ in pieces(config, inputs, STEPS, config.diffusion.steps):
        yield ", ".join(map(str, (name, *work.values())))
        truth, tokenizer = call(exact), work["stage"] in TOKENIZER_STAGES
        for dtype, group in engines.items():
            makers = {k: maker(call, x, dtype) for k, x in group.items() if tokenizer or k != "monai"}
            bench.run(what | work, makers, truth, budget=cell)


def _engines(config: ModelConfig, networks: Networks, dtype: torch.dtype, compiled: bool = False) -> dict[str, Engine]:
    engines: dict[str, Engine] = {BASELINE: PlainEngine(config, networks, CPU, dtype)}
    if compiled:  # trying products would take as long again for each of them
        engines["compile"] = PlainEngine(config, networks, CPU, dtype, compiled=True, mode="default")
    return engines | {"ours": TorchEngine(config, *networks, CPU, dtype=dtype)}


def _large(bench: SideBySide, types: list[torch.dtype], progress: Callable[[str], None]) -> None:
    config = PRESETS[LARGE]
    networks = random_networks(config)
    call = partial(sample, inputs=Inputs(config, networks[0], 1), steps=1)
    progress(f"{LARGE}, one step")
    truth = call(PlainEngine(config, networks, CPU, torch.float64))
    for dtype in types:
        makers = {name: maker(call, one, dtype) for name, one in _engines(config, networks, dtype).items()}
        what = {"model": f"{LARGE}, random weights", "threads": torch.get_num_threads(), "stage": "sample", "steps": 1}
        bench.run(what, makers, truth, operations(config))


# ---------------------------------------------------------------------------------------------------------- growth


def grown(name: str, axis: str, value: int, count: int) -> dict[str, float]:
    """Of a study, images to images, with a value of an axis: seconds and processor seconds, the least of a few, and
    bytes in use at the worst moment over those before.

    Meant for a process of its own, as memory that was once taken stays.
    """
    torch.set_num_threads(count)
    config, batch, steps = larger(PRESETS[name], axis, value)
    networks = random_networks(config)
    engine, inputs = TorchEngine(config, *networks, CPU, dtype=torch.float32), Inputs(config, networks[0], batch)
    memory = Memory(CPU)
    taken = [_took(partial(whole, engine, inputs, steps)) for _ in range(REPEATS)]
    wall, processor = (min(column) for column in zip(*taken, strict=True))
    return {axis: value, "wall_s": wall, "processor_s": processor, "peak_bytes": memory.peak()}


def larger(config: ModelConfig, axis: str, value: int) -> tuple[ModelConfig, int, int]:
    """The model, the studies at a time and the steps at a value of an axis of GROWTH."""
    batch, steps = (value if axis == one else 1 for one in ("batch", "steps"))
    if axis == "modalities":
        names = (*config.elements, *(f"more{i}" for i in range(8)))[:value]
        config = dataclasses.replace(config, elements=names)
    if axis == "volume":
        height, width, depth = config.image
        config = dataclasses.replace(config, image=(height, width, depth * value))
    return config, batch, steps


def _took(call: Callable[[], Any]) -> tuple[float, float]:
    wall, processor = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - processor


def markdown(report: Mapping[str, Any]) -> str:
    """As of `side_by_side`, with the tables of growth."""
    lines = [side_by_side.markdown(report)]
    if "growth" in report:
        lines += [
            "## Growth",
            "",
            f"A study of {GROWN} in float32, images to images, random weights, one element missing, ours, "
            f"{report['settings']['threads']} threads: the least of {REPEATS}. Memory over that of the loaded model. "
            "Volume: multiples of the preset's depth.",
        ]
    for axis, rows in report.get("growth", {}).items():
        body = [
            [
                str(row[axis]),
                seconds(row["wall_s"]),
                seconds(row["processor_s"]),
                f"{row['wall_s'] / rows[0]['wall_s']:.2f}",
                f"{row['peak_bytes'] / 2**20:,.0f}",
            ]
            for row in rows
        ]
        lines += ["", *table([axis, "time", "processor", "times the first", "MiB"], body, 1)]
    return "\n".join(lines) + "\n"


# -------------------------------------------------------------------------------------------------------- commands


def _commands(bench: SideBySide, model: str, onnx: Path | None, temporary: Path) -> None:
    """`copedit synth` on a simulated study: start of Python, files and pictures of progress included. onnx: the folder
    that engines other than torch's take, those of them that are installed (None: it could not be exported)."""
    config = checkpoint.read_config(checkpoint.locate(model))
    truth = compare.as_study(config, prepared.phantom_subject(config, SUBJECT))
    study = temporary / f"{model}-study"
    study.mkdir()
    for name, volume in compare.incomplete(config, truth, [config.elements[1]]).volumes.items():
        volume.save(study / f"subject_{name}.nii.gz")
    others = [engine for engine in TORCHLESS if onnx and find_spec(engine)]
    for engine in ("torch", *others):
        which = model if engine == "torch" else onnx
        words = ("synth", "-i", str(study), "-o", str(temporary / "made"), "--model", str(which), "--overwrite")
        command = (sys.executable, "-m", "copedit_rt", *words, "--engine", engine, "--device", "cpu")
        wall, processor = _repeat(command)
        row = {"model": model, "engine": engine, "wall_s": wall, "processor_s": processor}
        bench.extra.setdefault("commands", []).append(row)
        bench.notes.append(
            f"`copedit synth` of one study of {model}, {engine}: {_spread(wall)}, processor time {_spread(processor)}."
        )


def _repeat(command: tuple[str, ...]) -> tuple[list[float], list[float]]:
    """Wall and processor seconds of a command, run a few times after a first one."""
    wall, processor = [], []
    for number in range(1 + REPEATS):
        before, start = os.times(), time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise CopeditError(f"{' '.join(command[1:4])} failed: {done.stderr.strip().splitlines()[-1:]}")
        after = os.times()
        if number:
            wall.append(time.perf_counter() - start)
            used = after.children_user - before.children_user + after.children_system - before.children_system
            processor.append(used)
    return wall, processor


def _imports(bench: SideBySide) -> None:
    """Seconds of processor time that our modules take to import once torch is there."""
    measured = {
        "import copedit_rt": "import copedit_rt",
        "the synthesizer with its engine on torch": "import copedit_rt.synthesizer, copedit_rt.engines.torch_engine",
    }
    for title, statement in measured.items():
        code = f"import torch, time; start = time.process_time(); {statement}; print(time.process_time() - start)"
        found = []
        for _ in range(1 + REPEATS):
            done = subprocess.run((sys.executable, "-c", code), cwd=ROOT, capture_output=True, text=True, check=True)
            found.append(float(done.stdout))
        bench.extra.setdefault("imports", {})[title] = found[1:]
        bench.notes.append(f"After torch, {title}: {_spread(found[1:])} of processor time.")


def _spread(values: list[float]) -> str:
    return f"{seconds(quantile(values, 0.5))} ({seconds(min(values))} to {seconds(max(values))})"
