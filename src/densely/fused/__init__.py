"""The exact fused dense block, and `accelerate`, which puts it into anybody's DenseNet."""

from densely.fused.accelerate import accelerate, report, restore
from densely.fused.report import Acceleration

__all__ = ["Acceleration", "accelerate", "report", "restore"]
