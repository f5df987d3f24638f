"""The packages themselves, where they are installed: the other side of `convert --check`."""

import os
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from densely.weights.architecture import Architecture
from densely.weights.files import read_weights


def package_logits(package: str, net: Architecture, path: Path, x: Tensor) -> Tensor | str:
    """Logits of `x` from a package's own network with the weights of `path`, read by itself.

    Args:
        package: "torchvision", "timm", "monai" or "keras".
        net: the network.
        path: the file, in the package's dialect.
        x: images [N, C, ...], float32.

    Returns:
        float64 [N, num_classes]; or, where that cannot be, the reason.
    """
    if package not in (*_MODELS, "keras"):
        return "it is not installed as a package"
    if reason := _misfit(package, net):
        return reason
    try:
        if package == "keras":
            return _keras(net, path, x)
        model = _MODELS[package](net)
    except ImportError as error:
        return f"not installed here ({error})"
    except RuntimeError as error:  # torchvision beside a torch that it was not compiled for
        if "torchvision::" not in str(error):
            raise
        return f"cannot be imported here ({error})"
    model.load_state_dict(read_weights(path).tensors)
    with torch.no_grad():
        return model.eval().double()(x.double())  # type: ignore[no-any-return]


def _misfit(package: str, net: Architecture) -> str | None:
    """Why a package has no such network."""
    if net.bias or net.bn_size is None or net.num_classes == 0 or net.compression != 0.5:
        return "it has no such network"
    if net.spatial_dims != 2 and package != "monai":
        return f"it has no {net.spatial_dims}-dimensional network"
    if net.stem != "large" and not (package == "timm" and net.stem == "deep"):
        return f"it has no {net.stem} stem"
    if package == "torchvision" and net.in_channels != 3:
        return "its stem takes 3 channels only"
    if package == "timm" and net.num_init_features != 2 * net.growth_rate:
        return "its stem makes twice the growth rate"
    if package == "keras" and net.name not in _KERAS_MODELS:
        return f"it has {', '.join(_KERAS_MODELS.values())} only"
    return None


def _torchvision(net: Architecture) -> nn.Module:
    make: Any = import_module("torchvision.models").DenseNet
    return make(  # type: ignore[no-any-return]
        net.growth_rate,
        net.block_config,
        net.num_init_features,
        net.bn_size,
        num_classes=net.num_classes,
    )


def _timm(net: Architecture) -> nn.Module:
    make: Any = import_module("timm.models.densenet").DenseNet
    return make(  # type: ignore[no-any-return]
        net.growth_rate,
        net.block_config,
        num_classes=net.num_classes,
        in_chans=net.in_channels,
        bn_size=net.bn_size,
        stem_type="deep" if net.stem == "deep" else "",
    )


def _monai(net: Architecture) -> nn.Module:
    make: Any = import_module("monai.networks.nets").DenseNet
    return make(  # type: ignore[no-any-return]
        net.spatial_dims,
        net.in_channels,
        net.num_classes,
        net.num_init_features,
        net.growth_rate,
        net.block_config,
        net.bn_size,
    )


_KERAS_MODELS = {
    "densenet121": "DenseNet121",
    "densenet169": "DenseNet169",
    "densenet201": "DenseNet201",
}
_MODELS = {"torchvision": _torchvision, "timm": _timm, "monai": _monai}


def _keras(net: Architecture, path: Path, x: Tensor) -> Tensor:
    os.environ.setdefault("KERAS_BACKEND", "torch")  # read once, when Keras is imported
    keras: Any = import_module("keras")
    images = x.movedim(1, -1)
    make = getattr(keras.applications, _KERAS_MODELS[net.name or ""])
    model = make(
        weights=None,
        input_shape=tuple(images.shape[1:]),
        classes=net.num_classes,
        classifier_activation=None,
    )
    model.load_weights(str(path))
    logits = model(images.numpy(), training=False)
    return torch.as_tensor(keras.ops.convert_to_numpy(logits)).double()
