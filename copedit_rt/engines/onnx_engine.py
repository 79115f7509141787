"""The engine on ONNX Runtime, on the CPU: needs neither torch nor triton. `copedit export onnx` writes its files."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from copedit_rt import checkpoint
from copedit_rt.checkpoint import digest
from copedit_rt.engines.graphs import DECODER, ENCODER, GRAPHS, STEP, GraphEngine
from copedit_rt.errors import CopeditError
from copedit_rt.files import read_json
from copedit_rt.prior import PRIOR

MANIFEST = "onnx.json"
FORMAT = 2  # of the manifest, and of the graphs' inputs and outputs
PRECISIONS = ("float32", "float16", "bfloat16")


class Refused(CopeditError):
    """ONNX files that must not be used, in a folder whose weights may be sound."""


def read_manifest(folder: Path) -> dict[str, Any]:
    """What the export wrote about itself; every file that it names is as it was written.

    Raises Refused for a file that is damaged, exchanged or missing, and for files of another origin or version;
    CopeditError for a folder that holds no ONNX files.
    """
    path, again = folder / MANIFEST, "export it again with copedit export onnx"
    graphs = [folder / name for name in (ENCODER, STEP, DECODER)]
    if not path.is_file():
        if foreign := [graph for graph in graphs if graph.is_file()]:
            raise Refused(f"{foreign[0]}: there is no {MANIFEST} beside it, so copedit did not write it; {again}")
        raise CopeditError(
            f"{folder} holds no ONNX files; write them where torch is installed, with copedit export onnx --model "
            f"{folder.name} -o FOLDER, and give --model FOLDER"
        )
    try:
        manifest = read_json(path)
        version, digests = manifest["format"], dict(manifest["sha256"])
        precision = manifest["precision"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise Refused(f"{path}: damaged, it is not what copedit export onnx writes; {again}") from error
    if version != FORMAT:
        raise Refused(f"{path}: of format {version}, this version reads {FORMAT}; {again}")
    if precision not in PRECISIONS:
        raise Refused(f"{path}: damaged, there is no precision {precision!r}; {again}")
    needed = {checkpoint.CONFIG, checkpoint.TOKENIZER, checkpoint.DENOISER, ENCODER, STEP, DECODER}
    for name in sorted(needed | {PRIOR} & set(digests)):
        try:
            same = digest(folder / name) == digests.get(name)
        except OSError as error:
            raise Refused(f"{folder / name}: cannot be read ({error.strerror}); {again}") from error
        if not same:
            kind = "damaged or not from this export" if name.endswith(".onnx") else "changed since the export"
            raise Refused(f"{folder / name}: {kind}, its hash is not that in {MANIFEST}; {again}")
    return manifest


@contextmanager
def refusing(path: Path, library: str) -> Iterator[None]:
    """Whatever a library raises over a graph, whose errors have no common base, as Refused in one line."""
    try:
        yield
    except Exception as error:
        raise Refused(f"{path}: {library}: {str(error).strip().splitlines()[0]}") from error


class OnnxEngine(GraphEngine):
    """See `engine.Engine`."""

    name, device, title = "onnxruntime", "cpu", "ONNX Runtime"

    def __init__(self, folder: Path, device: str = "auto", max_memory: int | None = None):
        """device: auto or cpu. max_memory: None, as these graphs take whole volumes.

        Threads: OMP_NUM_THREADS, or one a core. Raises CopeditError for another device, a max_memory, and where the
        library is not installed or the folder holds no ONNX files; Refused for files that must not be used.
        """
        if device not in ("auto", "cpu"):
            raise CopeditError(f"device {device!r}: the engine {self.name} runs on the CPU; use cpu, or engine torch")
        if max_memory is not None:
            raise CopeditError(f"max_memory: the engine {self.name} takes whole volumes; leave it out, or use torch")
        try:
            library = self._library()
        except ImportError as error:
            raise CopeditError(f"engine {self.name}: {error}; pip install {self.name}") from error
        manifest = read_manifest(folder)
        if manifest["precision"] == "bfloat16":
            raise Refused(f"{folder}: exported in bfloat16, which {self.title} cannot compute on a CPU; export float32")
        digests, self.precision = manifest["sha256"], manifest["precision"]
        self.config = checkpoint.read_config(folder)
        self.weights = {"tokenizer": digests[checkpoint.TOKENIZER], "denoiser": digests[checkpoint.DENOISER]}
        self.versions = {self.name: str(library.__version__)}
        threads = os.environ.get("OMP_NUM_THREADS", "")
        self._sessions = self._open(folder, library, int(threads) if threads.isdecimal() else 0)

    def _library(self) -> Any:
        return importlib.import_module("onnxruntime")

    def _open(self, folder: Path, library: Any, threads: int) -> dict[str, Any]:
        """What runs each graph, and the inputs that each takes. Raises Refused for one that cannot be loaded."""
        options = library.SessionOptions()
        options.log_severity_level = 4  # errors are raised as well
        options.intra_op_num_threads = threads
        sessions = {}
        for name in GRAPHS:
            with refusing(folder / name, f"{self.title} {library.__version__}"):
                sessions[name] = library.InferenceSession(folder / name, options, providers=["CPUExecutionProvider"])
        self._takes = {name: {i.name for i in session.get_inputs()} for name, session in sessions.items()}
        return sessions

    def _run(self, graph: str, **inputs: np.ndarray) -> list[np.ndarray]:
        given = {name: value for name, value in inputs.items() if name in self._takes[graph]}
        try:
            return self._compute(graph, given)
        except Exception as error:
            if "alloc" in str(error).lower():
                raise MemoryError(str(error)) from error
            raise

    def _compute(self, graph: str, given: dict[str, np.ndarray]) -> list[np.ndarray]:
        return self._sessions[graph].run(None, given)
