"""The command line end to end, with a tiny model whose weights are random."""

import gzip
import json
import os
import pickle
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from processors import Faulty, Sound
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from copedit_rt import checkpoint, cli
from copedit_rt.config import ModelConfig
from copedit_rt.images.nifti import Volume, read_volume
from copedit_rt.images.study import Study
from copedit_rt.networks.denoiser import build_denoiser
from copedit_rt.networks.tokenizer import CoPeVAE
from copedit_rt.synthesizer import Synthesizer

AFFINE = np.diag([-2.0, 2.0, 5.0, 1.0])
AFFINE[:3, 3] = [24, -24, -25]
GRID = (24, 22, 10)
SHORT_AXIS = np.diag([3.0, 3.0, 8.0, 1.0])


def tiny(preset: str, image: tuple[int, int, int], folder: Path) -> Path:
    config = ModelConfig.preset(preset)
    config = replace(
        config,
        image=image,
        tokenizer=replace(
            config.tokenizer,
            channels=(4, 8),
            strides=((2, 2, 2), (2, 2, 2)),
            residual_units=1,
            residual_channels=4,
            codes=16,
            prompt_channels=(4, 8),
            prompt_dim=16,
            contrast_dim=8,
        ),
        denoiser=replace(config.denoiser, width=32, heads=2, blocks=2, patch=(1, 1, 1)),
        diffusion=replace(config.diffusion, steps=2),
    )
    torch.manual_seed(0)
    tokenizer, denoiser = CoPeVAE(config.tokenizer, len(config.elements)), build_denoiser(config)
    for weight in denoiser.parameters():  # untrained output layers are zero
        torch.nn.init.normal_(weight, std=0.05)
    checkpoint.save(folder / preset, config, tokenizer, denoiser)
    return folder / preset


@pytest.fixture(scope="session")
def brain(tmp_path_factory):
    return tiny("demo-brain", (16, 16, 8), tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def heart(tmp_path_factory):
    return tiny("demo-cardiac", (16, 16, 4), tmp_path_factory.mktemp("models"))


def image(seed: int = 0, grid: tuple[int, ...] = GRID) -> np.ndarray:
    """An ellipsoid of noise on a background of 0."""
    data = np.random.default_rng(seed).uniform(100, 900, grid)
    inside = sum(((np.arange(n) - n / 2) / (0.45 * n)).reshape([-1 if a == b else 1 for b in range(3)]) ** 2
                 for a, n in enumerate(grid)) < 1  # fmt: skip
    return np.where(inside, data, 0)


def slices(width: int, count: int) -> np.ndarray:
    """A stack without blank slices."""
    return np.random.default_rng(0).uniform(100, 900, (width, width, count))


def save(path: Path, data: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Volume.from_array(data, affine).save(path)
    return path


def study(folder: Path, name: str = "case", elements: tuple[str, ...] = ("t1", "t2", "flair")) -> Path:
    for seed, element in enumerate(elements):
        save(folder / f"{name}_{element}.nii.gz", image(seed))
    return folder


def run(*arguments: object):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments], catch_exceptions=False)


def refused(result, *words: str) -> str:
    """The one sentence of a refusal, after it was checked to be that."""
    assert result.exit_code == 1, result.output
    lines = [line for line in result.stderr.splitlines() if not line.startswith("passed over")]
    assert len(lines) == 1 and lines[0].startswith("copedit: "), result.stderr
    assert result.stdout == ""
    for word in words:
        assert word in lines[0], lines[0]
    return lines[0]


def files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


# ---- what goes right ---------------------------------------------------------------------------------------


def test_one_study(tmp_path, brain):
    study(tmp_path / "in")
    result = run("synth", "-i", tmp_path / "in", "-o", tmp_path / "out", "--model", brain, "--preview")
    assert result.exit_code == 0
    assert files(tmp_path / "out") == {"case_t1ce.nii.gz", "case_t1ce.json", "case_preview.png"}
    assert str(tmp_path / "out" / "case_t1ce.nii.gz") in result.stdout
    made = nib.load(tmp_path / "out" / "case_t1ce.nii.gz")
    assert made.shape == GRID and np.array_equal(made.affine, AFFINE)
    sidecar = json.loads((tmp_path / "out" / "case_t1ce.json").read_text())
    assert sidecar["element"] == "t1ce" and sidecar["sampler"] == {
        "method": "ddim",
        "steps": 2,
        "seed": 0,
        "samples": 1,
    }
    assert set(sidecar["inputs"]) == {"t1", "t2", "flair"} and len(sidecar["inputs"]["t1"]["sha256"]) == 64


def test_json_is_all_there_is_on_stdout(tmp_path, brain):
    study(tmp_path / "in")
    save(tmp_path / "in" / "case_seg.nii.gz", image())
    result = run("synth", tmp_path / "in", "-o", tmp_path / "out", "--model", brain, "--json", "--seed", 3)
    summary = json.loads(result.stdout)
    (entry,) = summary["studies"]
    assert summary["written"] == 1 and entry["status"] == "written"
    assert Path(entry["outputs"]["t1ce"]).is_file() and Path(entry["sidecars"]["t1ce"]).is_file()
    assert entry["record"]["sampler"]["seed"] == 3
    assert sum(entry["perception"]["count"].values()) == pytest.approx(1)
    assert any("case_seg" in path for paths in summary["passed_over"].values() for path in paths)


def test_files_by_option_and_target_and_samples(tmp_path, brain):
    one, two = save(tmp_path / "x.nii.gz", image(1)), save(tmp_path / "y.nii", image(2))
    options = ["--t1", one, "--t2", two, "--target", "FLAIR", "--samples", 3, "-o", tmp_path / "out"]
    assert run("synth", *options, "--model", brain).exit_code == 0
    written = files(tmp_path / "out")
    assert len(written) == 3 and {p.partition("flair")[2] for p in written} == {
        ".nii.gz",
        ".json",
        "_sd.nii.gz",
    }
    spread = next((tmp_path / "out").glob("*_sd.nii.gz"))
    assert read_volume(spread).data.min() >= 0


def test_existing_outputs_are_kept_unless_overwritten(tmp_path, brain):
    study(tmp_path / "in", elements=("t1", "t2"))
    command = ["synth", "-i", tmp_path / "in", "-o", tmp_path / "out", "--model", brain]
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


def test_kept_outputs_need_no_weights(tmp_path, brain, monkeypatch):
    study(tmp_path / "in")
    command = ["synth", "-i", tmp_path / "in", "-o", tmp_path / "out", "--model", brain]
    run(*command)
    monkeypatch.setattr(Synthesizer, "load", lambda *a, **k: pytest.fail("loaded"))
    assert run(*command).exit_code == 0


def test_outputs_may_go_beside_the_inputs(tmp_path, brain):
    folder = study(tmp_path / "cohort" / "case").parent
    before = {p: p.read_bytes() for p in folder.rglob("*.nii.gz")}
    for overwrite in ([], ["--overwrite"]):  # its own outputs are not taken for inputs
        result = run("synth", "-i", folder, "-o", folder, "--model", brain, *overwrite)
        assert result.exit_code == 0 and "case_t1ce.nii.gz" in result.stdout
    assert all(p.read_bytes() == content for p, content in before.items())
    assert "case/case_t1ce.nii.gz" in files(folder)


def test_a_cohort_goes_on_after_a_failure(tmp_path, brain):
    for name in ("a", "b", "c", "d"):
        study(tmp_path / "in" / name, name)
    broken = tmp_path / "in" / "b" / "b_t2.nii.gz"
    broken.write_bytes(broken.read_bytes()[:200])
    save(tmp_path / "in" / "d" / "d_t1ce.nii.gz", image(9))
    command = ["synth", "-i", tmp_path / "in", "-o", tmp_path / "out", "--model", brain]
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


def test_the_next_study_is_read_while_one_is_computed(tmp_path, brain, monkeypatch):
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
    result = run("synth", "-i", tmp_path / "in", "-o", tmp_path / "out", "--model", brain)
    assert result.exit_code == 0, result.stderr
    assert files(tmp_path / "out") == {f"{n}/{n}_t1ce{end}" for n in "abcd" for end in (".nii.gz", ".json")}


def test_two_processes_share_a_cohort(tmp_path, brain):
    """Every study is written once, by one of them; one that is broken fails where it belongs and stops nobody."""
    names = "abcde"
    for name in names:
        study(tmp_path / "in" / name, name)
    broken = tmp_path / "in" / "b" / "b_t2.nii.gz"
    broken.write_bytes(broken.read_bytes()[:200])
    command = [sys.executable, "-m", "copedit_rt.cli", "synth", "-i", str(tmp_path / "in"), "-o", str(tmp_path / "out")]
    command += ["--model", str(brain), "--json"]
    environment = {k: v for k, v in os.environ.items() if k != "TORCHELASTIC_RUN_ID"}
    both = [
        subprocess.Popen(
            command,
            env=environment | {"RANK": str(rank), "WORLD_SIZE": "2"},
            cwd=Path(cli.__file__).parents[1],
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
def test_torchrun_does_not_stop_the_others_for_a_study_that_failed(tmp_path, brain):
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
            *("-m", "copedit_rt.cli", "synth", "-i", str(tmp_path / "in"), "-o", str(tmp_path / "out")),
            *("--model", str(brain), "--device", "cpu"),
        ],
        cwd=Path(cli.__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode != 0 and "b_t2" in done.stderr
    assert files(tmp_path / "out") == {f"{n}/{n}_t1ce{end}" for n in "aceg" for end in (".nii.gz", ".json")}


@pytest.mark.parametrize(("rank", "world"), [("2", "2"), ("x", "2"), ("0", "")])
def test_a_place_among_processes_that_does_not_exist(tmp_path, brain, monkeypatch, rank, world):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    study(tmp_path / "in")
    result = run("synth", "-i", tmp_path / "in", "-o", tmp_path / "out", "--model", brain)
    refused(result, f"RANK={rank}, WORLD_SIZE={world}")


def test_an_interrupted_cohort_can_be_repeated(tmp_path, brain, monkeypatch):
    for name in ("a", "b"):
        study(tmp_path / "in" / name, name)
    command = ["synth", "-i", tmp_path / "in", "-o", tmp_path / "out", "--model", brain]
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


def test_a_model_that_cannot_be_used_stops_a_cohort(tmp_path, brain):
    for name in ("a", "b"):
        study(tmp_path / "in" / name, name)
    command = ["synth", "-i", tmp_path / "in", "-o", tmp_path / "out"]
    refused(run(*command, "--model", "nowhere"), "nowhere")
    refused(run(*command, "--model", brain, "--device", "tpu"), "tpu")
    refused(run(*command, "--model", brain, "--target", "pd"), "pd")


def test_a_cohort_in_which_nothing_is_missing(tmp_path, brain, heart):
    for name in ("a", "b"):
        study(tmp_path / "brains" / name, name, ("t1", "t1ce", "t2", "flair"))
        save(tmp_path / "hearts" / f"{name}.nii.gz", slices(16, 8), SHORT_AXIS)
    for folder, model in (("brains", brain), ("hearts", heart)):
        result = run("synth", "-i", tmp_path / folder, "-o", tmp_path / "out", "--model", model)
        assert result.exit_code == 1 and "nothing is missing in any" in result.stderr
    assert not (tmp_path / "out").exists()


def test_heart(tmp_path, heart):
    stack = slices(20, 12)
    stack[..., 4] = 0
    path = save(tmp_path / "patient001_frame01.nii.gz", stack, SHORT_AXIS)
    options = ["-o", tmp_path / "out", "--model", heart, "--missing-slices", "5-6", "--preview"]
    result = run("synth", "-i", path, *options)
    assert result.exit_code == 0, result.stderr
    made = read_volume(tmp_path / "out" / path.name).data
    there = [z for z in range(12) if z not in (4, 5, 6)]
    assert np.array_equal(made[..., there], stack[..., there].astype(np.float32))
    assert (tmp_path / "out" / "patient001_frame01_preview.png").is_file()


def test_same_seed_same_bytes(tmp_path, brain):
    study(tmp_path / "in")
    made = []
    for name in ("one", "two"):
        run("synth", "-i", tmp_path / "in", "-o", tmp_path / name, "--model", brain)
        made.append((tmp_path / name / "case_t1ce.nii.gz").read_bytes())
    assert made[0] == made[1]


# ---- bad input: one sentence each, nothing written ---------------------------------------------------------


def truncated(folder: Path) -> None:
    path = study(folder) / "case_t2.nii.gz"
    path.write_bytes(path.read_bytes()[:1000])


def not_nifti(folder: Path) -> None:
    (study(folder) / "case_t2.nii.gz").write_bytes(gzip.compress(b"no image at all" * 100))


def empty(folder: Path) -> None:
    (study(folder) / "case_t2.nii.gz").write_bytes(b"")


def shaped(*shape: int):
    def build(folder: Path) -> None:
        nib.save(nib.Nifti1Image(np.ones(shape, np.float32), AFFINE), study(folder) / "case_t2.nii.gz")

    return build


def filled(value: float, where: slice | int = 3):
    def build(folder: Path) -> None:
        data = image(5)
        data[where] = value
        save(study(folder) / "case_t2.nii.gz", data)

    return build


def zero_affine(folder: Path) -> None:
    header = nib.Nifti1Header()
    header.set_data_shape(GRID)
    header.set_data_dtype(np.float32)
    header["sform_code"] = 1
    content = header.binaryblock + bytes(4) + image().astype(np.float32).tobytes(order="F")
    (study(folder) / "case_t2.nii.gz").write_bytes(gzip.compress(content))


def huge(folder: Path) -> None:
    header = nib.Nifti1Header()
    header.set_data_dtype(np.float32)
    header["dim"][:4] = 3, 30000, 30000, 30000
    header["pixdim"][1:4] = 1
    header["sform_code"] = 1
    header["srow_x"], header["srow_y"], header["srow_z"] = [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]
    (study(folder) / "case_t2.nii.gz").write_bytes(gzip.compress(header.binaryblock + bytes(4)))


def twice(folder: Path) -> None:
    save(study(folder) / "case_t2w.nii.gz", image(7))


def unknown_names(folder: Path) -> None:
    study(folder, elements=("swi", "adc"))


def other_grid(folder: Path) -> None:
    save(study(folder) / "case_t2.nii.gz", image(1, (24, 22, 12)))


def complete(folder: Path) -> None:
    study(folder, elements=("t1", "t1ce", "t2", "flair"))


def nothing(folder: Path) -> None:
    folder.mkdir()


def pd(folder: Path) -> None:
    study(folder, elements=("t1", "pd"))


BAD = {
    "truncated gzip": (truncated, "case_t2.nii.gz", "gzip"),
    "not NIfTI": (not_nifti, "case_t2.nii.gz", "NIfTI"),
    "empty": (empty, "case_t2.nii.gz", "empty"),
    "2-D": (shaped(24, 22), "case_t2.nii.gz", "2-D"),
    "4-D": (shaped(24, 22, 10, 3), "case_t2.nii.gz", "3 volumes"),
    "all zero": (filled(0, slice(None)), "case_t2.nii.gz", "every voxel"),
    "NaN": (filled(np.nan), "case_t2.nii.gz", "NaN"),
    "infinite": (filled(np.inf), "case_t2.nii.gz", "infinite"),
    "zero affine": (zero_affine, "case_t2.nii.gz", "affine"),
    "too large": (huge, "case_t2.nii.gz", "memory"),
    "two files for one modality": (twice, "two files for t2"),
    "unknown modality names": (unknown_names, "swi"),
    "different grids": (other_grid, "--resample", "24 x 22 x 12", "24 x 22 x 10"),
    "nothing missing": (complete, "case", "missing"),
    "everything missing": (nothing, "no images found"),
    "a modality that the model does not know": (pd, "pd", "demo-brain"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_one_sentence(tmp_path, brain, case):
    build, *words = BAD[case]
    build(tmp_path / "in")
    result = run("synth", "-i", tmp_path / "in", "-o", tmp_path / "out", "--model", brain)
    refused(result, *words)
    assert not (tmp_path / "out").exists()


def test_resample_takes_other_grids(tmp_path, brain):
    other_grid(tmp_path / "in")
    command = ["synth", "-i", tmp_path / "in", "-o", tmp_path / "out", "--model", brain]
    assert run(*command, "--resample").exit_code == 0
    assert nib.load(tmp_path / "out" / "case_t1ce.nii.gz").shape == GRID


def test_every_slice_of_a_heart_missing(tmp_path, heart):
    path = save(tmp_path / "stack.nii.gz", np.zeros((16, 16, 8)), SHORT_AXIS)
    refused(run("synth", "-i", path, "-o", tmp_path / "out", "--model", heart), "stack.nii.gz")
    path = save(tmp_path / "stack.nii.gz", slices(16, 8), SHORT_AXIS)
    options = ["-o", tmp_path / "out", "--model", heart, "--missing-slices"]
    refused(run("synth", "-i", path, *options, "8"), "no slice 8")
    refused(run("synth", "-i", path, *options, "two"), "--missing-slices")
    refused(run("synth", "-i", path, *options[:-1], "--target", "t1"), "--missing-slices")
    assert not (tmp_path / "out").exists()


def test_unwritable_output_is_told_before_anything_is_read(tmp_path, brain, monkeypatch):
    study(tmp_path / "in")
    monkeypatch.setattr(cli, "_find", lambda *a: pytest.fail("read"))
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        refused(run("synth", "-i", tmp_path / "in", "-o", folder, "--model", brain), str(folder))


def test_a_heart_is_not_written_over_itself(tmp_path, heart):
    stack = slices(16, 8)
    stack[..., 3] = 0
    path = save(tmp_path / "stack.nii.gz", stack, SHORT_AXIS)
    before = path.read_bytes()
    refused(run("synth", "-i", path, "-o", tmp_path, "--model", heart, "--overwrite"), "would replace an input")
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--target", "swi"], ["swi"]),
        (["--target", "pd"], ["pd", "demo-brain"]),
        (["--target", "t1ce,t1"], ["--target t1", "case"]),
        (["--device", "tpu"], ["tpu"]),
        (["--device", "cuda:99"], ["cuda:99"]),
        (["--model", "no-such-model"], ["no-such-model"]),
        (["--missing-slices", "1"], ["cardiac"]),
        (["--steps", "100000"], ["100000"]),
    ],
)
def test_bad_options(tmp_path, brain, options, words):
    study(tmp_path / "in")
    result = run("synth", "-i", tmp_path / "in", "-o", tmp_path / "out", "--model", brain, *options)
    refused(result, *words)
    assert not (tmp_path / "out").exists()


def test_wrong_task(tmp_path, heart):
    study(tmp_path / "in")
    refused(run("synth", "-i", tmp_path / "in", "-o", tmp_path / "out", "--model", heart), "brain", "demo-cardiac")


def drop_tensor(path: Path) -> None:
    tensors = load_file(path)
    del tensors[sorted(tensors)[0]]
    save_file(tensors, path)


def reshape_tensor(path: Path) -> None:
    tensors = load_file(path)
    tensors[sorted(tensors)[0]] = torch.zeros(7, 7)
    save_file(tensors, path)


def pickle_it(path: Path) -> None:
    path.write_bytes(pickle.dumps({"a": 1}))


@pytest.mark.parametrize("part", ["tokenizer.safetensors", "denoiser.safetensors"])
@pytest.mark.parametrize(
    ("damage", "word"), [(drop_tensor, "missing"), (reshape_tensor, "shape"), (pickle_it, "pickle")]
)
def test_damaged_model(tmp_path, brain, part, damage, word):
    model = tmp_path / "model"
    model.mkdir()
    for file in brain.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    damage(model / part)
    study(tmp_path / "in")
    refused(run("synth", "-i", tmp_path / "in", "-o", tmp_path / "out", "--model", model), part, word)
    assert not (tmp_path / "out").exists()


def test_running_out_of_memory_is_a_sentence(tmp_path, brain, monkeypatch):
    def greedy(*args, **options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    study(tmp_path / "in")
    monkeypatch.setattr(Synthesizer, "synthesize", greedy)
    refused(run("synth", "-i", tmp_path / "in", "-o", tmp_path / "out", "--model", brain), "memory ran out")


@pytest.mark.parametrize(
    ("text", "size"), [("2GB", 2**31), ("1.5g", 3 * 2**29), ("500MB", 500 * 2**20), ("8KiB", 8192)]
)
def test_max_memory_reaches_the_model(tmp_path, brain, monkeypatch, text, size):
    seen, load = [], Synthesizer.load
    monkeypatch.setattr(Synthesizer, "load", lambda *given, **more: seen.append(more) or load(*given, **more))
    study(tmp_path / "in")
    result = run("synth", "-i", tmp_path / "in", "-o", tmp_path / "out", "--model", brain, "--max-memory", text)
    assert [more["max_memory"] for more in seen] == [size]
    if size > 2**20:
        assert result.exit_code == 0, result.stderr
    else:
        refused(result, "max_memory of 0.0 MiB")


@pytest.mark.parametrize("text", ["2", "GB", "-1GB", "2TB"])
def test_max_memory_that_is_no_amount(tmp_path, brain, text):
    study(tmp_path / "in")
    command = ["synth", "-i", tmp_path / "in", "-o", tmp_path / "out", "--model", brain, f"--max-memory={text}"]
    refused(run(*command), "--max-memory", "2GB or 500MB")


def test_the_solver_is_recorded(tmp_path, brain):
    study(tmp_path / "in")
    command = ["synth", "-i", tmp_path / "in", "--model", brain, "--steps", "3"]
    assert run(*command, "-o", tmp_path / "out", "--solver", "dpm2m").exit_code == 0
    sidecar = json.loads((tmp_path / "out" / "case_t1ce.json").read_text())
    assert "dpm2m" in json.dumps(sidecar)
    refused(run(*command, "-o", tmp_path / "no", "--solver", "euler"), "euler", "ddim, dpm2m")


@pytest.mark.parametrize(
    "arguments",
    [
        ["synth"],
        ["synth", "-o", "x", "--samples", "0"],
        ["synth", "-o", "x", "--nonsense"],
        ["train", "decoder"],
    ],
)
def test_wrong_usage_is_exit_code_2(arguments):
    assert run(*arguments).exit_code == 2


# ---- inspect -----------------------------------------------------------------------------------------------


def test_inspect_a_consistent_study(tmp_path, brain, monkeypatch):
    study(tmp_path / "in")
    agreeing(monkeypatch)
    result = run("inspect", "-i", tmp_path / "in", "--model", brain)
    assert result.exit_code == 0 and "files and images agree" in result.stdout


def agreeing(monkeypatch, **looks: str) -> None:
    """Make the network perceive what the files say, but for `looks`."""
    from copedit_rt.perception import Perception

    real = Synthesizer.perceive

    def perceive(self, case):
        seen = real(self, case)
        names, given = seen.elements, seen.identity
        return Perception(
            [0.9 if c == len(names) - len(given) else 0.05 for c in range(1, len(names))],
            [0.1 if e in given else 0.9 for e in names],
            {e: [0.97 if looks.get(e, e) == other else 0.01 for other in names] for e in given},
            names,
        )

    monkeypatch.setattr(Synthesizer, "perceive", perceive)


def test_inspect_flags_a_misnamed_file(tmp_path, brain, monkeypatch):
    study(tmp_path / "in")
    agreeing(monkeypatch, flair="t2")
    result = run("inspect", "-i", tmp_path / "in", "--model", brain, "--json")
    (report,) = json.loads(result.stdout)["studies"]
    assert result.exit_code == cli.FLAGGED and not report["consistent"]
    (finding,) = report["findings"]
    assert finding["text"] == "case_flair.nii.gz is named flair but looks like t2 (0.97)"
    assert report["perceived"]["looks_like"]["flair"] == "t2"


def test_inspect_survives_what_synth_refuses(tmp_path, brain):
    """A constant volume, blank planes, NaN, a truncated file, two files for one modality, another grid."""
    study(tmp_path / "in" / "a", "a")
    save(tmp_path / "in" / "a" / "a_t2.nii.gz", np.full(GRID, 7.0))
    holes = image(3)
    holes[:, :, 4:6] = 0
    save(tmp_path / "in" / "a" / "a_flair.nii.gz", holes)
    filled(np.nan)(tmp_path / "in" / "b")
    truncated(tmp_path / "in" / "c")
    twice(tmp_path / "in" / "d")
    other_grid(tmp_path / "in" / "e")
    result = run("inspect", "-i", tmp_path / "in", "--model", brain, "--json")
    assert result.exit_code == cli.FLAGGED
    reports = json.loads(result.stdout)["studies"]
    kinds = [{f["kind"] for f in report["findings"]} for report in reports]
    assert {"constant", "blank"} <= kinds[0] and "t2" not in reports[0]["perceived"]["looks_like"]
    assert "non-finite" in kinds[1]
    assert "unreadable" in kinds[2] and "unreadable" in kinds[3]
    assert "note" in kinds[4]
    assert all(report["perceived"] for report in reports)
    assert run("inspect", "-i", tmp_path / "in", "--model", brain).exit_code == cli.FLAGGED


def test_inspect_names_the_missing_slices_of_a_heart(tmp_path, heart, monkeypatch):
    stack = slices(16, 16)
    stack[..., 5] = np.nan
    path = save(tmp_path / "stack.nii.gz", stack, SHORT_AXIS)
    agreeing(monkeypatch)
    result = run("inspect", "-i", path, "--model", heart, "--missing-slices", "6", "--json")
    (report,) = json.loads(result.stdout)["studies"]
    assert result.exit_code == 0 and report["missing_slices"] == [5, 6] and report["missing"] == ["slab1"]
    constant = save(tmp_path / "flat.nii.gz", np.ones((16, 16, 16)), SHORT_AXIS)
    result = run("inspect", "-i", constant, "--model", heart)
    assert result.exit_code == cli.FLAGGED and "constant" in result.stdout


def test_inspect_of_nothing_readable_is_an_error(tmp_path, brain):
    (tmp_path / "x_t1.nii.gz").write_bytes(b"")
    refused(run("inspect", "-i", tmp_path, "--model", brain), "empty")
    study(tmp_path, "y")  # beside another study it is a finding
    result = run("inspect", "-i", tmp_path, "--model", brain, "--json")
    reports = json.loads(result.stdout)["studies"]
    assert result.exit_code == cli.FLAGGED and reports[0]["findings"][0]["kind"] == "unreadable"
    assert reports[0]["perceived"] is None and reports[1]["perceived"]
    refused(run("inspect", "-i", tmp_path, "--model", brain, "--device", "tpu"), "tpu")


# ---- the rest ----------------------------------------------------------------------------------------------


def test_the_model_is_chosen_by_task_and_modalities(tmp_path, brain, heart, monkeypatch):
    ixi = tmp_path / "ixi"
    ixi.mkdir()
    config = replace(checkpoint.read_config(brain), name="ixi", elements=("t1", "t2", "pd"))
    checkpoint.write_config(ixi, config)
    known = {"ixi": ixi, "demo-brain": brain, "demo-cardiac": heart}
    monkeypatch.setattr(checkpoint, "list_models", lambda: sorted(known))
    monkeypatch.setattr(checkpoint, "locate", lambda name: known[str(name)])
    models = cli._Models(None, "cpu")
    assert models.choose("brain", {"t1": 0, "flair": 0})[0] == "demo-brain"
    assert models.choose("brain", {"t1": 0, "pd": 0})[0] == "ixi"
    assert models.choose("cardiac", {"sax": 0})[0] == "demo-cardiac"
    monkeypatch.setattr(checkpoint, "list_models", lambda: [])
    with pytest.raises(cli.CopeditError, match="no model for brain"):
        models.choose("brain", {"t1": 0})


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


def test_train_hands_over_its_options(tmp_path, monkeypatch):
    from copedit_training.stages import trainer

    seen = {}
    monkeypatch.setattr(trainer, "run", lambda stage, **options: seen.update(options, stage=stage))
    options = [
        "--preset",
        "demo-brain",
        "-o",
        tmp_path / "run",
        "--set",
        "steps=3",
        "--set",
        "lr=1e-3",
        "--resume",
    ]
    assert run("train", "tokenizer", *options).exit_code == 0
    assert seen["stage"] == "tokenizer" and seen["overrides"] == ["steps=3", "lr=1e-3"] and seen["resume"]
    assert seen["preset"] == "demo-brain" and seen["data"] == "phantom" and seen["output"] == tmp_path / "run"


def test_as_a_process(tmp_path):
    """Help and errors as a shell sees them."""

    def process(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "copedit_rt.cli", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(cli.__file__).parents[1])

    for flag in ("-h", "--help"):
        shown = process(flag)
        assert shown.returncode == 0
        assert all(word in shown.stdout for word in ("demo", "synth", "inspect", "train", "evaluate", "doctor"))
    failed = process("synth", "-i", str(tmp_path / "nowhere"), "-o", str(tmp_path / "out"))
    assert failed.returncode == 1 and failed.stdout == ""
    assert failed.stderr.startswith("copedit: ") and failed.stderr.count("\n") == 1
