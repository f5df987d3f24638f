"""A run directory: all that one training run leaves behind, never overwritten.

runs/NAME-NNN/config.yaml          the resolved configuration
              env.json             versions, hardware, command
              metrics.csv          a row an epoch, written as it goes
              curves.png           the curves of metrics.csv
              checkpoints/last/    to go on from
              checkpoints/best/    the best by the validation split, where there is one
              README.md            the model card
"""

import csv
import json
import os
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from densely.environment import environment
from densely.errors import DenselyError, RunError
from densely.runtime import Runtime
from densely.training.config import TrainConfig, read_yaml


@dataclass(frozen=True)
class EpochMetrics:
    """A row of `metrics.csv`; epochs count from 1, losses are in nats.

    The learning rate is that of the epoch's last step. Training figures are means over the epoch,
    as the weights were while it went on. Examples/s counts the training pass as a whole, loading
    and resizing included; `epoch_s` counts evaluation as well. The test split is looked at each
    epoch only where no validation split is.
    """

    epoch: int
    lr: float
    train_loss: float
    train_accuracy: float
    validation_loss: float | None
    validation_accuracy: float | None
    test_loss: float | None
    test_accuracy: float | None
    examples_per_s: float
    epoch_s: float


class RunDirectory:
    """Paths and files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last = path / "checkpoints" / "last"
        self.best = path / "checkpoints" / "best"
        self.metrics_file = path / "metrics.csv"
        self.curves_file = path / "curves.png"
        self.card_file = path / "README.md"

    @classmethod
    def create(cls, config: TrainConfig, runtime: Runtime) -> "RunDirectory":
        """Make the next free `OUTPUT/NAME-NNN` and write what is known at the start.

        Raises:
            RunError: the folder cannot be made.
        """
        output = Path(config.output)
        try:
            output.mkdir(parents=True, exist_ok=True)
            pattern = re.compile(re.escape(config.run_name) + r"-(\d+)")
            taken = [
                int(m[1]) for entry in output.iterdir() if (m := pattern.fullmatch(entry.name))
            ]
            number = max(taken, default=0) + 1
            while True:
                path = output / f"{config.run_name}-{number:03d}"
                try:
                    path.mkdir()
                    break
                except FileExistsError:  # another run, started at the same moment
                    number += 1
            run = cls(path)
            (path / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
            run.write_environment(runtime)
        except OSError as error:
            raise RunError(f"--output {output}: cannot be written: {error.strerror}") from error
        return run

    @classmethod
    def open(cls, path: Path) -> "RunDirectory":
        """Take an existing run.

        Raises:
            RunError: there is none at `path`.
        """
        if not (path / "config.yaml").is_file():
            raise RunError(f"{path}: no run directory (it has no config.yaml)")
        return cls(path)

    def config(self) -> TrainConfig:
        """Read the resolved configuration.

        Raises:
            RunError: `config.yaml` is damaged.
        """
        try:
            return TrainConfig.from_values(read_yaml(self.path / "config.yaml"))
        except DenselyError as error:
            raise RunError(f"{self.path / 'config.yaml'}: {error}") from error

    def weights(self) -> Path:
        """Checkpoint to use: the best one where a validation split chose it, else the last."""
        return self.best if self.best.exists() else self.last

    def write_environment(self, runtime: Runtime) -> None:
        """Write `env.json`."""
        text = json.dumps(environment(runtime), indent=2)
        (self.path / "env.json").write_text(text + "\n", encoding="utf-8")

    def append(self, row: EpochMetrics) -> None:
        """Add a row to `metrics.csv`, on disk when this returns."""
        is_new = not self.metrics_file.exists()
        with self.metrics_file.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(EpochMetrics)])
            if is_new:
                writer.writeheader()
            writer.writerow(asdict(row))
            file.flush()
            os.fsync(file.fileno())

    def rows(self) -> list[EpochMetrics]:
        """Read `metrics.csv`; empty before the first epoch.

        Raises:
            RunError: the file is damaged.
        """
        if not self.metrics_file.exists():
            return []
        try:
            with self.metrics_file.open(newline="", encoding="utf-8") as file:
                return [
                    EpochMetrics(
                        epoch=int(row.pop("epoch")),
                        **{key: float(text) if text else None for key, text in row.items()},  # type: ignore[arg-type]
                    )
                    for row in csv.DictReader(file)
                ]
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise RunError(f"{self.metrics_file}: damaged: {error}") from error

    def keep_rows(self, epochs: int) -> None:
        """Drop rows of epochs after the first `epochs`, of which the checkpoint knows nothing."""
        rows = self.rows()
        if len(rows) > epochs:
            self.metrics_file.unlink()
            for row in rows[:epochs]:
                self.append(row)
