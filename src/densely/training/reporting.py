"""What a person, or a program, sees of a run while it goes on.

One interface, four voices: a progress bar on a terminal, plain lines when piped, JSON lines for
programs, and almost nothing when asked to be quiet.
"""

import json
import os
import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from densely.training.config import TrainConfig
from densely.training.run import EpochMetrics
from densely.training.scoring import Score
from densely.words import counted


@dataclass(frozen=True)
class RunFacts:
    """What is known when training begins."""

    run: Path
    config: TrainConfig
    parameters: int
    train_images: int
    validation_images: int
    test_images: int
    image_size: int
    device: str
    precision: str
    memory_format: str
    first_epoch: int


@dataclass(frozen=True)
class Summary:
    """How a run ended.

    `seconds` and `examples_per_s` count everything: reading, training, evaluation and saving.
    """

    run: Path
    epochs: int
    best_epoch: int
    test: Score
    seconds: float
    examples_per_s: float
    curves: Path


class Reporter:
    """The quiet voice: nothing but the run's folder at the end. The others build on it."""

    def __init__(self, out: TextIO | None = None) -> None:
        self.out = out or sys.stdout

    def note(self, text: str) -> None:
        """Say something in passing."""

    def started(self, facts: RunFacts) -> None:
        """Training begins."""

    def step(self, epoch: int, done: int, total: int, loss: float, accuracy: float) -> None:
        """`done` of `total` steps of an epoch are done; called a few times a second."""

    def epoch(self, row: EpochMetrics) -> None:
        """An epoch is over."""

    def stopped(self) -> None:
        """Training ends before its time."""

    def finished(self, summary: Summary) -> None:
        """The run is over."""
        self.say(str(summary.run))

    def say(self, line: str) -> None:
        """Print a line at once; if whoever read has gone, as `head` does, say no more."""
        try:
            print(line, file=self.out, flush=True)
        except BrokenPipeError:  # the stream itself, which is flushed once more at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.out.fileno())


class JsonReporter(Reporter):
    """A JSON object a line: a `note` for each, `start`, one `epoch` for each, `end`."""

    def note(self, text: str) -> None:
        """Say something in passing."""
        self._event("note", {"text": text})

    def started(self, facts: RunFacts) -> None:
        """Training begins."""
        self._event("start", asdict(facts))

    def epoch(self, row: EpochMetrics) -> None:
        """An epoch is over."""
        self._event("epoch", asdict(row))

    def finished(self, summary: Summary) -> None:
        """The run is over."""
        self._event("end", asdict(summary))

    def _event(self, name: str, values: dict[str, object]) -> None:
        self.say(json.dumps({"event": name} | values, default=str))


class PlainReporter(Reporter):
    """Lines for people, without a bar."""

    def note(self, text: str) -> None:
        """Say something in passing."""
        self.say(text)

    def started(self, facts: RunFacts) -> None:
        """Training begins."""
        config = facts.config
        self.say(
            f"{config.model} ({facts.parameters:,} parameters) on {config.data}, images of "
            f"{facts.image_size}x{facts.image_size}"
        )
        self.say(
            f"{counted(config.epochs, 'epoch')}, batch {config.batch_size}, lr {config.lr:g} "
            f"({config.schedule}); {facts.device}, {facts.precision}, {facts.memory_format}"
        )
        if facts.first_epoch:
            self.say(f"going on in epoch {facts.first_epoch + 1}")
        self.say(f"run directory: {facts.run}")

    def epoch(self, row: EpochMetrics) -> None:
        """An epoch is over."""
        held_out = "".join(
            f"{name} acc {accuracy:.4f}  "
            for name, accuracy in (
                ("validation", row.validation_accuracy),
                ("test", row.test_accuracy),
            )
            if accuracy is not None
        )
        self.say(
            f"epoch {row.epoch:3d}  train loss {row.train_loss:.4f}  "
            f"train acc {row.train_accuracy:.4f}  {held_out}{row.examples_per_s:,.0f} examples/s"
        )

    def finished(self, summary: Summary) -> None:
        """The run is over."""
        self.say(
            f"test accuracy {summary.test.accuracy:.4f}, loss {summary.test.loss:.4f} "
            f"(weights of epoch {summary.best_epoch} of {summary.epochs}); "
            f"{summary.seconds:.0f} s, {summary.examples_per_s:,.0f} examples/s everything included"
        )
        self.say(f"curves:    {summary.curves}")
        self.say(f"use it:    densely predict {shlex.quote(str(summary.run))} IMAGE...")


class BarReporter(PlainReporter):
    """Lines for people, and a bar for the epoch under way."""

    def __init__(self) -> None:
        super().__init__()
        self._console = Console()
        self._bar: Progress | None = None

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def step(self, epoch: int, done: int, total: int, loss: float, accuracy: float) -> None:
        """Move the bar."""
        if self._bar is None:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._bar.start()
            self._bar.add_task("", total=total)
        self._bar.update(
            self._bar.task_ids[0],
            description=f"epoch {epoch:3d}  loss {loss:.3f}  acc {accuracy:.3f}",
            completed=done,
            total=total,
        )

    def epoch(self, row: EpochMetrics) -> None:
        """An epoch is over."""
        self.stopped()
        super().epoch(row)

    def stopped(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
