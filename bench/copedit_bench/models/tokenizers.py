"""The body of `copedit bench tokenizers`: what a tokenizer's operations buy. Designs of one interface, the latents of
brain-brats, trained alike at a fraction of their width on simulated brains: decibels against TFLOP a study.

Trained is the autoencoder alone (L1, no codebook, no pretext tasks), as its operations are what the designs differ in.
Operations are counted at full width.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from copedit_bench import machine
from copedit_bench.models.cost import count_denoiser, count_tokenizer
from copedit_rt.config import PRESETS, ModelConfig, TokenizerConfig
from copedit_rt.networks.tokenizer import CoPeVAE, lean
from copedit_training.data import prepared
from copedit_training.evaluation.report import table, write
from copedit_training.stages.wavelets import start_as_wavelets

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "brain-brats"
ENTRY = 16  # channels: the eight wavelets of 2 x 2 x 2 voxels with both signs
# Channels, residual units, channels within them, by level. An entry is a level without units.
DESIGNS: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = {
    "paper": ((256, 384, 512), (3, 3, 3), (256, 256, 256)),
    "narrow": ((64, 256, 512), (3, 3, 3), (64, 256, 256)),
    "entry": ((ENTRY, 256, 512), (0, 3, 3), (256, 256, 256)),
    "entry, half": ((ENTRY, 128, 512), (0, 3, 3), (128, 128, 256)),
    "entry, four units": ((ENTRY, 256, 512), (0, 4, 3), (256, 256, 256)),
    "entry, twice": ((ENTRY, 128, 512), (0, 0, 6), (256, 256, 512)),
}
TARGET = 7.0  # TFLOP a study, at most
SIZE, VIEW = (96, 96, 32), (96.0, 96.0, 45.0)  # voxels and mm: the middle of the paper's grid
CROP = (32, 32, 32)
RATE, WARMUP = 2e-3, 0.1  # of Adam; share of the steps
Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much is trained: designs at 1 / scale of their width, for steps of `batch` crops of `subjects` phantoms, and
    measured on as many that were not seen; seeds: of first weights and crops."""

    scale: int = 8
    steps: int = 300
    batch: int = 2
    subjects: int = 12
    measured: int = 4
    seeds: tuple[int, ...] = (0, 1)


QUICK = Plan(scale=32, steps=3, batch=1, subjects=1, measured=1, seeds=(0,))


def design(name: str, scale: int = 1) -> ModelConfig:
    """brain-brats with a design's tokenizer, its widths divided by scale; an entry's are what they are."""
    channels, units, hidden = DESIGNS[name]
    first = channels[0] if not units[0] else channels[0] // scale
    narrow = (first, *(c // scale for c in channels[1:]))
    tokenizer = TokenizerConfig(
        channels=narrow, residual_units=units, residual_channels=tuple(h // scale for h in hidden)
    )
    return dataclasses.replace(PRESETS[PAPER], tokenizer=tokenizer)


def tflop(config: ModelConfig) -> dict[str, float]:
    """TFLOP of encoding and decoding one element, and of a study of one step with one element missing."""
    counted, step = count_tokenizer(config)["flops"], _step()
    observed = len(config.elements) - 1
    study = observed * (counted["encode"] + counted["prompts"]) + counted["decode"] + step
    return {"encode": counted["encode"] / 1e12, "decode": counted["decode"] / 1e12, "study": study / 1e12}


@functools.cache
def _step() -> int:
    """Operations of a step of the denoiser, which the designs have in common."""
    return count_denoiser(PRESETS[PAPER])["flops"]["total"]


def subjects(first: int, count: int) -> Tensor:
    """Phantoms at the paper's voxel size [count, m, 1, H, W, D] in 0..1."""
    view = dataclasses.replace(PRESETS[PAPER].preprocessing, field_of_view=VIEW)
    config = dataclasses.replace(PRESETS[PAPER], image=SIZE, preprocessing=view)
    return torch.from_numpy(np.stack([prepared.model_images(config, first + i) for i in range(count)]))


def crops(images: Tensor, plan: Plan, seed: int) -> Iterator[Tensor]:
    """Batches [batch, 1, 1, *CROP], the same for every design."""
    random = np.random.default_rng(seed)
    for _ in range(plan.steps):
        drawn = []
        for _ in range(plan.batch):
            subject, element = random.integers(len(images)), random.integers(images.shape[1])
            at = [random.integers(n - c + 1) for n, c in zip(SIZE, CROP, strict=True)]
            h, w, d = (slice(a, a + c) for a, c in zip(at, CROP, strict=True))
            drawn.append(images[subject, element, :, h, w, d])
        yield torch.stack(drawn)[:, None]


def trained(config: ModelConfig, plan: Plan, seed: int, images: Tensor) -> tuple[CoPeVAE, float]:
    """A tokenizer after the plan's steps, and processor seconds of them."""
    torch.manual_seed(seed)
    vae = CoPeVAE(config.tokenizer, len(config.elements)).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    if not config.tokenizer.units[0]:
        start_as_wavelets(vae)
    weights = [*vae.encoder.parameters(), *vae.decoder.parameters()]
    optimizer = torch.optim.Adam(weights, RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, plan.steps + 1, pct_start=WARMUP)
    start = time.process_time()
    for batch in crops(images, plan, seed):
        optimizer.zero_grad()
        F.l1_loss(vae.decode(vae.encode(batch), joint=False), batch).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
    return vae.eval(), time.process_time() - start


@torch.no_grad()
def decibels(vae: CoPeVAE, images: Tensor) -> float:
    """PSNR of each image [S, m, 1, H, W, D] after encoder and decoder, clipped to 0..1, averaged."""
    lean(vae)
    found = []
    for subject in images:
        made = vae.decode(vae.encode(subject[None]), joint=False)[0].clamp(0, 1)
        found += (-10 * (made - subject).square().flatten(1).mean(1).log10()).tolist()
    return float(np.mean(found))


def run(
    plan: Plan = Plan(),
    progress: Progress = lambda done, total: None,
    save: Callable[[dict[str, Any]], Any] = lambda report: None,
) -> dict[str, Any]:
    """JSON-able. save: hears the report so far."""
    report: dict[str, Any] = {
        "machine": machine.describe(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "plan": dataclasses.asdict(plan) | {"crop": CROP, "size": SIZE, "rate": RATE},
        "target_tflop": TARGET,
        "designs": [],
    }
    for name in DESIGNS:
        full = design(name)
        row = {"design": name, **_shape(full), "tflop": tflop(full), "decibels": [], "seconds": []}
        report["designs"].append(row)
    seen, unseen = subjects(0, plan.subjects), subjects(prepared.HELD_OUT, plan.measured)
    runs = [(seed, row) for seed in plan.seeds for row in report["designs"]]
    for number, (seed, row) in enumerate(runs, 1):
        vae, seconds = trained(design(row["design"], plan.scale), plan, seed, seen)
        row["decibels"].append(decibels(vae, unseen))
        row["seconds"].append(seconds)
        progress(number, len(runs))
        save(report)
    return report


def _shape(config: ModelConfig) -> dict[str, Any]:
    c = config.tokenizer
    with torch.device("meta"):
        vae = CoPeVAE(c, len(config.elements))
    weights = sum(p.numel() for net in (vae.encoder, vae.decoder) for p in net.parameters())
    return {"channels": c.channels, "units": c.units, "hidden": c.hidden, "parameters": weights}


def markdown(report: dict[str, Any]) -> str:
    about, plan = report["machine"], report["plan"]
    rows = [
        [
            row["design"],
            *(", ".join(map(str, row[key])) for key in ("channels", "units")),
            ", ".join(str(h) if n else "–" for h, n in zip(row["hidden"], row["units"], strict=True)),
            f"{row['parameters'] / 1e6:.1f}",
            *(f"{row['tflop'][part]:.2f}" for part in ("encode", "decode", "study")),
            ", ".join(f"{value:.2f}" for value in row["decibels"]),
            ", ".join(f"{value:.0f}" for value in row["seconds"]),
        ]
        for row in report["designs"]
    ]
    header = ["design", "channels", "units", "within", "parameters (M)", "encode (TFLOP)", "decode", "study, 1 step"]
    lines = [
        "# Tokenizers of one interface",
        "",
        f"{about['date']}, commit {about['commit'] or 'unknown'}{' with changes' * about['changed']}, torch "
        f"{about['packages']['torch']}, {about['name']}, {report['threads']} threads.",
        "",
        f"Operations at full width, of brain-brats. Decibels of 1/{plan['scale']} of it (an entry stays as it is), "
        f"after {plan['steps']} steps of {plan['batch']} crops of {' x '.join(map(str, plan['crop']))} voxels of "
        f"{plan['subjects']} simulated brains, L1 alone, on {plan['measured']} others; one figure a seed. Every design "
        "sees the same crops. Seconds of the processor for the training.",
        "",
        *table([*header, "dB", "seconds"], rows, 4),
    ]
    return "\n".join(lines) + "\n"


def plot(report: dict[str, Any]) -> Figure:
    """Decibels against TFLOP, with the limit that brain-lean keeps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for row in report["designs"]:
        if not row["decibels"]:
            continue
        x, y = row["tflop"]["study"], float(np.mean(row["decibels"]))
        axes.plot([x] * len(row["decibels"]), row["decibels"], "o", markersize=4)
        axes.annotate(row["design"], (x, y), xytext=(5, 3), textcoords="offset points", fontsize=8)
    axes.axvline(report["target_tflop"], color="grey", linewidth=0.8)
    axes.set(xscale="log", xlabel="TFLOP a study, one step", ylabel="dB")
    axes.grid(alpha=0.3)
    return figure


def write_report(report: dict[str, Any], folder: Path) -> list[Path]:
    """tokenizers.json, tokenizers.md and, with matplotlib, tokenizers.png in a folder."""
    return write(report, markdown(report), folder, "tokenizers", lambda: [("tokenizers", plot(report))])
