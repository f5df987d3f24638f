"""Small DenseNets of the real packages, with weights that are all unlike each other."""

import importlib
from typing import Any

import numpy as np
import peers
import torch
from torch import Tensor, nn

CONFIG = (2, 1, 3, 2)
CLASSES = 5


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """In float64, with no weight or running statistic at a special value."""
    generator = torch.Generator().manual_seed(seed)
    for key, value in model.double().state_dict().items():
        if key.endswith("num_batches_tracked"):
            value.fill_(7)
        elif key.endswith("running_var") or (key.endswith("weight") and value.dim() == 1):
            value.uniform_(0.5, 1.5, generator=generator)
        elif value.dim() > 1:
            value.normal_(0, (2 / value[0].numel()) ** 0.5, generator=generator)
        else:
            value.normal_(0, 0.3, generator=generator)
    return model


def torchvision() -> nn.Module:
    peers.torchvision()
    make = importlib.import_module("torchvision.models.densenet").DenseNet
    return randomised(make(8, CONFIG, 16, 4, num_classes=CLASSES))


def timm(stem_type: str = "") -> nn.Module:
    peers.timm()
    make = importlib.import_module("timm.models.densenet").DenseNet
    return randomised(make(8, CONFIG, num_classes=CLASSES, stem_type=stem_type))


def monai(spatial_dims: int) -> nn.Module:
    make = peers.monai_networks().DenseNet
    return randomised(make(spatial_dims, 3, CLASSES, 16, 8, CONFIG))


def keras() -> Any:
    """In float32, in which its norms compute whatever they are given; without its softmax."""
    peers.keras()
    make = importlib.import_module("keras.src.applications.densenet").DenseNet
    model = make(
        list(CONFIG),
        weights=None,
        input_shape=(40, 40, 3),
        classes=CLASSES,
        classifier_activation=None,
    )
    random = np.random.default_rng(0)
    model.set_weights(
        [
            random.normal(0, (2 / np.prod(w.shape[:-1])) ** 0.5, w.shape)
            if w.ndim > 1
            else random.uniform(0.5, 1.5, w.shape)
            for w in model.get_weights()
        ]
    )
    return model


def images(spatial_dims: int = 2, size: int = 40, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 3, *(size,) * spatial_dims, dtype=torch.float64, generator=generator)
