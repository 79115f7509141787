"""What float32 means on a GPU, and how cuDNN chooses its convolutions."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_CUDNN: Any = torch.backends.cudnn


class _Held:
    """Settings of the process, (owner, name, value) each: the first call that enters makes them, the last that leaves
    restores what was there, so that calls of several threads do not undo each other's."""

    def __init__(self, *settings: tuple[Any, str, Any]):
        self.settings = settings
        self.lock = threading.Lock()
        self.inside = 0  # calls that are inside, whatever their thread
        self.before: list[Any] = []

    @contextmanager
    def hold(self) -> Iterator[None]:
        with self.lock:
            if not self.inside:
                self.before = [getattr(owner, name) for owner, name, _ in self.settings]
                self._set([value for *_, value in self.settings])
            self.inside += 1
        try:
            yield
        finally:
            with self.lock:
                self.inside -= 1
                if not self.inside:
                    self._set(self.before)

    def _set(self, values: list[Any]) -> None:
        for (owner, name, _), value in zip(self.settings, values, strict=True):
            setattr(owner, name, value)


# cuBLAS's products, cuDNN's convolutions: PyTorch lets the latter run in TF32, with 10 bits of a mantissa for 23.
_EXACT = _Held((torch.backends.cuda.matmul, "fp32_precision", "ieee"), (_CUDNN.conv, "fp32_precision", "ieee"))
_TRIED = _Held((_CUDNN, "benchmark", True))


@contextmanager
def exact_float32() -> Iterator[None]:
    """Inside, float32 is float32 on every device: no TF32. Also a decorator."""
    with _EXACT.hold():
        yield


@contextmanager
def tried_convolutions() -> Iterator[None]:
    """Inside, cuDNN tries its convolutions for every new size and keeps the fastest, where it would guess one.

    For sizes that come again; equal calls of two processes may then differ by rounding. Also a decorator.
    """
    with _TRIED.hold():
        yield
