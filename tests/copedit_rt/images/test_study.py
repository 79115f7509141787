"""Studies on disk: what is recognised, what is read, and that nothing else changes in what is written."""

import gzip
import hashlib
import json
import os
import struct
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from copedit_rt.config import ModelConfig
from copedit_rt.errors import CopeditError
from copedit_rt.images.find import find_studies
from copedit_rt.images.names import modality
from copedit_rt.images.nifti import MARK, Volume, read_volume
from copedit_rt.images.prepare import prepare
from copedit_rt.images.study import Study

AFFINE = np.array([[-1.2, 0, 0, 40], [0, 1.2, 0.6576, -50], [0, -0.2, 3.9456, -20], [0, 0, 0, 1]])
BRATS = ("t1", "t1ce", "t2", "flair")


def image(shape=(6, 7, 5), seed=0):
    return np.random.default_rng(seed).uniform(1, 200, shape)


def save(path, data=None, affine=AFFINE, dtype=np.float32, slope=None):
    """Write a NIfTI file with both transforms set; slope is (slope, intercept)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = image() if data is None else data
    nifti = nib.Nifti1Image(np.asarray(data).astype(dtype), affine)
    nifti.header.set_xyzt_units("mm", "sec")
    nifti.set_qform(affine, 2)
    nifti.set_sform(affine, 4)
    nifti.header["descrip"] = b"scanner X"
    nifti.header["cal_max"] = 180
    if slope:
        nifti.header.set_slope_inter(*slope)
    nib.save(nifti, path)
    return path


def names(found):
    return {study.name: (study.task, list(study.files)) for study in found}


def write(study, images, folder, **kwargs):
    return study.with_synthetic(images).write(folder, model="demo-brain", **kwargs)


# ---- names -------------------------------------------------------------------------------------------------

LAYOUTS = {
    "brats2021": (
        [f"BraTS2021_00000_{m}.nii.gz" for m in ("flair", "t1", "t1ce", "t2", "seg")],
        {"BraTS2021_00000": ("brain", ["t1", "t1ce", "t2", "flair"])},
        "t1ce",
        "BraTS2021_00000_t1ce.nii.gz",
    ),
    "brats2020": (
        ["BraTS20_Training_001_t1.nii", "BraTS20_Training_001_flair.nii"],
        {"BraTS20_Training_001": ("brain", ["t1", "flair"])},
        "t2",
        "BraTS20_Training_001_t2.nii.gz",
    ),
    "brats2023": (
        [f"BraTS-GLI-00000-000-{m}.nii.gz" for m in ("t1n", "t2w", "t2f", "seg")],
        {"BraTS-GLI-00000-000": ("brain", ["t1", "t2", "flair"])},
        "t1ce",
        "BraTS-GLI-00000-000-t1c.nii.gz",
    ),
    "ixi folders": (
        [
            "IXI-T1/IXI002-Guys-0828-T1.nii.gz",
            "IXI-PD/IXI002-Guys-0828-PD.nii.gz",
            "IXI-T1/IXI012-HH-1211-T1.nii.gz",
            "IXI-T2/IXI012-HH-1211-T2.nii.gz",
            "IXI-MRA/IXI012-HH-1211-MRA.nii.gz",
        ],
        {"IXI002-Guys-0828": ("brain", ["t1", "pd"]), "IXI012-HH-1211": ("brain", ["t1", "t2"])},
        "t2",
        "IXI002-Guys-0828-T2.nii.gz",
    ),
    "bids": (
        [
            "sub-01/ses-a/anat/sub-01_ses-a_acq-mprage_T1w.nii.gz",
            "sub-01/ses-a/anat/sub-01_ses-a_ce-gadolinium_T1w.nii.gz",
            "sub-01/ses-a/anat/sub-01_ses-a_FLAIR.nii.gz",
            "sub-01/ses-a/dwi/sub-01_ses-a_dwi.nii.gz",
            "derivatives/sub-01/anat/sub-01_ses-a_T1w.nii.gz",
        ],
        {"sub-01_ses-a": ("brain", ["t1", "t1ce", "flair"])},
        "t2",
        "sub-01/ses-a/anat/sub-01_ses-a_T2w.nii.gz",
    ),
    "bids without contrast": (
        ["sub-02/anat/sub-02_space-MNI_T1w.nii.gz", "sub-02/anat/sub-02_space-MNI_PDw.nii.gz"],
        {"sub-02": ("brain", ["t1", "pd"])},
        "t1ce",
        "sub-02/anat/sub-02_ce-gadolinium_space-MNI_T1w.nii.gz",
    ),
    "folder of studies": (
        ["A01/A01_t1.nii.gz", "A01/A01_t2.nii.gz", "B02/B02_T2.nii.gz", "B02/B02_T1GD.nii.gz"],
        {"A01": ("brain", ["t1", "t2"]), "B02": ("brain", ["t1ce", "t2"])},
        "flair",
        "A01/A01_flair.nii.gz",
    ),
    "flat folder": (
        ["p1_T1.nii.gz", "p1_T2_FLAIR.nii.gz", "p2_T1.nii.gz", "p2_t1-gd.NII.GZ", "p2_T1_mask.nii.gz"],
        {"p1": ("brain", ["t1", "flair"]), "p2": ("brain", ["t1", "t1ce"])},
        "t2",
        "p1_T2.nii.gz",
    ),
    "bare names": (
        ["s1/t1.nii.gz", "s1/flair.nii.gz", "s2/t1.nii.gz"],
        {"s1": ("brain", ["t1", "flair"]), "s2": ("brain", ["t1"])},
        "t1ce",
        "s1/t1ce.nii.gz",
    ),
    "modality folders": (
        ["T1/007.nii.gz", "FLAIR/007.nii.gz"],
        {"007": ("brain", ["t1", "flair"])},
        "t2",
        "007_T2.nii.gz",
    ),
    "acdc": (
        [f"patient001/patient001_{n}.nii.gz" for n in ("frame01", "frame01_gt", "frame12", "4d")],
        {"patient001_frame01": ("cardiac", ["sax"]), "patient001_frame12": ("cardiac", ["sax"])},
        "sax",
        "patient001/patient001_frame01.nii.gz",
    ),
    "sunnybrook": (
        ["SC-HF-I-09_ED.nii.gz", "._SC-HF-I-09_ED.nii.gz", ".cache/SC-N-07_ED.nii.gz"],
        {"SC-HF-I-09_ED": ("cardiac", ["sax"])},
        "sax",
        "SC-HF-I-09_ED.nii.gz",
    ),
    "ukbb": (
        ["1000/sa_ED.nii.gz", "1000/label_sa_ED.nii.gz", "2000/sa_ED.nii.gz"],
        {"1000_sa_ED": ("cardiac", ["sax"]), "2000_sa_ED": ("cardiac", ["sax"])},
        "sax",
        "1000/sa_ED.nii.gz",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_layouts(tmp_path, layout):
    files, expected, element, output = LAYOUTS[layout]
    root = tmp_path / "in"
    for file in files:
        save(root / file)
    found = find_studies([root])
    assert names(found) == expected
    assert found[0].output_path(tmp_path / "out", element) == tmp_path / "out" / output
    visible = [f for f in files if not any(part.startswith(".") for part in Path(f).parts)]
    assert len(found.skipped) == len(visible) - sum(len(study.files) for study in found)
    assert all(reason for _, reason in found.skipped)


def test_one_study_is_a_folder_its_files_or_a_mapping(tmp_path):
    files = {m: save(tmp_path / "A01" / f"A01_{m}.nii.gz") for m in ("t1", "t2")}
    for inputs in (tmp_path / "A01", [str(f) for f in files.values()], files):
        study = Study.read(inputs)
        assert (study.name, study.task, list(study.volumes)) == ("A01", "brain", ["t1", "t2"])
        assert study.output_path(tmp_path / "out", "flair") == tmp_path / "out" / "A01_flair.nii.gz"


def test_given_modalities_may_have_any_file_name_and_keep_their_order(tmp_path):
    scan, other = save(tmp_path / "scan.nii.gz"), save(tmp_path / "77.nii.gz")
    (study,) = find_studies((), {"T2w": scan, "t1gd": other})
    assert list(study.files) == ["t2", "t1ce"]
    assert study.output_path(tmp_path / "o", "t1").name == "scan_t1.nii.gz"
    (stack,) = find_studies((), {"sax": scan})
    assert stack.task == "cardiac"


def test_several_folders_keep_their_outputs_apart(tmp_path):
    for site in ("x", "y"):
        save(tmp_path / site / "t1.nii.gz")
    found = find_studies([tmp_path / "x", tmp_path / "y"])
    assert [s.output_path(tmp_path / "o", "t2") for s in found] == [
        tmp_path / "o" / "x" / "t2.nii.gz",
        tmp_path / "o" / "y" / "t2.nii.gz",
    ]
    for study in find_studies([tmp_path / "x" / "t1.nii.gz", tmp_path / "y" / "t1.nii.gz"]):
        with pytest.raises(CopeditError, match="same output"):
            Study.read(study)


def test_outputs_are_the_models_missing_elements(tmp_path):
    save(tmp_path / "A_t1.nii.gz")
    save(tmp_path / "A_flair.nii.gz")
    (study,) = find_studies(tmp_path)
    assert {e: p.name for e, p in study.outputs(tmp_path / "o", BRATS).items()} == {
        "t1ce": "A_t1ce.nii.gz",
        "t2": "A_t2.nii.gz",
    }


def test_the_task_can_be_asked_for(tmp_path):
    save(tmp_path / "brain" / "A_t1.nii.gz")
    save(tmp_path / "heart" / "B.nii.gz")
    assert names(find_studies(tmp_path, task="brain")) == {"A": ("brain", ["t1"])}
    assert names(find_studies(tmp_path, task="cardiac")) == {"B": ("cardiac", ["sax"])}
    # An MSCMR stack is named as a T2: taken for what it is asked to be when it is named itself.
    t2 = save(tmp_path / "patient6_T2.nii.gz")
    assert names(find_studies(t2, task="cardiac")) == {"patient6_T2": ("cardiac", ["sax"])}


def test_images_beside_a_brain_study_are_not_taken_for_stacks(tmp_path):
    for name in ("A_t1", "A_swi", "A_something"):
        save(tmp_path / f"{name}.nii.gz")
    found = find_studies(tmp_path)
    assert names(found) == {"A": ("brain", ["t1"])}
    reasons = {path.name: reason for path, reason in found.skipped}
    assert "unknown modality 'swi'; known modalities are t1, t1ce, t2, flair, pd" in reasons["A_swi.nii.gz"]
    assert "neither a modality" in reasons["A_something.nii.gz"]


@pytest.mark.parametrize(
    ("spelling", "element"),
    [
        *[(s, "t1") for s in ("t1", "T1w", "T1N")],
        *[(s, "t1ce") for s in ("t1ce", "T1Gd", "t1c", "T1-post", "t1wce")],
        *[(s, "t2") for s in ("T2", "t2w")],
        *[(s, "flair") for s in ("FLAIR", "t2f", "t2_flair", "T2FLAIR")],
        *[(s, "pd") for s in ("PD", "PDw")],
    ],
)
def test_modality_spellings(spelling, element):
    assert modality(spelling) == element


# ---- reading -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii"])
@pytest.mark.parametrize(
    ("dtype", "slope"), [(np.uint8, None), (np.int16, (0.5, -3)), (np.uint16, None), (np.float64, None)]
)
def test_reading_agrees_with_nibabel(tmp_path, name, dtype, slope):
    path = save(tmp_path / name, image(), dtype=dtype, slope=slope)
    volume = read_volume(path)
    assert volume.data.dtype == np.float32
    np.testing.assert_allclose(volume.data, nib.load(path).get_fdata(), rtol=1e-6)
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-5)
    assert volume.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert volume.grid == "6 x 7 x 5 voxels of 1.2 x 1.22 x 4 mm"


def test_reading_big_endian_nifti2_and_misnamed_compression(tmp_path):
    data = image().astype(">f4")
    big = nib.Nifti1Image(data, AFFINE, nib.Nifti1Header(endianness=">"))
    nib.save(big, tmp_path / "big.nii")
    nib.save(nib.Nifti2Image(data.astype("<f4"), AFFINE), tmp_path / "two.nii")
    (tmp_path / "plain.nii.gz").write_bytes((tmp_path / "two.nii").read_bytes())
    (tmp_path / "zipped.nii").write_bytes(gzip.compress((tmp_path / "big.nii").read_bytes()))
    for path in tmp_path.iterdir():
        volume = read_volume(path)
        np.testing.assert_array_equal(volume.data, data.astype(np.float32))
        Volume.save(volume, tmp_path / ".copy.nii.gz")
        np.testing.assert_array_equal(nib.load(tmp_path / ".copy.nii.gz").get_fdata(), data)


def test_one_volume_in_four_dimensions_is_a_volume(tmp_path):
    path = save(tmp_path / "A_t1.nii.gz", image((6, 7, 5, 1)))
    study = Study.read(path)
    assert study.volumes["t1"].data.shape == (6, 7, 5)
    (out,) = write(study, {"t2": image()}, tmp_path / "o")
    assert nib.load(out).shape == (6, 7, 5)


def test_a_file_without_orientation_is_read_and_said(tmp_path):
    nifti = nib.Nifti1Image(image().astype(np.float32), None)
    nifti.header["pixdim"][1:4] = 3, 3, 4
    nib.save(nifti, tmp_path / "A_t1.nii.gz")
    study = Study.read(tmp_path)
    assert "A_t1.nii.gz has no orientation" in study.notes[0]
    assert "LAS" in study.notes[0]
    (out,) = write(study, {"t2": image()}, tmp_path / "o")
    header = nib.load(out).header
    assert (header["qform_code"], header["sform_code"]) == (0, 0)


def test_one_image_under_two_names_is_said(tmp_path):
    for name, seed in (("t1", 0), ("t1ce", 0), ("t2", 1)):
        save(tmp_path / f"A_{name}.nii.gz", image(seed=seed))
    (tmp_path / "A_t1ce.nii.gz").write_bytes((tmp_path / "A_t1.nii.gz").read_bytes())
    (note,) = Study.read(tmp_path).notes
    assert note.startswith("t1 and t1ce are one image") and "A_t1ce.nii.gz" in note


def test_resampling_is_on_request_and_noted(tmp_path):
    save(tmp_path / "A_t1.nii.gz")
    moved = AFFINE.copy()
    moved[2, 3] += 2
    save(tmp_path / "A_t2.nii.gz", affine=moved)
    study = Study.read(tmp_path, resample=True)
    assert study.volumes["t2"].data.shape == (6, 7, 5)
    np.testing.assert_array_equal(study.volumes["t2"].affine, study.volumes["t1"].affine)
    assert study.notes == ("t2 was resampled from 6 x 7 x 5 voxels of 1.2 x 1.22 x 4 mm onto the grid of t1",)


@pytest.mark.parametrize(("blank", "several"), [(0, list), (7, np.array), (np.nan, iter)])
def test_blank_slices_are_missing(tmp_path, blank, several):
    data = image((6, 7, 8))
    data[..., [2, 5]] = blank
    study = Study.read(save(tmp_path / "heart.nii.gz", data), missing_slices=several([6, 2]))
    assert study.missing_slices == (2, 5, 6)
    assert study.notes == ("slices 2, 5 are blank and count as missing",)


def test_an_image_that_shows_nothing_can_be_looked_at(tmp_path):
    save(tmp_path / "A_t1.nii.gz", np.full((6, 7, 5), np.nan))
    save(tmp_path / "A_t2.nii.gz", np.zeros((6, 7, 5)))
    study = Study.read(tmp_path, check_content=False)
    assert not study.volumes["t2"].data.any()


# ---- writing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "slope"), [(np.float32, None), (np.int16, (2.5, 7))])
def test_output_header_is_the_references_but_for_type_and_description(tmp_path, dtype, slope):
    path = save(tmp_path / "A_t1.nii.gz", dtype=dtype, slope=slope)
    before = nib.load(path).header
    study = Study.read(path)
    data = image(seed=4).astype(np.float32)
    (out,) = write(study, {"flair": data}, tmp_path / "o")
    assert out == tmp_path / "o" / "A_flair.nii.gz"
    written = nib.load(out)
    np.testing.assert_array_equal(written.get_fdata(dtype=np.float32), data)
    assert written.get_data_dtype() == np.float32
    changed = {"datatype", "bitpix", "descrip", "scl_slope", "scl_inter", "cal_max"}
    assert written.header["cal_max"] == 0  # it was the T1's
    for key in set(before.keys()) - changed:
        np.testing.assert_array_equal(written.header[key], before[key], err_msg=key)
    np.testing.assert_array_equal(written.affine, nib.load(path).affine)
    assert bytes(written.header["descrip"]).startswith(b"synthetic, CoPeDiT demo-brain")
    assert bytes(study.volumes["t1"].header["descrip"]).startswith(b"scanner X")  # not touched


def test_header_extensions_are_kept(tmp_path):
    nifti = nib.Nifti1Image(image().astype(np.float32), AFFINE)
    nifti.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"from the scanner"))
    nib.save(nifti, tmp_path / "A_t1.nii.gz")
    (out,) = write(Study.read(tmp_path), {"t2": image()}, tmp_path / "o")
    assert nib.load(out).header.extensions[0].get_content().startswith(b"from the scanner")
    np.testing.assert_array_equal(nib.load(out).get_fdata(), image().astype(np.float32))


def test_sidecar_and_spread(tmp_path):
    study = Study.read(save(tmp_path / "A_t1.nii.gz"))
    record = {"seed": np.int64(3), "inputs": {"t1": {"sha256": study.volumes["t1"].sha256}}}
    write(study, {"t2": image(), "t1ce": image()}, tmp_path / "o", record=record, std={"t2": image(seed=2)})
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == [
        "A_t1ce.json",
        "A_t1ce.nii.gz",
        "A_t2.json",
        "A_t2.nii.gz",
        "A_t2_sd.nii.gz",
    ]
    sidecar = json.loads((tmp_path / "o" / "A_t2.json").read_text())
    assert sidecar["seed"] == 3
    assert sidecar["synthetic"] is True
    assert (sidecar["element"], sidecar["file"], sidecar["model"]) == ("t2", "A_t2.nii.gz", "demo-brain")
    spread = nib.load(tmp_path / "o" / "A_t2_sd.nii.gz")
    assert spread.get_data_dtype() == np.float32
    assert spread.header["cal_max"] == 0
    assert bytes(spread.header["descrip"]).startswith(MARK.encode())


def test_a_long_model_name_fits_the_description(tmp_path):
    study = Study.read(save(tmp_path / "A_t1.nii.gz")).with_synthetic({"t2": image()})
    (out,) = study.write(tmp_path / "o", model="modèle-" * 30)
    assert MARK.encode() in bytes(nib.load(out).header["descrip"])


def test_equal_images_give_equal_files(tmp_path, monkeypatch):
    study = Study.read(save(tmp_path / "A_t1.nii.gz"))
    (one,) = write(study, {"t2": image()}, tmp_path / "x")
    monkeypatch.setattr(time, "time", lambda: 1e9)
    (two,) = write(study, {"t2": image()}, tmp_path / "y")
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("offset", [0, 16, 352])
def test_a_header_that_misplaces_its_voxels_is_not_passed_on(tmp_path, offset):
    path = save(tmp_path / "A_t1.nii")
    content = bytearray(path.read_bytes())
    struct.pack_into("<f", content, 108, offset)
    path.write_bytes(content)
    (out,) = write(Study.read(path), {"t2": image()}, tmp_path / "o")
    np.testing.assert_array_equal(nib.load(out).get_fdata(), image().astype(np.float32))


def test_outputs_are_not_taken_for_inputs(tmp_path):
    study = Study.read(save(tmp_path / "A_t1.nii.gz"))
    (out,) = write(study, {"t2": image()}, tmp_path, std={"t2": image()})
    found = find_studies(tmp_path)
    assert names(found) == {"A": ("brain", ["t1"])}
    assert {(path.name, reason) for path, reason in found.skipped} == {
        ("A_t2.nii.gz", "synthetic, written by CoPeDiT"),
        ("A_t2_sd.nii.gz", "synthetic, written by CoPeDiT"),
    }
    for call in (lambda: find_studies(out), lambda: find_studies((), {"t2": out})):
        with pytest.raises(CopeditError, match=r"A_t2.nii.gz is marked as synthetic"):
            call()


def test_an_input_is_never_replaced(tmp_path):
    data = image((6, 7, 8))
    data[..., 3] = 0
    path = save(tmp_path / "heart.nii.gz", data)
    before = path.read_bytes()
    (files,) = find_studies(path)
    study = Study.read(files).with_synthetic({"sax": data})
    for call in (lambda: files.outputs(tmp_path, ()), lambda: study.write(tmp_path, model="m")):
        with pytest.raises(CopeditError, match="would replace an input; choose another output folder"):
            call()
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    study = Study.read(save(tmp_path / "A_t1.nii.gz"))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(CopeditError, match=r"cannot write .*A_t2.nii.gz: No space left on device"):
        write(study, {"t2": image()}, tmp_path / "o")
    assert not list((tmp_path / "o").iterdir())


@pytest.mark.parametrize(
    ("dtype", "slope"),
    [
        (np.uint8, None),
        (np.int16, (0.25, 10)),
        (np.uint16, None),
        (np.float32, None),
        (np.float64, None),
        (np.dtype(">i2"), None),
    ],
)
def test_present_slices_are_identical_on_disk(tmp_path, dtype, slope):
    data = image((6, 7, 8)).astype(np.dtype(dtype).newbyteorder("="))
    header = nib.Nifti1Header(endianness=">" if np.dtype(dtype).byteorder == ">" else "<")
    data[..., [3, 4]] = 0
    nifti = nib.Nifti1Image(data, AFFINE, header)
    nifti.set_data_dtype(np.dtype(dtype))
    if slope:
        nifti.header.set_slope_inter(*slope)
    nib.save(nifti, tmp_path / "heart.nii.gz")
    study = Study.read(tmp_path / "heart.nii.gz")
    stack = study.volumes["sax"].data.copy()
    stack[..., [3, 4]] = 60.3
    (out,) = write(study, {"sax": stack}, tmp_path / "o")
    assert out.name == "heart.nii.gz"
    was, now = nib.load(tmp_path / "heart.nii.gz"), nib.load(out)
    assert now.get_data_dtype() == was.get_data_dtype()
    keep = [0, 1, 2, 5, 6, 7]
    raw = [nifti.dataobj.get_unscaled()[..., keep] for nifti in (was, now)]
    np.testing.assert_array_equal(*raw)
    np.testing.assert_array_equal(now.get_fdata()[..., keep], was.get_fdata()[..., keep])
    step = 0 if np.dtype(dtype).kind == "f" else (slope or (1, 0))[0]
    np.testing.assert_allclose(now.get_fdata()[..., [3, 4]], 60.3, atol=step / 2 + 1e-5)
    assert json.loads((tmp_path / "o" / "heart.json").read_text())["synthetic_slices"] == [3, 4]


def test_synthetic_values_beyond_the_type_are_clipped(tmp_path):
    data = image((6, 7, 8)).astype(np.uint8)
    data[..., 3] = 0
    study = Study.read(save(tmp_path / "heart.nii.gz", data, dtype=np.uint8))
    stack = study.volumes["sax"].data.copy()
    stack[:3, :, 3], stack[3:, :, 3] = -4, 300
    (out,) = write(study, {"sax": stack}, tmp_path / "o")
    assert set(np.unique(nib.load(out).get_fdata()[..., 3])) == {0, 255}


def test_nan_slices_are_replaced(tmp_path):
    data = image((6, 7, 8))
    data[..., 3] = np.nan
    study = Study.read(save(tmp_path / "heart.nii.gz", data))
    stack = np.where(np.isnan(data), 50, data)
    (out,) = write(study, {"sax": stack}, tmp_path / "o")
    assert nib.load(out).get_data_dtype() == np.float32
    np.testing.assert_array_equal(nib.load(out).get_fdata(), stack.astype(np.float32))


def test_a_study_without_files_can_be_written(tmp_path):
    study = Study("sim", "brain", {"t1": Volume.from_array(image(), AFFINE)})
    (out,) = write(study, {"t2": image()}, tmp_path)
    assert out == tmp_path / "sim_t2.nii.gz"
    np.testing.assert_allclose(nib.load(out).affine, AFFINE, atol=1e-5)
    study.volumes["t1"].save(tmp_path / "sim_t1.nii.gz", "simulated")
    assert list(Study.read(tmp_path).volumes) == ["t1"]


def test_a_study_shares_no_array_with_who_gives_or_takes_images():
    data = image((6, 7, 8))
    data[..., 3] = 0
    given = nib.Nifti1Image(data.copy(), AFFINE)
    study = Study.of({"sax": Volume.from_image(given, "sax")})
    given.dataobj[:] = -1
    made = study.with_synthetic({"sax": data + 1}).images(model="m")["sax"]
    np.testing.assert_array_equal(made.get_fdata()[..., 4:], data[..., 4:])
    brain = Study.of({"t1": Volume.from_array(image(), AFFINE)}).with_synthetic({"t2": image(seed=1)})
    np.asarray(brain.images(model="m")["t2"].dataobj)[:] = -1
    np.testing.assert_array_equal(brain.volumes["t2"].data, image(seed=1).astype(np.float32))


# ---- real studies ------------------------------------------------------------------------------------------


def test_real_brain_comes_back_on_its_grid(real_data, tmp_path):
    (files,) = find_studies(real_data / "brain" / "ms_patient07")
    assert list(files.files) == ["t1", "t1ce", "t2", "flair"]
    study = Study.read({m: files.files[m] for m in ("t1", "t2")})
    prepared = prepare(study, ModelConfig.preset("brain-brats"))
    images = prepared.images.copy()
    images[1] = images[2]  # the T2 in place of the T1ce
    restored = prepared.restore(images)["t1ce"]
    (out,) = write(study, {"t1ce": restored}, tmp_path)
    was, now = nib.load(files.files["t1"]), nib.load(out)
    assert out.name == "ms_patient07_t1ce.nii.gz"
    np.testing.assert_array_equal(now.affine, was.affine)
    for key in ("qform_code", "sform_code", "dim", "pixdim"):
        np.testing.assert_array_equal(now.header[key], was.header[key])
    black, white = prepared.intensity["t1"]
    shown = {m: np.clip((study.volumes[m].data - prepared.intensity[m][0]) / np.ptp(prepared.intensity[m]), 0, 1)
             for m in ("t1", "t2")}  # fmt: skip
    error = np.abs((restored - black) / (white - black) - shown["t2"])
    tissue = (shown["t1"] > 0.1) | (shown["t2"] > 0.1)
    height = np.flatnonzero(tissue.any((0, 1)))
    assert abs((height[0] + height[-1]) / 2 - 81) < 3, "the middle of the head, 10 mm below that of the grid"
    inside = np.zeros(tissue.shape, bool)
    inside[:, 13:-13, 36:127] = True  # 192 and 90 mm about the middle of the head
    assert error[inside].mean() < 0.006
    # What lies outside follows the images that are there; here it is the T2 itself.
    assert prepared.outside == (tissue & ~inside).sum() > 50_000
    assert restored[tissue & ~inside].min() > black and error[tissue & ~inside].max() < 0.002


def test_real_oblique_files_are_refused_and_resampled(real_data):
    folder = real_data / "brain" / "ms_raw_patient01"
    with pytest.raises(CopeditError, match=r"different grids, t1 .*0.719 x 0.719 x 3 mm; t2 .*--resample"):
        Study.read(folder)
    study = Study.read(folder, resample=True)
    t1, t2 = (study.volumes[m].data > study.volumes[m].data.mean() for m in ("t1", "t2"))
    assert 2 * (t1 & t2).sum() / (t1.sum() + t2.sum()) > 0.75  # the head lies where it lay


def test_real_stack_keeps_its_slices(real_data, tmp_path):
    path = real_data / "cardiac" / "SC-HF-I-09_ED.nii.gz"
    study = Study.read(path, missing_slices=[4, 5, 6])
    prepared = prepare(study, ModelConfig.preset("demo-cardiac"))
    restored = prepared.restore(prepared.images)
    (out,) = write(study, restored, tmp_path)
    was, now = np.asarray(nib.load(path).dataobj), np.asarray(nib.load(out).dataobj)
    keep = [i for i in range(was.shape[2]) if i not in (4, 5, 6)]
    assert now.dtype == was.dtype
    np.testing.assert_array_equal(now[..., keep], was[..., keep])
    assert (now[..., 4:7] != was[..., 4:7]).any()
