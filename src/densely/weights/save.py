"""Weights written under the names of any dialect."""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from densely.errors import WeightsError
from densely.models.densenet import norm_eps
from densely.weights.dialects import Place, named_dialect
from densely.weights.files import write_weights
from densely.weights.keras_h5 import write_keras
from densely.weights.translate import EPS_KEY, assign, state_of


def save_weights(model: nn.Module, path: str | os.PathLike[str], dialect: str = "densely") -> None:
    """Write a model's weights as a package calls them.

    Args:
        model: a DenseNet of densely, torchvision, timm or MONAI.
        path: what to write shows in its ending: .safetensors (preferred), .pth, .pt, .tar, .bin;
            .weights.h5 or .h5 for Keras.
        dialect: "densely" (torchvision's names), "timm", "torchvision_legacy", "monai", "keras",
            "efficient", "andreasveit", "bamos".

    Raises:
        ConfigError: an unknown dialect.
        WeightsError: the dialect has no name for a part of this network, or the file cannot be
            written. What was there before stays.
    """
    state = state_of(model)
    found = assign(state)
    whole = found is not None and not found.others
    if not whole and dialect not in ("densely", "torchvision"):
        raise WeightsError(f"{type(model).__name__}: no DenseNet: {dialect} has no such network")
    if found is None:
        write_weights(Path(path), state)
        return
    epsilons = norm_eps(model)
    told = ", ".join(f"{value:g}" for value in sorted(epsilons))
    usual = named_dialect(dialect).norm_eps
    kept = Path(path).suffix == ".safetensors" and len(epsilons) == 1
    if not kept and any(abs(value - usual) > 0.01 * usual for value in epsilons):
        warnings.warn(
            f"{path}: epsilon of the norms ({told}) is not kept there; a safetensors file of "
            "densely's keeps it where all norms have the same",
            stacklevel=2,
        )
    eps = epsilons.pop() if len(epsilons) == 1 else None
    if whole:
        weights = {place: state[key] for place, key in found.places.items()}
        write_dialect(Path(path), weights, dialect, eps=eps)
    else:
        write_weights(Path(path), state, _metadata(eps, usual))


def write_dialect(
    path: Path, weights: Mapping[Place, Tensor], dialect: str, *, eps: float | None
) -> None:
    """Write weights by place; see `save_weights`.

    Args:
        path: the file.
        weights: in PyTorch's layout.
        dialect: whose names.
        eps: epsilon of the norms, kept in a safetensors file where it is not PyTorch's usual.

    Raises:
        ConfigError: an unknown dialect.
        WeightsError: as `save_weights`.
    """
    target = named_dialect(dialect)
    named: dict[str, Tensor] = {}
    homeless = []
    for place, value in weights.items():
        key = target.name_of(place)
        if key is not None:
            named[key] = target.from_torch(place, value.detach())
        elif not place.is_count:
            homeless.append(f"{place.kind} {place.part}.{place.variable}")
    if homeless:
        raise WeightsError(
            f"{path}: {target.name} has no name for {', '.join(dict.fromkeys(homeless))}: "
            "this network is none of its kind"
        )
    if target.is_keras:
        write_keras(path, named)
        return
    write_weights(path, named, _metadata(eps, target.norm_eps))


def _metadata(eps: float | None, usual: float) -> dict[str, str] | None:
    return None if eps is None or eps == usual else {EPS_KEY: repr(eps)}
