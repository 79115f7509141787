from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from copedit_rt.inspection import Report, contradictions, examine
from copedit_rt.perception import Perception

BRATS = ("t1", "t1ce", "t2", "flair")


def perceive(count=(0.9, 0.08, 0.02), missing=(0.1, 0.9, 0.1, 0.1), **identity):
    chances = {name: [0.97 if e == looks else 0.01 for e in BRATS] for name, looks in identity.items()}
    return Perception(list(count), list(missing), chances, BRATS)


def volume(data):
    return SimpleNamespace(data=np.asarray(data, dtype=np.float32))


def test_from_logits_gives_probabilities():
    position = np.array([-3.0, 2.0, 0.0, -40.0])
    perceived = Perception.from_logits(BRATS, [0.0, 1.0, 2.0], position, {"t1": [-4.0, 3.0, 2.0, 1.0]})
    assert sum(perceived.count) == pytest.approx(1)
    assert perceived.count_missing == 3
    assert perceived.missing == pytest.approx(1 / (1 + np.exp(-position)))
    # The heads say P(missing) per element; given that exactly one is present, Bayes' rule says which.
    p = 1 / (1 + np.exp(-np.array([-4.0, 3.0, 2.0, 1.0])))
    only = np.array([np.prod(np.delete(p, i)) * (1 - p[i]) for i in range(4)])
    assert perceived.identity["t1"] == pytest.approx(only / only.sum())
    assert perceived.looks_like("t1")[0] == "t1"


def test_from_logits_survives_extreme_logits():
    perceived = Perception.from_logits(BRATS, [900.0, -900.0, 0.0], [900.0] * 4, {"t1": [-900.0, 900.0, 0.0, 0.0]})
    assert np.isfinite([*perceived.count, *perceived.missing, *perceived.identity["t1"]]).all()


def test_no_contradiction_where_files_and_images_agree():
    assert contradictions(perceive(t1="t1", t2="t2", flair="flair"), {}, task="brain") == []


def test_mislabelled_file_is_named_with_what_it_looks_like():
    (found,) = contradictions(perceive(t1="t1", t2="t2", flair="t2"), {"flair": "s_flair.nii.gz"}, task="brain")
    assert found.kind == "identity" and found.flag
    assert found.text == "s_flair.nii.gz is named flair but looks like t2 (0.97)"


def test_count_and_which_are_compared_with_the_files():
    perceived = perceive((0.1, 0.8, 0.1), (0.1, 0.9, 0.7, 0.1), t1="t1", t2="t2", flair="flair")
    kinds = [f.kind for f in contradictions(perceived, {}, task="brain")]
    assert kinds == ["count", "missing"]


def test_complete_study_is_judged_by_identity_alone():
    perceived = perceive(t1="t1", t1ce="t1ce", t2="t2", flair="flair")
    assert contradictions(perceived, {}, task="brain") == []


def test_examine_points_out_constant_blank_and_non_finite():
    data = np.random.default_rng(0).random((6, 6, 6))
    holes, nan = data.copy(), data.copy()
    holes[:, :, [0, 2, 3, 5]], nan[1, 1, 1] = 0, np.nan  # 0 and 5 are background
    volumes = {
        "t1": volume(data),
        "t2": volume(holes),
        "flair": volume(nan),
        "t1ce": volume(np.full((6, 6, 6), 7)),
    }
    found = {f.kind: f.text for f in examine(volumes, {"t1ce": "x_t1ce.nii.gz"}, task="brain")}
    assert set(found) == {"blank", "non-finite", "constant"}
    assert found["blank"] == "t2 is blank inside the image at k = 2-3"
    assert "x_t1ce.nii.gz" in found["constant"]


def test_blank_slices_of_a_heart_are_not_flagged():
    data = np.random.default_rng(0).random((8, 8, 6))
    data[..., 2:4] = np.nan
    assert examine({"sax": volume(data)}, {}, task="cardiac") == []


@pytest.mark.parametrize("perception", [None, perceive(t1="t1", t2="t2", flair="t2")])
def test_report_is_json_and_renders(perception):
    import json

    report = Report("case [1]", "brain", {"t1": "a", "t2": "b", "flair": "c"}, ("t1ce",), (), perception)
    report.findings = contradictions(perception, report.files, task="brain") if perception else []
    assert json.loads(json.dumps(report.to_dict()))["consistent"] is (perception is None)
    console = Console(width=100, record=True, file=open("/dev/null", "w"))
    console.print(report.render())
    text = console.export_text()
    assert "case [1]" in text and ("looks like t2" in text) == (perception is not None)
