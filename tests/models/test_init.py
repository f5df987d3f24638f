"""The three initialisations have the moments and bounds that their papers give them."""

import math

import pytest
import torch
from torch import Tensor, nn

from densely.models import DenseNet, create_model
from densely.models.init import INITS


def network(init: str) -> DenseNet:
    """Layers large enough to measure, each with fan_in far from fan_out."""
    torch.manual_seed(0)
    return DenseNet(
        growth_rate=24,
        block_config=(2, 1),
        num_init_features=48,
        num_classes=150,
        bias=True,
        init=init,
    )


def layers(model: nn.Module, kind: type) -> list:
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


@pytest.mark.parametrize("init", ["fan_out", "torchvision"])
def test_he(init: str) -> None:
    model = network(init)
    for layer in layers(model, nn.Conv2d):
        outputs, inputs, height, width = layer.weight.shape
        fan = (outputs if init == "fan_out" else inputs) * height * width
        assert_normal(layer.weight, math.sqrt(2 / fan))
        assert not layer.bias.any()
    assert not model.classifier.bias.any()
    assert_uniform(model.classifier.weight, 1 / math.sqrt(model.classifier.in_features))


def test_xavier() -> None:
    for layer in layers(network("xavier"), nn.Conv2d | nn.Linear):
        outputs, inputs, *kernel = layer.weight.shape
        area = math.prod(kernel)
        assert_uniform(layer.weight, math.sqrt(6 / ((inputs + outputs) * area)))
        assert_uniform(layer.bias, 1 / math.sqrt(inputs * area))  # PyTorch's own


@pytest.mark.parametrize("init", INITS)
def test_batch_norm_starts_as_the_identity(init: str) -> None:
    for norm in layers(network(init), nn.BatchNorm2d):
        assert (norm.weight == 1).all()
        assert (norm.bias == 0).all()
        assert (norm.running_mean == 0).all()
        assert (norm.running_var == 1).all()


@pytest.mark.parametrize(("name", "init"), [("d2l", "xavier"), ("densenet_bc_22_12", "fan_out")])
def test_presets_start_as_published(name: str, init: str) -> None:
    torch.manual_seed(0)
    weight = create_model(name).features.denseblock1.denselayer1.conv1.weight
    outputs, inputs, *kernel = weight.shape
    area = math.prod(kernel)
    if init == "xavier":
        assert_uniform(weight, math.sqrt(6 / ((inputs + outputs) * area)))
    else:
        assert_normal(weight, math.sqrt(2 / (outputs * area)))
