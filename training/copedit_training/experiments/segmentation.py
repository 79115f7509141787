"""What synthesis is worth to a segmentation of tumours (Section 4.4, Table 9).

MONAI's U-Net is trained to find whole tumour, core and enhancing tumour in four modalities of which one is missing:
left blank ("missing"), synthesised from the other three, or after all there ("complete", the bound). Which one is
missing changes from sample to sample, so one network stands for all four cases. All networks have the same first
weights and see the same crops of the same subjects in the same order. Other methods' images may take the place of the
model's: from the same subjects, with the same noise.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from copedit_rt.config import ModelConfig
from copedit_rt.device import choose_device
from copedit_rt.errors import CopeditError
from copedit_rt.files import read_json, write_atomically
from copedit_rt.images.nifti import read_volume, same_grid
from copedit_rt.images.prepare import prepare
from copedit_rt.images.study import Study
from copedit_rt.synthesizer import Synthesizer
from copedit_training.data import layouts, phantom
from copedit_training.data.prepared import HELD_OUT, Files, grow, mapped, model_images, phantom_subject
from copedit_training.evaluation.beside import deviation, paired
from copedit_training.evaluation.report import costs, table, write
from copedit_training.experiments import beside as methods
from copedit_training.experiments.analysis import check_prior

Progress = Callable[[int, int], None]
REGIONS = tuple(phantom.TUMOUR)
BRATS = {"whole tumour": (1, 2, 3, 4), "tumour core": (1, 3, 4), "enhancing tumour": (3, 4)}  # 4 to 2021, 3 from 2023
SYNTHESISED = "synthesised"
INPUTS = ("missing", SYNTHESISED, "complete")
TRAINING = HELD_OUT + 250_000  # first seed of the subjects that the segmentation is trained on: new to every model
SMALLEST = 64  # voxels of whole tumour that a simulated subject must have
HALVED = 8  # what the U-Net's strides divide by


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
        if not 0 < value < math.inf:
            raise CopeditError(f"--set {item}: must be a number above 0")
        if key == "crop" and value % HALVED:
            raise CopeditError(f"--set {item}: must be a multiple of {HALVED}, which the U-Net halves three times")
        budget = replace(budget, **{key: value})
    return budget


@dataclass(frozen=True)
class Cases:
    """images, synthesised: float16 [N, m, H, W, D] in 0..1, the second each made from all others; regions: bool
    [N, 3, H, W, D]. path: where they are kept. skipped: studies that could not be used."""

    images: np.ndarray
    synthesised: np.ndarray | None
    regions: np.ndarray
    path: Path | None = None
    skipped: Sequence[layouts.Skipped] = ()


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
    config: ModelConfig, entries: Sequence[layouts.Entry], skipped: list[layouts.Skipped]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Images and regions of those studies of a data set that have a segmentation; what cannot be used is added to
    `skipped`."""
    for entry in entries:
        path = label_file(entry)
        if path is None:
            continue
        try:
            yield _case(config, entry, path)
        except CopeditError as error:
            skipped.append(layouts.Skipped(entry.files.name, "damaged", str(error)))


def _case(config: ModelConfig, entry: layouts.Entry, path: Path) -> tuple[np.ndarray, np.ndarray]:
    study, labels = Study.read(entry.files, resample=True), read_volume(path)
    if not same_grid(labels, study.reference):
        raise CopeditError(f"{path}: is not on the grid of {study.reference.path}; resample it to that")
    found = np.rint(labels.data)
    if not 0 <= found.min() <= found.max() <= 4:
        raise CopeditError(
            f"{path}: holds labels from {found.min():.0f} to {found.max():.0f}; give them BraTS' numbers, 0 to 4"
        )
    prepared = prepare(study, config, allow_complete=True)
    inside = regions_of(found, BRATS).astype(np.float32)
    regions = np.stack([prepared.frame.to_model(x) > 0.5 for x in inside])
    if not regions[0].any():
        raise CopeditError(f"{path}: marks no tumour on the model's grid; give studies that have one")
    return prepared.images[:, 0], regions


@dataclass(frozen=True)
class Filler:
    """What synthesises, under the name of its row. digest: of its weights."""

    name: str
    digest: str
    on_grid: methods.OnGrid


def fillers_of(
    model: str, beside: Sequence[str], device: str
) -> tuple[ModelConfig, dict[str, str], dict[str, list[Filler]], dict[str, Any]]:
    """The model's configuration and the SHA-256 of its networks; what synthesises, by row, the model first; and what
    the training of each has cost.

    Raises CopeditError for a heart, a model with a prior, and as `beside.rows`.
    """
    synthesizer = Synthesizer.load(model, device)
    config, weights = synthesizer.config, synthesizer.weights
    check_prior(config)
    if config.task.joint:
        raise CopeditError(f"model {config.name}: segmentation is of brain tumours; choose a brain model")
    digest = f"{weights['tokenizer']} {weights['denoiser']}"
    rows = {SYNTHESISED: [Filler(SYNTHESISED, digest, methods.model_on_grid(synthesizer))]}
    if not beside:
        return config, weights, rows, {}
    found, budget = methods.rows(beside, synthesizer, model, device)
    for label, runs in found.items():
        for run in runs:
            check_prior(run.config)
        rows[label] = [Filler(label, run.digest, run.on_grid) for run in runs]
    return config, weights, rows, {"model": budget} | {label: methods.cost(runs) for label, runs in found.items()}


def load_cases(
    config: ModelConfig, folder: Path, data: str, budget: Budget, progress: Progress | None = None
) -> dict[str, Cases]:
    """Cases to train and to test on, kept in the folder and mapped from there; nothing is synthesised yet.

    Those of a data set are kept under a name that its files decide: once one has changed, they are made anew."""
    found = None if data == "phantom" else layouts.find(Path(data), config)
    sides = layouts.split(found.subjects, folder / "split.json") if found else {}

    def of(side: str, wanted: int, first: int) -> Cases:
        entries: list[layouts.Entry] = []
        if found:
            members = set(sides[side])
            entries = list(islice((e for e in found.studies if e.subject in members and label_file(e)), wanted))
            if not entries:
                raise CopeditError(
                    f"{data}: no study to {side} on has its segmentation (*_seg.nii.gz, *-seg.nii.gz) beside it"
                )
        used = (word for entry in entries for word in _state(entry))
        path = folder / f"{side}-{_short(config.name, _origin(data), *used)}-{wanted}.npy"
        outlines, index = path.with_name(f"{path.stem}-regions.npy"), path.with_suffix(".json")
        if not (path.exists() and outlines.exists() and (index.exists() or not found)):
            skipped: list[layouts.Skipped] = []
            count = len(entries) if found else wanted
            source = folder_cases(config, entries, skipped) if found else phantom_cases(config, first, wanted)
            files: Files = {
                path: ((count, len(config.elements), *config.image), np.float16),
                outlines: ((count, len(REGIONS), *config.image), np.bool_),
            }
            grow(files, lambda rows: islice(source, rows.start, None), progress)
            if len(skipped) == count:
                raise CopeditError(f"{data}: no study to {side} on can be used, such as {skipped[0].reason}")
            if found:
                write_atomically(index, (json.dumps([asdict(item) for item in skipped], indent=1) + "\n").encode())
        left_out = [layouts.Skipped(**item) for item in read_json(index)] if found else []
        rows = slice(len(mapped(path)) - len(left_out))  # those at the end are blank instead
        return Cases(mapped(path)[rows], None, mapped(outlines)[rows], path, left_out)

    return {"train": of("train", budget.train, TRAINING), "test": of("test", budget.test, HELD_OUT)}


def _state(entry: layouts.Entry) -> Iterator[str]:
    """A study's name, and of its images and labels the name, size and time of change."""
    yield entry.files.name
    for path in (*entry.files.files.values(), label_file(entry)):
        if path and path.exists():
            state = path.stat()
            yield f"{path.name} {state.st_size} {state.st_mtime_ns}"


def _origin(data: str) -> str:
    return data if data == "phantom" else str(Path(data).resolve())


def _short(*parts: str) -> str:
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]


def synthesised(side: str, cases: Cases, filler: Filler, progress: Progress | None = None) -> Cases:
    """Cases of a side with every modality as a method makes it from all others, which is kept beside them."""
    assert cases.path is not None
    left_out = [item.study for item in cases.skipped]  # which rows are whose
    path = cases.path.with_name(f"{cases.path.stem}-{_short(filler.digest, *left_out)}.npy")
    if not path.exists():
        every = ~np.eye(cases.images.shape[1], dtype=bool)

        def make(rows: range) -> Iterator[Sequence[np.ndarray]]:
            for i in rows:
                images = cases.images[i, :, None].astype(np.float32)
                filled = (filler.on_grid(images, there, 0, f"segmentation-{side}-{i}") for there in every)
                yield (np.stack([x[missing, 0] for missing, x in enumerate(filled)]),)

        grow({path: (cases.images.shape, np.float16)}, make, progress)
    return replace(cases, synthesised=mapped(path))


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
        elif kind == SYNTHESISED:
            assert cases.synthesised is not None
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
    beside: Sequence[str] = (),
) -> dict[str, Any]:
    """Table 9, JSON-able. What is finished in the folder (subjects, images, networks' scores) is kept and not done
    again. beside: runs of methods and denoisers, as `beside.rows` takes them; those of several seeds take turns, one
    for each seed."""
    budget, where = budget or Budget(), choose_device(device)
    config, weights, fillers, spent = fillers_of(model, beside, device)
    budget = replace(budget, seeds=max(budget.seeds, *(len(some) for some in fillers.values())))
    cases = load_cases(config, folder, data, budget, progress)
    scores: dict[str, list[np.ndarray]] = {row: [] for row in ("missing", *fillers, "complete")}
    told = {key: value for key, value in vars(budget).items() if key != "seeds"}
    if data != "phantom":
        told["cases"] = [_short(x.path.stem, *(item.study for item in x.skipped)) for x in cases.values() if x.path]
    for seed in range(budget.seeds):
        for row, values in scores.items():
            filler = fillers[row][seed % len(fillers[row])] if row in fillers else None
            described = {"data": data, "model": _short(filler.digest) if filler else config.name} | told
            name = re.sub(r"\W+", "-", row)
            path = folder / f"dice-{name}-seed{seed}.json"
            stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            if stored.get("run") != described:
                own = {side: synthesised(side, x, filler, progress) if filler else x for side, x in cases.items()}
                kind = SYNTHESISED if filler else row
                found = test(train(own["train"], kind, budget, seed, where), own["test"], kind, where)
                listed = np.where(np.isnan(found), np.array(None), found).tolist()  # JSON has no NaN
                stored = {"run": described, "dice": listed}
                write_atomically(path, (json.dumps(stored) + "\n").encode())
            values.append(np.array(stored["dice"], dtype=np.float64))
    return {
        "segmentation": True,
        "model": model,
        "weights": weights,
        "data": data,
        "elements": list(config.elements),
        "budget": vars(budget),
        "train": len(cases["train"].images),
        "test": len(cases["test"].images),
        "skipped": [asdict(item) for side in cases.values() for item in side.skipped],
        "beside": spent,
        **summarise({row: np.stack(x) for row, x in scores.items()}, config.elements),
    }


def summarise(scores: Mapping[str, np.ndarray], elements: Sequence[str]) -> dict[str, Any]:
    """Dice [seeds, N, m, 3] of each kind of input -> means, deviations over subjects, and paired differences to
    "missing", and of other methods to the model. Subjects without a region do not count for it; None where all are."""
    table: dict[str, Any] = {}
    for kind, values in scores.items():
        cell: dict[str, Any] = {}
        for k, region in enumerate((*REGIONS, "average")):

            def of(dice: np.ndarray, k: int = k, average: bool = region == "average") -> np.ndarray:
                return np.nanmean(dice, axis=3) if average else dice[..., k]

            each = of(values)
            there = ~np.isnan(each).any((0, 2))  # [N]
            own, n = each[:, there].mean(2), int(there.sum())
            if not n:
                cell[region] = {"mean": None, "sd": None, "subjects": 0, "by_missing": dict.fromkeys(elements)}
                continue
            cell[region] = {
                "mean": float(own.mean()),
                "sd": deviation(own.mean(0)),
                "subjects": n,
                "by_missing": {e: float(each[:, there, i].mean()) for i, e in enumerate(elements)},
            }
            others = {"difference": "missing"} if kind != "missing" else {}
            others |= {"to_model": SYNTHESISED} if kind not in INPUTS else {}
            for name, other in others.items():
                cell[region][name] = paired(own, of(scores[other])[:, there].mean(2))
        table[kind] = cell
    return {"dice": table}


def markdown(report: Mapping[str, Any]) -> str:
    """The report as the paper's table, and by missing modality."""
    dice, budget, elements = report["dice"], report["budget"], report["elements"]
    regions, others = (*REGIONS, "average"), [kind for kind in dice if kind not in INPUTS]
    names = {"missing": "left blank", SYNTHESISED: "synthesised", "complete": "there (bound)"}
    names |= {method: f"synthesised by {method}" for method in others}

    def difference(d: Mapping[str, Any] | None) -> str:
        if d is None:
            return "–"
        error = "" if d["standard_error"] is None else f" ± {100 * d['standard_error']:.1f}"
        return f"{100 * d['mean']:+.1f}{error} ({', '.join(f'{100 * x:+.1f}' for x in d['per_seed'])})"

    def differences(kinds: Sequence[str], to: str) -> list[str]:
        return table(["", *regions], [[names[k], *(difference(dice[k][r].get(to)) for r in regions)] for k in kinds], 1)

    def percent(value: float | None) -> str:
        return "–" if value is None else f"{100 * value:.1f}"

    def spread(cell: Mapping[str, Any]) -> str:
        return percent(cell["mean"]) + ("" if cell["sd"] is None else f" ± {percent(cell['sd'])}")

    means = [[names[k], *(spread(row[r]) for r in regions)] for k, row in dice.items()]
    each = [[names[k], *(percent(row["average"]["by_missing"][e]) for e in elements)] for k, row in dice.items()]
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
        *differences([kind for kind in dice if kind != "missing"], "difference"),
    ]
    if others:
        lines += ["", "Differences to what the model synthesises:", "", *differences(others, "to_model")]
    lines += ["", "Average Dice (%) by what is missing:", ""]
    lines += table(["", *(e.upper() for e in elements)], each, 1)
    if others:
        lines += ["", *costs(report["beside"])]
    if report["skipped"]:
        lines += ["", "## Left out", "", *(f"- {item['reason']}" for item in report["skipped"])]
    return "\n".join(lines) + "\n"


def write_report(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """segmentation.json and segmentation.md in a folder."""
    return write(report, markdown(report), folder, "segmentation")
