"""A file that is written whole or not at all, and what went wrong in one line."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a path beside `path` to write to; it takes the place of `path` if nothing is raised."""
    part = path.with_name(path.name + ".part")
    try:
        yield part
        os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def first_line(error: BaseException) -> str:
    """The first line of what an error says, short and printable; of PyTorch's, its reason."""
    _, _, told = str(error).rpartition("WeightsUnpickler error:")
    lines = told.strip().splitlines()
    line = (lines[0] if lines else type(error).__name__)[:200]
    return "".join(c if c.isprintable() else "?" for c in line)
