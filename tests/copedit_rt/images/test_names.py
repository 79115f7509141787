"""What names say, and that nothing is guessed: neither a modality, nor a heart, nor that something is missing."""

import json
import os
from pathlib import Path
from unicodedata import normalize

import pytest

from copedit_rt.errors import CopeditError
from copedit_rt.images.find import find_studies
from copedit_rt.images.names import MODALITIES, STYLES, TABLE, is_heart, modality, parse
from copedit_rt.images.study import Study


def touch(root, *files):
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return root


def found(root, **options):
    return {study.name: (study.task, list(study.files)) for study in find_studies(root, **options)}


def element(stem):
    name = parse(Path(f"{stem}.nii.gz"))
    return name.element if name else None


# ---- modalities --------------------------------------------------------------------------------------------

# Names that BET, dcm2niix, HCP, fsl_anat, nnU-Net's authors and radiologists give.
UNDERSTOOD = {
    "t1": [
        "A_t1_brain", "T1w_acpc_dc_restore", "T1w_acpc_dc_restore_brain", "100307_3T_T1w_MPR1", "s1_T1_pre",
        "scan_t1_mprage_sag_p2_iso_20200304101112_4", "T1_biascorr_brain", "s_3D_T1", "sub-01_acq-mprage_run-2_T1w",
        "A_T1_pre_contrast", "A_sag_t1", "A_T1W_3D_TFE_401", "PD_01_T1", "A_t1_n4", "sub-01_space-MNI_desc-preproc_T1w",
    ],
    "t1ce": [
        "s1_T1km", "s1_T1+C", "s1_T1_Gad", "t1_mprage_tra_KM", "A_t1_post", "A_T1_MPRAGE_gd", "A_t1ce_brain",
        "sub-01_ce-gadolinium_T1w", "A_t1_tse_fs_gd", "A_T1_post_contrast",
    ],
    "t2": ["T2w_acpc_dc_restore", "t2_tse_tra_320_p2", "A_T2_fs", "A_t2w_bet", "100307_3T_T2w_SPC1", "A_ax_t2_tse"],
    "flair": ["s1_FLAIR_3D", "A_3D_FLAIR", "t2_tse_tra_flair", "A_Ax_T2_FLAIR", "A_FLAIR_T2", "A_flair_brain_n4"],
    "pd": ["A_PD_tse", "A_pd_brain"],
}  # fmt: skip
# What each of these is cannot be known, or is none of the five.
UNKNOWN = [
    "brain", "MPRAGE", "anat", "A_T1_FLAIR", "A_T1_T2", "A_PD_T2", "T1_map", "A_T2_star", "A_T2_map", "T1wDividedByT2w",
    "T1_to_MNI_lin", "A_T1_post_op", "A_T1_without_contrast", "t2_space_dark-fluid_sag", "A_tirm", "t2_tse_tra_e1",
    "A_T2_GRE", "A_swi_T2", "A_dwi_T2", "A_T2_swi", "A_T1_sub", "A_T1_inv2", "sub-01_acq-gd_T1w", "sub-01_T1map",
    "sub-01_acq-flair_T2w", "sub-01_part-phase_T1w", "A_t1_t1ce", "A_T10", "A_at1", "sub-01_UNIT1", "A_T2_TIRM",
    "A_T1_C-", "A_T1_-C", "A_T1C-", "A_t1_gd-_brain", "A_T1_no_contrast",
]  # fmt: skip


@pytest.mark.parametrize(("stem", "expected"), [(s, e) for e, stems in UNDERSTOOD.items() for s in stems])
def test_names_of_common_tools_are_understood(stem, expected):
    assert element(stem) == expected


@pytest.mark.parametrize("stem", UNKNOWN)
def test_no_modality_is_guessed(stem, tmp_path):
    assert element(stem) is None
    with pytest.raises(CopeditError, match="no images found to work on"):
        find_studies(touch(tmp_path, f"{stem}.nii.gz"))


def test_a_modality_is_one_row():
    assert [row.name for row in TABLE] == list(MODALITIES)
    for row in TABLE:
        assert modality(row.bids) == (row.enhanced or row.name)
        for style, written in zip(STYLES, row.written, strict=True):
            assert modality(written) == row.name and style[row.name] == written
            assert element(f"A_{written}") == row.name


# ---- hearts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file",
    [
        "patient001/patient001_frame01", "patient6_LGE", "1000/sa_ED", "A0S9V9_sa", "001_SA_ED", "SC-HF-I-09_ED",
        "SC-N-07_ES", "MES0001401_ED", "x/sub3_sax", "heart12", "cardiac_cine_short-axis", "cine short axis ED",
    ],
)  # fmt: skip
def test_hearts_by_name(tmp_path, file):
    (study,) = find_studies(touch(tmp_path, f"{file}.nii.gz"))
    assert study.task == "cardiac"


@pytest.mark.parametrize("name", ["brain", "MPRAGE", "anat", "s_0000", "sub-01_anat", "p1_swirl", "la_003", "image"])
def test_what_is_not_known_to_be_a_heart_is_not_taken_for_one(tmp_path, name):
    path = touch(tmp_path, f"{name}.nii.gz") / f"{name}.nii.gz"
    for where in (tmp_path, path):
        with pytest.raises(CopeditError, match=rf"{name}.nii.gz: .*--file t1"):
            find_studies(where)
    assert not is_heart(name)
    if not name.startswith("s_"):
        with pytest.raises(CopeditError, match="--task cardiac"):
            find_studies(path)
    for sure in (find_studies(path, task="cardiac"), find_studies(tmp_path, task="cardiac")):
        assert [study.task for study in sure] == ["cardiac"]
    assert find_studies((), {"sax": path})[0].task == "cardiac"


def test_field_maps_and_segmentations_are_no_hearts(tmp_path):
    touch(tmp_path, "sub-01/fmap/sub-01_magnitude1.nii.gz", "sub-01/fmap/sub-01_phasediff.nii.gz", "p1_aseg.nii.gz")
    with pytest.raises(CopeditError, match="no images found to work on"):
        find_studies(tmp_path)
    touch(tmp_path, "sub-01/anat/sub-01_T1w.nii.gz", "SC-HF-I-02_ES_lv.nii.gz", "SC-HF-I-02_ES.nii.gz")
    assert found(tmp_path) == {"sub-01": ("brain", ["t1"]), "SC-HF-I-02_ES": ("cardiac", ["sax"])}
    (study,) = find_studies(tmp_path / "sub-01")
    assert study.problem is None


def test_a_t2_of_a_heart(tmp_path):
    touch(tmp_path, *(f"patient1_{m}.nii.gz" for m in ("C0", "LGE", "T2")), "patient2_T2.nii.gz")
    assert {name: task for name, (task, _) in found(tmp_path).items()} == {
        "patient1_C0": "cardiac", "patient1_LGE": "cardiac", "patient1_T2": "cardiac", "patient2": "brain",
    }  # fmt: skip
    touch(tmp_path / "x", "heart_7_T2.nii.gz", "stack_T2.nii.gz", "B_T2.nii.gz", "B_T1.nii.gz")
    assert found(tmp_path / "x")["heart_7_T2"] == ("cardiac", ["sax"])
    assert found(tmp_path / "x")["B"] == ("brain", ["t1", "t2"])
    assert found(tmp_path / "x", task="cardiac").keys() == {"heart_7_T2", "stack_T2"}


# ---- channels ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["channel_names", "modality"])
def test_channels_are_named_by_a_dataset_json(tmp_path, key):
    images = touch(tmp_path / "imagesTr", "case_0000.nii.gz", "case_0002.nii.gz")
    with pytest.raises(CopeditError, match=r"channel, 0000, .*dataset.json .*channel_names.* --file t1=FILE"):
        find_studies(images)
    (tmp_path / "dataset.json").write_text(json.dumps({key: {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"}}))
    (study,) = find_studies(images)
    assert (study.name, study.problem, list(study.files)) == ("case", None, ["t1ce", "flair"])
    assert study.output_path(tmp_path / "o", "t2").name == "case_0003.nii.gz"
    assert study.output_path(tmp_path / "o", "pd").name == "case_pd.nii.gz"


def test_a_year_is_no_channel(tmp_path):
    assert found(touch(tmp_path, "Meier_T1_2021.nii.gz")) == {"Meier": ("brain", ["t1"])}


@pytest.mark.parametrize("text", ["", "[]", '{"channel_names": 3}', '{"channel_names": {"0": "CT", "x": "T1"}}'])
def test_a_dataset_json_that_says_nothing(tmp_path, text):
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(CopeditError, match="channel, 0000"):
        find_studies(touch(tmp_path, "case_0000.nii.gz"))


# ---- what is there is not missing --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file",
    [
        "s1_dark-fluid.nii.gz", "s1_T2_star2.nii.gz", "s1_post_T1.nii.gz", "s1_t2.mgz", "t2.mgz", "s1_t2.hdr",
        "anat.nii.gz",
    ],
)  # fmt: skip
def test_a_file_that_is_not_understood_stops_its_study(tmp_path, file):
    touch(tmp_path, "a/s1_t1.nii.gz", "a/s1_flair.nii.gz", "b/s2_t1.nii.gz", f"a/{file}")
    one, two = find_studies(tmp_path)
    assert file in one.problem and "may be what seems missing" in one.problem and "--file t1=FILE" in one.problem
    assert one.unclear == (tmp_path / "a" / file,)
    assert two.problem is None


@pytest.mark.parametrize(
    ("stem", "element"), [("t2_tirm_tra_dark-fluid", "flair"), ("A_T2_TIRM", "t2"), ("A_t1ce_odd", "t1ce")]
)
def test_what_a_name_most_likely_means_is_the_remedy(tmp_path, stem, element):
    with pytest.raises(CopeditError, match=f"rename it to end in {element} or give it by --file {element}=FILE"):
        find_studies(touch(tmp_path, f"{stem}.nii.gz"))


def test_what_cannot_be_missing_stops_nothing(tmp_path):
    touch(
        tmp_path, "s1_t1.nii.gz", "s1_t1.mgz", "s1_dwi.nii.gz", "s1_T1_map.nii.gz", "s1_seg.nii.gz", "s1_mask.mgz",
        "s10_odd.nii.gz", "s2_t1.nii.gz", "s1_t1.json",
    )  # fmt: skip
    assert [study.problem for study in find_studies(tmp_path)] == [None, None]


def test_a_file_that_may_be_anyones_stops_the_studies_of_its_folder_that_lack_it(tmp_path):
    touch(tmp_path, "p1_t1.nii.gz", "p2_t1.nii.gz", "topogram.nii.gz", "x/p3_t1.nii.gz")
    assert [study.problem for study in find_studies(tmp_path)] == [None] * 3
    touch(tmp_path, "t2_tirm_tra_dark-fluid.nii.gz")
    one, two, other = find_studies(tmp_path)
    assert "--file flair=FILE" in one.problem and one.unclear == two.unclear and other.problem is None
    touch(tmp_path, "p1_flair.nii.gz")
    assert [bool(study.problem) for study in find_studies(tmp_path)] == [False, True, False], "one lacks no FLAIR"


@pytest.mark.parametrize(
    ("stem", "held", "maybe"),
    [
        ("T1_GD_foo", "t1", "t1ce"), ("ax_post_T1", "t1", "t1ce"), ("t1_tse_foo_km", "t1", "t1ce"),
        ("T1_fatsat_GD_foo", "t1", "t1ce"), ("T1_GD_foo", "t1ce", "t1"), ("t2_spair_dark", "t2", "flair"),
        ("t2_tirm_tra", "t2", "flair"), ("t2_spair_dark", "flair", "t2"),
    ],
)  # fmt: skip
def test_a_file_that_may_be_one_of_two_stops_the_studies_that_lack_either(tmp_path, stem, held, maybe):
    touch(tmp_path, f"p1_{held}.nii.gz", f"p2_{held}.nii.gz", f"p2_{maybe}.nii.gz", f"{stem}.nii.gz")
    one, two = find_studies(tmp_path)
    assert one.unclear == (tmp_path / f"{stem}.nii.gz",) and two.problem is None


@pytest.mark.parametrize("stem", ["t1_to_mni_warp", "T1_template_brainweb", "t1_nativ_foo", "axial"])
def test_what_no_study_lacks_stops_none(tmp_path, stem):
    touch(tmp_path, "p1_t1.nii.gz", "p2_t1.nii.gz", f"{stem}.nii.gz")
    assert [study.problem for study in find_studies(tmp_path)] == [None, None]


@pytest.mark.parametrize(
    "files",
    [
        ["5_t1_se_tra", "6_t1_se_tra_KM", "7_t2_tse_tra"],
        ["002_t1_mprage_sag", "003_t2_tse_tra", "004_t2_tirm_tra_dark-fluid"],
        ["5/t1_se", "6/t2_tse", "7/flair", "2/localizer"],
        ["5/5_t1_se", "6/Meier_t2_tse"],
        ["5/Meier_t1", "7/Meier_dark-fluid"],
    ],
)
def test_numbered_series_of_one_patient_are_no_patients(tmp_path, files):
    touch(tmp_path / "M", *(f"{file}.nii.gz" for file in files))
    touch(tmp_path / "N", "N_t1.nii.gz")
    *series, other = find_studies(tmp_path)
    assert all("look like the series of one patient" in study.problem for study in series) and series
    assert other.problem is None
    assert find_studies(next((tmp_path / "M").rglob("*_t1*.nii.gz"), tmp_path / "N"))[0].problem is None


@pytest.mark.parametrize(
    "files",
    [
        ["001_t1", "002_t1", "003_flair"],
        ["001_t1", "001_t2", "002_flair"],
        ["001/t1", "001/t2", "002/flair"],
        ["001/Meier_t1", "002/Mueller_t2"],
        ["s1_t1", "s2_t2"],
    ],
)
def test_numbered_patients_are_no_series(tmp_path, files):
    studies = find_studies(touch(tmp_path, *(f"{file}.nii.gz" for file in files)))
    assert len(studies) > 1 and not any(study.problem for study in studies)


def test_understood_names_join_their_study(tmp_path):
    touch(tmp_path, *(f"s1_{n}.nii.gz" for n in ("T1_pre", "T1_Gad", "FLAIR_3D", "3D_T2")))
    assert found(tmp_path) == {"s1": ("brain", ["t1", "t1ce", "t2", "flair"])}
    touch(tmp_path / "v", "s1_post_t1.nii.gz", "s1_post_flair.nii.gz")  # a visit: the others share the word
    assert found(tmp_path / "v") == {"s1_post": ("brain", ["t1", "flair"])}


# ---- several files of one modality -------------------------------------------------------------------------


def test_runs_and_acquisitions_are_chosen(tmp_path):
    names = ("run-01", "run-02", "acq-highres_run-01", "acq-highres_rec-norm_run-01")
    touch(tmp_path, *(f"sub-1_{n}_T1w.nii.gz" for n in names), "sub-1_T2w.nii.gz")

    def chosen(*select):
        (study,) = find_studies(tmp_path, select=select)
        return study.problem or study.files["t1"].name

    assert "--select run-01 or --select run-02" in chosen()
    assert chosen("run-02") == "sub-1_run-02_T1w.nii.gz"
    assert chosen("run-01") == "sub-1_run-01_T1w.nii.gz"
    assert chosen("RUN-01", "acq-highres") == "sub-1_acq-highres_run-01_T1w.nii.gz"
    assert chosen("rec-norm") == "sub-1_acq-highres_rec-norm_run-01_T1w.nii.gz"
    with pytest.raises(CopeditError, match=r"--select run-3: no file carries that; there are acq-highres, plain, rec-"):
        chosen("run-3")


def test_stripped_and_plain_files_are_chosen(tmp_path):
    touch(tmp_path, "A_t1.nii.gz", "A_t1_brain.nii.gz")
    (study,) = find_studies(tmp_path)
    assert "two files for t1" in study.problem and "--select plain or --select brain" in study.problem
    for mark, name in (("plain", "A_t1.nii.gz"), ("brain", "A_t1_brain.nii.gz")):
        (study,) = find_studies(tmp_path, select=[mark])
        assert (study.problem, study.files["t1"].name) == (None, name)


# ---- names of studies --------------------------------------------------------------------------------------


def test_a_study_folder_that_ends_like_a_modality_is_not_split(tmp_path):
    touch(tmp_path / "trial_T2", "s_T1.nii.gz", "s_T2.nii.gz", "s_FLAIR.nii.gz")
    assert found(tmp_path) == {"s": ("brain", ["t1", "t2", "flair"])}
    touch(tmp_path / "x" / "visit_T2", "anat.nii.gz")  # neither a T2 nor a heart
    with pytest.raises(CopeditError, match="neither a modality"):
        find_studies(tmp_path / "x")


def test_one_name_in_two_normal_forms_is_one_study(tmp_path):
    names = [f"{normalize(form, 'Müller')}_{of}.nii.gz" for form, of in (("NFC", "t1"), ("NFD", "flair"))]
    assert list(found(touch(tmp_path, *names)).values()) == [("brain", ["t1", "flair"])]


def test_a_study_without_a_name_has_its_path_whatever_else_is_there(tmp_path):
    """Equal visits of two subjects have two names, and those of one have them when it is alone."""
    touch(tmp_path / "x", *(f"{s}/{v}/t1.nii.gz" for s in ("A", "B") for v in ("v1", "v2")), "C/v3/t1.nii.gz")
    names = [study.name for study in find_studies(tmp_path / "x")]
    assert names == ["A_v1", "A_v2", "B_v1", "B_v2", "C_v3"]
    touch(tmp_path / "y", "A/v1/t1.nii.gz", "A/v2/t1.nii.gz", "B/t1.nii.gz", "D/v3/E_t1.nii.gz")
    assert [study.name for study in find_studies(tmp_path / "y")] == ["A_v1", "A_v2", "B", "E"]
    names = [study.name for study in find_studies([tmp_path / "x", tmp_path / "y"])]
    assert names == ["x_A_v1", "x_A_v2", "B_v1", "B_v2", "C_v3", "y_A_v1", "y_A_v2", "B", "E"]


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (["A/v1/t1", "A_v1/t1"], ["A_v1-1", "A_v1-2"]),
        (["A/B_v1/t1", "A_B/v1/t1"], ["A_B_v1-1", "A_B_v1-2"]),
        (["A/v1/t1", "A_v1/A_v1_t1", "A_v1-2/t1"], ["A_v1-1", "A_v1-2-1", "A_v1-2-2"]),
    ],
)
def test_paths_that_are_one_name_are_numbered(tmp_path, files, names):
    assert list(found(touch(tmp_path, *(f"{file}.nii.gz" for file in files), "B/t1.nii.gz"))) == [*names, "B"]


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "s_t1.nii.gz")
    with pytest.raises(CopeditError, match="neither a file nor a folder"):
        find_studies(tmp_path / "s_t1.nii.gz")
    with pytest.raises(CopeditError, match="no regular file"):
        Study.read(tmp_path)
    with pytest.raises(CopeditError, match=r"cannot read .*xxx: File name too long"):
        find_studies(tmp_path / ("x" * 300))
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "IM0001.dcm").write_bytes(b"DICM")
    with pytest.raises(CopeditError, match=r"IM0001.dcm is a damaged DICOM file|pip install 'copedit\[dicom\]'"):
        find_studies(tmp_path / "d")


@pytest.mark.parametrize("options", [{"task": "brain"}, {"select": ["run-01"]}])
def test_what_chooses_among_found_files_is_refused_beside_named_ones(tmp_path, options):
    with pytest.raises(CopeditError, match="leave them out beside named files"):
        find_studies((), {"t1": tmp_path / "a.nii.gz"}, **options)
