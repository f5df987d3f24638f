"""Gradients that sum to zero over each channel, and are known to.

A batch norm in train mode takes the mean off what it reads: to move a whole channel changes nothing
behind it, so the gradient that it hands back sums to zero over the channel. A bias before it has a
gradient of exactly zero then, and to add up a map in order to find its rounding errors would be a
pass over memory. What is known is written on the gradient, with its version: it is void as soon as
anybody writes to that tensor, as autograd does where an output is read twice. Like autograd itself
it does not see who writes past the version, through `.data`.
"""

import torch
from torch import Tensor

_VERSION = "_densely_sums_to_zero"


def mark(grad: Tensor) -> None:
    """Note that the gradient [N, C, *space] sums to zero over each channel."""
    if not torch.compiler.is_compiling() and not grad.is_inference():
        setattr(grad, _VERSION, grad._version)


def is_marked(grad: Tensor) -> bool:
    """Whether it does, for all that is known."""
    if torch.compiler.is_compiling() or grad.is_inference():  # which have no versions
        return False
    return getattr(grad, _VERSION, None) == grad._version
