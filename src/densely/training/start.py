"""What a run starts from: a network with fresh weights, published ones, or those of a file."""

import dataclasses
from pathlib import Path

from torch import nn

from densely.data import ImageSet, Preprocessing
from densely.errors import ConfigError
from densely.models.registry import preset
from densely.training.checkpoint import ModelInfo
from densely.training.config import TrainConfig
from densely.weights.create import published, starting_options
from densely.weights.load import load_weights
from densely.weights.pretrained import Pretrained, fetch


def check_start(config: TrainConfig) -> None:
    """Refuse what cannot be trained, before any data are read.

    Raises:
        ConfigError: an unknown network or unknown weights, or a network for another task.
    """
    task = preset(config.model).task
    if task != "classification":
        raise ConfigError(f"model={config.model}: is made for {task}, and train classifies images")
    _published(config)


def begin(config: TrainConfig, train_set: ImageSet) -> tuple[ModelInfo, nn.Module]:
    """Make the network that `config` asks for, and say what it is.

    Raises:
        DenselyError: images too small for it; weights that are missing, damaged or do not fit.
    """
    entry = _published(config)
    options = starting_options(config.model, config.weights) if config.weights else {}
    preprocessing = _preprocessing(config, train_set, entry)
    info = ModelInfo(config.model, train_set.classes, preprocessing, dict(options))
    model = info.build()
    if config.weights:
        path = fetch(entry) if entry else Path(config.weights)
        load_weights(model, path, head="auto", stem="adapt")
    return info, model


def _published(config: TrainConfig) -> Pretrained | None:
    return published(config.model, config.weights) if config.weights else None


def _preprocessing(
    config: TrainConfig, train_set: ImageSet, entry: Pretrained | None
) -> Preprocessing:
    size = config.image_size or train_set.images.shape[-1]
    channels = train_set.images.shape[1]
    if not config.normalize:
        return Preprocessing.identity(size, channels)
    if entry is None:
        return Preprocessing.standardizing(train_set, size)
    # The scale that the weights know; the whole picture is kept, as always in training here.
    known = entry.preprocessing.for_channels(channels)
    return dataclasses.replace(known, image_size=size, crop=None)
