"""A study in, the same study's missing images out, in Triton Inference Server: one request a study.

This file is `model.py` of the model NAME-study. Beside it lie `copedit_rt`, the part of the runtime that needs no
torch, and `model`, the model folder without weights. Preparation, sampling loop and the way back are the runtime's; the
three networks are the server's other models, which it calls. It needs numpy, nibabel and safetensors.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if sys.version_info < (3, 11):  # noqa: UP036 - that of a server may be older, which an import would say less clearly
    raise ImportError(f"Python 3.11 or newer is needed, and this server has {sys.version.split()[0]}")

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
sys.path += filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))  # which the server's Python passes over

import numpy as np  # noqa: E402
import triton_python_backend_utils as pb_utils  # noqa: E402

from copedit_rt import checkpoint  # noqa: E402
from copedit_rt.engines.graphs import GraphEngine  # noqa: E402
from copedit_rt.errors import CopeditError, Fault  # noqa: E402
from copedit_rt.images.nifti import Volume  # noqa: E402
from copedit_rt.images.study import Study  # noqa: E402
from copedit_rt.synthesizer import Result, Synthesizer  # noqa: E402

NAME = 200  # characters that a study's name may have
FLAGS = {"guided": True, "none": False}


class GivenUp(Exception):
    """Nobody waits for the answer any more."""


class ServerEngine(GraphEngine):
    """Networks that are models of the server. See `engine.Engine`."""

    def __init__(self, folder: Path) -> None:
        """folder: of the model, with server.json."""
        about = json.loads((folder / "server.json").read_text("utf-8"))
        self.config = checkpoint.read_config(folder)
        self.name, self.device, self.precision = f"triton ({about['backend']})", about["device"], about["precision"]
        self.versions: dict[str, str] = {}
        self.weights: dict[str, str] = about["weights"]
        self._graphs, self._most = about["graphs"], about["max_batch"]

    def _run(self, graph: str, **inputs: np.ndarray) -> list[np.ndarray]:
        """As many samples at a time as the server joins."""
        count = len(next(iter(inputs.values())))
        parts = [slice(i, i + self._most) for i in range(0, count, self._most)]
        made = [self._ask(graph, {name: value[part] for name, value in inputs.items()}) for part in parts]
        return made[0] if len(made) == 1 else [np.concatenate(values) for values in zip(*made, strict=True)]

    def _ask(self, graph: str, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        about = self._graphs[graph]
        # One number a sample has a dimension of its own here.
        arrays = {name: x if x.ndim > 1 else x[:, None] for name, x in inputs.items() if name in about["inputs"]}
        given = [pb_utils.Tensor(name, np.ascontiguousarray(x)) for name, x in arrays.items()]
        response = pb_utils.InferenceRequest(
            model_name=about["model"],
            requested_output_names=about["outputs"],
            inputs=given,
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
        ).exec()
        if response.has_error():
            raise Fault(f"{about['model']}: {response.error().message()}")
        made = [pb_utils.get_output_tensor_by_name(response, name).as_numpy() for name in about["outputs"]]
        # Answers lie in memory that the server shares out again.
        return [np.array(value) for value in made]


class TritonPythonModel:
    """See docs/deploy.md for inputs and outputs."""

    def initialize(self, args: dict[str, str]) -> None:
        if np.lib.NumpyVersion(np.__version__) >= "2.0.0":  # whose outputs have no bytes in servers as of 2024
            raise pb_utils.TritonModelException(f"numpy {np.__version__} is too new for this server; use numpy<2")
        self._model = Synthesizer.on(ServerEngine(HERE / "model"), HERE / "model")

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        """Errors of the user in their one sentence; of ours that there was one, and in the log where."""
        codes = pb_utils.TritonError
        try:
            return _response(self._made(request))
        except GivenUp:
            return _refusal("nobody waits for this study any more", codes.CANCELLED)
        except CopeditError as error:
            return _refusal(str(error), codes.INTERNAL if isinstance(error, Fault) else codes.INVALID_ARG)
        except Exception as error:
            import traceback

            frames = traceback.extract_tb(error.__traceback__)[-3:]
            where = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames))
            pb_utils.Logger.log_error(f"copedit: {type(error).__name__} at {where}")
            return _refusal(f"the server failed ({type(error).__name__}); its log says where", codes.INTERNAL)

    def _made(self, request: Any) -> Result:
        asked = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        study = _study(asked, self._model.config.task.volumes(self._model.config.elements))

        def progress(done: int, count: int) -> None:
            if request.is_cancelled():
                raise GivenUp

        options: dict[str, Any] = {}
        for name, read in OPTIONS.items():
            if name in asked:
                options[name] = read(asked[name], name)
        return self._model.synthesize(study, progress=progress, **options)


def _study(asked: dict[str, np.ndarray], elements: tuple[str, ...]) -> Study:
    """The images that were sent, checked as files are."""
    there = [name for name in elements if name in asked]
    affines = asked["affine"]
    if len(affines) not in (1, len(there)):
        raise CopeditError(f"{len(affines)} affines for {len(there)} images; send one for all, or one for each")
    called = text(asked["study"], "study") if "study" in asked else "study"
    if not (0 < len(called) <= NAME and called.isprintable()):
        raise CopeditError(f"study: a name of 1 to {NAME} printable characters is expected")
    places = affines if len(affines) == len(there) else affines.repeat(len(there), 0)
    volumes = {name: Volume.placed(asked[name], place, name) for name, place in zip(there, places, strict=True)}
    missing = asked["missing_slices"].tolist() if "missing_slices" in asked else None
    return Study.of(volumes, called, missing_slices=missing)


def _single(value: np.ndarray, name: str) -> Any:
    if value.size != 1:
        raise CopeditError(f"{name}: one value is expected, {value.size} were sent")
    return value.ravel()[0]


def text(value: np.ndarray, name: str) -> str:
    return _decoded(_single(value, name), name)


def _decoded(value: Any, name: str) -> str:
    try:
        return value.decode() if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError as error:
        raise CopeditError(f"{name}: no text in UTF-8") from error


def _number(least: int) -> Callable[[np.ndarray, str], int]:
    def read(value: np.ndarray, name: str) -> int:
        number = int(_single(value, name))
        if number < least:
            raise CopeditError(f"{name} {number}: must be at least {least}")
        return number

    return read


def _detail(value: np.ndarray, name: str) -> bool:
    if (word := text(value, name)) not in FLAGS:
        raise CopeditError(f"{name} {word[:40]!r} is unknown; choose one of {', '.join(FLAGS)}")
    return FLAGS[word]


# Per input of that name what it is to `Synthesizer.synthesize`.
OPTIONS: dict[str, Callable[[np.ndarray, str], Any]] = {
    "steps": _number(0),
    "seed": _number(0),
    "samples": _number(1),
    "solver": text,
    "detail": _detail,
    "target": lambda value, name: [_decoded(word, name) for word in value.ravel()] or None,
}


def _response(result: Result) -> Any:
    study = result.study
    names = [name for name in study.volumes if name in study.synthetic]
    shape = study.reference.data.shape
    spread = [result.std[name] for name in names if name in result.std]
    about = {"record": result.record, "perception": result.perception.to_dict(), "notes": list(study.notes)}
    about |= {"unlike": list(result.perception.unlike), "seen_only": result.perception.seen_only}
    outputs = {
        "elements": np.array([name.encode() for name in names], dtype=object),
        "images": np.stack([np.ascontiguousarray(study.volumes[name].data) for name in names]),
        "deviation": np.stack(spread) if spread else np.zeros((0, *shape), np.float32),
        "about": np.array([json.dumps(about).encode()], dtype=object),
    }
    return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor(*item) for item in outputs.items()])


def _refusal(sentence: str, code: int) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(sentence, code))
