"""Every error that densely raises on purpose.

    DenselyError            the base: catch this one to catch them all
    ├── ConfigError         a flag, a field or a name is wrong                  (exit 2)
    ├── DataError           data is missing, damaged or of the wrong kind       (exit 2)
    ├── RunError            a run directory is missing, damaged or unfit        (exit 2)
    ├── WeightsError        a file of weights is missing, damaged or does not fit   (exit 2)
    ├── ShapeError          a tensor does not fit the model                     (exit 2)
    ├── TrainingError       training itself went wrong                          (exit 1)
    │   └── Diverged        the loss is no number any more
    └── Stopped             the user or the system ended it      (exit 130, 143 or 129)

A message says what was given, what is allowed and what to do, in one or two lines: it is
printed as it is, without a traceback.
"""

import difflib
from collections.abc import Iterable, Mapping


class DenselyError(Exception):
    """Base of all errors of this package; `exit_code` is what the command line returns."""

    exit_code = 2


class ConfigError(DenselyError, ValueError):
    """A flag, a configuration field or a name is wrong."""


class DataError(DenselyError):
    """Data is missing, damaged or of the wrong kind."""


class RunError(DenselyError):
    """A run directory is missing, damaged or unfit for what was asked."""


class WeightsError(DenselyError):
    """A file of weights is missing, damaged, unsafe, or does not fit the model.

    Args:
        message: for people.
        options: arguments of the network that the weights ask for, as far as they are known.
    """

    def __init__(self, message: str, options: Mapping[str, object] | None = None) -> None:
        super().__init__(message)
        self.options = dict(options or {})


class ShapeError(DenselyError, ValueError):
    """A tensor has a shape that the model cannot take."""


class TrainingError(DenselyError):
    """Training itself failed."""

    exit_code = 1


class Diverged(TrainingError):
    """The loss became infinite or NaN; it would again, from where the run was saved."""


class Stopped(DenselyError):
    """Ctrl-C (exit code 130), SIGTERM (143) or SIGHUP (129) ended the work, after saving."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """Say that `name` is no known `kind`, with the nearest known names first."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if near:
        return f"unknown {kind} '{name}'; did you mean {' or '.join(near)}?"
    return f"unknown {kind} '{name}'; known: {', '.join(names)}"


def first_line(error: BaseException) -> str:
    """The first line of what an error says, short and printable; of PyTorch's, its reason."""
    _, _, told = str(error).rpartition("WeightsUnpickler error:")
    lines = told.strip().splitlines()
    line = (lines[0] if lines else type(error).__name__)[:200]
    return "".join(c if c.isprintable() else "?" for c in line)
