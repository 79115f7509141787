"""Ablations (Tables 4, 7, 8 and 16): what the prompts, their injection, the backbone and an informed prior are worth.

Every variant is trained by stage II's own code on the latents of one frozen tokenizer: the same subjects, crops,
missing patterns, timesteps and noise in the same order, and the same first weights wherever two have the same layer.
Two runs that differ in nothing but the seed differ, too; so every variant is trained with several seeds, and what is
said about a difference is said beside its standard error and the difference under each seed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from copedit_rt import checkpoint
from copedit_rt.config import ModelConfig
from copedit_rt.errors import CopeditError
from copedit_rt.networks.denoiser import MDiT3D, UNet
from copedit_rt.networks.sampler import sample
from copedit_rt.networks.tokenizer import CoPeVAE
from copedit_rt.prior import PRIOR, Prior
from copedit_rt.schedule import begun, noise
from copedit_rt.task import Task
from copedit_training.evaluation.beside import deviation, paired
from copedit_training.evaluation.evaluate import missing_patterns
from copedit_training.evaluation.features import Networks
from copedit_training.evaluation.metrics import measure
from copedit_training.evaluation.report import difference, number, spread, table, write
from copedit_training.experiments.analysis import check_prior
from copedit_training.experiments.experiment import Experiment, Variant, distances, held_out_words, look, looked
from copedit_training.stages.denoiser_task import DenoiserTask
from copedit_training.stages.prior import fit_prior
from copedit_training.stages.settings import DenoiserSettings, load_settings
from copedit_training.stages.trainer import check_subjects

Ablation = Literal["prompts", "injection", "backbone", "prior", "identity"]

# Enough for differences of a tenth of a dB, and little enough for two CPU cores. Without `--full`, these and `NETWORK`
# replace the preset's own.
REDUCED = (
    "steps=200",
    "whole_steps=0",
    "crop=24",
    "batch_size=12",
    "warmup=20",
    "subjects=256",
    "ema=0.97",
    "compile=false",
    "checkpoint_every=50",
    "keep=1",
)
NETWORK = {"width": 96, "heads": 3, "blocks": 4}
NUMBERS = {"width": 1, "heads": 1, "blocks": 1, "patch": 3}  # what of the network can be set, and in how many numbers
IDLE = ("image_weight", "validate_every", "validate_subjects")  # settings that have no effect here


@dataclass(frozen=True)
class DenoiserVariant(Variant):
    """changes: what it has in place of the reference's, fields of `DenoiserConfig`; a width is a multiple of the
    reference's. start: where its sampling does, see `DiffusionConfig`. Not trained, a network with a prior returns the
    fill."""

    changes: Mapping[str, Any]
    start: float = 1.0


# The first row of each is the reference, the paper's choice.
VARIANTS: dict[Ablation, tuple[DenoiserVariant, ...]] = {
    "prompts": (
        DenoiserVariant("full", "all prompts (CoPeDiT)", {}),
        DenoiserVariant("no-count", "without p^d (how many)", {"prompts": "no-count"}),
        DenoiserVariant("no-position", "without p^p (which)", {"prompts": "no-position"}),
        DenoiserVariant("no-contrast", "without p^s (what)", {"prompts": "no-contrast"}),
        DenoiserVariant("none", "without prompts", {"prompts": "none"}),
        DenoiserVariant("mask", "mask codes", {"prompts": "mask"}),
    ),
    "injection": (
        DenoiserVariant("full", "across (modal / spatial)", {}),
        DenoiserVariant("within", "within (spatial / planar)", {"injection": "within"}),
        DenoiserVariant("both", "both", {"injection": "both"}),
    ),
    "backbone": (
        DenoiserVariant("full", "MDiT3D", {}),
        DenoiserVariant("dit3d", "DiT-3D", {"backbone": "dit3d"}),
        DenoiserVariant("dit3d-wide", "DiT-3D, twice as wide", {"backbone": "dit3d", "width": 2}),
        DenoiserVariant("dit", "DiT", {"backbone": "dit"}),
        DenoiserVariant("unet", "UNet", {"backbone": "unet"}),
    ),
    "identity": (
        DenoiserVariant("full", "sine and cosine of the index (CoPeDiT)", {}),
        DenoiserVariant("orthogonal", "orthogonal directions", {"identity": "orthogonal"}),
    ),
    "prior": (
        DenoiserVariant("full", "from noise (CoPeDiT)", {}),
        DenoiserVariant("fill", "the fill alone", {"prior": True}, trained=False),
        DenoiserVariant("prior", "the fill beside the noise, corrected", {"prior": True}),
        DenoiserVariant("noised", "the same, from the noised fill", {"prior": True}, start=0.3),
    ),
}
METRICS = ("psnr", "ssim", "mse")


def variant_config(config: ModelConfig, variant: DenoiserVariant) -> ModelConfig:
    """The reference's configuration with a variant's changes; heads keep their dimension."""
    changes = dict(variant.changes)
    if wider := changes.pop("width", 0):
        changes |= {"width": config.denoiser.width * wider, "heads": config.denoiser.heads * wider}
    diffusion = replace(config.diffusion, start=variant.start)
    return replace(config, denoiser=replace(config.denoiser, **changes), diffusion=diffusion)


# -------------------------------------------------------------------------------------------------------- training


class DenoiserExperiment(Experiment[DenoiserVariant, DenoiserSettings, DenoiserTask]):
    """Variants of stage II: they share latents and tokenizer, too."""

    stage = "denoiser"

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
        not exist, a tokenizer of another model and a folder that holds other settings."""
        for item in overrides:
            if item.partition("=")[0] in IDLE:
                raise CopeditError(f"--set {item}: an ablation trains the denoiser alone and measures it at the end")
        check_subjects(data, overrides)
        own = [x for x in overrides if x.partition("=")[0] in NUMBERS]
        rest = [x for x in overrides if x not in own]
        network: dict[str, Any] = {} if full else dict(NETWORK)
        for item in own:
            key, _, text = item.partition("=")
            parts, wanted = text.split(","), NUMBERS[key]
            if len(parts) != wanted or not all(x.isdecimal() and int(x) for x in parts):
                raise CopeditError(f"--set {item}: expected {wanted} positive number{'s, as in 4,4,1' * (wanted > 1)}")
            numbers = tuple(map(int, parts))
            network[key] = numbers if wanted > 1 else numbers[0]
        base = config or ModelConfig.preset(preset)
        check_prior(base)
        # The decoder stays the same for all: what differs is the denoiser.
        settings = load_settings("denoiser", preset, (*(() if full else REDUCED), *rest, "image_weight=0"))
        source = settings.tokenizer or preset
        trained, self.tokenizer, digest = checkpoint.load_tokenizer(checkpoint.locate(source))
        if (trained.tokenizer, trained.elements, trained.image) != (base.tokenizer, base.elements, base.image):
            raise CopeditError(
                f"{source}: its tokenizer is not the one of preset {preset}; name another with --set tokenizer=FOLDER"
            )
        model = replace(base, denoiser=replace(base.denoiser, **network))
        described = {"stage": "ablation", "tokenizer": digest}
        super().__init__(folder, model, settings, described, data=data, full=full, **shared)
        self._first: dict[int, dict[str, Tensor]] = {}
        self._prior: Prior | None = None

    def task(self, variant: DenoiserVariant, seed: int) -> DenoiserTask:
        """Stage II of a variant, before its first step."""
        config = variant_config(self.config, variant)
        whiten = 0.0 if config.denoiser.backbone == "unet" else self.settings.whiten
        settings = replace(self.settings, seed=seed, whiten=whiten)
        torch.manual_seed(seed)
        prior = self.prior() if config.denoiser.prior else None
        task = DenoiserTask(config, settings, self.images, self.tokenizer, self.folder / "latents.npy", prior)
        if variant.changes:
            share_weights(task.denoiser, self._reference(seed))
            task.average.load_state_dict(task.denoiser.state_dict())
        return task

    def prior(self) -> Prior:
        """The fill that all variants with a prior share, fitted to the training images."""
        if self._prior is None:
            if not (self.folder / PRIOR).exists():
                fit_prior(self.images, self.settings.seed).save(self.folder)
            self._prior = Prior.load(self.folder, self.config)
        return self._prior

    def _reference(self, seed: int) -> dict[str, Tensor]:
        """First weights of the reference under a seed."""
        if seed not in self._first:
            reference = self.task(DenoiserVariant("full", "", {}), seed).denoiser
            self._first[seed] = {name: p.detach().clone() for name, p in reference.named_parameters()}
        return self._first[seed]

    def scores(
        self, variant: DenoiserVariant, task: DenoiserTask, log: Sequence[Mapping[str, Any]], networks: Networks | None
    ) -> dict[str, Any]:
        """Parameters, costs, and of each held-out subject what `score` says."""
        start, prior = time.perf_counter(), self.prior() if task.config.denoiser.prior else None
        return {
            "parameters": sum(p.numel() for p in task.denoiser.parameters()),
            "gflop": gflop(task),
            "seconds_per_step": float(np.median([x["seconds"] for x in log])) if log else 0.0,
            "training_mse": float(np.mean([x["mse"] for x in log[-max(1, len(log) // 10) :]])) if log else 0.0,
            "subjects": [
                score(task.average, self.tokenizer, task.config, task.settings, images, i, prior, networks)
                for i, images in enumerate(self.held_out)
            ],
            "seconds_of_scoring": time.perf_counter() - start,
        }


def share_weights(net: nn.Module, first: Mapping[str, Tensor]) -> None:
    """Give a network the weights of another wherever both have one of the same name and shape."""
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if name in first and first[name].shape == weight.shape:
                weight.copy_(first[name])


@torch.no_grad()
def gflop(task: DenoiserTask) -> float:
    """10^9 floating-point operations of linear layers and convolutions in a forward pass of one training sample."""
    from torch.utils.flop_counter import FlopCounterMode

    c, size = task.config, tuple(task.config.latent)
    if task.settings.crop:
        size = (*(n * p for n, p in zip(task.size, c.denoiser.patch, strict=False)), size[-1])
    m = len(c.elements)
    z = torch.zeros(1, m, c.tokenizer.latent_channels, *size, device=task.device)
    prompts = torch.zeros(1, 3, c.tokenizer.prompt_dim, device=task.device)
    observed, zero = torch.ones(1, m, dtype=torch.bool, device=task.device), torch.zeros(1, 2, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        prior = z if c.denoiser.prior else None
        task.denoiser(z, zero[0, :1].to(task.device), prompts, observed, zero.to(task.device), prior)
    counted = counter.get_flop_counts()["Global"]
    return sum(n for name, n in counted.items() if str(name).split(".")[-1] in ("addmm", "mm", "convolution")) / 1e9


# --------------------------------------------------------------------------------------------------------- scoring


def patterns_of(config: ModelConfig, subject: int) -> list[tuple[int, ...]]:
    """One missing pattern per count for a subject, as rows; over the subjects all of them take turns."""
    every = missing_patterns(config).values()
    return [tuple(config.elements.index(e) for e in ps[subject % len(ps)]) for ps in every]


def in_tiles(net: MDiT3D | UNet, settings: DenoiserSettings, config: ModelConfig) -> Callable[..., Tensor]:
    """The network as it was trained: on whole latents, or where it has only seen crops on tiles of their size."""
    size = settings.crop if settings.crop and not settings.whole_steps else 0
    if not size:
        return net
    (a, b, _), (p, q, _) = config.tokenizer.compression, config.denoiser.patch
    h, w = size // a, size // b  # in latents
    if config.latent[0] % h or config.latent[1] % w:
        return net

    def predict(z: Tensor, t: Tensor, prompts: Tensor, observed: Tensor, prior: Tensor | None = None) -> Tensor:
        rows, columns = z.shape[-3] // h, z.shape[-2] // w
        tiles, begun = (
            None if x is None else rearrange(x, "b m c (i h) (j w) d -> (b i j) m c h w d", h=h, w=w)
            for x in (z, prior)
        )
        corner = torch.cartesian_prod(torch.arange(rows) * (h // p), torch.arange(columns) * (w // q))
        corner = corner.repeat(len(z), 1).to(z.device)
        t, prompts, observed = (x.repeat_interleave(rows * columns, 0) for x in (t, prompts, observed))
        out = net(tiles, t, prompts, observed, corner, begun)
        return rearrange(out, "(b i j) m c h w d -> b m c (i h) (j w) d", i=rows, j=columns)

    return predict


def filled(prior: Prior, images: np.ndarray, observed: Tensor) -> Tensor:
    """Images [patterns, m, 1, H, W, D], float32, the prior's fill where not observed [patterns, m]."""
    rows = np.repeat(images[None].astype(np.float32), len(observed), axis=0)
    for row, there in zip(rows, observed.cpu().numpy(), strict=True):
        row[~there] = prior.fill(row, there)
    return torch.from_numpy(rows)


@torch.no_grad()
def score(
    net: MDiT3D | UNet,
    vae: CoPeVAE,
    config: ModelConfig,
    settings: DenoiserSettings,
    images: np.ndarray,
    subject: int,
    prior: Prior | None = None,
    networks: Networks | None = None,
) -> dict[str, dict[str, float]]:
    """Missing count -> PSNR (dB), SSIM, and squared error of normalised latents ("mse"), means over what is missing.

    PSNR and SSIM of a brain are those of the voxels where any of its images shows something: the crops of a reduced
    budget are drawn where something happens, so such networks have hardly seen the background, three quarters of a
    volume.

    images: [m, 1, H, W, D] in 0..1, on the model's grid. The sampler's defaults; noise depends on the subject alone.
    networks: see whole images, under the missing count.
    """
    if networks:
        networks.next_subject()
    device = next(net.parameters()).device
    patterns, m = patterns_of(config, subject), len(config.elements)
    shown = np.any(images[:, 0] > 0, axis=0) if not config.task.joint else np.ones(images.shape[2:], dtype=bool)
    observed = torch.ones(len(patterns), m, dtype=torch.bool)
    for row, missing in zip(observed, patterns, strict=True):
        row[list(missing)] = False
    observed = observed.to(device)
    net.eval()
    predict = in_tiles(net, settings, config)
    with torch.autocast(device.type, torch.bfloat16, enabled=settings.dtype == "bfloat16"):
        x = torch.from_numpy(images.astype(np.float32))[None].to(device)
        z = vae.encode(x).float().expand(len(patterns), -1, -1, -1, -1, -1)
        prompts, z = vae.prompts(z, observed).float(), vae.normalise(z)
        eps = np.stack([noise(0, f"ablation-{subject}", e, tuple(z.shape[2:])) for e in config.elements])
        fill = z_fill = None
        there = observed[:, :, None, None, None, None]
        if prior:
            fill = filled(prior, images, observed).to(device)
            z_fill = torch.where(there, z, vae.normalise(vae.encode(fill).float()))
        begin = torch.where(there, z, begun(config.diffusion, torch.from_numpy(eps).to(device), z_fill))
        given = {} if z_fill is None else {"prior": z_fill}
        latents = sample(
            lambda x, t: predict(x, t, prompts, observed, **given).float(),
            begin,
            observed,
            config.diffusion,
            config.diffusion.steps,
        )
        found = {}
        for row, missing in enumerate(patterns):
            chosen = np.flatnonzero(config.task.decoded(np.isin(np.arange(m), missing, invert=True)))
            made = vae.images(latents[row : row + 1, chosen], joint=config.task.joint).float()[0]
            if fill is not None and z_fill is not None:  # what the fill shows beyond its latents stays, as in a study
                made += fill[row, chosen] - vae.images(z_fill[row : row + 1, chosen], joint=False).float()[0]
            final = made[np.isin(chosen, missing), 0].clamp(0, 1).cpu().numpy()
            each = []
            for image, i in zip(final, missing, strict=True):
                each.append(measure(image, images[i, 0].astype(np.float32), mask=shown))
                if networks:
                    look(networks, str(len(missing)), config.elements[i], image, images[i, 0], config.task.joint)
            found[str(len(missing))] = {
                "psnr": float(np.mean([one["psnr_inside"] for one in each])),
                "ssim": float(np.mean([one["ssim_inside"] for one in each])),
                "mse": (latents[row] - z[row])[list(missing)].square().mean().item(),
            }
    return found


# ---------------------------------------------------------------------------------------------------------- report


def means(runs: Sequence[Mapping[str, Any]], metric: str, count: str | None) -> np.ndarray:
    """[seeds, subjects]: a metric of a variant's runs, at one missing count or (None) averaged over all."""

    def value(subject: Mapping[str, Mapping[str, float]]) -> float:
        wanted = subject.values() if count is None else [subject[count]]
        return float(np.mean([row[metric] for row in wanted]))

    return np.array([[value(subject) for subject in run["subjects"]] for run in runs])


def summarise(runs: Mapping[str, Sequence[Mapping[str, Any]]], reference: str) -> dict[str, Any]:
    """Per variant and missing count ("all": averaged) the mean and deviation over subjects of each metric (after
    averaging over seeds), and the paired difference to the reference."""
    counts = [*runs[reference][0]["subjects"][0], None]
    table: dict[str, Any] = {}
    for name, own in runs.items():
        rows: dict[str, Any] = {}
        for count in counts:
            cell: dict[str, Any] = {}
            for metric in METRICS:
                values = means(own, metric, count)
                cell[metric] = {"mean": float(values.mean()), "sd": deviation(values.mean(0))}
                if name != reference:
                    cell[metric]["difference"] = paired(values, means(runs[reference], metric, count))
            rows[count or "all"] = cell
        table[name] = rows
    return table


def by_element(config: ModelConfig, runs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """PSNR (dB) of each element where it alone is missing, a mean over subjects and seeds."""
    found: dict[str, list[float]] = {}
    for run in runs:
        for i, subject in enumerate(run["subjects"]):
            ((row,), *_) = patterns_of(config, i)
            found.setdefault(config.elements[row], []).append(subject["1"]["psnr"])
    return {element: float(np.mean(found[element])) for element in config.elements if element in found}


@torch.no_grad()
def visible(task: DenoiserTask, samples: int = 256) -> float:
    """Share of elements of which it shows in what the denoiser is given at the last timestep whether they are missing.

    A rule without any learning: neighbours in the plane correlate in a latent and do not in noise, so an element whose
    correlation is below one half is called missing. This is what prompts and mask codes have to add to.
    """
    rng = np.random.default_rng(0)
    assert task.latents is not None
    z = task.latents[torch.from_numpy(rng.integers(0, len(task.latents), samples))].float()
    missing = torch.from_numpy(rng.random(z.shape[:2]) < 0.5)
    eps = torch.from_numpy(rng.standard_normal(z.shape, dtype=np.float32))
    z = torch.where(missing[:, :, None, None, None, None], eps, z.cpu())
    a, b = z[..., 1:, :, :].flatten(2), z[..., :-1, :, :].flatten(2)
    correlation = ((a - a.mean(2, True)) * (b - b.mean(2, True))).mean(2) / (a.std(2) * b.std(2))
    return ((correlation < 0.5) == missing).float().mean().item()


def ablate(kind: Ablation, experiment: DenoiserExperiment, only: Sequence[str] = ()) -> dict[str, Any]:
    """Train what is not there yet, and report; JSON-able. only: names of variants (the reference is always there)."""
    wanted = [v for v in VARIANTS[kind] if not only or v.name in only or not v.changes]
    if unknown := set(only) - {v.name for v in VARIANTS[kind]}:
        known = ", ".join(v.name for v in VARIANTS[kind])
        raise CopeditError(f"variant {min(unknown)!r} is unknown; choose among {known}")
    if kind == "prior" and experiment.config.task.joint:
        raise CopeditError(
            f"{experiment.config.name}: the ablation of the prior is of brains; choose a preset of a brain"
        )
    runs = experiment.runs(wanted)
    costs = ("parameters", "gflop", "seconds_per_step", "training_mse")
    report: dict[str, Any] = {
        "ablation": kind,
        "seeds": experiment.seeds,
        "variants": {
            v.name: {"label": v.label, "by_element": by_element(experiment.config, runs[v.name])}
            | {k: float(np.mean([r[k] for r in runs[v.name]])) for k in costs}
            for v in wanted
        },
        "table": summarise(runs, wanted[0].name),
        **experiment.described,
        **experiment.named_networks(),
    }
    if experiment.networks:
        counts = [c for c in report["table"][wanted[0].name] if c != "all"]
        for v in wanted:
            report["variants"][v.name]["frechet"] = {c: distances(runs[v.name], c) for c in counts}
    if kind == "prompts":
        report["visible"] = visible(experiment.task(wanted[0], experiment.seeds[0]))
    return report


def markdown(report: Mapping[str, Any]) -> str:
    """The report as the paper's table and a table of differences."""
    settings, network = report["settings"], report["model"]["denoiser"]
    variants, scores = report["variants"], report["table"]
    counts = [c for c in next(iter(scores.values())) if c != "all"]
    reference = next(iter(scores))
    where = "simulated" if report["data"] == "phantom" else report["data"]
    brain = report["model"]["task"] == Task.BRAIN
    lines = [
        f"# Ablation: {report['ablation']}",
        "",
        f"{report['model']['name']}, {where}: {settings['steps']} steps of {settings['batch_size']} "
        + (f"crops of {settings['crop']} voxels" if settings["crop"] else "subjects")
        + f", width {network['width']}, {network['blocks']} blocks, "
        f"patch {' x '.join(map(str, network['patch']))}, {held_out_words(report)} Mean ± standard "
        "deviation over subjects" + (", PSNR and SSIM inside the brain." if brain else "."),
        "",
    ]
    body, far = [], [name.upper() for name in report.get("networks", {})]
    for name, rows in scores.items():
        cells = []
        for c in counts:
            for metric, digits in (("psnr", 2), ("ssim", 3)):
                cells.append(spread(rows[c][metric], digits))
            cells += [number(x) for x in variants[name].get("frechet", {}).get(c, {}).values()]
        body.append([variants[name]["label"], *cells, f"{rows['all']['mse']['mean']:.4f}"])
    heads = [f"{c} missing: {what}" for c in counts for what in ("PSNR (dB)", "SSIM", *far)]
    lines += [
        *table(["", *heads, "all: latent MSE"], body, 1),
        "",
        *looked(report),
        f"Differences to {variants[reference]['label']!r} on the same subjects, all missing counts: mean ± standard "
        "error over subjects, and under each seed. Resolved: more than two standard errors from zero, seeds agree.",
        "",
    ]
    body = []
    for name, rows in scores.items():
        if name == reference:
            continue
        cells = []
        for metric, digits in (("psnr", 3), ("mse", 4)):
            cells += difference(rows["all"][metric]["difference"], digits)
        body.append([variants[name]["label"], *cells])
    seeds = ("under each seed", "resolved")
    lines += [*table(["", "PSNR (dB)", *seeds, "latent MSE", *seeds], body, 1), ""]
    elements = variants[reference]["by_element"]
    body = [[v["label"], *(f"{v['by_element'][e]:.2f}" for e in elements)] for v in variants.values()]
    lines += [*table(["1 missing: PSNR (dB) of", *elements], body, 1), ""]
    body = [
        [
            v["label"],
            f"{v['parameters'] / 1e6:.2f}",
            f"{v['gflop']:.3f}",
            f"{v['seconds_per_step']:.2f}",
            f"{v['training_mse']:.4f}",
        ]
        for v in variants.values()
    ]
    lines += table(["", "parameters (M)", "GFLOP a sample", "s a step", "training MSE at the end"], body, 1)
    if "visible" in report:
        lines += [
            "",
            f"Whether an element is missing shows in {report['visible']:.1%} of cases in what the denoiser is given at "
            "the last timestep, without any prompt: noise does not correlate from voxel to voxel.",
        ]
    return "\n".join(lines) + "\n"


def write_report(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """ablation-KIND.json and .md in a folder."""
    return write(report, markdown(report), folder, f"ablation-{report['ablation']}")
