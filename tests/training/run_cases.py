"""Small runs for the tests of training."""

import os
import signal
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from densely.training.config import TrainConfig
from densely.training.reporting import Reporter
from densely.training.run import EpochMetrics


def config(tmp_path: Path, **values: Any) -> TrainConfig:
    return TrainConfig.from_values(
        {"output": str(tmp_path / "runs"), "limit": 200, "epochs": 2} | values
    )


def weights(run: Path, which: str = "last") -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / which / "model.safetensors")


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


class StopAfter(Reporter):
    """Sends this process SIGTERM when an epoch is over."""

    def __init__(self, epoch: int) -> None:
        super().__init__()
        self.last = epoch

    def epoch(self, row: EpochMetrics) -> None:
        if row.epoch == self.last:
            os.kill(os.getpid(), signal.SIGTERM)


class StopAt(Reporter):
    """Sends this process a signal at a step of an epoch, as a person or a scheduler would."""

    def __init__(self, epoch: int, step: int, number: int = signal.SIGINT) -> None:
        super().__init__()
        self.at, self.number = (epoch, step), number

    def step(self, epoch: int, done: int, total: int, loss: float, accuracy: float) -> None:
        if (epoch, done) == self.at:
            os.kill(os.getpid(), self.number)
