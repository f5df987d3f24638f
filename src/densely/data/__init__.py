"""Where images come from, and how they reach the device."""

from densely.data.dataset import ImageSet, Splits, limited
from densely.data.preprocessing import Preprocessing
from densely.data.sources import absolute, load_data, with_validation

__all__ = [
    "ImageSet",
    "Preprocessing",
    "Splits",
    "absolute",
    "limited",
    "load_data",
    "with_validation",
]
