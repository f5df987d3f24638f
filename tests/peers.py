"""The real packages that densely is held against: torchvision, timm, MONAI and Keras.

Each function gives the module, or skips the test with the reason. Warnings that a package itself
raises while it is imported are its own concern.
"""

import importlib
import os
import warnings
from types import ModuleType

import pytest
import torch

# Kept for as long as the process runs: a library's operators go with it.
_declared: list[torch.library.Library] = []


def _import(name: str) -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


def torchvision() -> ModuleType:
    """`torchvision`, also where its compiled operators do not fit the torch at hand.

    Its models are plain PyTorch. Beside a CPU build of torch the compiled part of the PyPI wheel
    cannot be loaded, and the import fails for want of two operators: so they are declared first.
    """
    try:
        return _import("torchvision")
    except ModuleNotFoundError:
        pytest.skip("torchvision is not installed")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)
    return _import("torchvision")


def timm() -> ModuleType:
    """`timm`, which needs torchvision."""
    torchvision()
    try:
        return _import("timm")
    except ModuleNotFoundError:
        pytest.skip("timm is not installed")


def monai_networks() -> ModuleType:
    """`monai.networks.nets`."""
    try:
        return _import("monai.networks.nets")
    except ModuleNotFoundError:
        pytest.skip("MONAI is not installed")


def keras() -> ModuleType:
    """`keras` on its torch backend, on the CPU."""
    os.environ.setdefault("KERAS_BACKEND", "torch")
    try:
        module = _import("keras")
    except ModuleNotFoundError:
        pytest.skip("Keras is not installed")
    if module.backend.backend() != "torch":
        pytest.skip("Keras runs on another backend than torch")
    return module
