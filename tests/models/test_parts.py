"""Norms, activations and pooling against their formulas, alone and in a network."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import references
import torch
import torch.nn.functional as F
from nets import assert_equal, images, pull, randomized, state, step, tiny
from torch import Tensor, nn

from densely.models import DenseNet, Transition
from densely.models.parts import ACTIVATIONS, NORMS, ChannelLayerNorm, Parts

NORM_CLASSES = {
    "batch": (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    "sync_batch": (nn.SyncBatchNorm,) * 3,
    "group": (nn.GroupNorm,) * 3,
    "layer": (ChannelLayerNorm,) * 3,
}
ACTIVATION_CLASSES = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "mish": nn.Mish,
}


def norm_of(
    kind: str, net: dict[str, Tensor], train: bool, running: dict[str, Tensor]
) -> references.Norm:
    if kind in ("batch", "sync_batch"):
        return references.batch_norm(net, train, running)
    if kind == "group":
        return references.group_norm(
            net, lambda channels: max(g for g in (1, 2, 4, 8, 16, 32) if channels % g == 0)
        )
    return references.layer_norm(net)


def assert_like_reference(
    model: DenseNet,
    x: Tensor,
    norm: Callable[..., references.Norm],
    activation: references.Activation,
) -> None:
    """Logits, gradients and running statistics, in both modes; `norm(net, train, running)`."""
    strides = [(2,) * model.spatial_dims] * 2  # small stem, three blocks
    for train in (False, True):
        net = {k: v.requires_grad_() for k, v in state(model).items() if v.is_floating_point()}
        running: dict[str, Tensor] = {}
        leaf = x.clone().requires_grad_()
        parts = references.densenet(
            net, leaf, norm(net, train, running), strides=strides, activation=activation
        )
        pull(parts["logits"]).backward()
        y, gradients, after = step(model, x, train)
        assert_equal(y, parts["logits"].detach())
        wanted = {k: v.grad for k, v in net.items() if k in gradients} | {"x": leaf.grad}
        assert_equal(gradients, wanted)
        assert_equal({key: after[key] for key in running}, running)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", NORMS)
def test_networks_of_every_norm_and_activation(norm: Any, activation: Any) -> None:
    model = tiny(stem="small", bn_size=2, num_classes=4, norm=norm, activation=activation)
    kinds = {type(m) for m in model.modules()}
    assert kinds & set(sum(NORM_CLASSES.values(), ())) == {NORM_CLASSES[norm][1]}
    assert kinds & set(ACTIVATION_CLASSES.values()) == {ACTIVATION_CLASSES[activation]}
    assert_like_reference(
        randomized(model),
        images(2, 3, 9, 10),
        lambda net, train, running: norm_of(norm, net, train, running),
        references.ACTIVATIONS[activation],
    )


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("spatial_dims", [1, 3])
def test_norms_in_other_dimensions(norm: Any, spatial_dims: int) -> None:
    model = tiny(stem="small", num_classes=4, norm=norm, spatial_dims=spatial_dims)
    kinds = {type(m) for m in model.modules()}
    assert NORM_CLASSES[norm][spatial_dims - 1] in kinds
    assert_like_reference(
        randomized(model),
        images(2, 3, *(9, 5, 6)[:spatial_dims]),
        lambda net, train, running: norm_of(norm, net, train, running),
        references.ACTIVATIONS["relu"],
    )


# Custom: no norm at all, so that an activation in place would overwrite the block's own features;
# the identity with a copy; PyTorch's instance norm, one group a channel.
CUSTOM: dict[str, tuple[dict[str, Any], Callable[..., references.Norm], references.Activation]] = {
    "no norm, relu": (
        {"norm": lambda _channels: nn.Identity()},
        lambda *_: lambda x, _name: x,
        references.ACTIVATIONS["relu"],
    ),
    **{
        f"no norm, {name}": (
            {"norm": lambda _channels: nn.Identity(), "activation": name},
            lambda *_: lambda x, _name: x,
            references.ACTIVATIONS[name],
        )
        for name in ("leaky_relu", "elu", "silu", "mish")
    },
    "instance norm, tanh": (
        {
            "norm": lambda channels: nn.InstanceNorm2d(channels, affine=True),
            "activation": nn.Tanh,
        },
        lambda net, *_: references.group_norm(net, lambda channels: channels),
        torch.tanh,
    ),
    "batch norm, softplus": (
        {"activation": nn.Softplus},
        references.batch_norm,
        lambda x: (1 + x.exp()).log(),
    ),
}


@pytest.mark.parametrize("bn_size", [None, 2])
@pytest.mark.parametrize(("options", "norm", "activation"), CUSTOM.values(), ids=CUSTOM)
def test_norms_and_activations_of_ones_own(
    options: dict[str, Any],
    norm: Callable[..., references.Norm],
    activation: references.Activation,
    bn_size: int | None,
) -> None:
    model = tiny(stem="small", bn_size=bn_size, num_classes=4, **options)
    assert_like_reference(randomized(model), images(2, 3, 9, 10), norm, activation)


def test_the_input_is_left_as_it_is() -> None:
    x = images(2, 3, 9, 10)
    for options in ({}, {"norm": lambda _channels: nn.Identity()}):
        model = tiny(stem="small", **options).double()
        given = x.clone()
        model.train()(given)
        model.features(given)
        model.forward_features(given)
        assert torch.equal(given, x)


@pytest.mark.parametrize(
    ("channels", "groups"),
    [(1, 1), (7, 1), (12, 4), (24, 8), (32, 32), (48, 16), (64, 32), (96, 32), (100, 4)],
)
def test_group_norm_has_32_groups_or_as_many_as_divide_the_channels(
    channels: int, groups: int
) -> None:
    norm = Parts(norm="group").make_norm(channels)
    assert isinstance(norm, nn.GroupNorm)
    assert (norm.num_groups, norm.num_channels) == (groups, channels)


@pytest.mark.parametrize("size", [(5,), (4, 3), (2, 3, 4)])
def test_layer_norm_is_pytorchs_over_the_channels(size: tuple[int, ...]) -> None:
    norm = randomized(ChannelLayerNorm(6))
    x = 5 + 3 * images(2, 6, *size)
    rows = x.reshape(2, 6, -1).transpose(1, 2)
    expected = F.layer_norm(rows, (6,), norm.weight, norm.bias).transpose(1, 2).reshape(x.shape)
    assert_equal(norm(x), expected)
    assert norm(x).shape == x.shape


def test_layer_norm_starts_as_the_plain_one() -> None:
    y = ChannelLayerNorm(50).double()(4 + 2 * images(3, 50, 4))
    torch.testing.assert_close(y.mean(1), torch.zeros_like(y[:, 0]))
    torch.testing.assert_close(y.std(1, correction=0), torch.ones_like(y[:, 0]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("norm", NORMS)
def test_norm_eps_reaches_every_norm(norm: Any) -> None:
    model = tiny(norm=norm, norm_eps=0.125)
    norms = [m for m in model.modules() if isinstance(m, NORM_CLASSES[norm][1])]
    assert len(norms) == 1 + 2 * 6 + 2 + 1
    assert {m.eps for m in norms} == {0.125}


def test_norm_eps_none_keeps_each_ones_own() -> None:
    model = tiny(norm=lambda channels: nn.BatchNorm2d(channels, eps=0.25))
    assert {m.eps for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {0.25}
    assert {m.eps for m in tiny().modules() if isinstance(m, nn.BatchNorm2d)} == {1e-5}


@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "gelu"])
def test_activations_take_no_memory_of_their_own_after_our_norms(activation: Any) -> None:
    for norm in NORMS:
        assert Parts(norm=norm, activation=activation).make_activation().inplace  # type: ignore[arg-type]
    theirs = Parts(norm=lambda _channels: nn.Identity(), activation=activation)
    assert not theirs.make_activation().inplace


@pytest.mark.parametrize("norm", ["sync_batch", "group", "layer"])
def test_only_batch_norm_learns_its_channels(norm: Any) -> None:
    with pytest.raises(ValueError, match="channels"):
        Parts(norm=norm).make_norm(None)


# --- Transitions. ---


def by_hand(transition: Transition, x: Tensor, pool: Callable[[Tensor], Tensor]) -> Tensor:
    """The paper's order: norm, ReLU, 1x1 convolution, pooling."""
    net = state(transition)
    norm = references.batch_norm(net, False, {})
    weight = net["conv.weight"].flatten(1)
    y = torch.einsum("oc,nchw->nohw", weight, norm(x, "norm").clamp(min=0))
    return pool(y + net["conv.bias"][:, None, None])


def corners(x: Tensor) -> Tensor:
    """The four pixels of each 2x2 window; an odd last row or column is dropped."""
    h, w = (n // 2 * 2 for n in x.shape[2:])
    return torch.stack([x[:, :, i:h:2, j:w:2] for i in (0, 1) for j in (0, 1)])


@pytest.mark.parametrize("drop_rate", [0.0, 0.3])
@pytest.mark.parametrize("pool", ["avg", "max"])
def test_transition_is_the_papers(pool: Any, drop_rate: float) -> None:
    parts = Parts(bias=True, drop_rate=drop_rate)
    transition = randomized(Transition(6, 4, parts=parts, pool=pool)).eval()
    x = images(2, 6, 9, 6)
    reduce = {"avg": lambda c: c.mean(0), "max": lambda c: c.amax(0)}[pool]
    expected = by_hand(transition, x, lambda y: reduce(corners(y)))
    assert_equal(transition(x), expected)
    # The order matters to a maximum: the other one is another function.
    assert pool == "avg" or not torch.allclose(
        F.conv2d(
            corners(transition.relu(transition.norm(x))).amax(0),
            transition.conv.weight,
            transition.conv.bias,
        ),
        expected,
    )


def test_transition_without_stride_does_not_pool() -> None:
    transition = randomized(Transition(6, 4, parts=Parts(bias=True), stride=(1, 1))).eval()
    x = images(2, 6, 5, 4)
    assert_equal(transition(x), by_hand(transition, x, lambda y: y))


@pytest.mark.parametrize("spatial_dims", [1, 2, 3])
def test_transition_halves_every_axis_unless_told_otherwise(spatial_dims: int) -> None:
    for pool in ("avg", "max"):
        transition = Transition(6, 4, parts=Parts(spatial_dims), pool=pool)  # type: ignore[arg-type]
        assert transition.pool.kernel_size == transition.pool.stride == (2,) * spatial_dims


@pytest.mark.parametrize(
    ("pool", "drop_rate", "seen"), [("avg", 0, 6), ("max", 0, 24), ("avg", 0.5, 24)]
)
def test_a_transition_pools_first_only_where_it_may(pool: Any, drop_rate: float, seen: int) -> None:
    """Pixels that the convolution sees: a quarter of 4x6 where the average comes first."""
    transition = Transition(3, 2, parts=Parts(drop_rate=drop_rate), pool=pool)
    pixels = []
    transition.conv.register_forward_hook(
        lambda _module, args, _out: pixels.append(math.prod(args[0].shape[2:]))
    )
    transition(torch.zeros(1, 3, 4, 6))
    assert pixels == [seen]
