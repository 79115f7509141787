"""The command `copedit`. Nothing heavy is imported before a sub-command runs, so that help is instant.

Exit codes: 0 done; 1 an error, told in one sentence on stderr; 2 wrong usage; 3 `inspect` flagged something;
130 interrupted,
143 terminated. Answers go to stdout, progress and remarks to stderr; with --json, stdout is one JSON
document.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from copedit_rt.errors import CopeditError

if TYPE_CHECKING:
    from rich.console import Console

    from copedit_rt.config import ModelConfig
    from copedit_rt.images.find import Found, StudyFiles
    from copedit_rt.images.study import Study
    from copedit_rt.perception import Report
    from copedit_rt.synthesizer import Synthesizer

FLAGGED = 3


class _Group(TyperGroup):
    """Commands whose CopeditError becomes one sentence and exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except CopeditError as error:
            print(f"copedit: {error}", file=sys.stderr)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            print("copedit: interrupted; what is complete stays, repeat the command to go on", file=sys.stderr)
            raise typer.Exit(130) from None


_SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(
    cls=_Group,
    help="Fill in what is missing from an MRI study: modalities of a brain, slices of a cardiac short-axis "
    "stack. Not a medical device.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings=_SETTINGS,
)
train = typer.Typer(help="Train a model, stage by stage.", no_args_is_help=True, context_settings=_SETTINGS)
app.add_typer(train, name="train")
benchmarks = typer.Typer(
    help="Measure speed and memory on this machine.", no_args_is_help=True, context_settings=_SETTINGS
)
app.add_typer(benchmarks, name="bench")
exports = typer.Typer(
    help="Write a model for another engine than torch.", no_args_is_help=True, context_settings=_SETTINGS
)
app.add_typer(exports, name="export")


def main() -> None:
    """Entry point of the console script."""
    app()


# ---------------------------------------------------------------------------------------------------- options

Input = Annotated[
    list[Path] | None,
    typer.Option("-i", "--input", metavar="PATH", help="A study folder, a folder of studies, or files; repeatable."),
]
More = Annotated[list[Path] | None, typer.Argument(metavar="[PATH]...", help="More inputs, as after -i.")]
Output = Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Where the results go.")]
Model = Annotated[
    str | None,
    typer.Option(metavar="NAME_OR_FOLDER", help="The model; by default one that fits the task and the files."),
]
Steps = Annotated[int | None, typer.Option(min=1, help="Sampler steps; by default the model's.")]
Solver = Annotated[
    str | None, typer.Option(metavar="ddim|dpm2m", help="First- or second-order sampler; by default the model's.")
]
Device = Annotated[str, typer.Option(metavar="auto|cpu|cuda[:N]", help="Where to compute.")]
Engine = Annotated[
    str,
    typer.Option(
        metavar="torch|onnxruntime|tensorrt", help="What computes; all but torch take a folder of copedit export."
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        metavar="auto|float32|bfloat16|float16",
        help="Of the large products; auto is float32 on a CPU and bfloat16 on a GPU.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Slices = Annotated[
    str | None,
    typer.Option("--missing-slices", metavar="3,4,5", help="Missing slices of a cardiac stack, counted from 0."),
]
T1 = Annotated[Path | None, typer.Option("--t1", metavar="FILE", help="Instead of -i, this T1 file.")]
T1ce = Annotated[Path | None, typer.Option("--t1ce", metavar="FILE", help="T1 with contrast agent.")]
T2 = Annotated[Path | None, typer.Option("--t2", metavar="FILE", help="T2.")]
Flair = Annotated[Path | None, typer.Option("--flair", metavar="FILE", help="FLAIR.")]
Pd = Annotated[Path | None, typer.Option("--pd", metavar="FILE", help="Proton density.")]
Sax = Annotated[Path | None, typer.Option("--sax", metavar="FILE", help="A cardiac short-axis stack.")]


# --------------------------------------------------------------------------------------------------- commands


@app.command()
def synth(
    output: Output,
    more: More = None,
    inputs: Input = None,
    t1: T1 = None,
    t1ce: T1ce = None,
    t2: T2 = None,
    flair: Flair = None,
    pd: Pd = None,
    sax: Sax = None,
    model: Model = None,
    target: Annotated[str, typer.Option(metavar="all|t1,flair", help="What to synthesise.")] = "all",
    steps: Steps = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same images.")] = 0,
    samples: Annotated[
        int, typer.Option(min=1, help="Draw N, write their mean and a map of their standard deviation.")
    ] = 1,
    solver: Solver = None,
    device: Device = "auto",
    engine: Engine = "torch",
    dtype: Dtype = "auto",
    max_memory: Annotated[
        str | None,
        typer.Option(metavar="2GB|500MB", help="For encoding and decoding; less is slower. By default unlimited."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace outputs that exist.")] = False,
    resample: Annotated[
        bool, typer.Option("--resample", help="Bring files on other grids onto the first one's.")
    ] = False,
    preview: Annotated[bool, typer.Option("--preview", help="Also write a PNG per study.")] = False,
    missing_slices: Slices = None,
    as_json: Json = False,
) -> None:
    """Synthesise what is missing.

    Outputs are named as the inputs are, lie on the first input's grid, and mirror the folders below -i. Each
    has a JSON sidecar. Outputs that exist are kept, so an interrupted cohort can be repeated.
    """
    summary = synthesise(
        [*(inputs or ()), *(more or ())],
        output,
        explicit=_explicit(t1=t1, t1ce=t1ce, t2=t2, flair=flair, pd=pd, sax=sax),
        model=model,
        target=target,
        steps=steps,
        seed=seed,
        samples=samples,
        solver=solver,
        device=device,
        engine=engine,
        dtype=dtype,
        max_memory=_bytes(max_memory),
        overwrite=overwrite,
        resample=resample,
        preview=preview,
        missing_slices=_numbers(missing_slices),
        say=_nothing if as_json else print,
    )
    if as_json:
        _print_json(summary)
    _wait_for_others()
    if summary["failed"]:
        raise typer.Exit(1)


@app.command()
def inspect(
    more: More = None,
    inputs: Input = None,
    t1: T1 = None,
    t1ce: T1ce = None,
    t2: T2 = None,
    flair: Flair = None,
    pd: Pd = None,
    sax: Sax = None,
    model: Model = None,
    device: Device = "auto",
    engine: Engine = "torch",
    missing_slices: Slices = None,
    as_json: Json = False,
) -> None:
    """Compare what the network perceives with what the files say.

    How many elements are missing, which, what each image looks like; blank slices and constant volumes. Exit
    code 0 if all agree, 3 if something is flagged.
    """
    from rich.console import Console

    found = _find([*(inputs or ()), *(more or ())], _explicit(t1=t1, t1ce=t1ce, t2=t2, flair=flair, pd=pd, sax=sax))
    models = _Models(model, device, engine=engine)
    slices = _numbers(missing_slices)
    reports = [_look(files, models, slices, several=len(found) > 1) for files in found]
    if as_json:
        _print_json({"studies": [report.to_dict() for report in reports], "passed_over": _passed_over(found)})
    else:
        console = Console()
        for report in reports:
            console.print(report.render())
    if any(report.flagged for report in reports):
        raise typer.Exit(FLAGGED)


@app.command()
def demo(
    output: Output = Path("copedit-demo"),
    subjects: Annotated[int, typer.Option(min=1, help="Simulated brains and hearts.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Other subjects; that of 12 has a lesion.")] = 12,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Simulated studies in, what is missing out: files, scores beside baselines, and a picture."""
    from copedit_training import demo as body

    _check_writable(output)
    report = body.run(output, subjects=subjects, seed=seed, device=device)
    if as_json:
        _print_json(report)
    else:
        from rich.console import Console

        Console().print(body.render(report))


@app.command()
def evaluate(
    output: Output,
    model: Annotated[str, typer.Option(metavar="NAME_OR_FOLDER", help="The model.")] = "demo-brain",
    data: Annotated[
        str, typer.Option(metavar="phantom|DIR", help="Held-out simulated subjects, or a data set's complete studies.")
    ] = "phantom",
    subjects: Annotated[
        int | None, typer.Option(min=1, help="How many; by default 16 simulated ones, or all of a data set.")
    ] = None,
    first_seed: Annotated[
        int | None, typer.Option(help="Of the simulated subjects; 1000000 on are held out.", show_default="1000000")
    ] = None,
    split: Annotated[
        str,
        typer.Option(metavar="test|all|FILE", help="Which of a data set: held out by name, all, or by a split.json."),
    ] = "test",
    steps: Steps = None,
    patterns: Annotated[
        int | None, typer.Option(min=1, help="At most N missing patterns per count; by default all.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampler.")] = 0,
    solver: Solver = None,
    samples: Annotated[
        int, typer.Option(min=1, help="Average so many samples; 2 or more also give the calibration of their spread.")
    ] = 1,
    fid_network: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Features of slices, for FID: TorchScript or torch.export.")
    ] = None,
    fvd_network: Annotated[Path | None, typer.Option(metavar="FILE", help="Features of volumes, for FVD.")] = None,
    lpips_network: Annotated[Path | None, typer.Option(metavar="FILE", help="Distances of slices, for LPIPS.")] = None,
    sweep: Annotated[
        str | None,
        typer.Option(metavar="5,10,20", help="Instead: quality and time at these numbers of steps, per solver."),
    ] = None,
    ablation: Annotated[
        str | None,
        typer.Option(
            metavar="prompts|injection|backbone",
            help="Instead: train and compare variants of --preset. Repeat the command to go on.",
        ),
    ] = None,
    preset: Annotated[str, typer.Option(help="Of an ablation: its model and its training settings.")] = "demo-brain",
    override: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Of an ablation or segmentation: override a setting."),
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Of an ablation or segmentation: the whole budget, days.")
    ] = False,
    runs: Annotated[int | None, typer.Option(min=1, help="Of an ablation: seeds a variant.")] = None,
    analysis: Annotated[
        str | None,
        typer.Option(
            metavar="gradcam|tsne|attention|corruption|intervention",
            help="Instead: look into the prompts, with figures.",
        ),
    ] = None,
    segmentation: Annotated[
        bool, typer.Option("--segmentation", help="Instead: what synthesis is worth to a segmentation of tumours.")
    ] = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """PSNR, SSIM and MAE beside baselines, per missing count and pattern; tokenizer, heads, and more on demand."""
    if sum(map(bool, (sweep, ablation, analysis, segmentation))) > 1:
        raise CopeditError("--sweep, --ablation, --analysis and --segmentation are runs of their own; choose one")
    if ablation:
        return _ablate(ablation, output, preset, override or [], data, subjects or 16, full, runs, as_json)
    if analysis:
        return _analyse(analysis, output, model, subjects or 16, device, as_json)
    if segmentation:
        return _segment(output, model, data, override or [], device, full, as_json)
    from copedit_training.data.prepared import HELD_OUT
    from copedit_training.evaluation import evaluate as body
    from copedit_training.evaluation import features, report
    from copedit_training.evaluation import subjects as people

    counts = _numbers(sweep, "--sweep")
    if counts is not None and (steps, solver) != (None, None):
        raise CopeditError("--sweep tries every solver at its own numbers of steps; leave --steps and --solver out")
    if counts is not None and (samples > 1 or fid_network or fvd_network or lpips_network):
        raise CopeditError("--sweep measures PSNR, SSIM and MAE of single samples; leave --samples and networks out")
    _check_writable(output)
    synthesizer = _Models(model, device).load(model)
    whom: people.Cohort
    if data == "phantom":
        whom = people.Phantoms(synthesizer.config, subjects or 16, HELD_OUT if first_seed is None else first_seed)
    elif first_seed is not None:
        raise CopeditError(f"--first-seed is of simulated subjects, not of --data {data}; leave it out")
    else:
        whom = people.Folder(synthesizer.config, Path(data), subjects, split)
    with _progress(_stderr()) as bar:
        task = bar.add_task("evaluating")
        options: dict[str, Any] = {
            "seed": seed,
            "patterns": patterns,
            "progress": lambda done, total: bar.update(task, completed=done, total=total),
        }
        if counts is None:
            networks = features.Networks(fid_network, fvd_network, lpips_network, synthesizer.engine.device)
            options |= {"steps": steps, "solver": solver, "samples": samples, "networks": networks}
            found = body.evaluate(synthesizer, whom, **options)
        else:
            found = body.sweep(synthesizer, whom, steps=counts, **options)
    paths, remark = report.write_report(found, output)
    _present(found, report.markdown(found), paths, as_json, remark)


def _ablate(
    kind: str,
    output: Path,
    preset: str,
    override: Sequence[str],
    data: str,
    subjects: int,
    full: bool,
    runs: int | None,
    as_json: bool,
) -> None:
    from copedit_training.experiments import ablation as body

    if kind not in body.VARIANTS:
        raise CopeditError(f"--ablation {kind}: choose one of {', '.join(body.VARIANTS)}")
    _check_writable(output)
    experiment = body.Experiment(output, preset, override, data=data, full=full, runs=runs, test_subjects=subjects)
    found = body.ablate(kind, experiment)
    _present(found, body.markdown(found), body.write_report(found, output), as_json)


def _analyse(kind: str, output: Path, model: str, subjects: int, device: str, as_json: bool) -> None:
    from copedit_training.experiments import analysis as body

    if kind not in body.ANALYSES:
        raise CopeditError(f"--analysis {kind}: choose one of {', '.join(body.ANALYSES)}")
    _check_writable(output)
    found = body.analyse(kind, model, output, subjects, device)
    _present(found, body.markdown(found), body.write_report(found, output), as_json)


def _segment(
    output: Path, model: str, data: str, override: Sequence[str], device: str, full: bool, as_json: bool
) -> None:
    from copedit_training.experiments import segmentation as body

    budget = body.budget_of(full, override)
    _check_writable(output)
    found = body.compare(model, output, data, device, budget)
    _present(found, body.markdown(found), body.write_report(found, output), as_json)


def _present(
    report: Mapping[str, Any], text: str, paths: Sequence[Path], as_json: bool, remark: str | None = None
) -> None:
    """Print a report that was written: as JSON, or as text and the files; a remark goes to stderr."""
    if remark:
        _stderr().print(remark, style="yellow", markup=False, highlight=False, soft_wrap=True)
    if as_json:
        _print_json(report)
    else:
        typer.echo(text)
        typer.echo("\n".join(map(str, paths)))


Preset = Annotated[str, typer.Option(help="A preset: its model and its training settings.")]
Data = Annotated[str, typer.Option(metavar="phantom|DIR", help="What to train on: simulated subjects or a data set.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting; repeatable.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in the output folder.")]
Estimate = Annotated[
    bool, typer.Option("--estimate", help="Only say how much memory of a GPU a step is expected to take.")
]
Quick = Annotated[bool, typer.Option("--quick", help="A few steps on a few subjects, to see that all works.")]


@train.command("tokenizer")
def train_tokenizer(
    preset: Preset,
    output: Output,
    data: Data = "phantom",
    override: Set = None,
    resume: Resume = False,
    estimate: Estimate = False,
    quick: Quick = False,
) -> None:
    """Stage I: the autoencoder, its codebook and its prompt heads."""
    _train("tokenizer", preset, output, data, override, resume, estimate, quick)


@train.command("denoiser")
def train_denoiser(
    preset: Preset,
    output: Output,
    data: Data = "phantom",
    override: Set = None,
    resume: Resume = False,
    estimate: Estimate = False,
    quick: Quick = False,
) -> None:
    """Stage II: the diffusion transformer, on the latents of a trained tokenizer (--set tokenizer=FOLDER)."""
    _train("denoiser", preset, output, data, override, resume, estimate, quick)


@train.command("check-data")
def train_check_data(
    data: Annotated[Path, typer.Option(metavar="FOLDER", help="The data set.")],
    preset: Preset,
    deep: Annotated[bool, typer.Option("--deep", help="Read every voxel, not only headers and sizes.")] = False,
    as_json: Json = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Also write the report there, as JSON.")
    ] = None,
) -> None:
    """What a data set holds for a preset, what is skipped and why. Exit code 1 if there is nothing to train on."""
    from copedit_rt.config import ModelConfig
    from copedit_rt.files import write_atomically
    from copedit_training.data import layouts

    config = ModelConfig.preset(preset)
    found = layouts.find(data, config)
    with _progress(_stderr()) as bar:
        task = bar.add_task("checking")
        report = layouts.check(
            found, config, deep=deep, progress=lambda done, total: bar.update(task, completed=done, total=total)
        )
    if output:
        write_atomically(output, (json.dumps(report, indent=2) + "\n").encode())
    if as_json:
        _print_json(report)
    else:
        typer.echo(layouts.render(report))
    if not report["studies"]:
        raise typer.Exit(1)


def _train(
    stage: Any,
    preset: str,
    output: Path,
    data: str,
    override: list[str] | None,
    resume: bool,
    estimate: bool,
    quick: bool,
) -> None:
    from copedit_training.stages import trainer

    if estimate:
        typer.echo(trainer.expected(stage, preset, override or (), quick))
        return
    _check_writable(output)
    options = {"preset": preset, "output": output, "data": data, "overrides": override or (), "resume": resume}
    folder = trainer.run(stage, **options, quick=quick)
    if os.environ.get("RANK", "0") == "0":  # of torchrun's processes, the first one speaks
        typer.echo(folder)


@benchmarks.command("kernels")
def bench_kernels(
    output: Output,
    op: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Only this operator; repeatable.")] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="TYPE", help="bfloat16 (default on a GPU), float16 or float32 (on a CPU).")
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(min=1, help="Time for everything; what does not fit is skipped. By default 7 minutes."),
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Every operator at every shape of the presets, beside what it could be replaced by.

    Answers are checked before anything is timed. Writes kernels.json, kernels.md and, with matplotlib, kernels.png.
    On a CPU only the small presets at batch 1, to see that it works.
    """
    from copedit_bench.operators import measure as body
    from copedit_bench.operators import report as pages

    _check_writable(output)
    cases, where, what = body.plan(op, device, dtype)
    with _progress(_stderr()) as bar:
        task = bar.add_task("measuring")
        report = body.run(
            cases,
            where,
            what,
            seconds or body.SECONDS,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            save=lambda so_far: pages.write_json(so_far, output / "kernels.json"),
        )
    paths, remark = pages.write(report, output)
    _present(report, pages.summary(report), paths, as_json, remark)
    if any(check["status"] == "wrong" and check["provider"] == "ours" for check in report["checks"]):
        raise CopeditError(f"an operator gave a wrong answer; {paths[1]} says which")


Presets = Annotated[list[str] | None, typer.Option("--preset", metavar="NAME", help="Only this one; repeatable.")]
Compiled = Annotated[
    bool, typer.Option("--compile/--no-compile", help="Also measure torch.compile, which takes minutes to compile.")
]


@benchmarks.command("cpu")
def bench_cpu(
    output: Output,
    large: Annotated[
        bool, typer.Option("--large/--no-large", help="Also a step of the paper's brain model: minutes and 6 GB.")
    ] = True,
    as_json: Json = False,
) -> None:
    """The built-in models on this processor: plain PyTorch, ours, ONNX Runtime.

    Answers are checked before anything is timed. Writes cpu.json and cpu.md.
    """
    from copedit_bench.models import cpu as body

    _bench(output, "cpu", as_json, lambda **hooks: body.run(large=large, **hooks))


@benchmarks.command("sampler")
def bench_sampler(
    output: Output,
    preset: Presets = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Studies at a time; repeatable. 1 and 8.")] = None,
    steps: Annotated[list[int] | None, typer.Option(min=1, help="Sampler steps; repeatable. 10 to 250.")] = None,
    dtype: Dtype = "auto",
    compiled: Compiled = True,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Encoding, sampling and decoding at the paper's sizes, beside plain PyTorch and torch.compile.

    Answers are checked before anything is timed. Writes sampler.json and sampler.md. On a CPU a tiny model, to see that
    it works.
    """
    from copedit_bench.models import sampler as body

    options: dict[str, Any] = {"steps": steps, "device": device, "dtype": dtype, "compiled": compiled}
    options |= {key: value for key, value in (("presets", preset), ("batches", batch)) if value}
    _bench(output, "sampler", as_json, lambda **hooks: body.run(**options, **hooks))


@benchmarks.command("train-step")
def bench_train_step(
    output: Output,
    preset: Presets = None,
    stage: Annotated[
        list[str] | None, typer.Option(metavar="tokenizer|denoiser", help="Only this stage; repeatable.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Subjects a step; by default the paper's.")] = None,
    compiled: Compiled = True,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """An optimizer step of each stage: time and peak memory, beside plain PyTorch and torch.compile.

    Loss and gradients are checked before anything is timed. Writes train-step.json and train-step.md. On a CPU a tiny
    model, to see that it works.
    """
    from copedit_bench.models import train_step as body

    if unknown := [name for name in stage or () if name not in body.STAGES]:
        raise CopeditError(f"--stage {unknown[0]}: choose {' or '.join(body.STAGES)}")
    options: dict[str, Any] = {"batch": batch, "device": device, "compiled": compiled}
    options |= {key: value for key, value in (("presets", preset), ("stages", stage)) if value}
    _bench(output, "train-step", as_json, lambda **hooks: body.run(**options, **hooks))


def _bench(output: Path, name: str, as_json: bool, run: Callable[..., dict[str, Any]]) -> None:
    """Measure, keep what there is after every piece of work, and say it."""
    from copedit_bench.models import side_by_side

    _check_writable(output)
    with _progress(_stderr()) as bar:
        task = bar.add_task("measuring", total=None)
        report = run(
            progress=lambda text: bar.update(task, description=text),
            save=lambda so_far: side_by_side.write(so_far, output, name),
        )
    text = "\n".join([*side_by_side.tables(report), "", *side_by_side.remarks(report), *report["notes"]])
    _present(report, text, side_by_side.write(report, output, name), as_json)
    side_by_side.verify(report)


@benchmarks.command("cost")
def bench_cost(
    output: Output,
    measure: Annotated[
        list[str] | None,
        typer.Option(metavar="PRESET", help="Also measure this preset's models, besides the small ones; repeatable."),
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Parameters and operations of every preset and backbone; time and memory of the small ones on this machine.

    Needs the extra `train`. Writes cost.json, cost.md and, with matplotlib, cost.png.
    """
    from copedit_bench.models import cost as body

    _check_writable(output)
    with _progress(_stderr()) as bar:
        task = bar.add_task("measuring")
        report = body.run(
            [*body.DEMO, *(measure or ())],
            device,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    _present(report, body.markdown(report), body.write(report, output), as_json)


@exports.command("onnx")
def export_onnx(
    model: Annotated[str, typer.Option(metavar="NAME_OR_FOLDER", help="The model.")],
    output: Output,
    precision: Annotated[
        str, typer.Option(metavar="float32|float16|bfloat16", help="Of weights and products; a CPU wants float32.")
    ] = "float32",
    as_json: Json = False,
) -> None:
    """ONNX graphs of a model: encoder with prompt heads, sampler step, decoder.

    The new folder is a model for every engine. Needs the extra `export`.
    """
    from copedit_rt.engines import onnx_export as body

    _check_writable(output)
    report = body.export_onnx(model, output, precision)
    if as_json:
        _print_json(report)
    else:
        for name, size in report["files"].items():
            typer.echo(f"{output / name}  {size / 2**20:.1f} MiB")


@exports.command("tensorrt")
def export_tensorrt(
    model: Annotated[str, typer.Option(metavar="NAME_OR_FOLDER", help="The model.")],
    output: Output,
    precision: Annotated[
        str, typer.Option(metavar="float16|bfloat16|float32", help="Of weights and products.")
    ] = "float16",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """ONNX graphs of a model and TensorRT's plans of them for the GPU here, each checked against torch.

    The new folder is a model for every engine. May take minutes; needs the extras `export` and `tensorrt`.
    """
    from copedit_rt.engines import onnx_export as body

    _check_writable(output)
    with _building() as progress, _remarks():
        report = body.export_tensorrt(model, output, precision, device, progress)
    if as_json:
        _print_json(report)
    else:
        for name, size in report["files"].items():
            typer.echo(f"{output / name}  {size / 2**20:.1f} MiB")
        for part, agreed in report["parity"].items():
            typer.echo(f"{part}: cosine {agreed['cosine']:.6f}, max error {agreed['max_error']:.1e} against torch")


@exports.command("triton-repo")
def export_triton(
    model: Annotated[str, typer.Option(metavar="NAME_OR_FOLDER", help="The model.")],
    output: Output,
    backend: Annotated[str, typer.Option(metavar="onnxruntime|tensorrt", help="What the server computes with.")] = (
        "onnxruntime"
    ),
    precision: Annotated[
        str, typer.Option(metavar="float32|float16|bfloat16", help="Of weights and products; a CPU wants float32.")
    ] = "float32",
    max_batch: Annotated[int, typer.Option(min=1, help="Studies that the server may join into one batch.")] = 4,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """A model repository for Triton Inference Server: encoder, step and decoder as three models.

    With the backend tensorrt, plans for the GPU here (extra `tensorrt`). Needs the extra `export`.
    """
    from copedit_rt.engines import server_export as body

    _check_writable(output)
    with _building() as progress, _remarks():
        report = body.export_triton(model, output, backend, precision, max_batch, device, progress)
    if as_json:
        _print_json(report)
    else:
        for name, size in report["files"].items():
            typer.echo(f"{output / name}  {size / 2**20:.1f} MiB")


@app.command()
def doctor(as_json: Json = False) -> None:
    """Versions, devices, kernels in use, models, and what each extra still needs."""
    from copedit_rt import doctor as body

    report = body.diagnose()
    if as_json:
        _print_json(report)
    else:
        from rich.console import Console

        Console().print(body.render(report))


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        from copedit_rt import __version__

        typer.echo(__version__)
        raise typer.Exit


# -------------------------------------------------------------------------------------------------- synthesis


def _nothing(text: str) -> None:
    """Says nothing."""


def synthesise(
    inputs: Sequence[Path],
    output: Path,
    *,
    explicit: Mapping[str, Path] | None = None,
    model: str | None = None,
    target: str = "all",
    steps: int | None = None,
    seed: int = 0,
    samples: int = 1,
    solver: str | None = None,
    device: str = "auto",
    engine: str = "torch",
    dtype: str = "auto",
    max_memory: int | None = None,
    overwrite: bool = False,
    resample: bool = False,
    preview: bool = False,
    missing_slices: Sequence[int] | None = None,
    say: Callable[[str], None] = _nothing,
) -> dict[str, Any]:
    """The body of `copedit synth`; `say` hears one line per file. JSON-able.

    A study that fails does not stop the others; if it is the only one, its CopeditError is raised. The next study is
    read while one is computed. Of several processes (RANK and WORLD_SIZE in the environment, as torchrun sets them)
    each takes every WORLD_SIZE-th study, and in turn a GPU (LOCAL_RANK).
    """
    wanted = _targets(target)
    _check_writable(output)
    found = _find(inputs, explicit)
    rank, world = _shard()
    mine = found[rank::world]
    models, err = _Models(model, _own_device(device, world), max_memory, engine, dtype), _stderr()
    entries: list[dict[str, Any]] = []
    with _progress(err, quiet=rank > 0) as bar:
        models.bar = bar
        studies = bar.add_task("studies", total=len(mine), visible=len(mine) > 1)
        sampler = bar.add_task("", total=None, visible=False)

        def advance(done: int, total: int) -> None:
            bar.update(sampler, completed=done, total=total)

        options: dict[str, Any] = {"steps": steps, "seed": seed, "samples": samples, "solver": solver}
        options["progress"] = advance

        def open_one(files: StudyFiles) -> _Opened:
            return _open(files, output, models, wanted, overwrite, resample, missing_slices, len(found) > 1)

        # One study ahead is read while the device computes.
        with ThreadPoolExecutor(1, "read") as reader:
            ahead = deque(reader.submit(open_one, files) for files in mine[:1])
            for number, files in enumerate(mine):
                bar.update(sampler, description=files.name, completed=0, total=None, visible=True)
                entry: dict[str, Any] = {"study": files.name, "task": files.task, "status": "failed"}
                start = time.perf_counter()
                try:
                    opened = ahead.popleft().result()
                    if number + 1 < len(mine):
                        ahead.append(reader.submit(open_one, mine[number + 1]))
                    entry |= opened.entry
                    if opened.error:
                        raise opened.error
                    if opened.study:
                        _synthesise_one(opened, output, entry, models, options=options, preview=preview)
                except CopeditError as error:
                    if len(found) == 1 or isinstance(error, _UnusableModel):
                        raise
                    entry["error"] = str(error)
                entry["seconds"] = round(time.perf_counter() - start, 3)
                entries.append(entry)
                _tell(entry, say, err)
                bar.advance(studies)
    counts = Counter(entry["status"] for entry in entries)
    summary: dict[str, Any] = {name: counts[name] for name in ("written", "kept", "complete", "failed")}
    if counts["complete"] == len(found):
        raise CopeditError(
            f"nothing is missing in any of the {len(entries)} studies, so there is nothing to synthesise"
        )
    if len(entries) > 1:
        text = f"{len(entries)} studies: {counts['written']} written, {counts['kept']} kept"
        text += f", {counts['complete']} with nothing missing" * bool(counts["complete"])
        err.print(f"{text}, {counts['failed']} failed", highlight=False)
    return summary | {"studies": entries, "passed_over": _passed_over(found)}


@dataclass
class _Opened:
    """A study as far as it goes without computing: what its entry holds so far, and what went wrong.

    study: None where there is nothing to compute. todo: the elements to write, None for all.
    """

    files: StudyFiles
    entry: dict[str, Any]
    study: Study | None = None
    todo: list[str] | None = None
    error: CopeditError | None = None


def _open(
    files: StudyFiles,
    output: Path,
    models: _Models,
    target: Sequence[str] | None,
    overwrite: bool,
    resample: bool,
    missing_slices: Sequence[int] | None,
    several: bool,
) -> _Opened:
    """Choose the model, see what there is to do, and read the files."""
    opened = _Opened(files, {})
    try:
        _look_into(opened, output, models, target, overwrite, several)
        if "status" in opened.entry:
            return opened
        from copedit_rt.images.study import Study

        study = Study.read(files, missing_slices=missing_slices, resample=resample)
    except CopeditError as error:
        opened.error = error
        return opened
    if several and files.task == "cardiac" and not study.missing_slices:
        opened.entry["status"] = "complete"
    else:
        opened.study = study
    return opened


def _look_into(
    opened: _Opened, output: Path, models: _Models, target: Sequence[str] | None, overwrite: bool, several: bool
) -> None:
    """Fill in the entry; its status only where nothing is to be done."""
    files, entry = opened.files, opened.entry
    name, config = models.choose(files.task, files.files)
    entry["model"] = name
    # A model for the other task is refused where every study is prepared.
    outputs = files.outputs(output, config.elements) if config.task == files.task else {}
    if target is not None:
        _check_target(files, config, target)
        outputs = {element: path for element, path in outputs.items() if element in target}
    if not outputs and several and not files.problem and set(files.files) == set(config.elements):
        entry["status"] = "complete"
        return
    entry["outputs"] = {element: str(path) for element, path in outputs.items()}
    sidecars = {element: files.naming.path(output, element, ending=".json") for element in outputs}
    entry["sidecars"] = {element: str(path) for element, path in sidecars.items()}
    done = [] if overwrite else [element for element, path in outputs.items() if path.exists()]
    if outputs and len(done) == len(outputs):
        entry["status"] = "kept"
        return
    entry["kept"] = done
    # What exists stays as it is, though it is sampled again beside the others: elements depend on each other.
    opened.todo = None if files.task == "cardiac" else [element for element in outputs if element not in done]


def _synthesise_one(
    opened: _Opened,
    output: Path,
    entry: dict[str, Any],
    models: _Models,
    *,
    options: Mapping[str, Any],
    preview: bool,
) -> None:
    """Write one study's outputs and fill in its entry."""
    files, name, study = opened.files, opened.entry["model"], opened.study
    assert study is not None
    target = opened.todo or None
    result = _out_of_memory(files.name, lambda: models.load(name).synthesize(study, target=target, **options))
    entry["notes"] = list(result.study.notes)
    entry["perception"] = result.perception.to_dict()
    entry["record"] = result.record
    if preview:
        from copedit_rt.images import preview as picture

        entry["preview"] = str(output / files.naming.subfolder / f"{files.name}_preview.png")
        picture.save(picture.draw(result.study, model=result.record["model"]), Path(entry["preview"]))
    # Each image is written after all that belongs to it: where there is an image, it is complete.
    result.study.write(output, model=result.record["model"], record=result.record, std=result.std or None)
    entry["status"] = "written"


def _shard() -> tuple[int, int]:
    """Number of this process and of all of them."""
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdigit() and world.isdigit() and int(rank) < int(world)):
        raise CopeditError(f"RANK={rank}, WORLD_SIZE={world}: set both, to a number below the second, or neither")
    return int(rank), int(world)


def _wait_for_others() -> None:
    """torchrun ends all its processes as soon as one fails: a study that failed must not cost others theirs."""
    if "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from torch import distributed

        distributed.init_process_group("gloo", timeout=timedelta(days=30))
        distributed.barrier()
        distributed.destroy_process_group()


def _own_device(device: str, world: int) -> str:
    """Of several processes each takes the GPU of its number on this machine."""
    if world == 1 or device not in ("auto", "cuda"):
        return device
    import torch

    if device == "auto" and not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


def _out_of_memory(name: str, work: Callable[[], Any]) -> Any:
    """work(), a lack of memory told as a CopeditError."""
    try:
        return work()
    except (MemoryError, RuntimeError) as error:
        # What torch raises: a RuntimeError on the CPU, a subclass of it on CUDA.
        torch_says = ("out of memory", "allocate memory")
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in torch_says):
            raise
        raise CopeditError(
            f"{name}: memory ran out; set --max-memory, use a smaller model with --model, or another --device"
        ) from error


def _tell(entry: Mapping[str, Any], say: Callable[[str], None], err: Console) -> None:
    """One study's outcome: files to `say`, what went wrong to stderr."""
    name = entry["study"]
    for note in entry.get("notes", ()):
        err.print(f"{name}: {note}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    if entry["status"] == "failed":
        err.print(f"copedit: {entry['error']}", style="red", markup=False, highlight=False, soft_wrap=True)
    elif entry["status"] == "complete":
        say(f"{name}: nothing is missing")
    else:
        kept = entry["outputs"] if entry["status"] == "kept" else entry["kept"]
        for element, path in entry["outputs"].items():
            outcome = "kept (--overwrite replaces it)" if element in kept else "written"
            say(f"{name}: {element} {outcome}: {path}")
        if "preview" in entry:
            say(f"{name}: picture written: {entry['preview']}")


def _targets(text: str) -> list[str] | None:
    """--target as elements; None for all."""
    if text.strip().lower() == "all":
        return None
    from copedit_rt.images.names import modality

    return [modality(part) for part in text.split(",")]


def _check_target(files: StudyFiles, config: ModelConfig, target: Sequence[str]) -> None:
    if files.task == "cardiac":
        raise CopeditError(f"{files.name} is a cardiac stack; name slices with --missing-slices, not --target")
    for element in target:
        if element not in config.elements:
            known = ", ".join(config.elements)
            raise _UnusableModel(f"--target {element}: the model {config.name} knows {known} only; choose one of them")
        if element in files.files:
            there = files.files[element]
            raise CopeditError(f"--target {element}: {files.name} has it already ({there}); choose what is missing")


# ------------------------------------------------------------------------------------------------- inspection


def _look(files: StudyFiles, models: _Models, missing_slices: Sequence[int] | None, *, several: bool) -> Report:
    """What the files of one study say and what the network perceives.

    Bad files are findings; only where nothing can be read, of a single study, is that an error.
    """
    from copedit_rt.perception import Finding, Report, contradictions, examine

    shown = {element: path.name for element, path in files.files.items()}
    try:
        study, unreadable = _read_what_can_be_read(files, missing_slices)
    except CopeditError as error:
        if not several:
            raise
        return Report(files.name, files.task, shown, findings=[Finding("unreadable", str(error))])
    findings = [Finding("unreadable", text) for text in unreadable]
    findings += [Finding("note", note, flag=False) for note in study.notes]
    findings += examine(study.volumes, shown, task=files.task)
    constant = {f.element for f in findings if f.kind == "constant" and f.element}
    study = _only_finite(study, constant)
    name, config = models.choose(files.task, files.files)
    report = Report(files.name, files.task, shown, (), study.missing_slices, None, findings)
    if files.task == "brain":
        report.missing = tuple(element for element in config.elements if element not in files.files)
    if study.volumes:
        network = models.load(name)
        try:
            report.perception = network.perceive(study)
        except CopeditError as error:
            findings.append(Finding("unperceived", str(error)))
        else:
            if files.task == "cardiac":
                report.missing = tuple(e for e in config.elements if e not in report.perception.identity)
            findings += contradictions(report.perception, shown, task=files.task)
    return report


def _read_what_can_be_read(files: StudyFiles, missing_slices: Sequence[int] | None) -> tuple[Study, list[str]]:
    """The study without the files that cannot be read, and a sentence for each of these."""
    from copedit_rt.images.study import Study

    options: dict[str, Any] = {"missing_slices": missing_slices, "resample": True, "check_content": False}
    sentences = [files.problem] if files.problem else []
    files = replace(files, problem=None)
    try:
        return Study.read(files, **options), sentences
    except CopeditError:
        good = {}
        for element, path in files.files.items():
            try:
                Study.read(replace(files, files={element: path}), **options)
                good[element] = path
            except CopeditError as error:
                sentences.append(str(error))
        if not good or len(good) == len(files.files):
            raise
        return Study.read(replace(files, files=good), **options), sentences


def _only_finite(study: Study, left_out: set[str]) -> Study:
    """The study as the network can look at it: without constant volumes, NaN and infinities as 0."""
    import numpy as np

    volumes = {
        name: replace(volume, data=np.nan_to_num(volume.data, nan=0.0, posinf=0.0, neginf=0.0))
        for name, volume in study.volumes.items()
        if name not in left_out
    }
    return replace(study, volumes=volumes)


# ---------------------------------------------------------------------------------------------------- helpers


class _UnusableModel(CopeditError):
    """No other study would fare better."""


class _Models:
    """Chooses models and loads each once."""

    def __init__(
        self,
        model: str | None,
        device: str,
        max_memory: int | None = None,
        engine: str = "torch",
        dtype: str = "auto",
    ) -> None:
        self._model, self._device = model, device
        self._options: dict[str, Any] = {"max_memory": max_memory, "engine": engine, "dtype": dtype}
        self._loaded: dict[str, Synthesizer] = {}
        self.bar: Any = None  # where loading may show its progress; its own where there is none

    def choose(self, task: str, elements: Mapping[str, Any]) -> tuple[str, ModelConfig]:
        """The model that was asked for, or the first built in for the task that knows all the elements."""
        from copedit_rt import checkpoint

        if self._model is not None:
            try:
                return self._model, checkpoint.read_config(checkpoint.locate(self._model))
            except CopeditError as error:
                raise _UnusableModel(error) from error
        configs = {name: checkpoint.read_config(checkpoint.locate(name)) for name in checkpoint.list_models()}
        configs = {name: config for name, config in configs.items() if config.task == task}
        if not configs:
            raise CopeditError(f"no model for {task} MRI is built in; name a model folder with --model")
        for name, config in configs.items():
            if task == "cardiac" or set(elements) <= set(config.elements):
                return name, config
        return next(iter(configs.items()))

    def load(self, name: str) -> Synthesizer:
        from copedit_rt.synthesizer import Synthesizer

        if name not in self._loaded:
            try:
                with _building(self.bar) as progress, _remarks():
                    loaded = Synthesizer.load(name, self._device, progress=progress, **self._options)
            except CopeditError as error:
                raise _UnusableModel(error) from error
            for note in getattr(loaded.engine, "notes", ()):
                print(f"copedit: {note}", file=sys.stderr)
            self._loaded[name] = loaded
        return self._loaded[name]


@contextmanager
def _remarks() -> Iterator[None]:
    """Warnings to the user as one sentence each, once the work is done."""
    with warnings.catch_warnings(record=True) as remarks:
        warnings.simplefilter("always", UserWarning)
        yield
    for remark in remarks:
        print(f"copedit: {remark.message}", file=sys.stderr)


@contextmanager
def _building(bar: Any = None) -> Iterator[Callable[[str, int, int], None]]:
    """What shows the progress of a build, as one more line of a bar or of one of its own."""
    with _progress(_stderr()) if bar is None else nullcontext(bar) as shown:
        line = shown.add_task("", visible=False)

        def progress(what: str, done: int, total: int) -> None:
            shown.update(line, description=what, completed=done, total=total, visible=True)

        try:
            yield progress
        finally:
            shown.remove_task(line)


def _find(inputs: Sequence[Path], explicit: Mapping[str, Path] | None) -> Found:
    from copedit_rt.images.find import find_studies

    found = find_studies(inputs, explicit)
    for reason, paths in _passed_over(found).items():
        files = "a file" if len(paths) == 1 else f"{len(paths)} files"
        _stderr().print(
            f"passed over {files}: {reason} ({paths[0]}{', ...' * (len(paths) > 1)})",
            style="dim",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    return found


def _passed_over(found: Found) -> dict[str, list[str]]:
    """Reason -> the files that were passed over for it."""
    reasons: dict[str, list[str]] = {}
    for path, reason in found.skipped:
        reasons.setdefault(reason, []).append(str(path))
    return reasons


def _explicit(**files: Path | None) -> dict[str, Path] | None:
    return {name: path for name, path in files.items() if path is not None} or None


def _numbers(text: str | None, option: str = "--missing-slices") -> list[int] | None:
    """3,4,5 or 3-5 as integers."""
    if text is None:
        return None
    numbers: list[int] = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdigit() or (last and not last.isdigit()):
            raise CopeditError(f"{option} {text}: expected whole numbers such as 3,4,5 or 3-5")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def _bytes(text: str | None) -> int | None:
    """2GB, 500MB or 1.5g as bytes."""
    if text is None:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG])(?:i?B)?\s*", text, re.IGNORECASE)
    if not found:
        raise CopeditError(f"--max-memory {text}: expected an amount such as 2GB or 500MB")
    return int(float(found[1]) * 2 ** {"K": 10, "M": 20, "G": 30}[found[2].upper()])


def _check_writable(folder: Path) -> None:
    """CopeditError if files could not be written below a folder; leaves no trace."""
    ancestor = folder.absolute()
    while not ancestor.exists() and ancestor != ancestor.parent:
        ancestor = ancestor.parent
    try:
        if not ancestor.is_dir():
            raise NotADirectoryError(20, "not a folder")
        with tempfile.TemporaryFile(dir=ancestor):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise CopeditError(f"cannot write to {folder} ({ancestor}: {reason}); choose another folder with -o") from error


def _stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True)


def _progress(console: Console, quiet: bool = False) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    # Rich would send stdout to its own console, stderr: right on a terminal, a loss where stdout is a file.
    redirect = sys.stdout.isatty()
    return Progress(
        *columns, console=console, transient=True, disable=quiet or not console.is_terminal, redirect_stdout=redirect
    )


def _print_json(data: Any) -> None:
    typer.echo(json.dumps(data, indent=2, default=str, allow_nan=False))


if __name__ == "__main__":
    main()
