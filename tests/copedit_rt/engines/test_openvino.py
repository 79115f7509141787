"""The engine on OpenVINO against torch and ONNX Runtime; its cache; what it does not load and cannot do."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small import study

from copedit_rt import checkpoint
from copedit_rt.engines.onnx_engine import DECODER, OnnxEngine, Refused
from copedit_rt.engines.torch_engine import TorchEngine
from copedit_rt.errors import CopeditError
from copedit_rt.synthesizer import Synthesizer

ov = pytest.importorskip("openvino", reason="needs the extra openvino")
pytest.importorskip("onnxruntime", reason="needs the extra export")
from copedit_rt.engines.openvino_engine import CACHE, OpenVinoEngine  # noqa: E402

ROOT = Path(__file__).resolve().parents[3]
NARROW = "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


# Copies, because the engine keeps a cache in the folder.


@pytest.fixture
def copy(brain, tmp_path) -> Path:
    return Path(shutil.copytree(brain, tmp_path / "copy"))


@pytest.fixture
def copies(either, tmp_path) -> Path:
    """Of a brain, then of a heart."""
    return Path(shutil.copytree(either, tmp_path / "copies"))


def outputs(engine) -> list[np.ndarray]:
    """Everything that an engine computes of one input."""
    config = engine.config
    m, generator = len(config.elements), np.random.default_rng(0)
    images = generator.random((1, m - 1, 1, *config.image), np.float32)
    encoded = engine.encode(images)
    observed = np.arange(m)[None] < m - 1
    z = generator.standard_normal((1, m, *encoded.latents.shape[2:])).astype(np.float32)
    z[observed] = encoded.latents[0]
    sampled = engine.sample(z, encoded.prompts, observed, 3, "dpm2m")
    assert np.array_equal(sampled[observed], z[observed])
    chosen = sampled if config.task.joint else sampled[~observed][None]
    return [*vars(encoded).values(), sampled, engine.decode(chosen)]


def test_it_computes_what_torch_and_onnx_runtime_do(copies):
    """The gate: as near to torch as ONNX Runtime is."""
    config, vae, _ = checkpoint.load_tokenizer(copies)
    _, net, _ = checkpoint.load_denoiser(copies)
    exact = outputs(TorchEngine(config, vae, net, torch.device("cpu")))
    for engine in (OnnxEngine(copies), OpenVinoEngine(copies)):
        for here, there in zip(outputs(engine), exact, strict=True):
            np.testing.assert_allclose(here, there, rtol=1e-4, atol=1e-4, err_msg=engine.name)


@pytest.mark.skipif(not NARROW, reason="needs a processor with products in bfloat16")
def test_bfloat16(copies):
    """Within a few of its roundings of float32."""
    narrow, wide = outputs(OpenVinoEngine(copies, dtype="bfloat16")), outputs(OpenVinoEngine(copies))
    for here, there in zip(narrow, wide, strict=True):
        assert np.abs(here - there).max() <= 8 * 2**-8 * np.abs(there).max()


@pytest.mark.skipif(NARROW, reason="this processor has products in bfloat16")
def test_bfloat16_is_not_emulated(copy):
    with pytest.raises(CopeditError, match="no products in bfloat16; use float32"):
        OpenVinoEngine(copy, dtype="bfloat16")


def test_graphs_are_compiled_once(copy):
    """The second time from the cache, which belongs to these weights."""
    first = outputs(OpenVinoEngine(copy))
    (folder,) = (copy / CACHE).iterdir()
    kept = {path: path.stat().st_mtime_ns for path in folder.rglob("*.blob")}
    assert len(kept) == 3
    again = outputs(OpenVinoEngine(copy))
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.blob")} == kept
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_folder_that_cannot_be_written_has_no_cache(copy, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    OpenVinoEngine(copy)
    assert not (copy / CACHE).exists()


def test_a_study_by_the_synthesizer(copy):
    made = {
        engine: Synthesizer.load(copy, "cpu", engine=engine).synthesize(study_of(copy), seed=5)
        for engine in ("torch", "openvino")
    }
    assert made["openvino"].record["engine"] == "openvino" and made["openvino"].record["dtype"] == "float32"
    for name, volume in made["torch"].study.volumes.items():
        np.testing.assert_allclose(made["openvino"].study.volumes[name].data, volume.data, atol=1e-3)


def study_of(folder: Path):
    return study(checkpoint.read_config(folder), "t1", "t2")


def test_neither_torch_nor_telemetry_is_loaded(copy):
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from copedit_rt.engines.openvino_engine import OpenVinoEngine\n"
        "OpenVinoEngine(Path(sys.argv[1]))\n"
        "print({'torch', 'triton', 'openvino_telemetry', 'openvino.tools.ovc'} & set(sys.modules))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-c", code, copy]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["set()"], done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda"}, "engine openvino runs on the CPU"),
        ({"max_memory": 2**30}, "engine openvino takes whole volumes"),
        ({"dtype": "float16"}, "computes in float32 or bfloat16"),
    ],
)
def test_what_it_cannot_do(brain, options, message):
    with pytest.raises(CopeditError, match=message):
        Synthesizer.load(brain, **{"device": "cpu", **options}, engine="openvino")


def test_a_damaged_graph_is_refused(copy):
    (copy / DECODER).write_bytes((copy / DECODER).read_bytes()[:-1])
    with pytest.raises(Refused, match="damaged or not from this export"):
        OpenVinoEngine(copy)


def test_openvino_is_not_installed(brain, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(CopeditError, match="pip install openvino"):
        Synthesizer.load(brain, "cpu", engine="openvino")
