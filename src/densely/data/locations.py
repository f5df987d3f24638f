"""Where data is looked for: a folder given by the user, DENSELY_DATA, and the cache folder."""

import os
from collections.abc import Iterator
from pathlib import Path

from densely.errors import DataError

VARIABLE = "DENSELY_DATA"


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/densely`, by default `~/.cache/densely`; made when something is stored."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "densely"


def user_folders(data_dir: Path | None) -> Iterator[Path]:
    """Folders that the user named, in order: `data_dir`, then DENSELY_DATA.

    Raises:
        DataError: a folder was named that does not exist.
    """
    named = [("--data-dir", data_dir)]
    if value := os.environ.get(VARIABLE):
        named.append((VARIABLE, Path(value)))
    for origin, folder in named:
        if folder is None:
            continue
        if not folder.is_dir():
            raise DataError(f"{origin}: there is no folder {folder}")
        yield folder
