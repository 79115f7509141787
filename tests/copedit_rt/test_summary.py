"""Parts of a cohort, worked on by processes that know nothing of each other, and what became of it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import SHORT_AXIS, files, refused, run, save, slices, study

from copedit_rt import cohort, summary

ROOT = Path(cohort.__file__).parents[1]


@pytest.fixture
def many(tmp_path) -> Path:
    """Seven brains, of which e is broken and g has nothing missing."""
    for name in "abcdefg":
        study(tmp_path / "in" / name, name, ("t1", "t1ce", "t2", "flair") if name == "g" else ("t1", "t2", "flair"))
    (tmp_path / "in" / "e" / "e_t2.nii.gz").write_bytes(b"")
    return tmp_path / "in"


def outputs(names: str) -> set[str]:
    return {f"{n}/{n}_t1ce{end}" for n in names for end in (".nii.gz", ".json")}


@pytest.mark.parametrize("first", [0, 1], ids=["from 0", "from 1"])
def test_shards_make_the_whole(many, tmp_path, brain_model, first):
    command = ["synth", many, "--model", brain_model]
    run(*command, "-o", tmp_path / "whole")
    shares = []
    for i in range(first, first + 3):
        result = run(*command, "-o", tmp_path / "out", "--shard", f"{i}/3", "--json")
        shares.append([entry["study"] for entry in json.loads(result.stdout)["studies"]])
    assert sorted("".join(map("".join, shares))) == list("abcdefg") and max(map(len, shares)) == 3
    assert files(tmp_path / "out") == files(tmp_path / "whole") == outputs("abcdf")
    for name in outputs("abcdf"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_more_shards_than_studies_and_processes_within_one(tmp_path, brain_model, monkeypatch):
    for name in "ab":
        study(tmp_path / "in" / name, name)
    command = ["synth", tmp_path / "in", "-o", tmp_path / "out", "--model", brain_model]
    assert run(*command, "--shard", "3/4").exit_code == 0 and not files(tmp_path / "out")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        assert run(*command, "--shard", "1/1").exit_code == 0
    assert files(tmp_path / "out") == outputs("ab")
    told = {path.name for path in (tmp_path / "out").glob("copedit_summary*")}
    assert told == {"copedit_summary_4of4.json", "copedit_summary_1of2.json", "copedit_summary_2of2.json"}


@pytest.mark.parametrize("text", ["4", "5/4", "0/0", "-1/4", "a/b", "1/4/2", "1/4000000000"])
def test_a_shard_that_does_not_exist(many, tmp_path, brain_model, text):
    command = ["synth", many, "-o", tmp_path / "out", "--model", brain_model, f"--shard={text}"]
    refused(run(*command), f"--shard {text}", "1/4 to 4/4")


def test_the_summary_of_what_shards_did(many, tmp_path, brain_model):
    command = ["synth", many, "-o", tmp_path / "out", "--model", brain_model]
    stack = slices(16, 8)
    before = run(*command, "--summary", "--json")
    assert before.exit_code == 1 and json.loads(before.stdout)["not done"] == 6
    assert not (tmp_path / "out").exists()
    run(*command, "--shard", "1/2")
    half = json.loads(run(*command, "--summary", "--json").stdout)
    assert (half["done"], half["failed"], half["not done"], half["complete"]) == (3, 0, 3, 1)
    run(*command, "--shard", "2/2")
    shown = run(*command, "--summary")
    assert shown.exit_code == 1 and "7 studies: 5 done, 1 complete, 1 failed" in shown.stdout
    told = json.loads(run(*command, "--summary", "--json").stdout)["studies"]
    (failed,) = (row for row in told if row["outcome"] == "failed")
    assert failed["study"] == "e" and "e_t2.nii.gz is an empty file" in failed["error"]
    made = summary.render(told, summary.count(told)).renderables[0].columns[2].cells
    assert [str(cell) for cell in made] == ["t1ce"] * 4 + ["", "t1ce", ""], "what failed was only planned"
    assert all(row["seconds"] > 0 and row["model"] == str(brain_model) for row in told if row["outcome"] == "done")
    # What is on the disk decides, not what somebody once said.
    (tmp_path / "out" / "a" / "a_t1ce.json").unlink()
    save(many / "e" / "e_t2.nii.gz", stack, SHORT_AXIS)
    rows = {row["study"]: row for row in json.loads(run(*command, "--summary", "--json").stdout)["studies"]}
    assert rows["a"]["outcome"] == "not done" and rows["b"]["outcome"] == "done" and rows["e"]["outcome"] == "failed"
    study(many / "e", "e")
    repeated = run(*command)
    assert repeated.exit_code == 0 and "2 written, 4 kept, 1 with nothing missing, 0 failed" in repeated.stderr
    assert run(*command, "--summary").exit_code == 0
    (tmp_path / "out" / "copedit_summary_1of2.json").write_text("{")
    assert run(*command, "--summary").exit_code == 0
    assert len(summary.gather(tmp_path / "out")) == 7


def test_what_failed_last_is_not_done(tmp_path, brain_model, monkeypatch):
    """Though the output of an earlier run is there."""
    for name in "ab":
        study(tmp_path / "in" / name, name)
    command = ["synth", "-i", tmp_path / "in", "-o", tmp_path / "out", "--model", brain_model]
    quiet = [*command, "--summary", "-q"]
    assert run(*command).exit_code == 0
    done = run(*quiet)
    assert done.exit_code == 0 and done.stdout == ""
    with monkeypatch.context() as patch:
        real = cohort.Job.compute

        def compute(job, opened, study):
            if opened.files.name == "a":
                raise MemoryError
            return real(job, opened, study)

        patch.setattr(cohort.Job, "compute", compute)
        assert run(*command, "--overwrite").exit_code == 1
    left = run(*quiet)
    assert left.exit_code == 1 and "2 studies: 1 done, 1 failed" in left.stdout
    assert "│ a " in left.stdout and "│ b " not in left.stdout
    assert run(*command, "--overwrite").exit_code == 0 and run(*quiet).exit_code == 0
    assert run(*command, "--target", "t1").exit_code == 1 and run(*quiet).exit_code == 0, "nothing was to be replaced"


def test_an_index_of_all_shards(many, tmp_path, brain_model):
    command = ["synth", many, "-o", tmp_path / "out", "--model", brain_model, "--report"]
    run(*command, "--shard", "1/2")
    run(*command, "--shard", "2/2")
    text = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert re.findall(r'href="(.+?)"', text) == [f"{n}/{n}_report.html" for n in "abcdf"]
    assert all((tmp_path / "out" / link).is_file() for link in re.findall(r'href="(.+?)"', text))


def test_a_killed_shard_and_one_that_was_started_twice(tmp_path, brain_model):
    """Three processes on one output folder, one killed with a file half written: repeated, all of it is there."""
    for name in "abcdef":
        study(tmp_path / "in" / name, name)
    command = [sys.executable, "-m", "copedit_rt", "synth", str(tmp_path / "in"), "-o", str(tmp_path / "out")]
    command += ["--model", str(brain_model), "--samples", "5", "-q", "--shard"]
    started = [subprocess.Popen([*command, shard], cwd=ROOT) for shard in ("0/2", "1/2", "1/2")]
    until = time.monotonic() + 300
    while not files(tmp_path / "out") and time.monotonic() < until:
        time.sleep(0.01)
    started[0].send_signal(signal.SIGKILL)
    assert [process.wait(300) for process in started] == [-signal.SIGKILL, 0, 0]
    assert outputs("bdf") <= {name for name in files(tmp_path / "out") if not name.endswith(".part")}
    again = run(*command[3:-1], "--shard", "0/2")
    assert again.exit_code == 0 and outputs("abcdef") <= files(tmp_path / "out")
    assert not [name for name in files(tmp_path / "out") if name.endswith(".part")]
    assert run(*command[3:9], "--summary").exit_code == 0


def script(page: str, kind: str) -> str:
    (text,) = re.findall(rf"^```{kind}\n(.+?)^```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.M | re.S)
    return text


@pytest.mark.parametrize("first", [0, 1])
def test_the_script_for_slurm(tmp_path, brain_model, first):
    """The page's own, with the variables that Slurm sets, for arrays that count from 0 and from 1."""
    for name in "abc":
        study(tmp_path / "COHORT" / name, name)
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "copedit").write_text(
        f'#!/bin/sh\nexec {sys.executable} -m copedit_rt "$@" --model {brain_model} --device cpu\n'
    )
    (tools / "copedit").chmod(0o755)
    for i in range(first, first + 2):
        array = {"SLURM_ARRAY_TASK_ID": str(i), "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_CPUS_PER_TASK": "1"}
        path = {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
        text = script("cluster.md", "bash")
        done = subprocess.run(["bash", "-c", text], cwd=tmp_path, env=os.environ | array | path, capture_output=True)
        assert done.returncode == 0, done.stderr
    assert files(tmp_path / "OUT") == outputs("abc")


def test_the_recipe_for_snakemake_and_the_dockerfile():
    """They name commands, options and files that exist."""
    commands = re.findall(r'shell: f"(.+)"', script("cluster.md", "python"))
    assert [eval(f"f{command!r}", {"N": 4}) for command in commands] == [
        "copedit synth -i COHORT -o OUT --shard {wildcards.i}/4"
    ]
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    for source in re.findall(r"^COPY (.+) \S+$", text, re.M):
        assert all((ROOT / part).exists() for part in source.split() if not part.startswith("--")), source
