"""The command line end to end, with tiny models whose weights are random."""

import json
import os
import subprocess
import sys
from functools import partial
from importlib.metadata import EntryPoint
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import typer
from commands import (
    AFFINE,
    GRID,
    SHORT_AXIS,
    files,
    filled,
    image,
    other_grid,
    refused,
    run,
    save,
    slices,
    study,
    truncated,
    twice,
)  # fmt: skip
from processors import Faulty, Sound

from copedit_rt import checkpoint, cli, terminal
from copedit_rt.images.nifti import read_volume
from copedit_rt.synthesizer import Synthesizer


def test_one_study(tmp_path, brain_model):
    study(tmp_path / "in")
    result = run("synth", "-i", tmp_path / "in", "-o", tmp_path / "out", "--model", brain_model, "--preview")
    assert result.exit_code == 0
    assert files(tmp_path / "out") == {"case_t1ce.nii.gz", "case_t1ce.json", "case_preview.png"}
    assert str(tmp_path / "out" / "case_t1ce.nii.gz") in result.stdout
    made = nib.load(tmp_path / "out" / "case_t1ce.nii.gz")
    assert made.shape == GRID and np.array_equal(made.affine, AFFINE)
    sidecar = json.loads((tmp_path / "out" / "case_t1ce.json").read_text())
    assert sidecar["element"] == "t1ce"
    assert sidecar["sampler"] == {"method": "ddim", "steps": 2, "seed": 0, "samples": 1}
    assert set(sidecar["inputs"]) == {"t1", "t2", "flair"} and len(sidecar["inputs"]["t1"]["sha256"]) == 64


def test_json_is_all_there_is_on_stdout(tmp_path, brain_model):
    study(tmp_path / "in")
    save(tmp_path / "in" / "case_seg.nii.gz", image())
    result = run("synth", tmp_path / "in", "-o", tmp_path / "out", "--model", brain_model, "--json", "--seed", 3)
    summary = json.loads(result.stdout)
    (entry,) = summary["studies"]
    assert summary["written"] == 1 and entry["status"] == "written"
    assert Path(entry["outputs"]["t1ce"]).is_file() and Path(entry["sidecars"]["t1ce"]).is_file()
    assert entry["record"]["sampler"]["seed"] == 3
    assert sum(entry["perception"]["count"].values()) == pytest.approx(1)
    assert any("case_seg" in path for paths in summary["passed_over"].values() for path in paths)


def test_files_by_option_and_target_and_samples(tmp_path, brain_model):
    one, two = save(tmp_path / "x.nii.gz", image(1)), save(tmp_path / "y.nii", image(2))
    options = ["--t1", one, "--t2", two, "--target", "FLAIR", "--samples", 3, "-o", tmp_path / "out"]
    assert run("synth", *options, "--model", brain_model).exit_code == 0
    written = files(tmp_path / "out")
    assert len(written) == 3 and {p.partition("flair")[2] for p in written} == {".nii.gz", ".json", "_sd.nii.gz"}
    spread = next((tmp_path / "out").glob("*_sd.nii.gz"))
    assert read_volume(spread).data.min() >= 0
    options = ["--file", f"T1w={one}", "--file", f"t2={two}", "--model", brain_model]  # in any spelling
    assert run("synth", *options, "--target", "flair", "-o", tmp_path / "again").exit_code == 0
    assert files(tmp_path / "again") == {p for p in written if "_sd" not in p}
    refused(run("synth", "--file", f"swi={one}", "-o", tmp_path / "no"), "swi", "t1ce")
    refused(run("inspect", "--file", f"t1={one}", "--file", f"t1={two}"), "t1 was given already")
    refused(run("synth", "--t1", one, "-o", tmp_path / "x.nii.gz"), "x.nii.gz", "-o takes a folder")


def test_quiet_and_verbose(tmp_path, brain_model):
    study(tmp_path / "in" / "a", "a")
    study(tmp_path / "in" / "b", "b")
    save(tmp_path / "in" / "a" / "a_seg.nii.gz", image())
    (tmp_path / "in" / "b" / "b_t2.nii.gz").write_bytes(b"")
    command = ["synth", tmp_path / "in", "--model", brain_model]
    quiet = run(*command, "-o", tmp_path / "one", "-q")
    assert quiet.exit_code == 1 and quiet.stdout == "" and quiet.stderr.startswith("copedit: ")
    assert quiet.stderr.count("\n") == 1 and "b_t2.nii.gz is an empty file" in quiet.stderr
    told = run(*command, "-o", tmp_path / "two", "-v").stderr
    assert "a: tiny-brain by torch on cpu in float32; 2 steps of ddim, 1 samples, seed 0; missing t1ce" in told
    assert "a: kept, " in run(*command, "-o", tmp_path / "two", "--verbose").stderr
    assert run("inspect", tmp_path / "in" / "b", "--model", brain_model, "-q").exit_code in (1, 3)


@pytest.mark.parametrize(("own", "used"), [({}, "1"), ({"THP_MEM_ALLOC_ENABLE": "0"}, "0")])
def test_the_command_asks_torch_for_huge_pages_where_nothing_else_is_said(monkeypatch, own, used):
    monkeypatch.setattr(os, "environ", own)
    monkeypatch.setattr(cli, "app", lambda: None)
    monkeypatch.setattr(cli.gc, "set_threshold", lambda *_: None)
    cli.main()
    assert own == {"THP_MEM_ALLOC_ENABLE": used}


def test_completion_for_a_shell(monkeypatch):
    """Of the shell that the command is started from; a test may be started from none."""
    monkeypatch.setattr("shellingham.detect_shell", lambda *of: ("bash", "/bin/bash"))
    shown = run("--show-completion")
    assert shown.exit_code == 0 and "complete" in shown.stdout.lower()


def test_heart(tmp_path, heart_model):
    stack = slices(20, 12)
    stack[..., 4] = 0
    path = save(tmp_path / "patient001_frame01.nii.gz", stack, SHORT_AXIS)
    options = ["-o", tmp_path / "out", "--model", heart_model, "--missing-slices", "5-6", "--preview"]
    result = run("synth", "-i", path, *options)
    assert result.exit_code == 0, result.stderr
    made = read_volume(tmp_path / "out" / path.name).data
    there = [z for z in range(12) if z not in (4, 5, 6)]
    assert np.array_equal(made[..., there], stack[..., there].astype(np.float32))
    assert (tmp_path / "out" / "patient001_frame01_preview.png").is_file()


def test_same_seed_same_bytes(tmp_path, brain_model):
    study(tmp_path / "in")
    made = []
    for name in ("one", "two"):
        run("synth", "-i", tmp_path / "in", "-o", tmp_path / name, "--model", brain_model)
        made.append((tmp_path / name / "case_t1ce.nii.gz").read_bytes())
    assert made[0] == made[1]


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (truncated, ["case_t2.nii.gz", "gzip"]),
        (filled(np.nan), ["case_t2.nii.gz", "NaN"]),
        (twice, ["two files for t2"]),
        (other_grid, ["--resample", "24 x 22 x 12", "24 x 22 x 10"]),
        (partial(study, elements=("t1", "t1ce", "t2", "flair")), ["case", "missing"]),
        (partial(study, elements=("t1", "pd")), ["pd", "tiny-brain"]),
        (Path.mkdir, ["no images found"]),
    ],
)
def test_bad_input_is_refused_in_one_sentence(tmp_path, brain_model, build, words):
    build(tmp_path / "in")
    result = run("synth", "-i", tmp_path / "in", "-o", tmp_path / "out", "--model", brain_model)
    refused(result, *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["synth", "inspect"])
def test_task_and_select(tmp_path, brain_model, heart_model, command):
    stack = slices(16, 8)
    stack[..., 3] = 0
    save(tmp_path / "in" / "scan7.nii.gz", stack, SHORT_AXIS)  # nothing says that it is a heart
    save(tmp_path / "in" / "brain" / "sub-1_T1w.nii.gz", image(0))
    for number in (1, 2):
        save(tmp_path / "in" / "brain" / f"sub-1_run-0{number}_FLAIR.nii.gz", image(number))
    start = [command, tmp_path / "in", "--json", *(["-o", tmp_path / "out"] if command == "synth" else []), "--model"]
    (heart,) = json.loads(run(*start, heart_model, "--task", "Cardiac").stdout)["studies"]
    blank = heart["missing_slices"] if command == "inspect" else heart["record"]["missing_slices"]
    assert (heart["study"], heart["task"], blank) == ("scan7", "cardiac", [3])
    (brain,) = json.loads(run(*start, brain_model, "--task", "brain", "--select", "run-02").stdout)["studies"]
    given = brain["files"] if command == "inspect" else {k: v["file"] for k, v in brain["record"]["inputs"].items()}
    assert given["flair"] == "sub-1_run-02_FLAIR.nii.gz" and given["t1"] == "sub-1_T1w.nii.gz"
    refused(run(*start, brain_model, "--task", "brain", "--select", "run-01,run-3"), "--select run-3", "run-02")
    refused(run(*start, brain_model, "--task", "knee"), "--task knee: expected brain or cardiac")


def test_detail(tmp_path, brain_model):
    study(tmp_path / "in")
    made = {}
    for detail in ("guided", "none", None):
        options = ["--detail", detail] if detail else []
        folder = tmp_path / f"out-{detail}"
        assert run("synth", tmp_path / "in", "-o", folder, "--model", brain_model, *options).exit_code == 0
        made[detail] = read_volume(folder / "case_t1ce.nii.gz").data
        assert json.loads((folder / "case_t1ce.json").read_text())["output"]["detail"] == (detail == "guided")
    assert np.array_equal(made["none"], made[None]) and not np.allclose(made["guided"], made["none"])
    refused(run("synth", tmp_path / "in", "-o", tmp_path / "x", "--detail", "yes"), "--detail yes", "guided or none")


def test_resample_takes_other_grids(tmp_path, brain_model):
    other_grid(tmp_path / "in")
    command = ["synth", "-i", tmp_path / "in", "-o", tmp_path / "out", "--model", brain_model]
    assert run(*command, "--resample").exit_code == 0
    assert nib.load(tmp_path / "out" / "case_t1ce.nii.gz").shape == GRID


def test_every_slice_of_a_heart_missing(tmp_path, heart_model):
    path = save(tmp_path / "sax_stack.nii.gz", np.zeros((16, 16, 8)), SHORT_AXIS)
    refused(run("synth", "-i", path, "-o", tmp_path / "out", "--model", heart_model), "sax_stack.nii.gz")
    path = save(tmp_path / "sax_stack.nii.gz", slices(16, 8), SHORT_AXIS)
    options = ["-o", tmp_path / "out", "--model", heart_model, "--missing-slices"]
    refused(run("synth", "-i", path, *options, "8"), "no slice 8")
    refused(run("synth", "-i", path, *options, "two"), "--missing-slices")
    refused(run("synth", "-i", path, *options[:-1], "--target", "t1"), "--missing-slices")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--target", "swi"], ["swi"]),
        (["--target", "pd"], ["pd", "tiny-brain"]),
        (["--target", "t1ce,t1"], ["--target t1", "case"]),
        (["--device", "tpu"], ["tpu"]),
        (["--device", "cuda:99"], ["cuda:99"]),
        (["--model", "no-such-model"], ["no-such-model"]),
        (["--missing-slices", "1"], ["cardiac"]),
        (["--missing-slices", "²"], ["--missing-slices ²", "whole numbers"]),
        (["--missing-slices", "5-3"], ["--missing-slices 5-3"]),
        (["--missing-slices", "0-999999999"], ["--missing-slices 0-999999999"]),
        (["--file", "t1"], ["--file t1", "MODALITY=PATH"]),
        (["--file", "t1=a.nii", "--t1", "b.nii"], ["--file t1=a.nii", "b.nii"]),
        (["--steps", "100000"], ["100000"]),
    ],
)
def test_bad_options(tmp_path, brain_model, options, words):
    study(tmp_path / "in")
    result = run("synth", "-i", tmp_path / "in", "-o", tmp_path / "out", "--model", brain_model, *options)
    refused(result, *words)
    assert not (tmp_path / "out").exists()


def test_wrong_task(tmp_path, heart_model):
    study(tmp_path / "in")
    refused(run("synth", "-i", tmp_path / "in", "-o", tmp_path / "out", "--model", heart_model), "brain", "tiny-heart")


@pytest.mark.parametrize(
    ("text", "size"), [("2GB", 2**31), ("1.5g", 3 * 2**29), ("500MB", 500 * 2**20), ("8KiB", 8192)]
)
def test_max_memory_reaches_the_model(tmp_path, brain_model, monkeypatch, text, size):
    seen, load = [], Synthesizer.load
    monkeypatch.setattr(Synthesizer, "load", lambda *given, **more: seen.append(more) or load(*given, **more))
    study(tmp_path / "in")
    result = run("synth", "-i", tmp_path / "in", "-o", tmp_path / "out", "--model", brain_model, "--max-memory", text)
    assert [more["max_memory"] for more in seen] == [size]
    if size > 2**20:
        assert result.exit_code == 0, result.stderr
    else:
        refused(result, "max_memory of 0.0 MiB")


@pytest.mark.parametrize("text", ["2", "GB", "-1GB", "2TB", "²GB", f"{'9' * 400}G"])
def test_max_memory_that_is_no_amount(tmp_path, brain_model, text):
    study(tmp_path / "in")
    command = ["synth", "-i", tmp_path / "in", "-o", tmp_path / "out", "--model", brain_model, f"--max-memory={text}"]
    refused(run(*command), "--max-memory", "2GB or 500MB")


def test_the_solver_is_recorded(tmp_path, brain_model):
    study(tmp_path / "in")
    command = ["synth", "-i", tmp_path / "in", "--model", brain_model, "--steps", "3"]
    assert run(*command, "-o", tmp_path / "out", "--solver", "dpm2m").exit_code == 0
    sidecar = json.loads((tmp_path / "out" / "case_t1ce.json").read_text())
    assert "dpm2m" in json.dumps(sidecar)
    refused(run(*command, "-o", tmp_path / "no", "--solver", "euler"), "euler", "ddim, dpm2m")


@pytest.mark.parametrize(
    "arguments", [["synth"], ["synth", "-o", "x", "--samples", "0"], ["synth", "-o", "x", "--nonsense"], ["train", "x"]]
)
def test_wrong_usage_is_exit_code_2(arguments):
    assert run(*arguments).exit_code == 2


def test_doctor(monkeypatch):
    result = run("doctor", "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 0 and report["packages"]["numpy"] == np.__version__
    assert report["devices"][0]["device"] == "cpu" and "reference on the CPU" in report["kernels"]["in_use"]
    for extra in ("train", "export", "tensorrt", "bench"):
        state = report["extras"][extra]
        assert bool(state["missing"]) == (state["install"] is not None)
    assert "copedit" in run("doctor").stdout


@pytest.mark.parametrize("processor", [Sound, Faulty])
def test_doctor_compares_bfloat16_with_float32(processor):
    with processor():
        report = json.loads(run("doctor", "--json").stdout)
        shown = run("doctor").stdout
    found, sound = report["bfloat16"], processor is Sound
    assert found["right"] == sound and (found["errors"]["product 128x128"] < 2**-8)
    wrong = [name for name, error in found["errors"].items() if error is None or error > 2**-8]
    said = [x for x in report["problems"] if "--dtype float32" in x and "ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16" in x]
    assert len(said) == (not sound) and all(name in said[0] for name in wrong)
    assert len(wrong) == (0 if sound else 10), "five with one result along an axis, in both layouts"
    assert ("right here" in shown) == sound and ("wrong here" in shown) != sound


def test_doctor_never_fails(monkeypatch):
    monkeypatch.setenv("COPEDIT_KERNELS", "nonsense")
    monkeypatch.setattr(checkpoint, "list_models", lambda: [])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1 / 0)
    result = run("doctor", "--json")
    assert result.exit_code == 0
    problems = " ".join(json.loads(result.stdout)["problems"])
    assert "no built-in model" in problems and "devices" in problems


def test_as_a_process(tmp_path):
    """Help and errors as a shell sees them."""

    def process(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "copedit_rt", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(cli.__file__).parents[1])

    for flag in ("-h", "--help"):
        shown = process(flag)
        assert shown.returncode == 0
        assert all(word in shown.stdout for word in ("demo", "synth", "inspect", "train", "evaluate", "doctor"))
        assert not any(
            f"--{name}" in line and "<bool>" in line
            for line in shown.stdout.splitlines()
            for name in ("version", "debug")
        )
    failed = process("synth", "-i", str(tmp_path / "nowhere"), "-o", str(tmp_path / "out"))
    assert failed.returncode == 1 and failed.stdout == ""
    assert failed.stderr.startswith("copedit: ") and failed.stderr.count("\n") == 1
    traced = process("--debug", "synth", "-i", str(tmp_path / "nowhere"), "-o", str(tmp_path / "out"))
    assert traced.returncode == 1 and "Traceback" in traced.stderr and traced.stderr.endswith(failed.stderr)


def test_other_packages_add_their_commands(monkeypatch):
    """By the entry points of an installation, or by their place beside this one."""
    points = [EntryPoint(name, f"copedit_{name}.cli:app", cli.COMMANDS) for name in ("bench", "training")]
    found = {}
    for there in (points, []):
        monkeypatch.setattr(cli, "entry_points", lambda group, there=there: there)
        found[bool(there)] = list(cli._further())
    assert found[True] == found[False] and len(found[True]) == 2
    monkeypatch.setattr(sys, "path", [])
    assert list(cli._further()) == []


def walk(command, path=()):
    yield path
    for name, inner in getattr(command, "commands", {}).items():
        yield from walk(inner, (*path, name))


def test_an_option_is_no_command():
    assert run("--debug").exit_code == 2


def test_a_path_is_shown_as_it_is(tmp_path):
    refused(run("inspect", tmp_path / "a:x:b"), "a:x:b does not exist")


def test_without_a_stdout(monkeypatch):
    """As `>&-` has it."""
    monkeypatch.setattr(sys, "stdout", None)
    with terminal.progress() as bar:
        bar.add_task("")


@pytest.mark.parametrize("path", walk(typer.main.get_command(cli.app)), ids=" ".join)
def test_help_is_for_people(path):
    """No type of Python's stands in it, and no line ends early."""
    text = run(*path, "-h").stdout
    options = text[text.index("Options") :]
    assert "--help" in options and "<" not in options.replace("<=", ""), options
    assert "[[" not in text


def test_paragraphs_of_help_wrap():
    lines = [line.strip() for line in run("synth", "-h").stdout.splitlines()]
    start = next(i for i, line in enumerate(lines) if line.startswith("Outputs are named"))
    paragraph = lines[start : lines.index("", start)]
    assert len(paragraph) > 1 and min(map(len, paragraph[:-1])) > 60
