"""What a DenseNet is, in code that reads like the paper."""

from densely.models.densenet import DenseBlock, DenseLayer, DenseNet, Transition
from densely.models.registry import create_model, model_names

__all__ = ["DenseBlock", "DenseLayer", "DenseNet", "Transition", "create_model", "model_names"]
