"""The body of `copedit bench cpu`: the built-in models stage by stage, one step of the paper's brain model, the command
line from file to file, and what importing costs."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from copedit_bench.machine import ROOT
from copedit_bench.models.contestants import Eager, Inputs, Onnx, Ours, random_networks
from copedit_bench.models.sampler import maker, operations, pieces
from copedit_bench.models.side_by_side import BASELINE, Race, seconds
from copedit_bench.timing import quantile
from copedit_rt import checkpoint
from copedit_rt.config import PRESETS
from copedit_rt.engines import cpu_blocks
from copedit_rt.engines.engine import TORCHLESS
from copedit_rt.engines.onnx_engine import OnnxEngine
from copedit_rt.engines.openvino_engine import OpenVinoEngine
from copedit_rt.errors import CopeditError
from copedit_rt.images.names import STACK
from copedit_rt.images.nifti import Volume
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
    """JSON-able, see `side_by_side.Race`. large: one step of brain-brats as well, with random weights: 6 GB of memory.

    ONNX Runtime and OpenVINO take part where they and the exporter's packages are installed. Threads are those of
    OMP_NUM_THREADS for all. bfloat16 is measured where the processor multiplies it. save: hears the report so far.
    """
    types = [torch.float32] + [torch.bfloat16] * cpu_blocks.packable(torch.bfloat16)
    race = Race("CPU", CPU, set(types), "beside the weights")
    with tempfile.TemporaryDirectory() as temporary:
        for name in models:
            folder = Path(temporary) / name
            exported, missing = _exported(name, folder, types)
            for engine, reason in missing.items():
                race.absent({"model": name}, engine, reason)
            for piece in _stages(race, name, exported, types):
                progress(piece)
                save(race.report())
            progress(f"{name}, commands")
            _commands(race, name, folder, {engine for group in exported.values() for engine in group}, Path(temporary))
            save(race.report())
    if large:
        _large(race, types, progress)
    progress("imports")
    _imports(race)
    return race.report()


def _exported(
    name: str, folder: Path, types: list[torch.dtype]
) -> tuple[dict[torch.dtype, dict[str, Onnx]], dict[str, str]]:
    """The engines on freshly exported files by type and name, and why others are not there."""
    exported: dict[torch.dtype, dict[str, Onnx]] = {dtype: {} for dtype in types}
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
                exported[dtype][engine] = Onnx(make(), dtype)
            except CopeditError as error:
                missing[engine] = str(error)
    return exported, missing


def _stages(
    race: Race, name: str, exported: dict[torch.dtype, dict[str, Onnx]], types: list[torch.dtype]
) -> Iterator[str]:
    """Says what comes next before each piece of work."""
    folder = checkpoint.locate(name)
    config, vae, _ = checkpoint.load_tokenizer(folder)
    networks: Any = vae, checkpoint.load_denoiser(folder)[1]
    inputs, exact = Inputs(config, vae, 1, CPU), Eager(config, networks, CPU, torch.float64)
    # Of images that are noise, these models make 1e-5 of rounding's 3e-7; of a subject's they make 2e-7.
    inputs.images = torch.from_numpy(prepared.model_images(config, SUBJECT))[None][:, inputs.observed[0]]
    runners: dict[torch.dtype, dict[str, Any]] = {
        dtype: {BASELINE: Eager(config, networks, CPU, dtype), "ours": Ours(config, networks, CPU, dtype)}
        | exported[dtype]
        for dtype in types
    }
    for work, call, count in pieces(config, inputs, STEPS, config.diffusion.steps):
        yield ", ".join(map(str, (name, *work.values())))
        truth = call(exact)
        for dtype, group in runners.items():
            race.run({"model": name, **work}, {k: maker(call, x, dtype) for k, x in group.items()}, truth, count)


def _large(race: Race, types: list[torch.dtype], progress: Callable[[str], None]) -> None:
    config = PRESETS[LARGE]
    networks = random_networks(config)
    inputs = Inputs(config, networks[0], 1, CPU)

    def call(runner: Any) -> Any:
        return runner.sample(inputs.z, inputs.prompts, inputs.observed, 1)

    progress(f"{LARGE}, one step")
    truth = call(Eager(config, networks, CPU, torch.float64))
    for dtype in types:
        group = {BASELINE: Eager(config, networks, CPU, dtype), "ours": Ours(config, networks, CPU, dtype)}
        makers = {name: maker(call, runner, dtype) for name, runner in group.items()}
        what = {"model": f"{LARGE}, random weights", "stage": "sample", "steps": 1}
        race.run(what, makers, truth, operations(config))


def _commands(race: Race, model: str, onnx: Path, engines: set[str], temporary: Path) -> None:
    """`copedit synth` on a simulated study: start of Python, files and pictures of progress included. engines: those
    that take the folder `onnx`."""
    config = checkpoint.read_config(checkpoint.locate(model))
    phantom, brain = prepared.phantom_subject(config, SUBJECT), config.task == "brain"
    study = temporary / f"{model}-study"
    study.mkdir()
    if brain:
        for element in config.elements[:-1]:
            Volume.from_array(phantom.images[element], phantom.affine()).save(study / f"subject_{element}.nii.gz")
    else:
        volume = Volume.from_array(phantom.images[STACK], phantom.affine())
        volume.data = volume.data.copy()
        volume.data[..., compare.missing_slices(config, phantom, [config.elements[1]])] = 0
        volume.save(study / "subject.nii.gz")
    for engine in ("torch", *sorted(engines)):
        which = model if engine == "torch" else onnx
        words = ("synth", "-i", str(study), "-o", str(temporary / "made"), "--model", str(which), "--overwrite")
        command = (sys.executable, "-m", "copedit_rt", *words, "--engine", engine, "--device", "cpu")
        wall, processor = _repeat(command)
        row = {"model": model, "engine": engine, "wall_s": wall, "processor_s": processor}
        race.extra.setdefault("commands", []).append(row)
        race.notes.append(
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


def _imports(race: Race) -> None:
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
        race.extra.setdefault("imports", {})[title] = found[1:]
        race.notes.append(f"After torch, {title}: {_spread(found[1:])} of processor time.")


def _spread(values: list[float]) -> str:
    return f"{seconds(quantile(values, 0.5))} ({seconds(min(values))} to {seconds(max(values))})"
