"""bench/gpu.sh before it meets a GPU: what it calls exists, keeps its time, and needs nothing that is not there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from copedit_rt import cli

ROOT = Path(__file__).resolve().parents[2]
LANES = {"first": 540, "compare": 600, "deep": None}
# What a bare machine with a GPU lacks.
BLOCKED = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("nibabel", "monai", "xformers", "flash_attn"):
            raise ImportError(name + " is not installed")
sys.meta_path.insert(0, Refuse())
"""


def rehearse(
    lane: str, folder: Path, python: Path | None = None, device: str = "cpu"
) -> subprocess.CompletedProcess[str]:
    chosen = {"DEVICE": device, "OUT": str(folder), "PYTHON": str(python or sys.executable)}
    command = ["bash", ROOT / "bench/gpu.sh", lane]
    return subprocess.run(command, env=os.environ | chosen, capture_output=True, text=True, timeout=1200, cwd=ROOT)


def stand_in(folder: Path, body: str) -> Path:
    """An interpreter that writes down what it is asked, then does this."""
    path = folder / "python"
    path.write_text(f'#!/bin/bash\nprintf "%s\\n" "$*" >>{folder / "asked"}\n{body}\n')
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("lane", LANES)
def test_every_command_of_a_lane_is_understood(lane, device, tmp_path):
    done = rehearse(lane, tmp_path / "out", stand_in(tmp_path, "[[ $1 == -c ]] && echo NVIDIA H100; exit 0"), device)
    assert done.returncode == 0, done.stderr
    asked = [line.split(" ") for line in (tmp_path / "asked").read_text().splitlines()]
    ours = [words[2:] for words in asked if words[:2] == ["-m", "copedit_rt"]]
    assert len(ours) == {"first": 3, "compare": 3, "deep": 4}[lane]
    for words in ours:
        command, context = get_command(cli.app), None
        while words:  # down to the command itself, whose options are then parsed
            context = command.make_context(command.name, list(words), parent=context)
            if not hasattr(command, "resolve_command"):
                break
            _, command, words = command.resolve_command(context, words)
    presets = re.search(r"--(preset|measure) brain-brats", (tmp_path / "asked").read_text())
    assert bool(presets) == (device == "cuda")
    pieces = re.findall(r"==> (\S+), at most (\d+) s", done.stdout + done.stderr)
    if LANES[lane]:
        assert sum(int(most) for _, most in pieces) <= LANES[lane]
    said = next((tmp_path / "out").rglob(f"{lane}.txt")).read_text()
    assert said.count(": done, ") >= len(ours)


def test_a_failure_is_told_and_stops_nothing_else(tmp_path):
    done = rehearse("first", tmp_path / "out", stand_in(tmp_path, '[[ "$*" == *sampler* ]] && exit 1; exit 0'))
    assert done.returncode == 1
    said = (tmp_path / "out/first/first.txt").read_text()
    assert "loop: failed (1)" in said and "step: done" in said


def test_what_hangs_is_ended(tmp_path):
    text = (ROOT / "bench/gpu.sh").read_text()
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench/gpu.sh").write_text(text.replace("limit=540", "limit=8"))
    command, hang = ["bash", tmp_path / "bench/gpu.sh", "first"], "[[ $1 == --version ]] || sleep 60"
    environment = {"DEVICE": "cpu", "OUT": str(tmp_path / "out"), "PYTHON": str(stand_in(tmp_path, hang))}
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=300)
    said = (tmp_path / "out/first/first.txt").read_text()
    assert done.returncode == 0 and "out of time" in said and "no time left" in said


def test_nothing_needs_what_a_bare_machine_lacks():
    """With nibabel, monai, xformers and flash-attn blocked, every GPU test is collected and all that the script runs is
    imported."""
    files = subprocess.run(
        ["grep", "-rlE", r"mark\.gpu\b", "tests", "--include=test_*.py"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    code = BLOCKED + (
        "import importlib, pytest\n"
        "for name in ('operators.measure', 'operators.tables', 'models.sampler', 'models.train_step', 'predict'):\n"
        "    importlib.import_module('copedit_bench.' + name)\n"
        "assert not {'nibabel', 'monai'} & set(sys.modules)\n"
        "sys.exit(pytest.main(['--collect-only', '-m', 'gpu', '-p', 'no:cacheprovider', *sys.argv[1:]]))"
    )
    folders = [str(ROOT / part) for part in ("", "kernels", "training", "bench")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders)}
    done = subprocess.run(
        [sys.executable, "-c", code, *files], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert sum("::" in line for line in done.stdout.splitlines()) > 200


@pytest.mark.slow
def test_the_first_lane_from_end_to_end(tmp_path):
    """On the CPU, with tiny models: no line of the script is new on the day."""
    done = rehearse("first", tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "of peak" in (tmp_path / "first/predictions.md").read_text()
    said = (tmp_path / "first/first.txt").read_text()
    assert "loop: done" in said and "step: done" in said
    assert {path.name for path in (tmp_path / "first").glob("*.json")} == {
        "kernels.json",
        "sampler.json",
        "train-step.json",
    }
