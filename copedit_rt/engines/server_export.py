"""A model as a model repository of Triton Inference Server: encoder, step and decoder as three models.

The sampling loop is the client's: it sends latents, timestep and coefficients to the step, once per step. All three
take batches, and as each sample of a batch has its own timestep and coefficients, the server may join requests of
different studies at different steps.
"""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from copedit_rt import checkpoint
from copedit_rt.engines.onnx_engine import DECODER, ENCODER, STEP
from copedit_rt.engines.onnx_export import export_onnx
from copedit_rt.errors import CopeditError
from copedit_rt.files import new_folder, write_atomically

BACKENDS = ("onnxruntime", "tensorrt")
_WEIGHTS = {ENCODER: checkpoint.TOKENIZER, STEP: checkpoint.DENOISER, DECODER: checkpoint.TOKENIZER}
_MODEL = """\
name: "{name}"
backend: "{backend}"
max_batch_size: {max_batch}
{tensors}
dynamic_batching {{ }}
"""
_TENSOR = '{way} [ {{ name: "{name}" data_type: {kind} dims: [ {dims} ]{reshape} }} ]'


def export_triton(
    model: str | Path,
    output: Path,
    backend: str = "onnxruntime",
    precision: str = "float32",
    max_batch: int = 4,
    device: str = "auto",
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Write the repository into the new folder `output`; JSON-able: the models and the bytes of each file.

    The models are NAME-encoder, NAME-step and NAME-decoder, in version 1. max_batch: studies that the server may join.
    backend: onnxruntime, with the ONNX files and weights; or tensorrt, with plans for batches up to max_batch that are
    built here for the GPU `device`, compared with torch, and fit only it and this version of TensorRT. precision,
    progress: as for `onnx_export.export_tensorrt`.

    Raises CopeditError as `onnx_export.export_onnx` does, for an unknown backend or a max_batch below 1, and where
    TensorRT or a GPU is missing or a plan cannot be built or does not agree with torch.
    """
    if backend not in BACKENDS:
        raise CopeditError(f"backend {backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    if max_batch < 1:
        raise CopeditError(f"max_batch {max_batch}: must be at least 1")
    if backend == "onnxruntime" and device != "auto":
        raise CopeditError(f"device {device!r}: is that of tensorrt's plans, onnxruntime has none; leave it out")
    if backend == "tensorrt":
        from copedit_rt.engines import tensorrt_engine

        tensorrt_engine.library()
        tensorrt_engine.cuda(device)
    models = []
    with new_folder(output) as part:
        source = part / "onnx"
        export_onnx(model, source, precision)
        if backend == "tensorrt":
            plans = _plans(source, device, max_batch, progress)
        config = checkpoint.read_config(source)
        for graph in (ENCODER, STEP, DECODER):
            name = re.sub(r"[^\w.-]", "_", f"{config.name}-{Path(graph).stem}")
            version = part / name / "1"
            if backend == "onnxruntime":
                folder = version / "model.onnx"  # a folder, as the model is several files
                folder.mkdir(parents=True)
                os.replace(source / graph, folder / "model.onnx")
                _share(source / _WEIGHTS[graph], folder / _WEIGHTS[graph])
                described = folder / "model.onnx"
            else:
                version.mkdir(parents=True)
                os.replace(plans[graph], version / "model.plan")
                described = source / graph
            text = _MODEL.format(name=name, backend=backend, max_batch=max_batch, tensors=_tensors(described))
            write_atomically(part / name / "config.pbtxt", text.encode())
            models.append(name)
        shutil.rmtree(source)
    files = {p.relative_to(output).as_posix(): p.stat().st_size for p in sorted(output.rglob("*")) if p.is_file()}
    return {"models": models, "folder": str(output.absolute()), "backend": backend, "files": files}


def _plans(
    folder: Path, device: str, max_batch: int, progress: Callable[[str, int, int], None] | None
) -> dict[str, Path]:
    """A plan for each graph; the server has no torch that could do what TensorRT cannot."""
    from copedit_rt.engines.tensorrt_engine import GRAPHS, TensorRTEngine

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # on what torch does instead
        engine = TensorRTEngine(folder, device, progress=progress, batch=max_batch)
    for error in engine.refused.values():
        raise CopeditError(f"{error}; choose the backend onnxruntime or another precision") from error
    return {graph: engine.file(graph).path for graph in GRAPHS}


def _share(source: Path, target: Path) -> None:
    """The same file under two names, or where the disk knows no such thing, a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _tensors(graph: Path) -> str:
    """Inputs and outputs of a graph, without the dimension of the batch."""
    import onnx

    found = onnx.load(graph, load_external_data=False).graph
    return "\n".join([*_described("input", found.input), *_described("output", found.output)])


def _described(way: str, values: Iterable[Any]) -> Iterator[str]:
    from onnx import TensorProto

    kinds = {TensorProto.FLOAT: "TYPE_FP32", TensorProto.INT64: "TYPE_INT64", TensorProto.BOOL: "TYPE_BOOL"}
    for value in values:
        tensor = value.type.tensor_type
        dims = [-1 if dim.dim_param else dim.dim_value for dim in tensor.shape.dim][1:]
        # One number per sample: the server wants a dimension, the graph has none.
        reshape = "" if dims else " reshape: { shape: [ ] }"
        text = ", ".join(map(str, dims or [1]))
        yield _TENSOR.format(way=way, name=value.name, kind=kinds[tensor.elem_type], dims=text, reshape=reshape)
