"""What the prompts hold and what they do (Section 4.6 and 4.7, Figures 6 to 8), on held-out subjects.

Each analysis is a function of a `Probe` that returns a JSON-able report and draws one figure from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from copedit_rt import checkpoint
from copedit_rt.device import choose_device
from copedit_rt.errors import CopeditError
from copedit_rt.networks.denoiser import Block, MDiT3D
from copedit_rt.schedule import noise
from copedit_rt.synthesizer import Synthesizer
from copedit_rt.task import Task
from copedit_training.data import phantom
from copedit_training.data.prepared import phantom_subject
from copedit_training.evaluation.evaluate import missing_patterns
from copedit_training.evaluation.metrics import psnr
from copedit_training.evaluation.report import save_figure, write
from copedit_training.evaluation.report import table as markdown_table
from copedit_training.evaluation.subjects import Phantoms, held_out

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from copedit_rt.config import ModelConfig

PROMPTS = ("$p^d$ (how many)", "$p^p$ (which)", "$p^s$ (what)", "all")
KINDS = ("count", "position", "contrast", "all")  # of the prompts, in reports
RATES = (0.0, 0.25, 0.5, 0.75, 1.0)
INTERVENTIONS = ("zeroed", "shuffled", "random", "type-swapped")
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442", "#000000")  # Okabe and Ito
_TISSUES = {
    Task.BRAIN: {
        "background": (phantom.BACKGROUND,),
        "CSF": (phantom.CSF,),
        "grey matter": (phantom.GREY, phantom.DEEP_GREY),
        "white matter": (phantom.WHITE,),
        "vessel": (phantom.VESSEL,),
        "tumour": (phantom.CORE, phantom.RIM),
        "oedema, spots": (phantom.OEDEMA, phantom.HYPERINTENSITY),
    },
    Task.HEART: {
        "air, lung": (0,),
        "body, liver": (phantom.BODY, phantom.LIVER),
        "fat": (phantom.FAT,),
        "blood": (phantom.LV_BLOOD, phantom.RV_BLOOD, phantom.OTHER_BLOOD),
        "myocardium": (phantom.MYOCARDIUM,),
    },
}
THIRDS = {"background": (0,), "darkest third": (1,), "middle third": (2,), "brightest third": (3,)}


class Probe:
    """A model and held-out subjects as it sees them.

    names: whose they are. people: which studies are of the same person [N], from 0 on. images: float32 [N, m, 1, H, W,
    D] in 0..1. raw: latents [N, m, C, h, w, d] in the autoencoder's scale. each: prompts of every element alone [N, m,
    3, P]. patterns: every missing pattern as observed elements [S, m], bool. weights: SHA-256 of both networks.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: str,
        subjects: int,
        device: str = "cpu",
        *,
        data: str = "phantom",
        first_seed: int | None = None,
        split: str | None = None,
    ) -> None:
        """data, first_seed and split say whose the subjects are, as in `subjects.held_out`. Raises CopeditError as that
        does, and where no study of a data set can be used."""
        where = checkpoint.locate(model)
        self.device = choose_device(device)
        self.config, self.vae, tokenizer = checkpoint.load_tokenizer(where)
        check_prior(self.config)
        _, net, denoiser = checkpoint.load_denoiser(where)
        self.net, self.weights = net.to(self.device), {"tokenizer": tokenizer, "denoiser": denoiser}
        self.vae.to(self.device)
        self.joint = self.config.task.joint
        self.whom = held_out(self.config, data, subjects, first_seed, split)
        seen = [(name, prepared.images) for name, _, prepared in islice(self.whom, subjects)]
        if not seen:
            raise CopeditError(f"{data}: none of the held-out studies can be used; `copedit evaluate` says why")
        self.names, self.images = [name for name, _ in seen], np.stack([images for _, images in seen])
        self.people = torch.from_numpy(np.unique(self.names, return_inverse=True)[1])
        self.raw = torch.cat([self.vae.encode(torch.from_numpy(x)[None].to(self.device)) for x in self.images])
        self.each = torch.cat([self.vae.prompts_of_each(z[None]) for z in self.raw])
        m, every = len(self.config.elements), missing_patterns(self.config)
        self.patterns = torch.ones(sum(map(len, every.values())), m, dtype=torch.bool)
        for row, missing in zip(self.patterns, (p for ps in every.values() for p in ps), strict=True):
            row[[self.config.elements.index(e) for e in missing]] = False

    @property
    def persons(self) -> int:
        return len(self.people.unique())

    def prompts(self, subject: Tensor, observed: Tensor) -> Tensor:
        """Prompts [S, 3, P] of subjects [S] with these elements [S, m] observed: the mean over what is there."""
        share = (observed / observed.sum(1, keepdim=True)).to(self.each.device)
        return (self.each[subject] * share[:, :, None, None]).sum(1)

    def turns(self) -> tuple[Tensor, Tensor]:
        """Samples: one pattern of every missing count for each subject, all patterns in turn. (subject [S], [S, m])"""
        counts = (~self.patterns).sum(1)
        rows = [(i, self.patterns[counts == c]) for i in range(len(self.images)) for c in counts.unique().tolist()]
        return torch.tensor([i for i, _ in rows]), torch.stack([ps[i % len(ps)] for i, ps in rows])

    @cached_property
    def synthesizer(self) -> Synthesizer:
        return Synthesizer(self.config, self.vae, self.net, str(self.device))

    @torch.no_grad()
    def quality(self, subject: Tensor, observed: Tensor, prompts: Tensor) -> np.ndarray:
        """PSNR (dB) [S] of what is missing, mean over elements, synthesised with these prompts [S, 3, P]."""
        found = []
        for i, there, given in zip(subject.tolist(), observed.numpy(), prompts.cpu().numpy(), strict=True):
            latents = self.vae.normalise(self.raw[i]).cpu().numpy()[there]
            made = fill(self.synthesizer, latents, there, given, f"analysis-{i}")
            pairs = zip(made, self.images[i][~there, 0], strict=True)
            found.append(float(np.mean([min(psnr(a, b), 100.0) for a, b in pairs])))
        return np.array(found)

    def labels(self, subject: int) -> np.ndarray:
        """Codes of `tissues` on the grid of each element [m, H, W, D]."""
        if isinstance(self.whom, Phantoms):
            labels = phantom_subject(self.config, self.whom.first_seed + subject).labels
            m = len(self.config.elements)
            return np.stack(np.split(labels, m, axis=2) if self.joint else [labels] * m)
        return np.stack([thirds(image) for image in self.images[subject, :, 0]])

    @property
    def tissues(self) -> Mapping[str, Sequence[int]]:
        """Codes of each tissue; of a data set, which has none, of each third of an image's intensities."""
        return _TISSUES[self.config.task] if isinstance(self.whom, Phantoms) else THIRDS


def thirds(image: np.ndarray) -> np.ndarray:
    """0 where an image is 0, and 1, 2, 3 from the darkest to the brightest third of the rest."""
    inside = image > 0
    if not inside.any():
        return np.zeros(image.shape, np.int64)
    return np.where(inside, 1 + np.digitize(image, np.quantile(image[inside], (1 / 3, 2 / 3))), 0)


def fill(
    model: Synthesizer, latents: np.ndarray, observed: np.ndarray, prompts: np.ndarray, key: str, seed: int = 0
) -> np.ndarray:
    """What is missing of a subject, on the model's grid in 0..1: [missing, H, W, D], by the sampler's defaults.

    latents [k, C, h, w, d] (normalised) and prompts [3, P] of what is observed [m] (bool). key, seed: with the element
    they determine the noise.
    """
    sampler = model.config.diffusion
    start = model.start(latents, observed, key, seed)
    (z,) = model.sample(start[None], prompts[None], observed[None], sampler.steps, sampler.solver)
    made = model.decode(z, observed)
    return made[~observed, 0].clip(0, 1)


def check_prior(config: ModelConfig) -> None:
    """Raises CopeditError for a model with a prior: experiments look at what a network makes of noise and prompts."""
    if config.denoiser.prior:
        raise CopeditError(f"{config.name} starts from a prior, which no experiment takes; choose another model")


def _name(element: str) -> str:
    """As it is written: T1ce, FLAIR, SLAB0."""
    return element.upper().replace("CE", "ce")


def over_subjects(values: np.ndarray, subject: Tensor) -> tuple[float, float]:
    """Mean over subjects and its standard error of values [S] that belong to subjects [S]; zero for one subject."""
    each = np.array([values[subject.numpy() == i].mean() for i in subject.unique().tolist()])
    return float(each.mean()), float(each.std(ddof=1) / math.sqrt(len(each))) if len(each) > 1 else 0.0


# ---------------------------------------------------------------------------------------------------------- gradcam


def gradcam(probe: Probe, subject: int, observed: Tensor) -> Tensor:
    """Grad-CAM (Selvaraju et al. 2017) of the three pretext tasks for one subject: [3, m, h, w, d], 0 where an element
    is missing, the maximum of each task 1.

    The layer is the last convolution of the prompt encoder, the score that of the right answer: the logit of the true
    count; the mean logit of being missing over what is missing less that over what is observed; the contrastive
    embeddings' similarity between what is observed and what is missing.
    """
    vae, raw = probe.vae, probe.raw[subject]
    there, missing = observed.to(raw.device), ~observed.to(raw.device)
    maps = raw.new_zeros(3, len(raw), *raw.shape[-3:])
    for task, (encoder, head) in enumerate(zip(vae.prompt_encoders, vae.heads, strict=True)):
        with torch.enable_grad():
            features = encoder.conv(raw[there]).detach().requires_grad_()  # type: ignore[operator]
            answer = head(encoder.mlp(features.mean((2, 3, 4))).mean(0))  # type: ignore[operator]
            if task == 0:
                value = answer[int(missing.sum()) - 1]
            elif task == 1:
                value = answer[missing].mean() - answer[there].mean()
            else:
                with torch.no_grad():
                    other = head(encoder(raw[missing]).mean(0))
                value = F.cosine_similarity(answer, other, dim=0)
            (gradient,) = torch.autograd.grad(value, features)
        weights = gradient.mean((2, 3, 4), keepdim=True)
        maps[task, there] = (weights * features.detach()).sum(1).clamp_min(0)
    return maps / maps.amax((1, 2, 3, 4), keepdim=True).clamp_min(1e-12)


def salient_regions(probe: Probe) -> tuple[dict[str, Any], Figure]:
    """Figure 6, and in numbers: how much more of a task's activation a tissue holds than of the volume."""
    names = probe.tissues
    upsample = [n // k for n, k in zip(probe.config.image, probe.raw.shape[-3:], strict=True)]
    shares = {kind: {name: np.zeros(2) for name in names} for kind in KINDS[:3]}
    pick, most = 0, -1.0
    subject, observed = probe.turns()
    every = [probe.labels(i) for i in range(len(probe.images))]
    rare = list(names.values())[-2:] if not probe.joint else list(names.values())[-1:]
    for i, there in zip(subject.tolist(), observed, strict=True):
        labels, maps = every[i], gradcam(probe, i, there).cpu().numpy()
        for axis, n in enumerate(upsample):
            maps = maps.repeat(n, 2 + axis)
        for kind, values in zip(KINDS, maps, strict=False):
            for name, codes in names.items():
                inside = np.isin(labels, codes) & there.numpy()[:, None, None, None]
                total = values.sum()
                shares[kind][name] += (values[inside].sum() / total if total else 0, inside.sum() / inside[there].size)
        seen = float(np.isin(labels[..., labels.shape[-1] // 2], [c for codes in rare for c in codes]).mean())
        if seen > most:
            pick, most = i, seen
    table = {
        kind: {
            name: {"share_of_activation": float(a / len(subject)), "share_of_volume": float(v / len(subject))}
            for name, (a, v) in rows.items()
        }
        for kind, rows in shares.items()
    }
    for rows in table.values():
        for row in rows.values():
            row["ratio"] = row["share_of_activation"] / row["share_of_volume"] if row["share_of_volume"] else None  # type: ignore[assignment]
    report = {"samples": len(subject), "regions": table, "shown": {"subject": probe.names[pick]}}
    return report, _draw_regions(probe, pick, every[pick], table)


def _draw_regions(probe: Probe, pick: int, labels: np.ndarray, table: Mapping[str, Any]) -> Figure:
    from matplotlib import pyplot as plt

    config = probe.config
    there = torch.ones(len(config.elements), dtype=torch.bool)
    there[0] = False
    maps = F.interpolate(gradcam(probe, pick, there).cpu(), size=config.image, mode="trilinear").numpy()
    shown = there.nonzero()[:, 0].tolist()
    figure: Any = plt.figure(figsize=(7.2, 4.7), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.1, 1))
    axes = left.subplots(4, len(shown), gridspec_kw={"wspace": 0.02, "hspace": 0.02})
    rare = [c for codes in list(probe.tissues.values())[-2:] for c in codes]
    z = int(np.isin(labels[shown[0]], rare).sum((0, 1)).argmax())
    for column, element in enumerate(shown):
        image = np.rot90(probe.images[pick, element, 0, :, :, z])
        for row in range(4):
            ax = axes[row, column]
            ax.imshow(image, cmap="gray", vmin=0, vmax=1)
            if row:
                over = np.rot90(maps[row - 1, element, :, :, z])
                top = np.percentile(maps[row - 1, shown], 99.5)
                ax.imshow(np.clip(over / max(top, 1e-12), 0, 1), cmap="inferno", alpha=0.65, vmin=0, vmax=1)
            ax.set_xticks([])
            ax.set_yticks([])
            ax.spines[:].set_visible(False)
            if row == 0:
                ax.set_title(_name(config.elements[element]), fontsize=8)
            if column == 0:
                ax.set_ylabel(("image", *PROMPTS)[row], fontsize=8)
    ax = right.subplots()
    tissues, width = list(table["count"]), 0.26
    for k, kind in enumerate(KINDS[:3]):
        ratios = [table[kind][name]["ratio"] or 0 for name in tissues]
        ax.barh(np.arange(len(tissues)) + (k - 1) * width, ratios, width, color=COLOURS[k], label=PROMPTS[k])
    ax.axvline(1, color="0.4", lw=0.8, ls="--")
    ax.set_yticks(range(len(tissues)), tissues)
    ax.invert_yaxis()
    ax.set_xlabel("activation per volume (1: no preference)")
    ax.legend(frameon=False, fontsize=7)
    return figure


# ------------------------------------------------------------------------------------------------------------- tsne


def neighbour_accuracy(points: np.ndarray, labels: np.ndarray, subject: np.ndarray, neighbours: int = 5) -> float:
    """Share of samples whose label is that of most of their nearest neighbours among other subjects."""
    from sklearn.neighbors import KNeighborsClassifier

    right = []
    for i in np.unique(subject):
        own = subject == i
        near = KNeighborsClassifier(min(neighbours, int((~own).sum()))).fit(points[~own], labels[~own])
        right.extend(near.predict(points[own]) == labels[own])
    return float(np.mean(right))


@dataclass(frozen=True)
class Grouped:
    """Prompts [S, 3, P] of every person [S] under every pattern, in deviations; and by "count" and "identity" of what
    is missing, which of them belong there [S] (bool) and their classes [S]."""

    prompts: np.ndarray
    subject: np.ndarray
    groups: Mapping[str, tuple[np.ndarray, np.ndarray]]

    @classmethod
    def of(cls, probe: Probe) -> Grouped:
        if probe.persons < 2:
            raise CopeditError("prompts of one subject have no neighbours among others'; give studies of several")
        n, s = len(probe.images), len(probe.patterns)
        subject, observed = torch.arange(n).repeat_interleave(s), probe.patterns.repeat(n, 1)
        counts = (~observed).sum(1).numpy()
        one = counts == 1
        return cls(
            probe.prompts(subject, observed).cpu().numpy().astype(np.float64),
            probe.people[subject].numpy(),
            {"count": (np.ones_like(one), counts), "identity": (one, (~observed).float().argmax(1).numpy())},
        )

    def points(self, label: str, kind: int) -> np.ndarray:
        """One kind of prompt of a group [N, P], each value with mean 0 and deviation 1."""
        points = self.prompts[self.groups[label][0], kind]
        return (points - points.mean(0)) / points.std(0).clip(1e-9)


def separation(grouped: Grouped) -> dict[str, Any]:
    """How far count and identity separate in each prompt."""
    from sklearn.metrics import silhouette_score

    found: dict[str, Any] = {}
    for label, (rows, classes) in grouped.groups.items():
        for k, kind in enumerate(KINDS[:3]):
            points = grouped.points(label, k)
            found.setdefault(kind, {})[label] = {
                "silhouette": float(silhouette_score(points, classes[rows])),
                "nearest_neighbours": neighbour_accuracy(points, classes[rows], grouped.subject[rows]),
            }
    return found


def distribution(probe: Probe) -> tuple[dict[str, Any], Figure]:
    """Figure 7a and b: t-SNE of p^d over all patterns, by count, and of p^p where one is missing, by identity; and in
    numbers how far count and identity separate in each prompt."""
    from sklearn.manifold import TSNE

    grouped = Grouped.of(probe)
    report: dict[str, Any] = {"subjects": probe.persons, "separation": separation(grouped), "embedding": {}}
    for label, k in (("count", 0), ("identity", 1)):
        (rows, classes), points = grouped.groups[label], grouped.points(label, k)
        perplexity = min(30.0, (len(points) - 1) / 3)
        where = TSNE(2, perplexity=perplexity, init="pca", random_state=0).fit_transform(points)
        report["embedding"][label] = {
            "x": where[:, 0].tolist(),
            "y": where[:, 1].tolist(),
            "class": classes[rows].tolist(),
            "subject": grouped.subject[rows].tolist(),
        }
    return report, _draw_distribution(probe.config, report)


def _draw_distribution(config: ModelConfig, report: Mapping[str, Any]) -> Figure:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(7.2, 3.3), layout="constrained")
    unit = "slabs" if config.task.joint else "modalities"
    for ax, (label, points), prompt in zip(axes, report["embedding"].items(), PROMPTS, strict=False):
        classes = np.array(points["class"])
        for value in np.unique(classes):
            name = f"{value} {unit} missing" if label == "count" else f"{_name(config.elements[value])} missing"
            own = classes == value
            shift = 1 if label == "count" else 0
            ax.scatter(
                np.array(points["x"])[own],
                np.array(points["y"])[own],
                s=9,
                lw=0,
                alpha=0.8,
                color=COLOURS[value - shift],
                label=name.replace("1 modalities", "1 modality").replace("1 slabs", "1 slab"),
            )
        kind = "count" if label == "count" else "position"
        accuracy = report["separation"][kind][label]["nearest_neighbours"]
        ax.set_title(f"{prompt}: {accuracy:.0%} of nearest neighbours agree", fontsize=8)
        ax.set_xticks([])
        ax.set_yticks([])
        ax.spines[["top", "right"]].set_visible(True)
        ax.legend(frameon=False, fontsize=7, markerscale=1.8, loc="best", handletextpad=0.2)
    return figure


# -------------------------------------------------------------------------------------------------------- attention


@torch.no_grad()
def attention_maps(
    net: nn.Module, z: Tensor, t: Tensor, prompts: Tensor, observed: Tensor, tokens: Tensor | None = None
) -> Tensor:
    """Weights of the across-blocks [blocks, B, m, m], rows looking and columns looked at; mean over heads and tokens.

    tokens: [B, T] bool, the tokens to average over (None: all). Other arguments as `MDiT3D.forward`'s.
    """
    if not isinstance(net, MDiT3D) or not net.alternate:
        raise CopeditError("attention across elements: only the backbone mdit3d has it; choose such a model")
    found: list[Tensor] = []

    def note(heads: int) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(layer: nn.Module, given: Any, qkv: Tensor) -> None:
            q, k, _ = qkv.float().unflatten(-1, (3, heads, -1)).unbind(3)
            scores = torch.einsum("bithd,bjthd->bthij", q, k) / math.sqrt(q.shape[-1])
            weights = scores.softmax(-1).mean(2)
            keep = torch.ones(weights.shape[:2], device=z.device) if tokens is None else tokens.float()
            found.append((weights * keep[:, :, None, None]).sum(1) / keep.sum(1)[:, None, None])

        return hook

    across = [block for block in net.blocks if isinstance(block, Block) and block.axis == "element"]
    hooks = [block.qkv.register_forward_hook(note(block.heads)) for block in across]
    try:
        net(z, t, prompts, observed)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(found)


def attention(probe: Probe) -> tuple[dict[str, Any], Figure]:
    """Figure 7c: who looks at whom in the across-blocks where one element is missing, at the sampler's first step.

    Beside the prompts of the true pattern, those of another one show how much the prompts steer it.
    """
    config, m, n = probe.config, len(probe.config.elements), len(probe.images)
    last = torch.full((1,), config.diffusion.train_steps - 1, device=probe.device)
    net, maps = probe.net, {}
    if not isinstance(net, MDiT3D) or not net.alternate:
        raise CopeditError(f"model {config.name}: backbone {config.denoiser.backbone} has no attention across elements")
    for missing in range(m):
        there = torch.arange(m)[None] != missing
        for given in ("true", "other"):
            shown = there if given == "true" else torch.arange(m)[None] != (missing + 1) % m
            each = []
            for i in range(n):
                z = probe.vae.normalise(probe.raw[i : i + 1])
                eps = np.stack([noise(0, f"analysis-{i}", e, tuple(z.shape[2:])) for e in config.elements])
                z = torch.where(
                    there[..., None, None, None, None].to(z.device), z, torch.from_numpy(eps).to(probe.device)
                )
                content = torch.from_numpy(probe.images[i].max((0, 1)))[None, None]
                tokens = F.adaptive_max_pool3d(content, net.grid).flatten(1) > 0.05
                prompts = probe.prompts(torch.tensor([i]), shown)
                each.append(
                    attention_maps(net, z, last, prompts, there.to(z.device), tokens.to(z.device))[:, 0].cpu().numpy()
                )
            maps[missing, given] = np.stack(each)  # [N, blocks, m, m]
    report: dict[str, Any] = {"subjects": probe.persons, "missing": {}}
    for missing, element in enumerate(config.elements):
        report["missing"][element] = {}
        for given in ("true", "other"):
            values = maps[missing, given]
            others = [i for i in range(m) if i != missing]
            seen = values[:, :, others, missing].mean(-1)  # [N, blocks]
            report["missing"][element][given] = {
                "map": values.mean(0).tolist(),
                "observed_to_missing": seen.mean(0).tolist(),
                "observed_to_missing_sd": seen.std(0).tolist(),
                "missing_to_itself": values[:, :, missing, missing].mean(0).tolist(),
            }
    return report, _draw_attention(config, report)


def _draw_attention(config: ModelConfig, report: Mapping[str, Any]) -> Figure:
    from matplotlib import pyplot as plt

    first = config.elements[0]
    maps = np.array(report["missing"][first]["true"]["map"])
    m, blocks = len(config.elements), len(maps)
    figure: Any = plt.figure(figsize=(1.75 * min(blocks, 4) + 2.6, 2.5 * math.ceil(blocks / 4)), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.75 * min(blocks, 4), 2.6))
    axes = left.subplots(math.ceil(blocks / 4), min(blocks, 4), squeeze=False)
    names = [f"{_name(e)}*" if e == first else _name(e) for e in config.elements]
    top = max(0.5, maps.max())
    for k, ax in enumerate(axes.flat):
        if k >= blocks:
            ax.set_visible(False)
            continue
        picture = ax.imshow(maps[k], cmap="viridis", vmin=0, vmax=top)
        for i in range(m):
            for j in range(m):
                value = maps[k, i, j]
                ax.text(
                    j, i, f"{value:.2f}", ha="center", va="center", fontsize=6, color="w" if value < top / 2 else "k"
                )
        ax.set_xticks(range(m), names, rotation=45, fontsize=6)
        ax.set_yticks(range(m), names if k % 4 == 0 else [""] * m, fontsize=6)
        ax.set_title(f"across-block {k + 1}", fontsize=8)
    left.colorbar(picture, ax=axes, shrink=0.7, pad=0.02).ax.tick_params(labelsize=6)
    left.supxlabel("looked at (* missing)", fontsize=7)
    ax = right.subplots()
    for k, element in enumerate(config.elements):
        rows = report["missing"][element]
        x = np.arange(1, blocks + 1)
        ax.plot(
            x,
            rows["true"]["observed_to_missing"],
            "o-",
            ms=3,
            lw=1.2,
            color=COLOURS[k],
            label=f"{_name(element)} missing",
        )
        ax.plot(x, rows["other"]["observed_to_missing"], "o--", ms=3, lw=1, mfc="w", color=COLOURS[k])
    ax.plot([], [], "o--", color="0.4", ms=3, lw=1, mfc="w", label="wrong prompts")
    ax.axhline(1 / m, color="0.6", lw=0.8, ls=":")
    ax.set_xticks(range(1, blocks + 1))
    ax.set_xlabel("across-block", fontsize=8)
    ax.set_ylabel("attention of the observed\nto the missing element", fontsize=8)
    ax.set_ylim(bottom=0)
    ax.legend(frameon=False, fontsize=6)
    return figure


# ------------------------------------------------------------------------------------- corruption and interventions


def donors(subject: Tensor, observed: Tensor, rng: np.random.Generator) -> Tensor:
    """For each sample the index of another whose prompts are all wrong for it: of another subject (where there are
    several), another count and another missing set."""
    count = observed.sum(1)
    out = torch.empty(len(subject), dtype=torch.long)
    for i in range(len(subject)):
        wrong = count != count[i]  # another count is another set
        if (subject != subject[i]).any():
            wrong &= subject != subject[i]
        out[i] = int(rng.choice(wrong.nonzero()[:, 0].numpy()))
    return out


def replaced(prompts: Tensor, kind: int, by: Tensor) -> Tensor:
    """Prompts [S, 3, P] with one of them (3: all) replaced by those of `by`."""
    if kind == 3:
        return by
    out = prompts.clone()
    out[:, kind] = by[:, kind]
    return out


def corruption(probe: Probe, draws: int = 200) -> tuple[dict[str, Any], Figure]:
    """Figure 8a: PSNR where a fraction r of the samples is given prompts that are wrong for them.

    Samples do not influence one another, so each is synthesised once with its own prompts and once with wrong ones of
    every kind; the curve averages over `draws` random choices of the fraction.
    """
    subject, observed = probe.turns()
    rng = np.random.default_rng(0)
    prompts = probe.prompts(subject, observed)
    wrong = prompts[donors(probe.people[subject], observed, rng)]
    clean = probe.quality(subject, observed, prompts)
    orders = [rng.permutation(len(clean)) for _ in range(draws)]
    report: dict[str, Any] = {"subjects": probe.persons, "samples": len(clean), "rates": list(RATES), "psnr": {}}
    for kind, name in enumerate(KINDS):
        spoiled = probe.quality(subject, observed, replaced(prompts, kind, wrong))
        curves = []
        for order in orders:
            ranks = np.argsort(order)
            curves.append([float(np.where(ranks < round(r * len(clean)), spoiled, clean).mean()) for r in RATES])
        loss, error = over_subjects(spoiled - clean, probe.people[subject])
        report["psnr"][name] = {
            "mean": np.mean(curves, 0).tolist(),
            "sd_over_draws": np.std(curves, 0).tolist(),
            "difference_at_1": loss,
            "standard_error": error,
        }
    return report, _draw_corruption(report)


def _draw_corruption(report: Mapping[str, Any]) -> Figure:
    from matplotlib import pyplot as plt

    figure, ax = plt.subplots(figsize=(3.6, 2.9), layout="constrained")
    for k, (row, name) in enumerate(zip(report["psnr"].values(), PROMPTS, strict=True)):
        mean, sd = np.array(row["mean"]), np.array(row["sd_over_draws"])
        ax.plot(report["rates"], mean, "o-", ms=3, lw=1.2, color=COLOURS[k], label=name)
        ax.fill_between(report["rates"], mean - sd, mean + sd, color=COLOURS[k], alpha=0.15, lw=0)
    ax.set_xlabel("fraction $r$ of samples with wrong prompts")
    ax.set_ylabel("PSNR (dB)")
    ax.set_xticks(report["rates"])
    ax.legend(frameon=False, fontsize=7)
    return figure


def intervened(prompts: Tensor, how: str, subject: Tensor, rng: np.random.Generator) -> Tensor:
    """What an intervention puts in the place of prompts [S, 3, P].

    zeroed; shuffled: those of another sample; random: Gaussian with each component's mean and deviation;
    type-swapped: p^d <- p^p <- p^s <- p^d.
    """
    if how == "zeroed":
        return torch.zeros_like(prompts)
    if how == "type-swapped":
        return prompts.roll(-1, 1)
    if how == "shuffled":  # a cyclic shift of a random order leaves nobody his own
        order = torch.from_numpy(rng.permutation(len(prompts)))
        out = torch.empty_like(prompts)
        out[order] = prompts[order.roll(1)]
        return out
    eps = torch.from_numpy(rng.standard_normal(prompts.shape, dtype=np.float32)).to(prompts.device)
    return prompts.mean(0) + eps * prompts.std(0)


def intervention(probe: Probe) -> tuple[dict[str, Any], Figure]:
    """Figure 8b: change of PSNR (dB) where prompts are replaced, beside its standard error over subjects."""
    subject, observed = probe.turns()
    prompts = probe.prompts(subject, observed)
    clean = probe.quality(subject, observed, prompts)
    table: dict[str, Any] = {}
    for how in INTERVENTIONS:
        by = intervened(prompts, how, subject, np.random.default_rng(0))
        for kind, name in enumerate(KINDS):
            change = probe.quality(subject, observed, replaced(prompts, kind, by)) - clean
            mean, error = over_subjects(change, probe.people[subject])
            table.setdefault(name, {})[how] = {"difference": mean, "standard_error": error}
    report = {
        "subjects": probe.persons,
        "samples": len(clean),
        "psnr": over_subjects(clean, probe.people[subject])[0],
        "interventions": table,
    }
    return report, _draw_intervention(report)


def _draw_intervention(report: Mapping[str, Any]) -> Figure:
    from matplotlib import pyplot as plt

    table = report["interventions"]
    values = np.array([[table[kind][how]["difference"] for how in INTERVENTIONS] for kind in KINDS])
    errors = np.array([[table[kind][how]["standard_error"] for how in INTERVENTIONS] for kind in KINDS])
    figure, ax = plt.subplots(figsize=(4.6, 2.7), layout="constrained")
    low = min(float(values.min()), -1e-3)
    picture = ax.imshow(values, cmap="Reds_r", vmin=low, vmax=0, aspect="auto")
    for i, j in np.ndindex(values.shape):
        dark = values[i, j] < 0.55 * low
        text = f"{values[i, j]:+.2f}\n± {errors[i, j]:.2f}"
        ax.text(j, i, text, ha="center", va="center", fontsize=7, color="w" if dark else "k")
    ax.set_xticks(range(len(INTERVENTIONS)), INTERVENTIONS)
    ax.set_yticks(range(len(KINDS)), PROMPTS)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    figure.colorbar(picture, ax=ax, label="change of PSNR (dB)")
    return figure


# ---------------------------------------------------------------------------------------------------------- command

ANALYSES: dict[str, Callable[[Probe], tuple[dict[str, Any], Figure]]] = {
    "gradcam": salient_regions,
    "tsne": distribution,
    "attention": attention,
    "corruption": corruption,
    "intervention": intervention,
}


def analyse(
    kind: str, model: str, folder: Path, subjects: int = 16, device: str = "auto", **whose: Any
) -> dict[str, Any]:
    """Run one of `ANALYSES` on a model; writes its figure KIND.png and returns its report. whose: further arguments of
    `Probe`.

    Raises CopeditError as `Probe` does, and without the extra `train`, which has matplotlib and scikit-learn.
    """
    try:
        import matplotlib
        import sklearn  # noqa: F401
    except ImportError as error:
        raise CopeditError(f"analyses need {error.name}: pip install -c constraints.txt -e '.[train]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    probe = Probe(model, subjects, device, **whose)
    style: Any = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6}
    with matplotlib.rc_context(style):
        report, figure = ANALYSES[kind](probe)
        save_figure(figure, folder / f"{kind}.png", dpi=220)
        plt.close(figure)
    found = {"analysis": kind, "model": model, "weights": probe.weights, "figure": f"{kind}.png"}
    return found | probe.whom.about() | report


def _rows(report: Mapping[str, Any]) -> tuple[str, Sequence[str], list[tuple[str, ...]]]:
    """What a report says, as a sentence, column heads and rows."""
    kind = report["analysis"]
    if kind == "gradcam":
        regions = report["regions"]
        rows = [
            (name, *(f"{regions[k][name]['ratio']:.2f}" if regions[k][name]["ratio"] else "-" for k in KINDS[:3]))
            for name in regions["count"]
        ]
        return "Activation of Grad-CAM per volume; 1 is no preference.", ("tissue", *KINDS[:3]), rows
    if kind == "tsne":
        heads = ("prompt", "count: silhouette", "nearest neighbours", "identity: silhouette", "nearest neighbours")
        rows = [
            (
                k,
                *(
                    f"{v[label][x]:.2f}"
                    for label in ("count", "identity")
                    for x in ("silhouette", "nearest_neighbours")
                ),
            )
            for k, v in report["separation"].items()
        ]
        return "How far count and identity of what is missing separate in each prompt.", heads, rows
    if kind == "attention":
        blocks = len(next(iter(report["missing"].values()))["true"]["observed_to_missing"])
        rows = [
            (element, given, *(f"{x:.3f}" for x in row["observed_to_missing"]))
            for element, both in report["missing"].items()
            for given, row in both.items()
        ]
        says = "Attention of observed elements to the missing one, in each across-block."
        return says, ("missing", "prompts", *(f"block {i + 1}" for i in range(blocks))), rows
    if kind == "corruption":
        rows = [
            (
                name,
                *(f"{x:.2f}" for x in row["mean"]),
                f"{row['difference_at_1']:+.3f} ± {row['standard_error']:.3f}",
            )
            for name, row in report["psnr"].items()
        ]
        says = "PSNR (dB) where a fraction r of the samples has wrong prompts; last, the change at 1 ± standard error."
        return says, ("prompt", *(f"r = {r}" for r in report["rates"]), "change"), rows
    rows = [
        (name, *(f"{c['difference']:+.3f} ± {c['standard_error']:.3f}" for c in row.values()))
        for name, row in report["interventions"].items()
    ]
    return f"Change of PSNR ({report['psnr']:.2f} dB) ± standard error over subjects.", ("prompt", *INTERVENTIONS), rows


def markdown(report: Mapping[str, Any]) -> str:
    """The report as a Markdown table."""
    says, heads, rows = _rows(report)
    many = f"{report['samples']} samples" if "samples" in report else f"{report['subjects']} subjects"
    whose = f"of {report['data']} ({report['split']})" if "split" in report else f"simulated ({report['data']})"
    lines = [f"# {report['model']}: {report['analysis']}", "", f"{many}, {whose}. {says}", ""]
    return "\n".join([*lines, *markdown_table(heads, rows, 1)]) + "\n"


def write_report(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """KIND.json and KIND.md in a folder, beside the figure."""
    return [*write(report, markdown(report), folder, report["analysis"]), folder / report["figure"]]
