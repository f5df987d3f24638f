"""What a run starts from: a network with fresh weights, published ones, or those of a file."""

import dataclasses

from torch import nn

from densely.data import ImageSet, Preprocessing
from densely.errors import ConfigError
from densely.models.registry import preset
from densely.training.checkpoint import ModelInfo
from densely.training.config import TrainConfig
from densely.weights.create import published, start_model
from densely.weights.load import LoadReport
from densely.weights.pretrained import Pretrained


def check_start(config: TrainConfig) -> None:
    """Refuse what cannot be trained, before any data are read.

    Raises:
        ConfigError: an unknown network or unknown weights, or a network for another task.
    """
    task = preset(config.model).task
    if task != "classification":
        raise ConfigError(f"model={config.model}: is made for {task}, and train classifies images")
    if config.weights:
        published(config.model, config.weights)


def begin(
    config: TrainConfig, train_set: ImageSet
) -> tuple[ModelInfo, nn.Module, LoadReport | None]:
    """Make the network that `config` asks for; say what it is, and what weights it began with.

    Raises:
        DenselyError: images too small for it; weights that are missing, damaged or do not fit.
    """
    entry = published(config.model, config.weights) if config.weights else None
    preprocessing = _preprocessing(config, train_set, entry)
    info = ModelInfo(config.model, train_set.classes, preprocessing)
    if config.weights is None:
        return info, info.build(), None
    start = start_model(
        config.model,
        config.weights,
        num_classes=len(train_set.classes),
        in_channels=preprocessing.channels,
        image_size=preprocessing.image_size,
    )
    return dataclasses.replace(info, options=dict(start.options)), start.model, start.report


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
