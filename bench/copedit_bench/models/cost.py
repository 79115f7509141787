"""What models cost (Tables 10 and 11): parameters and operations counted, time and memory measured.

Counting needs no weights and no memory: every preset and every backbone, on tensors that have shapes only. Measuring
runs on this machine, each model in a process of its own, so that what one leaves in memory does not hide another's.
Time does not depend on what weights are: they are random. The operations of other methods are counted where they are
measured, over a whole study: what they compute depends on what is missing.
"""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from copedit_bench import machine
from copedit_bench.models.sampler import before_capture
from copedit_kernels.dispatch import using
from copedit_rt.config import PRESETS, Backbone, ModelConfig
from copedit_rt.device import choose_device
from copedit_rt.errors import CopeditError
from copedit_rt.images.prepare import prepare
from copedit_rt.networks.denoiser import build_denoiser
from copedit_rt.networks.precision import tried_convolutions
from copedit_rt.networks.tokenizer import CoPeVAE
from copedit_rt.prior import Prior
from copedit_rt.synthesizer import Synthesizer
from copedit_training.evaluation import compare
from copedit_training.evaluation.report import table, write
from copedit_training.evaluation.subjects import Phantoms
from copedit_training.experiments.beside import filled
from copedit_training.methods import METHODS, method
from copedit_training.methods import base as methods
from copedit_training.stages.prior import fit_prior
from copedit_training.stages.settings import Stage, load_settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BACKBONES: tuple[str, ...] = get_args(Backbone)
STAGES: tuple[Stage, ...] = ("tokenizer", "denoiser")
DEMO = tuple(name for name in PRESETS if name.startswith("demo-"))
REPEATS = 5
LONGEST = 20.0  # seconds for one measurement
KINDS = {  # of operators in the counter's report
    "linear": ("aten.mm", "aten.addmm"),
    "convolution": ("aten.convolution",),
    "attention": ("aten.bmm", "aten.baddbmm", "aten._scaled_dot_product"),
}
UNKNOWN: dict[Any, Any] = {  # to the counter: attention on a CPU, by its shapes
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
}
Progress = Callable[[int, int], None]


# ----------------------------------------------------------------------------------------------------------- counting


def parameters(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def flops(run: Callable[[], Any]) -> dict[str, int]:
    """Floating-point operations of run(), two a multiply-add: linear, convolution, attention (the products of queries,
    keys and values), and total. Element-wise work is not counted."""
    with FlopCounterMode(display=False, custom_mapping=UNKNOWN) as counter, torch.no_grad():
        run()
    every = {str(op): n for op, n in counter.get_flop_counts().get("Global", {}).items()}
    found = {kind: sum(n for op, n in every.items() if op.startswith(names)) for kind, names in KINDS.items()}
    return found | {"total": sum(every.values())}


def with_backbone(config: ModelConfig, backbone: Any) -> ModelConfig:
    return dataclasses.replace(config, denoiser=dataclasses.replace(config.denoiser, backbone=backbone))


def count_tokenizer(config: ModelConfig) -> dict[str, Any]:
    """Parameters (also without each pretext task, Table 10) and operations of encoding one element, of the prompts of
    one, and of decoding one (heart: its share of the stack)."""
    m = len(config.elements)
    with torch.device("meta"):
        vae = CoPeVAE(config.tokenizer, m).eval()
        images, codes = torch.empty(1, m, 1, *config.image), torch.empty(1, m, len(vae.latent_mean), *config.latent)
    total = parameters(vae)
    tasks = [parameters(*pair) for pair in zip(vae.prompt_encoders, vae.heads, strict=True)]
    joint = config.task.joint
    encode, decode = flops(lambda: vae.encode(images)), flops(lambda: vae.decode(codes, joint))
    prompts = flops(lambda: vae.prompts_of_each(codes))
    return {
        "parameters": total,
        "autoencoder": total - sum(tasks),
        "without_task": [total - task for task in tasks],
        "flops": {
            name: found["total"] // m for name, found in (("encode", encode), ("prompts", prompts), ("decode", decode))
        },
    }


def count_denoiser(config: ModelConfig) -> dict[str, Any]:
    """Parameters and operations of one step at batch 1, all elements."""
    m, batch = len(config.elements), 1
    with torch.device("meta"):
        net = build_denoiser(config).eval()
        z = torch.empty(batch, m, config.tokenizer.latent_channels, *config.latent)
        t = torch.zeros(batch, dtype=torch.int64)
        prompts = torch.empty(batch, 3, config.tokenizer.prompt_dim)
        observed = torch.ones(batch, m, dtype=torch.bool)
        prior = torch.empty_like(z) if config.denoiser.prior else None
    return {"parameters": parameters(net), "flops": flops(lambda: net(z, t, prompts, observed, prior=prior))}


def count(names: Iterable[str]) -> list[dict[str, Any]]:
    """One row per preset and backbone: sizes, operations, and those of a study with one element missing."""
    rows = []
    for name in names:
        config = ModelConfig.preset(name)
        tokenizer, m = count_tokenizer(config), len(config.elements)
        for backbone in BACKBONES:
            found = count_denoiser(with_backbone(config, backbone))
            decoded, encoded = int(config.task.decoded(np.arange(m) > 0).sum()), m - 1
            if config.denoiser.prior:  # its fill takes the same way
                decoded, encoded = 2 * decoded, m
            once = encoded * (tokenizer["flops"]["encode"] + tokenizer["flops"]["prompts"])
            once += decoded * tokenizer["flops"]["decode"]
            steps = config.diffusion.steps
            study = {"steps": steps, "tokenizer": once, "denoiser": steps * found["flops"]["total"]}
            rows.append(
                {"preset": name, "backbone": backbone, "tokenizer": tokenizer, "denoiser": found, "study": study}
            )
    return rows


# ---------------------------------------------------------------------------------------------------------- measuring


def apart(work: Callable[..., Any], *arguments: Any) -> Any:
    """work(*arguments) in a new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


class Memory:
    """Bytes in use at the worst moment since it was made: allocated on a GPU, or resident in this process."""

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
        else:
            self.before = _resident()

    def peak(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.before
        return max(0, _most_resident() - self.before)


def _most_resident() -> int:
    """Bytes; from Linux of this program alone, as getrusage also counts what started it."""
    if (found := _status("VmHWM")) is not None:
        return found
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _resident() -> int:
    """Bytes resident now; where that cannot be read, the most so far."""
    found = _status("VmRSS")
    return _most_resident() if found is None else found


def _status(name: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)


def repeated(sample: Callable[[], float], repeats: int) -> float:
    """Median of `repeats` samples in seconds after one to warm up; fewer once they have taken LONGEST seconds, and the
    one to warm up if that alone did."""
    first = sample()
    times: list[float] = []
    while len(times) < repeats and first + sum(times) < LONGEST:
        times.append(sample())
    return statistics.median(times or [first])


def _timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _prior(config: ModelConfig) -> Prior | None:
    """Of random images, for a model that has one."""
    if not config.denoiser.prior:
        return None
    shape = (1, len(config.elements), 1, 8, 8, 8)
    return fit_prior(np.random.default_rng(0).random(shape, dtype=np.float32), steps=1)


def inference(config: ModelConfig, device: str, repeats: int = REPEATS) -> dict[str, Any]:
    """Seconds (medians) of encoding what is observed, of one step, of decoding, and of a whole study with its second
    element missing at the model's own number of steps, geometry included; the peak of memory, weights included; and the
    type of the products. On a GPU a step is replayed from a graph, where the backbone is captured."""
    where = choose_device(device)
    subject, truth, _ = next(iter(Phantoms(config, 1)))
    study = compare.incomplete(config, truth, [config.elements[1]])
    prepared = prepare(study, config)
    memory = Memory(where)
    tokenizer, denoiser = CoPeVAE(config.tokenizer, len(config.elements)), build_denoiser(config)
    model = Synthesizer(config, tokenizer, denoiser, device, prior=_prior(config))
    engine, there = model.engine, prepared.observed
    encoded = engine.encode(prepared.images[None, there])
    z = model.start(encoded.latents[0], there, subject)[None]
    begun = z if config.denoiser.prior else None
    chosen = z[:, config.task.decoded(there)]

    def seconds(call: Callable[[], Any]) -> float:
        return repeated(lambda: _timed(call), repeats)  # it returns arrays: a GPU is done by then

    found = {
        "encode": seconds(lambda: engine.encode(prepared.images[None, there])),
        "decode": seconds(lambda: engine.decode(chosen)),
    }

    def loop(steps: int) -> float:
        call = partial(engine.sample, z, encoded.prompts, there[None], steps, "ddim", None, begun)
        for _ in range(before_capture(where, steps)):
            call()
        return seconds(call)

    one, three = loop(1), loop(3)
    return found | {
        "dtype": engine.precision,
        "step": (three - one) / 2,  # without what is prepared once
        "study": seconds(lambda: model.synthesize(study)),
        "steps": config.diffusion.steps,
        "peak_bytes": memory.peak(),
    }


def build_method(config: ModelConfig, settings: Any, name: str) -> methods.Method[Any]:
    """A method with random weights, and a tokenizer with such where it needs one."""
    kind = method(name)
    needed = kind.needs_tokenizer(settings)
    return kind(config, settings, CoPeVAE(config.tokenizer, len(config.elements)) if needed else None)


def method_inference(config: ModelConfig, settings: Any, name: str, repeats: int = REPEATS) -> dict[str, Any]:
    """Of a method what `inference` says of a study, at its own number of steps, and the operations of one, counted of
    the reference's operators, as those of Triton are not seen."""
    _, truth, _ = next(iter(Phantoms(config, 1)))
    study = compare.incomplete(config, truth, [config.elements[1]])
    memory = Memory(choose_device(settings.device))
    fill = filled(build_method(config, settings, name))
    seconds = repeated(lambda: _timed(lambda: fill(study, 0)), repeats)
    found: dict[str, Any] = {"study": seconds, "peak_bytes": memory.peak()}
    with using("reference"):
        return found | {"flops": flops(lambda: fill(study, 0))}


def training_step(
    config: ModelConfig, settings: Any, repeats: int = REPEATS, name: str | None = None
) -> dict[str, Any]:
    """Seconds of an optimizer step (median; a tokenizer's steps with and without pretext tasks by their share), of an
    epoch of the settings' subjects, the autocast type, and the peak of memory. name: of a method; None: of a stage."""
    from copedit_training.stages.denoiser_task import DenoiserTask
    from copedit_training.stages.settings import TokenizerSettings
    from copedit_training.stages.step import gradients, optimizers_of
    from copedit_training.stages.task import Task
    from copedit_training.stages.tokenizer_task import TokenizerTask

    drawn = settings.batch_size * settings.accumulate
    shape = (min(settings.batch_size, 4), len(config.elements), 1, *config.image)
    images = np.random.default_rng(0).random(shape, dtype=np.float32).astype(np.float16)
    memory = Memory(choose_device(settings.device))
    task: Task[Any, Any]
    if name:
        task = build_method(config, settings, name).on(images)
    elif isinstance(settings, TokenizerSettings):
        task = TokenizerTask(config, settings, images)
    else:
        tokenizer = CoPeVAE(config.tokenizer, len(config.elements))
        task = DenoiserTask(config, settings, images, tokenizer, prior=_prior(config))
    optimizers = optimizers_of(task)

    @tried_convolutions()
    def step(number: int) -> float:
        start = time.perf_counter()
        drawn_now: list[Any] = [task.draw(number, part) for part in range(settings.accumulate)]
        gradients(task, task.module, drawn_now)
        for optimizer in optimizers:
            optimizer.step()
        task.after_step(number)
        if task.device.type == "cuda":
            torch.cuda.synchronize(task.device)
        return time.perf_counter() - start

    every, first = 1, 0
    if isinstance(settings, TokenizerSettings):
        every, first = settings.pretext_every, max(0, settings.quantise_from, settings.adversarial_from)
    first = math.ceil(first / every) * every
    tasked = repeated(lambda: step(first), repeats)  # the first makes the optimizers' state
    plain = repeated(lambda: step(first + 1), repeats) if every > 1 else tasked
    mean = (tasked + (every - 1) * plain) / every
    epoch = mean * settings.subjects / drawn
    found = {"step": mean, "epoch": epoch, "subjects": settings.subjects, "batch": drawn, "peak_bytes": memory.peak()}
    return found | {"dtype": settings.dtype}


def method_rows(presets: Iterable[str]) -> list[dict[str, Any]]:
    """One row per preset that has methods, and method: its space, weights and the steps of its sampler, if any."""
    rows = []
    for preset, name in ((p, n) for p in presets for n in METHODS):
        kind, config, settings = method(name), ModelConfig.preset(preset), method_settings(preset, name)
        with torch.device("meta"):
            critic = kind.critic(config, settings)
        rows.append(
            {
                "preset": preset,
                "method": name,
                "space": kind.space,
                "parameters": methods.parameters(kind, config, settings),
                "critic": parameters(critic) if critic else None,
                "steps": settings.sampler_steps if kind.noised else None,
            }
        )
    return rows


def method_settings(preset: str, name: Any, device: str = "cpu") -> Any:
    """A method's settings in a preset. Raises CopeditError for a preset that has none."""
    return load_settings(name, preset, [f"device={device}"], kind=method(name).kind)


def run(
    measured: Sequence[str] = DEMO,
    device: str = "auto",
    repeats: int = REPEATS,
    progress: Progress | None = None,
    with_methods: bool = False,
) -> dict[str, Any]:
    """Count every preset, measure those named; JSON-able. with_methods: also the other methods of the presets that are
    measured. CopeditError for an unknown preset, one without methods, and without MONAI."""
    for name in measured:
        ModelConfig.preset(name)
    if find_spec("monai") is None:
        raise CopeditError(
            "the U-Net among the backbones is MONAI's, which is not installed; install the extra `train`"
        )
    where = choose_device(device)
    report: dict[str, Any] = {
        "machine": machine.describe(where),
        "threads": torch.get_num_threads(),
        "repeats": repeats,
    }
    jobs: list[tuple[str, str, partial[Any]]] = []
    for name in measured:
        for backbone in BACKBONES:
            config = with_backbone(ModelConfig.preset(name), backbone)
            jobs.append((name, backbone, partial(apart, inference, config, device, repeats)))
        for stage in STAGES:
            settings = load_settings(
                stage, name, [f"device={device}", *(["compile=false"] if stage == "denoiser" else [])]
            )
            jobs.append((name, stage, partial(apart, training_step, ModelConfig.preset(name), settings, repeats)))
    beside = method_rows(measured) if with_methods else []
    for name, what in ((row["preset"], row["method"]) for row in beside):
        arguments = ModelConfig.preset(name), method_settings(name, what, device)
        jobs.append((name, what, partial(apart, method_inference, *arguments, what, repeats)))
        jobs.append((name, what, partial(apart, training_step, *arguments, repeats, what)))
    rows = []
    for done, (name, what, job) in enumerate(jobs):
        if progress:
            progress(done, len(jobs) + 1)
        kind = "inference" if what in BACKBONES or job.args[0] is method_inference else "training"
        key = "method" if what in METHODS else "backbone" if kind == "inference" else "stage"
        row: dict[str, Any] = {"preset": name, "kind": kind, key: what}
        try:
            rows.append(row | job())
        except (RuntimeError, MemoryError, OSError) as error:  # too large for this machine: the others still count
            rows.append(row | {"failed": (str(error).strip() or type(error).__name__).splitlines()[0]})
    report |= {"measured": rows, "counted": count(PRESETS), "methods": beside}
    if progress:
        progress(len(jobs) + 1, len(jobs) + 1)
    return report


# ------------------------------------------------------------------------------------------------------------- report


def _giga(n: float) -> str:
    return f"{n / 1e9:,.1f}"


def _mega(n: int) -> str:
    return f"{n / 1e6:.2f}"


def markdown(report: dict[str, Any]) -> str:
    counted = report["counted"]
    presets = {row["preset"]: row["tokenizer"] for row in counted}
    lines = [
        "# Cost",
        "",
        "Parameters in millions; operations in GFLOP, two a multiply-add, products of matrices and convolutions only.",
        "",
        "## Tokenizer",
        "",
        "Per element. Without a task: without its prompt encoder and head.",
        "",
        *table(
            [
                "preset",
                "parameters",
                "autoencoder",
                "w/o task 1",
                "w/o task 2",
                "w/o task 3",
                "encode",
                "prompts",
                "decode",
            ],
            [
                [
                    name,
                    _mega(found["parameters"]),
                    _mega(found["autoencoder"]),
                    *map(_mega, found["without_task"]),
                    *(_giga(found["flops"][part]) for part in ("encode", "prompts", "decode")),
                ]
                for name, found in presets.items()
            ],
            1,
        ),
        "",
        "## Denoiser",
        "",
        "One step of all elements at batch 1; a study with one element missing at the preset's number of steps, its "
        "tokenizer included. The sampler computes a little less: what nothing reads is left out of the last block, and "
        "adaLN is evaluated once for all steps.",
        "",
        *table(
            ["preset", "backbone", "parameters", "linear", "convolution", "attention", "step", "steps", "study"],
            [
                [
                    row["preset"],
                    row["backbone"],
                    _mega(row["denoiser"]["parameters"]),
                    *(
                        _giga(row["denoiser"]["flops"][kind])
                        for kind in ("linear", "convolution", "attention", "total")
                    ),
                    str(row["study"]["steps"]),
                    _giga(row["study"]["tokenizer"] + row["study"]["denoiser"]),
                ]
                for row in counted
            ],
            2,
        ),
    ]
    return "\n".join([*lines, "", *_measured(report)]) + "\n"


def _measured(report: dict[str, Any]) -> list[str]:
    about = report["machine"]
    lines = [
        "## Measured",
        "",
        f"{about['name']} ({about['device']}, {report['threads']} threads), torch {about['packages']['torch']}, "
        f"{about['date']}: medians of up to {report['repeats']}, batch 1, one element missing. "
        "Memory: the most in use at once, weights included. On a GPU steps are replayed from a graph (not a U-Net's).",
        "",
    ]
    done = [row for row in report["measured"] if "failed" not in row]
    seconds = ("encode", "step", "decode", "study")
    body = [
        [
            row["preset"],
            row["backbone"],
            row["dtype"],
            *(f"{row[part]:.3f}" for part in seconds),
            str(row["steps"]),
            f"{row['peak_bytes'] / 2**30:.2f}",
        ]
        for row in done
        if "backbone" in row
    ]
    header = ["preset", "backbone", "type", *(f"{part} (s)" for part in seconds), "steps", "memory (GiB)"]
    lines += table(header, body, 3)
    body = [
        [
            row["preset"],
            row["stage"],
            row["dtype"],
            f"{row['step']:.3f}",
            str(row["batch"]),
            f"{row['epoch']:.0f}",
            str(row["subjects"]),
            f"{row['peak_bytes'] / 2**30:.2f}",
        ]
        for row in done
        if "stage" in row
    ]
    header = ["preset", "stage", "autocast", "step (s)", "subjects a step", "epoch (s)", "subjects", "memory (GiB)"]
    lines += ["", "Training, without torch.compile; an epoch draws as many subjects as there are.", ""]
    lines += table(header, body, 3)
    if report["methods"]:
        lines += ["", "## Methods", "", *_methods(report)]
    failed = [row for row in report["measured"] if "failed" in row]
    lines += [""] * bool(failed)
    keys = ("backbone", "stage", "method")
    lines += [f"- {row['preset']}, {next(row[k] for k in keys if k in row)}: {row['failed']}" for row in failed]
    return lines


def _methods(report: dict[str, Any]) -> list[str]:
    """The other methods: counted, and measured on a study with one element missing and in training."""
    done = (row for row in report["measured"] if "method" in row and "failed" not in row)
    found = {(row["preset"], row["method"], row["kind"]): row for row in done}
    gibibyte, body = 2**30, []
    for row in report["methods"]:
        study, step = (found.get((row["preset"], row["method"], kind)) for kind in ("inference", "training"))
        cells = [f"{study['flops']['total'] / 1e9:,.1f}", f"{study['study']:.3f}"] if study else ["–", "–"]
        cells.append(f"{study['peak_bytes'] / gibibyte:.2f}" if study else "–")
        cells += [f"{step['step']:.3f}", str(step["batch"])] if step else ["–", "–"]
        cells.append(f"{step['peak_bytes'] / gibibyte:.2f}" if step else "–")
        counts = [_mega(row["parameters"]), _mega(row["critic"]) if row["critic"] else "–", str(row["steps"] or "–")]
        body.append([row["preset"], method(row["method"]).title, row["space"], *counts, *cells])
    header = ["preset", "method", "space", "parameters", "critic", "steps", "study (GFLOP)", "study (s)"]
    header += ["memory (GiB)", "training step (s)", "subjects a step", "memory (GiB)"]
    return [
        "Parameters without the tokenizer's; a study's operations and seconds with it. The model's are in the tables "
        "above.",
        "",
        *table(header, body, 3),
    ]


def plot(report: dict[str, Any]) -> Figure:
    """Parameters, operations of a step, and measured seconds of a step, by preset and backbone."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.5, 4), layout="constrained")
    step = {(r["preset"], r["backbone"]): r["step"] for r in report["measured"] if "step" in r and "backbone" in r}
    sizes = {(r["preset"], r["backbone"]): r["denoiser"] for r in report["counted"]}
    shown = {
        "parameters (M)": {key: found["parameters"] / 1e6 for key, found in sizes.items()},
        "a step (GFLOP)": {key: found["flops"]["total"] / 1e9 for key, found in sizes.items()},
        "a step (s), measured": step,
    }
    for panel, (title, values) in zip(figure.subplots(1, 3), shown.items(), strict=True):
        presets = list(dict.fromkeys(name for name, _ in values))
        for i, backbone in enumerate(BACKBONES):
            there = [(x, values[p, backbone]) for x, p in enumerate(presets) if (p, backbone) in values]
            found = [(x + 0.2 * i - 0.3, value) for x, value in there]
            if found:
                panel.bar(*zip(*found, strict=True), 0.2, label=backbone)
        panel.set_xticks(range(len(presets)), presets, rotation=20, fontsize=8)
        panel.set(yscale="log", title=title)
        panel.grid(axis="y", alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    return figure


def write_report(report: dict[str, Any], folder: Path) -> list[Path]:
    """cost.json, cost.md and, with matplotlib, cost.png in a folder."""
    return write(report, markdown(report), folder, "cost", lambda: [("cost", plot(report))])
