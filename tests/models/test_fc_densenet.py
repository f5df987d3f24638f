"""FC-DenseNet against the paper, written once more without modules, and its sizes."""

import re
from collections.abc import Sequence
from typing import Any

import pytest
import references
import torch
from nets import assert_equal, images, pull, randomized, state, step
from torch import nn

from densely.errors import ConfigError, ShapeError
from densely.models import FCDenseNet, build_model
from densely.models.fc_densenet import crop


def tiny(**options: Any) -> FCDenseNet:
    """Two steps, with another number of layers in each block."""
    return FCDenseNet(
        **{
            "growth_rate": 3,
            "down_blocks": (2, 1),
            "bottleneck_layers": 3,
            "up_blocks": (2, 1),
            "num_init_features": 5,
            "num_classes": 4,
            "drop_rate": 0.0,
            **options,
        }
    )


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, (8, 12)),
        ({}, (9, 11)),
        ({}, (10, 7)),
        ({}, (4, 4)),
        ({"in_channels": 1, "down_blocks": (1, 2, 1), "up_blocks": (1, 1, 2)}, (13, 23)),
        ({"in_channels": 2, "spatial_dims": 1}, (19,)),
        ({"in_channels": 2, "spatial_dims": 3}, (5, 4, 7)),
    ],
)
def test_paper(options: dict[str, Any], size: tuple[int, ...], train: bool) -> None:
    model = randomized(tiny(**options))
    x = images(2, options.get("in_channels", 3), *size)
    net = {k: v.requires_grad_() for k, v in state(model).items() if v.is_floating_point()}
    leaf, running = x.clone().requires_grad_(), {}
    expected = references.fc_densenet(net, leaf, references.batch_norm(net, train, running))
    pull(expected).backward()

    y, gradients, after = step(model, x, train)
    assert y.shape == (2, 4, *size)
    assert_equal(y, expected.detach())
    wanted = {k: v.grad for k, v in net.items() if k in gradients} | {"x": leaf.grad}
    assert_equal(gradients, wanted)
    assert_equal({key: after[key] for key in running}, running)
    assert bool(running) == train


def test_dropout_is_off_in_eval_mode() -> None:
    plain, dropping = randomized(tiny()).eval(), tiny(drop_rate=0.4).double().eval()
    dropping.load_state_dict(plain.state_dict())
    x = images(2, 3, 9, 8)
    assert_equal(dropping(x), plain(x))
    assert not torch.allclose(dropping.train()(x), dropping(x))


@pytest.mark.parametrize(
    ("k", "down", "bottom", "up", "published"),
    [
        (12, (4, 4, 4, 4, 4), 4, (4, 4, 4, 4, 4), (1_376_795, 1.40)),
        (16, (5, 5, 5, 5, 5), 5, (5, 5, 5, 5, 5), (3_463_243, 3.50)),
        (16, (4, 5, 7, 10, 12), 15, (12, 10, 7, 5, 4), (9_322_091, 9.43)),
    ],
    ids=["56", "67", "103"],
)
def test_parameters_of_the_paper(
    k: int,
    down: Sequence[int],
    bottom: int,
    up: Sequence[int],
    published: tuple[int, float],
    request: pytest.FixtureRequest,
) -> None:
    def conv(inputs: int, outputs: int, size: int) -> int:
        return inputs * outputs * size**2 + outputs

    weights, statistics = conv(3, 48, 3), 0

    def add_norm(channels: int) -> None:
        nonlocal weights, statistics
        weights += 2 * channels
        statistics += 2 * channels

    def add_block(channels: int, layers: int) -> None:
        nonlocal weights
        for i in range(layers):
            add_norm(channels + i * k)
            weights += conv(channels + i * k, k, 3)

    channels, skips = 48, []
    for layers in down:
        add_block(channels, layers)
        channels += layers * k
        skips.append(channels)
        add_norm(channels)
        weights += conv(channels, channels, 1)
    add_block(channels, bottom)
    new = bottom * k
    for layers in up:
        weights += conv(new, new, 3)
        channels = new + skips.pop()
        add_block(channels, layers)
        new = layers * k
    weights += conv(channels + new, 11, 1)

    with torch.device("meta"):
        model = build_model(f"fc_densenet{request.node.callspec.id}")
    assert weights == published[0]
    assert sum(p.numel() for p in model.parameters()) == weights
    assert round((weights + statistics) / 1e6, 2) == published[1]
    buffers = sum(b.numel() for key, b in model.named_buffers() if "running" in key)
    assert buffers == statistics


def test_depth_is_in_the_name() -> None:
    """Convolutions: one first, one a layer, one a transition, one last."""
    for depth in (56, 67, 103):
        with torch.device("meta"):
            model = build_model(f"fc_densenet{depth}")
        kinds = (nn.Conv2d, nn.ConvTranspose2d)
        assert sum(isinstance(m, kinds) for m in model.modules()) == depth


@pytest.mark.parametrize("spatial_dims", [1, 2, 3])
@pytest.mark.parametrize("steps", [1, 3])
def test_smallest_image(steps: int, spatial_dims: int) -> None:
    least = 2**steps
    model = tiny(down_blocks=(1,) * steps, up_blocks=(1,) * steps, spatial_dims=spatial_dims).eval()
    assert model.min_image_size == least
    x = torch.zeros(1, 3, *[least] * spatial_dims)
    assert model(x).shape == (1, 4, *x.shape[2:])
    for axis in range(spatial_dims):
        size = [least - (i == axis) for i in range(spatial_dims)]
        with pytest.raises(ShapeError) as error:
            model(torch.zeros(1, 3, *size))
        assert "x".join(map(str, size)) in str(error.value)
        assert str(error.value).endswith(f"at least {'x'.join([str(least)] * spatial_dims)}")


@pytest.mark.parametrize(
    ("spatial_dims", "shape", "expected"),
    [
        (2, (1, 4, 8, 8), "[N, 3, H, W]"),
        (2, (3, 8, 8), "[N, 3, H, W]"),
        (1, (1, 3, 8, 8), "[N, 3, L]"),
        (3, (1, 3, 8, 8), "[N, 3, D, H, W]"),
    ],
)
def test_input_of_another_shape(spatial_dims: int, shape: tuple[int, ...], expected: str) -> None:
    with pytest.raises(ShapeError) as error:
        tiny(spatial_dims=spatial_dims)(torch.zeros(shape))
    assert str(list(shape)) in str(error.value)
    assert expected in str(error.value)


@pytest.mark.parametrize("norm", ["sync_batch", "group", "layer"])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_other_norms_and_activations_learn(norm: Any, activation: Any) -> None:
    model = randomized(tiny(norm=norm, activation=activation, drop_rate=0.2))
    y, gradients, _ = step(model, images(2, 3, 9, 10), train=True)
    assert y.isfinite().all()
    for key, gradient in gradients.items():
        assert gradient.isfinite().all(), key
        assert gradient.any(), key


def test_what_is_too_large_loses_its_margins_alike() -> None:
    x = torch.arange(70.0).view(1, 2, 5, 7)
    assert_equal(crop(x, (3, 2)), x[:, :, 1:4, 2:4])
    assert_equal(crop(x, (4, 7)), x[:, :, :4])  # a margin of one is below
    assert_equal(crop(x, (5, 7)), x)


def named_fields(**options: Any) -> set[str]:
    with pytest.raises(ConfigError) as error:
        FCDenseNet(**options)
    return set(re.findall(r"(?:^|; )(\w+(?:\[\d+\])?)", str(error.value)))


def test_all_faults_are_named_at_once() -> None:
    faulty: dict[str, Any] = {
        "growth_rate": 0,
        "bottleneck_layers": 0,
        "num_init_features": -1,
        "in_channels": 0,
        "num_classes": 0,
        "spatial_dims": 4,
        "drop_rate": 1.0,
        "norm": "instance",
        "activation": "swish",
        "init": "magic",
    }
    blocks = {"down_blocks": (1, 0), "up_blocks": (-1, 2)}
    assert named_fields(**faulty, **blocks) == {*faulty, "down_blocks[1]", "up_blocks[0]"}


def test_as_many_steps_up_as_down() -> None:
    with pytest.raises(ConfigError, match="2 down_blocks and 3 up_blocks"):
        FCDenseNet(down_blocks=(1, 1), up_blocks=(1, 1, 1))
    assert named_fields(down_blocks=(), up_blocks=()) == {"down_blocks"}
