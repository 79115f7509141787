"""`copedit demo`, `train`, `evaluate`, `figure`, `sweep`, `ablate`, `analyse` and `segment`. Nothing heavy is imported
before a command runs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from copedit_rt.errors import CopeditError
from copedit_rt.terminal import (
    Device,
    Json,
    Output,
    Screen,
    Solver,
    Steps,
    check_writable,
    commands,
    counting,
    flag,
    numbers,
    present,
    print_json,
    say,
    show,
)

if TYPE_CHECKING:
    from copedit_rt.synthesizer import Synthesizer
    from copedit_training.evaluation.beside import Beside as Row

app = commands()
train = commands("Train a model, stage by stage.")
app.add_typer(train, name="train")


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

    check_writable(output)
    with Screen() as screen:
        report = body.run(output, subjects=subjects, seed=seed, device=device, listener=screen)
    if as_json:
        print_json(report)
    else:
        show(body.render(report))


# ----------------------------------------------------------------------------------------------- evaluation

Model = Annotated[str, typer.Option(metavar="NAME_OR_FOLDER", help="The model.")]
Subjects = Annotated[
    int | None, typer.Option(min=1, help="How many; by default 16 simulated ones, or all of a data set.")
]
HeldOut = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="phantom|labels:DIR|DIR",
        help="Held-out phantoms, studies made of label maps, or a data set's studies.",
    ),
]
FirstSeed = Annotated[
    int | None, typer.Option(help="Of the simulated subjects; 1000000 on are held out.", show_default="1000000")
]
Split = Annotated[
    str | None,
    typer.Option(
        metavar="test|all|FILE",
        help="Which of a data set: held out by name, all, or by a split.json.",
        show_default="test",
    ),
]
Patterns = Annotated[int | None, typer.Option(min=1, help="At most N missing patterns per count; by default all.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the sampler.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting; repeatable.")]
Full = Annotated[bool, flag("--full", help="The whole budget, days, not the reduced one.")]
FidNetwork = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Features of slices, for FID: a TorchScript file.")
]
FvdNetwork = Annotated[Path | None, typer.Option(metavar="FILE", help="Features of volumes, for FVD.")]
Beside = Annotated[
    list[str] | None,
    typer.Option(metavar="RUN[@KEY=N]", help="A run of a method or denoiser, on the same studies; repeatable."),
]


@app.command()
def evaluate(
    output: Output,
    model: Model = "demo-brain",
    data: HeldOut = "phantom",
    subjects: Subjects = None,
    first_seed: FirstSeed = None,
    split: Split = None,
    steps: Steps = None,
    patterns: Patterns = None,
    seed: Seed = 0,
    solver: Solver = None,
    samples: Annotated[
        int,
        typer.Option(
            min=1, max=10_000, help="Average so many samples; 2 or more also give the calibration of their spread."
        ),
    ] = 1,
    fid_network: FidNetwork = None,
    fvd_network: FvdNetwork = None,
    lpips_network: Annotated[Path | None, typer.Option(metavar="FILE", help="Distances of slices, for LPIPS.")] = None,
    beside: Beside = None,
    seeds: Annotated[
        int, typer.Option(min=1, max=1000, help="So many seeds from --seed on; to resolve differences, two or more.")
    ] = 1,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """PSNR, SSIM and MAE beside baselines, per missing count and pattern; tokenizer, heads, and more on demand."""
    from copedit_training.evaluation import evaluate as body
    from copedit_training.evaluation.features import Networks
    from copedit_training.evaluation.report import markdown, unplotted, write_report
    from copedit_training.evaluation.subjects import held_out

    if beside and samples > 1:
        raise CopeditError(f"--samples {samples}: methods give one each; leave it out beside --beside, or take --seeds")
    check_writable(output)
    synthesizer = _load(model, device)
    whom = held_out(synthesizer.config, data, subjects, first_seed, split)
    others, budget = _beside(beside or [], synthesizer, model, device, steps=steps, solver=solver)
    seeds = max([seeds, *(len(method.runs) for method in others.values())])
    networks = Networks(fid_network, fvd_network, lpips_network, synthesizer.engine.device)
    options: dict[str, Any] = {"steps": steps, "solver": solver, "seed": seed, "patterns": patterns}
    options |= {"beside": others, "seeds": seeds, "budget": budget}
    with counting("evaluating") as progress:
        report = body.evaluate(synthesizer, whom, samples=samples, networks=networks, progress=progress, **options)
    report |= {"model": model, "weights": synthesizer.weights}
    present(report, markdown(report), write_report(report, output), as_json, unplotted())


@app.command("figure")
def side_by_side(
    output: Output,
    model: Model = "demo-brain",
    data: HeldOut = "phantom",
    subjects: Annotated[int, typer.Option(min=1, max=100, help="At most so many.")] = 1,
    first_seed: FirstSeed = None,
    split: Split = None,
    missing: Annotated[
        list[str] | None,
        typer.Option(metavar="T1+FLAIR", help="What is taken away; repeatable. By default one pattern per count."),
    ] = None,
    beside: Beside = None,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """A figure of what was observed, the truth, the model and other methods, with how far each is off."""
    from copedit_training.evaluation.report import unplotted
    from copedit_training.evaluation.subjects import held_out
    from copedit_training.experiments import pictures as body

    check_writable(output)
    synthesizer = _load(model, device)
    patterns = body.wanted_patterns(synthesizer.config, missing or ())
    whom = held_out(synthesizer.config, data, subjects, first_seed, split)
    others, _ = _beside(beside or [], synthesizer, model, device)
    with counting("synthesising") as progress:
        report, rows = body.compare(synthesizer, whom, others, patterns, seed, progress)
    report |= {"model": model, "weights": synthesizer.weights}
    present(report, body.markdown(report), body.write_report(report, rows, output), as_json, unplotted())


@app.command()
def sweep(
    output: Output,
    steps: Annotated[str, typer.Option(metavar="5,10,20", help="The numbers of sampler steps to try.")],
    model: Model = "demo-brain",
    data: HeldOut = "phantom",
    subjects: Subjects = None,
    first_seed: FirstSeed = None,
    split: Split = None,
    patterns: Patterns = None,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Quality and time of every solver at several numbers of steps."""
    from copedit_training.evaluation import evaluate as body
    from copedit_training.evaluation.report import markdown, unplotted, write_report
    from copedit_training.evaluation.subjects import held_out

    counts = numbers(steps, "--steps") or []
    check_writable(output)
    synthesizer = _load(model, device)
    whom = held_out(synthesizer.config, data, subjects, first_seed, split)
    with counting("evaluating") as progress:
        report = body.sweep(synthesizer, whom, steps=counts, seed=seed, patterns=patterns, progress=progress)
    report |= {"model": model, "weights": synthesizer.weights}
    present(report, markdown(report), write_report(report, output), as_json, unplotted())


def _beside(
    runs: list[str], model: Synthesizer, name: str, device: str, **sampling: Any
) -> tuple[dict[str, Row], dict[str, Any]]:
    if not runs:
        return {}, {}
    from copedit_training.experiments import beside

    return beside.load(runs, model, name, device, **sampling)


def _load(model: str, device: str) -> Synthesizer:
    from copedit_rt.models import Models

    with Screen() as screen:
        return Models(model, device, listener=screen).load(model)


# ---------------------------------------------------------------------------------------------- experiments


@app.command()
def ablate(
    kind: Annotated[
        str, typer.Argument(metavar="prompts|injection|backbone|prior|identity|pretext", help="What is changed.")
    ],
    output: Output,
    preset: Annotated[str, typer.Option(help="Its model and its training settings are the reference.")] = "demo-brain",
    data: Annotated[str, typer.Option(metavar="phantom|DIR", help="What to train and to test on.")] = "phantom",
    subjects: Annotated[int, typer.Option(min=1, help="Held-out subjects to test on.")] = 16,
    override: Set = None,
    full: Full = False,
    runs: Annotated[int | None, typer.Option(min=1, help="Seeds a variant; by default 2, or 3 with --full.")] = None,
    fid_network: FidNetwork = None,
    fvd_network: FvdNetwork = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Train and compare variants of a preset's denoiser or tokenizer. Repeat the command to go on with what is left."""
    from copedit_rt.device import choose_device
    from copedit_training.evaluation.features import Networks
    from copedit_training.experiments import ablation, pretext

    if kind != "pretext" and kind not in ablation.VARIANTS:
        known = ", ".join((*ablation.VARIANTS, "pretext"))
        raise CopeditError(f"ablation {kind!r} is unknown; choose one of {known}")
    check_writable(output)
    if device != "auto" and any(item.startswith("device=") for item in override or ()):
        raise CopeditError(f"--device {device} beside --set device=...: give one of them")
    settings = [*(override or ()), *([] if device == "auto" else [f"device={device}"])]
    networks = Networks(fid_network, fvd_network, device=choose_device(device)) if fid_network or fvd_network else None
    shared: Any = {"data": data, "full": full, "runs": runs, "test_subjects": subjects, "networks": networks}
    if kind == "pretext":
        report = pretext.ablate(pretext.TokenizerExperiment(output, preset, settings, **shared))
        present(report, pretext.markdown(report), pretext.write_report(report, output), as_json)
        return
    experiment = ablation.DenoiserExperiment(output, preset, settings, **shared)
    report = ablation.ablate(cast("ablation.Ablation", kind), experiment)
    present(report, ablation.markdown(report), ablation.write_report(report, output), as_json)


@app.command()
def analyse(
    kind: Annotated[
        str, typer.Argument(metavar="gradcam|tsne|attention|corruption|intervention", help="What to look at.")
    ],
    output: Output,
    model: Model = "demo-brain",
    data: HeldOut = "phantom",
    subjects: Annotated[int, typer.Option(min=1, help="At most so many.")] = 16,
    first_seed: FirstSeed = None,
    split: Split = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """What the prompts of a model hold and what they do, with figures."""
    from copedit_training.experiments import analysis as body

    if kind not in body.ANALYSES:
        raise CopeditError(f"analysis {kind!r} is unknown; choose one of {', '.join(body.ANALYSES)}")
    check_writable(output)
    report = body.analyse(kind, model, output, subjects, device, data=data, first_seed=first_seed, split=split)
    present(report, body.markdown(report), body.write_report(report, output), as_json)


@app.command()
def segment(
    output: Output,
    model: Model = "demo-brain",
    data: Annotated[
        str, typer.Option(metavar="phantom|DIR", help="What to train and to test on, with segmentations of tumours.")
    ] = "phantom",
    beside: Beside = None,
    override: Set = None,
    full: Full = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """What synthesis is worth to a segmentation of tumours."""
    from copedit_training.experiments import segmentation as body

    budget = body.budget_of(full, override or ())
    check_writable(output)
    with counting("synthesising") as progress:
        report = body.compare(model, output, data, device, budget, progress, beside or ())
    present(report, body.markdown(report), body.write_report(report, output), as_json)


@app.command()
def network(
    kind: Annotated[str, typer.Argument(metavar="inception|i3d|medicalnet", help="Which network.")],
    weights: Annotated[Path, typer.Argument(metavar="FILE", help="Its published weights: .pth, .pt or .safetensors.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The TorchScript file to write.")],
) -> None:
    """Published weights to the file that --fid-network or --fvd-network takes; nothing is downloaded."""
    from copedit_training.evaluation import networks as body

    check_writable(output.parent)
    print(f"{output}: for {body.convert(kind, weights, output)}")


# ------------------------------------------------------------------------------------------------- training

Preset = Annotated[str, typer.Option(help="A preset: its model and its training settings.")]
Data = Annotated[
    str, typer.Option(metavar="phantom|labels:DIR|DIR", help="Phantoms, studies made of label maps, or a data set.")
]
Resume = Annotated[bool, flag("--resume", help="Go on with the run in the output folder.")]
Estimate = Annotated[bool, flag("--estimate", help="Only say how much memory of a GPU a step is expected to take.")]
Quick = Annotated[bool, flag("--quick", help="A few steps on a few subjects, to see that all works.")]


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


@train.command("method")
def train_method(
    name: Annotated[str, typer.Argument(help="mmgan, mmt, hyper-gae, ldm, controlnet, m2dn or diffm4ri.")],
    preset: Preset,
    output: Output,
    data: Data = "phantom",
    override: Set = None,
    resume: Resume = False,
    quick: Quick = False,
) -> None:
    """A method of the paper's tables, to be compared with (`copedit evaluate --beside`)."""
    from copedit_training.methods.fit import fit

    check_writable(output)
    folder = fit(name, preset, output, data, override or (), resume, quick=quick)
    if os.environ.get("RANK", "0") == "0":
        say(folder)


@train.command("prior")
def train_prior(
    preset: Preset,
    output: Output,
    tokenizer: Annotated[str, typer.Option(metavar="NAME_OR_FOLDER", help="The model whose tokenizer is taken.")],
    data: Data = "phantom",
    override: Set = None,
    resume: Resume = False,
) -> None:
    """A model of its prior alone, in minutes: fitted, and not corrected until stage II has trained a denoiser."""
    from copedit_training.stages import trainer

    check_writable(output)
    say(trainer.fit_prior_alone(preset, output, data, tokenizer, override or (), resume))


@train.command("check-data")
def train_check_data(
    data: Annotated[Path, typer.Option(metavar="FOLDER", help="The data set.")],
    preset: Preset,
    deep: Annotated[bool, flag("--deep", help="Read every voxel, not only headers and sizes.")] = False,
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
    with counting("checking") as progress:
        report = layouts.check(found, config, deep=deep, progress=progress)
    if output:
        write_atomically(output, (json.dumps(report, indent=2) + "\n").encode())
    if as_json:
        print_json(report)
    else:
        say(layouts.render(report))
    if not report["studies"]:
        raise typer.Exit(1)


@train.command("check-simulation")
def train_check_simulation(
    studies: Annotated[Path, typer.Argument(metavar="FOLDER", help="Real studies of brains whose skull is off.")],
    data: Annotated[str, typer.Option(metavar="labels:DIR", help="The label maps that are simulated from.")],
    preset: Preset = "brain-2mm",
    count: Annotated[int, typer.Option("--simulated", min=20, help="How many studies to simulate.")] = 60,
) -> None:
    """Where real studies lie among simulated ones: quantiles, tissue ratios, correlations. Exit code 1 if one lies
    outside 5 to 95 % of the simulated ones."""
    from copedit_rt.config import ModelConfig
    from copedit_training.data import reality
    from copedit_training.data.prepared import Labels

    config = ModelConfig.preset(preset)
    labels = Labels.of(data, config)
    if labels is None:
        raise CopeditError(f"--data {data}: give label maps to simulate from, as labels:FOLDER")
    with counting("simulating") as progress:
        rows, names, left_out = reality.check(studies, labels, config, count, progress)
    for sentence in left_out:
        say(sentence)
    say(reality.table(rows, names))
    inside = sum(row.inside() for row in rows)
    say(f"{inside} of {len(rows)} measures lie within 5 to 95 % of the simulated ones, in every study")
    if inside < len(rows):
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
        if idle := "--resume" * resume or f"--data {data}" * (data != "phantom"):
            raise CopeditError(f"{idle}: --estimate starts nothing and reads no data; leave one of them out")
        say(trainer.expected(stage, preset, override or (), quick))
        return
    check_writable(output)
    options: dict[str, Any] = {"preset": preset, "output": output, "data": data, "overrides": override or ()}
    options["resume"] = resume
    folder = trainer.run(stage, **options, quick=quick)
    if os.environ.get("RANK", "0") == "0":  # of torchrun's processes, the first one speaks
        say(folder)
