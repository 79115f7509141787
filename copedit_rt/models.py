"""Which model suits a study; each is loaded once."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from copedit_rt import checkpoint
from copedit_rt.config import ModelConfig
from copedit_rt.engines.engine import choose_engine
from copedit_rt.errors import CopeditError
from copedit_rt.listener import Listener
from copedit_rt.prior import PRIOR
from copedit_rt.synthesizer import Synthesizer
from copedit_rt.task import Task

_LOADING = threading.RLock()  # one at a time: how warnings are caught concerns all threads


class UnusableModel(CopeditError):
    """The model cannot be used at all: no other study would fare better."""


class Models:
    """Chooses models by name, folder or study, and loads each once.

    model: the name of a built-in model or a folder, for every study; None: one that fits. The other options are those
    of `Synthesizer.load`. listener: hears what is being built, and remarks.
    """

    def __init__(
        self,
        model: str | None = None,
        device: str = "auto",
        *,
        max_memory: int | None = None,
        engine: str = "auto",
        dtype: str = "auto",
        listener: Listener | None = None,
    ) -> None:
        self._model, self._device = model, device
        self._options: dict[str, Any] = {"max_memory": max_memory, "engine": engine, "dtype": dtype}
        self._listener = listener or Listener()
        self._loaded: dict[str, Synthesizer] = {}
        self._weights: dict[str, dict[str, str]] = {}

    def choose(self, task: Task, elements: Iterable[str]) -> tuple[str, ModelConfig]:
        """Name and configuration of the model asked for, or of the first built in that knows all the elements.

        Raises UnusableModel for a model that cannot be read, CopeditError where none is built in for the task.
        """
        if self._model is not None:
            try:
                return self._model, checkpoint.read_config(checkpoint.locate(self._model))
            except CopeditError as error:
                raise UnusableModel(error) from error
        configs = {name: checkpoint.read_config(checkpoint.locate(name)) for name in checkpoint.list_models()}
        configs = {name: config for name, config in configs.items() if config.task == task}
        if not configs:
            raise CopeditError(f"no model for {task} MRI is built in; name a model folder with --model")
        for name, config in configs.items():
            if set(elements) <= set(config.task.volumes(config.elements)):
                return name, config
        return next(iter(configs.items()))

    def weights(self, name: str) -> dict[str, str]:
        """SHA-256 of the files that a record names, of the model of a name that `choose` gave; nothing is loaded."""
        if name not in self._weights:
            files = (checkpoint.TOKENIZER, checkpoint.DENOISER, PRIOR)
            folder = checkpoint.locate(name, exported=choose_engine(self._options["engine"]) != "torch")
            self._weights[name] = checkpoint.digests(folder, files)
        return self._weights[name]

    def load(self, name: str) -> Synthesizer:
        """The model of a name that `choose` gave. Raises UnusableModel where it cannot be loaded."""
        if name in self._loaded:  # nobody waits for the plans of another model
            return self._loaded[name]
        with _LOADING:
            if name not in self._loaded:
                try:
                    with remarks(self._listener.remark):
                        loaded = Synthesizer.load(name, self._device, progress=self._listener.building, **self._options)
                except CopeditError as error:
                    raise UnusableModel(error) from error
                for note in getattr(loaded.engine, "notes", ()):
                    self._listener.remark(note)
                self._loaded[name] = loaded
            return self._loaded[name]

    def introduced(self, name: str) -> Synthesizer:
        """`load`; the first time it says what the model was trained on."""
        new, model = name not in self._loaded, self.load(name)
        if new and model.trained:
            self._listener.remark(f"{name} was trained on {model.trained.words}")
        return model


@contextmanager
def remarks(say: Callable[[str], None]) -> Iterator[None]:
    """The warnings to the user of what is done inside, said once it is done."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in caught:
        say(str(warning.message))
