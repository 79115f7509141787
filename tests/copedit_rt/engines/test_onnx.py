"""The ONNX files and the engine that runs them, against torch; what is refused; what an accident leaves behind."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small import BRAIN, check_batch, damage, exported, saved, study, write

from copedit_rt import checkpoint, cli, cohort, schedule, synthesizer
from copedit_rt.config import ModelConfig
from copedit_rt.engines import engine, onnx_engine, onnx_export
from copedit_rt.engines.onnx_engine import DECODER, ENCODER, MANIFEST, STEP, OnnxEngine
from copedit_rt.engines.torch_engine import TorchEngine
from copedit_rt.errors import CopeditError
from copedit_rt.images.find import find_studies
from copedit_rt.images.study import Study
from copedit_rt.networks import sampler
from copedit_rt.networks.denoiser import build_denoiser
from copedit_rt.networks.tokenizer import CoPeVAE
from copedit_rt.synthesizer import Synthesizer
from copedit_rt.terminal import Screen

onnx = pytest.importorskip("onnx", reason="needs the extra export")
ort = pytest.importorskip("onnxruntime", reason="needs the extra export")
pytest.importorskip("onnxscript", reason="needs the extra export")

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def copy(brain, tmp_path) -> Path:
    return Path(shutil.copytree(brain, tmp_path / "copy"))


def run(path: Path, **inputs) -> list[np.ndarray]:
    return ort.InferenceSession(path).run(None, inputs)


def graph(path: Path):
    return onnx.load(path, load_external_data=False).graph


# ---- the files


def test_standard_operators_dynamic_batches_and_no_weights_of_their_own(either):
    held = set()
    for name in (ENCODER, STEP, DECODER):
        onnx.checker.check_model(either / name, full_check=True)
        model = onnx.load(either / name, load_external_data=False)
        assert [(o.domain, o.version) for o in model.opset_import] == [("", 23)]
        assert not model.functions and not {node.domain for node in model.graph.node} - {""}
        for value in (*model.graph.input, *model.graph.output):
            kind = value.type.tensor_type
            assert kind.elem_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.BOOL, onnx.TensorProto.INT64)
            assert kind.shape.dim[0].dim_param == "batch"
        held |= {i.name for i in model.graph.initializer if i.external_data}
        outside = {e.value for i in model.graph.initializer for e in i.external_data if e.key == "location"}
        assert outside <= {checkpoint.TOKENIZER, checkpoint.DENOISER} and outside
    _, net, _ = checkpoint.load_denoiser(either)
    expected = {f"denoiser.{name}" for name, _ in net.named_parameters()}
    _, vae, _ = checkpoint.load_tokenizer(either)
    expected |= {f"tokenizer.encoder.{name}" for name, _ in vae.encoder.named_parameters()}
    expected |= {f"tokenizer.decoder.{name}" for name, _ in vae.decoder.named_parameters()}
    assert expected <= held


def test_encoder(brain):
    """Batches, studies with different numbers of images, and NaN in what is not observed."""
    _, vae, _ = checkpoint.load_tokenizer(brain)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 4, 1, *BRAIN.image, generator=generator)
    observed = torch.tensor([[True, False, True, True], [False, True, False, False], [True, True, True, True]])
    dirty = images.where(observed[..., None, None, None, None], torch.nan)
    found = run(brain / ENCODER, images=dirty.numpy(), observed=observed.numpy())
    with torch.no_grad():
        z = vae.encode(images)
        prompts = vae.prompts(z, observed)
        alone = torch.stack([vae.assess(vae.prompts_of_each(z)[:, i])[1] for i in range(4)], dim=1)
        expected = (vae.normalise(z), prompts, *vae.assess(prompts)[:2], alone)
    for name, value, exact in zip(("latents", "prompts", "count", "missing", "alone"), found, expected, strict=True):
        if value.shape[:2] == observed.shape and name in ("latents", "alone"):
            value, exact = value[observed.numpy()], exact[observed]
        np.testing.assert_allclose(value, exact.numpy(), rtol=1e-4, atol=1e-5, err_msg=name)


def test_prompts_average_large_latents_as_exactly_as_torch(tmp_path):
    config, vae, _ = checkpoint.load_tokenizer(checkpoint.locate("demo-brain"))
    generator = torch.Generator().manual_seed(0)
    z = torch.zeros(1, config.tokenizer.latent_channels, *config.latent)  # equal values: errors of sums do not cancel
    z[:, :, 16:32, 16:32] = torch.randn(z[:, :, 16:32, 16:32].shape, generator=generator)
    path = tmp_path / "prompts.onnx"
    for encoder in vae.prompt_encoders[:1]:
        torch.onnx.export(encoder, (z,), path, dynamo=True, verbose=False, input_names=["z"])
        (found,) = run(path, z=z.numpy())
        with torch.no_grad():
            other, exact = encoder(z), encoder.double()(z.double())
        here, there = ((x - exact).square().mean().sqrt() for x in (torch.from_numpy(found), other))
        assert here < 2 * there + 1e-6 * exact.square().mean().sqrt()


@pytest.mark.parametrize("solver", ["ddim", "dpm2m"])
def test_sampler_step(either, solver):
    """A batch of studies with different patterns, by the plain sampler."""
    config, net, _ = checkpoint.load_denoiser(either)
    m, generator = len(config.elements), torch.Generator().manual_seed(1)
    z = torch.randn(3, m, 3, *config.latent, generator=generator)
    prompts = torch.randn(3, 3, config.tokenizer.prompt_dim, generator=generator)
    observed = torch.tensor([[True] + [False] * (m - 1), [False] * (m - 1) + [True], [True, True] + [False] * (m - 2)])
    with torch.no_grad():
        exact = sampler.sample(
            lambda z, t: net(z, t, prompts, observed), z, observed, config.diffusion, 5, None, solver
        )  # fmt: skip
    tables = [*schedule.solver_tables(config.diffusion, 5, solver), np.tile((1.0, 0.0), (5, 1))]
    session = ort.InferenceSession(either / STEP)
    now, previous = z.numpy(), np.zeros_like(z.numpy())
    for i, t in enumerate(schedule.timesteps(config.diffusion, 5)):
        given = {
            "z": now,
            "t": np.full(3, t),
            "prompts": prompts.numpy(),
            "observed": observed.numpy(),
            "previous": previous,
            "coefficients": np.tile(np.stack([table[i] for table in tables[:2]]).astype(np.float32), (3, 1, 1)),
        }
        inputs = {i.name for i in session.get_inputs()}
        now, previous = session.run(None, {name: value for name, value in given.items() if name in inputs})
    np.testing.assert_allclose(now, exact.numpy(), atol=1e-4)
    assert np.array_equal(now[observed.numpy()], z.numpy()[observed.numpy()])
    assert np.abs(now - z.numpy())[~observed.numpy()].max() > 0.1


def test_decoder(either):
    config, vae, _ = checkpoint.load_tokenizer(either)
    z = torch.randn(2, len(config.elements), 3, *config.latent, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        exact = vae.images(z, joint=config.task == "cardiac")
    np.testing.assert_allclose(run(either / DECODER, z=z.numpy())[0], exact.numpy(), atol=1e-5)
    assert exact.std() > 0.01


@pytest.mark.parametrize("distances", [1, 10**9])
def test_nearest_codes_by_rows_are_those_of_the_whole(monkeypatch, distances):
    monkeypatch.setattr(onnx_export, "DISTANCES", distances)
    vae = CoPeVAE(BRAIN.tokenizer, 4)
    with torch.no_grad():
        vae.codebook[7] = vae.codebook[3]  # a tie, which the leftmost wins
    z = torch.randn(2, 2, 3, 4, 3, 2)
    z[0, 0, :, 0, 0, 0] = vae.codebook[7]
    assert torch.equal(onnx_export.nearest(z, vae.codebook), vae.quantise(z)[0])


def narrowed(path: Path, net: torch.nn.Module, precision: str) -> None:
    """Weights of a step are narrow and outside the graph, its inputs and outputs are not narrow."""
    onnx.checker.check_model(path, full_check=True)
    found, narrow = graph(path), onnx.TensorProto.DataType.Value(precision.upper())
    held = {i.name.removeprefix("denoiser.") for i in found.initializer if i.data_type == narrow and i.external_data}
    # Weights of norms are float32 constants of the graph: norms are computed in float32.
    assert held == {name for name, _ in net.named_parameters() if "norm" not in name}
    assert narrow not in {value.type.tensor_type.elem_type for value in (*found.input, *found.output)}


def test_float16(tmp_path):
    """As near to float32 as torch is in float16; ONNX Runtime computes it on the CPU."""
    folder = exported(BRAIN, tmp_path, "float16")
    config, net, _ = checkpoint.load_denoiser(folder)  # the rounded weights in float32
    narrowed(folder / STEP, net, "float16")
    low = build_denoiser(config).eval()
    low.load_state_dict(net.state_dict())
    onnx_export._narrow(CoPeVAE(config.tokenizer, 4), low, torch.float16)
    z, prompts = torch.randn(2, 4, 3, *config.latent), torch.randn(2, 3, 16)
    t, observed = torch.tensor([499, 20]), torch.zeros(2, 4, dtype=torch.bool)
    with torch.no_grad():
        truth = net(z, t, prompts, observed).numpy()
        rounded = low(z.half(), t, prompts, observed).float().numpy()
    given = {"z": z, "t": t, "prompts": prompts, "observed": observed, "previous": z}
    given["coefficients"] = torch.eye(2).expand(2, 2, 2)
    _, value = run(folder / STEP, **{name: x.numpy() for name, x in given.items()})
    assert np.abs(value - truth).max() <= 2 * np.abs(rounded - truth).max() + np.abs(truth).max() * 2**-11
    for name in (ENCODER, DECODER):
        onnx.checker.check_model(folder / name, full_check=True)
    lean, full = (Synthesizer.load(folder, "cpu", engine=engine).engine for engine in ("onnxruntime", "torch"))
    images = np.random.default_rng(0).random((1, 2, 1, *BRAIN.image), np.float32)
    z = full.encode(images).latents
    np.testing.assert_allclose(lean.encode(images).latents, z, atol=0.01 * np.abs(z).max())
    image = full.decode(z)
    np.testing.assert_allclose(lean.decode(z), image, atol=0.01 * np.abs(image).max())


def test_bfloat16(tmp_path):
    """Written, checked, and refused where it cannot be computed."""
    folder = exported(BRAIN, tmp_path, "bfloat16")
    _, vae, _ = checkpoint.load_tokenizer(folder)
    _, net, _ = checkpoint.load_denoiser(folder)
    narrowed(folder / STEP, net, "bfloat16")
    assert "ConvTranspose" not in {node.op_type for node in graph(folder / DECODER).node}
    for name in (ENCODER, DECODER):
        onnx.checker.check_model(folder / name, full_check=True)
    onnx_export._narrow(vae, net, torch.bfloat16)
    assert vae.codebook.dtype == net.frequencies.dtype == vae.prompt_encoders[0].mlp[0].weight.dtype == torch.float32
    assert vae.decoder.inp.weight.dtype == vae.encoder.out.weight.dtype == torch.bfloat16
    with pytest.raises(onnx_engine.Refused, match="bfloat16, which ONNX Runtime cannot"):
        OnnxEngine(folder)


@pytest.mark.parametrize("stride", [(2, 2, 2), (2, 2, 1), (1, 2, 1)])
def test_upsampling_without_transposed_convolutions(stride):
    kernel = tuple(4 if s == 2 else 3 for s in stride)
    layer = torch.nn.ConvTranspose3d(5, 3, kernel, stride, 1).double()
    x = torch.randn(2, 5, 4, 6, 3, dtype=torch.float64)
    found, exact = onnx_export.Upsample(layer)(x), layer(x)
    assert found.shape == exact.shape and (found - exact).abs().max() < 1e-14


@pytest.mark.parametrize(
    ("preset", "blocks"),
    [
        ("demo-cardiac", None),
        ("demo-brain", None),
        # Real shapes, and fewer blocks than the 16 and 12 of the presets.
        ("brain-brats", 2),
        ("brain-ixi", 2),
        ("cardiac", 4),
    ],
)
@pytest.mark.slow
def test_latents_of_every_preset_after_20_steps(tmp_path, preset, blocks):
    """From the built-in weights where there are some."""
    config = ModelConfig.preset(preset)
    model: str | Path = preset
    if blocks:
        tokenizer = replace(config.tokenizer, channels=(8, 8, 8), residual_channels=8)  # plays no part here
        config = replace(config, tokenizer=tokenizer, denoiser=replace(config.denoiser, blocks=blocks))
        model = saved(config, tmp_path / "model")
    folder = tmp_path / "onnx"
    onnx_export.export_onnx(model, folder)
    generator = np.random.default_rng(0)
    m, c = len(config.elements), config.tokenizer
    z = generator.standard_normal((1, m, c.latent_channels, *config.latent), np.float32)
    prompts, observed = generator.standard_normal((1, 3, c.prompt_dim), np.float32), np.arange(m)[None] == 1
    found, exact = (
        Synthesizer.load(folder, "cpu", engine=engine).engine.sample(z, prompts, observed, 20, "ddim")
        for engine in ("onnxruntime", "torch")
    )
    assert np.array_equal(found[:, 1], z[:, 1]) and np.abs(exact - z).max() > 0.1
    assert np.abs(found - exact).max() <= 1e-4


# ---- the engine


@pytest.mark.parametrize("engine", ["torch", "onnxruntime"])
def test_a_batch_is_its_studies(either, engine):
    check_batch(Synthesizer.load(either, "cpu", engine=engine).engine, checkpoint.read_config(either))


@pytest.mark.parametrize("samples", [1, 3])
def test_a_study_comes_out_as_on_torch(either, samples):
    config = checkpoint.read_config(either)
    given = study(config, "t1", "flair")
    lean, full = (Synthesizer.load(either, "cpu", engine=engine) for engine in ("onnxruntime", "torch"))
    calls = []
    found = lean.synthesize(given, steps=3, samples=samples, progress=lambda *done: calls.append(done))
    exact = full.synthesize(given, steps=3, samples=samples)
    assert calls == [(samples * i, 3 * samples) for i in (1, 2, 3)]
    for name in exact.study.synthetic or ("sax",):
        np.testing.assert_allclose(found.study.volumes[name].data, exact.study.volumes[name].data, atol=1e-4)
    assert found.std.keys() == exact.std.keys()
    np.testing.assert_allclose(found.perception.missing, exact.perception.missing, atol=1e-4)
    for name, chances in exact.perception.identity.items():
        np.testing.assert_allclose(found.perception.identity[name], chances, atol=1e-4)
    assert found.record["engine"] == "onnxruntime" and found.record["device"] == "cpu"
    assert found.record["versions"]["onnxruntime"] == ort.__version__ and "torch" not in found.record["versions"]
    assert found.record["weights_sha256"] == exact.record["weights_sha256"]
    assert lean.perceive(given) == found.perception


def without_torch(*arguments: str | Path, blocked: bool = False, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, which says at the end whether it holds torch or triton.

    blocked: as if these, and what else the extra `cpu` does not bring, were not installed.
    """
    code = (
        "import atexit, sys\n"
        f"sys.modules.update({dict.fromkeys(['torch', 'triton', 'scipy', 'onnx']) if blocked else {}})\n"
        "atexit.register(lambda: print('heavy:', *[n for n in ('torch', 'triton') if sys.modules.get(n)]))\n"
        f"sys.argv = {['copedit', *map(str, arguments)]}\n"
        "from copedit_rt.cli import main; main()"
    )
    given = {"cwd": ROOT, "env": os.environ | variables, "timeout": 300}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **given)


def test_the_command_line_loads_neither_torch_nor_triton(brain, tmp_path):
    folder, out = write(study(BRAIN, "t1", "t2"), tmp_path), tmp_path / "out"
    options = ("--model", brain, "--engine", "onnxruntime")
    for command in (("synth", "-o", out, "--preview", *options), ("inspect", *options)):
        done = without_torch(command[0], "-i", folder, *command[1:])
        assert done.returncode in (0, cli.FLAGGED), done.stderr
        assert done.stdout.splitlines()[-1].split() == ["heavy:"]
    assert sorted(path.name for path in out.iterdir()) == [
        "s1_flair.json", "s1_flair.nii.gz", "s1_preview.png", "s1_t1ce.json", "s1_t1ce.nii.gz",
    ]  # fmt: skip
    assert '"onnxruntime"' in (out / "s1_flair.json").read_text()
    done = without_torch("synth", "-i", folder, "-o", tmp_path / "other", "--model", brain)
    assert "torch" in done.stdout.splitlines()[-1].split(), "the check itself"


def test_where_torch_is_not_installed(brain, copy, tmp_path):
    folder, out = write(study(BRAIN, "t1", "t2"), tmp_path), tmp_path / "out"

    def synth(*options):
        return without_torch("synth", "-i", folder, "-o", out, *options, blocked=True)

    done = synth("--model", brain, "--engine", "onnxruntime")
    assert done.returncode == 0, done.stderr
    done = synth("--model", brain, "--engine", "torch", "--overwrite")
    assert done.returncode == 1 and done.stderr.startswith("copedit: engine torch: torch is not installed")
    done = synth("--model", "brain-2mm", "--overwrite")
    assert done.returncode == 1 and "brain-2mm holds no ONNX files; write them where torch is installed" in done.stderr
    done = without_torch("demo", "-o", tmp_path / "demo", blocked=True)
    assert done.returncode == 1 and "pip install 'copedit[torch]'" in done.stderr and len(done.stderr.splitlines()) == 1
    damage(copy / STEP)
    done = synth("--model", copy, "--engine", "onnxruntime", "--overwrite")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert STEP in done.stderr and "torch, which could take over, is not installed" in done.stderr
    done = without_torch("doctor", "--json", blocked=True)
    report = json.loads(done.stdout.removesuffix("heavy:\n"))
    assert report["engines"]["onnxruntime"] == ort.__version__ and report["kernels"]["in_use"] is None


def test_a_wheel_with_onnx_files_needs_no_torch(brain, tmp_path):
    """A model as in the wheel of `make wheel`: without torch its ONNX files are taken unasked, with the same bytes."""
    model = shutil.copytree(brain.parent / "model", tmp_path / "model")
    shutil.copytree(brain, model / checkpoint.EXPORTED)
    folder, out = write(study(BRAIN, "t1", "t2"), tmp_path), [tmp_path / "lean", tmp_path / "full"]
    command = ("synth", "-i", folder, "--model", model, "-o")
    done = without_torch(*command, out[0], blocked=True)
    assert done.returncode == 0, done.stderr
    assert without_torch(*command, out[1], "--engine", "onnxruntime").returncode == 0
    lean, full = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in out)
    assert lean == full and len(lean) == 4 and b'"engine": "onnxruntime"' in lean["s1_flair.json"]
    done = without_torch(*command, out[0], blocked=True, RANK="0", WORLD_SIZE="2")
    assert done.returncode == 0 and "weights" not in done.stderr, "kept, and by the weights of the ONNX files"
    done = without_torch("inspect", "-i", folder, "--model", model, blocked=True)
    assert done.returncode in (0, cli.FLAGGED) and "s1" in done.stdout, done.stderr
    assert checkpoint.locate(model) == model and checkpoint.locate(model, exported=True) == model / "onnx"


@pytest.mark.parametrize(
    ("asked", "missing", "answer"),
    [
        ("auto", (), "torch"),
        ("auto", ("torch",), "onnxruntime"),
        ("auto", ("torch", "onnxruntime"), "openvino"),
        ("auto", ("torch", "onnxruntime", "openvino"), "pip install 'copedit\\[torch\\]', or 'copedit\\[cpu\\]'"),
        ("tensorrt", ("torch",), "engine tensorrt: torch is not installed"),
        ("openvino", ("torch", "openvino"), "openvino"),
    ],
)
def test_the_engine_that_is_there(monkeypatch, asked, missing, answer):
    monkeypatch.setattr(engine, "find_spec", lambda name: None if name in missing else object())
    if answer in engine.ENGINES:
        assert engine.choose_engine(asked) == answer
    else:
        with pytest.raises(CopeditError, match=answer):
            engine.choose_engine(asked)


class Exact(TorchEngine):
    """In float64."""

    def _there(self, x):
        there = super()._there(x)
        return there.double() if there.is_floating_point() else there


def test_a_real_study_comes_out_as_on_torch(real_data, tmp_path):
    """The built-in weights on a real brain with two modalities: both engines are where float64 is."""
    folder = tmp_path / "onnx"
    onnx_export.export_onnx("demo-brain", folder)
    (files,) = find_studies(real_data / "brain" / "ms_patient07")
    given = Study.read({name: files.files[name] for name in ("t1", "t2")})
    lean, full = (Synthesizer.load(folder, "cpu", engine=engine) for engine in ("onnxruntime", "torch"))
    found, other = lean.synthesize(given), full.synthesize(given)
    assert (found.record["engine"], other.record["engine"]) == ("onnxruntime", "torch")
    net = checkpoint.load_denoiser(folder)[1].double()
    vae = checkpoint.load_tokenizer(folder)[1].double()
    full.engine = Exact(full.config, vae, net, torch.device("cpu"))
    exact = full.synthesize(given)
    assert found.study.synthetic == exact.study.synthetic == {"t1ce", "flair"}
    for name in exact.study.synthetic:
        truth = exact.study.volumes[name].data
        for result in (found, other):
            error = np.abs(result.study.volumes[name].data - truth) / truth.max()
            assert np.quantile(error, 0.99) < 1e-5 and np.sqrt(np.mean(error**2)) < 1e-5, name
        np.testing.assert_allclose(found.perception.missing, exact.perception.missing, atol=1e-4)


# ---- what is refused


def rewrite(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def agree(folder: Path, name: str, content: bytes) -> None:
    """Another content, and a manifest that says so."""
    (folder / name).write_bytes(content)
    digests = json.loads((folder / MANIFEST).read_text())["sha256"]
    rewrite(folder / MANIFEST, sha256=digests | {name: onnx_engine.digest(folder / name)})


ACCIDENTS = {
    "damaged": (lambda f: damage(f / STEP), f"{STEP}: damaged or not from this export"),
    "cut": (lambda f: os.truncate(f / DECODER, 1000), f"{DECODER}: damaged or not from this export"),
    "gone": (lambda f: (f / ENCODER).unlink(), f"{ENCODER}: cannot be read"),
    "foreign": (lambda f: (f / MANIFEST).unlink(), f"there is no {MANIFEST} beside it"),
    "stale": (lambda f: rewrite(f / checkpoint.CONFIG, name="new"), f"{checkpoint.CONFIG}: changed since the export"),
    "manifest": (lambda f: (f / MANIFEST).write_text("[1"), f"{MANIFEST}: damaged"),
    "format": (lambda f: rewrite(f / MANIFEST, format=99), f"of format 99, this version reads {onnx_engine.FORMAT}"),
    "no onnx": (lambda f: agree(f, STEP, b"nonsense"), f"{STEP}: ONNX Runtime"),
}


@pytest.mark.parametrize("accident", ACCIDENTS)
def test_files_that_cannot_be_trusted_are_refused_and_torch_takes_over(copy, accident, monkeypatch):
    happen, message = ACCIDENTS[accident]
    happen(copy)
    with pytest.warns(UserWarning) as caught:
        model = Synthesizer.load(copy, "cpu", engine="onnxruntime")
    assert len(caught) == 1 and model.engine.name == "torch"
    text = str(caught[0].message)
    assert message in text and text.endswith("; torch takes over") and "\n" not in text
    monkeypatch.setattr(synthesizer, "find_spec", lambda name: None)
    with pytest.raises(CopeditError, match="torch, which could take over, is not installed"):
        Synthesizer.load(copy, "cpu", engine="onnxruntime")


def test_weights_of_another_training_are_noticed(copy):
    _, net, _ = checkpoint.load_denoiser(copy)
    with torch.no_grad():
        net.final.bias += 1
    checkpoint.write_tensors(copy / checkpoint.DENOISER, net.state_dict())
    with pytest.warns(UserWarning, match=f"{checkpoint.DENOISER}: changed since the export"):
        model = Synthesizer.load(copy, "cpu", engine="onnxruntime")
    assert torch.equal(model.engine.denoiser.final.bias, net.final.bias), "torch has the new ones"


def test_the_command_line_says_that_torch_took_over(copy, tmp_path, capsys):
    damage(copy / STEP)
    folder = write(study(BRAIN, "t1", "t2"), tmp_path)
    with Screen() as screen:
        summary = cohort.synthesise([folder], tmp_path / "out", model=str(copy), engine="onnxruntime", listener=screen)
    assert summary["studies"][0]["record"]["engine"] == "torch"
    assert capsys.readouterr().err.startswith(f"copedit: {copy / STEP}: damaged")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "tensorflow"}, "engine 'tensorflow' is unknown; choose one of auto, torch, onnxruntime"),
        ({"engine": "onnxruntime", "device": "cuda"}, "runs on the CPU"),
        ({"engine": "onnxruntime", "max_memory": 2**30}, "takes whole volumes"),
    ],
)
def test_what_the_engine_cannot_do(brain, options, message):
    with pytest.raises(CopeditError, match=message):
        Synthesizer.load(brain, **options)


def test_a_model_that_was_never_exported():
    with pytest.raises(CopeditError, match=r"holds no ONNX files; write them where torch .*export onnx --model demo-b"):
        Synthesizer.load("demo-brain", "cpu", engine="onnxruntime")


def test_onnxruntime_is_not_installed(brain, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(CopeditError, match="pip install onnxruntime"):
        Synthesizer.load(brain, "cpu", engine="onnxruntime")


# ---- accidents of the export


def test_a_full_disk_leaves_nothing(brain, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx_export, "_graph", full)
    with pytest.raises(CopeditError, match=r"cannot write .*new: No space left on device"):
        onnx_export.export_onnx(brain, tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_a_killed_export_leaves_no_model_and_can_be_repeated(brain, tmp_path, monkeypatch):
    code = (
        "import os, sys; from pathlib import Path; from copedit_rt.engines import onnx_export\n"
        "graph, done = onnx_export._graph, []\n"
        "def killed(*args):\n"
        "    if done: os._exit(9)\n"
        "    done.append(1); return b''\n"
        "onnx_export._graph = killed; onnx_export.export_onnx(sys.argv[1], Path(sys.argv[2]))"
    )
    done = subprocess.run([sys.executable, "-c", code, brain, tmp_path / "new"], cwd=ROOT, timeout=120)
    assert done.returncode == 9 and not (tmp_path / "new").exists()
    mark, part = sorted(tmp_path.iterdir())
    assert part.name == f"{mark.name}s" and part.name.startswith(".new.") and not (part / MANIFEST).exists()
    monkeypatch.setattr(onnx_export, "_graph", lambda *args: b"")
    onnx_export.export_onnx(brain, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert (tmp_path / "new" / MANIFEST).exists()


def test_what_is_not_exported(brain, tmp_path, monkeypatch):
    with pytest.raises(CopeditError, match="is there and not empty"):
        onnx_export.export_onnx(brain, brain)
    with pytest.raises(CopeditError, match="precision 'int8' is unknown; choose one of float32, float16, bfloat16"):
        onnx_export.export_onnx(brain, tmp_path / "new", "int8")
    monkeypatch.setattr(onnx_export, "find_spec", lambda name: None if name == "onnx" else name)
    with pytest.raises(CopeditError, match="onnx is not installed"):
        onnx_export.export_onnx(brain, tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_the_command(tmp_path, brain, monkeypatch):
    from typer.testing import CliRunner

    monkeypatch.setattr(onnx_export, "_graph", lambda *args: b"")
    arguments = ["export", "onnx", "--model", str(brain), "-o", str(tmp_path / "new"), "--precision", "float16"]
    result = CliRunner().invoke(cli.app, [*arguments, "--json"])
    report = json.loads(result.stdout)
    assert report["precision"] == "float16" and report["files"].keys() == {p.name for p in (tmp_path / "new").iterdir()}
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 1 and "is there and not empty" in result.stderr
