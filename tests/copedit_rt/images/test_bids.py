"""Data sets in the Brain Imaging Data Structure: what is found, what is written, and what the validator says."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import nibabel as nib
import pytest
from commands import SHORT_AXIS, files, image, refused, run, save, slices

from copedit_rt.errors import CopeditError
from copedit_rt.images import bids
from copedit_rt.images.find import find_studies
from copedit_rt.images.study import Study

VALIDATOR = os.environ.get("BIDS_VALIDATOR") or shutil.which("bids-validator-deno")


@pytest.fixture
def dataset(tmp_path) -> Path:
    """Two subjects, one with two sessions and one with two runs, and what is no anatomical image."""
    root = tmp_path / "raw"
    for seed, name in enumerate(
        [
            "sub-01/ses-a/anat/sub-01_ses-a_T1w",
            "sub-01/ses-a/anat/sub-01_ses-a_T2w",
            "sub-01/ses-b/anat/sub-01_ses-b_T1w",
            "sub-01/ses-b/anat/sub-01_ses-b_FLAIR",
            "sub-02/anat/sub-02_run-01_T1w",
            "sub-02/anat/sub-02_run-02_T1w",
            "sub-02/anat/sub-02_T2w",
        ]
    ):
        save(root / f"{name}.nii.gz", image(seed))
        (root / f"{name}.json").write_text("{}")
    (root / "sub-01/ses-a/anat/._sub-01_ses-a_T1w.nii.gz").write_bytes(b"\0\5\x16\7")  # of macOS
    save(root / "sub-01/ses-a/perf/sub-01_ses-a_T1w.nii.gz", image(9))
    save(root / "derivatives/other/sub-01/anat/sub-01_desc-x_T1w.nii.gz", image(9))
    (root / "derivatives/other" / bids.DESCRIPTION).write_text(json.dumps({"GeneratedBy": [{"Name": "other"}]}))
    described = {"Name": "made up", "BIDSVersion": "1.8.0", "DatasetType": "raw", "DatasetDOI": "doi:10.1/x"}
    (root / bids.DESCRIPTION).write_text(json.dumps(described))
    (root / "README").write_text("Made up for a test: noise in the place of images, and no person behind it.\n" * 3)
    return root


def test_the_walk(dataset):
    found = find_studies(dataset, select=["run-02"])
    assert [study.name for study in found] == ["sub-01_ses-a", "sub-01_ses-b", "sub-02"] and found.dataset == dataset
    assert [path.name for path in found[2].files.values()] == ["sub-02_run-02_T1w.nii.gz", "sub-02_T2w.nii.gz"]
    assert not any("perf" in path.parts for study in found for path in study.files.values())
    path = found[0].output_path(Path("out"), "flair")
    assert path == Path("out/sub-01/ses-a/anat/sub-01_ses-a_desc-copedit_FLAIR.nii.gz")
    assert found[0].output_path(Path("out"), "t1ce").name == "sub-01_ses-a_ce-gadolinium_desc-copedit_T1w.nii.gz"
    assert found[2].output_path(Path("out"), "t1ce").name == "sub-02_ce-gadolinium_run-02_desc-copedit_T1w.nii.gz"
    assert find_studies(dataset)[2].output_path(Path("out"), "flair").name == "sub-02_desc-copedit_FLAIR.nii.gz"


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ({"sub": ["01"]}, ["sub-01_ses-a", "sub-01_ses-b"]),
        ({"sub": ["sub-01"], "ses": ["b"]}, ["sub-01_ses-b"]),
        ({"sub": ["02"], "run": ["1"]}, ["sub-02"]),
        ({"run": ["2"]}, ["sub-01_ses-a", "sub-01_ses-b", "sub-02"]),
        ({"ses": ["a", "b"]}, ["sub-01_ses-a", "sub-01_ses-b"]),
    ],
)
def test_labels(dataset, labels, names):
    found = find_studies(dataset, labels=labels)
    assert [study.name for study in found] == names
    if labels.get("run") == ["1"]:
        names = ["sub-02_run-01_T1w.nii.gz", "sub-02_T2w.nii.gz"]  # one of its kind: of every run
        assert [path.name for path in found[0].files.values()] == names


def test_labels_that_are_not_there(dataset):
    for labels, words in (
        ({"sub": ["03"]}, "--participant-label 03: no file has it; there are 01, 02"),
        ({"ses": ["c"]}, "--session c: no file has it; there are a, b"),
        ({"run": ["3"]}, "--run 3"),
    ):
        with pytest.raises(CopeditError, match=words):
            find_studies(dataset, labels=labels)


def test_sources_below_any_folder():
    assert bids.sources([Path("/sub-cortical/ds/sub-01/ses-a/anat/sub-01_ses-a_T1w.nii.gz"), Path("x.nii")]) == [
        "bids:raw:sub-01/ses-a/anat/sub-01_ses-a_T1w.nii.gz",
        "bids:raw:x.nii",
    ]


def test_spaces_are_studies_of_their_own(tmp_path):
    for space in ("", "space-MNI152_"):
        save(tmp_path / f"sub-01_{space}desc-preproc_T1w.nii.gz", image(1))
    found = find_studies(tmp_path)
    assert [(study.name, study.problem) for study in found] == [("sub-01", None), ("sub-01_space-MNI152", None)]
    assert found[1].output_path(Path("o"), "flair").name == "sub-01_space-MNI152_FLAIR.nii.gz"


def test_outputs_are_a_derivative(dataset, brain_model):
    out = dataset / "derivatives" / "copedit"
    command = ["synth", dataset, "-o", out, "--model", brain_model, "--target", "flair", "--report", "--samples", 2]
    command += ["--participant-label", "01", "--session", "a"]
    result = run(*command)
    assert result.exit_code == 0, result.stderr
    folder = out / "sub-01" / "ses-a" / "anat"
    made = nib.load(folder / "sub-01_ses-a_desc-copedit_FLAIR.nii.gz")
    assert made.shape == image(0).shape
    sidecar = json.loads((folder / "sub-01_ses-a_desc-copedit_FLAIR.json").read_text())
    assert sidecar["Synthetic"] is True and sidecar["Sources"] == [
        f"bids:raw:sub-01/ses-a/anat/sub-01_ses-a_{suffix}.nii.gz" for suffix in ("T1w", "T2w")
    ]
    described = json.loads((out / bids.DESCRIPTION).read_text())
    assert described["DatasetType"] == "derivative" and described["GeneratedBy"][0]["Name"] == "CoPeDiT"
    assert described["SourceDatasets"] == [{"URL": "bids:raw:", "DOI": "doi:10.1/x"}]
    assert (out / described["DatasetLinks"]["raw"]).resolve() == dataset.resolve()
    before = files(out)
    assert "kept" in run(*command[:-4]).stdout or files(out) >= before  # its own outputs are no inputs
    assert not [study for study in find_studies(dataset) if "desc" in str(study.files)]


def test_a_heart_is_a_derivative(dataset, tmp_path):
    path = save(dataset / "sub-03" / "anat" / "sub-03_acq-sax_T2w.nii.gz", slices(20, 8), SHORT_AXIS)
    (found,) = find_studies(dataset, labels={"sub": ["03"]}, task="cardiac")
    study = Study.read(found, missing_slices=[3])
    (made,) = study.with_synthetic({"sax": study.reference.data}).write(tmp_path / "o", model="m")
    assert made == tmp_path / "o" / "sub-03" / "anat" / "sub-03_acq-sax_desc-copedit_T2w.nii.gz"
    sidecar = json.loads(made.with_name("sub-03_acq-sax_desc-copedit_T2w.json").read_text())
    assert sidecar["Synthetic"] is True and sidecar["SkullStripped"] is False
    assert sidecar["Sources"] == [f"bids:raw:sub-03/anat/{path.name}"]
    assert find_studies(path, task="cardiac")[0].output_path(Path("o"), "sax") == Path("o") / path.name


def test_raw_data_stay_raw(dataset, brain_model):
    before = files(dataset)
    for out in (dataset, dataset / "sub-01", dataset / "results"):
        result = run("synth", dataset, "-o", out, "--model", brain_model, "--session", "a")
        refused(result, "lies among the raw data", "derivatives/copedit")
    result = run("synth", dataset, "-o", dataset / "derivatives" / "other", "--model", brain_model, "--session", "a")
    refused(result, "was not written by CoPeDiT")
    assert files(dataset) == before


@pytest.mark.skipif(VALIDATOR is None, reason="needs bids-validator-deno on the path, or named by BIDS_VALIDATOR")
@pytest.mark.parametrize("which", ["raw", "derivative"])
def test_the_validator(dataset, tmp_path, brain_model, which):
    """No error, in what is read and in what is written."""
    shutil.rmtree(dataset / "derivatives")
    shutil.rmtree(dataset / "sub-01" / "ses-a" / "perf")
    out = tmp_path / "derived"
    if which == "derivative":
        options = ["--model", brain_model, "--session", "a", "--report", "--preview", "--samples", 2]
        assert run("synth", dataset, "-o", out, *options).exit_code == 0
    assert VALIDATOR is not None
    where = dataset if which == "raw" else out
    done = subprocess.run([VALIDATOR, str(where), "--json"], capture_output=True, text=True, timeout=600)
    issues = json.loads(done.stdout)["issues"]["issues"]
    assert [issue for issue in issues if issue["severity"] == "error"] == []
