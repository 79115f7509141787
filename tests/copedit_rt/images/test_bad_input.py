"""Bad input: one clear sentence that names the file or value and what to do, and nothing is written."""

import errno
import gzip
import os
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from commands import patch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from copedit_rt.config import ModelConfig
from copedit_rt.errors import CopeditError
from copedit_rt.images import nifti
from copedit_rt.images.find import find_studies
from copedit_rt.images.nifti import Volume, read_volume
from copedit_rt.images.prepare import prepare
from copedit_rt.images.study import Study

DIMS, DATATYPE, PIXDIM, CODES, SROWS, MAGIC = 40, 70, 76, 252, 280, 344  # offsets in a NIfTI-1 header
BRAIN, HEART = ModelConfig.preset("demo-brain"), ModelConfig.preset("demo-cardiac")


def image(shape=(8, 9, 6)):
    return np.random.default_rng(0).uniform(1, 200, shape).astype(np.float32)


def save(path, data=None, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(
        nib.Nifti1Image(image() if data is None else data, np.diag([2, 2, 5, 1.0]) if affine is None else affine),
        path,
    )
    return path


def refuses(sentence, call, *args, **kwargs):
    """The call ends in a CopeditError that matches, in one sentence on one line."""
    with pytest.raises(CopeditError, match=sentence) as caught:
        call(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text
    assert not re.search(r"[a-z]\. [A-Z]", text), "more than one sentence"
    assert "Error" not in text, "a Python class name means nothing to the user"
    assert "np." not in text
    return text


# ---- files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [11, 200, 0.5, -4])
def test_truncated_gzip(tmp_path, keep):
    path = save(tmp_path / "A_t1.nii.gz")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    refuses("A_t1.nii.gz is (a )?truncated .*copy or download it again", Study.read, tmp_path)


def test_damaged_gzip(tmp_path):
    path = save(tmp_path / "A_t1.nii.gz")
    content = bytearray(path.read_bytes())
    content[-6] ^= 0xFF  # the checksum
    path.write_bytes(content)
    refuses("A_t1.nii.gz is a truncated or damaged gzip file", Study.read, tmp_path)


def test_truncated_without_compression(tmp_path):
    path = save(tmp_path / "A_t1.nii")
    path.write_bytes(path.read_bytes()[:-100])
    refuses(
        "A_t1.nii is truncated: 2080 bytes are promised, 1980 are there; copy or download it again",
        Study.read,
        tmp_path,
    )
    path.write_bytes(path.read_bytes()[:300])
    refuses("A_t1.nii is truncated: it ends within its header", Study.read, tmp_path)


def test_compressed_content_shorter_than_promised(tmp_path):
    content = save(tmp_path / "A_t1.nii").read_bytes()
    (tmp_path / "A_t1.nii").unlink()
    (tmp_path / "A_t1.nii.gz").write_bytes(gzip.compress(content[:-100], mtime=0))
    refuses("A_t1.nii.gz is truncated", Study.read, tmp_path)


@pytest.mark.parametrize("content", [b"hello", b"DICM" * 200, gzip.compress(b"\0" * 1000, mtime=0)])
def test_not_nifti(tmp_path, content):
    (tmp_path / "A_t1.nii.gz").write_bytes(content)
    refuses("A_t1.nii.gz is not a NIfTI file; convert it", Study.read, tmp_path)


@pytest.mark.parametrize("content", [b"", gzip.compress(b"", mtime=0)])
def test_empty_file(tmp_path, content):
    (tmp_path / "A_t1.nii.gz").write_bytes(content)
    refuses("A_t1.nii.gz is an empty file", Study.read, tmp_path)


def test_another_file_type(tmp_path):
    (tmp_path / "A.dcm").write_bytes(b"DICM")
    refuses(r"A.dcm is not a NIfTI file .* give the whole folder of DICOM files", find_studies, tmp_path / "A.dcm")
    refuses(r"A.dcm is a damaged DICOM file|pip install 'copedit\[dicom\]'", find_studies, tmp_path)
    (tmp_path / "A.dcm").rename(tmp_path / "A.txt")
    refuses("no images found; files must end in .nii or .nii.gz", find_studies, tmp_path)


def test_header_of_a_pair(tmp_path):
    path = patch(save(tmp_path / "A_t1.nii"), MAGIC, "4s", b"ni1\0")
    refuses("A_t1.nii is the header of a .hdr/.img pair; convert", Study.read, path)


def test_not_there(tmp_path):
    refuses("nowhere does not exist", find_studies, tmp_path / "nowhere")
    refuses("A.nii does not exist", find_studies, (), {"t1": tmp_path / "A.nii"})


def test_broken_link(tmp_path):
    """What is there is not missing: the study is refused, of a cohort it alone."""
    save(tmp_path / "A_t2.nii.gz")
    save(tmp_path / "B_t2.nii.gz")
    (tmp_path / "A_t1.nii.gz").symlink_to(tmp_path / "gone")
    one, other = find_studies(tmp_path)
    refuses("cannot read .*A_t1.nii.gz: it is a broken link", Study.read, one)
    assert list(Study.read(other).volumes) == ["t2"]


def subjects(root: Path, described: bool) -> None:
    """Two of them, named as BIDS has it, as a data set or not."""
    for name in ("sub-01", "sub-02"):
        save(root / name / "anat" / f"{name}_T1w.nii.gz")
    if described:
        (root / "dataset_description.json").write_text('{"BIDSVersion": "1.8.0"}')


@pytest.mark.parametrize("described", [False, True])
@pytest.mark.parametrize("name", ["sub-02", "anat", "meg"])
def test_a_folder_that_cannot_be_read_is_not_passed_over(tmp_path, monkeypatch, described, name):
    """But where BIDS says that it holds no anatomical image."""
    subjects(tmp_path, described)
    (tmp_path / "sub-01" / "meg").mkdir()
    scan = os.scandir

    def denied(path):
        if Path(path).name == name:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", denied)
    if described and name == "meg":
        assert len(find_studies(tmp_path)) == 2
    else:
        refuses(f"cannot read .*{name}: Permission denied; .* make it readable", find_studies, tmp_path)


@pytest.mark.parametrize("described", [False, True])
@pytest.mark.parametrize("name", ["sub-03", "sub-03.04", "sub-01/ses-2", "sub-01/ses-1/anat"])
def test_a_broken_link_to_a_folder_is_not_passed_over(tmp_path, described, name):
    subjects(tmp_path, described)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    save(tmp_path / "sub-01" / "ses-0" / "anat" / "sub-01_ses-0_T1w.nii.gz")
    if not described:
        save(tmp_path / "sub-01" / "ses-1" / "sub-01_ses-1_T1w.nii.gz")
    (tmp_path / name).symlink_to("gone")
    refuses(f"cannot read .*{name}: No such file or directory; .* make it readable", find_studies, tmp_path)


def test_broken_links_to_what_is_no_study_do_no_harm(tmp_path):
    subjects(tmp_path, described=False)
    count = len(find_studies(tmp_path))
    for name in ("derivatives", "notes.txt"):
        (tmp_path / name).symlink_to("gone")
    found = find_studies(tmp_path)
    assert len(found) == count and not found.skipped


def test_links_to_folders_are_followed_and_a_folder_is_taken_once(tmp_path):
    """Also where one leads back to where it lies."""
    for name in ("1", "2"):
        there = tmp_path / "elsewhere" / name
        there.mkdir(parents=True)
        save(there / f"{name}_t1.nii.gz")
        (there / "back").symlink_to(tmp_path / "elsewhere")
    links = tmp_path / "links"
    links.mkdir()
    (links / "1").symlink_to(tmp_path / "elsewhere" / "1")
    assert [study.name for study in find_studies(links)] == ["1", "2"]
    (links / "again").symlink_to(tmp_path / "elsewhere")
    assert sorted(study.name for study in find_studies(links)) == ["1", "2"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read every file")
def test_unreadable(tmp_path):
    path = save(tmp_path / "A_t1.nii.gz")
    path.chmod(0)
    refuses("cannot read .*A_t1.nii.gz: Permission denied", Study.read, path)


# ---- what the header promises ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        ((8, 9), "is a 2-D image"),
        ((8, 9, 1), "is a 2-D image"),
        ((8, 1, 9), "is a 2-D image"),
        ((8, 9, 6, 3), "holds 3 volumes .* split it"),
        ((8, 9, 6, 1, 3), "holds 3 volumes"),
        ((8, 0, 6), "holds no voxels"),
    ],
)
def test_dimensions(tmp_path, shape, sentence):
    save(tmp_path / "A_t1.nii.gz", np.ones(shape, np.float32))
    refuses(f"A_t1.nii.gz {sentence}", Study.read, tmp_path)


@pytest.mark.parametrize("dtype", [np.complex64, [("R", "u1"), ("G", "u1"), ("B", "u1")]])
def test_data_type(tmp_path, dtype):
    save(tmp_path / "A_t1.nii.gz", np.zeros((8, 9, 6), dtype))
    refuses("A_t1.nii.gz holds .* voxels; convert it", Study.read, tmp_path)


def test_unknown_data_type(tmp_path):
    path = patch(save(tmp_path / "A_t1.nii"), DATATYPE, "<h", 999)
    refuses("A_t1.nii.* header is damaged", Study.read, path)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        ((32000, 32000, 32000), "header promises {} voxels, which take .* GiB to read and fill in, more than"),
        ((300, 300, 100), "truncated or its header is damaged: it promises {} voxels"),
    ],
)
def test_more_voxels_than_memory_or_the_file_can_hold(tmp_path, shape, sentence, compressed):
    path = patch(save(tmp_path / "A_t1.nii"), DIMS, "<4h", 3, *shape)
    if compressed:
        content = path.read_bytes()
        path.unlink()
        (tmp_path / "A_t1.nii.gz").write_bytes(gzip.compress(content, mtime=0))
    refuses(sentence.format("{} x {} x {}".format(*shape)), Study.read, tmp_path)


def test_memory_is_asked_for_before_anything_is_read(tmp_path, monkeypatch):
    path = save(tmp_path / "A_t1.nii.gz")
    needed = 352 + 8 * 9 * 6 * (4 + 4 + nifti.WORKING) + path.stat().st_size
    monkeypatch.setattr(nifti, "available_memory", lambda: needed)
    Study.read(tmp_path)
    monkeypatch.setattr(nifti, "available_memory", lambda: needed - 1)
    monkeypatch.setattr(nifti, "_read_content", None)
    refuses("more than the .* GiB of memory available", Study.read, tmp_path)


def test_some_memory_is_available():
    assert 1 << 20 < nifti.available_memory()


@pytest.mark.parametrize(
    ("code", "rows"),
    [
        (1, np.zeros((3, 4))),
        (1, [[1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0]]),
        (1, [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, np.nan, 0]]),
        (1, [[1, 0, 0, 0], [0, 1, 0, np.inf], [0, 0, 1, 0]]),
        (1, [[1, 0, 1, 0], [0, 1, 1, 0], [0, 0, 1e-9, 0]]),
        (0, None),  # no transform, and voxels of no size
    ],
)
def test_affine(tmp_path, code, rows):
    path = patch(save(tmp_path / "A_t1.nii"), CODES, "<2h", 0, code)
    if rows is None:
        patch(path, PIXDIM, "<4f", 1, 0, 0, 0)
    else:
        patch(path, SROWS, "<12f", *np.ravel(rows))
    refuses("A_t1.nii: its affine is singular or not finite.*correct sform", Study.read, tmp_path)


def test_impossible_rotation(tmp_path):
    path = patch(save(tmp_path / "A_t1.nii"), CODES, "<2h3f", 1, 0, 5, 5, 5)
    refuses("A_t1.nii: its header is damaged", Study.read, path)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.integers(0, 351), st.integers(0, 255), min_size=1, max_size=12))
@pytest.mark.filterwarnings("ignore")
def test_no_header_ends_in_a_traceback(tmp_path, changes):
    content = bytearray(nib.Nifti1Image(image(), np.diag([2, 2, 5, 1.0])).to_bytes())
    for offset, value in changes.items():
        content[offset] = value
    path = tmp_path / "A_t1.nii"
    path.write_bytes(content)
    try:
        volume = read_volume(path)
    except CopeditError as error:
        assert "A_t1.nii" in str(error)
    else:
        assert volume.data.ndim == 3
        assert np.isfinite(volume.affine).all()


# ---- what the voxels show ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, 7])
def test_constant_volume(tmp_path, value):
    save(tmp_path / "A_t1.nii.gz", np.full((8, 9, 6), value, np.float32))
    refuses(f"A_t1.nii.gz: every voxel of t1 is {value}, so it shows nothing; leave it out", Study.read, tmp_path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_voxels_that_are_not_finite(tmp_path, value):
    data = image()
    data[2, 3, :2] = value
    save(tmp_path / "A_t1.nii.gz", data)
    refuses("A_t1.nii.gz: 2 voxels of t1 are NaN or infinite; set them to 0", Study.read, tmp_path)
    save(tmp_path / "heart.nii.gz", data)
    refuses("heart.nii.gz: slice 0 holds NaN or infinite voxels", Study.read, tmp_path / "heart.nii.gz")


def test_values_beyond_float32(tmp_path):
    data = image().astype(np.float64)
    data[0, 0, 0] = 1e300
    save(tmp_path / "A_t1.nii.gz", data)
    refuses("1 voxels of t1 are NaN or infinite", Study.read, tmp_path)


def test_hardly_anything_in_the_volume(tmp_path):
    data = np.zeros((30, 30, 30), np.float32)
    data[0, 0, :5] = 1
    save(tmp_path / "A_t1.nii.gz", data)
    refuses(r"A: t1: at least 99 % of the voxels have one value \(0\)", prepare, Study.read(tmp_path), BRAIN)


@pytest.mark.parametrize("value", [0, 3, np.nan])
def test_stack_of_blank_slices(tmp_path, value):
    path = save(tmp_path / "heart.nii.gz", np.full((8, 9, 6), value, np.float32))
    refuses("heart.nii.gz: all 6 slices are blank", Study.read, path)


@pytest.mark.parametrize("index", [-1, 6])
def test_slice_that_is_not_there(tmp_path, index):
    path = save(tmp_path / "heart.nii.gz")
    refuses(
        f"heart.nii.gz has no slice {index}; it has 6 slices, counted from 0 to 5",
        Study.read,
        path,
        missing_slices=[2, index],
    )


@pytest.mark.parametrize("missing", [[1.5], 3, ["2"]])
def test_slices_that_are_no_whole_numbers(tmp_path, missing):
    path = save(tmp_path / "heart.nii.gz")
    refuses("missing slices .*: give whole numbers", Study.read, path, missing_slices=missing)


def test_more_slices_than_any_heart_has(tmp_path):
    path = save(tmp_path / "heart.nii.gz", np.zeros((40, 40, 1001), np.int8), np.diag([0.5, 0.5, 0.6, 1.0]))
    refuses("heart.nii.gz has 1001 slices along its axis 2, more than the 1000 of any heart", Study.read, path)


def test_every_slice_named_as_missing(tmp_path):
    path = save(tmp_path / "heart.nii.gz")
    refuses("all 6 slices are blank or named as missing", Study.read, path, missing_slices=range(6))


def test_slices_of_a_brain(tmp_path):
    save(tmp_path / "A_t1.nii.gz")
    refuses("A is a brain study; missing slices", Study.read, tmp_path, missing_slices=[1])
    refuses("A is a brain study; missing slices", Study.read, tmp_path, missing_slices=np.array([0]))


# ---- which files -------------------------------------------------------------------------------------------


def test_two_files_for_one_modality(tmp_path):
    save(tmp_path / "sub-1_run-1_T1w.nii.gz")
    save(tmp_path / "sub-1_run-2_T1w.nii.gz")
    (files,) = find_studies(tmp_path)
    refuses("two files for t1: .*run-1_T1w.nii.gz and .*run-2_T1w.nii.gz; choose with", Study.read, files)
    one, two = tmp_path.iterdir()
    refuses("two files for t1ce", find_studies, (), {"t1c": one, "T1Gd": two})
    refuses("one file was given for several modalities", find_studies, (), {"t1": one, "t2": one})


def test_compressed_and_not(tmp_path):
    for ending in (".nii", ".nii.gz"):
        save(tmp_path / f"A_t1{ending}")
        save(tmp_path / "h" / f"heart{ending}")
    for files in find_studies(tmp_path):
        refuses("two files for t1|same output", Study.read, files)


def test_unknown_modality(tmp_path):
    path = save(tmp_path / "A_swi.nii.gz")
    known = "known modalities are t1, t1ce, t2, flair, pd"
    refuses(f"unknown modality 'swi'; {known}", find_studies, (), {"swi": path})
    refuses(f"no images found .*A_swi.nii.gz: unknown modality 'swi'; {known}", find_studies, tmp_path)
    save(tmp_path / "A_t1_odd.nii.gz")
    refuses("A_t1_odd.nii.gz: its name holds t1 and words that may change .* --file t1=FILE", find_studies, tmp_path)


def test_only_labels(tmp_path):
    save(tmp_path / "A_seg.nii.gz")
    refuses("no images found .*A_seg.nii.gz: a label map or mask by its name", find_studies, tmp_path)
    save(tmp_path / "B_seg.nii.gz")
    save(tmp_path / "C_swi.nii.gz")
    refuses(r"over were C_swi.nii.gz: unknown .*; A_seg.nii.gz: a label [^;]*; \.\.\.$", find_studies, tmp_path)


def test_nothing_given(tmp_path):
    refuses("no input was given", find_studies, [])
    path = save(tmp_path / "A_t1.nii.gz")
    refuses("not both", find_studies, [path], {"t1": path})
    other = save(tmp_path / "other.nii.gz")
    refuses("a cardiac stack beside brain", find_studies, (), {"sax": other, "t1": path})


def test_several_studies_where_one_is_read(tmp_path):
    for name in ("A_t1", "B_t1"):
        save(tmp_path / f"{name}.nii.gz")
    refuses("holds 2 studies .A, B.; give one", Study.read, tmp_path)


def test_different_grids(tmp_path):
    save(tmp_path / "A_t1.nii.gz")
    save(tmp_path / "A_t2.nii.gz", image((8, 9, 7)), np.diag([2, 2, 4, 1.0]))
    text = refuses("A: the files are on different grids", Study.read, tmp_path)
    for part in (
        "t1 (",
        "A_t1.nii.gz): 8 x 9 x 6 voxels of 2 x 2 x 5 mm",
        "A_t2.nii.gz): 8 x 9 x 7 voxels of 2 x 2 x 4 mm",
        "--resample",
    ):
        assert part in text


def test_shifted_grids(tmp_path):
    save(tmp_path / "A_t1.nii.gz")
    shifted = np.diag([2, 2, 5, 1.0])
    shifted[2, 3] = 3
    save(tmp_path / "A_t2.nii.gz", affine=shifted)
    refuses("on different grids.*3 mm apart; use --resample", Study.read, tmp_path)


@pytest.mark.parametrize("standardised", [False, True])
def test_grids_that_do_not_overlap(tmp_path, standardised):
    save(tmp_path / "A_t1.nii.gz")
    far = np.diag([2, 2, 5, 1.0])
    far[0, 3] = 500
    data = np.random.default_rng(0).normal(size=(8, 9, 6)) if standardised else None
    save(tmp_path / "A_t2.nii.gz", data, affine=far)
    refuses("A_t2.nii.gz. does not overlap with t1", Study.read, tmp_path, resample=True)


# ---- study and model ---------------------------------------------------------------------------------------


def volume(shape=(8, 9, 16)):
    return Volume.from_array(image(shape), np.diag([2, 2, 5, 1.0]))


@pytest.mark.parametrize(
    ("shape", "affine", "sentence"),
    [
        ((8, 9), np.eye(4), "an image in memory is a 2-D image"),
        ((8, 9, 6, 2), np.eye(4), "an image in memory holds 2 volumes"),
        ((8, 9, 6), np.zeros((4, 4)), "an image in memory: its affine is singular"),
        ((8, 9, 6), np.full((4, 4), np.nan), "an image in memory: its affine is singular or not finite"),
        ((8, 9, 6), np.eye(4)[:3], "an image in memory: its affine has the shape .3, 4."),
    ],
)
def test_arrays_that_are_no_volume(shape, affine, sentence):
    refuses(sentence, Volume.from_array, np.ones(shape), affine)


def test_nothing_missing():
    study = Study("A", "brain", {m: volume() for m in BRAIN.elements})
    refuses("no element is missing: t1, t1ce, t2, flair are all there", prepare, study, BRAIN)
    assert prepare(study, BRAIN, allow_complete=True).observed.all()
    study = Study("B", "cardiac", {"sax": volume()})
    refuses("no element is missing: all 16 slices hold an image; .*--missing-slices", prepare, study, HEART)
    assert prepare(study, HEART, allow_complete=True).observed.all()


def test_everything_missing():
    refuses("A: every element is missing; at least one", prepare, Study("A", "brain", {}), BRAIN)
    refuses("B: every element is missing; at least one", prepare, Study("B", "cardiac", {}), HEART)
    study = Study("B", "cardiac", {"sax": volume()}, missing_slices=tuple(range(16)))
    refuses("B: every slice is missing", prepare, study, HEART)


def test_element_that_the_model_does_not_know():
    study = Study("A", "brain", {"t1": volume(), "pd": volume()})
    refuses(
        "A: the model demo-brain does not know pd, only t1, t1ce, t2, flair; leave .*--model",
        prepare,
        study,
        BRAIN,
    )


def test_model_for_another_task():
    refuses(
        "B is a cardiac study but the model demo-brain is for brain MRI; choose a cardiac model with --model",
        prepare,
        Study("B", "cardiac", {"sax": volume()}),
        BRAIN,
    )
    refuses("A is a brain study", prepare, Study("A", "brain", {"t1": volume()}), HEART)


def test_volumes_in_memory_on_different_grids():
    study = Study("A", "brain", {"t1": volume(), "t2": volume((8, 9, 15))})
    refuses("A: t2 is on a grid of its own; resample", prepare, study, BRAIN)


# ---- writing -----------------------------------------------------------------------------------------------


def test_output_folder_that_is_a_file(tmp_path):
    study = Study("A", "brain", {"t1": volume()}).with_synthetic({"t2": image((8, 9, 16))})
    (tmp_path / "out").write_text("")
    refuses("cannot write .*out.*: .*choose another output folder with -o", study.write, tmp_path / "out", model="m")
    assert (tmp_path / "out").read_text() == ""


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_output_folder_without_permission(tmp_path):
    study = Study("A", "brain", {"t1": volume()}).with_synthetic({"t2": image((8, 9, 16))})
    tmp_path.chmod(0o500)
    refuses("cannot write .*Permission denied; choose another output folder", study.write, tmp_path, model="m")
    assert not list(tmp_path.iterdir())
