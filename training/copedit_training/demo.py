"""The body of `copedit demo`: held-out simulated studies as files, `synth` run on them, scores, a picture."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from copedit_rt import checkpoint
from copedit_rt.cohort import synthesise
from copedit_rt.config import ModelConfig
from copedit_rt.images import preview
from copedit_rt.images.nifti import Volume, read_volume
from copedit_rt.images.study import Study
from copedit_rt.listener import Listener
from copedit_rt.task import STACK, Task
from copedit_training.data import prepared
from copedit_training.evaluation import compare, evaluate

if TYPE_CHECKING:
    from rich.console import RenderableType

MODELS: dict[str, str] = {Task.BRAIN: "demo-brain", Task.HEART: "demo-cardiac"}
REMOVED = ("flair", "t1ce", "t2", "t1")  # from the first, the second, ... brain
FIT_SUBJECTS = 8  # training phantoms for the regression baseline


def run(
    output: Path,
    *,
    subjects: int = 1,
    seed: int = 12,
    device: str = "auto",
    models: Mapping[str, str | Path] = MODELS,
    listener: Listener | None = None,
) -> dict[str, Any]:
    """Write, synthesise and score `subjects` brains and as many hearts; JSON-able.

    Below `output`: truth/ holds the complete studies, input/ the same without what was removed, output/ what
    `synth` made of input/, demo.png a picture. seed: the first
    subject is HELD_OUT + seed; 12 is one with a lesion.
    """
    start = time.perf_counter()
    studies, pictures = [], []
    for model in models.values():
        config = checkpoint.read_config(checkpoint.locate(model))
        for i in range(subjects):
            study, picture = _one(output, config, str(model), prepared.HELD_OUT + seed + i, i, device, listener)
            studies.append(study)
            if i == 0:
                pictures.append(picture)
    path = output / "demo.png"
    preview.save(preview.stack(pictures), path)
    return {
        "folder": str(output),
        "picture": str(path),
        "studies": studies,
        "seconds": round(time.perf_counter() - start, 1),
    }


def _one(
    output: Path, config: ModelConfig, model: str, seed: int, index: int, device: str, listener: Listener | None
) -> tuple[dict[str, Any], preview.Image.Image]:
    """One subject from phantom to scores and picture."""
    phantom = prepared.phantom_subject(config, seed)
    brain = not config.task.joint
    name = f"{'brain' if brain else 'heart'}{seed}"
    truth, given = output / "truth" / name, output / "input" / name
    for folder in (truth, given):
        folder.mkdir(parents=True, exist_ok=True)
    removed = [REMOVED[index % len(REMOVED)]] if brain else []
    slab = config.elements[1 + index % max(1, len(config.elements) - 2)]
    slices = [] if brain else compare.missing_slices(config, phantom, [slab])
    files = {e: f"{name}_{e}.nii.gz" for e in config.elements} if brain else {STACK: f"{name}.nii.gz"}
    for element, file in files.items():
        volume = Volume.from_array(phantom.images[element], phantom.affine())
        volume.save(truth / file)
        (given / file).unlink(missing_ok=True)  # of an earlier run that removed another
        if element not in removed:
            volume.data = volume.data.copy()
            volume.data[..., slices] = 0
            volume.save(given / file)

    results = output / "output" / name
    summary = synthesise([given], results, model=model, device=device, overwrite=True, listener=listener)
    (entry,) = summary["studies"]

    images = {element: read_volume(truth / file).data for element, file in files.items()}
    made = {element: read_volume(Path(path)).data for element, path in entry["outputs"].items()}
    if brain:
        regression = evaluate.fit_regression(config, [removed], FIT_SUBJECTS)
        intensity = compare.intensity_of(entry["record"])
        scores = compare.compare_brain(images, removed, made, intensity, regression)
    else:
        scores = compare.compare_heart(images[STACK], slices, made[STACK])
    report = {
        "study": name,
        "missing": ", ".join(removed) if brain else f"slices {slices[0]}-{slices[-1]}",
        "input": str(given),
        "truth": str(truth),
        "outputs": entry["outputs"],
        "seconds": entry["seconds"],
        "scores": {pair.method: pair.measure() for pair in scores},
    }
    shown = Study.read(given).with_synthetic(made)
    return report, preview.draw(shown, model=config.name, truth={e: images[e] for e in made})


def render(report: Mapping[str, Any]) -> RenderableType:
    """The report as a Rich table and where the files are."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Synthesised against the truth", title_justify="left")
    for heading in ("study", "missing", "method"):
        table.add_column(heading)
    for heading in ("PSNR dB", "SSIM"):
        table.add_column(heading, justify="right")
    for study in report["studies"]:
        best = {metric: max(row[metric] for row in study["scores"].values()) for metric in ("psnr", "ssim")}
        for i, (method, row) in enumerate(study["scores"].items()):
            cells = [
                Text(f"{row[metric]:.{digits}f}", style="bold" if row[metric] == best[metric] else "")
                for metric, digits in (("psnr", 2), ("ssim", 4))
            ]
            label = f"CoPeDiT ({study['seconds']:.1f} s)" if method == "model" else method
            table.add_row(study["study"] if not i else "", study["missing"] if not i else "", label, *cells)
        table.add_section()
    folder = Path(report["folder"])
    lines = [
        f"inputs   {folder / 'input'}",
        f"outputs  {folder / 'output'}",
        f"truth    {folder / 'truth'}",
        f"picture  {report['picture']}",
        f"{report['seconds']:.0f} s; all subjects are simulated and were not seen in training",
    ]
    return Group(table, *lines)
