"""Where requests wait and are worked on: warm models, one study at a time on a device, the next one read meanwhile."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import cycle
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np

from copedit_rt import checkpoint, inspection
from copedit_rt.cohort import Job
from copedit_rt.config import ModelConfig
from copedit_rt.errors import CopeditError, Fault
from copedit_rt.images.find import StudyFiles
from copedit_rt.images.nifti import Volume, read_outline
from copedit_rt.images.study import Study
from copedit_rt.listener import Listener
from copedit_rt.models import Models
from copedit_rt.serving.asked import Asked, Refused, public
from copedit_rt.serving.counts import Counts
from copedit_rt.task import STACK

AHEAD = 2  # threads a device: one has it, the other reads the next study or writes the last


@dataclass(eq=False)
class Ticket:
    """One request's claim on a thread: until when, and whether anybody still waits for it."""

    until: float
    given_up: threading.Event = field(default_factory=threading.Event)
    entered: float = field(default_factory=monotonic)

    def check(self, *step: int) -> None:
        """Called between steps: Refused where there is nothing to go on for."""
        if self.given_up.is_set():
            raise Refused("the request was given up", 503)
        if monotonic() > self.until:
            raise Refused("it took longer than this server allows; ask for fewer steps or samples", 504)


class Desk:
    """The models of a server and the threads that work with them.

    models: names of built-in ones or folders; none: all built in. devices: each computes one study at a time. limit:
    bytes that the images of a study may take in memory. options: engine, dtype and max_memory of `Models`.
    """

    def __init__(
        self,
        models: Sequence[str] = (),
        devices: Sequence[str] = ("auto",),
        *,
        limit: int = 2**30,
        remark: Callable[[str], None] = lambda text: None,
        **options: Any,
    ) -> None:
        self.counts, self.limit, self.ready = Counts(), limit, False
        self.closing = False  # no more models are loaded
        self._names = list(models) or checkpoint.list_models()
        self.configs = {name: checkpoint.read_config(checkpoint.locate(name)) for name in self._names}
        self.models = [config.name for config in self.configs.values()]
        if len(set(self.models)) < len(self.models):
            raise CopeditError(f"two models have one name: {', '.join(self.models)}; serve one of them")
        said = _Remarks(remark)
        self._places = [
            {name: Models(name, device, listener=said, **options) for name in self._names} for device in devices
        ]
        self._turns = cycle(self._places)
        self._pool = ThreadPoolExecutor(AHEAD * len(devices), "study", initializer=self._take_place)
        self._mine = threading.local()
        self._lock = threading.Lock()

    def _take_place(self) -> None:
        """Of the pool's threads, every so manieth works on a device."""
        with self._lock:
            self._mine.place = next(self._turns)

    def warm(self) -> None:
        """Load every model on every device and let it fill one study, so that the first request finds all in place."""
        for place in self._places:
            for name, models in place.items():
                if self.closing:
                    return
                models.load(name).synthesize(
                    _noise(self.configs[name]), steps=min(1, self.configs[name].diffusion.steps)
                )
        self.ready = True

    def close(self) -> None:
        """No more work; what waits is dropped, what runs ends at its next step if its ticket was given up."""
        self.ready = False
        self._pool.shutdown(wait=True, cancel_futures=True)

    def submit(self, work: Callable[[Asked, Ticket], Any], asked: Asked, ticket: Ticket) -> Future[Any]:
        """Do `work`, `synth` or `inspect`, in a thread."""
        return self._pool.submit(self._work, work, asked, ticket)

    def _work(self, work: Callable[[Asked, Ticket], Any], asked: Asked, ticket: Ticket) -> Any:
        self.counts.stages.labels("wait").observe(monotonic() - ticket.entered)
        with self.counts.running.track_inprogress():
            ticket.check()
            return work(asked, ticket)

    def synth(self, asked: Asked, ticket: Ticket) -> Path:
        """The folder of what `copedit synth` would have written. Raises CopeditError, Fault where it is ours."""
        with self.counts.stage("read"):
            files = asked.study()
            models = self._models(asked, files)
            self._check_size(files, asked.reading.get("resample", False))
            sampler = {**asked.sampler, "progress": ticket.check}
            wanted = (asked.preview, asked.report)
            job = Job(asked.output, models, asked.target, True, *wanted, False, asked.reading, sampler, Listener())
            job = replace(job, dicom=asked.dicom)
            opened = job.open(files)
            if opened.error:
                raise opened.error
            assert opened.study is not None
        ticket.check()
        with self.counts.stage("compute"):
            result = job.compute(opened, opened.study)
        ticket.check()
        with self.counts.stage("write"):
            job.save(opened, result)
        return asked.output

    def inspect(self, asked: Asked, ticket: Ticket) -> dict[str, Any]:
        """What `copedit inspect --json` says of the study."""
        with self.counts.stage("read"):
            files = asked.study()
            models = self._models(asked, files)
            self._check_size(files, resample=True)  # all that can be compared, is
        with self.counts.stage("compute"):
            (report,) = inspection.inspect([files], models, asked.reading.get("missing_slices"))
        return _public(report.to_dict(), asked.folder)

    def _models(self, asked: Asked, files: StudyFiles) -> Models:
        """Those with the one model that was asked for, or that fits, as `Models.choose` would choose."""
        if asked.model is not None:
            return self._mine.place[self._names[self.models.index(asked.model)]]
        for_task = {name: config for name, config in self.configs.items() if config.task == files.task}
        if not for_task:
            raise CopeditError(f"{files.name} is a {files.task} study, for which no model is served here")
        knows = (n for n, c in for_task.items() if c.task.joint or set(files.files) <= set(c.elements))
        return self._mine.place[next(knows, next(iter(for_task)))]

    def _check_size(self, files: StudyFiles, resample: bool = False) -> None:
        """Refused for images too large, also where all are brought onto the grid of the first; what is wrong with a
        file is told where it is read."""
        voxels = []
        if files.source:
            voxels = [files.source.chosen[element][0].voxels for element in files.files]
        for path in files.files.values() if not files.source else ():
            with suppress(CopeditError):
                voxels.append(read_outline(path).data.size)
        needed = 4 * max(sum(voxels), voxels[0] * len(voxels) if resample and voxels else 0)
        if needed > self.limit:
            sizes = needed / 2**20, self.limit / 2**20
            said = "its images take {:.0f} MiB in memory, more than the {:.0f} MiB of this server".format(*sizes)
            raise Refused(f"{files.name}: {said}; crop or downsample them", 413)


def _public(data: Any, folder: Path) -> Any:
    """What of a report may be told: sentences about files name their paths."""
    if isinstance(data, dict):
        return {key: _public(value, folder) for key, value in data.items()}
    if isinstance(data, list):
        return [_public(value, folder) for value in data]
    return public(data, folder) if isinstance(data, str) else data


class _Remarks(Listener):
    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say

    def remark(self, text: str) -> None:
        self._say(text)


def _noise(config: ModelConfig) -> Study:
    """A study of noise, with the least that a model needs."""
    height, width, depth = config.image
    shape = (height, width, depth * (len(config.elements) if config.task.joint else 1))
    size = [(extent or 100.0) / n for extent, n in zip(config.preprocessing.field_of_view, shape, strict=True)]
    data = np.random.default_rng(0).uniform(1, 100, shape)
    if not config.task.joint:
        return Study.of({config.elements[0]: Volume.from_array(data, np.diag([*size, 1.0]))}, "noise")
    data[..., 0] = 0
    return Study.of({STACK: Volume.from_array(data, np.diag([*size, 1.0]))}, "noise")


def where(error: BaseException) -> str:
    """What kind of error, and in which lines of this program: nothing of the request."""
    cause = error.__cause__ if isinstance(error, Fault) and error.__cause__ else error
    frames = traceback.extract_tb(cause.__traceback__)[-4:]
    return f"{type(cause).__name__} at " + " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames))
