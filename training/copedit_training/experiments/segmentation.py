"""What synthesis is worth to a segmentation of tumours (Section 4.4, Table 9).

MONAI's U-Net is trained to find whole tumour, core and enhancing tumour in four modalities of which one is missing:
left blank ("missing"), synthesised from the other three, or after all there ("complete", the bound). Which one is
missing changes from sample to sample, so one network stands for all four cases. The three networks have the same first
weights and see the same crops of the same subjects in the same order.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from copedit_rt.config import ModelConfig
from copedit_rt.device import choose_device
from copedit_rt.errors import CopeditError
from copedit_rt.files import write_atomically
from copedit_rt.images.nifti import read_volume, same_grid
from copedit_rt.images.prepare import prepare
from copedit_rt.images.study import Study
from copedit_rt.synthesizer import Synthesizer
from copedit_training.data import layouts, phantom
from copedit_training.data.prepared import HELD_OUT, model_images, phantom_subject
from copedit_training.evaluation.report import table, write
from copedit_training.experiments.ablation import paired
from copedit_training.experiments.analysis import check_prior, fill

Progress = Callable[[int, int], None]
REGIONS = tuple(phantom.TUMOUR)
BRATS = {"whole tumour": (1, 2, 3, 4), "tumour core": (1, 3, 4), "enhancing tumour": (3, 4)}  # 4 to 2021, 3 from 2023
INPUTS = ("missing", "synthesised", "complete")
TRAINING = HELD_OUT + 250_000  # first seed of the subjects that the segmentation is trained on: new to every model
SMALLEST = 64  # voxels of whole tumour that a simulated subject must have


@dataclass(frozen=True)
class Budget:
    """Subjects with a tumour to train and test on, steps, crops a step, their size in the plane, seeds."""

    train: int = 40
    test: int = 20
    steps: int = 300
    batch: int = 4
    crop: int = 48
    lr: float = 2e-3
    seeds: int = 2


FULL = Budget(train=1000, test=250, steps=30_000, batch=8, crop=128, lr=1e-3, seeds=3)


def budget_of(full: bool, overrides: Sequence[str] = ()) -> Budget:
    """The reduced or the full budget with `key=value` overrides. Raises CopeditError for an unknown key or value."""
    budget = FULL if full else Budget()
    for item in overrides:
        key, _, text = item.partition("=")
        if key not in vars(budget):
            raise CopeditError(f"--set {item}: expected key=value with a key among {', '.join(vars(budget))}")
        kind = type(getattr(budget, key))
        try:
            value = kind(text)
        except ValueError as error:
            raise CopeditError(f"--set {item}: {text!r} is not a valid {kind.__name__}") from error
        if value <= 0:
            raise CopeditError(f"--set {item}: must be above 0")
        budget = replace(budget, **{key: value})
    return budget


@dataclass(frozen=True)
class Cases:
    """images, synthesised: float16 [N, m, H, W, D] in 0..1, the second each made from all others; regions: bool
    [N, 3, H, W, D]."""

    images: np.ndarray
    synthesised: np.ndarray
    regions: np.ndarray


# ----------------------------------------------------------------------------------------------------------- cases


def regions_of(labels: np.ndarray, codes: Mapping[str, Sequence[int]]) -> np.ndarray:
    """Labels [H, W, D] -> the nested regions, bool [3, H, W, D]."""
    return np.stack([np.isin(labels, codes[name]) for name in REGIONS])


def phantom_cases(config: ModelConfig, first: int, count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Images [m, H, W, D] and regions of the first `count` simulated subjects from seed `first` that have a tumour."""
    seed = first
    while count:
        regions = regions_of(phantom_subject(config, seed).labels, phantom.TUMOUR)
        if regions[0].sum() >= SMALLEST:
            yield model_images(config, seed)[:, 0], regions
            count -= 1
        seed += 1


def label_file(entry: layouts.Entry) -> Path | None:
    """The segmentation that BraTS has beside the images of a study."""
    image = next(iter(entry.files.files.values()))
    found = [p for p in sorted(image.parent.iterdir()) if re.search(r"[-_.]seg\.nii(\.gz)?$", p.name, re.I)]
    own = [p for p in found if p.name.startswith(entry.files.naming.head.rstrip("-_. "))]
    return next(iter(own or (found if len(found) == 1 else [])), None)


def folder_cases(
    config: ModelConfig, entries: Sequence[layouts.Entry], count: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Images and regions of the first `count` studies of a data set that have a segmentation."""
    for entry in entries:
        path = label_file(entry)
        if path is None or not count:
            continue
        study, labels = Study.read(entry.files, resample=True), read_volume(path)
        if not same_grid(labels, study.reference):
            raise CopeditError(f"{path}: is not on the grid of {study.reference.path}; resample it to that")
        prepared = prepare(study, config, allow_complete=True)
        inside = regions_of(np.rint(labels.data), BRATS).astype(np.float32)
        yield prepared.images[:, 0], np.stack([prepared.frame.to_model(x) > 0.5 for x in inside])
        count -= 1


def load_cases(
    model: str, folder: Path, data: str, budget: Budget, device: str, progress: Progress | None = None
) -> tuple[ModelConfig, str, dict[str, Cases]]:
    """The model's configuration, a digest of its weights and the data's place, and cases to train and to test on, which
    are kept in the folder."""
    synthesizer = Synthesizer.load(model, device)
    config, weights = synthesizer.config, synthesizer.weights
    check_prior(config)
    if config.task.joint:
        raise CopeditError(f"model {config.name}: segmentation is of brain tumours; choose a brain model")
    origin = data if data == "phantom" else str(Path(data).resolve())
    digest = hashlib.sha256(f"{weights['tokenizer']} {weights['denoiser']} {origin}".encode()).hexdigest()[:16]
    sources: dict[str, Iterator[tuple[np.ndarray, np.ndarray]]]
    if data == "phantom":
        sources = {
            "train": phantom_cases(config, TRAINING, budget.train),
            "test": phantom_cases(config, HELD_OUT, budget.test),
        }
    else:
        found = layouts.find(Path(data), config)
        sides = layouts.split(found.subjects, folder / "split.json")
        sources = {
            side: folder_cases(config, [e for e in found.studies if e.subject in set(sides[side])], n)
            for side, n in (("train", budget.train), ("test", budget.test))
        }
    wanted, cases = {"train": budget.train, "test": budget.test}, {}
    done, total = 0, budget.train + budget.test
    for side, source in sources.items():
        path = folder / f"{side}-{config.name}-{digest}-{wanted[side]}.npz"
        if not path.exists():
            rows: list[tuple[np.ndarray, ...]] = []
            for images, regions in source:
                rows.append((images, synthesise(synthesizer, images, f"segmentation-{side}-{len(rows)}"), regions))
                done += 1
                if progress:
                    progress(done, total)
            if not rows:
                raise CopeditError(
                    f"{data}: no study to {side} on has its segmentation (*_seg.nii.gz, *-seg.nii.gz) beside it"
                )
            content = io.BytesIO()
            a, b, c = (np.stack(x) for x in zip(*rows, strict=True))
            np.savez(content, images=a.astype(np.float16), synthesised=b.astype(np.float16), regions=c)
            write_atomically(path, content.getvalue())
        with np.load(path, allow_pickle=False) as stored:
            cases[side] = Cases(*(stored[name] for name in ("images", "synthesised", "regions")))
    return config, digest, cases


def synthesise(model: Synthesizer, images: np.ndarray, key: str) -> np.ndarray:
    """Every modality of images [m, H, W, D] as the model makes it from all others."""
    made = []
    for row in ~np.eye(len(images), dtype=bool):
        encoded = model.encode(images[row, None])
        made.append(fill(model, encoded.latents[0], row, encoded.prompts[0], key))
    return np.concatenate(made)


# -------------------------------------------------------------------------------------------------------- training


def build(channels: int) -> nn.Module:
    """MONAI's U-Net for images [N, m, H, W, D] -> logits [N, 3, H, W, D]."""
    from monai.networks.nets import UNet

    return UNet(3, channels, len(REGIONS), (16, 32, 64, 128), (2, 2, 2), num_res_units=1)


def network_input(cases: Cases, rows: np.ndarray, missing: np.ndarray, kind: str) -> np.ndarray:
    """Images float32 [N, m, H, W, D] of cases in which modality `missing` [N] is blank, synthesised or there."""
    images = cases.images[rows].astype(np.float32)
    for image, row, element in zip(images, rows, missing, strict=True):
        if kind == "missing":
            image[element] = 0
        elif kind == "synthesised":
            image[element] = cases.synthesised[row, element]
    return images


def _autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on GPUs alone: on CPUs, torch 2.13, this network's weights became NaN within 30 steps now and then,
    probably by the fault that `tokenizer.unsafe_type` tells of."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def train(cases: Cases, kind: str, budget: Budget, seed: int, device: torch.device) -> nn.Module:
    """A network trained on one kind of input: Adam, cosine decay, Dice + cross-entropy, crops and mirror images."""
    from monai.losses import DiceLoss

    torch.manual_seed(seed)
    m, (h, w) = cases.images.shape[1], cases.images.shape[2:4]
    net = build(m).to(device)
    optimizer = torch.optim.Adam(net.parameters(), budget.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, budget.steps)
    overlap = DiceLoss(sigmoid=True, batch=True)
    size = min(budget.crop, h, w)
    for step in range(budget.steps):
        rng = np.random.default_rng((seed, step))
        rows = rng.integers(0, len(cases.images), budget.batch)
        images = network_input(cases, rows, rng.integers(0, m, budget.batch), kind)
        x, y = [], []
        for image, target in zip(images, cases.regions[rows], strict=True):
            # Two of three crops show a part of the tumour.
            inside = np.argwhere(target[0]) if rng.random() < 2 / 3 else np.empty((0, 3))
            middle = inside[rng.integers(len(inside))][:2] if len(inside) else rng.integers(0, (h, w))
            a, b = (int(np.clip(c - size // 2, 0, n - size)) for c, n in zip(middle, (h, w), strict=True))
            part = np.s_[:, a : a + size, b : b + size]
            step_x = -1 if rng.random() < 0.5 else 1
            x.append(image[part][:, ::step_x])
            y.append(target[part][:, ::step_x])
        given, wanted = (torch.from_numpy(np.stack(v)).to(device).float() for v in (x, y))
        with _autocast(device):
            logits = net(given).float()
        loss = overlap(logits, wanted) + F.binary_cross_entropy_with_logits(logits, wanted)
        if not loss.isfinite():
            raise CopeditError(
                f"step {step} of the segmentation ({kind}): loss {loss.item()}; use a lower lr (--set lr=)"
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval()


def dice(logits: Tensor, regions: Tensor) -> np.ndarray:
    """Dice [N, 3] of logits above 0 and regions [N, 3, H, W, D]; NaN where a region is empty. MONAI's."""
    from monai.metrics import compute_dice

    return compute_dice((logits > 0).float(), regions.float(), ignore_empty=True).cpu().numpy()


@torch.no_grad()
def test(net: nn.Module, cases: Cases, kind: str, device: torch.device) -> np.ndarray:
    """Dice [N, m, 3] of every case with each modality missing."""
    m, found = cases.images.shape[1], []
    for row in range(len(cases.images)):
        images = network_input(cases, np.full(m, row), np.arange(m), kind)
        wanted = torch.from_numpy(cases.regions[row]).expand(m, -1, -1, -1, -1)
        with _autocast(device):
            logits = net(torch.from_numpy(images).to(device)).float()
        found.append(dice(logits, wanted.to(device)))
    return np.stack(found)


# ---------------------------------------------------------------------------------------------------------- report


def compare(
    model: str,
    folder: Path,
    data: str = "phantom",
    device: str = "auto",
    budget: Budget | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Table 9, JSON-able. What is finished in the folder (subjects, networks' scores) is kept and not done again."""
    budget, where = budget or Budget(), choose_device(device)
    config, digest, cases = load_cases(model, folder, data, budget, device, progress)
    scores: dict[str, list[np.ndarray]] = {kind: [] for kind in INPUTS}
    described = json.loads(json.dumps({"data": data, "model": digest} | {k: v for k, v in vars(budget).items()}))
    for seed in range(budget.seeds):
        for kind in INPUTS:
            path = folder / f"dice-{kind}-seed{seed}.json"
            stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            if stored.get("run") != described:
                values = test(train(cases["train"], kind, budget, seed, where), cases["test"], kind, where)
                listed = np.where(np.isnan(values), np.array(None), values).tolist()  # JSON has no NaN
                stored = {"run": described, "dice": listed}
                write_atomically(path, (json.dumps(stored) + "\n").encode())
            scores[kind].append(np.array(stored["dice"], dtype=np.float64))
    return {
        "segmentation": True,
        "model": config.name,
        "data": data,
        "elements": list(config.elements),
        "budget": vars(budget),
        "train": len(cases["train"].images),
        "test": len(cases["test"].images),
        **summarise({kind: np.stack(x) for kind, x in scores.items()}, config.elements),
    }


def summarise(scores: Mapping[str, np.ndarray], elements: Sequence[str]) -> dict[str, Any]:
    """Dice [seeds, N, m, 3] of each kind of input -> means, deviations over subjects, and paired differences to
    "missing". Subjects without a region do not count for it."""
    table: dict[str, Any] = {}
    for kind, values in scores.items():
        cell: dict[str, Any] = {}
        for k, region in enumerate((*REGIONS, "average")):
            each = np.nanmean(values, axis=3) if region == "average" else values[..., k]
            there = ~np.isnan(each).any((0, 2))  # [N]
            base = np.nanmean(scores["missing"], axis=3) if region == "average" else scores["missing"][..., k]
            own, reference = each[:, there].mean(2), base[:, there].mean(2)
            cell[region] = {
                "mean": float(own.mean()),
                "sd": float(own.mean(0).std()),
                "subjects": int(there.sum()),
                "by_missing": {e: float(each[:, there, i].mean()) for i, e in enumerate(elements)},
            }
            if kind != "missing":
                cell[region]["difference"] = paired(own, reference)
        table[kind] = cell
    return {"dice": table}


def markdown(report: Mapping[str, Any]) -> str:
    """The report as the paper's table, and by missing modality."""
    dice, budget, elements = report["dice"], report["budget"], report["elements"]
    regions = (*REGIONS, "average")
    names = {"missing": "left blank", "synthesised": "synthesised", "complete": "there (bound)"}

    def difference(d: Mapping[str, Any]) -> str:
        error = "" if d["standard_error"] is None else f" ± {100 * d['standard_error']:.1f}"
        return f"{100 * d['mean']:+.1f}{error} ({', '.join(f'{100 * x:+.1f}' for x in d['per_seed'])})"

    means = [
        [names[k], *(f"{100 * row[r]['mean']:.1f} ± {100 * row[r]['sd']:.1f}" for r in regions)]
        for k, row in dice.items()
    ]
    gains = [[names[k], *(difference(dice[k][r]["difference"]) for r in regions)] for k in INPUTS[1:]]
    each = [[names[k], *(f"{100 * row['average']['by_missing'][e]:.1f}" for e in elements)] for k, row in dice.items()]
    lines = [
        f"# Segmentation with what {report['model']} synthesises",
        "",
        f"U-Net, {report['train']} subjects to train on and {report['test']} to test on ({report['data']}), "
        f"{budget['steps']} steps of {budget['batch']} crops, {budget['seeds']} seeds; one modality missing, each in "
        "turn. Dice (%), mean ± standard deviation over subjects.",
        "",
        *table(["the missing modality is", *regions], means, 1),
        "",
        "Differences to the blank one on the same subjects: mean ± standard error; under each seed.",
        "",
        *table(["", *regions], gains, 1),
        "",
        "Average Dice (%) by what is missing:",
        "",
        *table(["", *(e.upper() for e in elements)], each, 1),
    ]
    return "\n".join(lines) + "\n"


def write_report(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """segmentation.json and segmentation.md in a folder."""
    return write(report, markdown(report), folder, "segmentation")
