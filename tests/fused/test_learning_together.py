"""Norms of a whole net learn at the end of its forward pass: what they learn is as in PyTorch."""

import copy

import pytest
import torch
from torch import Tensor, nn

from densely.fused import backend
from densely.fused.coefficients import learning_together, update_running_statistics
from densely.fused.plain import Norm
from densely.models.registry import build_model


def norm_of(module: nn.BatchNorm2d) -> Norm:
    return Norm(
        module.weight,
        module.bias,
        module.running_mean,
        module.running_var,
        module.num_batches_tracked,
        module.momentum,
        module.eps,
        module.training,
    )


def taken(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel."""
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    return mean, var


@pytest.mark.parametrize("momentum", [0.1, 0.3, None])
def test_a_norm_that_is_used_twice_learns_twice_in_turn(momentum: float | None) -> None:
    theirs = nn.BatchNorm2d(3, momentum=momentum)
    ours = copy.deepcopy(theirs)
    batches = [torch.randn(4, 3, 5, 5) + i for i in range(3)]
    for x in batches:
        theirs(x)
    with learning_together():
        for x in batches:
            update_running_statistics([(norm_of(ours), *taken(x))], 100)
        assert ours.num_batches_tracked is not None
        assert ours.num_batches_tracked < 3, "it did not wait"
    for name, value in theirs.state_dict().items():
        assert torch.allclose(ours.state_dict()[name], value, atol=1e-6), name


def test_norms_of_different_batches_and_momenta_learn_each_its_own() -> None:
    theirs = [nn.BatchNorm2d(3, momentum=momentum) for momentum in (0.1, 0.1, 0.5)]
    ours = copy.deepcopy(theirs)
    batches = [torch.randn(2, 3, size, size) for size in (2, 5, 9)]
    with learning_together():
        for norm, x in zip(ours, batches, strict=True):
            update_running_statistics([(norm_of(norm), *taken(x))], x.numel() // 3)
    for norm, other, x in zip(theirs, ours, batches, strict=True):
        norm(x)
        for name, value in norm.state_dict().items():
            assert torch.allclose(other.state_dict()[name], value, atol=1e-6), name


def test_what_was_seen_before_an_exception_is_learnt() -> None:
    norm = nn.BatchNorm2d(3)

    @learning_together()
    def run() -> None:
        update_running_statistics([(norm_of(norm), *taken(torch.randn(4, 3, 5, 5)))], 100)
        raise KeyError

    with pytest.raises(KeyError):
        run()
    assert norm.num_batches_tracked == 1


def test_within_another_net_a_net_learns_at_its_own_end() -> None:
    inner, outer = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    with learning_together():
        update_running_statistics([(norm_of(outer), *taken(torch.randn(4, 3, 5, 5)))], 100)
        with learning_together():
            update_running_statistics([(norm_of(inner), *taken(torch.randn(4, 3, 5, 5)))], 100)
        assert (inner.num_batches_tracked, outer.num_batches_tracked) == (1, 0)
    assert outer.num_batches_tracked == 1


def net(fused: bool) -> nn.Module:
    torch.manual_seed(0)
    return build_model("d2l", block_config=(1, 1), in_channels=1, fused=fused).train()


def assert_learnt_the_same(ours: nn.Module, theirs: nn.Module) -> None:
    expected = theirs.state_dict()
    for name, value in ours.state_dict().items():
        assert torch.allclose(value, expected[name], atol=1e-5), name


def test_a_net_has_learnt_when_it_returns_and_also_where_it_raises() -> None:
    ours, theirs, x = net(True), net(False), torch.rand(4, 1, 32, 32)
    before = backend.fused_calls.total()
    ours(x)
    theirs(x)
    assert backend.fused_calls.total() > before
    assert_learnt_the_same(ours, theirs)

    def stop(*_: object) -> None:
        raise StopIteration

    ours.features.transition1.register_forward_hook(stop)  # type: ignore[union-attr,operator]
    with pytest.raises(StopIteration):
        ours(x)
    assert ours.features.norm0.num_batches_tracked == 2  # type: ignore[union-attr]
    assert ours.features[-1].num_batches_tracked == 1  # type: ignore[index]


def test_a_block_that_runs_by_itself_after_a_net_learns_at_once() -> None:
    ours, theirs = net(True), net(False)
    for model in (ours, theirs):
        torch.manual_seed(1)
        model(torch.rand(4, 1, 32, 32))
        model.features.denseblock1(torch.rand(4, 64, 8, 8))  # type: ignore[union-attr,operator]
    assert_learnt_the_same(ours, theirs)
