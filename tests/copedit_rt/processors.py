"""Processors that are not here: one that gets some convolutions in bfloat16 wrong, and one that gets them right."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

FORWARD, BACKWARD = torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default


class Faulty(TorchDispatchMode):
    """Inside, 3-D convolutions in bfloat16 on a CPU, and their gradients, are NaN where the smaller side (the result;
    the input, if transposed) has the extent 1 along an axis. Strided ones are garbage on processors with AMX."""

    def __init__(self) -> None:
        super().__init__()
        self.met = 0  # such calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is FORWARD:
            x, small = args[0], args[0] if args[6] else found
        elif func is BACKWARD:
            x, small = args[1], args[1] if args[7] else args[0]
        else:
            return found
        if x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.ndim == 5 and 1 in small.shape[2:]:
            self.met += 1
            for y in (found,) if isinstance(found, Tensor) else found:
                if y is not None:
                    y.fill_(torch.nan)
        return found


class Sound(TorchDispatchMode):
    """Inside, convolutions in bfloat16 are computed in float32 and rounded."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not FORWARD or args[0].dtype != torch.bfloat16:
            return func(*args, **(kwargs or {}))
        wide = (x.float() if isinstance(x, Tensor) else x for x in args)
        return func(*wide, **(kwargs or {})).bfloat16()
