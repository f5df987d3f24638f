"""What a run starts from: a network with fresh weights, published ones, or those of a file."""

import dataclasses
from typing import cast

from torch import nn

from densely.data import ImageSet, Preprocessing
from densely.errors import ConfigError, DenselyError, WeightsError
from densely.models.registry import ModelOptions, preset
from densely.training.checkpoint import ModelInfo
from densely.training.config import TrainConfig
from densely.weights.create import published, start_model
from densely.weights.load import LoadReport


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
        DenselyError: images too small for it; options that it does not take; weights that are
            missing, damaged or do not fit.
    """
    try:
        return _begin(config, train_set)
    except WeightsError as error:
        if not error.options:
            raise
        flags = " ".join(f"--options.{name} {value}" for name, value in error.options.items())
        raise WeightsError(f"{error}\n  here: {flags}", error.options) from error
    except DenselyError:
        raise
    except (TypeError, ValueError, AttributeError) as error:
        if not config.options:
            raise
        raise ConfigError(f"options={config.options}: {config.model}: {error}") from error


def _begin(
    config: TrainConfig, train_set: ImageSet
) -> tuple[ModelInfo, nn.Module, LoadReport | None]:
    size = config.image_size or train_set.images.shape[-1]
    channels = train_set.images.shape[1]
    start = None
    if config.weights is not None:
        start = start_model(
            config.model,
            config.weights,
            num_classes=len(train_set.classes),
            in_channels=channels,
            image_size=size,
            **cast(ModelOptions, config.options),
        )
    if not config.normalize:
        preprocessing = Preprocessing.identity(size, channels)
    elif start is not None and start.preprocessing is not None:
        # The scale that the weights know. The whole picture is kept, and fitted as folders are when
        # they are read: what predicts must see the same pixels as what learnt.
        preprocessing = dataclasses.replace(
            start.preprocessing, crop=None, interpolation="bilinear"
        )
    else:
        preprocessing = Preprocessing.standardizing(train_set, size)
    info = ModelInfo(config.model, train_set.classes, preprocessing, config.options)
    if start is None:
        return info, info.build(), None
    return dataclasses.replace(info, options=dict(start.options)), start.model, start.report
