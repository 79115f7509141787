"""The operators of CoPeDiT under one public name each.

`COPEDIT_KERNELS` = auto (default), reference or triton chooses the implementation: see `kernels.dispatch`.
"""

from kernels.ada_norm import ada_norm, gated_residual_ada_norm
from kernels.axis_attention import axis_attention
from kernels.dispatch import decompositions, implementation
from kernels.nearest_code import nearest_code
from kernels.partial_ddim import partial_ddim_step_
from kernels.reference import rotate
from kernels.swiglu import swiglu

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
