"""How the weights of a network start: three well-known ways, each by its name."""

from collections.abc import Callable
from typing import Literal, get_args

from torch import nn

from densely.models.parts import CONVS, TRANSPOSED_CONVS

InitName = Literal["fan_out", "torchvision", "xavier"]
INITS: tuple[str, ...] = get_args(InitName)


def initialize(model: nn.Module, name: InitName) -> None:
    """Fill the weights of all convolutions and linear layers of `model` in place.

    - "fan_out": normal, variance 2 / fan_out for convolutions; linear bias 0. The authors' Torch
      code (He et al. 2015, with the number of outputs).
    - "torchvision": the same with fan_in, as torchvision, timm and MONAI have it.
    - "xavier": Xavier uniform for convolutions and linear layers; biases as PyTorch makes them.
      The chapter's (Glorot and Bengio 2010).

    Batch norms start as the identity, gamma 1 and beta 0, in each of them.
    """
    if all(parameter.is_meta for parameter in model.parameters()):
        return  # there are no values, and PyTorch takes its time to fill in none
    fill: Callable[[nn.Module], None]
    if name == "xavier":
        fill = _xavier
    else:
        mode: Literal["fan_in", "fan_out"] = "fan_out" if name == "fan_out" else "fan_in"

        def fill(module: nn.Module) -> None:
            _he(module, mode)

    model.apply(fill)


def _xavier(module: nn.Module) -> None:
    if isinstance(module, (*CONVS, *TRANSPOSED_CONVS, nn.Linear)):
        nn.init.xavier_uniform_(module.weight)


def _he(module: nn.Module, mode: Literal["fan_in", "fan_out"]) -> None:
    if isinstance(module, CONVS + TRANSPOSED_CONVS):
        nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")
    if isinstance(module, (*CONVS, *TRANSPOSED_CONVS, nn.Linear)) and module.bias is not None:
        nn.init.zeros_(module.bias)
