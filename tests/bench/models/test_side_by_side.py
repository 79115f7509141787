"""The benchmarks of whole models on tiny ones: wrong answers are caught, reports complete, plain is the same model."""

import dataclasses
import json
import os

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from copedit_bench import machine, timing
from copedit_bench.models import contestants, cpu, sampler, side_by_side, train_step
from copedit_bench.models.side_by_side import TINY, Contestant, SideBySide, distance
from copedit_rt import checkpoint, cli
from copedit_rt.engines import cpu_blocks
from copedit_rt.engines.torch_engine import TorchEngine
from copedit_rt.errors import CopeditError
from copedit_rt.networks.sampler import REPAID

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def hurry():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "ROUNDS", (2, 2))
        patch.setattr(timing, "SAMPLE", 1e-5)
        patch.setattr(side_by_side, "CELL", 0.0)
        yield


def constant(value, dtype=torch.float32):
    return lambda: Contestant(lambda: {"y": torch.tensor([1.0, value])}, dtype)


def test_only_right_answers_are_timed():
    def broken():
        raise RuntimeError("no such library\nand more")

    entrants = {
        "eager": constant(1 + 1e-6),
        "ours": constant(1 + 2e-6),
        "wrong": constant(1 + 1e-5),
        "nan": constant(float("nan")),
        "broken": broken,
        "other": lambda: Contestant(lambda: {"z": torch.ones(2)}, torch.float32),
    }
    one = SideBySide("Test", CPU, {torch.float32}, "of nothing")
    one.run({"model": "x"}, entrants, {"y": torch.ones(2)}, operations=1e9, items=3)
    report = json.loads(json.dumps(one.report(), allow_nan=False))
    status = {check["contestant"]: check["status"] for check in report["checks"]}
    assert status == {
        "eager": "ok", "ours": "ok", "wrong": "wrong", "nan": "wrong", "broken": "failed", "other": "wrong",
    }  # fmt: skip
    rows = {row["contestant"]: row for row in report["timings"]}
    assert rows.keys() == {"eager", "ours"}
    row = rows["ours"]
    assert 0 < row["low_s"] <= row["median_s"] <= row["high_s"] and row["samples"] == 2
    assert row["per_second"] == pytest.approx(3 / row["median_s"])
    assert row["tflop_s"] == pytest.approx(1e-3 / row["median_s"])
    text = side_by_side.markdown(report)
    assert "| x | float32 |" in text and "- broken (model x): failed, RuntimeError: no such library" in text
    side_by_side.verify(report)
    report["checks"].append({"model": "x", "contestant": "ours", "status": "wrong", "error": 1.0, "tolerance": 0.1})
    with pytest.raises(CopeditError, match="ours did not give the right answer"):
        side_by_side.verify(report)


def test_where_the_baseline_stands_for_the_truth_others_may_differ_from_it():
    """Its own error, none, was what twice of which the others were allowed."""
    entrants = {name: constant(y, torch.bfloat16) for name, y in (("eager", 1.0), ("ours", 1.1), ("wrong", 1.5))}
    one = SideBySide("Test", CPU, {torch.bfloat16}, "of nothing")
    one.run({"model": "x"}, entrants, None)
    assert {c["contestant"]: c["status"] for c in one.checks} == {"eager": "ok", "ours": "ok", "wrong": "wrong"}


@pytest.mark.parametrize(("steps", "calls"), [(0, 1), (1, 11), (3, 4), (20, 1)])
def test_short_loops_on_a_gpu_are_captured_before_they_are_timed(steps, calls):
    """The first call that counts brings the steps taken to those that repay a graph."""
    seen = []
    warm = sampler.before_capture(torch.device("cuda"), steps)
    sampler.maker(seen.append, TINY, torch.float32, warm)().call()
    assert len(seen) == calls and (calls * steps >= REPAID or not steps)
    assert sampler.before_capture(CPU, steps) == 0


def test_presets_with_a_prior_are_refused():
    with pytest.raises(CopeditError, match="preset 'heart-3mm' starts from a prior"):
        side_by_side.chosen(["cardiac", "heart-3mm"], (), torch.device("cuda"))


@pytest.mark.parametrize("what", ["encode", "decode"])
def test_convolutions_of_plain_pytorch_are_tried_as_ours_are(networks, monkeypatch, what):
    tried = []
    monkeypatch.setattr(contestants, "_here", lambda x: tried.append(torch.backends.cudnn.benchmark) or x.numpy())
    inputs = contestants.Inputs(TINY, networks[0], 1)
    getattr(contestants, what)(contestants.PlainEngine(TINY, networks, CPU, torch.float32), inputs)
    assert tried and all(tried)


def test_distance_is_that_of_the_worst_result():
    exact = {"a": torch.full((4,), 2.0), "b": torch.ones(2)}
    assert distance(exact, exact) == 0
    assert distance({"a": torch.full((4,), 2.2), "b": torch.tensor([1.0, 1.1])}, exact) == pytest.approx(0.1, rel=1e-5)
    assert distance({"a": exact["a"]}, exact) == float("inf")


@pytest.fixture(scope="module")
def networks():
    return contestants.random_networks(TINY)


def test_plain_eager_and_ours_are_the_same_model_and_not_zero(networks):
    inputs = contestants.Inputs(TINY, networks[0], 2)
    engines = (
        contestants.PlainEngine(TINY, networks, CPU, torch.float64),
        TorchEngine(TINY, *networks, CPU, dtype=torch.float32),
    )
    for work, call, _ in sampler.pieces(TINY, inputs, (3,), 3):
        exact, found = (call(engine) for engine in engines)
        assert distance(found, exact) < 1e-4, work
        assert all(x.std() > 1e-3 for x in exact.values()), work
    made = engines[0].sample(inputs.z, inputs.prompts, inputs.observed, 3, "ddim")
    assert np.array_equal(made[inputs.observed], inputs.z[inputs.observed])
    assert not np.array_equal(made[~inputs.observed], inputs.z[~inputs.observed])
    ours, plain = (engine.encode(inputs.images) for engine in engines)
    for name in ("count", "missing", "alone"):
        np.testing.assert_allclose(getattr(ours, name), getattr(plain, name), atol=1e-4)


def test_operations_of_a_step_by_hand():
    c, hidden, t, m, values = 64, 170, 4 * 4 * 2 // 4, 4, 4 * 8
    t = (8 // 2) * (8 // 2) * (4 // 2)
    linear = 2 * m * t * (c * 3 * c + c * c + c * 2 * hidden + hidden * c)
    attention = 4 * m * t * t * c, 4 * t * m * m * c
    conditioning = 2 * (c * 256 + c * c + 48 * c + 2 * c * c) + 4 * 2 * 6 * c * c
    ends = 2 * 2 * m * t * c * values
    assert sampler.operations(TINY) == 4 * linear + 2 * sum(attention) + conditioning + ends


@pytest.mark.parametrize("stage", train_step.STAGES)
def test_a_plain_training_step_has_the_same_loss_and_gradients(stage):
    """In float32, against ours; and a step moves the weights of both alike."""
    settings = train_step._settings(stage, TINY, 2, "cpu")
    state, exact = train_step._truth(stage, TINY, settings)
    assert exact["gradients"].abs().max() > 0
    single = train_step.dataclasses.replace(settings, dtype="float32")
    moved = []
    for kind in ("ours", "eager"):
        one = train_step._contestant(stage, TINY, single, kind, state)
        assert distance(one.answer(), exact) < 1e-4
        one.call()
        task = one.call.args[0]
        moved.append({name: p.detach() - state[name] for name, p in task.module.named_parameters() if p.requires_grad})
    for name, change in moved[0].items():
        assert change.shape == moved[1][name].shape
    sizes = [torch.cat([x.flatten() for x in part.values()]) for part in moved]
    assert sizes[0].norm() > 0 and (sizes[0] - sizes[1]).norm() < 0.1 * sizes[0].norm()


def test_a_wrong_gradient_is_caught(monkeypatch):
    """Ours with a scaled attention output in place of the right one."""
    from copedit_rt.networks import denoiser

    settings = train_step._settings("denoiser", TINY, 2, "cpu")
    state, exact = train_step._truth("denoiser", TINY, settings)
    right = denoiser.axis_attention
    monkeypatch.setattr(denoiser, "axis_attention", lambda *given: 1.2 * right(*given))
    one = SideBySide("Test", CPU, {torch.bfloat16}, "of nothing")
    kinds = ("eager", "ours")
    makers = {k: lambda k=k: train_step._contestant("denoiser", TINY, settings, k, state) for k in kinds}
    one.run({"stage": "denoiser"}, makers, exact)
    assert {check["contestant"]: check["status"] for check in one.checks} == {"eager": "ok", "ours": "wrong"}


@pytest.mark.parametrize(
    ("command", "options", "rows"),
    [("sampler", ("--batch", "2", "--steps", "2"), 4), ("train-step", (), 2)],
)
def test_commands(tmp_path, command, options, rows):
    done = CliRunner().invoke(
        cli.app, ["bench", command, "-o", str(tmp_path), "--device", "cpu", "--no-compile", *options]
    )
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / f"{command}.json").read_text())
    assert {check["status"] for check in report["checks"]} == {"ok"}
    assert [row["contestant"] for row in report["timings"]].count("ours") == rows
    assert report["settings"]["threads"] == torch.get_num_threads() and "load_before" in report["settings"]
    assert f"{command}.md" in done.output and "All answers were right." in (tmp_path / f"{command}.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sampler", "--preset", "brian"], "preset 'brian' is unknown"),
        (["train-step", "--preset", "brian"], "preset 'brian' is unknown"),
        (["train-step", "--stage", "third"], "--stage third: choose tokenizer or denoiser"),
        (["sampler", "--device", "cuda:99"], "device 'cuda:99' is not there"),
    ],
)
def test_refusals(tmp_path, arguments, message):
    done = CliRunner().invoke(cli.app, ["bench", *arguments, "-o", str(tmp_path)])
    assert done.exit_code == 1 and message in done.stderr


@pytest.mark.slow
def test_the_commands_and_imports_of_the_benchmark_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu, "REPEATS", 1)
    one = SideBySide("Test", CPU, {torch.float32}, "of nothing")
    cpu._commands(one, "demo-cardiac", None, tmp_path)
    cpu._imports(one)
    (row,) = one.extra["commands"]
    assert row["engine"] == "torch" and len(row["wall_s"]) == len(row["processor_s"]) == 1
    assert 0 < row["processor_s"][0]
    assert len(list((tmp_path / "made").rglob("*.nii.gz"))) == 1
    assert [len(values) for values in one.extra["imports"].values()] == [1, 1]
    report = json.loads(json.dumps(one.report()))
    assert "`copedit synth` of one study of demo-cardiac, torch:" in side_by_side.markdown(report)
    assert side_by_side.tables(report) == ["Nothing has been timed."]
    print(report["commands"], report["imports"])


@pytest.mark.parametrize("exported", [True, False])
def test_the_commands_of_engines_that_are_not_installed_are_left_out(tmp_path, monkeypatch, exported):
    """After a quarter of an hour the benchmark ended in the refusal of an engine that had never been installed."""
    monkeypatch.setattr(cpu, "find_spec", lambda name: name == "onnxruntime")
    monkeypatch.setattr(cpu, "_repeat", lambda command: ([1.0], [1.0]))
    one = SideBySide("Test", CPU, {torch.float32}, "of nothing")
    cpu._commands(one, "demo-cardiac", tmp_path / "onnx" if exported else None, tmp_path)
    assert [row["engine"] for row in one.extra["commands"]] == ["torch", "onnxruntime"][: 1 + exported]


def test_perturbed_networks_are_not_zero():
    net = nn.Linear(4, 4)
    nn.init.zeros_(net.weight)
    side_by_side.perturb(net)
    assert net.weight.abs().min() > 0


@pytest.fixture(scope="module")
def hearts():
    """A tiny model of hearts, whose slabs are decoded together."""
    config = dataclasses.replace(TINY, task="cardiac", elements=("slab0", "slab1", "slab2", "slab3"))
    return config, contestants.random_networks(config)


@pytest.mark.parametrize("which", ["brain", "heart"])
def test_monais_layers_are_the_same_tokenizer(networks, hearts, which):
    pytest.importorskip("monai")
    config, made = (TINY, networks) if which == "brain" else hearts
    inputs = contestants.Inputs(config, made[0], 1)
    exact = contestants.PlainEngine(config, made, CPU, torch.float64)
    monai = contestants.MonaiEngine(config, made, CPU, torch.float32)
    assert "monai" in type(monai.vae.encoder).__module__ and "monai" in type(monai.vae.decoder).__module__
    for call in (contestants.encode, contestants.decode):
        assert distance(call(monai, inputs), call(exact, inputs)) < 1e-5
    uneven = dataclasses.replace(config, tokenizer=dataclasses.replace(config.tokenizer, residual_units=(0, 1)))
    with pytest.raises(CopeditError, match="monai: its VQVAE has as many residual units"):
        contestants.MonaiEngine(uneven, contestants.random_networks(uneven), CPU, torch.float32)


def test_threads_are_those_of_torch_and_of_what_is_begun_there(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    with pytest.raises(KeyError), cpu.threads(before + 1):
        assert torch.get_num_threads() == before + 1 and os.environ["OMP_NUM_THREADS"] == str(before + 1)
        raise KeyError
    assert torch.get_num_threads() == before and "OMP_NUM_THREADS" not in os.environ


def test_growth_along_every_axis(monkeypatch):
    """More of anything takes longer; each axis moves one thing."""
    monkeypatch.setattr(cpu, "PRESETS", {"tiny": TINY})
    monkeypatch.setattr(cpu, "REPEATS", 1)
    for axis in cpu.GROWTH:
        moved = [cpu.larger(TINY, axis, value) for value in (2, 4)]
        images, elements, batches, steps = zip(
            *((c.image[2], len(c.elements), batch, step) for c, batch, step in moved), strict=True
        )
        found = {"volume": images, "modalities": elements, "batch": batches, "steps": steps}
        wanted = (32, 64) if axis == "volume" else (2, 4)
        assert found.pop(axis) == wanted and all(one == other for one, other in found.values())
    rows = [cpu.grown("tiny", "batch", value, torch.get_num_threads()) for value in (1, 16)]
    assert [row["batch"] for row in rows] == [1, 16]
    assert rows[1]["processor_s"] > rows[0]["processor_s"] > 0


def test_the_page_of_a_cpu_says_the_processor_and_how_things_grow():
    one = SideBySide("CPU", CPU, {torch.float32}, "of nothing")
    row = {"wall_s": 0.5, "processor_s": 1.0, "peak_bytes": 3 * 2**20}
    one.extra["growth"] = {"steps": [{"steps": 1, **row}, {"steps": 4, **row, "wall_s": 1.0}]}
    report = json.loads(json.dumps(one.report()))
    about = report["machine"]
    assert about["cores"] >= 1 and set(about["flags"]) <= set(machine.FLAGS) and about["torch_uses"]
    assert "training" in machine.SOURCES, "its changes are changes of what is measured"
    text = cpu.markdown(report)
    assert f"{about['cores']} cores" in text and about["torch_uses"] in text
    assert "| 1 | 500 ms | 1 s | 1.00 | 3 |" in text and "| 4 | 1 s | 1 s | 2.00 | 3 |" in text


def test_the_whole_of_the_benchmark_on_a_cpu(tmp_path, monkeypatch):
    """Without processes of their own and without the exporter, which its own tests run."""
    monkeypatch.setattr(cpu, "_export", lambda name, folder: "the exporter is not here")
    folder, vae, net = tmp_path / "tiny", *contestants.random_networks(TINY)
    checkpoint.save(folder, TINY, vae, net)
    monkeypatch.setattr(checkpoint, "locate", lambda name: folder)
    row = {"wall_s": 1, "processor_s": 1, "peak_bytes": 0}
    monkeypatch.setattr(cpu, "apart", lambda call, name, axis, value, count: row | {axis: value})
    done = CliRunner().invoke(cli.app, ["bench", "cpu", "-o", str(tmp_path), "--quick"])
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "cpu.json").read_text())
    ours = [row for row in report["timings"] if row["contestant"] == "ours"]
    types = ["float32"] + ["bfloat16"] * cpu_blocks.packable(torch.bfloat16)
    stages = [(stage, 1, dtype) for stage in ("encode", "sample", "decode", "all") for dtype in types]
    assert [(row["stage"], row["threads"], row["dtype"]) for row in ours] == stages
    assert {check["contestant"] for check in report["checks"] if check["status"] == "unavailable"} >= {"onnxruntime"}
    assert report["yardsticks_of_threads"].keys() == {"1"} and report["growth"].keys() == {"steps"}
    assert [row["steps"] for row in report["growth"]["steps"]] == [1, 2], "each in a process of its own"
    assert "## Growth" in (tmp_path / "cpu.md").read_text()
