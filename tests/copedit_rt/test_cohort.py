"""Many studies, with tiny models whose weights are random."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from commands import SHORT_AXIS, files, image, refused, run, save, slices, study

from copedit_rt import changes, checkpoint, cohort
from copedit_rt.cli import FLAGGED
from copedit_rt.errors import CopeditError
from copedit_rt.images.study import Study
from copedit_rt.listener import Listener
from copedit_rt.models import Models
from copedit_rt.perception import Perception
from copedit_rt.synthesizer import Synthesizer
from copedit_rt.trained import TrainedOn

ROOT = Path(cohort.__file__).parents[1]


def test_existing_outputs_are_kept_unless_overwritten(tmp_path, brain_model):
    study(tmp_path / "in", elements=("t1", "t2"))
    command = ["synth", "-i", tmp_path / "in", "-o", tmp_path / "out", "--model", brain_model]
    assert run(*command, "--seed", 1).exit_code == 0
    flair, t1ce = tmp_path / "out" / "case_flair.nii.gz", tmp_path / "out" / "case_t1ce.nii.gz"
    before = flair.read_bytes(), t1ce.read_bytes()
    result = run(*command, "--seed", 2)
    assert result.exit_code == 0 and result.stdout.count(" kept (") == 2
    assert (flair.read_bytes(), t1ce.read_bytes()) == before
    t1ce.unlink()
    result = run(*command, "--seed", 2)
    assert result.stdout.count(" kept (") == 1 and result.stdout.count(" written: ") == 1
    assert flair.read_bytes() == before[0] and t1ce.is_file()
    assert run(*command, "--seed", 2, "--overwrite").stdout.count(" written: ") == 2
    assert json.loads((tmp_path / "out" / "case_flair.json").read_text())["sampler"]["seed"] == 2


def test_only_outputs_with_their_own_sidecar_are_kept(tmp_path, brain_model):
    """An image whose sidecar is missing, or that of another, is made again; leftovers of the dead go."""
    study(tmp_path / "in", elements=("t1", "t2"))
    command = ["synth", "-i", tmp_path / "in", "-o", tmp_path / "out", "--model", brain_model, "--json"]
    assert run(*command).exit_code == 0
    out, (flair, t1ce) = (
        tmp_path / "out",
        (tmp_path / "out" / f"case_{element}.nii.gz" for element in ("flair", "t1ce")),
    )
    whole = t1ce.read_bytes()

    def again() -> dict[str, object]:
        (entry,) = json.loads(run(*command).stdout)["studies"]
        return entry

    assert again()["status"] == "kept"
    for spoil in (
        lambda: (out / "case_t1ce.json").unlink(),
        lambda: (out / "case_t1ce.json").write_bytes((out / "case_flair.json").read_bytes()),
        lambda: t1ce.write_bytes(flair.read_bytes()),
    ):
        spoil()
        entry = again()
        assert entry["status"] == "written" and entry["kept"] == ["flair"]
        assert t1ce.read_bytes() == whole and again()["status"] == "kept"
    dead = out / "deep" / f".case_t1ce.nii.gz.{'0' * 16}.part"
    dead.parent.mkdir()
    dead.write_bytes(b"half")
    assert again()["status"] == "kept" and not dead.exists()


def test_what_is_kept_says_what_has_changed_since(tmp_path, brain_model, monkeypatch):
    model = Path(shutil.copytree(brain_model, tmp_path / "model"))
    study(tmp_path / "in", elements=("t1", "t2", "flair"))
    command = ["synth", "-i", tmp_path / "in", "-o", tmp_path / "out", "--model", model]
    assert run(*command, "--seed", 1).exit_code == 0
    made = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    monkeypatch.setattr(Synthesizer, "load", lambda *a, **k: pytest.fail("loaded"))

    def note(*options: object) -> str:
        result = run(*command, *options)
        assert result.exit_code == 0 and " kept (--overwrite replaces it)" in result.stdout
        assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == made
        return result.stderr

    t2 = tmp_path / "in" / "case_t2.nii.gz"
    assert note("--seed", 1) == ""
    os.utime(t2)  # only touched: the content decides
    assert note("--seed", 1) == ""
    told = note("--seed", 2, "--steps", 3, "--samples", 2, "--detail", "guided", "--solver", "dpm2m", "--resample")
    assert "case: kept though made otherwise: t1ce (" in told and "; --overwrite makes it again" in told
    assert "(method ddim, now dpm2m; steps 2, now 3; seed 1, now 2; samples 1, now 2; detail False, now True; " in told
    assert "resample False, now True)" in told
    for path in (model / "tokenizer.safetensors", model / "denoiser.safetensors"):
        before = path.read_bytes()
        path.write_bytes(before + b" ")
        assert "(other weights of tiny-brain)" in note("--seed", 1)
        path.write_bytes(before)
    checkpoint.write_config(model, replace(checkpoint.read_config(model), name="another"))
    assert "(model tiny-brain, now another)" in note("--seed", 1)
    checkpoint.write_config(model, checkpoint.read_config(brain_model))
    save(t2, image(8))
    assert "(t2 is another image)" in note("--seed", 1)
    t2.unlink()
    told = note("--seed", 1, "--target", "t1ce")
    assert "(t2 was among the inputs)" in told
    summary = json.loads(run(*command, "--target", "t1ce", "--seed", 1, "--json").stdout)
    assert "t2 was among the inputs" in summary["studies"][0]["notes"][0]


def test_slices_named_otherwise_are_told_of_a_stack_that_is_kept(tmp_path, heart_model):
    path = save(tmp_path / "sax_stack.nii.gz", slices(16, 8), SHORT_AXIS)
    command = ["synth", "-i", path, "-o", tmp_path / "out", "--model", heart_model]
    assert run(*command, "--missing-slices", "3").exit_code == 0
    assert run(*command, "--missing-slices", "3").stderr == ""
    assert "(missing_slices [3], now [3, 4])" in run(*command, "--missing-slices", "3,4").stderr


def test_slices_to_compare_may_be_an_array(heart_model):
    asked = changes.request(checkpoint.read_config(heart_model), {}, {"missing_slices": np.array([5, 2, 5])})
    assert json.dumps(asked["reading"]) == '{"missing_slices": [2, 5], "resample": false}'


def test_kept_outputs_need_no_weights(tmp_path, brain_model, monkeypatch):
    study(tmp_path / "in")
    command = ["synth", "-i", tmp_path / "in", "-o", tmp_path / "out", "--model", brain_model]
    run(*command)
    monkeypatch.setattr(Synthesizer, "load", lambda *a, **k: pytest.fail("loaded"))
    assert run(*command).exit_code == 0


def test_outputs_may_go_beside_the_inputs(tmp_path, brain_model):
    folder = study(tmp_path / "cohort" / "case").parent
    before = {p: p.read_bytes() for p in folder.rglob("*.nii.gz")}
    for overwrite in ([], ["--overwrite"]):  # its own outputs are not taken for inputs
        result = run("synth", "-i", folder, "-o", folder, "--model", brain_model, *overwrite)
        assert result.exit_code == 0 and "case_t1ce.nii.gz" in result.stdout
    assert all(p.read_bytes() == content for p, content in before.items())
    assert "case/case_t1ce.nii.gz" in files(folder)


def test_a_cohort_goes_on_after_a_failure(tmp_path, brain_model):
    for name in ("a", "b", "c", "d"):
        study(tmp_path / "in" / name, name)
    broken = tmp_path / "in" / "b" / "b_t2.nii.gz"
    broken.write_bytes(broken.read_bytes()[:200])
    save(tmp_path / "in" / "d" / "d_t1ce.nii.gz", image(9))
    command = ["synth", "-i", tmp_path / "in", "-o", tmp_path / "out", "--model", brain_model]
    result = run(*command, "--json")
    summary = json.loads(result.stdout)
    assert result.exit_code == 1
    assert {e["study"]: e["status"] for e in summary["studies"]} == {
        "a": "written",
        "b": "failed",
        "c": "written",
        "d": "complete",
    }
    assert sum(line.startswith("copedit: ") and "b_t2" in line for line in result.stderr.splitlines()) == 1
    assert files(tmp_path / "out") == {f"{n}/{n}_t1ce{end}" for n in "ac" for end in (".nii.gz", ".json")}
    # Mended and repeated, only what was not done is done.
    save(broken, image(1))
    summary = json.loads(run(*command, "--json").stdout)
    assert (summary["written"], summary["kept"], summary["failed"]) == (1, 2, 0)


@pytest.mark.parametrize("where", [(Study, "read"), (Synthesizer, "synthesize")])
@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("can't allocate memory: 9 bytes"), RuntimeError("CUDA error: no\nluck")]
)
def test_whatever_goes_wrong_with_a_study_is_its_own_failure(tmp_path, brain_model, monkeypatch, where, error):
    for name in "abc":
        study(tmp_path / "in" / name, name)
    real = getattr(*where)

    def raises(*given, **options):
        if "b" in [getattr(thing, "name", "") for thing in given]:
            raise error
        return real(*given, **options)

    monkeypatch.setattr(*where, raises)
    command = ["synth", "-i", tmp_path / "in", "-o", tmp_path / "out", "--model", brain_model, "--json"]
    result = run(*command)
    summary = json.loads(result.stdout)
    assert result.exit_code == 1 and [e["status"] for e in summary["studies"]] == ["written", "failed", "written"]
    (told,) = (line for line in result.stderr.splitlines() if line.startswith("copedit: "))
    assert told == f"copedit: {summary['studies'][1]['error']}" and told.startswith("copedit: b: ")
    assert ("RuntimeError: CUDA error: no luck" if "CUDA" in str(error) else "memory ran out") in told
    assert "Traceback" not in result.stderr
    traceback = run("--debug", *command).stderr
    assert "Traceback" in traceback and "in raises" in traceback and told in traceback
    refused(run("synth", "-i", tmp_path / "in/b", "-o", tmp_path / "one", "--model", brain_model), "b: ")


@pytest.mark.parametrize(("part", "what"), [("tokenizer", "encoder"), ("denoiser", "denoiser")])
def test_a_network_that_overflows_writes_nothing(tmp_path, brain_model, part, what):
    """Its latents are not finite, but the codes that are nearest to them are."""
    model = Path(shutil.copytree(brain_model, tmp_path / "model"))
    path = model / f"{part}.safetensors"
    weights = checkpoint.read_tensors(path)[0]
    grown = {k: v * 1e25 if v.ndim > 1 and not k.startswith("decoder") else v for k, v in weights.items()}
    checkpoint.write_tensors(path, grown)
    for name in "ab":
        study(tmp_path / "in" / name, name)
    result = run("synth", "-i", tmp_path / "in", "-o", tmp_path / "out", "--model", model)
    told = [line for line in result.stderr.splitlines() if f"the {what} of tiny-brain returned NaN or infinity" in line]
    assert result.exit_code == 1 and [line[:12] for line in told] == ["copedit: a: ", "copedit: b: "]
    assert files(tmp_path / "out") == set()


def test_what_a_model_was_trained_on_is_said_once(tmp_path, brain_model):
    model = Path(shutil.copytree(brain_model, tmp_path / "model"))
    TrainedOn("noise").save(model)
    for name in "ab":
        study(tmp_path / "in" / name, name)
    result = run("synth", "-i", tmp_path / "in", "-o", tmp_path / "out", "--model", model)
    assert result.exit_code == 0 and result.stderr.count("was trained on noise") == 1
    assert run("inspect", "-i", tmp_path / "in", "--model", model).stderr.count("was trained on noise") == 1


def test_names_that_are_no_text(tmp_path, brain_model):
    """Names with escapes and bytes that are not UTF-8 are worked on like any other, and shown harmlessly."""
    name = os.fsdecode(b"caf\xe9\x1b[31m\x07")
    study(tmp_path / "in" / name, name)
    save(tmp_path / "in" / name / f"{name}_seg.nii.gz", image())
    study(tmp_path / "in" / "z", "z")
    command = ["-i", tmp_path / "in", "--model", brain_model]
    result = run("synth", *command, "-o", tmp_path / "out", "--preview", "--report")
    assert result.exit_code == 0 and len(files(tmp_path / "out")) == 9
    assert "caf%E9" in (tmp_path / "out" / "index.html").read_text()
    looked = run("inspect", *command)
    assert looked.exit_code in (0, FLAGGED)
    for output in (result.stdout, result.stderr, looked.stdout, looked.stderr):
        assert "\x1b" not in output and "\x07" not in output and "caf\\xe9\\x1b[31m" in output
    (tmp_path / "in" / name / f"{name}_t2.nii.gz").write_bytes(b"")
    result = run("synth", *command, "-o", tmp_path / "other", "--json")
    assert [e["status"] for e in json.loads(result.stdout)["studies"]] == ["failed", "written"]
    assert "\x1b" not in result.stderr and "caf\\xe9\\x1b[31m\\x07_t2.nii.gz" in result.stderr


def test_heads_that_are_not_finite_are_null_in_json(tmp_path, brain_model, monkeypatch):
    real = Perception.from_logits

    def unfinished(task, elements, count, *more):
        return real(task, elements, np.full_like(count, np.nan), *more)

    monkeypatch.setattr(Perception, "from_logits", unfinished)
    study(tmp_path / "in")
    result = run("synth", "-i", tmp_path / "in", "-o", tmp_path / "out", "--model", brain_model, "--json")
    assert result.exit_code == 0
    (entry,) = json.loads(result.stdout, parse_constant=pytest.fail)["studies"]
    assert entry["perception"]["count"] == {"1": None, "2": None, "3": None}
    result = run("inspect", "-i", tmp_path / "in", "--model", brain_model, "--json")
    json.loads(result.stdout, parse_constant=pytest.fail)


def test_a_listener_hears_what_a_cohort_does(tmp_path, brain_model):
    """Python users need no terminal."""
    heard = []

    class Everything(Listener):
        def __getattribute__(self, name):
            return lambda *told: heard.append((name, *told))

    for name in "ab":
        study(tmp_path / "in" / name, name)
    (tmp_path / "in" / "b" / "b_t2.nii.gz").write_bytes(b"")
    summary = cohort.synthesise([tmp_path / "in"], tmp_path / "out", model=str(brain_model), listener=Everything())
    assert (summary["written"], summary["failed"]) == (1, 1)
    # The second begins while the first is written.
    assert [told[0] for told in heard] == ["found", "began", "step", "step", "began", "ended", "ended"]
    assert heard[3] == ("step", 2, 2) and heard[5][2] is None and str(heard[6][2]) == summary["studies"][1]["error"]


def test_the_next_study_is_read_while_one_is_computed(tmp_path, brain_model, monkeypatch):
    for name in "abcd":
        study(tmp_path / "in" / name, name)
    began = {name: threading.Event() for name in "abcd"}
    read, compute = Study.read, Synthesizer.synthesize

    def reading(files, **options):
        began[files.name].set()
        return read(files, **options)

    def computing(self, case, **options):
        after = chr(ord(case.name) + 1)
        if after in began:
            assert began[after].wait(60), f"{after} is not read while {case.name} is computed"
        assert not any(began[name].is_set() for name in "abcd" if name > after), "more than one study is read ahead"
        return compute(self, case, **options)

    monkeypatch.setattr(Study, "read", reading)
    monkeypatch.setattr(Synthesizer, "synthesize", computing)
    result = run("synth", "-i", tmp_path / "in", "-o", tmp_path / "out", "--model", brain_model)
    assert result.exit_code == 0, result.stderr
    assert files(tmp_path / "out") == {f"{n}/{n}_t1ce{end}" for n in "abcd" for end in (".nii.gz", ".json")}


def test_a_study_is_written_while_the_next_is_computed(tmp_path, brain_model, monkeypatch):
    """And a second one is not computed before it is: two results in memory, not a cohort's."""
    for name in "abc":
        study(tmp_path / "in" / name, name)
    begun, written = ({name: threading.Event() for name in "abc"} for _ in range(2))
    write, compute = cohort.Job.save, Synthesizer.synthesize

    def computing(self, case, **options):
        begun[case.name].set()
        assert case.name != "c" or written["a"].is_set()
        return compute(self, case, **options)

    def writing(self, opened, result):
        after = chr(ord(opened.files.name) + 1)
        assert after not in begun or begun[after].wait(60), f"{after} waits until {opened.files.name} is written"
        write(self, opened, result)
        written[opened.files.name].set()

    monkeypatch.setattr(cohort.Job, "save", writing)
    monkeypatch.setattr(Synthesizer, "synthesize", computing)
    found = cohort.synthesise([tmp_path / "in"], tmp_path / "out", model=str(brain_model))
    assert found["written"] == 3 and [entry["study"] for entry in found["studies"]] == ["a", "b", "c"]
    assert files(tmp_path / "out") >= {f"{n}/{n}_t1ce{end}" for n in "abc" for end in (".nii.gz", ".json")}


def test_two_processes_share_a_cohort(tmp_path, brain_model):
    """Every study is written once, by one of them; one that is broken fails where it belongs and stops nobody."""
    names = "abcde"
    for name in names:
        study(tmp_path / "in" / name, name)
    broken = tmp_path / "in" / "b" / "b_t2.nii.gz"
    broken.write_bytes(broken.read_bytes()[:200])
    command = [sys.executable, "-m", "copedit_rt", "synth", "-i", str(tmp_path / "in"), "-o", str(tmp_path / "out")]
    command += ["--model", str(brain_model), "--json"]
    environment = {k: v for k, v in os.environ.items() if k != "TORCHELASTIC_RUN_ID"}
    both = [
        subprocess.Popen(
            command,
            env=environment | {"RANK": str(rank), "WORLD_SIZE": "2"},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    found = []
    for process in both:
        out, error = process.communicate(timeout=300)
        assert "Traceback" not in error
        found.append({e["study"]: e["status"] for e in json.loads(out)["studies"]})
    assert [process.returncode for process in both] == [0, 1]
    assert found == [dict.fromkeys("ace", "written"), {"b": "failed", "d": "written"}]
    assert files(tmp_path / "out") == {f"{n}/{n}_t1ce{end}" for n in "acde" for end in (".nii.gz", ".json")}


@pytest.mark.slow
def test_torchrun_does_not_stop_the_others_for_a_study_that_failed(tmp_path, brain_model):
    """Its processes end together: those of other studies are done by then."""
    for name in "abcdefgh":
        study(tmp_path / "in" / name, name)
    broken = tmp_path / "in" / "b" / "b_t2.nii.gz"
    broken.write_bytes(broken.read_bytes()[:200])
    for name in "dfh":  # nothing else to do for the process that fails
        (tmp_path / "in" / name / f"{name}_t1ce.nii.gz").write_bytes((tmp_path / "in/a/a_t1.nii.gz").read_bytes())
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *("-m", "copedit_rt", "synth", "-i", str(tmp_path / "in"), "-o", str(tmp_path / "out")),
            *("--model", str(brain_model), "--device", "cpu"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode != 0 and "b_t2" in done.stderr
    assert files(tmp_path / "out") == {f"{n}/{n}_t1ce{end}" for n in "aceg" for end in (".nii.gz", ".json")}


@pytest.mark.parametrize(("engine", "device"), [("torch", "cuda:1"), ("onnxruntime", "auto"), ("openvino", "auto")])
def test_a_process_takes_a_gpu_only_where_its_engine_computes_there(monkeypatch, engine, device):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert cohort._own_device("auto", 2, engine) == device


@pytest.mark.parametrize(("rank", "world"), [("2", "2"), ("x", "2"), ("²", "3"), ("0", "")])
def test_a_place_among_processes_that_does_not_exist(tmp_path, brain_model, monkeypatch, rank, world):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    study(tmp_path / "in")
    result = run("synth", "-i", tmp_path / "in", "-o", tmp_path / "out", "--model", brain_model)
    refused(result, f"RANK={rank}, WORLD_SIZE={world}")


def test_an_interrupted_cohort_can_be_repeated(tmp_path, brain_model, monkeypatch):
    for name in ("a", "b"):
        study(tmp_path / "in" / name, name)
    command = ["synth", "-i", tmp_path / "in", "-o", tmp_path / "out", "--model", brain_model]
    real = Synthesizer.synthesize

    def interrupted(self, case, **options):
        if case.name == "b":
            raise KeyboardInterrupt
        return real(self, case, **options)

    monkeypatch.setattr(Synthesizer, "synthesize", interrupted)
    result = run(*command)
    assert result.exit_code == 130 and "Traceback" not in result.stderr
    assert files(tmp_path / "out") == {"a/a_t1ce.nii.gz", "a/a_t1ce.json"}
    first = (tmp_path / "out" / "a" / "a_t1ce.nii.gz").read_bytes()
    monkeypatch.setattr(Synthesizer, "synthesize", real)
    summary = json.loads(run(*command, "--json").stdout)
    assert [e["status"] for e in summary["studies"]] == ["kept", "written"]
    assert (tmp_path / "out" / "a" / "a_t1ce.nii.gz").read_bytes() == first


def test_a_model_that_cannot_be_used_stops_a_cohort(tmp_path, brain_model):
    for name in ("a", "b"):
        study(tmp_path / "in" / name, name)
    command = ["synth", "-i", tmp_path / "in", "-o", tmp_path / "out"]
    refused(run(*command, "--model", "nowhere"), "nowhere")
    refused(run(*command, "--model", brain_model, "--device", "tpu"), "tpu")
    refused(run(*command, "--model", brain_model, "--target", "pd"), "pd")


def test_a_cohort_in_which_nothing_is_missing(tmp_path, brain_model, heart_model):
    for name in ("a", "b"):
        study(tmp_path / "brains" / name, name, ("t1", "t1ce", "t2", "flair"))
        save(tmp_path / "hearts" / f"sax_{name}.nii.gz", slices(16, 8), SHORT_AXIS)
    for folder, model in (("brains", brain_model), ("hearts", heart_model)):
        result = run("synth", "-i", tmp_path / folder, "-o", tmp_path / "out", "--model", model)
        assert result.exit_code == 1 and "nothing is missing in any" in result.stderr
    there = ["synth", "-i", tmp_path / "hearts", "-o", tmp_path / "out", "--model", heart_model, "--summary"]
    assert files(tmp_path / "out") == set() and run(*there).exit_code == 0


def test_an_acquired_image_is_never_replaced(tmp_path, brain_model):
    before = {path: path.read_bytes() for path in study(tmp_path / "in", elements=("t1", "flair")).iterdir()}
    command = ["synth", "-i", tmp_path / "in" / "case_t1.nii.gz", "-o", tmp_path / "in", "--model", brain_model]
    for more in ([], ["--overwrite"], ["--target", "flair"]):
        refused(run(*command, *more), "case_flair.nii.gz is there and not of CoPeDiT; choose another output folder")
    assert {path: path.read_bytes() for path in (tmp_path / "in").iterdir()} == before
    assert run(*command, "--target", "t2").exit_code == 0
    assert {path: path.read_bytes() for path in before} == before


def test_an_output_of_another_patient_is_not_kept(tmp_path, brain_model):
    for number, patient in enumerate(("P1", "P2")):
        for element in ("t1", "t2"):
            save(tmp_path / patient / f"{element}.nii.gz", image(number))
    command = ["synth", "-o", tmp_path / "out", "--model", brain_model, "-i"]
    assert run(*command, tmp_path / "P1").exit_code == 0
    before = {name: (tmp_path / "out" / name).read_bytes() for name in files(tmp_path / "out")}
    for more in ([], ["--overwrite"]):
        refused(run(*command, tmp_path / "P2", *more), "is of the study P1, not of P2; choose another output folder")
    assert {name: (tmp_path / "out" / name).read_bytes() for name in files(tmp_path / "out")} == before
    (tmp_path / "P1").rename(tmp_path / "renamed")
    assert "kept" in run(*command, tmp_path / "renamed").stdout, "the same images"


def test_a_synthetic_image_of_what_was_acquired_since_is_told_and_goes_on_request(tmp_path, brain_model, monkeypatch):
    for name in "ab":
        study(tmp_path / "in" / name, name, ("t1", "t2"))
    command = ["synth", "-i", tmp_path / "in", "-o", tmp_path / "out", "--model", brain_model]
    assert run(*command, "--samples", 2).exit_code == 0
    acquired = save(tmp_path / "in" / "a" / "a_flair.nii.gz", image(7))
    flair = tmp_path / "out" / "a" / "a_flair.nii.gz"
    told = f"{flair} is synthetic, and the study has a flair now; "
    assert run(*command).stderr.count(f"a: {told}remove it, or repeat with --overwrite") == 1
    rows = json.loads(run(*command, "--summary", "--json").stdout)["studies"]
    assert [row.get("outlived") for row in rows] == [[f"{told}remove it, or repeat with --overwrite"], None]
    assert "the study has a flair" in " ".join(run(*command, "--summary").stdout.replace("│", " ").split())

    def withdraw(*given):
        raise PermissionError("a read-only folder")

    with monkeypatch.context() as patch:
        patch.setattr(cohort, "withdraw", withdraw)
        failed = run(*command, "--overwrite", "--json")
    assert failed.exit_code == 1
    assert [entry["status"] for entry in json.loads(failed.stdout)["studies"]] == ["failed", "written"]
    assert f"a: {told}it was removed" in run(*command, "--overwrite").stderr
    left = {
        f"{n}/{n}_{e}{end}" for n, e in (("a", "t1ce"), ("b", "t1ce"), ("b", "flair")) for end in (".nii.gz", ".json")
    }
    assert files(tmp_path / "out") == left and acquired.is_file()
    (tmp_path / "out" / "a" / "a_report.html").touch()
    assert "flair now" not in run(*command).stderr
    # Of a study that is complete now the error says it. What was acquired stays, also where outputs lie beside it.
    save(tmp_path / "in" / "a" / "a_t1ce.nii.gz", image(8))
    alone = ["synth", "-i", tmp_path / "in" / "a", "--model", brain_model, "--overwrite", "-o"]
    told = "a_t1ce.nii.gz is synthetic, and the study has a t1ce now; it was removed"
    said = refused(run(*alone, tmp_path / "out" / "a"), "no element is missing", "a_report.html may show what was rem")
    assert told in said
    refused(run(*alone, tmp_path / "in" / "a"), "no element is missing")
    assert files(tmp_path / "out" / "a") == {"a_report.html"} and len(files(tmp_path / "in" / "a")) == 4


def test_what_was_acquired_since_replaces_nothing_before_it_was_read(tmp_path, brain_model):
    study(tmp_path / "in", "a", ("t1", "t2"))
    command = ["synth", "-i", tmp_path / "in", "-o", tmp_path / "out", "--model", brain_model]
    assert run(*command).exit_code == 0
    before = files(tmp_path / "out")
    flair = save(tmp_path / "in" / "a_flair.nii.gz", image(7))
    refused(run(*command, "--overwrite", "--steps", 100_000), "steps")
    again = run(*command, "--overwrite", "--target", "t1ce")
    assert again.exit_code == 0 and "repeat with --overwrite and without --target" in again.stderr
    content = flair.read_bytes()
    flair.write_bytes(b"")
    refused(run(*command, "--overwrite"), "a_flair.nii.gz is an empty file")
    save(tmp_path / "in" / "a_t1ce.nii.gz", image(8))
    refused(run(*command, "--overwrite"), "a_flair.nii.gz is an empty file")  # of a study that is complete
    assert files(tmp_path / "out") == before
    flair.write_bytes(content)
    refused(run(*command, "--overwrite"), "a flair now; it was removed", "a t1ce now; it was removed")
    assert not files(tmp_path / "out")


def test_unwritable_output_is_told_before_anything_is_read(tmp_path, brain_model, monkeypatch):
    study(tmp_path / "in")
    monkeypatch.setattr(cohort, "find_studies", lambda *a, **k: pytest.fail("read"))
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        refused(run("synth", "-i", tmp_path / "in", "-o", folder, "--model", brain_model), str(folder))


def test_a_heart_is_not_written_over_itself(tmp_path, heart_model):
    stack = slices(16, 8)
    stack[..., 3] = 0
    path = save(tmp_path / "sax_stack.nii.gz", stack, SHORT_AXIS)
    before = path.read_bytes()
    refused(run("synth", "-i", path, "-o", tmp_path, "--model", heart_model, "--overwrite"), "would replace an input")
    assert path.read_bytes() == before


def test_damaged_model(tmp_path, brain_model):
    model = tmp_path / "model"
    model.mkdir()
    for file in brain_model.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    (model / checkpoint.DENOISER).write_bytes(pickle.dumps({"a": 1}))
    study(tmp_path / "in")
    command = ["synth", "-i", tmp_path / "in", "-o", tmp_path / "out", "--model", model]
    refused(run(*command), checkpoint.DENOISER, "pickle")
    assert not (tmp_path / "out").exists()


def test_the_model_is_chosen_by_task_and_modalities(tmp_path, brain_model, heart_model, monkeypatch):
    ixi = tmp_path / "ixi"
    ixi.mkdir()
    config = replace(checkpoint.read_config(brain_model), name="ixi", elements=("t1", "t2", "pd"))
    checkpoint.write_config(ixi, config)
    known = {"ixi": ixi, "tiny-brain": brain_model, "tiny-heart": heart_model}
    monkeypatch.setattr(checkpoint, "list_models", lambda: sorted(known))
    monkeypatch.setattr(checkpoint, "locate", lambda name: known[str(name)])
    models = Models(None, "cpu")
    assert models.choose("brain", {"t1": 0, "flair": 0})[0] == "tiny-brain"
    assert models.choose("brain", {"t1": 0, "pd": 0})[0] == "ixi"
    assert models.choose("cardiac", {"sax": 0})[0] == "tiny-heart"
    monkeypatch.setattr(checkpoint, "list_models", lambda: [])
    with pytest.raises(CopeditError, match="no model for brain"):
        models.choose("brain", {"t1": 0})


@pytest.mark.parametrize("task", ["brain", "cardiac"])
def test_of_a_complete_study_that_is_said_before_a_network_is_loaded(tmp_path, monkeypatch, request, task):
    monkeypatch.setattr(Models, "load", lambda *_: pytest.fail("a network was loaded"))
    if task == "brain":
        study(tmp_path / "in", elements=("t1", "t1ce", "t2", "flair"))
    else:
        save(tmp_path / "in" / "patient001_frame01.nii.gz", slices(16, 6), SHORT_AXIS)
    model = request.getfixturevalue("brain_model" if task == "brain" else "heart_model")
    result = run("synth", "-i", tmp_path / "in", "-o", tmp_path / "out", "--model", model)
    assert result.exit_code == 1 and "no element is missing" in result.stderr
    assert not (tmp_path / "out").exists()
