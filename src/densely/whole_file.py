"""A file that is written whole or not at all: nobody ever sees half of one."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

#: Numbers of errors that are a disk's, which what writes to a file raises without its name.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a path beside `path` to write to; it takes the place of `path` if nothing is raised.

    Raises:
        OSError: it cannot be written; `filename` is set, which a full disk leaves open.
    """
    beside = path.with_name(path.name + ".new")
    try:
        yield beside
        os.replace(beside, path)
    except OSError as error:
        if error.errno in DISK_ERRORS:
            error.filename = error.filename or str(path)
        raise
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()


def write_whole(path: Path, text: str) -> None:
    r"""Write a text file in UTF-8, its lines ending in \n on every system."""
    with whole_file(path) as beside:
        beside.write_text(text, encoding="utf-8", newline="")
