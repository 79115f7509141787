"""What has changed since an output was made: its sidecar against what would be asked for now."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from copedit_rt.config import ModelConfig
from copedit_rt.images.study import named_slices
from copedit_rt.schedule import PRIOR_ALONE


def request(config: ModelConfig, sampler: Mapping[str, Any], reading: Mapping[str, Any]) -> dict[str, Any]:
    """What a run asks of a model, as a sidecar has it: "sampler", "output" and "reading".

    sampler: options of `Synthesizer.synthesize`, left out or None for the model's own; reading: those of `Study.read`.
    """
    own = {"steps": config.diffusion.steps, "solver": config.diffusion.solver, "detail": config.preprocessing.detail}
    asked = {"seed": 0, "samples": 1} | own | {name: value for name, value in sampler.items() if value is not None}
    drawn = {name: asked[name] for name in ("steps", "seed", "samples")}
    return {
        "sampler": {"method": asked["solver"] if asked["steps"] else PRIOR_ALONE, **drawn},
        "output": {"detail": asked["detail"]},
        "reading": {
            "missing_slices": sorted(set(named_slices(reading.get("missing_slices")))),
            "resample": bool(reading.get("resample")),
        },
    }


def changes(
    sidecar: Mapping[str, Any],
    model: str,
    weights: Mapping[str, str],
    asked: Mapping[str, Mapping[str, Any]],
    files: Mapping[str, Sequence[Path]],
) -> list[str]:
    """What differs from the run that wrote a sidecar, each in a few words. Of what the sidecar does not hold, no notice
    is taken.

    model: name in the configuration; weights: SHA-256 of its files; asked: a `request`; files: of what is
    observed, several of a DICOM series.
    """
    found = []
    if (before := sidecar.get("model", model)) != model:
        found.append(f"model {before}, now {model}")
    elif any(digest != weights.get(part) for part, digest in _part(sidecar, "weights_sha256").items()):
        found.append(f"other weights of {model}")
    for part, options in asked.items():
        there = _part(sidecar, part)
        found += [f"{k} {there[k]}, now {v}" for k, v in options.items() if k in there and there[k] != v]
    if inputs := _part(sidecar, "inputs"):
        found += _changed_inputs(inputs, files)
    return found


def of_another(sidecar: Mapping[str, Any], study: str, files: Mapping[str, Sequence[Path]]) -> bool:
    """Whether an output is of a study of another name, with not one image in common."""
    if sidecar.get("study", study) == study:
        return False
    inputs = _part(sidecar, "inputs")
    return not any(_same_files(paths, _part(inputs, name)) for name, paths in files.items() if name in inputs)


def _changed_inputs(inputs: Mapping[str, Any], files: Mapping[str, Sequence[Path]]) -> Iterator[str]:
    """Of a sidecar's inputs."""
    for name, paths in files.items():
        if name not in inputs:
            yield f"{name} was not among the inputs"
        elif not _same_files(paths, _part(inputs, name)):
            yield f"{name} is another image"
    yield from (f"{name} was among the inputs" for name in inputs if name not in files)


def _same_files(paths: Sequence[Path], noted: Mapping[str, Any]) -> bool:
    """Whether files are those that were read: by all their bytes and the last change, or else by content."""
    try:
        states = [path.stat() for path in paths]
        size = sum(state.st_size for state in states)
        if [size, max(state.st_mtime_ns for state in states)] == noted.get("size_mtime_ns"):
            return True
        digest = hashlib.sha256()
        for path in paths:
            with open(path, "rb") as file:
                while piece := file.read(1 << 20):
                    digest.update(piece)
        return digest.hexdigest() == noted.get("sha256")
    except OSError:
        return False


def _part(of: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """An object within one; an empty one where there is none."""
    there = of.get(name)
    return there if isinstance(there, Mapping) else {}
