"""A GPU that several processes share: while one measures, nobody else is on it."""

import fcntl
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path


class Turns:
    """Turns by a lock on a file that all of the processes name.

    Args:
        path: of the file; None for a process that has the GPU to itself.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path

    @property
    def shared(self) -> bool:
        """Whether there may be others."""
        return self._path is not None

    def among_others(self) -> AbstractContextManager[None]:
        """Where to compile, check, and make ready: nobody measures meanwhile."""
        return self._locked(fcntl.LOCK_SH)

    def alone(self) -> AbstractContextManager[None]:
        """Where to measure: begins once nobody is on the GPU. Not within `among_others`."""
        return self._locked(fcntl.LOCK_EX)

    @contextmanager
    def _locked(self, kind: int) -> Iterator[None]:
        if self._path is None:
            yield
            return
        with self._path.open("a") as file:
            fcntl.flock(file, kind)
            try:
                yield
            finally:  # closing it would not do where a forked process has it too
                fcntl.flock(file, fcntl.LOCK_UN)
