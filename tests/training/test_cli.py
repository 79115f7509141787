"""The commands of training: what they hand over, and what each refuses."""

import pytest
from typer.testing import CliRunner

from copedit_rt.cli import app


def test_train_hands_over_its_options(tmp_path, monkeypatch):
    from copedit_training.stages import trainer

    seen = {}
    monkeypatch.setattr(trainer, "run", lambda stage, **options: seen.update(options, stage=stage))
    options = [
        "--preset",
        "demo-brain",
        "-o",
        str(tmp_path / "run"),
        "--set",
        "steps=3",
        "--set",
        "lr=1e-3",
        "--resume",
    ]
    assert CliRunner().invoke(app, ["train", "tokenizer", *options]).exit_code == 0
    assert seen["stage"] == "tokenizer" and seen["overrides"] == ["steps=3", "lr=1e-3"] and seen["resume"]
    assert seen["preset"] == "demo-brain" and seen["data"] == "phantom" and seen["output"] == tmp_path / "run"


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("evaluate", ["--sweep=2", "--ablation=prompts", "--analysis=tsne", "--segmentation", "--runs=2", "--full"]),
        ("sweep", ["--samples=2", "--solver=ddim", "--fid-network=x.pt", "--set=a=1", "--full"]),
        ("ablate", ["--model=demo-brain", "--steps=3", "--samples=2", "--split=all", "--first-seed=1000000"]),
        ("analyse", ["--preset=demo-brain", "--steps=3", "--samples=2", "--set=a=1", "--full"]),
        ("segment", ["--preset=demo-brain", "--subjects=2", "--split=all", "--seed=1", "--runs=2"]),
    ],
)
def test_options_of_other_commands_are_wrong_usage(tmp_path, command, options):
    needed = {"sweep": ["--steps=2"], "ablate": ["prompts"], "analyse": ["tsne"]}.get(command, [])
    for option in options:
        result = CliRunner().invoke(app, [command, *needed, "-o", str(tmp_path / "out"), option])
        assert result.exit_code == 2 and option.split("=")[0] in result.stderr, (command, option)
    assert not (tmp_path / "out").exists()
