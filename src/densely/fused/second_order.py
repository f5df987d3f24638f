"""Gradients that have gradients, for the rare call with `create_graph=True`."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def second_order_wanted() -> bool:
    """Whether the backward that runs now is to have gradients itself: under `create_graph`."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def gradients_with_gradients(
    forward: Callable[..., Tensor], inputs: Sequence[Tensor], needed: Sequence[bool], grad: Tensor
) -> list[Tensor]:
    """Gradients of those inputs that need one, through plain PyTorch.

    `torch.func.vjp` takes the inputs as if they depended on nothing, which `torch.autograd.grad`
    would not: a block's input is read off its output, which itself depends on the parameters.
    """
    places = [i for i, need in enumerate(needed) if need]

    def of_needed(*some: Tensor) -> Tensor:
        every = list(inputs)
        for i, tensor in zip(places, some, strict=True):
            every[i] = tensor
        return forward(*every)

    backward = torch.func.vjp(of_needed, *(inputs[i] for i in places))[1]
    return list(backward(grad))
