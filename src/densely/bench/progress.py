"""What a person sees while a benchmark runs: a bar on a terminal, else a line a stage.

On standard error, so that standard output holds the tables alone.
"""

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar


class Progress:
    """Stages of known length, made of turns; to be used as a context."""

    def __init__(self) -> None:
        self._bar: Bar | None = None
        if sys.stderr.isatty():
            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[turn]}"),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task("", total=None, turn="")

    def __enter__(self) -> "Progress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()

    def stage(self, title: str, turns: int) -> None:
        """Begin a stage."""
        if self._bar:
            self._bar.reset(self._task, total=turns, description=title, turn="")
            self._done = -1
        else:
            print(title, file=sys.stderr, flush=True)

    def turn(self, name: str) -> None:
        """Begin a turn of the stage."""
        if self._bar:
            self._done += 1
            self._bar.update(self._task, completed=self._done, turn=name)
