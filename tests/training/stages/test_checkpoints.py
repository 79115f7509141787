"""The run folder: whose it is, and what survives in it."""

import json

import pytest

from copedit_rt.errors import CopeditError
from tests.training.stages.tiny import train


def test_a_run_folder_is_not_overwritten_nor_resumed_with_other_settings(tmp_path):
    train("tokenizer", tmp_path / "a", "steps=2")
    with pytest.raises(CopeditError, match="holds a run already; add --resume"):
        train("tokenizer", tmp_path / "a", "steps=2")
    with pytest.raises(CopeditError, match="other settings"):
        train("tokenizer", tmp_path / "a", "steps=3", resume=True)
    described = json.loads((tmp_path / "a" / "run.json").read_text())
    del described["model"]["diffusion"]["solver"]  # as written before there were solvers
    del described["settings"]["accumulate"]
    (tmp_path / "a" / "run.json").write_text(json.dumps(described))
    train("tokenizer", tmp_path / "a", f"steps={described['settings']['steps']}", resume=True)
