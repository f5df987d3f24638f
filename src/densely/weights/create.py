"""`create_model`: a network by its name, fresh or with published or saved weights."""

import os
from pathlib import Path
from typing import Unpack

from torch import nn

from densely.errors import ConfigError
from densely.models.registry import ModelOptions, build_model, preset
from densely.weights.architecture import architecture
from densely.weights.dialects import candidates
from densely.weights.files import read_weights
from densely.weights.load import load_weights, translate
from densely.weights.pretrained import Pretrained, fetch, find_pretrained


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
        The network in train mode; with published weights its `preprocessing` attribute says what
        images they want (`densely.data.Preprocessing`).

    Raises:
        ConfigError: an unknown name, tag or option (the nearest ones are named), or a value out
            of range.
        WeightsError: the weights are damaged or do not fit.
        DataError: published weights are not here and cannot be fetched.
    """
    preset(name)  # an unknown name is told before anything is fetched
    if weights is None:
        return build_model(
            name,
            num_classes=num_classes,
            in_channels=in_channels,
            image_size=image_size,
            **options,
        )
    entry = published(name, weights)
    options = {**starting_options(name, weights), **options}
    if entry is None:
        model = build_model(
            name,
            num_classes=num_classes,
            in_channels=in_channels,
            image_size=image_size,
            **options,
        )
        load_weights(model, weights, head="auto", stem="adapt" if in_channels else "strict")
        return model
    classes = entry.num_classes if num_classes is None else num_classes
    channels = entry.preprocessing.channels if in_channels is None else in_channels
    model = build_model(
        name, num_classes=classes, in_channels=channels, image_size=image_size, **options
    )
    load_weights(model, fetch(entry), head="auto", stem="adapt")
    model.preprocessing = entry.preprocessing.for_channels(channels)  # type: ignore[assignment]
    return model


def starting_options(name: str, weights: str | os.PathLike[str]) -> ModelOptions:
    """What weights decide about a network beside its numbers: its stem, its norms' epsilon.

    Raises:
        ConfigError, WeightsError: as `create_model`.
    """
    if published(name, weights) is not None:
        return {"stem": "large"}
    contents = read_weights(Path(weights))
    if not preset(name).stem_by_image_size or not candidates(contents.tensors):
        return {}
    where = os.fspath(weights)
    found = translate(contents, where, "auto", None)
    options: ModelOptions = {"stem": architecture(found.weights, where).stem}
    if found.norm_eps is not None:
        options["norm_eps"] = found.norm_eps
    return options


def published(name: str, weights: str | os.PathLike[str]) -> Pretrained | None:
    """The published weights that `weights` is the tag of; None where it is a file.

    Raises:
        ConfigError: it is neither.
    """
    if isinstance(weights, os.PathLike) or Path(weights).is_file():
        return None
    try:
        return find_pretrained(name, weights)
    except ConfigError as error:
        if Path(weights).suffix or os.sep in weights:
            raise ConfigError(f"weights={weights}: there is no such file") from error
        raise
