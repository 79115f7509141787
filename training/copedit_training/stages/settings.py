"""What a training run is told: one TOML per preset, any field of a stage set on the command line."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from copedit_rt.errors import CopeditError

Method = Literal["mmgan", "mmt", "hyper-gae", "ldm", "controlnet", "m2dn", "diffm4ri"]
Stage = Literal["tokenizer", "denoiser"] | Method
_PRESETS = Path(__file__).parents[1] / "presets"
_MOST = 10_000_000  # steps, or subjects
_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("steps", "subjects", "pretext_every", "checkpoint_every"), (1, _MOST)),
    **dict.fromkeys(("batch_size", "accumulate", "draws", "prompt_batch", "keep", "validate_subjects"), (1, 65_536)),
    **dict.fromkeys(("warmup", "prompt_steps", "quantise_from", "readout_steps", "whole_steps"), (0, _MOST)),
    **dict.fromkeys(("prior_steps", "validate_every"), (0, _MOST)),
    "adversarial_from": (-1, _MOST),
    "seed": (0, 2**63 - 1),
    **dict.fromkeys(("crop", "prompt_crop"), (0, 4096)),
    "lr": (1e-12, 10),
    **dict.fromkeys(("prompt_lr", "muon_lr"), (0, 10)),
    "clip": (1e-6, 1e6),
    **dict.fromkeys(("beta1", "beta2", "ema"), (0, 0.999_999)),
    **dict.fromkeys(("weight_decay", "whiten", "last_timestep", "observed_weight", "image_weight"), (0, 1)),
    **dict.fromkeys(("patients_share", "phantoms_share"), (0, 0.9)),
    **dict.fromkeys(("count_weight", "position_weight", "contrast_weight"), (0, 100)),
    **dict.fromkeys(("sampler_steps", "slices"), (1, 65_536)),
}
# Of `--quick`: the most that each is.
_QUICK: dict[Stage, dict[str, Any]] = {
    "tokenizer": {
        "prompt_steps": 1,
        "quantise_from": 1,
        "adversarial_from": 2,
        "readout_steps": 20,
        "prior_steps": 20,
        "pretext_every": 2,
    },
    "denoiser": {"whole_steps": 1, "ema": 0.5, "compile": False},
}
_QUICK_METHOD = {"ema": 0.5, "sampler_steps": 2, "control_steps": 2}  # of those that a method has
_QUICK_BOTH = {"steps": 4, "warmup": 1, "batch_size": 2, "subjects": 4, "checkpoint_every": 2, "validate_every": 0}
# What has no effect while another setting has a value.
_IDLE: dict[str, tuple[str, Any]] = {
    "prompt_lr": ("prompt_steps", 0),
    "prompt_batch": ("prompt_steps", 0),
    "prompt_crop": ("prompt_steps", 0),
    "patients_share": ("patients", ""),
    "patients": ("patients_share", 0.0),
    "validate_subjects": ("validate_every", 0),
    "whole_steps": ("crop", 0),
    "muon_lr": ("optimizer", "adam"),
}
_CHOICES: dict[str, tuple[str, ...]] = {
    "dtype": ("float32", "bfloat16", "float16"),
    "position_loss": ("bce", "cross-entropy"),
    "optimizer": ("adam", "muon"),
    "export": ("float32", "float16"),
    "guidance": ("full", "mask", "none"),
    "predicts": ("noise", "clean"),
}


@dataclass(frozen=True)
class Settings:
    """Hyperparameters of either stage.

    steps, batch_size (subjects), lr (peak of a linear warm-up and cosine decay), warmup (steps), seed.
    accumulate: micro-batches of batch_size subjects in a step, shared by the processes of torchrun.
    subjects: simulated subjects to train on. dtype: autocast type, "float32", "bfloat16", or on a GPU "float16", whose
    losses are scaled so that small gradients do not vanish (Micikevicius et al. 2018).
    clip: gradient norm. beta1, beta2, weight_decay: of the optimizer. device: auto, cpu or cuda[:N].
    crop: train on random crops of so many voxels in the plane, 0 for whole images; the stages say how.
    augment: `augmentation.Augmentation` of every image; brains are mirrored with or without it. In the denoiser it
    costs the encoding of each batch, as latents are then not computed once and kept.
    checkpointing: less memory for more time, see `task.checkpoint_activations`.
    checkpoint_every, keep: how often, and how many checkpoints stay.
    validate_every: steps between measurements on the first `validate_subjects` held-out subjects, of a data
    set at most half of them; 0 for none.

    Raises CopeditError for a value out of its range.
    """

    stage: ClassVar[Stage]
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {}  # of what a kind of settings adds

    steps: int
    batch_size: int
    lr: float
    warmup: int = 100
    seed: int = 0
    accumulate: int = 1
    subjects: int = 256
    dtype: str = "bfloat16"
    clip: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.0
    crop: int = 0
    augment: bool = False
    checkpointing: bool = False
    device: str = "auto"
    checkpoint_every: int = 250
    keep: int = 2
    validate_every: int = 0
    validate_subjects: int = 4

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            low, high = self.ranges.get(name) or _RANGES.get(name, (value, value))
            if not low <= value <= high:  # neither is NaN
                raise CopeditError(f"{name} = {value}: must be from {low} to {high}")
            if value not in (choices := _CHOICES.get(name, (value,))):
                raise CopeditError(f"{name} = {value!r}: must be {' or '.join(choices)}")

    def phase(self, step: int) -> tuple[float, int, int]:
        """Of the part of the run that a step is in: the peak of its learning rate, the step in it, and its length."""
        return self.lr, step, self.steps

    def too_late(self) -> list[str]:
        """What the run is too short for, a sentence each."""
        first = self.phase(0)[2]
        run = f"the run has {first} steps" + " before its last phase" * (first < self.steps)
        said = [f"warmup = {self.warmup} lasts to the end: {run}"] if self.warmup >= first else []
        for name in ("quantise_from", "adversarial_from"):
            if (begin := getattr(self, name, -1)) >= first:
                said.append(f"{name} = {begin} never begins: {run}")
        if self.crop and (whole := getattr(self, "whole_steps", 0)) >= self.steps:
            said.append(f"whole_steps = {whole} leaves no step on crops: {run}")
        return said


@dataclass(frozen=True)
class TokenizerSettings(Settings):
    """Hyperparameters of stage I, beside those of either.

    crop: the pretext tasks read whole images all the same, every `pretext_every` steps, with their weight raised
    accordingly. draws: missing patterns drawn per subject for them.
    wavelets: the autoencoder starts as `wavelets.start_as_wavelets`, not at random.
    quantise_from: the first step with quantisation. Before it stage I is a plain autoencoder, so that the codebook
    starts from latents that already mean something.
    prompt_steps: so many of the steps, at the end and with a schedule of their own (peak `prompt_lr`, 0 for lr), train
    the prompt encoders and heads alone, `prompt_batch` subjects at a time, on latents that no longer move; of crops of
    `prompt_crop` voxels in the plane, 0 for whole images, which the read-out sees in any case.
    readout_steps: after them, steps of the linear layers and heads alone on pooled features.
    prior_steps: of fitting the prior of a brain model that has one, 0 for others.
    patients: folder of real brain studies, complete or not, that are mixed into the fit of the prior with
    `patients_share` of the draws (`patients.varied`), and into the read-out with a quarter of that; empty for none.
    phantoms_share: of the draws of the prior, `PHANTOMS` phantoms among images that are simulated from label maps or
    of a data set.
    adversarial_from: the first step with the adversarial term, -1 for none. perceptual: file with the weights of its
    network (`losses.Perceptual`), empty for no such term.
    position_loss: "bce", each element missing or not by itself, which is how the heads are read; or "cross-entropy",
    the paper's, over all elements with equal shares for the missing ones. count_weight, position_weight,
    contrast_weight: of the pretext tasks among each other; the paper's are 1, 1, 1.
    """

    stage: ClassVar[Stage] = "tokenizer"

    pretext_every: int = 1
    draws: int = 1
    wavelets: bool = False
    quantise_from: int = 0
    prompt_steps: int = 0
    prompt_batch: int = 4
    prompt_crop: int = 0
    prompt_lr: float = 0.0
    readout_steps: int = 0
    prior_steps: int = 0
    patients: str = ""
    patients_share: float = 0.15
    phantoms_share: float = 0.0
    adversarial_from: int = -1
    perceptual: str = ""
    position_loss: str = "bce"
    count_weight: float = 1.0
    position_weight: float = 0.5
    contrast_weight: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.prompt_steps < self.steps:
            raise CopeditError(
                f"prompt_steps = {self.prompt_steps}: must be below steps = {self.steps}; set both, or try --quick"
            )

    def phase(self, step: int) -> tuple[float, int, int]:
        before = self.steps - self.prompt_steps
        if step < before:
            return self.lr, step, before
        return self.prompt_lr or self.lr, step - before, self.prompt_steps


@dataclass(frozen=True)
class DenoiserSettings(Settings):
    """Hyperparameters of stage II, beside those of either.

    crop: a batch of crops holds more subjects, patterns and timesteps for its tokens; the last `whole_steps` steps are
    on whole images, as many at a time as have the tokens of a batch of crops.
    whiten: above 0, the input layer starts as a rotation of the principal components of a token's values, each scaled
    by its variance to the power -whiten; 0.5 makes all equally large.
    last_timestep: share of the samples that are drawn at the last timestep, where sampling begins; above 0, that
    timestep is pure noise in training, too.
    observed_weight: of an observed element in the loss; 1 is equation 5. What is observed is never replaced, and a
    narrow network that need not copy it has room for what is missing.
    image_weight: above 0, the logarithm of the decoded images' mean squared error joins the loss with this weight, and
    the decoder learns along: what is synthesised is smoother than what the encoder gives.
    relative: the error of what is missing counts relative to that of the prior's fill, so that hard cases, in which
    everything is far off, do not outweigh the others.
    optimizer: "adam", or "muon" (Jordan et al. 2024) for all matrices but those of the conditioning and Adam for the
    rest. muon_lr: its peak, 0 for lr.
    compile: train through torch.compile; needs a C++ compiler on a CPU.
    ema: decay of the averaged weights. tokenizer: model folder of stage I.
    export: type of the finished denoiser's weights on disk, "float32" or "float16".
    """

    stage: ClassVar[Stage] = "denoiser"

    whole_steps: int = 0
    whiten: float = 0.0
    last_timestep: float = 0.0
    observed_weight: float = 1.0
    image_weight: float = 0.0
    relative: bool = False
    optimizer: str = "adam"
    muon_lr: float = 0.0
    compile: bool = False
    ema: float = 0.9999
    tokenizer: str = ""
    export: str = "float32"


@dataclass(frozen=True)
class MethodSettings(Settings):
    """What the methods of the paper's tables have in common, beside what all runs have; each adds its own.

    ema: decay of the averaged weights that are sampled with, 0 for none. tokenizer: the model whose tokenizer is taken,
    for methods on latents and for guidance by prompts. guidance: what tells the network what is missing, see
    `guidance.Guidance`. slices: of each drawn volume that many axial slices, for methods on slices. sampler_steps: of
    methods that sample.
    """

    ema: float = 0.0
    tokenizer: str = ""
    guidance: str = "none"
    slices: int = 8
    sampler_steps: int = 200


_KINDS: dict[Stage, type[Settings]] = {"tokenizer": TokenizerSettings, "denoiser": DenoiserSettings}


def load_settings(
    stage: Stage,
    preset: str,
    overrides: Sequence[str] = (),
    quick: bool = False,
    kind: type[MethodSettings] | None = None,
) -> Any:
    """`TokenizerSettings` or `DenoiserSettings` of a preset, or those of a method (kind), with `key=value` overrides.

    quick: a few steps on a few subjects, to see that everything works; overrides count all the same.

    Raises CopeditError for an unknown preset, key or value, for a key of the other stage, and for a preset that has
    none of a method.
    """
    paths = {path.stem: path for path in sorted(_PRESETS.glob("*.toml"))}
    if preset not in paths:
        raise CopeditError(f"preset {preset!r} has no training settings; choose one of {', '.join(paths)}")
    every = {name: tomllib.loads(path.read_text(encoding="utf-8")) for name, path in paths.items()}
    if stage not in every[preset]:
        able = ", ".join(name for name, sections in every.items() if stage in sections)
        raise CopeditError(f"preset {preset!r} has no settings of {stage}; choose one of {able}")
    values: dict[str, Any] = every[preset][stage]
    if quick:
        most = _QUICK_BOTH | _QUICK.get(stage, {key: x for key, x in _QUICK_METHOD.items() if hasattr(kind, key)})
        without = {"prior_steps"} - values.keys()  # a model that has no prior takes none
        values |= {k: min(values.get(k, getattr(kind, k, x)), x) for k, x in most.items() if k not in without}
    kinds: dict[Stage, type[Settings]] = {stage: kind} if kind else _KINDS
    own = dict(_parsed(stage, item, kinds) for item in overrides)
    needed = (f.name for f in dataclasses.fields(kinds[stage]) if f.default is f.default_factory is dataclasses.MISSING)
    if lacking := ", ".join(name for name in needed if name not in values | own):
        raise CopeditError(f"preset {preset!r}: its section [{stage}] lacks {lacking}; add it to {paths[preset].name}")
    settings = kinds[stage](**values | own)
    _check_idle(settings, own)
    return settings


def _check_idle(settings: Settings, own: Mapping[str, Any]) -> None:
    """Raises CopeditError for an override that would change nothing, as another setting is what it is."""
    defaults = {field.name: field.default for field in dataclasses.fields(settings)}
    for key, (other, without) in _IDLE.items():
        if key in own and own[key] != defaults[key] and getattr(settings, other, None) == without:
            idle = f"{other} = {without or repr(without)}"
            raise CopeditError(f"--set {key}={own[key]}: has no effect with {idle}; change that, or leave it out")


def _parsed(stage: Stage, item: str, known: Mapping[Stage, type[Settings]]) -> tuple[str, Any]:
    """Key and value of `key=value`."""
    readers: dict[str, Any] = {"int": int, "float": float, "str": str, "bool": _switch}
    kinds = {other: {f.name: str(f.type) for f in dataclasses.fields(kind)} for other, kind in known.items()}
    key, sign, text = item.partition("=")
    if not sign or not any(key in keys for keys in kinds.values()):
        raise CopeditError(f"--set {item}: expected key=value with a key among {', '.join(kinds[stage])}")
    if key not in kinds[stage]:
        raise CopeditError(
            f"--set {item}: {key} is a setting of the other stage; the {stage} has {', '.join(kinds[stage])}"
        )
    kind = kinds[stage][key]
    try:
        return key, readers[kind](text)
    except (ValueError, KeyError) as error:
        raise CopeditError(f"--set {item}: {text!r} is not a valid {'switch' if kind == 'bool' else kind}") from error


def _switch(text: str) -> bool:
    return {"true": True, "false": False}[text.lower()]
