"""The loop of both stages: it can be stopped anywhere and goes on exactly where it was.

A step is the mean over `accumulate` micro-batches, one after the other in one process or spread over those of torchrun.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import threading
import time
from collections.abc import Sequence
from contextlib import closing, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from copedit_rt import checkpoint
from copedit_rt.config import ModelConfig
from copedit_rt.errors import CopeditError, Stopped
from copedit_training.data import layouts
from copedit_training.data.prepared import folder_images, held_out_images, phantom_images, study_names
from copedit_training.stages import distributed, memory
from copedit_training.stages.checkpoints import claim, restore, store
from copedit_training.stages.denoiser_task import DenoiserTask
from copedit_training.stages.settings import Settings, Stage, load_settings
from copedit_training.stages.step import (
    Share,
    ahead,
    clip,
    gradients,
    learning_rate,
    optimizers_of,
    set_learning_rate,
)
from copedit_training.stages.task import Task
from copedit_training.stages.tokenizer_task import TokenizerTask


def run(
    stage: Stage,
    preset: str,
    output: Path,
    data: str = "phantom",
    overrides: Sequence[str] = (),
    resume: bool = False,
    config: ModelConfig | None = None,
) -> Path:
    """Train one stage, alone or as one of torchrun's processes, and return the model folder `output/model`.

    data: "phantom" or the folder of a data set, see `layouts.find`. config replaces the preset's model (its training
    settings stay). Raises CopeditError for bad settings, unusable data, an output folder in use, or a loss that is not
    finite; Stopped after SIGTERM or SIGINT, with a checkpoint of the step that was under way.
    """
    settings = load_settings(stage, preset, overrides)
    config = config or ModelConfig.preset(preset)
    with distributed.processes(settings.device):
        return _run(stage, preset, output, data, settings, resume, config)


def expected(stage: Stage, preset: str, overrides: Sequence[str] = ()) -> str:
    """What a step of this run is expected to need of a GPU's memory, as text. Raises CopeditError as `run` does."""
    settings, config = load_settings(stage, preset, overrides), ModelConfig.preset(preset)
    return memory.render(memory.estimate(config, settings), settings)


def _run(
    stage: Stage, preset: str, output: Path, data: str, settings: Settings, resume: bool, config: ModelConfig
) -> Path:
    world = distributed.world()
    if settings.accumulate % world:
        raise CopeditError(
            f"accumulate = {settings.accumulate}: {world} processes cannot share so many micro-batches; set a multiple "
            f"of {world} (a step takes accumulate x batch_size subjects, however many processes there are)"
        )
    found = None if data == "phantom" else layouts.find(Path(data), config)
    described: dict[str, Any] = {"stage": stage, "settings": dataclasses.asdict(settings), "model": config.to_dict()}
    if found:
        described["data"] = str(Path(data).resolve())
    console = Console(stderr=True, quiet=distributed.rank() > 0)
    console.print_json(data=described["settings"])

    torch.manual_seed(settings.seed)
    with distributed.first(), _progress(console) as bar:
        if not distributed.rank():
            claim(output, described, resume)
        drawing = bar.add_task("preparing images", total=None, note="")

        def advance(done: int, total: int) -> None:
            bar.update(drawing, completed=done, total=total)

        if found:
            say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
            images = folder_images(config, found, output, advance, say)
        else:
            images = phantom_images(config, settings.subjects, output / "phantom.npy", advance)
    task: Task[Any, Any]
    if stage == "tokenizer":
        task = TokenizerTask(config, settings, images)
    else:
        if not settings.tokenizer:
            raise CopeditError("the denoiser needs its tokenizer: add --set tokenizer=FOLDER (stage I's RUN/model)")
        trained, tokenizer, _ = checkpoint.load_tokenizer(checkpoint.locate(settings.tokenizer))
        if (trained.tokenizer, trained.elements, trained.image) != (config.tokenizer, config.elements, config.image):
            raise CopeditError(
                f"{settings.tokenizer}: its tokenizer is not the one of preset {preset}; train stage I again"
            )
        with distributed.first():
            prior = checkpoint.load_prior(checkpoint.locate(settings.tokenizer), config)
            task = DenoiserTask(config, settings, images, tokenizer, output / "latents.npy", prior)

    held_out = None
    if settings.validate_every:
        with distributed.first():
            held_out = held_out_images(config, found, output, settings.validate_subjects)
        if not len(held_out):
            console.print("no validation: none of the held-out subjects can be used", highlight=False)
            held_out = None
    if stage == "tokenizer" and not settings.perceptual:
        console.print("no perceptual term: no weights are named (--set perceptual=FILE)", highlight=False)
    return fit(stage, output, task, resume, held_out, console)


def fit(
    stage: str, output: Path, task: Task[Any, Any], resume: bool, held_out: np.ndarray | None, console: Console
) -> Path:
    """Train a task to the end, from its newest checkpoint where it resumes; returns the model folder."""
    optimizers = optimizers_of(task)
    start = restore(output, task.module, optimizers) if resume else 0
    _loop(stage, output, task, optimizers, start, held_out, console)
    if not distributed.rank():
        task.export(output / "model")
    distributed.wait()
    return output / "model"


def _loop(
    stage: str,
    output: Path,
    task: Task[Any, Any],
    optimizers: Sequence[torch.optim.Optimizer],
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
    path = output / "log.jsonl" if writes else Path(os.devnull)
    with (
        _progress(console) as bar,
        _Signals() as signals,
        closing(ahead(task.draw, wanted)) as batches,
        open(path, "a", buffering=1, encoding="utf-8") as log,
        _board(output / "tensorboard", start, console) if writes else nullcontext() as board,
    ):
        shown = bar.add_task(stage, total=settings.steps, completed=start, note="")
        for step in range(start, settings.steps):
            began = time.perf_counter()
            set_learning_rate(optimizers, learning_rate(settings, step))
            terms, shares = gradients(task, model, islice(batches, share))
            norm = clip(task)
            if not (math.isfinite(terms["loss"]) and math.isfinite(norm)):
                _leave(_not_finite(step, norm, shares, study_names(output)))
            for optimizer in optimizers:
                optimizer.step()
            terms |= task.after_step(step) | {"gradient": norm, "seconds": time.perf_counter() - began}
            if held_out is not None and (step + 1) % settings.validate_every == 0 and writes:
                found, picture = task.validate(held_out)
                terms |= found
                if board:
                    board.add_image("validation/truth above result", picture, step, dataformats="HW")
            for name, value in terms.items():
                if board and (step % max(1, settings.steps // 10_000) == 0 or name.startswith("val_")):
                    board.add_scalar(name.replace("val_", "validation/"), value, step)
            log.write(json.dumps({"step": step} | {k: float(f"{v:.6g}") for k, v in terms.items()}) + "\n")
            bar.update(shown, advance=1, note=" ".join(f"{k} {v:.3g}" for k, v in terms.items()))
            stop = signals.agreed(task.device)
            if (step + 1) % settings.checkpoint_every == 0 or step + 1 == settings.steps or stop:
                if writes:
                    store(output, step + 1, task.module, optimizers, settings.keep)
            if stop and step + 1 < settings.steps:
                distributed.wait()
                name = signal.Signals(stop).name
                _leave(Stopped(f"{name}: stopped after step {step}, and all is saved; go on with --resume", stop))


def _board(folder: Path, start: int, console: Console) -> Any:
    """Context of TensorBoard's writer, which hides what an interrupted run wrote from step `start` on; of None where
    there is no TensorBoard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        console.print("no TensorBoard: install the extra `train`; log.jsonl has all figures", highlight=False)
        return nullcontext()
    return SummaryWriter(str(folder), purge_step=start)


def _not_finite(step: int, norm: float, shares: list[Share], names: Sequence[str]) -> CopeditError:
    """The sentence for a loss or gradient that is not finite: which terms, and the subjects of the micro-batches."""
    guilty = [share for share in shares if not share.finite]
    every: list[Share] = [share for part in distributed.every_object(guilty or shares) for share in part]  # type: ignore[attr-defined]
    every = [share for share in every if not share.finite] or every
    culprits = [f"{name} {value}" for name, value in every[0].terms.items() if not math.isfinite(value)]
    subjects = sorted({names[row] if names else f"phantom {row}" for share in every for row in share.subjects})
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


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, TextColumn("{task.fields[note]}"), console=console, disable=console.quiet)
