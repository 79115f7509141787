"""The benchmark's own correctness: floors counted by hand, wrong answers caught, fair turns, complete reports."""

import json
import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import copedit_kernels as ops
from copedit_bench import timing
from copedit_bench.operators import measure as body
from copedit_bench.operators import report as pages
from copedit_bench.operators import tables
from copedit_bench.operators.cases import BATCHES, OPERATORS, Case, Fill, directions, floor, preset_cases
from copedit_bench.operators.contestants import Contestant
from copedit_kernels import activation, attention_token
from copedit_rt import cli
from copedit_rt.config import PRESETS
from copedit_rt.errors import CopeditError
from copedit_rt.networks import denoiser, tokenizer
from copedit_rt.networks.denoiser import MDiT3D
from copedit_rt.networks.tokenizer import CoPeVAE
from copedit_training.evaluation import report as writer

CPU = torch.device("cpu")


def tiny(op: str, tier: int = 2) -> Case:
    return Case(op, ("tiny",), dict(OPERATORS[op].small), tier)


@pytest.fixture(autouse=True, scope="module")
def hurry():
    """Few and short samples: what is tested here is not the machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "ROUNDS", (2, 3))
        patch.setattr(timing, "SAMPLE", 1e-4)
        patch.setattr(body, "CELL", 1e-3)
        patch.setattr(body._Bench.overhead, "__defaults__", (2,))
        yield


@pytest.fixture(scope="module")
def report():
    """Every operator at its tiny shape, plus what the interface saved on the way."""
    saved = []
    cases = [tiny(op) for op in OPERATORS]
    found = body.run(cases, CPU, torch.float32, 60, save=lambda so_far: saved.append(len(so_far["checks"])))
    assert saved == sorted(saved) and len(saved) == len(cases)
    return found


# Shapes and floors


@pytest.mark.parametrize("preset", PRESETS)
def test_shapes_are_those_that_the_models_use(preset, monkeypatch):
    """Run the preset's models on the meta device and compare what they hand to the operators with the cases."""
    config, batch = PRESETS[preset], 4
    used: dict[str, set[tuple]] = {}

    def shapes(values):
        return tuple(tuple(x.shape) if isinstance(x, Tensor) else x for x in values)

    def record(module, name):
        original = getattr(ops, name)

        def call(*args):
            label = f"{name}_{args[2]}" if name == "axis_attention" else name
            used.setdefault(label, set()).add(shapes(args))
            return original(*args) if name != "nearest_code" else args[0].new_zeros(len(args[0])).long()

        monkeypatch.setattr(module, name, call)

    for name in ("axis_attention", "ada_norm", "gated_residual_ada_norm", "swiglu"):
        record(denoiser, name)
    record(tokenizer, "nearest_code")
    with torch.device("meta"):
        network = MDiT3D(replace(config, denoiser=replace(config.denoiser, blocks=2)))
        vae = CoPeVAE(config.tokenizer, len(config.elements))
        z = torch.randn(batch, len(config.elements), config.tokenizer.latent_channels, *config.latent)
        observed = torch.ones(z.shape[:2], dtype=torch.bool)
        prompts, prior = torch.randn(batch, 3, config.tokenizer.prompt_dim), z if config.denoiser.prior else None
        network(z, torch.zeros(batch), prompts, observed, prior=prior)
        vae.quantise(z)
    assert len(used) == 6
    for op, found in used.items():
        row = OPERATORS[op]
        assert shapes(row.inputs(row.sizes(config, batch), Fill(torch.float16)).values()) in found, op
    step = OPERATORS["partial_ddim_step_"].sizes(config, batch)
    assert math.prod(z.shape) == step["B"] * step["m"] * step["E"]


@pytest.mark.parametrize("preset", [name for name, config in PRESETS.items() if config.tokenizer.residual_units])
def test_the_convolution_is_that_of_the_first_residual_units(preset):
    config = PRESETS[preset]
    with torch.device("meta"):
        levels = iter(CoPeVAE(config.tokenizer, len(config.elements)).encoder.levels)
        x, first = torch.empty(1, 1, *config.image), next(levels)
        while len(first) == 2:  # an entry
            x, first = first(x), next(levels)
        x = first[:2](x)
    inputs = OPERATORS["conv3"].inputs(OPERATORS["conv3"].sizes(config, 4), Fill(torch.float16))
    assert inputs["x"].shape == x.movedim(1, -1).shape
    assert inputs["weight"].shape == first[2].conv1.weight.movedim(1, -1).shape


def test_cases_cover_every_operator_preset_and_batch():
    cases = preset_cases()
    seen = {(case.op, preset) for case in cases for preset in case.presets}
    assert seen == {(op, preset) for op in OPERATORS for preset in PRESETS}
    for op in [op for op in OPERATORS if op not in ("nearest_code", "conv3")]:
        assert {case.sizes["B"] for case in cases if case.op == op} == set(BATCHES)
    assert len({(case.op, case.label) for case in cases}) == len(cases)
    assert [case.tier for case in cases] == sorted(case.tier for case in cases)
    full = {case.op for case in cases if case.tier == 0}
    assert full == set(OPERATORS)
    assert any(case.op == "nearest_code" and case.sizes["N"] == 36_864 for case in cases)


def test_floors_counted_by_hand():
    """Two samples, three elements, four tokens; every tensor of the signature written out, in bfloat16 (2 bytes)."""
    tokens = 2 * 3 * 4
    attention = {"B": 2, "m": 3, "T": 4, "H": 5, "D": 8}
    packed, out, rope = tokens * 3 * 40 * 2, tokens * 40 * 2, 2 * 4 * 4 * 4
    # A row of scores is 8 multiplications and additions for each key; so are the products with v, and in the backward
    # the scores again, dV, dP, dQ and dK.
    within, across = 2 * 3 * 5 * 4 * 4 * 16, 2 * 4 * 5 * 3 * 3 * 16
    volume = {"P": 2, "Q": 3, "R": 4, "C": 5, "U": 6}
    moved = 24 * 5 + 27 * 5 * 6 + 6 + 24 * 6 + 24 * 6  # x, weight, bias, residual, result
    assert floor("conv3", "forward", volume, 2) == (2 * moved, 24 * 6 * 27 * 5 * 2)
    assert floor("axis_attention_token", "forward", attention, 2) == (packed + out + rope, 2 * within)
    assert floor("axis_attention_token", "backward", attention, 2) == (packed + out + packed + rope, 5 * within)
    assert floor("axis_attention_element", "forward", attention, 2) == (packed + out, 2 * across)
    assert floor("axis_attention_element", "backward", attention, 2) == (2 * packed + out, 5 * across)
    assert floor("axis_attention_element", "both", attention, 2) == (3 * packed + 2 * out, 7 * across)

    rows = {"B": 2, "m": 3, "T": 4, "C": 10}
    x, modulation, weight = tokens * 10 * 2, 2 * 10 * 2, 10 * 2
    # x and branch in, y and its norm out; gate, scale, shift, weight in.
    assert floor("ada_norm", "forward", rows, 2)[0] == 2 * x + 2 * modulation + weight
    assert floor("gated_residual_ada_norm", "forward", rows, 2)[0] == 4 * x + 3 * modulation + weight
    # x and dy in, dx out; scale and weight in, dscale, dshift and dweight out.
    assert floor("ada_norm", "backward", rows, 2)[0] == 3 * x + modulation + weight + 2 * modulation + weight
    # y, branch and two cotangents in, dx and dbranch out; gate, scale, weight in; dgate, dscale, dshift, dweight out.
    assert floor("gated_residual_ada_norm", "backward", rows, 2)[0] == 6 * x + 5 * modulation + 2 * weight
    # square, add; times rstd; times weight * (1 + scale), plus shift. The residual adds a product and a sum.
    assert floor("ada_norm", "forward", rows, 2)[1] == tokens * 10 * 5
    assert floor("gated_residual_ada_norm", "forward", rows, 2)[1] == tokens * 10 * 7

    wide = {"B": 2, "m": 3, "T": 4, "F": 6}
    assert floor("swiglu", "forward", wide, 2)[0] == tokens * (12 + 6) * 2
    assert floor("swiglu", "backward", wide, 2)[0] == tokens * (12 + 6 + 12) * 2

    codes = {"N": 7, "K": 5, "d": 4}
    assert floor("nearest_code", "forward", codes, 4) == (7 * 16 + 5 * 16 + 7 * 8, 7 * 5 * 4 * 3)
    step = {"B": 2, "m": 3, "M": 1, "E": 9}  # one missing element a sample: z and x0 in, z out; the mask
    assert floor("partial_ddim_step_", "forward", step, 4) == (2 * 9 * 4 * 3 + 6, 2 * 9 * 3)


# The report


def test_every_right_contestant_is_timed_in_every_direction(report):
    right = {(c["op"], c["contestant"]) for c in report["checks"] if c["status"] == "ok"}
    assert {(op, "ours") for op in OPERATORS} <= right
    assert {(op, OPERATORS[op].baseline) for op in OPERATORS} <= right
    timed = {(t["op"], t["contestant"], t["direction"]) for t in report["timings"]}
    assert timed == {(op, name, direction) for op, name in right for direction in directions(op)}
    assert {c["status"] for c in report["checks"]} == {"ok", "skipped", "unavailable"}
    assert {(c["op"], c["contestant"]) for c in report["checks"]} == {
        (op, name) for op, operator in OPERATORS.items() for name in operator.contestants
    }


def test_fields_and_rates(report):
    copy = report["yardsticks"]["copy"]["median"]
    for row in report["timings"]:
        moved, computed = floor(row["op"], row["direction"], row["sizes"], 4)
        assert (row["bytes"], row["operations"], row["dtype"], row["mode"]) == (moved, computed, "float32", "eager")
        assert row["low_us"] <= row["median_us"] <= row["high_us"] and row["samples"] in (2, 3)
        assert row["gb_s"] == pytest.approx(moved / row["median_us"] / 1e3)
        assert row["tflop_s"] == pytest.approx(computed / row["median_us"] / 1e6)
        assert row["copy_share"] == pytest.approx(row["gb_s"] * 1e9 / copy)
        assert row["peak_bytes"] is None  # not known on a CPU
    assert {(e["op"], e["contestant"]) for e in report["overhead"]} == {
        (op, name) for op in OPERATORS for name in ("ours", OPERATORS[op].baseline)
    }
    assert all(e["us"] > 0 for e in report["overhead"])
    machine = report["machine"]
    assert machine["packages"]["torch"] == torch.__version__ and machine["device"] == "cpu" and machine["name"]
    assert len(machine["sources"]) == 16


def test_files(report, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "find_spec", lambda name: None)
    paths = pages.write_report(report, tmp_path / "new")
    assert "matplotlib is not installed" in writer.unplotted()
    assert [p.name for p in paths] == ["kernels.json", "kernels.md"]
    assert json.loads(paths[0].read_text()) == json.loads(json.dumps(report))
    text = paths[1].read_text()
    for op in OPERATORS:
        assert f"## {op}" in text
    assert "skipped" in text and "sdpa-cudnn, sdpa-efficient, flex: unavailable, needs CUDA" in text
    first = next(t for t in report["timings"] if (t["op"], t["contestant"]) == ("swiglu", "ours"))
    assert f"{first['median_us']:.4g} ±" in text or first["median_us"] >= 1e4
    assert "swiglu" in pages.summary(report)


def test_plot(report, tmp_path):
    pytest.importorskip("matplotlib")
    png = pages.write_report(report, tmp_path)[-1]
    assert png.name == "kernels.png" and png.read_bytes().startswith(b"\x89PNG")


# Wrong answers


def altered(op: str, **contestants: Contestant):
    operator = OPERATORS[op]
    kept = {name: operator.contestants[name] for name in ("ours", operator.baseline)}
    return {op: replace(operator, contestants=kept | contestants)}


def statuses(found):
    return {c["contestant"]: c["status"] for c in found["checks"]}


def eager(*inputs: Any) -> Tensor:
    return OPERATORS["ada_norm"].contestants["eager"].call(*inputs)


def boom(*args: Tensor) -> Tensor:
    raise RuntimeError("no such kernel\nsecond line")


def test_wrong_contestants_are_reported_and_not_timed(tmp_path):
    wrong = {
        "scaled": lambda *a: eager(*a) * 1.001,
        "nan": lambda *a: eager(*a).index_fill(2, torch.tensor(0), math.nan),
        "last token": lambda *a: torch.cat((eager(*a)[:, :, :-1], eager(*a)[:, :, :1]), dim=2),
        "no gradient of scale": lambda x, scale, *a: eager(x, scale.detach() + 0 * scale, *a),
        "without gradients": lambda *a: eager(*a) + (0 if torch.is_grad_enabled() else 1),
        "shape": lambda *a: eager(*a)[:, :, None],
        "double": lambda *a: eager(*a).double(),
        "boom": boom,
    }
    operators = altered("ada_norm", **{name: Contestant(call) for name, call in wrong.items()})
    found = body.run([tiny("ada_norm")], CPU, torch.float32, 60, operators=operators)
    failed = {"shape": "failed", "boom": "failed"}  # a gradient of another shape cannot be taken
    expected = dict.fromkeys(wrong, "wrong") | failed | {"ours": "ok", "eager": "ok"}
    assert statuses(found) == expected
    assert {t["contestant"] for t in found["timings"]} == {"ours", "eager"}
    notes = {c["contestant"]: c["note"] for c in found["checks"]}
    assert notes["boom"] == "RuntimeError: no such kernel"
    assert notes["no gradient of scale"] == "d scale"
    assert notes["double"] == "output 0 is (2, 3, 5, 24) float64, not (2, 3, 5, 24) float32"
    text = pages.markdown(found)
    assert "scaled: WRONG, not timed" in text and "error not finite, allowed" in text
    writer.write_json(found, tmp_path / "kernels.json")


def test_a_wrong_baseline_is_caught():
    operators = altered("swiglu", eager=Contestant(lambda h: OPERATORS["swiglu"].contestants["eager"].call(h) * 1.001))
    found = body.run([tiny("swiglu")], CPU, torch.float32, 60, operators=operators)
    assert statuses(found)["eager"] == "wrong"


def test_low_precision_may_err_twice_as_much_as_the_baseline():
    exact = {"output 0": torch.tensor([1.0, 0.5], dtype=torch.float64)}
    low = {"output 0": torch.tensor([1.0, 0.50390625], dtype=torch.bfloat16)}  # off by 2^-8
    eps = torch.finfo(torch.bfloat16).eps  # 2^-7

    def judged(value: float) -> body.Verdict:
        return body.judge_values({"output 0": torch.tensor([1.0, value]).bfloat16()}, exact, low, torch.bfloat16)

    assert judged(0.5).error == 0
    assert judged(0.515625).right and judged(0.515625).tolerance == pytest.approx(2 * 2**-8 + eps, rel=1e-3)
    assert not judged(0.51953125).right
    assert not judged(math.nan).right


def test_codes_of_ours_must_be_identical_and_of_others_as_near():
    """Equal codes: the leftmost is ours to find; the others may take any of them, but no farther one."""
    operator = OPERATORS["nearest_code"]

    def inputs(sizes, fill):
        made = operator.inputs(sizes, fill)
        return {"z": made["z"], "codebook": made["codebook"].repeat(2, 1)}

    def rightmost(z, codebook):
        return ops.nearest_code(z, codebook) + len(codebook) // 2

    def next_one(z, codebook):
        return (ops.nearest_code(z, codebook) + 1) % len(codebook)

    def run(ours):
        contestants = {"ours": ours, "cdist": operator.contestants["cdist"].call, "other": rightmost, "wrong": next_one}
        changed = replace(operator, inputs=inputs, contestants={n: Contestant(c) for n, c in contestants.items()})
        return statuses(body.run([tiny("nearest_code")], CPU, torch.float32, 60, operators={"nearest_code": changed}))

    assert run(ops.nearest_code) == {"ours": "ok", "cdist": "ok", "other": "ok", "wrong": "wrong"}
    assert run(rightmost)["ours"] == "wrong"


def test_the_step_is_checked_on_copies_and_must_keep_observed_bits():
    def everything(z, x0, observed, table, step):
        return z.copy_(table[step, 0].float() * z + table[step, 1].float() * x0)

    operators = altered("partial_ddim_step_", everything=Contestant(everything))
    found = body.run([tiny("partial_ddim_step_")], CPU, torch.float32, 60, operators=operators)
    assert statuses(found) == {"ours": "ok", "eager": "ok", "everything": "wrong"}


# Time


class Clock:
    """A stopwatch for which every lap takes what it says."""

    cuda = False

    def __init__(self):
        self.order = []

    def sample(self, lap):
        self.order.append(lap.calls)
        return lap.run()


def test_contestants_take_turns(monkeypatch):
    monkeypatch.setattr(timing, "ROUNDS", (2, 4))
    clock = Clock()
    laps = {name: timing.Lap(lambda i=i: 10.0 * i, i) for i, name in enumerate("abc")}
    laps["bad"] = timing.Lap(boom, 9)
    samples, broken = timing.interleave(laps, clock, budget=0)
    assert samples == {"a": [0.0] * 2, "b": [10.0] * 2, "c": [20.0] * 2}
    assert broken == {"bad": "RuntimeError: no such kernel"}
    assert clock.order == [0, 1, 2, 9, 0, 1, 2, 1, 2, 0]  # a warm-up, two rounds
    samples, _ = timing.interleave(laps, clock, budget=60)
    assert len(samples["a"]) == 4


def test_inputs_rotate():
    seen = []
    timing.repeated(seen.append, calls=5, sets=2)()
    assert seen == [0, 1, 0, 1, 0]
    assert timing.calls_of(seconds=1e-5, sets=3) == 10 and timing.calls_of(1e-1, 3) == 3
    assert timing.calls_of(1e-9, 3) == timing.CALLS
    assert timing.rotating(1e-5, 30) == 30 and timing.rotating(1e-2, 30) == 2 and timing.rotating(1.0, 30) == 1


def test_quantiles():
    assert timing.quantile([3, 1, 2], 0.5) == 2 and timing.quantile([0, 10], 0.1) == pytest.approx(1)
    assert timing.quantile([7], 0.9) == 7


def test_what_does_not_fit_the_time_is_listed():
    found = body.run([tiny("swiglu"), tiny("swiglu")], CPU, torch.float32, 0.0)
    assert {c["note"] for c in found["checks"]} == {"the time was up"} and not found["timings"]
    assert "skipped, the time was up" in pages.summary(found) and "the time was up" in pages.markdown(found)


def test_compilers_have_a_share_of_the_time(monkeypatch):
    monkeypatch.setattr(body, "COMPILING", 0.0)
    found = body.run([tiny("swiglu", tier=0)], CPU, torch.float32, 60)
    notes = {c["contestant"]: c["note"] for c in found["checks"]}
    assert notes["compile"] == notes["compile-max"] == "the time for compilers was up"


# Contestants


def test_the_other_rotation_is_switched_on_and_off():
    usual = attention_token.ROTATE_BEFORE
    with OPERATORS["axis_attention_token"].contestants["ours-rotated-before"].context():
        assert attention_token.ROTATE_BEFORE is True
    assert attention_token.ROTATE_BEFORE is usual


def compiled_statuses(operators=OPERATORS):
    ops = ("ada_norm", "axis_attention_token", "partial_ddim_step_")
    found = body.run([tiny(op, tier=1) for op in ops], CPU, torch.float32, 300, operators=operators)
    checks = {c["op"]: (c["status"], c["note"]) for c in found["checks"] if c["contestant"] == "compile"}
    timed = {(t["op"], t["direction"]) for t in found["timings"] if t["contestant"] == "compile"}
    assert timed == {(op, direction) for op in ops for direction in directions(op)}
    return {op: status for op, (status, _) in checks.items()}


def test_compiled_contestants(monkeypatch):
    """Dynamo and AOTAutograd, with retained graphs; the code generator is the next test's."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    assert set(compiled_statuses().values()) == {"ok"}


@pytest.mark.slow
def test_compiled_contestants_for_real():
    assert set(compiled_statuses().values()) == {"ok"}


# The command and the document


def test_command(tmp_path, monkeypatch):
    small = [replace(tiny("swiglu"), tier=2)]
    monkeypatch.setattr(body, "plan", lambda op, device, dtype: (small, CPU, torch.float32))
    done = CliRunner().invoke(cli.app, ["bench", "kernels", "-o", str(tmp_path / "out"), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["timings"]
    assert (tmp_path / "out/kernels.json").exists() and (tmp_path / "out/kernels.md").exists()


def test_a_command_that_finds_ours_wrong_fails(tmp_path, monkeypatch):
    wrong = altered("swiglu", ours=Contestant(lambda h: 1.01 * ops.swiglu(h)))
    monkeypatch.setattr(body, "plan", lambda op, device, dtype: ([tiny("swiglu")], CPU, torch.float32))
    monkeypatch.setattr(body, "rivals", lambda against: wrong)
    done = CliRunner().invoke(cli.app, ["bench", "kernels", "-o", str(tmp_path)])
    assert done.exit_code == 1 and "an operator gave a wrong answer" in done.stderr and "kernels.md" in done.stderr


def test_command_names_what_does_not_exist(tmp_path):
    for options, words in ((["--op", "softmax"], "swiglu"), (["--dtype", "int8"], "bfloat16")):
        done = CliRunner().invoke(cli.app, ["bench", "kernels", "-o", str(tmp_path), "--device", "cpu", *options])
        assert done.exit_code == 1 and words in done.stderr and len(done.stderr.splitlines()) == 1


def test_plan_on_a_cpu_is_small():
    cases, device, dtype = body.plan(None, "cpu", None)
    assert (device.type, dtype) == ("cpu", torch.float32)
    assert {case.op for case in cases} == set(OPERATORS)
    assert len(cases) == 2 * len(OPERATORS), "the two built-in models differ in every shape"
    assert [case.op for case in body.plan(["swiglu"], "cpu", "float16")[0]] == ["swiglu", "swiglu"]


def test_document_is_up_to_date():
    """`python -m copedit_bench.operators.tables` writes the tables in docs/kernels.md."""
    assert tables.main(["--check"]) == 0
    marked = tables.MARKED.findall(tables.DOCUMENT.read_text("utf-8"))
    for wanted in ("floor", "measured"):
        assert {op for kind, op in marked if kind == wanted} == set(OPERATORS), wanted
    assert {op for kind, op in marked if kind == "tiles"} == {"axis_attention_token", *tables.TILES}


def test_an_unknown_option_writes_nothing(monkeypatch):
    monkeypatch.setattr(tables, "write_atomically", lambda *_: pytest.fail("written"))
    for wrong in ("--chekc", "--help", "FOLDER"):
        with pytest.raises(SystemExit):
            tables.main([wrong])


def test_tiles_come_from_the_modules(monkeypatch):
    monkeypatch.setitem(activation.TILES, 80, activation.TILES[80]._replace(rows=7))
    assert tables.tiles_table("swiglu")[2].startswith("| sm_80 | 7 |")
    rows = tables.tiles_table("axis_attention_token")
    tile = attention_token.BACKWARD_KV[80][96]
    line = next(row for row in rows if row.startswith("| backward, dk and dv, sm_80"))
    assert line.endswith(f"| {tile.BQ} × {tile.BK}, {tile.warps}, {tile.stages} |")


def test_document_takes_recorded_runs(report, tmp_path):
    on_gpu = report | {"machine": report["machine"] | {"device": "cuda", "name": "NVIDIA X"}}
    writer.write_json(on_gpu, tmp_path / "x" / "kernels.json")
    writer.write_json(report, tmp_path / "cpu" / "kernels.json")
    runs = tables.runs(tmp_path)
    assert list(runs) == ["x"]
    text = "before\n<!-- measured swiglu -->\nold\n<!-- end -->\nafter\n"
    new = tables.filled(text, runs)
    assert new.startswith("before\n") and new.endswith("<!-- end -->\nafter\n")
    assert "NVIDIA X" in new and "old" not in new and tables.filled(new, runs) == new
    assert tables.NOTHING in tables.filled(text, {})
    with pytest.raises(CopeditError, match="<!-- tiles swiglu --> lacks a line <!-- end -->"):
        tables.filled("<!-- tiles swiglu -->\nkept\n" + text, runs)


def test_rivals_are_named_by_how_they_begin():
    assert body.rivals(None) is OPERATORS
    found = body.rivals(["eager", "sdpa"])
    for op, row in OPERATORS.items():
        kept = set(found[op].contestants)
        assert {*row.ours, row.baseline} <= kept
        assert kept - {*row.ours, row.baseline} == {n for n in row.contestants if n.startswith(("eager", "sdpa"))} - {
            row.baseline
        }
    with pytest.raises(CopeditError, match=r"--against tensorflow: no contestant begins so; there are .*sdpa-flash"):
        body.rivals(["tensorflow"])


# On a GPU, and as if


class Pretended(timing.Stopwatch):
    """The paths that only CUDA takes, on a CPU: a captured graph is the calls themselves."""

    graphs = True
    refused = 0

    def rotation(self, size):
        return 3

    def peak(self, call):
        call()
        return 3 << 20

    def capture(self, lap):
        if not self.refused:
            self.refused += 1
            raise RuntimeError("cannot be captured")
        return lap


def test_as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(body, "Stopwatch", Pretended)
    found = body.run([tiny("swiglu")], CPU, torch.bfloat16, 60)
    assert {t["mode"] for t in found["timings"]} == {"eager", "graph"}
    assert all(
        t["peak_bytes"] == 3 << 20 and t["dtype"] == "bfloat16" and t["bytes"] % 2 == 0 for t in found["timings"]
    )
    ours = next(c for c in found["checks"] if c["contestant"] == "ours")
    assert ours["broken"] == ["forward, capture: RuntimeError: cannot be captured"]
    assert len([t for t in found["timings"] if t["contestant"] == "ours"]) == 5  # three passes, one not captured
    about = dict.fromkeys(("driver", "cuda", "cudnn", "power_limit_w", "sm_clock_mhz", "sm_clock_max_mhz"), "7")
    found |= {"machine": found["machine"] | about | {"device": "cuda", "memory_clock_mhz": "7"}, "clocks_after": {}}
    text = pages.markdown(found)
    assert "each call replayed from a CUDA graph" in text and "ours: forward, capture" in text
    assert "| forward | 3 | 3 |" in text and "Driver 7" in text
    # The short table is of graphs, so ours has no forward there.
    assert "forward | – | – |" in "\n".join(pages.short_table(found, "swiglu", "brain-brats"))


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    cases = [tiny(op, tier=1 if op == "swiglu" else 2) for op in OPERATORS]
    found = body.run(cases, torch.device("cuda"), torch.bfloat16, 120)
    ours = {c["op"]: (c["status"], c["note"], c.get("broken")) for c in found["checks"] if c["contestant"] == "ours"}
    assert all(status == "ok" and not broken for status, _, broken in ours.values()), ours
    timed = {(t["op"], t["direction"], t["mode"]) for t in found["timings"] if t["contestant"] == "ours"}
    assert timed == {(op, d, mode) for op in OPERATORS for d in directions(op) for mode in ("eager", "graph")}
    assert all(t["peak_bytes"] >= 0 for t in found["timings"])
    assert found["machine"]["l2_bytes"] > 0
    pages.write_report(found, tmp_path)
