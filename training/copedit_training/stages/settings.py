"""What a training run is told: one TOML per preset, any field of it set on the command line."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from copedit_rt.errors import CopeditError

Stage = Literal["tokenizer", "denoiser"]
_PRESETS = Path(__file__).parents[1] / "presets"


@dataclass(frozen=True)
class Settings:
    """Hyperparameters of one stage.

    steps, batch_size (subjects), lr (peak of a linear warm-up and cosine decay), warmup (steps), seed.
    accumulate: micro-batches of batch_size subjects in a step, shared by the processes of torchrun.
    subjects: simulated subjects to train on. dtype: autocast type, "float32" or "bfloat16".
    clip: gradient norm. beta2, weight_decay: of the optimizer. device: auto, cpu or cuda[:N].
    crop: train on random crops of so many voxels in the plane, 0 for whole images. In the tokenizer the pretext tasks
    always read whole images, every `pretext_every` steps, with their weight raised accordingly. In the denoiser a batch
    of crops holds more subjects, patterns and timesteps for its tokens; the last `whole_steps` steps are on whole
    images, as many at a time as have the tokens of a batch of crops.
    augment: `data.Augmentation` of every image; brains are mirrored with or without it. In the denoiser it costs the
    encoding of each batch, as latents are then not computed once and kept.
    draws (tokenizer): missing patterns drawn per subject for the pretext tasks.
    quantise_from (tokenizer): the first step with quantisation. Before it stage I is a plain autoencoder, so that the
    codebook starts from latents that already mean something.
    prompt_steps (tokenizer): so many of the steps, at the end and with a schedule of their own (peak `prompt_lr`, 0 for
    lr), train the prompt encoders and heads alone, `prompt_batch` subjects at a time, on latents that no longer move.
    readout_steps (tokenizer): after them, steps of the linear layers and heads alone on pooled features.
    adversarial_from (tokenizer): the first step with the adversarial term, -1 for none. perceptual (tokenizer): file
    with the weights of its network (`losses.Perceptual`), empty for no such term.
    checkpointing: less memory for more time, see `memory.checkpoint_activations`.
    optimizer (denoiser): "adam", or "muon" (Jordan et al. 2024) for all matrices but those of the conditioning and Adam
    for the rest. muon_lr: its peak, 0 for lr.
    whiten (denoiser): above 0, the input layer starts as a rotation of the principal components of a token's values,
    each scaled by its variance to the power -whiten; 0.5 makes all equally large.
    observed_weight (denoiser): of an observed element in the loss; 1 is equation 5. What is observed is never replaced,
    and a narrow network that need not copy it has room for what is missing.
    image_weight (denoiser): above 0, the logarithm of the decoded images' mean squared error joins the loss with this
    weight, and the decoder learns along: what is synthesised is smoother than what the encoder gives.
    last_timestep (denoiser): share of the samples that are drawn at the last timestep, where sampling begins; above 0,
    that timestep is pure noise in training, too.
    compile (denoiser): train through torch.compile; needs a C++ compiler on a CPU.
    ema: decay of the averaged weights (denoiser). tokenizer: model folder of stage I (denoiser).
    export: type of the finished denoiser's weights on disk, "float32" or "float16".
    checkpoint_every, keep: how often, and how many checkpoints stay.
    validate_every: steps between measurements on the first `validate_subjects` held-out subjects, 0 for none.
    """

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
    pretext_every: int = 1
    draws: int = 1
    quantise_from: int = 0
    prompt_steps: int = 0
    prompt_batch: int = 4
    prompt_lr: float = 0.0
    readout_steps: int = 0
    adversarial_from: int = -1
    perceptual: str = ""
    checkpointing: bool = False
    whole_steps: int = 0
    whiten: float = 0.0
    last_timestep: float = 0.0
    observed_weight: float = 1.0
    image_weight: float = 0.0
    device: str = "auto"
    optimizer: str = "adam"
    muon_lr: float = 0.0
    compile: bool = False
    ema: float = 0.9999
    tokenizer: str = ""
    export: str = "float32"
    checkpoint_every: int = 250
    keep: int = 2
    validate_every: int = 0
    validate_subjects: int = 4

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "accumulate", "subjects", "pretext_every", "draws", "prompt_batch")
        for name in (*counts, "checkpoint_every", "keep", "validate_subjects"):
            if getattr(self, name) < 1:
                raise CopeditError(f"{name} = {getattr(self, name)}: must be at least 1")
        if not 0 <= self.prompt_steps < self.steps:
            raise CopeditError(f"prompt_steps = {self.prompt_steps}: must be at least 0 and below steps = {self.steps}")
        if self.whole_steps < 0:
            raise CopeditError(f"whole_steps = {self.whole_steps}: must be at least 0")
        for name in ("whiten", "last_timestep", "observed_weight", "image_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise CopeditError(f"{name} = {getattr(self, name)}: must be from 0 to 1")
        if self.optimizer not in ("adam", "muon"):
            raise CopeditError(f"optimizer = {self.optimizer!r}: must be adam or muon")
        if self.export not in ("float32", "float16"):
            raise CopeditError(f"export = {self.export!r}: must be float32 or float16")
        if self.dtype not in ("float32", "bfloat16"):
            raise CopeditError(f"dtype = {self.dtype!r}: must be float32 or bfloat16")


def load_settings(stage: Stage, preset: str, overrides: Sequence[str] = ()) -> Settings:
    """Settings of a preset with `key=value` overrides. Raises CopeditError for an unknown preset, key or value."""
    path = _PRESETS / f"{preset}.toml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in _PRESETS.glob("*.toml")))
        raise CopeditError(f"preset {preset!r} has no training settings; choose one of {known}")
    values: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))[stage]
    readers: dict[str, Any] = {"int": int, "float": float, "str": str, "bool": _switch}
    kinds = {f.name: readers[str(f.type)] for f in dataclasses.fields(Settings)}
    for item in overrides:
        key, sign, text = item.partition("=")
        if not sign or key not in kinds:
            raise CopeditError(f"--set {item}: expected key=value with a key among {', '.join(kinds)}")
        try:
            values[key] = kinds[key](text)
        except (ValueError, KeyError) as error:
            kind = kinds[key].__name__.removeprefix("_")
            raise CopeditError(f"--set {item}: {text!r} is not a valid {kind}") from error
    return Settings(**values)


def _switch(text: str) -> bool:
    return {"true": True, "false": False}[text.lower()]
