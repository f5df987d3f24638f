"""What a DenseNet is, in code that reads like the paper."""

from densely.models.densenet import DenseBlock, DenseLayer, DenseNet, Transition
from densely.models.fc_densenet import FCDenseNet
from densely.models.registry import ModelFacts, build_model, list_models, model_facts
from densely.models.resnet import ResNet

__all__ = [
    "DenseBlock",
    "DenseLayer",
    "DenseNet",
    "FCDenseNet",
    "ModelFacts",
    "ResNet",
    "Transition",
    "build_model",
    "list_models",
    "model_facts",
]
