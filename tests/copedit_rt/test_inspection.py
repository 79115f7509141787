"""What files say beside what a tiny model with random weights perceives."""

import io
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from commands import GRID, SHORT_AXIS, filled, image, other_grid, refused, run, save, slices, study, truncated, twice
from rich.console import Console

from copedit_rt import inspection
from copedit_rt.cli import FLAGGED
from copedit_rt.inspection import Report, contradictions, examine
from copedit_rt.perception import Perception
from copedit_rt.synthesizer import Synthesizer
from copedit_rt.task import Task

BRATS = ("t1", "t1ce", "t2", "flair")


def agreeing(monkeypatch, **looks: str) -> None:
    """Make the network perceive what the files say, but for `looks`."""
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


def test_inspect_a_consistent_study(tmp_path, brain_model, monkeypatch):
    study(tmp_path / "in")
    agreeing(monkeypatch)
    result = run("inspect", "-i", tmp_path / "in", "--model", brain_model)
    assert result.exit_code == 0 and "files and images agree" in result.stdout


def test_inspect_flags_a_misnamed_file(tmp_path, brain_model, monkeypatch):
    study(tmp_path / "in")
    agreeing(monkeypatch, flair="t2")
    result = run("inspect", "-i", tmp_path / "in", "--model", brain_model, "--json")
    (report,) = json.loads(result.stdout)["studies"]
    assert result.exit_code == FLAGGED and not report["consistent"]
    (finding,) = report["findings"]
    assert finding["text"] == "case_flair.nii.gz is named flair but looks like t2 (0.97)"
    assert report["perceived"]["looks_like"]["flair"] == "t2"


def test_inspect_survives_what_synth_refuses(tmp_path, brain_model):
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
    result = run("inspect", "-i", tmp_path / "in", "--model", brain_model, "--json")
    assert result.exit_code == FLAGGED
    reports = json.loads(result.stdout)["studies"]
    kinds = [{f["kind"] for f in report["findings"]} for report in reports]
    assert {"constant", "blank"} <= kinds[0] and "t2" not in reports[0]["perceived"]["looks_like"]
    assert "non-finite" in kinds[1]
    assert "unreadable" in kinds[2] and "unreadable" in kinds[3]
    assert "note" in kinds[4]
    assert all(report["perceived"] for report in reports)
    assert run("inspect", "-i", tmp_path / "in", "--model", brain_model).exit_code == FLAGGED


def test_inspect_names_the_missing_slices_of_a_heart(tmp_path, heart_model, monkeypatch):
    stack = slices(16, 16)
    stack[..., 5] = np.nan
    path = save(tmp_path / "sax_stack.nii.gz", stack, SHORT_AXIS)
    agreeing(monkeypatch)
    result = run("inspect", "-i", path, "--model", heart_model, "--missing-slices", "6", "--json")
    (report,) = json.loads(result.stdout)["studies"]
    assert result.exit_code == 0 and report["missing_slices"] == [5, 6] and report["missing"] == ["slab1"]
    constant = save(tmp_path / "sax_flat.nii.gz", np.ones((16, 16, 16)), SHORT_AXIS)
    result = run("inspect", "-i", constant, "--model", heart_model)
    assert result.exit_code == FLAGGED and "constant" in result.stdout


def test_debug_shows_where_what_is_a_finding_happened(tmp_path, brain_model, monkeypatch):
    for name in "ab":
        study(tmp_path / name, name)
    monkeypatch.setattr(inspection, "_read_what_can_be_read", lambda *given: 1 / 0)
    for debug in ([], ["--debug"]):
        result = run(*debug, "inspect", tmp_path, "--model", brain_model)
        assert result.exit_code == FLAGGED and ("test_inspection.py" in result.stderr) == bool(debug)


def test_inspect_of_nothing_readable_is_an_error(tmp_path, brain_model):
    (tmp_path / "x_t1.nii.gz").write_bytes(b"")
    refused(run("inspect", "-i", tmp_path, "--model", brain_model), "empty")
    study(tmp_path, "y")  # beside another study it is a finding
    result = run("inspect", "-i", tmp_path, "--model", brain_model, "--json")
    reports = json.loads(result.stdout)["studies"]
    assert result.exit_code == FLAGGED and reports[0]["findings"][0]["kind"] == "unreadable"
    assert reports[0]["perceived"] is None and reports[1]["perceived"]
    refused(run("inspect", "-i", tmp_path, "--model", brain_model, "--device", "tpu"), "tpu")


def perceive(count=(0.9, 0.08, 0.02), missing=(0.1, 0.9, 0.1, 0.1), **identity):
    chances = {name: [0.97 if e == looks else 0.01 for e in BRATS] for name, looks in identity.items()}
    return Perception(list(count), list(missing), chances, BRATS)


def volume(data):
    return SimpleNamespace(data=np.asarray(data, dtype=np.float32))


def test_no_contradiction_where_files_and_images_agree():
    assert contradictions(perceive(t1="t1", t2="t2", flair="flair"), {}, task=Task.BRAIN) == []


def test_mislabelled_file_is_named_with_what_it_looks_like():
    (found,) = contradictions(perceive(t1="t1", t2="t2", flair="t2"), {"flair": "s_flair.nii.gz"}, task=Task.BRAIN)
    assert found.kind == "identity" and found.flag
    assert found.text == "s_flair.nii.gz is named flair but looks like t2 (0.97)"


def test_count_and_which_are_compared_with_the_files():
    perceived = perceive((0.02, 0.96, 0.02), (0.1, 0.9, 0.96, 0.1), t1="t1", t2="t2", flair="flair")
    kinds = [f.kind for f in contradictions(perceived, {}, task=Task.BRAIN)]
    assert kinds == ["count", "missing"]


def test_what_is_not_sure_is_not_held_against_the_files():
    perceived = perceive((0.06, 0.9, 0.04), (0.1, 0.9, 0.9, 0.1), t1="t1", t2="t2", flair="t2")
    perceived.identity["flair"] = [0.01, 0.01, 0.9, 0.08]
    assert contradictions(perceived, {}, task=Task.BRAIN) == []
    report = Report("a", Task.BRAIN, {"flair": "a_flair.nii.gz"}, perception=perceived)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(report.render())
    text = console.export_text()
    assert "not sure (t2 0.90)" in text and "t1 (0.97)" in text and "files and images agree" in text


def test_complete_study_is_judged_by_identity_alone():
    perceived = perceive(t1="t1", t1ce="t1ce", t2="t2", flair="flair")
    assert contradictions(perceived, {}, task=Task.BRAIN) == []


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
    found = {f.kind: f.text for f in examine(volumes, {"t1ce": "x_t1ce.nii.gz"}, task=Task.BRAIN)}
    assert set(found) == {"blank", "non-finite", "constant"}
    assert found["blank"] == "t2 is blank inside the image at k = 2-3"
    assert "x_t1ce.nii.gz" in found["constant"]


def test_specks_beyond_a_blank_plane_are_no_image():
    data = np.random.default_rng(0).random((40, 40, 40))
    data[:, :, :6] = 0
    data[20, 20, 3] = 1  # as a mask leaves it
    assert examine({"t1": volume(data)}, {}, task=Task.BRAIN) == []
    data[10:20, 10:20, 3] = 1
    assert [f.kind for f in examine({"t1": volume(data)}, {}, task=Task.BRAIN)] == ["blank"]
    data[..., :3] = np.nan
    assert {f.kind for f in examine({"t1": volume(data)}, {}, task=Task.BRAIN)} == {"blank", "non-finite"}
    data[..., 3:6] = data[..., 6:9]
    assert {f.kind for f in examine({"t1": volume(data)}, {}, task=Task.BRAIN)} == {"non-finite"}
    speck = np.zeros((40, 40, 40))
    speck[5, 5, 5] = 1
    assert examine({"t1": volume(speck)}, {}, task=Task.BRAIN) == []


def test_what_a_network_says_that_has_seen_phantoms_alone_is_a_remark():
    perceived = perceive(t1="t1", t2="flair", flair="flair")
    assert all(finding.flag for finding in contradictions(perceived, {}, task=Task.BRAIN))
    told = contradictions(replace(perceived, seen_only="simulated phantoms"), {}, task=Task.BRAIN)
    assert not any(finding.flag for finding in told) and "has seen simulated phantoms alone" in told[-1].text
    agreed = replace(perceive(t1="t1", t2="t2", flair="flair"), seen_only="simulated phantoms")
    assert contradictions(agreed, {}, task=Task.BRAIN) == []


def test_blank_slices_of_a_heart_are_not_flagged():
    data = np.random.default_rng(0).random((8, 8, 6))
    data[..., 2:4] = np.nan
    assert examine({"sax": volume(data)}, {}, task=Task.HEART) == []


@pytest.mark.parametrize("perception", [None, perceive(t1="t1", t2="t2", flair="t2")])
def test_report_is_json_and_renders(perception):
    report = Report("case [1]", Task.BRAIN, {"t1": "a", "t2": "b", "flair": "c"}, ("t1ce",), (), perception)
    report.findings = contradictions(perception, report.files, task=Task.BRAIN) if perception else []
    assert json.loads(json.dumps(report.to_dict()))["consistent"] is (perception is None)
    console = Console(width=100, record=True, file=open("/dev/null", "w"))
    console.print(report.render())
    text = console.export_text()
    assert "case [1]" in text and ("looks like t2" in text) == (perception is not None)
