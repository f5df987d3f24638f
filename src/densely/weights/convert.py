"""A file of weights into another dialect, and the proof that both are the same function."""

import math
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from densely.errors import WeightsError
from densely.models import DenseNet
from densely.weights.architecture import Architecture, architecture
from densely.weights.dialects import named_dialect
from densely.weights.explain import require_fit
from densely.weights.files import read_weights
from densely.weights.load import load_translated, load_weights
from densely.weights.packages import package_logits
from densely.weights.save import write_dialect
from densely.weights.translate import Translated, places_of, translate

#: Share of the largest logit that rounding in float32 and another epsilon may explain.
_TOLERANCE = 1e-3
_EPS_NOTE = "norms of {to} add {theirs:g} to the variance, those of the source {eps:g}"


@dataclass(frozen=True)
class Conversion:
    """What was converted, and how far the results are apart.

    Args:
        source, target: the files.
        dialect: of the source, as found.
        to: of the target.
        network: what the weights are of.
        tensors: how many there are.
        ignored: entries of the source that are no weights of the network.
        notes: what the two packages do differently.
        differences: largest absolute difference of logits, by what was held against the source;
            None, with the reason in its name, where that could not run. Empty without a check.
        scale: largest absolute logit, for comparison.
    """

    source: str
    target: str
    dialect: str
    to: str
    network: str
    tensors: int
    ignored: tuple[str, ...]
    notes: tuple[str, ...]
    differences: dict[str, float | None]
    scale: float


def convert_weights(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    to: str = "densely",
    dialect: str = "auto",
    prefix: str | None = None,
    check: bool = False,
) -> Conversion:
    """Write the weights of one dialect as another one.

    Args:
        source: a file of weights (safetensors, .pt, .pth, .tar, .h5) of any dialect.
        target: the file to write; its ending says the format, as `save_weights` has it.
        to: whose names it gets.
        dialect: whose names the source has; "auto" finds out.
        prefix: as `load_weights` has it.
        check: run both on the same input: the target read back by densely and, where the package
            of `to` is installed and has such a network, by that package itself.

    Raises:
        ConfigError: an unknown dialect.
        WeightsError: the source is damaged, incomplete or no DenseNet, `to` has no such network,
            or the check shows another function.
    """
    named_dialect(to)
    where = os.fspath(source)
    if Path(target).exists() and Path(source).exists() and Path(target).samefile(source):
        raise WeightsError(f"{where}: source and target are the same file; name another target")
    found = translate(read_weights(Path(source)), where, dialect, prefix)
    net = architecture(found.weights, where)
    _check_whole(found, net, where)
    eps, theirs_eps = found.norm_eps or found.dialect.norm_eps, named_dialect(to).norm_eps
    keeps_eps = to == "densely" and Path(target).suffix == ".safetensors"
    notes = list(found.notes)
    if eps != theirs_eps and not keeps_eps:
        notes.append(_EPS_NOTE.format(to=to, theirs=theirs_eps, eps=eps))
    differences: dict[str, float | None] = {}
    scale = 0.0
    if check:  # before anything takes the target's place
        with tempfile.TemporaryDirectory() as folder:
            trial = Path(folder) / Path(target).name
            try:
                write_dialect(trial, found.weights, to, eps=eps)
            except WeightsError as error:
                told = str(error).replace(os.fspath(trial), os.fspath(target))
                raise WeightsError(told) from error
            differences, scale = _differences(found, net, where, trial, to)
        for by, difference in differences.items():
            if difference is not None and not difference <= _TOLERANCE * scale:
                told = "".join(f"; {note}" for note in notes)
                raise WeightsError(
                    f"{os.fspath(target)}: was not written, as it would be another function: {by}, "
                    f"logits differ by {difference:g} of {scale:g}{told}"
                )
    write_dialect(Path(target), found.weights, to, eps=eps)
    return Conversion(
        where,
        os.fspath(target),
        found.dialect.name,
        to,
        net.name or f"DenseNet, growth rate {net.growth_rate}, blocks {net.block_config}",
        len(found.weights),
        found.ignored,
        tuple(notes),
        differences,
        scale,
    )


def _differences(
    found: Translated, net: Architecture, where: str, path: Path, to: str
) -> tuple[dict[str, float | None], float]:
    """How far logits of a file are from the source's, by who reads it, and the largest of these.

    None where a package cannot.
    """
    theirs, ours = net.build(), net.build()
    load_translated(theirs, found, where)
    x = _images(theirs)
    logits = _logits(theirs, x)
    scale = logits.abs().max().item()
    if not math.isfinite(scale):
        raise WeightsError(f"{where}: its network gives NaN or infinity: nothing can be checked")
    load_weights(ours, path)
    differences: dict[str, float | None] = {
        "densely reading it back": (_logits(ours, x) - logits).abs().max().item()
    }
    package = "torchvision" if to == "densely" else to
    told = package_logits(package, net, path, x)
    if isinstance(told, Tensor):
        differences[f"{package} itself"] = (told - logits).abs().max().item()
    else:
        differences[f"{package} itself: {told}"] = None
    return differences, scale


def _check_whole(found: Translated, net: Architecture, where: str) -> None:
    """Hold every tensor against the architecture, which is made without being allocated."""
    with torch.device("meta"):
        model = net.build()
    tensors = model.state_dict()
    places = places_of(tensors)
    assert places is not None
    wanted = {place: tensors[key] for place, key in places.items()}
    require_fit(found, found.weights, wanted, where, unexpected=tuple(found.unexpected))


def _images(model: DenseNet) -> Tensor:
    """Two random images of a size that suits the network and everybody's packages."""
    size = max(32, model.min_image_size)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, model.in_channels, *(size,) * model.spatial_dims, generator=generator)


def _logits(model: DenseNet, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval().double()(x.double())  # type: ignore[no-any-return]
