"""Where data is looked for: folders that the user names, by an option or DENSELY_DATA."""

import os
from collections.abc import Iterator
from pathlib import Path

from densely.errors import DataError

VARIABLE = "DENSELY_DATA"


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
