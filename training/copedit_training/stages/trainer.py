"""The loop of both stages: it can be stopped anywhere and goes on exactly where it was.

A step is the mean over `accumulate` micro-batches, one after the other in one process or spread over those of torchrun.
"""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import numpy as np
import torch
from rich.console import Console
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from copedit_rt import checkpoint
from copedit_rt.config import ModelConfig
from copedit_rt.errors import CopeditError, Stopped
from copedit_rt.images.find import find_studies
from copedit_rt.networks.denoiser import build_denoiser
from copedit_rt.networks.precision import tried_convolutions
from copedit_rt.networks.tokenizer import CoPeVAE
from copedit_rt.prior import PRIOR
from copedit_rt.terminal import finite
from copedit_rt.trained import TrainedOn
from copedit_training.data import layouts
from copedit_training.data.patients import read_patients
from copedit_training.data.prepared import (
    Labels,
    folder_images,
    heart_centres,
    phantom_images,
    simulated_images,
    study_names,
    watched_images,
)
from copedit_training.stages import distributed, memory, prior
from copedit_training.stages.checkpoints import claim, cut_log, finished, restore, store
from copedit_training.stages.denoiser_task import DenoiserTask, check
from copedit_training.stages.progress import counted, shown, terminal
from copedit_training.stages.settings import (
    DenoiserSettings,
    MethodSettings,
    Settings,
    Stage,
    TokenizerSettings,
    load_settings,
)
from copedit_training.stages.step import Optimization, Share, ahead, clip, gradients, learning_rate
from copedit_training.stages.task import Task, Terms
from copedit_training.stages.tokenizer_task import TokenizerTask, check_prior

PRIORS = "seed", "subjects", "patients", "patients_share", "phantoms_share", "prior_steps"  # what a prior goes by
_AGAIN = "repeat the command with --resume to go on (ablate: as it is)"
PHANTOMS = "simulated phantoms"
KNOWN = 200  # training subjects whose grey values the model remembers
Source = layouts.DataSet | Labels | None  # None: phantoms


@contextmanager
def _resumable() -> Iterator[None]:
    """Inside, Ctrl-C says how the run goes on."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise Stopped(f"SIGINT: stopped; {_AGAIN}", signal.SIGINT) from error


def run(
    stage: Stage,
    preset: str,
    output: Path,
    data: str = "phantom",
    overrides: Sequence[str] = (),
    resume: bool = False,
    config: ModelConfig | None = None,
    quick: bool = False,
) -> Path:
    """Train one stage, alone or as one of torchrun's processes, and return the model folder `output/model`.

    data: "phantom", "labels:FOLDER" (`Labels`) or the folder of a data set, see `layouts.find`. config replaces the
    preset's model (its training settings stay). quick: see `load_settings`. Raises CopeditError for bad settings,
    unusable data, an output folder in use, or a loss that is not finite; Stopped after SIGTERM or SIGINT, with a
    checkpoint of the step under way.
    """
    settings = load_settings(stage, preset, overrides, quick)
    config = config or ModelConfig.preset(preset)
    check_subjects(data, overrides)
    with distributed.processes(settings.device):
        return _run(preset, output, data, settings, resume, config, settings.subjects if quick else None)


@_resumable()
def fit_prior_alone(
    preset: str,
    output: Path,
    data: str,
    tokenizer: str,
    overrides: Sequence[str] = (),
    resume: bool = False,
    config: ModelConfig | None = None,
) -> Path:
    """A model of its prior alone, in `output/model`, which is returned: the tokenizer of a model that is there, the
    prior fitted to the training images, and a denoiser that corrects nothing, until stage II has trained one.

    data, resume, config: as in `run`; overrides: of the settings of stage I that are in `PRIORS`. Raises CopeditError
    for another setting, a preset without a prior, another tokenizer than the preset's, unusable data, and an output
    folder in use.
    """
    settings, config = load_settings("tokenizer", preset, overrides), config or ModelConfig.preset(preset)
    if not config.denoiser.prior:
        raise CopeditError(f"preset {preset}: its models have no prior; choose one that does, such as heart-3mm")
    able = PRIORS[:2] if config.task.joint else PRIORS
    for item in overrides:
        if item.partition("=")[0] not in able:
            raise CopeditError(f"--set {item}: the prior of {preset} does not go by it; it goes by {', '.join(able)}")
    check_subjects(data, overrides)
    check_prior(config, settings)
    patients = read_patients(Path(settings.patients), config) if settings.patients else ()
    vae, digest = load_tokenizer(preset, config, tokenizer)
    found, console = source(data, config), terminal()
    claim(output, describe(settings, config, data, found, {"tokenizer": digest}) | {"stage": "prior"}, resume)
    images = _images(config, settings, found, output, console)
    words = trained_words(found, settings, config, len(images))
    perception = _perceives(tokenizer, words)
    phantoms = prior.phantoms_of(config, settings)
    prior.fit(config, settings, images, heart_centres(output), patients, phantoms).save(output / "model")
    torch.manual_seed(settings.seed)
    alone = config.prior_alone()
    checkpoint.save(output / "model", alone, tokenizer=vae)
    checkpoint.save(output / "model", alone, denoiser=build_denoiser(config), dtype=torch.float16)
    trained_on(words, config, images, perception).save(output / "model")
    return output / "model"


def expected(stage: Stage, preset: str, overrides: Sequence[str] = (), quick: bool = False) -> str:
    """What a step of this run is expected to need of a GPU's memory, as text. Raises CopeditError as `run` does."""
    settings, config = load_settings(stage, preset, overrides, quick), ModelConfig.preset(preset)
    return memory.render(memory.estimate(config, settings), settings)


def _run(
    preset: str, output: Path, data: str, settings: Settings, resume: bool, config: ModelConfig, most: int | None
) -> Path:
    found = source(data, config)
    make, taken = _checked(preset, settings, config, output)
    described = describe(settings, config, data, found, taken)
    return carry_out(described, output, settings, config, found, make, resume, most)


def describe(
    settings: Settings, config: ModelConfig, data: str, found: Source, taken: Mapping[str, str]
) -> dict[str, Any]:
    """What `run.json` says of a run; taken: SHA-256 of the "tokenizer" and "prior" that it takes from a model."""
    own = dataclasses.asdict(settings)
    described: dict[str, Any] = {"stage": settings.stage, "settings": own, "model": config.to_dict()}
    if found:
        described["data"] = f"labels:{found.folder}" if isinstance(found, Labels) else str(Path(data).resolve())
    return {**described, **taken}


@_resumable()
def carry_out(
    described: dict[str, Any],
    output: Path,
    settings: Settings,
    config: ModelConfig,
    found: Source,
    make: Callable[[np.ndarray], Task[Any, Any]],
    resume: bool,
    most: int | None = None,
) -> Path:
    """A run whose settings have been checked: claim the folder, prepare images (most: of a data set's studies at most
    so many), make the task of them, and train."""
    console = terminal()
    console.print_json(data=described["settings"])
    for sentence in settings.too_late():
        console.print(sentence, highlight=False, soft_wrap=True)
    with distributed.first():
        if not distributed.rank():
            claim(output, described, resume)
    if resume and finished(output, settings.stage, settings.steps, config.denoiser.prior):
        console.print(f"{output}: finished before, nothing is left to do", highlight=False)
        return output / "model"
    with distributed.first():
        images = _images(config, settings, found, output, console, most)
    words = trained_words(found, settings, config, len(images))  # now: at the end its folders may be gone
    perception = _perceives(getattr(settings, "tokenizer", ""), words)
    with distributed.first():
        task = make(images)
    held_out = None
    if settings.validate_every:
        with distributed.first():
            held_out = watched_images(config, found, output, settings.validate_subjects)
        if not len(held_out):
            console.print("no validation: there are too few held-out subjects that can be used", highlight=False)
            held_out = None
    if isinstance(task, TokenizerTask) and not task.perceptual:
        console.print("no perceptual term: no weights are named (--set perceptual=FILE)", highlight=False)
    model = fit(settings.stage, output, task, resume, held_out, console)
    if not distributed.rank():
        trained_on(words, config, images, perception).save(model)
    return model


def trained_words(found: Source, settings: Settings, config: ModelConfig, studies: int) -> str:
    """What a model says that it was trained on, as a part of a sentence: the source, and of stage II what its tokenizer
    says. studies: how many of a data set. Raises CopeditError where the tokenizer or the patients are not there."""
    origin = PHANTOMS
    if isinstance(found, Labels):
        origin = "contrasts simulated from label maps"
    elif found is not None:
        published = ", ".join(sorted({entry.layout for entry in found.studies} - {"other"}))
        origin = f"{studies} studies of a data set" + (f" ({published})" if published else "")
    parts = [origin]
    if isinstance(settings, TokenizerSettings):
        parts += ["phantoms"] if settings.phantoms_share and found is not None else []
        parts += [f"{len(find_studies(settings.patients, task=config.task))} patients"] if settings.patients else []
    words = " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))
    if isinstance(settings, DenoiserSettings | MethodSettings) and settings.tokenizer:
        first = TrainedOn.load(checkpoint.locate(settings.tokenizer))
        if first and first.words != words:
            words = first.words if first.words.startswith(words) else f"{words}, its tokenizer on {first.words}"
    return words


def _perceives(tokenizer: str, words: str) -> str:
    """What the tokenizer of a model was trained on where that is phantoms alone, and `words` say more of the model."""
    first = TrainedOn.load(checkpoint.locate(tokenizer)) if tokenizer else None
    if first is None:
        return ""
    return first.perception or (PHANTOMS if first.words == PHANTOMS != words else "")


def trained_on(words: str, config: ModelConfig, images: np.ndarray, perception: str) -> TrainedOn:
    """What a model holds of its training: these words, what its perception was trained on where that is less, and the
    quantiles of the first `KNOWN` training images."""
    return TrainedOn.of(words, config.elements, (x.astype(np.float32) for x in images[:KNOWN]), perception)


def check_subjects(data: str, overrides: Sequence[str]) -> None:
    """Raises CopeditError where a number of simulated subjects is set beside a data set."""
    given = [item for item in overrides if item.partition("=")[0] == "subjects"]
    if given and data != "phantom" and not data.startswith("labels:"):
        raise CopeditError(f"--set {given[0]}: is of simulated subjects, not of --data {data}; leave it out")


def source(data: str, config: ModelConfig) -> Source:
    """What `data` names, see `run`; raises CopeditError for a folder that holds nothing of the kind."""
    labels = Labels.of(data, config)
    return labels if labels or data == "phantom" else layouts.find(Path(data), config)


def load_tokenizer(preset: str, config: ModelConfig, model: str) -> tuple[CoPeVAE, str]:
    """The tokenizer of a model, and the SHA-256 of its weights; CopeditError if it is not one of the preset's kind."""
    trained, tokenizer, digest = checkpoint.load_tokenizer(checkpoint.locate(model))
    if (trained.tokenizer, trained.elements, trained.image) != (config.tokenizer, config.elements, config.image):
        raise CopeditError(f"{model}: its tokenizer is not the one of preset {preset}; train stage I again")
    return tokenizer, digest


def get_ready(settings: Settings) -> None:
    """Seed what draws weights. Raises CopeditError where the processes cannot share the micro-batches."""
    if settings.accumulate % (world := distributed.world()):
        raise CopeditError(
            f"accumulate = {settings.accumulate}: {world} processes cannot share so many micro-batches; set a multiple "
            f"of {world} (a step takes accumulate x batch_size subjects, however many processes there are)"
        )
    torch.manual_seed(settings.seed)


def _checked(
    preset: str, settings: Settings, config: ModelConfig, output: Path
) -> tuple[Callable[[np.ndarray], Task[Any, Any]], dict[str, str]]:
    """What makes a task of its images, and the SHA-256 of what stage II takes from stage I; all that can be wrong
    without the images raises CopeditError now."""
    get_ready(settings)
    if isinstance(settings, TokenizerSettings):
        task = TokenizerTask(config, settings)
        return lambda images: task.on(images, heart_centres(output)), {}
    assert isinstance(settings, DenoiserSettings)
    check(config, settings)
    if not settings.tokenizer:
        raise CopeditError("the denoiser needs its tokenizer: add --set tokenizer=FOLDER (stage I's RUN/model)")
    tokenizer, digest = load_tokenizer(preset, config, settings.tokenizer)
    folder = checkpoint.locate(settings.tokenizer)
    given = checkpoint.load_prior(folder, config)
    taken = {"tokenizer": digest} | checkpoint.digests(folder, (PRIOR,) if given else ())
    return lambda images: DenoiserTask(config, settings, images, tokenizer, output / "latents.npy", given), taken


def _images(
    config: ModelConfig, settings: Settings, found: Source, output: Path, console: Console, most: int | None = None
) -> np.ndarray:
    """The training images, prepared or from an earlier start; of a data set at most so many."""
    with _ended_by_sigterm(), counted("preparing images", "subject") as progress:
        if isinstance(found, Labels):
            return simulated_images(config, found, settings.subjects, output / "simulated.npy", progress)
        if found is None:
            return phantom_images(config, settings.subjects, output / "phantom.npy", progress)
        say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
        return folder_images(config, found, output, progress, say, most)


def fit(
    stage: str, output: Path, task: Task[Any, Any], resume: bool, held_out: np.ndarray | None, console: Console
) -> Path:
    """Train a task to the end, from its newest checkpoint where it resumes; returns the model folder."""
    optimization, start = Optimization(task), 0
    if resume and (kept := restore(output)):
        start, tensors, state = kept
        where = output / f"checkpoint-{start:08d}"
        checkpoint.fill(task.module, tensors, where / "task.safetensors")
        optimization.load(state, where / "optimizer.safetensors")
    if not distributed.rank():
        cut_log(output / "log.jsonl", start)
    _loop(stage, output, task, optimization, start, held_out, console)
    if not distributed.rank():
        if held_out is not None and (words := task.settle(held_out)):
            console.print(words, highlight=False)
        task.export(output / "model")
    distributed.wait()
    return output / "model"


def _loop(
    stage: str,
    output: Path,
    task: Task[Any, Any],
    optimization: Optimization,
    start: int,
    held_out: np.ndarray | None,
    console: Console,
) -> None:
    """Steps from `start` to the end, with the log, validation and checkpoints.

    Raises CopeditError for what is not finite and, all saved, Stopped after a signal.
    """
    settings, writes = task.settings, not distributed.rank()
    share = settings.accumulate // distributed.world()
    parts = range(distributed.rank() * share, (distributed.rank() + 1) * share)
    model: nn.Module = task.module
    if distributed.world() > 1:
        model = DistributedDataParallel(task.module, find_unused_parameters=task.sparse)
    wanted = ((step, part) for step in range(start, settings.steps) for part in parts)
    with (
        shown(console, stage, "step", start) as advance,
        tried_convolutions(),
        _Signals() as signals,
        closing(ahead(task.draw, wanted)) as batches,  # type: ignore[type-var]
        _Log(output, start, settings.steps, console) if writes else nullcontext() as log,
    ):
        for step in range(start, settings.steps):
            began, worked, done = time.perf_counter(), time.process_time(), step + 1
            optimization.set_rate(learning_rate(settings, step))
            terms, shares = gradients(task, model, islice(batches, share), optimization.scaler)
            optimization.unscale()
            norm, adverse = clip(task)
            if not math.isfinite(terms["loss"]) or not (math.isfinite(norm + adverse) or optimization.overflowed):
                _leave(_not_finite(step, norm + adverse, shares, study_names(output)))
            optimization.step()
            terms |= task.after_step(step) | {
                "gradient": norm,
                "seconds": time.perf_counter() - began,
                "processor_seconds": time.process_time() - worked,  # what others do on the machine is not in it
            }
            if log:
                picture = None
                if held_out is not None and done % settings.validate_every == 0:
                    measured, picture = task.validate(held_out)
                    terms |= measured
                log.write(step, terms, picture)
            advance(done, settings.steps, " ".join(f"{k} {v:.3g}" for k, v in terms.items()))
            stop = signals.agreed(task.device)
            if writes and (done % settings.checkpoint_every == 0 or done == settings.steps or stop):
                store(
                    output, done, {"task": task.module.state_dict(), "optimizer": optimization.state()}, settings.keep
                )
            if stop and done < settings.steps:
                distributed.wait()
                name = signal.Signals(stop).name
                _leave(Stopped(f"{name}: stopped after step {step}, and all is saved; {_AGAIN}", stop))


class _Log:
    """log.jsonl and, where it is installed, TensorBoard, which hides what an interrupted run wrote from step `start`
    on; a line is a step. A context."""

    def __init__(self, output: Path, start: int, steps: int, console: Console):
        self.every = max(1, steps // 10_000)  # of the curves on the board
        self.board: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(output / "tensorboard"), purge_step=start)
        except ImportError:
            console.print("no TensorBoard: install the extra `train`; log.jsonl has all figures", highlight=False)
        self.file = open(output / "log.jsonl", "a", buffering=1, encoding="utf-8")

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()
        if self.board:
            self.board.close()

    def write(self, step: int, terms: Terms, picture: np.ndarray | None) -> None:
        rounded = {name: float(f"{value:.6g}") for name, value in terms.items()}
        self.file.write(json.dumps(finite({"step": step} | rounded), allow_nan=False) + "\n")
        if not self.board:
            return
        if picture is not None:
            self.board.add_image("validation/truth above result", picture, step, dataformats="HW")
        for name, value in terms.items():
            if step % self.every == 0 or name.startswith("val_"):
                self.board.add_scalar(name.replace("val_", "validation/"), value, step)


def _not_finite(step: int, norm: float, shares: list[Share], names: Sequence[str]) -> CopeditError:
    """The sentence for a loss or gradient that is not finite: which terms, and the subjects of the micro-batches."""
    guilty = [share for share in shares if not share.finite]
    every: list[Share] = [share for part in distributed.every_object(guilty or shares) for share in part]  # type: ignore[attr-defined]
    every = [share for share in every if not share.finite] or every
    culprits = [f"{name} {value}" for name, value in every[0].terms.items() if not math.isfinite(value)]
    subjects = sorted({names[row] if names else f"subject {row}" for share in every for row in share.subjects})
    return CopeditError(
        f"step {step}: {', '.join(culprits) or f'gradient {norm}'} on {', '.join(subjects)}; look at these images, or "
        f"start again with a lower lr"
    )


def _leave(error: CopeditError) -> NoReturn:
    """What all processes have found at the same time, process 0 says."""
    if distributed.rank():
        raise SystemExit(error.exit_code)
    raise error


class _Signals:
    """Inside, the first SIGTERM or SIGINT is only noted, so that the step can be finished and saved."""

    def __init__(self) -> None:
        self.noted = 0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            self.before = {n: signal.signal(n, self._note) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.noted = number
        if distributed.world() == 1:  # torchrun passes on what a terminal has sent to all already
            self.__exit__()

    def agreed(self, device: torch.device) -> int:
        """The signal that some process has got, for all; 0 if there was none."""
        every = distributed.gather(torch.tensor([self.noted], device=device))
        return int(every.max())


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Inside, SIGTERM ends what is under way as Ctrl-C does, so that nothing half done is left behind."""

    def end(number: int, frame: FrameType | None) -> NoReturn:
        raise Stopped(f"SIGTERM: stopped while images were prepared; {_AGAIN}", number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
