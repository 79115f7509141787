"""DICOM over HTTP: a zip in, what the command writes out, nothing of the patient left or logged."""

import io
import json
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="needs the extra serve")
pytest.importorskip("uvicorn", reason="needs the extra serve")
pytest.importorskip("multipart", reason="needs the extra serve")
pytest.importorskip("prometheus_client", reason="needs the extra serve")
pytest.importorskip("pydicom", reason="needs the extra dicom")
pytest.importorskip("dcm2niix", reason="needs the extra dicom")

import dicoms
from commands import files, run
from serving import members, part, post, served

from copedit_rt.client import Client


@pytest.fixture(scope="module")
def house(brain_model, tmp_path_factory):
    scratch = tmp_path_factory.mktemp("scratch")
    with served([brain_model], scratch, size=1 << 22) as (_, port, log):
        yield port, scratch, log
    assert not list(scratch.iterdir()) and "Roe" not in "".join(log) and "t1_mprage" not in "".join(log)


def packed(folder: Path) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as target:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                target.write(path, path.relative_to(folder))
    return content.getvalue()


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Path:
    return dicoms.study(tmp_path_factory.mktemp("dicom") / "case")


def test_a_study_in_and_out(house, case, brain_model, tmp_path):
    port, scratch, _ = house
    assert run("synth", case, "-o", tmp_path, "--model", brain_model, "--resample").exit_code == 0
    sent = [part("file", packed(case), "study.zip"), part("resample", "true"), part("name", "case")]
    status, content, _ = post(port, "/v1/synth", *sent)
    assert status == 200 and not list(scratch.iterdir())
    made = members(content)
    assert set(made) == files(tmp_path) and len(made) == 2 + 34
    for name in made:
        if not name.endswith(".json"):  # it holds when files were written
            assert made[name] == (tmp_path / name).read_bytes(), name
    status, content, _ = post(port, "/v1/synth", *sent, part("dicom", "false"))
    assert status == 200 and set(members(content)) == {"case_t1ce.nii.gz", "case_t1ce.json"}


def test_inspect(house, case):
    port, scratch, _ = house
    status, report, _ = post(port, "/v1/inspect", part("file", packed(case), "x.zip"))
    assert status == 200 and report["files"]["flair"] == "series 4 (t2_tirm_tra_dark-fluid)"
    assert "Roe" not in json.dumps(report) and str(scratch) not in json.dumps(report) and not list(scratch.iterdir())


def test_series_are_named_by_fields(house, case):
    port, scratch, _ = house
    zipped = part("file", packed(case), "x.zip")
    _, report, _ = post(port, "/v1/inspect", zipped, part("t1", "none"), part("pd", "ep2d_diff"))
    assert "the field pd=ep2d_diff: 2 series of study are that; name its UID (5 (ep2d" in report["error"]
    status, report, _ = post(port, "/v1/inspect", zipped, part("t1", "none"), part("t1ce", "2"))
    assert status == 200 and report["files"]["t1ce"] == "series 2 (t1_mprage_sag_p2_iso)"
    assert "t1" not in report["files"]
    status, report, _ = post(port, "/v1/inspect", part("t1", b"x", "a.nii"), part("t2", "5"))
    assert status == 400 and "the field t2 names a series of DICOM" in report["error"]
    assert not list(scratch.iterdir())


def test_refusals(house, case, tmp_path):
    port, scratch, _ = house
    assert "different grids" in post(port, "/v1/synth", part("file", packed(case), "x.zip"))[1]["error"]
    flair = sorted((dicoms.study(tmp_path / "gap") / "0004").iterdir())
    flair[4].unlink()
    status, answer, _ = post(port, "/v1/synth", part("file", packed(tmp_path / "gap"), "x.zip"))
    assert status == 422 and "unevenly spaced" in answer["error"] and "the field flair" in answer["error"]
    sets = [*dicoms.images(dicoms.T2), *dicoms.images(dicoms.Made("FLAIR", 9, patient="Roe2"))]
    status, answer, _ = post(port, "/v1/synth", part("file", packed(dicoms.save(sets, tmp_path / "mixed")), "x.zip"))
    assert status == 422 and "2 patients lie side by side" in answer["error"] and "Roe" not in answer["error"]
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as target:
        target.writestr("IM1", bytes(1 << 24))
    status, answer, _ = post(port, "/v1/synth", part("file", bomb.getvalue(), "x.zip"))
    assert status == 413 and "unpacked" in answer["error"]
    assert not list(scratch.iterdir())


def test_the_client(house, case, tmp_path):
    port, _, _ = house
    (tmp_path / "case.zip").write_bytes(packed(case))
    client = Client(f"http://127.0.0.1:{port}")
    client.synth([tmp_path / "case.zip"], tmp_path / "OUT", resample=True, name="case")
    assert len(list((tmp_path / "OUT" / "case_t1ce_dicom").iterdir())) == 34
