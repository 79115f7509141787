import json

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from copedit_rt.cli import app
from copedit_rt.images.nifti import read_volume
from copedit_training import demo


@pytest.fixture(scope="module")
def models(model_folder):
    return {"brain": model_folder("demo-brain"), "cardiac": model_folder("demo-cardiac")}


def test_demo(tmp_path, models):
    report = demo.run(tmp_path, subjects=2, seed=0, models=models)
    studies = {study["study"]: study for study in report["studies"]}
    assert list(studies) == ["brain1000000", "brain1000001", "heart1000000", "heart1000001"]
    for study in studies.values():
        methods = list(study["scores"])
        assert methods[0] == "model" and len(methods) == 3
        assert all(np.isfinite(row["psnr"]) and 0 < row["ssim"] <= 1 for row in study["scores"].values())
    # Truth complete, input without what was removed, output what was missing and nothing else.
    first = studies["brain1000000"]
    assert first["missing"] == "flair" and studies["brain1000001"]["missing"] == "t1ce"
    names = {
        folder: sorted(p.name for p in (tmp_path / folder / "brain1000000").glob("*.nii.gz"))
        for folder in ("truth", "input", "output")
    }
    assert len(names["truth"]) == 4 and names["output"] == ["brain1000000_flair.nii.gz"]
    assert sorted(names["input"] + names["output"]) == names["truth"]
    # The heart's other slices come back as they were.
    truth, given, made = (
        read_volume(tmp_path / folder / "heart1000000" / "heart1000000.nii.gz").data
        for folder in ("truth", "input", "output")
    )
    blank = [z for z in range(truth.shape[2]) if not given[..., z].any()]
    there = [z for z in range(truth.shape[2]) if z not in blank]
    assert len(blank) == 4 and np.array_equal(made[..., there], truth[..., there])
    assert not np.array_equal(made[..., blank], given[..., blank])
    assert Image.open(report["picture"]).width > 500


def test_demo_can_be_repeated_and_renders(tmp_path, models):
    reports = [demo.run(tmp_path, seed=0, models=models) for _ in range(2)]
    assert reports[0]["studies"][0]["scores"] == reports[1]["studies"][0]["scores"]
    console = Console(width=100, record=True, file=open("/dev/null", "w"))
    console.print(demo.render(reports[0]))
    text = console.export_text()
    for word in ("brain1000000", "linear regression", "nearest slice", "PSNR", "demo.png"):
        assert word in text


def test_the_command(tmp_path, models, monkeypatch):
    monkeypatch.setattr(demo.run, "__kwdefaults__", demo.run.__kwdefaults__ | {"models": models})
    result = CliRunner().invoke(app, ["demo", "-o", str(tmp_path / "out"), "--json", "--seed", "5"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["studies"][0]["study"] == "brain1000005"
    (tmp_path / "file").write_text("")
    refused = CliRunner().invoke(app, ["demo", "-o", str(tmp_path / "file" / "x")])
    assert refused.exit_code == 1 and refused.stderr.count("\n") == 1
