"""A model is a folder: `config.json`, `tokenizer.safetensors`, `denoiser.safetensors`. Nothing is pickled.

What handles tensors loads torch when it is called: engines without torch find and read a folder with the rest.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from copedit_rt.config import ModelConfig
from copedit_rt.errors import CopeditError
from copedit_rt.files import is_file, read_json, write_atomically
from copedit_rt.images.names import MODALITIES

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from copedit_rt.networks.denoiser import MDiT3D, UNet
    from copedit_rt.networks.tokenizer import CoPeVAE
    from copedit_rt.prior import Prior
    from copedit_rt.prior_heart import SlicePrior

M = TypeVar("M", bound="nn.Module")
# How files of torch.save and of pickle's protocols begin.
_PICKLES = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
BUILT_IN = Path(__file__).parent / "weights"
EXPORTED = "onnx"  # the folder of its ONNX files in a model's own, where a wheel brings them
CONFIG, TOKENIZER, DENOISER = "config.json", "tokenizer.safetensors", "denoiser.safetensors"


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of those of a model folder's files that are there, under their names without an ending."""
    return {Path(name).stem: digest(folder / name) for name in names if (folder / name).is_file()}


def list_models() -> list[str]:
    """Names of the models inside the package; those that have seen nothing but phantoms come last."""
    names = (p.parent.name for p in BUILT_IN.glob(f"*/{CONFIG}"))
    return sorted(names, key=lambda name: (name.startswith("demo-"), name))


def locate(model: str | Path, exported: bool = False) -> Path:
    """Folder of a built-in name or a path; exported: of its ONNX files, where the model has such a folder inside.

    Raises CopeditError for what is neither a name nor a path.
    """
    for folder in (BUILT_IN / str(model), Path(model)):
        if is_file(folder / CONFIG):
            return folder / EXPORTED if exported and is_file(folder / EXPORTED / CONFIG) else folder
    raise CopeditError(
        f"model {str(model)!r}: no folder with a {CONFIG} and no built-in name; built in are {', '.join(list_models())}"
    )


def read_config(folder: Path) -> ModelConfig:
    """Raises CopeditError for a file that is missing, not JSON, or not a model's configuration."""
    path = folder / CONFIG
    try:
        data = read_json(path)
    except OSError as error:
        raise CopeditError(f"{path}: cannot be read ({error.strerror}); a model folder holds {CONFIG}") from error
    except ValueError as error:
        raise CopeditError(f"{path}: not valid JSON ({error}); copy the model again") from error
    config = ModelConfig.from_dict(data)
    if not config.task.joint and (unknown := [name for name in config.elements if name not in MODALITIES]):
        raise CopeditError(f"{path}: unknown element {unknown[0]!r}; known modalities are {', '.join(MODALITIES)}")
    return config


def write_config(folder: Path, config: ModelConfig) -> None:
    write_atomically(folder / CONFIG, (json.dumps(config.to_dict(), indent=2) + "\n").encode())


def read_tensors(path: Path) -> tuple[dict[str, Tensor], str]:
    """Tensors of a safetensors file and its SHA-256. Raises CopeditError for anything else, a pickle included."""
    from safetensors import SafetensorError
    from safetensors.torch import load as load_tensors

    try:
        data = path.read_bytes()
    except OSError as error:
        raise CopeditError(f"{path}: cannot be read ({error.strerror}); the model folder is incomplete") from error
    try:
        tensors = load_tensors(data)
    except SafetensorError as error:
        if data[:2] in _PICKLES:  # only now: the length that a sound file begins with may read like one
            text = f"{path}: this is a pickle, which can run code; convert the weights to safetensors"
            raise CopeditError(text) from error
        raise CopeditError(f"{path}: not a safetensors file ({error}); copy the model again") from error
    except (KeyError, ValueError, TypeError, ArithmeticError, RuntimeError) as error:
        raise CopeditError(f"{path}: holds tensors that torch does not know ({error}); copy the model again") from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not _finite(tensor):
            raise CopeditError(f"{path}: tensor {name} holds NaN or infinity; copy the model again, or train it again")
    return tensors, hashlib.sha256(data).hexdigest()


def _finite(tensor: Tensor) -> bool:
    """In one pass that takes no memory: NaN is both the least and the greatest."""
    low, high = tensor.aminmax() if tensor.numel() else (0.0, 0.0)
    return math.isfinite(low) and math.isfinite(high)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """Write tensors as safetensors, the floating-point ones as dtype where one is given."""
    from safetensors.torch import save as save_tensors

    plain = {
        name: (t.to(dtype) if dtype and t.is_floating_point() else t).detach().cpu().contiguous()
        for name, t in tensors.items()
    }
    write_atomically(path, save_tensors(plain))


def fill(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    where: str | Path,
    assign: bool = False,
    owner: str = f"this {CONFIG}",
) -> None:
    """Load tensors into a module, whatever floating-point type they were stored in; assign: as its own, uncopied;
    owner: what the weights have to belong to, for the error.

    Raises CopeditError naming the first tensor that is missing, unknown or of a wrong shape.
    """
    expected = module.state_dict()
    _check(expected, tensors, where, owner)
    converted = {name: tensor.to(expected[name].dtype) for name, tensor in tensors.items()}
    module.load_state_dict(converted, assign=assign)


def _undrawn(build: Callable[[], M], where: Path) -> M:
    """A module whose weights are loaded next. Memory that is not written to takes none, so that a configuration of
    another size than its weights costs nothing until `fill` refuses it."""
    from copedit_rt.networks.undrawn import Undrawn

    try:
        with Undrawn():
            return build()
    except RuntimeError as error:  # torch's allocator
        raise CopeditError(
            f"{where}: the {CONFIG} beside it asks for more memory than there is; copy the model again"
        ) from error


def _check(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: str | Path, owner: str) -> None:
    if missing := sorted(set(expected) - set(tensors)):
        raise CopeditError(f"{where}: tensor {missing[0]} is missing; the weights do not belong to {owner}")
    if unknown := sorted(set(tensors) - set(expected)):
        raise CopeditError(f"{where}: tensor {unknown[0]} is unknown; the weights do not belong to {owner}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise CopeditError(
                f"{where}: tensor {name} has shape {tuple(tensor.shape)}, expected {tuple(expected[name].shape)}; "
                f"the weights do not belong to {owner}"
            )


def load_tokenizer(folder: Path) -> tuple[ModelConfig, CoPeVAE, str]:
    """Configuration, tokenizer (float32, CPU, evaluation mode) and the SHA-256 of its weights."""
    from copedit_rt.networks.tokenizer import CoPeVAE

    config = read_config(folder)
    tensors, digest = read_tensors(folder / TOKENIZER)
    tokenizer = _undrawn(lambda: CoPeVAE(config.tokenizer, len(config.elements)), folder / TOKENIZER)
    fill(tokenizer, tensors, folder / TOKENIZER, assign=True)
    return config, tokenizer.eval(), digest


def load_denoiser(folder: Path) -> tuple[ModelConfig, MDiT3D | UNet, str]:
    """Configuration, denoiser (float32, CPU, evaluation mode) and the SHA-256 of its weights."""
    from copedit_rt.networks.denoiser import build_denoiser

    config = read_config(folder)
    tensors, digest = read_tensors(folder / DENOISER)
    denoiser = _undrawn(lambda: build_denoiser(config), folder / DENOISER)
    fill(denoiser, tensors, folder / DENOISER, assign=True)
    return config, denoiser.eval(), digest


def load_prior(folder: Path, config: ModelConfig) -> Prior | SlicePrior | None:
    """The prior of a model that has one."""
    from copedit_rt.prior import Prior
    from copedit_rt.prior_heart import SlicePrior

    kind: type[Prior] | type[SlicePrior] = SlicePrior if config.task.joint else Prior
    return kind.load(folder, config) if config.denoiser.prior else None


def save(
    folder: Path,
    config: ModelConfig,
    tokenizer: CoPeVAE | None = None,
    denoiser: nn.Module | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a model folder, or a part of it; weights as dtype (None: as they are)."""
    write_config(folder, config)
    if tokenizer is not None:
        write_tensors(folder / TOKENIZER, tokenizer.state_dict(), dtype)
    if denoiser is not None:
        write_tensors(folder / DENOISER, denoiser.state_dict(), dtype)
