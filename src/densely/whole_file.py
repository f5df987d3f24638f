"""A file that is written whole or not at all: nobody ever sees half of one."""

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

#: Numbers of errors that are a disk's, which what writes to a file raises without its name.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a path beside `path` to write to; it takes the place of `path` if nothing is raised.

    It is a new file, of a name that nobody else has, and becomes one of the old file's mode, or as
    usual for new ones. A link stays one, and what it leads to is replaced.

    Raises:
        OSError: it cannot be written; `filename` is set, which a full disk leaves open.
    """
    target = Path(os.path.realpath(path)) if path.is_symlink() else path
    beside = None
    try:
        beside = _new_file(target)
        mode = (target if target.exists() else beside).stat().st_mode
        yield beside
        os.chmod(beside, stat.S_IMODE(mode))
        os.replace(beside, target)
    except OSError as error:
        if error.errno in DISK_ERRORS or error.filename == str(beside):
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        if beside is not None:
            with contextlib.suppress(OSError):
                beside.unlink()


def _new_file(target: Path) -> Path:
    """An empty file beside `target`, with its ending: some who write ask what it is."""
    while True:
        beside = target.with_name(f".densely-{secrets.token_hex(4)}{target.suffix}")
        try:
            os.close(os.open(beside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        except FileExistsError:
            continue
        except OSError as error:
            error.filename = str(target)
            raise
        return beside


def write_whole(path: Path, text: str) -> None:
    r"""Write a text file in UTF-8, its lines ending in \n on every system."""
    with whole_file(path) as beside:
        beside.write_text(text, encoding="utf-8", newline="")
