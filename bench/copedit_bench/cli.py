"""`copedit bench`: what there is to measure. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from copedit_rt.errors import CopeditError
from copedit_rt.terminal import (
    Device,
    Dtype,
    Json,
    Output,
    Steps,
    check_writable,
    commands,
    counting,
    flag,
    present,
    progress,
)

app = commands()
benchmarks = commands("Measure speed and memory on this machine.")
app.add_typer(benchmarks, name="bench")


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
    against: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Only beside contestants that begin so, and the baseline; repeatable."),
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
    from copedit_training.evaluation.report import unplotted, write_json

    check_writable(output)
    cases, where, what = body.plan(op, device, dtype)
    with counting("measuring") as progress:
        report = body.run(
            cases,
            where,
            what,
            seconds or body.SECONDS,
            progress=progress,
            operators=body.rivals(against),
            save=lambda so_far: write_json(so_far, output / "kernels.json"),
        )
    paths = pages.write_report(report, output)
    present(report, pages.summary(report), paths, as_json, unplotted())
    if any(check["status"] == "wrong" and check["contestant"] == "ours" for check in report["checks"]):
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
    ] = False,
    compiled: Compiled = True,
    quick: Annotated[
        bool, typer.Option("--quick", help="The heart alone, on one thread, a few samples: to see that it works.")
    ] = False,
    as_json: Json = False,
) -> None:
    """The demo models on this processor, on one and two threads, ours beside plain PyTorch, torch.compile, MONAI's
    layers, ONNX Runtime and OpenVINO; and how time and memory grow with steps, batch, modalities and volume.

    Answers are checked before anything is timed. About ten minutes on two quiet cores. Writes cpu.json and cpu.md.
    """
    from dataclasses import replace

    from copedit_bench.models import cpu as body

    parts = body.QUICK if quick else replace(body.Parts(), compiled=compiled)
    parts = replace(parts, large=large)
    _bench(output, "cpu", as_json, lambda **hooks: body.run(parts, **hooks), body.markdown)


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


def _bench(
    output: Path,
    name: str,
    as_json: bool,
    run: Callable[..., dict[str, Any]],
    page: Callable[[dict[str, Any]], str] | None = None,
) -> None:
    """Measure, keep what there is after every piece of work, and say it. page: the report in Markdown."""
    from copedit_bench.models import side_by_side
    from copedit_training.evaluation.report import write

    check_writable(output)
    text_of = page or side_by_side.markdown
    with progress() as bar:
        task = bar.add_task("measuring", total=None)
        report = run(
            progress=lambda text: bar.update(task, description=text),
            save=lambda so_far: write(so_far, text_of(so_far), output, name),
        )
    text = "\n".join([*side_by_side.tables(report), "", *side_by_side.remarks(report), *report["notes"]])
    present(report, text, write(report, text_of(report), output, name), as_json)
    side_by_side.verify(report)


@benchmarks.command("serve")
def bench_serve(
    output: Output,
    model: Annotated[
        list[str] | None, typer.Option(metavar="NAME_OR_FOLDER", help="A model to serve; repeatable. The demo models.")
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="Under load; every fifth is hostile.")] = 500,
    clients: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 8,
    alone: Annotated[int, typer.Option(min=0, help="Requests before that, one at a time.")] = 50,
    steps: Steps = None,
    as_json: Json = False,
) -> None:
    """A real server under load on this machine: latency, memory, and that every answer is the command's.

    Needs the extra `serve`. Writes serve.json and serve.md.
    """
    from copedit_bench import serving as body
    from copedit_rt.files import write_atomically

    check_writable(output)
    with counting("requests") as progress:
        report = body.run(
            model or ["demo-brain", "demo-cardiac"],
            requests=requests,
            clients=clients,
            alone=alone,
            steps=steps,
            progress=progress,
        )
    paths, text = [output / "serve.json", output / "serve.md"], body.markdown(report)
    write_atomically(paths[0], (json.dumps(report, indent=2) + "\n").encode())
    write_atomically(paths[1], text.encode())
    present(report, text, paths, as_json)


@benchmarks.command("cost")
def bench_cost(
    output: Output,
    measure: Annotated[
        list[str] | None,
        typer.Option(metavar="PRESET", help="Also measure this preset's models, besides the small ones; repeatable."),
    ] = None,
    methods: Annotated[
        bool, flag("--methods", help="Also the other methods of the paper's tables, at the presets that are measured.")
    ] = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Parameters and operations of every preset and backbone; time and memory of the small ones on this machine.

    Needs the extra `train`. Writes cost.json, cost.md and, with matplotlib, cost.png.
    """
    from copedit_bench.models import cost as body
    from copedit_training.evaluation.report import unplotted

    check_writable(output)
    with counting("measuring") as progress:
        report = body.run([*body.DEMO, *(measure or ())], device, progress=progress, with_methods=methods)
    present(report, body.markdown(report), body.write_report(report, output), as_json, unplotted())


@benchmarks.command("tokenizers")
def bench_tokenizers(
    output: Output,
    quick: Annotated[bool, typer.Option("--quick", help="A few steps of narrow ones, to see that it works.")] = False,
    as_json: Json = False,
) -> None:
    """What a tokenizer's operations buy: designs for brain-brats trained alike, small, on simulated brains.

    Decibels against TFLOP a study. About 15 minutes on one core. Writes tokenizers.json, tokenizers.md and, with
    matplotlib, tokenizers.png.
    """
    from copedit_bench.models import tokenizers as body
    from copedit_training.evaluation.report import unplotted

    check_writable(output)
    with counting("trained") as progress:
        report = body.run(
            body.QUICK if quick else body.Plan(), progress, lambda so_far: body.write_report(so_far, output)
        )
    present(report, body.markdown(report), body.write_report(report, output), as_json, unplotted())
