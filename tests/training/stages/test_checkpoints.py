"""The run folder: whose it is, and what survives in it."""

import itertools
import json
import os
import shutil
import subprocess

import pytest
import torch

from copedit_rt import files
from copedit_rt.errors import CopeditError
from copedit_training.data.prepared import phantom_images
from copedit_training.stages.checkpoints import claim, cut_log, restore, store
from copedit_training.stages.step import Optimization
from copedit_training.stages.tokenizer_task import TokenizerTask
from tests.training.stages.tiny import TINY, settings, smooth, train


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


DESCRIBED = {"stage": "tokenizer", "settings": {}, "model": TINY.to_dict()}


@pytest.mark.parametrize("content", ["", "{", "[]", '"x"', '{"stage": "tokenizer"}', '{"model": 3}', '{"model": {}}'])
def test_a_run_json_that_describes_no_run_is_named(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(CopeditError, match=r"run\.json: does not describe a run"):
        claim(tmp_path, DESCRIBED, resume=True)


def test_a_folder_in_place_of_a_file_is_named(tmp_path):
    (tmp_path / "run.json").mkdir()
    with pytest.raises(CopeditError, match=r"run\.json: does not describe a run"):
        claim(tmp_path, DESCRIBED, resume=True)
    (tmp_path / "log.jsonl").mkdir()
    with pytest.raises(CopeditError, match=r"log\.jsonl: cannot be read"):
        cut_log(tmp_path / "log.jsonl", 3)
    (tmp_path / "phantom.npy").mkdir()
    with pytest.raises(CopeditError, match=r"phantom\.npy: not what a run keeps there"):
        phantom_images(TINY, 2, tmp_path / "phantom.npy")


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"PK\x03\x04", b"\x80\x04K\x01."])
def test_images_that_are_none_are_named(tmp_path, content):
    (tmp_path / "phantom.npy").write_bytes(content)
    with pytest.raises(CopeditError, match=r"phantom\.npy: not what a run keeps there"):
        phantom_images(TINY, 2, tmp_path / "phantom.npy")


def test_a_log_is_cut_to_the_checkpoint(tmp_path):
    path = tmp_path / "log.jsonl"
    cut_log(path, 3)
    lines = [f'{{"step": {step}, "l1": 0.5}}\n' for step in range(6)]
    path.write_text("".join(lines[:4]) + "nonsense\n" + "".join(lines[2:]) + '{"step": 6, "l')
    cut_log(path, 3)
    assert path.read_text() == "".join(lines[:3]) + lines[2]
    cut_log(path, 0)
    assert path.read_text() == ""


def test_what_dead_processes_left_is_swept_and_of_the_living_kept(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    names = [".images.npy.{}.tmp.npy", ".images.npy.0123456789abcdef.{}.tmp.npy", ".images.json.{}.part"]
    for pid in (gone.pid, os.getpid()):
        for name in names:
            (tmp_path / name.format(pid)).write_bytes(b"x")
    (tmp_path / "checkpoint-00000004.tmp").mkdir()
    for mark in ("1234567890123456", "abcdef0123456789"):  # of writers that are gone; the first looks like a number
        (tmp_path / f".checkpoint-00000006.{mark}.parts").mkdir()
        (tmp_path / f".checkpoint-00000006.{mark}.part").touch()
        (tmp_path / f".log.jsonl.{mark}.part").touch()
    claim(tmp_path, DESCRIBED, resume=False)
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {"run.json", *(name.format(os.getpid()) for name in names)}


def stored(folder, *steps):
    for step in steps:
        store(folder, step, {"task": {"a": torch.full((2,), float(step))}, "optimizer": {}}, keep=9)


def test_a_link_where_a_checkpoint_is_written_is_not_followed(tmp_path):
    (tmp_path / "victim").mkdir()
    (tmp_path / "checkpoint-00000002.tmp").symlink_to(tmp_path / "victim")
    stored(tmp_path, 2)
    assert restore(tmp_path)[0] == 2 and not list((tmp_path / "victim").iterdir())


def test_a_checkpoint_is_whole_or_not_there(tmp_path, monkeypatch):
    """Whatever a writer does last."""
    stored(tmp_path, 2)
    real = files.os.replace
    for at in range(1, 5):  # three files and the folder
        calls = itertools.count(1)

        def dies(*given, at=at, calls=calls):
            if next(calls) == at:
                raise KeyboardInterrupt
            real(*given)

        monkeypatch.setattr(files.os, "replace", dies)
        with pytest.raises(KeyboardInterrupt):
            stored(tmp_path, 4)
        assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-00000002"] and restore(tmp_path)[0] == 2


@pytest.mark.parametrize("name", ["task.safetensors", "optimizer.safetensors", "checksums.json"])
@pytest.mark.parametrize("damage", ["gone", "empty", "halved", "a bit"])
def test_a_damaged_checkpoint_names_the_intact_one_before_it(tmp_path, name, damage):
    stored(tmp_path, 2, 4, 6, 8)
    (tmp_path / "checkpoint-00000006" / "task.safetensors").unlink()
    path = tmp_path / "checkpoint-00000008" / name
    content = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "a bit":
        content[-3] ^= 4
        path.write_bytes(content)
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "halved" else b"")
    if (name, damage) == ("checksums.json", "gone"):  # as older versions wrote it
        assert restore(tmp_path)[0] == 8
        return
    with pytest.raises(
        CopeditError, match=r"checkpoint-00000008.*(damaged|missing).*; delete .*8, and the same command goes on from"
    ):
        restore(tmp_path)
    shutil.rmtree(tmp_path / "checkpoint-00000008")
    with pytest.raises(CopeditError, match=r"goes on from .*checkpoint-00000004"):
        restore(tmp_path)
    shutil.rmtree(tmp_path / "checkpoint-00000006")
    done, task, optimizer = restore(tmp_path)
    assert done == 4 and task["a"].tolist() == [4.0, 4.0] and not optimizer


def test_no_intact_checkpoint_says_to_start_again(tmp_path):
    assert restore(tmp_path) is None
    stored(tmp_path, 2)
    (tmp_path / "checkpoint-00000002" / "task.safetensors").write_bytes(b"PK")
    with pytest.raises(CopeditError, match="no other one is intact: start again in another folder"):
        restore(tmp_path)


KEYS = ["x", "0.0", "scaler.scale", "1.0.exp_avg", "5.0.exp_avg", "0.9999.exp_avg", "0.0.colour", "-1.0.step"]
KEYS += ["0.0.step"]


@pytest.mark.parametrize("key", KEYS)
def test_foreign_optimizer_tensors_are_named(key):
    optimization = Optimization(TokenizerTask(TINY, settings("tokenizer"), smooth(TINY, 2)))
    with pytest.raises(CopeditError, match=f"^o: {key} is of no optimizer of this run; resume with another checkpoint"):
        optimization.load({key: torch.zeros(3)}, "o")
