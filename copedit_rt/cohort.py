"""Many studies: what is missing from each, written beside one another. What `copedit synth` does."""

from __future__ import annotations

import os
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import copedit_rt
from copedit_rt import summary
from copedit_rt.changes import changes, of_another, request
from copedit_rt.config import ModelConfig
from copedit_rt.engines.engine import TORCHLESS, choose_engine
from copedit_rt.errors import CopeditError, by_name, failure
from copedit_rt.files import check_writable, is_file, sweep
from copedit_rt.images import bids
from copedit_rt.images.find import StudyFiles, find_studies
from copedit_rt.images.names import targets
from copedit_rt.images.nifti import is_synthetic
from copedit_rt.images.prepare import complete_brain, complete_stack
from copedit_rt.images.study import Study, complete_sidecar, withdraw
from copedit_rt.listener import Listener
from copedit_rt.models import Models, UnusableModel
from copedit_rt.synthesizer import Result
from copedit_rt.task import Task

OUTCOMES = ("written", "kept", "complete", "failed")  # complete: nothing is missing


def synthesise(
    inputs: Sequence[Path],
    output: Path,
    *,
    explicit: Mapping[str, Path] | None = None,
    task: Task | None = None,
    select: Sequence[str] = (),
    labels: Mapping[str, Sequence[str]] | None = None,
    model: str | None = None,
    target: str = "all",
    steps: int | None = None,
    seed: int = 0,
    samples: int = 1,
    solver: str | None = None,
    detail: bool | None = None,
    device: str = "auto",
    engine: str = "auto",
    dtype: str = "auto",
    max_memory: int | None = None,
    overwrite: bool = False,
    resample: bool = False,
    preview: bool = False,
    report: bool = False,
    dicom: bool = True,
    missing_slices: Sequence[int] | None = None,
    shard: tuple[int, int] = (0, 1),
    listener: Listener | None = None,
) -> dict[str, Any]:
    """Synthesise what is missing from every study in `inputs`, files below `output`; the summary is JSON-able.

    inputs, explicit, task, select and labels are those of `find_studies`; model, device, engine, dtype and max_memory
    those of `Models`; steps, seed, samples, solver and detail those of `Synthesizer.synthesize`; missing_slices and
    resample those of `Study.read`. target: "all", or elements as in "t1,flair". overwrite: replace also outputs that
    are there and complete (`complete_sidecar`), which are kept otherwise, with a note on what has changed since
    (`changes`), and, where there is no target, in the end remove those of a modality that the study has by now
    (`Job.clear`). preview: also write a PNG per study; report: a page per study that a browser opens, and of several an
    index.html. dicom: of DICOM studies also write each image as a derived series (`Study.write`).

    A study that fails, for whatever reason, is told in one sentence and does not stop the others; if it is the only one
    its CopeditError is raised, and so is that of a model that cannot be used. While one is computed, the next study is
    read and the one before written. shard: (i, n), every n-th study from the i-th on, counted from 0 or from 1: n of n
    is 0 of n. Of several processes (RANK and WORLD_SIZE in the environment, as torchrun sets them) each takes every
    WORLD_SIZE-th study of the shard, and in turn a GPU (LOCAL_RANK). Of several studies, `summary` keeps the entries in
    the output folder.
    """
    listener = listener or Listener()
    elements = targets(target)
    check_writable(output)
    found = find_studies(inputs, explicit, task=task, select=select, labels=labels)
    if found.dataset:
        bids.derivative(output, found.dataset, copedit_rt.__version__)
    sweep(output)
    rank, world = _process()
    (first, shards), several = shard, len(found) > 1
    mine = found[first % shards :: shards][rank::world]
    listener.found(found, len(mine))
    where = _own_device(device, world, engine)
    models = Models(model, where, max_memory=max_memory, engine=engine, dtype=dtype, listener=listener)
    sampler: dict[str, Any] = {"steps": steps, "seed": seed, "samples": samples, "solver": solver, "detail": detail}
    sampler["progress"] = listener.step
    reading = {"missing_slices": missing_slices, "resample": resample}
    job = Job(output, models, elements, overwrite, preview, report, several, reading, sampler, listener, dicom)
    entries = job.run(mine)
    counts = Counter(entry["status"] for entry in entries)
    if several:
        summary.keep(entries, output, rank * shards + first % shards, shards * world)
    if counts["complete"] == len(found):
        raise CopeditError(
            f"nothing is missing in any of the {len(entries)} studies, so there is nothing to synthesise"
        )
    if several and report:
        from copedit_rt.report import page

        page.index(summary.gather(output).values(), output / "index.html")
    return {name: counts[name] for name in OUTCOMES} | {"studies": entries, "passed_over": found.reasons()}


def survey(
    inputs: Sequence[Path],
    output: Path,
    *,
    explicit: Mapping[str, Path] | None = None,
    task: Task | None = None,
    select: Sequence[str] = (),
    labels: Mapping[str, Sequence[str]] | None = None,
    model: str | None = None,
    target: str = "all",
) -> list[dict[str, Any]]:
    """What became of every study of a cohort (`summary.judge`), whoever worked on it. Options: see `synthesise`."""
    elements = targets(target)
    found = find_studies(inputs, explicit, task=task, select=select, labels=labels)
    job = Job(output, Models(model, "cpu"), elements, False, False, False, True, {}, {}, Listener())
    there = []
    for files in found:
        opened = Opened(files, {"study": files.name, "task": files.task, "status": "failed"})
        try:
            job.look_ahead(opened)
        except CopeditError as error:
            opened.entry["error"] = str(error)
        there.append(opened.entry | ({"error": files.problem} if files.problem else {}))
    return summary.judge(there, output)


@dataclass
class Opened:
    """A study as far as it goes without computing: what its entry holds so far, and what went wrong.

    study: None where there is nothing to compute. todo: the elements to write, None for all.
    """

    files: StudyFiles
    entry: dict[str, Any]
    study: Study | None = None
    todo: list[str] | None = None
    error: CopeditError | None = None


@dataclass(frozen=True)
class Job:
    """What all studies of a cohort share. several: the cohort has more than one study.

    target: elements, None for all. reading: options of `Study.read`. sampler: those of `Synthesizer.synthesize`.
    """

    output: Path
    models: Models
    target: Sequence[str] | None
    overwrite: bool
    preview: bool
    report: bool
    several: bool
    reading: Mapping[str, Any]
    sampler: Mapping[str, Any]
    listener: Listener
    dicom: bool = True

    def run(self, studies: Sequence[StudyFiles]) -> list[dict[str, Any]]:
        """The studies' entries. While the device computes, the next study is read and the one before is written."""
        entries = []
        with ThreadPoolExecutor(1, "read") as reader, ThreadPoolExecutor(1, "write") as writer:
            ahead = deque(reader.submit(self.open, files) for files in studies[:1])
            behind: deque[Callable[[], dict[str, Any]]] = deque()
            for number, files in enumerate(studies):
                self.listener.began(files.name)
                start = time.perf_counter()
                opened = ahead.popleft().result()
                if number + 1 < len(studies):
                    ahead.append(reader.submit(self.open, studies[number + 1]))
                result = self.attempt(opened)
                behind.append(partial(self.ended, writer.submit(self.finish, opened, result), start))
                while len(behind) > bool(result):  # where nothing is written, nothing is waited for
                    entries.append(behind.popleft()())
            entries += [outcome() for outcome in behind]
        return entries

    def ended(self, writing: Future[tuple[dict[str, Any], CopeditError | None]], start: float) -> dict[str, Any]:
        """The entry of a study, once it is written."""
        entry, error = writing.result()
        entry["seconds"] = round(time.perf_counter() - start, 3)
        self.listener.ended(entry, error)
        return entry

    def open(self, files: StudyFiles) -> Opened:
        """Choose the model, see what there is to do, and read the files."""
        opened = Opened(files, {"study": files.name, "task": files.task, "status": "failed"})
        try:
            if self.look_ahead(opened):
                study = Study.read(files, **self.reading)
                if files.task.joint and not study.missing_slices:
                    self.complete(opened, complete_stack(study))
                else:
                    opened.study = study
        except Exception as error:
            opened.error = failure(files.name, error, "free some, or give a smaller image")
        return opened

    def look_ahead(self, opened: Opened) -> bool:
        """Fill in the entry; whether there is something to do, from the names alone."""
        files, entry = opened.files, opened.entry
        name, config = self.models.choose(files.task, files.files)
        entry["model"], entry["model_name"] = name, config.name
        # A model for the other task is refused where every study is prepared.
        elements = config.elements
        if self.target is not None:
            _check_target(files, config, self.target)
            elements = tuple(element for element in elements if element in self.target)
        entry["outlived"] = self.outlived(files)
        outputs = files.outputs(self.output, elements) if config.task == files.task else {}
        if not outputs and not files.problem and set(files.files) == set(config.elements):
            self.complete(opened, complete_brain(files.name, config))
            return False
        entry["outputs"] = {element: str(path) for element, path in outputs.items()}
        sidecars = {element: files.naming.path(self.output, element, ending=".json") for element in outputs}
        entry["sidecars"] = {element: str(path) for element, path in sidecars.items()}
        done = {e: there for e, path in outputs.items() if (there := complete_sidecar(path))}
        for element, sidecar in done.items():
            if of_another(sidecar, files.name, files.inputs()):
                whose = f"{outputs[element]} is of the study {sidecar['study']}, not of {files.name}"
                raise CopeditError(f"{whose}; choose another output folder with -o")
        if self.overwrite and done:
            entry["overwrite"], done = True, {}
        entry["notes"] = self.outdated(name, config, files, done)
        if files.source and self.dicom and (bare := [e for e, sidecar in done.items() if "dicom" not in sidecar]):
            entry["notes"].append(f"kept without a DICOM series: {', '.join(bare)}; --overwrite makes it again")
        if outputs and len(done) == len(outputs):
            entry["status"] = "kept"
            for kind, asked, path, told in (
                ("preview", self.preview, self.picture(files), "no picture was drawn"),
                ("report", self.report, self.page(files), "no page was written"),
            ):
                if path.is_file():
                    entry[kind] = str(path)
                elif asked:
                    entry["notes"].append(f"nothing was made, so {told}; --overwrite makes both")
            return False
        entry["kept"] = list(done)
        # What is done stays as it is, though it is sampled again beside the others: elements depend on each other.
        opened.todo = None if files.task.joint else [element for element in outputs if element not in done]
        return True

    def picture(self, files: StudyFiles) -> Path:
        """Where a study's preview goes."""
        return self.output / files.naming.subfolder / f"{files.name}_preview.png"

    def page(self, files: StudyFiles) -> Path:
        """Where a study's page goes."""
        return self.output / files.naming.subfolder / f"{files.name}_report.html"

    def outdated(self, model: str, config: ModelConfig, files: StudyFiles, done: Mapping[str, Any]) -> list[str]:
        """A note on each difference between runs that wrote outputs that are kept (their sidecars) and this one."""
        if not self.sampler:  # `survey` asks for nothing
            return []
        asked = request(config, self.sampler, self.reading)
        notes: dict[str, list[str]] = {}
        for element, sidecar in done.items():
            if found := changes(sidecar, config.name, self.models.weights(model), asked, files.inputs()):
                notes.setdefault("; ".join(found), []).append(element)
        return [
            f"kept though made otherwise: {', '.join(elements)} ({what}); --overwrite makes it again"
            for what, elements in notes.items()
        ]

    def outlived(self, files: StudyFiles, remove: bool = False) -> list[str]:
        """A note on each synthetic image of a modality that the study has by now; remove: that image goes."""
        notes, again = [], "--overwrite" + " and without --target" * (self.target is not None)
        for element in () if files.task.joint or files.problem else files.files:
            path = files.naming.path(self.output, element)
            sidecar = complete_sidecar(path) if is_synthetic(path) else None
            if sidecar and not of_another(sidecar, files.name, files.inputs()):
                if remove:
                    withdraw(path, sidecar)
                left = f"remove it, or repeat with {again}" if is_file(path) else "it was removed"
                notes.append(f"{path} is synthetic, and the study has a {element} now; {left}")
        return notes

    def complete(self, opened: Opened, error: CopeditError) -> None:
        """Of a study that lacks nothing, before any network is loaded: an outcome, and an error if it is the only
        one."""
        if self.overwrite and opened.entry["outlived"]:
            Study.read(opened.files, **self.reading)  # what cannot be read replaces nothing
        opened.entry["status"] = "complete"
        opened.error = None if self.several else error

    def attempt(self, opened: Opened) -> Result | None:
        """What is missing from a study, if something is; what goes wrong is kept."""
        try:
            if opened.study and not opened.error:
                return self.compute(opened, opened.study)
        except Exception as error:
            opened.error = self.failure(opened, error)
        return None

    def failure(self, opened: Opened, error: Exception) -> CopeditError:
        return failure(
            opened.files.name, error, "set --max-memory, use a smaller model with --model, or another --device"
        )

    def finish(self, opened: Opened, result: Result | None) -> tuple[dict[str, Any], CopeditError | None]:
        """The study's entry after its outputs were written, and why it failed if it did."""
        try:
            if result:
                self.save(opened, result)
            if self.overwrite and self.target is None and opened.entry["status"] in ("written", "complete"):
                self.clear(opened)
        except Exception as error:
            opened.error, opened.entry["status"] = self.failure(opened, error), "failed"
        told = opened.error
        if told and opened.entry["status"] == "complete":
            told = CopeditError("; ".join((str(told), *opened.entry["outlived"])))
        if told and (not self.several or isinstance(told, UnusableModel)):
            raise told from told.__cause__
        if told:
            folders = {path.parent for path in (*opened.files.files.values(), *opened.files.unclear)}
            opened.entry |= {"error": str(told), "remark": by_name(str(told), folders | {self.output})}
        return opened.entry, told

    def clear(self, opened: Opened) -> None:
        """Synthetic images of modalities that the study has by now go, which is said, and so is what shows them."""
        files, entry = opened.files, opened.entry
        if entry["outlived"]:
            entry["outlived"] = self.outlived(files, remove=True)
            shown = {"preview": self.picture(files), "report": self.page(files)}
            old = [path for kind, path in shown.items() if kind not in entry and path.is_file()]
            entry["outlived"] += [f"{path} may show what was removed" for path in old]

    def compute(self, opened: Opened, study: Study) -> Result:
        """What is missing from a study, synthesised."""
        model = self.models.introduced(opened.entry["model"])
        return model.synthesize(study, target=opened.todo or None, **self.sampler)

    def save(self, opened: Opened, result: Result) -> None:
        """Write one study's outputs and fill in its entry."""
        files, entry = opened.files, opened.entry
        entry["notes"] += result.study.notes
        entry["perception"] = result.perception.to_dict()
        config = self.models.load(entry["model"]).config
        result.record["reading"] = request(config, self.sampler, self.reading)["reading"]
        entry["record"] = result.record
        if self.preview:
            from copedit_rt.images import preview

            record = result.record
            picture = preview.draw(result.study, model=record["model"], trained=record["trained_on"])
            preview.save(picture, self.picture(files))
            entry["preview"] = str(self.picture(files))
        if self.report:
            from copedit_rt.report import page

            page.write(result, entry["model"], self.page(files))
            entry["report"] = str(self.page(files))
        std = result.std or None
        result.study.write(self.output, model=result.record["model"], record=result.record, std=std, dicom=self.dicom)
        if files.source and self.dicom:
            made = [name for name in result.study.volumes if name in result.study.synthetic]
            entry["dicom"] = {name: str(result.study.dicom_path(self.output, name)) for name in made}
        entry["status"] = "written"


def _check_target(files: StudyFiles, config: ModelConfig, target: Sequence[str]) -> None:
    if files.task.joint:
        raise CopeditError(f"{files.name} is a cardiac stack; name slices with --missing-slices, not --target")
    for element in target:
        if element not in config.elements:
            known = ", ".join(config.elements)
            raise UnusableModel(f"--target {element}: the model {config.name} knows {known} only; choose one of them")
        if element in files.files:
            there = files.files[element]
            raise CopeditError(f"--target {element}: {files.name} has it already ({there}); choose what is missing")


# -------------------------------------------------------------------------------------------------- processes


def _process() -> tuple[int, int]:
    """Number of this process and of all of them."""
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        raise CopeditError(f"RANK={rank}, WORLD_SIZE={world}: set both, to a number below the second, or neither")
    return int(rank), int(world)


def wait_for_others() -> None:
    """Wait for the other processes of torchrun, which ends all as soon as one fails: a study that failed must not cost
    others theirs."""
    if "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from torch import distributed

        distributed.init_process_group("gloo", timeout=timedelta(days=30))
        distributed.barrier()
        distributed.destroy_process_group()


def _own_device(device: str, world: int, engine: str) -> str:
    """Of several processes each takes the GPU of its number on this machine, where the engine computes on GPUs."""
    if world == 1 or device not in ("auto", "cuda") or choose_engine(engine) in TORCHLESS:
        return device
    import torch

    if device == "auto" and not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
