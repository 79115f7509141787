"""What each pretext task is worth to the tokenizer (Tables 6 and 10), and what prompts look like without them (Figure
1c).

Every variant is trained by stage I's own code: the same subjects, crops, missing patterns and first weights under a
seed, the weight of one task, or of all, set to 0. What is said of a difference is said beside its standard error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from copedit_rt import checkpoint
from copedit_rt.config import ModelConfig
from copedit_rt.errors import CopeditError
from copedit_rt.networks.tokenizer import CoPeVAE
from copedit_training.evaluation.beside import deviation, paired
from copedit_training.evaluation.evaluate import missing_patterns
from copedit_training.evaluation.features import Networks
from copedit_training.evaluation.metrics import measure
from copedit_training.evaluation.report import number, save_figure, spread, table, write
from copedit_training.experiments.analysis import KINDS, Grouped, Probe, distribution, separation
from copedit_training.experiments.experiment import Experiment, Variant, distances, held_out_words, look, looked
from copedit_training.stages.settings import TokenizerSettings, load_settings
from copedit_training.stages.tokenizer_task import TokenizerTask
from copedit_training.stages.trainer import check_subjects

# A short budget, a twentieth of the demo's steps; without `--full` these replace the preset's own.
REDUCED = (
    "steps=200",
    "quantise_from=100",
    "prompt_steps=0",
    "readout_steps=1000",
    "pretext_every=10",
    "warmup=50",  # with 10 the preset's learning rate ends in black images, by the log's PSNR
    "subjects=128",
    "checkpoint_every=50",
    "keep=1",
)
IDLE = ("count_weight", "position_weight", "contrast_weight", "validate_every", "validate_subjects", "patients")


@dataclass(frozen=True)
class TokenizerVariant(Variant):
    """without: which of the tasks `KINDS` are left out."""

    without: tuple[int, ...]


VARIANTS = (
    TokenizerVariant("full", "all tasks (CoPeVAE)", ()),
    TokenizerVariant("no-count", "without task 1 (how many)", (0,)),
    TokenizerVariant("no-position", "without task 2 (which)", (1,)),
    TokenizerVariant("no-contrast", "without task 3 (what)", (2,)),
    TokenizerVariant("none", "without pretext tasks", (0, 1, 2)),
)


class Seen(Probe):
    """A tokenizer without a denoiser, and the held-out subjects of an experiment, as the analyses see them."""

    @torch.no_grad()
    def __init__(self, config: ModelConfig, vae: CoPeVAE, images: np.ndarray):
        self.config, self.vae, self.images = config, vae.eval(), images.astype(np.float32)
        self.device, self.people = next(vae.parameters()).device, torch.arange(len(images))
        self.raw = torch.cat([vae.encode(torch.from_numpy(x)[None].to(self.device)).float() for x in self.images])
        self.each = vae.prompts_of_each(self.raw)
        self.patterns = observed_patterns(config)


def observed_patterns(config: ModelConfig) -> torch.Tensor:
    """Every missing pattern as observed elements [S, m] (bool)."""
    every = [missing for some in missing_patterns(config).values() for missing in some]
    return torch.tensor([[e not in missing for e in config.elements] for missing in every])


class TokenizerExperiment(Experiment[TokenizerVariant, TokenizerSettings, TokenizerTask]):
    """Variants of stage I."""

    stage = "tokenizer"

    def __init__(
        self,
        folder: Path,
        preset: str,
        overrides: Sequence[str] = (),
        *,
        data: str = "phantom",
        full: bool = False,
        config: ModelConfig | None = None,
        **shared: Any,
    ) -> None:
        """config replaces the preset's model; the rest as in `Experiment`. Raises CopeditError for settings that do
        not exist or are what is compared, and for a folder that holds other settings."""
        for item in overrides:
            if item.partition("=")[0] in IDLE:
                raise CopeditError(f"--set {item}: an ablation of the pretext tasks sets it itself; leave it out")
        check_subjects(data, overrides)
        config = config or ModelConfig.preset(preset)
        settings = load_settings("tokenizer", preset, (*(() if full else REDUCED), *overrides))
        super().__init__(folder, config, settings, {"stage": "pretext"}, data=data, full=full, least=2, **shared)

    def task(self, variant: TokenizerVariant, seed: int) -> TokenizerTask:
        """Stage I of a variant, before its first step."""
        weights: dict[str, Any] = {f"{KINDS[i]}_weight": 0.0 for i in variant.without}
        torch.manual_seed(seed)
        return TokenizerTask(self.config, replace(self.settings, seed=seed, **weights)).on(self.images)

    def scores(
        self,
        variant: TokenizerVariant,
        task: TokenizerTask,
        log: Sequence[Mapping[str, Any]],
        networks: Networks | None,
    ) -> dict[str, Any]:
        """Parameters, seconds, how prompts lie (`separation`), and of each held-out subject what `score` says."""
        seen = Seen(self.config, task.tokenizer, self.held_out)
        groups = separation(Grouped.of(seen))
        return {
            "parameters": parameters(task.tokenizer, variant),
            "seconds_per_step": float(np.mean([x["seconds"] for x in log])),
            "separation": {
                kind: {label: v["nearest_neighbours"] for label, v in x.items()} for kind, x in groups.items()
            },
            "subjects": [score(seen, i, networks) for i in range(len(self.held_out))],
        }

    def figure(self, seed: int) -> Path:
        """Figure 1c: t-SNE of the prompts with the pretext tasks above, without them below."""
        from matplotlib import pyplot as plt

        rows = []
        for variant in (VARIANTS[0], VARIANTS[-1]):
            where = self.folder / f"{variant.name}-seed{seed}" / "model"
            drawn = distribution(Seen(self.config, checkpoint.load_tokenizer(where)[1], self.held_out))[1]
            drawn.canvas.draw()
            rows.append(np.asarray(drawn.canvas.buffer_rgba()))  # type: ignore[attr-defined]
            plt.close(drawn)
        figure, axes = plt.subplots(2, 1, figsize=(7.2, 7.0), layout="constrained")
        for ax, row, title in zip(axes, rows, ("with pretext tasks", "without"), strict=True):
            ax.imshow(row)
            ax.set_title(title)
            ax.axis("off")
        save_figure(figure, self.folder / "pretext.png", dpi=220)
        plt.close(figure)
        return self.folder / "pretext.png"


def parameters(vae: CoPeVAE, variant: TokenizerVariant) -> int:
    """Weights and codes of a tokenizer without the encoders and heads of what is left out."""
    parts: list[nn.Module] = [x[i] for i in variant.without for x in (vae.prompt_encoders, vae.heads)]
    idle = sum(p.numel() for part in parts for p in part.parameters())
    return sum(p.numel() for p in vae.parameters()) - idle


@torch.no_grad()
def score(seen: Seen, subject: int, networks: Networks | None = None) -> dict[str, float]:
    """Of a held-out subject the reconstruction's PSNR (dB) and SSIM, of a brain inside it, while networks see it; and
    the shares of its missing patterns of which the heads say right how many, and exactly which, are missing."""
    vae, images = seen.vae, seen.images[subject, :, 0]
    made = vae.images(vae.normalise(seen.raw[subject : subject + 1]), joint=seen.config.task.joint)[0, :, 0].float()
    shown = None if seen.config.task.joint else np.any(images > 0, axis=0)
    final = made.clamp(0, 1).cpu().numpy()
    found = [measure(a, b, mask=shown) for a, b in zip(final, images, strict=True)]
    if networks:
        networks.next_subject()
        for element, a, b in zip(seen.config.elements, final, images, strict=True):
            look(networks, "all", element, a, b, seen.config.task.joint)
    inside = "" if shown is None else "_inside"
    own = torch.full((len(seen.patterns),), subject)
    count, which, _ = vae.assess(seen.prompts(own, seen.patterns))
    missing = ~seen.patterns.to(count.device)
    return {
        "psnr": float(np.mean([x[f"psnr{inside}"] for x in found])),
        "ssim": float(np.mean([x[f"ssim{inside}"] for x in found])),
        "count": (count.argmax(1) == missing.sum(1) - 1).float().mean().item(),
        "which": ((which > 0) == missing).all(1).float().mean().item(),
    }


def ablate(experiment: TokenizerExperiment) -> dict[str, Any]:
    """Train what is not there yet, and report; JSON-able. Raises CopeditError without the extra `train`."""
    try:
        import matplotlib
        import sklearn  # noqa: F401
    except ImportError as error:
        raise CopeditError(f"this ablation needs {error.name}: pip install -c constraints.txt -e '.[train]'") from error
    matplotlib.use("Agg")
    runs = experiment.runs(VARIANTS)
    values = {
        name: {key: np.array([[x[key] for x in run["subjects"]] for run in own]) for key in ("psnr", "ssim")}
        for name, own in runs.items()
    }
    rows = {}
    for v in VARIANTS:
        own = runs[v.name]
        cell: dict[str, Any] = {"label": v.label, "without": v.without}
        for key in ("psnr", "ssim"):
            cell[key] = {"mean": float(values[v.name][key].mean()), "sd": deviation(values[v.name][key].mean(0))}
            if v.without:
                cell[key]["difference"] = paired(values[v.name][key], values["full"][key])
        for key in ("count", "which"):
            cell[key] = float(np.mean([x[key] for run in own for x in run["subjects"]]))
        cell["separation"] = {
            "count": float(np.mean([run["separation"]["count"]["count"] for run in own])),
            "identity": float(np.mean([run["separation"]["position"]["identity"] for run in own])),
        }
        if experiment.networks:
            cell["frechet"] = distances(own, "all")
        rows[v.name] = cell | {k: float(np.mean([run[k] for run in own])) for k in ("parameters", "seconds_per_step")}
    figure = experiment.figure(experiment.seeds[0]).name
    return {
        "ablation": "pretext",
        "seeds": experiment.seeds,
        "figure": figure,
        "table": rows,
        **experiment.described,
        **experiment.named_networks(),
    }


def markdown(report: Mapping[str, Any]) -> str:
    """The report as the paper's two tables."""
    settings, rows = report["settings"], list(report["table"].values())
    where = "simulated" if report["data"] == "phantom" else report["data"]
    lines = [
        "# Ablation: pretext",
        "",
        f"{report['model']['name']}, {where}: {settings['steps']} steps, {settings['readout_steps']} of the read-out, "
        f"{held_out_words(report)} Reconstruction: mean ± standard deviation over subjects; differences "
        "to all tasks on the same subjects ± standard error, resolved where it is more than two of them from zero and "
        "the seeds agree.",
        "",
    ]
    body, far = [], [name.upper() for name in report.get("networks", {})]
    for row in rows:
        cells = [spread(row[k], n) for k, n in (("psnr", 2), ("ssim", 3))]
        cells += [number(x) for x in row.get("frechet", {}).values()]
        if difference := row["psnr"].get("difference"):
            cells += [
                f"{difference['mean']:+.3f} ± {difference['standard_error']:.3f}",
                "yes" if difference["resolved"] else "no",
            ]
        body.append([row["label"], *cells, *[""] * (4 + len(far) - len(cells))])
    lines += [*table(["", "PSNR (dB)", "SSIM", *far, "difference (dB)", "resolved"], body, 1), "", *looked(report)]
    body = [
        [
            row["label"],
            *(f"{row[k]:.0%}" if not set(row["without"]) & {i} else "-" for i, k in enumerate(("count", "which"))),
            *(f"{x:.0%}" for x in row["separation"].values()),
            f"{row['parameters'] / 1e6:.2f}",
            f"{row['seconds_per_step']:.2f}",
        ]
        for row in rows
    ]
    heads = ["", "says how many", "says which", "p^d: neighbours agree on how many", "p^p: on which"]
    lines += [*table([*heads, "parameters (M)", "s a step"], body, 1), ""]
    lines.append(f"{report['figure']}: the prompts of held-out subjects with and without the tasks, seed")
    return "\n".join([*lines[:-1], f"{lines[-1]} {report['seeds'][0]}."]) + "\n"


def write_report(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """ablation-pretext.json and .md in a folder, beside the figure."""
    return [*write(report, markdown(report), folder, "ablation-pretext"), folder / report["figure"]]
