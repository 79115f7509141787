"""Which modality a series is, from descriptions as hospitals write them, and from times."""

import pytest

pytest.importorskip("pydicom", reason="needs the extra dicom")

from dataclasses import replace
from pathlib import Path

from copedit_rt.images import names
from copedit_rt.images.dicom import match
from copedit_rt.images.dicom.headers import MR, Header
from copedit_rt.images.dicom.match import by_times, judge
from copedit_rt.images.dicom.series import Series, group

PLAIN = Header(
    Path("x"), 1, "", MR, "1", "2", "3", "P", "MR", "1", "", "", "", ("ORIGINAL", "PRIMARY", "M"), ("SE",), "HEAD",
    False, False, None, None, None, None, "4", 1, 8, 8, 2, (0.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0), (1.0, 1.0),
)  # fmt: skip


def series(description: str = "", count: int = 5, **tags) -> Series:
    one = replace(PLAIN, description=description, **tags)
    return Series(tuple(replace(one, instance=str(k), position=(0.0, 0.0, 4.0 * k)) for k in range(count)))


DESCRIPTIONS = {
    "t1": "T1 | t1_mprage_sag_p2_iso | SAG T1 SE | Ax T1 pre | 3D T1 MPRAGE | sT1W_3D_TFE | T1W_SE | MPRAGE_GRAPPA2 | "
    "AX T1 FSPGR 3D | BRAVO | WIP T1W_TFE SENSE | t1_tse_tra nativ | T1 ohne KM | t1_fl2d_tra | T1 w/o contrast | "
    "AX T1 NON CONTRAST | t1_se_fs | T1 fat sat | Sag 3D T1 SPACE | T1_GRE_3D | t1 vibe fs tra | "
    "AX T1 C- | T1 -C | T1 FS GD- | T1 -KM | T1C- | AX T1 NO CONTRAST | T1 NON-GAD | T1 senza mdc | T1 sin contraste | "
    "T1 S/C | T1 S/ CONTRASTE | T1 sem contraste | T1 zonder contrast | T1 utan kontrast | T1 WOUT GAD | T1 minus gad",
    "t1ce": "T1 MPRAGE +C | T1+C | AX T1 POST | t1_mprage_sag_KM | AX T1 POST GD FS | T1 C+ | Ax T1 w/ contrast | "
    "T1CE | t1_tse_tra_Gd | Post T1 SE | T1 GAD | SAG T1 MPRAGE POST CONTRAST | T1 +Gadovist | T1c | 3D T1 MDC | "
    "AX T1 W/GAD | AX T1 W/CONTRAST | T1 W/GD | T1 POST/GAD | T1 Gadavist | T1 c/contraste | T1 +GD/FS | "
    "T1-C | T1 - C+ | T1 sinc +C | t1_tse_fatsat_km | t1_fatsaturated_gd",
    "t2": "T2 | t2_tse_tra_320_p2 | AX T2 FSE | Ax T2 FRFSE | T2W_TSE | sT2W | T2 BLADE | t2_space_sag | AX T2 PROP FS",
    "flair": "FLAIR | FLAIR_AX | t2_tirm_tra_dark-fluid | t2_tirm_tra_dark_fluid | AX T2 FLAIR | T2FLAIR | FLAIR +C | "
    "3D FLAIR SPACE | t2_spc_da-fl_sag_p2_iso | sag CUBE flair | T2W_FLAIR_SPIR | 3D_Brain_VIEW_FLAIR | "
    "t2_fatsat_flair",
    "pd": "PD | pd_tse_tra | AX PD | PDW | Proton Density",
    "sax": "SAX | Short Axis stack | cine_sax | short-axis | cine SA",
}


@pytest.mark.parametrize(
    ("description", "element"), [(text, e) for e, texts in DESCRIPTIONS.items() for text in texts.split(" | ")]
)
def test_descriptions(description, element):
    assert judge(series(description))[0] == element


@pytest.mark.parametrize(
    ("description", "words"),
    [
        ("localizer", "localizer"),
        ("AAHead_Scout", "localizer"),
        ("3-plane loc", "localizer"),
        ("Survey_MST", "localizer"),
        ("ep2d_diff_3scan_trace_p2", "diffusion"),
        ("DWI b1000", "diffusion"),
        ("ADC (10^-6 mm2/s)", "diffusion"),
        ("Ax DTI 32 dirs FA", "diffusion"),
        ("ep2d_perf", "perfusion"),
        ("t2*_fl2d", "susceptibility"),
        ("T2 star", "susceptibility"),
        ("SWI_Images", "susceptibility"),
        ("Ax SWAN", "susceptibility"),
        ("T2 GRE", "susceptibility"),
        ("TOF_3D_multi-slab", "angiography"),
        ("T1 map", "map"),
        ("ASSET cal", "calibration"),
        ("t2_stir_cor", "inversion"),
        ("t2_tirm_cor", "inversion"),
        ("T2 sag C-Spine", "spine"),
        ("T1 SUB", "subtraction"),
        ("cine 4CH", "short axis"),
        ("T1 FLAIR", "flair and t1"),
        ("T1 T2 whatever", "t1 and t2"),
        ("dynamic", "says no modality"),
        ("", "says no modality"),
    ],
)
def test_what_is_left_out(description, words):
    element, why = judge(series(description))
    assert element is None and words in why


@pytest.mark.parametrize(
    ("tags", "words"),
    [
        ({"image_type": ("DERIVED", "SECONDARY", "MPR")}, "derived"),
        ({"image_type": ("ORIGINAL", "PRIMARY", "P")}, "phase"),
        ({"image_type": ("ORIGINAL", "PRIMARY", "LOCALIZER")}, "localizer"),
        ({"kind": "CT", "sop_class": "1.2.840.10008.5.1.4.1.1.2"}, r"no MR image (CT)"),
        ({"synthetic": True}, "synthetic"),
        ({"count": 1}, "a single image"),
        ({"position": None}, "no position"),
    ],
)
def test_what_is_left_out_whatever_it_is_called(tags, words):
    one = series("t1_mprage", tags.pop("count", 5), **{k: v for k, v in tags.items() if k != "position"})
    if "position" in tags:
        one = Series(tuple(replace(h, position=None) for h in one.headers))
    element, why = judge(one)
    assert element is None and words in why


def test_corrected_images_are_taken():
    assert judge(series("t1_mprage", image_type=("DERIVED", "PRIMARY", "M", "DIS2D")))[0] == "t1"


@pytest.mark.parametrize(
    ("times", "element"),
    [((500, 10, None), "t1"), ((5000, 100, None), "t2"), ((9000, 100, 2500), "flair"), ((2500, 15, None), "pd"),
     ((2000, 3, 900), "t1"), ((4000, 60, 150), None), ((None, None, None), None), ((1200, 50, None), None)],
)  # fmt: skip
def test_times(times, element):
    repetition, echo, inversion = times
    one = series("axial head", repetition_time=repetition, echo_time=echo, inversion_time=inversion)
    assert by_times(one.first) == element and judge(one)[0] == element


def test_a_word_beside_another_is_of_the_row_that_says_so(monkeypatch):
    """As in names of files: any row of the table may say so, not FLAIR's alone."""
    assert judge(series("T2 PD"))[0] is None
    monkeypatch.setitem(names._ROWS, "pd", replace(names._ROWS["pd"], beside=("t2",)))
    assert judge(series("T2 PD"))[0] == "pd"


def test_contrast_agent_and_protocol():
    assert judge(series("t1_se_tra", contrast=True)) == ("t1ce", "by its description and contrast agent")
    assert judge(series("T1 pre", contrast=True))[0] == "t1"
    assert judge(series("T1 post", contrast=False))[0] == "t1ce"
    assert judge(series("T1 C-", contrast=True))[0] == "t1"
    assert judge(series("head axial", protocol="FLAIR_AX"))[0] == "flair"
    assert judge(series("t2_tirm", repetition_time=9000, echo_time=90, inversion_time=2500))[0] == "flair"
    assert judge(series("FLAIR", repetition_time=500, echo_time=10))[0] is None
    assert judge(series("axial", repetition_time=500, echo_time=10, contrast=True))[0] == "t1ce"


@pytest.mark.parametrize(
    "text",
    [
        *("pre/post", "POST/PRE", "pre / post GD", "WITH/WITHOUT", "without/with gad", "W/WO", "mit/ohne KM"),
        *("sin/con", "C-/C+", "C+/C-", "with and without contrast", "pre & post", "pre+post gd"),
        *("PRE/POST-CONTRAST", "WITH/WITHOUT-CONTRAST", "W/WO-GAD", "mit/ohne-KM"),
    ],
)
def test_with_and_without_agent_is_neither(text):
    """The header decides."""
    assert match.agent("T1 pre/c-spine") is False
    assert match.agent(f"T1 {text}") is None
    assert [judge(series(f"T1 {text}", contrast=c))[0] for c in (True, False)] == ["t1ce", "t1"]


def test_hearts():
    assert judge(series("t2_tse_sax", body_part="HEART"))[0] == "sax" and judge(series("T2 SAX"))[0] == "t2"
    assert judge(series("T2 SAX", body_part=""))[0] == "sax"
    assert "of the chest" in judge(series("t2_tse_tra", body_part="CHEST"))[1]
    assert judge(series("axial", body_part="HEART", repetition_time=500, echo_time=10))[0] is None


def test_two_echoes_are_two_series():
    early = series("PD_T2 tse", echo_time=15.0, repetition_time=4000.0).headers
    late = [replace(h, echo_time=100.0, instance=f"{h.instance}b") for h in early]
    both, duplicates = group([*early, *late, early[0]])
    assert [judge(one) for one in both] == [(e, "by its description and echo time") for e in ("pd", "t2")]
    assert [one.key for one in both] == ["1e1", "1e2"] and duplicates == 1
    uneven = [replace(h, echo_time=15.01 if k % 2 else 15.0) for k, h in enumerate(series(count=6).headers)]
    assert len(group(uneven)[0]) == 1  # half of the slices each
    (over_time,), _ = group([*early, *(replace(h, instance=f"{h.instance}b") for h in early)])
    assert "several images of each slice" in judge(over_time)[1]


def test_words_of_the_table_are_no_reason_to_leave_a_series_out(monkeypatch):
    assert match.left_out("ep2d_diff ADC") == "diffusion" and match.left_out("ADC") == "diffusion"
    monkeypatch.setitem(match._WORDS, "adc", "e?adc")  # as a row of names.TABLE does
    assert match.left_out("ADC") is None and match.named("ax eADC") == {"adc"}
    assert match.left_out("ep2d_diff ADC") == "diffusion"
