"""The body of `copedit bench cpu`: the built-in models stage by stage, one step of the paper's brain model, the command
line from file to file, and what importing costs."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from copedit_bench.machine import ROOT
from copedit_bench.models.contestants import Inputs, Networks, PlainEngine, random_networks, sample
from copedit_bench.models.sampler import maker, operations, pieces
from copedit_bench.models.side_by_side import BASELINE, SideBySide, seconds
from copedit_bench.timing import quantile
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

MODELS = ("demo-brain", "demo-cardiac")
LARGE = "brain-brats"
STEPS = (1,)  # the default of the built-in models
REPEATS = 3
SUBJECT = prepared.HELD_OUT + 12
CPU = torch.device("cpu")


def run(
    models: tuple[str, ...] = MODELS,
    large: bool = True,
    progress: Callable[[str], None] = lambda text: None,
    save: Callable[[dict[str, Any]], Any] = lambda report: None,
) -> dict[str, Any]:
    """JSON-able, see `SideBySide`. large: one step of brain-brats as well, with random weights: 6 GB of memory.

    ONNX Runtime and OpenVINO take part where they and the exporter's packages are installed. Threads are those of
    OMP_NUM_THREADS for all. bfloat16 is measured where the processor multiplies it. save: hears the report so far.
    """
    types = [torch.float32] + [torch.bfloat16] * cpu_blocks.packable(torch.bfloat16)
    bench = SideBySide("CPU", CPU, set(types), "beside the weights")
    with tempfile.TemporaryDirectory() as temporary:
        for name in models:
            folder = Path(temporary) / name
            exported, missing = _exported(name, folder, types)
            for engine, reason in missing.items():
                bench.absent({"model": name}, engine, reason)
            for piece in _stages(bench, name, exported, types):
                progress(piece)
                save(bench.report())
            progress(f"{name}, commands")
            _commands(bench, name, folder, {engine for group in exported.values() for engine in group}, Path(temporary))
            save(bench.report())
    if large:
        _large(bench, types, progress)
    progress("imports")
    _imports(bench)
    return bench.report()


def _exported(
    name: str, folder: Path, types: list[torch.dtype]
) -> tuple[dict[torch.dtype, dict[str, Engine]], dict[str, str]]:
    """The engines on freshly exported files by type and name, and why others are not there."""
    exported: dict[torch.dtype, dict[str, Engine]] = {dtype: {} for dtype in types}
    missing: dict[str, str] = {}
    try:
        from copedit_rt.engines import onnx_export

        onnx_export.export_onnx(name, folder)
    except (CopeditError, ImportError) as error:
        return exported, dict.fromkeys(TORCHLESS, str(error))
    for engine, dtype, make in (
        ("onnxruntime", torch.float32, lambda: OnnxEngine(folder, "cpu")),
        ("openvino", torch.float32, lambda: OpenVinoEngine(folder, "cpu")),
        ("openvino", torch.bfloat16, lambda: OpenVinoEngine(folder, "cpu", dtype="bfloat16")),
    ):
        if dtype in exported:
            try:
                exported[dtype][engine] = make()
            except CopeditError as error:
                missing[engine] = str(error)
    return exported, missing


def _stages(
    bench: SideBySide, name: str, exported: dict[torch.dtype, dict[str, Engine]], types: list[torch.dtype]
) -> Iterator[str]:
    """Says what comes next before each piece of work."""
    folder = checkpoint.locate(name)
    config, vae, _ = checkpoint.load_tokenizer(folder)
    networks: Any = vae, checkpoint.load_denoiser(folder)[1]
    inputs, exact = Inputs(config, vae, 1), PlainEngine(config, networks, CPU, torch.float64)
    # Of images that are noise, these models make 1e-5 of rounding's 3e-7; of a subject's they make 2e-7.
    inputs.images = prepared.model_images(config, SUBJECT)[None, inputs.observed[0]]
    engines = {dtype: _engines(config, networks, dtype) | exported[dtype] for dtype in types}
    for work, call, count in pieces(config, inputs, STEPS, config.diffusion.steps):
        yield ", ".join(map(str, (name, *work.values())))
        truth = call(exact)
        for dtype, group in engines.items():
            bench.run({"model": name, **work}, {k: maker(call, x, dtype) for k, x in group.items()}, truth, count)


def _engines(config: ModelConfig, networks: Networks, dtype: torch.dtype) -> dict[str, Engine]:
    ours = TorchEngine(config, *networks, CPU, dtype=dtype)
    return {BASELINE: PlainEngine(config, networks, CPU, dtype), "ours": ours}


def _large(bench: SideBySide, types: list[torch.dtype], progress: Callable[[str], None]) -> None:
    config = PRESETS[LARGE]
    networks = random_networks(config)
    call = partial(sample, inputs=Inputs(config, networks[0], 1), steps=1)
    progress(f"{LARGE}, one step")
    truth = call(PlainEngine(config, networks, CPU, torch.float64))
    for dtype in types:
        makers = {name: maker(call, one, dtype) for name, one in _engines(config, networks, dtype).items()}
        what = {"model": f"{LARGE}, random weights", "stage": "sample", "steps": 1}
        bench.run(what, makers, truth, operations(config))


def _commands(bench: SideBySide, model: str, onnx: Path, engines: set[str], temporary: Path) -> None:
    """`copedit synth` on a simulated study: start of Python, files and pictures of progress included. engines: those
    that take the folder `onnx`."""
    config = checkpoint.read_config(checkpoint.locate(model))
    truth = compare.as_study(config, prepared.phantom_subject(config, SUBJECT))
    study = temporary / f"{model}-study"
    study.mkdir()
    for name, volume in compare.incomplete(config, truth, [config.elements[1]]).volumes.items():
        volume.save(study / f"subject_{name}.nii.gz")
    for engine in ("torch", *sorted(engines)):
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
