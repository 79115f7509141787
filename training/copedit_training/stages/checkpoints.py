"""The run folder: which run it holds, and its checkpoints."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from copedit_rt import checkpoint
from copedit_rt.config import ModelConfig
from copedit_rt.errors import CopeditError
from copedit_rt.files import write_atomically
from copedit_training.stages.settings import DenoiserSettings, TokenizerSettings


def claim(output: Path, described: dict[str, Any], resume: bool) -> None:
    """Note in a folder which run it holds. Raises CopeditError where it holds another one, or is not to be resumed."""
    path = output / "run.json"
    if not path.exists():
        write_atomically(path, (json.dumps(described, indent=2) + "\n").encode())
    elif not resume:
        raise CopeditError(f"{output}: holds a run already; add --resume to go on with it, or choose another folder")
    elif _complete(json.loads(path.read_text())) != json.loads(json.dumps(described)):
        raise CopeditError(f"{output}: was started with other settings (see {path}); resume with the same ones")


def _complete(described: dict[str, Any]) -> dict[str, Any]:
    """A run as an older version described it, with the fields that have been added since and without those that have
    gone."""
    model = ModelConfig.from_dict(described["model"])
    kind = TokenizerSettings if described["stage"] == "tokenizer" else DenoiserSettings
    settings = {
        field.name: described["settings"].get(field.name, field.default)
        for field in dataclasses.fields(kind)
        if field.name in described["settings"] or field.default is not dataclasses.MISSING
    }
    return described | {"model": json.loads(json.dumps(model.to_dict())), "settings": settings}


def checkpoints(output: Path) -> list[Path]:
    return sorted(output.glob("checkpoint-*[0-9]"))


def store(output: Path, step: int, module: nn.Module, optimizers: Sequence[torch.optim.Optimizer], keep: int) -> None:
    """A folder of safetensors, complete or absent: written under another name, then renamed."""
    folder = output / f"checkpoint-{step:08d}"
    temporary = output / f"{folder.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    checkpoint.write_tensors(temporary / "task.safetensors", module.state_dict())
    flat = {
        f"{k}.{i}.{name}": value
        for k, optimizer in enumerate(optimizers)
        for i, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }
    checkpoint.write_tensors(temporary / "optimizer.safetensors", flat)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    for old in checkpoints(output)[:-keep]:
        shutil.rmtree(old)


def restore(output: Path, module: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> int:
    """Load the newest checkpoint; returns the number of steps done."""
    found = checkpoints(output)
    if not found:
        return 0
    checkpoint.fill(module, checkpoint.read_tensors(found[-1] / "task.safetensors")[0], found[-1])
    flat, _ = checkpoint.read_tensors(found[-1] / "optimizer.safetensors")
    states: list[dict[int, dict[str, Tensor]]] = [{} for _ in optimizers]
    for key, value in flat.items():
        k, index, name = key.split(".", 2)
        states[int(k)].setdefault(int(index), {})[name] = value
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(found[-1].name.removeprefix("checkpoint-"))
