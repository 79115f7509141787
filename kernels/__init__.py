"""The operators of CoPeDiT under one public name each.

`COPEDIT_KERNELS` = auto (default), reference or triton chooses the implementation: see `kernels.dispatch`.
"""

from kernels.dispatch import decompositions, implementation
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
    "decompositions",
    "gated_residual_ada_norm",
    "implementation",
    "nearest_code",
    "partial_ddim_step_",
    "rotate",
    "swiglu",
]

implementation()  # a wrong setting is named at once
