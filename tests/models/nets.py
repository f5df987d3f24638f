"""Small networks, inputs and comparisons that the tests of the models share."""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from densely.models import DenseNet

Model = TypeVar("Model", bound=nn.Module)


def tiny(**options: Any) -> DenseNet:
    return DenseNet(
        **{"growth_rate": 3, "block_config": (2, 3, 1), "num_init_features": 10, **options}
    )


def randomized(model: Model, seed: int = 0) -> Model:
    """The model in float64, with no weight or running statistic left at a special value."""
    rng = np.random.default_rng(seed)
    for key, value in model.double().state_dict().items():
        shape = tuple(value.shape)
        if key.endswith("num_batches_tracked"):
            continue
        if key.endswith("running_var"):
            new = rng.uniform(0.5, 2.0, shape)
        elif key.endswith("weight") and len(shape) == 1:
            new = rng.uniform(0.5, 1.5, shape) * rng.choice([-1, 1], shape)
        elif key.endswith("weight"):
            new = rng.normal(0, 1 / np.sqrt(np.prod(shape[1:])), shape)
        else:
            new = rng.normal(0, 0.5, shape)
        value.copy_(torch.from_numpy(np.asarray(new)))
    return model


def images(*shape: int, seed: int = 1) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def assert_equal(actual: object, expected: object, message: str | None = None) -> None:
    """Equal to 1e-10, in float64; a NaN equals nothing."""
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10, msg=message)


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the weights and running statistics."""
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def pull(outputs: Tensor | list[Tensor]) -> Tensor:
    """A loss with another gradient for each value of the outputs."""
    outputs = [outputs] if isinstance(outputs, Tensor) else outputs
    return torch.stack([(y * images(*y.shape, seed=7)).sum() for y in outputs]).sum()


def step(
    model: nn.Module, x: Tensor, train: bool
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Output, gradients (of weights, and of the input as "x") and state after one pass."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model.train(train)(x)
    pull(y).backward()
    gradients = {key: value.grad.clone() for key, value in model.named_parameters()}
    return y.detach(), gradients | {"x": x.grad}, state(model)


def assert_twins(
    ours: nn.Module, theirs: nn.Module, x: Tensor, rename: Callable[[str], str] = str
) -> None:
    """The same function, in eval and in train mode: outputs, gradients, running statistics.

    `rename` gives the name in `theirs` of each weight in `ours`, whose values it takes.
    """
    theirs.double().load_state_dict({rename(key): value for key, value in state(ours).items()})
    for train in (False, True):
        mine, other = step(ours, x, train), step(theirs, x, train)
        assert_equal(mine[0], other[0])
        for found, wanted in zip(mine[1:], other[1:], strict=True):
            assert_equal({rename(key): value for key, value in found.items()}, dict(wanted))
