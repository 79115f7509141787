"""The run folder: which run it holds, its log, its checkpoints."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from copedit_rt import checkpoint, files
from copedit_rt.checkpoint import CONFIG, DENOISER, TOKENIZER
from copedit_rt.config import ModelConfig
from copedit_rt.errors import CopeditError
from copedit_rt.files import new_folder, read_json, write_atomically
from copedit_rt.prior import PRIOR
from copedit_rt.trained import TRAINING
from copedit_training.stages.settings import DenoiserSettings, TokenizerSettings

SUMS = "checksums.json"  # of the files beside it
TAKEN = ("tokenizer", "prior")  # from a model, of which a run notes the SHA-256
Tensors = dict[str, Tensor]


def check_claim(output: Path, described: Mapping[str, Any], resume: bool) -> None:
    """Raises CopeditError where a folder holds another run, one that is not to be resumed, or something else."""
    path = output / "run.json"
    if not path.exists():
        return
    if not resume:
        raise CopeditError(f"{output}: holds a run already; add --resume to go on with it, or choose another folder")
    try:
        found = _complete(read_json(path))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, CopeditError) as error:
        raise CopeditError(
            f"{path}: does not describe a run ({error}); choose another output folder, or delete this one"
        ) from error
    wanted = json.loads(json.dumps(described))
    own, others = ({key: value for key, value in run.items() if key not in TAKEN} for run in (wanted, found))
    if own != others:
        raise CopeditError(f"{output}: was started with other settings (see {path}); resume with the same ones")
    for key in TAKEN:
        if key in found and found[key] != wanted.get(key):  # older versions noted less
            raise CopeditError(
                f"{output}: was started with another {key} ({path} has its SHA-256); go on with that one, or start "
                f"again in another folder"
            )


def claim(output: Path, described: Mapping[str, Any], resume: bool) -> None:
    """Note in a folder which run it holds, and sweep up what a killed one left; raises as `check_claim`."""
    check_claim(output, described, resume)
    if not (output / "run.json").exists():
        write_atomically(output / "run.json", (json.dumps(described, indent=2) + "\n").encode())
    sweep(output)


def sweep(output: Path) -> None:
    """Delete what processes that are gone left half written."""
    for stale in output.glob("checkpoint-*.tmp"):
        shutil.rmtree(stale, ignore_errors=True)
    for stale in (*output.glob(".*.tmp.npy"), *output.glob(".*.part")):
        pid = stale.name.removesuffix(".npy").split(".")[-2]
        if re.fullmatch("[0-9]{1,10}", pid) and not alive(int(pid)):  # longer: the files' own mark, not a number
            stale.unlink(missing_ok=True)
    files.sweep(output)


def alive(pid: int) -> bool:
    """Whether there is a process of that number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # someone else's
        return True
    return True


def _complete(described: dict[str, Any]) -> dict[str, Any]:
    """A run as an older version described it, with the fields that have been added since and without those that have
    gone; of a method as it is."""
    model = ModelConfig.from_dict(described["model"])
    if "method" in described:
        return described | {"model": json.loads(json.dumps(model.to_dict()))}
    kind = TokenizerSettings if described["stage"] in ("tokenizer", "prior") else DenoiserSettings
    settings = {
        field.name: described["settings"].get(field.name, field.default)
        for field in dataclasses.fields(kind)
        if field.name in described["settings"] or field.default is not dataclasses.MISSING
    }
    return described | {"model": json.loads(json.dumps(model.to_dict())), "settings": settings}


def cut_log(path: Path, start: int) -> None:
    """Drop the lines of a log from step `start` on, which a resumed run writes again, and what is no line of it.

    Raises CopeditError for what is no file.
    """
    if not path.exists():
        return
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    except OSError as error:
        raise CopeditError(f"{path}: cannot be read ({error.strerror}); move it away and resume") from error
    kept = [line for line in lines if line.endswith("\n") and 0 <= _step(line) < start]
    if kept != lines:
        write_atomically(path, "".join(kept).encode())


def _step(line: str) -> int:
    """The step of a line of the log, -1 for what is none."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return -1


def checkpoints(output: Path) -> list[Path]:
    """Oldest first."""
    return sorted(output.glob("checkpoint-" + "[0-9]" * 8))


def store(output: Path, step: int, parts: Mapping[str, Mapping[str, Tensor]], keep: int) -> None:
    """A folder with a safetensors file of each part, complete or absent: written under another name, then renamed."""
    folder = output / f"checkpoint-{step:08d}"
    shutil.rmtree(folder, ignore_errors=True)
    with new_folder(folder) as part:
        sums = {}
        for name, tensors in parts.items():
            checkpoint.write_tensors(part / f"{name}.safetensors", tensors)
            sums[f"{name}.safetensors"] = checkpoint.digest(part / f"{name}.safetensors")
        write_atomically(part / SUMS, json.dumps(sums).encode())
    for old in checkpoints(output)[:-keep]:
        shutil.rmtree(old)


def finished(output: Path, stage: str, steps: int, prior: bool) -> bool:
    """Whether a run of so many steps has come to its end, which writes what its model was trained on last of all, and
    its model is still there. prior: whether that has one."""
    every = checkpoints(output)
    more = (PRIOR,) * prior
    own = {"tokenizer": (TOKENIZER, *more), "denoiser": (TOKENIZER, DENOISER, *more)}
    names = (CONFIG, TRAINING, *own.get(stage, ("method.json", "method.safetensors")))
    there = all((output / "model" / name).is_file() for name in names)
    return there and bool(every) and every[-1].name == f"checkpoint-{steps:08d}"


def restore(output: Path) -> tuple[int, Tensors, Tensors] | None:
    """Steps done, the task's tensors and the optimizer's of the newest checkpoint; None where there is none.

    Raises CopeditError for a damaged one, which names the intact one before it.
    """
    every = checkpoints(output)
    if not every:
        return None
    try:
        return _read(every[-1])
    except CopeditError as error:
        before = next((folder for folder in reversed(every[:-1]) if _intact(folder)), None)
        remedy = f"delete {every[-1]}, and the same command goes on from {before} (of train with --resume)"
        if before is None:
            remedy = "no other one is intact: start again in another folder"
        raise CopeditError(f"{error}; {remedy}") from error


def _read(folder: Path) -> tuple[int, Tensors, Tensors]:
    """Raises CopeditError, without a remedy, for a checkpoint that is not what was stored."""
    sums, parts = _sums(folder), []
    for name in ("task.safetensors", "optimizer.safetensors"):
        if not (folder / name).is_file():
            raise CopeditError(f"{folder}: {name} is missing")
        try:
            tensors, digest = checkpoint.read_tensors(folder / name)
        except CopeditError as error:
            raise CopeditError(f"{folder / name}: damaged") from error
        if sums is not None and sums.get(name) != digest:
            raise CopeditError(f"{folder / name}: damaged, as its checksum is another than when it was stored")
        parts.append(tensors)
    return int(folder.name.removeprefix("checkpoint-")), parts[0], parts[1]


def _sums(folder: Path) -> dict[str, str] | None:
    """File name -> SHA-256; None for a checkpoint of an older version, which has none."""
    path = folder / SUMS
    if not path.exists():
        return None
    try:
        return dict(read_json(path))
    except (OSError, ValueError, TypeError) as error:
        raise CopeditError(f"{path}: damaged") from error


def _intact(folder: Path) -> bool:
    try:
        _read(folder)
    except CopeditError:
        return False
    return True
