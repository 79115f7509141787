"""The operators of CoPeDiT under one public name each.

`COPEDIT_KERNELS` = auto (default) or reference chooses the implementation. There are no Triton kernels yet, so both
mean the PyTorch reference, on every device; `triton` is refused rather than silently replaced.
"""

import os

from kernels.reference import (
    ada_norm,
    axis_attention,
    gated_residual_ada_norm,
    nearest_code,
    partial_ddim_step_,
    rotate,
    swiglu,
)

PROJECT = "copedit"  # copedit_rt checks it: another package on the index has this import name

__all__ = [
    "ada_norm",
    "axis_attention",
    "gated_residual_ada_norm",
    "implementation",
    "nearest_code",
    "partial_ddim_step_",
    "rotate",
    "swiglu",
]


def implementation() -> str:
    """Name of the implementation in use. Raises ValueError if COPEDIT_KERNELS asks for one that does not exist."""
    wanted = os.environ.get("COPEDIT_KERNELS", "auto")
    if wanted in ("auto", "reference"):
        return "reference"
    raise ValueError(
        f"COPEDIT_KERNELS={wanted!r}: this version has only 'auto' and 'reference'; unset it or use one of them"
    )


implementation()
