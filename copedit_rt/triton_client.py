"""A client of Triton Inference Server with a repository of `copedit export triton-repo`: one request a study.

Needs the extra `triton`, and neither torch nor the model: what is computed, the server computes.
"""

from __future__ import annotations

import importlib
import json
import urllib.parse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from copedit_rt.client import ServerError
from copedit_rt.errors import CopeditError
from copedit_rt.images.names import targets
from copedit_rt.images.study import Study
from copedit_rt.perception import Perception
from copedit_rt.synthesizer import Result, inputs_of, notes_of

_KINDS = {"FP32": np.float32, "FP64": np.float64, "INT32": np.int32, "INT64": np.int64, "BYTES": np.object_}
_OUTPUTS = ("elements", "images", "deviation", "about")
_WAYS = {"http": "tritonclient.http", "grpc": "tritonclient.grpc"}


class TritonClient:
    """Of a server at `address`, http://HOST:8000 or grpc://HOST:8001, and one of its models, such as "brain-2mm".

    seconds: how long to wait for an answer. Not safe to use from several threads: give each one of its own.
    """

    def __init__(self, address: str, model: str, *, seconds: float = 900.0) -> None:
        try:
            parts = urllib.parse.urlsplit(address)
        except ValueError:  # half an address of IPv6
            parts = urllib.parse.urlsplit("")
        if parts.scheme not in _WAYS or not parts.netloc:
            raise CopeditError(f"{address}: expected an address such as http://127.0.0.1:8000 or grpc://127.0.0.1:8001")
        try:
            self._library = importlib.import_module(_WAYS[parts.scheme])
        except ImportError as error:
            raise CopeditError(f"{type(self).__name__}: {error}; pip install 'copedit[triton]'") from error
        self.address, self._model = address, f"{model}-study"
        http = {"connection_timeout": seconds, "network_timeout": seconds} if parts.scheme == "http" else {}
        self._client = self._library.InferenceServerClient(parts.netloc, **http)
        self._http, self._late = bool(http), {} if http else {"client_timeout": seconds}

    def ready(self) -> bool:
        """Whether the server is there and has loaded the model."""
        try:
            return bool(self._client.is_model_ready(self._model, **self._late))
        except Exception:  # of the transport; each has its own
            return False

    def synthesize(
        self,
        study: Study,
        *,
        target: str | Sequence[str] | None = None,
        steps: int | None = None,
        seed: int = 0,
        samples: int = 1,
        solver: str | None = None,
        detail: bool | None = None,
    ) -> Result:
        """As `Synthesizer.synthesize`: what is missing, on the grid of the first image in the model's order.

        Raises ServerError for what the server refuses, CopeditError where it cannot be reached.
        """
        wanted = targets(target)
        options: dict[str, Any] = {"study": study.name, "steps": steps, "seed": seed, "samples": samples}
        options |= {"solver": solver, "target": wanted}
        options["detail"] = None if detail is None else ("none", "guided")[detail]
        options["missing_slices"] = list(study.missing_slices) or None
        with self._telling():
            known = self._kinds()
        # The server's order: affines are told apart by it, and the first image gives grid and range of what is made.
        order = dict.fromkeys((*known, *study.volumes))
        study = replace(study, volumes={name: study.volumes[name] for name in order if name in study.volumes})
        there = {name: volume for name, volume in study.volumes.items() if name not in study.synthetic}
        given: dict[str, np.ndarray] = {name: np.ascontiguousarray(volume.data) for name, volume in there.items()}
        given["affine"] = np.stack([volume.affine for volume in there.values()]) if there else np.eye(4)[None]
        made = self._ask(known, given, {name: value for name, value in options.items() if value is not None})
        return _result(study, made)

    def _ask(
        self, known: dict[str, str], arrays: dict[str, np.ndarray], options: dict[str, Any]
    ) -> dict[str, np.ndarray]:
        """The server's outputs by name. known: types of the model's inputs."""
        for name, value in options.items():
            if name not in known:
                raise CopeditError(f"{name}: the model {self._model} takes no such option; leave it out")
            arrays[name] = _array(value, known[name])
        with self._telling():
            inputs = [self._input(name, known.get(name, "FP32"), array) for name, array in arrays.items()]
            outputs = [self._library.InferRequestedOutput(name) for name in _OUTPUTS]
            answer = self._client.infer(self._model, inputs, outputs=outputs, **self._late)
            return {name: answer.as_numpy(name) for name in _OUTPUTS}

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """What goes wrong inside as one of ours."""
        try:
            yield
        except MemoryError:
            raise
        except Exception as error:
            raise self._told(error) from error

    def _kinds(self) -> dict[str, str]:
        """Types of the model's inputs by name, in its order."""
        about = self._client.get_model_metadata(self._model, **self._late)
        if self._http:
            return {part["name"]: part["datatype"] for part in about["inputs"]}
        return {part.name: part.datatype for part in about.inputs}

    def _input(self, name: str, kind: str, array: np.ndarray) -> Any:
        tensor = self._library.InferInput(name, list(array.shape), kind)
        tensor.set_data_from_numpy(array)
        return tensor

    def _told(self, error: Exception) -> CopeditError:
        """What a server refused in its own sentence; whatever else went wrong as one of ours."""
        message = getattr(error, "message", None)
        said = " ".join(str(message() if callable(message) else error).split())
        status = str(getattr(error, "status", lambda: "")() or "")
        if callable(message) and not any(word in status for word in ("UNAVAILABLE", "DEADLINE")):
            codes = {"400": 400, "404": 404, "INVALID_ARGUMENT": 400, "NOT_FOUND": 404}
            return ServerError(said, next((code for word, code in codes.items() if word in status), 500))
        return CopeditError(f"no answer from {self.address} ({said or type(error).__name__}); is the server running?")


def _array(value: Any, kind: str) -> np.ndarray:
    several = value if isinstance(value, list) else [value]
    if kind == "BYTES":
        several = [str(item).encode() for item in several]
    return np.array(several, _KINDS[kind])


def _result(study: Study, made: dict[str, np.ndarray]) -> Result:
    """What the server made of a study."""
    about = json.loads(made["about"][0])
    names = [name.decode() for name in made["elements"]]
    whole = study.with_synthetic(dict(zip(names, made["images"], strict=True)))
    whole.notes += tuple(note for note in about["notes"] if note not in study.notes)
    seen = about["perception"]
    perception = Perception(
        count=list(seen["count"].values()),
        missing=list(seen["missing"].values()),
        identity={name: list(row.values()) for name, row in seen["identity"].items()},
        elements=tuple(seen["missing"]),
        unlike=tuple(about["unlike"]),
        seen_only=about.get("seen_only", ""),
    )
    std = dict(zip(names, made["deviation"], strict=True)) if len(made["deviation"]) else {}
    return Result(whole, perception, about["record"] | {"inputs": inputs_of(study), "notes": notes_of(whole)}, std)
