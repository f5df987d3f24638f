"""The trainer's optimizer is PyTorch's, to the bit and in its state."""

from typing import Any

import pytest
import torch
from torch import nn

from densely.training.sgd import SGD


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4) -> None:
    for i in range(steps):
        optimizer.zero_grad()
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(i))
        model(x).square().sum().backward()
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / (1 + i)
        optimizer.step()


SETTINGS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-2},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_same_bits_and_state(settings: dict[str, Any]) -> None:
    model, other = net(), net()
    ours = SGD(model.parameters(), lr=0.1, **settings)
    theirs = torch.optim.SGD(other.parameters(), lr=0.1, **settings)
    for _ in range(2):
        learn(model, ours)
        learn(other, theirs)
        for one, two in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(one, two)
        mine, expected = ours.state_dict(), theirs.state_dict()
        assert mine.keys() == expected.keys()
        assert mine["param_groups"] == expected["param_groups"]
        # Each goes on from the other's.
        ours.load_state_dict(expected)
        theirs.load_state_dict(mine)
    assert all(p.requires_grad and p.grad_fn is None for p in model.parameters())


def test_groups_may_be_added_and_gradients_go() -> None:
    model = net()
    first, _, second = model.children()
    optimizer = SGD(first.parameters(), lr=0.1)
    optimizer.add_param_group({"params": second.parameters(), "lr": 0.2})
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]
    learn(model, optimizer, steps=1)
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(ValueError, match="learning rate"):
        SGD(model.parameters(), lr=-1.0)
