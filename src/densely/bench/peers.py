"""Other people's DenseNets: torchvision, timm and MONAI, where they are installed."""

import importlib
import warnings
from types import ModuleType
from typing import Any

import torch
from torch import nn

# Kept for as long as the process runs: a library's operators go with it.
_declared: list[torch.library.Library] = []


def torchvision_module(name: str = "torchvision.models") -> ModuleType:
    """A module of torchvision, also where its compiled operators do not fit the torch at hand.

    Its models are plain PyTorch. Beside a CPU build of torch the compiled part of the PyPI wheel
    cannot be loaded, and the import fails for want of two operators: so they are declared first.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return _import(name)
    except RuntimeError as error:
        if "torchvision::" not in str(error) or _declared:
            raise
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for operator in ("nms", "qnms"):
        library.define(  # type: ignore[no-untyped-call]
            f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        )
    _declared.append(library)
    return _import(name)


def torchvision_densenet121(memory_efficient: bool = False) -> nn.Module:
    """From torchvision, without weights."""
    return _made(torchvision_module().densenet121(memory_efficient=memory_efficient))


def torchvision_bc(depth: int, memory_efficient: bool = False) -> nn.Module:
    """The class of torchvision as the paper's BC net for images of 32x32.

    It can only be built with the stem for large images; people then put a 3x3 convolution in its
    place, as here.
    """
    net = _made(
        torchvision_module().DenseNet(
            growth_rate=12,
            block_config=3 * ((depth - 4) // 6,),
            num_init_features=24,
            num_classes=10,
            memory_efficient=memory_efficient,
        )
    )
    features = net.get_submodule("features")
    features.conv0 = nn.Conv2d(3, 24, 3, padding=1, bias=False)
    features.norm0 = features.relu0 = features.pool0 = nn.Identity()
    return net


def timm_densenet121() -> nn.Module:
    """From timm, which needs torchvision, without weights."""
    torchvision_module()
    return _made(_import("timm").create_model("densenet121", pretrained=False))


def monai_densenet121() -> nn.Module:
    """From MONAI, for flat images with three channels."""
    nets = _import("monai.networks.nets")
    return _made(nets.DenseNet121(spatial_dims=2, in_channels=3, out_channels=1000))


def _import(name: str) -> ModuleType:
    """Import, leaving warnings that a package raises meanwhile to itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


def _made(model: Any) -> nn.Module:
    assert isinstance(model, nn.Module)
    return model
