"""The plain peers are the same networks as densely's, and checkpoints change no result."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from densely import create_model
from densely.bench.plain_nets import bc_net, chapter_net


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("peer", "name"),
    [(chapter_net, "d2l"), (lambda: bc_net(100), "densenet_bc_100_12")],
)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_as_many_parameters_as_densely_has(
    peer: Callable[[], nn.Module], name: str, checkpointed: bool
) -> None:
    with torch.device("meta"):
        theirs = chapter_net(checkpointed) if name == "d2l" else bc_net(100, 12, checkpointed)
        assert parameters(theirs) == parameters(peer()) == parameters(create_model(name))


def test_the_plain_net_is_the_same_function_as_densely() -> None:
    ours = create_model("densenet_bc_100_12", block_config=(2, 2, 2), fused=False)
    theirs = bc_net(16)
    shapes = [p.shape for p in ours.parameters()]
    assert shapes == [p.shape for p in theirs.parameters()]
    with torch.no_grad():
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            other.copy_(mine)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(theirs(x), ours(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("peer", "shape"), [(partial(bc_net, 16), (2, 3, 16, 16)), (chapter_net, (2, 1, 32, 32))]
)
def test_checkpoints_change_no_gradient(
    peer: Callable[..., nn.Module], shape: tuple[int, ...]
) -> None:
    x = torch.randn(shape)
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        net = peer(checkpointed=checkpointed)
        net(x).square().sum().backward()
        gradients.append([p.grad for p in net.parameters()])
    torch.testing.assert_close(*gradients)
