"""Where to compute, and in which number format. torch is loaded only when asked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from copedit_rt.errors import CopeditError

if TYPE_CHECKING:
    import torch


def choose_device(name: str) -> torch.device:
    """auto (CUDA where there is one), cpu, cuda or cuda:N. Raises CopeditError for anything else or a missing GPU."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, colon, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (colon and (kind == "cpu" or not index.isdecimal())):
        raise CopeditError(f"device {name!r} is unknown; use auto, cpu, cuda or cuda:N")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise CopeditError(
            f"device {name!r} is not there ({torch.cuda.device_count()} CUDA devices found); use auto or cpu"
        )
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """float32, bfloat16 or, on CUDA only, float16 of a name; auto is float32 on a CPU, and on CUDA bfloat16,
    or float16 where the GPU has no bfloat16. Raises CopeditError for anything else."""
    import torch

    known = {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }
    if name == "auto":
        if device.type == "cpu":
            return torch.float32
        with torch.cuda.device(device):
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if name not in known:
        raise CopeditError(f"dtype {name!r} is unknown; use auto, {', '.join(known)}")
    if name == "float16" and device.type == "cpu":
        raise CopeditError(f"dtype {name!r} is for GPUs; on a CPU use float32 or bfloat16")
    return known[name]
