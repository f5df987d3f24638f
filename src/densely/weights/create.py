"""`create_model`: a network by its name, fresh or with published or saved weights."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Unpack, cast

from torch import nn

from densely.data.preprocessing import Preprocessing
from densely.errors import ConfigError
from densely.models import DenseNet
from densely.models.registry import ModelOptions, build_model, preset
from densely.weights.architecture import architecture
from densely.weights.load import Head, LoadReport, StemFit, load_by_name, load_translated
from densely.weights.pretrained import PRETRAINED, Pretrained, fetch, find_pretrained
from densely.weights.translate import contents_of, translate


class Start(NamedTuple):
    """A network with weights, and what came with them.

    Args:
        model: the network.
        options: arguments of the network that the weights decided, for building it again.
        report: what was loaded.
        preprocessing: of the images that published weights want; None for others.
    """

    model: nn.Module
    options: ModelOptions
    report: LoadReport
    preprocessing: Preprocessing | None


def create_model(
    name: str,
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    in_channels: int | None = None,
    image_size: int | None = None,
    **options: Unpack[ModelOptions],
) -> nn.Module:
    """Make a network by its name.

    Args:
        name: such as "d2l", "densenet121" or "densenet_bc_100_12"; see `list_models()`.
        weights: None for fresh ones; the tag of published ones, such as "imagenet" (see
            `densely.weights.PRETRAINED`), or a file of weights of any dialect. With another
            number of classes the head is fresh; with other channels the stem is adapted so that
            it keeps its response (`densely.weights.adapt_stem`).
        num_classes: outputs, 0 for the pooled features; None for what the weights or the
            published network have.
        in_channels: channels of the images, 1 for grey; None likewise.
        image_size: side of the images in pixels, if known: up to 64 the ImageNet networks get
            the small stem (3x3, no pooling) unless the weights have another or `stem` says so,
            and images that would shrink to nothing are refused here.
        options: anything else that `DenseNet` takes.

    Returns:
        The network in train mode. With weights, its `load_report` says what was loaded; with
        published ones, its `preprocessing` says what images they want
        (`densely.data.Preprocessing`).

    Raises:
        ConfigError: an unknown name, tag or option (the nearest ones are named), or a value out
            of range.
        WeightsError: the weights are damaged or do not fit.
        DataError: published weights are not here and cannot be fetched.
    """
    sizes = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size}
    preset(name)  # an unknown name is told before anything is fetched
    if weights is None:
        return build_model(name, **sizes, **options)
    start = start_model(name, weights, **sizes, **options)
    start.model.load_report = start.report  # type: ignore[assignment]
    if start.preprocessing is not None:
        start.model.preprocessing = start.preprocessing  # type: ignore[assignment]
    return start.model


def start_model(
    name: str,
    weights: str | os.PathLike[str],
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
    image_size: int | None = None,
    **options: Unpack[ModelOptions],
) -> Start:
    """Make a network with weights, and say what they decided; see `create_model`."""
    entry = published(name, weights)
    path = Path(weights) if entry is None else fetch(entry)
    contents, where = contents_of(path)
    given: dict[str, Any] = {"num_classes": num_classes, "in_channels": in_channels}
    decided: dict[str, Any] = {}
    found = None
    if preset(name).network is DenseNet:
        found = translate(contents, where, "auto", None)
        net = architecture(found.weights, where)
        given = {key: getattr(net, key) if v is None else v for key, v in given.items()}
        if preset(name).stem_by_image_size:
            decided["stem"] = net.stem
        if found.norm_eps is not None:
            decided["norm_eps"] = found.norm_eps
    elif num_classes is None:
        heads = [v for k, v in contents.tensors.items() if k.endswith("classifier.bias")]
        given["num_classes"] = heads[0].numel() if len(heads) == 1 else None
    decided |= options
    model = build_model(name, image_size=image_size, **given, **decided)
    head: Head = "load" if num_classes is None else "auto"
    if found is None:
        report = load_by_name(model, contents, where, "auto", head=head)
    else:
        stem: StemFit = "strict" if in_channels is None else "adapt"
        report = load_translated(
            model, found, where, head=head, stem=stem, keep_eps="norm_eps" in options
        )
    preprocessing = None
    if entry is not None:
        preprocessing = entry.preprocessing.for_channels(given["in_channels"])
        if image_size is not None:
            preprocessing = dataclasses.replace(preprocessing, image_size=image_size)
    return Start(model, cast(ModelOptions, decided), report, preprocessing)


def published(name: str, weights: object) -> Pretrained | None:
    """The published weights that `weights` is the tag of; None where it is a file.

    Raises:
        ConfigError: it is neither.
    """
    if isinstance(weights, Mapping):
        raise ConfigError("weights: a state_dict: build the network, then load_weights(model, it)")
    if not isinstance(weights, str | os.PathLike):
        raise ConfigError(
            f"weights={weights!r}: expected the tag of published weights, such as 'imagenet', or a "
            "file"
        )
    if isinstance(weights, str) and weights in {one.tag for one in PRETRAINED}:
        return find_pretrained(name, weights)  # also where a folder or a file is called so
    if Path(weights).is_file():
        return None
    if Path(weights).is_dir():
        raise ConfigError(
            f"weights={weights}: is a folder; name a file of weights, of a run "
            "RUN/checkpoints/best/model.safetensors or RUN/checkpoints/last/model.safetensors"
        )
    if isinstance(weights, os.PathLike) or Path(weights).suffix or os.sep in weights:
        raise ConfigError(f"weights={weights}: there is no such file")
    return find_pretrained(name, weights)
