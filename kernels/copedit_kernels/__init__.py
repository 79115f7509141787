"""The operators of CoPeDiT under one public name each.

`COPEDIT_KERNELS` = auto (default), reference or triton chooses the implementation: see `copedit_kernels.dispatch`.
"""

from copedit_kernels.activation import swiglu
from copedit_kernels.attention import axis_attention
from copedit_kernels.codes import nearest_code
from copedit_kernels.convolution import conv3
from copedit_kernels.dispatch import decompositions, implementation
from copedit_kernels.norm import ada_norm, gated_residual_ada_norm
from copedit_kernels.reference import rotate
from copedit_kernels.sampler_step import partial_ddim_step_

__all__ = [
    "ada_norm",
    "axis_attention",
    "conv3",
    "decompositions",
    "gated_residual_ada_norm",
    "implementation",
    "nearest_code",
    "partial_ddim_step_",
    "rotate",
    "swiglu",
]

implementation()  # a wrong setting is named at once
