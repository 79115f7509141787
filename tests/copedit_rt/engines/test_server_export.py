"""The model repository, read back with the server's own schema of config.pbtxt."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small import BRAIN, GRID, HEART, study

from copedit_rt import checkpoint, cli
from copedit_rt.engines import onnx_export, server_export, tensorrt_engine
from copedit_rt.errors import CopeditError
from copedit_rt.synthesizer import Synthesizer

onnx = pytest.importorskip("onnx", reason="needs the extra export")
ort = pytest.importorskip("onnxruntime", reason="needs the extra export")
text_format = pytest.importorskip("google.protobuf.text_format", reason="needs the extra export")
schema = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="needs tritonclient and grpcio")
stand_in = pytest.importorskip("stand_in")

KINDS = {"TYPE_FP32": onnx.TensorProto.FLOAT, "TYPE_INT64": onnx.TensorProto.INT64, "TYPE_BOOL": onnx.TensorProto.BOOL}
PARTS = ("encoder", "step", "decoder")
INSIDE = Path(__file__).parent / "inside" / "triton_python_backend_utils.py"


@pytest.fixture
def exported_already(brain, monkeypatch):
    """Exports of the small brain take its files from another test: an export takes seconds."""

    def copy(model, output, precision="float32"):
        shutil.copytree(brain, output, ignore=shutil.ignore_patterns(tensorrt_engine.FOLDER), dirs_exist_ok=True)

    monkeypatch.setattr(server_export, "export_onnx", copy)
    return brain


def configs(folder: Path) -> dict[str, schema.ModelConfig]:
    """Per model of a repository its configuration; every name and type is one that the server knows."""
    found = {}
    for path in sorted(folder.iterdir()):
        assert path.is_dir(), f"{path} is no model"
        text = (path / "config.pbtxt").read_text()
        found[path.name] = text_format.Parse(text, schema.ModelConfig())
        assert found[path.name].name == path.name and [p.name for p in path.iterdir() if p.is_dir()] == ["1"]
    return found


def check_tensors(config: schema.ModelConfig, graph) -> None:
    """The server's view of each tensor is the graph's."""
    for described, values in ((config.input, graph.input), (config.output, graph.output)):
        assert [tensor.name for tensor in described] == [value.name for value in values]
        for tensor, value in zip(described, values, strict=True):
            kind = value.type.tensor_type
            assert KINDS[schema.DataType.Name(tensor.data_type)] == kind.elem_type
            assert kind.shape.dim[0].dim_param == "batch"
            inner = [-1 if dim.dim_param else dim.dim_value for dim in kind.shape.dim[1:]]
            assert list(tensor.dims) == (inner or [1]) and 0 not in tensor.dims
            assert tensor.HasField("reshape") == (not inner) and not list(tensor.reshape.shape)


def check_study(config: schema.ModelConfig, count: int) -> None:
    """Images may be left out, and all that has a default; the server takes so many studies at once."""
    assert config.backend == "python" and not config.max_batch_size and config.instance_group[0].count == count
    given = {tensor.name: tensor for tensor in config.input}
    assert [name for name in given if not given[name].optional] == ["affine"]
    assert [list(given[name].dims) for name in BRAIN.elements] == [[-1, -1, -1]] * 4
    assert {tensor.name for tensor in config.output} == {"elements", "images", "deviation", "about"}


def test_onnxruntime(exported_already, tmp_path, capsys):
    cli.export_triton(str(exported_already), tmp_path / "repository", max_batch=8)
    assert "tiny-brain-step/config.pbtxt" in capsys.readouterr().out
    found = configs(tmp_path / "repository")
    assert sorted(found) == sorted(f"tiny-brain-{part}" for part in (*PARTS, "study"))
    check_study(found.pop("tiny-brain-study"), 8)
    generator = np.random.default_rng(0)
    for name, config in found.items():
        assert config.backend == "onnxruntime" and config.max_batch_size == 8 and config.HasField("dynamic_batching")
        model = tmp_path / "repository" / name / "1" / "model.onnx" / "model.onnx"
        check_tensors(config, onnx.load(model, load_external_data=False).graph)
        # What the server would send, a batch of two: the folder holds all that the model needs.
        given = {}
        for tensor in config.input:
            shape = [2, *(3 if n == -1 else n for n in (() if tensor.HasField("reshape") else tensor.dims))]
            kind = {"TYPE_FP32": np.float32, "TYPE_INT64": np.int64, "TYPE_BOOL": bool}
            given[tensor.name] = generator.random(shape).astype(kind[schema.DataType.Name(tensor.data_type)])
        if "observed" in given:
            given["observed"][:] = True
        outputs = ort.InferenceSession(model).run(None, given)
        for tensor, value in zip(config.output, outputs, strict=True):
            assert len(value) == 2 and all(n in (-1, m) for n, m in zip(tensor.dims, value.shape[1:], strict=True))
    step = {tensor.name: list(tensor.dims) for tensor in found["tiny-brain-step"].input}
    assert step["t"] == [1] and step["coefficients"] == [2, 2] and step["z"] == [4, 3, *BRAIN.latent]


def test_a_batch_of_steps_is_each_step_alone(brain):
    """What lets the server join studies at different steps."""
    session = ort.InferenceSession(brain / "step.onnx")
    generator = np.random.default_rng(1)
    shape = (3, 4, 3, *BRAIN.latent)
    given = {
        "z": generator.standard_normal(shape, np.float32),
        "t": np.array([499, 250, 3]),
        "prompts": generator.standard_normal((3, 3, 16), np.float32),
        "observed": np.array([[True, False, True, False]] * 3),
        "previous": generator.standard_normal(shape, np.float32),
        "coefficients": generator.standard_normal((3, 2, 2), np.float32),
    }
    given = {value.name: given[value.name] for value in session.get_inputs()}
    whole, _ = session.run(None, given)
    for i in range(3):
        alone, _ = session.run(None, {name: x[i : i + 1] for name, x in given.items()})
        np.testing.assert_allclose(whole[i], alone[0], atol=1e-4)


@pytest.fixture
def tensorrt(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", stand_in)
    monkeypatch.setattr(tensorrt_engine, "cuda", lambda device: torch.device("cpu"))
    monkeypatch.setattr(tensorrt_engine, "gpu", lambda device: "stand-in (sm_00)")
    stand_in.faults.clear()
    yield stand_in
    stand_in.faults.clear()


def test_tensorrt(exported_already, tensorrt, tmp_path):
    report = server_export.export_triton(exported_already, tmp_path / "repository", "tensorrt", max_batch=5)
    found = configs(tmp_path / "repository")
    for graph, part in zip(tensorrt_engine.GRAPHS, PARTS, strict=True):
        config = found[f"tiny-brain-{part}"]
        assert config.backend == "tensorrt" and config.max_batch_size == 5
        check_tensors(config, onnx.load(exported_already / graph, load_external_data=False).graph)
        plan = (tmp_path / "repository" / config.name / "1" / "model.plan").read_bytes()
        engine = stand_in.ICudaEngine(plan)
        assert all(least[0] == 1 and most[0] == 5 for least, most in engine._ranges.values())
    plans = [name for name in report["files"] if "-study/" not in name]
    assert len(plans) == 6, "plans and configurations, nothing else"
    check_study(found["tiny-brain-study"], 5)
    about = json.loads((tmp_path / "repository/tiny-brain-study/1/model/server.json").read_text())
    assert about["device"] == "cuda" and about["max_batch"] == 5


@pytest.mark.parametrize("fault", ["build", "wrong"])
def test_a_plan_that_cannot_be_leaves_nothing(exported_already, tensorrt, tmp_path, fault):
    tensorrt.faults[fault] = "decoder.onnx"
    with pytest.raises(CopeditError, match=r"decoder.onnx: .*; choose the backend onnxruntime or another precision"):
        server_export.export_triton(exported_already, tmp_path / "repository", "tensorrt")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_asked_for(brain, tmp_path, monkeypatch):
    for options, message in (({"backend": "torch"}, "backend 'torch' is unknown"), ({"max_batch": 0}, "at least 1")):
        with pytest.raises(CopeditError, match=message):
            server_export.export_triton(brain, tmp_path / "new", **options)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(CopeditError, match="TensorRT cannot be loaded"):
        server_export.export_triton(brain, tmp_path / "new", "tensorrt")
    with pytest.raises(CopeditError, match="is there and not empty"):
        server_export.export_triton(brain, brain)
    assert not list(tmp_path.iterdir())


def test_export_of_plans(brain, exported_already, tensorrt, tmp_path, monkeypatch, capsys):
    """`copedit export tensorrt`: a model folder with plans, which the engine then takes as they are."""
    monkeypatch.setattr(onnx_export, "export_onnx", lambda *arguments: server_export.export_onnx(*arguments) or {})
    cli.export_tensorrt(str(brain), tmp_path / "model", "float32")
    assert "step: cosine 1.000000, max error" in capsys.readouterr().out
    tensorrt.built.clear()
    engine = tensorrt_engine.TensorRTEngine(tmp_path / "model")
    assert not tensorrt.built and not engine.notes and engine.config == checkpoint.read_config(brain)
    monkeypatch.setattr(stand_in.Builder, "build_serialized_network", lambda *arguments: None)
    with pytest.raises(CopeditError, match="cannot build it"):
        cli.export_tensorrt(str(brain), tmp_path / "other", "float32")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# ---- the study, with a stand-in for the server; the real one: test_triton_server.py


def ask(repository: Path, model: str, folder: Path, **inputs: np.ndarray) -> tuple[dict[str, np.ndarray], str]:
    """Outputs of a model in Python and what it refused, in a process that has the repository's runtime alone."""
    given, made = folder / "given.npz", folder / "made.npz"
    np.savez(given, **inputs)
    command = [sys.executable, INSIDE, repository, model, given, made]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ""}, timeout=300)
    assert done.returncode == 0, done.stderr
    with np.load(made, allow_pickle=True) as held:
        return {name: held[name] for name in held.files}, done.stdout.strip()


@pytest.mark.parametrize(("config", "name"), [(BRAIN, "brain"), (HEART, "heart")])
def test_a_study_is_that_of_the_engine(config, name, request, tmp_path, monkeypatch):
    """With the runtime that the repository holds: without torch, every file of it is needed, and no other is."""
    exported = request.getfixturevalue(name)
    monkeypatch.setattr(server_export, "export_onnx", lambda m, o, p: shutil.copytree(exported, o, dirs_exist_ok=True))
    server_export.export_triton(exported, tmp_path / "repository", "python", max_batch=2)
    given = study(config, "t1", "flair")
    images = {element: volume.data for element, volume in given.volumes.items()}
    images |= {"seed": np.array([5]), "steps": np.array([2], np.int32)}
    images["study"] = np.array([given.name.encode()], object)
    found, refused = ask(tmp_path / "repository", f"{config.name}-study", tmp_path, affine=GRID[None], **images)
    expected = Synthesizer.load(exported, engine="onnxruntime").synthesize(given, seed=5, steps=2)
    assert not refused and {word.decode() for word in found["elements"]} == expected.study.synthetic
    for element, image in zip(found["elements"], found["images"], strict=True):
        assert np.array_equal(image, expected.study.volumes[element.decode()].data)
    about = json.loads(found["about"][0])
    assert about["perception"] == expected.perception.to_dict() and about["record"]["engine"] == "triton (python)"
    _, refused = ask(tmp_path / "repository", f"{config.name}-study", tmp_path, affine=GRID[None])
    assert refused.startswith("invalid study: expected images of a brain, or one short-axis stack")


def test_a_graph_in_python(exported_already, tmp_path):
    server_export.export_triton(exported_already, tmp_path / "repository", "python")
    assert configs(tmp_path / "repository")["tiny-brain-decoder"].backend == "python"
    z = np.random.default_rng(0).standard_normal((1, 2, 3, *BRAIN.latent), np.float32)
    found, _ = ask(tmp_path / "repository", "tiny-brain-decoder", tmp_path, z=z)
    expected = ort.InferenceSession(exported_already / "decoder.onnx").run(None, {"z": z})
    assert np.array_equal(found["images"], expected[0])
    _, refused = ask(tmp_path / "repository", "tiny-brain-decoder", tmp_path, z=z[:, :, :1])
    assert refused.startswith("internal onnxruntime: ") and "\n" not in refused
    needs = (tmp_path / "repository/tiny-brain-study/requirements.txt").read_text().split()
    assert needs == ["numpy<2", "nibabel", "safetensors", "onnxruntime"]
