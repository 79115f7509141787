"""A stand-in for what Triton Inference Server gives its models in Python; other models are their ONNX files.

Run as a program: REPOSITORY MODEL INPUTS.npz OUTPUTS.npz loads a model.py as the server does, asks it once, and fails
where torch was loaded. A refusal goes to stdout.
"""

import importlib.util
import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

TRITONSERVER_MEMORY_CPU = 0
REPOSITORY = Path(sys.argv[1]) if len(sys.argv) > 1 else Path()


class TritonModelException(Exception):
    pass


class TritonError:
    INVALID_ARG, INTERNAL, CANCELLED = "invalid", "internal", "cancelled"

    def __init__(self, text: str, code: str = INTERNAL):
        self.text, self.code = text, code

    def message(self) -> str:
        return self.text


class Tensor:
    def __init__(self, name: str, value: np.ndarray):
        self._name, self._value = name, value

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._value


class PreferredMemory:
    def __init__(self, kind: int, number: int):
        pass


class InferenceResponse:
    def __init__(self, output_tensors: Any = (), error: TritonError | None = None):
        self.tensors, self._error = {tensor.name(): tensor for tensor in output_tensors}, error

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error


def get_output_tensor_by_name(response: InferenceResponse, name: str) -> Tensor:
    return response.tensors[name]


def get_input_tensor_by_name(request: Any, name: str) -> Tensor:
    return next(tensor for tensor in request.inputs() if tensor.name() == name)


class InferenceRequest:
    """Both a request to a model in Python and one of it to another model."""

    sessions: ClassVar[dict[str, Any]] = {}

    def __init__(self, inputs: list[Tensor], model_name: str = "", **ignored: Any):
        self._inputs, self._model = inputs, model_name

    def inputs(self) -> list[Tensor]:
        return self._inputs

    def is_cancelled(self) -> bool:
        return False

    def exec(self) -> InferenceResponse:
        import onnxruntime

        if self._model not in self.sessions:
            (path,) = (p for p in (REPOSITORY / self._model).rglob("model.onnx") if p.is_file())
            self.sessions[self._model] = onnxruntime.InferenceSession(path)
        session = self.sessions[self._model]
        ranks = {value.name: len(value.shape) for value in session.get_inputs()}
        given = {x.name(): x.as_numpy() for x in self._inputs}
        given = {name: x.reshape(x.shape[: ranks[name]]) for name, x in given.items()}  # as config.pbtxt says
        names = [value.name for value in session.get_outputs()]
        return InferenceResponse([Tensor(*item) for item in zip(names, session.run(names, given), strict=True)])


def main() -> None:
    np.__version__ = "1.26.4"  # the real server's
    sys.modules["triton_python_backend_utils"] = sys.modules["__main__"]
    path = REPOSITORY / sys.argv[2] / "1" / "model.py"
    specification = importlib.util.spec_from_file_location("model", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    model = module.TritonPythonModel()
    model.initialize({})
    with np.load(sys.argv[3], allow_pickle=True) as held:
        request = InferenceRequest([Tensor(name, held[name]) for name in held.files])
    (response,) = model.execute([request])
    if response.has_error():
        print(response.error().code, response.error().message())
    np.savez(sys.argv[4], **{name: tensor.as_numpy() for name, tensor in response.tensors.items()})
    strange = {"torch", "triton", "typer", "rich"} & set(sys.modules)
    outside = [
        name
        for name, loaded in sys.modules.items()
        if name.startswith("copedit") and not (loaded.__file__ or "").startswith(str(path.parent))
    ]
    unused = {p.relative_to(path.parent).with_suffix("").as_posix() for p in (path.parent / "copedit_rt").rglob("*.py")}
    unused -= {name.replace(".", "/") for name in sys.modules}
    unused = {name for name in unused if not name.endswith("__init__")}
    sys.exit(f"loaded {strange}, outside {outside}, unused {unused}" if strange or outside or unused else 0)


if __name__ == "__main__":
    main()
