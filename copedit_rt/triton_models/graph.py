"""A graph of copedit in Triton Inference Server, for servers without its onnxruntime backend.

This file is `model.py` beside the ONNX file. It needs numpy and onnxruntime. Every request runs by itself, so that
what is computed does not depend on who else asks.
"""

import os
import sys
from pathlib import Path
from typing import Any

sys.path += filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))  # which the server's Python passes over

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """Inputs and outputs are those of the graph."""

    def initialize(self, args: dict[str, str]) -> None:
        if np.lib.NumpyVersion(np.__version__) >= "2.0.0":  # whose outputs have no bytes in servers as of 2024
            raise pb_utils.TritonModelException(f"numpy {np.__version__} is too new for this server; use numpy<2")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors are raised as well
        threads = os.environ.get("OMP_NUM_THREADS", "")
        options.intra_op_num_threads = int(threads) if threads.isdecimal() else 0
        path = Path(__file__).with_name("model.onnx")
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._inputs = [value.name for value in self._session.get_inputs()]
        self._outputs = [value.name for value in self._session.get_outputs()]

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        given = {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self._inputs}
        try:
            made = self._session.run(None, given)
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(f"onnxruntime: {reason}"))
        outputs = [pb_utils.Tensor(name, value) for name, value in zip(self._outputs, made, strict=True)]
        return pb_utils.InferenceResponse(output_tensors=outputs)
