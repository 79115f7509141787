"""What a training run is told: one TOML per preset, any field of a stage set on the command line."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from copedit_rt.errors import CopeditError

Stage = Literal["tokenizer", "denoiser"]
_PRESETS = Path(__file__).parents[1] / "presets"
_MOST = 10_000_000  # steps, or subjects
_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("steps", "subjects", "pretext_every", "checkpoint_every"), (1, _MOST)),
    **dict.fromkeys(("batch_size", "accumulate", "draws", "prompt_batch", "keep", "validate_subjects"), (1, 65_536)),
    **dict.fromkeys(("warmup", "prompt_steps", "quantise_from", "readout_steps", "whole_steps"), (0, _MOST)),
    "validate_every": (0, _MOST),
    "adversarial_from": (-1, _MOST),
    "seed": (0, 2**63 - 1),
    **dict.fromkeys(("crop", "prompt_crop"), (0, 4096)),
    "lr": (1e-12, 10),
    **dict.fromkeys(("prompt_lr", "muon_lr"), (0, 10)),
    "clip": (1e-6, 1e6),
    **dict.fromkeys(("beta2", "ema"), (0, 0.999_999)),
    **dict.fromkeys(("weight_decay", "whiten", "last_timestep", "observed_weight", "image_weight"), (0, 1)),
    "patients_share": (0, 0.9),
    **dict.fromkeys(("count_weight", "position_weight", "contrast_weight"), (0, 100)),
}
# Of `--quick`: the most that each is.
_QUICK: dict[Stage, dict[str, Any]] = {
    "tokenizer": {
        "prompt_steps": 1,
        "quantise_from": 1,
        "adversarial_from": 2,
        "readout_steps": 20,
        "pretext_every": 2,
    },
    "denoiser": {"whole_steps": 1, "ema": 0.5, "compile": False},
}
_QUICK_BOTH = {"steps": 4, "warmup": 1, "batch_size": 2, "subjects": 4, "checkpoint_every": 2, "validate_every": 0}
# What has no effect while another setting has a value.
_IDLE: dict[str, tuple[str, Any]] = {
    "prompt_lr": ("prompt_steps", 0),
    "prompt_batch": ("prompt_steps", 0),
    "validate_subjects": ("validate_every", 0),
    "whole_steps": ("crop", 0),
    "muon_lr": ("optimizer", "adam"),
}
_CHOICES: dict[str, tuple[str, ...]] = {
    "dtype": ("float32", "bfloat16", "float16"),
    "position_loss": ("bce", "cross-entropy"),
    "optimizer": ("adam", "muon"),
    "export": ("float32", "float16"),
}


@dataclass(frozen=True)
class Settings:
    """Hyperparameters of either stage.

    steps, batch_size (subjects), lr (peak of a linear warm-up and cosine decay), warmup (steps), seed.
    accumulate: micro-batches of batch_size subjects in a step, shared by the processes of torchrun.
    subjects: simulated subjects to train on. dtype: autocast type, "float32", "bfloat16", or on a GPU "float16", whose
    losses are scaled so that small gradients do not vanish (Micikevicius et al. 2018).
    clip: gradient norm. beta2, weight_decay: of the optimizer. device: auto, cpu or cuda[:N].
    crop: train on random crops of so many voxels in the plane, 0 for whole images; the stages say how.
    augment: `augmentation.Augmentation` of every image; brains are mirrored with or without it. In the denoiser it
    costs the encoding of each batch, as latents are then not computed once and kept.
    checkpointing: less memory for more time, see `task.checkpoint_activations`.
    checkpoint_every, keep: how often, and how many checkpoints stay.
    validate_every: steps between measurements on the first `validate_subjects` held-out subjects, 0 for none.

    Raises CopeditError for a value out of its range.
    """

    stage: ClassVar[Stage]

    steps: int
    batch_size: int
    lr: float
    warmup: int = 100
    seed: int = 0
    accumulate: int = 1
    subjects: int = 256
    dtype: str = "bfloat16"
    clip: float = 1.0
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
            low, high = _RANGES.get(name, (value, value))
            if not low <= value <= high:  # neither is NaN
                raise CopeditError(f"{name} = {value}: must be from {low} to {high}")
            if value not in (choices := _CHOICES.get(name, (value,))):
                raise CopeditError(f"{name} = {value!r}: must be {' or '.join(choices)}")


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
    patients: folder of real brain studies, complete or not, that are mixed into the read-out and into the fit of the
    prior with `patients_share` of the draws (`patients.varied`); empty for none.
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
    patients: str = ""
    patients_share: float = 0.15
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


_KINDS: dict[Stage, type[Settings]] = {"tokenizer": TokenizerSettings, "denoiser": DenoiserSettings}


def load_settings(stage: Stage, preset: str, overrides: Sequence[str] = (), quick: bool = False) -> Any:
    """`TokenizerSettings` or `DenoiserSettings` of a preset with `key=value` overrides.

    quick: a few steps on a few subjects, to see that everything works; overrides count all the same.

    Raises CopeditError for an unknown preset, key or value, and for a key of the other stage.
    """
    paths = {path.stem: path for path in sorted(_PRESETS.glob("*.toml"))}
    if preset not in paths:
        raise CopeditError(f"preset {preset!r} has no training settings; choose one of {', '.join(paths)}")
    values: dict[str, Any] = tomllib.loads(paths[preset].read_text(encoding="utf-8"))[stage]
    if quick:
        values |= {key: min(values.get(key, most), most) for key, most in {**_QUICK_BOTH, **_QUICK[stage]}.items()}
    own = dict(_parsed(stage, item) for item in overrides)
    settings = _KINDS[stage](**values | own)
    _check_idle(settings, own)
    return settings


def _check_idle(settings: Settings, own: Mapping[str, Any]) -> None:
    """Raises CopeditError for an override that would change nothing, as another setting is what it is."""
    defaults = {field.name: field.default for field in dataclasses.fields(settings)}
    for key, (other, without) in _IDLE.items():
        if key in own and own[key] != defaults[key] and getattr(settings, other) == without:
            raise CopeditError(f"--set {key}={own[key]}: has no effect with {other} = {without}; set both, or neither")


def _parsed(stage: Stage, item: str) -> tuple[str, Any]:
    """Key and value of `key=value`."""
    readers: dict[str, Any] = {"int": int, "float": float, "str": str, "bool": _switch}
    kinds = {other: {f.name: str(f.type) for f in dataclasses.fields(kind)} for other, kind in _KINDS.items()}
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
