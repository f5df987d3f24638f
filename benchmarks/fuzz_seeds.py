"""Valid files of weights of every format and dialect, for `fuzz_weights.py` to damage."""

import importlib
import io
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from densely import DenseNet, FCDenseNet
from densely.models.densenet import Stem
from densely.weights import save_weights
from densely.weights.files import read_weights

#: Dialects that have names for each stem.
DIALECTS: dict[Stem, tuple[str, ...]] = {
    "large": ("densely", "torchvision_legacy", "monai", "efficient"),
    "small": ("andreasveit", "bamos", "densely"),
}


@dataclass(frozen=True)
class Seed:
    """A valid file.

    Args:
        name: dialect and format.
        target: the model that it fits: "large", "small", "fc".
        kind: "safetensors", "zip", "legacy", "h5", or "weights.h5".
        suffix: of the file's name.
        data: the file's bytes.
        tensors: what it holds, where that is a dictionary of tensors of PyTorch's and no more.
    """

    name: str
    target: str
    kind: str
    suffix: str
    data: bytes
    tensors: dict[str, Tensor]


def models() -> dict[str, nn.Module]:
    """The networks that files are loaded into, one for each kind of file."""
    torch.manual_seed(0)
    return {
        "large": _densenet("large", 4),
        "small": _densenet("small", None),
        "fc": FCDenseNet(
            growth_rate=2,
            down_blocks=(1, 1),
            bottleneck_layers=1,
            up_blocks=(1, 1),
            num_init_features=4,
            num_classes=3,
        ).eval(),
    }


def _densenet(stem: Stem, bn_size: int | None) -> nn.Module:
    return DenseNet(
        growth_rate=4,
        block_config=(2, 1, 1),
        num_init_features=8,
        bn_size=bn_size or 2,
        stem=stem,
        num_classes=5,
    ).eval()


def seeds(folder: Path) -> list[Seed]:
    """Write each valid file once below `folder`, from other weights than `models` has."""
    torch.manual_seed(1)
    networks = {
        "large": _densenet("large", 4),
        "small": _densenet("small", None),
        "fc": models()["fc"],
    }
    for network in networks.values():
        for value in network.state_dict().values():
            value.copy_(torch.rand(value.shape) if value.is_floating_point() else value + 7)
    made: list[Seed] = []

    def add(name: str, target: str, kind: str, suffix: str, write: Callable[[Path], None]) -> None:
        path = folder / f"seed{suffix}"
        write(path)
        plain = name.split()[0] not in ("keras", "checkpoint", "whole")
        tensors = read_weights(path).tensors if plain else {}
        made.append(Seed(name, target, kind, suffix, path.read_bytes(), tensors))

    for stem, dialects in DIALECTS.items():
        for to in dialects:
            write = partial(_save, networks[stem], to)
            add(f"{to} safetensors", stem, "safetensors", ".safetensors", write)
            add(f"{to} zip", stem, "zip", ".pth", write)
    large = networks["large"]
    add("keras h5", "large", "h5", ".h5", partial(_save, large, "keras"))
    add("keras 3", "large", "weights.h5", ".weights.h5", partial(_save, large, "keras"))
    state = large.state_dict()
    wrapped = {
        "epoch": 3,
        "state_dict": {f"module.{key}": value for key, value in state.items()},
        "optimizer": {"state": {0: {"step": 1}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
    }
    for kind in ("zip", "legacy"):
        add(f"checkpoint {kind}", "large", kind, ".tar", partial(_pickle, wrapped, kind))
        add(f"whole model {kind}", "large", kind, ".pth", partial(_save_whole, large, kind))
    add("densely legacy", "large", "legacy", ".pth", partial(_pickle, state, "legacy"))
    fc = networks["fc"]
    add("fc safetensors", "fc", "safetensors", ".safetensors", partial(_save, fc, "densely"))
    add("fc zip", "fc", "zip", ".pth", partial(_save, fc, "densely"))
    return made


def _save(model: nn.Module, dialect: str, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what a format does not keep
        save_weights(model, path, dialect)


def _pickle(thing: object, kind: str, path: Path) -> None:
    path.write_bytes(torch_bytes(thing, kind))


def torch_bytes(thing: object, kind: str) -> bytes:
    """What `torch.save` makes of it: "zip" or "legacy"."""
    stream = io.BytesIO()
    torch.save(thing, stream, _use_new_zipfile_serialization=kind == "zip")
    return stream.getvalue()


def _save_whole(model: nn.Module, kind: str, path: Path) -> None:
    with _torchvision_classes() as make, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the source code of `_Whole`, which is not found
        _pickle(_as_torchvision(model, make), kind, path)


def _as_torchvision(model: nn.Module, make: Callable[[], nn.Module]) -> nn.Module:
    """The same modules under classes that pickles name as torchvision's, or torch's own."""
    module = type(model).__module__
    same = make() if module.startswith("densely.") else model.__class__.__new__(model.__class__)
    same.__dict__.update(model.__dict__)
    same._modules = {
        name: None if child is None else _as_torchvision(child, make)
        for name, child in model._modules.items()
    }
    for name in [key for key, value in same.__dict__.items() if "densely" in repr(type(value))]:
        del same.__dict__[name]
    return same


@contextmanager
def _torchvision_classes() -> Iterator[Callable[[], nn.Module]]:
    """Let `DenseNet` be pickled as torchvision's, whether that is installed or not."""
    name = "torchvision.models.densenet"
    fake: Any = types.ModuleType(name)
    source = importlib.import_module(__name__)
    fake.DenseNet = source._Whole
    names = ("torchvision", "torchvision.models", name)
    before = {key: sys.modules.get(key) for key in names}
    try:
        sys.modules.update(dict.fromkeys(names, fake))
        yield fake.DenseNet
    finally:
        for key, module in before.items():
            sys.modules.pop(key)
            if module is not None:
                sys.modules[key] = module


class _Whole(nn.Module):
    """Pickled under torchvision's name."""


_Whole.__module__ = "torchvision.models.densenet"
_Whole.__qualname__ = _Whole.__name__ = "DenseNet"
