"""Dialects of DenseNet weights, read and written, and networks that start from them."""

from densely.weights.convert import Conversion, convert_weights
from densely.weights.create import create_model
from densely.weights.load import LoadReport, load_weights
from densely.weights.pretrained import PRETRAINED, Pretrained
from densely.weights.save import save_weights
from densely.weights.stem import adapt_stem

__all__ = [
    "PRETRAINED",
    "Conversion",
    "LoadReport",
    "Pretrained",
    "adapt_stem",
    "convert_weights",
    "create_model",
    "load_weights",
    "save_weights",
]
