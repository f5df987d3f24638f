"""A run directory: all that one training run leaves behind; no other run ever writes into it.

runs/NAME-NNN/config.yaml          the resolved configuration
              env.json             versions, hardware, command
              metrics.csv          a row an epoch, written as it goes
              curves.png           the curves of metrics.csv
              checkpoints/last/    to go on from
              checkpoints/best/    the best by the validation split, where there is one
              README.md            the model card
"""

import contextlib
import csv
import io
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

from densely.environment import environment
from densely.errors import DenselyError, RunError
from densely.runtime import Runtime
from densely.training.checkpoint import find_checkpoint
from densely.training.config import TrainConfig, read_yaml
from densely.whole_file import write_whole


@dataclass(frozen=True)
class EpochMetrics:
    """A row of `metrics.csv`; epochs count from 1, losses are in nats.

    The learning rate is that of the epoch's last step. Training figures are means over the epoch,
    as the weights were while it went on. Examples/s counts the training pass as a whole, loading
    and resizing included; `epoch_s` counts evaluation as well. The test split is looked at only
    where no validation split is; neither is after epochs that are not evaluated.
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


def held_out_split(rows: Sequence[EpochMetrics]) -> Literal["validation", "test"]:
    """The split that the epochs of a run were judged on, where they were."""
    return "validation" if any(row.validation_loss is not None for row in rows) else "test"


class RunDirectory:
    """Paths and files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last = path / "checkpoints" / "last"
        self.best = path / "checkpoints" / "best"
        self.metrics_file = path / "metrics.csv"
        self.curves_file = path / "curves.png"
        self.card_file = path / "README.md"
        self._lock: int | None = None

    @classmethod
    def create(cls, config: TrainConfig, runtime: Runtime) -> "RunDirectory":
        """Make the next free `OUTPUT/NAME-NNN` and write what is known at the start.

        Raises:
            RunError: the folder cannot be made.
        """
        run = cls(numbered_folder(Path(config.output), config.run_name))
        try:
            run.write_config(config)
            run.write_environment(runtime)
        except OSError as error:
            raise _not_written(Path(config.output), error) from error
        return run

    @classmethod
    def open(cls, path: Path) -> "RunDirectory":
        """Take an existing run.

        Raises:
            RunError: there is none at `path`.
        """
        if not (path / "config.yaml").is_file():
            raise RunError(f"{path}: no run directory (it has no config.yaml)")
        if (path / "runs").is_dir() and not (path / "checkpoints").is_dir():
            raise RunError(
                f"{path}: a comparison; its runs are in {path / 'runs'}, and it goes on with "
                "densely compare --resume"
            )
        return cls(path)

    def config(self) -> TrainConfig:
        """Read the resolved configuration.

        Raises:
            RunError: `config.yaml` is damaged.
        """
        path = self.path / "config.yaml"
        try:
            values = read_yaml(path)
        except DenselyError as error:  # which names the file
            raise RunError(str(error)) from error
        try:
            config = TrainConfig.from_values(values)
        except DenselyError as error:
            raise RunError(f"{path}: {error}") from error
        # Fields that came after runs had been written; these had the default.
        late = {"augment", "evaluate_every", "options"}
        if missing := [f.name for f in fields(config) if f.name not in {*values, *late}]:
            raise RunError(f"{path}: damaged: {', '.join(missing)} missing")
        return config

    def write_config(self, config: TrainConfig) -> None:
        """Write `config.yaml`, the old one standing until the new one is whole."""
        write_whole(self.path / "config.yaml", config.to_yaml())

    def lock(self) -> None:
        """Keep other processes from training this run, until this one ends.

        Raises:
            RunError: another process is at it.
        """
        if sys.platform == "win32":  # which cannot lock a folder
            return
        import fcntl

        self._lock = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.unlock()
            raise RunError(f"{self.path}: another process is training this run") from error

    def unlock(self) -> None:
        """Let other processes train this run."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def weights(self) -> Path:
        """Checkpoint to use: the best one where a validation split chose it, else the last."""
        return self.best if find_checkpoint(self.best) else self.last

    def write_environment(self, runtime: Runtime) -> None:
        """Write `env.json`."""
        write_whole(self.path / "env.json", json.dumps(environment(runtime), indent=2) + "\n")

    def precision(self) -> str:
        """What the run was last trained in, as `env.json` says.

        Raises:
            RunError: the file is missing or damaged.
        """
        path = self.path / "env.json"
        try:
            return str(json.loads(path.read_text(encoding="utf-8"))["precision"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path}: missing or damaged: {error}") from error

    def append(self, row: EpochMetrics) -> None:
        """Add a row to `metrics.csv`, whole or not at all; it is on disk when this returns."""
        size = self.metrics_file.stat().st_size if self.metrics_file.exists() else 0
        try:
            with self.metrics_file.open("a", newline="", encoding="utf-8") as file:
                file.write(_csv([row], header=size == 0))
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(self.metrics_file, size)
            raise

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
        """Drop rows of epochs after the first `epochs`, of which the checkpoint knows nothing.

        Raises:
            RunError: rows of earlier epochs are missing.
        """
        rows = self.rows()
        if [row.epoch for row in rows[:epochs]] != list(range(1, epochs + 1)):
            raise RunError(f"{self.metrics_file}: damaged: it lacks rows of epochs 1 to {epochs}")
        text = _csv(rows[:epochs], header=True)
        # Also where it lacks its last end of line, as editors may leave it.
        if self.metrics_file.exists() and self.metrics_file.read_text(encoding="utf-8") != text:
            write_whole(self.metrics_file, text)

    def replace_last(self, row: EpochMetrics) -> None:
        """Write the last row of `metrics.csv` anew, the old one standing until it is whole."""
        write_whole(self.metrics_file, _csv([*self.rows()[:-1], row], header=True))


def numbered_folder(output: Path, name: str) -> Path:
    """Make the next free `OUTPUT/NAME-NNN`, one beyond the highest number there.

    Raises:
        RunError: it cannot be made.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        pattern = re.compile(re.escape(name) + r"-(\d+)")
        taken = [int(m[1]) for entry in output.iterdir() if (m := pattern.fullmatch(entry.name))]
        number = max(taken, default=0) + 1
        while True:
            path = output / f"{name}-{number:03d}"
            try:
                path.mkdir()
                return path
            except FileExistsError:  # another run, started at the same moment
                number += 1
    except OSError as error:
        raise _not_written(output, error) from error


def _not_written(output: Path, error: OSError) -> RunError:
    return RunError(f"--output {output}: cannot be written: {error.strerror}")


def _csv(rows: Sequence[EpochMetrics], *, header: bool) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(
        text, [field.name for field in fields(EpochMetrics)], lineterminator="\n"
    )
    if header:
        writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()
