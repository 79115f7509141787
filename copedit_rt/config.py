"""What a model is: frozen dataclasses, their JSON form and the presets.

Numbers are those of the paper (Tables 13 to 15) with the corrections that reproduce its own parameter counts; see
`PRESETS`. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from copedit_rt.errors import CopeditError
from copedit_rt.task import Task

Triple = tuple[int, int, int]
Prompts = Literal["full", "none", "mask", "no-count", "no-position", "no-contrast"]
Injection = Literal["across", "within", "both"]
Backbone = Literal["mdit3d", "dit3d", "dit", "unet"]
Identity = Literal["sincos", "orthogonal"]
Solver = Literal["ddim", "dpm2m"]
# What a number may be, and each of several; far beyond all that is of use, but small enough to be computed with.
_RANGES: dict[str, tuple[float, float]] = {
    "version": (1, 1),
    "field_of_view": (10, 1000),
    "percentiles": (0, 100),
    "strides": (1, 2),
    "residual_units": (0, 16),
    "latent_channels": (1, 64),
    "codes": (1, 2**20),
    "prompt_stride": (1, 4),
    **dict.fromkeys(("channels", "residual_channels", "prompt_channels"), (1, 4096)),
    **dict.fromkeys(("prompt_dim", "contrast_dim", "width"), (1, 8192)),
    "heads": (1, 128),
    "blocks": (1, 256),
    "patch": (1, 16),
    "train_steps": (1, 100_000),
    **dict.fromkeys(("beta_start", "beta_end"), (1e-8, 0.999)),
    "start": (0.01, 1),
    "image": (1, 1024),
}
VOXELS, TOKENS = 2**26, 2**17  # of all elements of a study together; the paper's have 9.4 million and 2304


def _check_ranges(config: Any, where: str) -> None:
    """Raises CopeditError for a number of a configuration that is out of its range."""
    for name, (low, high) in _RANGES.items():
        for value in _numbers(getattr(config, name, None)):
            if not low <= value <= high:  # so is NaN
                raise CopeditError(f"{where}.{name}: {value} is out of range; it must be from {low:g} to {high:g}")


def _of_each(value: int | tuple[int, ...], levels: int) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,) * levels


def _numbers(value: Any) -> list[float]:
    """The numbers in a value."""
    if isinstance(value, tuple):
        return [number for part in value for number in _numbers(part)]
    return [] if value is None else [value]


@dataclass(frozen=True)
class Preprocessing:
    """Deterministic steps from a file to the model grid (Appendix B.1), shared by training and inference.

    field_of_view: crop in mm along RAS x, y, z, about a brain's head or the centre of a stack; None keeps all of that
    axis.
    percentiles: the intensities that become 0 and 1.
    detail: on the way back, what the grid cannot hold is carried over from the observed images. whole_range: there, the
    brightest voxels are lifted to where those of every training image are.
    """

    version: int = 1
    field_of_view: tuple[float, float, float | None] = (192.0, 192.0, 90.0)
    percentiles: tuple[float, float] = (0.5, 99.5)
    detail: bool = False
    whole_range: bool = False

    def __post_init__(self) -> None:
        _check_ranges(self, "preprocessing")
        low, high = self.percentiles
        if not low < high:
            raise CopeditError(f"preprocessing.percentiles: {low:g} is not below {high:g}")


@dataclass(frozen=True)
class TokenizerConfig:
    """CoPeVAE (Section 3.2, Tables 13 and 14).

    channels, strides: one entry a level; a stride of 2 is a convolution of kernel 4, a stride of 1 of kernel 3.
    residual_units, residual_channels: of every level, or one entry each.
    prompt_channels: the two convolutions of a prompt encoder, prompt_stride: of the first one (1 in the paper; its cost
    falls with the third power). quantise: latents to be decoded become their nearest
    codes first, as in the paper; off, they are decoded as they are.
    """

    channels: tuple[int, ...] = (256, 384, 512)
    strides: tuple[Triple, ...] = ((2, 2, 2), (2, 2, 2), (2, 2, 2))
    residual_units: int | tuple[int, ...] = 3
    residual_channels: int | tuple[int, ...] = 256
    latent_channels: int = 8
    codes: int = 8192
    prompt_channels: tuple[int, int] = (128, 256)
    prompt_stride: int = 1
    prompt_dim: int = 512
    contrast_dim: int = 128
    quantise: bool = True

    def __post_init__(self) -> None:
        _check_ranges(self, "tokenizer")
        if not 1 <= len(self.channels) <= 8:
            raise CopeditError(f"tokenizer.channels: {len(self.channels)} levels; 1 to 8 are supported")
        if len(self.channels) != len(self.strides):
            raise CopeditError(
                f"tokenizer: {len(self.channels)} channels but {len(self.strides)} strides; give one each"
            )
        for name in ("residual_units", "residual_channels"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != len(self.channels):
                raise CopeditError(
                    f"tokenizer.{name}: {len(value)} for {len(self.channels)} levels; give one number, or one a level"
                )

    @property
    def units(self) -> tuple[int, ...]:
        """Residual units of each level."""
        return _of_each(self.residual_units, len(self.channels))

    @property
    def hidden(self) -> tuple[int, ...]:
        """Channels within the residual units of each level."""
        return _of_each(self.residual_channels, len(self.channels))

    @property
    def compression(self) -> Triple:
        """Voxels per latent position along each axis."""
        return typing.cast(Triple, tuple(math.prod(s[a] for s in self.strides) for a in range(3)))


@dataclass(frozen=True)
class DenoiserConfig:
    """MDiT3D (Section 3.3, Table 15) and its ablations (Tables 4, 7 and 8).

    prompts: which of the prompts condition the network; "mask" replaces them by a one-hot mask code.
    injection: the blocks that receive them. Only "mdit3d" has both kinds; the other backbones take them everywhere.
    prior: a fill of what is missing (`prior.Prior`) is encoded, given to the network as a second latent of each missing
    element, and corrected by it; off, as in the paper, the network starts from noise alone.
    identity: what tells one element from another, sine and cosine of its index, as positions are told in the paper, of
    which those of neighbours are nearly parallel, or orthogonal directions of the same length.
    """

    width: int = 768
    heads: int = 12
    blocks: int = 16
    patch: Triple = (2, 2, 2)
    backbone: Backbone = "mdit3d"
    prompts: Prompts = "full"
    injection: Injection = "across"
    prior: bool = False
    identity: Identity = "sincos"

    def __post_init__(self) -> None:
        _check_ranges(self, "denoiser")
        if self.width % self.heads or (self.width // self.heads) % 8:
            raise CopeditError(
                f"denoiser: width {self.width} over {self.heads} heads must give a head dimension divisible by 8"
            )
        kinds = {"backbone": Backbone, "prompts": Prompts, "injection": Injection, "identity": Identity}
        for name, kind in kinds.items():
            if getattr(self, name) not in typing.get_args(kind):
                known = ", ".join(typing.get_args(kind))
                raise CopeditError(f"denoiser: {name} {getattr(self, name)!r} is unknown; choose one of {known}")

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def hidden(self) -> int:
        """SwiGLU width: 8/3 of the model's, as that keeps the parameters of a 4x MLP."""
        return self.width * 8 // 3


@dataclass(frozen=True)
class DiffusionConfig:
    """Scaled-linear schedule (Appendix B.3) and the sampler's defaults; solvers: `schedule.solver_tables`.

    start: the share of the schedule at which sampling starts. 1, the paper's, is noise alone. Below 1 it is the fill,
    noised as far as that timestep is (as in SDEdit, Meng et al. 2022); only for models with a prior. steps: 0 is that
    fill as it is, of models with a prior whose denoiser gains nothing over it.
    """

    train_steps: int = 500
    beta_start: float = 0.0015
    beta_end: float = 0.0195
    steps: int = 200
    solver: Solver = "ddim"
    start: float = 1.0

    def __post_init__(self) -> None:
        _check_ranges(self, "diffusion")
        if self.beta_start > self.beta_end:
            raise CopeditError(f"diffusion.beta_start: {self.beta_start:g} is above beta_end, {self.beta_end:g}")
        if not 0 <= self.steps <= self.most_steps:
            where = "train_steps" if self.start == 1 else "start x train_steps"
            raise CopeditError(f"diffusion.steps: {self.steps} must be from 0 to {where}, {self.most_steps}")

    @property
    def most_steps(self) -> int:
        """As many as the schedule has timesteps from where sampling starts."""
        return max(round(self.start * self.train_steps), 1)


@dataclass(frozen=True)
class ModelConfig:
    """A whole model; `config.json` of a model folder.

    elements: names of the m elements, index = identity. image: (H, W, D) voxels of one element on the model grid.
    """

    name: str
    task: Task
    elements: tuple[str, ...]
    image: Triple
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    preprocessing: Preprocessing = field(default_factory=Preprocessing)

    def __post_init__(self) -> None:
        object.__setattr__(self, "task", Task(self.task))
        if not 2 <= len(self.elements) <= 8:
            raise CopeditError(f"model {self.name}: {len(self.elements)} elements; 2 to 8 are supported")
        if not re.fullmatch(r"[\w. +-]{1,64}", self.name):
            raise CopeditError(f"model {self.name[:64]!r}: its name must be of 1 to 64 letters, digits, and ._+-")
        if odd := [name for name in self.elements if not re.fullmatch(r"[a-z0-9]{1,16}", name)]:
            raise CopeditError(f"model {self.name}: element {odd[0][:64]!r} is no name of 1 to 16 letters and digits")
        if len(set(self.elements)) < len(self.elements):
            raise CopeditError(f"model {self.name}: an element is named twice: {', '.join(self.elements)}")
        _check_ranges(self, f"model {self.name}")
        if self.diffusion.start < 1 and not self.denoiser.prior:
            raise CopeditError(
                f"model {self.name}: diffusion.start is {self.diffusion.start:g}, and without denoiser.prior there is "
                f"nothing to start from but noise; set it to 1"
            )
        if not self.diffusion.steps and not self.denoiser.prior:
            raise CopeditError(
                f"model {self.name}: diffusion.steps is 0, and without denoiser.prior there is no fill that it could "
                f"give; set it to 1 or more"
            )
        if any(n % c for n, c in zip(self.image, self.tokenizer.compression, strict=True)):
            raise CopeditError(f"model {self.name}: image {self.image} does not divide by {self.tokenizer.compression}")
        if any(n % p for n, p in zip(self.latent, self.denoiser.patch, strict=True)):
            raise CopeditError(
                f"model {self.name}: latent {self.latent} does not divide by patch {self.denoiser.patch}"
            )
        m = len(self.elements)
        tokens = m * math.prod(n // p for n, p in zip(self.latent, self.denoiser.patch, strict=True))
        for what, count, most in (("voxels", m * math.prod(self.image), VOXELS), ("tokens", tokens, TOKENS)):
            if count > most:
                raise CopeditError(f"model {self.name}: {count} {what} a study; at most {most} are supported")

    @property
    def latent(self) -> Triple:
        """(h, w, d) of one element's latent."""
        return typing.cast(Triple, tuple(n // c for n, c in zip(self.image, self.tokenizer.compression, strict=True)))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelConfig:
        """Raises CopeditError for a missing, unknown or ill-typed field."""
        return _build(cls, data, "config")

    def prior_alone(self) -> ModelConfig:
        """The same model, which fills by its prior alone unless it is asked for sampling steps."""
        return replace(self, diffusion=replace(self.diffusion, steps=0))

    @classmethod
    def preset(cls, name: str) -> ModelConfig:
        if name not in PRESETS:
            raise CopeditError(f"preset {name!r} is unknown; choose one of {', '.join(PRESETS)}")
        return PRESETS[name]


def _build(cls: Any, data: Any, where: str) -> Any:
    if not isinstance(data, Mapping):
        raise CopeditError(f"{where}: expected an object, found {_short(data)}")
    hints = typing.get_type_hints(cls)
    if unknown := sorted(set(data) - set(hints)):
        raise CopeditError(f"{where}: unknown field {_short(unknown[0])}; another version or a hand wrote it")
    try:
        return cls(**{k: _value(hints[k], v, f"{where}.{k}") for k, v in data.items()})
    except TypeError as error:
        raise CopeditError(f"{where}: {str(error).replace('__init__() ', '')}") from error


def _value(kind: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, where)
    if origin is tuple and isinstance(value, list | tuple):
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(kinds) == len(value):
            return tuple(_value(k, v, where) for k, v in zip(kinds, value, strict=True))
    elif origin is Literal or kind is Task:
        if value in (args or list(Task)):
            return value
    elif origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        kinds = [a for a in args if a is not type(None)]
        fitting = [a for a in kinds if (typing.get_origin(a) is tuple) == isinstance(value, list | tuple)]
        return _value((fitting or kinds)[0], value, where)
    elif kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif kind in (int, str, bool) and type(value) is kind:  # True is an int, too
        return value
    raise CopeditError(f"{where}: {_short(value)} is not a valid {getattr(kind, '__name__', kind)}")


def _short(value: Any) -> str:
    """A value as text of a sentence, however large it is."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


_BRATS = ("t1", "t1ce", "t2", "flair")
_SLABS = ("slab0", "slab1", "slab2", "slab3")
_DEMO_TOKENIZER = TokenizerConfig(
    channels=(24,),
    strides=((2, 2, 1),),
    residual_units=1,
    residual_channels=24,
    latent_channels=3,
    codes=1024,
    prompt_channels=(8, 64),
    prompt_dim=128,
    contrast_dim=64,
    quantise=False,
)

# brain-lean: brain-brats with a tokenizer whose first level is an entry alone, 16 channels for the eight wavelets of
# 2 x 2 x 2 voxels with both signs: 4.9 TFLOP a study of one step in place of 33.5 (docs/performance.md).
# brain-brats and brain-ixi: the paper's B models. cardiac: its C models at width 384 with 6 heads, which is what its
# own 33.0 M parameters and 104 GFLOP fit (Table 15 prints 576 and 12). The field of view of brain-ixi is 192 x 192 x 80
# voxels at IXI's 0.9375 x 0.9375 x 1.25 mm. demo-*: small enough for two CPU cores.
# What one sampling step gives is an expectation and lies between codes: decoded as it is, it is 0.2 dB better.
# Of simulated brains, eight principal components of blocks of 4 x 4 x 4 voxels (8 x 8 x 20 mm) keep 25 dB, four of
# 4 x 4 x 1 keep 27, three of 2 x 2 x 1 keep 34; 192 (the width) of a token of 8 x 8 x 4 voxels keep 35, of 8 x 8 x 8
# only 29.
PRESETS: dict[str, ModelConfig] = {
    config.name: config
    for config in (
        ModelConfig("brain-brats", Task.BRAIN, _BRATS, (192, 192, 64)),
        ModelConfig(
            "brain-ixi",
            Task.BRAIN,
            ("t1", "t2", "pd"),
            (192, 192, 64),
            preprocessing=Preprocessing(field_of_view=(180.0, 180.0, 100.0)),
        ),
        ModelConfig(
            "brain-lean",
            Task.BRAIN,
            _BRATS,
            (192, 192, 64),
            TokenizerConfig(channels=(16, 256, 512), residual_units=(0, 3, 3)),
        ),
        ModelConfig(
            "cardiac",
            Task.HEART,
            _SLABS,
            (192, 192, 8),
            TokenizerConfig(channels=(32, 64, 128)),
            DenoiserConfig(width=384, heads=6, blocks=12, patch=(1, 1, 1)),
            DiffusionConfig(steps=250),
            Preprocessing(field_of_view=(288.0, 288.0, None)),
        ),
        ModelConfig(
            "demo-brain",
            Task.BRAIN,
            _BRATS,
            (96, 96, 32),
            _DEMO_TOKENIZER,
            DenoiserConfig(width=192, heads=3, blocks=8, patch=(4, 4, 4)),
            DiffusionConfig(steps=1),
            Preprocessing(field_of_view=(192.0, 192.0, 160.0)),
        ),
        ModelConfig(
            "brain-2mm",
            Task.BRAIN,
            _BRATS,
            (96, 112, 64),
            replace(_DEMO_TOKENIZER, channels=(8,), residual_units=0, prompt_stride=2),
            DenoiserConfig(width=192, heads=3, blocks=8, patch=(4, 4, 4), prior=True),
            DiffusionConfig(steps=1),
            Preprocessing(field_of_view=(192.0, 224.0, 192.0), detail=True, whole_range=True),
        ),
        ModelConfig(
            "demo-cardiac",
            Task.HEART,
            _SLABS,
            (96, 96, 4),
            _DEMO_TOKENIZER,
            DenoiserConfig(width=192, heads=3, blocks=6, patch=(4, 4, 4)),
            DiffusionConfig(steps=1),
            Preprocessing(field_of_view=(288.0, 288.0, None)),
        ),
        ModelConfig(
            "heart-3mm",
            Task.HEART,
            _SLABS,
            (96, 96, 4),
            _DEMO_TOKENIZER,
            DenoiserConfig(width=144, heads=3, blocks=4, patch=(4, 4, 4), prior=True),
            DiffusionConfig(steps=1),
            Preprocessing(field_of_view=(288.0, 288.0, None)),
        ),
    )
}
