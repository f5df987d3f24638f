"""The images of a run: made anew, and the same, whenever they are needed."""

import dataclasses

from densely.data import Splits, limited, load_data, with_validation
from densely.training.config import TrainConfig


def held_out_digest(splits: Splits) -> str:
    """Short name of the images that a run is judged by: validation, where there are any, and test.

    By the first the best epoch is chosen, among all of a run's.
    """
    parts = [splits.validation, splits.test]
    return " ".join(part.digest() for part in parts if part is not None)


def splits_of(
    config: TrainConfig, *, image_size: int | None = None, channels: int | None = None
) -> Splits:
    """Training, validation and test images of a run, as `config` parts them.

    Args:
        config: the run's.
        image_size: side in pixels for a folder's images; None for the config's.
        channels: 1 or 3 for a folder's images; None to follow its training images.
    """
    splits = load_data(
        config.data,
        data_dir=config.data_dir,
        image_size=image_size or config.image_size,
        channels=channels,
        split_seed=config.split_seed,
    )
    splits = with_validation(splits, config.validation, config.split_seed)
    return dataclasses.replace(splits, train=limited(splits.train, config.limit, config.split_seed))
