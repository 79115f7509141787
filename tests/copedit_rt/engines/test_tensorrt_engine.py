"""The engine on TensorRT, without TensorRT or a GPU: its calls against the real API, the rest against a stand-in."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from small import BRAIN, HEART, check_batch, damage, exported, study

from copedit_rt import checkpoint
from copedit_rt.config import ModelConfig
from copedit_rt.engines import onnx_export, tensorrt_engine
from copedit_rt.engines.onnx_engine import DECODER, ENCODER, STEP
from copedit_rt.engines.tensorrt_engine import FOLDER, GRAPHS, Parity, PlanFile, TensorRTEngine, parity, shapes
from copedit_rt.errors import CopeditError
from copedit_rt.synthesizer import Synthesizer

onnx = pytest.importorskip("onnx", reason="needs the extra export")
pytest.importorskip("onnxruntime", reason="needs the extra export")
stand_in = pytest.importorskip("stand_in")
HERE = Path(__file__).resolve().parent
SOURCE = Path(tensorrt_engine.__file__)
CPU = torch.device("cpu")


# ---- the API contract

SYMBOLS = {
    "libnvinfer.so.11": (
        "createInferBuilder_INTERNAL",
        "createInferRefitter_INTERNAL",
        "createInferRuntime_INTERNAL",
        "getBuilderPluginRegistry",
        "getPluginRegistry",
    ),
    "libnvinfer_plugin.so.11": ("initLibNvInferPlugins",),
    "libnvonnxparser.so.11": (
        "createNvOnnxParser_INTERNAL",
        "createNvOnnxParserRefitter_INTERNAL",
        "getNvOnnxParserVersion",
    ),
}


def compiler() -> str:
    found = shutil.which("cc") or shutil.which("gcc")
    if found is None:
        pytest.skip("needs a C compiler")
    return found


def library(folder: Path, name: str, symbols: tuple[str, ...]) -> None:
    """A shared library whose functions do nothing."""
    code = "".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in symbols)
    command = [compiler(), "-shared", "-fPIC", "-x", "c", "-", "-o", str(folder / name)]
    subprocess.run(command, input=code, text=True, check=True, timeout=60)


@pytest.fixture(scope="module")
def stub(tmp_path_factory) -> Path:
    """Libraries with which the real bindings can be imported."""
    if find_spec("tensorrt_bindings") is None:
        pytest.skip("needs tensorrt-cu13-bindings, of the extra test")
    folder = tmp_path_factory.mktemp("stub")
    for name, symbols in SYMBOLS.items():
        library(folder, name, symbols)
    return folder


def script(libraries: Path, *arguments: str | Path, timeout: float = 120) -> str:
    """Output of Python with these libraries in front of all others."""
    found = os.pathsep.join([str(libraries), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])])
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | {"LD_LIBRARY_PATH": found},
        cwd=HERE.parents[2],
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def contract(stub: Path, source: Path) -> dict[str, list[str]]:
    return json.loads(script(stub, HERE / "tensorrt_api.py", source))


def test_every_name_of_tensorrt_exists_in_the_real_api(stub):
    found = contract(stub, SOURCE)
    assert found["wrong"] == []
    # The check has followed values to where they matter, not only names after `trt.`.
    assert {
        "IExecutionContext.execute_async_v3",
        "ICudaEngine.create_execution_context",
        "Builder.build_serialized_network",
        "IAttention.decomposable",
        "ParserError.desc",
        "ITimingCache.serialize",
        "IProgressMonitor.step_complete",
        "LayerType.ATTENTION_INPUT",
    } <= set(found["uses"])


@pytest.mark.parametrize(
    ("now", "before", "line"),
    [
        ("trt.BuilderFlag.TF32", "trt.BuilderFlag.FP16", "BuilderFlag.FP16 does not exist"),
        ("trt.OnnxParser(network", "trt.OnnxReader(network", "OnnxReader does not exist"),
        ("execute_async_v3(", "execute_async_v2(", "IExecutionContext.execute_async_v2 does not exist"),
        (".decomposable = True", ".splittable = True", "IAttention.splittable does not exist"),
        ("engine.num_io_tensors", "engine.num_bindings", "ICudaEngine.num_bindings does not exist"),
        ("set_timing_cache(cache, False)", "set_timing_cache(cache)", "does not take these arguments"),
        ("create_network(1 <<", "create_network(kinds=1 <<", "does not take these arguments"),
        ("def phase_start(", "def phase_begin(", "Monitor has no phase_start, which TensorRT calls"),
        ("error: trt.ParserError = ", "error = ", "the bindings do not say: annotate it"),
    ],
)
def test_the_contract_notices(stub, tmp_path, now, before, line):
    text = SOURCE.read_text("utf-8")
    assert now in text
    (tmp_path / "changed.py").write_text(text.replace(now, before))
    assert any(line in wrong for wrong in contract(stub, tmp_path / "changed.py")["wrong"])


def test_the_stand_in_has_only_what_the_real_api_has(stub):
    code = """
        import enum, sys
        sys.path.insert(0, "tests/copedit_rt/engines")
        import stand_in, tensorrt_bindings as trt
        for name, kind in vars(stand_in).items():
            if isinstance(kind, type) and kind.__module__ == "stand_in":
                members = kind.__members__ if issubclass(kind, enum.Enum) else vars(kind)
                for part in members:
                    if not part.startswith("_"):
                        assert hasattr(getattr(trt, name), part), f"{name}.{part}"
                        print(name, part)
    """
    assert len(script(stub, "-c", textwrap.dedent(code)).splitlines()) > 40


# ---- the engine on the stand-in


@pytest.fixture
def tensorrt(monkeypatch):
    """The stand-in under TensorRT's name, and the CPU as its GPU."""
    monkeypatch.setitem(sys.modules, "tensorrt", stand_in)
    monkeypatch.setattr(tensorrt_engine, "cuda", lambda device: CPU)
    monkeypatch.setattr(tensorrt_engine, "gpu", lambda device: "stand-in (sm_00)")
    for record in (stand_in.faults, stand_in.built, stand_in.timings):
        record.clear()
    yield stand_in
    stand_in.faults.clear()


@pytest.fixture
def fresh(brain, tmp_path) -> Path:
    """An export without plans that a test may change."""
    return Path(shutil.copytree(brain, tmp_path / "model", ignore=shutil.ignore_patterns(FOLDER)))


@pytest.fixture
def ready(fresh, tensorrt) -> Path:
    """An export with plans."""
    TensorRTEngine(fresh)
    tensorrt.built.clear()
    return fresh


def plan(folder: Path, graph: str = STEP) -> Path:
    (found,) = (folder / FOLDER).glob(f"{Path(graph).stem}-*.plan")
    return found


def same(found, exact) -> None:
    """Results of a study on two engines."""
    for name in exact.study.synthetic or ("sax",):
        np.testing.assert_allclose(found.study.volumes[name].data, exact.study.volumes[name].data, atol=1e-4)
    np.testing.assert_allclose(found.perception.missing, exact.perception.missing, atol=1e-4)


@pytest.mark.parametrize("which", ["brain", "heart"])
def test_a_study_comes_out_as_on_torch(which, request, tmp_path, tensorrt):
    source = request.getfixturevalue(which)
    folder = Path(shutil.copytree(source, tmp_path / "model"))
    told = []
    lean = Synthesizer.load(folder, engine="tensorrt", progress=lambda *step: told.append(step))
    full = Synthesizer.load(folder, "cpu")
    config = BRAIN if which == "brain" else HEART
    # Two numbers of images, one after the other: buffers are made anew.
    for there in [("t1",), ("t1", "t2", "flair")] if which == "brain" else [()]:
        given = study(config, *there)
        same(lean.synthesize(given, steps=3, solver="dpm2m"), full.synthesize(given, steps=3, solver="dpm2m"))
    record = lean.synthesize(given).record
    assert record["engine"] == "tensorrt" and record["versions"]["tensorrt"] == stand_in.__version__
    assert record["weights_sha256"] == full.weights
    assert tensorrt.built == list(GRAPHS) and ("step: building engine", 1, 2) in told
    for graph in GRAPHS:
        (note,) = (note for note in lean.engine.notes if note.startswith(Path(graph).stem))
        assert "agrees with torch: cosine 1.000000, max error" in note


@pytest.mark.parametrize("batch", [1, 2])
def test_a_batch_is_its_studies(fresh, tensorrt, batch):
    check_batch(TensorRTEngine(fresh, batch=batch), BRAIN)


@pytest.mark.parametrize("engine", ["torch", "onnxruntime", "tensorrt"])
def test_latents_that_are_not_finite_never_become_an_image(ready, tensorrt, monkeypatch, engine):
    """The tokenizer quantises, as the paper's do: NaN would decode to some code, and look plausible."""
    model = Synthesizer.load(ready, "auto" if engine == "tensorrt" else "cpu", engine=engine)
    nothing = np.full((1, 1, BRAIN.tokenizer.latent_channels, *BRAIN.latent), np.nan, np.float32)
    assert np.isfinite(model.engine.decode(nothing)).all(), "otherwise the check after decoding would do"
    for part, what in (("encode", "encoder"), ("sample", "denoiser")):
        for value in (np.nan, np.inf):

            def spoilt(*given, part=part, value=value, real=getattr(model.engine, part)):
                made = real(*given)
                (made if part == "sample" else made.latents)[0, -1, 0, 0, 0, 0] = value
                return made

            with monkeypatch.context() as patched, pytest.raises(CopeditError) as refused:
                patched.setattr(model.engine, part, spoilt)
                model.synthesize(study(BRAIN, "t1", "t2"))
            told = f"s1: the {what} of tiny-brain returned NaN or infinity ({engine}, float32), so nothing is written"
            assert told in str(refused.value)


def test_the_second_start_builds_nothing_and_loads_no_weights(ready, tensorrt, monkeypatch):
    monkeypatch.setattr(checkpoint, "load_denoiser", None)
    engine = TensorRTEngine(ready)
    assert not tensorrt.built and not engine.notes and engine.name == "tensorrt"
    assert set(engine.parity) == set(GRAPHS) and all(p.cosine > 0.999999 for p in engine.parity.values())


def test_one_timing_cache_goes_from_build_to_build(fresh, tensorrt):
    TensorRTEngine(fresh)
    assert tensorrt.timings == [b"", b"+", b"++"]
    (cache,) = (fresh / FOLDER).glob("timing-*.cache")
    for path in (fresh / FOLDER).glob("*.plan"):
        path.unlink()
    cache.write_bytes(b"damaged")
    tensorrt.timings.clear()
    TensorRTEngine(fresh)
    assert tensorrt.timings == [b"", b"+", b"++"]


def test_an_interrupted_build_stops(fresh, tensorrt):
    """Ctrl-C arrives in what TensorRT calls, and must not pass through its code."""

    def interrupt(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TensorRTEngine(fresh, progress=interrupt)
    assert not tensorrt.built and not list((fresh / FOLDER).glob("*.plan"))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def foreign(folder: Path) -> None:
    """The plan of another GPU under this one's name, with the approval that it has there."""
    approval = plan(folder).with_suffix(".json")
    said = json.loads(approval.read_text())
    approval.write_text(json.dumps(said | {"key": said["key"] | {"GPU": "another"}}))


def agreed(folder: Path) -> None:
    """Nonsense that the approval knows the hash of: only TensorRT notices."""
    PlanFile(folder / FOLDER, "step", TensorRTEngine(folder)._key(STEP)).write(b"nonsense", Parity(1.0, 0.0))


@pytest.mark.parametrize(
    ("accident", "words"),
    [
        (lambda f: damage(plan(f)), "damaged, its hash is not that in"),
        (lambda f: cut(plan(f)), "damaged, its hash is not that in"),
        (lambda f: plan(f).unlink(), "cannot be read"),
        (lambda f: cut(plan(f).with_suffix(".json")), "damaged, it is not what copedit wrote"),
        (foreign, "foreign, it is for GPU another, not stand-in (sm_00)"),
        (agreed, "TensorRT 0.0 does not take the plan: not a plan"),
    ],
    ids=["damaged", "cut", "gone", "approval", "foreign", "not a plan"],
)
def test_a_plan_that_cannot_be_trusted_is_refused_and_built_again(ready, tensorrt, accident, words):
    accident(ready)
    engine = TensorRTEngine(ready)
    assert tensorrt.built == [STEP] and engine.name == "tensorrt"
    assert words in engine.notes[0] and engine.notes[0].endswith("; it is built again") and "\n" not in engine.notes[0]
    tensorrt.built.clear()
    assert not TensorRTEngine(ready).notes and not tensorrt.built


def test_a_plan_that_was_not_approved_is_built_again(ready, tensorrt):
    """What a process that was killed between build and comparison leaves."""
    plan(ready).with_suffix(".json").unlink()
    plan(ready).write_bytes(b"half a pl")
    TensorRTEngine(ready)
    assert tensorrt.built == [STEP]


def test_the_key_of_a_plan(ready, tensorrt, monkeypatch):
    def paths() -> list[Path]:
        engine = TensorRTEngine(ready)
        return [PlanFile(ready / FOLDER, "x", engine._key(graph)).path for graph in GRAPHS]

    first = paths()
    assert len(set(first)) == 3 and paths() == first
    monkeypatch.setattr(tensorrt_engine, "gpu", lambda device: "another (sm_90)")
    other = paths()
    assert not set(other) & set(first) and tensorrt.built == list(GRAPHS)
    monkeypatch.setattr(stand_in, "__version__", "0.1")
    assert not set(paths()) & {*first, *other}
    engine = TensorRTEngine(ready)
    key = engine._key(STEP)
    for name in key:
        assert PlanFile(ready, "x", key | {name: "other"}).path != PlanFile(ready, "x", key).path
    assert set(key) == {"graph", "weights", "precision", "shapes", "TensorRT", "GPU"}
    assert engine._key(STEP)["weights"] != engine._key(DECODER)["weights"] == engine._key(ENCODER)["weights"]


def test_changed_weights_make_the_export_stale(ready, tensorrt):
    _, net, _ = checkpoint.load_denoiser(ready)
    with torch.no_grad():
        net.final.bias += 1
    checkpoint.write_tensors(ready / checkpoint.DENOISER, net.state_dict())
    with pytest.warns(UserWarning, match=f"{checkpoint.DENOISER}: changed since the export.*; torch takes over"):
        assert Synthesizer.load(ready, "cpu", engine="tensorrt").engine.name == "torch"


FAULTS = {
    "parse": "cannot read it: node node_17, no such operator;",
    "build": "cannot build it: no implementation;",
    "context": "TensorRT cannot make the plan ready to run;",
    "address": "the plan does not take a buffer for",
    "execute": "TensorRT could not run the plan;",
    "wrong": "does not agree with torch (cosine 0.",
    "nan": "(cosine nan, max error nan; in float32 at least 0.999999 and at most 0.001 are accepted)",
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("graph", GRAPHS)
def test_what_tensorrt_cannot_do_torch_does(fresh, tensorrt, fault, graph):
    tensorrt.faults[fault] = graph
    with pytest.warns(UserWarning) as caught:
        lean = Synthesizer.load(fresh, engine="tensorrt")
    (text,) = (str(warning.message) for warning in caught)
    part = Path(graph).stem
    assert FAULTS[fault] in text and text.endswith(f"; torch does the {part} instead") and "\n" not in text
    given = study(BRAIN, "t1", "flair")
    result = lean.synthesize(given, steps=2)
    same(result, Synthesizer.load(fresh, "cpu").synthesize(given, steps=2))
    assert result.record["engine"] == f"tensorrt (torch: {part})"
    assert not list((fresh / FOLDER).glob(f"{part}-*")), "nothing that was refused is kept"


def test_a_step_that_changes_what_is_observed_is_refused(fresh, tensorrt):
    tensorrt.faults["observed"] = STEP
    with pytest.warns(UserWarning, match="changes observed elements; torch does the step instead"):
        assert TensorRTEngine(fresh).name == "tensorrt (torch: step)"


def test_a_plan_that_fails_later(ready, tensorrt):
    lean = Synthesizer.load(ready, engine="tensorrt")
    tensorrt.faults["execute"] = STEP
    given = study(BRAIN, "t1", "flair")
    with pytest.warns(UserWarning, match="could not run the plan; torch does the step from now on"):
        found = lean.synthesize(given, steps=2)
    same(found, Synthesizer.load(ready, "cpu").synthesize(given, steps=2))
    assert found.record["engine"] == "tensorrt (torch: step)"
    tensorrt.faults.clear()
    lean.synthesize(given, steps=2)
    assert lean.engine.name == "tensorrt (torch: step)"


def test_where_no_plan_can_be_torch_takes_over(fresh, tensorrt, monkeypatch):
    monkeypatch.setattr(stand_in.Builder, "build_serialized_network", lambda *args: None)
    with pytest.warns(UserWarning, match=f"{ENCODER}: TensorRT 0.0 cannot build it; torch takes over"):
        assert Synthesizer.load(fresh, "cpu", engine="tensorrt").engine.name == "torch"


def test_a_folder_that_cannot_be_written_keeps_no_plan(fresh, tensorrt):
    (fresh / FOLDER).write_text("a file where the folder should be")
    engine = TensorRTEngine(fresh)
    assert engine.name == "tensorrt"
    assert sum("cannot write" in note and "the next start builds the plan again" in note for note in engine.notes) == 3


def test_a_shape_that_the_plan_was_not_built_for(ready, tensorrt):
    engine = TensorRTEngine(ready)
    images = np.zeros((1, 5, 1, *BRAIN.image), np.float32)  # of four elements
    with pytest.warns(UserWarning, match=r"does not take images of shape \(1, 5, 1, 16, 16, 8\)"):
        assert engine.encode(images).latents.shape[1] == 5


def test_without_tensorrt_or_a_gpu(fresh, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    for work in (
        lambda: Synthesizer.load(fresh, engine="tensorrt"),
        lambda: onnx_export.export_tensorrt(fresh, tmp_path / "new"),
    ):
        with pytest.raises(CopeditError, match=r"TensorRT cannot be loaded .*pip install 'copedit\[tensorrt\]'"):
            work()
    monkeypatch.setitem(sys.modules, "tensorrt", stand_in)
    with pytest.raises(CopeditError, match="device 'cpu': the engine tensorrt needs a CUDA GPU"):
        Synthesizer.load(fresh, "cpu", engine="tensorrt")
    with pytest.raises(CopeditError, match="takes whole volumes"):
        TensorRTEngine(fresh, max_memory=2**30)
    assert not (tmp_path / "new").exists()


# ---- the measure of agreement


def test_parity():
    a = np.array([3.0, 4.0], np.float32)
    assert parity([a], [a]) == Parity(pytest.approx(1), 0)
    found = parity([np.array([4.0, 3.0])], [a])
    assert found.cosine == pytest.approx(24 / 25) and found.max_error == pytest.approx(0.25)
    worst = parity([a, np.array([4.0, 3.0])], [a, a])
    assert worst == found
    zero = np.zeros(2)
    assert parity([zero], [zero]) == Parity(1, 0) and not parity([a], [zero]).within("bfloat16")
    for bad in (np.array([np.nan, 4]), np.array([np.inf, 4]), np.zeros(3)):
        assert not parity([bad], [a]).within("bfloat16")
    assert Parity(1, 0).within("float32") and not Parity(1, 0.5).within("float16")


def test_shapes_are_those_of_the_graphs(either):
    config = checkpoint.read_config(either)
    for graph in GRAPHS:
        inputs = onnx.load(either / graph, load_external_data=False).graph.input
        ranges = shapes(config, graph, batch=3)
        for value in inputs:
            dims = value.type.tensor_type.shape.dim
            for kind, shape in enumerate(ranges[value.name]):
                assert len(shape) == len(dims)
                for n, dim in zip(shape, dims, strict=True):
                    allowed = {"batch": {1 if kind == 0 else 3}, "given": range(1, len(config.elements) + 1)}
                    assert n in (allowed[dim.dim_param] if dim.dim_param else {dim.dim_value})


# ---- NVIDIA's own parser and builder


@pytest.fixture(scope="module")
def rtx(tmp_path_factory) -> Path:
    """TensorRT-RTX under TensorRT's names. Nobody supports this, but its parser and its builder need no GPU."""
    wheel = find_spec("onnxruntime_ep_nv_tensorrt_rtx")
    if wheel is None or wheel.origin is None or find_spec("tensorrt_bindings") is None:
        pytest.skip("needs the extras tensorrt-rtx and test")
    folder = tmp_path_factory.mktemp("rtx")
    for name, pattern in (("libnvinfer.so.11", "libtensorrt_rtx"), ("libnvonnxparser.so.11", "libtensorrt_onnxparser")):
        (found,) = Path(wheel.origin).parent.glob(f"{pattern}*.so.*")
        (folder / name).symlink_to(found)
    library(folder, "libnvinfer_plugin.so.11", SYMBOLS["libnvinfer_plugin.so.11"])
    return folder


BUILD = """
    import json, sys, time
    from pathlib import Path
    import tensorrt_bindings
    sys.modules["tensorrt"] = tensorrt_bindings
    from copedit_rt import checkpoint
    from copedit_rt.engines.tensorrt_engine import build, shapes
    graph, told = Path(sys.argv[1]), []
    ranges = shapes(checkpoint.read_config(graph.parent), graph.name)
    begin = time.monotonic()
    plan, timing = build(graph, ranges, b"", lambda *step: told.append(step))
    seconds = time.monotonic() - begin
    assert build(graph, ranges, timing)[0] if len(sys.argv) > 2 else True
    print(json.dumps({"bytes": len(plan), "timing": len(timing), "told": told, "seconds": seconds}))
"""


def built(rtx: Path, graph: Path, *more: str) -> dict:
    """A build in a process of its own, whose memory it gives back."""
    return json.loads(script(rtx, "-c", textwrap.dedent(BUILD), graph, *more, timeout=600).splitlines()[-1])


@pytest.mark.parametrize("graph", GRAPHS)
def test_the_real_builder_takes_small_graphs(rtx, either, graph):
    """In float32, whose attention needs permission to be taken apart; twice, the second time with the timing cache."""
    found = built(rtx, either / graph, "twice")
    assert found["bytes"] > 10_000 and found["timing"] > 0
    assert any(what.startswith(Path(graph).stem) and total > 1 for what, _, total in found["told"])


def test_what_the_real_builder_complains_of_is_told(rtx, brain, tmp_path):
    """The sentence of a graph that TensorRT cannot read names the node and the reason."""
    shutil.copy(brain / checkpoint.CONFIG, tmp_path)
    node = onnx.helper.make_node("StringConcat", ["a", "a"], ["b"], name="the_culprit")
    text = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.STRING, [1]) for name in "ab"]
    graph = onnx.helper.make_graph([node], "g", text[:1], text[1:])
    onnx.save(onnx.helper.make_model(graph), tmp_path / STEP)
    with pytest.raises(AssertionError, match=r"Refused: .*step.onnx: TensorRT 11\.\d.* cannot read it"):
        built(rtx, tmp_path / STEP)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
@pytest.mark.parametrize("preset", ["brain-brats", "brain-ixi", "cardiac"])
def test_the_real_builder_takes_the_paper_presets(rtx, tmp_path, preset, precision):
    """All three parts at full size, with untrained weights; every plan holds the weights of its part."""
    folder = exported(ModelConfig.preset(preset), tmp_path, precision)
    shutil.rmtree(tmp_path / "model")
    _, vae, _ = checkpoint.load_tokenizer(folder)
    _, net, _ = checkpoint.load_denoiser(folder)
    for graph, part in zip(GRAPHS, (vae.encoder, net, vae.decoder), strict=True):
        found = built(rtx, folder / graph)
        print(f"{preset} {precision} {graph}: {found['seconds']:.1f} s, {found['bytes'] / 2**20:.0f} MiB")
        assert found["bytes"] > 2 * sum(p.numel() for p in part.parameters())
