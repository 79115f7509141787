"""DICOM in and out, through the real dcm2niix; validators and servers where they are installed."""

import io
import json
import shutil
import subprocess
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import PIL.features
import PIL.Image
import pytest

pytest.importorskip("pydicom", reason="needs the extra dicom")
pytest.importorskip("dcm2niix", reason="needs the extra dicom")

import dcm2niix
import dicoms
import pydicom
from commands import files, image, refused, run, save
from dicoms import FLAIR, T1, T2, Made, tilted

from copedit_rt import archive
from copedit_rt.errors import CopeditError
from copedit_rt.images import find
from copedit_rt.images.dicom.studies import dicom_studies
from copedit_rt.images.dicom.write import Made as Output
from copedit_rt.images.dicom.write import stored, write_series
from copedit_rt.images.find import find_studies
from copedit_rt.images.study import Study, complete_sidecar, withdraw

RECORD = {"sampler": {"method": "ddim", "steps": 2, "samples": 1, "seed": 0}}


@pytest.fixture(scope="module")
def hospital(tmp_path_factory) -> Path:
    """A study that no test changes."""
    return dicoms.study(tmp_path_factory.mktemp("dicom") / "case")


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path, monkeypatch):
    """Whatever a test does, no temporary folder outlives it."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    yield
    assert not list(scratch.iterdir())


def converted(folder: Path, where: Path) -> nib.Nifti1Image:
    """What dcm2niix makes of a folder, in the order of the file's own voxels."""
    where.mkdir()
    command = [dcm2niix.bin, "-b", "n", "-x", "i", "-f", "x", "-o", str(where), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    (made,) = where.glob("*.nii")
    assert "Warning: " not in done.stdout.replace("Warning: Unable to determine manufacturer", "")
    return nib.load(made)


# ------------------------------------------------------------------------------------------------------------ in


def test_the_match(hospital):
    (found,) = find_studies(hospital)
    assert found.name == "case" and found.task == "brain" and not found.problem
    assert {e: p.name for e, p in found.files.items()} == {
        "t1": "series 2 (t1_mprage_sag_p2_iso)",
        "t2": "series 3 (t2_tse_tra_320_p2)",
        "flair": "series 4 (t2_tirm_tra_dark-fluid)",
    }
    assert [(one.key, why.split()[0]) for one, why in found.source.left_out] == [
        ("1", "its"), ("5", "diffusion"), ("6", "diffusion"),
    ]  # fmt: skip
    assert len(found.inputs()["t1"]) == 34


@pytest.mark.parametrize(
    "made",
    [
        Made("T1", 1),
        Made("T1", 1, tilted()),
        Made("T1", 1, tilted(dicoms.SAGITTAL, 11, -7), (40, 36, 34), (1.1, 1.3, 1.5)),
        Made("T1", 1, tilted(dicoms.CORONAL, -20, 30), (33, 35, 20), (1.25, 1.25, 3.3)),
        Made("T1", 1, (dicoms.AXIAL[0], tuple(-v for v in dicoms.AXIAL[1])), (33, 35, 12)),
    ],
)
def test_voxels_lie_where_the_scanner_says(tmp_path, made):
    """The affine, and every voxel, against the positions in the headers."""
    sets = dicoms.images(made)
    dicoms.save(sets, tmp_path / "s")
    volume = Study.read(tmp_path / "s").volumes["t1"]
    assert volume.data.shape == made.shape
    to_voxels = np.linalg.inv(volume.affine)
    for one in (sets[0], sets[-1]):
        row, column = np.reshape(np.array(one.ImageOrientationPatient, float), (2, 3))
        for i, j in ((0, 0), (made.shape[0] - 1, 0), (4, made.shape[1] - 2)):
            lps = np.array(one.ImagePositionPatient, float) + i * made.size[0] * row + j * made.size[1] * column
            x, y, z = (to_voxels @ [-lps[0], -lps[1], lps[2], 1])[:3]
            np.testing.assert_allclose([x, y, z], np.rint([x, y, z]), atol=1e-3)
            assert volume.data[round(x), round(y), round(z)] == one.pixel_array[j, i]


def test_headers_tell_nothing_of_the_patient(hospital):
    for volume in Study.read(hospital, resample=True).volumes.values():
        told = volume.header.binaryblock
        assert b"Roe" not in told and b"TE=" not in told and volume.path.parent == hospital


def test_series_are_named_by_hand(tmp_path):
    dicoms.study(tmp_path / "case", T1, replace(T1, number=7, description="T1 again"), T2)
    problem = find_studies(tmp_path / "case")[0].problem
    assert "2 series may be the t1: 2 (t1_mprage_sag_p2_iso), 7 (T1 again)" in problem
    assert "--file t1=2 or --file t1=7" in problem
    for named in ("7", f"{dicoms.ROOT}.1.7", "T1 AGAIN", "again"):
        (found,) = find_studies(tmp_path / "case", {"t1": named})
        assert found.files["t1"].name == "series 7 (T1 again)" and "t2" in found.files and not found.problem
        assert [why for _, why in found.source.left_out] == ["another t1 was asked for"]
    (found,) = find_studies(tmp_path / "case", {"t1": "none"})
    assert list(found.files) == ["t2"] and {why for _, why in found.source.left_out} == {"no t1 was asked for"}
    for named, words in (("320", "no such series; there are 2"), ("t", "3 series of case are that; name its UID")):
        with pytest.raises(CopeditError, match=words):
            find_studies(tmp_path / "case", {"t1": named})
    with pytest.raises(CopeditError, match="named twice"):
        find_studies(tmp_path / "case", {"t1": "7", "t2": "7"})


def test_a_folder_is_no_file(hospital):
    with pytest.raises(CopeditError, match=r"is a folder; .* with -i and the series' number with --file t1=NUMBER"):
        find_studies((), {"t1": hospital / "0002"})


def test_a_series_that_is_none_cannot_be_named(hospital):
    with pytest.raises(CopeditError, match=r"series 1 \(localizer\) of case cannot be taken: its slices lie in"):
        find_studies(hospital, {"t1": "localizer"})
    (found,) = find_studies(hospital, {"pd": "5"})  # whatever it is, who names it is believed
    assert found.files["pd"].name == "series 5 (ep2d_diff_3scan_trace_p2)"


def test_a_cohort(tmp_path):
    for n, name in enumerate(("b", "a/visit1", "a/visit2"), 1):
        dicoms.study(tmp_path / "cohort" / name, T2, FLAIR, study=str(n))
    found = find_studies(tmp_path / "cohort")
    names = ["a_visit1", "a_visit2", "b"]
    assert [study.name for study in found] == names and not any(study.problem for study in found)
    assert found[0].output_path(Path("o"), "t1") == Path("o/a/visit1/visit1_t1.nii.gz")
    assert [study.name for study in find_studies(tmp_path / "cohort" / "a" / "visit1")] == ["visit1"]
    with pytest.raises(CopeditError, match=r"--file names series of one study, and .* holds 3"):
        find_studies(tmp_path / "cohort", {"t1": "3"})


def test_a_study_that_cannot_be_read_is_not_missing(tmp_path):
    for n in ("1", "2", "3"):
        dicoms.study(tmp_path / "cohort" / n, T2, study=n)
    for path in (tmp_path / "cohort" / "2").rglob("IM*"):
        path.unlink()
        path.symlink_to("gone")
    with pytest.raises(CopeditError, match=r"2/0003/IM00000 is a file that cannot be read \(No such file"):
        find_studies(tmp_path / "cohort")


def test_a_cohort_with_its_outputs_below(tmp_path):
    made = {"SyntheticData": "YES", "ImageType": ["DERIVED", "SECONDARY", "OTHER"]}
    for n in ("1", "2"):
        dicoms.study(tmp_path / "cohort" / n, T2, FLAIR, study=n)
        dicoms.study(tmp_path / "cohort" / "out" / n, replace(T1, tags=made), study=n)
    found = find_studies(tmp_path / "cohort")
    assert [(study.name, list(study.files), study.problem) for study in found] == [
        (n, ["t2", "flair"], None) for n in ("1", "2")
    ]


@pytest.mark.parametrize("name", ["DICOMDIR", "dicomdir", "DICOMDIR.;1"])
def test_the_directory_of_a_disk_is_no_image(tmp_path, name):
    directory = pydicom.Dataset()
    directory.FileSetID, directory.file_meta = "DISK", dicoms.images(T2)[0].file_meta
    directory.file_meta.MediaStorageSOPClassUID = pydicom.uid.MediaStorageDirectoryStorage
    case = dicoms.study(tmp_path / "case", T2)
    directory.save_as(case / name, enforce_file_format=True)
    assert not find_studies(case)[0].problem


@pytest.mark.parametrize(("changed", "words"), [({"study": "2"}, "2 studies"), ({"patient": "P2"}, "2 patients")])
def test_studies_and_patients_side_by_side(tmp_path, changed, words):
    dicoms.save([*dicoms.images(T2), *dicoms.images(replace(FLAIR, **changed))], tmp_path / "case")
    refused(run("synth", tmp_path / "case", "-o", tmp_path / "o"), f"DICOM files of {words} lie side by side", "IM0")
    assert not (tmp_path / "o").exists()


def test_nifti_beside_dicom_is_taken(tmp_path, hospital):
    shutil.copytree(hospital, tmp_path / "case")
    volume = Study.read(hospital, resample=True).volumes["t1"]
    volume.save(tmp_path / "case" / "x_t1.nii.gz")
    assert passed_over(tmp_path / "case") == ["0001", "0002", "0003", "0004", "0005", "0006"]
    (found,) = find_studies(tmp_path / "case")
    assert found.source is None and list(found.files) == ["t1"]


def passed_over(folder: Path) -> list[str]:
    """Folders whose DICOM files were passed over for NIfTI files beside them."""
    return [path.name for path, reason in find_studies(folder).skipped if "DICOM files beside NIfTI" in reason]


def test_dicom_studies_among_others_are_told(tmp_path, hospital):
    for site in ("", "site"):
        save(tmp_path / site / "p1" / "p1_t1.nii.gz", image())
        shutil.copytree(hospital / "0003", tmp_path / site / "p2" / "dicom")
        (tmp_path / site / "p3").mkdir()
        (tmp_path / site / "p3" / "notes.txt").write_text("neither")
    assert len(find_studies(tmp_path)) == 2 and passed_over(tmp_path) == ["p2", "p2"]
    shutil.copy(hospital / "0003" / "IM00000", tmp_path / "site" / "p1")
    assert passed_over(tmp_path) == ["p2", "p1", "p2"]


def test_of_other_files_two_a_folder_are_opened(tmp_path, monkeypatch):
    """To look for DICOM: there may be millions."""
    save(tmp_path / "p1" / "p1_t1.nii.gz", image())
    for n in range(100):
        (tmp_path / "p1" / f"notes{n}.txt").write_text("neither")
    looked_at: list[Path] = []
    monkeypatch.setattr(find, "is_dicom", lambda path: looked_at.append(path))
    assert len(find_studies(tmp_path)) == 1 and len(looked_at) == 2


def test_frames_of_reference(tmp_path):
    other = replace(FLAIR, tags={**FLAIR.tags, "FrameOfReferenceUID": "1.2.3"})
    study = Study.read(dicoms.study(tmp_path / "case", T2, other))
    assert any("several frames of reference" in note for note in study.notes)


def test_multi_frame_images(tmp_path, brain_model):
    """One Enhanced MR image gives what one file a slice gives, and is a source of what is written."""
    (tmp_path / "new").mkdir()
    dicoms.multi_frame(T2).save_as(tmp_path / "new" / "IM1", enforce_file_format=True)
    one, two = (Study.read(f).reference for f in (tmp_path / "new", dicoms.study(tmp_path / "old", T2)))
    assert np.array_equal(one.data, two.data)
    np.testing.assert_allclose(one.affine, two.affine, rtol=0, atol=1e-5)
    assert run("synth", tmp_path / "new", "-o", tmp_path / "o", "--model", brain_model, "--target", "t1").exit_code == 0
    made = converted(tmp_path / "o" / "new_t1_dicom", tmp_path / "back")
    np.testing.assert_allclose(made.affine, one.affine, rtol=0, atol=1e-5)
    (item,) = pydicom.dcmread(tmp_path / "o" / "new_t1_dicom" / "0001.dcm").SourceImageSequence
    assert item.ReferencedSOPClassUID == pydicom.uid.EnhancedMRImageStorage


def test_a_stack_of_the_heart(tmp_path, heart_model):
    sax = Made("cine_sax", 1, tilted(), (24, 20, 12), (2, 2, 3), tags={"BodyPartExamined": "HEART"})
    dicoms.study(tmp_path / "heart", sax)
    options = ["-o", tmp_path / "o", "--model", heart_model, "--missing-slices", "5,6"]
    assert run("synth", tmp_path / "heart", *options).exit_code == 0
    made = nib.load(tmp_path / "o" / "heart.nii.gz")
    back = converted(tmp_path / "o" / "heart_dicom", tmp_path / "back")
    assert np.array_equal(made.affine, back.affine)
    np.testing.assert_array_equal(np.asarray(made.dataobj), np.asarray(back.dataobj))
    read = [pydicom.dcmread(path) for path in sorted((tmp_path / "o" / "heart_dicom").iterdir())]
    assert [one.SyntheticData for one in read] == ["YES" if k in (5, 6) else "NO" for k in range(12)]
    with pytest.raises(CopeditError, match="cannot be taken: synthetic"):  # though its first slice was there
        find_studies(shutil.copytree(tmp_path / "o" / "heart_dicom", tmp_path / "heart" / "made").parent, {"sax": "7"})
    assert read[0].BodyPartExamined == "HEART" and "Slices 5, 6 (from 0)" in read[0].DerivationDescription


def test_a_stack_whose_slices_are_not_the_scanners(tmp_path):
    """Cut along another axis than the coarsest: every image is in part synthetic, and it is said which slices are."""
    tags = {"BodyPartExamined": "HEART"}
    case = dicoms.study(tmp_path / "heart", Made("cine_sax", 1, tilted(), (6, 20, 24), (8, 2, 2), tags=tags))
    study = Study.read(case, missing_slices=[2, 3])
    study.with_synthetic({"sax": study.reference.data}).write(tmp_path / "o", model="m", record=RECORD)
    one = pydicom.dcmread(tmp_path / "o" / "heart_dicom" / "0001.dcm")
    assert one.DerivationDescription.startswith("Slices 2, 3 (from 0 along axis 0 of the NIfTI image) of the stack")
    assert one.SyntheticData == "YES"


def test_the_scale_of_a_stack_is_in_its_sidecar(tmp_path):
    """Its numbers are the file's own, which a source's rescale slope makes grey values."""
    scale = {"BodyPartExamined": "HEART", "RescaleSlope": 0.5, "RescaleIntercept": -3}
    sax = Made("cine_sax", 1, tilted(), (24, 20, 6), (2, 2, 8), tags=scale)
    study = Study.read(dicoms.study(tmp_path / "heart", sax), missing_slices=[3])
    (path,) = study.with_synthetic({"sax": study.reference.data}).write(tmp_path / "o", model="m", record=RECORD)
    told = json.loads((tmp_path / "o" / "heart.json").read_text())["dicom"]
    numbers = np.asarray(converted(tmp_path / "o" / "heart_dicom", tmp_path / "back").dataobj)
    assert (told["low"], told["step"]) == (-3, 0.5)
    np.testing.assert_array_equal(told["low"] + told["step"] * numbers, nib.load(path).get_fdata())


@pytest.mark.parametrize(
    "tags",
    [{"EchoNumbers": 2}, {"EchoNumbers": 1}, {"TriggerTime": 412.5, "Manufacturer": "Philips Medical Systems"}],
    ids=["second echo", "first echo", "stack"],
)
def test_one_echo_or_time_is_one_volume(tmp_path, tags):
    """dcm2niix adds its number to the name."""
    case = dicoms.study(tmp_path / "case", replace(T2, tags={**T2.tags, **tags}))
    assert Study.read(case).reference.data.shape == T2.shape


def test_the_task_chooses(tmp_path):
    case = dicoms.study(tmp_path / "case", T2, Made("short axis", 9))
    assert [list(study.files) for study in find_studies(case)] == [["t2"]]
    assert [list(study.files) for study in find_studies(case, task="cardiac")] == [["sax"]]
    for sax in ("9", "short axis"):
        (named,) = find_studies(case, {"sax": sax})
        assert named.task == "cardiac" and list(named.files) == ["sax"]
        assert [why for _, why in named.source.left_out] == ["the sax was asked for"]
    (several,) = find_studies(dicoms.study(tmp_path / "two", Made("SAX", 5), Made("short axis", 6)))
    assert "2 series may be the sax: 5 (SAX), 6 (short axis)" in several.problem
    (brain,) = find_studies(dicoms.study(tmp_path / "head", Made("SAX", 1), Made("T1", 2), Made("T2", 3)))
    assert brain.task == "brain" and list(brain.files) == ["t1", "t2"]
    with pytest.raises(CopeditError, match="give one or the other"):
        find_studies(case, {"sax": "9", "t2": "3"})
    with pytest.raises(CopeditError, match="a DICOM study of the other task than --task cardiac"):
        find_studies(dicoms.study(tmp_path / "brain", T2), task="cardiac")
    (unclear,) = find_studies(dicoms.study(tmp_path / "unclear", dicoms.DIFFUSION), task="brain")
    assert "no series could be matched" in unclear.problem


# ----------------------------------------------------------------------------------------------------------- out


@pytest.fixture(scope="module")
def outputs(hospital, brain_model, tmp_path_factory) -> Path:
    """What the command makes of the study."""
    out = tmp_path_factory.mktemp("made")
    result = run("synth", hospital, "-o", out, "--model", brain_model, "--resample")
    assert result.exit_code == 0, result.stderr
    assert "case: t1ce written as DICOM:" in result.stdout
    assert "t1 is series 2 (t1_mprage_sag_p2_iso), t2 is series 3" in result.stderr
    assert "left out: 1 (localizer)" in result.stderr
    return out


def test_round_trip(outputs, tmp_path):
    """Affine as it was, voxels within half a step of 16 bits."""
    made, back = nib.load(outputs / "case_t1ce.nii.gz"), converted(outputs / "case_t1ce_dicom", tmp_path / "back")
    scale = json.loads((outputs / "case_t1ce.json").read_text())["dicom"]
    assert np.array_equal(made.affine, back.affine)
    values = np.asarray(back.dataobj, np.float64)
    assert values.max() == 65535 and scale["step"] > 0
    worst = np.abs(values * scale["step"] + scale["low"] - made.get_fdata()).max()
    assert worst <= 0.501 * scale["step"]


@pytest.mark.parametrize("axes", [dicoms.AXIAL, tilted(dicoms.SAGITTAL, 11, -7), tilted(dicoms.CORONAL, -20, 30)])
def test_round_trip_of_any_directions_without_the_source(tmp_path, axes):
    """Places from the affine alone, as if the source had no such slices: float32 to text and back."""
    dicoms.study(tmp_path / "case", Made("T2", 3, axes, (33, 35, 12), (1.17, 1.17, 3.3)))
    (study,) = dicom_studies(tmp_path / "case")
    volume = Study.read(tmp_path / "case").volumes["t2"]
    shifted = volume.affine.copy()
    shifted[:3, 3] += 7
    data = np.random.default_rng(0).normal(100, 50, volume.data.shape).astype(np.float32)
    made = write_series(tmp_path / "out", study, Output("t1", data, shifted, "t2", "m", RECORD))
    back = converted(tmp_path / "out", tmp_path / "back")
    np.testing.assert_allclose(back.affine, shifted, rtol=0, atol=2e-5)
    values = np.asarray(back.dataobj, np.float64) * made["step"] + made["low"]
    np.testing.assert_allclose(values, data, rtol=0, atol=0.51 * made["step"])


def test_attributes(outputs, hospital):
    source = pydicom.dcmread(hospital / "0002" / "IM00000")
    paths = sorted((outputs / "case_t1ce_dicom").iterdir())
    read = [pydicom.dcmread(path) for path in paths]
    assert [path.name for path in paths[:2]] == ["0001.dcm", "0002.dcm"] and len(read) == 34
    assert len({one.SOPInstanceUID for one in read}) == 34 and len({one.SeriesInstanceUID for one in read}) == 1
    one = read[7]
    copied = "PatientName PatientID PatientBirthDate PatientSex StudyInstanceUID StudyDate StudyTime StudyID "
    copied += "FrameOfReferenceUID AccessionNumber ReferringPhysicianName BodyPartExamined PatientPosition"
    for keyword in copied.split():
        assert one[keyword].value == source[keyword].value
    assert one.SeriesInstanceUID != source.SeriesInstanceUID and one.SeriesNumber == 8
    assert list(one.ImageType) == ["DERIVED", "SECONDARY", "OTHER"] and one.SyntheticData == "YES"
    assert one.SOPClassUID == one.file_meta.MediaStorageSOPClassUID == source.SOPClassUID
    (equipment,) = one.ContributingEquipmentSequence
    (code,) = equipment.PurposeOfReferenceCodeSequence
    assert (code.CodeValue, code.CodingSchemeDesignator) == ("109100", "DCM") and equipment.SoftwareVersions
    instances = {item.ReferencedSOPInstanceUID for item in one.SourceImageSequence}
    assert len(instances) == 34 + 12 + 12 and source.SOPInstanceUID in instances
    assert "t1ce synthesised from t1, t2, flair" in one.DerivationDescription
    assert one.BitsAllocated == 16 and one.BurnedInAnnotation == "NO"
    for keyword in "RescaleSlope RescaleIntercept Laterality MagneticFieldStrength SeriesTime".split():
        assert keyword not in one
    assert not one.EchoTime and not one.RepetitionTime  # of the T1, and not true of this
    assert list(one.PixelSpacing) == list(source.PixelSpacing) and one.SliceThickness == 1.5


def written(folder: Path, **changed) -> pydicom.Dataset:
    """The first image of a T1 that was made of a T2 with these tags."""
    case = dicoms.study(folder / "case", replace(T2, tags={**T2.tags, **changed}))
    (study,) = dicom_studies(case)
    affine = Study.read(case).reference.affine
    write_series(folder / "o", study, Output("t1", np.zeros(T2.shape, np.float32), affine, "t2", "Müller's", RECORD))
    return pydicom.dcmread(folder / "o" / "0001.dcm")


@pytest.mark.parametrize(("thickness", "told"), [(3, 3), (None, 4)])
def test_slices_are_as_thick_as_the_sources(tmp_path, thickness, told):
    one = written(tmp_path, SliceThickness=thickness)
    assert one.SliceThickness == told and one.SpacingBetweenSlices == 4


def test_text_of_our_own_is_ascii(tmp_path):
    one = written(tmp_path, SpecificCharacterSet=None)
    assert "M?ller's" in one.SeriesDescription and "M?ller's" in one.DerivationDescription


def test_one_body_part_or_several(tmp_path):
    assert list(written(tmp_path, BodyPartExamined=["HEAD", "NECK"]).BodyPartExamined) == ["HEAD", "NECK"]


def test_who_is_responsible_for_an_animal(tmp_path):
    told = {"ResponsiblePerson": "Roe^Jane", "ResponsiblePersonRole": "OWNER", "ResponsibleOrganization": "Zoo"}
    told |= {"PatientBreedDescription": "Beagle", "AnatomicalOrientationType": "QUADRUPED"}
    one = written(tmp_path, **told)
    assert {keyword: one[keyword].value for keyword in told} == told


def test_other_outputs_do_not_change_a_series(tmp_path):
    """The same UIDs, the same content, whatever of our own lies beside it; another number, other UIDs."""
    first, case = written(tmp_path), tmp_path / "case"
    dicoms.save(dicoms.images(replace(T1, number=20, tags={"SyntheticData": "YES"})), case / "made")
    (study,) = dicom_studies(case)
    affine = Study.read(case).reference.affine
    output = Output("t1", np.zeros(T2.shape, np.float32), affine, "t2", "Müller's", RECORD)
    write_series(tmp_path / "o", study, output)
    assert pydicom.dcmread(tmp_path / "o" / "0001.dcm") == first
    dicoms.save(dicoms.images(dicoms.DIFFUSION), case / "0005")
    write_series(tmp_path / "o", dicom_studies(case)[0], output)
    other = pydicom.dcmread(tmp_path / "o" / "0001.dcm")
    assert other.SeriesNumber == first.SeriesNumber + 2 and other.SeriesInstanceUID != first.SeriesInstanceUID


def test_the_same_image_has_the_same_uids(outputs, hospital, brain_model, tmp_path):
    copied = shutil.copytree(hospital, tmp_path / "case")
    options = ["-o", tmp_path / "o", "--model", brain_model, "--resample"]
    assert run("synth", copied, *options).exit_code == 0
    one, two = (folder / "case_t1ce_dicom" / "0003.dcm" for folder in (outputs, tmp_path / "o"))
    assert one.read_bytes() == two.read_bytes()
    assert run("synth", copied, *options, "--seed", 1, "--overwrite").exit_code == 0
    other = pydicom.dcmread(two)
    assert other.SeriesInstanceUID != pydicom.dcmread(one).SeriesInstanceUID


@pytest.mark.parametrize(
    ("tags", "side"), [({"Laterality": "L"}, "L"), ({"ImageLaterality": "R"}, "R"), ({"ImageLaterality": "B"}, "")]
)
def test_paired_parts_have_a_side(tmp_path, tags, side):
    one = written(tmp_path, BodyPartExamined="KNEE", LossyImageCompression="01", **tags)
    assert one.Laterality == side and one.LossyImageCompression == "01"


def test_what_is_complete_is_kept(outputs, hospital, brain_model, tmp_path):
    out = shutil.copytree(outputs, tmp_path / "o")
    command = ["synth", hospital, "-o", out, "--model", brain_model, "--resample"]
    assert "kept" in run(*command).stdout and "changed" not in run(*command).stderr
    (out / "case_t1ce_dicom" / ".DS_Store").write_bytes(b"of macOS")
    assert complete_sidecar(out / "case_t1ce.nii.gz")
    (out / "case_t1ce_dicom" / "0005.dcm").unlink()
    assert not complete_sidecar(out / "case_t1ce.nii.gz")
    assert "t1ce written" in run(*command).stdout and files(out) == files(outputs)
    shutil.rmtree(out / "case_t1ce_dicom")
    (out / "case_t1ce_dicom").mkdir()
    (out / "case_t1ce_dicom" / "mine.txt").write_text("not a slice")
    assert "holds other files than a series" in run(*command).stderr.splitlines()[-1]
    assert (out / "case_t1ce_dicom" / "mine.txt").exists()


def test_a_series_goes_with_its_image(outputs, tmp_path):
    out = shutil.copytree(outputs, tmp_path / "o")
    image = out / "case_t1ce.nii.gz"
    withdraw(image, complete_sidecar(image))
    assert not any(name.startswith("case_t1ce") for name in files(out)) and not (out / "case_t1ce_dicom").exists()


def test_without_dicom_out(hospital, brain_model, tmp_path):
    command = ["synth", hospital, "-o", tmp_path / "o", "--model", brain_model, "--resample"]
    assert run(*command, "--no-dicom").exit_code == 0
    assert files(tmp_path / "o") == {"case_t1ce.nii.gz", "case_t1ce.json"}
    assert "kept without a DICOM series: t1ce; --overwrite makes it again" in run(*command).stderr
    assert run(*command, "--overwrite").exit_code == 0 and (tmp_path / "o" / "case_t1ce_dicom").is_dir()
    assert run(*command, "--overwrite", "--no-dicom").exit_code == 0  # a new image: the series of the old one goes
    assert files(tmp_path / "o") == {"case_t1ce.nii.gz", "case_t1ce.json"}


def test_outputs_are_no_inputs(hospital, brain_model, tmp_path):
    case = shutil.copytree(hospital, tmp_path / "case")
    command = ["synth", case, "-o", case / "made", "--model", brain_model, "--resample"]
    assert run(*command).exit_code == 0
    again = run(*command)
    assert "kept" in again.stdout and "t1ce synthetic" in again.stderr
    refused(run("synth", case / "made", "-o", tmp_path / "o"), "synthetic")


def test_values():
    numbers = np.array([[[0, 7, 4095]]])
    assert stored(numbers.astype(np.int16))[0].dtype == np.uint16 and stored(numbers)[1:] == (0, 1)
    assert stored(-numbers)[0].dtype == np.int16
    for data in (numbers * 0.37, numbers - 100.5, numbers * 1e-9, numbers * 0.0, numbers * 1e6):
        values, low, step = stored(data)
        assert values.dtype == np.uint16 and low == min(data.min(), 0)
        np.testing.assert_allclose(values * step + low, data, rtol=0, atol=0.51 * step)


def test_inspect(hospital, brain_model):
    result = run("inspect", hospital, "--model", brain_model, "--json")
    report = json.loads(result.stdout)
    assert report["studies"][0]["files"]["flair"] == "series 4 (t2_tirm_tra_dark-fluid)"
    assert f"{hospital}/series 5 (ep2d_diff_3scan_trace_p2)" in report["passed_over"]["diffusion"]


def test_a_study_of_which_nothing_is_understood(tmp_path, brain_model):
    for name, made in (("a", dicoms.DIFFUSION), ("b", T2)):
        dicoms.study(tmp_path / "cohort" / name, made, study=name.replace("a", "1").replace("b", "2"))
    words = "a: no series could be matched with a modality; there are 5 (ep2d_diff_3scan_trace_p2): diffusion"
    refused(run("inspect", tmp_path / "cohort" / "a", "--model", brain_model), words)
    report = json.loads(run("inspect", tmp_path / "cohort", "--model", brain_model, "--json").stdout)
    assert words in report["studies"][0]["findings"][0]["text"] and report["studies"][1]["files"]
    done = run("synth", tmp_path / "cohort", "-o", tmp_path / "o", "--model", brain_model, "--shard", "0/2")
    assert done.exit_code == 1 and words in done.stderr


def test_without_the_extra(hospital, tmp_path, monkeypatch):
    from copedit_rt.images.dicom import convert, headers

    monkeypatch.setattr(headers, "find_spec", lambda name: None)
    refused(run("synth", hospital, "-o", tmp_path / "o"), "pip install 'copedit[dicom]'")
    monkeypatch.undo()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    monkeypatch.setattr(convert, "find_spec", lambda name: None)
    monkeypatch.setattr(convert.shutil, "which", lambda name: None)
    refused(run("synth", hospital, "-o", tmp_path / "o"), "dcm2niix", "pip install 'copedit[dicom]'")


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="needs dciodvfy (Debian: dicom3tools)")
def test_dciodvfy(outputs):
    """No error; a dictionary from before 2023 does not know Synthetic Data."""
    for path in sorted((outputs / "case_t1ce_dicom").iterdir())[::11]:
        done = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True, timeout=60)
        errors = [line for line in (done.stderr + done.stdout).splitlines() if line.startswith("Error")]
        assert [line for line in errors if "(0x0008,0x001c)" not in line] == []


# ----------------------------------------------------------------------------------------------------------- zip


def zipped(folder: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                target.write(file, Path("export") / file.relative_to(folder))
        target.writestr("__MACOSX/export/._IM00001.dcm", b"litter")
    return path


def test_a_zip_gives_what_the_folder_gives(outputs, hospital, brain_model, tmp_path):
    path = zipped(hospital, tmp_path / "case.zip")
    result = run("synth", path, "-o", tmp_path / "o", "--model", brain_model, "--resample")
    assert result.exit_code == 0, result.stderr
    one, two = (folder / "case_t1ce_dicom" / "0003.dcm" for folder in (outputs, tmp_path / "o"))
    assert one.read_bytes() == two.read_bytes() and files(tmp_path / "o") == files(outputs)
    again = run("synth", path, "-o", tmp_path / "o", "--model", brain_model, "--resample")
    assert "kept" in again.stdout and "made otherwise" not in again.stderr
    assert Study.read(path, resample=True).name == "case"


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"../../evil": b"x"}, "no images found"),
        ({"/etc/evil": b"x"}, "no images found"),
        ({"a": b"x", "a/b": b"x"}, "two members of the zip"),
        ({"x" * 300: b"x"}, "too long"),
        ({"bomb": bytes(1 << 22)}, "holds more than 0.0 GiB, unpacked"),
        (b"no zip", "the zip is damaged"),
    ],
)
def test_zips_that_mean_harm(tmp_path, monkeypatch, members, words):
    monkeypatch.setattr(archive, "_SMALL", 1 << 20)
    path = tmp_path / "deep" / "down" / "case.zip"
    path.parent.mkdir(parents=True)
    if isinstance(members, bytes):
        path.write_bytes(members)
    else:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
            for name, content in members.items():
                target.writestr(name, content)
    refused(run("synth", path, "-o", tmp_path / "o"), words)
    assert not list(tmp_path.rglob("evil")) and not Path("/etc/evil").exists() and not (tmp_path / "o").exists()


# ------------------------------------------------------------------------------------------------- hostile files


def changed(folder: Path, change, every: int = 1) -> Path:
    """Some files of the FLAIR, changed."""
    dicoms.study(folder)
    for path in sorted((folder / "0004").iterdir())[::every]:
        one = pydicom.dcmread(path)
        if change(one) is not False:
            one.save_as(path)
    return folder


def without(keyword: str):
    return lambda one: delattr(one, keyword)


def cut(folder: Path, bytes_left: int) -> Path:
    path = sorted((dicoms.study(folder) / "0004").iterdir())[3]
    path.write_bytes(path.read_bytes()[:bytes_left])
    return folder


def lost(folder: Path, *numbers: int) -> Path:
    paths = sorted((dicoms.study(folder) / "0004").iterdir())
    for number in numbers:
        paths[number].unlink()
    return folder


def dangling(folder: Path) -> Path:
    (dicoms.study(folder) / "0004" / "IM00000").unlink()
    (folder / "0004" / "IM00000").symlink_to("nowhere")
    return folder


def put(keyword: str, value):
    return lambda one: setattr(one, keyword, value)


def raw(folder: Path, name: str, content: bytes) -> Path:
    (dicoms.study(folder) / name).write_bytes(content)
    return folder


HOSTILE = [
    (lambda f: cut(f, 2500), "IM00003 is a truncated DICOM file"),
    (lambda f: cut(f, 700), "IM00003 is a damaged DICOM file"),
    (lambda f: cut(f, 200), "IM00003 is a damaged DICOM file"),
    (dangling, "IM00000 is a file that cannot be read (No such file or directory); copy or export it again"),
    (lambda f: changed(f, without("Rows"), 5), "is a damaged DICOM file: it has no rows and columns, and 2 more"),
    (lambda f: changed(f, without("StudyInstanceUID"), 99), "a damaged DICOM file, or none"),
    (lambda f: changed(f, put("Rows", 60000), 99), "is a truncated DICOM file"),
    (lambda f: lost(f, 4), "series 4 (t2_tirm_tra_dark-fluid), the flair: its slices are unevenly spaced (4 to 8 mm)"),
    (lambda f: dicoms.study(f, T2, replace(FLAIR, shift=1.0)), "shifted against each other by 11 mm (a tilted gantry)"),
    (lambda f: changed(f, put("PixelSpacing", [2, 2]), 99), "its images differ in size"),
    (lambda f: raw(f, "junk.dcm", b"junk" * 100), "junk.dcm is a damaged DICOM file"),
    (lambda f: raw(f, "IM", bytes(128) + b"DICM" + b"\xff" * 3000), "IM is a damaged DICOM file"),
    (lambda f: raw(f, "IM", bytes(128) + b"DICM\x02\0\x10\0UI\x16\x001.2.840.10008.1.2.1.99"), "deflated"),
]  # fmt: skip


@pytest.mark.parametrize(("build", "words"), HOSTILE, ids=[words[:40] for _, words in HOSTILE])
def test_hostile_files_are_one_sentence(tmp_path, build, words):
    case = build(tmp_path / "case")
    refused(run("synth", case, "-o", tmp_path / "o", "--resample"), words)
    assert not (tmp_path / "o").exists()


def test_bytes_changed_at_random(tmp_path):
    """A volume or one sentence, whatever the files are."""
    small = {"shape": (16, 16, 4), "size": (4, 4, 12)}
    case = dicoms.study(tmp_path / "case", replace(T2, **small), replace(FLAIR, **small))
    paths, draw, outcomes = sorted(case.rglob("IM*")), np.random.default_rng(0), set()
    for _ in range(60):
        path = paths[draw.integers(len(paths))]
        content = path.read_bytes()
        at = draw.integers(132, len(content) - 512)
        new = [bytes(16), b"\xff\xff\xff\xff", draw.bytes(3), b""][draw.integers(4)]
        path.write_bytes(content[:at] + new + (content[at + len(new) :] if new else b""))
        try:
            outcomes |= {len(Study.read(case).volumes)}
        except CopeditError as error:
            assert str(tmp_path / "scratch") not in str(error)
            outcomes |= {"refused"}
        path.write_bytes(content)
    assert {2, "refused"} <= outcomes


def test_missing_tags_that_do_not_matter(tmp_path):
    for keyword in "SeriesNumber EchoTime ProtocolName FrameOfReferenceUID PatientID InstanceNumber".split():
        case = changed(tmp_path / keyword, without(keyword))
        found = find_studies(case)[0]
        assert not found.problem and set(found.files) == {"t1", "t2", "flair"}, keyword
    found = find_studies(changed(tmp_path / "position", without("ImagePositionPatient")))[0]
    assert set(found.files) == {"t1", "t2"} and any("no position" in why for _, why in found.source.left_out)


def test_text_of_any_kind(tmp_path):
    """A description with what no terminal or file name should hold; invalid values in what is copied."""
    odd = replace(T2, description="T2 \x1b[31m../../x", tags={**T2.tags, "PatientAge": "old", "StudyID": "x" * 40})
    with pydicom.config.disable_value_validation():
        case = dicoms.study(tmp_path / "case", odd)
    (found,) = find_studies(case)
    assert found.files["t2"].parent == case and "\x1b" not in found.files["t2"].name
    affine = Study.read(case).reference.affine
    output = Output("t1", np.zeros(T2.shape, np.float32), affine, "t2", "m", RECORD)
    write_series(tmp_path / "o", found.source, output)
    with pydicom.config.disable_value_validation():
        assert pydicom.dcmread(tmp_path / "o" / "0001.dcm").PatientAge == "old"


@pytest.mark.parametrize(
    ("charset", "name"),
    [
        ("ISO_IR 100", "Müller^Jörg"),
        ("ISO_IR 192", "Łoś^山田"),
        (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎=やまだ^たろう"),
        (None, "Roe^R"),
    ],
)
def test_names_in_any_script(tmp_path, charset, name):
    tags = {"SpecificCharacterSet": charset, "PatientName": name, "StudyDescription": name.partition("=")[0]}
    case = dicoms.study(tmp_path / "case", replace(T2, tags=tags))
    (found,) = find_studies(case)
    data, affine = np.zeros(T2.shape, np.float32), Study.read(case).reference.affine
    write_series(tmp_path / "o", found.source, Output("t1", data, affine, "t2", "m", RECORD))
    one = pydicom.dcmread(tmp_path / "o" / "0002.dcm")
    assert one.PatientName == name and one.StudyDescription == tags["StudyDescription"]


@pytest.mark.parametrize(
    ("charset", "name"),
    [("ISO_IR 192", "Müller^Jörg ".encode("latin-1")), ("ISO_IR 13", "山田^太郎 ".encode("shift-jis"))],
)
def test_bytes_of_another_script_than_is_said(tmp_path, charset, name):
    """They are repeated."""
    case = dicoms.study(tmp_path / "case", replace(T2, tags={**T2.tags, "SpecificCharacterSet": charset}))
    keywords = ("PatientName", "PatientID", "StudyDescription")
    for path in case.rglob("IM*"):
        one = pydicom.dcmread(path)
        for keyword in keywords:
            tag, vr = pydicom.tag.Tag(keyword), pydicom.datadict.dictionary_VR(keyword)
            one[tag] = pydicom.dataelem.RawDataElement(tag, vr, len(name), name, 0, False, True)
        one.save_as(path)
    (found,) = find_studies(case)
    data, affine = np.zeros(T2.shape, np.float32), Study.read(case).reference.affine
    write_series(tmp_path / "o", found.source, Output("t1", data, affine, "t2", "m", RECORD))
    one, source = pydicom.dcmread(tmp_path / "o" / "0002.dcm"), pydicom.dcmread(path)
    assert [one.get_item(k).value for k in keywords] == [source.get_item(k).value for k in keywords]
    assert one.get_item("PatientID").value == name


def test_duplicates_are_one(tmp_path):
    case = dicoms.study(tmp_path / "case")
    shutil.copytree(case / "0004", case / "again")
    (found,) = find_studies(case)
    assert found.source.duplicates == 12 and not found.problem and len(found.inputs()["flair"]) == 12


def run_length(one) -> None:
    one.compress(pydicom.uid.RLELossless, generate_instance_uid=False)


def jpeg_2000(one) -> None:
    packed = io.BytesIO()
    pixels = PIL.Image.fromarray(one.pixel_array.astype(np.uint16))
    pixels.save(packed, "JPEG2000", no_jp2=True, irreversible=False, num_resolutions=3)
    one.PixelData, one.BitsStored, one.HighBit = pydicom.encaps.encapsulate([packed.getvalue()]), 16, 15
    one["PixelData"].VR = "OB"
    one.file_meta.TransferSyntaxUID = pydicom.uid.JPEG2000Lossless


@pytest.mark.parametrize("compress", [run_length, jpeg_2000])
def test_compressed_files(tmp_path, compress):
    """The same voxels as of files that are not compressed, from what pydicom and Pillow can write without loss."""
    if compress is jpeg_2000 and not PIL.features.check("jpg_2000"):
        pytest.skip("needs Pillow with JPEG 2000")
    plain = Study.read(dicoms.study(tmp_path / "plain", T2)).volumes["t2"]
    case = dicoms.study(tmp_path / "case", T2)
    for path in case.rglob("IM*"):
        one = pydicom.dcmread(path)
        compress(one)
        one.save_as(path)
    packed = Study.read(case).volumes["t2"]
    assert np.array_equal(packed.data, plain.data) and np.array_equal(packed.affine, plain.affine)


def test_compressed_files_that_are_none(tmp_path):
    """Said to be JPEG 2000, and nothing but noise."""
    case = dicoms.study(tmp_path / "case", T2)
    for path in case.rglob("IM*"):
        one = pydicom.dcmread(path)
        one.PixelData = pydicom.encaps.encapsulate([np.random.default_rng(0).bytes(500)])
        one["PixelData"].VR = "OB"
        one.file_meta.TransferSyntaxUID = pydicom.uid.JPEG2000Lossless
        one.save_as(path)
    result = run("synth", case, "-o", tmp_path / "o")
    sentence = result.stderr.splitlines()[-1]
    assert result.exit_code == 1 and "series 3 (t2_tse_tra_320_p2): dcm2niix makes no image of it (transfer" in sentence
    assert "JPEG 2000" in sentence and "scratch" not in sentence and not (tmp_path / "o").exists()


def test_dcm2niix_is_limited(tmp_path, hospital, monkeypatch):
    """Its time, its memory, and what it says: none of its paths is told."""
    from copedit_rt.images.dicom import convert

    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setattr(convert, "program", lambda: str(slow))
    monkeypatch.setattr(convert, "SECONDS", 0.2)
    with pytest.raises(CopeditError, match=r"was not done after 0\.2 s"):
        Study.read(hospital)
    slow.write_text('#!/bin/sh\necho "Error: cannot do $9"\nexit 1\n')
    with pytest.raises(CopeditError, match=r"makes no image of it, Error: cannot do"):
        Study.read(hospital)
    slow.write_text("#!/bin/sh\nkill -11 $$\n")
    with pytest.raises(CopeditError, match="crashed on it"):
        Study.read(hospital)
    slow.write_text("#!/bin/sh\nulimit -v\nulimit -f\nexit 1\n")
    monkeypatch.setattr(convert, "SECONDS", 20)
    with pytest.raises(CopeditError, match="makes no image"):
        Study.read(hospital)


def test_no_value_is_told_in_warnings(tmp_path, recwarn):
    case = dicoms.study(tmp_path / "case", T2)
    for path in case.rglob("IM*"):
        content = path.read_bytes()
        path.write_bytes(content.replace(b"19700101", b"SECRET--"))
    Study.read(case)
    assert not [w for w in recwarn if "SECRET" in str(w.message)]
