"""Gradients by plain PyTorch: those that have gradients of their own, and many at once."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def plain_wanted(grad: Tensor) -> bool:
    """Whether the backward that runs now is not for kernels.

    It is to have gradients itself, as under `create_graph`, or `grad` stands for a batch of
    gradients, as under `is_grads_batched` or `torch.autograd.functional.jacobian(vectorize=True)`.
    """
    if torch.compiler.is_compiling():
        return False
    functorch = torch._C._functorch
    is_batch = functorch.is_batchedtensor(grad) or functorch.is_legacy_batchedtensor(grad)
    return torch.is_grad_enabled() or is_batch


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
