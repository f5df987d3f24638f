"""The dtype that a backward computes in: that of its forward, wherever it is called."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def without_autocast(grad: Tensor) -> AbstractContextManager[object]:
    """For a backward whose forward has chosen its dtypes already.

    Autograd runs it in whatever region of autocast `backward()` is called in, which would make
    16-bit products of float32 maps: as `torch.amp.custom_bwd` does, for any device.
    """
    device = grad.device.type
    if torch.compiler.is_compiling() or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)
