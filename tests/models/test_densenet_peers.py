"""DenseNet against the real networks of torchvision, timm and MONAI, with the same weights."""

import re
from typing import Any

import peers
import pytest
import torch
from nets import assert_equal, assert_twins, images, randomized

from densely.models import DenseNet

SIZE: dict[str, Any] = {"growth_rate": 6, "block_config": (2, 3, 1), "bn_size": 2}


def monai_key(key: str) -> str:
    key = re.sub(r"(denselayer\d+)\.", r"\1.layers.", key)
    return key.replace("classifier.", "class_layers.out.")


@pytest.mark.parametrize(
    ("spatial_dims", "size"),
    [(1, (61,)), (2, (37, 44)), (3, (33, 18, 21))],
    ids=["1D", "2D", "3D"],
)
def test_monai(spatial_dims: int, size: tuple[int, ...]) -> None:
    theirs = peers.monai_networks().DenseNet(
        spatial_dims=spatial_dims, in_channels=2, out_channels=5, init_features=7, **SIZE
    )
    ours = DenseNet(
        spatial_dims=spatial_dims, in_channels=2, num_classes=5, num_init_features=7, **SIZE
    )
    assert_twins(randomized(ours), theirs, images(3, 2, *size), monai_key)


@pytest.mark.parametrize(
    ("norm", "theirs_norm", "activation"),
    [
        ("batch", "batch", "gelu"),
        ("batch", "batch", "mish"),
        ("group", ("group", {"num_groups": 32}), "elu"),
    ],
)
def test_monai_with_other_parts(norm: Any, theirs_norm: Any, activation: Any) -> None:
    """64 everywhere, since MONAI asks for groups that divide all channels."""
    sizes: Any = {"growth_rate": 64, "block_config": (1, 1), "bn_size": 1}
    theirs = peers.monai_networks().DenseNet(
        spatial_dims=2,
        in_channels=1,
        out_channels=3,
        init_features=64,
        norm=theirs_norm,
        act=activation,
        **sizes,
    )
    ours = DenseNet(
        in_channels=1,
        num_classes=3,
        num_init_features=64,
        norm=norm,
        activation=activation,
        **sizes,
    )
    assert_twins(randomized(ours), theirs, images(2, 1, 9, 14), monai_key)


def test_torchvision() -> None:
    theirs = peers.torchvision().models.DenseNet(num_init_features=9, num_classes=5, **SIZE)
    ours = DenseNet(num_init_features=9, num_classes=5, **SIZE)
    layout = [(key, value.shape) for key, value in theirs.state_dict().items()]
    assert [(key, value.shape) for key, value in ours.state_dict().items()] == layout
    assert_twins(randomized(ours), theirs, images(3, 3, 37, 44))


def test_torchvisions_weights_load_as_they_are() -> None:
    theirs = randomized(peers.torchvision().models.DenseNet(num_init_features=9, **SIZE))
    ours = DenseNet(num_init_features=9, **SIZE).double()
    ours.load_state_dict(theirs.state_dict())
    x = images(2, 3, 32, 40)
    assert_equal(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize(("stem", "stem_type"), [("large", ""), ("deep", "deep")])
def test_timm(stem: Any, stem_type: str) -> None:
    theirs = peers.timm().models.DenseNet(num_classes=5, stem_type=stem_type, **SIZE)
    ours = DenseNet(num_init_features=12, num_classes=5, stem=stem, **SIZE)
    assert set(ours.state_dict()) == set(theirs.state_dict())
    assert_twins(randomized(ours), theirs, images(3, 3, 37, 44))


def test_timm_with_another_activation() -> None:
    theirs = peers.timm().models.DenseNet(num_classes=5, act_layer="silu", **SIZE)
    ours = DenseNet(num_init_features=12, num_classes=5, activation="silu", **SIZE)
    assert_twins(randomized(ours), theirs, images(3, 3, 37, 44))


@pytest.mark.parametrize("levels", [None, (1, 3)])
def test_feature_maps_are_timms(levels: tuple[int, ...] | None) -> None:
    """timm's pyramid begins with the stem's maps, which are no dense block's."""
    theirs = randomized(peers.timm().models.DenseNet(**SIZE))
    ours = DenseNet(num_init_features=12, **SIZE).double()
    ours.load_state_dict(theirs.state_dict())
    x = images(2, 3, 37, 44)
    with torch.no_grad():
        maps = theirs.eval().forward_intermediates(x, intermediates_only=True)
        found = ours.eval().forward_features(x, levels)
    assert_equal(found, [maps[level] for level in levels or (1, 2, 3)])
