"""A model as a model repository of Triton Inference Server: encoder, step and decoder as three models, and the study.

The model NAME-study takes images and returns images: it runs in Python on the server, prepares the study, and calls the
other three, once a step. Who wants the loop for himself finds the three as they are: they take batches, and as each
sample of a batch has its own timestep and coefficients, the server may join requests of different studies at different
steps.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import copedit_rt
from copedit_rt import checkpoint
from copedit_rt.config import ModelConfig
from copedit_rt.engines.graphs import DECODER, ENCODER, GRAPHS, STEP
from copedit_rt.engines.onnx_engine import read_manifest
from copedit_rt.engines.onnx_export import export_onnx
from copedit_rt.errors import CopeditError
from copedit_rt.files import new_folder, write_atomically
from copedit_rt.prior import PRIOR
from copedit_rt.trained import TRAINING

BACKENDS = ("onnxruntime", "python", "tensorrt")
_OURS = Path(copedit_rt.__file__).parent
_WEIGHTS = {ENCODER: checkpoint.TOKENIZER, STEP: checkpoint.DENOISER, DECODER: checkpoint.TOKENIZER}
_MODEL = """\
name: "{name}"
backend: "{backend}"
max_batch_size: {max_batch}
{tensors}
dynamic_batching {{ }}
"""
# As many at once as the server may join: each waits for its steps most of the time.
_STUDY = """\
name: "{name}"
backend: "python"
max_batch_size: 0
{tensors}
instance_group [ {{ kind: KIND_CPU count: {count} }} ]
"""
_TENSOR = '{way} [ {{ name: "{name}" data_type: {kind} dims: [ {dims} ]{more} }} ]'
# Of the study besides its images: name, type, dimensions. All may be left out but the affine.
_AFFINE = ("affine", "TYPE_FP64", "-1, 4, 4")
_OPTIONS = (
    ("study", "TYPE_STRING", "1"),
    ("steps", "TYPE_INT32", "1"),
    ("seed", "TYPE_INT64", "1"),
    ("samples", "TYPE_INT32", "1"),
    ("solver", "TYPE_STRING", "1"),
)
_OF_BRAINS = (("target", "TYPE_STRING", "-1"), ("detail", "TYPE_STRING", "1"))
_OF_HEARTS = (("missing_slices", "TYPE_INT32", "-1"),)
_MADE = (
    ("elements", "TYPE_STRING", "-1"),
    ("images", "TYPE_FP32", "-1, -1, -1, -1"),
    ("deviation", "TYPE_FP32", "-1, -1, -1, -1"),
    ("about", "TYPE_STRING", "1"),
)
# The part of the runtime that a study needs, as files below copedit_rt. NumPy and nibabel, no torch.
_RUNTIME = (
    *("__init__ archive checkpoint config device errors files perception prior prior_heart schedule".split()),
    *("synthesizer task trained engines/__init__ engines/engine engines/graphs images/__init__ images/bids".split()),
    *("images/detail images/find images/grids images/intensity images/names images/nifti images/prepare".split()),
    "images/study",
    *(f"images/dicom/{name}" for name in ("__init__", "convert", "headers", "match", "series", "studies")),
)
_NEEDS = {"onnxruntime": (), "tensorrt": (), "python": ("onnxruntime",)}


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

    The models are NAME-encoder, NAME-step, NAME-decoder and NAME-study, in version 1. max_batch: studies that the
    server may join, and samples that a study asks for at once. backend: of the first three; onnxruntime, with the ONNX
    files and weights; python, with the same and a model.py for servers that have no other; or tensorrt, with plans for
    batches up to max_batch that are built here for the GPU `device`, compared with torch, and fit only it and this
    version of TensorRT. precision, progress: as for `onnx_export.export_tensorrt`.

    Raises CopeditError as `onnx_export.export_onnx` does, for an unknown backend or a max_batch below 1, and where
    TensorRT or a GPU is missing or a plan cannot be built or does not agree with torch.
    """
    if backend not in BACKENDS:
        raise CopeditError(f"backend {backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    if max_batch < 1:
        raise CopeditError(f"max_batch {max_batch}: must be at least 1")
    if backend != "tensorrt" and device != "auto":
        raise CopeditError(f"device {device!r}: is that of tensorrt's plans, {backend} has none; leave it out")
    if backend == "tensorrt":
        from copedit_rt.engines import tensorrt_engine

        tensorrt_engine.library()
        tensorrt_engine.cuda(device)
    models: dict[str, Any] = {}
    with new_folder(output) as part:
        source = part / "onnx"
        export_onnx(model, source, precision)
        plans = _plans(source, device, max_batch, progress) if backend == "tensorrt" else {}
        config, manifest = checkpoint.read_config(source), read_manifest(source)
        stem = re.sub(r"[^\w.-]", "_", config.name)
        for graph in GRAPHS:
            name = f"{stem}-{Path(graph).stem}"
            version = part / name / "1"
            version.mkdir(parents=True)
            models[graph] = _inside(source / graph) | {"model": name}
            text = _MODEL.format(name=name, backend=backend, max_batch=max_batch, tensors=_tensors(source / graph))
            write_atomically(part / name / "config.pbtxt", text.encode())
            if backend == "tensorrt":
                os.replace(plans[graph], version / "model.plan")
            else:
                _place(source, graph, version, backend)
        hashes = {Path(name).stem: manifest["sha256"][name] for name in (checkpoint.TOKENIZER, checkpoint.DENOISER)}
        about = {
            "backend": backend,
            "device": "cuda" if backend == "tensorrt" else "cpu",
            "precision": manifest["precision"],
            "max_batch": max_batch,
            "weights": hashes,
            "graphs": models,
        }
        _study(part / f"{stem}-study", source, config, about)
        shutil.rmtree(source)
    files = {p.relative_to(output).as_posix(): p.stat().st_size for p in sorted(output.rglob("*")) if p.is_file()}
    names = [*(about["model"] for about in models.values()), f"{stem}-study"]
    return {"models": names, "folder": str(output.absolute()), "backend": backend, "files": files}


def _place(source: Path, graph: str, version: Path, backend: str) -> None:
    """A graph and its weights; onnxruntime wants a folder of them, as the model is several files."""
    folder = version / "model.onnx" if backend == "onnxruntime" else version
    folder.mkdir(exist_ok=True)
    os.replace(source / graph, folder / "model.onnx")
    _share(source / _WEIGHTS[graph], folder / _WEIGHTS[graph])
    if backend == "python":
        shutil.copyfile(_OURS / "triton_models/graph.py", version / "model.py")


def _study(folder: Path, source: Path, config: ModelConfig, about: dict[str, Any]) -> None:
    """The model that takes studies: the runtime without torch, and of the model what is no network."""
    version, model = folder / "1", folder / "1" / "model"
    model.mkdir(parents=True)
    shutil.copyfile(_OURS / "triton_models/study.py", version / "model.py")
    for name in _RUNTIME:
        target = version / "copedit_rt" / f"{name}.py"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(_OURS / f"{name}.py", target)
    for name in (checkpoint.CONFIG, PRIOR, TRAINING):
        if (source / name).is_file():
            shutil.copyfile(source / name, model / name)
    write_atomically(model / "server.json", (json.dumps(about, indent=1) + "\n").encode())
    needs = ["numpy<2", "nibabel", "safetensors", *_NEEDS[about["backend"]]]
    write_atomically(folder / "requirements.txt", ("\n".join(needs) + "\n").encode())
    text = _STUDY.format(name=folder.name, count=about["max_batch"], tensors="\n".join(_of_a_study(config)))
    write_atomically(folder / "config.pbtxt", text.encode())


def _of_a_study(config: ModelConfig) -> Iterator[str]:
    """Inputs and outputs of the model that takes studies."""
    images = [(name, "TYPE_FP32", "-1, -1, -1") for name in config.task.volumes(config.elements)]
    options = [*_OPTIONS, *(_OF_HEARTS if config.task.joint else _OF_BRAINS)]
    for name, kind, dims in (*images, *options):
        yield _TENSOR.format(way="input", name=name, kind=kind, dims=dims, more=" optional: true")
    for way, (name, kind, dims) in (("input", _AFFINE), *(("output", made) for made in _MADE)):
        yield _TENSOR.format(way=way, name=name, kind=kind, dims=dims, more="")


def _inside(graph: Path) -> dict[str, list[str]]:
    """Names of a graph's inputs and outputs."""
    import onnx

    found = onnx.load(graph, load_external_data=False).graph
    return {"inputs": [value.name for value in found.input], "outputs": [value.name for value in found.output]}


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
        yield _TENSOR.format(way=way, name=value.name, kind=kinds[tensor.elem_type], dims=text, more=reshape)
