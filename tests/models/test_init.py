"""The three initialisations have the moments and bounds that their papers give them."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from densely.models import DenseNet, FCDenseNet, ResNet, build_model
from densely.models.init import INITS


def network(init: Any, spatial_dims: int = 2) -> DenseNet:
    """Layers large enough to measure, each with fan_in far from fan_out."""
    torch.manual_seed(0)
    return DenseNet(
        growth_rate=24,
        block_config=(2, 1),
        num_init_features=48,
        num_classes=150,
        bias=True,
        init=init,
        spatial_dims=spatial_dims,
        stem="small" if spatial_dims == 3 else "large",
    )


CONVS = nn.Conv1d | nn.Conv2d | nn.Conv3d
TRANSPOSED_CONVS = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
NORMS = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d


def fc_network(init: Any, spatial_dims: int) -> FCDenseNet:
    torch.manual_seed(0)
    return FCDenseNet(
        growth_rate=20,
        down_blocks=(1,),
        bottleneck_layers=1,
        up_blocks=(2,),
        num_init_features=30,
        num_classes=3,
        init=init,
        spatial_dims=spatial_dims,
    )


def any_network(family: str, init: Any) -> nn.Module:
    if family == "ResNet":
        torch.manual_seed(0)
        return ResNet(block_config=(1, 1), channels=(24, 40), init=init)
    kind, dims = family.split()
    return (network if kind == "DenseNet" else fc_network)(init, int(dims[0]))


FAMILIES = [
    *[f"{kind} {dims}D" for kind in ("DenseNet", "FCDenseNet") for dims in (1, 2, 3)],
    "ResNet",
]


def layers(model: nn.Module, kind: Any) -> list[Any]:
    found = [module for module in model.modules() if isinstance(module, kind)]
    assert found
    return found


def assert_normal(weight: Tensor, std: float) -> None:
    """Mean, spread and shape of a normal distribution, each within 5 standard errors."""
    n, values = weight.numel(), weight.detach().double() / std
    assert abs(values.mean()) < 5 / math.sqrt(n)
    assert abs(values.std() - 1) < 5 / math.sqrt(2 * n)
    inside = (values.abs() < 1).double().mean()
    assert abs(inside - 0.6827) < 5 * math.sqrt(0.6827 * 0.3173 / n)


def assert_uniform(weight: Tensor, bound: float) -> None:
    """Within the bound, nearly up to it on both sides, and as wide as a uniform distribution."""
    n, values = weight.numel(), weight.detach().double() / bound
    assert values.abs().max() <= 1 + 1e-6
    assert values.max() > 1 - 20 / n
    assert values.min() < -1 + 20 / n
    assert abs(values.mean()) < 5 / math.sqrt(3 * n)
    assert abs((values**2).mean() - 1 / 3) < 5 * math.sqrt(4 / 45 / n)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("init", ["fan_out", "torchvision"])
def test_he(init: str, family: str) -> None:
    model = any_network(family, init)
    for layer in layers(model, CONVS):
        outputs, inputs, *kernel = layer.weight.shape
        fan = (outputs if init == "fan_out" else inputs) * math.prod(kernel)
        assert_normal(layer.weight, math.sqrt(2 / fan))
        assert layer.bias is not None
        assert not layer.bias.any()
    if family.startswith("FC"):
        for layer in layers(model, TRANSPOSED_CONVS):  # as many channels in as out
            channels, same, *kernel = layer.weight.shape
            assert channels == same
            assert_normal(layer.weight, math.sqrt(2 / (channels * math.prod(kernel))))
            assert not layer.bias.any()
    else:
        assert not model.classifier.bias.any()
        assert_uniform(model.classifier.weight, 1 / math.sqrt(model.classifier.in_features))


@pytest.mark.parametrize("family", FAMILIES)
def test_xavier(family: str) -> None:
    for layer in layers(any_network(family, "xavier"), CONVS | TRANSPOSED_CONVS | nn.Linear):
        outputs, inputs, *kernel = layer.weight.shape
        area = math.prod(kernel)
        assert_uniform(layer.weight, math.sqrt(6 / ((inputs + outputs) * area)))
        assert_uniform(layer.bias, 1 / math.sqrt(inputs * area))  # PyTorch's own


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("init", INITS)
def test_batch_norm_starts_as_the_identity(init: str, family: str) -> None:
    for norm in layers(any_network(family, init), NORMS):
        assert (norm.weight == 1).all()
        assert (norm.bias == 0).all()
        assert (norm.running_mean == 0).all()
        assert (norm.running_var == 1).all()


@pytest.mark.parametrize("norm", ["group", "layer"])
@pytest.mark.parametrize("init", INITS)
def test_other_norms_start_as_the_identity(init: Any, norm: Any) -> None:
    model = DenseNet(growth_rate=4, block_config=(1,), num_init_features=4, init=init, norm=norm)
    norms = [m for name, m in model.named_modules() if name.split(".")[-1].startswith("norm")]
    assert len(norms) == 4
    for module in norms:
        assert (module.weight == 1).all()
        assert (module.bias == 0).all()


@pytest.mark.parametrize(
    ("name", "init"),
    [
        ("d2l", "xavier"),
        ("densenet_bc_22_12", "fan_out"),
        ("d2l_resnet18", "xavier"),
        ("fc_densenet56", "torchvision"),
    ],
)
def test_presets_start_as_published(name: str, init: str) -> None:
    torch.manual_seed(0)
    weights = (m.weight for m in build_model(name).modules() if isinstance(m, nn.Conv2d))
    weight = next(w for w in weights if w.numel() > 1000 and w.shape[0] != w.shape[1])
    outputs, inputs, *kernel = weight.shape
    area = math.prod(kernel)
    if init == "xavier":
        assert_uniform(weight, math.sqrt(6 / ((inputs + outputs) * area)))
    else:
        assert_normal(weight, math.sqrt(2 / ((outputs if init == "fan_out" else inputs) * area)))
