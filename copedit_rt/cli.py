"""The command `copedit`. Nothing heavy is imported before a sub-command runs, so that help is instant.

Exit codes: 0 done; 1 an error, told in one sentence on stderr; 2 wrong usage; 3 `inspect` flagged something; 130
interrupted, 143 terminated. Answers go to stdout, progress and remarks to stderr; with --json, stdout is one JSON
document. Other packages add their commands through the entry points `copedit.commands`, each a Typer application.
"""

from __future__ import annotations

import errno
import gc
import importlib
import os
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import typer

from copedit_rt import __version__, terminal
from copedit_rt.errors import CopeditError
from copedit_rt.images.names import MODALITIES
from copedit_rt.task import STACK, Task
from copedit_rt.terminal import Device, Dtype, Json, Output, Quiet, Solver, Steps, Verbose, flag

FLAGGED = 3
TASKS = {task.value: task for task in Task}
TORCH = ("torch", "triton", "scipy")  # what the extra `torch` brings
COMMANDS = "copedit.commands"  # the group of entry points that add commands


class _Root(terminal.Group):
    """Commands whose CopeditError, or a path that cannot be, becomes one sentence and exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except CopeditError as error:
            terminal.tell_error(error, ctx.params["debug"])
            raise typer.Exit(error.exit_code) from None
        except ModuleNotFoundError as error:
            if error.name not in TORCH:
                raise
            reason = CopeditError(f"this needs {error.name}, which is not installed; pip install 'copedit[torch]'")
            reason.__cause__ = error
            terminal.tell_error(reason, ctx.params["debug"])
            raise typer.Exit(reason.exit_code) from None
        except OSError as error:  # a path that is too long, for one
            if error.errno == errno.EPIPE or error.filename is None:
                raise
            reason = CopeditError(f"{error.filename}: {error.strerror}; give another path")
            reason.__cause__ = error
            terminal.tell_error(reason, ctx.params["debug"])
            raise typer.Exit(reason.exit_code) from None
        except KeyboardInterrupt:
            terminal.tell("copedit: interrupted; what is complete stays, repeat the command to go on")
            raise typer.Exit(130) from None


app = terminal.commands(
    "Fill in what is missing from an MRI study: modalities of a brain, slices of a cardiac short-axis stack. Not a "
    "medical device.",
    _Root,
    pretty_exceptions_enable=False,
)
exports = terminal.commands("Write a model for another engine than torch.")


def main() -> None:
    """Entry point of the console script."""
    gc.set_threshold(50_000, 20, 20)  # imports make a million objects and no garbage: looked at less often, 0.1 s less
    # torch reads it when it is loaded, and asks for huge pages: fewer are to be zeroed when a block is taken. `evaluate
    # --model demo-brain --subjects 2 --patterns 2` takes 27.7 s of a core (Zen 5), and 28.9 with 0 in place of 1.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    app()


@app.callback(invoke_without_command=True)
def _root(
    ctx: typer.Context,
    version: Annotated[bool, flag("--version", help="Print the version and exit.")] = False,
    debug: Annotated[bool, flag("--debug", help="Show where an error came from, not only what it is.")] = False,
) -> None:
    ctx.obj = debug
    if version:
        typer.echo(__version__)
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        ctx.fail("Missing command.")


# ---------------------------------------------------------------------------------------------------- options

Input = Annotated[
    list[Path] | None,
    typer.Option(
        "-i",
        "--input",
        metavar="PATH",
        help="A study folder (NIfTI or DICOM), a folder of studies, a zip of these, or NIfTI files; repeatable.",
    ),
]
More = Annotated[list[Path] | None, typer.Argument(metavar="PATH", help="More inputs, as after -i.")]
Files = Annotated[
    list[str] | None,
    typer.Option(
        "--file",
        metavar="MODALITY=PATH",
        help=f"Instead of -i, the file of a modality, whatever its name; repeatable: {', '.join(MODALITIES)}, {STACK}. "
        "Beside a DICOM study, number, UID or description of the series instead of a path, or none.",
    ),
]
Model = Annotated[
    str | None,
    typer.Option(metavar="NAME_OR_FOLDER", help="The model; by default one that fits the task and the files."),
]
Engine = Annotated[
    str,
    typer.Option(
        metavar="auto|torch|onnxruntime|openvino|tensorrt",
        help="What computes; all but torch take a folder of copedit export. auto: torch where it is installed.",
    ),
]
Slices = Annotated[
    str | None,
    typer.Option("--missing-slices", metavar="3,4,5", help="Missing slices of a cardiac stack, counted from 0."),
]
T1 = Annotated[Path | None, typer.Option("--t1", metavar="FILE", help="Short for --file t1=FILE, and so on.")]
T1ce = Annotated[Path | None, typer.Option("--t1ce", metavar="FILE", help="T1 with contrast agent.")]
T2 = Annotated[Path | None, typer.Option("--t2", metavar="FILE", help="T2.")]
Flair = Annotated[Path | None, typer.Option("--flair", metavar="FILE", help="FLAIR.")]
Pd = Annotated[Path | None, typer.Option("--pd", metavar="FILE", help="Proton density.")]
Sax = Annotated[Path | None, typer.Option("--sax", metavar="FILE", help="A cardiac short-axis stack.")]
TaskName = Annotated[
    str | None,
    typer.Option(
        "--task",
        metavar="brain|cardiac",
        help="Pass over studies of the other; cardiac takes images of any name for short-axis stacks.",
    ),
]
Select = Annotated[
    str | None,
    typer.Option(metavar="run-01,acq-highres", help="Of several files of a modality those whose names carry this."),
]
MaxMemory = Annotated[
    str | None,
    typer.Option(metavar="2GB|500MB", help="For encoding and decoding; less is slower. By default unlimited."),
]
Participant = Annotated[
    list[str] | None, typer.Option("--participant-label", metavar="LABEL", help="BIDS: only sub-LABEL; repeatable.")
]
Session = Annotated[list[str] | None, typer.Option(metavar="LABEL", help="BIDS: only ses-LABEL; repeatable.")]
Run = Annotated[list[str] | None, typer.Option(metavar="N", help="BIDS: only run-N; repeatable.")]
ExportModel = Annotated[str, typer.Option("--model", metavar="NAME_OR_FOLDER", help="The model.")]
Precision = Annotated[
    str, typer.Option(metavar="float32|float16|bfloat16", help="Of weights and products; a CPU wants float32.")
]


# --------------------------------------------------------------------------------------------------- commands


@app.command()
def synth(
    ctx: typer.Context,
    output: Output,
    more: More = None,
    inputs: Input = None,
    file: Files = None,
    t1: T1 = None,
    t1ce: T1ce = None,
    t2: T2 = None,
    flair: Flair = None,
    pd: Pd = None,
    sax: Sax = None,
    task: TaskName = None,
    select: Select = None,
    participant_label: Participant = None,
    session: Session = None,
    run: Run = None,
    model: Model = None,
    target: Annotated[str, typer.Option(metavar="all|t1,flair", help="What to synthesise.")] = "all",
    steps: Steps = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same images.")] = 0,
    samples: Annotated[
        int, typer.Option(min=1, max=10_000, help="Draw N, write their mean and a map of their standard deviation.")
    ] = 1,
    solver: Solver = None,
    detail: Annotated[
        str | None,
        typer.Option(
            metavar="guided|none",
            help="Whether a brain's detail finer than the model's grid comes from the given images; by default the "
            "model's.",
        ),
    ] = None,
    device: Device = "auto",
    engine: Engine = "auto",
    dtype: Dtype = "auto",
    max_memory: MaxMemory = None,
    overwrite: Annotated[
        bool,
        flag("--overwrite", help="Replace outputs that exist, and remove those whose modality was acquired since."),
    ] = False,
    resample: Annotated[bool, flag("--resample", help="Bring files on other grids onto the first one's.")] = False,
    preview: Annotated[bool, flag("--preview", help="Also write a PNG per study.")] = False,
    report: Annotated[
        bool, flag("--report", help="Also write a page per study that a browser opens, and one of a cohort.")
    ] = False,
    no_dicom: Annotated[bool, flag("--no-dicom", help="Of a DICOM study, write NIfTI files alone.")] = False,
    missing_slices: Slices = None,
    shard: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="Only every N-th study, from the I-th on; I from 0 or from 1."),
    ] = None,
    summary: Annotated[
        bool, flag("--summary", help="Compute nothing: say what became of every study, whichever process did it.")
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Synthesise what is missing.

    Outputs are named as the inputs are, lie on the first input's grid, and mirror the folders below -i. Each
    has a JSON sidecar. Outputs that are complete are kept, so an interrupted cohort can be repeated.
    """
    from copedit_rt import cohort

    explicit = terminal.files_by_modality(file, t1=t1, t1ce=t1ce, t2=t2, flair=flair, pd=pd, sax=sax)
    if summary:
        _refuse_beside_summary(ctx)
        found = {"task": terminal.choice(task, "--task", TASKS), "select": terminal.words(select), "explicit": explicit}
        found["labels"] = _labels(participant_label, session, run)
        rows = cohort.survey([*(inputs or ()), *(more or ())], output, model=model, target=target, **found)
        return _summarise(rows, as_json, quiet)
    missing, memory = terminal.numbers(missing_slices), terminal.size(max_memory)
    say = terminal.nothing if as_json else terminal.say
    with terminal.Screen(say, bool(ctx.obj), quiet, verbose) as screen:
        made = cohort.synthesise(
            [*(inputs or ()), *(more or ())],
            output,
            explicit=explicit,
            task=terminal.choice(task, "--task", TASKS),
            select=terminal.words(select),
            labels=_labels(participant_label, session, run),
            model=model,
            target=target,
            steps=steps,
            seed=seed,
            samples=samples,
            solver=solver,
            detail=terminal.choice(detail, "--detail", {"guided": True, "none": False}),
            device=device,
            engine=engine,
            dtype=dtype,
            overwrite=overwrite,
            resample=resample,
            preview=preview,
            report=report,
            dicom=not no_dicom,
            missing_slices=missing,
            shard=terminal.shard(shard),
            max_memory=memory,
            listener=screen,
        )
    if (count := len(made["studies"])) > 1 and not quiet:
        complete = f", {made['complete']} with nothing missing" * bool(made["complete"])
        outcomes = f"{made['written']} written, {made['kept']} kept{complete}, {made['failed']} failed"
        terminal.tell(f"{count} studies: {outcomes}")
    if as_json:
        terminal.print_json(made)
    cohort.wait_for_others()
    if made["failed"]:
        raise typer.Exit(1)


# What says which studies and outputs are meant, and how it is told. All other options are of what is computed.
_MEANT = {"output", "more", "inputs", "file", *MODALITIES, STACK, "task", "select", "participant_label", "session"}
_MEANT |= {"run", "model", "target", "summary", "device", "quiet", "verbose", "as_json"}


def _refuse_beside_summary(ctx: typer.Context) -> None:
    for name in ctx.params:
        source = ctx.get_parameter_source(name)
        if name not in _MEANT and source is not None and source.name == "COMMANDLINE":
            raise CopeditError(f"--summary computes nothing; leave out --{name.replace('_', '-')}")


def _labels(participants: list[str] | None, sessions: list[str] | None, runs: list[str] | None) -> dict[str, list[str]]:
    """What of a BIDS data set is asked for; several labels may stand in one option."""
    asked = {"sub": participants, "ses": sessions, "run": runs}
    return {key: ",".join(given).replace(",", " ").split() for key, given in asked.items() if given}


def _summarise(rows: list[dict[str, Any]], as_json: bool, quiet: bool) -> None:
    """What became of a cohort, or of what is left to do of it; exit code 1 where that is something."""
    from copedit_rt import summary

    counts, left = summary.count(rows), [row for row in rows if row["outcome"] in summary.LEFT]
    if as_json:
        terminal.print_json({**counts, "studies": rows})
    elif left or not quiet:
        terminal.show(summary.render(left if quiet else rows, counts))
    if left:
        raise typer.Exit(1)


@app.command()
def inspect(
    ctx: typer.Context,
    more: More = None,
    inputs: Input = None,
    file: Files = None,
    t1: T1 = None,
    t1ce: T1ce = None,
    t2: T2 = None,
    flair: Flair = None,
    pd: Pd = None,
    sax: Sax = None,
    task: TaskName = None,
    select: Select = None,
    participant_label: Participant = None,
    session: Session = None,
    run: Run = None,
    model: Model = None,
    device: Device = "auto",
    engine: Engine = "auto",
    missing_slices: Slices = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Compare what the network perceives with what the files say.

    How many elements are missing, which, what each image looks like; blank slices and constant volumes. Exit
    code 0 if all agree, 3 if something is flagged.
    """
    from copedit_rt import inspection
    from copedit_rt.images.find import find_studies
    from copedit_rt.models import Models

    explicit = terminal.files_by_modality(file, t1=t1, t1ce=t1ce, t2=t2, flair=flair, pd=pd, sax=sax)
    with terminal.Screen(debug=bool(ctx.obj), quiet=quiet) as screen:
        paths, which = [*(inputs or ()), *(more or ())], terminal.choice(task, "--task", TASKS)
        labels = _labels(participant_label, session, run)
        found = find_studies(paths, explicit, task=which, select=terminal.words(select), labels=labels)
        screen.found(found, len(found))
        models = Models(model, device, engine=engine, listener=screen)
        reports = inspection.inspect(found, models, terminal.numbers(missing_slices), screen)
    if as_json:
        terminal.print_json({"studies": [report.to_dict() for report in reports], "passed_over": found.reasons()})
    else:
        terminal.show(*(report.render() for report in reports if report.flagged or not quiet))
    if any(report.flagged for report in reports):
        raise typer.Exit(FLAGGED)


@app.command()
def serve(
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Where to listen; 0.0.0.0 is everywhere.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one and says which.")] = 8080,
    model: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME_OR_FOLDER", help="A model to serve; repeatable. By default all built in."),
    ] = None,
    device: Annotated[
        list[str] | None,
        typer.Option(metavar="auto|cpu|cuda[:N]", help="Where to compute, one study at a time; repeatable."),
    ] = None,
    engine: Engine = "auto",
    dtype: Dtype = "auto",
    max_memory: MaxMemory = None,
    queue: Annotated[int, typer.Option(min=1, help="Requests in the house at most; others are told to wait.")] = 16,
    max_size: Annotated[
        str, typer.Option(metavar="1GB|500MB", help="Of a request, and of its images in memory.")
    ] = "1GB",
    time_limit: Annotated[float, typer.Option(min=1, metavar="SECONDS", help="For a request.")] = 600,
    grace: Annotated[int, typer.Option(min=0, metavar="SECONDS", help="For what runs when told to end.")] = 60,
    token_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Holds the bearer token that requests must have; or set COPEDIT_TOKEN."),
    ] = None,
    scratch: Annotated[Path | None, typer.Option(metavar="DIR", help="For files of requests, while they last.")] = None,
    quiet: Quiet = False,
) -> None:
    """Answer requests over HTTP with warm models: POST /v1/synth, POST /v1/inspect.

    Also /health, /ready and /metrics. Nothing of a request stays. Needs the extra `serve`.
    """
    from copedit_rt.serving.server import Limits
    from copedit_rt.serving.server import serve as body

    body(
        host=host,
        port=port,
        models=model or [],
        devices=device or ["auto"],
        token=terminal.secret(token_file),
        scratch=scratch,
        limits=Limits(terminal.size(max_size, "--max-size") or 0, queue, time_limit),
        grace=grace,
        say=terminal.nothing if quiet else terminal.tell,
        warn=terminal.tell,
        engine=engine,
        dtype=dtype,
        max_memory=terminal.size(max_memory),
    )


@app.command()
def doctor(as_json: Json = False) -> None:
    """Versions, devices, kernels in use, models, and what each extra still needs."""
    from copedit_rt import doctor as body

    report = body.diagnose()
    if as_json:
        terminal.print_json(report)
    else:
        terminal.show(body.render(report))


@exports.command("onnx")
def export_onnx(model: ExportModel, output: Output, precision: Precision = "float32", as_json: Json = False) -> None:
    """ONNX graphs of a model: encoder with prompt heads, sampler step, decoder.

    The new folder is a model for every engine. Needs the extra `export`.
    """
    from copedit_rt.engines import onnx_export as body

    terminal.check_writable(output)
    _exported(body.export_onnx(model, output, precision), output, as_json)


@exports.command("tensorrt")
def export_tensorrt(
    model: ExportModel,
    output: Output,
    precision: Precision = "float16",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """ONNX graphs of a model and TensorRT's plans of them for the GPU here, each checked against torch.

    The new folder is a model for every engine. May take minutes; needs the extras `export` and `tensorrt`.
    """
    from copedit_rt.engines import onnx_export as body
    from copedit_rt.models import remarks

    terminal.check_writable(output)
    with terminal.Screen() as screen, remarks(screen.remark):
        report = body.export_tensorrt(model, output, precision, device, screen.building)
    _exported(report, output, as_json)


@exports.command("triton-repo")
def export_triton(
    model: ExportModel,
    output: Output,
    backend: Annotated[
        str,
        typer.Option(
            metavar="onnxruntime|python|tensorrt",
            help="What the server computes with; python is ONNX Runtime for servers without that backend.",
        ),
    ] = "onnxruntime",
    precision: Precision = "float32",
    max_batch: Annotated[int, typer.Option(min=1, help="Studies that the server may join into one batch.")] = 4,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """A model repository for Triton Inference Server: a study in, its missing images out.

    NAME-study calls encoder, step and decoder, models that can be asked as well. With the backend tensorrt, plans
    for the GPU here (extra `tensorrt`). Needs the extra `export`.
    """
    from copedit_rt.engines import server_export as body
    from copedit_rt.models import remarks

    terminal.check_writable(output)
    with terminal.Screen() as screen, remarks(screen.remark):
        report = body.export_triton(model, output, backend, precision, max_batch, device, screen.building)
    _exported(report, output, as_json)


def _exported(report: Mapping[str, Any], output: Path, as_json: bool) -> None:
    """What was written, and how it agreed with torch where that was compared."""
    if as_json:
        return terminal.print_json(report)
    for name, size in report["files"].items():
        terminal.say(f"{output / name}  {size / 2**20:.1f} MiB")
    for part, agreed in report.get("parity", {}).items():
        terminal.say(f"{part}: cosine {agreed['cosine']:.6f}, max error {agreed['max_error']:.1e} against torch")


app.add_typer(exports, name="export")


# --------------------------------------------------------------------------------------------- other packages


def _further() -> Iterator[typer.Typer]:
    """The applications of other packages. Where copedit is not installed, as in a bare checkout on the path, there are
    no entry points: then those of the packages copedit_* on the path that have a cli.py."""
    if points := entry_points(group=COMMANDS):
        yield from (point.load() for point in points)
    else:
        packages = {file.parent.name for folder in sys.path for file in Path(folder).glob("copedit_*/cli.py")}
        for package in sorted(packages - {__package__}):
            yield importlib.import_module(f"{package}.cli").app


for _application in _further():
    app.add_typer(_application)
