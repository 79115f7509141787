"""What float32 means on a GPU."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# cuBLAS's products, cuDNN's convolutions: PyTorch lets the latter run in TF32, with 10 bits of a mantissa for 23.
_CUDNN: Any = torch.backends.cudnn
_SETTINGS: tuple[Any, ...] = (torch.backends.cuda.matmul, _CUDNN.conv)
_LOCK = threading.Lock()
_inside = 0  # calls that are inside, whatever their thread
_before: list[str] = []


@contextmanager
def exact_float32() -> Iterator[None]:
    """Inside, float32 is float32 on every device: no TF32. Also a decorator.

    The settings are the process's: the first call that enters makes them, the last that leaves restores what was
    there, so that calls of several threads do not undo each other's.
    """
    global _inside
    with _LOCK:
        if not _inside:
            _before[:] = [setting.fp32_precision for setting in _SETTINGS]
            _set(["ieee"] * len(_SETTINGS))
        _inside += 1
    try:
        yield
    finally:
        with _LOCK:
            _inside -= 1
            if not _inside:
                _set(_before)


def _set(values: list[str]) -> None:
    for setting, value in zip(_SETTINGS, values, strict=True):
        setting.fp32_precision = value
