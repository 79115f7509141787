"""The engine on OpenVINO, on the CPU: the files of `copedit export onnx` as they are, without torch and triton."""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from copedit_rt.engines.onnx_engine import GRAPHS, MANIFEST, OnnxEngine, refusing
from copedit_rt.errors import CopeditError

CACHE = "openvino"  # the folder of compiled graphs in that of the model
_TOOLS = "openvino.tools.ovc"  # the converter: not needed, and it brings telemetry
_TYPES = {"float32": "f32", "bfloat16": "bf16"}


class OpenVinoEngine(OnnxEngine):
    """See `engine.Engine`."""

    name, title = "openvino", "OpenVINO"

    def __init__(self, folder: Path, device: str = "auto", max_memory: int | None = None, dtype: str = "auto"):
        """device, max_memory, threads and errors: as of `OnnxEngine`.

        dtype: of the products, float32 or bfloat16; auto is float32. What OpenVINO makes of a graph is kept in the
        model's folder where that can be written, and is loaded from there the next time.

        Raises CopeditError for another dtype, and for bfloat16 on a processor that would only emulate it.
        """
        if dtype not in ("auto", *_TYPES):
            known = " or ".join(_TYPES)
            raise CopeditError(f"dtype {dtype!r}: the engine openvino computes in {known}; use one of them, or auto")
        self._dtype = "float32" if dtype == "auto" else dtype
        super().__init__(folder, device, max_memory)
        self.precision = self._dtype

    def _library(self) -> Any:
        block = _TOOLS not in sys.modules
        if block:
            sys.modules[_TOOLS] = None  # type: ignore[assignment]  # importing it is an ImportError, which is expected
        try:
            return importlib.import_module("openvino")
        finally:
            if block:
                del sys.modules[_TOOLS]

    def _open(self, folder: Path, library: Any, threads: int) -> dict[str, Any]:
        core = library.Core()
        if self._dtype == "bfloat16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise CopeditError("dtype 'bfloat16': this processor has no products in bfloat16; use float32 or auto")
        settings: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": _TYPES[self._dtype],
            "ENABLE_HYPER_THREADING": False,
        }
        if threads:
            settings["INFERENCE_NUM_THREADS"] = threads
        if os.access(folder, os.W_OK):
            # Its own keys know a file by name, size and time; ours by what is in it and in the weights.
            content = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()[:16]
            settings["CACHE_DIR"] = str(folder / CACHE / content)
        compiled = {}
        for name in GRAPHS:
            with refusing(folder / name, f"{self.title} {library.__version__}"):
                compiled[name] = core.compile_model(str(folder / name), "CPU", settings)
        self._takes = {name: {i.any_name for i in graph.inputs} for name, graph in compiled.items()}
        return compiled

    def _compute(self, graph: str, given: dict[str, np.ndarray]) -> list[np.ndarray]:
        made = self._sessions[graph](given)
        return [np.array(made[i]) for i in range(len(made))]  # copies: the memory is the graph's
