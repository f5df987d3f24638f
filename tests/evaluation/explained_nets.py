"""Small networks that the tests of heat maps and connections share, densely's and others'."""

from collections.abc import Callable
from typing import NamedTuple

import peers
import torch
from torch import Tensor, nn

import densely
from densely.models import DenseNet
from densely.models.resnet import ResNet


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    levels: int


TINY = {
    "growth_rate": 4,
    "block_config": (2, 3),
    "num_init_features": 6,
    "bn_size": 2,
    "num_classes": 5,
    "stem": "small",
}


def tiny(**options: object) -> DenseNet:
    return DenseNet(**{**TINY, **options})


def torchvision(**options: object) -> nn.Module:
    peers.torchvision()
    from torchvision.models.densenet import DenseNet

    return DenseNet(8, (2, 3, 2), 16, 2, **{"num_classes": 5, **options})


def timm(**options: object) -> nn.Module:
    peers.timm()
    from timm.models.densenet import DenseNet

    return DenseNet(8, (2, 3, 2), bn_size=2, **{"num_classes": 5, **options})


def monai(dims: int = 2, **options: object) -> nn.Module:
    return peers.monai_networks().DenseNet(dims, 3, 5, 16, 8, (2, 3), 2, **options)


def resnet() -> ResNet:
    return ResNet(block_config=(1, 2, 1), channels=(4, 6, 8), in_channels=3, num_classes=5)


def accelerated(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def make_accelerated() -> nn.Module:
        model = make()
        assert densely.accelerate(model).replaced
        return model

    return make_accelerated


_OTHERS = {
    "torchvision": Case(torchvision, (3, 64, 48), 3),
    "timm": Case(timm, (3, 64, 48), 3),
    "MONAI 1D": Case(lambda: monai(1), (3, 70), 2),
    "MONAI 2D": Case(monai, (3, 40, 32), 2),
    "MONAI 3D": Case(lambda: monai(3), (3, 18, 20, 22), 2),
}
CASES = {
    "densely": Case(tiny, (3, 12, 10), 2),
    "densely, not fused": Case(lambda: tiny(fused=False), (3, 12, 10), 2),
    "densely, plain layers": Case(lambda: tiny(bn_size=None, stem="large"), (3, 40, 36), 2),
    "densely, GELU": Case(lambda: tiny(activation="gelu", norm="group"), (3, 12, 10), 2),
    "densely, 1D": Case(lambda: tiny(spatial_dims=1), (3, 14), 2),
    "densely, 3D": Case(lambda: tiny(spatial_dims=3), (3, 6, 8, 7), 2),
    "densely, one block": Case(lambda: tiny(block_config=(3,)), (3, 9, 9), 1),
    "densely, dropout": Case(lambda: tiny(drop_rate=0.3, classifier_drop_rate=0.5), (3, 9, 9), 2),
    "ResNet": Case(resnet, (3, 40, 32), 3),
    **_OTHERS,
    **{
        f"{name}, accelerated": case._replace(make=accelerated(case.make))
        for name, case in _OTHERS.items()
    },
}


def shuffled(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in float64, with no weight or statistic left at a special value."""
    generator = torch.Generator().manual_seed(seed)
    for key, value in model.double().state_dict().items():
        if key.endswith("running_var"):
            value.uniform_(0.5, 2, generator=generator)
        elif value.dim() > 1:
            value.normal_(0, value[0].numel() ** -0.5, generator=generator)
        elif value.is_floating_point():
            value.normal_(0.3, 0.7, generator=generator)
    return model


def images(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)
